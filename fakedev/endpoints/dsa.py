"""A DMA engine with work queues, PASIDs, ATS and PRI, in the manner of Intel's Data Streaming Accelerator (8086:0b25).

Mirrors the DSA architecture specification (341204) and drivers/dma/idxd/registers.h: capability registers, commands and
their errors, work queue configuration, descriptors of 64 bytes, completion records of 32. Operations: no-op, batch,
drain, move, fill, compare. A descriptor that faults on a page either says so in its completion record or, with Block On
Fault in descriptor and queue, waits for the page request's answer; meanwhile other engines go on.

A store of 64 bytes to a portal (MOVDIR64B, ENQCMD) is eight stores of 8 here, in order; the last one submits. A command
is done when the store that gave it returns, but for a drain, which is done when nothing that it waits for is left.
Interrupts are MSI: vector 0 for errors and commands, a descriptor's handle for completions.

Left out: groups and engine assignment (every engine serves every queue), event log, interrupt message storage, the
operations on deltas, checksums and protection information, caching hints, traffic classes, occupancy interrupts.
UNVERIFIED: the error code of a descriptor that no queue takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from functools import partial
from typing import TypeAlias, TypeVar

from fakedev.ats import AtsPort, PageFault
from fakedev.dma import DmaAbort, Outcome, Parked
from fakedev.pci import MEM64, PCI_COMMAND, PCI_COMMAND_MASTER, Bar, PciFunction
from fakedev.pcie import PCI_EXP_TYPE_RC_END, AtsCapability, ExpressCapability, PasidCapability, PriCapability
from fakedev.tlp import NO_PASID

T = TypeVar("T")
#: Work that may wait: it yields what it waits for and is sent the outcome.
Work: TypeAlias = Generator[Parked, Outcome, T]

MMIO_SIZE, WQS, ENGINES = 0x10000, 8, 4
#: Each work queue has four portal pages.
PORTAL_PAGES = 4
PORTALS_SIZE = WQS * PORTAL_PAGES * 4096

VERSION, GENCAP, WQCAP, GRPCAP, ENGCAP, OPCAP, OFFSETS = 0x00, 0x10, 0x20, 0x30, 0x38, 0x40, 0x60
GENCFG, GENCTRL, GENSTS, INTCAUSE, CMD, CMDSTS, CMDCAP, SWERR = 0x80, 0x88, 0x90, 0x98, 0xA0, 0xA8, 0xB0, 0xC0
GRPCFG, WQCFG, MSIXPERM = 0x400, 0x500, 0x800
WQCFG_SIZE, TOTAL_WQ_SIZE = 64, 128
MAX_TRANSFER_LG2, MAX_BATCH_LG2 = 31, 10
GENCAP_BLOCK_ON_FAULT = 1

STATE_DISABLED, STATE_ENABLED = 0, 1
INTC_ERR, INTC_CMD = 1, 2
CMD_ENABLE_DEVICE, CMD_DISABLE_DEVICE, CMD_DRAIN_ALL, CMD_ABORT_ALL, CMD_RESET_DEVICE = 1, 2, 3, 4, 5
CMD_ENABLE_WQ, CMD_DISABLE_WQ, CMD_DRAIN_WQ, CMD_ABORT_WQ, CMD_RESET_WQ = 6, 7, 8, 9, 10
CMD_DRAIN_PASID, CMD_ABORT_PASID = 11, 12
CMDSTS_ACTIVE = 1 << 31
ERR_COMMAND, ERR_WQ_INDEX = 1, 2
ERR_DEVICE_ENABLED, ERR_BUS_MASTER, ERR_WQ_SIZES = 0x10, 0x12, 0x14
ERR_DEVICE_NOT_ENABLED, ERR_WQ_ENABLED, ERR_WQ_SIZE = 0x20, 0x21, 0x22
ERR_WQ_BOF, ERR_WQ_PASID, ERR_MAX_BATCH, ERR_MAX_TRANSFER = 0x25, 0x26, 0x27, 0x28
ERR_WQ_NOT_ENABLED = 0x32

# WQCFG, bytes 8-11.
WQ_DEDICATED, WQ_BOF, WQ_ATS_DISABLE, WQ_PRS_DISABLE = 1, 2, 4, 8
WQ_PASID_SHIFT, WQ_PASID_EN, WQ_PRIV = 8, 1 << 28, 1 << 29
WQ_STATE_SHIFT = 30  # in bytes 24-27

OP_NOOP, OP_BATCH, OP_DRAIN, OP_MEMMOVE, OP_MEMFILL, OP_COMPARE = 0, 1, 2, 3, 4, 5
_OPERATIONS = (OP_NOOP, OP_BATCH, OP_DRAIN, OP_MEMMOVE, OP_MEMFILL, OP_COMPARE)
FLAG_FENCE, FLAG_BOF, FLAG_CRAV, FLAG_RCR, FLAG_RCI, FLAG_CC = 0x1, 0x2, 0x4, 0x8, 0x10, 0x100
_KNOWN_FLAGS = FLAG_FENCE | FLAG_BOF | FLAG_CRAV | FLAG_RCR | FLAG_RCI | FLAG_CC
COMP_SUCCESS, COMP_PAGE_FAULT, COMP_PAGE_FAULT_IR, COMP_BATCH_FAIL = 1, 3, 4, 5
COMP_BAD_OPCODE, COMP_INVALID_FLAGS, COMP_TRANSFER_SIZE, COMP_DESCRIPTOR_COUNT = 0x10, 0x11, 0x13, 0x14
COMP_OVERLAP, COMP_LIST_ALIGNMENT, COMP_RECORD_FAULT, COMP_RECORD_ALIGNMENT = 0x16, 0x18, 0x1A, 0x1B
COMP_HARDWARE, COMP_TRANSLATION = 0x20, 0x22
#: In a status: the access that faulted was a write.
COMP_WRITE = 0x80
SWERR_VALID, SWERR_OVERFLOW, SWERR_DESC_VALID, SWERR_WQ_VALID, SWERR_WRITE, SWERR_PRIV = 1, 2, 4, 8, 0x20, 0x40
SWERR_NO_QUEUE = 0x50


class _Failed(Exception):
    """A descriptor ended with a status other than success, at an address where that says something."""

    def __init__(self, status: int, address: int = 0) -> None:
        super().__init__(status)
        self.status = status
        self.address = address


class Descriptor:
    """64 bytes, in fields; and who runs them."""

    __slots__ = (
        "count",
        "done",
        "flags",
        "handle",
        "opcode",
        "pasid",
        "privileged",
        "record",
        "result",
        "src",
        "status",
        "to",
    )

    def __init__(self, data: bytes) -> None:
        head = int.from_bytes(data[:8], "little")
        #: As the descriptor says; a dedicated queue's own replaces them.
        self.pasid = head & 0xFFFFF
        self.privileged = bool(head >> 31 & 1)
        self.flags = head >> 32 & 0xFF_FFFF
        self.opcode = head >> 56
        self.record, self.src, self.to = (int.from_bytes(data[at : at + 8], "little") for at in (8, 16, 24))
        self.count = int.from_bytes(data[32:36], "little")
        self.handle = int.from_bytes(data[36:38], "little")
        #: Bytes (descriptors of a batch) that are finished.
        self.done = 0
        #: Of a comparison: 1 where they differ. And how the descriptor ended.
        self.result = self.status = 0


class _Job:
    """A submitted descriptor, from its queue's acceptance to its completion."""

    __slots__ = ("dead", "descriptor", "index", "waiting")

    def __init__(self, index: int, descriptor: Descriptor) -> None:
        self.index = index
        self.descriptor = descriptor
        self.dead = False
        self.waiting: Parked | None = None


class _Mmio(Bar):
    def __init__(self, device: Dsa) -> None:
        super().__init__(MMIO_SIZE, MEM64)
        self._device = device

    def read(self, offset: int, width: int) -> int:
        return int.from_bytes(self._device.registers[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        if width >= 4 and not offset % 4:
            for at in range(0, width, 4):
                self._device.store(offset + at, value >> 8 * at & 0xFFFF_FFFF)


class _Portals(Bar):
    def __init__(self, device: Dsa) -> None:
        super().__init__(PORTALS_SIZE, MEM64)
        self._device = device

    def write(self, offset: int, width: int, value: int) -> None:
        if width == 8 and not offset % 8:
            self._device.portal_store(offset, value)


class Dsa(PciFunction):
    """The function. BAR 0 has the registers, BAR 2 the portals: queue n at n * 0x4000.

    Without `ats` it has no PRI either: a device for an IOMMU that lets its requests wait.
    """

    def __init__(
        self,
        address: str,
        bar_address: int = 0,
        portals_address: int = 0,
        *,
        command: int = 0,
        pasid_bits: int = 20,
        ats: bool = True,
        kind: int = PCI_EXP_TYPE_RC_END,
    ) -> None:
        super().__init__(
            address,
            (0x8086, 0x0B25),
            0x088000,
            subsystem=(0x8086, 0),
            bars=[_Mmio(self), None, _Portals(self)],
            addresses=[bar_address, 0, portals_address],
            command=command,
            config_size=4096,
        )
        ExpressCapability(self, 0x40, kind)
        self.add_msi(0x80, 3)
        self.port = AtsPort(
            self,
            AtsCapability(self, 0x100) if ats else None,
            PasidCapability(self, 0x120 if ats else 0x100, pasid_bits),
            PriCapability(self, 0x110, capacity=64) if ats else None,
        )
        self.registers = bytearray(MMIO_SIZE)
        self._portal_data: dict[int, bytearray] = {}
        self._queue: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._drains: list[tuple[int | None, int | None]] = []
        self.reset_device()

    # -- registers ---------------------------------------------------------------------------------------------------

    def _get(self, offset: int, width: int = 4) -> int:
        return int.from_bytes(self.registers[offset : offset + width], "little")

    def _put(self, offset: int, value: int, width: int = 4) -> None:
        self.registers[offset : offset + width] = value.to_bytes(width, "little")

    def reset_device(self) -> None:
        self._abort()
        self._drains.clear()
        self._portal_data.clear()
        self.registers[:] = bytes(MMIO_SIZE)
        limits = MAX_TRANSFER_LG2 << 16 | MAX_BATCH_LG2 << 21
        self._put(VERSION, 0x100)
        self._put(GENCAP, GENCAP_BLOCK_ON_FAULT | limits | 1 << 31, 8)
        # The log2 of a queue's configuration, less 5; shared and dedicated mode, ATS and PRS by queue.
        self._put(WQCAP, TOTAL_WQ_SIZE | WQS << 16 | 1 << 24 | 3 << 48 | 1 << 50 | 1 << 55, 8)
        self._put(GRPCAP, 1, 8)
        self._put(ENGCAP, ENGINES, 8)
        self._put(OPCAP, sum(1 << operation for operation in _OPERATIONS), 8)
        self._put(OFFSETS, GRPCFG >> 8 | WQCFG >> 8 << 16 | MSIXPERM >> 8 << 32, 8)
        self._put(CMDCAP, sum(1 << command for command in range(1, 13)))

    def store(self, offset: int, value: int) -> None:
        """A store of 4 bytes to a register; those that cannot be written keep."""
        if offset == CMD:
            self._command(value >> 20 & 0x1F, value & 0xFFFFF, bool(value >> 31))
        elif offset == INTCAUSE:
            self._put(offset, self._get(offset) & ~value)
        elif offset == SWERR:
            self._put(offset, self._get(offset) & ~(value & (SWERR_VALID | SWERR_OVERFLOW)))
        elif offset in (GENCFG, GENCTRL) or GRPCFG <= offset < WQCFG or MSIXPERM <= offset < MSIXPERM + 0x100:
            self._put(offset, value)
        elif WQCFG <= offset < WQCFG + WQS * WQCFG_SIZE:
            index, at = divmod(offset - WQCFG, WQCFG_SIZE)
            if not self._wq_enabled(index) and at < 24:
                self._put(offset, value)

    def _interrupt(self, cause: int) -> None:
        self._put(INTCAUSE, self._get(INTCAUSE) | cause)
        if self.msi is not None:
            self.msi.notify()

    # -- commands ----------------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return self._get(GENSTS) & 3 == STATE_ENABLED

    def _wq(self, index: int, offset: int) -> int:
        return self._get(WQCFG + index * WQCFG_SIZE + offset)

    def _wq_enabled(self, index: int) -> bool:
        return self._wq(index, 24) >> WQ_STATE_SHIFT == 1

    def _set_wq_enabled(self, index: int, enabled: bool) -> None:
        self._put(WQCFG + index * WQCFG_SIZE + 24, enabled << WQ_STATE_SHIFT)

    def _command(self, command: int, operand: int, interrupt: bool) -> None:
        if self._get(CMDSTS) & CMDSTS_ACTIVE:
            return  # the specification leaves it undefined; the drain goes on
        self._put(CMDSTS, self._execute_command(command, operand))
        self._finish_drains()
        if interrupt:
            self._interrupt(INTC_CMD)

    def _execute_command(self, command: int, operand: int) -> int:
        """Do it; CMDSTS: an error code, or ACTIVE while it is not done."""
        if command == CMD_ENABLE_DEVICE:
            return self._enable_device()
        if command == CMD_RESET_DEVICE:
            self._abort()
            self.registers[WQCFG : WQCFG + WQS * WQCFG_SIZE] = bytes(WQS * WQCFG_SIZE)
            self._put(GENSTS, STATE_DISABLED)
            return 0
        if command not in range(CMD_DISABLE_DEVICE, CMD_ABORT_PASID + 1):
            return ERR_COMMAND
        if command == CMD_DISABLE_DEVICE and not self.enabled:
            return 0x31
        if not self.enabled:
            return ERR_DEVICE_NOT_ENABLED
        if command == CMD_ENABLE_WQ:
            return ERR_WQ_INDEX if operand >= WQS else self._enable_wq(operand)
        if command in (CMD_DRAIN_PASID, CMD_ABORT_PASID):
            if command == CMD_ABORT_PASID:
                self._abort(pasid=operand)
            self._drains.append((None, operand))
            return CMDSTS_ACTIVE
        everything = command in (CMD_DISABLE_DEVICE, CMD_DRAIN_ALL, CMD_ABORT_ALL)
        # Queues are named by bits: 16 of them, and which 16.
        named = range(WQS) if everything else [n for n in range(WQS) if operand & 1 << n and not operand >> 16]
        if not everything and (not named or not all(map(self._wq_enabled, named))):
            return ERR_WQ_NOT_ENABLED if named else ERR_WQ_INDEX
        for index in named:
            if command in (CMD_DISABLE_DEVICE, CMD_DISABLE_WQ, CMD_RESET_WQ):
                self._set_wq_enabled(index, False)
            if command in (CMD_ABORT_ALL, CMD_ABORT_WQ, CMD_RESET_WQ):
                self._abort(index)
            if command == CMD_RESET_WQ:
                start = WQCFG + index * WQCFG_SIZE
                self.registers[start : start + WQCFG_SIZE] = bytes(WQCFG_SIZE)
            self._drains.append((index, None))
        if command == CMD_DISABLE_DEVICE:
            self._put(GENSTS, STATE_DISABLED)
        return CMDSTS_ACTIVE

    def _enable_device(self) -> int:
        if self.enabled:
            return ERR_DEVICE_ENABLED
        if not self.config_read(PCI_COMMAND, 2) & PCI_COMMAND_MASTER:
            return ERR_BUS_MASTER
        if sum(self._wq(index, 0) & 0xFFFF for index in range(WQS)) > TOTAL_WQ_SIZE:
            return ERR_WQ_SIZES
        self._put(GENSTS, STATE_ENABLED)
        return 0

    def _enable_wq(self, index: int) -> int:
        mode, limits = self._wq(index, 8), self._wq(index, 12)
        if self._wq_enabled(index):
            return ERR_WQ_ENABLED
        if not self._wq(index, 0) & 0xFFFF:
            return ERR_WQ_SIZE
        pasids = self.port.pasid is not None and self.port.pasid.enabled
        # A shared queue's descriptors bring PASIDs, so it needs them.
        if bool(mode & WQ_PASID_EN) > pasids or (not mode & WQ_DEDICATED and not mode & WQ_PASID_EN):
            return ERR_WQ_PASID
        if limits & 0x1F > MAX_TRANSFER_LG2:
            return ERR_MAX_TRANSFER
        if limits >> 5 & 0xF > MAX_BATCH_LG2:
            return ERR_MAX_BATCH
        self._set_wq_enabled(index, True)
        return 0

    def _abort(self, index: int | None = None, pasid: int | None = None) -> None:
        """Drop work: of a queue, of a PASID, or all."""
        for job in [*self._queue, *self._running]:
            if index in (None, job.index) and pasid in (None, job.descriptor.pasid):
                job.dead = True
        self._queue = deque(job for job in self._queue if not job.dead)
        self._running = [job for job in self._running if not job.dead]

    def _finish_drains(self) -> None:
        if not self._get(CMDSTS) & CMDSTS_ACTIVE:
            return
        left = [*self._queue, *self._running]
        for index, pasid in self._drains:
            if any(index in (None, job.index) and pasid in (None, job.descriptor.pasid) for job in left):
                return
        self._drains.clear()
        self._put(CMDSTS, 0)

    # -- submission --------------------------------------------------------------------------------------------------

    def portal_store(self, offset: int, value: int) -> None:
        """Eight bytes of a descriptor; the last eight submit it."""
        index = offset // (4096 * PORTAL_PAGES)
        data = self._portal_data.setdefault(index, bytearray(64))
        at = offset & 63
        data[at : at + 8] = value.to_bytes(8, "little")
        if at == 56:
            del self._portal_data[index]
            self._submit(index, Descriptor(bytes(data)))

    def _submit(self, index: int, descriptor: Descriptor) -> None:
        if not self.enabled or not self._wq_enabled(index):
            self._software_error(index, descriptor, SWERR_NO_QUEUE, 0, 0)
            return
        used = sum(job.index == index for job in [*self._queue, *self._running])
        if used >= self._wq(index, 0) & 0xFFFF:
            self._software_error(index, descriptor, SWERR_NO_QUEUE, 0, 0)
            return
        mode = self._wq(index, 8)
        if mode & WQ_DEDICATED:
            descriptor.pasid = mode >> WQ_PASID_SHIFT & 0xFFFFF if mode & WQ_PASID_EN else NO_PASID
            descriptor.privileged = bool(mode & WQ_PRIV)
        self._queue.append(_Job(index, descriptor))
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting descriptors to free engines."""
        while self._queue and len(self._running) < ENGINES:
            job = self._queue.popleft()
            self._running.append(job)
            self._advance(job, self._run(job.index, job.descriptor), None)
        self._finish_drains()

    def _advance(self, job: _Job, work: Work[None], outcome: Outcome | None) -> None:
        """Run until it is done or waits."""
        while True:
            if job.dead:
                work.close()
                return
            try:
                parked = next(work) if outcome is None else work.send(outcome)
            except StopIteration:
                if job in self._running:
                    self._running.remove(job)
                return
            outcome = parked.outcome
            if outcome is None:
                parked.then(partial(self._resume, job, work))
                return

    def _resume(self, job: _Job, work: Work[None], outcome: Outcome) -> None:
        self._advance(job, work, outcome)
        self._dispatch()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _access(self, index: int, descriptor: Descriptor, address: int, what: int | bytes, block: bool) -> Work[bytes]:
        """Read `what` bytes, or write them: through the device TLB, unless the queue does without. _Failed."""
        mode = self._wq(index, 8)
        direct = bool(mode & WQ_ATS_DISABLE)
        untranslated = direct or not self.port.enabled
        pasid, privileged = descriptor.pasid, descriptor.privileged
        block = block and not mode & WQ_PRS_DISABLE
        write = COMP_WRITE if isinstance(what, bytes) else 0
        while True:
            try:
                if isinstance(what, bytes):
                    self.port.write(address, what, pasid, privileged, block=block, direct=direct)
                    return b""
                return self.port.read(address, what, pasid, privileged, block=block, direct=direct)
            except PageFault as fault:
                raise _Failed(COMP_PAGE_FAULT | write, fault.address) from None
            except DmaAbort as abort:
                status = COMP_HARDWARE if untranslated else COMP_TRANSLATION
                raise _Failed(status | write, abort.address) from None
            except Parked as parked:
                wait, at = parked, parked.request.address
            outcome = yield wait
            if outcome == Outcome.ABORT:
                # Without ATS it stalled, and what ends that is the abort of a request, which is no word about pages.
                raise _Failed((COMP_HARDWARE if untranslated else COMP_PAGE_FAULT_IR) | write, at)
            if outcome == Outcome.RAZ_WI:
                return bytes(what) if isinstance(what, int) else b""

    # -- descriptors -------------------------------------------------------------------------------------------------

    def _run(self, index: int, descriptor: Descriptor, in_batch: bool = False) -> Work[None]:
        """Execute one descriptor, write its completion record, raise its interrupt."""
        status, fault = COMP_SUCCESS, 0
        try:
            self._check(index, descriptor, in_batch)
            yield from self._operate(index, descriptor)
        except _Failed as failed:
            status, fault = failed.status, failed.address
        if descriptor.flags & FLAG_CRAV and (descriptor.flags & FLAG_RCR or status != COMP_SUCCESS):
            yield from self._complete(index, descriptor, status, fault)
        elif status != COMP_SUCCESS:
            self._software_error(index, descriptor, status & ~COMP_WRITE, fault, status & COMP_WRITE)
        descriptor.status = status
        if descriptor.flags & FLAG_RCI and self.msi is not None and descriptor.handle < self.msi.vectors:
            self.msi.notify(descriptor.handle)

    def _check(self, index: int, descriptor: Descriptor, in_batch: bool) -> None:
        mode, limits = self._wq(index, 8), self._wq(index, 12)
        if descriptor.opcode not in _OPERATIONS or (in_batch and descriptor.opcode == OP_BATCH):
            raise _Failed(COMP_BAD_OPCODE)
        blocks = mode & WQ_BOF
        if descriptor.flags & ~_KNOWN_FLAGS or (descriptor.flags & FLAG_BOF and not blocks):
            raise _Failed(COMP_INVALID_FLAGS)
        if descriptor.flags & FLAG_RCR and not descriptor.flags & FLAG_CRAV:
            raise _Failed(COMP_INVALID_FLAGS)
        if descriptor.opcode == OP_BATCH:
            if not 2 <= descriptor.count <= 1 << (limits >> 5 & 0xF):
                raise _Failed(COMP_DESCRIPTOR_COUNT)
            if descriptor.src & 63:
                raise _Failed(COMP_LIST_ALIGNMENT)
        elif descriptor.opcode in (OP_MEMMOVE, OP_MEMFILL, OP_COMPARE):
            if not 0 < descriptor.count <= 1 << (limits & 0x1F):
                raise _Failed(COMP_TRANSFER_SIZE)
            distance = abs(descriptor.src - descriptor.to)
            if descriptor.opcode == OP_MEMMOVE and distance < descriptor.count:
                raise _Failed(COMP_OVERLAP)

    def _operate(self, index: int, descriptor: Descriptor) -> Work[None]:
        operation, count = descriptor.opcode, descriptor.count
        block = bool(descriptor.flags & FLAG_BOF)
        if operation == OP_BATCH:
            yield from self._batch(index, descriptor)
            return
        if operation in (OP_NOOP, OP_DRAIN):
            return
        pattern = descriptor.src.to_bytes(8, "little") * 513
        while descriptor.done < count:
            done = descriptor.done
            to = descriptor.to + done
            size = min(count - done, 4096 - (to & 4095))
            if operation == OP_MEMFILL:
                yield from self._access(index, descriptor, to, pattern[done & 7 :][:size], block)
            else:
                source = descriptor.src + done
                size = min(size, 4096 - (source & 4095))
                data = yield from self._access(index, descriptor, source, size, block)
                if operation == OP_MEMMOVE:
                    yield from self._access(index, descriptor, to, data, block)
                else:
                    other = yield from self._access(index, descriptor, to, size, block)
                    if data != other:
                        descriptor.done += next(n for n in range(size) if data[n] != other[n])
                        descriptor.result = 1
                        return
            descriptor.done += size

    def _batch(self, index: int, batch: Descriptor) -> Work[None]:
        good = True
        for number in range(batch.count):
            data = yield from self._access(index, batch, batch.src + 64 * number, 64, bool(batch.flags & FLAG_BOF))
            one = Descriptor(data)
            one.pasid, one.privileged = batch.pasid, batch.privileged
            yield from self._run(index, one, in_batch=True)
            good = good and one.status == COMP_SUCCESS
            batch.done += 1
        if not good:
            raise _Failed(COMP_BATCH_FAIL)

    def _complete(self, index: int, descriptor: Descriptor, status: int, fault: int) -> Work[None]:
        """Write the completion record; where that is impossible, say so in SWERR."""
        if descriptor.record & 31:
            self._software_error(index, descriptor, COMP_RECORD_ALIGNMENT, descriptor.record, 0)
            return
        result = descriptor.result if status == COMP_SUCCESS else 0
        record = bytes([status, result, 0, 0]) + descriptor.done.to_bytes(4, "little") + fault.to_bytes(8, "little")
        try:
            block = bool(self._wq(index, 8) & WQ_BOF)
            yield from self._access(index, descriptor, descriptor.record, record + bytes(16), block)
        except _Failed as failed:
            self._software_error(index, descriptor, COMP_RECORD_FAULT, failed.address, COMP_WRITE)

    def _software_error(self, index: int, descriptor: Descriptor, code: int, address: int, write: int) -> None:
        """Record an error that no completion record can tell; the second one only sets Overflow."""
        low = self._get(SWERR)
        if low & SWERR_VALID:
            self._put(SWERR, low | SWERR_OVERFLOW)
            return
        low = SWERR_VALID | SWERR_DESC_VALID | SWERR_WQ_VALID | code << 8 | index << 16
        low |= (SWERR_WRITE if write else 0) | (SWERR_PRIV if descriptor.privileged else 0)
        pasid = 0 if descriptor.pasid == NO_PASID else descriptor.pasid
        self._put(SWERR, low | descriptor.opcode << 32 | pasid << 40, 8)
        self._put(SWERR + 8, 0, 8)
        self._put(SWERR + 16, address, 8)
        self._put(SWERR + 24, 0, 8)
        self._interrupt(INTC_ERR)
