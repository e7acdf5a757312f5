"""IOMMU_IOAS_UNMAP on an IOAS without a domain: whole areas only, in ascending order, and what an error leaves.

Mirrors iommufd_ioas_unmap(), iopt_unmap_iova_range() and iopt_unmap_all().
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U64_MAX,
    fails,
    ioas_alloc,
    map_user,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_IOAS_UNMAP, IOMMU_OPTION_HUGE_PAGES

TOP = U64_MAX - PAGE + 1


@pytest.fixture
def ioas(iommu: File) -> int:
    """Three areas of 2, 1 and 4 pages at 0x10000, 0x20000 and 0x21000 (the last two adjacent)."""
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, 2 * PAGE, iova=0x10000)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x20000)
    map_user(iommu, ioas, NOWHERE, 4 * PAGE, iova=0x21000)
    return ioas


@pytest.mark.parametrize("object_id", [0, 2, 99])
def test_unknown_ioas_is_enoent(iommu: File, ioas: int, object_id: int) -> None:
    with fails(errno.ENOENT):
        unmap(iommu, object_id, 0x10000, PAGE)


@pytest.mark.parametrize(("iova", "length"), [(0, U64_MAX), (U64_MAX, U64_MAX), (0, 0)])
def test_unknown_ioas_is_tested_first(iommu: File, iova: int, length: int) -> None:
    with fails(errno.ENOENT):
        unmap(iommu, 99, iova, length)


@pytest.mark.parametrize(
    ("iova", "length", "number"),
    [
        (1, U64_MAX, errno.EOVERFLOW),
        (U64_MAX, U64_MAX, errno.EOVERFLOW),
        (U64_MAX, 1, errno.EOVERFLOW),
        (U64_MAX, 0, errno.EOVERFLOW),
        (0, 0, errno.EINVAL),
        (0x10000, 0, errno.EINVAL),
        (TOP, PAGE + 1, errno.EOVERFLOW),
        (0x10000, U64_MAX - 1, errno.EOVERFLOW),
        (2, U64_MAX, errno.EOVERFLOW),
        (0x30000, PAGE, errno.ENOENT),
        (0, 0x10000, errno.ENOENT),
        (0x12000, 0xE000, errno.ENOENT),
        (0x25000, U64_MAX - 0x25000, errno.ENOENT),
    ],
)
def test_range_without_areas_or_sense_fails(iommu: File, ioas: int, iova: int, length: int, number: int) -> None:
    with fails(number):
        unmap(iommu, ioas, iova, length)
    assert unmap_all(iommu, ioas) == 7 * PAGE


@pytest.mark.parametrize(
    ("iova", "length", "unmapped"),
    [
        (0x10000, 2 * PAGE, 2 * PAGE),
        (0x20000, PAGE, PAGE),
        (0x21000, 4 * PAGE, 4 * PAGE),
        (0x20000, 5 * PAGE, 5 * PAGE),
        (0xFFFF, 2 * PAGE + 1, 2 * PAGE),
        (0x10000, 0x10000, 2 * PAGE),
        (0x8000, 0x18000 + PAGE, 3 * PAGE),
        (0, U64_MAX - 1, 7 * PAGE),
        (1, U64_MAX - 1, 7 * PAGE),
        (0x3, 0x30001, 7 * PAGE),
    ],
)
def test_areas_fully_inside_are_unmapped(iommu: File, ioas: int, iova: int, length: int, unmapped: int) -> None:
    assert unmap(iommu, ioas, iova, length) == unmapped
    assert unmap_all(iommu, ioas) == 7 * PAGE - unmapped


@pytest.mark.parametrize(
    ("iova", "length"),
    [
        (0x10000, PAGE),
        (0x11000, PAGE),
        (0x10001, 2 * PAGE),
        (0x10000, 2 * PAGE - 1),
        (0x10001, 1),
        (0x11FFF, 0x100),
        (0x22000, 2 * PAGE),
        (0x22000, 0x10000),
    ],
)
def test_part_of_an_area_is_enoent(iommu: File, ioas: int, iova: int, length: int) -> None:
    with fails(errno.ENOENT):
        unmap(iommu, ioas, iova, length)
    assert unmap_all(iommu, ioas) == 7 * PAGE


@pytest.mark.parametrize(
    ("iova", "length", "lost"),
    [
        (0x10000, 0x10000 + 2 * PAGE, 3 * PAGE),
        (0x20000, 2 * PAGE, PAGE),
        (0x20000, 5 * PAGE - 1, PAGE),
        (0x11000, 0x10000, 0),
        (0x10001, 0x30000, 0),
    ],
    ids=["third_cut", "second_cut", "one_byte_short", "first_cut", "first_cut_by_a_byte"],
)
def test_areas_before_the_one_that_is_cut_stay_unmapped(
    iommu: File, ioas: int, iova: int, length: int, lost: int
) -> None:
    arg = IOMMU_IOAS_UNMAP.make(ioas_id=ioas, iova=iova, length=length)
    with fails(errno.ENOENT):
        IOMMU_IOAS_UNMAP.raw(iommu, arg)
    assert arg.length == length
    assert unmap_all(iommu, ioas) == 7 * PAGE - lost


def test_second_unmap_is_enoent(iommu: File, ioas: int) -> None:
    assert unmap(iommu, ioas, 0x20000, PAGE) == PAGE
    with fails(errno.ENOENT):
        unmap(iommu, ioas, 0x20000, PAGE)


def test_unmap_all_returns_the_sum(iommu: File, ioas: int) -> None:
    assert unmap_all(iommu, ioas) == 7 * PAGE


def test_unmap_all_of_nothing_succeeds_with_zero(iommu: File, ioas: int) -> None:
    unmap_all(iommu, ioas)
    assert unmap_all(iommu, ioas) == 0


def test_range_from_zero_to_the_last_but_one_byte_of_nothing_is_enoent(iommu: File, ioas: int) -> None:
    """Only the pair (0, 2^64-1) means everything."""
    unmap_all(iommu, ioas)
    with fails(errno.ENOENT):
        unmap(iommu, ioas, 0, U64_MAX - 1)


@pytest.mark.since("7.3")
def test_unmap_all_reaches_the_last_byte(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=TOP)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0)
    assert unmap_all(iommu, ioas) == 9 * PAGE


@pytest.mark.since("7.3")
def test_range_to_the_last_byte_leaves_what_is_below(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=TOP)
    assert unmap(iommu, ioas, 0x20000, U64_MAX - 0x20000 + 1) == 6 * PAGE
    assert unmap_all(iommu, ioas) == 2 * PAGE


def test_range_to_the_last_but_one_byte_cuts_an_area_at_the_top(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, 2 * PAGE, iova=TOP - PAGE - 1)
    assert unmap(iommu, ioas, 0x30000, U64_MAX - 0x30000) == 2 * PAGE


def test_alignment_of_the_ioas_does_not_bind_unmap(iommu: File, ioas: int) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    assert unmap(iommu, ioas, 0xFFF1, 0x2011) == 2 * PAGE


def test_single_byte_areas_unmap(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    for iova in (0, 1, 5, 0x1000):
        map_user(iommu, ioas, NOWHERE, 1, iova=iova)
    assert unmap(iommu, ioas, 1, 1) == 1
    assert unmap(iommu, ioas, 0, 6) == 2
    assert unmap_all(iommu, ioas) == 1


def test_areas_are_never_merged(iommu: File) -> None:
    """Two adjacent maps of adjacent memory remain two areas."""
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x10000)
    map_user(iommu, ioas, NOWHERE + PAGE, PAGE, iova=0x11000)
    assert unmap(iommu, ioas, 0x11000, PAGE) == PAGE
    assert unmap(iommu, ioas, 0x10000, PAGE) == PAGE


def test_space_is_free_again(iommu: File, ioas: int) -> None:
    unmap(iommu, ioas, 0x10000, 2 * PAGE)
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=0x11000) == 0x11000


def test_reply_changes_nothing_but_the_length(iommu: File, ioas: int) -> None:
    reply = IOMMU_IOAS_UNMAP(iommu, ioas_id=ioas, iova=0x8000, length=0x10000)
    assert (reply.size, reply.ioas_id, reply.iova, reply.length) == (24, ioas, 0x8000, 2 * PAGE)


@pytest.mark.parametrize(("iova", "length"), [(0x10000, 2 * PAGE), (0, U64_MAX)], ids=["range", "all"])
def test_reply_fault_is_efault_and_the_areas_are_gone(iommu: File, ioas: int, iova: int, length: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_IOAS_UNMAP.make(ioas_id=ioas, iova=iova, length=length))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_UNMAP.number, memory.page(0))
    with fails(errno.ENOENT):
        unmap(iommu, ioas, 0x10000, 2 * PAGE)


def test_hundreds_of_areas_unmap_at_once(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    for index in range(300):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=index * 3 * PAGE)
    assert unmap(iommu, ioas, 3 * PAGE, 600 * PAGE) == 200 * PAGE
    assert unmap_all(iommu, ioas) == 100 * PAGE
