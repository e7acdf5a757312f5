"""Transactions that wait for software: the stall model.

Mirrors Arm IHI 0070, 3.12.2, 4.7.1, 4.7.2 and 7.2.1. A stalled transaction has an event record with a token (STAG) by
which CMD_RESUME finds it. Where the event queue cannot take the record, or no token is free, the transaction waits
unrecorded and is retried once there is space, or a token again: the fault that it then meets is what is recorded.

Left out: early retry, and suppression of records of the same page (both permitted, never required).
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.dma import Outcome, Parked
from fakedev.smmuv3.events import Event
from fakedev.smmuv3.regs import STALL_MAX


class Stalls:
    """The stalled transactions. `record` writes an event and says whether the queue took it."""

    def __init__(self, record: Callable[[Event], bool]) -> None:
        self._record = record
        #: By STAG: whose they are, and whom to tell.
        self._recorded: dict[int, tuple[int, Parked]] = {}
        self._unrecorded: list[tuple[int, Parked]] = []
        self._next = 0
        #: Ended, but nobody has been told yet: that is done when the command is done with.
        self._ended: list[tuple[Parked, Outcome]] = []

    def __len__(self) -> int:
        return len(self._recorded) + len(self._unrecorded)

    def stall(self, event: Event, parked: Parked) -> None:
        """Let a transaction wait, and tell software by `event`."""
        if len(self._recorded) < STALL_MAX:
            while self._next in self._recorded:
                self._next = (self._next + 1) % STALL_MAX
            event.stag = self._next
            # The record may raise an interrupt whose handler resumes the transaction at once.
            self._recorded[event.stag] = (event.sid, parked)
            self._next = (self._next + 1) % STALL_MAX
            if self._record(event):
                return
            del self._recorded[event.stag]
        self._unrecorded.append((event.sid, parked))

    def resume(self, sid: int, stag: int, outcome: Outcome) -> None:
        """CMD_RESUME: nothing happens unless the token is one of that stream's."""
        found = self._recorded.get(stag)
        if found is not None and found[0] == sid:
            del self._recorded[stag]
            self._ended.append((found[1], outcome))

    def terminate(self, sid: int) -> None:
        """CMD_STALL_TERM: abort all of a stream."""
        self._end(lambda owner: owner == sid)

    def terminate_all(self) -> None:
        """The SMMU is switched off."""
        self._end(lambda _owner: True)

    def _end(self, wanted: Callable[[int], bool]) -> None:
        for stag, (owner, parked) in list(self._recorded.items()):
            if wanted(owner):
                del self._recorded[stag]
                self._ended.append((parked, Outcome.ABORT))
        self._ended += [(parked, Outcome.ABORT) for owner, parked in self._unrecorded if wanted(owner)]
        self._unrecorded = [entry for entry in self._unrecorded if not wanted(entry[0])]

    def retry_unrecorded(self) -> None:
        """The event queue can be written, and there may be a token."""
        waiting, self._unrecorded = self._unrecorded, []
        self._ended += [(parked, Outcome.RETRY) for _, parked in waiting]

    def settle(self) -> None:
        """Tell those whose wait is over; they may send requests from inside."""
        while self._ended:
            parked, outcome = self._ended.pop(0)
            parked.resolve(outcome)
