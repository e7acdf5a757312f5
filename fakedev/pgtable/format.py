"""What a page table format is: bits, and nothing else.

The vocabulary is that of drivers/iommu/generic_pt: a *table* has *items*; an item is empty, a *leaf* (it names output
memory) or a table pointer; level 0 holds leaves only. A format says which is which and where the bits are. The walker
reads tables by it (the hardware's side); `kernel_model/iommu/pgtable.py` writes them by it (the kernel's side).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

#: Kinds of an item.
EMPTY, TABLE, LEAF = range(3)


class PageTableFormat(ABC):
    """Tables of 512 items of 64 bits, 4 KiB granule. Subclass it for one architecture's bits."""

    name = ""
    granule_lg2 = 12
    index_bits = 9
    #: The highest level that may hold leaves (2: 1 GiB).
    max_leaf_level = 2
    #: The output address in an item, at any level.
    address_mask = 0x000F_FFFF_FFFF_F000

    def item_lg2(self, level: int) -> int:
        """log2 of the bytes that an item of `level` covers."""
        return self.granule_lg2 + self.index_bits * level

    @abstractmethod
    def kind(self, item: int, level: int) -> int:
        """EMPTY, TABLE or LEAF."""

    @abstractmethod
    def permissions(self, item: int) -> int:
        """READ | WRITE as this one item allows; those of a path are the intersection."""

    @abstractmethod
    def reserved(self, item: int, level: int) -> int:
        """The bits set in `item` that must be zero."""

    @abstractmethod
    def table_bits(self) -> int:
        """The attribute bits of a table pointer."""

    @abstractmethod
    def leaf_bits(self, prot: int, level: int) -> int:
        """The attribute bits of a leaf with IOMMU_READ | IOMMU_WRITE from `prot`."""
