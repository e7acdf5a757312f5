"""Requests of a device that wait for their client: the page fault that it reads, the answer that it writes, the rest.

Mirrors drivers/iommu/io-pgfault.c and the fault queue of drivers/iommu/iommufd/eventq.c, end to end: behind VT-d the
device asks for the page (PRI), behind an SMMUv3 its request stalls; either way the transfer goes on, or ends, when the
client says so. What is peculiar to the one is in test_pri.py, to the other in test_stall.py; the queue's own rules are
in test_mock_fault_file.py.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, HARDWARE, MOVE, ON_WRITE, REFUSED_PAGE, SUCCESS, Dsa, Job, Queue
from conformance.mock import PageFault, answer_faults, fault_queue, read_faults
from conformance.spaces import MORE, NAME, RECORDS, TARGET, Space, reached
from conformance.steps import PAGE, READ, destroy, fails
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "waiting_dma")]

LAST, WITH_PASID = IOMMU_PGFAULT_FLAGS_LAST_PAGE, IOMMU_PGFAULT_FLAGS_PASID_VALID
TO_READ, TO_WRITE = IOMMU_PGFAULT_PERM_READ, IOMMU_PGFAULT_PERM_WRITE
GO_ON, INVALID = 0, 1
#: How a transfer ends that was not to go on: the page was refused; or, without page requests, the request was aborted.
ENDED = (REFUSED_PAGE, HARDWARE)


class Setting:
    """A fault queue, and two spaces whose HWPTs report to it: the device is on `a`, its PASID 5 on `b`."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, records: Buffer) -> None:
        self.kernel, self.iommu, self.dsa, self.records = kernel, iommu, dsa, records
        self.fault, self.file = fault_queue(kernel, iommu)
        self.a, self.b = self.space(b"a"), self.space(b"b")
        dsa.vfio.attach(self.a.hwpt)
        dsa.vfio.attach_pasid(5, self.b.hwpt)
        self.own, self.five = self.queue(0, None), self.queue(1, 5)

    def space(self, name: bytes, flags: int = IOMMU_HWPT_FAULT_ID_VALID, fault: int = 0) -> Space:
        """One more, whose HWPT reports to this queue, or to `fault`, or to none."""
        fields = {"fault_id": fault or self.fault} if flags else {}
        flags |= IOMMU_HWPT_ALLOC_PASID
        return Space(self.kernel, self.iommu, self.dsa.vfio.devid, name, self.records, flags, **fields)

    def queue(self, index: int, pasid: int | None) -> Queue:
        return self.dsa.queue(index, pasid).record_in(self.records, RECORDS)

    def one(self) -> PageFault:
        """The only fault that is to be read."""
        (fault,) = read_faults(self.file)
        assert self.file.read(40) == b""
        return fault


@pytest.fixture
def setting(kernel: Backend, iommu: File, waiting_dsa: Dsa, records: Buffer) -> Iterator[Setting]:
    made = Setting(kernel, iommu, waiting_dsa, records)
    yield made
    made.file.close()


def page(fault: PageFault) -> int:
    return fault.addr & -PAGE


def ended(job: Job) -> bool:
    """Whether the job's end is that of one that was not to go on."""
    return job.wait().status & ~ON_WRITE in ENDED


# -- the fault -------------------------------------------------------------------------------------------------------


def test_the_fault_says_who_wants_what(setting: Setting) -> None:
    job = setting.five.submit(FILL, 0x5A, MORE + 0x40, 8)
    fault = setting.one()
    assert (fault.flags & (LAST | WITH_PASID), fault.dev_id, fault.pasid) == (LAST | WITH_PASID, 1, 5)
    assert (fault.perm & (TO_READ | TO_WRITE), page(fault)) == (TO_WRITE, MORE)
    assert (fault.length, fault.cookie) == (0, 1)
    assert job.poll() is None


def test_without_a_pasid_it_says_so(setting: Setting) -> None:
    setting.own.submit(MOVE, MORE + PAGE, TARGET, 8)
    fault = setting.one()
    assert (fault.flags, fault.dev_id, fault.pasid) == (LAST, 1, 0)
    assert (fault.perm, page(fault)) == (TO_READ, MORE + PAGE)


def test_poll_tells_of_it(setting: Setting) -> None:
    assert setting.file.poll(select.POLLIN | select.POLLOUT) == select.POLLOUT
    setting.five.submit(FILL, 0, MORE, 8)
    assert setting.file.poll(select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT
    setting.one()
    assert setting.file.poll(select.POLLIN | select.POLLOUT) == select.POLLOUT


def test_a_device_that_does_not_want_to_wait_reports_nothing_of_page_requests(setting: Setting) -> None:
    """Where it has any: a request that stalls does so whether the device likes it or not."""
    job = setting.five.submit(FILL, 0, MORE, 8, 0)
    faults = read_faults(setting.file)
    assert bool(faults) == (job.poll() is None)
    for fault in faults:
        answer_faults(setting.file, fault.cookie, code=INVALID)
    assert job.wait().status & ON_WRITE


# -- the answer ------------------------------------------------------------------------------------------------------


def test_a_write_goes_on_when_the_page_is_there(setting: Setting) -> None:
    job = setting.five.submit(FILL, 0x1122334455667788, MORE + 0x40, 8)
    fault = setting.one()
    setting.b.map_more()
    assert job.poll() is None
    assert answer_faults(setting.file, fault.cookie) == 8
    found = job.wait()
    assert (found.status, found.done) == (SUCCESS, 8)
    assert setting.b.more(offset=0x40) == bytes.fromhex("8877665544332211")
    assert setting.b.more(offset=0x38) == bytes(8)
    assert setting.a.more(offset=0x40) == bytes(8)


def test_a_read_goes_on_with_what_is_in_the_page_by_then(setting: Setting) -> None:
    job = setting.five.submit(MOVE, MORE + 8, TARGET, 8)
    fault = setting.one()
    setting.b.map_more()
    setting.b.set_more(b"too soon", offset=8)
    setting.b.set_more(b"in time!", offset=8)
    answer_faults(setting.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert (setting.b.target, setting.a.target) == (b"in time!", bytes(8))


def test_a_refused_page_ends_the_transfer_which_moved_nothing_of_it(setting: Setting) -> None:
    setting.b.map_more()
    job = setting.five.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE + PAGE - 8, 16)
    fault = setting.one()
    assert page(fault) == MORE + PAGE
    answer_faults(setting.file, fault.cookie, code=INVALID)
    found = job.wait()
    assert (found.status & ~ON_WRITE in ENDED, found.done) == (True, 8)
    assert found.address & -PAGE == MORE + PAGE
    setting.b.map_more(1)
    assert (setting.b.more(0, 8, PAGE - 8), setting.b.more(1)) == (b"Z" * 8, bytes(8))
    assert reached(setting.five, [setting.a, setting.b]) == "b"


def test_an_answer_without_the_page_brings_the_fault_again(setting: Setting) -> None:
    job = setting.five.submit(FILL, 0, MORE, 8)
    for _ in range(3):
        fault = setting.one()
        assert (page(fault), fault.cookie) == (MORE, 1)
        answer_faults(setting.file, fault.cookie)
        assert job.poll() is None
    setting.b.map_more()
    answer_faults(setting.file, setting.one().cookie)
    assert job.wait().status == SUCCESS


def test_a_page_that_may_only_be_read_is_asked_for_to_write(setting: Setting) -> None:
    setting.b.map_more(0, 1, READ)
    job = setting.five.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    fault = setting.one()
    assert fault.perm & TO_WRITE
    setting.b.unmap_more()
    setting.b.map_more()
    answer_faults(setting.file, fault.cookie)
    assert (job.wait().status, setting.b.more()) == (SUCCESS, b"Z" * 8)


def test_a_transfer_over_pages_that_come_one_by_one(setting: Setting) -> None:
    setting.b.set_more(bytes(range(256)) * 16, 0)
    setting.b.set_more(bytes(range(255, -1, -1)) * 16, 1)
    job = setting.five.submit(MOVE, MORE + 100, MORE + 2 * PAGE, PAGE)
    asked = []
    while job.poll() is None:
        fault = setting.one()
        asked.append((page(fault) - MORE) // PAGE)
        setting.b.map_more(asked[-1])
        answer_faults(setting.file, fault.cookie)
    assert (asked, job.wait().done) == ([0, 2, 1], PAGE)
    whole = bytes(range(256)) * 16 + bytes(range(255, -1, -1)) * 16
    assert setting.b.more(2, PAGE) == whole[100 : 100 + PAGE]


def test_an_answered_cookie_is_einval(setting: Setting) -> None:
    setting.five.submit(FILL, 0, MORE, 8)
    fault = setting.one()
    answer_faults(setting.file, fault.cookie, code=INVALID)
    with fails(errno.EINVAL):
        answer_faults(setting.file, fault.cookie)


# -- several ---------------------------------------------------------------------------------------------------------


def test_answers_may_come_in_any_order(setting: Setting) -> None:
    jobs = [setting.five.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE + n * PAGE, 8) for n in range(3)]
    faults = read_faults(setting.file)
    assert [page(fault) for fault in faults] == [MORE, MORE + PAGE, MORE + 2 * PAGE]
    assert [fault.cookie for fault in faults] == [1, 2, 3]
    assert len({fault.grpid for fault in faults}) == 3
    setting.b.map_more(0, 4)
    answer_faults(setting.file, faults[2].cookie)
    assert [job.poll() is not None for job in jobs] == [False, False, True]
    answer_faults(setting.file, faults[0].cookie, code=INVALID)
    assert (ended(jobs[0]), jobs[1].poll()) == (True, None)
    assert answer_faults(setting.file, faults[1].cookie) == 8
    assert [setting.b.more(n) for n in range(3)] == [bytes(8), b"Z" * 8, b"Z" * 8]


def test_other_transfers_go_on_meanwhile(setting: Setting) -> None:
    waiting = setting.five.submit(FILL, 0, MORE, 8)
    assert reached(setting.five, [setting.a, setting.b]) == "b"
    assert reached(setting.own, [setting.a, setting.b]) == "a"
    assert waiting.poll() is None


def test_faults_of_two_tables_tell_which_and_want_their_own_page(setting: Setting) -> None:
    own, five = setting.own.submit(FILL, 1, MORE, 8), setting.five.submit(FILL, 5, MORE, 8)
    faults = {fault.pasid: fault for fault in read_faults(setting.file)}
    assert sorted(faults) == [0, 5]
    setting.a.map_more()
    assert answer_faults(setting.file, faults[0].cookie, faults[5].cookie) == 16
    assert (own.wait().status, five.poll()) == (SUCCESS, None)
    assert (setting.a.more()[0], setting.b.more()[0]) == (1, 0)
    again = setting.one()
    assert (again.pasid, page(again)) == (5, MORE)
    setting.b.map_more()
    answer_faults(setting.file, again.cookie)
    assert (five.wait().status, setting.b.more()[0]) == (SUCCESS, 5)


def test_two_pasids_of_one_table_want_the_page_each(setting: Setting) -> None:
    setting.dsa.vfio.attach_pasid(6, setting.b.hwpt)
    six = setting.queue(2, 6)
    jobs = [queue.submit(FILL, 0, MORE, 8) for queue in (setting.five, six)]
    faults = read_faults(setting.file)
    assert [(fault.pasid, page(fault)) for fault in faults] == [(5, MORE), (6, MORE)]
    setting.b.map_more()
    assert answer_faults(setting.file, *(fault.cookie for fault in faults)) == 16
    assert [job.wait().status for job in jobs] == [SUCCESS, SUCCESS]


def test_two_queues_get_the_faults_of_their_own_tables(setting: Setting) -> None:
    fault, file = fault_queue(setting.kernel, setting.iommu)
    with file:
        other = setting.space(b"c", fault=fault)
        setting.dsa.vfio.attach_pasid(6, other.hwpt)
        setting.queue(2, 6).submit(FILL, 0, MORE, 8)
        assert setting.file.read(40) == b""
        setting.five.submit(FILL, 0, MORE + PAGE, 8)
        (theirs,) = read_faults(file)
        assert (theirs.pasid, page(theirs), theirs.cookie) == (6, MORE, 1)
        ours = setting.one()
        assert (ours.pasid, page(ours), ours.cookie) == (5, MORE + PAGE, 1)


def test_a_table_without_a_queue_refuses_at_once(setting: Setting) -> None:
    plain = setting.space(b"p", 0)
    setting.dsa.vfio.attach_pasid(6, plain.hwpt)
    job = setting.queue(2, 6).submit(FILL, 0, MORE, 8)
    assert ended(job)
    assert setting.file.read(40) == b""


# -- what ends while it waits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_detach_of_the_pasid_ends_what_waits_on_it(setting: Setting, read: bool) -> None:
    own, five = setting.own.submit(FILL, 0, MORE, 8), setting.five.submit(FILL, 0, NAME + PAGE, 8)
    faults = read_faults(setting.file) if read else []
    setting.dsa.vfio.detach_pasid(5)
    assert own.poll() is None
    # Its completion record has no way out either: the device says so in a register.
    assert five.poll() is None
    code, address = setting.dsa.error() or (0, 0)
    assert (code, address) != (0, 0)
    left = read_faults(setting.file) if not read else [fault for fault in faults if not fault.pasid]
    assert [fault.pasid for fault in left] == [0]
    for fault in faults:
        if fault.pasid:
            with fails(errno.EINVAL):
                answer_faults(setting.file, fault.cookie)
    setting.a.map_more()
    answer_faults(setting.file, left[0].cookie)
    assert own.wait().status == SUCCESS


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_replace_ends_what_waits_though_the_new_table_has_the_page(setting: Setting, read: bool) -> None:
    other = setting.space(b"c")
    other.map_more()
    job = setting.five.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    faults = read_faults(setting.file) if read else []
    setting.dsa.vfio.attach_pasid(5, other.hwpt)
    assert ended(job)
    assert (other.more(), setting.b.more()) == (bytes(8), bytes(8))
    assert setting.file.read(40) == b""
    for fault in faults:
        with fails(errno.EINVAL):
            answer_faults(setting.file, fault.cookie)
    assert reached(setting.five, [setting.a, setting.b, other]) == "c"
    job = setting.five.submit(FILL, 0, MORE + PAGE, 8)
    assert page(setting.one()) == MORE + PAGE
    assert job.poll() is None


def test_a_detach_of_the_device_ends_only_its_own(setting: Setting) -> None:
    setting.own.submit(FILL, 0, MORE, 8)
    five = setting.five.submit(FILL, 0, MORE, 8)
    setting.dsa.vfio.detach()
    fault = setting.one()
    assert fault.pasid == 5
    setting.b.map_more()
    answer_faults(setting.file, fault.cookie)
    assert five.wait().status == SUCCESS


def test_the_closed_device_leaves_an_empty_queue(setting: Setting) -> None:
    setting.own.submit(FILL, 0, MORE, 8)
    setting.five.submit(FILL, 0, MORE, 8)
    first = read_faults(setting.file, 1)
    assert len(first) == 1
    setting.dsa.close()
    assert setting.file.read(40) == b""
    with fails(errno.EINVAL):
        answer_faults(setting.file, first[0].cookie)
    for space in (setting.a, setting.b):
        destroy(setting.iommu, space.hwpt)


def test_the_queue_is_held_by_its_file_and_by_its_tables(setting: Setting) -> None:
    job = setting.five.submit(FILL, 0, MORE, 8)
    with fails(errno.EBUSY):
        destroy(setting.iommu, setting.fault)
    setting.file.close()
    with fails(errno.EBUSY):
        destroy(setting.iommu, setting.fault)
    assert job.poll() is None
    with fails(errno.EBUSY):
        destroy(setting.iommu, setting.b.hwpt)
    plain = setting.space(b"p", 0)
    setting.dsa.vfio.attach_pasid(5, plain.hwpt)
    assert ended(job)
    destroy(setting.iommu, setting.b.hwpt)
    with fails(errno.EBUSY):
        destroy(setting.iommu, setting.fault)
    setting.dsa.vfio.attach(plain.hwpt)
    destroy(setting.iommu, setting.a.hwpt)
    destroy(setting.iommu, setting.fault)


def test_an_abandoned_transfer_may_still_be_answered(setting: Setting) -> None:
    """The device was reset and wants nothing any more; the answer goes to whom it concerned."""
    setting.five.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    fault = setting.one()
    setting.dsa.restart()
    setting.b.map_more()
    assert answer_faults(setting.file, fault.cookie) == 8
    assert setting.b.more() == bytes(8)
    assert reached(setting.queue(1, 5), [setting.a, setting.b]) == "b"
