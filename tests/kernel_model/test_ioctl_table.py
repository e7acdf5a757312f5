"""kernel_model/ioctl.py: the table of each release, and the rules of sizes."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kernel_model.iommufd.ctx import table
from kernel_model.kernel import Kernel
from uapi import registry
from uapi.iommufd import IOMMU_HWPT_ALLOC, IOMMU_IOAS_ALLOC
from uapi.profile import profile

RELEASES = ["6.2", "6.6", "6.12", "7.3"]
IOMMUFD = [ioctl for name, ioctl in registry.ioctls().items() if name.startswith("IOMMU_")]


def refused(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


@pytest.mark.parametrize("release", RELEASES)
def test_ioctl_that_came_later_is_enotty(release: str) -> None:
    known = profile(release).ioctls
    with Kernel("bare", release) as kernel, kernel.open("/dev/iommu") as iommu:
        for ioctl in IOMMUFD:
            arg = bytearray(ioctl.size)  # its size word is 0: EINVAL from a call that is there
            with refused(errno.EINVAL if ioctl.name in known else errno.ENOTTY):
                iommu.ioctl(ioctl.number, arg)


@pytest.mark.parametrize("release", RELEASES)
def test_sizes_are_those_of_the_release(release: str) -> None:
    with Kernel("bare", release) as kernel, kernel.open("/dev/iommu") as iommu:
        for entry in table.flatten(release).values():
            below = bytearray((entry.min_size - 1).to_bytes(4, "little") + bytes(200))
            with refused(errno.EINVAL):
                iommu.ioctl(entry.number, below)
            beyond = bytearray((entry.size + 1).to_bytes(4, "little") + bytes(200))
            beyond[entry.size] = 1
            with refused(errno.E2BIG):
                iommu.ioctl(entry.number, beyond)


def test_member_that_came_later_is_e2big_before_and_read_after() -> None:
    """fault_id came to IOMMU_HWPT_ALLOC in 6.11."""
    for release, number in [("6.10", errno.E2BIG), ("7.3", errno.ENOENT)]:
        with Kernel("bare", release) as kernel, kernel.open("/dev/iommu") as iommu, refused(number):
            IOMMU_HWPT_ALLOC(iommu, dev_id=9, pt_id=9, fault_id=1)


def test_release_before_6_2_has_no_iommufd() -> None:
    with Kernel("bare", "6.1") as kernel, refused(errno.ENOENT):
        kernel.open("/dev/iommu")


def test_release_that_does_not_exist_is_a_value_error() -> None:
    for release in ("4.20", "99.1", "nonsense"):
        with pytest.raises(ValueError):  # noqa: PT011 - the words differ
            Kernel("bare", release)


def test_any_other_bit_of_the_number_is_enotty(kernel: Kernel) -> None:
    with kernel.open("/dev/iommu") as iommu:
        for bit in range(8, 32):
            with refused(errno.ENOTTY):
                iommu.ioctl(IOMMU_IOAS_ALLOC.number ^ 1 << bit, IOMMU_IOAS_ALLOC.make())


def test_size_word_is_read_before_the_number_is_known(kernel: Kernel) -> None:
    with kernel.open("/dev/iommu") as iommu:
        with refused(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number ^ 1 << 31, 8)
        with refused(errno.ENOTTY):  # below the range no size is looked at
            iommu.ioctl(0x3B7F, 8)


def test_every_handler_is_of_a_declared_ioctl() -> None:
    for name, (ioctl, _) in table.handlers.items():
        assert registry.ioctls(*registry.HEADERS, registry.TEST_HEADER)[name] is ioctl
