"""Page tables in memory, written by any format: one map and unmap for all vendors.

Mirrors drivers/iommu/generic_pt/iommu_pt.h and its vocabulary (`fakedev/pgtable/format.py`). What a client can tell:

- Each piece of a mapping gets the largest page that IOVA, physical address, length and the domain's page sizes allow.
- Mapping over a leaf fails, and nothing of that mapping stays. Empty tables in the way of a large page are freed.
- Unmapping works on whole leaves: it stops at the first hole or in front of a leaf that begins before the range, and
  takes a leaf that reaches beyond the range whole.
- A table is freed when one unmap covers all that it spans; a table that was emptied piece by piece stays.

Left out: dirty bits, growing the top level, cache flushing for walkers that do not snoop (model memory is coherent).
"""

from __future__ import annotations

import errno
from array import array

from fakedev.memory import PhysicalMemory
from fakedev.pgtable.format import EMPTY, LEAF, TABLE, PageTableFormat
from kernel_model.errors import KernelError
from kernel_model.page_alloc import PageAllocator

_ZEROES = bytes(4096)
_U64 = 1 << 64
_OUTPUT_BITS = 52


class PageTable:
    """One tree of tables with its root at `root`, which is of `top_level`, for IOVAs of `address_bits` bits.

    `extra_leaf_bits` is ORed into every leaf that is made from now on.
    """

    __slots__ = (
        "_memory",
        "_pages",
        "_recent",
        "_recent_key",
        "_words",
        "address_bits",
        "extra_leaf_bits",
        "format",
        "root",
        "top_level",
    )

    def __init__(
        self, fmt: PageTableFormat, memory: PhysicalMemory, pages: PageAllocator, top_level: int, address_bits: int
    ) -> None:
        self.format = fmt
        self.top_level = top_level
        self.address_bits = address_bits
        self.extra_leaf_bits = 0
        self._memory = memory
        self._words = memory.words
        self._pages = pages
        # The level-0 table that was written last, and which 2 MiB it spans.
        self._recent_key = -1
        self._recent = 0
        self.root = pages.alloc()

    # -- map ---------------------------------------------------------------------------------------------------------

    def map(self, iova: int, pa: int, length: int, prot: int, pgsize_bitmap: int) -> list[int]:
        """Map [iova, iova + length) to `pa`; the tables that were freed (flush before giving them back).

        EINVAL: no R or W in `prot`, no length; ERANGE: outside the address widths; EOVERFLOW: the range wraps; ENXIO:
        no page size fits; EADDRINUSE: a leaf is in the way; ENOMEM.
        """
        if not prot & 3 or not length:
            raise KernelError(errno.EINVAL, "a mapping without permission or length")
        end = iova + length
        if end > _U64:
            raise KernelError(errno.EOVERFLOW, f"{iova:#x}+{length:#x} wraps")
        if end - 1 >> self.address_bits or pa >> _OUTPUT_BITS:
            raise KernelError(errno.ERANGE, f"iova {iova:#x}+{length:#x} or pa {pa:#x} is too wide for the table")
        bits = self.format.leaf_bits(prot, 0) | self.extra_leaf_bits
        if length == 4096 and pgsize_bitmap & 4096:
            if (iova | pa) & 4095:
                raise KernelError(errno.ENXIO, f"iova {iova:#x} or pa {pa:#x} is off 4 KiB")
            table = self._recent if self._recent_key == iova >> 21 else self._table_for(iova, 0)
            index = table + (iova >> 9 & 0xFF8) >> 3
            if self._words[index]:
                raise KernelError(errno.EADDRINUSE, f"iova {iova:#x} is mapped")
            self._words[index] = pa | bits
            return []
        freed: list[int] = []
        va = iova
        try:
            while va < end:
                lg2, stop = _best_size(pgsize_bitmap, va, pa, end)
                level = (lg2 - 12) // 9
                leaf = bits if level == 0 else self.format.leaf_bits(prot, level) | self.extra_leaf_bits
                while va < stop:
                    count = self._store(va, pa, level, min(stop - va >> lg2, 512), leaf, freed)
                    va += count << lg2
                    pa += count << lg2
        except KernelError:
            if va > iova:  # no DMA can have come between, so nothing of it is cached
                freed += self.unmap(iova, va - iova)[1]
            for table in freed:
                self._pages.free(table)
            raise
        return freed

    def _store(self, va: int, pa: int, level: int, count: int, bits: int, freed: list[int]) -> int:
        """Store up to `count` leaves of `level` from `va` on, within one table; how many it were."""
        table = self._table_for(va, level)
        lg2 = 12 + 9 * level
        index = va >> lg2 & 511
        count = min(count, 512 - index)
        start = table + 8 * index
        if self._memory.mapped[start : start + 8 * count] != _ZEROES[: 8 * count]:
            for n in range(count):
                self._make_empty(start + 8 * n, level, va + (n << lg2), freed)
        first = start >> 3
        item = pa | bits
        if count == 1:
            self._words[first] = item
        else:
            step = 1 << lg2
            self._words[first : first + count] = array("Q", range(item, item + count * step, step))
        return count

    def _make_empty(self, item_pa: int, level: int, va: int, freed: list[int]) -> None:
        """Free the empty table that an item points to. EADDRINUSE if there is a leaf in it, or the item is one."""
        item = self._words[item_pa >> 3]
        kind = self.format.kind(item, level)
        if kind == TABLE:
            below = item & self.format.address_mask
            tables: list[int] = [below]
            if self._has_leaf(below, level - 1, tables):
                raise KernelError(errno.EADDRINUSE, f"part of the large page at iova {va:#x} is mapped")
            self._words[item_pa >> 3] = 0
            self._recent_key = -1
            freed += tables
        elif kind != EMPTY:
            raise KernelError(errno.EADDRINUSE, f"iova {va:#x} is mapped")

    def _has_leaf(self, table: int, level: int, tables: list[int]) -> bool:
        for item in self._words[table >> 3 : (table >> 3) + 512].tolist():
            if item:
                if self.format.kind(item, level) == LEAF:
                    return True
                below = item & self.format.address_mask
                tables.append(below)
                if self._has_leaf(below, level - 1, tables):
                    return True
        return False

    def _table_for(self, va: int, level: int) -> int:
        """The table of `level` for `va`, made if need be. EADDRINUSE where a larger leaf is."""
        words, fmt = self._words, self.format
        table = self.root
        for above in range(self.top_level, level, -1):
            index = (table >> 3) + (va >> 12 + 9 * above & 511)
            item = words[index]
            if not item:
                table = self._pages.alloc()
                words[index] = table | fmt.table_bits()
            elif fmt.kind(item, above) == TABLE:
                table = item & fmt.address_mask
            else:
                raise KernelError(errno.EADDRINUSE, f"iova {va:#x} is in a larger page")
        if level == 0:
            self._recent_key = va >> 21
            self._recent = table
        return table

    # -- unmap -------------------------------------------------------------------------------------------------------

    def unmap(self, iova: int, length: int) -> tuple[int, list[int]]:
        """Clear leaves from `iova` on: the bytes cleared, and the tables that no longer hang in the tree.

        The caller flushes the IOTLB before it gives the tables back.
        """
        last = iova + length - 1
        if length <= 0 or last >> self.address_bits:
            return 0, []
        if length == 4096 and self._recent_key == iova >> 21 and not iova & 4095:
            index = self._recent + (iova >> 9 & 0xFF8) >> 3
            if self._words[index]:
                self._words[index] = 0
                return 4096, []
            return 0, []
        freed: list[int] = []
        unmapped, _ = self._unmap(self.root, self.top_level, iova, last, freed)
        if freed:
            self._recent_key = -1
        return unmapped, freed

    def _unmap(self, table: int, level: int, va: int, last: int, freed: list[int]) -> tuple[int, bool]:
        """Clear [va, last] within `table`; the bytes cleared, and whether the whole range was."""
        words = self._words
        first = table >> 3
        lg2 = 12 + 9 * level
        index, end = va >> lg2 & 511, (last >> lg2 & 511) + 1
        if level == 0:
            if va & 4095:
                return 0, False
            low, high = first + index, first + end
            items = words[low:high].tolist()
            count = items.index(0) if 0 in items else len(items)
            self._memory.mapped[low << 3 : low + count << 3] = _ZEROES[: count << 3]
            return count << 12, count == len(items)
        unmapped = 0
        fmt = self.format
        span = 1 << lg2
        while index < end:
            item = words[first + index]
            kind = fmt.kind(item, level)
            start = va & -span
            if kind == LEAF:
                if va != start:
                    return unmapped, False
                words[first + index] = 0
                unmapped += span
            elif kind == TABLE:
                below = item & fmt.address_mask
                stop = min(start + span - 1, last)
                cleared, whole = self._unmap(below, level - 1, va, stop, freed)
                unmapped += cleared
                if not whole:
                    return unmapped, False
                if va == start and stop == start + span - 1:
                    words[first + index] = 0
                    freed.append(below)
            else:
                return unmapped, False
            index += 1
            va = start + span
        return unmapped, True

    # -- look --------------------------------------------------------------------------------------------------------

    def iova_to_phys(self, iova: int) -> int | None:
        """The physical address behind `iova`, None where nothing is mapped."""
        if iova >> self.address_bits:
            return None
        table, fmt = self.root, self.format
        for level in range(self.top_level, -1, -1):
            item = self._words[(table >> 3) + (iova >> 12 + 9 * level & 511)]
            kind = fmt.kind(item, level)
            if kind == LEAF:
                span = 1 << fmt.item_lg2(level)
                return item & fmt.address_mask & -span | iova & span - 1
            if kind != TABLE:
                return None
            table = item & fmt.address_mask
        return None

    def tables(self) -> list[int]:
        """The physical addresses of all tables of the tree."""
        found = [self.root]
        self._collect(self.root, self.top_level, found)
        return found

    def _collect(self, table: int, level: int, found: list[int]) -> None:
        if level == 0:
            return
        for item in self._words[table >> 3 : (table >> 3) + 512].tolist():
            if item and self.format.kind(item, level) == TABLE:
                below = item & self.format.address_mask
                found.append(below)
                self._collect(below, level - 1, found)

    def free(self) -> None:
        """Give all tables back."""
        for table in self.tables():
            self._pages.free(table)
        self._recent_key = -1


def _best_size(pgsize_bitmap: int, va: int, pa: int, end: int) -> tuple[int, int]:
    """log2 of the largest page that fits at `va`, and where a run of such pages ends. ENXIO if none fits."""
    length = end - va
    sizes = pgsize_bitmap & (1 << length.bit_length()) - 1
    low_bit = (va | pa) & -(va | pa)
    if low_bit:
        sizes &= (low_bit << 1) - 1
    if not sizes:
        raise KernelError(errno.ENXIO, f"no page size fits iova {va:#x}, pa {pa:#x}, length {length:#x}")
    lg2 = sizes.bit_length() - 1
    stop = va + (length & -(1 << lg2))
    larger = pgsize_bitmap & -(2 << lg2)
    if larger:
        size = larger & -larger
        if not (va ^ pa) & size - 1:
            boundary = (va | size - 1) + 1
            if boundary + size <= end:
                stop = boundary
    return lg2, stop
