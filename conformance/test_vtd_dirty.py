"""Dirty tracking by VT-d's own dirty bits: a device's DMA, with and without a guest's tables, sets exactly its pages.

Mirrors intel_iommu_set_dirty_tracking() of drivers/iommu/intel/iommu.c, intel_pasid_setup_dirty_tracking() of pasid.c
and the dirty operations of generic_pt. The checks of the two ioctls are in test_dirty, whole tables of the mock driver
in test_mock_dirty.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.steps import PAGE, READ, MiB, destroy, fails, hwpt_alloc, ioas_alloc, map_user, unmap
from conformance.tracked import COUNT, IOVA, bits, dirty
from conformance.vtd_guest import GPA, PAGES, RW, US, Guest, P
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd", "dirty")]

DIRTY, NEST_PARENT = IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT
PASID, FAULT = IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID
VA = 0x4000_0000


# -------------------------------------------------------------------------------------------------------- what is there


def test_hw_info_says_that_the_unit_tracks(iommu: File, device: VfioDevice) -> None:
    assert IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING


@pytest.mark.parametrize("flags", [DIRTY, DIRTY | PASID])
def test_hwpt_with_dirty_tracking(iommu: File, device: VfioDevice, ioas: int, flags: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas, flags)
    set_tracking(iommu, hwpt)
    assert device.attach(hwpt) == hwpt
    set_tracking(iommu, hwpt, on=False)


def test_other_hwpt_is_eopnotsupp(iommu: File, device: VfioDevice, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        set_tracking(iommu, hwpt)
    with fails(errno.EOPNOTSUPP):
        dirty(iommu, hwpt)


# ------------------------------------------------------------------------------------------------------- a device's DMA


def test_writes_of_the_device_make_their_pages_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    assert dirty(iommu, tracked) == 0
    edu.store(IOVA, 1)
    edu.store(IOVA + 7 * PAGE + 4095, 1)
    edu.store(IOVA + 63 * PAGE, PAGE)
    assert dirty(iommu, tracked) == bits(0, 7, 63)


def test_write_across_a_boundary_makes_both_pages_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + 5 * PAGE - 1, 2)
    assert dirty(iommu, tracked) == bits(4, 5)


def test_reads_make_nothing_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    edu.load(IOVA, PAGE)
    edu.load(IOVA + 9 * PAGE + 100, 8)
    assert dirty(iommu, tracked) == 0
    edu.store(IOVA, 4)
    assert dirty(iommu, tracked) == bits(0)


def test_reading_cleans_and_the_next_write_counts_again(iommu: File, edu: Edu, tracked: int) -> None:
    for _ in range(3):
        for page in (2, 9, 50):
            edu.store(IOVA + page * PAGE, 8)
        assert dirty(iommu, tracked) == bits(2, 9, 50)
        assert dirty(iommu, tracked) == 0


def test_no_clear_leaves_what_is_dirty(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + PAGE, 4)
    for _ in range(2):
        assert dirty(iommu, tracked, clear=False) == bits(1)
    edu.store(IOVA + 3 * PAGE, 4)
    assert dirty(iommu, tracked) == bits(1, 3)
    assert dirty(iommu, tracked) == 0


def test_part_of_the_range_is_cleaned_alone(iommu: File, edu: Edu, tracked: int) -> None:
    for page in (0, 1, 2, 3):
        edu.store(IOVA + page * PAGE, 4)
    assert get_dirty(iommu, tracked, IOVA + PAGE, 2 * PAGE) == bits(0, 1)
    assert dirty(iommu, tracked) == bits(0, 3)


def test_coarser_bitmap(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + 5 * PAGE, 4)
    edu.store(IOVA + 40 * PAGE, 4)
    assert get_dirty(iommu, tracked, IOVA, COUNT * PAGE, page=8 * PAGE) == bits(0, 5)


def test_tracking_that_is_off_counts_nothing_and_switching_on_cleans(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA, 4)
    set_tracking(iommu, tracked, on=False)
    edu.store(IOVA + PAGE, 4)
    assert dirty(iommu, tracked, clear=False) == bits(0)
    set_tracking(iommu, tracked)
    assert dirty(iommu, tracked) == 0
    edu.store(IOVA + 2 * PAGE, 4)
    set_tracking(iommu, tracked)  # again: cleaned once more
    assert dirty(iommu, tracked) == 0


def test_tracking_before_attach_counts_from_the_attach(iommu: File, edu: Edu, ioas: int, memory: Buffer) -> None:
    map_user(iommu, ioas, memory.address, COUNT * PAGE, IOVA)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    set_tracking(iommu, hwpt)
    edu.store(IOVA, 4)
    assert dirty(iommu, hwpt) == 0
    edu.vfio.attach(hwpt)
    edu.store(IOVA + PAGE, 4)
    edu.vfio.attach(ioas)
    edu.store(IOVA + 2 * PAGE, 4)
    assert dirty(iommu, hwpt) == bits(1)


def test_dirty_pages_stay_after_the_device_has_gone(iommu: File, edu: Edu, tracked: int) -> None:
    edu.store(IOVA + 6 * PAGE, 4)
    edu.vfio.detach()
    assert dirty(iommu, tracked) == bits(6)
    edu.vfio.attach(tracked)
    edu.store(IOVA + 7 * PAGE, 4)
    assert dirty(iommu, tracked) == bits(7)


def test_refused_write_makes_nothing_dirty(iommu: File, edu: Edu, ioas: int, memory: Buffer) -> None:
    map_user(iommu, ioas, memory.address, COUNT * PAGE // 2, IOVA, prot=READ)
    map_user(iommu, ioas, memory.address, COUNT * PAGE // 2, IOVA + COUNT * PAGE // 2)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    set_tracking(iommu, hwpt)
    edu.vfio.attach(hwpt)
    edu.store(IOVA, 4)
    assert dirty(iommu, hwpt) == 0


def test_unmapped_page_takes_its_bit_along(iommu: File, edu: Edu, ioas: int, memory: Buffer, tracked: int) -> None:
    map_user(iommu, ioas, memory.address, PAGE, IOVA + COUNT * PAGE)
    edu.store(IOVA + COUNT * PAGE, 4)
    unmap(iommu, ioas, IOVA + COUNT * PAGE, PAGE)
    map_user(iommu, ioas, memory.address, PAGE, IOVA + COUNT * PAGE)
    assert get_dirty(iommu, tracked, IOVA, (COUNT + 1) * PAGE) == 0


@pytest.mark.needs("huge_pages")
def test_large_leaf_is_dirty_as_a_whole(kernel: Backend, iommu: File, edu: Edu, ioas: int) -> None:
    size = 2 * MiB
    buffer = kernel.buffer(size, huge=True)
    map_user(iommu, ioas, buffer.address, size, size)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, DIRTY)
    set_tracking(iommu, hwpt)
    edu.vfio.attach(hwpt)
    edu.store(size + 77 * PAGE, 4)
    assert get_dirty(iommu, hwpt, size, size) == (1 << 512) - 1
    edu.vfio.attach(ioas)
    destroy(iommu, hwpt)
    unmap(iommu, ioas, size, size)
    buffer.close()


# -- below a guest's tables -------------------------------------------------------------------------------------------


@pytest.fixture
def guest(kernel: Backend, iommu: File, edu: Edu, ioas: int) -> Iterator[Guest]:
    """A guest on a parent that tracks; VA + n pages is its page 16 + n."""
    guest = Guest(kernel, iommu, edu.vfio, ioas, DIRTY)
    for page in range(8):
        guest.map(VA + page * PAGE, guest.page(16 + page))
    yield guest
    guest.buffer.close()


def data_pages(guest: Guest) -> int:
    """The dirty bits of the guest's pages from 16 on; its tables are below."""
    return get_dirty(guest.iommu, guest.parent, GPA, PAGES * PAGE) >> 16


@pytest.mark.needs("nesting")
@pytest.mark.parametrize("attach_first", [False, True])
def test_writes_through_the_guests_tables_are_in_the_parents_bitmap(guest: Guest, edu: Edu, attach_first: bool) -> None:
    nested = guest.nested()
    if attach_first:
        edu.vfio.attach(nested)
    set_tracking(guest.iommu, guest.parent)
    edu.vfio.attach(nested)
    edu.store(VA + 3 * PAGE, 4)
    edu.load(VA + 5 * PAGE, 4)
    assert data_pages(guest) == bits(3)
    assert data_pages(guest) == 0
    edu.store(VA + 3 * PAGE, 4)
    edu.store(VA + 4 * PAGE, 4)
    assert data_pages(guest) == bits(3, 4)


@pytest.mark.needs("nesting")
def test_guests_tables_are_dirty_where_the_unit_notes_in_them(guest: Guest, edu: Edu) -> None:
    """An accessed bit that the unit sets is a write to the guest's page."""
    set_tracking(guest.iommu, guest.parent)
    edu.vfio.attach(guest.nested())
    edu.store(VA, 4)
    tables = get_dirty(guest.iommu, guest.parent, GPA, 16 * PAGE)
    assert tables == bits(0, 1, 2, 3)  # the four tables of VA


@pytest.mark.needs("nesting")
def test_tracking_off_ends_it_for_nested_hwpts_too(guest: Guest, edu: Edu) -> None:
    edu.vfio.attach(guest.nested())
    set_tracking(guest.iommu, guest.parent)
    edu.store(VA, 4)
    set_tracking(guest.iommu, guest.parent, on=False)
    edu.store(VA + PAGE, 4)
    assert data_pages(guest) == bits(0)


@pytest.mark.needs("nesting")
def test_nested_hwpt_itself_has_no_dirty_tracking(guest: Guest) -> None:
    nested = guest.nested()
    with fails(errno.ENOENT):
        set_tracking(guest.iommu, nested)
    with fails(errno.ENOENT):
        get_dirty(guest.iommu, nested, GPA, PAGE)


@pytest.mark.needs("nesting")
def test_parent_without_dirty_tracking_is_eopnotsupp(iommu: File, device: VfioDevice, ioas: int) -> None:
    parent = hwpt_alloc(iommu, device.devid, ioas, NEST_PARENT)
    with fails(errno.EOPNOTSUPP):
        set_tracking(iommu, parent)
    other = hwpt_alloc(iommu, device.devid, ioas_alloc(iommu), NEST_PARENT | DIRTY | PASID)
    set_tracking(iommu, other)


@pytest.mark.needs("nesting")
def test_write_that_the_guest_forbids_is_not_dirty(guest: Guest, edu: Edu) -> None:
    guest.map(VA, guest.page(16), P | US)
    guest.map(VA + PAGE, guest.page(17), P | RW | US)
    set_tracking(guest.iommu, guest.parent)
    edu.vfio.attach(guest.nested())
    edu.store(VA, 4)
    edu.store(VA + PAGE, 4)
    assert data_pages(guest) == bits(1)
