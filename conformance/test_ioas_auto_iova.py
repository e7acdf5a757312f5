"""Where IOMMU_IOAS_MAP puts a mapping that does not say where: the algorithm, exactly.

Mirrors iopt_alloc_iova(). The expected answers of the random cases come from `expected_iova` below, which looks for
the first fit the slow and obvious way and shares nothing with any implementation. Files and copies choose by the same
rule from the file offset and from the first piece's address: test_ioas_map_file.py, test_ioas_copy.py. Reserved
regions count as used space: test_ioas_reserved.py.
"""

from __future__ import annotations

import errno
import random

import pytest

from conformance.steps import (
    NOWHERE,
    PAGE,
    U64_MAX,
    GiB,
    MiB,
    allow_iovas,
    answer,
    fails,
    ioas_alloc,
    map_user,
    option_set,
    unmap,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_OPTION_HUGE_PAGES

CAP = 2 * MiB
Span = tuple[int, int]


def alignment_of(va: int, length: int) -> int:
    """What an automatic IOVA is aligned to, before the page offset is put in."""
    alignment = 1 << (length - 1).bit_length()
    if va:
        alignment = min(alignment, va & -va)
    return min(alignment, CAP)


def expected_iova(va: int, length: int, used: list[Span], allowed: list[Span], ioas_alignment: int = 1) -> int | None:
    """The lowest place that fits, None for ENOSPC. `used` and `allowed` are (start, last) pairs."""
    offset = va % PAGE
    alignment = alignment_of(va, length)
    assert alignment >= ioas_alignment
    spans: list[list[int]] = []
    for start, last in sorted(allowed) or [(PAGE, U64_MAX - PAGE)]:
        start, last = max(start, PAGE), min(last, U64_MAX - PAGE)
        if start > last:
            continue
        if spans and spans[-1][1] + 1 == start:
            spans[-1][1] = last
        else:
            spans.append([start, last])

    def place(start: int, last: int) -> int | None:
        if start + alignment - 1 > U64_MAX:
            return None
        start = (start + alignment - 1) // alignment * alignment | offset
        return start if start < last and last - start >= length - 1 else None

    for span_start, span_last in spans:
        lowest = place(span_start, span_last)
        if lowest is None:
            continue
        at = lowest
        for start, last in [*sorted(used), (span_last + 1, span_last + 1)]:
            if last < at:
                continue
            if at <= min(start - 1, span_last):
                found = place(at, min(start - 1, span_last))
                if found is not None:
                    return found
            at = max(at, last + 1)
    return None


@pytest.mark.parametrize(
    ("va", "length", "iova"),
    [
        (NOWHERE, PAGE, PAGE),
        (NOWHERE, 1, PAGE),
        (NOWHERE, 2 * PAGE, 2 * PAGE),
        (NOWHERE, 3 * PAGE, 4 * PAGE),
        (NOWHERE, MiB, MiB),
        (NOWHERE, MiB + 1, 2 * MiB),
        (NOWHERE, 2 * MiB, 2 * MiB),
        (NOWHERE, 4 * MiB, 2 * MiB),
        (NOWHERE, GiB, 2 * MiB),
        (NOWHERE, 1 << 62, 2 * MiB),
    ],
)
def test_alignment_follows_the_length_up_to_2_mib(iommu: File, ioas: int, va: int, length: int, iova: int) -> None:
    assert map_user(iommu, ioas, va, length) == iova


@pytest.mark.parametrize(
    ("va", "iova"),
    [
        (NOWHERE + PAGE, PAGE),
        (NOWHERE + 2 * PAGE, 2 * PAGE),
        (NOWHERE + 0x10000, 0x10000),
        (NOWHERE + 0x30000, 0x10000),
        (NOWHERE + MiB, MiB),
        (NOWHERE + 2 * MiB, 2 * MiB),
        (NOWHERE + GiB, 2 * MiB),
    ],
)
def test_alignment_follows_the_lowest_set_bit_of_the_address(iommu: File, ioas: int, va: int, iova: int) -> None:
    assert map_user(iommu, ioas, va, GiB) == iova


def test_address_zero_aligns_by_length_alone(iommu: File, ioas: int) -> None:
    assert map_user(iommu, ioas, 0, 64 * PAGE) == 64 * PAGE


@pytest.mark.parametrize(
    ("va", "length", "iova"),
    [
        (NOWHERE + 0x800, PAGE, PAGE + 0x800),
        (NOWHERE + 0xFFF, PAGE, PAGE + 0xFFF),
        (NOWHERE + 1, 1, PAGE + 1),
        (NOWHERE + 0x123, 3 * PAGE, PAGE + 0x123),
        (NOWHERE + 0x10FFF, 10, PAGE + 0xFFF),
    ],
)
def test_page_offset_is_kept(iommu: File, ioas: int, va: int, length: int, iova: int) -> None:
    assert map_user(iommu, ioas, va, length) == iova


def test_page_offset_is_ored_in_not_added(iommu: File, ioas: int) -> None:
    """The next free byte is 0x1801, already past the offset 0x801: both together, 0x1801, keep every set bit."""
    map_user(iommu, ioas, NOWHERE, 0x801, iova=PAGE)
    assert map_user(iommu, ioas, NOWHERE + 0x801, 0x10) == 0x1801


def test_or_may_break_congruence_with_the_page(iommu: File, ioas: int) -> None:
    """The next free byte is 0x1006; with offset 1 the answer is 0x1007, which is not 1 in its page."""
    map_user(iommu, ioas, NOWHERE, 6, iova=PAGE)
    assert map_user(iommu, ioas, NOWHERE + 1, 2) == 0x1007


def test_page_zero_is_never_chosen(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0, 2 * PAGE - 1)])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == PAGE
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, PAGE)


def test_last_page_is_never_chosen(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(U64_MAX - 2 * PAGE + 1, U64_MAX)])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == U64_MAX - 2 * PAGE + 1
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, PAGE)


def test_allowed_list_inside_page_zero_is_enospc(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0, PAGE - 1)])
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, 1)


def test_first_fit_takes_the_lowest_hole(iommu: File, ioas: int) -> None:
    for iova in (0x1000, 0x3000, 0x8000):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=iova)
    assert map_user(iommu, ioas, NOWHERE + PAGE, 4 * PAGE) == 0x4000
    assert map_user(iommu, ioas, NOWHERE + PAGE, PAGE) == 0x2000
    assert map_user(iommu, ioas, NOWHERE + PAGE, PAGE) == 0x9000


def test_hole_that_unmap_opened_is_used_again(iommu: File, ioas: int) -> None:
    iovas = [map_user(iommu, ioas, NOWHERE, PAGE) for _ in range(5)]
    unmap(iommu, ioas, iovas[2], PAGE)
    assert map_user(iommu, ioas, NOWHERE, PAGE) == iovas[2]


def test_hole_too_small_after_alignment_is_skipped(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x1000)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x4000)
    assert map_user(iommu, ioas, NOWHERE, 2 * PAGE) == 0x2000
    assert map_user(iommu, ioas, NOWHERE, 2 * PAGE) == 0x6000


def test_one_byte_span_never_fits(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x1000)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x2001)
    assert map_user(iommu, ioas, NOWHERE + 1, 1) == 0x3001


def test_one_byte_fits_into_two(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x1000)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x2002)
    assert map_user(iommu, ioas, NOWHERE, 1) == 0x2000
    assert map_user(iommu, ioas, NOWHERE, 1) == 0x3002


@pytest.mark.parametrize("length", [(U64_MAX // 2), U64_MAX // 2 + 1, U64_MAX - PAGE])
def test_half_of_the_space_or_more_is_eoverflow(iommu: File, ioas: int, length: int) -> None:
    with fails(errno.EOVERFLOW):
        map_user(iommu, ioas, 0, length)


def test_just_under_half_of_the_space_fits(iommu: File, ioas: int) -> None:
    assert map_user(iommu, ioas, 0, U64_MAX // 2 - 1) == 2 * MiB


def test_space_that_is_full_is_enospc(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, 0, U64_MAX - PAGE, iova=0)
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, PAGE)


def test_failing_map_takes_no_space(iommu: File, ioas: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x1FFFF)])
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, 0x20000)
    assert map_user(iommu, ioas, NOWHERE, 0x10000) == 0x10000


@pytest.mark.parametrize("va", [NOWHERE + 1, NOWHERE + 0x800, NOWHERE + 0xC00])
def test_alignment_below_that_of_the_ioas_is_einval(iommu: File, ioas: int, va: int) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, va, PAGE)


def test_alignment_of_the_ioas_comes_before_lack_of_space(iommu: File, ioas: int) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    allow_iovas(iommu, ioas, [(0, 1)])
    with fails(errno.EINVAL):
        map_user(iommu, ioas, NOWHERE + 1, PAGE)
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, NOWHERE, PAGE)


@pytest.mark.parametrize("second", [0x12000, 0x20000])
def test_search_goes_on_in_the_next_allowed_span(iommu: File, ioas: int, second: int) -> None:
    allow_iovas(iommu, ioas, [(0x10000, 0x10FFF), (second, second + 0x1FFF)])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == 0x10000
    assert map_user(iommu, ioas, NOWHERE, 2 * PAGE) == second


def test_areas_outside_the_allowed_spans_do_not_matter(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, 0x10000, iova=0)
    map_user(iommu, ioas, NOWHERE, 0x10000, iova=0x20000)
    allow_iovas(iommu, ioas, [(0x8000, 0x2FFFF)])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == 0x10000


def test_area_that_covers_the_start_of_an_allowed_span_is_stepped_over(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, 0x2800, iova=0xF000)
    allow_iovas(iommu, ioas, [(0x10000, 0x1FFFF)])
    assert map_user(iommu, ioas, NOWHERE, PAGE) == 0x12000


def _random_layout(rng: random.Random, unit: int) -> tuple[list[Span], list[Span]]:
    """Some areas in the lowest part of the space, and perhaps an allowed list over it."""
    used: list[Span] = []
    at = 0
    for _ in range(rng.randrange(3, 11)):
        at += rng.choice([0, 1, 1, 2, 3, 7, 20]) * unit
        length = rng.choice([1, 1, 2, 5, 16]) * unit
        used.append((at, at + length - 1))
        at += length
    allowed: list[Span] = []
    if rng.random() < 0.5:
        start = 0
        for _ in range(rng.randrange(1, 5)):
            start += rng.randrange(0, 12) * unit
            length = rng.randrange(1, 24) * unit + rng.choice([0, 0, 1, unit // 2])
            if length > 1:
                allowed.append((start, start + length - 1))
            start += length
    return used, allowed


def _check_random(iommu: File, seed: int, unit: int, va_unit: int, ioas_alignment: int) -> None:
    rng = random.Random(seed)
    ioas = ioas_alloc(iommu)
    if ioas_alignment > 1:
        option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    used, allowed = _random_layout(rng, unit)
    for start, last in used:
        map_user(iommu, ioas, NOWHERE, last - start + 1, iova=start)
    allow_iovas(iommu, ioas, allowed)
    for _ in range(10):
        va = NOWHERE + rng.randrange(0, 1 << 12) * va_unit
        length = rng.choice([1, 1, 2, 3, 4, 8, 13]) * unit
        expected = expected_iova(va, length, used, allowed, ioas_alignment)
        if expected is None:
            assert answer(map_user, iommu, ioas, va, length) == errno.ENOSPC
            continue
        assert map_user(iommu, ioas, va, length) == expected, (hex(va), hex(length))
        used.append((expected, expected + length - 1))
        if rng.random() < 0.3:
            start, last = used.pop(rng.randrange(len(used)))
            assert unmap(iommu, ioas, start, last - start + 1) == last - start + 1


@pytest.mark.parametrize("seed", range(16))
def test_random_holes_by_pages(iommu: File, seed: int) -> None:
    _check_random(iommu, seed, PAGE, PAGE, PAGE)


@pytest.mark.parametrize("seed", range(16))
def test_random_holes_by_bytes(iommu: File, seed: int) -> None:
    _check_random(iommu, 1000 + seed, 257, 129, 1)


@pytest.mark.parametrize("seed", range(8))
def test_random_holes_by_64_kib(iommu: File, seed: int) -> None:
    _check_random(iommu, 2000 + seed, 0x10000, 0x8000, 1)
