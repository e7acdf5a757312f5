"""A VT-d remapping unit in legacy mode: from a request id and an IOVA to a physical address, or to a fault record.

Mirrors the VT-d specification, revision 5.10: chapter 3 (translation), 6 (caches and their invalidation), 7 (faults),
11.4 (registers). It reads root, context and second-stage tables from memory and nothing else; caches context entries
by request id, and translations by domain id; with caching mode (CM) it caches what was not present, too, so that a
driver which forgets to invalidate after mapping is found out.

Left out: scalable mode, device TLBs, page requests, protected memory regions, paging-structure caches. INTERRUPT
REMAPPING IS A CAPABILITY BIT ONLY: IRTA, SIRTP and IRE are accepted and shown in GSTS, and a write to 0xFEEx_xxxx goes
to the interrupt controller as it is. UNVERIFIED: a request to that range that is no interrupt (a read, another length)
is aborted by the device's port and leaves no fault record; the manual says that it is a fault, not which.
"""

from __future__ import annotations

from collections.abc import Callable

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
    Walk,
    explain,
    load_word,
    loader,
    walk,
)
from fakedev.reg import Register, RegisterFile
from fakedev.tlb import Tlb
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, faults, regs
from fakedev.vtd.faults import FaultRecorder

_ONES32 = 0xFFFF_FFFF
_ONES64 = 0xFFFF_FFFF_FFFF_FFFF
_STATUS_ADDRESS = (1 << ADDRESS_BITS) - 4


class _Context:
    """A cached context entry, or (with a `reason`) the knowledge that a source has none."""

    __slots__ = ("did", "fpd", "limit_bits", "pass_through", "reason", "root", "top_level")

    def __init__(self, did: int, root: int = 0, top_level: int = 0, limit_bits: int = 0, reason: int = 0) -> None:
        self.did = did
        self.root = root
        self.top_level = top_level
        self.limit_bits = limit_bits
        self.reason = reason
        self.fpd = False
        self.pass_through = False


class VtdUnit:
    """One unit. `cap` and `ecap` are the capability registers and decide what it can do.

    `host_address_bits` is the width of the platform's physical addresses (HAW): bits from there up are reserved in
    root, context and table entries.

    `read` and `write` are its 4 KiB register window. `send_interrupt` gets (address, data) of its own interrupts;
    `on_fault` gets every refused request in words.
    """

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
    ) -> None:
        self.memory = memory
        self._load = loader(memory)
        self.caps = caps = regs.Capabilities(cap, ecap)
        self._host_bits = host_address_bits
        self._beyond = -(1 << host_address_bits) & _ONES64
        # Bit 62 of a leaf is no transient-mapping bit any more: reserved, with and without device TLBs (9.8).
        self.format = VtdSecondStage(host_address_bits, caps.sllps, caps.snoop_control, device_tlb=False)
        self.tlb = Tlb() if tlb is None else tlb
        #: Context entries by request id.
        self.contexts: dict[int, _Context] = {}
        self._warm: set[DmaPort] = set()
        self._send = send_interrupt
        self._on_fault = on_fault
        self._translating = False
        self._root = 0
        self.registers = RegisterFile(self._declare(version))
        at = self.registers.by_name
        self._gsts, self._fsts, self._rtaddr = at["GSTS"], at["FSTS"], at["RTADDR"]
        self._iqh, self._iqt, self._iqa = at["IQH"], at["IQT"], at["IQA"]
        self._recorder = FaultRecorder(self.registers, caps.fault_records, caps.fault_offset, send_interrupt)
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
            Register("FECTL", regs.FECTL, reset=regs.EVENT_IM, writable=regs.EVENT_IM, action=self._fault_control),
            Register("FEDATA", regs.FEDATA, writable=_ONES32),
            Register("FEADDR", regs.FEADDR, writable=_ONES32 & ~3),
            Register("FEUADDR", regs.FEUADDR, writable=_ONES32),
            Register("IQH", regs.IQH, 8),
            Register("IQT", regs.IQT, 8, writable=0x7FFF0, action=self._tail),
            Register("IQA", regs.IQA, 8, writable=_ONES64 & ~0x7F8),
            Register("ICS", regs.ICS, clears=regs.ICS_IWC, action=self._completion_status),
            Register("IECTL", regs.IECTL, reset=regs.EVENT_IM, writable=regs.EVENT_IM, action=self._completion_control),
            Register("IEDATA", regs.IEDATA, writable=_ONES32),
            Register("IEADDR", regs.IEADDR, writable=_ONES32 & ~3),
            Register("IEUADDR", regs.IEUADDR, writable=_ONES32),
            Register("IRTA", regs.IRTA, 8, writable=_ONES64 & ~0x7F0),
            Register("IVA", caps.iotlb_offset, 8, writable=_ONES64 & ~0xF80),
            Register("IOTLB", caps.iotlb_offset + 8, 8, writable=_ONES64, action=self._iotlb_command),
        ]
        for n in range(caps.fault_records):
            offset = caps.fault_offset + 16 * n
            found.append(Register(f"FRCD{n}_LO", offset, 8))
            found.append(Register(f"FRCD{n}_HI", offset + 8, 8, clears=regs.FRCD_F, action=self._record_cleared))
        return found

    def write(self, offset: int, width: int, value: int) -> None:
        """A store to a register."""
        if offset == regs.IQT and width == 4:  # what a driver writes all the time
            self._iqt.value = value & 0x7FFF0
            self._run_queue()
        else:
            self.registers.write(offset, width, value)

    def reset(self) -> None:
        """Power-on: registers, caches, translation off."""
        self.registers.reset()
        self._recorder.reset()
        self._translating = False
        self._root = 0
        self.tlb.clear()
        self.contexts.clear()
        self._forget()

    # -- registers ---------------------------------------------------------------------------------------------------

    def _command(self, _old: int, written: int) -> None:
        status = self._gsts.value
        if written & regs.SRTP:
            self._root = self._rtaddr.value
            status |= regs.SRTP
        if written & regs.SIRTP:
            status |= regs.SIRTP
        if (written ^ status) & regs.QIE:
            self._iqh.value = 0
        status = status & ~(regs.TE | regs.QIE | regs.IRE | regs.CFI)
        status |= written & (regs.TE | regs.QIE | regs.IRE | regs.CFI)
        self._gsts.value = status
        self._translating = bool(status & regs.TE)
        self.registers.by_name["GCMD"].value = 0
        self._forget()
        self._run_queue()

    def _fault_status(self, old: int, _written: int) -> None:
        self._recorder.update()
        if old & regs.FSTS_IQE and not self._fsts.value & regs.FSTS_IQE:
            self._run_queue()

    def _record_cleared(self, _old: int, _written: int) -> None:
        self._recorder.update()

    def _fault_control(self, _old: int, _written: int) -> None:
        self._recorder.deliver()

    def _completion_status(self, _old: int, _written: int) -> None:
        at = self.registers.by_name
        if not at["ICS"].value & regs.ICS_IWC:
            at["IECTL"].value &= ~regs.EVENT_IP

    def _completion_control(self, _old: int, _written: int) -> None:
        at = self.registers.by_name
        control = at["IECTL"]
        if control.value & (regs.EVENT_IP | regs.EVENT_IM) == regs.EVENT_IP:
            control.value &= ~regs.EVENT_IP
            self._send(at["IEUADDR"].value << 32 | at["IEADDR"].value, at["IEDATA"].value)

    def _completed(self) -> None:
        at = self.registers.by_name
        if not at["ICS"].value & regs.ICS_IWC:
            at["ICS"].value |= regs.ICS_IWC
            at["IECTL"].value |= regs.EVENT_IP
            self._completion_control(0, 0)

    def _context_command(self, _old: int, written: int) -> None:
        register = self.registers.by_name["CCMD"]
        if written & regs.CCMD_ICC:
            value = register.value
            granularity = value >> 61 & 3
            self._invalidate_contexts(granularity, value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 3)
            register.value = value & ~regs.CCMD_ICC | granularity << 59

    def _iotlb_command(self, _old: int, written: int) -> None:
        register = self.registers.by_name["IOTLB"]
        if written & regs.IOTLB_IVT:
            value, where = register.value, self.registers.by_name["IVA"].value
            granularity = value >> 60 & 3
            self._invalidate_iotlb(granularity, value >> 32 & 0xFFFF, where & -4096, where & qi.IOTLB_AM_MASK)
            register.value = value & ~(regs.IOTLB_IVT | 3 << 57) | granularity << 57

    # -- invalidation ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        for port in self._warm:
            port.forget()
        self._warm.clear()

    def _tail(self, _old: int, _written: int) -> None:
        self._run_queue()

    def _run_queue(self) -> None:
        """Execute descriptors until the head meets the tail, or an error stops the queue."""
        if not self._gsts.value & regs.QIE or self._fsts.value & (regs.FSTS_IQE | regs.FSTS_ITE):
            return
        base = self._iqa.value & regs.ADDRESS_MASK
        size = 4096 << (self._iqa.value & regs.IQA_QS_MASK)
        head, tail = self._iqh.value, self._iqt.value
        if tail >= size or self._iqa.value & regs.IQA_DW:
            self._recorder.set_error(regs.FSTS_IQE)
            return
        memory = self.memory
        words = memory.words
        in_ram = base + size <= memory.ram_size
        while head != tail:
            try:
                at = base + head
                if in_ram:
                    done = self._execute(words[at >> 3], words[(at >> 3) + 1])
                else:
                    done = self._execute(load_word(memory, at), load_word(memory, at + 8))
            except BusAbort:
                done = False
            if not done:
                self._iqh.value = head
                self._recorder.set_error(regs.FSTS_IQE)
                return
            head = (head + 16) % size
        self._iqh.value = head

    def _execute(self, low: int, high: int) -> bool:
        """One descriptor; False if it is malformed."""
        kind = low & qi.TYPE_MASK
        if kind == qi.IOTLB_TYPE:
            granularity = low >> 4 & 3
            if low & qi.IOTLB_RESERVED_LOW or high & qi.IOTLB_RESERVED_HIGH or not granularity:
                return False
            mask = high & qi.IOTLB_AM_MASK
            if granularity == qi.SELECTIVE and (not self.caps.page_selective or mask > self.caps.am_max):
                return False
            self._invalidate_iotlb(granularity, low >> 16 & qi.DID_MASK, high & -4096, mask)
            return True
        if kind == qi.WAIT_TYPE:
            if low & qi.WAIT_RESERVED_LOW or high & 3:
                return False
            if low & qi.WAIT_SW:
                data = low >> qi.WAIT_DATA_SHIFT
                self.memory.write(high & _STATUS_ADDRESS, data.to_bytes(4, "little"))
            if low & qi.WAIT_IF:
                self._completed()
            return True
        if kind == qi.CC_TYPE:
            granularity = low >> 4 & 3
            if low & qi.CC_RESERVED or not granularity:
                return False
            sid, ignored = low >> qi.CC_SID_SHIFT & 0xFFFF, low >> qi.CC_FM_SHIFT & 3
            self._invalidate_contexts(granularity, low >> 16 & qi.DID_MASK, sid, ignored)
            return True
        return kind == qi.IEC_TYPE  # nothing is cached of interrupts

    def _invalidate_iotlb(self, granularity: int, did: int, address: int, mask: int) -> None:
        if granularity == qi.SELECTIVE:
            length = 4096 << mask
            self.tlb.clear_range(did, address & -length, length)
        elif granularity == qi.DOMAIN:
            self.tlb.clear_tag(did)
        elif granularity == qi.GLOBAL:
            self.tlb.clear()
        if self._warm:
            self._forget()

    def _invalidate_contexts(self, granularity: int, did: int, sid: int, ignored: int) -> None:
        if granularity == qi.GLOBAL:
            self.contexts.clear()
        elif granularity:
            # The function bits that are ignored, from the most significant down (6.5.1.1).
            keep = 0xFFFF & ~(0, 4, 6, 7)[ignored]
            for rid in [
                rid
                for rid, context in self.contexts.items()
                if context.did == did and (granularity == qi.DOMAIN or (rid ^ sid) & keep == 0)
            ]:
                del self.contexts[rid]
        self._forget()

    # -- translation -------------------------------------------------------------------------------------------------

    def translate(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The run of IOVAs that holds `address`: cached, or walked and then cached.

        Of [address, address + length) as much is looked up as one table holds. Raises TranslationFault after the fault
        has been recorded.
        """
        self._warm.add(port)
        if not self._translating:
            return IDENTITY
        rid = port.rid
        if pasid != NO_PASID:
            self._fault(DmaRequest(rid, pasid, address, length, access), faults.PASID_IN_LEGACY_MODE, None)
        context = self.contexts.get(rid)
        if context is None:
            context = self._fetch_context(rid)
        if context.reason:
            self._fault(DmaRequest(rid, pasid, address, length, access), context.reason, context)
        if address >> context.limit_bits:
            self._fault(DmaRequest(rid, pasid, address, length, access), faults.BEYOND_ADDRESS_WIDTH, context)
        if context.pass_through:
            return 0, 1 << context.limit_bits, 0, READ | WRITE
        run = self.tlb.lookup(context.did, address)
        if run is None:
            run = self._fill(context, DmaRequest(rid, pasid, address, length, access))
        elif run[1] < address + length:
            run = self.tlb.extend(context.did, run, address + length)
        if not run[3] & access:
            reason = faults.NO_READ_PERMISSION if access == READ else faults.NO_WRITE_PERMISSION
            self._fault(DmaRequest(rid, pasid, address, length, access), reason, context)
        return run

    def _fetch_context(self, rid: int) -> _Context:
        """Read the root and the context entry of a source, and cache what was found."""
        context = self._read_context(rid)
        if not context.reason:
            self.contexts[rid] = context
        elif self.caps.caching_mode and context.reason in (faults.ROOT_NOT_PRESENT, faults.CONTEXT_NOT_PRESENT):
            context.did = 0  # what is not present is cached under domain 0 (6.1)
            self.contexts[rid] = context
        return context

    def _read_context(self, rid: int) -> _Context:
        if self._root >> regs.RTADDR_TTM_SHIFT & 3:
            return _Context(0, reason=faults.ROOT_ADDRESS_INVALID)
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
        context.limit_bits = self._host_bits if context.pass_through else min(self.caps.mgaw, 30 + 9 * aw)
        known = tt == 0 or (tt == 1 and self.caps.device_tlb) or (tt == 2 and self.caps.pass_through)
        if not low & entries.ENTRY_PRESENT:
            context.reason = faults.CONTEXT_NOT_PRESENT
        elif low & (entries.CONTEXT_RESERVED_LOW | self._beyond) or high & entries.CONTEXT_RESERVED_HIGH:
            context.reason = faults.CONTEXT_RESERVED
        elif not self.caps.sagaw >> aw & 1 or not known:
            context.reason = faults.CONTEXT_INVALID
        return context

    def _fill(self, context: _Context, request: DmaRequest) -> Run:
        """Walk the tables for an address that is not cached; cache and return what is there."""
        address = request.address
        end = walk(self.format, self._load, context.root, context.top_level, address)
        if end.outcome == NOT_PRESENT:
            page = address & -4096
            run = (page, page + 4096, 0, 0)
            if self.caps.caching_mode:
                self.tlb.insert(context.did, run, 12)
            return run
        if end.outcome == RESERVED_BITS:
            self._fault(request, faults.PAGE_TABLE_RESERVED, context)
        if end.outcome == FETCH_FAILED:
            top = end.level == context.top_level
            self._fault(request, faults.CONTEXT_INVALID if top else faults.PAGE_TABLE_ERROR, context)
        lg2 = end.lg2
        size = 1 << lg2
        start = address & -size
        stop = start + (self._contiguous(end, address, request.length) << 12 if end.level == 0 else size)
        run = (start, stop, end.output - address, end.rights & (READ | WRITE))
        if MSI_START <= end.output < MSI_END:
            self._fault(request, faults.INTERRUPT_RANGE, context)
        return self.tlb.insert(context.did, run, lg2)

    def _contiguous(self, end: Walk, address: int, length: int) -> int:
        """How many pages of the request continue the leaf at `end` in the same table: only these are cached."""
        index = end.item_pa >> 3 & 511
        wanted = min((address & 4095) + length + 4095 >> 12, 512 - index)
        if wanted > 1 and end.item_pa + 8 * wanted <= self.memory.ram_size:
            first = end.item_pa >> 3
            words = self.memory.words
            item = end.item
            for n in range(1, wanted):
                item += 4096
                if words[first + n] != item:
                    return n
            return wanted
        return 1

    # -- faults ------------------------------------------------------------------------------------------------------

    def _fault(self, request: DmaRequest, reason: int, context: _Context | None) -> None:
        """Record and refuse: always raises TranslationFault."""
        text = f"{request!r}: fault {reason:02x}h, {faults.REASONS[reason]}"
        if context is None or not context.fpd or reason in faults.UNQUALIFIED:
            self._recorder.record(request, reason)
        else:
            text += " (fault processing is disabled for this source)"
        if self._on_fault is not None:
            self._on_fault("\n".join([text, *("  " + line for line in self.explain(request.rid, request.address))]))
        raise TranslationFault(text)

    def explain(self, rid: int, address: int) -> list[str]:
        """The way from a source and an IOVA through the tables as they are in memory, a line a step."""
        context = self._read_context(rid)
        cached = self.contexts.get(rid)
        lines = []
        if cached is not None and (cached.did, cached.root, cached.reason) != (
            context.did if not context.reason else cached.did,
            context.root,
            context.reason,
        ):
            lines.append(f"the context cache still holds domain {cached.did:#x}, table {cached.root:#x}")
        if context.reason:
            return [*lines, f"context entry: {faults.REASONS[context.reason]}"]
        if context.pass_through:
            return [*lines, f"context entry: domain {context.did:#x}, pass-through"]
        lines.append(f"context entry: domain {context.did:#x}, {context.top_level + 1} levels from {context.root:#x}")
        run = self.tlb.lookup(context.did, address)
        if run is not None:
            allowed = "".join(name for bit, name in ((READ, "R"), (WRITE, "W")) if run[3] & bit) or "nothing"
            lines.append(f"IOTLB: iova {run[0]:#x}-{run[1] - 1:#x} at {run[0] + run[2]:#x}, allows {allowed}")
        return lines + explain(self.format, self._load, context.root, context.top_level, address)
