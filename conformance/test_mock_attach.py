"""What attaching mock devices refuses and undoes, and where the page faults of an attachment go.

Mirrors the error paths of iommufd_device_change_pt() and below (drivers/iommu/iommufd/device.c), and the way from a
page request to an attachment: find_fault_handler() of drivers/iommu/io-pgfault.c, iommufd_auto_response_faults().
Plain attaching and replacing is in test_mock_domain.py and test_mock_nested.py, PASIDs are in test_mock_pasid.py.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import VfioDevice
from conformance.layout import Layout
from conformance.mock import (
    APERTURE,
    SMALL,
    MockDevice,
    check_map,
    check_refs,
    mock_domain,
    mock_replace,
    run,
)
from conformance.pasids import (
    PasidDevice,
    attached,
    nest_parent,
    nested,
    pasid_attach,
    pasid_check,
    pasid_detach,
    pasid_hwpt,
    pasid_replace,
    ready,
)
from conformance.steps import (
    PAGE,
    U64_MAX,
    allow_iovas,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_user,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
)
from uapi.vfio import VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_ATTACH_PASID

pytestmark = pytest.mark.needs("iommu", "mock")

FAULT = IOMMU_HWPT_FAULT_ID_VALID
IOVA = APERTURE[0]


# -- an IOAS that does not suit --------------------------------------------------------------------------------------


class Unsuitable(NamedTuple):
    """An IOAS that no mock domain can be filled from, and the errno of trying."""

    ioas: int
    errno: int
    ranges: list[tuple[int, int]]


@pytest.fixture(params=["below", "above", "misaligned", "odd_length", "not_allowed", "unreadable"])
def unsuitable(request: pytest.FixtureRequest, kernel: Backend, iommu: File) -> Iterator[Unsuitable]:
    everything = [(0, U64_MAX)]
    ioas = ioas_alloc(iommu)
    with arena(2) as memory:
        number = errno.EADDRINUSE
        if request.param == "below":
            map_user(iommu, ioas, memory.page(0), PAGE, iova=IOVA - PAGE)
        elif request.param == "above":
            map_user(iommu, ioas, memory.page(0), PAGE, iova=APERTURE[1] + 1)
        elif request.param == "misaligned":
            map_user(iommu, ioas, memory.page(0), PAGE, iova=IOVA + 1024)
        elif request.param == "odd_length":
            map_user(iommu, ioas, memory.page(0), SMALL + 1, iova=IOVA)
        elif request.param == "not_allowed":
            allow_iovas(iommu, ioas, [(0, IOVA)])
        else:
            map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=IOVA)
            memory.no_access(1)
            number = errno.EFAULT
        yield Unsuitable(ioas, number, everything)


def test_device_on_an_unsuitable_ioas_leaves_nothing(iommu: File, unsuitable: Unsuitable) -> None:
    for _ in range(2):
        with fails(unsuitable.errno):
            mock_domain(iommu, unsuitable.ioas)
    assert iova_ranges(iommu, unsuitable.ioas) == unsuitable.ranges
    assert ioas_alloc(iommu) == unsuitable.ioas + 1
    destroy(iommu, unsuitable.ioas)


@pytest.mark.since("6.6")
def test_replace_by_an_unsuitable_ioas_keeps_the_old(kernel: Backend, iommu: File, unsuitable: Unsuitable) -> None:
    buffer = kernel.buffer(PAGE)
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
    mock = mock_domain(iommu, ioas)
    next_id = ioas_alloc(iommu)
    destroy(iommu, next_id)
    with fails(unsuitable.errno):
        mock_replace(iommu, mock.stdev, unsuitable.ioas)
    check_map(iommu, mock.hwpt, IOVA, PAGE, buffer.address)
    assert mock_replace(iommu, mock.stdev, ioas) == mock.hwpt
    assert iova_ranges(iommu, unsuitable.ioas) == unsuitable.ranges
    assert ioas_alloc(iommu) == next_id
    buffer.close()


@pytest.mark.since("6.2")
def test_failed_attach_leaves_no_pin(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    with arena(4) as memory:
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=IOVA)
        map_user(iommu, ioas, memory.page(2), 2 * PAGE, iova=IOVA + 2 * PAGE)
        memory.no_access(3)
        with fails(errno.EFAULT):
            mock_domain(iommu, ioas)
        check_refs(iommu, memory.page(0), 3 * PAGE, 0)


# -- the automatic HWPT ----------------------------------------------------------------------------------------------


@pytest.mark.since("6.6")
def test_attach_to_an_ioas_never_picks_a_hwpt_of_the_users_own(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    first = mock_domain(iommu, ioas)
    own = hwpt_alloc(iommu, first.idev, ioas)
    mock_replace(iommu, first.stdev, own)
    second = mock_domain(iommu, ioas)
    assert second.hwpt != own
    assert mock_replace(iommu, first.stdev, ioas) == second.hwpt


@pytest.mark.since("6.6")
def test_replace_of_one_of_two_devices_leaves_the_automatic_hwpt(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    first, second = mock_domain(iommu, ioas), mock_domain(iommu, ioas)
    other = ioas_alloc(iommu)
    moved = mock_replace(iommu, first.stdev, other)
    assert moved != second.hwpt
    with fails(errno.EBUSY):
        destroy(iommu, second.hwpt)
    assert mock_replace(iommu, second.stdev, other) == moved
    with fails(errno.ENOENT):
        destroy(iommu, second.hwpt)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


@pytest.mark.since("6.6")
def test_automatic_hwpt_that_is_held_by_its_id_goes_with_the_last_holder(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    first = mock_domain(iommu, ioas)
    second = mock_domain(iommu, first.hwpt)
    destroy(iommu, first.stdev)
    with fails(errno.EBUSY):
        destroy(iommu, second.hwpt)
    destroy(iommu, second.stdev)
    with fails(errno.ENOENT):
        destroy(iommu, second.hwpt)


@pytest.mark.since("6.6")
def test_hwpt_that_a_device_enters_holds_what_the_ioas_maps(kernel: Backend, iommu: File) -> None:
    buffer = kernel.buffer(2 * PAGE)
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    mock = mock_domain(iommu, here)
    map_user(iommu, there, buffer.address, 2 * PAGE, iova=IOVA)
    moved = mock_replace(iommu, mock.stdev, there)
    check_map(iommu, moved, IOVA, 2 * PAGE, buffer.address)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    mock_replace(iommu, mock.stdev, here)
    check_refs(iommu, buffer.address, 2 * PAGE, 0)
    buffer.close()


# -- beside another IOMMU --------------------------------------------------------------------------------------------
# Only first attachments: a replace by a HWPT of another driver takes a 7.3.4 down.


@pytest.mark.needs("dma_device", "vfio_cdev")
def test_hwpt_of_another_driver_is_einval_for_both(device: VfioDevice, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    own = hwpt_alloc(iommu, device.devid, ioas)
    mock = mock_domain(iommu, ioas_alloc(iommu))
    with fails(errno.EINVAL):
        device.attach(mock.hwpt)
    with fails(errno.EINVAL):
        mock_domain(iommu, own)


@pytest.mark.needs("dma_device", "vfio_cdev")
def test_device_behind_another_iommu_gets_an_automatic_hwpt_of_its_own(
    device: VfioDevice, iommu: File, layout: Layout
) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    own = device.attach(ioas)
    assert own != mock.hwpt
    assert mock_domain(iommu, ioas).hwpt == mock.hwpt
    start, last = APERTURE
    ranges = [(max(first, start), min(end, last)) for first, end in layout.attached]
    assert iova_ranges(iommu, ioas) == [(first, end) for first, end in ranges if first <= end]


@pytest.mark.needs("dma_device", "vfio_cdev")
@pytest.mark.since("6.15")
def test_hwpt_of_another_driver_is_einval_for_a_pasid(device: VfioDevice, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    own = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_ALLOC_PASID)
    dev, (hwpt,) = ready(iommu)
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=5, pt_id=hwpt)
    with fails(errno.EINVAL):
        pasid_attach(iommu, dev.stdev, 5, own)
    with attached(iommu, dev.stdev, [5], hwpt):
        with fails(errno.EINVAL):
            pasid_replace(iommu, dev.stdev, 5, own)
        pasid_check(iommu, dev.stdev, 5, hwpt)


# -- faults of an attachment -----------------------------------------------------------------------------------------


MESSAGE = struct.Struct("<IIIIIIQII")
PASID_VALID, LAST = 1, 2


class Queue(NamedTuple):
    """A fault queue."""

    id: int
    file: File

    def faults(self) -> list[tuple[int, int, int]]:
        """(flags, device, PASID) of every message that waits."""
        found = []
        while data := self.file.read(MESSAGE.size):
            flags, dev_id, pasid, *_ = MESSAGE.unpack(data)
            found.append((flags, dev_id, pasid))
        return found


@pytest.fixture
def queue(kernel: Backend, iommu: File) -> Iterator[Queue]:
    """A fault queue, object 1."""
    reply = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    file = kernel.adopt(reply.out_fault_fd)
    yield Queue(reply.out_fault_id, file)
    file.close()


def trigger(iommu: File, idev: int, pasid: int = 0) -> None:
    """TRIGGER_IOPF: one page request, a group of its own. It succeeds whether anybody listens or not."""
    op = abi.IOMMU_TEST_OP_TRIGGER_IOPF
    run(iommu, op, 0, "trigger_iopf", dev_id=idev, pasid=pasid, grpid=7, perm=1, addr=IOVA)


def reporting(iommu: File, mock: MockDevice, ioas: int, queue: Queue, flags: int = 0) -> int:
    """A paging HWPT whose faults go to the queue."""
    return hwpt_alloc(iommu, mock.idev, ioas, FAULT | flags, fault_id=queue.id)


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_fault_of_a_device_is_told_while_it_is_attached(iommu: File, queue: Queue) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    hwpt = reporting(iommu, mock, ioas, queue)
    trigger(iommu, mock.idev)
    mock_replace(iommu, mock.stdev, hwpt)
    trigger(iommu, mock.idev)
    assert queue.faults() == [(LAST, mock.idev, 0)]
    mock_replace(iommu, mock.stdev, ioas)
    trigger(iommu, mock.idev)
    assert queue.faults() == []


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_device_made_on_a_reporting_hwpt(iommu: File, queue: Queue) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    second = mock_domain(iommu, reporting(iommu, mock, ioas, queue))
    for device in (mock, second):
        trigger(iommu, device.idev)
    assert queue.faults() == [(LAST, second.idev, 0)]


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_replace_answers_what_waits(iommu: File, queue: Queue) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    hwpt, other = (reporting(iommu, mock, ioas, queue) for _ in range(2))
    mock_replace(iommu, mock.stdev, hwpt)
    trigger(iommu, mock.idev)
    mock_replace(iommu, mock.stdev, hwpt)  # no replace at all
    trigger(iommu, mock.idev)
    assert len(queue.faults()) == 2
    trigger(iommu, mock.idev)
    mock_replace(iommu, mock.stdev, other)
    assert queue.faults() == []
    trigger(iommu, mock.idev)
    assert queue.faults() == [(LAST, mock.idev, 0)]


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_refused_replace_keeps_what_waits(iommu: File, queue: Queue) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    mock_replace(iommu, mock.stdev, reporting(iommu, mock, ioas, queue))
    trigger(iommu, mock.idev)
    with fails(errno.ENOENT):
        mock_replace(iommu, mock.stdev, 99)
    assert queue.faults() == [(LAST, mock.idev, 0)]


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_device_that_goes_takes_only_its_own_faults_along(iommu: File, queue: Queue) -> None:
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    hwpt = reporting(iommu, mock, ioas, queue)
    first, second = mock_domain(iommu, hwpt), mock_domain(iommu, hwpt)
    for device in (first, second, first):
        trigger(iommu, device.idev)
    destroy(iommu, first.stdev)
    assert queue.faults() == [(LAST, second.idev, 0)]


def listening(iommu: File, queue: Queue) -> tuple[PasidDevice, int, int]:
    """A device with PASIDs on a HWPT that reports nothing, that HWPT, and one that reports."""
    dev, (own,) = ready(iommu)
    hwpt = hwpt_alloc(iommu, dev.idev, dev.ioas, FAULT | IOMMU_HWPT_ALLOC_PASID, fault_id=queue.id)
    return dev, own, hwpt


@pytest.mark.since("6.15")
def test_fault_with_a_pasid_is_that_attachments(iommu: File, queue: Queue) -> None:
    dev, own, hwpt = listening(iommu, queue)
    with attached(iommu, dev.stdev, [5], hwpt), attached(iommu, dev.stdev, [6], own):
        for pasid in (0, 5, 6, 7):
            trigger(iommu, dev.idev, pasid)
        assert queue.faults() == [(PASID_VALID | LAST, dev.idev, 5)]


@pytest.mark.since("6.15")
def test_fault_with_a_pasid_that_is_not_attached_is_nobodys(iommu: File, queue: Queue) -> None:
    dev, _, hwpt = listening(iommu, queue)
    mock_replace(iommu, dev.stdev, hwpt)
    trigger(iommu, dev.idev, 5)
    assert queue.faults() == []


@pytest.mark.since("6.15")
def test_fault_with_a_pasid_that_is_not_attached_goes_to_a_nested_hwpt_of_the_device(iommu: File, queue: Queue) -> None:
    """The guest has the table of PASIDs then."""
    dev, own, hwpt = listening(iommu, queue)
    flags = FAULT | IOMMU_HWPT_ALLOC_PASID
    mock_replace(iommu, dev.stdev, nested(iommu, dev.idev, nest_parent(iommu, dev), flags, queue.id))
    with attached(iommu, dev.stdev, [5], own), attached(iommu, dev.stdev, [6], hwpt):
        for pasid in (0, 5, 6, 7):
            trigger(iommu, dev.idev, pasid)
        expected = [(LAST, dev.idev, 0), (PASID_VALID | LAST, dev.idev, 6), (PASID_VALID | LAST, dev.idev, 7)]
        assert queue.faults() == expected


@pytest.mark.since("6.15")
def test_pasids_come_and_go_one_by_one(iommu: File, queue: Queue) -> None:
    dev, own, hwpt = listening(iommu, queue)
    with attached(iommu, dev.stdev, [1, 2, 3], hwpt):
        mock_replace(iommu, dev.stdev, hwpt)
        pasid_detach(iommu, dev.stdev, 2)
        pasid_replace(iommu, dev.stdev, 3, own)
        for pasid in range(4):
            trigger(iommu, dev.idev, pasid)
        assert [pasid for _, _, pasid in queue.faults()] == [0, 1]
        mock_replace(iommu, dev.stdev, own)
        for pasid in range(4):
            trigger(iommu, dev.idev, pasid)
        assert [pasid for _, _, pasid in queue.faults()] == [1]


@pytest.mark.since("6.15")
def test_detach_of_a_pasid_answers_what_waits_of_it_alone(iommu: File, queue: Queue) -> None:
    dev, own, hwpt = listening(iommu, queue)
    with attached(iommu, dev.stdev, [1, 2, 3], hwpt):
        for pasid in (1, 2, 3, 2, 1):
            trigger(iommu, dev.idev, pasid)
        pasid_detach(iommu, dev.stdev, 2)
        pasid_replace(iommu, dev.stdev, 1, own)
        assert [pasid for _, _, pasid in queue.faults()] == [3]


@pytest.mark.since("6.15")
def test_replace_that_the_driver_refuses_keeps_what_waits(iommu: File, queue: Queue) -> None:
    dev, _, hwpt = listening(iommu, queue)
    other = pasid_hwpt(iommu, dev)
    pasid = abi.IOMMU_TEST_PASID_RESERVED
    with attached(iommu, dev.stdev, [pasid], hwpt):
        trigger(iommu, dev.idev, pasid)
        with fails(errno.ENOMEM):
            pasid_replace(iommu, dev.stdev, pasid, other)
        trigger(iommu, dev.idev, pasid)
        assert [number for _, _, number in queue.faults()] == [pasid, pasid]


@pytest.mark.since("6.15")
def test_queue_is_held_by_its_hwpts(iommu: File, queue: Queue) -> None:
    dev, _, hwpt = listening(iommu, queue)
    with attached(iommu, dev.stdev, [5], hwpt):
        queue.file.close()
        with fails(errno.EBUSY):
            destroy(iommu, queue.id)
        trigger(iommu, dev.idev, 5)
        pasid_check(iommu, dev.stdev, 5, hwpt)
    destroy(iommu, hwpt)
    destroy(iommu, queue.id)


@pytest.mark.since("6.15")
def test_same_pasid_on_another_device_is_another_attachment(iommu: File, queue: Queue) -> None:
    dev, own, hwpt = listening(iommu, queue)
    second = mock_domain(iommu, dev.ioas)
    mock_replace(iommu, second.stdev, own)
    with fails(errno.EINVAL):
        pasid_attach(iommu, second.stdev, 5, hwpt)
    with attached(iommu, dev.stdev, [5], hwpt):
        trigger(iommu, second.idev, 5)
        assert queue.faults() == []
