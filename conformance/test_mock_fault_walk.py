"""Random walks over a fault queue that devices of several attachments share, against a short statement of the rules.

The rules stand in `Expected`, as lists: what waits, what is outstanding, which cookie comes next. Each walk is the same
every time; a kernel that does otherwise differs at the first step that shows it.
"""

from __future__ import annotations

import errno
import random
import select

import pytest

from conformance.arena import Arena, arena
from conformance.mock import (
    answer_faults,
    fault_queue,
    mock_domain,
    mock_replace,
    nest_parent,
    nested_alloc,
    page_faults,
    trigger_iopf,
)
from conformance.steps import PAGE, answer, ioas_alloc
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_FAULT_ID_VALID

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.has("fault-read-too-small")]

STEPS = 120
SIZE = 40


class Expected:
    """What a fault queue does, as far as a client can tell."""

    def __init__(self) -> None:
        #: (number of the request, device), oldest first.
        self.waiting: list[tuple[int, int]] = []
        #: cookie -> device.
        self.outstanding: dict[int, int] = {}
        self.lowest = 1

    def read(self, room: int, fitting: int) -> tuple[int, list[tuple[int, int]]]:
        """The errno of a read with room for so many messages, of which so many lie in memory; and the messages."""
        if self.waiting and not room:
            return errno.EINVAL, []
        found: list[tuple[int, int]] = []
        while self.waiting and len(found) < room:
            if len(found) == fitting:
                return (0, found) if found else (errno.EFAULT, [])
            number, device = self.waiting.pop(0)
            cookie = next(c for c in range(self.lowest, 1 << 32) if c not in self.outstanding)
            self.outstanding[cookie] = device
            found.append((number, cookie))
        return 0, found

    def write(self, cookies: list[int], code: int) -> tuple[int, int]:
        """The errno of a write of these answers, and how many are taken."""
        taken = 0
        for cookie in cookies:
            if code <= 1 and cookie == 0 and self.outstanding:
                self.lowest = 0
            if code > 1 or self.outstanding.pop(cookie, None) is None:
                return (0 if taken else errno.EINVAL), taken
            taken += 1
        return 0, taken

    def detach(self, device: int) -> None:
        self.waiting = [fault for fault in self.waiting if fault[1] != device]
        self.outstanding = {cookie: other for cookie, other in self.outstanding.items() if other != device}


@pytest.mark.parametrize("seed", range(12))
def test_walk_over_a_fault_queue(kernel: Backend, iommu: File, seed: int) -> None:
    chance = random.Random(seed)
    ioas = ioas_alloc(iommu)
    devices = [mock_domain(iommu, ioas) for _ in range(3)]
    parent = nest_parent(iommu, devices[0].idev, ioas)
    fault, queue = fault_queue(kernel, iommu)
    hwpts = [nested_alloc(iommu, devices[0].idev, parent, IOMMU_HWPT_FAULT_ID_VALID, fault_id=fault) for _ in range(2)]
    attached = [0, 0, 0]
    for device in devices:
        mock_replace(iommu, device.stdev, hwpts[0])
    expected, number = Expected(), 0
    with queue, arena(2) as memory:
        memory.unmap(1)
        for _ in range(STEPS):
            what = chance.choices(("trigger", "read", "write", "replace", "same"), (8, 5, 5, 1, 1))[0]
            which = chance.randrange(3)
            if what == "trigger":
                number += 1
                trigger_iopf(iommu, devices[which].idev, grpid=number)
                expected.waiting.append((number, which))
            elif what == "read":
                room = chance.choice((0, 1, 1, 2, 3, 8))
                fitting = chance.choice((room, room, chance.randint(0, room)))
                outcome, found = expected.read(room, fitting)
                start = memory.page(0) + PAGE - fitting * SIZE - (chance.randrange(SIZE) if fitting < room else 0)
                assert answer(_read, queue, start, room, found) == outcome
            elif what == "write":
                pool = [*expected.outstanding, 0, 1, 2, 99] if chance.random() < 0.3 else [*expected.outstanding]
                cookies = chance.sample(pool, min(len(pool), chance.randint(0, 4)))
                code = chance.choice((0, 0, 0, 1, 1, 2))
                outcome, taken = expected.write(cookies, code)
                assert answer(_write, queue, cookies, code, taken) == outcome
            else:
                if what == "replace":
                    attached[which] ^= 1
                    expected.detach(which)
                mock_replace(iommu, devices[which].stdev, hwpts[attached[which]])
            assert bool(queue.poll(select.POLLIN)) == bool(expected.waiting)


def _read(queue: File, address: int, room: int, expected: list[tuple[int, int]]) -> None:
    size = queue.read_to(address, room * SIZE)
    assert [(fault.grpid, fault.cookie) for fault in page_faults(Arena.read(address, size))] == expected


def _write(queue: File, cookies: list[int], code: int, taken: int) -> None:
    assert answer_faults(queue, *cookies, code=code) == taken * 8
