"""Message signalled interrupts: who hears what a device writes to 0xFEEx_xxxx.

Mirrors what `request_irq()` and the vector allocator of arch/x86/kernel/apic give a driver: an (address, data) pair to
put into a device, and a handler that runs when the device writes it. Left out: affinity, masking, interrupt remapping
(nothing checks that a device writes only the pairs it was given).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fakedev.machine import Machine
from kernel_model.errors import KernelError

_BASE = 0xFEE0_0000
_FIRST_VECTOR, _END_VECTOR = 0x30, 0xF0
_PER_CPU = _END_VECTOR - _FIRST_VECTOR
_CPUS = 256


class Interrupts:
    """The vectors of `machine`, of which it becomes the interrupt sink."""

    def __init__(self, machine: Machine) -> None:
        self._handlers: dict[tuple[int, int], Callable[[], None]] = {}
        #: Messages that nobody had asked for.
        self.spurious = 0
        machine.interrupt_sink = self.deliver

    def request(self, handler: Callable[[], None]) -> tuple[int, int]:
        """A free (address, data) pair that calls `handler` from now on, the lowest first. ENOSPC when all are taken."""
        for number in range(_CPUS * _PER_CPU):
            key = (_BASE | number // _PER_CPU << 12, _FIRST_VECTOR + number % _PER_CPU)
            if key not in self._handlers:
                self._handlers[key] = handler
                return key
        raise KernelError(errno.ENOSPC, "no interrupt vector is left")

    def free(self, address: int, data: int) -> None:
        """Give a pair back; messages to it are spurious from now on."""
        self._handlers.pop((address, data), None)

    def deliver(self, address: int, data: int) -> None:
        """A message arrived."""
        handler = self._handlers.get((address, data))
        if handler is None:
            self.spurious += 1
        else:
            handler()
