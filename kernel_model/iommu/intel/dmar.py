"""The part of the VT-d driver that talks to a unit's registers: start-up, the invalidation queue, the fault interrupt.

Mirrors drivers/iommu/intel/dmar.c and the register half of iommu.c at 7.3. Everything goes through `machine.mmio` and
words in RAM. Left out: register-based invalidation (a unit without a queue is refused), interrupt remapping beyond
switching it on, kexec, suspend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fakedev.machine import Machine
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, faults, regs
from kernel_model.errors import KernelBug
from kernel_model.irq import MSI_ADDRESS, Interrupts
from kernel_model.page_alloc import PageAllocator

_QI_LENGTH = 256
_QI_DONE = 2
#: Identity domains use 1; 0 is what hardware caches not-present entries under.
FLPT_DEFAULT_DID = 1
_FIRST_DID = 2


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
            raise KernelBug("the driver needs a unit with queued invalidation")
        #: Domain ids in use (`domain_ida`).
        self.domain_ids: set[int] = set()
        #: Lines as the kernel's log has them, of the last faults.
        self.fault_log: deque[str] = deque(maxlen=64)
        self._gcmd = 0
        self._root = pages.alloc()
        self._queue = pages.alloc()
        self._status = pages.alloc()
        self._free_head = 0
        self._tail_register = base + regs.IQT

    # -- start-up ----------------------------------------------------------------------------------------------------

    def start(self, interrupts: Interrupts, vector: int) -> None:
        """init_dmars(): the queue, the root table, global flushes, the fault interrupt, translation on.

        `vector` is a free one outside of those that PCI functions get.
        """
        self._writel(regs.IQT, 0)
        self._writeq(regs.IQA, self._queue)
        self._command(regs.QIE, on=True)
        self._writeq(regs.RTADDR, self._root)
        self._one_shot(regs.SRTP)
        self.flush_context(0, 0, qi.GLOBAL)
        self.flush_iotlb_global()
        interrupts.request_irq(vector, self.handle_fault)
        self._writel(regs.FEDATA, vector)
        self._writel(regs.FEADDR, MSI_ADDRESS)
        self._writel(regs.FEUADDR, 0)
        self._writel(regs.FECTL, 0)
        if self.caps.interrupt_remapping:
            self._one_shot(regs.SIRTP)
            self._command(regs.IRE, on=True)
        self._command(regs.TE, on=True)

    def _command(self, bit: int, on: bool) -> None:
        self._gcmd = self._gcmd | bit if on else self._gcmd & ~bit
        self._writel(regs.GCMD, self._gcmd)
        if bool(self._readl(regs.GSTS) & bit) != on:
            raise KernelBug(f"the unit does not acknowledge command {bit:#x}")

    def _one_shot(self, bit: int) -> None:
        self._writel(regs.GCMD, self._gcmd | bit)
        if not self._readl(regs.GSTS) & bit:
            raise KernelBug(f"the unit does not acknowledge command {bit:#x}")

    def _readl(self, offset: int) -> int:
        return self._mmio.read(self.base + offset, 4)

    def _writel(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 4, value)

    def _writeq(self, offset: int, value: int) -> None:
        self._mmio.write(self.base + offset, 8, value)

    # -- context entries ---------------------------------------------------------------------------------------------

    def context_address(self, rid: int, allocate: bool) -> int | None:
        """iommu_context_addr(): where the context entry of a source is. None without its table; ENOMEM."""
        index = (self._root >> 3) + (rid >> 8) * 2
        low = self._words[index]
        if low & entries.ENTRY_PRESENT:
            table = low & entries.ADDRESS_MASK
        elif allocate:
            table = self.pages.alloc()
            self._words[index], self._words[index + 1] = entries.root_entry(table)
        else:
            return None
        return table + (rid & 0xFF) * 16

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

    def submit(self, descriptors: Sequence[tuple[int, int]]) -> None:
        """qi_submit_sync(): queue the descriptors and a wait, ring, see that they were carried out."""
        words = self._words
        queue = self._queue >> 3
        head = self._free_head
        for low, high in descriptors:
            index = queue + 2 * head
            words[index] = low
            words[index + 1] = high
            head = (head + 1) % _QI_LENGTH
        status = self._status + 4 * head
        index = queue + 2 * head
        words[index], words[index + 1] = qi.wait(status, _QI_DONE)
        self._free_head = head = (head + 1) % _QI_LENGTH
        self._mmio.write(self._tail_register, 4, head << 4)
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
            address = self._mmio.read(self.base + record, 8)
            self._writel(record + 12, regs.FRCD_F >> 32)
            self.fault_log.append(
                f"DMAR: [DMA {'Read' if high & regs.FRCD_READ else 'Write'} NO_PASID] Request device "
                f"[{sid >> 8:02x}:{sid >> 3 & 31:02x}.{sid & 7}] fault addr {address:#x} "
                f"[fault reason {reason:#04x}] {faults.REASONS.get(reason, 'unknown')}"
            )
            index = (index + 1) % self.caps.fault_records
        self._writel(regs.FSTS, regs.FSTS_PFO | regs.FSTS_PPF)
