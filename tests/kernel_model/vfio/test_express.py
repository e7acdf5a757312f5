"""PCI Express functions through VFIO, on a machine from a file: the client's configuration space, DMA of a DSA."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.drivers.vfio import VfioDevice, iommu_group, take
from conformance.steps import ioas_alloc, map_user
from fakedev.endpoints import dsa
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_ATS_CTRL, PCI_PASID_CTRL, PCI_PASID_EXEC, PCI_PASID_PRIV, PCI_PRI_ALLOC_REQ, PCI_PRI_CTRL
from kernel_model import pci_ats
from kernel_model.errors import KernelBug, KernelError
from kernel_model.kernel import Kernel

MACHINE = """
[[iommu]]
kind = "vtd"

[[bridge]]
kind = "root-port"
address = "0000:00:01.0"
buses = [1]

[[bridge]]
kind = "pcie-to-pci"
address = "0000:00:02.0"
buses = [2]

[[device]]
kind = "dsa"
address = "0000:01:00.0"

[[device]]
kind = "edu"
address = "0000:02:04.0"

[[device]]
kind = "edu"
address = "0000:02:05.0"
"""
DSA = "0000:01:00.0"
CONFIG = 7 << 40
IOVA = 0x10000


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    path = tmp_path / "express.toml"
    path.write_text(MACHINE, encoding="utf-8")
    with Kernel(machine=str(path)) as kernel:
        yield kernel


@pytest.fixture
def device(kernel: Kernel) -> Iterator[VfioDevice]:
    with kernel.open("/dev/iommu") as iommu, VfioDevice(kernel, DSA) as device:
        device.bind(iommu)
        yield device


@pytest.fixture
def function(kernel: Kernel) -> PciFunction:
    return kernel.machine.function(DSA)


def word(device: VfioDevice, offset: int) -> int:
    return int(struct.unpack("<I", device.file.pread(4, CONFIG + offset))[0])


def store(device: VfioDevice, offset: int, value: int) -> None:
    device.file.pwrite(struct.pack("<H", value), CONFIG + offset)


def test_clients_see_ats_and_pri_but_no_pasids(device: VfioDevice) -> None:
    chain = []
    at = 0x100
    while at:
        header = word(device, at)
        chain.append((at, header & 0xFFFF))
        at = header >> 20
    assert chain == [(0x100, 0x0F), (0x110, 0x13)]


def test_clients_cannot_switch_the_services(device: VfioDevice, function: PciFunction) -> None:
    before = bytes(function.config[0x100:0x130])
    for offset in (0x100 + PCI_ATS_CTRL, 0x110 + PCI_PRI_CTRL):
        store(device, offset, 0xFFFF)
    assert bytes(function.config[0x100:0x130]) == before


def test_a_function_level_reset_by_the_client_is_done_and_reads_zero(device: VfioDevice, function: PciFunction) -> None:
    function.registers[0x88:0x8C] = b"\x07\0\0\0"  # type: ignore[attr-defined]
    store(device, 0x48, 0x8000)
    assert function.registers[0x88:0x8C] == bytes(4)  # type: ignore[attr-defined]
    assert word(device, 0x48) & 0x8000 == 0


def test_the_read_request_size_goes_through_and_the_payload_size_does_not(
    device: VfioDevice, function: PciFunction
) -> None:
    store(device, 0x48, 0x2040)
    assert word(device, 0x48) & 0xFFFF == 0x2040
    assert function.config_read(0x48, 2) == 0x2000


def test_services_that_the_kernel_switched_on_outlive_a_reset(device: VfioDevice, function: PciFunction) -> None:
    assert function.root is not None
    pci_ats.enable_pasid(function.root, function, 0)
    pci_ats.enable_pri(function, 1000)
    pci_ats.enable_ats(function, 12)
    device.reset()
    assert function.config_read(0x100 + PCI_ATS_CTRL, 2) == 0x8000
    assert function.config_read(0x110 + PCI_PRI_CTRL, 2) == 1
    assert function.config_read(0x110 + PCI_PRI_ALLOC_REQ, 4) == 64
    assert function.config_read(0x120 + PCI_PASID_CTRL, 2) == 1


def test_a_dsa_moves_a_clients_memory(kernel: Kernel, device: VfioDevice) -> None:
    with kernel.buffer(3 * 4096) as buffer:
        memory = buffer.view
        memory[:5] = b"moved"
        assert device.iommu is not None
        ioas = ioas_alloc(device.iommu)
        device.attach(ioas)
        map_user(device.iommu, ioas, buffer.address, 3 * 4096, IOVA)
        device.enable()
        mmio, portals = device.map_bar(0), device.map_bar(2)
        mmio.write(dsa.WQCFG, 4, 16)
        mmio.write(dsa.WQCFG + 8, 4, dsa.WQ_DEDICATED)
        mmio.write(dsa.WQCFG + 12, 4, 21)
        for command in (dsa.CMD_ENABLE_DEVICE, dsa.CMD_ENABLE_WQ):
            mmio.write(dsa.CMD, 4, command << 20)
            assert mmio.read(dsa.CMDSTS, 4) == 0
        flags = dsa.FLAG_CRAV | dsa.FLAG_RCR
        words = [flags << 32 | dsa.OP_MEMMOVE << 56, IOVA + 8192, IOVA, IOVA + 4096, 5, 0, 0, 0]
        for number, value in enumerate(words):
            portals.write(8 * number, 8, value)
        assert bytes(memory[4096:4101]) == b"moved"
        assert memory[8192] == dsa.COMP_SUCCESS


def test_behind_a_bridge_to_conventional_pci_dma_is_translated_by_the_bridges_id(kernel: Kernel) -> None:
    address = "0000:02:05.0"
    function = kernel.machine.function(address)
    assert function.dma.rid == 0x200
    with (
        kernel.buffer(4096) as buffer,
        kernel.open("/dev/iommu") as iommu,
        VfioDevice(kernel, "0000:02:04.0") as other,
        VfioDevice(kernel, address) as device,
    ):
        ioas = None
        for one in (other, device):
            one.bind(iommu)
            ioas = ioas_alloc(iommu) if ioas is None else ioas
            one.attach(ioas)
        map_user(iommu, ioas, buffer.address, 4096, IOVA)
        device.enable()
        function.dma.write(IOVA, b"alias")
        assert bytes(buffer.view[:5]) == b"alias"
        other.detach()
        function.dma.forget()
        assert function.dma.read(IOVA, 5) == b"alias"


def test_groups_follow_the_bridges(kernel: Kernel) -> None:
    groups = {function.address: iommu_group(kernel, function.address) for function in kernel.machine.functions}
    assert groups["0000:02:04.0"] == groups["0000:02:05.0"] == groups["0000:00:02.0"]
    assert len(set(groups.values())) == 3


def test_a_bridge_is_nothing_for_vfio_pci(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        take(kernel, "0000:00:01.0")


# -- drivers' calls --------------------------------------------------------------------------------------------------


def test_what_a_function_lacks_is_einval(kernel: Kernel) -> None:
    edu, root = kernel.machine.function("0000:02:04.0"), kernel.machine.root
    for call in (
        lambda: pci_ats.enable_ats(edu, 12),
        lambda: pci_ats.enable_pri(edu, 1),
        lambda: pci_ats.reset_pri(edu),
        lambda: pci_ats.enable_pasid(root, edu, 0),
        lambda: pci_ats.max_pasids(edu),
        lambda: pci_ats.pasid_features(edu),
    ):
        with pytest.raises(KernelError, match="has no"):
            call()
    assert not pci_ats.ats_supported(edu)
    assert not pci_ats.pri_supported(edu)
    assert not pci_ats.prg_resp_pasid_required(edu)


def test_the_capabilities_are_told_as_they_are(function: PciFunction) -> None:
    assert pci_ats.ats_supported(function)
    assert pci_ats.pri_supported(function)
    assert pci_ats.prg_resp_pasid_required(function)
    assert pci_ats.max_pasids(function) == 1 << 20
    assert pci_ats.pasid_features(function) == PCI_PASID_PRIV


def test_pasid_features_that_are_not_there_are_einval(kernel: Kernel, function: PciFunction) -> None:
    with pytest.raises(KernelError, match="no PASID features"):
        pci_ats.enable_pasid(kernel.machine.root, function, PCI_PASID_EXEC)


def test_pasids_need_a_way_up_that_turns_nothing_around(kernel: Kernel, function: PciFunction) -> None:
    kernel.machine.function("0000:00:01.0").config_write(0x106, 2, 0)
    with pytest.raises(KernelError, match="routed to peers"):
        pci_ats.enable_pasid(kernel.machine.root, function, 0)


def test_switching_on_twice_or_off_twice_is_a_bug(function: PciFunction) -> None:
    for on, off in (
        (lambda: pci_ats.enable_ats(function, 12), pci_ats.disable_ats),
        (lambda: pci_ats.enable_pri(function, 4), pci_ats.disable_pri),
        (lambda: pci_ats.enable_pasid(function.root, function, 0), pci_ats.disable_pasid),
    ):
        on()
        with pytest.raises(KernelBug):
            on()
        off(function)
        with pytest.raises(KernelBug):
            off(function)
