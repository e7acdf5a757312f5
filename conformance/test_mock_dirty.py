"""Dirty tracking where there is some: HWPT_SET_DIRTY_TRACKING, HWPT_GET_DIRTY_BITMAP, and DIRTY as the device.

Mirrors iopt_set_dirty_tracking(), iopt_read_and_clear_dirty_data() and iova_bitmap.c of drivers/iommu/iommufd, and the
`mock` format of drivers/iommu/generic_pt. With IOMMU_OPTION_HUGE_PAGES off each page of 4 KiB is a leaf, so the tests
know what is dirty; which leaves there are otherwise is in test_mock_leaves.py. What an IOMMU without tracking answers
is in test_dirty.py.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conformance.arena import Arena, arena
from conformance.mock import APERTURE, SMALL, command, mock_domain, mock_domain_flags, mock_replace, run
from conformance.mock_dirty import (
    dirty_at,
    dirty_to,
    get_dirty,
    grouped,
    make_dirty,
    set_tracking,
    spread,
    tracked_hwpt,
)
from conformance.steps import (
    PAGE,
    READ,
    U32_MAX,
    U64_MAX,
    MiB,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    map_user,
    option_set,
    place,
    unmap,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    IOMMU_OPTION_HUGE_PAGES,
)

pytestmark = [pytest.mark.since("6.7"), pytest.mark.needs("iommu", "mock")]

IOVA = APERTURE[0]
COUNT = 64
LENGTH = COUNT * PAGE
ALL = (1 << COUNT) - 1
ODD = 0x8421_0F00_F0F0_5A01


class World(NamedTuple):
    """An IOAS in leaves of 4 KiB with 64 pages mapped at the aperture's start, and a HWPT that tracks them."""

    ioas: int
    stdev: int
    idev: int
    hwpt: int
    buffer: Buffer


@pytest.fixture
def world(kernel: Backend, iommu: File) -> Iterator[World]:
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    mock = mock_domain(iommu, ioas)
    with kernel.buffer(LENGTH) as buffer:
        map_user(iommu, ioas, buffer.address, LENGTH, IOVA)
        yield World(ioas, mock.stdev, mock.idev, tracked_hwpt(iommu, mock.idev, ioas), buffer)


@pytest.fixture
def memory() -> Iterator[Arena]:
    """Eight pages for bitmaps that are partly not there."""
    with arena(8) as made:
        yield made


# -- HWPT_SET_DIRTY_TRACKING -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 2, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"flags": U32_MAX}, errno.EOPNOTSUPP),
        ({"hwpt_id": 0}, errno.ENOENT),
        ({"hwpt_id": 99, "__reserved": 1}, errno.ENOENT),
    ],
)
def test_set_dirty_tracking_refuses(iommu: File, world: World, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, **{"hwpt_id": world.hwpt, **fields})


def test_set_dirty_tracking_does_not_look_at_its_reserved_word(iommu: File, world: World) -> None:
    flags = IOMMU_HWPT_DIRTY_TRACKING_ENABLE
    IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=world.hwpt, flags=flags, __reserved=1)


def test_set_dirty_tracking_of_what_is_no_paging_hwpt_is_enoent(iommu: File, world: World) -> None:
    for number in (world.ioas, world.stdev, world.idev):
        with fails(errno.ENOENT):
            set_tracking(iommu, number)


@pytest.mark.since("6.8")
def test_parent_of_a_nested_hwpt_is_tracked_and_the_nested_one_is_not(iommu: File, world: World) -> None:
    parent = tracked_hwpt(iommu, world.idev, world.ioas, flags=IOMMU_HWPT_ALLOC_NEST_PARENT)
    data = {"data_type": abi.IOMMU_HWPT_DATA_SELFTEST, "data_len": 4, "data_uptr": place(bytes(4))}
    nested = hwpt_alloc(iommu, world.idev, parent, **data)
    mock_replace(iommu, world.stdev, nested)
    with fails(errno.ENOENT):
        set_tracking(iommu, nested)
    with fails(errno.ENOENT):
        get_dirty(iommu, nested, IOVA, LENGTH)
    with fails(errno.ENOENT):
        make_dirty(iommu, nested, IOVA, ODD, COUNT)
    make_dirty(iommu, parent, IOVA, ODD, COUNT)
    assert get_dirty(iommu, parent, IOVA, LENGTH) == ODD
    set_tracking(iommu, parent, False)


@pytest.mark.parametrize("on", [True, False])
def test_set_dirty_tracking_of_hwpts_without_it_is_eopnotsupp(iommu: File, world: World, on: bool) -> None:
    plain = hwpt_alloc(iommu, world.idev, world.ioas)
    for number in (plain, world.idev + 1):  # the second is the automatic one
        with fails(errno.EOPNOTSUPP):
            set_tracking(iommu, number, on)


def test_tracking_goes_on_and_off_as_often_as_one_likes(iommu: File, world: World) -> None:
    for on in (True, True, False, False, True):
        set_tracking(iommu, world.hwpt, on)


def test_tracking_goes_on_with_a_device_attached_and_without_mappings(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    hwpt = tracked_hwpt(iommu, mock.idev, ioas)
    other = mock_domain(iommu, hwpt)
    set_tracking(iommu, hwpt, False)
    set_tracking(iommu, hwpt)
    destroy(iommu, other.stdev)
    destroy(iommu, hwpt)


def test_switching_on_makes_everything_clean(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    set_tracking(iommu, world.hwpt, False)
    set_tracking(iommu, world.hwpt)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


def test_switching_on_again_makes_everything_clean(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    set_tracking(iommu, world.hwpt)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


@pytest.mark.since("6.19")
def test_what_was_dirty_can_be_read_after_switching_off(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    set_tracking(iommu, world.hwpt, False)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


def test_every_hwpt_of_an_ioas_tracks_for_itself(iommu: File, world: World) -> None:
    other = tracked_hwpt(iommu, world.idev, world.ioas)
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    make_dirty(iommu, other, IOVA, 1, COUNT)
    set_tracking(iommu, other, False)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD
    set_tracking(iommu, other)
    assert get_dirty(iommu, other, IOVA, LENGTH) == 0


def test_dirty_pages_outlive_the_device_that_wrote_them(iommu: File, world: World) -> None:
    mock_replace(iommu, world.stdev, world.hwpt)
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    destroy(iommu, world.stdev)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD


# -- DIRTY -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"page_size": 0, "length": 0}, errno.EINVAL),
        ({"length": 0}, errno.EINVAL),
        ({"iova": IOVA + SMALL}, errno.EINVAL),
        ({"length": PAGE + SMALL}, errno.EINVAL),
        ({"uptr": 0}, errno.EINVAL),
        ({"hwpt": 0, "uptr": 0}, errno.EINVAL),
        pytest.param(
            {"hwpt": 0, "length": ((1 << 27) + 1) * PAGE}, errno.EOVERFLOW, marks=pytest.mark.has("mock-dirty-cap")
        ),
        ({"hwpt": 0, "length": 1 << 39}, errno.ENOENT),
        ({"hwpt": 0}, errno.ENOENT),
        ({"uptr": 1 << 40}, errno.EFAULT),
    ],
)
def test_dirty_refuses(iommu: File, world: World, memory: Arena, fields: dict[str, int], number: int) -> None:
    arguments = {"hwpt": world.hwpt, "iova": IOVA, "length": PAGE, "page_size": PAGE, "uptr": memory.address}
    with fails(number):
        dirty_at(iommu, **{**arguments, **fields})


def test_dirty_needs_tracking_to_be_on(iommu: File, world: World) -> None:
    plain = hwpt_alloc(iommu, world.idev, world.ioas)
    off = tracked_hwpt(iommu, world.idev, world.ioas, on=False)
    for number in (plain, off):
        with fails(errno.EINVAL):
            make_dirty(iommu, number, IOVA, 1, 1)
    set_tracking(iommu, world.hwpt, False)
    with fails(errno.EINVAL):
        make_dirty(iommu, world.hwpt, IOVA, 1, 1)


@pytest.mark.since("6.19")
def test_dirty_counts_bits_and_not_leaves(iommu: File, world: World) -> None:
    assert make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT) == ODD.bit_count()
    assert make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT) == ODD.bit_count()
    assert make_dirty(iommu, world.hwpt, IOVA, 0b1111, 4, SMALL) == 4
    assert make_dirty(iommu, world.hwpt, IOVA + LENGTH, 0b101, 3) == 2, "nothing is mapped there"
    assert make_dirty(iommu, world.hwpt, 0, 1, 1) == 1, "nor here, below the aperture"
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD | 0b11


def test_dirty_does_not_look_at_bits_beyond_its_length(iommu: File, world: World, memory: Arena) -> None:
    memory.write(memory.address, b"\xff")
    assert dirty_at(iommu, world.hwpt, IOVA, 3 * SMALL, SMALL, memory.address) == 3
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0b11


@pytest.mark.has("mock-generic-pt")
@pytest.mark.parametrize("page", [1, 2, 512, SMALL, PAGE, 2 * PAGE, 16 * PAGE, 3 * PAGE, 3, 6000])
def test_dirty_takes_any_page_size(iommu: File, world: World, page: int) -> None:
    iova = -(-IOVA // page) * page
    count = (IOVA + LENGTH - iova) // page
    chosen = sorted(random.Random(page).sample(range(count), min(count, 9)))
    make_dirty(iommu, world.hwpt, iova, sum(1 << index for index in chosen), count, page)
    expected = sum({1 << ((iova + index * page - IOVA) // PAGE) for index in chosen})
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == expected


def test_dirty_steps_over_holes(iommu: File, world: World) -> None:
    map_user(iommu, world.ioas, world.buffer.address, PAGE, IOVA + LENGTH + 5 * PAGE)
    make_dirty(iommu, world.hwpt, IOVA + LENGTH - PAGE, 0b1111111, 7)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 1 << (COUNT - 1)
    assert get_dirty(iommu, world.hwpt, IOVA + LENGTH + 5 * PAGE, PAGE) == 1


def test_dirty_whose_reply_faults_has_its_effect(iommu: File, world: World, memory: Arena) -> None:
    memory.write(memory.page(1), b"\x01")
    fields = {"iova": IOVA, "length": SMALL, "page_size": SMALL, "uptr": memory.page(1)}
    memory.write(memory.address, command(abi.IOMMU_TEST_OP_DIRTY, world.hwpt, "dirty", **fields))
    memory.read_only(0)
    with fails(errno.EFAULT):
        abi.IOMMU_TEST_CMD.raw(iommu, memory.address)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 1


# -- HWPT_GET_DIRTY_BITMAP: arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 2, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"__reserved": 1, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"hwpt_id": 0, "length": 0}, errno.ENOENT),
        pytest.param(
            {"length": 0, "iova": U64_MAX, "page_size": 0},
            errno.EINVAL,
            marks=pytest.mark.has("dirty-bitmap-length-0"),
        ),
        ({"iova": U64_MAX, "length": 2, "page_size": 0}, errno.EOVERFLOW),
        ({"iova": IOVA + SMALL, "length": PAGE}, errno.EINVAL),
        ({"length": SMALL}, errno.EINVAL),
        ({"page_size": 0}, errno.EINVAL),
        ({"page_size": 2 * MiB}, errno.EINVAL),
        ({"iova": IOVA + PAGE, "length": 3 * PAGE, "page_size": 2 * PAGE}, errno.EINVAL),
        ({"length": 3 * PAGE, "page_size": 2 * PAGE}, errno.EINVAL),
        ({"page_size": PAGE + 1, "iova": IOVA + PAGE}, errno.EINVAL),
    ],
)
def test_get_dirty_bitmap_refuses(
    iommu: File, world: World, memory: Arena, fields: dict[str, int], number: int
) -> None:
    make_dirty(iommu, world.hwpt, IOVA, 1, 1)
    arguments = {"hwpt_id": world.hwpt, "iova": IOVA, "length": PAGE, "page_size": PAGE, "data": memory.address}
    with fails(number):
        IOMMU_HWPT_GET_DIRTY_BITMAP(iommu, **{**arguments, **fields})
    assert get_dirty(iommu, world.hwpt, IOVA, PAGE) == 1, "what was refused has cleared nothing"


def test_get_dirty_bitmap_without_tracking_comes_last(iommu: File, world: World) -> None:
    plain = hwpt_alloc(iommu, world.idev, world.ioas)
    with fails(errno.EINVAL):
        get_dirty(iommu, plain, IOVA + SMALL, PAGE)
    with fails(errno.EOPNOTSUPP):
        get_dirty(iommu, plain, IOVA, PAGE)


def test_the_range_is_aligned_to_the_ioas_and_not_to_the_page(kernel: Backend, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    hwpt = tracked_hwpt(iommu, mock.idev, ioas)
    with kernel.buffer(PAGE) as buffer:
        map_user(iommu, ioas, buffer.address, SMALL, IOVA + SMALL)
        make_dirty(iommu, hwpt, IOVA + SMALL, 1, 1, SMALL)
        with fails(errno.EINVAL):
            get_dirty(iommu, hwpt, IOVA + SMALL // 2, SMALL, SMALL // 2)
        with fails(errno.EINVAL):
            get_dirty(iommu, hwpt, IOVA + SMALL, SMALL // 2, SMALL // 2)
        assert get_dirty(iommu, hwpt, IOVA + SMALL, SMALL, SMALL // 2) == 0b11


# -- HWPT_GET_DIRTY_BITMAP: what it says -----------------------------------------------------------------------------


def test_bitmap_says_what_was_written_to_and_then_that_it_is_clean(iommu: File, world: World) -> None:
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


def test_no_clear_leaves_it_dirty(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, clear=False) == ODD
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, clear=False) == ODD
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, clear=False) == 0


def test_bits_are_set_and_never_cleared(iommu: File, world: World, memory: Arena) -> None:
    make_dirty(iommu, world.hwpt, IOVA, 0b0110, 4)
    memory.write(memory.address, b"\xf0\x0f")
    dirty_to(iommu, world.hwpt, IOVA, LENGTH, PAGE, memory.address)
    assert memory.read(memory.address, 3) == b"\xf6\x0f\0"


def test_two_writes_to_a_page_are_one_bit(iommu: File, world: World) -> None:
    for _ in range(2):
        make_dirty(iommu, world.hwpt, IOVA, 0b10, 2)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0b10
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


@pytest.mark.parametrize("page", [PAGE, 2 * PAGE, 8 * PAGE, 64 * PAGE])
def test_bit_of_a_larger_page_is_set_for_any_dirty_leaf_in_it(iommu: File, world: World, page: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, page) == grouped(ODD, page // PAGE)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, page) == 0


@pytest.mark.since("6.19")
@pytest.mark.parametrize("page", [SMALL, 1024, 64, 8, 2])
def test_every_bit_of_a_dirty_leaf_is_set(iommu: File, world: World, page: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, page) == spread(ODD, PAGE // page)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, page) == 0


@pytest.mark.parametrize(("page", "counts_as"), [(3 * PAGE, PAGE), (5 * PAGE, PAGE), (7 * 2 * PAGE, 2 * PAGE)])
def test_page_size_counts_as_its_lowest_bit(iommu: File, world: World, page: int, counts_as: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    # The range must be aligned to the bits of (page - 1): the whole buffer is, and so says the kernel.
    assert (IOVA | (IOVA + LENGTH)) & (page - 1) == 0
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH, page) & ~(1 << 64) == grouped(ODD, counts_as // PAGE)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 511, SMALL, 0xFF1, 4091, 4095])
def test_bitmap_may_begin_at_any_byte(iommu: File, world: World, memory: Arena, offset: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    dirty_to(iommu, world.hwpt, IOVA, LENGTH, PAGE, memory.page(1) + offset)
    expected = bytearray(3 * PAGE)
    expected[PAGE + offset : PAGE + offset + 8] = ODD.to_bytes(8, "little")
    assert memory.read(memory.address, 3 * PAGE) == expected


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (0, 7), (7, 8), (3, 41), (40, 63), (63, 63)])
def test_part_of_the_range_can_be_read(iommu: File, world: World, first: int, last: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    mask = ((2 << last) - 1) & ~((1 << first) - 1)
    length = (last - first + 1) * PAGE
    assert get_dirty(iommu, world.hwpt, IOVA + first * PAGE, length) == (ODD & mask) >> first
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD & ~mask, "the rest is dirty still"


@pytest.mark.parametrize("seed", range(8))
def test_random_sets_in_random_pieces(iommu: File, world: World, memory: Arena, seed: int) -> None:
    chance = random.Random(seed)
    dirty = 0
    for _ in range(12):
        first = chance.randrange(COUNT)
        count = chance.randint(1, COUNT - first)
        bits = chance.getrandbits(count) & chance.getrandbits(count)
        make_dirty(iommu, world.hwpt, IOVA + first * PAGE, bits, count)
        dirty |= bits << first
        scale = chance.choice([1, 2, 4])
        first = chance.randrange(COUNT // scale) * scale
        count = chance.randint(1, (COUNT - first) // scale) * scale
        clear = chance.random() < 0.5
        data, before = memory.address + chance.randrange(PAGE), chance.randbytes(16)
        memory.write(data, before)
        dirty_to(iommu, world.hwpt, IOVA + first * PAGE, count * PAGE, scale * PAGE, data, clear)
        seen = dirty >> first & ((1 << count) - 1)
        want = int.from_bytes(before, "little") | grouped(seen, scale)
        assert int.from_bytes(memory.read(data, 16), "little") == want
        if clear:
            dirty &= ~(seen << first)


# -- areas -----------------------------------------------------------------------------------------------------------


def test_range_may_cover_several_mappings(iommu: File, world: World) -> None:
    map_user(iommu, world.ioas, world.buffer.address, 4 * PAGE, IOVA + LENGTH)
    map_user(iommu, world.ioas, world.buffer.address, 4 * PAGE, IOVA + LENGTH + 4 * PAGE)
    bits = 0b1010_0101_1 << (COUNT - 1)
    make_dirty(iommu, world.hwpt, IOVA, bits, COUNT + 8)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH + 8 * PAGE) == bits


def test_reading_stops_at_a_hole_and_says_nothing(iommu: File, world: World) -> None:
    beyond = IOVA + LENGTH + PAGE
    map_user(iommu, world.ioas, world.buffer.address, PAGE, beyond)
    make_dirty(iommu, world.hwpt, IOVA, (1 << (COUNT + 1)) | 1, COUNT + 2)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH + 2 * PAGE) == 1
    assert get_dirty(iommu, world.hwpt, beyond, PAGE) == 1, "it was not reached"


def test_range_that_begins_in_a_hole_says_nothing(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, world.hwpt, IOVA - PAGE, LENGTH + PAGE) == 0
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD


@pytest.mark.parametrize("iova", [0, APERTURE[1] + 1, 1 << 40, U64_MAX - PAGE + 1])
def test_range_without_a_mapping_is_no_error(iommu: File, world: World, iova: int) -> None:
    assert get_dirty(iommu, world.hwpt, iova, PAGE) == 0


def test_range_may_reach_up_to_the_end_of_the_space(iommu: File, world: World, memory: Arena) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    dirty_to(iommu, world.hwpt, IOVA, U64_MAX - IOVA + 1, PAGE, memory.address)
    assert memory.read(memory.address, 16) == ODD.to_bytes(16, "little")


def test_unmapping_takes_the_dirty_bits_along(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ALL, COUNT)
    unmap(iommu, world.ioas, IOVA, LENGTH)
    map_user(iommu, world.ioas, world.buffer.address, LENGTH, IOVA)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


def test_two_mappings_of_a_page_are_dirty_each_for_itself(iommu: File, world: World) -> None:
    copy(iommu, world.ioas, world.ioas, IOVA, 4 * PAGE, IOVA + LENGTH)
    make_dirty(iommu, world.hwpt, IOVA + LENGTH, 0b1001, 4)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0
    assert get_dirty(iommu, world.hwpt, IOVA + LENGTH, 4 * PAGE) == 0b1001


def test_pages_mapped_while_tracking_are_tracked(iommu: File, world: World) -> None:
    map_user(iommu, world.ioas, world.buffer.address, PAGE, IOVA + LENGTH)
    make_dirty(iommu, world.hwpt, IOVA + LENGTH, 1, 1)
    assert get_dirty(iommu, world.hwpt, IOVA + LENGTH, PAGE) == 1


def test_mappings_that_no_device_may_write_to_get_dirty_all_the_same(iommu: File, world: World) -> None:
    map_user(iommu, world.ioas, world.buffer.address, PAGE, IOVA + LENGTH, prot=READ)
    make_dirty(iommu, world.hwpt, IOVA + LENGTH, 1, 1)
    assert get_dirty(iommu, world.hwpt, IOVA + LENGTH, PAGE) == 1


# -- bitmaps that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [0, 8, 1 << 46, 1 << 63, U64_MAX - 3, U64_MAX])
def test_bitmap_at_no_address_loses_what_was_dirty(iommu: File, world: World, data: int) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    dirty_to(iommu, world.hwpt, IOVA, LENGTH, PAGE, data)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0


def test_no_clear_loses_nothing_to_a_bad_bitmap(iommu: File, world: World) -> None:
    make_dirty(iommu, world.hwpt, IOVA, ODD, COUNT)
    dirty_to(iommu, world.hwpt, IOVA, LENGTH, PAGE, 0, clear=False)
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == ODD


@pytest.mark.parametrize("how", ["unmap", "no_access", "read_only"])
@pytest.mark.parametrize("bad", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_page_of_the_bitmap_counts_for_itself(
    iommu: File, world: World, memory: Arena, how: str, bad: tuple[int, ...]
) -> None:
    # Pages of one byte: a leaf takes 512 bytes of the bitmap, eight leaves a page. It begins in the middle of page 0.
    bits = 0b1011_11011011_1101
    make_dirty(iommu, world.hwpt, IOVA, bits, 16)
    memory.write(memory.address, bytes(3 * PAGE))
    for page in bad:
        getattr(memory, how)(page)
    dirty_to(iommu, world.hwpt, IOVA, 16 * PAGE, 1, memory.address + 2048)
    whole = bytes(2048) + spread(bits, 4096).to_bytes(8192, "little") + bytes(2048)
    for page in set(range(3)) - set(bad):
        assert memory.read(memory.page(page), PAGE) == whole[page * PAGE : page * PAGE + PAGE], f"page {page}"
    assert get_dirty(iommu, world.hwpt, IOVA, LENGTH) == 0, "all has been cleared"


@pytest.mark.since("6.19")
def test_leaf_that_begins_in_a_bad_page_is_lost_whole(iommu: File, world: World, memory: Arena) -> None:
    make_dirty(iommu, world.hwpt, IOVA, 0b11111, 5)
    memory.no_access(0)
    dirty_to(iommu, world.hwpt, IOVA, 5 * PAGE, 1, memory.page(1) - 1024 - 256)
    expected = bytes(256) + b"\xff" * 1024 + bytes(PAGE - 1280)
    assert memory.read(memory.page(1), PAGE) == expected, "the third leaf begins 256 bytes before the page"


@pytest.mark.since("6.19")
def test_leaf_that_runs_into_a_bad_page_is_there_up_to_it(iommu: File, world: World, memory: Arena) -> None:
    make_dirty(iommu, world.hwpt, IOVA, 0b11111, 5)
    memory.unmap(1)
    dirty_to(iommu, world.hwpt, IOVA, 5 * PAGE, 1, memory.page(1) - 1024 - 256)
    assert memory.read(memory.address, PAGE) == bytes(PAGE - 1280) + b"\xff" * 1280


@pytest.mark.since("6.19")
def test_bitmap_of_more_than_two_mebibytes_is_filled_to_its_end(kernel: Backend, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    mock = mock_domain(iommu, ioas)
    hwpt = tracked_hwpt(iommu, mock.idev, ioas)
    length, count = 20 * MiB, 20 * MiB // PAGE
    with kernel.buffer(MiB) as buffer, kernel.buffer(3 * MiB) as bitmap:
        for index in range(20):
            map_user(iommu, ioas, buffer.address, MiB, IOVA + index * MiB)
        chance = random.Random(7)
        bits = chance.getrandbits(count) | 0b1111 << 4094
        make_dirty(iommu, hwpt, IOVA, bits, count)
        dirty_to(iommu, hwpt, IOVA, length, 1, bitmap.address + 1)
        assert bitmap.view[0] == 0
        for index in range(count):
            start = 1 + index * 512
            assert bytes(bitmap.view[start : start + 512]) == (b"\xff" if bits >> index & 1 else b"\0") * 512
        assert bytes(bitmap.view[1 + count * 512 :]).count(0) == 3 * MiB - 1 - count * 512


# -- PASIDs and capabilities -----------------------------------------------------------------------------------------


@pytest.mark.since("6.15")
def test_tracking_of_a_hwpt_that_a_pasid_is_attached_to(iommu: File, world: World) -> None:
    hwpt = tracked_hwpt(iommu, world.idev, world.ioas, on=False, flags=IOMMU_HWPT_ALLOC_PASID)
    mock = mock_domain_flags(iommu, hwpt, abi.MOCK_FLAGS_DEVICE_PASID)
    run(iommu, abi.IOMMU_TEST_OP_PASID_ATTACH, mock.stdev, "pasid_attach", pasid=100, pt_id=hwpt)
    set_tracking(iommu, hwpt)
    make_dirty(iommu, hwpt, IOVA, ODD, COUNT)
    assert get_dirty(iommu, hwpt, IOVA, LENGTH) == ODD
    set_tracking(iommu, hwpt, False)
    run(iommu, abi.IOMMU_TEST_OP_PASID_DETACH, mock.stdev, "pasid_detach", pasid=100)
    without = abi.MOCK_FLAGS_DEVICE_PASID | abi.MOCK_FLAGS_DEVICE_NO_DIRTY
    other = mock_domain_flags(iommu, ioas_alloc(iommu), without)
    with fails(errno.EINVAL):
        run(iommu, abi.IOMMU_TEST_OP_PASID_ATTACH, other.stdev, "pasid_attach", pasid=100, pt_id=hwpt)
