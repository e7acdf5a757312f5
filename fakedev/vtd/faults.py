"""Fault reasons of VT-d, and the recording of faults.

Mirrors the VT-d specification, revision 5.10: table 30 in 7.1.3 for the reasons and what each kind of request gets for
them, table 15 in 5.1.4.1 for interrupts, 7.2 for the fault recording registers. Left out: the reasons of host
permission tables and of posted interrupts, which no capability offers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.dma import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE
from fakedev.vtd import regs

if TYPE_CHECKING:
    from fakedev.dma import DmaRequest
    from fakedev.reg import RegisterFile
    from fakedev.vtd.events import Event

# Legacy mode.
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
TRANSLATION_BLOCKED = 0xD
INTERRUPT_RANGE = 0xE
# Interrupt remapping.
IR_REQUEST_RESERVED = 0x20
IR_INDEX_BEYOND = 0x21
IR_NOT_PRESENT = 0x22
IR_TABLE_ERROR = 0x23
IR_RESERVED = 0x24
IR_COMPATIBILITY_BLOCKED = 0x25
IR_SOURCE_REFUSED = 0x26
IR_ILLEGAL_REQUEST = 0x29
IR_EXTENDED_MODE_REQUIRED = 0x2A
IR_REMAPPING_REQUIRED = 0x2B
# The root-table address register.
ROOT_ADDRESS_INVALID = 0x30
PASID_IN_LEGACY_MODE = 0x31
PAGE_REQUEST_IN_LEGACY_MODE = 0x32
ABORT_MODE = 0x33
EXECUTE_REQUESTED = 0x34
# Scalable mode: root, context, PASID directory, PASID table.
SM_ROOT_TABLE_ERROR = 0x38
SM_ROOT_NOT_PRESENT = 0x39
SM_ROOT_RESERVED = 0x3A
SM_CONTEXT_TABLE_ERROR = 0x40
SM_CONTEXT_NOT_PRESENT = 0x41
SM_CONTEXT_RESERVED = 0x42
SM_CONTEXT_INVALID = 0x43
SM_DEVICE_TLB_DISABLED = 0x44
SM_PASID_DISABLED = 0x45
SM_PASID_BEYOND_DIRECTORY = 0x46
SM_PAGE_REQUEST_DISABLED = 0x47
SM_PASID_IS_RID_PASID = 0x48
SM_TRANSLATED_PASID_DISABLED = 0x49
DIRECTORY_ERROR = 0x50
DIRECTORY_NOT_PRESENT = 0x51
DIRECTORY_RESERVED = 0x52
PASID_TABLE_ERROR = 0x58
PASID_NOT_PRESENT = 0x59
PASID_RESERVED = 0x5A
PASID_INVALID = 0x5B
PASID_NO_EXECUTE = 0x5C
PASID_NO_SUPERVISOR = 0x5D
# First stage.
FS_TABLE_ERROR = 0x70
FS_NOT_PRESENT = 0x71
FS_RESERVED = 0x72
FS_ROOT_ERROR = 0x73
FS_BEYOND_SECOND_STAGE = 0x74
FS_ROOT_NOT_READABLE = 0x75
FS_TABLE_NOT_READABLE = 0x76
FS_TABLE_NOT_WRITABLE = 0x77
FS_UPDATE_WITHOUT_SNOOP = 0x90
FS_UPDATE_FAILED = 0x91
# Second stage.
SS_TABLE_ERROR = 0x78
SS_NOT_PRESENT = 0x79
SS_RESERVED = 0x7A
SS_ROOT_ERROR = 0x7B
SS_UPDATE_WITHOUT_SNOOP = 0x7C
SS_UPDATE_FAILED = 0x7D
# General.
NOT_CANONICAL = 0x80
NO_USER_PERMISSION = 0x81
BEYOND_HOST_WIDTH = 0x83
SM_BEYOND_ADDRESS_WIDTH = 0x84
SM_NO_WRITE_PERMISSION = 0x85
SM_NO_READ_PERMISSION = 0x86
SM_INTERRUPT_RANGE = 0x87
PASID_BEYOND_UNIT = 0x89

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
    TRANSLATION_BLOCKED: "translation type blocks translation and translated requests",
    INTERRUPT_RANGE: "address in the interrupt range",
    IR_REQUEST_RESERVED: "reserved bits set in interrupt request",
    IR_INDEX_BEYOND: "interrupt index beyond the table",
    IR_NOT_PRESENT: "present bit in interrupt-remapping entry is clear",
    IR_TABLE_ERROR: "interrupt-remapping table cannot be read",
    IR_RESERVED: "reserved bits set in interrupt-remapping entry",
    IR_COMPATIBILITY_BLOCKED: "interrupt in compatibility format is blocked",
    IR_SOURCE_REFUSED: "interrupt-remapping entry is not for this source",
    IR_ILLEGAL_REQUEST: "request to the interrupt range that is no interrupt",
    IR_EXTENDED_MODE_REQUIRED: "extended interrupt mode is required, and off",
    IR_REMAPPING_REQUIRED: "interrupt remapping is required, and off",
    ROOT_ADDRESS_INVALID: "invalid translation table mode",
    PASID_IN_LEGACY_MODE: "request with PASID in legacy mode",
    PAGE_REQUEST_IN_LEGACY_MODE: "page request in legacy mode",
    ABORT_MODE: "abort-DMA mode",
    EXECUTE_REQUESTED: "execute requested",
    SM_ROOT_TABLE_ERROR: "scalable-mode root table cannot be read",
    SM_ROOT_NOT_PRESENT: "present bit in scalable-mode root entry is clear",
    SM_ROOT_RESERVED: "reserved bits set in scalable-mode root entry",
    SM_CONTEXT_TABLE_ERROR: "scalable-mode context table cannot be read",
    SM_CONTEXT_NOT_PRESENT: "present bit in scalable-mode context entry is clear",
    SM_CONTEXT_RESERVED: "reserved bits set in scalable-mode context entry",
    SM_CONTEXT_INVALID: "invalid scalable-mode context entry",
    SM_DEVICE_TLB_DISABLED: "device TLB is not enabled in scalable-mode context entry",
    SM_PASID_DISABLED: "PASID is not enabled in scalable-mode context entry",
    SM_PASID_BEYOND_DIRECTORY: "PASID beyond the PASID directory",
    SM_PAGE_REQUEST_DISABLED: "page requests are not enabled in scalable-mode context entry",
    SM_PASID_IS_RID_PASID: "PASID is the one of requests without PASID",
    SM_TRANSLATED_PASID_DISABLED: "PASID in translated requests is not enabled in scalable-mode context entry",
    DIRECTORY_ERROR: "PASID directory cannot be read",
    DIRECTORY_NOT_PRESENT: "present bit in PASID-directory entry is clear",
    DIRECTORY_RESERVED: "reserved bits set in PASID-directory entry",
    PASID_TABLE_ERROR: "PASID table cannot be read",
    PASID_NOT_PRESENT: "present bit in PASID-table entry is clear",
    PASID_RESERVED: "reserved bits set in PASID-table entry",
    PASID_INVALID: "invalid PASID-table entry",
    PASID_NO_EXECUTE: "execute requests are not supported",
    PASID_NO_SUPERVISOR: "supervisor requests are not enabled in PASID-table entry",
    FS_TABLE_ERROR: "next first-stage table cannot be read",
    FS_NOT_PRESENT: "present bit in first-stage entry is clear",
    FS_RESERVED: "reserved bits set in first-stage entry",
    FS_ROOT_ERROR: "first first-stage table cannot be read",
    FS_BEYOND_SECOND_STAGE: "address in first-stage entry beyond the second stage's width",
    FS_ROOT_NOT_READABLE: "second stage gives no read permission for the first first-stage table",
    FS_TABLE_NOT_READABLE: "second stage gives no read permission for a first-stage table",
    FS_TABLE_NOT_WRITABLE: "second stage gives no write permission for flags in a first-stage table",
    FS_UPDATE_WITHOUT_SNOOP: "flags in a first-stage entry need an update, but walks do not snoop",
    FS_UPDATE_FAILED: "flags in a first-stage entry cannot be written",
    SS_TABLE_ERROR: "next second-stage table cannot be read",
    SS_NOT_PRESENT: "second stage allows neither reading nor writing",
    SS_RESERVED: "reserved bits set in second-stage entry",
    SS_ROOT_ERROR: "first second-stage table cannot be read",
    SS_UPDATE_WITHOUT_SNOOP: "flags in a second-stage entry need an update, but walks do not snoop",
    SS_UPDATE_FAILED: "flags in a second-stage entry cannot be written",
    NOT_CANONICAL: "address is not canonical",
    NO_USER_PERMISSION: "first stage is for supervisors only",
    BEYOND_HOST_WIDTH: "address beyond the host address width",
    SM_BEYOND_ADDRESS_WIDTH: "access beyond the second stage's address width",
    SM_NO_WRITE_PERMISSION: "no write permission",
    SM_NO_READ_PERMISSION: "no read permission",
    SM_INTERRUPT_RANGE: "address in the interrupt range",
    PASID_BEYOND_UNIT: "PASID beyond the unit's size",
}

#: Reported even where an entry says that faults are not to be processed ("Qualified: No" in table 30).
UNQUALIFIED = {
    ROOT_NOT_PRESENT,
    ROOT_TABLE_ERROR,
    CONTEXT_TABLE_ERROR,
    ROOT_RESERVED,
    IR_ILLEGAL_REQUEST,
    ROOT_ADDRESS_INVALID,
    PASID_IN_LEGACY_MODE,
    PAGE_REQUEST_IN_LEGACY_MODE,
    ABORT_MODE,
    EXECUTE_REQUESTED,
    SM_ROOT_TABLE_ERROR,
    SM_ROOT_NOT_PRESENT,
    SM_ROOT_RESERVED,
    SM_CONTEXT_TABLE_ERROR,
    DIRECTORY_ERROR,
    PASID_TABLE_ERROR,
}

#: For these a translation request completes successfully, with no permission: nothing is reported (7.1.2).
RECOVERABLE = {
    BEYOND_ADDRESS_WIDTH,
    DIRECTORY_NOT_PRESENT,
    PASID_NOT_PRESENT,
    PASID_NO_EXECUTE,
    PASID_NO_SUPERVISOR,
    FS_TABLE_ERROR,
    FS_NOT_PRESENT,
    FS_RESERVED,
    FS_ROOT_ERROR,
    FS_BEYOND_SECOND_STAGE,
    FS_ROOT_NOT_READABLE,
    FS_TABLE_NOT_READABLE,
    FS_TABLE_NOT_WRITABLE,
    FS_UPDATE_WITHOUT_SNOOP,
    FS_UPDATE_FAILED,
    SS_NOT_PRESENT,
    NOT_CANONICAL,
    NO_USER_PERMISSION,
    BEYOND_HOST_WIDTH,
    SM_BEYOND_ADDRESS_WIDTH,
}
#: Of those, what is reported all the same.
REPORTED_TOO = {FS_UPDATE_FAILED}

#: The address type of a request, as a record has it.
UNTRANSLATED, TRANSLATION, TRANSLATED = 0, 1, 2


class Refused(Exception):
    """A request meets a fault condition. It stays in the unit; who handles the request knows what follows.

    `fpd`: an entry on the way says that faults are not to be processed. `lg2`: of how many bytes that is known.
    """

    def __init__(self, reason: int, fpd: bool = False, lg2: int = 12) -> None:
        super().__init__(REASONS[reason])
        self.lg2 = lg2
        self.reason = reason
        self.fpd = fpd


class FaultRecorder:
    """The primary fault log: record registers used as a ring, FSTS, and the fault event.

    What the unit lacks reads as zeros: PP, PV, EXE and PRIV without PASIDs, AT without device TLBs, and of an address
    what is beyond the largest width of its tables (11.4.7.6), so the sign of a first stage's, too.
    """

    def __init__(self, registers: RegisterFile, caps: regs.Capabilities, event: Event) -> None:
        by_name = registers.by_name
        records = caps.fault_records
        self._low = [by_name[f"FRCD{n}_LO"] for n in range(records)]
        self._high = [by_name[f"FRCD{n}_HI"] for n in range(records)]
        self._fsts = by_name["FSTS"]
        self._event = event
        self._pasids = caps.pasid
        self._device_tlbs = caps.device_tlb
        self._address_mask = (1 << caps.widest_table) - 4096
        self._next = 0

    def record(self, request: DmaRequest, reason: int, at: int = UNTRANSLATED, page_request: bool = False) -> None:
        """Log a fault of a request. With overflow pending, or with all records in use, only PFO tells of it."""
        access = request.access
        if page_request:
            kind = regs.FRCD_T2
        elif at == TRANSLATION or not access & WRITE:
            kind = regs.FRCD_T1
        else:
            kind = regs.FRCD_T1 | regs.FRCD_T2 if access & READ else 0
        if self._device_tlbs:
            kind |= at << regs.FRCD_AT_SHIFT
        if request.pasid != NO_PASID and self._pasids:
            kind |= request.pasid << regs.FRCD_PASID_SHIFT | regs.FRCD_PP
            kind |= (regs.FRCD_EXE if access & EXECUTE else 0) | (regs.FRCD_PRIV if access & PRIVILEGED else 0)
        self.log(request.address & self._address_mask, kind | reason << regs.FRCD_REASON_SHIFT | request.rid)

    def log(self, info: int, high: int) -> None:
        """Put the words of a record into the next register, if there is room."""
        status = self._fsts.value
        if status & regs.FSTS_PFO:
            return
        index = self._next
        if self._high[index].value & regs.FRCD_F:
            self._set_status(regs.FSTS_PFO)
            return
        self._low[index].value = info
        self._high[index].value = regs.FRCD_F | high
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
        if not pending:  # else an event is on its way, or software has not dealt with the last one
            self._event.signal()

    def update(self) -> None:
        """After software cleared a record or a status bit: PPF follows the records, IP follows the status."""
        if any(high.value & regs.FRCD_F for high in self._high):
            self._fsts.value |= regs.FSTS_PPF
        else:
            self._fsts.value &= ~regs.FSTS_PPF
        if not self._fsts.value & 0xFF:
            self._event.withdraw()

    def restart(self) -> None:
        """Power-on, or address and interrupt translation are off: the next record is the first (7.2.1)."""
        self._next = 0
