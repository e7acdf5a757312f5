"""Interrupts: who is called when a device sends a message or raises its line.

Stands for what kernel/irq, the MSI domains and the I/O APIC do together for a PCI driver: `pci_alloc_irq_vectors()`,
`request_irq()` and their opposites. A function's messages are its MSI domain's (`MsiDomain`): on a PC they go to the
processor, as arch/x86/kernel/apic/{msi,vector}.c would have it, or name an entry of the IOMMU's table. With a GIC they
go to the doorbell of its translation service (drivers/irqchip/irq-gic-v3-its.c), each function counting its events from
0; the doorbell is memory that the IOMMU translates, so the domain of the device must map it. INTx handlers are found by
function. Handlers run inside the store that caused the interrupt.

A vector's message is in the function while the vector is active: from its allocation until its handler goes, and again
from the next one. In between the function has a message of zeros, with MSI on: what it sends then is a DMA to 0.

Left out: MSI-X, shared lines (a line belongs to one function), affinity, spurious interrupts, messages that are no
interrupt for a handler (SMI, NMI, INIT: they are dropped), the translation service's own tables and commands.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from fakedev.machine import Machine
from fakedev.pci import (
    PCI_COMMAND,
    PCI_COMMAND_INTX_DISABLE,
    PCI_INTERRUPT_LINE,
    PCI_INTERRUPT_PIN,
    PCI_MSI_ADDRESS_HI,
    PCI_MSI_ADDRESS_LO,
    PCI_MSI_FLAGS,
    PCI_MSI_FLAGS_ENABLE,
    PCI_MSI_FLAGS_QSIZE,
    PciFunction,
)
from kernel_model.errors import KernelBug, KernelError

#: Where messages go (Intel SDM volume 3, 12.11.1); bits 19:12 are the number of the processor's APIC, which is 0.
MSI_ADDRESS = 0xFEE0_0000
_DESTINATION_SHIFT, _DESTINATION_MASK, _EVERYBODY, _LOGICAL = 12, 0xFF, 0xFF, 1 << 2
_VECTOR_MASK, _DELIVERY_SHIFT, _DELIVERY_MASK = 0xFF, 8, 7
#: Vectors that functions get, as many as a processor has to give.
VECTORS = range(0x40, 0xEC)
#: The numbers that a GIC gives to messages.
LPIS = range(8192, 1 << 16)
#: The first number that an Arm board's kernel has left for a function's line when it has booted.
FIRST_LINE = 21
_PCI_MSI_DATA_64 = 12

Handler = Callable[[], None]


class MsiDomain:
    """The parent of a function's MSI domain: what turns vectors into messages. This one has them sent as they are.

    A function's vectors are allocated together and known by a number from then on; each is activated and deactivated
    by its position among them. Mirrors `struct irq_domain_ops`, of x86_vector_domain here.
    """

    #: MSI_FLAG_MULTI_PCI_MSI: a function may have more than one vector.
    multi = False

    def alloc(self, function: PciFunction, count: int) -> int:
        """Make room for that many vectors; the number of the allocation. ENOSPC, ENOMEM."""
        return 0

    def compose(self, allocation: int, first: int) -> tuple[int, int]:
        """The (address, data) that the function is to send; `first` is its first vector."""
        return MSI_ADDRESS, first

    def activate(self, allocation: int, position: int, vector: int) -> None:
        """From now on the message leads to `vector`."""

    def deactivate(self, allocation: int, position: int) -> None:
        """From now on the message leads nowhere."""

    def free(self, allocation: int) -> None:
        """Give the room back."""


@dataclass
class _Allocated:
    """The vectors of a function."""

    function: PciFunction
    domain: MsiDomain
    number: int
    vectors: list[int]
    #: Positions of those whose message leads somewhere.
    active: set[int]
    #: Of those that were raised while nobody had asked for them: IRQS_PENDING, on Arm a LPI that is pending.
    pending: set[int]


class Interrupts:
    """The interrupts of a PC; `interrupts_of` makes those of any machine."""

    _numbers = VECTORS

    def __init__(self, machine: Machine) -> None:
        self._handlers: dict[int, Handler] = {}
        self._lines: dict[int, Handler] = {}
        self._vectors: dict[int, _Allocated] = {}
        #: By vector, who has it: a function's vectors and the position among them.
        self._owners: dict[int, tuple[_Allocated, int]] = {}
        self._default = MsiDomain()
        self._domains: dict[int, MsiDomain] = {}
        #: Numbers of functions' lines: the firmware of a PC has written them into the functions.
        self._irqs = {function.rid: function.config[PCI_INTERRUPT_LINE] for function in machine.functions}
        machine.root.interrupt_sink = self._message
        machine.root.intx_sink = self._line

    # -- message signalled -------------------------------------------------------------------------------------------

    def set_msi_domain(self, function: PciFunction, domain: MsiDomain) -> None:
        """dev_set_msi_domain(): the function's messages go through `domain`, and not straight to the processor."""
        self._domains[function.rid] = domain

    def pci_alloc_irq_vectors(self, function: PciFunction, wanted: int) -> int:
        """Turn MSI on with up to `wanted` vectors; how many there are.

        ERANGE: none is wanted. ENOSPC: the function has no MSI, no vector is left, the domain has no room,
        or the function's IOMMU domain does not let it reach the doorbell.
        """
        if wanted < 1:
            raise KernelError(errno.ERANGE, "no vector is wanted")
        msi = function.msi
        if msi is None:
            raise KernelError(errno.ENOSPC, "the function has no MSI")
        if function.rid in self._vectors:
            raise KernelBug("MSI is on already")
        domain = self._domains.get(function.rid, self._default)
        count = min(wanted, msi.vectors) if domain.multi else 1
        free = list(islice((vector for vector in self._numbers if vector not in self._owners), count))
        if len(free) < count:
            raise KernelError(errno.ENOSPC, "no vector is left")
        try:
            try:
                number = domain.alloc(function, count)
            except KernelError:  # msi_handle_pci_fail() has many tried again as one
                if count == 1:
                    raise
                count = 1
                del free[1:]
                number = domain.alloc(function, 1)
        except KernelError as error:
            raise KernelError(errno.ENOSPC, error.why) from error
        owned = _Allocated(function, domain, number, free, set(), set())
        self._vectors[function.rid] = owned
        self._owners.update({vector: (owned, position) for position, vector in enumerate(owned.vectors)})
        for position in range(count):
            self._activate(owned, position)
        flags = function.config_read(msi.offset + PCI_MSI_FLAGS, 2) & ~PCI_MSI_FLAGS_QSIZE
        pci_intx(function, False)
        enabled_lg2 = (count - 1).bit_length()  # a function is given a power of two
        function.config_write(msi.offset + PCI_MSI_FLAGS, 2, flags | enabled_lg2 << 4 | PCI_MSI_FLAGS_ENABLE)
        return count

    def pci_free_irq_vectors(self, function: PciFunction) -> None:
        """Turn MSI off. Every handler must have gone."""
        msi = function.msi
        assert msi is not None
        owned = self._vectors.pop(function.rid)
        if any(vector in self._handlers for vector in owned.vectors):
            raise KernelBug("a vector is freed under its handler")
        flags = function.config_read(msi.offset + PCI_MSI_FLAGS, 2)
        function.config_write(msi.offset + PCI_MSI_FLAGS, 2, flags & ~(PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE))
        pci_intx(function, True)
        for position, vector in enumerate(owned.vectors):
            self._deactivate(owned, position)
            del self._owners[vector]
        owned.domain.free(owned.number)

    def pci_irq_vector(self, function: PciFunction, index: int) -> int:
        """The interrupt number of a vector. EINVAL: the function has fewer."""
        owned = self._vectors.get(function.rid)
        vectors = [] if owned is None else owned.vectors
        if index >= len(vectors):
            raise KernelError(errno.EINVAL, f"vector {index} of {len(vectors)}")
        return vectors[index]

    def _activate(self, owned: _Allocated, position: int) -> None:
        if position not in owned.active:
            owned.active.add(position)
            owned.domain.activate(owned.number, position, owned.vectors[position])
            if not position:
                self._write_message(owned.function, *owned.domain.compose(owned.number, owned.vectors[0]))

    def _deactivate(self, owned: _Allocated, position: int) -> None:
        if position in owned.active:
            owned.active.remove(position)
            if not position:
                self._write_message(owned.function, 0, 0)  # msi_domain_deactivate() leaves no message
            owned.domain.deactivate(owned.number, position)

    def _write_message(self, function: PciFunction, address: int, data: int) -> None:
        """pci_write_msg_msi(): all vectors of a function share one message, which is its first vector's."""
        assert function.msi is not None
        cap = function.msi.offset
        function.config_write(cap + PCI_MSI_ADDRESS_LO, 4, address & 0xFFFF_FFFF)
        function.config_write(cap + PCI_MSI_ADDRESS_HI, 4, address >> 32)
        function.config_write(cap + _PCI_MSI_DATA_64, 2, data)

    def request_irq(self, vector: int, handler: Handler) -> None:
        """Have `handler` called for a vector; now, if it was raised since it is there (`check_irq_resend()`)."""
        if vector in self._handlers:
            raise KernelBug(f"vector {vector} has a handler")
        self._handlers[vector] = handler
        if vector in self._owners:
            owned, position = self._owners[vector]
            self._activate(owned, position)
            if position in owned.pending:
                owned.pending.remove(position)
                handler()

    def free_irq(self, vector: int) -> None:
        del self._handlers[vector]
        if vector in self._owners:
            self._deactivate(*self._owners[vector])

    def _raise(self, vector: int) -> None:
        """Call the handler, or note for the first who asks that this came (`handle_edge_irq()`)."""
        handler = self._handlers.get(vector)
        if handler is not None:
            handler()
        elif vector in self._owners:
            owned, position = self._owners[vector]
            if position in owned.active:
                owned.pending.add(position)

    def _message(self, address: int, data: int) -> None:
        destination = address >> _DESTINATION_SHIFT & _DESTINATION_MASK | address >> 32 & ~_DESTINATION_MASK
        mine = destination & 1 if address & _LOGICAL else destination in (0, _EVERYBODY)
        if mine and data >> _DELIVERY_SHIFT & _DELIVERY_MASK in (0, 1):  # fixed, lowest priority
            self._raise(data & _VECTOR_MASK)

    # -- lines -------------------------------------------------------------------------------------------------------

    def irq(self, function: PciFunction) -> int:
        """The number of a function's line, 0 without."""
        return self._irqs.get(function.rid, 0)

    def pci_assign_irq(self, function: PciFunction) -> None:
        """A driver is about to take the function: its line gets a number, where the firmware gave it none."""

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


class _ItsDomain(MsiDomain):
    """Messages to a GIC's doorbell. `prepare` is `iommu_dma_prepare_msi()`: where a function writes to reach it.

    As in `its_irq_domain_alloc()` of 7.3, events that were taken before it refuses are never given back: a function
    with one vector that asked once where its domain maps no doorbell gets ENOSPC from then on.
    """

    multi = True

    def __init__(self, doorbell: int, prepare: Callable[[PciFunction, int], int]) -> None:
        self._doorbell = doorbell
        self._prepare = prepare
        #: By request id: where the function writes, and its first event.
        self._messages: dict[int, tuple[int, int]] = {}
        #: How many events of a function are lost.
        self._lost: dict[int, int] = {}

    def alloc(self, function: PciFunction, count: int) -> int:
        rid, block = function.rid, 1 << (count - 1).bit_length()
        first = -(-self._lost.get(rid, 0) // block) * block
        if function.msi is None or first + block > function.msi.vectors:
            raise KernelError(errno.ENOSPC, "the function has no event left")
        try:
            self._messages[rid] = self._prepare(function, self._doorbell), first
        except KernelError:
            self._lost[rid] = first + block
            raise
        return rid

    def compose(self, allocation: int, first: int) -> tuple[int, int]:
        return self._messages[allocation]

    def free(self, allocation: int) -> None:
        del self._messages[allocation]

    def position(self, rid: int, event: int) -> int:
        """Which of the function's vectors an event is; negative for none."""
        message = self._messages.get(rid)
        return -1 if message is None else event - message[1]


class GicInterrupts(Interrupts):
    """The interrupts of a machine with a GICv3 and its translation service."""

    _numbers = LPIS

    def __init__(self, machine: Machine, prepare: Callable[[PciFunction, int], int]) -> None:
        super().__init__(machine)
        self._default = self._its = _ItsDomain(machine.root.doorbell, prepare)
        machine.root.doorbell_sink = self._translate
        #: Numbers of the four wires that the slots' pins share.
        self._wires: dict[int, int] = {}

    def pci_assign_irq(self, function: PciFunction) -> None:
        pin = function.config[PCI_INTERRUPT_PIN]
        if pin and not self.irq(function):
            wire = (function.rid >> 3) + pin - 1 & 3
            irq = self._irqs[function.rid] = self._wires.setdefault(wire, FIRST_LINE + len(self._wires))
            function.config_write(PCI_INTERRUPT_LINE, 1, irq)

    def _translate(self, rid: int, event: int) -> None:
        """What the translation service does with a write of the function that has this request id."""
        owned, position = self._vectors.get(rid), self._its.position(rid, event)
        if owned is not None and position in owned.active:
            self._raise(owned.vectors[position])


def interrupts_of(machine: Machine, prepare: Callable[[PciFunction, int], int]) -> Interrupts:
    """The interrupts of a machine: a GIC's if it has a translation service, else a PC's."""
    return Interrupts(machine) if machine.its is None else GicInterrupts(machine, prepare)


def pci_intx(function: PciFunction, enable: bool) -> None:
    """pci_intx(): let the function's line through, or keep it back, by the command register."""
    command = function.config_read(PCI_COMMAND, 2)
    wanted = command & ~PCI_COMMAND_INTX_DISABLE if enable else command | PCI_COMMAND_INTX_DISABLE
    if wanted != command:
        function.config_write(PCI_COMMAND, 2, wanted)
