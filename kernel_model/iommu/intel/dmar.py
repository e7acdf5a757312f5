"""The part of the VT-d driver that talks to a unit's registers: start-up, the invalidation queue, the fault interrupt.

Mirrors drivers/iommu/intel/dmar.c and the register half of iommu.c at 7.3. Everything goes through `machine.mmio` and
words in RAM. A unit that has scalable mode is used in it. Left out: register-based invalidation (a unit without a queue
is refused), kexec, suspend, devices that do not complete an invalidation (the kernel tries again, for ever).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fakedev.machine import Machine
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, faults, regs
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.io_pgfault import IopfQueue
from kernel_model.irq import MSI_ADDRESS, Interrupts
from kernel_model.page_alloc import PageAllocator

if TYPE_CHECKING:
    from kernel_model.iommu.intel.irq_remapping import IrqRemapping
    from kernel_model.iommu.intel.prq import PageRequests

_QI_LENGTH = 256
_QI_DONE = 2
#: Identity domains use 1; 0 is what hardware caches not-present entries under.
FLPT_DEFAULT_DID = 1
_FIRST_DID = 2
#: As the order of a flush: all addresses.
MAX_AGAW_PFN_WIDTH = 52


class IntelUnit:
    """`struct intel_iommu`: one unit at `base`."""

    def __init__(self, machine: Machine, pages: PageAllocator, base: int) -> None:
        self.base = base
        self.memory = machine.memory
        self.pages = pages
        self._mmio = machine.mmio
        self._words = machine.memory.words
        self._ram = machine.memory.ram
        self.version = self._mmio.read(base + regs.VER, 4)
        self.caps = regs.Capabilities(self._mmio.read(base + regs.CAP, 8), self._mmio.read(base + regs.ECAP, 8))
        if not self.caps.queued_invalidation:
            raise KernelError(errno.ENODEV, "the driver needs a unit with queued invalidation")
        caps = self.caps
        #: The tables are those of scalable mode (sm_supported() and its kin).
        self.scalable = caps.scalable
        self.pasid_supported = caps.scalable and caps.pasid
        self.nested_supported = caps.scalable and caps.nested
        self.ssads_supported = caps.scalable and caps.second_stage_dirty and caps.walk_coherency
        #: How many PASIDs it knows; 0 without.
        self.max_pasids = 1 << caps.pasid_bits if self.pasid_supported else 0
        #: Codes of the address widths of its tables: the usual one and the largest.
        self.agaw, self.msagaw = self._agaw(3), self._agaw(4)
        #: Devices that take page faults; and who takes their page requests, where the unit has them.
        self.iopf_queue = IopfQueue()
        self.prq: PageRequests | None = None
        #: The table of interrupts, while they are remapped.
        self.irq_remapping: IrqRemapping | None = None
        #: Domain ids in use (`domain_ida`).
        self.domain_ids: set[int] = set()
        #: Lines as the kernel's log has them, of the last faults.
        self.fault_log: deque[str] = deque(maxlen=64)
        self._gcmd = 0
        self._root = pages.alloc()
        #: Descriptors are twice as large where there is scalable mode.
        self._descriptor_lg2 = 5 if caps.scalable else 4
        self._queue = pages.alloc(_QI_LENGTH << self._descriptor_lg2)
        self._status = pages.alloc()
        self._free_head = 0
        self._tail_register = base + regs.IQT

    def _agaw(self, widest: int) -> int:
        """__iommu_calculate_agaw(): of tables of n + 2 levels, the largest n up to `widest`."""
        caps = self.caps
        levels = caps.sagaw
        if caps.scalable and caps.first_stage:
            first = 1 << 2 | caps.first_stage_5_levels << 3
            levels = levels & first if caps.second_stage else first
        levels &= (2 << widest) - 1
        if not levels:
            raise KernelError(errno.EINVAL, f"the unit has no address width for its tables, sagaw {caps.sagaw:#x}")
        return levels.bit_length() - 1

    # -- start-up ----------------------------------------------------------------------------------------------------

    def enable_qi(self) -> None:
        """dmar_enable_qi()."""
        self._writel(regs.IQT, 0)
        self._writeq(regs.IQA, self._queue | (regs.IQA_DW | 1 if self.scalable else 0))
        self.command(regs.QIE, on=True)

    def start(self, interrupts: Interrupts, vector: int) -> None:
        """init_dmars(): the root table, global flushes, the fault interrupt, translation on. The queue is on.

        `vector` is a free one outside of those that PCI functions get.
        """
        self._writeq(regs.RTADDR, self._root | (regs.TTM_SCALABLE << regs.RTADDR_TTM_SHIFT if self.scalable else 0))
        self.one_shot(regs.SRTP)
        if not self.caps.enhanced_root_pointer:  # else the unit has forgotten everything by itself
            self.flush_context(0, 0, qi.GLOBAL)
            if self.scalable:
                self.flush_pasid_cache(0, 0, qi.PC_GLOBAL)
            self.flush_iotlb_global()
        interrupts.request_irq(vector, self.handle_fault)
        self._writel(regs.FEDATA, vector)
        self._writel(regs.FEADDR, MSI_ADDRESS)
        self._writel(regs.FEUADDR, 0)
        self._writel(regs.FECTL, 0)
        self.command(regs.TE, on=True)

    def command(self, bit: int, on: bool) -> None:
        """Switch a bit of GCMD, and see that GSTS follows."""
        self._gcmd = self._gcmd | bit if on else self._gcmd & ~bit
        self._writel(regs.GCMD, self._gcmd)
        if bool(self._readl(regs.GSTS) & bit) != on:
            raise KernelBug(f"the unit does not acknowledge command {bit:#x}")

    def one_shot(self, bit: int) -> None:
        """Give a command of GCMD that has no off, and see that it was done."""
        self._writel(regs.GCMD, self._gcmd | bit)
        if not self._readl(regs.GSTS) & bit:
            raise KernelBug(f"the unit does not acknowledge command {bit:#x}")

    def write_irta(self, value: int) -> None:
        """The interrupt remapping table, for the next SIRTP."""
        self._writeq(regs.IRTA, value)

    def _readl(self, offset: int) -> int:
        return self._mmio.read(self.base + offset, 4)

    def _writel(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 4, value)

    def _writeq(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 8, value)

    # -- context entries ---------------------------------------------------------------------------------------------

    def context_address(self, rid: int, allocate: bool) -> int | None:
        """iommu_context_addr(): where the context entry of a source is. None without its table; ENOMEM.

        In scalable mode entries are twice as large, so that a bus has two tables.
        """
        index = (self._root >> 3) + (rid >> 8) * 2
        offset = (rid & 0xFF) * 16
        if self.scalable:
            index += rid >> 7 & 1
            offset = (rid & 0x7F) * entries.SM_CONTEXT_BYTES
        word = self._words[index]
        if word & entries.ENTRY_PRESENT:
            return (word & entries.ADDRESS_MASK) + offset
        if not allocate:
            return None
        table = self.pages.alloc()
        self._words[index] = table | entries.ENTRY_PRESENT
        return table + offset

    def read_entry(self, address: int) -> tuple[int, int]:
        """The two words of a context entry."""
        return self._words[address >> 3], self._words[(address >> 3) + 1]

    def write_entry(self, address: int, entry: tuple[int, int]) -> None:
        """Store a context entry, the word with the present bit last."""
        self._words[(address >> 3) + 1] = entry[1]
        self._words[address >> 3] = entry[0]

    # -- domain ids --------------------------------------------------------------------------------------------------

    def alloc_domain_id(self) -> int | None:
        """The lowest free domain id, None if there is none."""
        for did in range(_FIRST_DID, self.caps.ndoms):
            if did not in self.domain_ids:
                self.domain_ids.add(did)
                return did
        return None

    # -- the invalidation queue --------------------------------------------------------------------------------------

    def submit(self, descriptors: Sequence[tuple[int, int]], drain: bool = False) -> None:
        """qi_submit_sync(): queue the descriptors and a wait, ring, see that they were carried out.

        `drain`: the wait is for page requests on their way into the queue, too.
        """
        words = self._words
        lg2 = self._descriptor_lg2
        queue, step = self._queue >> 3, 1 << lg2 - 3  # the upper half of a large descriptor stays 0
        head = self._free_head
        for low, high in descriptors:
            index = queue + step * head
            words[index] = low
            words[index + 1] = high
            head = (head + 1) % _QI_LENGTH
        status = self._status + 4 * head
        index = queue + step * head
        words[index], words[index + 1] = qi.wait(status, _QI_DONE, flags=qi.WAIT_PD if drain else 0)
        self._free_head = head = (head + 1) % _QI_LENGTH
        self._mmio.write(self._tail_register, 4, head << lg2)
        if self._ram[status] != _QI_DONE:
            raise KernelBug(f"the invalidation queue stopped, FSTS {self._readl(regs.FSTS):#x}")
        self._ram[status] = 0

    def flush_context(self, did: int, sid: int, granularity: int) -> None:
        """Forget cached context entries: all, or those of `sid` cached under `did`."""
        self.submit([qi.context_cache(did, sid, 0, granularity)])

    def flush_iotlb_global(self) -> None:
        """Forget all translations."""
        self.submit([qi.iotlb(0, 0, 0, qi.GLOBAL)])

    def flush_iotlb_domain(self, did: int) -> None:
        """Forget all translations of a domain id."""
        self.submit([qi.iotlb(did, 0, 0, qi.DOMAIN)])

    def flush_pasid_cache(self, did: int, pasid: int, granularity: int) -> None:
        """Forget cached PASID-table entries: qi.PC_PASID, one PASID's that were cached under a domain id; or all."""
        self.submit([qi.pasid_cache(did, pasid, granularity)])

    def flush_piotlb_all(self, did: int, pasid: int) -> None:
        """Forget all translations of a PASID under a domain id."""
        self.submit([qi.pasid_iotlb(did, pasid, 0, 0, qi.PIOTLB_PASID)])

    @property
    def translating(self) -> bool:
        """Translation is on. Without it no device is told to forget anything."""
        return bool(self._gcmd & regs.TE)

    def flush_device_tlb(self, sid: int, pfsid: int, qdep: int) -> None:
        """Have a device forget all that it uses without a PASID."""
        if self.translating:
            self.submit([qi.device_tlb(sid, pfsid, 0, MAX_AGAW_PFN_WIDTH, qdep)])

    def flush_pasid_device_tlb(self, sid: int, pfsid: int, pasid: int, qdep: int) -> None:
        """Have a device forget all that it uses with a PASID."""
        if self.translating:
            self.submit([qi.pasid_device_tlb(sid, pfsid, pasid, 0, MAX_AGAW_PFN_WIDTH, qdep)])

    def context_present_cache_flush(self, did: int, rid: int) -> None:
        """A context entry became present: needed only where hardware caches what is not (under domain 0)."""
        if self.caps.caching_mode:
            self.flush_context(0, rid, qi.SELECTIVE)
            self.flush_iotlb_domain(did)

    # -- faults ------------------------------------------------------------------------------------------------------

    def handle_fault(self) -> None:
        """dmar_fault(): log and clear every fault record."""
        status = self._readl(regs.FSTS)
        if not status & regs.FSTS_PPF:
            return
        index = status >> regs.FSTS_FRI_SHIFT & 0xFF
        while True:
            record = self.caps.fault_offset + 16 * index
            high = self._mmio.read(self.base + record + 8, 8)
            if not high & regs.FRCD_F:
                break
            reason, sid = high >> regs.FRCD_REASON_SHIFT & 0xFF, high & 0xFFFF
            pasid = f"PASID {high >> regs.FRCD_PASID_SHIFT & 0xFFFFF:#x}" if high & regs.FRCD_PP else "NO_PASID"
            address = self._mmio.read(self.base + record, 8)
            self._writel(record + 12, regs.FRCD_F >> 32)
            index = (index + 1) % self.caps.fault_records
            if 0x20 <= reason < 0x27:
                self.fault_log.append(
                    f"DMAR: [INTR-REMAP] Request device [{sid >> 8:02x}:{sid >> 3 & 31:02x}.{sid & 7}] "
                    f"fault index {address >> 48:#x} [fault reason {reason:#04x}] {faults.REASONS[reason]}"
                )
                continue
            self.fault_log.append(
                f"DMAR: [DMA {'Read' if high & regs.FRCD_READ else 'Write'} {pasid}] Request device "
                f"[{sid >> 8:02x}:{sid >> 3 & 31:02x}.{sid & 7}] fault addr {address:#x} "
                f"[fault reason {reason:#04x}] {faults.REASONS.get(reason, 'unknown')}"
            )
        self._writel(regs.FSTS, regs.FSTS_PFO | regs.FSTS_PPF)
