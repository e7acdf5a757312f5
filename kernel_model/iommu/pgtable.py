"""Page tables in memory, written by any format: one map, unmap and dirty log for all vendors.

Mirrors drivers/iommu/generic_pt/iommu_pt.h and its vocabulary (`fakedev/pgtable/format.py`). What a client can tell:

- Each piece of a mapping gets the largest page that IOVA, physical address, length and the domain's page sizes allow.
- Mapping over a leaf fails, and nothing of that mapping stays. Empty tables in the way of a large page are freed.
- Unmapping works on whole leaves: it stops at the first hole or in front of a leaf that begins before the range, and
  takes a leaf that reaches beyond the range whole.
- A table is freed when one unmap covers all that it spans; a table that was emptied piece by piece stays.
- Dirty bits are read and cleared by whole leaves.

A page may be several items of a table that tell of one another (AMD's page sizes): they are written and cleared
together. Left out: growing the top level, a table for the upper half of signed addresses, cache flushing for walkers
that do not snoop (model memory is coherent).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fakedev.memory import PhysicalMemory
from fakedev.pgtable.format import EMPTY, LEAF, TABLE, PageTableFormat
from fakedev.pgtable.walker import MAPPED, loader, walk
from kernel_model.errors import KernelError
from kernel_model.page_alloc import PageAllocator

if TYPE_CHECKING:
    from kernel_model.iommufd.iova_bitmap import IovaBitmap

#: As much as the largest root: 16 tables of 64 KiB.
_ZEROES = bytes(1 << 20)
_U64 = 1 << 64


class PageTable:
    """One tree of tables with its root at `root`, which is of `top_level`, for IOVAs of `address_bits` bits.

    `extra_leaf_bits` is ORed into every leaf that is made from now on.
    """

    __slots__ = (
        "_granule_lg2",
        "_index_bits",
        "_linear",
        "_load",
        "_mask",
        "_memory",
        "_one_size",
        "_output_bits",
        "_pages",
        "_quick",
        "_recent",
        "_recent_key",
        "_recent_lg2",
        "_root_mask",
        "_table_bytes",
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
        self._load = loader(memory)
        self._pages = pages
        self._granule_lg2 = fmt.granule_lg2
        self._index_bits = fmt.index_bits
        self._mask = (1 << fmt.index_bits) - 1
        self._root_mask = (1 << (fmt.root_index_bits or fmt.index_bits)) - 1
        self._table_bytes = fmt.table_bytes()
        #: Every leaf is one item.
        self._one_size = all(fmt.leaf_sizes(n) in (0, 1 << fmt.item_lg2(n)) for n in range(top_level + 1))
        #: A page of 4 KiB is an item of a table that is not the root.
        self._quick = fmt.granule_lg2 == 12 and top_level > 0
        #: A page's address stands in its leaf as it is.
        self._linear = type(fmt).leaf_address is PageTableFormat.leaf_address
        self._output_bits = fmt.output_bits
        # The level-0 table that was written last, and which range it spans; never the root.
        self._recent_lg2 = fmt.item_lg2(1)
        self._recent_key = -1
        self._recent = 0
        self.root = pages.alloc(8 * (self._root_mask + 1))

    def possible_sizes(self) -> int:
        """get_info(): the page sizes that the table can hold, as a bitmap."""
        sizes = 0
        for level in range(self.top_level + 1):
            sizes |= self.format.leaf_sizes(level)
        return sizes & (1 << self.address_bits - 1) - 1 & (1 << self.format.output_bits) - 1

    def _index(self, va: int, level: int) -> int:
        return va >> self._granule_lg2 + self._index_bits * level & (
            self._root_mask if level == self.top_level else self._mask
        )

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
        if end - 1 >> self.address_bits or pa >> self._output_bits:
            raise KernelError(errno.ERANGE, f"iova {iova:#x}+{length:#x} or pa {pa:#x} is too wide for the table")
        if length == 4096 and self._quick and pgsize_bitmap & 4096:
            if (iova | pa) & 4095:
                raise KernelError(errno.ENXIO, f"iova {iova:#x} or pa {pa:#x} is off 4 KiB")
            table = self._recent if self._recent_key == iova >> 21 else self._table_for(iova, 0)
            index = table + (iova >> 9 & 0xFF8) >> 3
            if self._words[index]:
                raise KernelError(errno.EADDRINUSE, f"iova {iova:#x} is mapped")
            self._words[index] = pa | self.format.leaf_bits(prot, 0) | self.extra_leaf_bits
            return []
        freed: list[int] = []
        va = iova
        try:
            while va < end:
                lg2, stop = best_size(pgsize_bitmap, va, pa, end)
                level = self.level_of(lg2)
                leaf = self.format.leaf_bits(prot, level) | self.extra_leaf_bits
                while va < stop:
                    count = self._store(va, pa, lg2, level, stop - va >> lg2, leaf, freed)
                    va += count << lg2
                    pa += count << lg2
        except KernelError:
            if va > iova:  # no DMA can have come between, so nothing of it is cached
                freed += self.unmap(iova, va - iova)[1]
            for table in freed:
                self._pages.free(table)
            raise
        return freed

    def level_of(self, lg2: int) -> int:
        """The level whose items hold pages of 1 << `lg2` bytes."""
        return (lg2 - self._granule_lg2) // self._index_bits

    def _store(self, va: int, pa: int, lg2: int, level: int, count: int, bits: int, freed: list[int]) -> int:
        """Store up to `count` leaves of 1 << lg2 bytes from `va` on, within one table; how many it were."""
        fmt = self.format
        table = self._table_for(va, level)
        item_lg2 = self._granule_lg2 + self._index_bits * level
        mask = self._root_mask if level == self.top_level else self._mask
        index = va >> item_lg2 & mask
        step_lg2 = lg2 - item_lg2
        count = min(count, mask + 1 - index >> step_lg2)
        start = table + 8 * index
        length = 8 * (count << step_lg2)
        if self._memory.mapped[start : start + length] != _ZEROES[:length]:
            for n in range(count << step_lg2):
                self._make_empty(start + 8 * n, level, va + (n << item_lg2), freed)
        first = start >> 3
        if self._linear and count > 1:
            item = pa | bits
            self._words[first : first + count] = array("Q", range(item, item + (count << lg2), 1 << lg2))
            return count
        item = fmt.leaf_address(pa, lg2, level) | bits
        if count == 1 and not step_lg2:
            self._words[first] = item
            return 1
        last = fmt.leaf_address(pa + (count - 1 << lg2), lg2, level) | bits
        items: Sequence[int]
        if last - item == count - 1 << lg2:
            items = range(item, last + 1, 1 << lg2)
        else:
            items = [fmt.leaf_address(pa + (n << lg2), lg2, level) | bits for n in range(count)]
        if step_lg2:
            items = [item for item in items for _ in range(1 << step_lg2)]
        self._words[first : first + len(items)] = array("Q", items)
        return count

    def _make_empty(self, item_pa: int, level: int, va: int, freed: list[int]) -> None:
        """Free the empty table that an item points to. EADDRINUSE if there is a leaf in it, or the item is one."""
        item = self._words[item_pa >> 3]
        kind = self.format.kind(item, level)
        if kind == TABLE:
            below = self.format.table_address(item, level)
            tables: list[int] = [below]
            if self._has_leaf(below, level - 1, tables):
                raise KernelError(errno.EADDRINUSE, f"part of the large page at iova {va:#x} is mapped")
            self._words[item_pa >> 3] = 0
            self._recent_key = -1
            freed += tables
        elif kind != EMPTY:
            raise KernelError(errno.EADDRINUSE, f"iova {va:#x} is mapped")

    def _items(self, table: int, level: int) -> list[int]:
        """All items of a table."""
        entries = (self._root_mask if level == self.top_level else self._mask) + 1
        found: list[int] = self._words[table >> 3 : (table >> 3) + entries].tolist()
        return found

    def _has_leaf(self, table: int, level: int, tables: list[int]) -> bool:
        for item in self._items(table, level):
            if item:
                if self.format.kind(item, level) == LEAF:
                    return True
                below = self.format.table_address(item, level)
                tables.append(below)
                if self._has_leaf(below, level - 1, tables):
                    return True
        return False

    def _table_for(self, va: int, level: int) -> int:
        """The table of `level` for `va`, made if need be. EADDRINUSE where a larger leaf is."""
        words, fmt = self._words, self.format
        table = self.root
        mask, bits = self._root_mask, self._index_bits
        shift = self._granule_lg2 + bits * self.top_level
        for above in range(self.top_level, level, -1):
            index = (table >> 3) + (va >> shift & mask)
            mask = self._mask
            shift -= bits
            item = words[index]
            if not item:
                table = self._pages.alloc(self._table_bytes)
                words[index] = fmt.table_item(table, above)
            elif fmt.kind(item, above) == TABLE:
                table = fmt.table_address(item, above)
            else:
                raise self._in_use(va)
        if level == 0 and self.top_level:
            self._recent_key = va >> self._recent_lg2
            self._recent = table
        return table

    def _in_use(self, va: int) -> KernelError:
        return KernelError(errno.EADDRINUSE, f"iova {va:#x} is in a larger page")

    # -- unmap -------------------------------------------------------------------------------------------------------

    def unmap(self, iova: int, length: int) -> tuple[int, list[int]]:
        """Unmap [iova, iova + length): the bytes unmapped from `iova` on, and the tables that were freed.

        The caller flushes the IOTLB before it gives the tables back.
        """
        last = iova + length - 1
        if length <= 0 or last >> self.address_bits:
            return 0, []
        if length == 4096 and self._recent_key == iova >> 21 and self._quick and self._one_size and not iova & 4095:
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
        fmt = self.format
        first = table >> 3
        lg2 = self._granule_lg2 + self._index_bits * level
        mask = self._root_mask if level == self.top_level else self._mask
        index, end = va >> lg2 & mask, (last >> lg2 & mask) + 1
        span = 1 << lg2
        if level == 0 and self._one_size:
            if va & span - 1:
                return 0, False
            low, high = first + index, first + end
            items = words[low:high].tolist()
            count = items.index(0) if 0 in items else len(items)
            self._memory.mapped[low << 3 : low + count << 3] = _ZEROES[: count << 3]
            return count << lg2, count == len(items)
        unmapped = 0
        while index < end:
            item = words[first + index]
            kind = fmt.kind(item, level)
            start = va & -span
            if kind == LEAF:
                if self._one_size:
                    if va != start:
                        return unmapped, False
                    words[first + index] = 0
                    unmapped += span
                    index += 1
                    va += span
                    continue
                leaf_lg2 = fmt.leaf_lg2(item, level)
                if va & (1 << leaf_lg2) - 1:
                    return unmapped, False
                step = 1 << leaf_lg2 - lg2
                low = first + index
                self._memory.mapped[low << 3 : low + step << 3] = _ZEROES[: step << 3]
                unmapped += 1 << leaf_lg2
                index += step
                va = start + (1 << leaf_lg2)
                continue
            if kind != TABLE:
                return unmapped, False
            below = fmt.table_address(item, level)
            stop = min(start + span - 1, last)
            cleared, whole = self._unmap(below, level - 1, va, stop, freed)
            unmapped += cleared
            if not whole:
                return unmapped, False
            if va == start and stop == start + span - 1:
                words[first + index] = 0
                freed.append(below)
            index += 1
            va = start + span
        return unmapped, True

    # -- dirty bits --------------------------------------------------------------------------------------------------

    def read_and_clear_dirty(
        self, iova: int, length: int, clear: bool, bitmap: IovaBitmap | None
    ) -> tuple[int, int] | None:
        """Report the dirty leaves that meet the range to `bitmap`, whole; make them clean if told to `clear`.

        The IOVAs [first, last] to flush before their next write counts, None where nothing was dirty. EINVAL: no
        length; EOVERFLOW: the range wraps; ERANGE: it is outside the table.
        """
        last = iova + length - 1
        if length <= 0:
            raise KernelError(errno.EINVAL, "no length")
        if last >= _U64:
            raise KernelError(errno.EOVERFLOW, f"{iova:#x}+{length:#x} wraps")
        if last >> self.address_bits:
            raise KernelError(errno.ERANGE, f"{iova:#x}+{length:#x} is outside the table")
        seen: list[int] = []
        self._dirty(self.root, self.top_level, iova, last, clear, bitmap, seen)
        return (seen[0], seen[-1]) if seen else None

    def _dirty(
        self, table: int, level: int, va: int, last: int, clear: bool, bitmap: IovaBitmap | None, seen: list[int]
    ) -> None:
        words, fmt = self._words, self.format
        lg2 = fmt.item_lg2(level)
        index, end = self._index(va, level), self._index(last, level)
        base = (va >> lg2) - index << lg2
        first = table >> 3
        single = 0  # dirty leaves of one item, from `index` on
        n = index
        while n <= end:
            item = words[first + n]
            kind = fmt.kind(item, level) if item else EMPTY
            step = 1
            if kind == TABLE:
                low = base + (n << lg2)
                below = fmt.table_address(item, level)
                high = low + (1 << lg2) - 1
                self._dirty(below, level - 1, max(va, low), min(last, high), clear, bitmap, seen)
            elif kind == LEAF:
                step = 1 << fmt.leaf_lg2(item, level) - lg2
                n &= -step
                if any(fmt.is_dirty(item, level) for item in words[first + n : first + n + step].tolist()):
                    start = base + (n << lg2)
                    if step > 1 and bitmap is not None:
                        bitmap.set_leaves(start, lg2 + step.bit_length() - 1, 1, 1)
                    elif step == 1:
                        single |= 1 << n - index
                    if clear:
                        for k in range(first + n, first + n + step):
                            words[k] = fmt.with_clean(words[k], level)
                    seen += (start, start + (step << lg2) - 1)
            n += step
        if single and bitmap is not None:
            bitmap.set_leaves(base + (index << lg2), lg2, end - index + 1, single)

    # -- look --------------------------------------------------------------------------------------------------------

    def iova_to_phys(self, iova: int) -> int | None:
        """The physical address behind `iova`, None where nothing is mapped."""
        if iova >> self.address_bits:
            return None
        found = walk(self.format, self._load, self.root, self.top_level, iova)
        return found.output if found.outcome == MAPPED else None

    def tables(self) -> list[int]:
        """The physical addresses of all tables of the tree."""
        found = [self.root]
        self._collect(self.root, self.top_level, found)
        return found

    def _collect(self, table: int, level: int, found: list[int]) -> None:
        if level == 0:
            return
        for item in self._items(table, level):
            if item and self.format.kind(item, level) == TABLE:
                below = self.format.table_address(item, level)
                found.append(below)
                self._collect(below, level - 1, found)

    def free(self) -> None:
        """Give all tables back."""
        for table in self.tables():
            self._pages.free(table)
        self._recent_key = -1


def best_size(pgsize_bitmap: int, va: int, pa: int, end: int) -> tuple[int, int]:
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
