"""A whole machine: memory, functions, IOMMUs. `fakedev.machines` has those with names, and those of files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from fakedev.ats import AtsPort
from fakedev.caching import LEAVES, Caching
from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.pci import PciFunction, RootComplex
from fakedev.smmuv3 import regs as smmuv3_regs
from fakedev.smmuv3.regs import Features
from fakedev.smmuv3.unit import SmmuV3
from fakedev.vtd import regs
from fakedev.vtd.unit import VtdUnit

#: Of QEMU 10's intel-iommu with aw-bits=48, caching-mode=on, x-scalable-mode=off, intremap=on.
VTD_LEGACY_CAP = 0x00D2_008C_222F_0686
VTD_LEGACY_ECAP = 0x0000_0000_00F0_0F4A
#: The same with x-scalable-mode=on, which has a second stage only; and with x-flts=on, a first stage only.
VTD_SCALABLE_CAP, VTD_SCALABLE_ECAP = 0x00D2_008C_222F_0686, 0x0000_4800_80F0_0F4A
VTD_FIRST_STAGE_CAP, VTD_FIRST_STAGE_ECAP = 0x01D2_008C_222F_0686, 0x0000_8800_00F0_0F4A
VTD_BASE = 0xFED9_0000
#: Where QEMU's `virt` machine has its SMMU.
SMMU_BASE = 0x0905_0000
#: The doorbell in the registers of an ITS.
GITS_TRANSLATER = 0x1_0040


class Mmio:
    """The registers that the processor reaches by address: `read` and `write` of 4 or 8 bytes."""

    def __init__(self) -> None:
        self._windows: list[tuple[int, int, VtdUnit | SmmuV3]] = []

    def add(self, base: int, unit: VtdUnit | SmmuV3, size: int = regs.WINDOW_SIZE) -> None:
        self._windows.append((base, base + size, unit))

    def read(self, address: int, width: int) -> int:
        """A load. BusAbort where there is no register window."""
        for base, end, unit in self._windows:
            if base <= address < end:
                return unit.read(address - base, width)
        raise BusAbort(address)

    def write(self, address: int, width: int, value: int) -> None:
        """A store; it has taken effect when the call returns. BusAbort where there is no register window."""
        for base, end, unit in self._windows:
            if base <= address < end:
                unit.write(address - base, width, value)
                return
        raise BusAbort(address)


class Machine:
    """A box: `memory`, `mmio`, `root` (the PCI functions), and what the firmware tells about its VT-d units.

    A kernel finds functions in `functions` (by address, ascending) and units in `vtd_units` ([(register base, rids)],
    the DMAR table) and `smmu_units` (the same, of the IORT table); `reserved_memory` ([(start, last, rids)], the
    DMAR table's RMRRs) is what the firmware does DMA to by itself; `atsr_all_ports` lets what is behind any root port
    use ATS. `last_faults` holds the last refused DMAs in words, newest last.
    """

    def __init__(
        self,
        name: str,
        memory: PhysicalMemory | None = None,
        kernel_arguments: str = "",
        *,
        its: int | None = None,
        host_bridge: str = "",
    ) -> None:
        self.name = name
        #: Where a GIC's interrupt translation service has its registers: MSIs are writes to its doorbell.
        self.its = its
        #: What the device tree calls the PCI host bridge; without, its functions are nobody's children.
        self.host_bridge = host_bridge
        #: What the kernel of this machine is told at boot.
        self.kernel_arguments = kernel_arguments.split()
        self.memory = PhysicalMemory() if memory is None else memory
        self.mmio = Mmio()
        if its is None:
            self.root = RootComplex(self.memory)
        else:
            self.root = RootComplex(self.memory, (0, 0), its + GITS_TRANSLATER)
        self.last_faults: deque[str] = deque(maxlen=16)
        #: For tests and tools: the units themselves. A driver uses `mmio`.
        self.units: list[VtdUnit | SmmuV3] = []
        self.vtd_units: list[tuple[int, list[int]]] = []
        self.smmu_units: list[tuple[int, list[int]]] = []
        self.reserved_memory: list[tuple[int, int, list[int]]] = []
        self.atsr_all_ports = False
        self._behind: dict[VtdUnit | SmmuV3, list[int]] = {}
        #: By request id, the properties that the firmware gives a function: "dma-can-stall".
        self.properties: dict[int, frozenset[str]] = {}
        #: Who gets (register base, name) of an SMMU's wired interrupts. The kernel sets it.
        self.wired_sink: Callable[[int, str], None] | None = None
        self.caching = LEAVES

    def set_caching(self, caching: Caching) -> None:
        """How much every cache of the machine keeps from now on. Each machine needs a `Caching` of its own."""
        self.caching = caching
        for unit in self.units:
            unit.set_caching(caching)
        for function in self.functions:
            self._cache_in(function)

    def _cache_in(self, function: PciFunction) -> None:
        function.dma.caching = self.caching
        function.dma.forget()
        if isinstance(function.ats, AtsPort):
            function.ats.tlb.clear()
            self.caching.droppable(function.ats.tlb.clear)

    @property
    def functions(self) -> list[PciFunction]:
        """All functions, in the order of a bus scan."""
        return [function for _, function in sorted(self.root.functions.items())]

    def explain_transfers(self) -> list[str]:
        """In words: how the last transfer of each function was translated, and what the tables say there now."""
        lines = []
        for function in self.functions:
            for what, start, end, pa in function.dma.last_runs():
                text = f"{function.address}: last {what} in iova {start:#x}-{end - 1:#x} went to {pa:#x}"
                walks = [line for unit in self.units for line in unit.explain(function.rid, start)]
                lines.append("\n".join([text, *(f"  {line}" for line in walks)]))
        return lines

    def function(self, address: str) -> PciFunction:
        """The function at "0000:00:10.0". KeyError if there is none."""
        for function in self.root.functions.values():
            if function.address == address:
                return function
        raise KeyError(address)

    def add_vtd(self, base: int = VTD_BASE, cap: int = VTD_LEGACY_CAP, ecap: int = VTD_LEGACY_ECAP) -> VtdUnit:
        """A VT-d unit with its registers at `base`."""
        unit = VtdUnit(
            self.memory,
            cap,
            ecap,
            send_interrupt=self.root.interrupt,
            on_fault=self.last_faults.append,
            downstream=self.root,
            host_address_bits=self.memory.address_bits,
        )
        self.mmio.add(base, unit)
        self.units.append(unit)
        self._behind[unit] = []
        self.vtd_units.append((base, self._behind[unit]))
        return unit

    def add_smmu(self, base: int = SMMU_BASE, features: Features | None = None) -> SmmuV3:
        """An SMMUv3 with its registers at `base`."""

        def wired(name: str) -> None:
            if self.wired_sink is not None:
                self.wired_sink(base, name)

        unit = SmmuV3(
            self.memory,
            features,
            send_interrupt=self.root.interrupt,
            msi_window=self.root.msi_window,
            wired=wired,
            downstream=self.root,
            on_fault=self.last_faults.append,
        )
        self.mmio.add(base, unit, smmuv3_regs.WINDOW_SIZE)
        self.units.append(unit)
        self._behind[unit] = []
        self.smmu_units.append((base, self._behind[unit]))
        return unit

    def add(
        self, function: PciFunction, unit: VtdUnit | SmmuV3 | None = None, properties: Iterable[str] = ()
    ) -> PciFunction:
        """Plug a function in, behind `unit` or behind none; `properties` are what the firmware says of it."""
        self.root.add(function, unit).dma.on_abort = self.last_faults.append
        self._cache_in(function)
        if unit is not None:
            self._behind[unit].append(function.rid)
        self.properties[function.rid] = frozenset(properties)
        return function

    @property
    def tlb_entries(self) -> int:
        """Translations that are cached anywhere in the machine; a leak test compares it."""
        return sum(len(unit.tlb) for unit in self.units)

    @property
    def interrupt_sink(self) -> Callable[[int, int], None] | None:
        """Who gets (address, data) of every MSI. The kernel sets it."""
        return self.root.interrupt_sink

    @interrupt_sink.setter
    def interrupt_sink(self, sink: Callable[[int, int], None] | None) -> None:
        self.root.interrupt_sink = sink

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()
