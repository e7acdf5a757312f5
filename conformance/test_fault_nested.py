"""Faults of a guest's own tables: a device on a nested HWPT asks for a page, and the guest answers.

Mirrors find_fault_handler() of drivers/iommu/io-pgfault.c: a fault goes to the nested HWPT that its PASID is attached
to; where guests have the table of PASIDs (SMMUv3), to the nested HWPT of the device itself, whichever of the guest's
PASIDs it is. What a client does with a fault is in test_fault_dma.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from conformance import vsmmu
from conformance.drivers.dsa import FILL, HARDWARE, MOVE, ON_WRITE, SUCCESS, Dsa, Queue
from conformance.mock import answer_faults, fault_queue, read_faults
from conformance.steps import PAGE, map_user, unmap
from conformance.vtd_guest import GPA, RW, US, Guest, P
from uapi.backend import Backend, Buffer, File
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
        page = _Page(self.guest.buffer, self.guest.page(RECORDS) - GPA)
        return self.dsa.queue(index, pasid).record_in(page, RECORDS_VA)


class _Page:
    """The guest's page of completion records, as the driver wants it."""

    def __init__(self, memory: Buffer, start: int) -> None:
        self.address = memory.address + start
        self.length = PAGE
        self.view = memory.view[start : start + PAGE]

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


# -- SMMUv3 ----------------------------------------------------------------------------------------------------------

#: In a guest's context descriptor: what faults stalls. In its STE: requests without PASID are descriptor 0's.
CD_STALL, S1DSS_SSID0 = 1 << 44, 2
#: The guest's table of context descriptors has 1 << _CDMAX.
_CDMAX, _CDMAX_SHIFT = 2, 59
VSID = 0x81


class SmmuSetting:
    """A guest with a vSMMU whose device is on a nested HWPT with a fault queue; CD 0 and CD 3 share a table."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa) -> None:
        self.dsa, self.iommu = dsa, iommu
        self.fault, self.file = fault_queue(kernel, iommu)
        self.guest = guest = vsmmu.Guest(kernel, iommu, dsa.vfio)
        for pasid, asid in ((0, 1), (3, 2)):
            cd = vsmmu.make_cd(guest.page(vsmmu.TTB_PAGE), asid, more=CD_STALL)
            guest.write(vsmmu.CD_PAGE, struct.pack("<8Q", *cd), 64 * pasid)
        guest.map(RECORDS_VA, guest.page(RECORDS))
        guest.map(SOURCE_VA, guest.page(SOURCE))
        guest.write(SOURCE, b"nested!!")
        low, high = guest.ste()
        guest.vdevice(VSID)
        self.hwpt = guest.nested((low | _CDMAX << _CDMAX_SHIFT, high | S1DSS_SSID0), flags=FAULT, fault_id=self.fault)
        dsa.vfio.attach(self.hwpt)

    def queue(self, index: int, pasid: int | None) -> Queue:
        return self.dsa.queue(index, pasid).record_in(_Page(self.guest.ram, RECORDS * PAGE), RECORDS_VA)


@pytest.fixture
def smmu(kernel: Backend, iommu: File, stalling_dsa: Dsa) -> Iterator[SmmuSetting]:
    setting = SmmuSetting(kernel, iommu, stalling_dsa)
    yield setting
    setting.file.close()
    setting.guest.close()


@pytest.mark.needs("stall")
@pytest.mark.parametrize("pasid", [3, None])
def test_a_stall_of_the_guests_tables_waits_for_the_guest(smmu: SmmuSetting, pasid: int | None) -> None:
    """With a PASID of the guest's own, of which the host knows nothing, the device's HWPT has the queue."""
    queue = smmu.queue(0, pasid)
    assert queue.move(SOURCE_VA, RECORDS_VA + 0x800, 8).status == SUCCESS
    assert smmu.guest.read(RECORDS, 8, 0x800) == b"nested!!"
    job = queue.submit(MOVE, SOURCE_VA, LATER_VA + 16, 8)
    (fault,) = read_faults(smmu.file)
    assert (fault.dev_id, fault.pasid, fault.addr) == (1, pasid or 0, LATER_VA + 16)
    smmu.guest.map(LATER_VA, smmu.guest.page(LATER))
    answer_faults(smmu.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert smmu.guest.read(LATER, 8, 16) == b"nested!!"


@pytest.mark.needs("stall")
def test_what_the_guests_memory_lacks_stalls_too(smmu: SmmuSetting) -> None:
    """Stage 2 faults; the queue of the nested HWPT tells of it by the guest's virtual address."""
    absent = vsmmu.RAM + vsmmu.RAM_PAGES * PAGE
    smmu.guest.map(LATER_VA, absent)
    job = smmu.queue(0, 3).submit(FILL, 0x5A5A5A5A5A5A5A5A, LATER_VA, 8)
    (fault,) = read_faults(smmu.file)
    assert (fault.pasid, fault.addr) == (3, LATER_VA)
    map_user(smmu.iommu, smmu.guest.ioas, smmu.guest.ram.address + LATER * PAGE, PAGE, absent)
    answer_faults(smmu.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert smmu.guest.read(LATER, 8) == b"Z" * 8


@pytest.mark.needs("stall")
def test_the_guests_events_go_one_way_and_its_stalls_another(smmu: SmmuSetting) -> None:
    """A context descriptor that is not valid is an event; a page that is not there, with a stall, is a fault."""
    _, events = smmu.guest.veventq()
    with events:
        smmu.queue(0, 2).submit(FILL, 0, LATER_VA, 8)
        assert smmu.file.read(40) == b""
        record = events.read(8 + 32)
        assert (record[8], int.from_bytes(record[12:16], "little")) == (vsmmu.C_BAD_CD, VSID)
        job = smmu.queue(1, 3).submit(FILL, 0, LATER_VA, 8)
        assert events.read(8 + 32)[8] == vsmmu.C_BAD_CD  # of the completion record that could not be written
        assert events.read(8 + 32) == b""
        (fault,) = read_faults(smmu.file)
        answer_faults(smmu.file, fault.cookie, code=INVALID)
        assert job.wait().status == HARDWARE | ON_WRITE


@pytest.mark.needs("stall")
def test_the_guests_stall_ends_when_the_device_leaves_it(smmu: SmmuSetting) -> None:
    job = smmu.queue(0, 3).submit(FILL, 0x5A5A5A5A5A5A5A5A, LATER_VA, 8)
    (fault,) = read_faults(smmu.file)
    smmu.guest.map(LATER_VA, smmu.guest.page(LATER))
    smmu.dsa.vfio.attach(smmu.guest.parent)
    assert job.poll() is None  # its record had nowhere to go
    assert smmu.dsa.error() is not None
    assert smmu.guest.read(LATER, 8) == bytes(8)
    assert smmu.file.read(40) == b""
    smmu.dsa.vfio.attach(smmu.hwpt)
    assert smmu.queue(1, 3).fill(0x5A5A5A5A5A5A5A5A, LATER_VA, 8).status == SUCCESS
    with pytest.raises(OSError, match="Invalid argument"):
        answer_faults(smmu.file, fault.cookie)
