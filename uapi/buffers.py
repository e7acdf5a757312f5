"""Client memory for tests and drivers: page-aligned, zeroed, with a known lifetime."""

from __future__ import annotations

import ctypes
import mmap

from uapi.backend import Closing

_MAP_HUGETLB = 0x40000
HUGE_PAGE = 2 << 20


class AnonymousBuffer(Closing):
    """Private anonymous memory.

    A plain buffer starts on a multiple of its own size (of the next power of two, at most 2 MiB), so that an automatic
    IOVA, which keeps the address's alignment, does not depend on where the allocator happened to put it. A longer one
    starts on an odd multiple of 2 MiB: that alignment and no better.
    """

    def __init__(self, length: int, *, huge: bool = False) -> None:
        if length <= 0:
            raise ValueError(f"a buffer of {length} bytes")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB if huge else 0)
        alignment = min(1 << (length - 1).bit_length(), 2 * HUGE_PAGE)
        slack = alignment if alignment > mmap.PAGESIZE and not huge else 0
        page = HUGE_PAGE if huge else mmap.PAGESIZE
        self._map = mmap.mmap(-1, (length + page - 1) // page * page + slack, flags=flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        skip = ((HUGE_PAGE if alignment > HUGE_PAGE else 0) - base) % alignment if slack else 0
        self.address = base + skip
        self.length = length
        self._view: memoryview | None = memoryview(self._map)[skip : skip + length]

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise ValueError("the buffer is closed")
        return self._view

    def close(self) -> None:
        """Unmap the memory. Views taken from the buffer must be gone (BufferError otherwise)."""
        if self._view is not None:
            self._view.release()
            self._view = None
            self._map.close()
