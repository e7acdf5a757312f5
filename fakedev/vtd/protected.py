"""Protected memory regions of a VT-d unit: memory that no DMA reaches, whether translation is on or off.

Mirrors the VT-d specification 11.4.8: one region below 4 GiB and one anywhere, aligned to 2 MiB, compared with the
address after translation, as hardware from version 2 on does. What is blocked leaves no fault record. A unit's own
reads of its tables are not subject to it.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.dma import Run
from fakedev.reg import Register
from fakedev.vtd import regs

#: The bits below are zeros in a base and ones in a limit.
_ALIGNMENT = (2 << 20) - 1
_LOW = 0xFFFF_FFFF & ~_ALIGNMENT
_HIGH = (1 << 64) - 1 & ~_ALIGNMENT


class ProtectedRegions:
    """The registers of the regions that `caps` has; `changed` is called when they are switched on or off."""

    def __init__(self, caps: regs.Capabilities, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._pairs: list[tuple[Register, Register]] = []
        if caps.protected_low:
            self._pairs.append(
                (Register("PLMBASE", regs.PLMBASE, writable=_LOW), Register("PLMLIMIT", regs.PLMLIMIT, writable=_LOW))
            )
        if caps.protected_high:
            self._pairs.append(
                (
                    Register("PHMBASE", regs.PHMBASE, 8, writable=_HIGH),
                    Register("PHMLIMIT", regs.PHMLIMIT, 8, writable=_HIGH),
                )
            )
        self._enable = Register("PMEN", regs.PMEN, writable=regs.PMEN_EPM if self._pairs else 0, action=self._enabled)

    @property
    def registers(self) -> list[Register]:
        return [self._enable, *(register for pair in self._pairs for register in pair)]

    @property
    def enabled(self) -> bool:
        return bool(self._enable.value & regs.PMEN_EPM)

    def clip(self, run: Run, address: int) -> Run | None:
        """What of a run around `address` lies outside of the regions; None if its target does not."""
        start, stop, delta, allowed = run
        target = address + delta
        for base, limit in self._pairs:
            first, beyond = base.value, (limit.value | _ALIGNMENT) + 1
            if first >= beyond:
                continue
            if first <= target < beyond:
                return None
            if target < first:
                stop = min(stop, first - delta)
            else:
                start = max(start, beyond - delta)
        return start, stop, delta, allowed

    def _enabled(self, _old: int, _written: int) -> None:
        self._enable.value = regs.PMEN_EPM | regs.PMEN_PRS if self.enabled else 0
        self._changed()
