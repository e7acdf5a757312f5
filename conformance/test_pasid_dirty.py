"""Dirty tracking and PASIDs: a device's writes are in the bitmap of the HWPT that their PASID is attached to.

Mirrors what SMMUv3 (HTTU at stage 1) and VT-d (dirty bits of second-stage tables, SLADS) do for requests with a PASID,
and for translations that a device asks for and keeps. Tracking without PASIDs is in test_smmu_dirty.py and
test_vtd_dirty.py.
"""

from __future__ import annotations

import pytest

from conformance.drivers.dsa import SUCCESS, WQ_BLOCK, WQ_NO_ATS, Dsa
from conformance.dsa_offers import has_ats
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.spaces import MORE, RECORDS, TARGET, Space
from conformance.steps import PAGE
from conformance.tracked import bits
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_PASID

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "dirty")]

DIRTY, PASID = IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_PASID


class Pair:
    """Two spaces with dirty tracking on; the device is on `a`, its PASID 5 on `b`. Four pages of MORE in each."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, records: Buffer, mode: int) -> None:
        made = [Space(kernel, iommu, dsa.vfio.devid, name, records, DIRTY | PASID) for name in (b"a", b"b")]
        self.iommu, self.records, (self.a, self.b) = iommu, records, made
        for space in made:
            space.map_more(0, 4)
            set_tracking(iommu, space.hwpt)
        dsa.vfio.attach(self.a.hwpt)
        dsa.vfio.attach_pasid(5, self.b.hwpt)
        self.own, self.five = (dsa.queue(n, p, mode).record_in(records, RECORDS) for n, p in enumerate((None, 5)))

    def dirty(self, space: Space, start: int = MORE, count: int = 4) -> int:
        return get_dirty(self.iommu, space.hwpt, start, count * PAGE)


@pytest.fixture(params=[WQ_BLOCK, WQ_BLOCK | WQ_NO_ATS], ids=["ats", "no_ats"])
def pair(request: pytest.FixtureRequest, kernel: Backend, iommu: File, dsa: Dsa, records: Buffer) -> Pair:
    if not request.param & WQ_NO_ATS and not has_ats(dsa.vfio):
        pytest.skip("the device has no ATS")
    return Pair(kernel, iommu, dsa, records, request.param)


def test_writes_with_a_pasid_are_in_its_own_table(pair: Pair) -> None:
    """And so is the completion record that each descriptor writes."""
    assert pair.five.fill(0x5A, MORE + PAGE - 4, 8).status == SUCCESS
    assert (pair.dirty(pair.b), pair.dirty(pair.a)) == (bits(0, 1), 0)
    assert (pair.dirty(pair.b, RECORDS, 3), pair.dirty(pair.a, RECORDS, 3)) == (bits(0), 0)
    assert pair.own.fill(0x5A, MORE + 3 * PAGE, 8).status == SUCCESS
    assert (pair.dirty(pair.b), pair.dirty(pair.a)) == (0, bits(3))


def test_a_page_that_was_read_first_is_dirty_when_it_is_written(pair: Pair) -> None:
    """A device that keeps what it was allowed to read has to ask again before it writes."""
    assert pair.five.move(MORE + 2 * PAGE, TARGET, 8).status == SUCCESS
    assert (pair.dirty(pair.b), pair.dirty(pair.b, TARGET, 1)) == (0, 1)
    assert pair.five.fill(0x5A, MORE + 2 * PAGE, 8).status == SUCCESS
    assert pair.dirty(pair.b) == bits(2)


def test_two_pasids_of_one_table_write_into_one_bitmap(iommu: File, dsa: Dsa, pair: Pair) -> None:
    dsa.vfio.attach_pasid(6, pair.b.hwpt)
    six = dsa.queue(2, 6).record_in(pair.records, RECORDS)
    assert [queue.fill(0x5A, MORE + n * PAGE, 8).status for n, queue in enumerate((pair.five, six))] == [SUCCESS] * 2
    assert (pair.dirty(pair.b), pair.dirty(pair.a)) == (bits(0, 1), 0)
