"""The command queue's commands, carried out.

Mirrors Arm IHI 0070 chapter 4. `execute` does one command and says which error it is (CERROR_NONE: it is consumed).
Everything takes effect before the next command, so SYNC has nothing to wait for but endpoints that did not complete an
ATC_INV. Reserved fields are ignored, but for SSec; an invalidation removes what it names and nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.dma import NO_PASID, READ, Outcome
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import regs
from fakedev.smmuv3.lookup import StreamAborts
from fakedev.smmuv3.regs import CERROR_ATC_INV_SYNC, CERROR_ILL, CERROR_NONE
from fakedev.smmuv3.translate import GLOBALS, STAGE_2, VMID_SHIFT, Refused
from fakedev.tlp import PRG_FAILURE, PRG_INVALID, PRG_SUCCESS, Invalidation, PageResponse

if TYPE_CHECKING:
    from fakedev.smmuv3.unit import SmmuV3

_RESPONSES = {c.PRI_FAILURE: PRG_FAILURE, c.PRI_INVALID: PRG_INVALID, c.PRI_SUCCESS: PRG_SUCCESS}
#: Translations that one PREFETCH_ADDR makes at most.
_PREFETCH_LIMIT = 64


class Commands:
    """What the command queue of `unit` can do, by opcode."""

    def __init__(self, unit: SmmuV3) -> None:
        self._unit = unit
        self._features = unit.features
        self._configuration = unit.configuration
        self._translator = unit.translator
        #: An ATC_INV since the last SYNC has not been completed by its endpoint.
        self._atc_timeout = False
        table: dict[int, Callable[[int, int], int]] = {
            c.PREFETCH_CONFIG: self._prefetch_config,
            c.PREFETCH_ADDR: self._prefetch_addr,
            c.CFGI_STE: self._cfgi_ste,
            c.CFGI_STE_RANGE: self._cfgi_ste_range,
            c.TLBI_NSNH_ALL: self._tlbi_nsnh_all,
            c.SYNC: self._sync,
        }
        if self._features.stage1:
            table |= {
                c.CFGI_CD: self._cfgi_cd,
                c.CFGI_CD_ALL: self._cfgi_cd_all,
                c.TLBI_NH_ALL: self._tlbi_nh_all,
                c.TLBI_NH_ASID: self._tlbi_nh_asid,
                c.TLBI_NH_VA: self._tlbi_nh_va,
                c.TLBI_NH_VAA: self._tlbi_nh_vaa,
            }
        if self._features.stage2:
            table |= {c.TLBI_S2_IPA: self._tlbi_s2_ipa, c.TLBI_S12_VMALL: self._tlbi_s12_vmall}
        if self._features.ats:
            table[c.ATC_INV] = self._atc_inv
        if self._features.pri:
            table[c.PRI_RESP] = self._pri_resp
        if self._features.stall_model != regs.STALL_NEVER:
            table |= {c.RESUME: self._resume, c.STALL_TERM: self._stall_term}
        self._table = table

    def execute(self, low: int, high: int) -> int:
        """One command: CERROR_NONE, or why it cannot be consumed."""
        command = self._table.get(low & 0xFF)
        return CERROR_ILL if command is None else command(low, high)

    # -- configuration -----------------------------------------------------------------------------------------------

    def _cfgi_ste(self, low: int, high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._configuration.forget_ste(low >> 32, bool(high & c.CFGI_LEAF))
        self._unit.forget_ports()
        return CERROR_NONE

    def _cfgi_ste_range(self, low: int, high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._configuration.forget_range(low >> 32, c.CFGI_RANGE.get(high))
        self._unit.forget_ports()
        return CERROR_NONE

    def _cfgi_cd(self, low: int, high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._configuration.forget_cd(low >> 32, c.SSID.get(low), bool(high & c.CFGI_LEAF))
        self._unit.forget_ports()
        return CERROR_NONE

    def _cfgi_cd_all(self, low: int, _high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._configuration.forget_cds(low >> 32)
        self._unit.forget_ports()
        return CERROR_NONE

    def _prefetch_config(self, low: int, _high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._prefetch(low, 0, 0, 12)
        return CERROR_NONE

    def _prefetch_addr(self, low: int, high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        count = min(1 << c.PREFETCH_SIZE.get(high), _PREFETCH_LIMIT)
        self._prefetch(low, high & c.TLBI_VA_MASK, count, 12 + c.PREFETCH_STRIDE.get(high))
        return CERROR_NONE

    def _prefetch(self, low: int, address: int, count: int, stride: int) -> None:
        """Look up ahead; nothing that goes wrong is told."""
        if not self._unit.enabled:
            return
        pasid = c.SSID.get(low) if low & c.SSV and self._features.ssid_bits else NO_PASID
        try:
            stream = self._configuration.stream(low >> 32, pasid)
            for n in range(count):
                where = address + (n << stride)
                if where >> 64:
                    break
                self._translator.translate(stream, where, 1, READ)
        except (Refused, StreamAborts):
            return

    # -- translations ------------------------------------------------------------------------------------------------

    def _range(self, low: int, high: int) -> tuple[int, int, int] | None:
        """The length, TG and TTL that the range fields name (4.4.1.1); None where they are reserved."""
        tg = c.TLBI_TG.get(high)
        if not tg or not self._features.range_invalidation:
            return 4096, 0, 0
        ttl = c.TLBI_TTL.get(high)
        if tg == 2 and ttl == 1:
            ttl = 0  # without 52-bit addresses a 16 KiB granule has no leaves there
        num, scale = c.TLBI_NUM.get(low), c.TLBI_SCALE.get(low)
        if not (num or scale or ttl):
            return None
        return (num + 1 << scale) << c.TLBI_GRANULES[tg], tg, ttl

    def _invalidate(self, tag: int, address: int, span: tuple[int, int, int], high: int) -> None:
        length, tg, ttl = span
        leaf = bool(high & c.TLBI_LEAF)
        self._translator.invalidate(tag, address, min(length, (1 << 64) - address), tg, ttl, leaf)

    def _tlbi_nh_va(self, low: int, high: int) -> int:
        span = self._range(low, high)
        if span is None:
            return CERROR_ILL
        base = c.TLBI_VMID.get(low) << VMID_SHIFT
        address = high & c.TLBI_VA_MASK
        for tag in (c.TLBI_ASID.get(low), *GLOBALS):
            self._invalidate(base | tag, address, span, high)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_nh_vaa(self, low: int, high: int) -> int:
        span = self._range(low, high)
        if span is None:
            return CERROR_ILL
        vmid = c.TLBI_VMID.get(low)
        for tag in self._translator.tags():
            if tag >> VMID_SHIFT == vmid and not tag & STAGE_2:
                self._invalidate(tag, high & c.TLBI_VA_MASK, span, high)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_s2_ipa(self, low: int, high: int) -> int:
        span = self._range(low, high)
        if span is None:
            return CERROR_ILL
        self._invalidate(c.TLBI_VMID.get(low) << VMID_SHIFT | STAGE_2, high & c.TLBI_IPA_MASK, span, high)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_nh_all(self, low: int, _high: int) -> int:
        vmid = c.TLBI_VMID.get(low)
        self._translator.invalidate_tags(lambda tag: tag >> VMID_SHIFT == vmid and not tag & STAGE_2)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_nh_asid(self, low: int, _high: int) -> int:
        wanted = c.TLBI_VMID.get(low) << VMID_SHIFT | c.TLBI_ASID.get(low)
        self._translator.invalidate_tags(lambda tag: tag == wanted)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_s12_vmall(self, low: int, _high: int) -> int:
        vmid = c.TLBI_VMID.get(low)
        self._translator.invalidate_tags(lambda tag: tag >> VMID_SHIFT == vmid)
        self._unit.forget_ports()
        return CERROR_NONE

    def _tlbi_nsnh_all(self, _low: int, _high: int) -> int:
        self._translator.clear()
        self._unit.forget_ports()
        return CERROR_NONE

    # -- endpoints ---------------------------------------------------------------------------------------------------

    def _atc_inv(self, low: int, high: int) -> int:
        size = c.ATC_SIZE.get(high)
        if size > c.ATC_SIZE_ALL:
            return CERROR_ILL
        unit = self._unit
        if unit.enabled:
            length = 4096 << size
            pasid, everywhere = NO_PASID, False
            if low & c.SSV and self._features.ssid_bits:
                pasid, everywhere = c.SSID.get(low), bool(low & c.ATC_GLOBAL)
            where = high & c.TLBI_VA_MASK & -length
            if unit.atc_invalidate(low >> 32, Invalidation(pasid, where, length, everywhere)):
                self._atc_timeout = True
        return CERROR_NONE

    def _pri_resp(self, low: int, high: int) -> int:
        code = _RESPONSES.get(c.PRI_RESPONSE.get(high))
        if code is None:
            return CERROR_ILL
        if self._unit.enabled:
            pasid = c.SSID.get(low) if low & c.SSV and self._features.ssid_bits else NO_PASID
            self._unit.pri_respond(low >> 32, PageResponse(pasid, c.PRI_PRGINDEX.get(high), code))
        return CERROR_NONE

    def _resume(self, low: int, high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        # TERM_MODEL is 1: a terminated transaction is aborted, whatever Ab says.
        outcome = Outcome.RETRY if low & c.RESUME_RETRY else Outcome.ABORT
        self._unit.stalls.resume(low >> 32, c.RESUME_STAG.get(high), outcome)
        self._unit.retry_stalls()
        return CERROR_NONE

    def _stall_term(self, low: int, _high: int) -> int:
        if low & c.SSEC:
            return CERROR_ILL
        self._unit.stalls.terminate(low >> 32)
        self._unit.retry_stalls()
        return CERROR_NONE

    def _sync(self, low: int, high: int) -> int:
        signal = c.SYNC_CS.get(low)
        if signal > c.SIG_SEV:
            return CERROR_ILL
        if self._atc_timeout:
            self._atc_timeout = False
            return CERROR_ATC_INV_SYNC
        if signal == c.SIG_IRQ:
            self._unit.signal_sync(high & c.SYNC_MSIADDR_MASK, c.SYNC_MSIDATA.get(low))
        elif signal == c.SIG_SEV and self._features.sev:
            self._unit.send_event()
        return CERROR_NONE

    def reset(self) -> None:
        """Power-on."""
        self._atc_timeout = False
