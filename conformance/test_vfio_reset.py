"""RESET and the hot reset of a vfio-pci device.

edu on the root bus can be reset in no way: it has neither FLR nor a power state, and the root bus has no reset. So
what is checked here is how the calls say so, and in which order they look at their arguments.

Sources: drivers/vfio/pci/vfio_pci_core.c (`vfio_pci_ioctl_reset`, `..._get_pci_hot_reset_info`, `..._pci_hot_reset`).
"""

from __future__ import annotations

import errno
import struct

import pytest

from conformance.drivers.edu import REG_LIVENESS
from conformance.drivers.vfio import VfioDevice
from conformance.steps import NOWHERE, fails
from uapi.vfio import (
    VFIO_DEVICE_FLAGS_RESET,
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_DEVICE_PCI_HOT_RESET,
    VFIO_DEVICE_RESET,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")


def test_device_without_a_reset_does_not_offer_one(device: VfioDevice) -> None:
    assert device.info().flags & VFIO_DEVICE_FLAGS_RESET == 0


def test_reset_of_a_device_without_one_is_einval(device: VfioDevice) -> None:
    device.write(0, REG_LIVENESS, 4, 0x600D)
    with fails(errno.EINVAL):
        device.reset()
    assert device.read(0, REG_LIVENESS, 4) == ~0x600D & 0xFFFFFFFF


def test_reset_does_not_look_at_its_argument(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_RESET.raw(device.file, NOWHERE)


def test_hot_reset_info_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 11])
def test_hot_reset_info_with_argsz_below_12_is_einval(device: VfioDevice, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.raw(device.file, bytearray(struct.pack("<III", argsz, 0, 0)))


@pytest.mark.parametrize("argsz", [12, 256])
def test_hot_reset_info_on_the_root_bus_is_enodev(device: VfioDevice, argsz: int) -> None:
    block = bytearray(struct.pack("<III", argsz, 0xFFFFFFFF, 77)) + bytes(244)
    with fails(errno.ENODEV):
        VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.raw(device.file, block)
    assert struct.unpack_from("<III", block) == (argsz, 0xFFFFFFFF, 77)


def test_hot_reset_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_PCI_HOT_RESET.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 11])
def test_hot_reset_with_argsz_below_12_is_einval(device: VfioDevice, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_PCI_HOT_RESET.raw(device.file, bytearray(struct.pack("<III", argsz, 0, 0)))


def test_hot_reset_with_a_flag_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_PCI_HOT_RESET.raw(device.file, bytearray(struct.pack("<III", 12, 1, 0)))


def test_hot_reset_with_groups_is_einval_for_a_device_of_the_cdev_kind(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_PCI_HOT_RESET.raw(device.file, bytearray(struct.pack("<IIIi", 16, 0, 1, -1)))


def test_hot_reset_on_the_root_bus_is_enodev(device: VfioDevice) -> None:
    with fails(errno.ENODEV):
        VFIO_DEVICE_PCI_HOT_RESET.raw(device.file, bytearray(struct.pack("<III", 12, 0, 0)))
