"""Interrupts: who is called when a device sends a message or raises its line.

Stands for what kernel/irq, the MSI domains and the I/O APIC do together for a PCI driver: `pci_alloc_irq_vectors()`,
`request_irq()` and their opposites. On a PC every MSI vector has data of its own, and all go to one address in the
processor's interrupt window. With a GIC they go to the doorbell of its translation service (drivers/irqchip/
irq-gic-v3-its.c), each function counting its events from 0; the doorbell is memory that the IOMMU translates, so the
domain of the device must map it. INTx handlers are found by function. Handlers run inside the store that caused the
interrupt.

Left out: MSI-X, shared lines (a line belongs to one function), affinity, spurious interrupts, the translation
service's own tables and commands.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fakedev.machine import Machine
from fakedev.pci import (
    PCI_COMMAND,
    PCI_COMMAND_INTX_DISABLE,
    PCI_INTERRUPT_PIN,
    PCI_MSI_ADDRESS_HI,
    PCI_MSI_ADDRESS_LO,
    PCI_MSI_FLAGS,
    PCI_MSI_FLAGS_ENABLE,
    PCI_MSI_FLAGS_QSIZE,
    PciFunction,
)
from kernel_model.errors import KernelBug, KernelError

#: Where messages go (Intel SDM volume 3, 12.11.1), and the data of the first vector.
MSI_ADDRESS = 0xFEE0_0000
FIRST_VECTOR = 0x40
#: The first number that a GIC gives to messages.
FIRST_LPI = 8192
_PCI_MSI_DATA_64 = 12

Handler = Callable[[], None]


class Interrupts:
    """The interrupts of a PC; `interrupts_of` makes those of any machine."""

    _first = FIRST_VECTOR

    def __init__(self, machine: Machine) -> None:
        self._handlers: dict[int, Handler] = {}
        self._lines: dict[int, Handler] = {}
        self._vectors: dict[int, range] = {}
        machine.root.interrupt_sink = self._message
        machine.root.intx_sink = self._line

    def _doorbell(self, function: PciFunction) -> int:
        """Where the function sends its messages."""
        return MSI_ADDRESS

    def _event(self, vector: int) -> int:
        """The data of the first vector of a function's."""
        return vector

    # -- message signalled -------------------------------------------------------------------------------------------

    def pci_alloc_irq_vectors(self, function: PciFunction, wanted: int) -> int:
        """Turn MSI on with up to `wanted` vectors; how many there are.

        ERANGE: none is wanted. ENOSPC: the function has no MSI, or its domain does not let it reach the doorbell.
        """
        if wanted < 1:
            raise KernelError(errno.ERANGE, "no vector is wanted")
        msi = function.msi
        if msi is None:
            raise KernelError(errno.ENOSPC, "the function has no MSI")
        if function.rid in self._vectors:
            raise KernelBug("MSI is on already")
        count = min(wanted, msi.vectors)
        doorbell = self._doorbell(function)
        enabled_lg2 = (count - 1).bit_length()
        block = 1 << enabled_lg2  # a function is given a power of two, and data aligned to it
        first = self._first
        for taken in sorted(self._vectors.values(), key=lambda span: span.start):
            if first + block <= taken.start:
                break
            first = -(-taken.stop // block) * block
        self._vectors[function.rid] = range(first, first + count)
        cap = msi.offset
        function.config_write(cap + PCI_MSI_ADDRESS_LO, 4, doorbell & 0xFFFF_FFFF)
        function.config_write(cap + PCI_MSI_ADDRESS_HI, 4, doorbell >> 32)
        function.config_write(cap + _PCI_MSI_DATA_64, 2, self._event(first))
        flags = function.config_read(cap + PCI_MSI_FLAGS, 2) & ~PCI_MSI_FLAGS_QSIZE
        pci_intx(function, False)
        function.config_write(cap + PCI_MSI_FLAGS, 2, flags | enabled_lg2 << 4 | PCI_MSI_FLAGS_ENABLE)
        return count

    def pci_free_irq_vectors(self, function: PciFunction) -> None:
        """Turn MSI off. Every handler must have gone."""
        msi = function.msi
        assert msi is not None
        if any(vector in self._handlers for vector in self._vectors.pop(function.rid)):
            raise KernelBug("a vector is freed under its handler")
        flags = function.config_read(msi.offset + PCI_MSI_FLAGS, 2)
        function.config_write(msi.offset + PCI_MSI_FLAGS, 2, flags & ~(PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE))
        for offset, width in ((PCI_MSI_ADDRESS_LO, 4), (PCI_MSI_ADDRESS_HI, 4), (_PCI_MSI_DATA_64, 2)):
            function.config_write(msi.offset + offset, width, 0)  # msi_domain_deactivate() leaves no message
        pci_intx(function, True)

    def pci_irq_vector(self, function: PciFunction, index: int) -> int:
        """The interrupt number of a vector. EINVAL: the function has fewer."""
        vectors = self._vectors.get(function.rid, range(0))
        if index >= len(vectors):
            raise KernelError(errno.EINVAL, f"vector {index} of {len(vectors)}")
        return vectors[index]

    def request_irq(self, vector: int, handler: Handler) -> None:
        if vector in self._handlers:
            raise KernelBug(f"vector {vector} has a handler")
        self._handlers[vector] = handler

    def free_irq(self, vector: int) -> None:
        del self._handlers[vector]

    def _message(self, address: int, data: int) -> None:
        handler = self._handlers.get(data) if address == MSI_ADDRESS else None
        if handler is not None:
            handler()

    # -- lines -------------------------------------------------------------------------------------------------------

    def request_intx(self, function: PciFunction, handler: Handler) -> None:
        """Have `handler` called while the function asserts its line. ENODEV: it has no interrupt pin."""
        if not function.config[PCI_INTERRUPT_PIN]:
            raise KernelError(errno.ENODEV, "the function has no interrupt pin")
        self._lines[function.rid] = handler
        self._line(function)

    def free_intx(self, function: PciFunction) -> None:
        del self._lines[function.rid]

    def _line(self, function: PciFunction) -> None:
        handler = self._lines.get(function.rid)
        if handler is not None and function.intx_asserted:
            handler()


class GicInterrupts(Interrupts):
    """The interrupts of a machine with a GICv3 and its translation service.

    `prepare` is `iommu_dma_prepare_msi()`: where a function writes to reach a doorbell.
    """

    _first = FIRST_LPI

    def __init__(self, machine: Machine, prepare: Callable[[PciFunction, int], int]) -> None:
        super().__init__(machine)
        self._root = machine.root
        self._prepare = prepare
        machine.root.doorbell_sink = self._translate

    def _doorbell(self, function: PciFunction) -> int:
        try:
            return self._prepare(function, self._root.doorbell)
        except KernelError as error:  # msi_handle_pci_fail()
            raise KernelError(errno.ENOSPC, f"no doorbell: {error.strerror}") from error

    def _event(self, vector: int) -> int:
        return 0

    def _translate(self, rid: int, event: int) -> None:
        """What the translation service does with a write of the function that has this request id."""
        vectors = self._vectors.get(rid, range(0))
        handler = self._handlers.get(vectors[event]) if event < len(vectors) else None
        if handler is not None:
            handler()


def interrupts_of(machine: Machine, prepare: Callable[[PciFunction, int], int]) -> Interrupts:
    """The interrupts of a machine: a GIC's if it has a translation service, else a PC's."""
    return Interrupts(machine) if machine.its is None else GicInterrupts(machine, prepare)


def pci_intx(function: PciFunction, enable: bool) -> None:
    """pci_intx(): let the function's line through, or keep it back, by the command register."""
    command = function.config_read(PCI_COMMAND, 2)
    wanted = command & ~PCI_COMMAND_INTX_DISABLE if enable else command | PCI_COMMAND_INTX_DISABLE
    if wanted != command:
        function.config_write(PCI_COMMAND, 2, wanted)
