"""One SMMUv3 as its driver holds it: what the identification registers say, reset, the stream table, interrupts.

Mirrors `struct arm_smmu_device`, `arm_smmu_device_hw_probe()`, `arm_smmu_device_reset()` and the interrupt handlers of
drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3, for a unit that the device tree describes. Everything goes through
`machine.mmio` and words in RAM. Left out: units with tables or queues of their own, the hypervisor's world (E2H),
errata by IIDR, messages instead of wired interrupts, suspend, kdump.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

from fakedev.machine import Machine
from fakedev.smmuv3 import commands, events, regs
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3.ats import (
    PRIQ_0_EXEC,
    PRIQ_0_LAST,
    PRIQ_0_PRIV,
    PRIQ_0_READ,
    PRIQ_0_SSID_SHIFT,
    PRIQ_0_SSV,
    PRIQ_0_WRITE,
)
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.arm_smmu_v3.entries import make_abort_ste
from kernel_model.iommu.arm_smmu_v3.queues import CommandQueue, OutputQueue
from kernel_model.iommu.io_pgfault import (
    IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE,
    IOMMU_FAULT_PAGE_REQUEST_PASID_VALID,
    IopfQueue,
    PageRequest,
    report_device_fault,
)
from kernel_model.page_alloc import PageAllocator
from uapi.iommufd import (
    IOMMU_PGFAULT_PERM_EXEC,
    IOMMU_PGFAULT_PERM_PRIV,
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
)

if TYPE_CHECKING:
    from kernel_model.iommu.arm_smmu_v3.master import Master
    from kernel_model.iommu.core import Device

#: Streams of a level 2 stream table, as log2, and the most level 1 descriptors.
_SPLIT = 8
_MAX_L1_ENTRIES = 1 << 17
#: Tables and queues: inner shareable, write-back.
_CR1 = 0xD75
#: What is told in words with addresses, and what is handled at all; the rest is only logged.
_CLASSES = ("CD fetch", "Stage 1 translation table fetch", "Input address caused fault", "Reserved")
_HANDLED = frozenset(
    (
        events.C_BAD_STE,
        events.F_STREAM_DISABLED,
        events.C_BAD_SUBSTREAMID,
        events.C_BAD_CD,
        *events.TRANSLATION_RELATED,
    )
)


class SmmuDevice:
    """`struct arm_smmu_device`: the unit with its registers at `base`.

    ENXIO for a unit that the driver refuses: no AArch64 tables, too small a command queue.
    """

    def __init__(self, machine: Machine, pages: PageAllocator, base: int) -> None:
        self.base = base
        self.memory = machine.memory
        self.pages = pages
        self.words = machine.memory.words
        self._mmio = machine.mmio
        self.idr = tuple(self.readl(offset) for offset in range(regs.IDR0, regs.IDR5 + 4, 4))
        self.iidr, self.aidr = self.readl(regs.IIDR), self.readl(regs.AIDR)
        self._hw_probe()
        #: Stage-1 domains by ASID and stage-2 domains by VMID; 0 is taken by streams without stage 2.
        self.asids: set[int] = set()
        self.vmids: set[int] = set()
        self.streams: dict[int, Master] = {}
        #: Those whose stalls are reported.
        self.iopf = IopfQueue()
        #: Lines as the kernel's log has them.
        self.log: deque[str] = deque(maxlen=64)
        cmdqs, evtqs = regs.IDR1_CMDQS.get(self.idr[1]), regs.IDR1_EVENTQS.get(self.idr[1])
        if cmdqs <= 6:
            raise KernelError(errno.ENXIO, f"a command queue of {1 << cmdqs} entries does not hold a batch")
        self.cmdq = CommandQueue(machine, pages, base, cmdqs)
        self.evtq = OutputQueue(machine, pages, evtqs, 4, base + regs.EVENTQ_PROD, base + regs.EVENTQ_CONS)
        self.priq: OutputQueue | None = None
        if self.pri:
            priqs = regs.IDR1_PRIQS.get(self.idr[1])
            self.priq = OutputQueue(machine, pages, priqs, 2, base + regs.PRIQ_PROD, base + regs.PRIQ_CONS)
        self._init_strtab()

    def readl(self, offset: int) -> int:
        return self._mmio.read(self.base + offset, 4)

    def writel(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 4, value)

    def _writeq(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 8, value)

    # -- probe -------------------------------------------------------------------------------------------------------

    def _hw_probe(self) -> None:
        """arm_smmu_device_hw_probe()."""
        idr0, idr1, _, idr3, _, idr5 = self.idr
        self.stage1, self.stage2 = bool(idr0 & regs.IDR0_S1P), bool(idr0 & regs.IDR0_S2P)
        if not (self.stage1 or self.stage2) or not regs.IDR0_TTF.get(idr0) & 2:
            raise KernelError(errno.ENXIO, "the unit has no translation by AArch64 tables")
        self.nesting = self.stage1 and self.stage2
        self.coherent = bool(idr0 & regs.IDR0_COHACC)
        self.two_level_cdtab = bool(idr0 & regs.IDR0_CD2L)
        self.ats, self.pri = bool(idr0 & regs.IDR0_ATS), bool(idr0 & regs.IDR0_PRI)
        self.dirty_bits = regs.IDR0_HTTU.get(idr0) >= regs.HTTU_ACCESS_DIRTY
        stall_model = regs.IDR0_STALL_MODEL.get(idr0)
        self.stall_forced = stall_model == regs.STALL_FORCED
        self.stalls = stall_model != regs.STALL_NEVER
        self.attr_types_ovr = bool(idr1 & regs.IDR1_ATTR_TYPES_OVR)
        self.asid_bits = 16 if idr0 & regs.IDR0_ASID16 else 8
        self.vmid_bits = 16 if idr0 & regs.IDR0_VMID16 else 8
        self.sid_bits, self.ssid_bits = regs.IDR1_SIDSIZE.get(idr1), regs.IDR1_SSIDSIZE.get(idr1)
        self.two_level_strtab = regs.IDR0_ST_LEVEL.get(idr0) == 1 and self.sid_bits > _SPLIT
        self.range_inv, self.s2fwb = bool(idr3 & regs.IDR3_RIL), bool(idr3 & regs.IDR3_FWB)
        self.vax, self.ds = regs.IDR5_VAX.get(idr5) == 1, bool(idr5 & regs.IDR5_DS)
        oas = regs.IDR5_OAS.get(idr5)
        self.oas = regs.ADDRESS_SIZES[oas] if oas < len(regs.ADDRESS_SIZES) else 48
        self.pgsize_bitmap = 0
        for bit, sizes in (
            (regs.IDR5_GRAN64K, 1 << 16 | 1 << 29),
            (regs.IDR5_GRAN16K, 1 << 14 | 1 << 25),
            (regs.IDR5_GRAN4K, 1 << 12 | 1 << 21 | 1 << 30),
        ):
            if idr5 & bit:
                self.pgsize_bitmap |= sizes
        if self.oas == 52:
            self.pgsize_bitmap |= 1 << 42

    # -- the stream table --------------------------------------------------------------------------------------------

    def _init_strtab(self) -> None:
        """arm_smmu_init_strtab()."""
        self._l2: dict[int, int] = {}
        if self.two_level_strtab:
            self._l1_entries = min(1 << self.sid_bits - _SPLIT, _MAX_L1_ENTRIES)
            self._strtab = self.pages.alloc(8 * self._l1_entries)
        else:
            self._strtab = self.pages.alloc(e.STE_BYTES << self.sid_bits)
            self._abort(self._strtab, 1 << self.sid_bits)

    def _abort(self, table: int, count: int) -> None:
        first = make_abort_ste()[0]
        for n in range(count):
            self.words[(table >> 3) + e.STE_WORDS * n] = first

    def init_sid(self, sid: int) -> bool:
        """arm_smmu_init_sid_strtab(): have an STE for a stream. False: the tables do not reach that far. ENOMEM."""
        if not self.two_level_strtab:
            return sid < 1 << self.sid_bits
        index = sid >> _SPLIT
        if index >= self._l1_entries:
            return False
        if index not in self._l2:
            table = self.pages.alloc(e.STE_BYTES << _SPLIT)
            self._abort(table, 1 << _SPLIT)
            self._l2[index] = table
            self.words[(self._strtab >> 3) + index] = e.L1STD_SPAN.put(_SPLIT + 1) | table & e.L1STD_L2PTR_MASK
        return True

    def ste(self, sid: int) -> memoryview[int]:
        """The eight words of a stream's entry, in place."""
        table = self._strtab
        if self.two_level_strtab:
            table, sid = self._l2[sid >> _SPLIT], sid & (1 << _SPLIT) - 1
        first = (table >> 3) + e.STE_WORDS * sid
        return self.words[first : first + e.STE_WORDS]

    # -- reset -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """arm_smmu_device_reset(): everything off, tables and queues told, everything forgotten, everything on."""
        if self.readl(regs.CR0) & regs.CR0_SMMUEN:
            self.writel(regs.GBPA, self.readl(regs.GBPA) | regs.GBPA_ABORT | regs.GBPA_UPDATE)
        self._acknowledged(regs.CR0, regs.CR0ACK, 0)
        self.writel(regs.CR1, _CR1)
        self.writel(regs.CR2, regs.CR2_PTM | regs.CR2_RECINVSID)
        if self.two_level_strtab:
            config = (
                regs.STRTAB_FMT.put(regs.STRTAB_FMT_2LVL)
                | regs.STRTAB_LOG2SIZE.put(self._l1_entries.bit_length() - 1 + _SPLIT)
                | regs.STRTAB_SPLIT.put(_SPLIT)
            )
        else:
            config = regs.STRTAB_FMT.put(regs.STRTAB_FMT_LINEAR) | regs.STRTAB_LOG2SIZE.put(self.sid_bits)
        self._writeq(regs.STRTAB_BASE, self._strtab & regs.STRTAB_BASE_ADDR_MASK | regs.STRTAB_BASE_RA)
        self.writel(regs.STRTAB_BASE_CFG, config)
        self._writeq(regs.CMDQ_BASE, self.cmdq.q_base)
        self.writel(regs.CMDQ_PROD, self.cmdq.prod)
        self.writel(regs.CMDQ_CONS, self.cmdq.cons)
        enables = regs.CR0_CMDQEN
        self._acknowledged(regs.CR0, regs.CR0ACK, enables)
        self.cmdq.issue([commands.cfgi_all()])
        self.cmdq.issue([commands.tlbi_nsnh_all()])
        self._writeq(regs.EVENTQ_BASE, self.evtq.q_base)
        self.writel(regs.EVENTQ_PROD, self.evtq.prod)
        self.writel(regs.EVENTQ_CONS, self.evtq.cons)
        enables |= regs.CR0_EVENTQEN
        self._acknowledged(regs.CR0, regs.CR0ACK, enables)
        if self.priq is not None:
            self._writeq(regs.PRIQ_BASE, self.priq.q_base)
            self.writel(regs.PRIQ_PROD, self.priq.prod)
            self.writel(regs.PRIQ_CONS, self.priq.cons)
            enables |= regs.CR0_PRIQEN
            self._acknowledged(regs.CR0, regs.CR0ACK, enables)
        if self.ats:
            enables |= regs.CR0_ATSCHK
            self._acknowledged(regs.CR0, regs.CR0ACK, enables)
        self._setup_irqs()
        self._acknowledged(regs.CR0, regs.CR0ACK, enables | regs.CR0_SMMUEN)

    def _setup_irqs(self) -> None:
        self._acknowledged(regs.IRQ_CTRL, regs.IRQ_CTRLACK, 0)
        if self.idr[0] & regs.IDR0_MSI:  # the addresses are cleared, so that the wires are used
            self._writeq(regs.GERROR_IRQ_CFG0, 0)
            self._writeq(regs.EVENTQ_IRQ_CFG0, 0)
            if self.pri:
                self._writeq(regs.PRIQ_IRQ_CFG0, 0)
        flags = regs.IRQ_EVENTQ | regs.IRQ_GERROR | (regs.IRQ_PRIQ if self.pri else 0)
        self._acknowledged(regs.IRQ_CTRL, regs.IRQ_CTRLACK, flags)

    def _acknowledged(self, register: int, ack: int, value: int) -> None:
        """arm_smmu_write_reg_sync()."""
        self.writel(register, value)
        if self.readl(ack) != value:
            raise KernelBug(f"the unit does not acknowledge {value:#x} in register {register:#x}")

    # -- interrupts --------------------------------------------------------------------------------------------------

    def interrupt(self, name: str) -> None:
        """A wired interrupt of the unit's: "eventq", "priq" or "gerror"."""
        if name == "eventq":
            self._evtq_thread()
        elif name == "priq":
            self._priq_thread()
        elif name == "gerror":
            self._gerror_handler()

    def _evtq_thread(self) -> None:
        for record in self.evtq.drain(lambda: self.log.append("EVTQ overflow detected -- events lost")):
            if not self._handle_event(record):
                self._dump_event(record)

    def _handle_event(self, record: list[int]) -> bool:
        """arm_smmu_handle_event(): report a stalled transaction, or tell the guest that the device is in of a fault of
        its own stage. False: nobody takes the event."""
        low, second, _, _ = record
        master = self.streams.get(events.EVT_0_SID.get(low))
        if events.EVT_0_ID.get(low) not in _HANDLED or master is None:
            return False
        try:
            if second & events.EVT_1_STALL:
                _report_stall(master.device, record)
            elif master.vmaster is not None and not second & events.EVT_1_S2:
                master.vmaster.report_event(record)
            else:
                return False
        except KernelError:
            return False
        return True

    def _dump_event(self, record: list[int]) -> None:
        """arm_smmu_dump_event(), without the raw words and the limit of its rate."""
        low, second, address, last = record
        number, sid = events.EVT_0_ID.get(low), events.EVT_0_SID.get(low)
        ssid = events.EVT_0_SSID.get(low) if low & events.EVT_0_SSV else 0
        master = self.streams.get(sid)
        client = master.device.name if master is not None else "(unassigned sid)"
        line = f"event: {events.NAMES.get(number, 'UNKNOWN')} client: {client} sid: {sid:#x} ssid: {ssid:#x}"
        if number not in events.TRANSLATION_RELATED:
            self.log.append(line)
            return
        self.log.append(f"{line} iova: {address:#x} ipa: {last & events.EVT_3_IPA_MASK:#x}")
        self.log.append(
            f"{'priv' if second & events.EVT_1_PNU else 'unpriv'} {'inst' if second & events.EVT_1_IND else 'data'} "
            f"{'read' if second & events.EVT_1_RNW else 'write'} {'s2' if second & events.EVT_1_S2 else 's1'} "
            f'"{_CLASSES[events.EVT_1_CLASS.get(second)]}"'
            f"{' stall' if second & events.EVT_1_STALL else ''} stag: {events.EVT_1_STAG.get(second):#x}"
        )

    def _priq_thread(self) -> None:
        """Nobody in the kernel takes page requests of the PRI queue: each group is refused."""
        if self.priq is None:
            return
        for record in self.priq.drain(lambda: self.log.append("PRIQ overflow detected -- requests lost")):
            self._handle_ppr(*record)

    def _handle_ppr(self, low: int, second: int) -> None:
        """arm_smmu_handle_ppr()."""
        sid, last, group = low & 0xFFFF_FFFF, low & PRIQ_0_LAST, second & 0x1FF
        ssid = low >> PRIQ_0_SSID_SHIFT & 0xF_FFFF if low & PRIQ_0_SSV else None
        rights = zip("RWX", (PRIQ_0_READ, PRIQ_0_WRITE, PRIQ_0_EXEC), strict=True)
        self.log.append("unexpected PRI request received:")
        self.log.append(
            f"\tsid {sid:#010x}.0x{ssid or 0:05x}: [{group}{'L' if last else ''}] "
            f"{'' if low & PRIQ_0_PRIV else 'un'}privileged {''.join(name for name, bit in rights if low & bit)} "
            f"access at iova {second & -4096:#018x}"
        )
        if last:
            self.cmdq.issue([commands.pri_resp(sid, group, commands.PRI_FAILURE, ssid)], sync=False)

    def _gerror_handler(self) -> None:
        errors = self.readl(regs.GERROR)
        active = errors ^ self.readl(regs.GERRORN)
        if not active & regs.GERROR_MASK:
            return
        self.log.append(f"unexpected global error reported ({active:#010x}), this could be serious")
        for bit, text in (
            (regs.GERROR_EVENTQ_ABT_ERR, "EVTQ write aborted -- events may have been lost"),
            (regs.GERROR_PRIQ_ABT_ERR, "PRIQ write aborted -- events may have been lost"),
        ):
            if active & bit:
                self.log.append(text)
        if active & regs.GERROR_CMDQ_ERR:
            self.log.append(self.cmdq.skip_err())
        self.writel(regs.GERRORN, errors)


def _report_stall(device: Device, record: list[int]) -> None:
    """The page request that a stalled transaction is. Errnos of `report_device_fault`."""
    low, second, address, _ = record
    perm = IOMMU_PGFAULT_PERM_READ if second & events.EVT_1_RNW else IOMMU_PGFAULT_PERM_WRITE
    perm |= IOMMU_PGFAULT_PERM_EXEC if second & events.EVT_1_IND else 0
    perm |= IOMMU_PGFAULT_PERM_PRIV if second & events.EVT_1_PNU else 0
    flags, pasid = IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE, 0
    if low & events.EVT_0_SSV:
        flags, pasid = flags | IOMMU_FAULT_PAGE_REQUEST_PASID_VALID, events.EVT_0_SSID.get(low)
    report_device_fault(
        device, PageRequest(flags=flags, pasid=pasid, grpid=events.EVT_1_STAG.get(second), perm=perm, addr=address)
    )
