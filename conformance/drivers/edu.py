"""A driver for QEMU's `edu` device (docs/specs/edu.rst): a factorial unit, interrupts, and a DMA engine.

The engine moves up to 4 KiB between memory and a buffer inside the device, which the CPU cannot see: a copy from
memory to memory is two transfers. On QEMU a transfer takes 100 ms of guest time. A transfer that leaves the buffer
must never be asked for: QEMU logs it and then overruns its own heap.
"""

from __future__ import annotations

import os
import select
import time

from conformance.drivers.vfio import VfioDevice, functions
from uapi.backend import Backend
from uapi.vfio import VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX

VENDOR, DEVICE = 0x1234, 0x11E8
IDENT = 0x010000ED

# Registers of BAR 0. Those below 0x80 take 4-byte accesses only.
REG_ID, REG_LIVENESS, REG_FACTORIAL, REG_STATUS = 0x00, 0x04, 0x08, 0x20
REG_IRQ_STATUS, REG_IRQ_RAISE, REG_IRQ_ACK = 0x24, 0x60, 0x64
REG_DMA_SRC, REG_DMA_DST, REG_DMA_COUNT, REG_DMA_CMD = 0x80, 0x88, 0x90, 0x98
STATUS_COMPUTING, STATUS_IRQ = 0x01, 0x80
DMA_RUN, DMA_TO_MEMORY, DMA_IRQ = 0x1, 0x2, 0x4
#: What the interrupt status register shows after a transfer with DMA_IRQ.
IRQ_OF_DMA = 0x100

#: The device's own buffer, in its own address space.
BUFFER, BUFFER_SIZE = 0x40000, 4096
#: Seconds that one transfer may take. QEMU needs 0.1 of the guest's.
TIMEOUT = 10.0


class EduTimeout(TimeoutError):
    """The device did not finish."""


class Edu:
    """The driver of one bound device. Construction is the probe: memory and bus master on, BAR 0 mapped, id checked."""

    def __init__(self, vfio: VfioDevice) -> None:
        self.vfio = vfio
        vfio.enable()
        self.bar = vfio.map_bar(VFIO_PCI_BAR0_REGION_INDEX)
        ident = self.bar.read(REG_ID, 4)
        if ident & 0xFFFF != IDENT & 0xFFFF:
            raise RuntimeError(f"{vfio.address} is no edu device: {ident:#x}")
        # vfio-pci cannot reset the function, so what an earlier owner left is still there.
        self.wait_dma()
        self.acknowledge(self.bar.read(REG_IRQ_STATUS, 4))
        self._eventfd = -1

    def liveness(self, value: int) -> int:
        """Write the liveness register and read it back: the device inverts every bit."""
        self.bar.write(REG_LIVENESS, 4, value)
        return self.bar.read(REG_LIVENESS, 4)

    def factorial(self, n: int) -> int:
        """n! modulo 2^32."""
        self.bar.write(REG_FACTORIAL, 4, n)
        self._wait(REG_STATUS, 4, STATUS_COMPUTING)
        return self.bar.read(REG_FACTORIAL, 4)

    def raise_irq(self, bits: int) -> None:
        """Set bits in the interrupt status register and signal."""
        self.bar.write(REG_IRQ_RAISE, 4, bits)

    def irq_status(self) -> int:
        return self.bar.read(REG_IRQ_STATUS, 4)

    def acknowledge(self, bits: int) -> None:
        """Clear bits of the interrupt status register."""
        if bits:
            self.bar.write(REG_IRQ_ACK, 4, bits)

    def enable_msi(self) -> int:
        """Have the device's one MSI vector signal a new eventfd: its number. It belongs to this driver."""
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.vfio.signal_on(VFIO_PCI_MSI_IRQ_INDEX, [self._eventfd])
        return self._eventfd

    def start(self, source: int, destination: int, count: int, command: int) -> None:
        """Start a transfer without waiting. Raises ValueError where it would leave the device's buffer."""
        inside = destination if not command & DMA_TO_MEMORY else source
        if not BUFFER <= inside <= inside + count <= BUFFER + BUFFER_SIZE:
            raise ValueError(f"{inside:#x}+{count:#x} leaves the device's buffer")
        self.bar.write(REG_DMA_SRC, 8, source)
        self.bar.write(REG_DMA_DST, 8, destination)
        self.bar.write(REG_DMA_COUNT, 8, count)
        self.bar.write(REG_DMA_CMD, 8, DMA_RUN | command)

    def wait_dma(self) -> None:
        """Wait for the transfer under way, if there is one. Raises EduTimeout."""
        self._wait(REG_DMA_CMD, 8, DMA_RUN)

    def load(self, iova: int, count: int, at: int = 0, flags: int = 0) -> None:
        """DMA from memory at `iova` into the device's buffer at `at`. A refused read leaves zeros there."""
        self.start(iova, BUFFER + at, count, flags)
        self.wait_dma()

    def store(self, iova: int, count: int, at: int = 0, flags: int = 0) -> None:
        """DMA from the device's buffer at `at` to memory at `iova`."""
        self.start(BUFFER + at, iova, count, DMA_TO_MEMORY | flags)
        self.wait_dma()

    def memcpy(self, destination: int, source: int, length: int) -> None:
        """Copy memory by DMA, between two IOVAs, in pieces of the device's buffer."""
        for done in range(0, length, BUFFER_SIZE):
            piece = min(BUFFER_SIZE, length - done)
            self.load(source + done, piece)
            self.store(destination + done, piece)

    def remove(self) -> None:
        """Stop the device. The VFIO device stays open: its owner closes it."""
        self.wait_dma()
        if self._eventfd >= 0:
            self.vfio.disable_irqs(VFIO_PCI_MSI_IRQ_INDEX)
            os.close(self._eventfd)
            self._eventfd = -1
        self.bar.close()

    def _wait(self, register: int, width: int, busy: int) -> None:
        give_up = time.monotonic() + TIMEOUT
        while self.bar.read(register, width) & busy:
            if time.monotonic() > give_up:
                raise EduTimeout(f"register {register:#x} stays busy")
            time.sleep(0.002)


def signals(eventfd: int, timeout: float = 2.0) -> int:
    """How often an eventfd was signalled since it was last read, waiting for a first signal; 0 after `timeout` s."""
    if not select.select([eventfd], [], [], timeout)[0]:
        return 0
    return os.eventfd_read(eventfd)


def edu_functions(kernel: Backend) -> list[str]:
    """Addresses of the edu devices."""
    return functions(kernel, VENDOR, DEVICE)
