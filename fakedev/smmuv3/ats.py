"""What endpoints with ATS and PRI ask of the SMMU: translations, passage for translated requests, pages.

Mirrors Arm IHI 0070: 3.9.1 (ATS), the field STE.EATS in 5.2, 13.6 (attributes of responses), chapter 8 (the PRI queue).
A translation request that cannot be served is Unsupported Request or Completer Abort and leaves no record but
F_BAD_ATS_TREQ; a page that is not there is a successful answer without rights.

Left out: responses for more than one translation, and the distinction of UR from CA (both raise TranslationFault).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.dma import EXECUTE, IDENTITY, NO_PASID, PRIVILEGED, READ, WRITE, DmaRequest, Run, TranslationFault
from fakedev.smmuv3 import events
from fakedev.smmuv3.config import Ste
from fakedev.smmuv3.entries import EATS_FULL, EATS_NONE, EATS_SPLIT
from fakedev.smmuv3.events import Event
from fakedev.smmuv3.lookup import ConfigurationError, StreamAborts
from fakedev.smmuv3.translate import AGAIN, LEAF_SHIFT, Refused, Stream, attributes
from fakedev.tlp import PRG_FAILURE, PRG_SUCCESS, PageRequest, PageResponse, Translation

if TYPE_CHECKING:
    from fakedev.smmuv3.unit import SmmuV3

#: A record of the PRI queue (chapter 8).
PRIQ_0_SSID_SHIFT, PRIQ_0_PRIV, PRIQ_0_EXEC, PRIQ_0_READ, PRIQ_0_WRITE = 32, 1 << 58, 1 << 59, 1 << 60, 1 << 61
PRIQ_0_LAST, PRIQ_0_SSV = 1 << 62, 1 << 63


class Ats:
    """The translation agent of `unit`."""

    def __init__(self, unit: SmmuV3) -> None:
        self._unit = unit

    def _effective_eats(self, ste: Ste) -> int:
        if ste.eats == EATS_SPLIT and not self._unit.ats_checked:
            return EATS_NONE
        return ste.eats

    # -- translation requests ----------------------------------------------------------------------------------------

    def request_translation(self, rid: int, pasid: int, address: int, access: int) -> Translation:
        """The answer to a translation request for the page that holds `address`. Raises TranslationFault."""
        unit = self._unit
        request = DmaRequest(rid, pasid, address, 4096, access)
        if not unit.features.ats or not unit.enabled:
            raise self._disallowed(request)
        try:
            ste = unit.configuration.ste(rid)
            if ste.aborts:
                raise TranslationFault(f"{request!r}: translation request, the STE aborts")
            eats = self._effective_eats(ste)
            if eats == EATS_NONE:
                raise self._disallowed(request)
            stream = unit.configuration.stream(rid, pasid)
        except Refused as refused:
            raise TranslationFault(f"{request!r}: translation request, {refused}") from None
        return self._answer(stream, request, split=eats == EATS_SPLIT)

    def _disallowed(self, request: DmaRequest) -> TranslationFault:
        event = Event(
            events.F_BAD_ATS_TREQ,
            request.rid,
            None if request.pasid == NO_PASID else request.pasid,
            address=request.address,
            rnw=not request.access & WRITE,
            pnu=bool(request.access & PRIVILEGED),
            ind=bool(request.access & EXECUTE),
        )
        self._unit.record(event)
        return TranslationFault(f"{request!r}: {event}")

    def _answer(self, stream: Stream, request: DmaRequest, split: bool) -> Translation:
        """The translation as the tables have it now, and the rights that it gives to requests of this privilege."""
        address, access = request.address, request.access
        page = address & -4096
        translate = self._unit.translator.translate_stage1 if split and stream.cd else self._unit.translator.translate
        privileged = attributes(stream.ste, access)[0]
        shift = 3 if privileged else 0
        try:
            if stream.bypass or (split and stream.cd is None):
                return Translation(page, 4096, page, READ | WRITE | access & EXECUTE)
            run = translate(stream, address, 1, access & PRIVILEGED)  # needs no right: whatever there is
            if access & WRITE and run[3] & AGAIN:  # the write that may come makes the page dirty now
                run = translate(stream, address, 1, access & (WRITE | PRIVILEGED))
        except Refused as refused:
            if refused.number not in events.TRANSLATION_RELATED:
                raise TranslationFault(f"{request!r}: translation request, {refused}") from None
            if refused.number != events.F_PERMISSION:
                return Translation(page, 4096, 0, 0)
            try:
                run = translate(stream, address, 1, access & PRIVILEGED)
            except Refused:
                return Translation(page, 4096, 0, 0)
        size = run[1] - run[0] if run[3] >> LEAF_SHIFT > 12 else 4096
        start = address & -size
        allowed = run[3] >> shift & (READ | WRITE | access & EXECUTE)
        return Translation(start, size, start + run[2] if allowed else 0, allowed)

    # -- translated requests -----------------------------------------------------------------------------------------

    def translated(self, rid: int, pasid: int, address: int, length: int, access: int) -> Run:
        """Let a translated request pass, translate it (split-stage ATS), or raise TranslationFault."""
        unit = self._unit
        request = DmaRequest(rid, pasid, address, length, access)
        if not unit.enabled or not unit.features.ats:
            raise self._forbidden(request)
        if not unit.ats_checked:
            return IDENTITY
        try:
            ste = unit.configuration.ste(rid)
        except ConfigurationError as refused:
            if unit.records_ats_configuration_errors:
                raise unit.refuse(request, refused, None) from None
            raise TranslationFault(f"{request!r}: translated, {refused}") from None
        if ste.aborts:
            raise TranslationFault(f"{request!r}: translated, the STE aborts")
        if ste.eats == EATS_FULL:
            return IDENTITY
        if ste.eats == EATS_NONE:
            raise self._forbidden(request)
        stream = Stream(rid, None if pasid == NO_PASID else pasid, ste, None)
        try:
            start, stop, delta, rights = unit.translator.stage2(ste, address, stream.needed[access])
        except Refused as refused:
            refused.ste = ste
            raise unit.refuse(request, refused, None) from None
        return start, stop, delta, rights >> (3 if access & PRIVILEGED else 0) & 7

    def _forbidden(self, request: DmaRequest) -> TranslationFault:
        event = Event(
            events.F_TRANSL_FORBIDDEN,
            request.rid,
            None if request.pasid == NO_PASID else request.pasid,
            address=request.address,
            rnw=not request.access & WRITE,
        )
        self._unit.record(event)
        return TranslationFault(f"{request!r}: {event}")

    # -- page requests -----------------------------------------------------------------------------------------------

    def page_request(self, request: PageRequest) -> None:
        """Record a page request, or answer it: failure where the queue is off, success where it has overflowed."""
        unit = self._unit
        queue = unit.priq
        if queue is None or not queue.enabled or unit.errors.active(queue.abort_error):
            # 8.2 says "all incoming PPRs"; a device is answered once a group.
            self._respond(request, PRG_FAILURE, with_pasid=False)
            return
        if queue.indexes.full() or queue.overflowed():
            queue.overflow()
            self._overflowed(request)
            return
        was_empty = queue.indexes.empty()
        if not queue.put(self._words(request)):
            self._respond(request, PRG_FAILURE, with_pasid=False)
            return
        unit.pri_interrupt(was_empty, request.last)

    def _words(self, request: PageRequest) -> tuple[int, int]:
        low = request.rid | (PRIQ_0_LAST if request.last else 0)
        access = request.access
        low |= (PRIQ_0_READ if access & READ else 0) | (PRIQ_0_WRITE if access & WRITE else 0)
        if request.pasid != NO_PASID and self._unit.features.ssid_bits:
            low |= PRIQ_0_SSV | request.pasid << PRIQ_0_SSID_SHIFT
            low |= (PRIQ_0_EXEC if access & EXECUTE else 0) | (PRIQ_0_PRIV if access & PRIVILEGED else 0)
        return low, request.address & -4096 | request.group

    def _overflowed(self, request: PageRequest) -> None:
        """8.1: success, so that the endpoint tries again."""
        with_pasid, code = request.pasid != NO_PASID, PRG_SUCCESS
        if with_pasid and not self._unit.features.pps:
            try:
                with_pasid = self._unit.configuration.ste(request.rid).ppar
            except (ConfigurationError, StreamAborts):
                with_pasid, code = False, PRG_FAILURE
        self._respond(request, code, with_pasid)

    def _respond(self, request: PageRequest, code: int, with_pasid: bool) -> None:
        if request.last and not request.is_stop_marker:
            pasid = request.pasid if with_pasid else NO_PASID
            self._unit.pri_respond(request.rid, PageResponse(pasid, request.group, code))
