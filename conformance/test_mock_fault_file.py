"""The descriptor of a fault queue: what is read from it, what is written to it, cookies, and poll.

Mirrors the file operations of drivers/iommu/iommufd/eventq.c. Which faults come to a queue, and when they end, is in
test_mock_fault.py.
"""

from __future__ import annotations

import errno
import select

import pytest

from conformance.arena import arena
from conformance.mock import (
    Reporting,
    answer_faults,
    cookies,
    mock_replace,
    page_faults,
    read_faults,
    trigger_iopf,
)
from conformance.steps import NOWHERE, U32_MAX, U64_MAX, fails
from uapi.backend import File

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.11")]

#: Of a message.
SIZE = 40


# -- reading ---------------------------------------------------------------------------------------------------------


def test_read_takes_what_fits(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for grpid in range(5):
        trigger_iopf(iommu, ids.idev, grpid=grpid)
    assert [fault.grpid for fault in read_faults(queue, 2)] == [0, 1]
    assert [fault.grpid for fault in read_faults(queue, 1)] == [2]
    assert [fault.grpid for fault in read_faults(queue, 100)] == [3, 4]
    assert queue.read(SIZE) == b""


@pytest.mark.parametrize("count", [1, 39, 41, 79])
def test_read_of_parts_is_espipe_and_takes_nothing(iommu: File, reporting: Reporting, count: int) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    with fails(errno.ESPIPE):
        queue.read(count)
    assert cookies(read_faults(queue)) == [1]


@pytest.mark.has("fault-read-too-small")
def test_read_without_room_is_einval_while_something_waits(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    assert queue.read(0) == b""
    trigger_iopf(iommu, ids.idev)
    with fails(errno.EINVAL):
        queue.read(0)
    assert cookies(read_faults(queue)) == [1]
    assert queue.read(0) == b""


def test_read_at_an_offset_is_espipe(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    for offset in (0, SIZE):
        with fails(errno.ESPIPE):
            queue.pread(SIZE, offset)


def test_read_into_bad_memory_is_efault_and_takes_nothing(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev, grpid=1)
    trigger_iopf(iommu, ids.idev, grpid=2)
    for address in (0, NOWHERE, U64_MAX - SIZE, 1 << 63):
        with fails(errno.EFAULT):
            queue.read_to(address, SIZE)
    assert [(fault.grpid, fault.cookie) for fault in read_faults(queue)] == [(1, 1), (2, 2)]


def test_read_stops_where_the_memory_ends(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for grpid in range(3):
        trigger_iopf(iommu, ids.idev, grpid=grpid)
    with arena(2) as memory:
        memory.unmap(1)
        assert queue.read_to(memory.page(1) - SIZE - 39, 3 * SIZE) == SIZE
        assert page_faults(memory.read(memory.page(1) - SIZE - 39, SIZE))[0][3:] == (0, 3, 0x1000, 0, 1)
        with fails(errno.EFAULT):
            queue.read_to(memory.page(1) - 39, 2 * SIZE)
    assert [(fault.grpid, fault.cookie) for fault in read_faults(queue)] == [(1, 2), (2, 3)]


def test_read_of_an_empty_queue_looks_at_no_user_memory(reporting: Reporting) -> None:
    """Only at whether it could be some."""
    for address in (0, NOWHERE):
        assert reporting[1].read_to(address, SIZE) == 0
    for address in (U64_MAX - SIZE, 1 << 63):
        with fails(errno.EFAULT):
            reporting[1].read_to(address, SIZE)


def test_no_room_for_bad_memory_is_told_from_the_count_first(iommu: File, reporting: Reporting) -> None:
    trigger_iopf(iommu, reporting[0].idev)
    with fails(errno.ESPIPE):
        reporting[1].read_to(NOWHERE, SIZE + 1)


# -- answering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1])
def test_answer_takes_the_fault_off(iommu: File, reporting: Reporting, code: int) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    assert cookies(read_faults(queue)) == [1]
    assert answer_faults(queue, 1, code=code) == 8
    with fails(errno.EINVAL):
        answer_faults(queue, 1, code=code)


def test_fault_is_answered_only_after_it_was_read(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    with fails(errno.EINVAL):
        answer_faults(queue, 1)
    assert cookies(read_faults(queue)) == [1]


@pytest.mark.parametrize("code", [2, 0xF, U32_MAX])
def test_unknown_code_is_einval_and_the_fault_stays(iommu: File, reporting: Reporting, code: int) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    with fails(errno.EINVAL):
        answer_faults(queue, 1, code=code)
    assert answer_faults(queue, 1) == 8


def test_answers_in_any_order_and_several_at_once(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for _ in range(5):
        trigger_iopf(iommu, ids.idev)
    assert cookies(read_faults(queue)) == [1, 2, 3, 4, 5]
    assert answer_faults(queue, 4, 1, 3) == 24
    assert answer_faults(queue, 5, 2) == 16


def test_write_stops_at_the_first_bad_answer(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for _ in range(3):
        trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    assert answer_faults(queue, 2, 9, 1) == 8
    assert answer_faults(queue, 1, 1, 3) == 8
    with fails(errno.EINVAL):
        answer_faults(queue, 9, 3)
    assert answer_faults(queue, 3) == 8


@pytest.mark.parametrize("length", [1, 4, 7, 9, 20])
def test_write_of_parts_is_espipe_and_answers_nothing(iommu: File, reporting: Reporting, length: int) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    with fails(errno.ESPIPE):
        queue.write((1).to_bytes(8, "little").ljust(length, b"\0")[:length])
    assert answer_faults(queue, 1) == 8


def test_write_of_nothing_answers_nothing(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    assert queue.write(b"") == 0
    assert answer_faults(queue, 1) == 8


def test_write_at_an_offset_is_espipe(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    for offset in (0, 8):
        with fails(errno.ESPIPE):
            queue.pwrite((1).to_bytes(8, "little"), offset)
    assert answer_faults(queue, 1) == 8


def test_write_from_bad_memory_is_efault_after_those_that_could_be_read(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for _ in range(3):
        trigger_iopf(iommu, ids.idev)
    read_faults(queue)
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 20, b"".join(n.to_bytes(8, "little") for n in (3, 1)) + bytes(4))
        for address in (0, NOWHERE, 1 << 63, memory.page(1) - 4):
            with fails(errno.EFAULT):
                queue.write_from(address, 8)
        assert queue.write_from(memory.page(1) - 20, 24) == 16
    assert answer_faults(queue, 2) == 8


# -- cookies ---------------------------------------------------------------------------------------------------------


def test_cookies_are_the_lowest_free(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting

    def more(count: int) -> list[int]:
        for _ in range(count):
            trigger_iopf(iommu, ids.idev)
        return cookies(read_faults(queue))

    assert more(4) == [1, 2, 3, 4]
    answer_faults(queue, 3, 1)
    assert more(3) == [1, 3, 5]
    answer_faults(queue, 5, 4, 3, 2, 1)
    assert more(2) == [1, 2]


def test_cookies_are_given_when_read(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for grpid in range(3):
        trigger_iopf(iommu, ids.idev, grpid=grpid)
    assert [(fault.grpid, fault.cookie) for fault in read_faults(queue, 1)] == [(0, 1)]
    answer_faults(queue, 1)
    assert [(fault.grpid, fault.cookie) for fault in read_faults(queue)] == [(1, 1), (2, 2)]


def test_answer_to_cookie_zero_sets_it_free(iommu: File, reporting: Reporting) -> None:
    """It is EINVAL, but while another fault is outstanding the kernel forgets that zero is kept back."""
    ids, queue = reporting

    def more(count: int) -> list[int]:
        for _ in range(count):
            trigger_iopf(iommu, ids.idev)
        return cookies(read_faults(queue))

    with fails(errno.EINVAL):
        answer_faults(queue, 0)
    assert more(1) == [1]
    with fails(errno.EINVAL):
        answer_faults(queue, 0)
    assert more(2) == [0, 2]
    answer_faults(queue, 1, 2)
    assert more(1) == [1]
    assert answer_faults(queue, 0, 1) == 16
    with fails(errno.EINVAL):
        answer_faults(queue, 0)
    assert more(3) == [0, 1, 2]


def test_answer_to_cookie_zero_with_nothing_outstanding_changes_nothing(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    for _ in range(2):
        trigger_iopf(iommu, ids.idev)
        with fails(errno.EINVAL):
            answer_faults(queue, 0)
        assert cookies(read_faults(queue)) == [1]
        answer_faults(queue, 1)


# -- poll ------------------------------------------------------------------------------------------------------------


def test_poll_tells_whether_something_waits(iommu: File, reporting: Reporting) -> None:
    ids, queue = reporting
    every = 0xFFF
    assert queue.poll(every) == select.POLLOUT
    trigger_iopf(iommu, ids.idev)
    trigger_iopf(iommu, ids.idev)
    for _ in range(2):
        assert queue.poll(every) == select.POLLIN | select.POLLRDNORM | select.POLLOUT
        assert queue.poll(select.POLLIN) == select.POLLIN
        queue.read(SIZE)
    assert queue.poll(every) == select.POLLOUT
    answer_faults(queue, 1, 2)
    assert queue.poll(every) == select.POLLOUT


def test_hosts_own_poll_sees_the_same(iommu: File, reporting: Reporting) -> None:
    """As a program's event loop does, on the bare descriptor."""
    ids, queue = reporting

    def readable() -> bool:
        return bool(select.select([queue.fileno()], [], [], 0)[0])

    assert not readable()
    trigger_iopf(iommu, ids.idev)
    trigger_iopf(iommu, ids.idev)
    assert readable()
    queue.read(SIZE)
    assert readable()
    queue.read(SIZE)
    assert not readable()
    trigger_iopf(iommu, ids.idev)
    assert readable()
    mock_replace(iommu, ids.stdev, ids.parent)
    assert not readable()
