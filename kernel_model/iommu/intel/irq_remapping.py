"""Interrupt remapping: an entry of the unit's table for every vector of a PCI function.

Mirrors drivers/iommu/intel/irq_remapping.c at 7.3 as far as MSIs of PCI functions go: the table of 64 Ki entries,
`alloc_irte()`, `modify_irte()` and `clear_entries()` with the flush of the interrupt entry cache after each,
`set_msi_sid()`, messages with a subhandle. Left out: the I/O APIC's and HPET's entries (neither sends messages here),
posted interrupts, affinity, tables of an earlier kernel.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.pci import PciFunction, RootComplex
from fakedev.vtd import descriptors as qi
from fakedev.vtd import irte, regs
from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.irq import MsiDomain

if TYPE_CHECKING:
    from kernel_model.iommu.intel.dmar import IntelUnit

_ENTRIES = 1 << 16
#: INTR_REMAP_TABLE_REG_SIZE: 2 << 15 entries.
_IRTA_SIZE = 0xF


class IrqRemapping(MsiDomain):
    """`struct ir_table` of one unit, and the domain that it is to the functions behind the unit."""

    multi = True

    def __init__(self, unit: IntelUnit, root: RootComplex, extended: bool) -> None:
        self._unit = unit
        self._root = root
        self._extended = extended
        self._words = unit.memory.words
        self._table = unit.pages.alloc(_ENTRIES * irte.ENTRY_BYTES)
        #: Allocations: the first entry -> (log2 of the entries, the source that may use them: SVT, SID).
        self.allocated: dict[int, tuple[int, int, int]] = {}

    def enable(self) -> None:
        """iommu_set_irq_remapping() and iommu_enable_irq_remapping(): on, and no message of the old format passes."""
        unit = self._unit
        unit.write_irta(self._table | (regs.IRTA_EIME if self._extended else 0) | _IRTA_SIZE)
        unit.one_shot(regs.SIRTP)
        if not unit.caps.enhanced_interrupt_pointer:
            unit.submit([qi.interrupt_entries()])
        unit.command(regs.IRE, on=True)
        unit.command(regs.CFI, on=False)

    # -- irq_domain_ops ----------------------------------------------------------------------------------------------

    def alloc(self, function: PciFunction, count: int) -> int:
        """alloc_irte(): a power of two of entries, aligned to itself. ENOMEM, where Linux finds no entry, too."""
        if injecting:
            kmalloc("struct intel_ir_data")
        order = (count - 1).bit_length()
        if order > self._unit.caps.handle_mask_max:
            raise KernelError(errno.ENOMEM, f"{count} entries are more than one invalidation can name")
        taken = sorted((first, first + (1 << lg2)) for first, (lg2, _, _) in self.allocated.items())
        index = 0
        for first, beyond in taken:
            if index + (1 << order) <= first:
                break
            index = beyond + (1 << order) - 1 & -(1 << order)
        if index + (1 << order) > _ENTRIES:
            raise KernelError(errno.ENOMEM, "the interrupt remapping table is full")
        self.allocated[index] = (order, *self._source(function))
        return index

    def compose(self, allocation: int, first: int) -> tuple[int, int]:
        """fill_msi_msg(): the function puts the position of a vector into the data, which is the subhandle."""
        return irte.message(allocation, 0)

    def activate(self, allocation: int, position: int, vector: int) -> None:
        _, svt, sid = self.allocated[allocation]
        self._modify(allocation + position, irte.entry(vector, 0, sid, svt=svt, extended=self._extended))

    def deactivate(self, allocation: int, position: int) -> None:
        self._modify(allocation + position, (0, 0))

    def free(self, allocation: int) -> None:
        """clear_entries()."""
        order, _, _ = self.allocated.pop(allocation)
        for index in range(allocation, allocation + (1 << order)):
            self._store(index, (0, 0))
        self._unit.submit([qi.interrupt_entries(allocation, order)])

    # -- entries -----------------------------------------------------------------------------------------------------

    def _source(self, function: PciFunction) -> tuple[int, int]:
        """set_msi_sid(): SVT and SID. Behind a bridge that takes requests over, only the buses can be told."""
        alias, bus = self._root.requester_id(function), function.rid >> 8
        if alias != function.rid:
            return irte.SVT_BUS, alias >> 8 << 8 | bus
        return irte.SVT_SID, function.rid

    def _modify(self, index: int, entry: tuple[int, int]) -> None:
        self._store(index, entry)
        self._unit.submit([qi.interrupt_entries(index)])

    def _store(self, index: int, entry: tuple[int, int]) -> None:
        at = (self._table + index * irte.ENTRY_BYTES) >> 3
        self._words[at], self._words[at + 1] = entry
