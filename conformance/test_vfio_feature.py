"""DEVICE_FEATURE and IOEVENTFD of a vfio-pci device.

Sources: drivers/vfio/vfio_main.c (`vfio_ioctl_device_feature`), include/linux/vfio.h (`vfio_check_feature`),
pci/vfio_pci_core.c (low power, VF token), pci/vfio_pci_rdwr.c (`vfio_pci_ioeventfd`).
"""

from __future__ import annotations

import errno
import os
import struct

import pytest

from conformance.arena import arena
from conformance.drivers.edu import IDENT, REG_FACTORIAL, REG_ID, REG_LIVENESS
from conformance.drivers.vfio import CONFIG_REGION, PCI_COMMAND_MEMORY, REGION_SHIFT, VfioDevice
from conformance.steps import NOWHERE, answer, fails
from uapi.vfio import (
    VFIO_DEVICE_FEATURE,
    VFIO_DEVICE_FEATURE_DMA_BUF,
    VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET,
    VFIO_DEVICE_IOEVENTFD,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

GET, SET, PROBE = VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, VFIO_DEVICE_FEATURE_PROBE
ENTRY, EXIT = VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
WAKEUP = VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
BAD_FD = 0x7FFFFFFF


def feature(device: VfioDevice, flags: int, data: bytes = b"", argsz: int | None = None) -> int:
    size = 8 + len(data) if argsz is None else argsz
    return VFIO_DEVICE_FEATURE.raw(device.file, bytearray(struct.pack("<II", size, flags) + data))


# ---------------------------------------------------------------------------------------------------- common checks


def test_argument_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_FEATURE.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 7])
def test_argsz_below_8_is_einval(device: VfioDevice, argsz: int) -> None:
    with fails(errno.EINVAL):
        feature(device, EXIT | SET, argsz=argsz)


@pytest.mark.parametrize("flag", [1 << 19, 1 << 31])
def test_unknown_flag_is_einval(device: VfioDevice, flag: int) -> None:
    with fails(errno.EINVAL):
        feature(device, EXIT | SET | flag)


def test_get_and_set_together_are_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        feature(device, 0xFFFF | GET | SET)  # before the feature is looked up


@pytest.mark.parametrize("number", [14, 15, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("flags", [GET, SET, PROBE, 0], ids=["get", "set", "probe", "none"])
def test_unknown_feature_is_enotty(device: VfioDevice, number: int, flags: int) -> None:
    with fails(errno.ENOTTY):
        feature(device, number | flags)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (0, errno.ENOTTY),
        (1, errno.ENOTTY),
        (2, errno.ENOTTY),
        (6, errno.ENOTTY),
        (7, errno.ENOTTY),
        (8, errno.ENOTTY),
        (9, errno.ENOTTY),
        (10, errno.ENOTTY),
        pytest.param(12, errno.EINVAL, marks=pytest.mark.since("7.2")),
        (13, errno.ENOTTY),
    ],
    ids=[
        "PCI_VF_TOKEN",
        "MIGRATION",
        "MIG_DEVICE_STATE",
        "DMA_LOGGING_START",
        "DMA_LOGGING_STOP",
        "DMA_LOGGING_REPORT",
        "MIG_DATA_SIZE",
        "BUS_MASTER",
        "MIG_PRECOPY_INFOv2",
        "ZPCI_ERROR",
    ],
)
def test_feature_that_plain_vfio_pci_lacks(device: VfioDevice, number: int, error: int) -> None:
    for flags in (PROBE, PROBE | GET, PROBE | SET, GET, SET):
        with fails(error):
            feature(device, number | flags, bytes(32))


# ---------------------------------------------------------------------------------------------------------- low power


@pytest.mark.parametrize("number", [ENTRY, WAKEUP, EXIT], ids=["entry", "wakeup", "exit"])
def test_low_power_can_be_probed(device: VfioDevice, number: int) -> None:
    assert feature(device, number | PROBE) == 0
    assert feature(device, number | PROBE | SET) == 0


@pytest.mark.parametrize("number", [ENTRY, WAKEUP, EXIT], ids=["entry", "wakeup", "exit"])
def test_low_power_cannot_be_got(device: VfioDevice, number: int) -> None:
    for flags in (GET, PROBE | GET, PROBE | GET | SET):
        with fails(errno.EINVAL):
            feature(device, number | flags, bytes(8))


@pytest.mark.parametrize("number", [ENTRY, WAKEUP, EXIT], ids=["entry", "wakeup", "exit"])
def test_low_power_with_no_operation_is_einval(device: VfioDevice, number: int) -> None:
    with fails(errno.EINVAL):
        feature(device, number, bytes(8))


def test_low_power_exit_is_idempotent(device: VfioDevice) -> None:
    assert feature(device, EXIT | SET) == 0
    assert feature(device, EXIT | SET) == 0


def test_low_power_entry_twice_is_einval(device: VfioDevice) -> None:
    assert feature(device, ENTRY | SET) == 0
    with fails(errno.EINVAL):
        feature(device, ENTRY | SET)
    assert feature(device, EXIT | SET) == 0
    assert feature(device, ENTRY | SET) == 0


def test_low_power_leaves_calls_and_reads_working(device: VfioDevice) -> None:
    feature(device, ENTRY | SET)
    assert device.info().num_regions == 9
    assert device.read(0, REG_ID, 4) == IDENT
    assert device.config_read(0, 4) == 0x11E81234


def test_low_power_ends_with_the_binding(kernel: object, device: VfioDevice, iommu: object) -> None:
    feature(device, ENTRY | SET)
    device.close()
    with VfioDevice(kernel, device.address) as again:  # type: ignore[arg-type]
        again.bind(iommu)  # type: ignore[arg-type]
        assert feature(again, ENTRY | SET) == 0


def test_low_power_with_wakeup_needs_its_data(device: VfioDevice) -> None:
    for argsz in (8, 15):
        with fails(errno.EINVAL):
            feature(device, WAKEUP | SET, bytes(8), argsz=argsz)


def test_low_power_with_wakeup_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 8, struct.pack("<II", 16, WAKEUP | SET))
        with fails(errno.EFAULT):
            VFIO_DEVICE_FEATURE.raw(device.file, memory.page(1) - 8)


def test_low_power_with_wakeup_checks_its_eventfd(device: VfioDevice) -> None:
    plain = os.memfd_create("iommulab")
    for fd, error in ((-1, errno.EINVAL), (BAD_FD, errno.EBADF), (plain, errno.EINVAL)):
        with fails(error):
            feature(device, WAKEUP | SET, struct.pack("<iI", fd, 0))
    os.close(plain)


def test_low_power_with_wakeup_while_low_is_einval(device: VfioDevice, eventfd: int) -> None:
    feature(device, ENTRY | SET)
    with fails(errno.EINVAL):
        feature(device, WAKEUP | SET, struct.pack("<iI", eventfd, 0))
    with fails(errno.EBADF):  # the eventfd comes first
        feature(device, WAKEUP | SET, struct.pack("<iI", BAD_FD, 0))


def test_low_power_with_wakeup_enters(device: VfioDevice, eventfd: int) -> None:
    assert feature(device, WAKEUP | SET, struct.pack("<iI", eventfd, 0)) == 0
    assert feature(device, EXIT | SET) == 0


# ------------------------------------------------------------------------------------------------------------ dma-buf


@pytest.mark.since("6.19")
@pytest.mark.linux_only("the model is a kernel without CONFIG_VFIO_PCI_DMABUF")
class TestDmaBuf:
    """DMA_BUF's checks. A kernel without CONFIG_VFIO_PCI_DMABUF answers ENOTTY."""

    @pytest.fixture(autouse=True)
    def _offered(self, device: VfioDevice) -> None:
        if answer(feature, device, VFIO_DEVICE_FEATURE_DMA_BUF | PROBE) == errno.ENOTTY:
            pytest.skip("the kernel has no CONFIG_VFIO_PCI_DMABUF")

    @staticmethod
    def export(device: VfioDevice, region: int, *ranges: tuple[int, int], flags: int = 0) -> int:
        data = struct.pack("<IIII", region, os.O_CLOEXEC, flags, len(ranges))
        data += b"".join(struct.pack("<QQ", *one) for one in ranges)
        return feature(device, VFIO_DEVICE_FEATURE_DMA_BUF | GET, data)

    def test_set_is_einval(self, device: VfioDevice) -> None:
        with fails(errno.EINVAL):
            feature(device, VFIO_DEVICE_FEATURE_DMA_BUF | SET, bytes(32))

    def test_no_ranges_are_einval(self, device: VfioDevice) -> None:
        with fails(errno.EINVAL):
            self.export(device, 0)

    def test_flags_are_einval(self, device: VfioDevice) -> None:
        with fails(errno.EINVAL):
            self.export(device, 0, (0, 4096), flags=1)

    @pytest.mark.parametrize("region", [1, 6, 7])
    def test_region_that_is_no_bar_is_enodev(self, device: VfioDevice, region: int) -> None:
        with fails(errno.ENODEV):
            self.export(device, region, (0, 4096))

    @pytest.mark.parametrize("span", [(0, 0), (1, 4096), (0, 4095), (0, 2 << 20)])
    def test_bad_range_is_einval(self, device: VfioDevice, span: tuple[int, int]) -> None:
        with fails(errno.EINVAL):
            self.export(device, 0, span)

    def test_the_result_is_the_descriptor(self, device: VfioDevice) -> None:
        fd = self.export(device, 0, (0, 4096))
        assert "dmabuf" in os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------- IOEVENTFD


def ioeventfd(
    device: VfioDevice, flags: int, offset: int, data: int, fd: int, argsz: int = 32, region: int = 0
) -> None:
    block = struct.pack("<IIQQiI", argsz, flags, (region << REGION_SHIFT) + offset, data, fd, 0)
    VFIO_DEVICE_IOEVENTFD.raw(device.file, bytearray(block))


def test_ioeventfd_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_IOEVENTFD.raw(device.file, NOWHERE)


def test_ioeventfd_with_argsz_below_28_is_einval(device: VfioDevice, eventfd: int) -> None:
    with fails(errno.EINVAL):
        ioeventfd(device, 4, REG_LIVENESS, 0, eventfd, argsz=27)
    ioeventfd(device, 4, REG_LIVENESS, 0, eventfd, argsz=28)


@pytest.mark.parametrize("flags", [0, 3, 5, 15, 16, 20, 1 << 31])
def test_ioeventfd_size_must_be_exactly_one(device: VfioDevice, eventfd: int, flags: int) -> None:
    with fails(errno.EINVAL):
        ioeventfd(device, flags, REG_LIVENESS, 0, eventfd)


@pytest.mark.parametrize("fd", [-2, -0x80000000])
def test_ioeventfd_with_other_negative_descriptor_is_einval(device: VfioDevice, fd: int) -> None:
    with fails(errno.EINVAL):
        ioeventfd(device, 4, REG_LIVENESS, 0, fd)


@pytest.mark.parametrize("region", [1, 5, 6, CONFIG_REGION, 8, 9])
def test_ioeventfd_outside_a_bar_is_einval(device: VfioDevice, eventfd: int, region: int) -> None:
    with fails(errno.EINVAL):
        ioeventfd(device, 4, 0, 0, eventfd, region=region)


@pytest.mark.parametrize(("size", "offset"), [(4, 1 << 20), (8, (1 << 20) - 4), (1, 1 << 20), (2, (1 << 20) - 1)])
def test_ioeventfd_beyond_the_bar_is_einval(device: VfioDevice, eventfd: int, size: int, offset: int) -> None:
    with fails(errno.EINVAL):
        ioeventfd(device, size, offset, 0, eventfd)


def test_ioeventfd_twice_is_eexist_unless_it_differs(device: VfioDevice, eventfd: int) -> None:
    ioeventfd(device, 4, REG_LIVENESS, 1, eventfd)
    with fails(errno.EEXIST):
        ioeventfd(device, 4, REG_LIVENESS, 1, eventfd)
    with fails(errno.EEXIST):  # before the descriptor is looked at
        ioeventfd(device, 4, REG_LIVENESS, 1, BAD_FD)
    ioeventfd(device, 4, REG_LIVENESS, 2, eventfd)
    ioeventfd(device, 4, REG_FACTORIAL, 1, eventfd)
    ioeventfd(device, 8, 0x80, 1, eventfd)


def test_ioeventfd_is_removed_by_descriptor_minus_one(device: VfioDevice, eventfd: int) -> None:
    ioeventfd(device, 4, REG_LIVENESS, 1, eventfd)
    ioeventfd(device, 4, REG_LIVENESS, 1, -1)
    with fails(errno.ENODEV):
        ioeventfd(device, 4, REG_LIVENESS, 1, -1)
    ioeventfd(device, 4, REG_LIVENESS, 1, eventfd)


def test_ioeventfd_checks_its_eventfd(device: VfioDevice) -> None:
    plain = os.memfd_create("iommulab")
    for fd, error in ((BAD_FD, errno.EBADF), (plain, errno.EINVAL)):
        with fails(error):
            ioeventfd(device, 4, REG_LIVENESS, 1, fd)
    os.close(plain)
    with fails(errno.ENODEV):  # a failed one leaves nothing
        ioeventfd(device, 4, REG_LIVENESS, 1, -1)


def test_ioeventfd_writes_its_data_to_the_device(device: VfioDevice, eventfd: int) -> None:
    device.write(0, REG_LIVENESS, 4, 0)
    ioeventfd(device, 4, REG_LIVENESS, 0x12345678, eventfd)
    os.eventfd_write(eventfd, 1)
    assert device.read(0, REG_LIVENESS, 4) == ~0x12345678 & 0xFFFFFFFF


def test_ioeventfd_consumes_the_signal(device: VfioDevice, eventfd: int) -> None:
    ioeventfd(device, 4, REG_LIVENESS, 1, eventfd)
    os.eventfd_write(eventfd, 3)
    device.read(0, REG_LIVENESS, 4)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_ioeventfd_does_nothing_after_removal(device: VfioDevice, eventfd: int) -> None:
    device.write(0, REG_LIVENESS, 4, 0)
    ioeventfd(device, 4, REG_LIVENESS, 0x1111, eventfd)
    ioeventfd(device, 4, REG_LIVENESS, 0x1111, -1)
    os.eventfd_write(eventfd, 1)
    assert device.read(0, REG_LIVENESS, 4) == 0xFFFFFFFF
    assert os.eventfd_read(eventfd) == 1


def test_ioeventfd_does_nothing_while_memory_is_off(device: VfioDevice, eventfd: int) -> None:
    device.write(0, REG_LIVENESS, 4, 0)
    ioeventfd(device, 4, REG_LIVENESS, 0x1111, eventfd)
    device.disable(PCI_COMMAND_MEMORY)
    os.eventfd_write(eventfd, 1)
    device.enable(PCI_COMMAND_MEMORY)
    assert device.read(0, REG_LIVENESS, 4) == 0xFFFFFFFF


def test_ioeventfd_ends_with_the_binding(kernel: object, device: VfioDevice, iommu: object, eventfd: int) -> None:
    ioeventfd(device, 4, REG_LIVENESS, 0x1111, eventfd)
    device.close()
    with VfioDevice(kernel, device.address) as again:  # type: ignore[arg-type]
        again.bind(iommu)  # type: ignore[arg-type]
        with fails(errno.ENODEV):
            ioeventfd(again, 4, REG_LIVENESS, 0x1111, -1)


def test_ioeventfds_are_limited_to_1000(device: VfioDevice, eventfd: int) -> None:
    for data in range(1000):
        ioeventfd(device, 4, REG_LIVENESS, data, eventfd)
    with fails(errno.ENOSPC):
        ioeventfd(device, 4, REG_LIVENESS, 1000, eventfd)
    ioeventfd(device, 4, REG_LIVENESS, 7, -1)
    ioeventfd(device, 4, REG_LIVENESS, 1000, eventfd)
