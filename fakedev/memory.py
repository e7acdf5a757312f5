"""The physical address space of a machine.

Two kinds of memory answer in it. *RAM* is one sparse memfd, from physical address 0 upwards on a PC and from 1 GiB on
an Arm board, mapped once: the kernel's tables live there. *Windows* are everything else: a client's pages, a shared
file, a device's registers; who owns one says how it is read (`Backing`). An access that nothing answers raises
`BusAbort`, as a real bus returns Unsupported Request.

Offsets into `ram` and `words` are physical addresses: `words[pa >> 3]` is a table load. (They begin at 0 even where
RAM does not; what lies before it takes no memory.) What is left out: memory
attributes and ordering (the model has no threads), and RAM above the hole for 32-bit registers.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from typing import Protocol

#: Bits of a physical address; the machine's host address width.
ADDRESS_BITS = 52
ADDRESS_SIZE = 1 << ADDRESS_BITS
#: Where q35 stops low RAM; the registers of a PC lie between here and 4 GiB.
LOW_RAM_LIMIT = 0x8000_0000

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT


class BusAbort(Exception):
    """No memory answered at a physical address (or it has gone away)."""

    def __init__(self, address: int) -> None:
        super().__init__(f"nothing answers at physical address {address:#x}")
        self.address = address


class Backing(Protocol):
    """What answers in a window. Offsets count from the window's base."""

    def read(self, offset: int, length: int, /) -> bytes:
        """The bytes there. BusAbort where there is nothing."""

    def write(self, offset: int, data: bytes | memoryview, /) -> None:
        """Store bytes. BusAbort where there is nothing."""

    def view(self, offset: int, length: int, /) -> memoryview | None:
        """A direct, writable view of the whole range while its memory is known to be alive, else None."""


class _Nothing:
    """Answers no access; stands where no window is."""

    def read(self, offset: int, _length: int) -> bytes:
        raise BusAbort(offset)

    def write(self, offset: int, _data: bytes | memoryview) -> None:
        raise BusAbort(offset)

    def view(self, offset: int, _length: int) -> memoryview | None:
        raise BusAbort(offset)


class PhysicalMemory:
    """RAM and windows of one machine.

    `ram_size` bytes (a multiple of 4096) of sparse memory from address `ram_start`, which end at 2 GiB at most; nothing
    is committed before it is touched. `address_bits` is what the machine's buses and IOMMUs can all address, up to
    ADDRESS_BITS. ValueError for a bad size.
    """

    __slots__ = (
        "_base",
        "_bases",
        "_end",
        "_fd",
        "_target",
        "_windows",
        "address_bits",
        "mapped",
        "ram",
        "ram_end",
        "ram_start",
        "words",
    )

    def __init__(self, ram_size: int = LOW_RAM_LIMIT, ram_start: int = 0, *, address_bits: int = ADDRESS_BITS) -> None:
        ram_end = ram_start + ram_size
        if ram_size % PAGE_SIZE or not 0 < ram_size <= ram_end <= LOW_RAM_LIMIT:
            raise ValueError(f"{ram_size:#x} bytes of RAM: not a multiple of 4 KiB up to {LOW_RAM_LIMIT:#x}")
        self.address_bits = address_bits
        self._fd = os.memfd_create("fakedev-ram", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, ram_end)
        #: RAM as a mapping (its slices are `bytes`), as a view, and as little-endian 64-bit words.
        self.mapped = mmap.mmap(self._fd, ram_end)
        self.ram_start, self.ram_end = ram_start, ram_end
        self.ram = memoryview(self.mapped)
        self.words = self.ram.cast("Q")
        self._bases: list[int] = []
        self._windows: list[tuple[int, int, Backing]] = []
        self._base = self._end = 0
        self._target: Backing = _Nothing()

    # -- windows -----------------------------------------------------------------------------------------------------

    def add_window(self, base: int, size: int, backing: Backing) -> None:
        """Let `backing` answer in [base, base + size). ValueError where that is taken or outside the address space."""
        end = base + size
        if size <= 0 or base < 0 or (base < self.ram_end and end > self.ram_start) or end > 1 << self.address_bits:
            raise ValueError(f"no window can be at {base:#x}+{size:#x}")
        index = bisect_right(self._bases, base)
        if (index and self._windows[index - 1][1] > base) or (index < len(self._bases) and self._bases[index] < end):
            raise ValueError(f"{base:#x}+{size:#x} overlaps another window")
        self._bases.insert(index, base)
        self._windows.insert(index, (base, end, backing))

    def remove_window(self, base: int) -> None:
        """Take away the window that starts at `base`. ValueError if there is none."""
        index = bisect_right(self._bases, base) - 1
        if index < 0 or self._bases[index] != base:
            raise ValueError(f"no window starts at {base:#x}")
        del self._bases[index], self._windows[index]
        self._base = self._end = 0
        self._target = _Nothing()

    def _select(self, pa: int) -> None:
        """Make the window that holds `pa` the last one hit. BusAbort if there is none."""
        index = bisect_right(self._bases, pa) - 1
        if index < 0 or pa >= self._windows[index][1]:
            raise BusAbort(pa)
        self._base, self._end, self._target = self._windows[index]

    # -- accesses ----------------------------------------------------------------------------------------------------

    def view(self, pa: int, length: int) -> memoryview | None:
        """A direct view of [pa, pa + length) where the whole range is one piece of live memory, else None.

        BusAbort where nothing answers. Use the view at once: the memory may go away with the next system call.
        """
        end = pa + length
        if end <= self.ram_end and pa >= self.ram_start:
            return self.ram[pa:end]
        if not self._base <= pa < self._end:
            self._select(pa)
        if end > self._end:
            return None
        return self._target.view(pa - self._base, length)

    def read(self, pa: int, length: int) -> bytes:
        """The bytes of [pa, pa + length). BusAbort where nothing answers."""
        end = pa + length
        if end <= self.ram_end and pa >= self.ram_start:
            return self.mapped[pa:end]
        if not self._base <= pa < self._end:
            if self.ram_start <= pa < self.ram_end:
                return self.mapped[pa : self.ram_end] + self.read(self.ram_end, end - self.ram_end)
            self._select(pa)
        if end > self._end:
            split = self._end - pa
            return self._target.read(pa - self._base, split) + self.read(self._end, length - split)
        return self._target.read(pa - self._base, length)

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at `pa`. BusAbort where nothing answers; what came before the abort has been stored."""
        length = len(data)
        end = pa + length
        if end <= self.ram_end and pa >= self.ram_start:
            self.ram[pa:end] = data
            return
        view = memoryview(data)
        if not self._base <= pa < self._end:
            if self.ram_start <= pa < self.ram_end:
                split = self.ram_end - pa
                self.ram[pa : self.ram_end] = view[:split]
                self.write(self.ram_end, view[split:])
                return
            self._select(pa)
        if end > self._end:
            split = self._end - pa
            self._target.write(pa - self._base, view[:split])
            self.write(pa + split, view[split:])
            return
        self._target.write(pa - self._base, view)

    def close(self) -> None:
        """Give the RAM back. Views that are still held keep it alive."""
        self.words.release()
        try:
            self.ram.release()
            self.mapped.close()
        except BufferError:
            pass
        os.close(self._fd)
