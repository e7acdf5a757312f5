"""The kernel's page allocator, as far as the model needs one: zeroed 4 KiB pages of RAM for tables and queues.

Mirrors `iommu_alloc_pages_sz()` of drivers/iommu/iommu-pages.c. Freed pages are handed out again in last-in-first-out
order and fresh ones ascending, so the same calls give the same addresses. `live` counts pages that are out: a test that
leaks a table sees it there.
"""

from __future__ import annotations

import errno

from fakedev.memory import PAGE_SIZE, PhysicalMemory
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import alloc_page, injecting

#: Below lie the real-mode vectors, the video memory and the firmware of a PC.
_FIRST_PAGE = 0x10_0000
_ZEROES = bytes(PAGE_SIZE)


class PageAllocator:
    """Zeroed pages of `memory`'s RAM from 1 MiB up."""

    __slots__ = ("_free", "_next", "_out", "_ram", "_top")

    def __init__(self, memory: PhysicalMemory) -> None:
        self._ram = memory.ram
        self._next = _FIRST_PAGE
        self._top = memory.ram_size
        self._free: list[int] = []
        self._out: set[int] = set()

    @property
    def live(self) -> int:
        """Pages allocated and not yet freed."""
        return len(self._out)

    def alloc(self) -> int:
        """The physical address of a zeroed page. ENOMEM when RAM is used up."""
        if injecting:
            alloc_page("a table or queue")
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

    def free(self, page: int) -> None:
        """Give a page back. KernelBug if it is not out."""
        try:
            self._out.remove(page)
        except KeyError:
            raise KernelBug(f"page {page:#x} is freed but was not allocated") from None
        self._free.append(page)
