"""Interrupt remapping: from a device's message to the processor's, or to the reason why there is none.

Mirrors the VT-d specification 5.1 (what is checked in which order, table 15), 6.4 (the interrupt entry cache) and
11.4.10 (IRTA). Entries are cached by index, with caching mode also those that fault, and go with an invalidation
descriptor only, or (ESIRTPS) with a new table and when remapping is switched off.

Left out: posted interrupts (5.2), which no capability offers. Not every value of a delivery mode is a mode: those that
are reserved (011b, 110b) are fault 24h here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fakedev.dma import DmaRequest, TranslationFault
from fakedev.memory import BusAbort
from fakedev.pgtable.walker import load_word
from fakedev.reg import Register
from fakedev.vtd import faults, irte, regs
from fakedev.vtd.faults import Refused

if TYPE_CHECKING:
    from fakedev.vtd.unit import VtdUnit

_RESERVED_DELIVERY = (3, 6)


class RefusedInterrupt(Refused):
    """A message meets a fault condition. `index` is the entry that it names, 0 where a record does not say."""

    def __init__(self, reason: int, index: int = 0, fpd: bool = False) -> None:
        super().__init__(reason, fpd)
        self.index = index


class InterruptRemapping:
    """One unit's table and cache. GSTS says whether remapping is on, and whether messages of the old format pass."""

    def __init__(self, unit: VtdUnit) -> None:
        self._unit = unit
        self._caps = unit.caps
        writable = (-1 << 12) & (1 << 64) - 1 | regs.IRTA_SIZE_MASK
        writable |= regs.IRTA_EIME if unit.caps.extended_interrupts else 0
        self._irta = Register("IRTA", regs.IRTA, 8, writable=writable if unit.caps.interrupt_remapping else 0)
        #: Cached entries by index: (lower, upper word).
        self.cache: dict[int, tuple[int, int]] = {}
        self.forget_table()

    @property
    def registers(self) -> list[Register]:
        return [self._irta]

    def forget_table(self) -> None:
        """Power-on."""
        self._base, self._entries, self._extended = 0, 2, False
        self.cache.clear()

    def load_table(self) -> None:
        """SIRTP: use the table that the register IRTA says."""
        irta = self._irta.value
        self._base = irta & ~0xFFF
        self._entries = 2 << (irta & regs.IRTA_SIZE_MASK)
        self._extended = bool(irta & regs.IRTA_EIME)
        if self._caps.enhanced_interrupt_pointer:
            self.cache.clear()

    def invalidate(self, index: int | None = None, mask: int = 0) -> None:
        """Forget cached entries: all, or 1 << mask of them around `index`."""
        if index is None:
            self.cache.clear()
            return
        first = index & -(1 << mask)
        for one in [one for one in self.cache if first <= one < first + (1 << mask)]:
            del self.cache[one]

    def message(self, rid: int, address: int, data: int) -> tuple[int, int]:
        """What becomes of a device's message: the (address, data) to send on. TranslationFault, once it is recorded."""
        status = self._unit.status
        try:
            if status & regs.IRE:
                return self._remap(rid, address, data, bool(status & regs.CFI))
            if self._caps.interrupts_required:
                raise RefusedInterrupt(faults.IR_REMAPPING_REQUIRED)
        except RefusedInterrupt as refused:
            text = f"{rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7}: message {data:#x} to {address:#x}, "
            text += f"entry {refused.index:#x}: fault {refused.reason:02x}h, {refused}"
            if refused.fpd:
                text += " (fault processing is disabled for this entry)"
            else:
                self._unit.recorder.log(refused.index << 48, refused.reason << regs.FRCD_REASON_SHIFT | rid)
            self._unit.tell(text)
            raise TranslationFault(text) from None
        return address, data

    def illegal(self, request: DmaRequest) -> NoReturn:
        """A request to the interrupt range that is no message: recorded while the unit is on. TranslationFault."""
        if self._unit.status & (regs.IRE | regs.TE):
            self._unit.fault(request, faults.IR_ILLEGAL_REQUEST)
        raise TranslationFault(repr(request))

    def _remap(self, rid: int, address: int, data: int, compatibility: bool) -> tuple[int, int]:
        if self._caps.extended_interrupts_required and not self._extended:
            raise RefusedInterrupt(faults.IR_EXTENDED_MODE_REQUIRED)
        if not address & irte.REMAPPABLE:
            if self._extended or not compatibility:
                raise RefusedInterrupt(faults.IR_COMPATIBILITY_BLOCKED)
            return address, data
        index = address >> irte.HANDLE_SHIFT & irte.HANDLE_MASK | (0x8000 if address & irte.HANDLE_15 else 0)
        if address & irte.SHV:
            if data & ~irte.SUBHANDLE_MASK:
                raise RefusedInterrupt(faults.IR_REQUEST_RESERVED)
            index += data
        low, high = self._entry(index)
        if not low & irte.PRESENT:
            raise self._refusal(faults.IR_NOT_PRESENT, index, low)
        if not _may_use(rid, high):
            raise self._refusal(faults.IR_SOURCE_REFUSED, index, low)
        if self._malformed(low, high):
            raise self._refusal(faults.IR_RESERVED, index, low)
        self._keep(index, low, high)
        return irte.to_processor(low, self._extended)

    def _entry(self, index: int) -> tuple[int, int]:
        # An index takes 17 bits where handle and subhandle are added; a record has room for 16.
        if index >= self._entries:
            raise RefusedInterrupt(faults.IR_INDEX_BEYOND, index & 0xFFFF)
        cached = self.cache.get(index)
        if cached is not None:
            return cached
        where = self._base + index * irte.ENTRY_BYTES
        if where >> self._unit.host_address_bits:
            raise RefusedInterrupt(faults.IR_INDEX_BEYOND, index)
        memory = self._unit.memory
        try:
            low, high = load_word(memory, where), load_word(memory, where + 8)
        except BusAbort:
            raise RefusedInterrupt(faults.IR_TABLE_ERROR, index) from None
        if self._caps.caching_mode:
            self._keep(index, low, high)
        return low, high

    def _keep(self, index: int, low: int, high: int) -> None:
        if self._unit.caching.keep():
            self.cache[index] = low, high

    def _refusal(self, reason: int, index: int, low: int) -> RefusedInterrupt:
        return RefusedInterrupt(reason, index, bool(low & irte.FPD))

    def _malformed(self, low: int, high: int) -> bool:
        return bool(
            low & irte.RESERVED_LOW
            or high & irte.RESERVED_HIGH
            or (not self._extended and low & irte.RESERVED_DESTINATION)
            or high >> irte.SVT_SHIFT & irte.SVT_MASK > irte.SVT_BUS
            or low >> irte.DELIVERY_SHIFT & irte.DELIVERY_MASK in _RESERVED_DELIVERY
        )


def _may_use(rid: int, high: int) -> bool:
    """Whether the entry is for messages of `rid`, by its SVT, SQ and SID. A reserved SVT is not for here."""
    svt, sid = high >> irte.SVT_SHIFT & irte.SVT_MASK, high & irte.SID_MASK
    if svt == irte.SVT_SID:
        return not (rid ^ sid) & irte.SQ_COMPARED[high >> irte.SQ_SHIFT & irte.SQ_MASK]
    return svt != irte.SVT_BUS or sid >> 8 <= rid >> 8 <= sid & 0xFF
