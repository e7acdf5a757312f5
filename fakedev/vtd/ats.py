"""Translation requests, translated requests and page requests, as a VT-d unit answers them.

Mirrors the VT-d specification 4.2.3 and 4.2.5 (device TLBs), 7.4 (page requests) and the columns of table 30 in 7.1.3:
what completes with Unsupported Request or Completer Abort and is reported, and what completes successfully without a
permission. UNVERIFIED: a page request while translation is off is answered as invalid. Left out: translation requests
for more than one range, host permission tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.dma import (
    MSI_END,
    MSI_START,
    NO_PASID,
    PRIVILEGED,
    READ,
    WRITE,
    DmaPort,
    DmaRequest,
    Run,
    TranslationFault,
)
from fakedev.pgtable.format import PRIVILEGED as PRIVILEGED_SHIFT
from fakedev.tlp import PRG_INVALID, PageRequest, PageResponse, Translation
from fakedev.vtd import faults, regs
from fakedev.vtd.faults import Refused
from fakedev.vtd.scalable import CLEAN_TO_WRITE

if TYPE_CHECKING:
    from fakedev.vtd.page_requests import PageRequestQueue
    from fakedev.vtd.unit import VtdUnit

_PERMISSIONS = {
    faults.SM_NO_READ_PERMISSION,
    faults.SM_NO_WRITE_PERMISSION,
    faults.NO_READ_PERMISSION,
    faults.NO_WRITE_PERMISSION,
}


class TranslationServices:
    """The side of one unit that functions with ATS and PRI talk to."""

    def __init__(self, unit: VtdUnit) -> None:
        self._unit = unit

    # -- translation requests ----------------------------------------------------------------------------------------

    def request_translation(self, port: DmaPort, pasid: int, address: int, access: int) -> Translation:
        """The completion. Raises TranslationFault for Unsupported Request and Completer Abort."""
        unit = self._unit
        rid = port.rid
        request = DmaRequest(rid, pasid, address, 4096, access)
        if not unit.translating:
            raise TranslationFault(f"{request!r}: translation request while translation is off")
        try:
            unit.check_mode()
            if pasid == NO_PASID and MSI_START <= address < MSI_END:
                self._check_source(rid)
                # S.1 and S.2: interrupts are written as untranslated requests.
                writes = access & WRITE or not unit.caps.no_write_flag
                return Translation(address & -4096, 4096, 0, WRITE if writes else 0, untranslated=bool(writes))
            if access & WRITE or not unit.caps.no_write_flag:
                access |= WRITE
            if unit.mode == regs.TTM_LEGACY:
                run, allowed = self._legacy(rid, pasid, address, access)
            else:
                run, allowed = self._scalable(rid, pasid, address, access)
        except Refused as refused:
            if refused.reason not in faults.RECOVERABLE:
                unit.fault(request, refused.reason, refused.fpd, faults.TRANSLATION)
            if refused.reason in faults.REPORTED_TOO and not refused.fpd:
                unit.recorder.record(request, refused.reason, faults.TRANSLATION)
            return Translation(address & -4096, 4096, 0, 0)
        if not allowed:
            return Translation(address & -4096, 4096, 0, 0)
        start, length = _range(run, address)
        return Translation(start, length, start + run[2], allowed)

    def _check_source(self, rid: int) -> None:
        """Whether a source may ask for translations. Refused."""
        unit = self._unit
        if unit.mode == regs.TTM_LEGACY:
            context = unit.legacy_context(rid)
            if not context.device_tlb:
                raise Refused(faults.TRANSLATION_BLOCKED, context.fpd)
        else:
            unit.scalable.for_translation_request(rid, NO_PASID, READ)

    def _legacy(self, rid: int, pasid: int, address: int, access: int) -> tuple[Run, int]:
        unit = self._unit
        if pasid != NO_PASID:
            raise Refused(faults.PASID_IN_LEGACY_MODE)
        context = unit.legacy_context(rid)
        if not context.device_tlb:
            raise Refused(faults.TRANSLATION_BLOCKED, context.fpd)
        if address >> context.limit_bits:
            raise Refused(faults.BEYOND_ADDRESS_WIDTH, context.fpd)
        run = unit.tlb.lookup(context.did, address)
        if run is None:
            run = unit.fill(context, address, 1, READ)
        return run, run[3] & (READ | WRITE if access & WRITE else READ)

    def _scalable(self, rid: int, pasid: int, address: int, access: int) -> tuple[Run, int]:
        """The run and what it allows. A dirty bit is set for a translation that allows writing (4.2.3.1)."""
        scalable = self._unit.scalable
        entry, access = scalable.for_translation_request(rid, pasid, access)
        shift = PRIVILEGED_SHIFT if access & PRIVILEGED else 0
        privilege = access & PRIVILEGED
        if access & WRITE:
            try:
                run = scalable.look_up(entry, address, 1, WRITE | privilege)
            except Refused as refused:
                if refused.reason not in _PERMISSIONS:
                    raise
            else:
                writes = WRITE if run[3] & CLEAN_TO_WRITE else 0
                return run, run[3] >> shift & (READ | writes)
        try:
            run = scalable.look_up(entry, address, 1, READ | privilege)
        except Refused as refused:
            if refused.reason not in _PERMISSIONS:
                raise
            page = address & -4096
            return (page, page + 4096, 0, 0), 0
        return run, run[3] >> shift & READ

    # -- translated requests -----------------------------------------------------------------------------------------

    def translated(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The identity, where the function may send translated requests. Raises TranslationFault."""
        unit = self._unit
        rid = port.rid
        request = DmaRequest(rid, pasid, address, length, access)
        if not unit.translating:
            raise TranslationFault(f"{request!r}: translated request while translation is off")
        try:
            unit.check_mode()
            if unit.mode == regs.TTM_LEGACY:
                if pasid != NO_PASID:
                    raise Refused(faults.PASID_IN_LEGACY_MODE)
                context = unit.legacy_context(rid)
                if not context.device_tlb:
                    raise Refused(faults.TRANSLATION_BLOCKED, context.fpd)
                if address >> unit.host_address_bits:
                    raise Refused(faults.BEYOND_ADDRESS_WIDTH, context.fpd)
                if MSI_START <= address < MSI_END:
                    raise Refused(faults.INTERRUPT_RANGE, context.fpd)
            else:
                unit.scalable.check_translated(rid, pasid, address, access)
        except Refused as refused:
            unit.fault(request, refused.reason, refused.fpd, faults.TRANSLATED)
        if address < MSI_START:
            return unit.clip((0, MSI_START, 0, READ | WRITE), address)
        return unit.clip((MSI_END, 1 << unit.host_address_bits, 0, READ | WRITE), address)

    # -- page requests -----------------------------------------------------------------------------------------------

    def page_request(self, message: PageRequest, queue: PageRequestQueue) -> None:
        """Queue a page request, or answer it as table 31 says."""
        unit = self._unit
        try:
            if not unit.caps.page_request or not unit.translating:
                raise TranslationFault("nobody takes page requests")
            request = DmaRequest(message.rid, message.pasid, message.address, 4096, message.access)
            try:
                unit.check_mode()
                if unit.mode == regs.TTM_LEGACY:
                    raise Refused(faults.PAGE_REQUEST_IN_LEGACY_MODE)
                entry = unit.scalable.for_page_request(message.rid, message.pasid)
            except Refused as refused:
                unit.fault(request, refused.reason, refused.fpd, page_request=True)
        except TranslationFault:
            if message.last and not message.is_stop_marker:
                self.answer(message, PRG_INVALID)
            return
        if not queue.overflows:  # an error condition, too: without it what is cached of the page goes first (7.4.1)
            unit.invalidate_for_page_request(entry, message.address)
        queue.take(message)

    def answer(self, message: PageRequest, code: int) -> None:
        """The hardware's own response to a page request."""
        self._unit.respond(message.rid, PageResponse(message.pasid, message.group, code))


def _range(run: Run, address: int) -> tuple[int, int]:
    """The largest aligned power-of-two range around `address` that a run covers: start and length."""
    start, stop, delta, _ = run
    length = 4096
    base = address & -4096
    while not delta & (2 * length - 1):
        wider = address & -(2 * length)
        if wider < start or wider + 2 * length > stop or length >= 1 << 30:
            break
        length *= 2
        base = wider
    return base, length
