"""IOMMU_IOAS_ALLOW_IOVAS: the list that automatic IOVAs, and only those, must come from.

Mirrors iommufd_ioas_allow_iovas(), iommufd_ioas_load_iovas() and iopt_set_allow_iova(). The list cannot be read
back; what it says shows in the next automatic IOVA. Conflicts with reserved regions need a device:
test_ioas_reserved.py.
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from conformance.arena import arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    allow_iovas,
    fails,
    ioas_alloc,
    map_user,
    unmap,
    unmap_all,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_IOAS_ALLOW_IOVAS, iommu_iova_range

HIGH = (0x10_0000, 0x1F_FFFF)


def test_unknown_ioas_is_enoent(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1)


def test_unknown_ioas_is_enoent_before_the_list_is_read(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1, num_iovas=1, allowed_iovas=8)


def test_reserved_field_is_eopnotsupp(iommu: File, ioas: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, __reserved=1)


def test_reserved_field_is_tested_before_the_id(iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=99, __reserved=0x8000_0000)


def test_automatic_iova_comes_from_the_list(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_fixed_iova_ignores_the_list(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE) == PAGE


def test_full_list_is_enospc(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x13FFF)])
    map_user(iommu, ioas, NOWHERE, 4 * PAGE)
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, PAGE)


def test_new_list_replaces_the_old_one(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x1FFFF)])
    allow_iovas(iommu, ioas, [HIGH])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_empty_list_allows_everything_again(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    allow_iovas(iommu, ioas, [])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == PAGE


@pytest.mark.parametrize("pointer", [0, 8, U64_MAX])
def test_pointer_of_an_empty_list_is_not_looked_at(iommu: File, ioas: int, pointer: int) -> None:
    IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=0, allowed_iovas=pointer)


def test_existing_areas_are_not_checked(iommu: File, ioas: int) -> None:
    iova = map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE)
    allow_iovas(iommu, ioas, [HIGH])
    assert unmap(iommu, ioas, iova, PAGE) == PAGE


def test_list_survives_unmap_all(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    map_user(iommu, ioas, NOWHERE, PAGE)
    unmap_all(iommu, ioas)
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_each_ioas_has_its_own_list(iommu: File, ioas: int) -> None:
    other = ioas_alloc(iommu)
    allow_iovas(iommu, ioas, [HIGH])
    assert map_user(iommu, other, NOWHERE, PAGE) == PAGE


def test_order_of_the_entries_does_not_matter(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH, (0x8000, 0x8FFF), (0x4000, 0x4FFF)])
    assert [map_user(iommu, ioas, NOWHERE, PAGE) for _ in range(3)] == [0x4000, 0x8000, HIGH[0]]


def test_adjacent_entries_make_one_span(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x10FFF), (0x11000, 0x11FFF)])
    assert map_user(iommu, ioas, NOWHERE, 2 * PAGE) == 0x10000


def test_entries_with_a_gap_do_not(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x10FFE), (0x11000, 0x11FFF)])
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, 2 * PAGE)


@pytest.mark.parametrize(
    "entry",
    [(0x1000, 0x1000), (0, 0), (U64_MAX, U64_MAX), (0x2000, 0x1FFF), (1, 0), (U64_MAX, 0)],
    ids=["one_byte", "zero", "last_byte", "reversed", "one_zero", "max_zero"],
)
def test_entry_of_fewer_than_two_bytes_is_einval(iommu: File, ioas: int, entry: tuple[int, int]) -> None:
    with fails(errno.EINVAL):
        allow_iovas(iommu, ioas, [entry])


@pytest.mark.parametrize(
    "entry", [(0, 1), (0, U64_MAX), (U64_MAX - 1, U64_MAX), (0x1001, 0x1FFE)], ids=["low", "all", "top", "odd"]
)
def test_any_entry_of_two_bytes_or_more_is_accepted(iommu: File, ioas: int, entry: tuple[int, int]) -> None:
    allow_iovas(iommu, ioas, [entry])


@pytest.mark.parametrize(
    "second",
    [(0x2000, 0x2FFF), (0x1000, 0x2000), (0x2FFF, 0x4000), (0x2400, 0x24FF), (0, U64_MAX)],
    ids=["same", "touches_start", "touches_end", "inside", "around"],
)
def test_overlapping_entries_are_einval(iommu: File, ioas: int, second: tuple[int, int]) -> None:
    with fails(errno.EINVAL):
        allow_iovas(iommu, ioas, [(0x2000, 0x2FFF), second])


@pytest.mark.parametrize("pointer", [0, 8, 0xFFFF_8000_0000_0000, U64_MAX - 15], ids=["null", "low", "kernel", "last"])
def test_bad_pointer_is_efault(iommu: File, ioas: int, pointer: int) -> None:
    with fails(errno.EFAULT):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=1, allowed_iovas=pointer)


def two_entries_and_a_hole(iommu: File, ioas: int, entries: list[tuple[int, int]], count: int) -> None:
    """Offer `count` entries of which only `entries` lie in memory: an unmapped page follows."""
    array = (iommu_iova_range * len(entries))(*(iommu_iova_range(*entry) for entry in entries))
    with arena(2) as memory:
        address = memory.page(1) - ctypes.sizeof(array)
        memory.write(address, bytes(array))
        memory.unmap(1)
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=count, allowed_iovas=address)


def test_list_may_end_at_the_edge_of_memory(iommu: File, ioas: int) -> None:
    two_entries_and_a_hole(iommu, ioas, [(0x1000, 0x1FFF), HIGH], 2)


@pytest.mark.parametrize("count", [3, U32_MAX])
def test_list_that_runs_into_a_hole_is_efault(iommu: File, ioas: int, count: int) -> None:
    with fails(errno.EFAULT):
        two_entries_and_a_hole(iommu, ioas, [(0x1000, 0x1FFF), HIGH], count)


def test_entries_are_judged_one_after_the_other(iommu: File, ioas: int) -> None:
    """A bad second entry answers before a fault at the third."""
    with fails(errno.EINVAL):
        two_entries_and_a_hole(iommu, ioas, [(0x1000, 0x1FFF), (0x1000, 0x1FFF)], 3)


def test_list_need_not_be_aligned(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.write(memory.page(0) + 5, bytes(iommu_iova_range(*HIGH)))
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=1, allowed_iovas=memory.page(0) + 5)
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_list_is_copied(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.write(memory.address, iommu_iova_range(*HIGH))
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=1, allowed_iovas=memory.address)
        memory.write(memory.address, iommu_iova_range(0x4000, 0x4FFF))
        assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


@pytest.mark.parametrize("bad", [[(5, 5)], [(0x4000, 0x4FFF), (0x4800, 0x5000)]], ids=["one_byte", "overlap"])
def test_failing_call_keeps_the_old_list(iommu: File, ioas: int, bad: list[tuple[int, int]]) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    with fails(errno.EINVAL):
        allow_iovas(iommu, ioas, bad)
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_fault_keeps_the_old_list(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [HIGH])
    with fails(errno.EFAULT):
        two_entries_and_a_hole(iommu, ioas, [(0x4000, 0x4FFF)], 2)
    assert map_user(iommu, ioas, NOWHERE, PAGE) == HIGH[0]


def test_long_list_is_accepted(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(i << 16, (i << 16) + 0xFFF) for i in range(1, 513)])
    assert [map_user(iommu, ioas, NOWHERE, PAGE) for _ in range(3)] == [0x10000, 0x20000, 0x30000]
