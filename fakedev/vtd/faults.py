"""Fault reasons of VT-d's legacy mode, and the recording of faults.

Mirrors the VT-d specification: table 30 in 7.1.3 for the reasons, 7.2 for the fault recording registers, 7.3 for the
event. Left out: advanced fault logging (no capability offers it), page requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.vtd import regs

if TYPE_CHECKING:
    from fakedev.dma import DmaRequest
    from fakedev.reg import RegisterFile

ROOT_NOT_PRESENT = 0x1
CONTEXT_NOT_PRESENT = 0x2
CONTEXT_INVALID = 0x3
BEYOND_ADDRESS_WIDTH = 0x4
NO_WRITE_PERMISSION = 0x5
NO_READ_PERMISSION = 0x6
PAGE_TABLE_ERROR = 0x7
ROOT_TABLE_ERROR = 0x8
CONTEXT_TABLE_ERROR = 0x9
ROOT_RESERVED = 0xA
CONTEXT_RESERVED = 0xB
PAGE_TABLE_RESERVED = 0xC
INTERRUPT_RANGE = 0xE
ROOT_ADDRESS_INVALID = 0x30
PASID_IN_LEGACY_MODE = 0x31

REASONS = {
    ROOT_NOT_PRESENT: "present bit in root entry is clear",
    CONTEXT_NOT_PRESENT: "present bit in context entry is clear",
    CONTEXT_INVALID: "invalid context entry",
    BEYOND_ADDRESS_WIDTH: "access beyond the address width",
    NO_WRITE_PERMISSION: "no write permission",
    NO_READ_PERMISSION: "no read permission",
    PAGE_TABLE_ERROR: "next page table cannot be read",
    ROOT_TABLE_ERROR: "root table cannot be read",
    CONTEXT_TABLE_ERROR: "context table cannot be read",
    ROOT_RESERVED: "reserved bits set in root entry",
    CONTEXT_RESERVED: "reserved bits set in context entry",
    PAGE_TABLE_RESERVED: "reserved bits set in page table entry",
    INTERRUPT_RANGE: "address in the interrupt range",
    ROOT_ADDRESS_INVALID: "invalid translation table mode",
    PASID_IN_LEGACY_MODE: "request with PASID in legacy mode",
}

#: Reported even where the context entry says that faults are not to be processed (it has not been read).
UNQUALIFIED = {
    ROOT_NOT_PRESENT,
    ROOT_TABLE_ERROR,
    CONTEXT_TABLE_ERROR,
    ROOT_RESERVED,
    ROOT_ADDRESS_INVALID,
    PASID_IN_LEGACY_MODE,
}


class FaultRecorder:
    """The primary fault log: record registers used as a ring, FSTS, and the fault event."""

    def __init__(self, registers: RegisterFile, records: int, offset: int, send: Callable[[int, int], None]) -> None:
        by_name = registers.by_name
        self._low = [by_name[f"FRCD{n}_LO"] for n in range(records)]
        self._high = [by_name[f"FRCD{n}_HI"] for n in range(records)]
        self._fsts = by_name["FSTS"]
        self._fectl = by_name["FECTL"]
        self._fedata = by_name["FEDATA"]
        self._feaddr = by_name["FEADDR"]
        self._feuaddr = by_name["FEUADDR"]
        self._send = send
        self._next = 0

    def record(self, request: DmaRequest, reason: int) -> None:
        """Log a fault. With overflow pending, or with all records in use, it is lost and only PFO tells."""
        status = self._fsts.value
        if status & regs.FSTS_PFO:
            return
        index = self._next
        high = self._high[index]
        if high.value & regs.FRCD_F:
            self._set_status(regs.FSTS_PFO)
            return
        self._low[index].value = request.address & -4096
        read = regs.FRCD_READ if request.access == 1 else 0
        high.value = regs.FRCD_F | read | reason << regs.FRCD_REASON_SHIFT | request.rid
        self._next = (index + 1) % len(self._high)
        if not status & regs.FSTS_PPF:
            self._fsts.value = self._fsts.value & ~(0xFF << regs.FSTS_FRI_SHIFT) | index << regs.FSTS_FRI_SHIFT
        self._set_status(regs.FSTS_PPF)

    def set_error(self, bit: int) -> None:
        """An error of the invalidation queue (FSTS_IQE and its kin)."""
        self._set_status(bit)

    def _set_status(self, bit: int) -> None:
        pending = self._fsts.value & 0xFF
        self._fsts.value |= bit
        if pending:
            return  # an event is on its way, or software has not dealt with the last one
        self._fectl.value |= regs.EVENT_IP
        self.deliver()

    def deliver(self) -> None:
        """Send the event if one is pending and not masked."""
        if self._fectl.value & (regs.EVENT_IP | regs.EVENT_IM) == regs.EVENT_IP:
            self._fectl.value &= ~regs.EVENT_IP
            self._send(self._feuaddr.value << 32 | self._feaddr.value, self._fedata.value)

    def update(self) -> None:
        """After software cleared a record or a status bit: PPF follows the records, IP follows the status."""
        if any(high.value & regs.FRCD_F for high in self._high):
            self._fsts.value |= regs.FSTS_PPF
        else:
            self._fsts.value &= ~regs.FSTS_PPF
        if not self._fsts.value & 0xFF:
            self._fectl.value &= ~regs.EVENT_IP

    def reset(self) -> None:
        self._next = 0
