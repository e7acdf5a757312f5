"""A driver for a DMA engine in the manner of Intel DSA (8086:0b25): work queues, descriptors, completion records.

After the DSA architecture specification (341204) and drivers/dma/idxd, as far as a client of VFIO gets: what needs the
configuration space (PASID, ATS, page requests) is on or off as the host's IOMMU driver likes. A dedicated queue sends
all its requests with the queue's PASID, or without one. A descriptor moves, fills or compares memory and writes a
completion record of 32 bytes; one that may block on a fault waits for the page, or its own record, as long as it takes.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

from conformance.drivers.vfio import VfioDevice, functions
from uapi.backend import Backend, Buffer
from uapi.vfio import VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX

VENDOR, DEVICE = 0x8086, 0x0B25

# Registers of BAR 0; BAR 2 has four portal pages a queue.
REG_VERSION, REG_OFFSETS, REG_GENSTS, REG_CMD, REG_CMDSTS, REG_SWERR = 0x00, 0x60, 0x90, 0xA0, 0xA8, 0xC0
CMD_ENABLE, CMD_RESET, CMD_ENABLE_WQ, CMD_DISABLE_WQ, CMD_ABORT_PASID = 1, 5, 6, 7, 12
CMD_SHIFT, CMDSTS_ACTIVE = 20, 1 << 31
WQCFG_SIZE, PORTAL = 64, 0x4000
WQ_DEDICATED, WQ_BLOCK, WQ_NO_ATS, WQ_NO_PRS = 1, 2, 4, 8
WQ_PASID_SHIFT, WQ_PASID_EN, WQ_PRIVILEGED = 8, 1 << 28, 1 << 29
#: Up to 2 MiB in one descriptor, 32 descriptors in a batch.
LIMITS = 21 | 5 << 5

MOVE, FILL, COMPARE = 3, 4, 5
BLOCK_ON_FAULT, RECORD_VALID, RECORD_WANTED = 0x2, 0x4, 0x8
SUCCESS, PAGE_FAULT, REFUSED_PAGE, HARDWARE, TRANSLATION = 0x01, 0x03, 0x04, 0x20, 0x22
#: In a status: what failed was a write.
ON_WRITE = 0x80
#: Descriptors that a queue holds, and completion records of one.
SLOTS = 16
#: Seconds that a command or a descriptor may take.
TIMEOUT = 10.0


class DsaError(Exception):
    """The device refused a command: the error code of CMDSTS."""

    def __init__(self, code: int) -> None:
        super().__init__(f"command error {code:#x}")
        self.code = code


class Completion(NamedTuple):
    """A completion record: status, result (of COMPARE, 1: they differ), bytes done, and where it faulted."""

    status: int
    result: int
    done: int
    address: int


class Dsa:
    """The driver of one bound device. Construction resets and enables the engine; a queue sends nothing before it is
    configured."""

    def __init__(self, vfio: VfioDevice) -> None:
        self.vfio = vfio
        self.closed = False
        vfio.enable()
        self.bar = vfio.map_bar(VFIO_PCI_BAR0_REGION_INDEX)
        self.portals = vfio.map_bar(VFIO_PCI_BAR2_REGION_INDEX)
        if not self.bar.read(REG_VERSION, 4) & 0x100:
            raise RuntimeError(f"{vfio.address} is no DSA 1.0")
        self._wqcfg = (self.bar.read(REG_OFFSETS, 4) >> 16) * 0x100
        self.restart()

    def restart(self) -> None:
        """Reset the engine, which forgets its queues and what they had to do, and enable it."""
        self.vfio.enable()
        self.command(CMD_RESET)
        self.command(CMD_ENABLE)

    def command(self, number: int, operand: int = 0) -> None:
        """Give a command and wait for it. Raises DsaError, TimeoutError."""
        self.bar.write(REG_CMD, 4, number << CMD_SHIFT | operand)
        give_up = time.monotonic() + TIMEOUT
        while (status := self.bar.read(REG_CMDSTS, 4)) & CMDSTS_ACTIVE:
            if time.monotonic() > give_up:
                raise TimeoutError(f"command {number} does not end")
            time.sleep(0.002)
        if status & 0xFF:
            raise DsaError(status & 0xFF)

    def queue(self, index: int = 0, pasid: int | None = None, flags: int = WQ_BLOCK) -> Queue:
        """Configure a dedicated queue and enable it; `flags` are WQ_*. Raises DsaError: among
        others where `pasid` is given and the host has not enabled the device's PASIDs."""
        at = self._wqcfg + index * WQCFG_SIZE
        mode = WQ_DEDICATED | flags
        if pasid is not None:
            mode |= WQ_PASID_EN | pasid << WQ_PASID_SHIFT
        for offset, value in ((0, SLOTS), (4, 0), (8, mode), (12, LIMITS)):
            self.bar.write(at + offset, 4, value)
        self.command(CMD_ENABLE_WQ, index)
        return Queue(self, index)

    def disable(self, queue: Queue) -> None:
        """Let the queue finish what it has, then disable it: it can be configured anew."""
        self.command(CMD_DISABLE_WQ, 1 << queue.index)

    def error(self) -> tuple[int, int] | None:
        """What no completion record could tell: its code and the address; None if there is nothing. It is cleared."""
        low = self.bar.read(REG_SWERR, 8)
        if not low & 1:
            return None
        address = self.bar.read(REG_SWERR + 16, 8)
        self.bar.write(REG_SWERR, 4, 3)
        return low >> 8 & 0xFF, address

    def close(self) -> None:
        """Close the VFIO device under the engine's feet."""
        self.closed = True
        self.vfio.close()

    def remove(self) -> None:
        """Stop the engine. The VFIO device stays open: its owner closes it."""
        self.command(CMD_RESET)
        self.bar.close()
        self.portals.close()


class Queue:
    """An enabled work queue. Its completion records go to 16 slots of a page of the client's, a descriptor after the
    other."""

    def __init__(self, engine: Dsa, index: int) -> None:
        self.engine = engine
        self.index = index
        self._records: Buffer | None = None
        self._page_iova = self._count = 0

    def record_in(self, page: Buffer, iova: int) -> Queue:
        """Have completion records written to this page, mapped at `iova`; the queue itself."""
        self._records, self._page_iova = page, iova
        return self

    def submit(self, operation: int, source: int, target: int, count: int, flags: int = BLOCK_ON_FAULT) -> Job:
        """Submit a descriptor; what became of it is asked of the Job. `source` is the pattern of a FILL."""
        if self._records is None:
            raise ValueError("no place for completion records")
        slot = SLOTS * self.index + self._count % SLOTS
        self._count += 1
        self._records.view[32 * slot : 32 * slot + 32] = bytes(32)
        head = operation << 56 | (flags | RECORD_VALID | RECORD_WANTED) << 32
        body = struct.pack("<QQQQI", head, self._page_iova + 32 * slot, source, target, count) + bytes(28)
        for at, word in enumerate(struct.unpack("<8Q", body)):
            self.engine.portals.write(self.index * PORTAL + 8 * at, 8, word)
        return Job(self._records, slot)

    def move(self, source: int, target: int, count: int) -> Completion:
        """MOVE that waits for nobody's page: how it ended. Raises TimeoutError."""
        return self.submit(MOVE, source, target, count, 0).wait()

    def fill(self, pattern: int, target: int, count: int) -> Completion:
        """FILL in the same way."""
        return self.submit(FILL, pattern, target, count, 0).wait()


class Job:
    """A submitted descriptor."""

    def __init__(self, records: Buffer, slot: int) -> None:
        self._records = records
        self.slot = slot

    def poll(self) -> Completion | None:
        """How it ended; None while it runs, or waits."""
        record = struct.unpack("<BBxxIQ", self._records.view[32 * self.slot : 32 * self.slot + 16])
        return Completion(*record) if record[0] else None

    def wait(self) -> Completion:
        """How it ended. Raises TimeoutError."""
        give_up = time.monotonic() + TIMEOUT
        while (found := self.poll()) is None:
            if time.monotonic() > give_up:
                raise TimeoutError("the descriptor does not end")
            time.sleep(0.002)
        return found


def dsa_functions(kernel: Backend) -> list[str]:
    """Addresses of the devices."""
    return functions(kernel, VENDOR, DEVICE)
