"""The three event interrupts of a unit: faults, completed invalidations, page requests.

Mirrors the VT-d specification 7.3, 6.5.2.10 and 7.5: each has a control register (mask, pending), data and an address,
and one rule. They are never remapped.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.reg import Register
from fakedev.vtd import regs

_ONES32 = 0xFFFF_FFFF


class Event:
    """The registers `<prefix>CTL`, `<prefix>DATA`, `<prefix>ADDR`, `<prefix>UADDR` from `offset`, and the message."""

    def __init__(self, prefix: str, offset: int, send: Callable[[int, int], None]) -> None:
        self._send = send
        self._control = Register(
            f"{prefix}CTL", offset, reset=regs.EVENT_IM, writable=regs.EVENT_IM, action=self._unmasked
        )
        self._data = Register(f"{prefix}DATA", offset + 4, writable=0xFFFF)
        self._address = Register(f"{prefix}ADDR", offset + 8, writable=_ONES32 & ~3)
        self._upper = Register(f"{prefix}UADDR", offset + 12, writable=_ONES32)

    @property
    def registers(self) -> list[Register]:
        return [self._control, self._data, self._address, self._upper]

    def signal(self) -> None:
        """Something happened that software has not been told of: send the message, or hold it while masked."""
        self._control.value |= regs.EVENT_IP
        self._deliver()

    def withdraw(self) -> None:
        """Software has dealt with the cause: a message that is held is not sent any more."""
        self._control.value &= ~regs.EVENT_IP

    def _unmasked(self, _old: int, _written: int) -> None:
        self._deliver()

    def _deliver(self) -> None:
        if self._control.value & (regs.EVENT_IP | regs.EVENT_IM) == regs.EVENT_IP:
            self._control.value &= ~regs.EVENT_IP
            self._send(self._upper.value << 32 | self._address.value, self._data.value)
