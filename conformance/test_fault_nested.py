"""Faults of a guest's own tables: a device on a nested HWPT asks for a page, and the guest answers.

Mirrors find_fault_handler() of drivers/iommu/io-pgfault.c: a fault goes to the nested HWPT that its PASID is attached
to; where guests have the table of PASIDs (SMMUv3), to the nested HWPT of the device itself, whichever of the guest's
PASIDs it is. What a client does with a fault is in test_fault_dma.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, MOVE, ON_WRITE, SUCCESS, Dsa, Queue
from conformance.mock import answer_faults, fault_queue, read_faults
from conformance.steps import PAGE, map_user, unmap
from conformance.vtd_guest import GPA, RW, US, Guest, P
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "nesting")]

FAULT, PASID = IOMMU_HWPT_FAULT_ID_VALID, IOMMU_HWPT_ALLOC_PASID
INVALID = 1
#: In the guest: virtual addresses of the completion records, of a page to read, and of one that is not mapped yet.
RECORDS_VA, SOURCE_VA, LATER_VA = 0x4000_0000, 0x4000_1000, 0x4000_2000
#: The pages of its memory that these are; its tables are in the first ones.
RECORDS, SOURCE, LATER = 16, 17, 18


class VtdSetting:
    """A guest whose table for PASID 5 has two pages, and a fault queue for its nested HWPT."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, ioas: int) -> None:
        self.dsa, self.iommu, self.ioas = dsa, iommu, ioas
        self.fault, self.file = fault_queue(kernel, iommu)
        self.guest = Guest(kernel, iommu, dsa.vfio, ioas)
        self.guest.map(RECORDS_VA, self.guest.page(RECORDS))
        self.guest.map(SOURCE_VA, self.guest.page(SOURCE))
        self.guest.write(self.guest.page(SOURCE), b"nested!!")
        self.hwpt = self.guest.nested(hwpt_flags=FAULT | PASID, fault_id=self.fault)

    def queue(self, index: int, pasid: int | None) -> Queue:
        queue = self.dsa.queue(index, pasid)
        return queue.record_in(_Page(self.guest), RECORDS_VA)


class _Page:
    """The guest's page of completion records, as the driver wants it."""

    def __init__(self, guest: Guest) -> None:
        start = guest.page(RECORDS) - GPA
        self.address = guest.buffer.address + start
        self.length = PAGE
        self.view = guest.buffer.view[start : start + PAGE]

    def close(self) -> None: ...


@pytest.fixture
def vtd(kernel: Backend, iommu: File, asking_dsa: Dsa, ioas: int) -> Iterator[VtdSetting]:
    setting = VtdSetting(kernel, iommu, asking_dsa, ioas)
    yield setting
    setting.file.close()
    setting.guest.buffer.close()


@pytest.mark.needs("vtd", "pri")
@pytest.mark.parametrize("pasid", [5, None])
def test_the_guest_maps_the_page_in_its_own_table(vtd: VtdSetting, pasid: int | None) -> None:
    vtd.dsa.vfio.attach(vtd.hwpt) if pasid is None else vtd.dsa.vfio.attach_pasid(pasid, vtd.hwpt)
    queue = vtd.queue(0, pasid)
    assert queue.move(SOURCE_VA, RECORDS_VA + 0x800, 8).status == SUCCESS
    assert vtd.guest.read(vtd.guest.page(RECORDS) + 0x800, 8) == b"nested!!"
    job = queue.submit(MOVE, SOURCE_VA, LATER_VA + 16, 8)
    (fault,) = read_faults(vtd.file)
    assert (fault.dev_id, fault.pasid, fault.addr) == (1, pasid or 0, LATER_VA)
    vtd.guest.map(LATER_VA, vtd.guest.page(LATER))
    answer_faults(vtd.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert vtd.guest.read(vtd.guest.page(LATER) + 16, 8) == b"nested!!"


@pytest.mark.needs("vtd", "pri")
def test_a_page_that_the_guest_forbids_is_its_own_affair(vtd: VtdSetting) -> None:
    vtd.dsa.vfio.attach_pasid(5, vtd.hwpt)
    vtd.guest.map(LATER_VA, vtd.guest.page(LATER), P | US)
    queue = vtd.queue(0, 5)
    job = queue.submit(FILL, 0, LATER_VA, 8)
    (fault,) = read_faults(vtd.file)
    assert (fault.pasid, fault.addr) == (5, LATER_VA)
    answer_faults(vtd.file, fault.cookie, code=INVALID)
    assert job.wait().status & ON_WRITE
    job = queue.submit(FILL, 0x5A5A5A5A5A5A5A5A, LATER_VA, 8)
    (fault,) = read_faults(vtd.file)
    vtd.guest.map(LATER_VA, vtd.guest.page(LATER), P | RW | US)
    answer_faults(vtd.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert vtd.guest.read(vtd.guest.page(LATER), 8) == b"Z" * 8


@pytest.mark.needs("vtd", "pri")
def test_a_page_that_the_guests_memory_lacks_is_asked_for_by_the_guests_address(vtd: VtdSetting) -> None:
    """The guest has mapped it; the parent has nothing there. The host maps it."""
    vtd.dsa.vfio.attach_pasid(5, vtd.hwpt)
    absent = 0x1000_0000
    vtd.guest.map(LATER_VA, absent)
    job = vtd.queue(0, 5).submit(FILL, 0x5A5A5A5A5A5A5A5A, LATER_VA, 8)
    (fault,) = read_faults(vtd.file)
    assert (fault.pasid, fault.addr) == (5, LATER_VA)
    map_user(vtd.iommu, vtd.ioas, vtd.guest.buffer.address + LATER * PAGE, PAGE, absent)
    answer_faults(vtd.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert vtd.guest.read(vtd.guest.page(LATER), 8) == b"Z" * 8
    unmap(vtd.iommu, vtd.ioas, absent, PAGE)


@pytest.mark.needs("vtd", "pri")
def test_a_guests_two_tables_have_a_queue_each(kernel: Backend, vtd: VtdSetting) -> None:
    fault, file = fault_queue(kernel, vtd.iommu)
    with file:
        other = vtd.guest.nested(hwpt_flags=FAULT | PASID, fault_id=fault)
        vtd.dsa.vfio.attach_pasid(5, vtd.hwpt)
        vtd.dsa.vfio.attach_pasid(6, other)
        jobs = [vtd.queue(n, pasid).submit(FILL, 0, LATER_VA, 8) for n, pasid in enumerate((5, 6))]
        (ours,), (theirs,) = read_faults(vtd.file), read_faults(file)
        assert (ours.pasid, theirs.pasid) == (5, 6)
        vtd.guest.map(LATER_VA, vtd.guest.page(LATER))
        answer_faults(file, theirs.cookie)
        assert (jobs[1].wait().status, jobs[0].poll()) == (SUCCESS, None)
        vtd.dsa.vfio.attach_pasid(5, other)
        assert jobs[0].wait().status & ON_WRITE  # INVALID, and the record goes through the other table
