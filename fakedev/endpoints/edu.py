"""QEMU's educational device `edu` (1234:11e8): a factorial unit, an interrupt register, a DMA engine with a buffer.

Mirrors hw/misc/edu.c of QEMU 10 and docs/specs/edu.rst, with `dma_mask` all ones: the registers, the access widths,
what a read of a hole gives. Where QEMU takes time, the model does not: a factorial is there at once, and a DMA is done
when the store that started it returns, so the busy bits are never seen set.

One difference, on purpose: a transfer that would leave the device's buffer is dropped (its run bit clears and its
interrupt comes, no byte moves). QEMU logs it as a guest error and then copies beyond its own buffer.

A DMA goes out in pieces that do not cross 4 KiB, as requests on the bus do: a piece that is refused reads as zeros, or
is not written, and the others are carried out. The device has no status for it. While a piece waits in the IOMMU the
run bit stays set, and stores to the DMA registers are ignored, as QEMU ignores them while it runs.
"""

from __future__ import annotations

from functools import partial

from fakedev.dma import DmaAbort, Outcome, Parked
from fakedev.pci import Bar, PciFunction

BAR_SIZE = 1 << 20
IDENT = 0x010000ED

REG_ID, REG_LIVENESS, REG_FACTORIAL, REG_STATUS, REG_IRQ_STATUS = 0x00, 0x04, 0x08, 0x20, 0x24
REG_IRQ_RAISE, REG_IRQ_ACK = 0x60, 0x64
REG_DMA_SRC, REG_DMA_DST, REG_DMA_COUNT, REG_DMA_CMD = 0x80, 0x88, 0x90, 0x98
STATUS_IRQFACT = 0x80
FACT_IRQ, DMA_IRQ = 0x001, 0x100
DMA_RUN, DMA_TO_PCI, DMA_CMD_IRQ = 1, 2, 4
DMA_START, DMA_SIZE = 0x40000, 4096

_WORD = 0xFFFF_FFFF
_DMA_REGISTERS = (REG_DMA_SRC, REG_DMA_DST, REG_DMA_COUNT, REG_DMA_CMD)


class EduBar(Bar):
    """The registers."""

    def __init__(self, device: Edu) -> None:
        super().__init__(BAR_SIZE)
        self._device = device

    def read(self, offset: int, width: int) -> int:
        if width < 4 or offset % width:
            return 0  # QEMU's bus refuses it, and the processor gets zeros
        return self._device.load(offset, width) & (1 << 8 * width) - 1

    def write(self, offset: int, width: int, value: int) -> None:
        if width >= 4 and offset % width == 0:
            self._device.store(offset, width, value)


class Edu(PciFunction):
    """The function. `buffer` is the device's own memory, which the processor cannot see."""

    def __init__(
        self, address: str, bar_address: int = 0, interrupt_line: int = 0, command: int = 0, header_type: int = 0
    ) -> None:
        super().__init__(
            address,
            (0x1234, 0x11E8),
            0x00FF00,
            revision=0x10,
            header_type=header_type,
            subsystem=(0x1AF4, 0x1100),
            bars=[EduBar(self)],
            addresses=[bar_address],
            interrupt_pin=1,
            interrupt_line=interrupt_line,
            command=command,
        )
        self.add_msi(0x40)
        self.buffer = bytearray(DMA_SIZE)
        # QEMU gives `edu` no reset handler: these outlive a reset of the bus.
        self.liveness = 0
        self.factorial = 0
        self.status = 0
        self.irq_status = 0
        self.dma_registers = dict.fromkeys(_DMA_REGISTERS, 0)
        #: While a piece of a transfer waits in the IOMMU.
        self.waiting: Parked | None = None

    def load(self, offset: int, width: int) -> int:
        """A load of 4 or 8 bytes; all ones where there is no register of that width."""
        if offset < 0x80 and width == 4:
            if offset == REG_ID:
                return IDENT
            if offset == REG_LIVENESS:
                return self.liveness
            if offset == REG_FACTORIAL:
                return self.factorial
            if offset == REG_STATUS:
                return self.status
            if offset == REG_IRQ_STATUS:
                return self.irq_status
        return self.dma_registers.get(offset, -1) if offset >= 0x80 else -1

    def store(self, offset: int, width: int, value: int) -> None:
        """A store of 4 or 8 bytes (a DMA register takes either; the upper half of a 4-byte store is zero)."""
        if offset >= 0x80:
            if self.waiting is not None:
                pass
            elif offset == REG_DMA_CMD:
                if value & DMA_RUN:
                    self.dma_registers[REG_DMA_CMD] = value
                    self._run_dma()
            elif offset in self.dma_registers:
                self.dma_registers[offset] = value
        elif width != 4:
            return
        elif offset == REG_LIVENESS:
            self.liveness = ~value & _WORD
        elif offset == REG_FACTORIAL:
            self._compute(value)
        elif offset == REG_STATUS:
            self.status = value & STATUS_IRQFACT
        elif offset == REG_IRQ_RAISE:
            self._raise(value)
        elif offset == REG_IRQ_ACK:
            self._lower(value)

    def _compute(self, value: int) -> None:
        result = 1
        while value and result:  # 2^32 divides 34!, and every later one
            result = result * value & _WORD
            value -= 1
        self.factorial = result
        if self.status & STATUS_IRQFACT:
            self._raise(FACT_IRQ)

    def _raise(self, bits: int) -> None:
        self.irq_status |= bits
        if self.irq_status:
            if self.msi is not None and self.msi.enabled:
                self.msi.notify()
            else:
                self.set_intx(True)

    def _lower(self, bits: int) -> None:
        self.irq_status &= ~bits
        if not self.irq_status and not (self.msi is not None and self.msi.enabled):
            self.set_intx(False)

    def _run_dma(self) -> None:
        registers = self.dma_registers
        command, count = registers[REG_DMA_CMD], registers[REG_DMA_COUNT]
        source, target = registers[REG_DMA_SRC], registers[REG_DMA_DST]
        inside, outside = (source, target) if command & DMA_TO_PCI else (target, source)
        start = inside - DMA_START
        if start < 0 or start + count > DMA_SIZE:
            count = 0
        self._move(outside, start, count)

    def _move(self, outside: int, start: int, count: int) -> None:
        """Move the rest of a transfer, and finish it unless a piece has to wait."""
        command = self.dma_registers[REG_DMA_CMD]
        while count:
            piece = min(count, 4096 - (outside & 4095))
            try:
                self._transfer(outside, start, piece, command & DMA_TO_PCI)
            except Parked as parked:
                self.waiting = parked
                parked.then(partial(self._resume, outside, start, count, piece))
                return
            outside = outside + piece & (1 << 64) - 1
            start += piece
            count -= piece
        self.dma_registers[REG_DMA_CMD] = command & ~DMA_RUN
        if command & DMA_CMD_IRQ:
            self._raise(DMA_IRQ)

    def _resume(self, outside: int, start: int, count: int, piece: int, outcome: Outcome) -> None:
        self.waiting = None
        if outcome != Outcome.RETRY:
            if not self.dma_registers[REG_DMA_CMD] & DMA_TO_PCI:
                self.buffer[start : start + piece] = bytes(piece)
            outside, start, count = outside + piece & (1 << 64) - 1, start + piece, count - piece
        self._move(outside, start, count)

    def _transfer(self, address: int, start: int, length: int, to_pci: int) -> None:
        end = start + length
        if to_pci:
            try:
                self.dma.write(address, self.buffer[start:end])
            except DmaAbort:
                pass
        else:
            try:
                self.buffer[start:end] = self.dma.read(address, length)
            except DmaAbort:
                self.buffer[start:end] = bytes(length)
