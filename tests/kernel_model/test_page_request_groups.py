"""Groups of several page requests, from the bus to a client's fault queue and back.

The suite's engine asks for one page at a time, so here the function's page requests are made by hand, on the machine
with everything; the client goes through the ioctls. Behind an SMMUv3 a group is one stall (test_arm_smmu_faults.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.mock import answer_faults, fault_queue, read_faults
from conformance.steps import PAGE, fails, hwpt_alloc, ioas_alloc, map_user
from fakedev.ats import AtsPort
from fakedev.dma import Outcome
from fakedev.pci import PciFunction
from fakedev.tlp import READ, WRITE, PageRequest
from kernel_model.kernel import Kernel
from uapi.backend import File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID

DSA = "0000:00:11.0"
IOVA = 0x20_0000
LAST, WITH_PASID = 1 << 1, 1
FLAGS = IOMMU_HWPT_FAULT_ID_VALID | IOMMU_HWPT_ALLOC_PASID


class World:
    """The device's PASID 5 on a HWPT with a fault queue."""

    def __init__(self, kernel: Kernel, iommu: File, device: VfioDevice) -> None:
        self.kernel, self.iommu, self.device = kernel, iommu, device
        device.bind(iommu)
        device.enable()
        self.ioas = ioas_alloc(iommu)
        self.fault, self.file = fault_queue(kernel, iommu)
        self.hwpt = hwpt_alloc(iommu, device.devid, self.ioas, FLAGS, fault_id=self.fault)
        device.attach_pasid(5, self.hwpt)

    @property
    def function(self) -> PciFunction:
        return self.kernel.machine.function(DSA)

    @property
    def port(self) -> AtsPort:
        port = self.function.ats
        assert isinstance(port, AtsPort)
        return port

    def ask(self, *pages: tuple[int, int], pasid: int = 5) -> list[Outcome]:
        """One group for these (page, access); what has become of it."""
        requests = self.port.page_requests
        assert requests is not None
        outcomes: list[Outcome] = []
        requests.ask(pasid, [(IOVA + page * PAGE, access) for page, access in pages]).then(outcomes.append)
        return outcomes

    def message(self, page: int, group: int, last: bool) -> None:
        """A bare message, as a device sends it whose groups mix."""
        request = PageRequest(self.function.rid, 5, IOVA + page * PAGE, READ, group, last)
        self.function.dma.send_page_request(request)


@pytest.fixture
def world() -> Iterator[World]:
    with (
        Kernel(machine="q35-vtd-max") as kernel,
        kernel.open("/dev/iommu") as iommu,
        VfioDevice(kernel, DSA) as device,
    ):
        made = World(kernel, iommu, device)
        yield made
        made.file.close()


def test_a_group_is_read_whole_under_one_cookie_and_answered_once(world: World) -> None:
    outcomes = world.ask((0, READ), (3, WRITE), (1, READ | WRITE))
    faults = read_faults(world.file)
    assert [(fault.addr, fault.perm) for fault in faults] == [(IOVA, 1), (IOVA + 3 * PAGE, 2), (IOVA + PAGE, 3)]
    assert [bool(fault.flags & LAST) for fault in faults] == [False, False, True]
    assert all(fault.flags & WITH_PASID and fault.pasid == 5 for fault in faults)
    assert len({(fault.grpid, fault.cookie) for fault in faults}) == 1
    assert outcomes == []
    assert answer_faults(world.file, faults[0].cookie) == 8
    assert outcomes == [Outcome.RETRY]


def test_a_read_that_has_no_room_for_the_group_is_einval_and_loses_nothing(world: World) -> None:
    world.ask((0, READ), (1, READ), (2, READ))
    for room in (1, 2):
        with fails(errno.EINVAL):
            read_faults(world.file, room)
    assert len(read_faults(world.file, 3)) == 3


def test_a_read_takes_as_many_whole_groups_as_fit(world: World) -> None:
    world.ask((0, READ), (1, READ))
    world.ask((2, READ), (3, READ))
    assert [fault.addr for fault in read_faults(world.file, 3)] == [IOVA, IOVA + PAGE]
    assert [fault.addr for fault in read_faults(world.file, 3)] == [IOVA + 2 * PAGE, IOVA + 3 * PAGE]


def test_nothing_is_told_before_the_last_of_a_group_and_groups_may_mix(world: World) -> None:
    for page, group, last in ((0, 7, False), (1, 8, False), (2, 7, False)):
        world.message(page, group, last)
    assert world.file.read(40) == b""
    world.message(3, 8, True)
    assert [(fault.grpid, fault.addr) for fault in read_faults(world.file)] == [
        (8, IOVA + PAGE),
        (8, IOVA + 3 * PAGE),
    ]
    world.message(4, 7, True)
    assert [fault.addr for fault in read_faults(world.file)] == [IOVA, IOVA + 2 * PAGE, IOVA + 4 * PAGE]


def test_what_is_unfinished_at_a_detach_is_forgotten(world: World) -> None:
    world.message(0, 7, False)
    world.device.detach_pasid(5)
    assert world.file.read(40) == b""
    world.device.attach_pasid(5, world.hwpt)
    world.message(1, 7, True)
    assert [fault.addr for fault in read_faults(world.file)] == [IOVA + PAGE]


def test_a_refused_group_is_refused_as_a_whole(world: World) -> None:
    outcomes = world.ask((0, READ), (1, WRITE))
    answer_faults(world.file, read_faults(world.file)[0].cookie, code=1)
    assert outcomes == [Outcome.ABORT]


def test_requests_beyond_the_allocation_wait_for_credit(world: World) -> None:
    """The kernel would take 2048 at a time, the device makes no more than 64; the others go out with the answers."""
    outcomes = [world.ask(*((3 * n + page, READ) for page in range(3))) for n in range(24)]
    first = read_faults(world.file, 128)
    assert len(first) == 63
    buffer = world.kernel.buffer(72 * PAGE)
    map_user(world.iommu, world.ioas, buffer.address, 72 * PAGE, IOVA)
    answer_faults(world.file, *sorted({fault.cookie for fault in first}))
    assert [len(outcome) for outcome in outcomes] == [1] * 21 + [0] * 3
    answer_faults(world.file, *sorted({fault.cookie for fault in read_faults(world.file, 128)}))
    assert outcomes == [[Outcome.RETRY]] * 24
    buffer.close()
