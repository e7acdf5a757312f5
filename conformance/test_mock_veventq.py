"""IOMMU_VEVENTQ_ALLOC and the queue's descriptor on the mock driver: what is read, in which sizes, and what is lost.

Mirrors iommufd_veventq_alloc(), iommufd_veventq_fops_read() and their kin of drivers/iommu/iommufd/eventq.c,
iommufd_viommu_report_event() of driver.c, and iommufd_test_trigger_vevent() of selftest.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
from typing import NamedTuple

import pytest

from conformance.arena import Arena, arena
from conformance.mock import mock_domain, mock_replace
from conformance.mock_guest import (
    EVENT,
    HEADER,
    VEVENTQ_TYPE,
    Guest,
    guest,
    nested_hwpt,
    trigger_vevent,
    vdevice_alloc,
    veventq_alloc,
    viommu_alloc,
)
from conformance.steps import U32_MAX, answer, destroy, fails, ioas_alloc
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VEVENTQ_FLAG_LOST_EVENTS,
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
)

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.15")]

LOST = IOMMU_VEVENTQ_FLAG_LOST_EVENTS


class Queue(NamedTuple):
    """A vEVENTQ of depth 2 and the device whose events it gets."""

    ids: Guest
    nested: int
    vdevice: int
    number: int
    file: File


@pytest.fixture
def ids(iommu: File) -> Guest:
    return guest(iommu)


@pytest.fixture
def queue(kernel: Backend, iommu: File, ids: Guest) -> Queue:
    return attached(kernel, iommu, ids, 2)


def attached(kernel: Backend, iommu: File, ids: Guest, depth: int, virt_id: int = 0x99) -> Queue:
    """The guest's device attached within the vIOMMU, and a queue for its events."""
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, virt_id)
    mock_replace(iommu, ids.stdev, nested)
    return Queue(ids, nested, vdevice, *veventq_alloc(kernel, iommu, ids.viommu, depth))


def events(data: bytes) -> list[tuple[int, ...]]:
    """What a read brought: (flags, sequence, virt_id), or (flags, sequence) for lost ones."""
    found: list[tuple[int, ...]] = []
    while data:
        flags, _ = HEADER.unpack_from(data)
        kind = HEADER if flags & LOST else EVENT
        found.append(kind.unpack_from(data))
        data = data[kind.size :]
    return found


# -- allocation ------------------------------------------------------------------------------------------------------


def test_queue_is_an_object_and_a_file(kernel: Backend, iommu: File, ids: Guest) -> None:
    number, file = veventq_alloc(kernel, iommu, ids.viommu)
    assert number == ids.viommu + 1
    assert fcntl.fcntl(file.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_order_of_the_checks(kernel: Backend, iommu: File, ids: Guest) -> None:
    veventq_alloc(kernel, iommu, ids.viommu)
    good = {"type": VEVENTQ_TYPE, "veventq_depth": 1, "viommu_id": ids.viommu}
    for change, number in (
        ({"flags": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"__reserved": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"type": 0, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"veventq_depth": 0, "viommu_id": 99}, errno.EINVAL),
        ({"viommu_id": 99}, errno.ENOENT),
        ({"viommu_id": ids.parent}, errno.ENOENT),
        ({}, errno.EEXIST),
    ):
        assert answer(IOMMU_VEVENTQ_ALLOC, iommu, **(good | change)) == number, change


def test_deepest_queue(kernel: Backend, iommu: File, ids: Guest) -> None:
    veventq_alloc(kernel, iommu, ids.viommu, 1 << 19)


@pytest.mark.since("7.2")
@pytest.mark.parametrize("depth", [(1 << 19) + 1, U32_MAX])
def test_deeper_queue_is_einval(kernel: Backend, iommu: File, ids: Guest, depth: int) -> None:
    with fails(errno.EINVAL):
        veventq_alloc(kernel, iommu, ids.viommu, depth)


@pytest.mark.parametrize("kind", [1, IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV, 0xDEAD, U32_MAX])
def test_any_other_type_gives_a_queue_too(kernel: Backend, iommu: File, ids: Guest, kind: int) -> None:
    """The driver is not asked. No event ever comes."""
    number, file = veventq_alloc(kernel, iommu, ids.viommu, kind=kind)
    assert number == ids.viommu + 1
    assert file.read(64) == b""


def test_one_queue_of_a_type_in_a_viommu(kernel: Backend, iommu: File, ids: Guest) -> None:
    first, file = veventq_alloc(kernel, iommu, ids.viommu)
    with fails(errno.EEXIST):
        veventq_alloc(kernel, iommu, ids.viommu)
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    assert other == first + 1
    veventq_alloc(kernel, iommu, other)
    veventq_alloc(kernel, iommu, ids.viommu, kind=1)
    file.close()
    with fails(errno.EEXIST):  # it is the object that counts
        veventq_alloc(kernel, iommu, ids.viommu)
    destroy(iommu, first)
    assert veventq_alloc(kernel, iommu, ids.viommu)[0] == first


def test_open_file_keeps_the_object_and_the_object_the_viommu(kernel: Backend, iommu: File, ids: Guest) -> None:
    number, file = veventq_alloc(kernel, iommu, ids.viommu)
    for held in (number, ids.viommu):
        with fails(errno.EBUSY):
            destroy(iommu, held)
    file.close()
    with fails(errno.EBUSY):
        destroy(iommu, ids.viommu)
    destroy(iommu, number)
    destroy(iommu, ids.viommu)


def test_duplicate_keeps_the_object(kernel: Backend, iommu: File, ids: Guest) -> None:
    number, file = veventq_alloc(kernel, iommu, ids.viommu)
    twin = kernel.adopt(os.dup(file.fileno()))
    file.close()
    with fails(errno.EBUSY):
        destroy(iommu, number)
    twin.close()
    destroy(iommu, number)


def test_open_file_keeps_the_context(kernel: Backend, iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev)
    iommu.close()
    assert events(queue.file.read(64)) == [(0, 0, 0x99)]
    assert queue.file.read(64) == b""
    queue.file.close()


def test_reply_that_cannot_be_written_leaves_no_queue(kernel: Backend, iommu: File, ids: Guest) -> None:
    with arena(1) as memory:
        arg = IOMMU_VEVENTQ_ALLOC.make(type=VEVENTQ_TYPE, veventq_depth=1, viommu_id=ids.viommu)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_VEVENTQ_ALLOC.number, memory.page(0))
    number, _ = veventq_alloc(kernel, iommu, ids.viommu)
    assert number == ids.viommu + 1


def test_no_descriptor_left_is_emfile_and_leaves_no_queue(kernel: Backend, iommu: File, ids: Guest) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as last:
        limit = last.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with fails(errno.EMFILE):
            veventq_alloc(kernel, iommu, ids.viommu)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    number, _ = veventq_alloc(kernel, iommu, ids.viommu)
    assert number == ids.viommu + 1


# -- the file --------------------------------------------------------------------------------------------------------


def test_empty_queue_reads_nothing_and_never_blocks(kernel: Backend, iommu: File, ids: Guest) -> None:
    _, file = veventq_alloc(kernel, iommu, ids.viommu)
    for count in (8, 9, 12, 4096):
        assert file.read(count) == b""


@pytest.mark.parametrize("count", [0, 1, 7])
def test_read_shorter_than_a_header_is_einval(iommu: File, queue: Queue, count: int) -> None:
    with fails(errno.EINVAL):
        queue.file.read(count)
    trigger_vevent(iommu, queue.ids.idev)
    with fails(errno.EINVAL):
        queue.file.read(count)


def test_reads_at_an_offset(iommu: File, queue: Queue) -> None:
    """The file has no position: ESPIPE comes from pread(2) itself, at whatever offset."""
    trigger_vevent(iommu, queue.ids.idev)
    for offset in (0, 8):
        with fails(errno.ESPIPE):
            queue.file.pread(64, offset)
    assert len(queue.file.read(64)) == 12


def test_writes_are_einval(queue: Queue) -> None:
    for data in (b"", b"12345678"):
        with fails(errno.EINVAL):
            queue.file.write(data)


def test_ioctl_and_mmap_are_refused(queue: Queue) -> None:
    with fails(errno.ENOTTY):
        queue.file.ioctl(IOMMU_VEVENTQ_ALLOC.number, 0)
    with fails(errno.ENODEV):
        queue.file.mmap(4096)


def test_poll_tells_whether_an_event_is_there(iommu: File, queue: Queue) -> None:
    every = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM
    assert queue.file.poll(every) == 0
    trigger_vevent(iommu, queue.ids.idev)
    assert queue.file.poll(every) == select.POLLIN | select.POLLRDNORM
    assert queue.file.poll(select.POLLOUT) == 0
    queue.file.read(64)
    assert queue.file.poll(every) == 0


def test_event_is_header_and_virtual_id(iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev)
    assert queue.file.read(12) == EVENT.pack(0, 0, 0x99)
    assert queue.file.read(12) == b""


@pytest.mark.parametrize("count", [8, 9, 11])
def test_first_event_that_does_not_fit_is_einval_and_stays(iommu: File, queue: Queue, count: int) -> None:
    trigger_vevent(iommu, queue.ids.idev)
    with fails(errno.EINVAL):
        queue.file.read(count)
    assert events(queue.file.read(12)) == [(0, 0, 0x99)]


@pytest.mark.parametrize("count", range(12, 25))
def test_later_event_that_does_not_fit_waits(iommu: File, queue: Queue, count: int) -> None:
    trigger_vevent(iommu, queue.ids.idev, 2)
    assert len(queue.file.read(count)) == (24 if count == 24 else 12)
    rest = [] if count == 24 else [(0, 1, 0x99)]
    assert events(queue.file.read(64)) == rest


def test_sequence_goes_on_over_reads(iommu: File, queue: Queue) -> None:
    for number in range(5):
        trigger_vevent(iommu, queue.ids.idev)
        assert events(queue.file.read(64)) == [(0, number, 0x99)]


def test_sequence_belongs_to_the_queue(kernel: Backend, iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev)
    queue.file.close()
    destroy(iommu, queue.number)
    number, file = veventq_alloc(kernel, iommu, queue.ids.viommu)
    assert (number, file.read(64)) == (queue.number, b"")
    trigger_vevent(iommu, queue.ids.idev)
    assert events(file.read(64)) == [(0, 0, 0x99)]


def test_event_that_cannot_be_stored_stays(iommu: File, queue: Queue) -> None:
    """EFAULT for the first; a later one ends the read. Also where only the data behind the header does not fit."""
    with arena(2) as memory:
        memory.no_access(1)
        trigger_vevent(iommu, queue.ids.idev, 3)  # the third is lost
        for room in (0, 4, 8, 11):
            with fails(errno.EFAULT):
                queue.file.read_to(memory.page(1) - room, 64)
        assert queue.file.poll(select.POLLIN) == select.POLLIN
        address = memory.page(1) - 20
        assert queue.file.read_to(address, 64) == 12
        assert events(Arena.read(address, 12)) == [(0, 0, 0x99)]
        address = memory.page(1) - 16
        assert queue.file.read_to(address, 64) == 12
        assert events(Arena.read(address, 12)) == [(0, 1, 0x99)]
        for room in (0, 4):
            with fails(errno.EFAULT):
                queue.file.read_to(memory.page(1) - room, 64)
        address = memory.page(1) - 8
        assert queue.file.read_to(address, 64) == 8
        assert events(Arena.read(address, 8)) == [(LOST, 2)]


def test_read_of_an_empty_queue_looks_at_no_memory(queue: Queue) -> None:
    with arena(1) as memory:
        memory.no_access(0)
        assert queue.file.read_to(memory.page(0), 64) == 0
        with fails(errno.EINVAL):
            queue.file.read_to(memory.page(0), 7)


# -- overflow --------------------------------------------------------------------------------------------------------


def test_full_queue_keeps_one_note_of_what_is_lost(iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev, 6)
    assert events(queue.file.read(1024)) == [(0, 0, 0x99), (0, 1, 0x99), (LOST, 5)]
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(1024)) == [(0, 6, 0x99)]


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ((24, 8), (24, 8)),
        ((24, 64), (24, 8)),
        ((31, 8), (24, 8)),
        ((32,), (32,)),
        ((12, 8), (12, errno.EINVAL)),
        ((12, 20), (12, 20)),
        ((12, 19, 8), (12, 12, 8)),
    ],
)
def test_note_needs_room_for_a_header_alone(
    iommu: File, queue: Queue, counts: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    trigger_vevent(iommu, queue.ids.idev, 3)
    for count, size in zip(counts, sizes, strict=True):
        if size == errno.EINVAL:
            with fails(errno.EINVAL):
                queue.file.read(count)
        else:
            assert len(queue.file.read(count)) == size


def test_note_is_readable_alone_and_polls(iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev, 3)
    queue.file.read(24)
    assert queue.file.poll(select.POLLIN) == select.POLLIN
    assert queue.file.read(8) == HEADER.pack(LOST, 2)
    assert queue.file.poll(select.POLLIN) == 0


def test_event_that_fits_again_takes_the_notes_place(iommu: File, queue: Queue) -> None:
    """Then the gap in the sequence alone tells of the loss."""
    trigger_vevent(iommu, queue.ids.idev, 3)
    queue.file.read(12)
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(64)) == [(0, 1, 0x99), (0, 3, 0x99)]


def test_note_takes_no_room_of_an_event(iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev, 3)
    queue.file.read(24)  # the note is left
    trigger_vevent(iommu, queue.ids.idev, 3)
    assert events(queue.file.read(64)) == [(0, 3, 0x99), (0, 4, 0x99), (LOST, 5)]


def test_queue_of_one(kernel: Backend, iommu: File, ids: Guest) -> None:
    queue = attached(kernel, iommu, ids, 1)
    trigger_vevent(iommu, ids.idev, 4)
    assert events(queue.file.read(64)) == [(0, 0, 0x99), (LOST, 3)]
    trigger_vevent(iommu, ids.idev, 2)
    assert events(queue.file.read(64)) == [(0, 4, 0x99), (LOST, 5)]


def test_closing_with_events_inside(kernel: Backend, iommu: File, queue: Queue) -> None:
    trigger_vevent(iommu, queue.ids.idev, 5)
    queue.file.close()
    destroy(iommu, queue.number)
    with fails(errno.EOPNOTSUPP):
        trigger_vevent(iommu, queue.ids.idev)


def test_queue_without_a_reader_still_takes_events(iommu: File, queue: Queue) -> None:
    queue.file.close()
    trigger_vevent(iommu, queue.ids.idev, 5)
    destroy(iommu, queue.number)


def test_a_thousand_events(kernel: Backend, iommu: File, ids: Guest) -> None:
    queue = attached(kernel, iommu, ids, 1000)
    trigger_vevent(iommu, ids.idev, 1002)
    data = queue.file.read(1 << 20)
    assert events(data) == [*((0, number, 0x99) for number in range(1000)), (LOST, 1001)]


# -- whose events ----------------------------------------------------------------------------------------------------


def test_event_carries_the_low_half_of_the_virtual_id(kernel: Backend, iommu: File, ids: Guest) -> None:
    queue = attached(kernel, iommu, ids, 2, virt_id=0x1_2345_6789)
    trigger_vevent(iommu, ids.idev)
    assert events(queue.file.read(64)) == [(0, 0, 0x2345_6789)]


def test_only_a_device_within_a_viommu_has_events(kernel: Backend, iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    veventq_alloc(kernel, iommu, ids.viommu)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, 99)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, ids.stdev)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, ids.idev)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, ids.idev)
    mock_replace(iommu, ids.stdev, nested)
    trigger_vevent(iommu, ids.idev)
    mock_replace(iommu, ids.stdev, ids.ioas)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, ids.idev)


def test_virtual_id_0_counts_as_none(kernel: Backend, iommu: File, ids: Guest) -> None:
    attached(kernel, iommu, ids, 2, virt_id=0)
    with fails(errno.ENOENT):
        trigger_vevent(iommu, ids.idev)


def test_no_queue_of_that_type_is_eopnotsupp(kernel: Backend, iommu: File, queue: Queue) -> None:
    queue.file.close()
    destroy(iommu, queue.number)
    veventq_alloc(kernel, iommu, queue.ids.viommu, kind=1)
    with fails(errno.EOPNOTSUPP):
        trigger_vevent(iommu, queue.ids.idev)


def test_virtual_id_is_that_of_the_attachment(iommu: File, queue: Queue) -> None:
    destroy(iommu, queue.vdevice)
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(64)) == [(0, 0, 0x99)]
    vdevice_alloc(iommu, queue.ids.viommu, queue.ids.idev, 0x88)
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(64)) == [(0, 1, 0x99)]
    mock_replace(iommu, queue.ids.stdev, queue.ids.ioas)
    mock_replace(iommu, queue.ids.stdev, queue.nested)
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(64)) == [(0, 2, 0x88)]


def test_another_hwpt_of_the_viommu_keeps_the_virtual_id(iommu: File, queue: Queue) -> None:
    """The mock looks at it where the vIOMMU changes, and only there."""
    other = nested_hwpt(iommu, queue.ids.idev, queue.ids.viommu)
    destroy(iommu, queue.vdevice)
    vdevice_alloc(iommu, queue.ids.viommu, queue.ids.idev, 0x88)
    mock_replace(iommu, queue.ids.stdev, other)
    trigger_vevent(iommu, queue.ids.idev)
    assert events(queue.file.read(64)) == [(0, 0, 0x99)]


def test_devices_share_the_queue_of_their_viommu(iommu: File, queue: Queue) -> None:
    other = mock_domain(iommu, queue.ids.ioas)
    vdevice_alloc(iommu, queue.ids.viommu, other.idev, 0x77)
    mock_replace(iommu, other.stdev, queue.nested)
    for idev in (other.idev, queue.ids.idev):
        trigger_vevent(iommu, idev)
    assert events(queue.file.read(64)) == [(0, 0, 0x77), (0, 1, 0x99)]


def test_queues_of_two_viommus_do_not_mix(kernel: Backend, iommu: File, queue: Queue) -> None:
    viommu = viommu_alloc(iommu, queue.ids.idev, queue.ids.parent)
    other = mock_domain(iommu, queue.ids.ioas)
    nested = nested_hwpt(iommu, other.idev, viommu)
    vdevice_alloc(iommu, viommu, other.idev, 0x99)
    mock_replace(iommu, other.stdev, nested)
    _, file = veventq_alloc(kernel, iommu, viommu)
    trigger_vevent(iommu, other.idev)
    assert queue.file.read(64) == b""
    assert events(file.read(64)) == [(0, 0, 0x99)]
    assert ioas_alloc(iommu) > nested
