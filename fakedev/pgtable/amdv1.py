"""AMD's v1 host tables, 1 to 6 levels.

Mirrors the AMD I/O Virtualization Technology (IOMMU) Specification (48882), 2.2.3 "I/O Page Tables for Host
Translations", and drivers/iommu/generic_pt/fmt/amdv1.h. A table pointer names the level of the table it points to, and
may skip levels whose address bits are zero. A leaf is of its level's size (next level 0), or of any larger power of
two below the next level's (next level 7): then it stands in all the items that it covers, and the ones at the low end
of its address tell the size.

UNVERIFIED: that table pointers, too, get their accessed bit set (no unit of the model reads this format yet).
Left out: encrypted tables, and FC, which is there for software to write.
"""

from __future__ import annotations

from fakedev.pgtable.format import EMPTY, LEAF, TABLE, PageTableFormat, R, W, X, both

PR = 1 << 0
A, D = 1 << 5, 1 << 6
NEXT_LEVEL_SHIFT, NEXT_LEVEL_MASK = 9, 7 << 9
NL_DEFAULT, NL_SIZE = 0, 7
FC, IR, IW = 1 << 60, 1 << 61, 1 << 62
_RESERVED_LEAF = 0x7F << 52
_RESERVED_TABLE = 0x1FF << 52
_RIGHTS = (0, both(R | X), both(W), both(R | W | X))


class AmdV1(PageTableFormat):
    """The format as one unit reads it. `access_dirty`: it sets accessed and dirty bits (DTE.HAD)."""

    name = "amdv1"
    letters = "RW"
    max_leaf_level = 4

    def __init__(self, output_bits: int = 52, access_dirty: bool = False) -> None:
        self.output_bits = output_bits
        self._beyond = self.address_mask & -(1 << output_bits)
        self._accessed = A if access_dirty else 0
        self._dirty = D if access_dirty else 0
        reserved = self._beyond | _RESERVED_LEAF
        self.plain_leaf_mask = PR | IR | IW | NEXT_LEVEL_MASK | reserved | self._accessed | self._dirty
        self.plain_leaf_value = PR | IR | IW | self._accessed | self._dirty

    def kind(self, item: int, level: int) -> int:
        if not item & PR:
            return EMPTY
        if level == 0 or item >> NEXT_LEVEL_SHIFT & 7 in (NL_DEFAULT, NL_SIZE):
            return LEAF
        return TABLE

    def rights(self, item: int, level: int) -> int:
        return _RIGHTS[item >> 61 & 3]

    def reserved(self, item: int, level: int) -> int:
        following = item >> NEXT_LEVEL_SHIFT & 7
        if following == NL_SIZE:
            lg2 = self.leaf_lg2(item, level)
            if not self.item_lg2(level) < lg2 < self.item_lg2(level + 1):
                return item & NEXT_LEVEL_MASK
            return item & (self._beyond | _RESERVED_LEAF)
        if following == NL_DEFAULT:
            low = (1 << self.item_lg2(level)) - (1 << self.granule_lg2)
            return item & (self._beyond | _RESERVED_LEAF | low) if level <= 4 else PR
        if following > level:
            return item & NEXT_LEVEL_MASK
        return item & (self._beyond | _RESERVED_TABLE)

    def next_level(self, item: int, level: int, address: int) -> int:
        following = (item >> NEXT_LEVEL_SHIFT & 7) - 1
        skipped = (1 << self.item_lg2(level)) - (1 << self.item_lg2(following + 1))
        return -1 if address & skipped else following

    def leaf_lg2(self, item: int, level: int) -> int:
        if item >> NEXT_LEVEL_SHIFT & 7 == NL_SIZE:
            ones = (item & self.address_mask) >> 12
            return 13 + (~ones & ones + 1).bit_length() - 1
        return self.item_lg2(level)

    def output(self, item: int, level: int, address: int) -> int:
        mask = (1 << self.leaf_lg2(item, level)) - 1
        return item & self.address_mask & ~mask | address & mask

    def with_accessed(self, item: int, level: int) -> int:
        return item | self._accessed

    def with_dirty(self, item: int, level: int) -> int:
        return item | self._accessed | self._dirty

    def is_dirty(self, item: int, level: int) -> bool:
        return bool(item & D)

    def with_clean(self, item: int, level: int) -> int:
        return item & ~D

    def table_bits(self) -> int:
        return PR | IR | IW

    def table_item(self, pa: int, level: int) -> int:
        return pa | PR | IR | IW | level << NEXT_LEVEL_SHIFT

    def leaf_bits(self, prot: int, level: int) -> int:
        return PR | (prot & 3) << 61

    def leaf_sizes(self, level: int) -> int:
        """Every power of two from the item's size to half a table's; 512 GiB is left out (a bug of the hardware)."""
        if level > self.max_leaf_level:
            return 0
        lowest = self.item_lg2(level)
        return (1 << min(51, lowest + self.index_bits - 1) + 1) - (1 << lowest) & ~(1 << 39)

    def leaf_address(self, pa: int, lg2: int, level: int) -> int:
        if lg2 == self.item_lg2(level):
            return pa
        return pa | NL_SIZE << NEXT_LEVEL_SHIFT | (1 << lg2 - 1) - (1 << 12)
