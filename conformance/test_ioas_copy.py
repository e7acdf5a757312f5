"""IOMMU_IOAS_COPY between IOASes without a domain: its checks, the pieces it makes, the rights it hands on.

Mirrors iommufd_ioas_copy(), iopt_get_pages() and iopt_map_pages().
"""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    FIXED,
    NOWHERE,
    PAGE,
    READ,
    RW,
    U64_MAX,
    WRITE,
    MiB,
    allow_iovas,
    copy,
    destroy,
    fails,
    ioas_alloc,
    map_user,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_IOAS_COPY, IOMMU_OPTION_HUGE_PAGES

SRC, DST = 1, 2

#: One wrong thing each, in the order in which the kernel looks. The source has 4 pages at 0x10000, read and write; the
#: destination has page alignment and one area at 0x10000.
DEFECTS: list[tuple[str, dict[str, int], int]] = [
    ("unknown_flag", {"flags": FIXED | RW | 8}, errno.EOPNOTSUPP),
    ("length_u64_max", {"length": U64_MAX}, errno.EOVERFLOW),
    ("src_iova_u64_max", {"src_iova": U64_MAX}, errno.EOVERFLOW),
    ("dst_iova_u64_max", {"dst_iova": U64_MAX}, errno.EOVERFLOW),
    ("neither_read_nor_write", {"flags": FIXED}, errno.EINVAL),
    ("unknown_source", {"src_ioas_id": 99}, errno.ENOENT),
    ("length_zero", {"length": 0}, errno.EINVAL),
    ("source_wraps", {"src_iova": U64_MAX - 1, "length": 3}, errno.EOVERFLOW),
    ("source_is_a_hole", {"src_iova": 0x20000}, errno.ENOENT),
    ("unknown_destination", {"dst_ioas_id": 99}, errno.ENOENT),
    ("length_off_alignment", {"length": PAGE + 1}, errno.EINVAL),
    ("dst_off_alignment", {"dst_iova": 0x20001}, errno.EINVAL),
    ("dst_wraps", {"dst_iova": U64_MAX - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
    ("area_exists", {"dst_iova": 0x10000}, errno.EEXIST),
    ("piece_off_alignment", {"src_iova": 0x10800}, errno.EINVAL),
]
GOOD = {"flags": FIXED | RW, "src_iova": 0x10000, "length": PAGE, "dst_iova": 0x20000}


@pytest.fixture
def pair(iommu: File) -> tuple[int, int]:
    """A source with 4 pages at 0x10000, an empty destination."""
    assert (ioas_alloc(iommu), ioas_alloc(iommu)) == (SRC, DST)
    map_user(iommu, SRC, NOWHERE, 4 * PAGE, iova=0x10000)
    return SRC, DST


@pytest.fixture
def paged_pair(iommu: File, pair: tuple[int, int]) -> tuple[int, int]:
    """The same with page alignment and one area at 0x10000 in the destination."""
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, DST)
    map_user(iommu, DST, NOWHERE, PAGE, iova=0x10000)
    return pair


def _copy(iommu: File, fields: dict[str, int]) -> None:
    IOMMU_IOAS_COPY(iommu, **{"src_ioas_id": SRC, "dst_ioas_id": DST, **GOOD, **fields})


@pytest.mark.usefixtures("paged_pair")
@pytest.mark.parametrize(("fields", "number"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_check(iommu: File, fields: dict[str, int], number: int) -> None:
    with fails(number):
        _copy(iommu, fields)
    assert unmap_all(iommu, DST) == PAGE
    assert unmap_all(iommu, SRC) == 4 * PAGE


def _pairs() -> list[Any]:
    """Two defects at once that touch different fields and have different errnos: the earlier check answers."""
    rows = []
    for first, second in itertools.combinations(DEFECTS, 2):
        if first[2] != second[2] and not set(first[1]) & set(second[1]):
            rows.append(pytest.param({**first[1], **second[1]}, first[2], id=f"{first[0]}-{second[0]}"))
    return rows


@pytest.mark.usefixtures("paged_pair")
@pytest.mark.parametrize(("fields", "number"), _pairs())
def test_order_of_checks(iommu: File, fields: dict[str, int], number: int) -> None:
    with fails(number):
        _copy(iommu, fields)


def test_whole_area_copies(iommu: File, pair: tuple[int, int]) -> None:
    assert copy(iommu, DST, SRC, 0x10000, 4 * PAGE, dst_iova=0x80000) == 0x80000
    assert unmap(iommu, DST, 0x80000, 4 * PAGE) == 4 * PAGE


@pytest.mark.parametrize(
    ("src_iova", "length"),
    [(0x10000, PAGE), (0x11000, 2 * PAGE), (0x13000, PAGE), (0x10001, 1), (0x10FFF, 2), (0x10800, 0x3000)],
)
def test_any_part_of_an_area_copies(iommu: File, pair: tuple[int, int], src_iova: int, length: int) -> None:
    assert copy(iommu, DST, SRC, src_iova, length, dst_iova=0x80000) == 0x80000
    assert unmap_all(iommu, DST) == length


@pytest.mark.parametrize(
    ("src_iova", "length"),
    [(0xFFFF, 1), (0xFFFF, 2), (0x14000, 1), (0x13FFF, 2), (0x10000, 0x4001), (0, 0x20000)],
    ids=["before", "into", "after", "out_of", "one_too_many", "around"],
)
def test_source_range_that_is_not_covered_is_enoent(
    iommu: File, pair: tuple[int, int], src_iova: int, length: int
) -> None:
    with fails(errno.ENOENT):
        copy(iommu, DST, SRC, src_iova, length, dst_iova=0x80000)
    assert unmap_all(iommu, DST) == 0


def test_copy_over_several_areas_makes_as_many(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x14000)
    map_user(iommu, SRC, NOWHERE, 2 * PAGE, iova=0x15000)
    copy(iommu, DST, SRC, 0x10000, 7 * PAGE, dst_iova=0x80000)
    assert unmap(iommu, DST, 0x84000, PAGE) == PAGE
    assert unmap(iommu, DST, 0x80000, 4 * PAGE) == 4 * PAGE
    assert unmap(iommu, DST, 0x85000, 2 * PAGE) == 2 * PAGE


def test_pieces_at_both_ends_may_be_parts(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, 4 * PAGE, iova=0x14000)
    copy(iommu, DST, SRC, 0x13000, 3 * PAGE, dst_iova=0x80000)
    assert unmap(iommu, DST, 0x80000, PAGE) == PAGE
    assert unmap(iommu, DST, 0x81000, 2 * PAGE) == 2 * PAGE


def test_copy_over_a_gap_is_enoent(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x15000)
    with fails(errno.ENOENT):
        copy(iommu, DST, SRC, 0x10000, 6 * PAGE)
    assert unmap_all(iommu, DST) == 0


def test_source_and_destination_may_be_one(iommu: File, pair: tuple[int, int]) -> None:
    assert copy(iommu, SRC, SRC, 0x10000, 4 * PAGE, dst_iova=0x80000) == 0x80000
    assert unmap_all(iommu, SRC) == 8 * PAGE


def test_copy_onto_itself_is_eexist(iommu: File, pair: tuple[int, int]) -> None:
    with fails(errno.EEXIST):
        copy(iommu, SRC, SRC, 0x10000, PAGE, dst_iova=0x10000)


def test_copy_over_an_existing_area_is_eexist(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, DST, NOWHERE, PAGE, iova=0x83000)
    with fails(errno.EEXIST):
        copy(iommu, DST, SRC, 0x10000, 4 * PAGE, dst_iova=0x80000)
    assert unmap_all(iommu, DST) == PAGE


def test_copy_outlives_its_source_area(iommu: File, pair: tuple[int, int]) -> None:
    copy(iommu, DST, SRC, 0x10000, PAGE, dst_iova=0x80000)
    unmap_all(iommu, SRC)
    assert copy(iommu, SRC, DST, 0x80000, PAGE, dst_iova=0x10000) == 0x10000


def test_copy_outlives_its_source_ioas(iommu: File, pair: tuple[int, int]) -> None:
    copy(iommu, DST, SRC, 0x10000, PAGE, dst_iova=0x80000)
    destroy(iommu, SRC)
    assert unmap(iommu, DST, 0x80000, PAGE) == PAGE


@pytest.mark.parametrize("prot", [WRITE, RW], ids=["write", "read_write"])
def test_write_on_a_read_only_map_is_eperm(iommu: File, pair: tuple[int, int], prot: int) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x20000, prot=READ)
    with fails(errno.EPERM):
        copy(iommu, DST, SRC, 0x20000, PAGE, dst_iova=0x80000, prot=prot)
    assert unmap_all(iommu, DST) == 0


def test_eperm_of_a_later_piece_undoes_the_earlier_ones(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x14000, prot=READ)
    with fails(errno.EPERM):
        copy(iommu, DST, SRC, 0x10000, 5 * PAGE, dst_iova=0x80000)
    assert unmap_all(iommu, DST) == 0
    assert copy(iommu, DST, SRC, 0x10000, 5 * PAGE, dst_iova=0x80000, prot=READ) == 0x80000


def test_eexist_comes_before_eperm(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x20000, prot=READ)
    map_user(iommu, DST, NOWHERE, PAGE, iova=0x80000)
    with fails(errno.EEXIST):
        copy(iommu, DST, SRC, 0x20000, PAGE, dst_iova=0x80000)


def test_eperm_comes_before_the_page_offset(iommu: File, paged_pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE + 0x800, PAGE, iova=0x20800, prot=READ)
    with fails(errno.EPERM):
        copy(iommu, DST, SRC, 0x20800, PAGE, dst_iova=0x80000)
    with fails(errno.EINVAL):
        copy(iommu, DST, SRC, 0x20800, PAGE, dst_iova=0x80000, prot=READ)


def test_write_may_come_back_over_a_read_only_copy(iommu: File, pair: tuple[int, int]) -> None:
    """What counts is the original map's W, not the rights of the area that is copied."""
    copy(iommu, DST, SRC, 0x10000, PAGE, dst_iova=0x80000, prot=READ)
    assert copy(iommu, DST, DST, 0x80000, PAGE, dst_iova=0x90000, prot=RW) == 0x90000


def test_read_may_be_added_to_a_write_only_map(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE, PAGE, iova=0x20000, prot=WRITE)
    assert copy(iommu, DST, SRC, 0x20000, PAGE, dst_iova=0x80000, prot=RW) == 0x80000


def test_alignment_of_the_source_does_not_matter(iommu: File, pair: tuple[int, int]) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, SRC)
    assert copy(iommu, DST, SRC, 0x10001, 3, dst_iova=0x80001) == 0x80001


@pytest.mark.parametrize(
    ("va", "src_iova", "length", "iova"),
    [
        (NOWHERE, 0x40000, PAGE, PAGE),
        (NOWHERE, 0x40000, 4 * PAGE, 4 * PAGE),
        (NOWHERE, 0x41000, 4 * PAGE, PAGE),
        (NOWHERE, 0x42000, 6 * PAGE, 2 * PAGE),
        (NOWHERE, 0x40123, PAGE, PAGE + 0x123),
        (NOWHERE + 0x10, 0x40010, 5 * PAGE, PAGE + 0x10),
    ],
)
def test_automatic_iova_follows_the_address_of_the_first_piece(
    iommu: File, pair: tuple[int, int], va: int, src_iova: int, length: int, iova: int
) -> None:
    map_user(iommu, SRC, va, 16 * PAGE, iova=0x40000 + va % PAGE)
    assert copy(iommu, DST, SRC, src_iova, length) == iova


def test_automatic_iova_looks_at_the_first_piece_only(iommu: File, pair: tuple[int, int]) -> None:
    map_user(iommu, SRC, NOWHERE + 2 * MiB, MiB, iova=0x100000)
    map_user(iommu, SRC, NOWHERE + PAGE, MiB, iova=0x200000)
    assert copy(iommu, DST, SRC, 0x100000, 2 * MiB) == 2 * MiB


def test_automatic_iova_keeps_to_the_list_of_the_destination(iommu: File, pair: tuple[int, int]) -> None:
    allow_iovas(iommu, DST, [(0x70000, 0x7FFFF)])
    assert copy(iommu, DST, SRC, 0x10000, PAGE) == 0x70000
    with fails(errno.ENOSPC):
        map_user(iommu, SRC, 0, MiB, iova=MiB)
        copy(iommu, DST, SRC, MiB, MiB)


def test_dst_iova_field_of_an_automatic_copy_is_otherwise_ignored(iommu: File, pair: tuple[int, int]) -> None:
    reply = IOMMU_IOAS_COPY(
        iommu, flags=RW, dst_ioas_id=DST, src_ioas_id=SRC, length=PAGE, dst_iova=0x77777, src_iova=0x10000
    )
    fields = (reply.size, reply.flags, reply.dst_ioas_id, reply.src_ioas_id, reply.length, reply.src_iova)
    assert fields == (40, RW, DST, SRC, PAGE, 0x10000)
    assert reply.dst_iova == PAGE


def test_copy_of_a_long_run_of_areas(iommu: File, pair: tuple[int, int]) -> None:
    for index in range(64):
        map_user(iommu, SRC, NOWHERE, PAGE, iova=0x100000 + index * PAGE)
    copy(iommu, DST, SRC, 0x100000, 64 * PAGE, dst_iova=0)
    assert [unmap(iommu, DST, index * PAGE, PAGE) for index in (0, 31, 63)] == [PAGE] * 3
    assert unmap_all(iommu, DST) == 61 * PAGE


def test_reply_fault_is_efault_and_the_copy_stays(iommu: File, pair: tuple[int, int]) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_IOAS_COPY.make(**GOOD, src_ioas_id=SRC, dst_ioas_id=DST))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_COPY.number, memory.page(0))
    assert unmap(iommu, DST, GOOD["dst_iova"], PAGE) == PAGE
