"""Dirty tracking by an SMMUv3's own dirty states (HTTU): a device's DMA sets exactly its pages.

Mirrors arm_smmu_set_dirty_tracking() and arm_smmu_read_and_clear_dirty() of drivers/iommu/arm/arm-smmu-v3 and
arm_lpae_read_and_clear_dirty() of io-pgtable-arm.c: a page is dirty when it is mapped; the states are kept all the
time, tracking on or off; a block is dirty as a whole and stays a block; nothing is flushed when a page is made clean,
so that a unit need not notice the next write to it before its TLB has forgotten it. The checks of the two ioctls are in
test_dirty.py; DMA with PASIDs is in test_pasid_dirty.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.steps import PAGE, READ, MiB, destroy, fails, hwpt_alloc, map_user, option_set, unmap
from conformance.tracked import COUNT, IOVA, bits, dirty
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_OPTION_HUGE_PAGES,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "smmuv3", "dirty")]

DIRTY, PASID = IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_PASID


# -- what is there ---------------------------------------------------------------------------------------------------


def test_hardware_information_says_so_and_hwpts_can_be_had(iommu: File, device: VfioDevice, ioas: int) -> None:
    assert IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING
    for flags in (DIRTY, DIRTY | PASID):
        hwpt = hwpt_alloc(iommu, device.devid, ioas, flags)
        set_tracking(iommu, hwpt)
        assert device.attach(hwpt) == hwpt
        set_tracking(iommu, hwpt, on=False)


def test_a_hwpt_that_was_not_made_for_it_is_eopnotsupp(iommu: File, device: VfioDevice, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        set_tracking(iommu, hwpt)
    with fails(errno.EOPNOTSUPP):
        dirty(iommu, hwpt)


# -- a device's DMA --------------------------------------------------------------------------------------------------


def test_writes_of_the_device_make_their_pages_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    assert dirty(iommu, tracked) == 0
    edu.store(IOVA, 1)
    edu.store(IOVA + 7 * PAGE + 4095, 1)
    edu.store(IOVA + 20 * PAGE - 1, 2)
    edu.store(IOVA + 63 * PAGE, PAGE)
    assert dirty(iommu, tracked) == bits(0, 7, 19, 20, 63)
    assert dirty(iommu, tracked) == 0


def test_reads_make_nothing_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    edu.load(IOVA, PAGE)
    edu.load(IOVA + 9 * PAGE + 100, 8)
    assert dirty(iommu, tracked) == 0
    edu.store(IOVA, 4)
    assert dirty(iommu, tracked) == bits(0)


def test_what_is_not_cleared_stays(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + PAGE, 4)
    for _ in range(2):
        assert dirty(iommu, tracked, clear=False) == bits(1)
    edu.store(IOVA + 3 * PAGE, 4)
    assert dirty(iommu, tracked) == bits(1, 3)
    assert dirty(iommu, tracked) == 0


def test_part_of_the_range_is_cleaned_alone(iommu: File, edu: Edu, tracked: int) -> None:
    for page in range(4):
        edu.store(IOVA + page * PAGE, 4)
    assert get_dirty(iommu, tracked, IOVA + PAGE, 2 * PAGE) == bits(0, 1)
    assert dirty(iommu, tracked) == bits(0, 3)


def test_a_coarser_bitmap_has_a_bit_for_several_pages(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + 5 * PAGE, 4)
    edu.store(IOVA + 40 * PAGE, 4)
    assert get_dirty(iommu, tracked, IOVA, COUNT * PAGE, page=8 * PAGE) == bits(0, 5)


def test_a_page_counts_again_when_the_unit_has_forgotten_it(iommu: File, edu: Edu, ioas: int, tracked: int) -> None:
    for _ in range(3):
        edu.store(IOVA + 2 * PAGE, 8)
        assert dirty(iommu, tracked) == bits(2)
        edu.vfio.attach(ioas)
        edu.vfio.attach(tracked)


def test_states_are_kept_while_tracking_is_off_and_switching_on_cleans(
    iommu: File, edu: Edu, ioas: int, memory: Buffer
) -> None:
    map_user(iommu, ioas, memory.address, COUNT * PAGE, IOVA)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    edu.vfio.attach(hwpt)
    assert dirty(iommu, hwpt) == (1 << COUNT) - 1
    edu.store(IOVA + PAGE, 4)
    assert dirty(iommu, hwpt, clear=False) == bits(1)
    set_tracking(iommu, hwpt)
    assert dirty(iommu, hwpt) == 0
    edu.store(IOVA + 2 * PAGE, 4)
    set_tracking(iommu, hwpt, on=False)
    edu.store(IOVA + 3 * PAGE, 4)
    assert dirty(iommu, hwpt, clear=False) == bits(2, 3)
    set_tracking(iommu, hwpt)
    assert dirty(iommu, hwpt) == 0


def test_dirty_pages_stay_after_the_device_has_gone(iommu: File, edu: Edu, ioas: int, tracked: int) -> None:
    edu.store(IOVA + 6 * PAGE, 4)
    edu.vfio.attach(ioas)
    edu.store(IOVA + 7 * PAGE, 4)
    assert dirty(iommu, tracked) == bits(6)


def test_a_refused_write_makes_nothing_dirty(iommu: File, edu: Edu, ioas: int, memory: Buffer) -> None:
    half = COUNT * PAGE // 2
    map_user(iommu, ioas, memory.address, half, IOVA, prot=READ)
    map_user(iommu, ioas, memory.address, half, IOVA + half)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    edu.vfio.attach(hwpt)
    set_tracking(iommu, hwpt)
    edu.store(IOVA, 4)
    assert dirty(iommu, hwpt) == 0
    edu.store(IOVA + half - 2, 4)  # its second half goes through
    assert dirty(iommu, hwpt) == bits(32)


def test_a_new_mapping_is_dirty_unless_it_may_only_be_read(
    iommu: File, ioas: int, memory: Buffer, tracked: int
) -> None:
    beyond, whole = IOVA + COUNT * PAGE, (COUNT + 2) * PAGE
    map_user(iommu, ioas, memory.address, PAGE, beyond)
    map_user(iommu, ioas, memory.address, PAGE, beyond + PAGE, prot=READ)
    assert get_dirty(iommu, tracked, IOVA, whole) == bits(COUNT)
    assert get_dirty(iommu, tracked, IOVA, whole) == 0
    unmap(iommu, ioas, beyond, PAGE)
    map_user(iommu, ioas, memory.address, PAGE, beyond)
    assert get_dirty(iommu, tracked, IOVA, whole) == bits(COUNT)


@pytest.mark.needs("huge_pages")
@pytest.mark.parametrize("huge", [1, 0], ids=["block", "pages"])
def test_a_block_is_dirty_as_a_whole_and_pages_are_not(
    kernel: Backend, iommu: File, edu: Edu, ioas: int, huge: int
) -> None:
    size = 2 * MiB
    buffer = kernel.buffer(size, huge=True)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, huge, ioas)
    map_user(iommu, ioas, buffer.address, size, size)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    edu.vfio.attach(hwpt)
    set_tracking(iommu, hwpt)
    edu.load(size + 9 * PAGE, 4)
    assert get_dirty(iommu, hwpt, size, size) == 0
    edu.store(size + 77 * PAGE, 4)
    assert get_dirty(iommu, hwpt, size, size, clear=False) == ((1 << 512) - 1 if huge else bits(77))
    # Asked for a part of it, the block is clean afterwards as a whole.
    assert get_dirty(iommu, hwpt, size + 77 * PAGE, PAGE) & 1 == 1
    assert get_dirty(iommu, hwpt, size, size) == 0
    edu.vfio.attach(ioas)
    destroy(iommu, hwpt)
    unmap(iommu, ioas, size, size)
    buffer.close()
