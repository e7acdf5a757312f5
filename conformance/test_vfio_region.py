"""Regions of a vfio-pci device: config space as VFIO virtualises it, BARs by pread and pwrite, and mmap.

Sources: drivers/vfio/pci/vfio_pci_config.c, vfio_pci_rdwr.c, vfio_pci_core.c (`vfio_pci_rw`, `vfio_pci_core_mmap`).
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import struct
import time

import pytest

from conformance.drivers.edu import IDENT, REG_FACTORIAL, REG_ID, REG_LIVENESS, Edu, signals
from conformance.drivers.vfio import (
    CONFIG_REGION,
    PCI_COMMAND,
    PCI_COMMAND_MASTER,
    PCI_COMMAND_MEMORY,
    REGION_SHIFT,
    VfioDevice,
)
from conformance.steps import PAGE, fails
from uapi.backend import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, Mapping
from uapi.vfio import (
    VFIO_DEVICE_FEATURE,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_SET,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_ROM_REGION_INDEX,
    VFIO_PCI_VGA_REGION_INDEX,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

CONFIG = CONFIG_REGION << REGION_SHIFT
CONFIG_SIZE = 256
BAR_SIZE = 1 << 20
PCI_COMMAND_IO, PCI_COMMAND_INTX_DISABLE = 0x1, 0x400
PCI_STATUS, PCI_STATUS_CAP_LIST = 0x06, 0x10
PCI_CACHE_LINE_SIZE, PCI_BASE_ADDRESS_0, PCI_ROM_ADDRESS, PCI_CAPABILITY_LIST = 0x0C, 0x10, 0x30, 0x34
PCI_INTERRUPT_LINE, PCI_INTERRUPT_PIN = 0x3C, 0x3D
MSI_CAP = 0x40
MSI_FLAGS, MSI_ADDRESS_LO, MSI_ADDRESS_HI, MSI_DATA_64 = MSI_CAP + 2, MSI_CAP + 4, MSI_CAP + 8, MSI_CAP + 12
#: A dword of config space behind the last capability.
GAP = 0x80
#: MSI-enabled bit and multiple-message field of the flags.
MSI_ENABLE, MSI_QSIZE_7, MSI_64BIT = 0x1, 0x70, 0x80


# ------------------------------------------------------------------------------------------------- config: the access


def test_config_ids(device: VfioDevice) -> None:
    assert device.config_read(0, 2) == 0x1234
    assert device.config_read(2, 2) == 0x11E8
    assert device.config_read(0, 4) == 0x11E81234


def test_config_can_be_read_whole(device: VfioDevice) -> None:
    data = device.file.pread(CONFIG_SIZE, CONFIG)
    assert len(data) == CONFIG_SIZE
    assert data[:4] == b"\x34\x12\xe8\x11"


@pytest.mark.parametrize(("offset", "count"), [(1, 4), (2, 4), (3, 2), (1, 1), (3, 5), (7, 9)])
def test_config_takes_any_alignment(device: VfioDevice, offset: int, count: int) -> None:
    whole = device.file.pread(CONFIG_SIZE, CONFIG)
    assert device.file.pread(count, CONFIG + offset) == whole[offset : offset + count]


def test_empty_config_read_returns_nothing(device: VfioDevice) -> None:
    assert device.file.pread(0, CONFIG) == b""
    assert device.file.pread(0, CONFIG + CONFIG_SIZE) == b""


def test_empty_write_succeeds_anywhere(device: VfioDevice) -> None:
    assert device.file.pwrite(b"", CONFIG + 0x1000) == 0
    assert device.file.pwrite(b"", 77 << REGION_SHIFT) == 0


@pytest.mark.parametrize(("offset", "count"), [(256, 1), (252, 8), (255, 2), (0, 257), (4096, 4), (1 << 39, 4)])
def test_config_read_beyond_the_end_is_efault(device: VfioDevice, offset: int, count: int) -> None:
    with fails(errno.EFAULT):
        device.file.pread(count, CONFIG + offset)


@pytest.mark.parametrize(("offset", "count"), [(256, 1), (252, 8), (255, 2)])
def test_config_write_beyond_the_end_is_efault(device: VfioDevice, offset: int, count: int) -> None:
    with fails(errno.EFAULT):
        device.file.pwrite(bytes(count), CONFIG + offset)


@pytest.mark.parametrize("index", [9, 10, 100, (1 << 23) - 1])
def test_region_beyond_the_last_is_einval(device: VfioDevice, index: int) -> None:
    with fails(errno.EINVAL):
        device.file.pread(4, index << REGION_SHIFT)
    with fails(errno.EINVAL):
        device.file.pwrite(bytes(4), index << REGION_SHIFT)


def test_vga_region_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.file.pread(4, VFIO_PCI_VGA_REGION_INDEX << REGION_SHIFT)


# ------------------------------------------------------------------------------------------- config: virtual registers


def test_bus_master_is_off_after_bind(device: VfioDevice) -> None:
    assert device.config_read(PCI_COMMAND, 2) & PCI_COMMAND_MASTER == 0


def test_memory_is_on_after_bind(device: VfioDevice) -> None:
    assert device.config_read(PCI_COMMAND, 2) & PCI_COMMAND_MEMORY


def test_command_bits_can_be_set_and_cleared(device: VfioDevice) -> None:
    device.enable()
    both = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
    assert device.config_read(PCI_COMMAND, 2) & both == both
    device.disable(both)
    assert device.config_read(PCI_COMMAND, 2) & both == 0


def test_command_does_not_outlive_the_binding(kernel: object, device: VfioDevice, iommu: object) -> None:
    device.enable()
    device.close()
    with VfioDevice(kernel, device.address) as again:  # type: ignore[arg-type]
        again.bind(iommu)  # type: ignore[arg-type]
        command = again.config_read(PCI_COMMAND, 2)
        assert command & (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER) == PCI_COMMAND_MEMORY


def test_intx_disable_reads_back(device: VfioDevice) -> None:
    assert device.config_read(PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE == 0
    device.enable(PCI_COMMAND_INTX_DISABLE)
    assert device.config_read(PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE
    device.disable(PCI_COMMAND_INTX_DISABLE)
    assert device.config_read(PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE == 0


def test_command_can_be_written_by_bytes(device: VfioDevice) -> None:
    device.config_write(PCI_COMMAND, 1, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
    device.config_write(PCI_COMMAND + 1, 1, PCI_COMMAND_INTX_DISABLE >> 8)
    expected = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE
    assert device.config_read(PCI_COMMAND, 2) & expected == expected


@pytest.mark.parametrize("offset", [0, 8, 0x2C], ids=["ids", "class", "subsystem"])
def test_identity_cannot_be_written(device: VfioDevice, offset: int) -> None:
    before = device.config_read(offset, 4)
    device.config_write(offset, 4, ~before & 0xFFFFFFFF)
    assert device.config_read(offset, 4) == before


def test_status_cannot_be_written(device: VfioDevice) -> None:
    before = device.config_read(PCI_STATUS, 2)
    device.config_write(PCI_STATUS, 2, 0xFFFF)
    assert device.config_read(PCI_STATUS, 2) == before


def test_cache_line_size_can_be_written(device: VfioDevice) -> None:
    before = device.config_read(PCI_CACHE_LINE_SIZE, 1)
    device.config_write(PCI_CACHE_LINE_SIZE, 1, 0x55)
    assert device.config_read(PCI_CACHE_LINE_SIZE, 1) == 0x55
    device.config_write(PCI_CACHE_LINE_SIZE, 1, before)


def test_interrupt_line_is_the_users_own(device: VfioDevice) -> None:
    device.config_write(PCI_INTERRUPT_LINE, 1, 0x99)
    assert device.config_read(PCI_INTERRUPT_LINE, 1) == 0x99


def test_interrupt_line_does_not_outlive_the_binding(kernel: object, device: VfioDevice, iommu: object) -> None:
    before = device.config_read(PCI_INTERRUPT_LINE, 1)
    device.config_write(PCI_INTERRUPT_LINE, 1, before ^ 0xFF)
    device.close()
    with VfioDevice(kernel, device.address) as again:  # type: ignore[arg-type]
        again.bind(iommu)  # type: ignore[arg-type]
        assert again.config_read(PCI_INTERRUPT_LINE, 1) == before


def test_interrupt_pin_is_a_and_cannot_be_written(device: VfioDevice) -> None:
    device.config_write(PCI_INTERRUPT_PIN, 1, 3)
    assert device.config_read(PCI_INTERRUPT_PIN, 1) == 1


def test_bar_probe_gives_the_size_mask(device: VfioDevice) -> None:
    before = device.config_read(PCI_BASE_ADDRESS_0, 4)
    device.config_write(PCI_BASE_ADDRESS_0, 4, 0xFFFFFFFF)
    assert device.config_read(PCI_BASE_ADDRESS_0, 4) == ~(BAR_SIZE - 1) & 0xFFFFFFFF
    device.config_write(PCI_BASE_ADDRESS_0, 4, before)
    assert device.config_read(PCI_BASE_ADDRESS_0, 4) == before


def test_bar_is_virtual(device: VfioDevice) -> None:
    device.config_write(PCI_BASE_ADDRESS_0, 4, 0x12345678)
    assert device.config_read(PCI_BASE_ADDRESS_0, 4) == 0x12300000
    assert device.read(0, REG_ID, 4) == IDENT  # the device has not moved


def test_bar_can_be_written_by_bytes(device: VfioDevice) -> None:
    device.config_write(PCI_BASE_ADDRESS_0, 4, 0)
    device.config_write(PCI_BASE_ADDRESS_0 + 3, 1, 0xAB)
    device.config_write(PCI_BASE_ADDRESS_0 + 2, 1, 0xFF)
    assert device.config_read(PCI_BASE_ADDRESS_0, 4) == 0xABF00000


@pytest.mark.parametrize("bar", [1, 2, 3, 4, 5])
def test_missing_bar_reads_zero(device: VfioDevice, bar: int) -> None:
    device.config_write(PCI_BASE_ADDRESS_0 + 4 * bar, 4, 0xFFFFFFFF)
    assert device.config_read(PCI_BASE_ADDRESS_0 + 4 * bar, 4) == 0


def test_missing_rom_reads_zero(device: VfioDevice) -> None:
    device.config_write(PCI_ROM_ADDRESS, 4, 0xFFFFFFFF)
    assert device.config_read(PCI_ROM_ADDRESS, 4) == 0


def test_capability_list_is_msi_alone(device: VfioDevice) -> None:
    assert device.config_read(PCI_STATUS, 2) & PCI_STATUS_CAP_LIST
    assert device.config_read(PCI_CAPABILITY_LIST, 1) == MSI_CAP
    assert device.config_read(MSI_CAP, 2) == 0x0005  # MSI, last


def test_capability_chain_cannot_be_written(device: VfioDevice) -> None:
    device.config_write(PCI_CAPABILITY_LIST, 1, 0x50)
    device.config_write(MSI_CAP, 2, 0x5011)
    assert device.config_read(PCI_CAPABILITY_LIST, 1) == MSI_CAP
    assert device.config_read(MSI_CAP, 2) == 0x0005


def test_msi_flags_say_one_vector_of_64_bits(device: VfioDevice) -> None:
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT


def test_msi_cannot_be_enabled_through_config_space(device: VfioDevice) -> None:
    device.config_write(MSI_FLAGS, 2, MSI_64BIT | MSI_ENABLE)
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT


def test_msi_enable_bit_is_the_users_while_the_kernel_has_msi_on(device: VfioDevice, ioas: int) -> None:
    device.attach(ioas)  # or there is no doorbell, on Arm
    device.signal_on(VFIO_PCI_MSI_IRQ_INDEX, [-1])
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT
    device.config_write(MSI_FLAGS, 2, MSI_64BIT | MSI_ENABLE)
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT | MSI_ENABLE
    device.config_write(MSI_FLAGS, 2, MSI_64BIT)
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT


def test_msi_vector_count_is_limited(device: VfioDevice) -> None:
    device.config_write(MSI_FLAGS, 2, MSI_64BIT | MSI_QSIZE_7)
    assert device.config_read(MSI_FLAGS, 2) == MSI_64BIT


def test_msi_address_and_data_are_virtual(edu: Edu) -> None:
    device = edu.vfio
    eventfd = edu.enable_msi()
    device.config_write(MSI_ADDRESS_LO, 4, 0xDEAD0000)
    device.config_write(MSI_ADDRESS_HI, 4, 0x12345678)
    device.config_write(MSI_DATA_64, 2, 0xBEEF)
    assert device.config_read(MSI_ADDRESS_LO, 4) == 0xDEAD0000
    assert device.config_read(MSI_ADDRESS_HI, 4) == 0x12345678
    assert device.config_read(MSI_DATA_64, 2) == 0xBEEF
    edu.raise_irq(1)
    assert signals(eventfd) == 1  # the real message still goes to the kernel
    edu.acknowledge(1)


def test_gap_between_capabilities_goes_to_the_device(device: VfioDevice) -> None:
    before = device.config_read(GAP, 4)
    device.config_write(GAP, 4, 0x12345678)
    assert device.config_read(GAP, 4) == 0x12345678
    assert device.config_read(GAP + 1, 1) == 0x56
    device.config_write(GAP, 4, before)


# ------------------------------------------------------------------------------------------------------- BARs by pread


def test_bar_registers_by_pread_and_pwrite(device: VfioDevice) -> None:
    assert device.read(0, REG_ID, 4) == IDENT
    device.write(0, REG_LIVENESS, 4, 0x12345678)
    assert device.read(0, REG_LIVENESS, 4) == ~0x12345678 & 0xFFFFFFFF


@pytest.mark.needs("narrow_loads")
def test_bar_access_is_as_wide_as_its_alignment_allows(device: VfioDevice) -> None:
    # edu's registers below 0x80 answer 4-byte loads only: narrower ones read 0, an 8-byte one reads all ones.
    assert device.file.pread(4, REG_ID) == struct.pack("<I", IDENT)
    assert device.file.pread(2, REG_ID) == bytes(2)
    assert device.file.pread(1, REG_ID) == bytes(1)
    assert device.file.pread(6, REG_ID) == struct.pack("<I", IDENT) + bytes(2)
    assert device.file.pread(4, REG_ID + 2) == bytes(4)


@pytest.mark.since("6.10")
def test_bar_access_of_8_bytes_is_one(device: VfioDevice) -> None:
    assert device.file.pread(8, REG_ID) == b"\xff" * 8
    # At 4 mod 8 it is two of four bytes.
    device.write(0, REG_LIVENESS, 4, 0)
    device.write(0, REG_FACTORIAL, 4, 0)
    time.sleep(0.1)  # 0! is computed by a thread of QEMU's
    assert device.file.pread(8, REG_LIVENESS) == b"\xff" * 4 + device.file.pread(4, REG_FACTORIAL)


def test_empty_bar_read_returns_nothing(device: VfioDevice) -> None:
    assert device.file.pread(0, 0) == b""


@pytest.mark.parametrize("offset", [BAR_SIZE, BAR_SIZE + 4, (1 << 40) - 4])
def test_bar_access_beyond_the_end_is_einval(device: VfioDevice, offset: int) -> None:
    with fails(errno.EINVAL):
        device.file.pread(4, offset)
    with fails(errno.EINVAL):
        device.file.pwrite(bytes(4), offset)


def test_bar_access_across_the_end_is_cut(device: VfioDevice) -> None:
    assert len(device.file.pread(16, BAR_SIZE - 4)) == 4
    assert device.file.pwrite(bytes(16), BAR_SIZE - 4) == 4


@pytest.mark.parametrize("bar", [1, 2, 3, 4, 5])
def test_access_to_a_missing_bar_is_einval(device: VfioDevice, bar: int) -> None:
    with fails(errno.EINVAL):
        device.read(bar, 0, 4)
    with fails(errno.EINVAL):
        device.write(bar, 0, 4, 0)


def test_access_to_a_missing_rom_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.read(VFIO_PCI_ROM_REGION_INDEX, 0, 4)
    with fails(errno.EINVAL):
        device.write(VFIO_PCI_ROM_REGION_INDEX, 0, 4, 0)


def test_bar_access_while_memory_is_off_is_eio(device: VfioDevice) -> None:
    device.disable(PCI_COMMAND_MEMORY)
    with fails(errno.EIO):
        device.read(0, REG_ID, 4)
    with fails(errno.EIO):
        device.write(0, REG_LIVENESS, 4, 0)
    device.enable(PCI_COMMAND_MEMORY)
    assert device.read(0, REG_ID, 4) == IDENT


def test_bar_access_beyond_the_end_is_einval_even_while_memory_is_off(device: VfioDevice) -> None:
    device.disable(PCI_COMMAND_MEMORY)
    with fails(errno.EINVAL):
        device.read(0, BAR_SIZE, 4)
    assert device.file.pread(0, 0) == b""


# ---------------------------------------------------------------------------------------------------------------- mmap


def test_mapping_reaches_the_device(device: VfioDevice) -> None:
    with device.file.mmap(BAR_SIZE, 0) as bar:
        assert bar.length == BAR_SIZE
        assert bar.read(REG_ID, 4) == IDENT
        bar.write(REG_LIVENESS, 4, 0x0F0F0F0F)
        assert bar.read(REG_LIVENESS, 4) == 0xF0F0F0F0
        assert device.read(0, REG_LIVENESS, 4) == 0xF0F0F0F0


def test_two_mappings_are_one_device(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, 0) as first, device.file.mmap(BAR_SIZE, 0) as second:
        first.write(REG_LIVENESS, 4, 5)
        assert second.read(REG_LIVENESS, 4) == ~5 & 0xFFFFFFFF


def test_mapping_of_a_part(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, BAR_SIZE - PAGE) as last:
        assert last.read(0, 4) == 0xFFFFFFFF  # edu has no register there


def test_mapping_for_reading_only(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, 0, PROT_READ) as bar:
        assert bar.read(REG_ID, 4) == IDENT


def test_mapping_length_is_rounded_up_to_pages(device: VfioDevice) -> None:
    with device.file.mmap(5, 0) as bar:
        assert bar.length == PAGE


@pytest.mark.parametrize(("length", "offset"), [(BAR_SIZE + 1, 0), (2 * PAGE, BAR_SIZE - PAGE), (PAGE, BAR_SIZE)])
def test_mapping_beyond_the_bar_is_einval(device: VfioDevice, length: int, offset: int) -> None:
    with fails(errno.EINVAL):
        device.file.mmap(length, offset)


def test_private_mapping_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.file.mmap(PAGE, 0, PROT_READ | PROT_WRITE, MAP_PRIVATE)


@pytest.mark.parametrize("index", [1, 5, VFIO_PCI_ROM_REGION_INDEX, CONFIG_REGION, VFIO_PCI_VGA_REGION_INDEX, 9, 1000])
def test_mapping_of_another_region_is_einval(device: VfioDevice, index: int) -> None:
    with fails(errno.EINVAL):
        device.file.mmap(PAGE, index << REGION_SHIFT, PROT_READ, MAP_SHARED)


def test_mapping_can_be_made_while_memory_is_off_and_works_once_it_is_on(device: VfioDevice) -> None:
    device.disable(PCI_COMMAND_MEMORY)
    with device.file.mmap(PAGE, 0) as bar:
        device.enable(PCI_COMMAND_MEMORY)
        assert bar.read(REG_ID, 4) == IDENT
        device.disable(PCI_COMMAND_MEMORY)
        device.enable(PCI_COMMAND_MEMORY)
        assert bar.read(REG_ID, 4) == IDENT


def signal_of_touching(bar: Mapping) -> int:
    """The signal that kills a child which loads from a mapping, 0 if none does."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        bar.read(REG_ID, 4)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.linux_only("the model has no SIGBUS to send")
def test_touching_a_mapping_while_memory_is_off_is_sigbus(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, 0) as bar:
        assert signal_of_touching(bar) == 0
        device.disable(PCI_COMMAND_MEMORY)
        assert signal_of_touching(bar) == signal.SIGBUS
        device.enable(PCI_COMMAND_MEMORY)
        assert bar.read(REG_ID, 4) == IDENT


@pytest.mark.linux_only("the model has no SIGBUS to send")
def test_touching_a_mapping_in_low_power_is_sigbus(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, 0) as bar:
        VFIO_DEVICE_FEATURE.raw(
            device.file, bytearray(struct.pack("<II", 8, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY))
        )
        assert signal_of_touching(bar) == signal.SIGBUS
        assert device.read(0, REG_ID, 4) == IDENT
        VFIO_DEVICE_FEATURE.raw(
            device.file, bytearray(struct.pack("<II", 8, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_EXIT))
        )
        assert bar.read(REG_ID, 4) == IDENT


def test_raw_store_reaches_the_device_by_the_next_call(device: VfioDevice) -> None:
    with device.file.mmap(PAGE, 0) as bar:
        bar.view.cast("I")[REG_LIVENESS // 4] = 0x00FF00FF
        assert device.read(0, REG_LIVENESS, 4) == 0xFF00FF00
