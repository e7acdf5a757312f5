"""The circular queues of an SMMUv3, and the flags by which it tells of errors.

Mirrors Arm IHI 0070, 3.5.1 (indexes with a wrap bit above them), 7.4 (overflow of the event queue), 8.1 (of the PRI
queue) and 7.5 (GERROR). `QueueIndexes` counts; `OutputQueue` writes records and knows what overflow means;
`GlobalErrors` toggles bits of GERROR until software has toggled GERRORN after them.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.reg import Register
from fakedev.smmuv3 import regs


class QueueIndexes:
    """Base, size and the two index registers of one queue."""

    __slots__ = ("_base", "cons", "max_log2", "prod")

    def __init__(self, base: Register, prod: Register, cons: Register, max_log2: int) -> None:
        self._base = base
        self.prod = prod
        self.cons = cons
        self.max_log2 = max_log2

    @property
    def log2(self) -> int:
        """log2 of the entries; a size beyond the implemented one is that one."""
        return min(self._base.value & regs.Q_BASE_LOG2SIZE.mask, self.max_log2)

    def address(self, entry_log2: int) -> int:
        """Where the queue lies: aligned to its size."""
        return self._base.value & regs.Q_BASE_ADDR_MASK & -(1 << max(self.log2 + entry_log2, 5))

    def empty(self) -> bool:
        """The indexes and their wrap bits are the same."""
        return not (self.prod.value ^ self.cons.value) & (2 << self.log2) - 1

    def full(self) -> bool:
        """The indexes are the same, their wrap bits differ."""
        log2 = self.log2
        return (self.prod.value ^ self.cons.value) & (2 << log2) - 1 == 1 << log2


class GlobalErrors:
    """GERROR and GERRORN."""

    __slots__ = ("_acknowledged", "_activated", "_errors")

    def __init__(self, errors: Register, acknowledged: Register, activated: Callable[[int], None]) -> None:
        self._errors = errors
        self._acknowledged = acknowledged
        self._activated = activated

    def active(self, bit: int) -> bool:
        """The error has happened and software has not acknowledged it."""
        return bool((self._errors.value ^ self._acknowledged.value) & bit)

    def activate(self, bit: int) -> None:
        """An error: its flag toggles unless it is active already; then the interrupt."""
        if not self.active(bit):
            self._errors.value ^= bit
            self._activated(bit)


class OutputQueue:
    """The event queue or the PRI queue: the unit writes, software reads.

    `abort_error` is the flag of GERROR for a record that memory refuses. An overflow toggles OVFLG once, until software
    has copied it to OVACKFLG.
    """

    __slots__ = ("_entry_log2", "_errors", "_memory", "abort_error", "enabled", "indexes")

    def __init__(
        self, memory: PhysicalMemory, indexes: QueueIndexes, entry_log2: int, errors: GlobalErrors, abort_error: int
    ) -> None:
        self._memory = memory
        self.indexes = indexes
        self._entry_log2 = entry_log2
        self._errors = errors
        self.abort_error = abort_error
        self.enabled = False

    def writable(self) -> bool:
        """Enabled, with space, and no abort to be acknowledged (7.2.1)."""
        return self.enabled and not self.indexes.full() and not self._errors.active(self.abort_error)

    def overflowed(self) -> bool:
        """Records were lost, and software has not acknowledged that."""
        return bool((self.indexes.prod.value ^ self.indexes.cons.value) & regs.Q_OVERFLOW_FLAG)

    def overflow(self) -> None:
        """A record is lost because the queue is full."""
        if not self.overflowed():
            self.indexes.prod.value ^= regs.Q_OVERFLOW_FLAG

    def put(self, words: tuple[int, ...], kept: bool = False) -> bool:
        """Write a record if the queue is writable; True if it has been written.

        One that a full queue does not take is lost, and that is an overflow; unless it is `kept` for later.
        """
        indexes = self.indexes
        if not self.writable():
            if not kept and self.enabled and indexes.full() and not self._errors.active(self.abort_error):
                self.overflow()
            return False
        log2 = indexes.log2
        prod = indexes.prod.value
        where = indexes.address(self._entry_log2) + ((prod & (1 << log2) - 1) << self._entry_log2)
        try:
            self._memory.write(where, b"".join(word.to_bytes(8, "little") for word in words))
        except BusAbort:
            self._errors.activate(self.abort_error)
            return False
        wrap = (2 << log2) - 1
        indexes.prod.value = prod & regs.Q_OVERFLOW_FLAG | prod + 1 & wrap
        return True
