"""GET_INFO, GET_REGION_INFO and GET_IRQ_INFO of a vfio-pci device.

Sources: drivers/vfio/pci/vfio_pci_core.c (`vfio_pci_ioctl_get_info`, `_get_region_info`, `_get_irq_info`),
vfio_main.c (`vfio_get_region_info`). The sizes are those of QEMU's edu: one 1 MiB 32-bit BAR, MSI, no reset.
"""

from __future__ import annotations

import errno
import struct

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import REGION_SHIFT, VfioDevice
from conformance.steps import NOWHERE, fails
from uapi.ioctl import Ioctl
from uapi.vfio import (
    VFIO_DEVICE_FLAGS_PCI,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_IRQ_INFO_AUTOMASKED,
    VFIO_IRQ_INFO_EVENTFD,
    VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE,
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
    VFIO_PCI_ROM_REGION_INDEX,
    VFIO_PCI_VGA_REGION_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

MINSZ = [(VFIO_DEVICE_GET_INFO, 16), (VFIO_DEVICE_GET_REGION_INFO, 32), (VFIO_DEVICE_GET_IRQ_INFO, 16)]
READ_WRITE = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE


def block(argsz: int, size: int, fill: int = 0, index: int = 0) -> bytearray:
    """An argument of `size` bytes: argsz, then `fill`, with `index` where REGION_INFO and IRQ_INFO look for it."""
    data = bytearray([fill]) * size
    struct.pack_into("<I", data, 0, argsz)
    if size >= 12:
        struct.pack_into("<I", data, 8, index)
    return data


@pytest.mark.parametrize(("ioctl", "minsz"), MINSZ, ids=lambda value: getattr(value, "name", str(value)))
def test_argsz_below_the_minimum_is_einval(device: VfioDevice, ioctl: Ioctl, minsz: int) -> None:
    for argsz in (0, minsz - 1):
        with fails(errno.EINVAL):
            ioctl.raw(device.file, block(argsz, 64))


@pytest.mark.parametrize(("ioctl", "minsz"), MINSZ, ids=lambda value: getattr(value, "name", str(value)))
def test_argument_that_cannot_be_read_is_efault(device: VfioDevice, ioctl: Ioctl, minsz: int) -> None:
    with fails(errno.EFAULT):
        ioctl.raw(device.file, NOWHERE)
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):  # one byte short of the minimum, whatever argsz would have said
            ioctl.raw(device.file, memory.page(1) - minsz + 1)


@pytest.mark.parametrize(("ioctl", "minsz"), MINSZ, ids=lambda value: getattr(value, "name", str(value)))
def test_reply_that_cannot_be_written_is_efault(device: VfioDevice, ioctl: Ioctl, minsz: int) -> None:
    with arena(1) as memory:
        memory.write(memory.address, bytes(block(minsz, minsz)))
        memory.read_only(0)
        with fails(errno.EFAULT):
            ioctl.raw(device.file, memory.address)


@pytest.mark.parametrize(("ioctl", "minsz"), MINSZ, ids=lambda value: getattr(value, "name", str(value)))
def test_minimum_is_enough_and_no_more_is_touched(device: VfioDevice, ioctl: Ioctl, minsz: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - minsz, bytes(block(minsz, minsz)))
        ioctl.raw(device.file, memory.page(1) - minsz)


@pytest.mark.parametrize(("ioctl", "minsz"), MINSZ, ids=lambda value: getattr(value, "name", str(value)))
def test_what_follows_the_struct_is_ignored_and_kept(device: VfioDevice, ioctl: Ioctl, minsz: int) -> None:
    data = block(64, 64, fill=0xA5)
    ioctl.raw(device.file, data)
    assert struct.unpack_from("<I", data) == (64,)
    assert data[ioctl.size :] == b"\xa5" * (64 - ioctl.size)


def test_get_info_of_edu(device: VfioDevice) -> None:
    info = device.info()
    assert (info.flags, info.num_regions, info.num_irqs, info.cap_offset) == (VFIO_DEVICE_FLAGS_PCI, 9, 5, 0)


def test_get_info_writes_argsz_bytes_up_to_the_struct(device: VfioDevice) -> None:
    for argsz, written in ((16, 16), (20, 20), (23, 23), (24, 24), (40, 24)):
        data = block(argsz, 40, fill=0xA5)
        VFIO_DEVICE_GET_INFO.raw(device.file, data)
        assert data[4:16] == struct.pack("<III", VFIO_DEVICE_FLAGS_PCI, 9, 5)
        assert data[16:written] == bytes(written - 16)
        assert data[written:] == b"\xa5" * (40 - written)


def test_bar0_is_a_mappable_megabyte(device: VfioDevice) -> None:
    info = device.region(VFIO_PCI_BAR0_REGION_INDEX)
    assert (info.size, info.offset) == (1 << 20, 0)
    assert info.flags == READ_WRITE | VFIO_REGION_INFO_FLAG_MMAP


@pytest.mark.parametrize("index", [1, 2, 3, 4, 5])
def test_missing_bar_has_an_offset_and_nothing_else(device: VfioDevice, index: int) -> None:
    info = device.region(index)
    assert (info.flags, info.size, info.offset) == (0, 0, index << REGION_SHIFT)


def test_missing_rom_has_an_offset_and_nothing_else(device: VfioDevice) -> None:
    info = device.region(VFIO_PCI_ROM_REGION_INDEX)
    assert (info.flags, info.size, info.offset) == (0, 0, VFIO_PCI_ROM_REGION_INDEX << REGION_SHIFT)


def test_config_region_is_as_long_as_the_config_space(device: VfioDevice) -> None:
    info = device.region(VFIO_PCI_CONFIG_REGION_INDEX)
    assert (info.flags, info.size) == (READ_WRITE, 256)
    assert info.offset == VFIO_PCI_CONFIG_REGION_INDEX << REGION_SHIFT


@pytest.mark.parametrize("index", [VFIO_PCI_VGA_REGION_INDEX, 9, 10, 0x80000000, 0xFFFFFFFF])
def test_region_that_does_not_exist_is_einval(device: VfioDevice, index: int) -> None:
    with fails(errno.EINVAL):
        device.region(index)


def test_region_info_overwrites_what_it_knows_and_keeps_cap_offset(device: VfioDevice) -> None:
    data = block(32, 32, fill=0xA5, index=1)
    VFIO_DEVICE_GET_REGION_INFO.raw(device.file, data)
    assert struct.unpack("<IIIIQQ", data) == (32, 0, 1, 0xA5A5A5A5, 0, 1 << REGION_SHIFT)


@pytest.mark.parametrize(
    ("index", "flags", "count"),
    [
        (VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED, 1),
        (VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, 1),
        (VFIO_PCI_MSIX_IRQ_INDEX, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, 0),
        pytest.param(
            VFIO_PCI_ERR_IRQ_INDEX, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, 1, marks=pytest.mark.since("7.3")
        ),
        (VFIO_PCI_REQ_IRQ_INDEX, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, 1),
    ],
    ids=["intx", "msi", "msix", "err", "req"],
)
def test_irq_info_of_edu(device: VfioDevice, index: int, flags: int, count: int) -> None:
    info = device.irq(index)
    assert (info.flags, info.count) == (flags, count)


@pytest.mark.parametrize("index", [5, 6, 0x80000000, 0xFFFFFFFF])
def test_irq_that_does_not_exist_is_einval(device: VfioDevice, index: int) -> None:
    with fails(errno.EINVAL):
        device.irq(index)


def test_irq_info_ignores_flags_and_count_of_the_caller(device: VfioDevice) -> None:
    data = bytearray(struct.pack("<IIII", 16, 0xFFFFFFFF, VFIO_PCI_MSI_IRQ_INDEX, 77))
    VFIO_DEVICE_GET_IRQ_INFO.raw(device.file, data)
    assert struct.unpack("<IIII", data) == (16, VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, 1, 1)
