"""The VFIO container's ioctls on an iommufd, as far as they need no device.

Mirrors drivers/iommu/iommufd/vfio_compat.c. They work on the context's compat IOAS (IOMMU_VFIO_IOAS SET), are
selected by the whole command, and size their structs by argsz: what lies behind the fields is never looked at.
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    answer,
    fails,
    ioas_alloc,
    iova_alignment,
    map_user,
    option_get,
    unmap,
    unmap_all,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_OPTION_HUGE_PAGES, IOMMU_VFIO_IOAS, IOMMU_VFIO_IOAS_SET
from uapi.vfio import (
    VFIO_API_VERSION,
    VFIO_CHECK_EXTENSION,
    VFIO_DMA_CC_IOMMU,
    VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_VADDR,
    VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    VFIO_DMA_UNMAP_FLAG_VADDR,
    VFIO_GET_API_VERSION,
    VFIO_IOMMU_DIRTY_PAGES,
    VFIO_IOMMU_GET_INFO,
    VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    VFIO_IOMMU_UNMAP_DMA,
    VFIO_NOIOMMU_IOMMU,
    VFIO_SET_IOMMU,
    VFIO_TYPE1_IOMMU,
    VFIO_UNMAP_ALL,
    VFIO_UPDATE_VADDR,
    VFIO_TYPE1v2_IOMMU,
    vfio_info_cap_header,
    vfio_iommu_type1_info,
    vfio_iova_range,
)

RW = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE
#: 24 bytes of info, 12 of DMA_AVAIL rounded up to 16, 16 of IOVA_RANGE and one range of 16.
INFO_TOTAL = 24 + 16 + 16 + 16


@pytest.fixture
def ioas(iommu: File) -> int:
    """The compat IOAS."""
    ioas = ioas_alloc(iommu)
    IOMMU_VFIO_IOAS(iommu, op=IOMMU_VFIO_IOAS_SET, ioas_id=ioas)
    return ioas


def map_dma(iommu: File, va: int, iova: int, size: int, flags: int = RW, argsz: int = 32) -> None:
    VFIO_IOMMU_MAP_DMA(iommu, argsz=argsz, flags=flags, vaddr=va, iova=iova, size=size)


def unmap_dma(iommu: File, iova: int, size: int, flags: int = 0, argsz: int = 24) -> int:
    return VFIO_IOMMU_UNMAP_DMA(iommu, argsz=argsz, flags=flags, iova=iova, size=size).size


def test_api_version_is_0(iommu: File) -> None:
    assert VFIO_GET_API_VERSION.raw(iommu) == VFIO_API_VERSION == 0


@pytest.mark.parametrize(
    ("extension", "there"),
    [
        (VFIO_TYPE1_IOMMU, 1),
        (VFIO_TYPE1v2_IOMMU, 1),
        (VFIO_UNMAP_ALL, 1),
        (VFIO_UPDATE_VADDR, 0),
        (0, 0),
        (2, 0),
        (5, 0),
        (6, 0),
        (7, 0),
        (11, 0),
        (U32_MAX, 0),
    ],
)
def test_check_extension(iommu: File, extension: int, there: int) -> None:
    assert VFIO_CHECK_EXTENSION.raw(iommu, extension) == there


def test_check_extension_of_coherency_without_an_ioas_is_enodev(iommu: File) -> None:
    with fails(errno.ENODEV):
        VFIO_CHECK_EXTENSION.raw(iommu, VFIO_DMA_CC_IOMMU)


@pytest.mark.usefixtures("ioas")
def test_check_extension_of_coherency_without_a_domain_is_1(iommu: File) -> None:
    assert VFIO_CHECK_EXTENSION.raw(iommu, VFIO_DMA_CC_IOMMU) == 1


@pytest.mark.parametrize("arg", [0, 1])
def test_dirty_pages_is_enotty(iommu: File, arg: int) -> None:
    with fails(errno.ENOTTY):
        VFIO_IOMMU_DIRTY_PAGES.raw(iommu, arg)


# --------------------------------------------------------------------------------------------------------- SET_IOMMU


@pytest.mark.parametrize("kind", [VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU])
def test_set_iommu_without_an_ioas_is_enodev(iommu: File, kind: int) -> None:
    with fails(errno.ENODEV):
        VFIO_SET_IOMMU.raw(iommu, kind)


@pytest.mark.parametrize("kind", [0, 2, 4, VFIO_NOIOMMU_IOMMU, 100])
def test_set_iommu_to_another_type_is_einval(iommu: File, kind: int) -> None:
    with fails(errno.EINVAL):
        VFIO_SET_IOMMU.raw(iommu, kind)


def test_set_iommu_may_be_repeated(iommu: File, ioas: int) -> None:
    for kind in (VFIO_TYPE1v2_IOMMU, VFIO_TYPE1v2_IOMMU, VFIO_TYPE1_IOMMU, VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU):
        VFIO_SET_IOMMU.raw(iommu, kind)


def test_set_iommu_to_type1_switches_huge_pages_off(iommu: File, ioas: int) -> None:
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1v2_IOMMU)
    before = option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas)
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1v2_IOMMU)
    assert (before, option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas)) == (1, 0)
    assert iova_alignment(iommu, ioas) == PAGE


def test_set_iommu_to_type1_over_a_misfit_area_is_eaddrinuse(iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=1)
    with fails(errno.EADDRINUSE):
        VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1v2_IOMMU)


# ----------------------------------------------------------------------------------------------------------- MAP_DMA


def test_map_dma_makes_an_area_of_the_compat_ioas(iommu: File, ioas: int) -> None:
    map_dma(iommu, NOWHERE, 0x10000, 2 * PAGE)
    with fails(errno.EEXIST):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=0x11000)
    assert unmap(iommu, ioas, 0x10000, 2 * PAGE) == 2 * PAGE


def test_map_dma_without_an_ioas_is_enodev(iommu: File) -> None:
    with fails(errno.ENODEV):
        map_dma(iommu, NOWHERE, 0, PAGE)


@pytest.mark.parametrize(
    ("flags", "argsz"),
    [(RW, 31), (RW, 0), (VFIO_DMA_MAP_FLAG_VADDR, 32), (RW | 8, 32), (0x8000_0000, 32), (RW | 8, 31)],
)
def test_map_dma_with_a_small_argsz_or_another_flag_is_einval(iommu: File, flags: int, argsz: int) -> None:
    """Before the IOAS is looked for."""
    with fails(errno.EINVAL):
        map_dma(iommu, NOWHERE, 0, PAGE, flags, argsz)


@pytest.mark.parametrize("flags", [0, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, RW])
def test_map_dma_takes_any_access_even_none(iommu: File, ioas: int, flags: int) -> None:
    map_dma(iommu, NOWHERE, 0, PAGE, flags)
    assert unmap_all(iommu, ioas) == PAGE


def test_map_dma_ignores_what_follows_its_fields(iommu: File, ioas: int) -> None:
    block = bytearray(bytes(VFIO_IOMMU_MAP_DMA.make(argsz=64, flags=RW, vaddr=NOWHERE, size=PAGE)) + b"\xff" * 32)
    VFIO_IOMMU_MAP_DMA.raw(iommu, block)
    assert unmap_all(iommu, ioas) == PAGE


@pytest.mark.parametrize(
    ("va", "iova", "size", "number"),
    [
        (NOWHERE, 0, 0, errno.EINVAL),
        pytest.param(NOWHERE, 0, U64_MAX, errno.EOVERFLOW, marks=pytest.mark.has("wrap-before-length")),
        pytest.param(NOWHERE, 0, U64_MAX, errno.EINVAL, marks=pytest.mark.lacks("wrap-before-length")),
        (0, 0, U64_MAX, errno.EINVAL),
        (U64_MAX, 0, 1, errno.EOVERFLOW),
        (NOWHERE, U64_MAX, 2, errno.EOVERFLOW),
        (NOWHERE, 0x11000, PAGE, errno.EEXIST),
    ],
)
def test_map_dma_follows_the_rules_of_a_fixed_map(
    iommu: File, ioas: int, va: int, iova: int, size: int, number: int
) -> None:
    map_dma(iommu, NOWHERE, 0x10000, 2 * PAGE)
    with fails(number):
        map_dma(iommu, va, iova, size)
    assert unmap_all(iommu, ioas) == 2 * PAGE


@pytest.mark.since("7.3")
def test_map_dma_at_the_last_byte_is_not_refused_as_map_does(iommu: File, ioas: int) -> None:
    """MAP's test of iova against U64_MAX is not here."""
    map_dma(iommu, NOWHERE, U64_MAX, 1)
    assert unmap_all(iommu, ioas) == 1


def test_map_dma_replies_nothing(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), VFIO_IOMMU_MAP_DMA.make(argsz=32, flags=RW, vaddr=NOWHERE, size=PAGE))
        memory.read_only(0)
        VFIO_IOMMU_MAP_DMA.raw(iommu, memory.page(0))
    assert unmap_all(iommu, ioas) == PAGE


@pytest.mark.parametrize(
    "call", [VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA, VFIO_IOMMU_GET_INFO], ids=["map", "unmap", "info"]
)
def test_bad_argument_is_efault_before_anything_else(iommu: File, call: object) -> None:
    assert answer(call.raw, iommu, 0) == errno.EFAULT  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------- UNMAP_DMA


def test_unmap_dma_without_an_ioas_is_enodev(iommu: File) -> None:
    with fails(errno.ENODEV):
        unmap_dma(iommu, 0, PAGE)


@pytest.mark.parametrize(
    ("flags", "argsz"),
    [
        (0, 23),
        (0, 0),
        (VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, 64),
        (VFIO_DMA_UNMAP_FLAG_VADDR, 24),
        (VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR, 24),
        (0x8000_0000, 24),
    ],
)
def test_unmap_dma_with_a_small_argsz_or_another_flag_is_einval(iommu: File, flags: int, argsz: int) -> None:
    with fails(errno.EINVAL):
        unmap_dma(iommu, 0, PAGE, flags, argsz)


def test_unmap_dma_returns_what_was_unmapped(iommu: File, ioas: int) -> None:
    map_dma(iommu, NOWHERE, 0x10000, 2 * PAGE)
    map_dma(iommu, NOWHERE, 0x20000, PAGE)
    assert unmap_dma(iommu, 0, 0x100000) == 3 * PAGE


def test_unmap_dma_of_nothing_succeeds_with_size_0(iommu: File, ioas: int) -> None:
    assert unmap_dma(iommu, 0, PAGE) == 0


def test_unmap_dma_of_size_0_is_einval(iommu: File, ioas: int) -> None:
    with fails(errno.EINVAL):
        unmap_dma(iommu, PAGE, 0)


def test_unmap_dma_that_wraps_is_eoverflow_with_the_size_written(iommu: File, ioas: int) -> None:
    arg = VFIO_IOMMU_UNMAP_DMA.make(argsz=24, iova=U64_MAX, size=2)
    with fails(errno.EOVERFLOW):
        VFIO_IOMMU_UNMAP_DMA.raw(iommu, arg)
    assert arg.size == 0


def test_unmap_dma_of_a_part_is_enoent_with_the_size_written(iommu: File, ioas: int) -> None:
    map_dma(iommu, NOWHERE, 0x10000, PAGE)
    map_dma(iommu, NOWHERE, 0x20000, 2 * PAGE)
    arg = VFIO_IOMMU_UNMAP_DMA.make(argsz=24, iova=0x10000, size=0x11000)
    with fails(errno.ENOENT):
        VFIO_IOMMU_UNMAP_DMA.raw(iommu, arg)
    assert arg.size == PAGE
    assert unmap_all(iommu, ioas) == 2 * PAGE


def test_unmap_all_takes_everything(iommu: File, ioas: int) -> None:
    map_dma(iommu, NOWHERE, 0x10000, PAGE)
    map_dma(iommu, NOWHERE, 1 << 60, PAGE)
    assert unmap_dma(iommu, 0, 0, VFIO_DMA_UNMAP_FLAG_ALL) == 2 * PAGE
    assert unmap_dma(iommu, 0, 0, VFIO_DMA_UNMAP_FLAG_ALL) == 0


@pytest.mark.parametrize(("iova", "size"), [(PAGE, 0), (0, PAGE), (0, U64_MAX)])
def test_unmap_all_with_a_range_is_einval(iommu: File, ioas: int, iova: int, size: int) -> None:
    with fails(errno.EINVAL):
        unmap_dma(iommu, iova, size, VFIO_DMA_UNMAP_FLAG_ALL)


def test_unmap_dma_reply_fault_is_efault_and_the_areas_are_gone(iommu: File, ioas: int) -> None:
    map_dma(iommu, NOWHERE, 0, PAGE)
    with arena(1) as memory:
        Arena.write(memory.page(0), VFIO_IOMMU_UNMAP_DMA.make(argsz=24, iova=0, size=PAGE))
        memory.read_only(0)
        with fails(errno.EFAULT):
            VFIO_IOMMU_UNMAP_DMA.raw(iommu, memory.page(0))
    assert unmap_all(iommu, ioas) == 0


@pytest.fixture
def type1(iommu: File, ioas: int) -> int:
    """The compat IOAS in type1 mode with 8 pages at 0x10000."""
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    map_dma(iommu, NOWHERE, 0x10000, 8 * PAGE)
    return ioas


@pytest.mark.parametrize(("first", "pages"), [(0, 1), (7, 1), (3, 2), (0, 8), (1, 7)])
def test_type1_unmaps_any_part_by_pages(iommu: File, type1: int, first: int, pages: int) -> None:
    assert unmap_dma(iommu, 0x10000 + first * PAGE, pages * PAGE) == pages * PAGE
    assert unmap_all(iommu, type1) == (8 - pages) * PAGE


def test_type1_leaves_two_areas_around_the_hole(iommu: File, type1: int) -> None:
    unmap_dma(iommu, 0x12000, PAGE)
    assert unmap(iommu, type1, 0x10000, 2 * PAGE) == 2 * PAGE
    assert unmap(iommu, type1, 0x13000, 5 * PAGE) == 5 * PAGE


@pytest.mark.parametrize(("iova", "size"), [(0x10800, PAGE), (0x10000, 0x800), (0x10002, PAGE - 2)])
def test_type1_cut_off_the_page_is_einval_without_a_reply(iommu: File, type1: int, iova: int, size: int) -> None:
    arg = VFIO_IOMMU_UNMAP_DMA.make(argsz=24, iova=iova, size=size)
    with fails(errno.EINVAL):
        VFIO_IOMMU_UNMAP_DMA.raw(iommu, arg)
    assert arg.size == size
    assert unmap_all(iommu, type1) == 8 * PAGE


def test_type1_does_not_cut_one_byte_behind_the_start(iommu: File, type1: int) -> None:
    """A cut after an area's first byte counts as none, so the area as a whole stands in the way."""
    with fails(errno.ENOENT):
        unmap_dma(iommu, 0x10001, PAGE - 1)
    assert unmap_all(iommu, type1) == 8 * PAGE


# ---------------------------------------------------------------------------------------------------------- GET_INFO


def get_info(iommu: File, argsz: int, room: int = 128) -> bytearray:
    """The block after GET_INFO, filled with a pattern before."""
    block = bytearray(b"\xa5" * room)
    block[:4] = argsz.to_bytes(4, "little")
    VFIO_IOMMU_GET_INFO.raw(iommu, block)
    return block


@pytest.mark.usefixtures("ioas")
@pytest.mark.parametrize("argsz", [0, 4, 15])
def test_get_info_with_a_small_argsz_is_einval(iommu: File, argsz: int) -> None:
    with fails(errno.EINVAL):
        get_info(iommu, argsz)


def test_get_info_without_an_ioas_is_enodev(iommu: File) -> None:
    with fails(errno.ENODEV):
        get_info(iommu, 16)


@pytest.mark.usefixtures("ioas")
def test_get_info_tells_page_sizes_and_the_room_it_wants(iommu: File) -> None:
    info = vfio_iommu_type1_info.from_buffer(get_info(iommu, 24))
    assert info.flags == VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS
    assert info.iova_pgsizes == 0xFFFF_FFFF_FFFF_F000
    assert (info.argsz, info.cap_offset) == (INFO_TOTAL, 0)


@pytest.mark.usefixtures("ioas")
def test_get_info_chains_two_capabilities(iommu: File) -> None:
    block = get_info(iommu, INFO_TOTAL)
    info = vfio_iommu_type1_info.from_buffer(block)
    assert (info.argsz, info.cap_offset) == (INFO_TOTAL, 24)
    avail = vfio_info_cap_header.from_buffer(block, 24)
    assert (avail.id, avail.version, avail.next) == (VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 40)
    assert ctypes.c_uint32.from_buffer(block, 32).value == U32_MAX
    ranges = vfio_info_cap_header.from_buffer(block, 40)
    assert (ranges.id, ranges.version, ranges.next) == (VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0)
    assert ctypes.c_uint32.from_buffer(block, 48).value == 1
    entry = vfio_iova_range.from_buffer(block, 56)
    assert (entry.start, entry.end) == (0, U64_MAX)


@pytest.mark.usefixtures("ioas")
def test_get_info_never_writes_past_its_argsz(iommu: File) -> None:
    for argsz in range(16, INFO_TOTAL + 9, 4):
        block = get_info(iommu, argsz)
        assert block[argsz:] == b"\xa5" * (len(block) - argsz)
        assert int.from_bytes(block[:4], "little") == INFO_TOTAL
        if argsz >= 24:
            assert int.from_bytes(block[16:20], "little") == (24 if argsz >= INFO_TOTAL else 0)
