"""Page requests of mock devices: the HWPTs that report them, the queue that they reach, the message, and their end.

Mirrors drivers/iommu/iommufd/eventq.c and find_fault_handler() of drivers/iommu/io-pgfault.c. A mock device asks for
one page at a time, so every group here is one message. Reading and answering is in test_mock_fault_file.py, the queue
while nothing faults in test_fault_queue.py.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.mock import (
    PageFault,
    Reporting,
    answer_faults,
    command,
    cookies,
    fault_queue,
    mock_domain,
    mock_domain_flags,
    mock_replace,
    nest_parent,
    nested_alloc,
    page_faults,
    read_faults,
    trigger_iopf,
)
from conformance.pasids import attached, pasid_attach, pasid_detach, pasid_replace
from conformance.steps import U32_MAX, U64_MAX, destroy, fails, hwpt_alloc, ioas_alloc
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
)

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.11")]

FAULT, PASID = IOMMU_HWPT_FAULT_ID_VALID, IOMMU_HWPT_ALLOC_PASID
LAST, PASID_VALID = IOMMU_PGFAULT_FLAGS_LAST_PAGE, IOMMU_PGFAULT_FLAGS_PASID_VALID
SIZE = 40


# -- the queue of a HWPT ---------------------------------------------------------------------------------------------


def test_hwpt_holds_the_queue(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    queue.close()
    with fails(errno.EBUSY):
        destroy(iommu, ids.fault)
    mock_replace(iommu, ids.stdev, ids.ioas)
    with fails(errno.EBUSY):
        destroy(iommu, ids.fault)
    destroy(iommu, ids.hwpt)
    destroy(iommu, ids.fault)


@pytest.mark.parametrize("fault_id", [0, 1, 3, 5, 7, 99, U32_MAX])
def test_unknown_queue_is_enoent_and_leaves_no_hwpt(iommu: File, reporting: Reporting, fault_id: int) -> None:
    with fails(errno.ENOENT):
        nested_alloc(iommu, reporting[0].idev, reporting[0].parent, FAULT, fault_id=fault_id)
    assert [ioas_alloc(iommu), ioas_alloc(iommu)] == [4, 8]


def test_queue_is_looked_up_after_the_driver_has_made_its_domain(iommu: File, reporting: Reporting) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, reporting[0].idev, reporting[0].parent, FAULT, data_type=1, data_len=4, fault_id=99)


def test_queue_without_the_flag_is_not_looked_at(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    nested = nested_alloc(iommu, ids.idev, ids.parent, fault_id=99)
    mock_replace(iommu, ids.stdev, nested)
    trigger_iopf(iommu, ids.idev)
    assert queue.read(SIZE) == b""


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_paging_hwpt_reports_too(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    paging = hwpt_alloc(iommu, ids.idev, ids.ioas, FAULT, fault_id=ids.fault)
    mock_replace(iommu, ids.stdev, paging)
    trigger_iopf(iommu, ids.idev)
    assert cookies(read_faults(queue)) == [1]


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_paging_hwpt_with_an_unknown_queue_is_enoent(iommu: File, reporting: Reporting) -> None:
    with fails(errno.ENOENT):
        hwpt_alloc(iommu, reporting[0].idev, reporting[0].ioas, FAULT, fault_id=99)
    assert [ioas_alloc(iommu), ioas_alloc(iommu)] == [4, 8]


# -- the message -----------------------------------------------------------------------------------------------------


def test_message_says_what_the_device_asked_for(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev, 0, 0x1234, 2, 0xDEAD_BEEF_F00D)
    data = queue.read(SIZE)
    assert page_faults(data) == [PageFault(LAST, ids.idev, 0, 0x1234, 2, 0xDEAD_BEEF_F00D, 0, 1)]
    assert data[20:24] == bytes(4)


@pytest.mark.parametrize("pasid", [1, 1024, U32_MAX])
def test_pasid_that_nobody_attached_is_the_guests_own(iommu: File, reporting: Reporting, pasid: int) -> None:
    """The domain of the device's own requests is nested, so that it gets those of every PASID."""
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev, pasid)
    assert read_faults(queue) == [PageFault(LAST | PASID_VALID, ids.idev, pasid, 0x2A, 3, 0x1000, 0, 1)]


@pytest.mark.parametrize(
    ("grpid", "perm", "addr"), [(0, 0, 0), (U32_MAX, U32_MAX, U64_MAX), (1, 16, 1)], ids=["zero", "max", "odd"]
)
def test_request_is_passed_on_as_it_is(iommu: File, reporting: Reporting, grpid: int, perm: int, addr: int) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev, 0, grpid, perm, addr)
    assert read_faults(queue) == [PageFault(LAST, ids.idev, 0, grpid, perm, addr, 0, 1)]


def test_requests_of_one_group_id_are_groups_of_their_own(iommu: File, reporting: Reporting) -> None:
    """Each says that it is the last of its group."""
    ids, queue = reporting
    for addr in (0x3000, 0x1000, 0x2000):
        trigger_iopf(iommu, ids.idev, grpid=9, addr=addr)
    faults = read_faults(queue)
    assert [fault.addr for fault in faults] == [0x3000, 0x1000, 0x2000]
    assert cookies(faults) == [1, 2, 3]


# -- who hears of it -------------------------------------------------------------------------------------------------


def test_trigger_on_what_is_no_device_is_enoent(iommu: File, reporting: Reporting) -> None:
    ids = reporting[0]
    for number in (0, ids.ioas, ids.stdev, ids.hwpt, ids.fault, 99):
        with fails(errno.ENOENT):
            trigger_iopf(iommu, number)


@pytest.mark.needs("vfio_cdev", "root")
def test_trigger_on_a_real_device_is_einval(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EINVAL):
        trigger_iopf(iommu, device.devid)


def test_trigger_writes_no_reply(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    with arena(1) as memory:
        arg = command(abi.IOMMU_TEST_OP_TRIGGER_IOPF, 0, "trigger_iopf", dev_id=ids.idev, grpid=5)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))
    assert [fault.grpid for fault in read_faults(queue)] == [5]


def test_request_that_nobody_handles_shows_nowhere(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for target in (ids.parent, ids.ioas, nested_alloc(iommu, ids.idev, ids.parent)):
        mock_replace(iommu, ids.stdev, target)
        trigger_iopf(iommu, ids.idev)
        trigger_iopf(iommu, ids.idev, pasid=1)
        assert (queue.read(SIZE), queue.poll(select.POLLIN)) == (b"", 0)


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_pasid_is_not_the_guests_own_where_the_domain_is_not_nested(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    mock_replace(iommu, ids.stdev, hwpt_alloc(iommu, ids.idev, ids.ioas, FAULT, fault_id=ids.fault))
    trigger_iopf(iommu, ids.idev, pasid=1)
    assert queue.read(SIZE) == b""


def test_devices_share_a_queue(kernel: Backend, iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    other = mock_domain(iommu, ids.hwpt)
    third = mock_domain(iommu, nested_alloc(iommu, ids.idev, ids.parent, FAULT, fault_id=ids.fault))
    for idev in (other.idev, ids.idev, third.idev, other.idev):
        trigger_iopf(iommu, idev)
    assert [fault.dev_id for fault in read_faults(queue)] == [other.idev, ids.idev, third.idev, other.idev]


def test_each_hwpt_has_its_queue(kernel: Backend, iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    fault, second = fault_queue(kernel, iommu)
    with second:
        other = mock_domain(iommu, nested_alloc(iommu, ids.idev, ids.parent, FAULT, fault_id=fault))
        trigger_iopf(iommu, other.idev, grpid=1)
        trigger_iopf(iommu, ids.idev, grpid=2)
        assert [(fault.grpid, fault.cookie) for fault in read_faults(second)] == [(1, 1)]
        assert [(fault.grpid, fault.cookie) for fault in read_faults(queue)] == [(2, 1)]


class PasidIds(NamedTuple):
    """A device with PASIDs, its own requests on a nested HWPT that reports to queue `fault`."""

    stdev: int
    idev: int
    parent: int
    fault: int
    own: int


@pytest.fixture
def pasids(kernel: Backend, iommu: File) -> Iterator[tuple[PasidIds, File]]:
    ioas = ioas_alloc(iommu)
    device = mock_domain_flags(iommu, ioas, abi.MOCK_FLAGS_DEVICE_PASID)
    parent = nest_parent(iommu, device.idev, ioas, PASID)
    fault, queue = fault_queue(kernel, iommu)
    own = nested_alloc(iommu, device.idev, parent, FAULT | PASID, fault_id=fault)
    mock_replace(iommu, device.stdev, own)
    yield PasidIds(device.stdev, device.idev, parent, fault, own), queue
    queue.close()


@pytest.mark.since("6.15")
def test_attached_pasid_has_its_own_queue(kernel: Backend, iommu: File, pasids: tuple[PasidIds, File]) -> None:
    ids, queue = pasids
    fault, second = fault_queue(kernel, iommu)
    with second, attached(iommu, ids.stdev, [7], nested_alloc(iommu, ids.idev, ids.parent, 12, fault_id=fault)):
        for pasid in (7, 0, 8):
            trigger_iopf(iommu, ids.idev, pasid)
        assert [(fault.flags, fault.pasid) for fault in read_faults(second)] == [(3, 7)]
        assert [(fault.flags, fault.pasid) for fault in read_faults(queue)] == [(2, 0), (3, 8)]


@pytest.mark.since("6.15")
def test_attached_pasid_that_reports_nowhere_does_not_fall_back(iommu: File, pasids: tuple[PasidIds, File]) -> None:
    ids, queue = pasids
    with attached(iommu, ids.stdev, [7], ids.parent):
        trigger_iopf(iommu, ids.idev, 7)
        assert queue.read(SIZE) == b""
    trigger_iopf(iommu, ids.idev, 7)
    assert cookies(read_faults(queue)) == [1]


@pytest.mark.since("6.15")
def test_faults_of_a_pasid_end_with_its_attachment_and_not_with_the_devices_own(
    iommu: File, pasids: tuple[PasidIds, File]
) -> None:
    ids, queue = pasids
    for pasid in (7, 8, 9):
        pasid_attach(iommu, ids.stdev, pasid, ids.own)
    for pasid in (0, 7, 8, 9, 10):
        trigger_iopf(iommu, ids.idev, pasid)
    pasid_detach(iommu, ids.stdev, 7)
    pasid_replace(iommu, ids.stdev, 8, ids.parent)
    assert [fault.pasid for fault in read_faults(queue)] == [0, 9, 10]
    mock_replace(iommu, ids.stdev, ids.parent)
    for cookie, outcome in ((1, errno.EINVAL), (2, 0), (3, errno.EINVAL)):
        if outcome:
            with fails(outcome):
                answer_faults(queue, cookie)
        else:
            assert answer_faults(queue, cookie) == 8
    pasid_detach(iommu, ids.stdev, 8, 9)


# -- the end of an attachment ----------------------------------------------------------------------------------------


def test_faults_end_with_the_attachment(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for _ in range(3):
        trigger_iopf(iommu, ids.idev)
    assert cookies(read_faults(queue, 1)) == [1]
    mock_replace(iommu, ids.stdev, ids.parent)
    assert queue.read(SIZE) == b""
    assert queue.poll(select.POLLIN) == 0
    with fails(errno.EINVAL):
        answer_faults(queue, 1)


def test_faults_end_with_the_device(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    trigger_iopf(iommu, ids.idev)
    read_faults(queue, 1)
    destroy(iommu, ids.stdev)
    assert queue.read(SIZE) == b""
    with fails(errno.EINVAL):
        answer_faults(queue, 1)
    destroy(iommu, ids.hwpt)


def test_faults_of_others_stay(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    other = mock_domain(iommu, ids.hwpt)
    for idev in (ids.idev, other.idev, ids.idev, other.idev):
        trigger_iopf(iommu, idev)
    assert [fault.dev_id for fault in read_faults(queue, 2)] == [ids.idev, other.idev]
    mock_replace(iommu, ids.stdev, ids.parent)
    assert [(fault.dev_id, fault.cookie) for fault in read_faults(queue)] == [(other.idev, 1)]
    assert answer_faults(queue, 1, 2) == 16


def test_replace_by_the_same_keeps_faults(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    trigger_iopf(iommu, ids.idev)
    read_faults(queue, 1)
    mock_replace(iommu, ids.stdev, ids.hwpt)
    assert cookies(read_faults(queue)) == [2]
    assert answer_faults(queue, 1, 2) == 16


def test_replace_by_another_hwpt_of_the_queue_ends_those_before(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev, grpid=1)
    second = nested_alloc(iommu, ids.idev, ids.parent, FAULT, fault_id=ids.fault)
    mock_replace(iommu, ids.stdev, second)
    trigger_iopf(iommu, ids.idev, grpid=2)
    assert [fault.grpid for fault in read_faults(queue)] == [2]
    mock_replace(iommu, ids.stdev, ids.hwpt)
    with fails(errno.EINVAL):
        answer_faults(queue, 1)


def test_failed_replace_keeps_faults(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    for target in (99, ids.fault):
        with fails(errno.ENOENT if target == 99 else errno.EINVAL):
            mock_replace(iommu, ids.stdev, target)
    assert cookies(read_faults(queue)) == [1]


# -- the end of the descriptor ---------------------------------------------------------------------------------------


def test_faults_go_on_without_a_reader(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    queue.close()
    trigger_iopf(iommu, ids.idev)
    mock_replace(iommu, ids.stdev, ids.ioas)
    destroy(iommu, ids.hwpt)
    destroy(iommu, ids.fault)


def test_queue_keeps_the_context_alive(iommu: File, reporting: Reporting) -> None:
    """Mock devices do not; but the queue's descriptor does, so that nothing is torn down before it is closed."""
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    trigger_iopf(iommu, ids.idev)
    iommu.close()
    assert [fault.dev_id for fault in read_faults(queue)] == [ids.idev, ids.idev]
    assert answer_faults(queue, 2, 1) == 16


def test_last_close_takes_queued_and_unanswered_faults_along(
    kernel: Backend, iommu: File, reporting: Reporting
) -> None:
    ids, queue = reporting
    for _ in range(3):
        trigger_iopf(iommu, ids.idev)
    read_faults(queue, 2)
    iommu.close()
    queue.close()
    with kernel.open("/dev/iommu") as again:
        assert ioas_alloc(again) == 1
