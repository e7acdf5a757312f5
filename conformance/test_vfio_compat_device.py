"""The VFIO container's ioctls on an iommufd whose IOAS a device is attached to: what they map and cut is what DMA sees.

Mirrors drivers/iommu/iommufd/vfio_compat.c and iopt_cut_iova(). Rows that need no device are in test_vfio_compat.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.layout import Layout
from conformance.steps import PAGE, fails, ioas_alloc, iova_ranges, option_get
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_OPTION_HUGE_PAGES, IOMMU_VFIO_IOAS, IOMMU_VFIO_IOAS_SET
from uapi.vfio import (
    VFIO_CHECK_EXTENSION,
    VFIO_DMA_CC_IOMMU,
    VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_IOMMU_GET_INFO,
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_UNMAP_DMA,
    VFIO_SET_IOMMU,
    VFIO_TYPE1_IOMMU,
    VFIO_TYPE1v2_IOMMU,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device")

IOVA, PAGES = 0x10_0000, 8
LENGTH = PAGES * PAGE
RW = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE


@pytest.fixture
def ioas(iommu: File) -> int:
    """The compat IOAS."""
    ioas = ioas_alloc(iommu)
    IOMMU_VFIO_IOAS(iommu, op=IOMMU_VFIO_IOAS_SET, ioas_id=ioas)
    return ioas


@pytest.fixture
def type1(iommu: File, ioas: int) -> None:
    """Type 1, not v2: mappings can be cut."""
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)


@pytest.fixture
def pages(kernel: Backend) -> Iterator[Buffer]:
    """Eight zeroed pages."""
    buffer = kernel.buffer(LENGTH)
    yield buffer
    buffer.close()


def map_dma(iommu: File, pages: Buffer) -> None:
    VFIO_IOMMU_MAP_DMA(iommu, flags=RW, vaddr=pages.address, iova=IOVA, size=LENGTH)


def unmap_dma(iommu: File, iova: int, size: int, flags: int = 0) -> int:
    return VFIO_IOMMU_UNMAP_DMA(iommu, argsz=24, flags=flags, iova=iova, size=size).size


def written(edu: Edu, pages: Buffer, index: int) -> bool:
    """Whether a DMA write to a page of the mapping reaches it."""
    pages.view[index * PAGE : index * PAGE + 8] = b"before.."
    edu.store(IOVA + index * PAGE, 8)
    return bytes(pages.view[index * PAGE : index * PAGE + 8]) != b"before.."


def test_map_dma_is_seen_by_dma(iommu: File, edu: Edu, pages: Buffer) -> None:
    map_dma(iommu, pages)
    assert written(edu, pages, 1)


def test_map_dma_without_access_is_einval_beside_a_domain(
    iommu: File, device: VfioDevice, ioas: int, pages: Buffer
) -> None:
    device.attach(ioas)
    with fails(errno.EINVAL):
        VFIO_IOMMU_MAP_DMA(iommu, flags=0, vaddr=pages.address, iova=IOVA, size=LENGTH)


def test_domain_after_a_map_without_access_is_einval(iommu: File, device: VfioDevice, ioas: int, pages: Buffer) -> None:
    VFIO_IOMMU_MAP_DMA(iommu, flags=0, vaddr=pages.address, iova=IOVA, size=LENGTH)
    with fails(errno.EINVAL):
        device.attach(ioas)


@pytest.mark.usefixtures("type1")
def test_type1_unmap_in_the_middle_leaves_both_ends(iommu: File, edu: Edu, pages: Buffer) -> None:
    map_dma(iommu, pages)
    assert unmap_dma(iommu, IOVA + 3 * PAGE, 2 * PAGE) == 2 * PAGE
    assert [written(edu, pages, index) for index in (2, 3, 4, 5)] == [True, False, False, True]


@pytest.mark.usefixtures("type1")
def test_type1_pieces_are_unmapped_one_by_one(iommu: File, device: VfioDevice, ioas: int, pages: Buffer) -> None:
    device.attach(ioas)
    map_dma(iommu, pages)
    assert [unmap_dma(iommu, IOVA + index * PAGE, PAGE) for index in (4, 0, 7)] == [PAGE] * 3
    assert unmap_dma(iommu, 0, 0, VFIO_DMA_UNMAP_FLAG_ALL) == 5 * PAGE


@pytest.mark.usefixtures("type1")
@pytest.mark.parametrize(("start", "size"), [(0x800, PAGE), (0, PAGE + 0x800)])
def test_type1_cut_off_a_page_is_einval(
    iommu: File, device: VfioDevice, ioas: int, pages: Buffer, start: int, size: int
) -> None:
    device.attach(ioas)
    map_dma(iommu, pages)
    with fails(errno.EINVAL):
        unmap_dma(iommu, IOVA + start, size)
    assert unmap_dma(iommu, 0, 0, VFIO_DMA_UNMAP_FLAG_ALL) == LENGTH


@pytest.mark.usefixtures("type1")
def test_type1_pieces_reach_a_domain_that_comes_later(
    iommu: File, device: VfioDevice, ioas: int, pages: Buffer
) -> None:
    map_dma(iommu, pages)
    assert unmap_dma(iommu, IOVA + 3 * PAGE, 2 * PAGE) == 2 * PAGE
    device.attach(ioas)
    edu = Edu(device)
    assert [written(edu, pages, index) for index in (2, 3, 5)] == [True, False, True]
    edu.remove()


def test_v2_unmap_in_the_middle_is_enoent_and_nothing_goes(iommu: File, edu: Edu, pages: Buffer) -> None:
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1v2_IOMMU)
    map_dma(iommu, pages)
    with fails(errno.ENOENT):
        unmap_dma(iommu, IOVA + 3 * PAGE, 2 * PAGE)
    assert written(edu, pages, 3)


def test_type1_beside_a_domain_and_a_mapping_is_einval(
    iommu: File, device: VfioDevice, ioas: int, pages: Buffer
) -> None:
    device.attach(ioas)
    map_dma(iommu, pages)
    with fails(errno.EINVAL):
        VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    assert option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas) == 1


def test_type1_beside_a_domain_alone_switches_large_pages_off(iommu: File, device: VfioDevice, ioas: int) -> None:
    device.attach(ioas)
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    assert option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas) == 0


@pytest.mark.needs("vtd")
def test_coherency_is_what_every_hwpt_enforces(iommu: File, device: VfioDevice, ioas: int, layout: Layout) -> None:
    assert VFIO_CHECK_EXTENSION.raw(iommu, VFIO_DMA_CC_IOMMU) == 1
    device.attach(ioas)
    assert VFIO_CHECK_EXTENSION.raw(iommu, VFIO_DMA_CC_IOMMU) == layout.snoop_control


@pytest.mark.needs("smmuv3")
def test_coherency_is_enforced_for_a_device_whose_firmware_says_canwbs(
    iommu: File, device: VfioDevice, ioas: int
) -> None:
    """The driver takes the firmware's word: nothing in the SMMU enforces it."""
    device.attach(ioas)
    assert VFIO_CHECK_EXTENSION.raw(iommu, VFIO_DMA_CC_IOMMU) == 1


def test_info_has_the_domains_page_sizes_and_the_ranges_that_are_left(
    iommu: File, device: VfioDevice, ioas: int
) -> None:
    before = VFIO_IOMMU_GET_INFO(iommu)
    device.attach(ioas)
    after = VFIO_IOMMU_GET_INFO(iommu)
    assert before.iova_pgsizes == 0xFFFF_FFFF_FFFF_F000
    assert after.iova_pgsizes == 1 << 12 | 1 << 21 | 1 << 30
    assert after.argsz == before.argsz + 16 * (len(iova_ranges(iommu, ioas)) - 1)
