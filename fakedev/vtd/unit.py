"""A VT-d remapping unit: from a request id, a PASID and an IOVA to a physical address, or to a fault record.

Mirrors the VT-d specification, revision 5.10: chapter 3 (translation), 6 (caches and their invalidation), 7 (faults),
11.4 (registers). This file has the registers and legacy mode; `scalable` has the other mode, `queue` the invalidation
queue, `ats` translation and page requests, `interrupts` the remapping of messages. It reads tables from memory and
nothing else; in legacy mode it caches context entries by request id, and translations and tables by domain id; with
caching mode (CM) it caches what was not present, too, so that a driver which forgets to invalidate after mapping is
found out. How much it caches is `caching`.

Left out: zero-length reads. It is a long file because registers, caches and legacy mode read and change one state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from fakedev.caching import LEAVES, Caching
from fakedev.dma import (
    IDENTITY,
    MSI_END,
    MSI_START,
    NO_PASID,
    READ,
    WRITE,
    DmaPort,
    DmaRequest,
    InterruptSink,
    Run,
    TranslationFault,
)
from fakedev.memory import ADDRESS_BITS, BusAbort, PhysicalMemory
from fakedev.pgtable.vtd_ss import VtdSecondStage
from fakedev.pgtable.walker import (
    FETCH_FAILED,
    NOT_PRESENT,
    RESERVED_BITS,
    contiguous_pages,
    load_word,
    loader,
    walk,
)
from fakedev.reg import Register, RegisterFile
from fakedev.tlb import TableCache, Tables, Tlb
from fakedev.tlp import Downstream, PageRequest, PageResponse, Translation
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, faults, regs
from fakedev.vtd.ats import TranslationServices
from fakedev.vtd.events import Event
from fakedev.vtd.explain import explain_legacy
from fakedev.vtd.faults import FaultRecorder, Refused
from fakedev.vtd.interrupts import InterruptRemapping
from fakedev.vtd.page_requests import PageRequestQueue
from fakedev.vtd.protected import ProtectedRegions
from fakedev.vtd.queue import InvalidationQueue
from fakedev.vtd.scalable import ScalableMode
from fakedev.vtd.scalable_tables import Pasid

_ONES32 = 0xFFFF_FFFF
_ONES64 = 0xFFFF_FFFF_FFFF_FFFF
#: What `translate` does with a request.
_OFF, _LEGACY, _OTHERWISE, _PROTECTED = range(4)


class _Context:
    """A cached context entry, or (with a `reason`) the knowledge that a source has none."""

    __slots__ = ("device_tlb", "did", "fpd", "limit_bits", "pass_through", "reason", "root", "top_level")

    def __init__(self, did: int, root: int = 0, top_level: int = 0, limit_bits: int = 0, reason: int = 0) -> None:
        self.did = did
        self.root = root
        self.top_level = top_level
        self.limit_bits = limit_bits
        self.reason = reason
        self.fpd = False
        self.pass_through = False
        self.device_tlb = False


class VtdUnit:
    """One unit. `cap` and `ecap` are the capability registers and decide what it can do.

    `host_address_bits` is the width of the platform's physical addresses (HAW): bits from there up are reserved in
    root, context and table entries.

    `read` and `write` are its 4 KiB register window. `send_interrupt` gets (address, data) of its own interrupts;
    `on_fault` gets every refused request in words; `downstream` carries its messages to functions with ATS and PRI
    (without it none of them answers).
    """

    __slots__ = (
        "_beyond",
        "_completion_event",
        "_fault_event",
        "_fsts",
        "_gsts",
        "_iqh",
        "_iqt",
        "_legacy",
        "_load",
        "_on_fault",
        "_page_requests",
        "_protected",
        "_queue",
        "_root",
        "_rtaddr",
        "_services",
        "_state",
        "_version",
        "_warm",
        "caching",
        "caps",
        "contexts",
        "downstream",
        "format",
        "host_address_bits",
        "interrupts",
        "memory",
        "mode",
        "read",
        "recorder",
        "registers",
        "scalable",
        "tables",
        "tlb",
    )

    def __init__(
        self,
        memory: PhysicalMemory,
        cap: int,
        ecap: int,
        *,
        version: int = 0x10,
        host_address_bits: int = ADDRESS_BITS,
        send_interrupt: InterruptSink,
        on_fault: Callable[[str], None] | None = None,
        tlb: Tlb | None = None,
        downstream: Downstream | None = None,
    ) -> None:
        self.memory = memory
        self.downstream = downstream
        self._load = loader(memory)
        self.caps = caps = regs.Capabilities(cap, ecap)
        self.host_address_bits = host_address_bits
        self._beyond = -(1 << host_address_bits) & _ONES64
        # Bit 62 of a leaf is no transient-mapping bit any more: reserved, with and without device TLBs (9.8).
        self.format = VtdSecondStage(host_address_bits, caps.sllps, caps.snoop_control, device_tlb=False)
        self.tlb = Tlb() if tlb is None else tlb
        #: Where second-stage tables lie, by domain id.
        self.tables = TableCache()
        self.caching = LEAVES
        #: Context entries by request id.
        self.contexts: dict[int, _Context] = {}
        self._warm: set[DmaPort] = set()
        self._on_fault = on_fault
        self._version = version
        self._enter(_OFF)
        #: The translation table mode, latched with the root table; an invalid one counts as reserved.
        self.mode = regs.TTM_LEGACY
        self._root = 0
        self.scalable = ScalableMode(memory, caps, self.tlb, host_address_bits, version >> 4)
        self._fault_event = Event("FE", regs.FECTL, send_interrupt)
        self._completion_event = Event("IE", regs.IECTL, send_interrupt)
        self._services = TranslationServices(self)
        self._page_requests = PageRequestQueue(memory, send_interrupt, self._services.answer)
        self.interrupts = InterruptRemapping(self)
        self._protected = ProtectedRegions(caps, self._protection_changed)
        self.registers = RegisterFile(self._declare(version))
        at = self.registers.by_name
        self._gsts, self._fsts, self._rtaddr = at["GSTS"], at["FSTS"], at["RTADDR"]
        self._iqh, self._iqt = at["IQH"], at["IQT"]
        self.recorder = FaultRecorder(self.registers, caps, self._fault_event)
        self._queue = InvalidationQueue(self)
        self.read = self.registers.read

    def _declare(self, version: int) -> list[Register]:
        caps = self.caps
        found = [
            Register("VER", regs.VER, reset=version),
            Register("CAP", regs.CAP, 8, reset=caps.cap),
            Register("ECAP", regs.ECAP, 8, reset=caps.ecap),
            Register("GCMD", regs.GCMD, action=self._command),
            Register("GSTS", regs.GSTS),
            Register("RTADDR", regs.RTADDR, 8, writable=_ONES64 & ~0x3FF),
            Register("CCMD", regs.CCMD, 8, writable=0x8000_0003_FFFF_FFFF | 3 << 61, action=self._context_command),
            Register("FSTS", regs.FSTS, clears=0x71, action=self._fault_status),
            *self._fault_event.registers,
            Register("IQH", regs.IQH, 8),
            Register("IQT", regs.IQT, 8, writable=0x7FFF0, action=self._tail),
            Register("IQA", regs.IQA, 8, writable=_ONES64 & ~0x7F8),
            Register("ICS", regs.ICS, clears=regs.ICS_IWC, action=self._completion_status),
            *self._completion_event.registers,
            Register("IQERCD", regs.IQERCD, 8),
            *self.interrupts.registers,
            Register("IVA", caps.iotlb_offset, 8, writable=_ONES64 & ~0xF80),
            Register("IOTLB", caps.iotlb_offset + 8, 8, writable=_ONES64, action=self._iotlb_command),
        ]
        found += self._protected.registers
        if caps.page_request:
            found += self._page_requests.registers
        for n in range(caps.fault_records):
            offset = caps.fault_offset + 16 * n
            found.append(Register(f"FRCD{n}_LO", offset, 8))
            found.append(Register(f"FRCD{n}_HI", offset + 8, 8, clears=regs.FRCD_F, action=self._record_cleared))
        return found

    def write(self, offset: int, width: int, value: int) -> None:
        """A store to a register."""
        if offset == regs.IQT and width == 4:  # what a driver writes all the time
            self._iqt.value = value & 0x7FFF0
            self._queue.run()
        else:
            self.registers.write(offset, width, value)

    def set_caching(self, caching: Caching) -> None:
        """From now on, keep what `caching` says."""
        self._clear_caches()
        self.caching = self.scalable.caching = caching
        self.tlb.keep = caching.keep
        droppers = (self.contexts.clear, self.tlb.clear, self.tables.clear, self.interrupts.cache.clear)
        caching.droppable(*droppers, *self.scalable.droppers())

    def reset(self) -> None:
        """Power-on: registers, caches, translation off."""
        self.registers.reset()
        self.recorder.restart()
        self._queue.forget()
        self.interrupts.forget_table()
        self._enter(_OFF)
        self.mode = regs.TTM_LEGACY
        self._root = self.scalable.root = 0
        self._clear_caches()

    # -- registers ---------------------------------------------------------------------------------------------------

    def _command(self, _old: int, written: int) -> None:
        before = status = self._gsts.value
        remapping = regs.IRE | regs.CFI if self.caps.interrupt_remapping else 0
        if written & regs.SRTP:
            self._set_root(self._rtaddr.value)
            status |= regs.SRTP
        if written & regs.SIRTP and remapping:
            self.interrupts.load_table()
            status |= regs.SIRTP
        if (written ^ status) & regs.QIE:
            self._iqh.value = 0
            self._queue.forget()
        switches = regs.TE | remapping | (regs.QIE if self.caps.queued_invalidation else 0)
        status = status & ~switches | written & switches
        self._gsts.value = status
        if before & regs.TE and not status & regs.TE and self.caps.scalable:
            self._clear_caches()
        if before & regs.IRE and not status & regs.IRE and self.caps.enhanced_interrupt_pointer:
            self.interrupts.invalidate()
        if not status & (regs.TE | regs.IRE):
            self.recorder.restart()
        self._set_state()
        self.registers.by_name["GCMD"].value = 0
        self._forget()
        self._queue.run()

    def _set_root(self, value: int) -> None:
        mode = value >> regs.RTADDR_TTM_SHIFT & 3
        caps = self.caps
        if (mode == regs.TTM_SCALABLE and not caps.scalable) or (mode == regs.TTM_ABORT and not caps.abort_mode):
            mode = regs.TTM_RESERVED
        self._root = self.scalable.root = value
        self.mode = mode
        if caps.enhanced_root_pointer:
            self._clear_caches()

    def _set_state(self) -> None:
        self._enter(_PROTECTED if self._protected.enabled else self._unprotected_state())

    def _enter(self, state: int) -> None:
        self._state = state
        self._legacy = state == _LEGACY

    def _unprotected_state(self) -> int:
        if not self._gsts.value & regs.TE:
            return _OFF
        return _LEGACY if self.mode == regs.TTM_LEGACY else _OTHERWISE

    def _protection_changed(self) -> None:
        self._set_state()
        self._forget()

    def _fault_status(self, old: int, _written: int) -> None:
        self.recorder.update()
        stopped = regs.FSTS_IQE | regs.FSTS_ITE
        if old & stopped and not self._fsts.value & stopped:
            self._queue.run()

    def _record_cleared(self, _old: int, _written: int) -> None:
        self.recorder.update()

    def _completion_status(self, _old: int, _written: int) -> None:
        if not self.registers.by_name["ICS"].value & regs.ICS_IWC:
            self._completion_event.withdraw()

    def invalidation_completed(self) -> None:
        """A wait descriptor asked for an interrupt."""
        status = self.registers.by_name["ICS"]
        if not status.value & regs.ICS_IWC:
            status.value |= regs.ICS_IWC
            self._completion_event.signal()

    def queue_error(self, bit: int) -> None:
        """The invalidation queue has stopped: `bit` of FSTS says why."""
        self.recorder.set_error(bit)

    def _context_command(self, _old: int, written: int) -> None:
        register = self.registers.by_name["CCMD"]
        if written & regs.CCMD_ICC:
            value = register.value
            granularity = value >> 61 & 3 if self._takes_commands else 0
            self.invalidate_contexts(granularity, value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 3)
            register.value = value & ~(regs.CCMD_ICC | 3 << 59) | granularity << 59

    def _iotlb_command(self, _old: int, written: int) -> None:
        register = self.registers.by_name["IOTLB"]
        if written & regs.IOTLB_IVT:
            value, where = register.value, self.registers.by_name["IVA"].value
            granularity = value >> 60 & 3 if self._takes_commands else 0
            mask, hint = where & qi.IOTLB_AM_MASK, where & qi.IOTLB_IH
            if granularity == qi.SELECTIVE:
                if not self.caps.page_selective:
                    granularity = qi.DOMAIN
                elif mask > self.caps.am_max:
                    granularity = 0
            self.invalidate_iotlb(granularity, value >> 32 & 0xFFFF, where & -4096, mask, hint)
            register.value = value & ~(regs.IOTLB_IVT | 3 << 57) | granularity << 57

    @property
    def _takes_commands(self) -> bool:
        """Invalidation by registers: in legacy mode, and not on hardware of version 6 or later (11.4.6)."""
        return self.mode == regs.TTM_LEGACY and self._version >> 4 < 6

    def _tail(self, _old: int, _written: int) -> None:
        self._queue.run()

    # -- invalidation ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        for port in self._warm:
            port.forget()
        self._warm.clear()

    def _clear_caches(self) -> None:
        self.tlb.clear()
        self.tables.clear()
        self.contexts.clear()
        self.scalable.clear()
        self._forget()

    def invalidate_iotlb(self, granularity: int, did: int, address: int, mask: int, hint: int = 0) -> None:
        """Forget translations of a domain: GLOBAL, DOMAIN, or 1 << mask pages at `address`; anything else: none.

        The tables above them go, too, but those above pages only without the `hint` that no table changed. Bits of the
        domain id and the address beyond the unit's widths mean nothing.
        """
        length = 4096 << mask
        did &= self.caps.ndoms - 1
        address &= (1 << self.caps.mgaw) - 1
        if self.mode:  # not legacy
            self.scalable.invalidate_iotlb(granularity, did, address & -length, length, hint)
        elif granularity == qi.SELECTIVE:
            self.tlb.clear_range(did, address & -length, length)
            if not hint:
                self.tables.clear_range(did, address & -length, length)
        elif granularity == qi.DOMAIN:
            self.tlb.clear_tag(did)
            self.tables.clear_tag(did)
        elif granularity == qi.GLOBAL:
            self.tlb.clear()
            self.tables.clear()
        if self._warm:
            self._forget()

    def invalidate_pasid_iotlb(
        self, granularity: int, did: int, pasid: int, address: int, mask: int, hint: int = 0
    ) -> None:
        """Forget translations of a PASID in a domain: all, or 1 << mask pages of its first stage at `address`."""
        length = 4096 << mask
        did &= self.caps.ndoms - 1
        self.scalable.invalidate_pasid_iotlb(granularity, did, pasid, address & -length, length, hint)
        if self._warm:
            self._forget()

    def invalidate_pasids(self, granularity: int, did: int, pasid: int) -> None:
        """Forget PASID-table entries: all, a domain's, or those of one PASID in a domain."""
        self.scalable.invalidate_pasids(granularity, did & self.caps.ndoms - 1, pasid)
        self._forget()

    def invalidate_contexts(self, granularity: int, did: int, sid: int, ignored: int) -> None:
        """Forget context entries: all, a domain's, or those of a source, of whose function bits some are ignored."""
        # From the most significant bit down (table 21).
        keep = 0xFFFF & ~(0, 4, 6, 7)[ignored]
        did &= self.caps.ndoms - 1
        if self.mode != regs.TTM_LEGACY:
            if granularity:
                self.scalable.invalidate_contexts(granularity, sid, keep)
        elif granularity == qi.GLOBAL:
            self.contexts.clear()
        elif granularity:
            for rid in [
                rid
                for rid, context in self.contexts.items()
                if context.did == did and (granularity == qi.DOMAIN or (rid ^ sid) & keep == 0)
            ]:
                del self.contexts[rid]
        self._forget()

    def invalidate_for_page_request(self, entry: Pasid, address: int) -> None:
        """The implicit invalidation of 6.5.3.1."""
        self.scalable.invalidate_for_page_request(entry, address)
        self._forget()

    def respond(self, rid: int, response: PageResponse) -> None:
        """Send a page group response to a function."""
        if self.downstream is not None:
            self.downstream.respond(rid, response)

    # -- translation -------------------------------------------------------------------------------------------------

    def translate(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The run of IOVAs that holds `address`: cached, or walked and then cached.

        Of [address, address + length) as much is looked up as one table holds. Raises TranslationFault after the fault
        has been recorded.
        """
        self._warm.add(port)
        if not self._legacy:
            return IDENTITY if self._state == _OFF else self._translate_otherwise(port, pasid, address, length, access)
        rid = port.rid
        if pasid != NO_PASID:
            self.fault(DmaRequest(rid, pasid, address, length, access), faults.PASID_IN_LEGACY_MODE)
        context = self.contexts.get(rid)
        if context is None:
            context = self._fetch_context(rid)
        if context.reason:
            self.fault(DmaRequest(rid, pasid, address, length, access), context.reason, context.fpd)
        if address >> context.limit_bits:
            self.fault(DmaRequest(rid, pasid, address, length, access), faults.BEYOND_ADDRESS_WIDTH, context.fpd)
        if context.pass_through:
            return 0, 1 << context.limit_bits, 0, READ | WRITE
        run = self.tlb.lookup(context.did, address)
        if run is None:
            try:
                run = self.fill(context, address, length, access)
            except Refused as refused:
                self.fault(DmaRequest(rid, pasid, address, length, access), refused.reason, refused.fpd)
        elif run[1] < address + length:
            run = self.tlb.extend(context.did, run, address + length)
        if run[3] & access != access:
            reason = faults.NO_WRITE_PERMISSION if access & ~run[3] & WRITE else faults.NO_READ_PERMISSION
            self.fault(DmaRequest(rid, pasid, address, length, access), reason, context.fpd)
        return run

    def _translate_otherwise(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        if self._state == _PROTECTED:
            self._enter(self._unprotected_state())
            try:
                return self.clip(self.translate(port, pasid, address, length, access), address)
            finally:
                self._enter(_PROTECTED)
        try:
            self.check_mode()
            return self.scalable.translate(port.rid, pasid, address, length, access)
        except Refused as refused:
            self.fault(DmaRequest(port.rid, pasid, address, length, access), refused.reason, refused.fpd)

    def clip(self, run: Run, address: int) -> Run:
        """A run without the protected memory regions. Raises TranslationFault where `address` leads into one."""
        if self._protected.enabled:
            clipped = self._protected.clip(run, address)
            if clipped is None:
                raise TranslationFault(f"{address + run[2]:#x} is in a protected memory region")
            return clipped
        return run

    def check_mode(self) -> None:
        """Whether requests are translated at all in the mode that the root-table address register asks for. Refused."""
        if self.mode == regs.TTM_RESERVED:
            raise Refused(faults.ROOT_ADDRESS_INVALID)
        if self.mode == regs.TTM_ABORT:
            raise Refused(faults.ABORT_MODE)

    @property
    def translating(self) -> bool:
        """GSTS.TES."""
        return bool(self._gsts.value & regs.TE)

    @property
    def status(self) -> int:
        """GSTS."""
        return self._gsts.value

    def interrupt(self, port: DmaPort, address: int, data: int) -> tuple[int, int]:
        """Remap a message: the (address, data) that goes to the processors. TranslationFault."""
        return self.interrupts.message(port.rid, address, data)

    def illegal_interrupt(self, port: DmaPort, address: int, length: int, access: int) -> NoReturn:
        """Refuse a request to the interrupt range that is no message. TranslationFault."""
        self.interrupts.illegal(DmaRequest(port.rid, NO_PASID, address, length, access))

    def translated(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """Check a translated request (AT=10b). Raises TranslationFault."""
        return self._services.translated(port, pasid, address, length, access)

    def request_translation(self, port: DmaPort, pasid: int, address: int, access: int) -> Translation:
        """Answer a translation request (AT=01b). Raises TranslationFault for UR and CA."""
        return self._services.request_translation(port, pasid, address, access)

    def page_request(self, port: DmaPort, request: PageRequest) -> None:
        """Take a page request message of a function."""
        self._services.page_request(request, self._page_requests)

    def legacy_context(self, rid: int) -> _Context:
        """The context entry of a source in legacy mode, cached or read. Refused."""
        context = self.contexts.get(rid) or self._fetch_context(rid)
        if context.reason:
            raise Refused(context.reason, context.fpd)
        return context

    def _fetch_context(self, rid: int) -> _Context:
        """Read the root and the context entry of a source, and cache what was found."""
        context = self.read_context(rid)
        if not self.caching.keep():
            return context
        if not context.reason:
            self.contexts[rid] = context
        elif self.caps.caching_mode and context.reason in (faults.ROOT_NOT_PRESENT, faults.CONTEXT_NOT_PRESENT):
            context.did = 0  # what is not present is cached under domain 0 (6.1)
            self.contexts[rid] = context
        return context

    def read_context(self, rid: int) -> _Context:
        """The root and the context entry of a source, from memory."""
        memory = self.memory
        try:
            where = (self._root & regs.ADDRESS_MASK) + (rid >> 8) * 16
            low, high = load_word(memory, where), load_word(memory, where + 8)
        except BusAbort:
            return _Context(0, reason=faults.ROOT_TABLE_ERROR)
        if not low & entries.ENTRY_PRESENT:
            return _Context(0, reason=faults.ROOT_NOT_PRESENT)
        if low & (entries.ROOT_RESERVED_LOW | self._beyond) or high & entries.ROOT_RESERVED_HIGH:
            return _Context(0, reason=faults.ROOT_RESERVED)
        try:
            where = (low & entries.ADDRESS_MASK) + (rid & 0xFF) * 16
            low, high = load_word(memory, where), load_word(memory, where + 8)
        except BusAbort:
            return _Context(0, reason=faults.CONTEXT_TABLE_ERROR)
        tt, aw = low >> entries.TT_SHIFT & entries.TT_MASK, high & entries.AW_MASK
        context = _Context(entries.context_did(high), low & entries.ADDRESS_MASK, aw + 1)
        context.fpd = bool(low & entries.CONTEXT_FPD)
        context.pass_through = tt == entries.TT_PASS_THROUGH
        context.device_tlb = tt == entries.TT_DEV_IOTLB
        context.limit_bits = self.host_address_bits if context.pass_through else min(self.caps.mgaw, 30 + 9 * aw)
        known = tt == 0 or (tt == 1 and self.caps.device_tlb) or (tt == 2 and self.caps.pass_through)
        if not low & entries.ENTRY_PRESENT:
            context.reason = faults.CONTEXT_NOT_PRESENT
        elif (
            low & (entries.CONTEXT_RESERVED_LOW | self._beyond)
            or high & entries.CONTEXT_RESERVED_HIGH
            or context.did >= self.caps.ndoms
        ):
            context.reason = faults.CONTEXT_RESERVED
        elif not self.caps.sagaw >> aw & 1 or not known:
            context.reason = faults.CONTEXT_INVALID
        return context

    def tables_of(self, did: int) -> Tables | None:
        """What is kept of second-stage tables under a domain id; None: nothing."""
        return self.tables.of(did, 12, 9) if self.caching.tables and self.caching.keep() else None

    def fill(self, context: _Context, address: int, length: int, access: int) -> Run:
        """Walk the tables for an address that is not cached; cache and return what is there. Refused.

        A run that does not allow `access` is returned all the same, and cached only with caching mode.
        """
        tables = self.tables_of(context.did)
        end = walk(self.format, self._load, context.root, context.top_level, address, tables=tables)
        if end.outcome == NOT_PRESENT:
            # With the tables, an item above the leaves is kept that is not present.
            lg2 = 12 if tables is None else self.format.item_lg2(end.level)
            start = address & -(1 << lg2)
            run = (start, start + (1 << lg2), 0, 0)
            if self.caps.caching_mode:
                self.tlb.insert(context.did, run, lg2)
            return run
        if end.outcome == RESERVED_BITS:
            raise Refused(faults.PAGE_TABLE_RESERVED, context.fpd)
        if end.outcome == FETCH_FAILED:
            top = end.level == context.top_level
            raise Refused(faults.CONTEXT_INVALID if top else faults.PAGE_TABLE_ERROR, context.fpd)
        if MSI_START <= end.output < MSI_END:
            raise Refused(faults.INTERRUPT_RANGE, context.fpd)
        lg2 = end.lg2
        size = 1 << lg2
        start = address & -size
        delta = end.output - address
        stop = start + (contiguous_pages(self.memory, end, address, length) << 12 if end.level == 0 else size)
        if start + delta < MSI_END and stop + delta > MSI_START:  # the rest of a page around the interrupt range
            start, lg2 = address & -4096, 12
            stop = start + 4096
        run = (start, stop, delta, end.rights & (READ | WRITE))
        if run[3] & access != access and not self.caps.caching_mode:
            return run
        return self.tlb.insert(context.did, run, lg2)

    # -- faults ------------------------------------------------------------------------------------------------------

    def fault(
        self,
        request: DmaRequest,
        reason: int,
        fpd: bool = False,
        at: int = faults.UNTRANSLATED,
        page_request: bool = False,
    ) -> NoReturn:
        """Record and refuse: always raises TranslationFault.

        `fpd`: an entry on the way disables fault processing; `at` and `page_request` are what the request was.
        """
        text = f"{request!r}: fault {reason:02x}h, {faults.REASONS[reason]}"
        if not fpd or reason in faults.UNQUALIFIED:
            self.recorder.record(request, reason, at, page_request)
        else:
            text += " (fault processing is disabled for this source)"
        if self._on_fault is not None:
            lines = (
                [] if reason == faults.IR_ILLEGAL_REQUEST else self.explain(request.rid, request.address, request.pasid)
            )
            self._on_fault("\n".join([text, *("  " + line for line in lines)]))
        raise TranslationFault(text)

    def tell(self, text: str) -> None:
        """For people: a message was refused."""
        if self._on_fault is not None:
            self._on_fault(text)

    def explain(self, rid: int, address: int, pasid: int = NO_PASID) -> list[str]:
        """The way from a source and an IOVA through the tables as they are in memory, a line a step."""
        if self.mode == regs.TTM_SCALABLE:
            return self.scalable.explain(rid, pasid, address)
        if self.mode != regs.TTM_LEGACY:
            return ["no root table: " + faults.REASONS[faults.ABORT_MODE if self.mode == 3 else 0x30]]
        return explain_legacy(self, rid, address)
