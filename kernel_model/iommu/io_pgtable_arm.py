"""Arm's tables as Linux writes them: the formats that it chooses, and where its map and unmap differ from generic_pt's.

Mirrors drivers/iommu/io-pgtable-arm.c at 7.3 and the loops around it in drivers/iommu/iommu.c (`iommu_map_nosync`,
`__iommu_unmap`, `iommu_pgsize`). Beside `kernel_model/iommu/pgtable.py` a client can tell:

- A leaf in the way is EEXIST. A table in the way of a block is freed with all that it maps.
- What is asked for is cut into the domain's page sizes by alignment alone, also when unmapping: a block-sized piece
  takes a whole table of pages away, holes or not, and a piece smaller than the leaf there stops the unmapping.
- A dirty bit is reported for a leaf's size from where the walk stands; a hole in the range is EINVAL.

Left out: contiguous hints (the driver writes none), TTB1, the 32-bit and Mali formats, software bits of walkers that
do not snoop.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.memory import PhysicalMemory
from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2
from fakedev.pgtable.format import EMPTY, LEAF, TABLE
from kernel_model.errors import KernelError
from kernel_model.iommu.pgtable import PageTable, best_size
from kernel_model.page_alloc import PageAllocator

if TYPE_CHECKING:
    from kernel_model.iommufd.iova_bitmap import IovaBitmap

_K4, _K16, _K64 = 1 << 12, 1 << 14, 1 << 16
_SIZES = {_K4: _K4 | 1 << 21 | 1 << 30, _K16: _K16 | 1 << 25, _K64: _K64 | 1 << 29}


def restrict_pgsizes(pgsize_bitmap: int, oas: int) -> int:
    """arm_lpae_restrict_pgsizes(): of a unit's page sizes those of one granule, 4 KiB where there is a choice; 0: none.

    `oas`: bits of an output address.
    """
    low = pgsize_bitmap & _K4 or pgsize_bitmap & -pgsize_bitmap
    sizes = _SIZES.get(low, 0)
    if low == _K64 and oas > 48:
        sizes |= 1 << 42
    return pgsize_bitmap & sizes


def _widths(granule: int, ias: int, oas: int) -> tuple[int, int]:
    limit = 52 if granule == _K64 else 48
    return min(ias, limit), min(oas, limit)


def stage1_format(pgsize_bitmap: int, ias: int, oas: int, *, dirty_tracking: bool = False) -> Arm64Stage1:
    """arm_64_lpae_alloc_pgtable_s1(): the format of a stage-1 domain on a unit of these sizes and widths. EINVAL."""
    granule = _granule(restrict_pgsizes(pgsize_bitmap, oas))
    ias, oas = _widths(granule, ias, oas)
    return Arm64Stage1(granule.bit_length() - 1, ias, oas, ha=dirty_tracking, hd=dirty_tracking)


def stage2_format(pgsize_bitmap: int, ias: int, oas: int, *, fwb: bool = False) -> Arm64Stage2:
    """arm_64_lpae_alloc_pgtable_s2(): the same for stage 2; its root is two tables or more only where it must be."""
    granule = _granule(restrict_pgsizes(pgsize_bitmap, oas))
    ias, oas = _widths(granule, ias, oas)
    lg2 = granule.bit_length() - 1
    top_level = -(-(ias - lg2) // (lg2 - 3)) - 1
    if (
        (granule == _K16 and top_level == 3 and 48 in (ias, oas))
        or (granule == _K4 and top_level == 3 and oas in (40, 42))
        or (granule == _K16 and top_level == 2 and oas == 40)
    ):
        top_level -= 1
    return Arm64Stage2(lg2, ias, oas, top_level, fwb=fwb)


def stage2_sl0(fmt: Arm64Stage2) -> int:
    """STE.S2SL0 for a stage-2 table of this format."""
    return fmt.top_level - 1 if fmt.granule_lg2 == 12 else fmt.top_level


def _granule(pgsize_bitmap: int) -> int:
    if not pgsize_bitmap & (_K4 | _K16 | _K64):
        raise KernelError(errno.EINVAL, f"no granule among the page sizes {pgsize_bitmap:#x}")
    return pgsize_bitmap & -pgsize_bitmap


class ArmPageTable(PageTable):
    """A tree of one of the formats above; the root's level is the format's."""

    __slots__ = ()

    format: Arm64Stage1 | Arm64Stage2

    def __init__(self, fmt: Arm64Stage1 | Arm64Stage2, memory: PhysicalMemory, pages: PageAllocator) -> None:
        super().__init__(fmt, memory, pages, fmt.top_level, fmt.input_bits)

    def map(self, iova: int, pa: int, length: int, prot: int, pgsize_bitmap: int) -> list[int]:
        """Map [iova, iova + length) to `pa`; the tables that were freed (flush before giving them back).

        EINVAL: off the smallest page size, no R or W in `prot`; ERANGE: outside the address widths; EEXIST: a leaf is
        in the way; ENOMEM.
        """
        if (iova | pa | length) & (pgsize_bitmap & -pgsize_bitmap) - 1:
            raise KernelError(
                errno.EINVAL, f"iova {iova:#x}, pa {pa:#x} or length {length:#x} is off the smallest page"
            )
        if not length:
            return []
        end = iova + length
        freed: list[int] = []
        va = iova
        try:
            while va < end:
                lg2, stop = best_size(pgsize_bitmap, va, pa, end)
                level = self.level_of(lg2)
                while va < stop:
                    if va >> self.address_bits or pa >> self.format.output_bits:
                        raise KernelError(errno.ERANGE, f"iova {va:#x} or pa {pa:#x} is too wide for the table")
                    if not prot & 3:
                        raise KernelError(errno.EINVAL, "a mapping without permission")
                    leaf = self.format.leaf_bits(prot, level) | self.extra_leaf_bits
                    count = self._store(va, pa, lg2, level, stop - va >> lg2, leaf, freed)
                    va += count << lg2
                    pa += count << lg2
        except KernelError:
            if va > iova:
                freed += self.unmap_by(iova, va - iova, pgsize_bitmap)[1]
            for table in freed:
                self._pages.free(table)
            raise
        return freed

    def _make_empty(self, item_pa: int, level: int, va: int, freed: list[int]) -> None:
        item = self._words[item_pa >> 3]
        kind = self.format.kind(item, level)
        if kind == TABLE:
            below = self.format.table_address(item, level)
            self._words[item_pa >> 3] = 0
            freed.append(below)
            self._collect(below, level - 1, freed)
        elif kind != EMPTY:
            raise self._in_use(va)

    def _in_use(self, va: int) -> KernelError:
        return KernelError(errno.EEXIST, f"iova {va:#x} is mapped")

    def unmap(self, iova: int, length: int) -> tuple[int, list[int]]:
        """`unmap_by` with all the sizes that the table can hold."""
        return self.unmap_by(iova, length, self.possible_sizes())

    def unmap_by(self, iova: int, length: int, pgsize_bitmap: int) -> tuple[int, list[int]]:
        """Unmap [iova, iova + length) in pieces of the domain's page sizes; the bytes unmapped, the tables freed.

        The caller flushes the IOTLB before it gives the tables back.
        """
        freed: list[int] = []
        if length <= 0 or (iova | length) & (pgsize_bitmap & -pgsize_bitmap) - 1 or iova >> self.address_bits:
            return 0, freed
        va, end = iova, iova + length
        while va < end:
            lg2, stop = best_size(pgsize_bitmap, va, va, end)
            size = self._unmap_pages(va, lg2, stop - va >> lg2, freed) if not va >> self.address_bits else 0
            if not size:
                break
            va += size
        return va - iova, freed

    def _unmap_pages(self, va: int, lg2: int, count: int, freed: list[int]) -> int:
        """__arm_lpae_unmap(): clear up to `count` items of 1 << lg2 bytes within one table; the bytes cleared."""
        words, fmt = self._words, self.format
        level, target = self.top_level, self.level_of(lg2)
        table = self.root
        while level > target:
            item = words[(table >> 3) + self._index(va, level)]
            if fmt.kind(item, level) != TABLE:
                return 0
            table = fmt.table_address(item, level)
            level -= 1
        index = self._index(va, level)
        # A table of the root's row ends where a table ends, as elsewhere.
        count = min(count, self._mask + 1 - (index & self._mask))
        first = (table >> 3) + index
        done = 0
        for item in words[first : first + count].tolist():
            if not item:
                break
            if fmt.kind(item, level) != LEAF:
                below = fmt.table_address(item, level)
                freed.append(below)
                self._collect(below, level - 1, freed)
            words[first + done] = 0
            done += 1
        return done << lg2

    def read_and_clear_dirty(
        self, iova: int, length: int, clear: bool, bitmap: IovaBitmap | None
    ) -> tuple[int, int] | None:
        """As in the base class. EINVAL: no length, outside the table, a hole in the range, or a stage-2 table."""
        if not length or iova + length - 1 >> self.address_bits or not isinstance(self.format, Arm64Stage1):
            raise KernelError(errno.EINVAL, f"no dirty bits at {iova:#x}+{length:#x}")
        words, fmt = self._words, self.format
        va, end = iova, iova + length
        seen: list[int] = []
        while va < end:
            table, level = self.root, self.top_level
            while True:
                index = self._index(va, level)
                item = words[(table >> 3) + index]
                kind = fmt.kind(item, level)
                if kind != TABLE:
                    break
                table = fmt.table_address(item, level)
                level -= 1
            lg2 = fmt.item_lg2(level)
            entries = (self._root_mask if level == self.top_level else self._mask) + 1
            stop = min(index + (end - va + (1 << lg2) - 1 >> lg2), entries)
            start, dirty = va, 0
            for n in range(index, stop):
                item = words[(table >> 3) + n]
                if fmt.kind(item, level) != LEAF:
                    break
                if fmt.is_dirty(item, level):
                    dirty |= 1 << n - index
                    seen += (va, va + (1 << lg2) - 1)
                    if clear:
                        words[(table >> 3) + n] = fmt.with_clean(item, level)
                va += 1 << lg2
            if dirty and bitmap is not None:
                bitmap.set_leaves(start, lg2, dirty.bit_length(), dirty)
            if va == start:
                raise KernelError(errno.EINVAL, f"iova {va:#x} is not mapped")
        return (seen[0], seen[-1]) if seen else None
