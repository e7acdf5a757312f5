"""Mappings seen through the mock driver: whose pages stand in its table, how often each is pinned, and where they fit.

MD_CHECK_MAP compares a range of the domain with the caller's memory, MD_CHECK_REFS counts the pins of a page.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import arena
from conformance.mock import APERTURE, SMALL, add_reserved, check_map, check_refs, mock_domain, mock_replace
from conformance.steps import (
    PAGE,
    U64_MAX,
    MiB,
    allow_iovas,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Buffer, File

pytestmark = pytest.mark.needs("iommu", "mock")

START = APERTURE[0]
PAGES = 16


@pytest.fixture
def hwpt(iommu: File, ioas: int) -> int:
    return mock_domain(iommu, ioas).hwpt


@pytest.fixture
def buffer(kernel: Backend) -> Buffer:
    made = kernel.buffer(PAGES * PAGE)
    made.view[:] = bytes(PAGES * PAGE)
    return made


# -- MD_CHECK_MAP ----------------------------------------------------------------------------------------------------


def test_mapping_holds_the_callers_pages(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address, PAGES * PAGE)
    check_map(iommu, hwpt, iova, PAGES * PAGE, buffer.address)


def test_mapping_made_before_the_domain_is_in_it(iommu: File, ioas: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address, PAGES * PAGE, iova=START)
    hwpt = mock_domain(iommu, ioas).hwpt
    check_map(iommu, hwpt, iova, PAGES * PAGE, buffer.address)


def test_other_pages_are_einval(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address, 4 * PAGE)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, iova, PAGE, buffer.address + PAGE)
    check_map(iommu, hwpt, iova + PAGE, PAGE, buffer.address + PAGE)


def test_unmapped_range_is_einval(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address, PAGE)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, iova, 2 * PAGE, buffer.address)
    unmap(iommu, ioas, iova, PAGE)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, iova, PAGE, buffer.address)


@pytest.mark.parametrize(("iova", "length", "uptr"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1024, 2048, 0)])
def test_check_off_the_smallest_page_is_einval(
    iommu: File, ioas: int, hwpt: int, buffer: Buffer, iova: int, length: int, uptr: int
) -> None:
    start = map_user(iommu, ioas, buffer.address, 4 * PAGE)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, start + iova, PAGE + length, buffer.address + uptr)


def test_check_of_half_pages(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address + SMALL, 3 * SMALL)
    assert iova % PAGE == SMALL
    check_map(iommu, hwpt, iova, 3 * SMALL, buffer.address + SMALL)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, iova - SMALL, SMALL, buffer.address)


def test_check_of_nothing_succeeds(iommu: File, hwpt: int) -> None:
    check_map(iommu, hwpt, 0, 0, 0)


def test_check_of_unreadable_memory_is_efault(iommu: File, hwpt: int) -> None:
    with arena(1) as memory:
        address = memory.page(0)
        memory.unmap(0)
        with fails(errno.EFAULT):
            check_map(iommu, hwpt, START, PAGE, address)


def test_check_that_wraps_is_einval(iommu: File, hwpt: int) -> None:
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, START, 2 * PAGE, U64_MAX - PAGE + 1)


@pytest.mark.has("mock-check-map-looks-first")
def test_check_of_no_hwpt_is_enoent(iommu: File, ioas: int, hwpt: int) -> None:
    for number in (0, ioas, hwpt - 1, hwpt + 1):
        with fails(errno.ENOENT):
            check_map(iommu, number, 1, 1, 1)


@pytest.mark.since("6.6")
def test_both_domains_of_an_ioas_hold_the_mapping(iommu: File, ioas: int, buffer: Buffer) -> None:
    mock = mock_domain(iommu, ioas)
    second = hwpt_alloc(iommu, mock.idev, ioas)
    iova = map_user(iommu, ioas, buffer.address, PAGES * PAGE)
    for hwpt in (mock.hwpt, second):
        check_map(iommu, hwpt, iova, PAGES * PAGE, buffer.address)
    unmap_all(iommu, ioas)
    for hwpt in (mock.hwpt, second):
        with fails(errno.EINVAL):
            check_map(iommu, hwpt, iova, PAGE, buffer.address)


@pytest.mark.since("6.13")
def test_file_pages_are_those_of_a_mapping_of_the_file(iommu: File, kernel: Backend, ioas: int, hwpt: int) -> None:
    with memfd(4 * PAGE) as fd:
        iova = map_file(iommu, ioas, fd, 0, 3 * PAGE)
        assert unmap(iommu, ioas, iova, 3 * PAGE) == 3 * PAGE
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, 0, 5 * PAGE)


# -- MD_CHECK_REFS ---------------------------------------------------------------------------------------------------


def test_page_of_no_mapping_is_pinned_by_nobody(iommu: File, buffer: Buffer) -> None:
    check_refs(iommu, buffer.address, PAGES * PAGE, 0)
    with fails(errno.EIO):
        check_refs(iommu, buffer.address, PAGES * PAGE, 1)


def test_mapping_without_a_domain_pins_nothing(iommu: File, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGES * PAGE)
    check_refs(iommu, buffer.address, PAGES * PAGE, 0)


@pytest.mark.since("6.6")
def test_mapping_pins_a_page_once_for_all_domains(iommu: File, ioas: int, buffer: Buffer) -> None:
    mock = mock_domain(iommu, ioas)
    iova = map_user(iommu, ioas, buffer.address, 4 * PAGE)
    check_refs(iommu, buffer.address, 4 * PAGE, 1)
    check_refs(iommu, buffer.address + 4 * PAGE, 4 * PAGE, 0)
    hwpt_alloc(iommu, mock.idev, ioas)
    check_refs(iommu, buffer.address, 4 * PAGE, 1)
    unmap(iommu, ioas, iova, 4 * PAGE)
    check_refs(iommu, buffer.address, 4 * PAGE, 0)


def test_two_mappings_of_a_page_pin_it_twice(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    first = map_user(iommu, ioas, buffer.address, 2 * PAGE)
    map_user(iommu, ioas, buffer.address + PAGE, 2 * PAGE)
    check_refs(iommu, buffer.address, PAGE, 1)
    check_refs(iommu, buffer.address + PAGE, PAGE, 2)
    check_refs(iommu, buffer.address + 2 * PAGE, PAGE, 1)
    with fails(errno.EIO):
        check_refs(iommu, buffer.address, 2 * PAGE, 1)
    unmap(iommu, ioas, first, 2 * PAGE)
    check_refs(iommu, buffer.address, PAGE, 0)
    check_refs(iommu, buffer.address + PAGE, 2 * PAGE, 1)


def test_half_page_mappings_of_one_page_pin_it_each(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, SMALL)
    map_user(iommu, ioas, buffer.address + SMALL, SMALL)
    check_refs(iommu, buffer.address, PAGE, 2)


def test_copy_shares_the_pin(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    iova = map_user(iommu, ioas, buffer.address, 4 * PAGE)
    twin = copy(iommu, ioas, ioas, iova, 4 * PAGE)
    check_map(iommu, hwpt, twin, 4 * PAGE, buffer.address)
    check_refs(iommu, buffer.address, 4 * PAGE, 1)
    unmap(iommu, ioas, iova, 4 * PAGE)
    check_refs(iommu, buffer.address, 4 * PAGE, 1)
    check_map(iommu, hwpt, twin, 4 * PAGE, buffer.address)
    unmap(iommu, ioas, twin, 4 * PAGE)
    check_refs(iommu, buffer.address, 4 * PAGE, 0)


def test_copy_of_a_part_pins_that_part(iommu: File, ioas: int, buffer: Buffer) -> None:
    source = ioas_alloc(iommu)
    hwpt = mock_domain(iommu, ioas).hwpt
    iova = map_user(iommu, source, buffer.address, 4 * PAGE, iova=START)
    twin = copy(iommu, ioas, source, iova + PAGE + SMALL, PAGE)
    check_map(iommu, hwpt, twin, PAGE, buffer.address + PAGE + SMALL)
    check_refs(iommu, buffer.address, PAGE, 0)
    check_refs(iommu, buffer.address + PAGE, 2 * PAGE, 1)
    check_refs(iommu, buffer.address + 3 * PAGE, PAGE, 0)


def test_pins_go_with_the_last_domain(iommu: File, ioas: int, buffer: Buffer) -> None:
    mock = mock_domain(iommu, ioas)
    iova = map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    destroy(iommu, mock.stdev)
    check_refs(iommu, buffer.address, PAGE, 0)
    again = mock_domain(iommu, ioas)
    check_refs(iommu, buffer.address, PAGE, 1)
    check_map(iommu, again.hwpt, iova, PAGE, buffer.address)


@pytest.mark.since("6.6")
def test_replace_keeps_the_pins_within_an_ioas(iommu: File, ioas: int, buffer: Buffer) -> None:
    mock = mock_domain(iommu, ioas)
    iova = map_user(iommu, ioas, buffer.address, PAGE)
    second = hwpt_alloc(iommu, mock.idev, ioas)
    mock_replace(iommu, mock.stdev, second)
    check_refs(iommu, buffer.address, PAGE, 1)
    check_map(iommu, second, iova, PAGE, buffer.address)


def test_failed_map_leaves_no_pin(iommu: File, ioas: int, hwpt: int) -> None:
    with arena(4) as memory:
        memory.unmap(2)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.page(0), 4 * PAGE)
        check_refs(iommu, memory.page(0), 2 * PAGE, 0)
        check_refs(iommu, memory.page(3), PAGE, 0)


@pytest.mark.parametrize(("address", "length"), [(1, 0), (0, 1), (2048, 0), (0, 2048)])
def test_count_off_the_page_is_einval(iommu: File, buffer: Buffer, address: int, length: int) -> None:
    with fails(errno.EINVAL):
        check_refs(iommu, buffer.address + address, PAGE + length, 0)


def test_count_of_unreadable_memory_is_efault(iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):
            check_refs(iommu, memory.page(0), 2 * PAGE, 0)


def test_count_that_wraps_is_einval(iommu: File) -> None:
    with fails(errno.EINVAL):
        check_refs(iommu, U64_MAX - PAGE + 1, 2 * PAGE, 0)


# -- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 1024, SMALL - 1, SMALL + 1, PAGE + 1024])
def test_length_off_the_smallest_page_is_einval(iommu: File, ioas: int, hwpt: int, buffer: Buffer, length: int) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, ioas, buffer.address, length)


@pytest.mark.parametrize("offset", [1, 1024, SMALL + 1])
def test_iova_off_the_smallest_page_is_einval(iommu: File, ioas: int, hwpt: int, buffer: Buffer, offset: int) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, ioas, buffer.address, SMALL, iova=START + offset)


@pytest.mark.parametrize("offset", [1, 1024, SMALL + 1024])
def test_address_off_the_smallest_page_is_einval(
    iommu: File, ioas: int, hwpt: int, buffer: Buffer, offset: int
) -> None:
    for iova in (None, START):
        with fails(errno.EINVAL):
            map_user(iommu, ioas, buffer.address + offset, SMALL, iova=iova)


@pytest.mark.parametrize("length", [SMALL, PAGE, 3 * SMALL])
def test_multiples_of_the_smallest_page_are_mapped(
    iommu: File, ioas: int, hwpt: int, buffer: Buffer, length: int
) -> None:
    map_user(iommu, ioas, buffer.address, length, iova=START + SMALL)
    check_map(iommu, hwpt, START + SMALL, length, buffer.address)


def test_misaligned_mapping_keeps_the_domain_out(iommu: File, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 1024, iova=START)
    with fails(errno.EADDRINUSE):
        mock_domain(iommu, ioas)
    unmap_all(iommu, ioas)
    mock_domain(iommu, ioas)
    assert iova_alignment(iommu, ioas) == SMALL


@pytest.mark.parametrize("iova", [0, START - PAGE, APERTURE[1] + 1, APERTURE[1] + 1 - PAGE])
def test_mapping_outside_the_aperture(iommu: File, ioas: int, buffer: Buffer, iova: int) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=iova)
    with fails(errno.EADDRINUSE):
        mock_domain(iommu, ioas)
    unmap_all(iommu, ioas)
    mock_domain(iommu, ioas)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=iova)


# -- ADD_RESERVED ----------------------------------------------------------------------------------------------------


def test_reserved_range_leaves_the_usable_ones(iommu: File, ioas: int) -> None:
    add_reserved(iommu, ioas, PAGE, PAGE)
    assert iova_ranges(iommu, ioas) == [(0, PAGE - 1), (2 * PAGE, U64_MAX)]


def test_reserved_range_ends_at_the_top(iommu: File, ioas: int) -> None:
    add_reserved(iommu, ioas, PAGE, U64_MAX - PAGE + 1)
    assert iova_ranges(iommu, ioas) == [(0, PAGE - 1)]


def test_reserved_ranges_may_overlap(iommu: File, ioas: int) -> None:
    add_reserved(iommu, ioas, PAGE, 2 * PAGE)
    add_reserved(iommu, ioas, 2 * PAGE, 2 * PAGE)
    assert iova_ranges(iommu, ioas) == [(0, PAGE - 1), (4 * PAGE, U64_MAX)]


@pytest.mark.parametrize(
    ("start", "length", "number"),
    [(PAGE, 0, errno.EINVAL), (U64_MAX, 2, errno.EOVERFLOW), (PAGE, U64_MAX, errno.EOVERFLOW)],
)
def test_range_of_nothing_or_that_wraps(iommu: File, start: int, length: int, number: int) -> None:
    with fails(number):
        add_reserved(iommu, 99, start, length)


def test_reserving_in_no_ioas_is_enoent(iommu: File, ioas: int, hwpt: int) -> None:
    for number in (0, hwpt, 99):
        with fails(errno.ENOENT):
            add_reserved(iommu, number, PAGE, PAGE)


def test_mapped_or_promised_range_cannot_be_reserved(iommu: File, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=4 * PAGE)
    with fails(errno.EADDRINUSE):
        add_reserved(iommu, ioas, 5 * PAGE - 1, 1)
    allow_iovas(iommu, ioas, [(16 * PAGE, 17 * PAGE)])
    with fails(errno.EADDRINUSE):
        add_reserved(iommu, ioas, 17 * PAGE, 1)
    add_reserved(iommu, ioas, 5 * PAGE, PAGE)


def test_fixed_map_into_a_reserved_range_is_einval(iommu: File, ioas: int, buffer: Buffer) -> None:
    add_reserved(iommu, ioas, PAGE, PAGE)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=0)
    map_user(iommu, ioas, buffer.address, PAGE, iova=0)


def test_automatic_iova_goes_around_reserved_ranges(iommu: File, ioas: int, hwpt: int, buffer: Buffer) -> None:
    add_reserved(iommu, ioas, START, 16 * MiB)
    iova = map_user(iommu, ioas, buffer.address, SMALL)
    assert START + 16 * MiB <= iova <= APERTURE[1]
    check_map(iommu, hwpt, iova, SMALL, buffer.address)


@pytest.mark.parametrize("length", [SMALL, PAGE, 3 * SMALL, 2 * PAGE, 5 * PAGE, 16 * PAGE])
def test_automatic_iova_is_aligned_and_inside_the_aperture(
    iommu: File, ioas: int, hwpt: int, buffer: Buffer, length: int
) -> None:
    iovas = [map_user(iommu, ioas, buffer.address, length) for _ in range(3)]
    for iova in iovas:
        assert iova % (length & -length) == 0
        assert START <= iova <= APERTURE[1] - length + 1
    assert iovas == sorted(iovas)


def test_reserved_range_stays_when_the_domain_goes(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    add_reserved(iommu, ioas, 2 * START, PAGE)
    destroy(iommu, mock.stdev)
    assert iova_ranges(iommu, ioas) == [(0, 2 * START - 1), (2 * START + PAGE, U64_MAX)]


def test_no_room_between_reserved_ranges_is_enospc(iommu: File, ioas: int, buffer: Buffer) -> None:
    add_reserved(iommu, ioas, 6, 0xFFFF_FFFF_FFFF_8001)
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, buffer.address, PAGES * PAGE)
