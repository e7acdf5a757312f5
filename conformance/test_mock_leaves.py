"""Which leaves a mock domain's table has, as dirty tracking shows them: a leaf is dirty whole.

Mirrors pt_compute_best_pgsize() and unmapping of drivers/iommu/generic_pt. A buffer of huge pages is contiguous memory
whose start is aligned, so leaves follow from addresses alone. Ordinary pages lie wherever the kernel found them: only
with IOMMU_OPTION_HUGE_PAGES off, or one page a mapping, is known what becomes of them.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from conformance.arena import Arena, arena
from conformance.mock import APERTURE, SMALL, check_map, check_refs, mock_domain
from conformance.mock_dirty import (
    dirty_to,
    get_dirty,
    leaf_sizes,
    make_dirty,
    set_tracking,
    tracked_hwpt,
)
from conformance.steps import (
    PAGE,
    MiB,
    copy,
    fails,
    ioas_alloc,
    map_user,
    option_set,
    unmap,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_IOAS_UNMAP, IOMMU_OPTION_HUGE_PAGES

pytestmark = [pytest.mark.since("6.19"), pytest.mark.needs("iommu", "mock", "huge_pages")]

IOVA = 16 * MiB
HUGE = 2 * MiB
LEAF = abi.MOCK_HUGE_PAGE_SIZE
#: The sizes that the two types of table have.
DEFAULT_SIZES = [1 << shift for shift in range(11, 37)]
HUGE_SIZES = [PAGE, LEAF]


def best_leaves(iova: int, physical: int, length: int, sizes: list[int]) -> list[int]:
    """Always the largest leaf that both addresses and the rest of the length allow."""
    chosen = []
    while length:
        size = max(size for size in sizes if size <= length and iova % size == 0 and physical % size == 0)
        chosen.append(size)
        iova, physical, length = iova + size, physical + size, length - size
    return chosen


@pytest.fixture
def device(iommu: File, ioas: int) -> int:
    """A mock device's id, attached to an IOAS of its own, so that `ioas` has the domains that the test makes."""
    return mock_domain(iommu, ioas_alloc(iommu)).idev


@pytest.fixture
def huge(kernel: Backend) -> Iterator[Buffer]:
    """One huge page."""
    with kernel.buffer(HUGE, huge=True) as buffer:
        buffer.view[0] = 1
        yield buffer


@pytest.fixture
def memory() -> Iterator[Arena]:
    with arena(8) as made:
        yield made


# -- what map makes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "offset", "length"),
    [
        (0, 0, HUGE),
        (0, 0, PAGE),
        (0, 0, SMALL),
        (0, 0, 3 * PAGE),
        (0, 0, 512 * 1024 - SMALL),
        (PAGE, PAGE, HUGE - PAGE),
        (PAGE, PAGE, 600 * 1024),
        (3 * PAGE, 3 * PAGE, 40 * PAGE),
        (PAGE, 0, 512 * 1024),
        (0, SMALL, 128 * 1024),
        (SMALL, 0, 128 * 1024),
        (8 * PAGE, 24 * PAGE, MiB),
        (MiB, 0, HUGE),
        (MiB, MiB, MiB),
        (HUGE - PAGE, HUGE - PAGE, PAGE),
        (LEAF - PAGE, LEAF - PAGE, 2 * PAGE),
    ],
)
def test_default_table_takes_the_largest_leaf_that_fits(
    iommu: File, ioas: int, device: int, huge: Buffer, iova: int, offset: int, length: int
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address + offset, length, IOVA + iova)
    assert leaf_sizes(iommu, hwpt, IOVA + iova, length) == best_leaves(IOVA + iova, offset, length, DEFAULT_SIZES)
    check_map(iommu, hwpt, IOVA + iova, length, huge.address + offset)


@pytest.mark.parametrize("seed", range(12))
def test_default_table_at_random_places(iommu: File, ioas: int, device: int, huge: Buffer, seed: int) -> None:
    chance = random.Random(seed)
    hwpt = tracked_hwpt(iommu, device, ioas)
    grain = 1 << chance.randint(13, 18)
    offset = chance.randrange(HUGE // grain) * grain
    length = min(chance.randrange(grain // SMALL, HUGE // SMALL) * SMALL, HUGE - offset)
    iova = IOVA + (offset if chance.random() < 0.5 else chance.randrange(64) * grain)
    map_user(iommu, ioas, huge.address + offset, length, iova)
    assert leaf_sizes(iommu, hwpt, iova, length) == best_leaves(iova, offset, length, DEFAULT_SIZES)


@pytest.mark.parametrize(
    ("iova", "offset", "length"),
    [
        (0, 0, HUGE),
        (0, 0, LEAF - PAGE),
        (LEAF, 0, LEAF + 8 * PAGE),
        (PAGE, PAGE, 3 * PAGE),
        (LEAF - 4 * PAGE, LEAF - 4 * PAGE, LEAF + 4 * PAGE),
        (0, PAGE, 16 * PAGE),
    ],
)
def test_huge_table_has_leaves_of_one_mebibyte_and_of_one_page(
    iommu: File, ioas: int, device: int, huge: Buffer, iova: int, offset: int, length: int
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas, huge=True)
    map_user(iommu, ioas, huge.address + offset, length, iova)
    assert leaf_sizes(iommu, hwpt, iova, length, PAGE) == best_leaves(iova, offset, length, HUGE_SIZES)
    check_map(iommu, hwpt, iova, length, huge.address + offset)


def test_without_huge_pages_each_page_is_a_leaf(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, 24 * PAGE, IOVA)
    assert leaf_sizes(iommu, hwpt, IOVA, 24 * PAGE) == [PAGE] * 24


def test_each_mapping_has_leaves_of_its_own(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    for index in range(4):
        map_user(iommu, ioas, huge.address + index * 16 * PAGE, 16 * PAGE, IOVA + index * 16 * PAGE)
    assert leaf_sizes(iommu, hwpt, IOVA, 64 * PAGE) == [16 * PAGE] * 4


def test_domain_that_comes_later_has_the_same_leaves(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    map_user(iommu, ioas, huge.address + PAGE, 20 * PAGE, IOVA + PAGE)
    first = tracked_hwpt(iommu, device, ioas)
    second = tracked_hwpt(iommu, device, ioas)
    expected = best_leaves(IOVA + PAGE, PAGE, 20 * PAGE, DEFAULT_SIZES)
    for hwpt in (first, second):
        assert leaf_sizes(iommu, hwpt, IOVA + PAGE, 20 * PAGE) == expected


def test_copy_of_a_part_has_leaves_of_its_own(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    copy(iommu, ioas, ioas, IOVA + 5 * PAGE, 30 * PAGE, IOVA + HUGE + 5 * PAGE)
    expected = best_leaves(5 * PAGE, 5 * PAGE, 30 * PAGE, DEFAULT_SIZES)
    assert leaf_sizes(iommu, hwpt, IOVA + HUGE + 5 * PAGE, 30 * PAGE) == expected
    assert leaf_sizes(iommu, hwpt, IOVA, HUGE) == [HUGE]


def test_place_of_a_large_leaf_can_be_mapped_in_small_ones(
    kernel: Backend, iommu: File, ioas: int, device: int, huge: Buffer
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    assert unmap(iommu, ioas, IOVA, HUGE) == HUGE
    for index in (0, 2):
        map_user(iommu, ioas, huge.address, PAGE, IOVA + index * PAGE)
        assert leaf_sizes(iommu, hwpt, IOVA + index * PAGE, PAGE) == [PAGE]
    unmap(iommu, ioas, IOVA, 4 * PAGE)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    assert leaf_sizes(iommu, hwpt, IOVA, HUGE) == [HUGE]


def test_part_of_a_mapping_cannot_be_unmapped(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    with fails(errno.ENOENT):
        IOMMU_IOAS_UNMAP(iommu, ioas_id=ioas, iova=IOVA, length=HUGE - PAGE)
    assert leaf_sizes(iommu, hwpt, IOVA, HUGE) == [HUGE]


# -- what a bitmap says of large leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [PAGE, SMALL, 64 * 1024, HUGE])
@pytest.mark.parametrize("written", [0, 1, 100, 511])
def test_one_write_makes_the_whole_leaf_dirty(
    iommu: File, ioas: int, device: int, huge: Buffer, page: int, written: int
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    assert make_dirty(iommu, hwpt, IOVA + written * PAGE, 1, 1) == 1
    assert get_dirty(iommu, hwpt, IOVA, HUGE, page) == (1 << (HUGE // page)) - 1
    assert get_dirty(iommu, hwpt, IOVA, HUGE, page) == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_to_leaves_of_one_mebibyte(
    kernel: Backend, iommu: File, ioas: int, device: int, memory: Arena, huge: Buffer, seed: int
) -> None:
    chance = random.Random(seed)
    hwpt = tracked_hwpt(iommu, device, ioas, huge=True)
    count = 8
    for index in range(count // 2):
        map_user(iommu, ioas, huge.address, HUGE, index * HUGE)
    for _ in range(4):
        bits = chance.getrandbits(count)
        page = 1 << chance.randint(11, 16)
        writes = sum(1 << (index * (LEAF // page) + chance.randrange(LEAF // page))
                     for index in range(count) if bits >> index & 1)  # fmt: skip
        make_dirty(iommu, hwpt, 0, writes, count * LEAF // page, page)
        scale = 1 << chance.randint(12, 20)
        expected = sum(((1 << (LEAF // scale)) - 1) << (index * (LEAF // scale))
                       for index in range(count) if bits >> index & 1)  # fmt: skip
        data = memory.address + chance.randrange(PAGE)
        memory.write(data, bytes(512))
        dirty_to(iommu, hwpt, 0, count * LEAF, scale, data)
        assert int.from_bytes(memory.read(data, 512), "little") == expected


def test_leaf_that_begins_before_the_range_is_lost(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    make_dirty(iommu, hwpt, IOVA, 1, 1)
    assert get_dirty(iommu, hwpt, IOVA + MiB, MiB, clear=False) == 0
    assert get_dirty(iommu, hwpt, IOVA, HUGE, MiB, clear=False) == 0b11, "it was not to be cleared"
    assert get_dirty(iommu, hwpt, IOVA + MiB, MiB) == 0
    assert get_dirty(iommu, hwpt, IOVA, HUGE, MiB) == 0, "the kernel forgets it"


@pytest.mark.parametrize("offset", [0, 1, 64, PAGE - 8, PAGE - 1])
def test_leaf_that_reaches_beyond_the_range_sets_bits_beyond_the_bitmap(
    iommu: File, ioas: int, device: int, huge: Buffer, memory: Arena, offset: int
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    make_dirty(iommu, hwpt, IOVA, 1, 1)
    dirty_to(iommu, hwpt, IOVA, 64 * PAGE, PAGE, memory.address + offset)
    expected = bytes(offset) + b"\xff" * (HUGE // PAGE // 8)
    # As far as the pages go that the kernel pinned: one more than it needs where the bitmap is not aligned.
    expected = expected[: PAGE if not offset else 2 * PAGE]
    assert memory.read(memory.address, 3 * PAGE) == expected.ljust(3 * PAGE, b"\0")
    assert get_dirty(iommu, hwpt, IOVA, HUGE) == 0


def test_bits_beyond_the_bitmap_end_with_the_last_page_of_it(
    iommu: File, ioas: int, device: int, huge: Buffer, memory: Arena
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    for offset, seen in ((0, PAGE), (8, 2 * PAGE - 8), (PAGE - 512, PAGE + 512)):
        memory.write(memory.address, bytes(4 * PAGE))
        make_dirty(iommu, hwpt, IOVA, 1, 1)
        # 512 bytes of bitmap for the range, 16 KiB for the leaf.
        dirty_to(iommu, hwpt, IOVA, 4 * PAGE, 4, memory.address + offset)
        assert memory.read(memory.address + offset, seen) == b"\xff" * seen
        assert memory.read(memory.address + offset + seen, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_leaf_over_three_pages_of_a_bitmap_of_which_one_is_bad(
    iommu: File, ioas: int, device: int, huge: Buffer, memory: Arena, bad: int
) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas, huge=True)
    map_user(iommu, ioas, huge.address, HUGE, 0)
    make_dirty(iommu, hwpt, LEAF, 1, 1)
    memory.read_only(bad)
    # A leaf takes 8 KiB of the bitmap; the second begins in the middle of page 0.
    dirty_to(iommu, hwpt, 0, HUGE, 16, memory.page(0) + SMALL - 2 * PAGE)
    pages = [bytes(SMALL) + b"\xff" * SMALL, b"\xff" * PAGE, b"\xff" * SMALL + bytes(SMALL)]
    for index in range(3):
        assert memory.read(memory.page(index), PAGE) == (pages[index] if index < bad else bytes(PAGE))


def test_tracking_cleans_large_leaves(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    make_dirty(iommu, hwpt, IOVA + PAGE, 1, 1)
    set_tracking(iommu, hwpt)
    assert get_dirty(iommu, hwpt, IOVA, HUGE) == 0


def test_aperture_of_the_huge_table_is_tracked_up_to_its_end(iommu: File, ioas: int, device: int, huge: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, device, ioas, huge=True)
    iova = (1 << 38) - HUGE
    map_user(iommu, ioas, huge.address, HUGE, iova)
    make_dirty(iommu, hwpt, iova + LEAF, 1, 1)
    assert get_dirty(iommu, hwpt, iova, HUGE, LEAF) == 0b10
    assert APERTURE[1] < iova


# -- pins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refs", [0, 1, 5])
def test_check_of_pins_passes_over_huge_pages(iommu: File, ioas: int, device: int, huge: Buffer, refs: int) -> None:
    check_refs(iommu, huge.address, HUGE, refs)
    tracked_hwpt(iommu, device, ioas)
    map_user(iommu, ioas, huge.address, HUGE, IOVA)
    check_refs(iommu, huge.address, HUGE, refs)


def test_check_of_pins_counts_ordinary_pages_beside_huge_ones(
    kernel: Backend, iommu: File, ioas: int, device: int
) -> None:
    tracked_hwpt(iommu, device, ioas)
    with kernel.buffer(4 * PAGE) as buffer:
        map_user(iommu, ioas, buffer.address, 2 * PAGE, IOVA)
        check_refs(iommu, buffer.address, 2 * PAGE, 1)
        with fails(errno.EIO):
            check_refs(iommu, buffer.address, 4 * PAGE, 1)
