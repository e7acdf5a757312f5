"""The kernel's page allocator, as far as the model needs one: zeroed pages of RAM for tables and queues.

Mirrors `iommu_alloc_pages_sz()` of drivers/iommu/iommu-pages.c. Freed pages are handed out again in last-in-first-out
order and fresh ones ascending, so the same calls give the same addresses. What is larger than a page is a power of two,
aligned to itself. `live` counts 4 KiB pages that are out: a test that leaks a table sees it there.
"""

from __future__ import annotations

import errno

from fakedev.memory import PAGE_SHIFT, PAGE_SIZE, PhysicalMemory
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import alloc_page, injecting

#: Where RAM begins lie the real-mode vectors, the video memory and the firmware of a PC, the device tree elsewhere.
_RESERVED = 0x10_0000
_ZEROES = bytes(PAGE_SIZE)


class PageAllocator:
    """Zeroed memory out of `memory`'s RAM but its first MiB."""

    __slots__ = ("_free", "_free_large", "_large", "_next", "_out", "_ram", "_top")

    def __init__(self, memory: PhysicalMemory) -> None:
        self._ram = memory.ram
        self._next = memory.ram_start + _RESERVED
        self._top = memory.ram_end
        self._free: list[int] = []
        self._out: set[int] = set()
        #: Allocations of more than a page: those that are out, with their sizes; those given back, by size.
        self._large: dict[int, int] = {}
        self._free_large: dict[int, list[int]] = {}

    @property
    def live(self) -> int:
        """Pages allocated and not yet freed."""
        return len(self._out) + (sum(self._large.values()) >> PAGE_SHIFT)

    def alloc(self, size: int = PAGE_SIZE) -> int:
        """The physical address of `size` zeroed bytes, rounded up to a power of two. ENOMEM when RAM is used up."""
        if injecting:
            alloc_page("a table or queue")
        if size > PAGE_SIZE:
            return self._alloc_large(1 << (size - 1).bit_length())
        if self._free:
            page = self._free.pop()
            self._ram[page : page + PAGE_SIZE] = _ZEROES
        else:
            page = self._next
            if page >= self._top:
                raise KernelError(errno.ENOMEM, "the machine's RAM is used up by tables")
            self._next = page + PAGE_SIZE
        self._out.add(page)
        return page

    def keep(self, page: int) -> None:
        """Whoever has what `alloc` gave keeps it for good: it is not counted any more."""
        if self._large.pop(page, None) is None:
            self._out.remove(page)

    def _alloc_large(self, size: int) -> int:
        again = self._free_large.get(size)
        if again:
            start = again.pop()
            self._ram[start : start + size] = bytes(size)
        else:
            start = self._next + size - 1 & -size
            if start + size > self._top:
                raise KernelError(errno.ENOMEM, "the machine's RAM is used up by tables")
            self._free += range(start - PAGE_SIZE, self._next - PAGE_SIZE, -PAGE_SIZE)
            self._next = start + size
        self._large[start] = size
        return start

    def free(self, page: int) -> None:
        """Give back what `alloc` gave. KernelBug if it is not out."""
        if page in self._out:
            self._out.remove(page)
            self._free.append(page)
        elif page in self._large:
            self._free_large.setdefault(self._large.pop(page), []).append(page)
        else:
            raise KernelBug(f"page {page:#x} is freed but was not allocated")
