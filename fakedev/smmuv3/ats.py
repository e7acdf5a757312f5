"""What endpoints with ATS and PRI ask of the SMMU: translations, passage for translated requests, pages.

Mirrors Arm IHI 0070: 3.9.1 (ATS), STE.EATS in 5.2, 13.6 and 13.7 (what is granted), chapter 8 (the PRI queue).
A translation request that cannot be served is Unsupported Request or Completer Abort and leaves no record but
F_BAD_ATS_TREQ, unless CR2.REC_CFG_ATS asks for more; a page that is not there is a successful answer without rights.

Left out: responses for more than one translation, and the distinction of UR from CA (both raise TranslationFault).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.dma import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE, DmaRequest, Run, TranslationFault
from fakedev.pgtable.format import R, X
from fakedev.smmuv3 import events
from fakedev.smmuv3.config import Ste
from fakedev.smmuv3.entries import EATS_FULL, EATS_NONE, EATS_SPLIT, OVERRIDE_CLEAR, OVERRIDE_SET
from fakedev.smmuv3.events import Event
from fakedev.smmuv3.lookup import ConfigurationError
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
        #: The smallest translation unit: the smallest granule.
        self._stu = 1 << min(unit.features.granules)

    def _effective_eats(self, ste: Ste) -> int:
        if ste.eats == EATS_SPLIT and not self._unit.ats_checked:
            return EATS_NONE
        return ste.eats

    # -- translation requests ----------------------------------------------------------------------------------------

    def request_translation(self, rid: int, pasid: int, address: int, access: int) -> Translation:
        """The answer to a translation request for what holds `address`. Raises TranslationFault.

        Without a PASID it asks for unprivileged data (13.7).
        """
        unit = self._unit
        if pasid == NO_PASID:
            access &= READ | WRITE
        request = DmaRequest(rid, pasid, address, 4096, access)
        if not unit.features.ats or not unit.enabled:
            raise self._disallowed(request)
        ste = None
        try:
            ste = unit.configuration.ste(rid)
            if ste.aborts:
                raise TranslationFault(f"{request!r}: translation request, the STE aborts")
            eats = self._effective_eats(ste)
            if eats == EATS_NONE:
                raise self._disallowed(request)
            return self._answer(unit.configuration.stream(rid, pasid), request, split=eats == EATS_SPLIT)
        except Refused as refused:
            if refused.number in events.TRANSLATION_RELATED:
                return Translation(address & -self._stu, self._stu, 0, 0)
            refused.ste = ste
            raise self._misconfigured(request, refused) from None

    def _misconfigured(self, request: DmaRequest, refused: Refused, despite_recinvsid: bool = False) -> Exception:
        """An error of the configuration: it is recorded with CR2.REC_CFG_ATS (3.9.1.2, 3.9.1.3, 8.1)."""
        unit = self._unit
        if unit.records_ats_configuration_errors:
            return unit.refuse(request, refused, None, despite_recinvsid)
        return TranslationFault(f"{request!r}, with ATS: {refused}")

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
        translator = self._unit.translator
        translate = translator.translate_split if split else translator.translate
        run = translate(stream, address, 1, access & PRIVILEGED)  # needs no right: whatever there is
        if stream.bypass:
            return Translation(address & -self._stu, self._stu, address & -self._stu, READ | WRITE)
        if access & WRITE and run[3] & AGAIN:  # the write that may come makes the page dirty now
            try:
                run = translate(stream, address, 1, access & (WRITE | PRIVILEGED))
            except Refused as refused:
                if refused.number != events.F_PERMISSION or refused.klass != events.CLASS_IN:
                    raise
        size = run[1] - run[0] if run[3] >> LEAF_SHIFT > 12 else 4096
        start = address & -size
        allowed = _granted(stream.ste, run[3], access)
        return Translation(start, size, start + run[2] if allowed else 0, allowed)

    # -- translated requests -----------------------------------------------------------------------------------------

    def translated(self, rid: int, address: int, length: int, access: int) -> Run:
        """Let a translated request pass, translate it (split-stage ATS), or raise TranslationFault.

        It is one for unprivileged data without a SubstreamID, whatever it carries (IDR3.PASIDTT is 0).
        """
        unit = self._unit
        access &= READ | WRITE
        request = DmaRequest(rid, NO_PASID, address, length, access)
        if not unit.enabled or not unit.features.ats:
            raise self._forbidden(request)
        if not unit.ats_checked:
            return unit.untranslated(request)
        try:
            ste = unit.configuration.ste(rid)
        except ConfigurationError as refused:
            raise self._misconfigured(request, refused, despite_recinvsid=True) from None
        if ste.aborts:
            raise TranslationFault(f"{request!r}: translated, the STE aborts")
        if ste.eats == EATS_FULL:
            return unit.untranslated(request)
        if ste.eats == EATS_NONE:
            raise self._forbidden(request)
        stream = Stream(rid, None, ste, None)
        try:
            start, stop, delta, rights = unit.translator.translate(stream, address, length, access)
        except Refused as refused:
            refused.ste = ste
            raise unit.refuse(request, refused, None) from None
        return start, stop, delta, rights >> (3 if attributes(ste, access)[0] else 0) & 7

    def _forbidden(self, request: DmaRequest) -> TranslationFault:
        rnw = not request.access & WRITE
        event = Event(events.F_TRANSL_FORBIDDEN, request.rid, address=request.address, rnw=rnw)
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
            unit.pri_interrupt(False, request.last)
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
        if not request.last or request.is_stop_marker:
            return
        unit = self._unit
        with_pasid, code = request.pasid != NO_PASID and unit.features.ssid_bits > 0, PRG_SUCCESS
        if with_pasid and not unit.features.pps:
            try:
                with_pasid = unit.configuration.ste(request.rid).ppar
            except ConfigurationError as refused:
                with_pasid, code = False, PRG_FAILURE
                about = DmaRequest(request.rid, request.pasid, request.address, 4096, request.access)
                self._misconfigured(about, refused)
        self._respond(request, code, with_pasid)

    def _respond(self, request: PageRequest, code: int, with_pasid: bool) -> None:
        if request.last and not request.is_stop_marker:
            pasid = request.pasid if with_pasid else NO_PASID
            self._unit.pri_respond(request.rid, PageResponse(pasid, request.group, code))


def _granted(ste: Ste, rights: int, access: int) -> int:
    """READ, WRITE and EXECUTE that a translation request for `access` is granted of a page's rights (13.7.1).

    EXECUTE only where it is asked for, and with READ: what may be executed and not read is not for ATS, unless INSTCFG
    makes all reads fetches.
    """
    rights >>= 3 if attributes(ste, access)[0] else 0
    reads, executes = bool(rights & R), bool(rights & X)
    if ste.instcfg == OVERRIDE_SET:
        reads = executes
    elif ste.instcfg == OVERRIDE_CLEAR:
        executes = reads
    return READ * reads | rights & WRITE | access & EXECUTE * (reads and executes)
