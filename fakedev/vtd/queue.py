"""The invalidation queue of a VT-d unit: fetches descriptors, checks them, has the unit carry them out.

Mirrors the VT-d specification 6.5.2: descriptors of 128 and of 256 bits, which types each translation table mode takes
(table 26), errors with their cause in IQERCD (11.4.9.9), time-outs of device TLBs, wait descriptors.

Everything is done when the store to the tail returns, so draining and fences need nothing. A device TLB that does not
complete is noticed by the next wait descriptor: that is aborted, ITE is set, and the head stays on it; or, without one,
where the queue ends. Messages to functions and interrupts leave when the head has moved on, as what they cause may ring
the tail again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.memory import BusAbort
from fakedev.pgtable.walker import load_word
from fakedev.tlp import NO_PASID, Invalidation, PageResponse
from fakedev.vtd import descriptors as qi
from fakedev.vtd import regs

if TYPE_CHECKING:
    from fakedev.vtd.unit import VtdUnit

#: Outcomes of a descriptor beside the IQEI codes: done; stopped by a time-out.
_DONE, _TIMED_OUT = -1, -2


class InvalidationQueue:
    """One unit's queue; its registers are the unit's."""

    def __init__(self, unit: VtdUnit) -> None:
        self._unit = unit
        caps = self._caps = unit.caps
        at = unit.registers.by_name
        self._iqh, self._iqt, self._iqa = at["IQH"], at["IQT"], at["IQA"]
        self._fsts, self._gsts, self._error_record = at["FSTS"], at["GSTS"], at["IQERCD"]
        self._status_address = (1 << unit.host_address_bits) - 4
        self._wait_reserved = qi.WAIT_RESERVED_LOW | (0 if caps.page_request_drain else qi.WAIT_PD)
        pfsid = 0 if caps.device_tlb_throttle else qi.DIOTLB_PFSID
        self._device_reserved = qi.DIOTLB_RESERVED_LOW | pfsid
        self._pasid_device_reserved = pfsid
        #: The source of a device-TLB invalidation that did not complete.
        self._silent: int | None = None
        self._later: list[Callable[[], object]] = []

    def run(self) -> None:
        """Execute descriptors until the head meets the tail, or an error stops the queue."""
        if not self._gsts.value & regs.QIE or self._fsts.value & (regs.FSTS_IQE | regs.FSTS_ITE):
            return
        iqa = self._iqa.value
        size = 4096 << (iqa & regs.IQA_QS_MASK)
        head, tail = self._iqh.value, self._iqt.value
        step = 16
        if iqa & regs.IQA_DW or self._unit.mode or tail >= size:
            step = 32 if iqa & regs.IQA_DW else 16
            error = self._wrong_setting(iqa, tail, size)
            if error != _DONE:
                if head != tail:
                    self._fail(error)
                return
        base = iqa & regs.ADDRESS_MASK
        memory = self._unit.memory
        words = memory.words
        in_ram = memory.ram_start <= base and base + size <= memory.ram_end
        wide = step == 32
        execute = self._execute
        while head != tail:
            at = base + head
            try:
                if in_ram:
                    index = at >> 3
                    if wide and (words[index + 2] or words[index + 3]):
                        error = regs.IQEI_RESERVED
                    else:
                        error = execute(words[index], words[index + 1])
                elif wide and (load_word(memory, at + 16) or load_word(memory, at + 24)):
                    error = regs.IQEI_RESERVED
                else:
                    error = execute(load_word(memory, at), load_word(memory, at + 8))
            except BusAbort:
                error = regs.IQEI_FETCH
            if error != _DONE:
                self._iqh.value = head
                if error != _TIMED_OUT:
                    self._fail(error)
                return
            head = (head + step) % size
            if self._later:
                self._iqh.value = head
                self._send_later()
                head, tail = self._iqh.value, self._iqt.value
                if self._fsts.value & (regs.FSTS_IQE | regs.FSTS_ITE) or not self._gsts.value & regs.QIE:
                    return
        self._iqh.value = head
        if self._silent is not None:
            self._time_out()

    def _wrong_setting(self, iqa: int, tail: int, size: int) -> int:
        """The IQEI code of registers that do not go together, or _DONE."""
        mode = self._unit.mode
        if tail >= size:
            return regs.IQEI_TAIL
        if mode == regs.TTM_RESERVED:
            return regs.IQEI_MODE
        if not iqa & regs.IQA_DW:
            return _DONE if mode == regs.TTM_LEGACY else regs.IQEI_WIDTH
        if not (self._caps.scalable or self._caps.abort_mode):
            return regs.IQEI_WIDTH
        return regs.IQEI_ALIGNMENT if tail & 16 else _DONE

    def forget(self) -> None:
        """Power-on, or the queue was switched off: nothing is pending."""
        self._silent = None

    def _send_later(self) -> None:
        later, self._later = self._later, []
        for send in later:
            send()

    def _fail(self, cause: int) -> None:
        self._error_record.value = self._error_record.value & ~0xF | cause
        self._unit.queue_error(regs.FSTS_IQE)

    # -- descriptors -------------------------------------------------------------------------------------------------

    def _execute(self, low: int, high: int) -> int:
        """Carry out one descriptor: _DONE, _TIMED_OUT or the IQEI code of what is wrong with it."""
        kind = low & qi.TYPE_MASK
        if kind == qi.IOTLB_TYPE:
            granularity = low >> 4 & 3
            if low & qi.IOTLB_RESERVED_LOW or high & qi.IOTLB_RESERVED_HIGH or not granularity:
                return regs.IQEI_RESERVED
            mask = high & qi.IOTLB_AM_MASK
            if granularity == qi.SELECTIVE and (not self._caps.page_selective or mask > self._caps.am_max):
                return regs.IQEI_RESERVED
            self._unit.invalidate_iotlb(granularity, low >> 16 & qi.DID_MASK, high & -4096, mask, high & qi.IOTLB_IH)
            return _DONE
        if kind == qi.WAIT_TYPE:
            if low & self._wait_reserved or high & 3:
                return regs.IQEI_RESERVED
            if low & qi.WAIT_IF or self._silent is not None:
                return self._wait(low, high)
            if low & qi.WAIT_SW:
                self._store_status(low, high)
            return _DONE
        if kind == qi.CC_TYPE:
            granularity = low >> 4 & 3
            if low & qi.CC_RESERVED or high or not granularity:
                return regs.IQEI_RESERVED
            sid, ignored = low >> qi.CC_SID_SHIFT & 0xFFFF, low >> qi.CC_FM_SHIFT & 3
            self._unit.invalidate_contexts(granularity, low >> 16 & qi.DID_MASK, sid, ignored)
            return _DONE
        if kind == qi.IEC_TYPE:
            if low & qi.IEC_RESERVED_LOW or high:
                return regs.IQEI_RESERVED
            mask = low >> qi.IEC_IM_SHIFT & qi.IEC_IM_MASK
            if mask > self._caps.handle_mask_max:
                return regs.IQEI_RESERVED
            self._unit.interrupts.invalidate(low >> qi.IEC_IIDX_SHIFT & 0xFFFF if low & qi.IEC_INDEXED else None, mask)
            return _DONE
        if kind == qi.DIOTLB_TYPE and self._caps.device_tlb:
            if low & self._device_reserved or high & qi.DIOTLB_RESERVED_HIGH:
                return regs.IQEI_RESERVED
            start, length = qi.device_tlb_range(high, bool(high & qi.DIOTLB_S))
            self._invalidate_device(low >> qi.DIOTLB_SID_SHIFT & 0xFFFF, Invalidation(NO_PASID, start, length))
            return _DONE
        if self._unit.mode != regs.TTM_LEGACY and self._caps.scalable:
            return self._execute_scalable(kind, low, high)
        return regs.IQEI_TYPE

    def _execute_scalable(self, kind: int, low: int, high: int) -> int:
        granularity = low >> 4 & 3
        did, pasid = low >> 16 & qi.DID_MASK, low >> qi.PASID_SHIFT & qi.PASID_MASK
        if kind == qi.PIOTLB_TYPE:
            if low & qi.PIOTLB_RESERVED_LOW or high & qi.PIOTLB_RESERVED_HIGH or granularity < qi.PIOTLB_PASID:
                return regs.IQEI_RESERVED
            mask = high & qi.IOTLB_AM_MASK
            self._unit.invalidate_pasid_iotlb(granularity, did, pasid, high & -4096, mask, high & qi.IOTLB_IH)
            return _DONE
        if kind == qi.PC_TYPE:
            if low & qi.PC_RESERVED or high or granularity == 2:
                return regs.IQEI_RESERVED
            self._unit.invalidate_pasids(granularity, did, pasid)
            return _DONE
        if kind == qi.PDIOTLB_TYPE and self._caps.device_tlb:
            if low & self._pasid_device_reserved or high & qi.PDIOTLB_RESERVED_HIGH:
                return regs.IQEI_RESERVED
            start, length = qi.device_tlb_range(high, bool(high & qi.PDIOTLB_S))
            everyone = bool(high & qi.PDIOTLB_GLOBAL)
            self._invalidate_device(low >> qi.PDIOTLB_SID_SHIFT & 0xFFFF, Invalidation(pasid, start, length, everyone))
            return _DONE
        if kind == qi.PGRP_TYPE and self._caps.page_request:
            if low & qi.PGRP_RESERVED_LOW or high & qi.PGRP_RESERVED_HIGH:
                return regs.IQEI_RESERVED
            rid, code = low >> qi.PGRP_RID_SHIFT & 0xFFFF, low >> qi.PGRP_CODE_SHIFT & 0xF
            response = PageResponse(pasid if low & qi.PGRP_PP else NO_PASID, high >> qi.PGRP_GROUP_SHIFT & 0x1FF, code)
            self._later.append(lambda: self._unit.respond(rid, response))
            return _DONE
        return regs.IQEI_TYPE

    def _invalidate_device(self, rid: int, request: Invalidation) -> None:
        downstream = self._unit.downstream
        if downstream is None or not downstream.invalidate(rid, request):
            self._silent = rid

    def _wait(self, low: int, high: int) -> int:
        if self._silent is not None:
            self._time_out()
            return _TIMED_OUT
        if low & qi.WAIT_SW:
            self._store_status(low, high)
        if low & qi.WAIT_IF:
            self._later.append(self._unit.invalidation_completed)
        return _DONE

    def _time_out(self) -> None:
        """ITE, and whose invalidation it was; where there were several, the last one's."""
        assert self._silent is not None
        self._error_record.value &= ~(0xFFFF << regs.IQERCD_ITESID_SHIFT)
        self._error_record.value |= self._silent << regs.IQERCD_ITESID_SHIFT
        self._silent = None
        self._unit.queue_error(regs.FSTS_ITE)

    def _store_status(self, low: int, high: int) -> None:
        """The status write of a wait descriptor. Where no memory answers, "behavior is undefined": the queue stops."""
        self._unit.memory.write(high & self._status_address, (low >> qi.WAIT_DATA_SHIFT).to_bytes(4, "little"))
