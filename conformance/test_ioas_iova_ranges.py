"""IOMMU_IOAS_IOVA_RANGES on an IOAS without a domain: one range, and all the ways to ask for it wrongly.

Mirrors iommufd_ioas_iova_ranges(). Ranges with holes need a device: test_ioas_reserved.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    allow_iovas,
    answer,
    fails,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_user,
    option_set,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_IOAS_IOVA_RANGES, IOMMU_OPTION_HUGE_PAGES, iommu_iova_range


def test_unknown_ioas_is_enoent(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=1)


def test_reserved_field_is_eopnotsupp(iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), __reserved=1)


def test_reserved_field_is_tested_before_the_id(iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=99, __reserved=1)


def test_too_small_an_array_is_emsgsize_with_the_reply_written(iommu: File) -> None:
    arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=ioas_alloc(iommu), num_iovas=0)
    with fails(errno.EMSGSIZE):
        IOMMU_IOAS_IOVA_RANGES.raw(iommu, arg)
    assert (arg.num_iovas, arg.out_iova_alignment) == (1, 1)


def test_array_without_room_is_not_looked_at(iommu: File) -> None:
    arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=ioas_alloc(iommu), num_iovas=0, allowed_iovas=8)
    with fails(errno.EMSGSIZE):
        IOMMU_IOAS_IOVA_RANGES.raw(iommu, arg)


@pytest.mark.parametrize("pointer", [0, 8, 0xFFFF_8000_0000_0000, U64_MAX], ids=["null", "low", "kernel", "last"])
def test_bad_array_is_efault_without_a_reply(iommu: File, pointer: int) -> None:
    arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=ioas_alloc(iommu), num_iovas=4, allowed_iovas=pointer)
    with fails(errno.EFAULT):
        IOMMU_IOAS_IOVA_RANGES.raw(iommu, arg)
    assert (arg.num_iovas, arg.out_iova_alignment) == (4, 0)


def test_read_only_array_is_efault(iommu: File) -> None:
    with arena(1) as memory:
        memory.read_only(0)
        with fails(errno.EFAULT):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), num_iovas=1, allowed_iovas=memory.page(0))


def test_array_that_ends_in_a_hole_is_efault(iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), num_iovas=1, allowed_iovas=memory.page(1) - 8)


def test_only_entries_that_are_there_are_written(iommu: File) -> None:
    """With room for a million ranges behind the page's end, one range that fits is fine."""
    with arena(2) as memory:
        memory.unmap(1)
        address = memory.page(1) - 16
        reply = IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), num_iovas=U32_MAX, allowed_iovas=address)
        assert reply.num_iovas == 1
        assert iommu_iova_range.from_buffer_copy(memory.read(address, 16)).last == U64_MAX


def test_entries_after_the_last_range_keep_their_bytes(iommu: File) -> None:
    with arena(1) as memory:
        memory.write(memory.address, b"\xa5" * 48)
        reply = IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), num_iovas=3, allowed_iovas=memory.address)
        assert reply.num_iovas == 1
        assert memory.read(memory.address, 48) == bytes(8) + b"\xff" * 8 + b"\xa5" * 32


def test_array_need_not_be_aligned(iommu: File) -> None:
    with arena(1) as memory:
        address = memory.page(0) + 3
        IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas_alloc(iommu), num_iovas=1, allowed_iovas=address)
        assert iommu_iova_range.from_buffer_copy(memory.read(address, 16)).last == U64_MAX


def test_reply_fault_is_efault_after_the_array_was_filled(iommu: File) -> None:
    with arena(2) as memory:
        arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=ioas_alloc(iommu), num_iovas=1, allowed_iovas=memory.page(1))
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_IOVA_RANGES.number, memory.page(0))
        assert iommu_iova_range.from_buffer_copy(memory.read(memory.page(1), 16)).last == U64_MAX


def test_areas_do_not_show_in_the_ranges(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, 16 * PAGE, iova=16 * PAGE)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


def test_allowed_list_does_not_show_in_the_ranges(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    allow_iovas(iommu, ioas, [(PAGE, 8 * PAGE - 1)])
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


def test_alignment_is_a_page_with_huge_pages_off(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    assert iova_alignment(iommu, ioas) == PAGE
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 1, ioas)
    assert iova_alignment(iommu, ioas) == 1


def test_alignment_is_written_even_with_emsgsize(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=ioas)
    assert answer(IOMMU_IOAS_IOVA_RANGES.raw, iommu, arg) == errno.EMSGSIZE
    assert arg.out_iova_alignment == PAGE
