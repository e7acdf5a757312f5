"""Steps for dirty tracking on the mock driver, and the plain computation of what a bitmap must say.

A set of dirty things is a Python int, bit 0 for the first. Nothing is checked here: an errno reaches the test as
OSError.
"""

from __future__ import annotations

import ctypes

from conformance.arena import Arena
from conformance.mock import run
from conformance.steps import PAGE
from uapi import iommufd_test as abi
from uapi.backend import File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
)

_BITS = Arena(16)


def tracked_hwpt(iommu: File, device: int, ioas: int, huge: bool = False, on: bool = True, flags: int = 0) -> int:
    """A mock HWPT with dirty tracking, of the table type HUGE if asked for (since 6.19), switched on; its id."""
    flags |= IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    fields: dict[str, int] = {}
    data = abi.iommu_hwpt_selftest(pagetable_type=abi.MOCK_IOMMUPT_HUGE)
    if huge:
        fields = {"data_type": abi.IOMMU_HWPT_DATA_SELFTEST, "data_len": len(bytes(data))}
        fields["data_uptr"] = ctypes.addressof(data)
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=device, pt_id=ioas, flags=flags, **fields).out_hwpt_id
    if on:
        set_tracking(iommu, hwpt)
    return hwpt


def set_tracking(iommu: File, hwpt: int, on: bool = True) -> None:
    """HWPT_SET_DIRTY_TRACKING."""
    flags = IOMMU_HWPT_DIRTY_TRACKING_ENABLE if on else 0
    IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=hwpt, flags=flags)


def make_dirty(iommu: File, hwpt: int, iova: int, bits: int, count: int, page: int | None = None) -> int:
    """DIRTY: a device writes to the page at iova + i * `page` for each bit i; how many the kernel counted.

    Without a `page` they are of 4 KiB and the device writes to both halves: before 6.19 DIRTY understood pages of 2 KiB
    only, and those were the leaves.
    """
    halves = 2 if page is None else 1
    data = spread(bits, halves).to_bytes((count * halves + 7) // 8, "little")
    assert len(data) <= 16 * PAGE
    _BITS.write(_BITS.address, data)
    step = page or PAGE // halves
    return dirty_at(iommu, hwpt, iova, count * halves * step, step, _BITS.address) // halves


def dirty_at(iommu: File, hwpt: int, iova: int, length: int, page_size: int, uptr: int) -> int:
    """DIRTY with the bits at an address."""
    op = abi.IOMMU_TEST_OP_DIRTY
    reply = run(iommu, op, hwpt, "dirty", iova=iova, length=length, page_size=page_size, uptr=uptr)
    return int(reply.dirty.out_nr_dirty)


def get_dirty(iommu: File, hwpt: int, iova: int, length: int, page: int = PAGE, clear: bool = True) -> int:
    """HWPT_GET_DIRTY_BITMAP into fresh memory; the bits."""
    size = ((length - 1) // page // 8 + 8) & ~7
    assert size <= 16 * PAGE
    _BITS.write(_BITS.address, bytes(size))
    dirty_to(iommu, hwpt, iova, length, page, _BITS.address, clear)
    return int.from_bytes(_BITS.read(_BITS.address, size), "little")


def dirty_to(iommu: File, hwpt: int, iova: int, length: int, page_size: int, data: int, clear: bool = True) -> None:
    """HWPT_GET_DIRTY_BITMAP to an address."""
    flags = 0 if clear else IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    IOMMU_HWPT_GET_DIRTY_BITMAP(
        iommu, hwpt_id=hwpt, flags=flags, iova=iova, length=length, page_size=page_size, data=data
    )


def spread(bits: int, ratio: int) -> int:
    """Each bit as `ratio` equal ones: what a bitmap of smaller pages says."""
    return sum(((1 << ratio) - 1) << (index * ratio) for index in range(bits.bit_length()) if bits >> index & 1)


def grouped(bits: int, ratio: int) -> int:
    """Whether any of each `ratio` bits is set: what a bitmap of larger pages says."""
    return sum({1 << (index // ratio) for index in range(bits.bit_length()) if bits >> index & 1})


def leaf_sizes(iommu: File, hwpt: int, iova: int, length: int, step: int = 2048) -> list[int]:
    """How large the leaves of the table are, found by dirtying one `step` after the other."""
    sizes, position = [], 0
    while position < length:
        make_dirty(iommu, hwpt, iova + position, 1, 1, step)
        bits = get_dirty(iommu, hwpt, iova, length, step)
        run_length = (bits >> (position // step)).bit_count()
        assert bits == ((1 << run_length) - 1) << (position // step), "one leaf, from here on"
        sizes.append(run_length * step)
        position += run_length * step
    return sizes
