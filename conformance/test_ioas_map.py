"""IOMMU_IOAS_MAP on an IOAS without a domain: every check, in the kernel's order, and what a success leaves.

Mirrors iommufd_ioas_map(), iopt_map_user_pages(), iopt_alloc_area_pages() and iopt_check_iova(). How an automatic
IOVA is chosen is in test_ioas_auto_iova.py; what pins do, in test_pin_accounting.py; reserved regions, in
test_ioas_reserved.py.
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
    U32_MAX,
    U64_MAX,
    WRITE,
    allow_iovas,
    fails,
    ioas_alloc,
    is_mapped,
    map_user,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_IOAS_MAP, IOMMU_OPTION_HUGE_PAGES

#: Longest length that is not EINVAL: the kernel rounds up to pages in 64 bits.
LONGEST = U64_MAX - PAGE

#: One wrong thing each, in the order in which the kernel looks. An IOAS with page alignment and an area at 0x10000.
DEFECTS: list[tuple[str, dict[str, int], int]] = [
    ("unknown_flag", {"flags": FIXED | RW | 8}, errno.EOPNOTSUPP),
    ("reserved_field", {"__reserved": 1}, errno.EOPNOTSUPP),
    ("iova_u64_max", {"iova": U64_MAX}, errno.EOVERFLOW),
    ("length_u64_max", {"length": U64_MAX}, errno.EOVERFLOW),
    ("neither_read_nor_write", {"flags": FIXED}, errno.EINVAL),
    ("unknown_ioas", {"ioas_id": 99}, errno.ENOENT),
    ("va_wraps", {"user_va": U64_MAX - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
    ("length_zero", {"length": 0}, errno.EINVAL),
    ("length_off_alignment", {"length": PAGE + 1}, errno.EINVAL),
    ("iova_off_alignment", {"iova": 0x10001}, errno.EINVAL),
    ("iova_wraps", {"iova": U64_MAX - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
    ("area_exists", {"iova": 0x10000}, errno.EEXIST),
    ("va_off_alignment", {"user_va": NOWHERE + 1}, errno.EINVAL),
]
GOOD = {"flags": FIXED | RW, "user_va": NOWHERE, "length": PAGE, "iova": 0x20000}


@pytest.fixture
def paged_ioas(iommu: File) -> int:
    """Page alignment, as with a domain, and one area at 0x10000."""
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x10000)
    return ioas


@pytest.mark.parametrize(("fields", "number"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_check(iommu: File, paged_ioas: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_MAP(iommu, **{"ioas_id": paged_ioas, **GOOD, **fields})
    assert unmap_all(iommu, paged_ioas) == PAGE


def _pairs() -> list[Any]:
    """Two defects at once that touch different fields and have different errnos: the earlier check answers."""
    rows = []
    for first, second in itertools.combinations(DEFECTS, 2):
        if first[2] != second[2] and not set(first[1]) & set(second[1]):
            rows.append(pytest.param({**first[1], **second[1]}, first[2], id=f"{first[0]}-{second[0]}"))
    return rows


@pytest.mark.parametrize(("fields", "number"), _pairs())
def test_order_of_checks(iommu: File, paged_ioas: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_MAP(iommu, **{"ioas_id": paged_ioas, **GOOD, **fields})
    assert unmap_all(iommu, paged_ioas) == PAGE


@pytest.mark.parametrize("flags", [8, 16, 0x8000_0000, 0xFFFF_FFF8])
def test_each_unknown_flag_is_eopnotsupp(iommu: File, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_MAP(iommu, flags=RW | flags, ioas_id=ioas, user_va=NOWHERE, length=PAGE)


def test_iova_field_of_an_automatic_map_is_tested_too(iommu: File, ioas: int) -> None:
    with fails(errno.EOVERFLOW):
        IOMMU_IOAS_MAP(iommu, flags=RW, ioas_id=ioas, user_va=NOWHERE, length=PAGE, iova=U64_MAX)


def test_iova_field_of_an_automatic_map_is_otherwise_ignored(iommu: File, ioas: int) -> None:
    reply = IOMMU_IOAS_MAP(iommu, flags=RW, ioas_id=ioas, user_va=NOWHERE, length=PAGE, iova=U64_MAX - 1)
    assert reply.iova == PAGE


@pytest.mark.parametrize("prot", [READ, WRITE, RW], ids=["read", "write", "read_write"])
def test_any_access_is_enough(iommu: File, ioas: int, prot: int) -> None:
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE, prot=prot) == PAGE


def test_no_access_is_einval_for_an_automatic_map(iommu: File, ioas: int) -> None:
    with fails(errno.EINVAL):
        IOMMU_IOAS_MAP(iommu, flags=0, ioas_id=ioas, user_va=NOWHERE, length=PAGE)


@pytest.mark.parametrize("object_id", [0, 2, U32_MAX])
def test_unknown_ioas_is_enoent(iommu: File, ioas: int, object_id: int) -> None:
    with fails(errno.ENOENT):
        map_user(iommu, object_id, NOWHERE, PAGE)


@pytest.mark.parametrize(
    ("va", "length"),
    [(U64_MAX, 1), (U64_MAX - PAGE + 1, PAGE), (PAGE + 1, LONGEST), (NOWHERE, U64_MAX - NOWHERE + 1)],
    ids=["last_byte", "last_page", "longest", "to_the_end"],
)
def test_va_range_that_ends_at_2_to_the_64_is_eoverflow(iommu: File, ioas: int, va: int, length: int) -> None:
    with fails(errno.EOVERFLOW):
        map_user(iommu, ioas, va, length, iova=0)


def test_va_range_may_end_one_byte_below_2_to_the_64(iommu: File, ioas: int) -> None:
    assert map_user(iommu, ioas, U64_MAX - PAGE, PAGE, iova=PAGE) == PAGE


@pytest.mark.parametrize("length", [0, LONGEST + 1, U64_MAX - 1])
def test_length_out_of_range_is_einval(iommu: File, ioas: int, length: int) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, ioas, 0, length, iova=0)


def test_longest_length_maps(iommu: File, ioas: int) -> None:
    assert map_user(iommu, ioas, 0, LONGEST, iova=0) == 0
    assert unmap(iommu, ioas, 0, LONGEST) == LONGEST


@pytest.mark.model_only("7.3 answers so too, but warns of a bug in itself (WARN in iopt_insert_area)")
@pytest.mark.parametrize("offset", [2, PAGE - 1])
def test_longest_length_with_a_page_offset_is_eoverflow(iommu: File, ioas: int, offset: int) -> None:
    with fails(errno.EOVERFLOW):
        map_user(iommu, ioas, offset, LONGEST, iova=0)
    assert map_user(iommu, ioas, 1, LONGEST, iova=0) == 0


@pytest.mark.parametrize(
    ("iova", "length"),
    [(0, 1), (0, PAGE), (1, 1), (0x1234_5677, 0x1235), (U64_MAX - 1, 1), (1 << 63, 1 << 62)],
    ids=["byte_zero", "page_zero", "byte_one", "odd", "top", "huge"],
)
def test_fixed_map_without_a_domain_knows_no_alignment(iommu: File, ioas: int, iova: int, length: int) -> None:
    assert map_user(iommu, ioas, NOWHERE + 7, length, iova=iova) == iova
    assert unmap(iommu, ioas, iova, length) == length


@pytest.mark.since("7.3")
def test_fixed_map_may_end_at_the_last_byte(iommu: File, ioas: int) -> None:
    top = U64_MAX - PAGE + 1
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=top) == top
    assert unmap(iommu, ioas, top, PAGE) == PAGE


@pytest.mark.parametrize(
    ("iova", "length"),
    [(U64_MAX - PAGE + 1, PAGE + 1), (U64_MAX - 1, 3), (PAGE + 2, LONGEST)],
    ids=["one_byte_over", "two_bytes_left", "longest"],
)
def test_fixed_map_that_wraps_is_eoverflow(iommu: File, ioas: int, iova: int, length: int) -> None:
    with fails(errno.EOVERFLOW):
        map_user(iommu, ioas, 0, length, iova=iova)


@pytest.mark.parametrize(
    ("iova", "length"),
    [
        (0x10000, 0x4000),
        (0x10000, 1),
        (0x13FFF, 1),
        (0xFFFF, 2),
        (0x13FFF, 2),
        (0x11000, PAGE),
        (0x0, 0x100000),
    ],
    ids=["same", "first_byte", "last_byte", "into_start", "over_end", "inside", "around"],
)
def test_map_over_an_existing_area_is_eexist(iommu: File, ioas: int, iova: int, length: int) -> None:
    map_user(iommu, ioas, NOWHERE, 0x4000, iova=0x10000)
    with fails(errno.EEXIST):
        map_user(iommu, ioas, NOWHERE, length, iova=iova)
    assert unmap_all(iommu, ioas) == 0x4000


@pytest.mark.parametrize("iova", [0xF000, 0x14000], ids=["below", "above"])
def test_map_beside_an_existing_area_is_fine(iommu: File, ioas: int, iova: int) -> None:
    map_user(iommu, ioas, NOWHERE, 0x4000, iova=0x10000)
    assert map_user(iommu, ioas, NOWHERE, 0x1000, iova=iova) == iova


def test_map_across_two_areas_is_eexist(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x10000)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x12000)
    with fails(errno.EEXIST):
        map_user(iommu, ioas, NOWHERE, 3 * PAGE, iova=0x10000)
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=0x11000) == 0x11000


def test_one_address_may_be_mapped_often(iommu: File, ioas: int) -> None:
    assert [map_user(iommu, ioas, NOWHERE, PAGE, iova=i * PAGE) for i in range(5)] == [i * PAGE for i in range(5)]


@pytest.mark.parametrize(
    "va",
    [0, PAGE, NOWHERE, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0x0001_0000_0000_0000],
    ids=["null", "low", "unmapped", "end_of_user_space", "kernel_half", "non_canonical"],
)
def test_user_memory_is_not_looked_at_without_a_domain(iommu: File, ioas: int, va: int) -> None:
    assert map_user(iommu, ioas, va, PAGE, iova=PAGE) == PAGE


def test_map_of_protected_memory_is_accepted_without_a_domain(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.no_access(0)
        assert map_user(iommu, ioas, memory.page(0), PAGE, iova=PAGE) == PAGE


def test_memory_may_go_while_it_is_mapped_without_a_domain(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        map_user(iommu, ioas, memory.page(0), PAGE, iova=PAGE)
    assert unmap(iommu, ioas, PAGE, PAGE) == PAGE


def test_real_memory_maps(kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(4 * PAGE)
    assert map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=PAGE) == PAGE
    unmap_all(iommu, ioas)
    buffer.close()


def test_reply_changes_nothing_but_the_iova(iommu: File, ioas: int) -> None:
    reply = IOMMU_IOAS_MAP(iommu, flags=RW, ioas_id=ioas, user_va=NOWHERE, length=PAGE, iova=123)
    assert (reply.size, reply.flags, reply.ioas_id, reply.user_va, reply.length) == (40, RW, ioas, NOWHERE, PAGE)
    assert reply.iova == PAGE


def test_reply_fault_is_efault_and_the_area_stays(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_IOAS_MAP.make(**GOOD, ioas_id=ioas))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_MAP.number, memory.page(0))
    assert unmap(iommu, ioas, GOOD["iova"], PAGE) == PAGE


def test_failing_map_leaves_its_place_free(iommu: File, paged_ioas: int) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, paged_ioas, NOWHERE + 1, PAGE, iova=0x20000)
    assert map_user(iommu, paged_ioas, NOWHERE, PAGE, iova=0x20000) == 0x20000


def test_area_covers_its_bytes_and_no_more(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, 0x1234, iova=0x10001)
    probes = (0x10000, 0x10001, 0x11234, 0x11235)
    assert [is_mapped(iommu, ioas, iova) for iova in probes] == [False, True, True, False]


def test_fixed_map_outside_the_allowed_list_is_fine(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x100000, 0x1FFFFF)])
    assert map_user(iommu, ioas, NOWHERE, PAGE, iova=0x200000) == 0x200000


def test_hundreds_of_areas_can_be_mapped(iommu: File, ioas: int) -> None:
    for index in range(400):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=(index * 7919 % 400) * 2 * PAGE)
    assert unmap_all(iommu, ioas) == 400 * PAGE
