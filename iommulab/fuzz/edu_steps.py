"""What a program has the `edu` device do: each step as one, from registers to the end of the transfer.

The device keeps its buffer, its registers and its interrupt status over a close, as it cannot be reset. So a step takes
nothing that an earlier program left, and leaves nothing that a later one could see: a copy fills the buffer before it
empties it, an interrupt is acknowledged. Registers are reached through the file, so that VFIO's own rules decide: a
function whose memory is off answers EIO. Needs only the standard library and the suite's drivers.
"""

from __future__ import annotations

import errno
import time
from typing import Protocol

from conformance.drivers.edu import (
    BUFFER,
    BUFFER_SIZE,
    DMA_RUN,
    DMA_TO_MEMORY,
    REG_DMA_CMD,
    REG_DMA_COUNT,
    REG_DMA_DST,
    REG_DMA_SRC,
    REG_IRQ_ACK,
    REG_IRQ_RAISE,
    REG_IRQ_STATUS,
    REG_LIVENESS,
    TIMEOUT,
)
from conformance.drivers.vfio import CONFIG_REGION, REGION_SHIFT
from uapi.vfio import VFIO_PCI_BAR0_REGION_INDEX

#: What a step does.
COPY, IRQ, LIVENESS = range(3)
#: Where the MSI capability of edu, its only one, ends.
_LAST_CAPABILITY = 0x4E
#: Where a PC's devices send interrupts. A copy there may be an NMI.
_INTERRUPTS = range(0xFEE0_0000, 0xFEF0_0000)
_BAR = int(VFIO_PCI_BAR0_REGION_INDEX) << REGION_SHIFT


class Registers(Protocol):
    """What a step needs of a door."""

    def pread(self, fd: int, count: int, offset: int) -> bytes | int: ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...


def forbidden(offset: int, count: int) -> bool:
    """Whether a plain write there would leave something behind, or worse: QEMU overruns its own heap on a transfer that
    leaves the device's buffer. All of BAR 0 but the identification and what is behind the registers; of configuration
    space what no capability has, which is memory in QEMU's device and not in a saved state of Linux."""
    region, place = offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1)
    if region == CONFIG_REGION:
        return place < 0x100 and place + count > _LAST_CAPABILITY
    return region == VFIO_PCI_BAR0_REGION_INDEX and place < 0x1000 and place + count > REG_LIVENESS


def run(door: Registers, fd: int, kind: int, first: int, second: int, count: int) -> int:
    """One step: 0, or what it reads, or the errno of the first access that VFIO refuses; ETIMEDOUT; EPERM for
    a copy that would be interrupts."""
    try:
        if kind == COPY:
            count = min(max(count, 1), BUFFER_SIZE)
            if any(start < _INTERRUPTS.stop and start + count > _INTERRUPTS.start for start in (first, second)):
                return -errno.EPERM
            return _copy(door, fd, first, second, count)
        if kind == IRQ:
            _write(door, fd, REG_IRQ_RAISE, first & 0xFFFFFFFF, 4)
            status = _read(door, fd, REG_IRQ_STATUS, 4)
            _write(door, fd, REG_IRQ_ACK, status, 4)
            return status & 0x7FFFFFFF
        _write(door, fd, REG_LIVENESS, first & 0xFFFFFFFF, 4)
        return _read(door, fd, REG_LIVENESS, 4) & 0x7FFFFFFF
    except OSError as error:
        return -(error.errno or 0)


def _copy(door: Registers, fd: int, source: int, target: int, count: int) -> int:
    """DMA into the buffer and out of it."""
    for origin, end, command in ((source, BUFFER, 0), (BUFFER, target, DMA_TO_MEMORY)):
        for register, value in (
            (REG_DMA_SRC, origin),
            (REG_DMA_DST, end),
            (REG_DMA_COUNT, count),
            (REG_DMA_CMD, DMA_RUN | command),
        ):
            _write(door, fd, register, value, 8)
        give_up = time.monotonic() + TIMEOUT
        while _read(door, fd, REG_DMA_CMD, 8) & DMA_RUN:
            if time.monotonic() > give_up:
                return -errno.ETIMEDOUT
            time.sleep(0.002)
    return 0


def _write(door: Registers, fd: int, register: int, value: int, width: int) -> None:
    result = door.pwrite(fd, value.to_bytes(width, "little"), _BAR + register)
    if result != width:
        raise OSError(-result if result < 0 else errno.EIO, "the write of a register")


def _read(door: Registers, fd: int, register: int, width: int) -> int:
    data = door.pread(fd, width, _BAR + register)
    if isinstance(data, int) or len(data) != width:
        raise OSError(-data if isinstance(data, int) and data < 0 else errno.EIO, "the read of a register")
    return int.from_bytes(data, "little")
