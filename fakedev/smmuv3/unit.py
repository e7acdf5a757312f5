"""An SMMUv3: from a StreamID, a SubstreamID and an address to a physical address, or to an event record.

Mirrors Arm IHI 0070 (G.b): the Non-secure programming interface. Here are the registers (chapter 6), the queues' turns
(3.5, 7.2) and the ports' side; what is looked up is in lookup.py, walked and cached in translate.py, commanded in
execute.py, waiting in stalls.py, and what endpoints with ATS and PRI ask in ats.py. Every update of CR0 and IRQ_CTRL is
complete when the store returns. A register that is guarded by an enabled function keeps its value.

Left out: Secure, Realm and EL2 streams, VMSAv8-32 and LPA2 tables, MPAM (so no VMS and no F_VMS_FETCH), ATOS, DPT, and
memory attributes. A StreamID is a function's request id.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.caching import Caching
from fakedev.dma import (
    EXECUTE,
    MSI_END,
    MSI_START,
    NO_PASID,
    PRIVILEGED,
    READ,
    WRITE,
    DmaPort,
    DmaRequest,
    InterruptSink,
    Parked,
    Run,
    TranslationFault,
)
from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.reg import Register, RegisterFile
from fakedev.smmuv3 import events, regs
from fakedev.smmuv3.ats import Ats
from fakedev.smmuv3.events import Event
from fakedev.smmuv3.execute import Commands
from fakedev.smmuv3.explain import explain_stream
from fakedev.smmuv3.lookup import Configuration, ConfigurationError, StreamAborts
from fakedev.smmuv3.queues import GlobalErrors, OutputQueue, QueueIndexes
from fakedev.smmuv3.regs import Features
from fakedev.smmuv3.stalls import Stalls
from fakedev.smmuv3.translate import Refused, Stream, Translator, attributes
from fakedev.tlb import TableCache, Tlb
from fakedev.tlp import Downstream, Invalidation, PageRequest, PageResponse, Translation

_ONES32 = 0xFFFF_FFFF
_COMMAND_LOG2, _EVENT_LOG2, _PRI_LOG2 = 4, 5, 4
_WRAPPED_INDEX = (2 << 19) - 1


class SmmuV3:
    """One SMMU. `read` and `write` are its two register pages (regs.WINDOW_SIZE bytes).

    `send_interrupt` gets (address, data) of its messages to `msi_window`; others are written to memory. `wired` gets
    the name of every interrupt, with or without a message: "eventq", "priq", "gerror" or "cmdq-sync".
    `downstream` leads to endpoints' device TLBs. `on_fault` gets every refused request in words. `keep` says before
    each insertion whether the caches may have it (True unless given).
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        features: Features | None = None,
        *,
        send_interrupt: InterruptSink,
        msi_window: tuple[int, int] = (MSI_START, MSI_END),
        wired: Callable[[str], None] | None = None,
        downstream: Downstream | None = None,
        on_fault: Callable[[str], None] | None = None,
        tlb: Tlb | None = None,
        keep: Callable[[], bool] | None = None,
    ) -> None:
        self.memory = memory
        self.features = features = features or Features()
        self.tlb = Tlb() if tlb is None else tlb
        self.msi_window = msi_window
        self.wired = wired
        self.downstream = downstream
        #: Sends an event to the processor (WFE): SYNC with SIG_SEV, and a command queue that is full no longer.
        self.on_event: Callable[[], None] | None = None
        #: Streams whose endpoints never complete an invalidation: the next SYNC fails (CERROR_ATC_INV_SYNC).
        self.silent_endpoints: set[int] = set()
        #: CR0.SMMUEN.
        self.enabled = False
        self._send = send_interrupt
        self._on_fault = on_fault
        self._warm: set[DmaPort] = set()
        self._running = False
        #: The command queue was full when it was last looked at.
        self._was_full = False
        self.registers = RegisterFile(self._declare())
        at = self.registers.by_name
        self._cr0, self._cr2, self._gbpa, self._irq_ctrl = at["CR0"], at["CR2"], at["GBPA"], at["IRQ_CTRL"]
        self.errors = GlobalErrors(at["GERROR"], at["GERRORN"], self._error_activated)
        self._cmdq = QueueIndexes(at["CMDQ_BASE"], at["CMDQ_PROD"], at["CMDQ_CONS"], features.cmdq_log2)
        self.eventq = OutputQueue(
            memory,
            QueueIndexes(at["EVENTQ_BASE"], at["EVENTQ_PROD"], at["EVENTQ_CONS"], features.eventq_log2),
            _EVENT_LOG2,
            self.errors,
            regs.GERROR_EVENTQ_ABT_ERR,
        )
        keeps = keep if keep is not None else lambda: True
        self.translator = Translator(memory, self.tlb, keeps)
        base, base_cfg = at["STRTAB_BASE"], at["STRTAB_BASE_CFG"]
        self.configuration = Configuration(features, self.translator, lambda: base.value, lambda: base_cfg.value, keeps)
        self._streams = self.configuration.streams
        self.stalls = Stalls(self.record)
        self._ats = Ats(self)
        self.priq: OutputQueue | None = None
        if features.pri:
            indexes = QueueIndexes(at["PRIQ_BASE"], at["PRIQ_PROD"], at["PRIQ_CONS"], features.priq_log2)
            self.priq = OutputQueue(memory, indexes, _PRI_LOG2, self.errors, regs.GERROR_PRIQ_ABT_ERR)
        self._commands = Commands(self)
        self.read = self.registers.read

    # -- registers ---------------------------------------------------------------------------------------------------

    def _declare(self) -> list[Register]:
        f = self.features
        cr0 = regs.CR0_SMMUEN | regs.CR0_EVENTQEN | regs.CR0_CMDQEN
        cr0 |= (regs.CR0_PRIQEN if f.pri else 0) | (regs.CR0_ATSCHK if f.ats else 0)
        cr2 = regs.CR2_RECINVSID | regs.CR2_PTM | (regs.CR2_REC_CFG_ATS if f.idr0 & regs.IDR0_ATSRECERR else 0)
        irqs = regs.IRQ_GERROR | regs.IRQ_EVENTQ | (regs.IRQ_PRIQ if f.pri else 0)
        index = _WRAPPED_INDEX
        flagged = index | regs.Q_OVERFLOW_FLAG
        found = [
            Register("IDR0", regs.IDR0, reset=f.idr0),
            Register("IDR1", regs.IDR1, reset=f.idr1),
            Register("IDR2", regs.IDR2),
            Register("IDR3", regs.IDR3, reset=f.idr3),
            Register("IDR4", regs.IDR4),
            Register("IDR5", regs.IDR5, reset=f.idr5),
            Register("IIDR", regs.IIDR, reset=f.iidr),
            Register("AIDR", regs.AIDR, reset=f.aidr),
            Register("CR0", regs.CR0, writable=cr0, action=self._cr0_written),
            Register("CR0ACK", regs.CR0ACK),
            Register("CR1", regs.CR1),
            Register("CR2", regs.CR2, writable=cr2),
            Register("STATUSR", regs.STATUSR),
            Register("GBPA", regs.GBPA, reset=0x1000, action=self._gbpa_written),
            Register("AGBPA", regs.AGBPA),
            Register("IRQ_CTRL", regs.IRQ_CTRL, writable=irqs, action=self._irq_ctrl_written),
            Register("IRQ_CTRLACK", regs.IRQ_CTRLACK),
            Register("GERROR", regs.GERROR),
            Register("GERRORN", regs.GERRORN, writable=regs.GERROR_MASK, action=self._gerrorn_written),
            Register("STRTAB_BASE", regs.STRTAB_BASE, 8),
            Register("STRTAB_BASE_CFG", regs.STRTAB_BASE_CFG),
            Register("CMDQ_BASE", regs.CMDQ_BASE, 8),
            Register("CMDQ_PROD", regs.CMDQ_PROD, writable=index, action=self._run_commands_after),
            Register("CMDQ_CONS", regs.CMDQ_CONS),
            Register("EVENTQ_BASE", regs.EVENTQ_BASE, 8),
            Register("EVENTQ_PROD", regs.EVENTQ_PROD),
            Register("EVENTQ_CONS", regs.EVENTQ_CONS, writable=flagged, action=self._event_space),
        ]
        names = ["GERROR", "EVENTQ"]
        if f.pri:
            found += [
                Register("PRIQ_BASE", regs.PRIQ_BASE, 8),
                Register("PRIQ_PROD", regs.PRIQ_PROD),
                Register("PRIQ_CONS", regs.PRIQ_CONS, writable=flagged),
            ]
            names.append("PRIQ")
        if f.msi:
            for name in names:
                offset = getattr(regs, f"{name}_IRQ_CFG0")
                found.append(Register(f"{name}_IRQ_CFG0", offset, 8))
                found.append(Register(f"{name}_IRQ_CFG1", offset + 8))
                found.append(Register(f"{name}_IRQ_CFG2", offset + 12))
        elif f.pri:
            found.append(Register("PRIQ_IRQ_CFG2", regs.PRIQ_IRQ_CFG2))
        by_name = {register.name: register for register in found}
        pa = (1 << f.oas) - 1  # the registers hold no more of an address (3.4.3)
        queue_base = regs.Q_BASE_RWA | regs.Q_BASE_ADDR_MASK & pa | regs.Q_BASE_LOG2SIZE.mask
        fmt = regs.STRTAB_FMT.mask | regs.STRTAB_SPLIT.mask if f.two_level_stream_table else 0
        guarded = [
            (regs.CR0_SMMUEN, "STRTAB_BASE", regs.STRTAB_BASE_RA | regs.STRTAB_BASE_ADDR_MASK & pa),
            (regs.CR0_SMMUEN, "STRTAB_BASE_CFG", regs.STRTAB_LOG2SIZE.mask | fmt),
            (regs.CR0_SMMUEN, "CR2", by_name["CR2"].writable),
            (regs.CR0_CMDQEN, "CMDQ_BASE", queue_base),
            (regs.CR0_CMDQEN, "CMDQ_CONS", index | regs.CMDQ_CONS_ERR.mask),
            (regs.CR0_EVENTQEN, "EVENTQ_BASE", queue_base),
            (regs.CR0_EVENTQEN, "EVENTQ_PROD", flagged),
            (regs.CR0_PRIQEN, "PRIQ_BASE", queue_base),
            (regs.CR0_PRIQEN, "PRIQ_PROD", flagged),
        ]
        #: What guards a register: (the enable bit, the register, its writable bits), of CR0 and of IRQ_CTRL.
        self._guards = [(bit, by_name[name], mask) for bit, name, mask in guarded if name in by_name]
        self._cr1 = by_name["CR1"]
        attributes = regs.IRQ_CFG2_MASK if f.msi else 0
        self._irq_guards = [
            (bit, by_name[f"{name}_IRQ_CFG{n}"], mask)
            for bit, name in ((regs.IRQ_GERROR, "GERROR"), (regs.IRQ_EVENTQ, "EVENTQ"), (regs.IRQ_PRIQ, "PRIQ"))
            for n, mask in (
                (0, regs.IRQ_CFG0_ADDR_MASK & pa),
                (1, _ONES32),
                (2, attributes | (regs.PRIQ_IRQ_CFG2_LO if name == "PRIQ" else 0)),
            )
            if f"{name}_IRQ_CFG{n}" in by_name
        ]
        self._guard(0, 0)
        return found

    def _guard(self, cr0: int, irq_ctrl: int) -> None:
        for value, guards in ((cr0, self._guards), (irq_ctrl, self._irq_guards)):
            for bit, register, mask in guards:
                register.writable = 0 if value & bit else mask
        queues = cr0 & (regs.CR0_CMDQEN | regs.CR0_EVENTQEN | regs.CR0_PRIQEN)
        self._cr1.writable = 0 if queues else regs.CR1_QUEUE_MASK
        self._cr1.writable |= 0 if cr0 & regs.CR0_SMMUEN else regs.CR1_TABLE_MASK

    def write(self, offset: int, width: int, value: int) -> None:
        """A store to a register."""
        if offset == regs.CMDQ_PROD and width == 4:  # what a driver writes all the time
            self._cmdq.prod.value = value & _WRAPPED_INDEX
            self._run_commands()
        else:
            self.registers.write(offset, width, value)

    def set_caching(self, caching: Caching) -> None:
        """From now on, keep what `caching` says."""
        translator = self.translator
        translator.clear()
        translator.keep = caching.keep
        translator.tables = TableCache() if caching.tables else None
        self.configuration.set_keep(caching.keep)
        self.forget_ports()
        caching.droppable(translator.clear, *self.configuration.droppers())

    def reset(self) -> None:
        """Power-on: registers, caches, nothing enabled; stalled transactions are aborted."""
        self.registers.reset()
        self._was_full = False
        self._guard(0, 0)
        self.enabled = self.eventq.enabled = False
        if self.priq is not None:
            self.priq.enabled = False
        self.translator.clear()
        self.configuration.clear()
        self._commands.reset()
        self.forget_ports()
        self.stalls.terminate_all()
        self.stalls.settle()

    def _cr0_written(self, old: int, _written: int) -> None:
        new = self._cr0.value
        self.registers.by_name["CR0ACK"].value = new
        self._guard(new, self._irq_ctrl.value)
        self.enabled = bool(new & regs.CR0_SMMUEN)
        self.eventq.enabled = bool(new & regs.CR0_EVENTQEN)
        if self.priq is not None:
            both = regs.CR0_PRIQEN | regs.CR0_SMMUEN
            self.priq.enabled = new & both == both
        self.forget_ports()
        if old & ~new & regs.CR0_SMMUEN:
            self.stalls.terminate_all()
            self.stalls.settle()
        if new & ~old & regs.CR0_EVENTQEN:
            self._event_space(0, 0)
        self._run_commands()

    def _gbpa_written(self, _old: int, written: int) -> None:
        if written & regs.GBPA_UPDATE:
            self._gbpa.value = written & regs.GBPA_MASK
            self.forget_ports()

    def _irq_ctrl_written(self, _old: int, _written: int) -> None:
        self.registers.by_name["IRQ_CTRLACK"].value = self._irq_ctrl.value
        self._guard(self._cr0.value, self._irq_ctrl.value)

    def _gerrorn_written(self, _old: int, _written: int) -> None:
        self._event_space(0, 0)
        self._run_commands()

    def _run_commands_after(self, _old: int, _written: int) -> None:
        self._run_commands()

    def _event_space(self, _old: int, _written: int) -> None:
        self.retry_stalls()
        if not self._running:
            self.stalls.settle()

    def retry_stalls(self) -> None:
        """What had to wait for space in the event queue, or for a token, may try again if there is space."""
        if len(self.stalls) and self.eventq.writable():
            self.stalls.retry_unrecorded()

    # -- interrupts --------------------------------------------------------------------------------------------------

    def _message(self, address: int, data: int, error: int) -> None:
        """An MSI: a 32-bit write. `error` is the flag of GERROR if it is aborted."""
        first, beyond = self.msi_window
        if first <= address < beyond:
            self._send(address, data)
            return
        try:
            self.memory.write(address, data.to_bytes(4, "little"))
        except BusAbort:
            self.errors.activate(error)

    def _interrupt(self, name: str, enable: int, error: int) -> None:
        if not self._irq_ctrl.value & enable:
            return
        if self.features.msi:
            at = self.registers.by_name
            address = at[f"{name}_IRQ_CFG0"].value
            if address:
                self._message(address, at[f"{name}_IRQ_CFG1"].value, error)
        if self.wired is not None:
            self.wired(name.lower())

    def _error_activated(self, bit: int) -> None:
        if bit != regs.GERROR_MSI_GERROR_ABT_ERR:
            self._interrupt("GERROR", regs.IRQ_GERROR, regs.GERROR_MSI_GERROR_ABT_ERR)

    def signal_sync(self, address: int, data: int) -> None:
        """SYNC is complete, and asks for an interrupt."""
        if self.features.msi and address:
            self._message(address & (1 << self.features.oas) - 1, data, regs.GERROR_MSI_CMDQ_ABT_ERR)
        if self.wired is not None:
            self.wired("cmdq-sync")

    def send_event(self) -> None:
        """A WFE event."""
        if self.on_event is not None:
            self.on_event()

    # -- commands ----------------------------------------------------------------------------------------------------

    def forget_ports(self) -> None:
        """Take the ports' shortcuts away."""
        for port in self._warm:
            port.forget()
        self._warm.clear()

    def _run_commands(self) -> None:
        """Consume commands until the queue is empty or one is in error."""
        if self._running:
            return  # an interrupt's handler stored to PROD; the loop below sees it
        self._running = True
        try:
            self._consume()
        finally:
            self._running = False
        self.stalls.settle()

    def _consume(self) -> None:
        queue, cons = self._cmdq, self._cmdq.cons
        load = self.translator.load
        execute = self._commands.execute
        while self._cr0.value & regs.CR0_CMDQEN and not self.errors.active(regs.GERROR_CMDQ_ERR) and not queue.empty():
            log2 = queue.log2
            index = cons.value
            where = queue.address(_COMMAND_LOG2) + ((index & (1 << log2) - 1) << _COMMAND_LOG2)
            try:
                error = execute(load(where), load(where + 8))
            except BusAbort:
                error = regs.CERROR_ABT
            if error:
                cons.value = regs.CMDQ_CONS_ERR.set(index, error)
                self.errors.activate(regs.GERROR_CMDQ_ERR)  # whose interrupt's handler may acknowledge it already
                continue
            cons.value = index & regs.CMDQ_CONS_ERR.mask | index + 1 & (2 << log2) - 1
            if self._was_full:
                self._was_full = False
                self.send_event()
        self._was_full = self.features.sev and queue.full()

    def atc_invalidate(self, sid: int, request: Invalidation) -> bool:
        """Carry an ATC_INV to an endpoint; True if it does not answer. One that refuses (UR) has answered."""
        if sid in self.silent_endpoints:
            return True
        if self.downstream is not None:
            self.downstream.invalidate(sid, request)
        return False

    def pri_respond(self, sid: int, response: PageResponse) -> None:
        """Carry a page response to an endpoint."""
        if self.downstream is not None:
            self.downstream.respond(sid, response)

    # -- translation -------------------------------------------------------------------------------------------------

    def translate(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The run of IOVAs that holds `address`: cached, or walked and then cached.

        Of [address, address + length) as much is looked up as one table holds. Raises TranslationFault after the event
        has been recorded, Parked if the transaction stalls.
        """
        self._warm.add(port)
        if not self.enabled:
            request = DmaRequest(port.rid, pasid, address, length, access)
            if self._gbpa.value & regs.GBPA_ABORT:
                raise TranslationFault(f"{request!r}: GBPA.ABORT")
            return self.untranslated(request)
        sid = port.rid
        substreams = self._streams.get(sid)
        stream = None if substreams is None else substreams.get(pasid)
        try:
            if stream is None:
                stream = self.configuration.stream(sid, pasid)
            start, stop, delta, rights = self.translator.translate(stream, address, length, access)
        except Refused as refused:
            request = DmaRequest(sid, pasid, address, length, access)
            if stream is not None:
                refused.ste = stream.ste
            raise self.refuse(request, refused, stream) from None
        except StreamAborts:
            raise TranslationFault(f"{DmaRequest(sid, pasid, address, length, access)!r}: the STE aborts") from None
        return start, stop, delta, rights >> (3 if access & PRIVILEGED else 0) & 7

    def untranslated(self, request: DmaRequest) -> Run:
        """A request passes as it is, within the physical addresses (3.4, 3.9.1.1). Raises TranslationFault."""
        if request.address >> self.features.oas:
            raise TranslationFault(f"{request!r}: physical addresses have {self.features.oas} bits")
        return 0, 1 << self.features.oas, 0, READ | WRITE | EXECUTE

    def refuse(
        self, request: DmaRequest, refused: Refused, stream: Stream | None, despite_recinvsid: bool = False
    ) -> Exception:
        """Record what stopped a request, and say what to raise: TranslationFault, or Parked where it stalls.

        `despite_recinvsid`: C_BAD_STREAMID is recorded whatever CR2.RECINVSID says.
        """
        number, ste = refused.number, refused.ste
        ssid = None if request.pasid == NO_PASID else request.pasid
        if isinstance(refused, ConfigurationError) and refused.ssid is not None:
            ssid = refused.ssid
        privileged, instruction = bool(request.access & PRIVILEGED), bool(request.access & EXECUTE)
        if ste is not None:
            privileged, instruction = attributes(ste, request.access)
        event = Event(
            number,
            request.rid,
            ssid,
            address=request.address,
            rnw=not request.access & WRITE,
            pnu=privileged,
            ind=instruction,
            s2=refused.s2,
            klass=refused.klass,
            ipa=refused.ipa,
            fetch_address=refused.fetch_address,
            ttrnw=refused.ttrnw,
        )
        stalls, records = False, True
        if number in events.TRANSLATION_RELATED:
            if refused.s2 and ste is not None:
                stalls, records = ste.s2s, ste.s2r
            elif stream is not None and stream.cd is not None:
                stalls, records = stream.cd.s, stream.cd.r
        elif number == events.C_BAD_STREAMID:
            records = despite_recinvsid or bool(self._cr2.value & regs.CR2_RECINVSID)
        if stalls:
            parked = Parked(request)
            self.stalls.stall(event, parked)
            self._tell(request, f"{event}")
            return parked
        if records:
            self.record(event)
        self._tell(request, f"{event}" if records else f"{event} (not to be recorded)")
        return TranslationFault(f"{request!r}: {event}")

    def _tell(self, request: DmaRequest, what: str) -> None:
        if self._on_fault is not None:
            lines = self.explain(request.rid, request.address, request.pasid)
            self._on_fault("\n".join([f"{request!r}: {what}", *("  " + line for line in lines)]))

    def record(self, event: Event) -> bool:
        """Write an event record; True if the queue took it. The interrupt tells that it is no longer empty."""
        was_empty = self.eventq.indexes.empty()
        if not self.eventq.put(event.words(), kept=event.stag is not None):
            return False
        if was_empty:
            self._interrupt("EVENTQ", regs.IRQ_EVENTQ, regs.GERROR_MSI_EVENTQ_ABT_ERR)
        return True

    # -- endpoints with ATS and PRI (fakedev/smmuv3/ats.py) ----------------------------------------------------------

    def translated(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """Check a translated request. Raises TranslationFault."""
        return self._ats.translated(port.rid, address, length, access)

    def request_translation(self, port: DmaPort, pasid: int, address: int, access: int) -> Translation:
        """Answer a translation request. Raises TranslationFault for UR and CA."""
        return self._ats.request_translation(port.rid, pasid, address, access)

    def page_request(self, port: DmaPort, request: PageRequest) -> None:
        """Put a page request into the PRI queue, or answer it where that cannot be done."""
        self._ats.page_request(request)

    def pri_interrupt(self, was_empty: bool, last: bool) -> None:
        """A page request has been written to the PRI queue, or has found it full."""
        config = self.registers.by_name.get("PRIQ_IRQ_CFG2")
        on_last = config is not None and bool(config.value & regs.PRIQ_IRQ_CFG2_LO)
        if last if on_last else was_empty:
            self._interrupt("PRIQ", regs.IRQ_PRIQ, regs.GERROR_MSI_PRIQ_ABT_ERR)

    @property
    def ats_checked(self) -> bool:
        """CR0.ATSCHK."""
        return bool(self._cr0.value & regs.CR0_ATSCHK)

    @property
    def records_ats_configuration_errors(self) -> bool:
        """CR2.REC_CFG_ATS."""
        return bool(self._cr2.value & regs.CR2_REC_CFG_ATS)

    # -- for people --------------------------------------------------------------------------------------------------

    def explain(self, rid: int, address: int, pasid: int = NO_PASID) -> list[str]:
        """The way from a stream and an IOVA through the tables as they are in memory, a line a step."""
        if not self.enabled:
            return ["the SMMU is off: " + ("abort" if self._gbpa.value & regs.GBPA_ABORT else "bypass")]
        return explain_stream(self.configuration, self.translator, rid, pasid, address)
