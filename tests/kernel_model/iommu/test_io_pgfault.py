"""Groups of page requests, and their answers: with the mock driver's test call each request is a group of its own."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.arena import arena
from conformance.mock import (
    FaultIds,
    answer_faults,
    mock_replace,
    nested_alloc,
    page_faults,
    reporting_device,
    trigger_iopf,
)
from conformance.steps import destroy, fails
from kernel_model.iommu.io_pgfault import (
    IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE,
    IOMMU_FAULT_PAGE_REQUEST_PASID_VALID,
    PageRequest,
    report_device_fault,
)
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.kernel import Kernel
from uapi.backend import File

LAST, WITH_PASID = IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE, IOMMU_FAULT_PAGE_REQUEST_PASID_VALID
SIZE = 40


class Reporting:
    """A mock device that reports to a queue, and the answers that its hardware got."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.iommu: File = kernel.open("/dev/iommu")
        ids, queue = reporting_device(kernel, self.iommu)
        self.ids: FaultIds = ids
        self.queue: File = queue
        (ctx,) = kernel.contexts
        device = ctx.objects.get(ids.idev, IommufdDevice).dev
        assert isinstance(device, MockDevice)
        self.device = device
        self.answers: list[tuple[int, int, int]] = []
        driver: Any = kernel.mock_iommu
        driver.page_response = lambda _device, fault, code: self.answers.append((fault.grpid, fault.addr, code))

    def request(self, grpid: int, addr: int, last: bool = False, pasid: int = 0) -> None:
        flags = (LAST if last else 0) | (WITH_PASID if pasid else 0)
        with self.kernel.entered():
            report_device_fault(self.device, PageRequest(flags, pasid, grpid, 3, addr))

    def read(self, room: int) -> list[tuple[int, int, int, int]]:
        """(group id, address, flags, cookie) of what is read."""
        return [(f.grpid, f.addr, f.flags, f.cookie) for f in page_faults(self.queue.read(SIZE * room))]


@pytest.fixture
def reporting() -> Iterator[Reporting]:
    with Kernel("mock") as kernel:
        yield Reporting(kernel)


def test_requests_wait_for_the_last_of_their_group(reporting: Reporting) -> None:
    reporting.request(1, 0x1000)
    reporting.request(2, 0x9000)
    reporting.request(1, 0x2000)
    assert reporting.read(4) == []
    reporting.request(1, 0x3000, last=True)
    assert reporting.read(4) == [(1, 0x1000, 0, 1), (1, 0x2000, 0, 1), (1, 0x3000, LAST, 1)]
    reporting.request(2, 0xA000, last=True)
    assert reporting.read(4) == [(2, 0x9000, 0, 2), (2, 0xA000, LAST, 2)]


def test_group_is_read_whole(reporting: Reporting) -> None:
    reporting.request(1, 0x1000, last=True)
    for addr in (0x2000, 0x3000):
        reporting.request(2, addr)
    reporting.request(2, 0x4000, last=True)
    assert [addr for _, addr, _, _ in reporting.read(3)] == [0x1000]
    for room in (0, 1, 2):
        with fails(errno.EINVAL):
            reporting.read(room)
    assert [(addr, cookie) for _, addr, _, cookie in reporting.read(3)] == [(0x2000, 2), (0x3000, 2), (0x4000, 2)]


def test_group_of_which_one_message_cannot_be_stored_stays_whole(reporting: Reporting) -> None:
    for addr in (0x1000, 0x2000):
        reporting.request(1, addr)
    reporting.request(1, 0x3000, last=True)
    with arena(2) as memory:
        memory.unmap(1)
        for messages in (0, 1, 2):
            with fails(errno.EFAULT):
                reporting.queue.read_to(memory.page(1) - messages * SIZE, 3 * SIZE)
        start = memory.page(1) - 3 * SIZE
        assert reporting.queue.read_to(start, 3 * SIZE) == 3 * SIZE
        assert [fault.cookie for fault in page_faults(memory.read(start, 3 * SIZE))] == [1, 1, 1]


def test_one_answer_is_for_the_whole_group_and_names_its_last(reporting: Reporting) -> None:
    reporting.request(7, 0x1000)
    reporting.request(7, 0x2000, last=True)
    reporting.read(2)
    assert answer_faults(reporting.queue, 1, code=1) == 8
    assert reporting.answers == [(7, 0x2000, 1)]


def test_request_that_nobody_handles_is_answered_invalid(reporting: Reporting) -> None:
    mock_replace(reporting.iommu, reporting.ids.stdev, reporting.ids.parent)
    for last in (False, True):
        with fails(errno.EINVAL):
            reporting.request(1, 0x1000, last)
    assert reporting.answers == [(1, 0x1000, 1)] * 2


def test_end_of_an_attachment_answers_invalid_those_that_wait_first(reporting: Reporting) -> None:
    for grpid in range(4):
        reporting.request(grpid, grpid << 12, last=True)
    reporting.read(2)
    mock_replace(reporting.iommu, reporting.ids.stdev, reporting.ids.parent)
    assert [(grpid, code) for grpid, _, code in reporting.answers] == [(2, 1), (3, 1), (0, 1), (1, 1)]


def test_end_of_an_attachment_forgets_unfinished_groups(reporting: Reporting) -> None:
    reporting.request(1, 0x1000)
    mock_replace(reporting.iommu, reporting.ids.stdev, reporting.ids.parent)
    mock_replace(reporting.iommu, reporting.ids.stdev, reporting.ids.hwpt)
    reporting.request(1, 0x2000, last=True)
    assert [addr for _, addr, _, _ in reporting.read(4)] == [0x2000]
    assert reporting.answers == []


def test_unfinished_groups_stay_while_the_device_keeps_a_domain_that_reports(reporting: Reporting) -> None:
    """Also through the replacement of one such domain by another: the new one is attached before the old one goes."""
    ids = reporting.ids
    other = nested_alloc(reporting.iommu, ids.idev, ids.parent, 4, fault_id=ids.fault)
    reporting.request(1, 0x1000)
    mock_replace(reporting.iommu, ids.stdev, other)
    reporting.request(1, 0x2000, last=True)
    assert [addr for _, addr, _, _ in reporting.read(4)] == [0x1000, 0x2000]


def test_device_faults_again_after_all_its_domains_have_changed(reporting: Reporting) -> None:
    ids = reporting.ids
    for target in (ids.parent, ids.hwpt, ids.ioas, ids.hwpt, ids.hwpt):
        mock_replace(reporting.iommu, ids.stdev, target)
        assert (reporting.device.fault_param is not None) == (target == ids.hwpt)
    trigger_iopf(reporting.iommu, ids.idev)
    assert len(reporting.read(4)) == 1
    destroy(reporting.iommu, ids.stdev)
    assert reporting.device.fault_param is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(1, 8)), max_size=40))
def test_every_request_is_read_once_in_whole_groups_and_in_order(steps: list[tuple[int, bool, int]]) -> None:
    """Requests of four interleaved groups; after each a read with some room."""
    with Kernel("mock") as kernel:
        reporting = Reporting(kernel)
        unfinished: dict[int, list[int]] = {}
        waiting: list[list[tuple[int, int]]] = []
        for number, (grpid, last, room) in enumerate(steps, 1):
            reporting.request(grpid, number << 12, last)
            unfinished.setdefault(grpid, []).append(number << 12)
            if last:
                waiting.append([(grpid, addr) for addr in unfinished.pop(grpid)])
            if waiting and len(waiting[0]) > room:
                with fails(errno.EINVAL):
                    reporting.read(room)
                continue
            expected: list[tuple[int, int]] = []
            while waiting and len(expected) + len(waiting[0]) <= room:
                expected += waiting.pop(0)
            found = reporting.read(room)
            assert [(grpid, addr) for grpid, addr, _, _ in found] == expected
            ends = [cookie for _, _, flags, cookie in found if flags & LAST]
            assert len(set(ends)) == len(ends)
            assert answer_faults(reporting.queue, *ends) == 8 * len(ends)
        if not waiting:
            assert reporting.queue.read(0) == b""


def test_older_release_reads_nothing_where_the_first_group_does_not_fit() -> None:
    with Kernel("mock", "7.1") as kernel:
        reporting = Reporting(kernel)
        reporting.request(1, 0x1000)
        reporting.request(1, 0x2000, last=True)
        assert (reporting.read(0), reporting.read(1), len(reporting.read(2))) == ([], [], 2)
