"""The page request queue of a VT-d unit: messages of functions become descriptors in memory and an event.

Mirrors the VT-d specification 7.4 and 7.5 (and 11.4.11): what is dropped and what is answered by the hardware itself,
overflow, the pending bit. The implicit invalidation of 6.5.3.1 is the unit's. Left out: coalescing.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.reg import Register
from fakedev.tlp import EXECUTE, NO_PASID, PRG_SUCCESS, PRIVILEGED, PageRequest
from fakedev.vtd import descriptors as qi
from fakedev.vtd import regs
from fakedev.vtd.events import Event


class PageRequestQueue:
    """Registers PQH, PQT, PQA, PRS, and the event PE. `answer(request, code)` sends the hardware's own responses."""

    def __init__(
        self,
        memory: PhysicalMemory,
        send: Callable[[int, int], None],
        answer: Callable[[PageRequest, int], None],
    ) -> None:
        self._memory = memory
        self._answer = answer
        self._event = Event("PE", regs.PECTL, send)
        self._head = Register("PQH", regs.PQH, 8, writable=0x7FFE0)
        self._tail = Register("PQT", regs.PQT, 8, writable=0x7FFE0)
        self._base = Register("PQA", regs.PQA, 8, writable=regs.ADDRESS_MASK | regs.PQA_QS_MASK)
        self._status = Register("PRS", regs.PRS, clears=regs.PRS_PPR | regs.PRS_PRO, action=self._cleared)

    @property
    def registers(self) -> list[Register]:
        return [self._head, self._tail, self._base, self._status, *self._event.registers]

    @property
    def overflows(self) -> bool:
        """The next request finds no room, or an overflow that software has not dealt with."""
        size = 4096 << (self._base.value & regs.PQA_QS_MASK)
        full = (self._tail.value + qi.PRQ_BYTES - self._head.value) % size == 0
        return full or bool(self._status.value & regs.PRS_PRO)

    def take(self, request: PageRequest) -> None:
        """Put a request that met no fault into the queue."""
        if self.overflows:
            if not self._status.value & regs.PRS_PRO:
                self._set(regs.PRS_PRO)
            self._dropped(request)
            return
        size = 4096 << (self._base.value & regs.PQA_QS_MASK)
        tail = self._tail.value % size
        following = (tail + qi.PRQ_BYTES) % size
        low, high = describe(request)
        data = low.to_bytes(8, "little") + high.to_bytes(8, "little") + bytes(16)
        try:
            self._memory.write((self._base.value & regs.ADDRESS_MASK) + tail, data)
        except BusAbort:
            return  # the queue is not in memory: nobody can read it
        self._tail.value = following
        self._set(regs.PRS_PPR)

    def _dropped(self, request: PageRequest) -> None:
        """Table 31: the last one of a group is answered as if it had been served."""
        if request.last and not request.is_stop_marker:
            self._answer(request, PRG_SUCCESS)

    def _set(self, bit: int) -> None:
        pending = self._status.value
        self._status.value |= bit
        if not pending:
            self._event.signal()

    def _cleared(self, _old: int, _written: int) -> None:
        if not self._status.value:
            self._event.withdraw()


def describe(request: PageRequest) -> tuple[int, int]:
    """The two lower words of a page request descriptor (figure 7-1); the others are zero."""
    low = request.rid << qi.PRQ_RID_SHIFT | qi.PRQ_TYPE
    if request.pasid != NO_PASID:
        low |= request.pasid << qi.PRQ_PASID_SHIFT | qi.PRQ_PP
        low |= qi.PRQ_EXECUTE if request.access & EXECUTE else 0
        low |= qi.PRQ_PRIVILEGED if request.access & PRIVILEGED else 0
    high = request.address & (1 << 64) - 4096 | request.group << qi.PRQ_GROUP_SHIFT | request.access & 3
    return low, high | (qi.PRQ_LAST if request.last else 0)
