"""What a page table format is: bits, and nothing else.

The vocabulary is that of drivers/iommu/generic_pt: a *table* has *items*; an item is empty, a *leaf* (it names output
memory) or a table pointer; level 0 holds leaves only. A format says which is which and where the bits are. The walker
reads tables by it (the hardware's side); `kernel_model/iommu/pgtable.py` writes them by it (the kernel's side).

*Rights* are six bits: read, write, execute for a request without privilege, and the same three again, shifted by
PRIVILEGED, for one with it. An item allows some; what a path allows is the intersection, then `settle()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

#: Kinds of an item.
EMPTY, TABLE, LEAF = range(3)

#: Rights of a request without privilege.
R, W, X = 1, 2, 4
#: By how much the rights of a request with privilege are shifted.
PRIVILEGED = 3
#: All rights; those to write.
ALL_RIGHTS = 0o77
WRITES = W | W << PRIVILEGED

#: The rights that a request needs, by its access bits (READ 1, WRITE 2, EXECUTE 4, PRIVILEGED 8 of fakedev/dma.py).
NEEDED = tuple((access & 7) << (PRIVILEGED if access & 8 else 0) for access in range(16))


def both(rights: int) -> int:
    """The same three rights with and without privilege."""
    return rights | rights << PRIVILEGED


def rights_in_words(rights: int, letters: str = "RWX") -> str:
    """The `letters` of the rights and, where they differ, those of privileged requests."""
    low, high = (
        "".join(letter for n, letter in enumerate(letters) if part >> n & 1) or "nothing"
        for part in (rights & 7, rights >> PRIVILEGED)
    )
    return low if low == high else f"{low} (privileged: {high})"


class PageTableFormat(ABC):
    """One architecture's bits, as one configuration of a unit reads them. Items are 64-bit words.

    A format is made once for a configuration and shared: it has no state.
    """

    name = ""
    #: log2 of the smallest page and of a table's entries.
    granule_lg2 = 12
    index_bits = 9
    #: Entries of the root table, as log2; more than `index_bits` where tables are concatenated. None: as the others.
    root_index_bits: int | None = None
    #: The highest level that may hold leaves (2: 1 GiB).
    max_leaf_level = 2
    #: The output address in an item, at any level.
    address_mask = 0x000F_FFFF_FFFF_F000
    #: Bits of an output address.
    output_bits = 52
    #: An item above level 0 with `item & plain_mask == plain_value` is a table pointer that allows everything, has no
    #: reserved bit set, wants no update and holds its address under `address_mask`. The walker passes quickly over it.
    plain_mask = 0
    plain_value = 1
    #: The same for an item of level 0: a leaf of the smallest page that gives `plain_leaf_rights`.
    plain_leaf_mask = 0
    plain_leaf_value = 1
    plain_leaf_rights = ALL_RIGHTS
    #: The rights that the format tells apart.
    letters = "RWX"
    #: `reserved()` tells of output addresses that are too wide (Arm), not of reserved bits.
    reserved_is_address_size = False

    def item_lg2(self, level: int) -> int:
        """log2 of the bytes that an item of `level` covers."""
        return self.granule_lg2 + self.index_bits * level

    def table_bytes(self) -> int:
        """The size of a table that is not the root."""
        return 8 << self.index_bits

    # -- what an item says -------------------------------------------------------------------------------------------

    @abstractmethod
    def kind(self, item: int, level: int) -> int:
        """EMPTY, TABLE or LEAF."""

    @abstractmethod
    def rights(self, item: int, level: int) -> int:
        """The rights that this one item allows."""

    @abstractmethod
    def reserved(self, item: int, level: int) -> int:
        """The bits set in `item` that must be zero."""

    def settle(self, rights: int) -> int:
        """What is left of a whole path's rights (rules that combine them, as "writable is not executable")."""
        return rights

    def table_address(self, item: int, level: int) -> int:
        """The table that a table pointer of `level` names."""
        return item & self.address_mask

    def next_level(self, item: int, level: int, address: int) -> int:
        """The level of the table that a table pointer of `level` names. AMD's may skip some; -1: not for `address`."""
        return level - 1

    def leaf_lg2(self, item: int, level: int) -> int:
        """log2 of the page that a leaf belongs to: the item's, or more where items are joined by a hint."""
        return self.item_lg2(level)

    def output(self, item: int, level: int, address: int) -> int:
        """The output address for `address`, which a leaf of `level` maps."""
        mask = (1 << self.item_lg2(level)) - 1
        return item & self.address_mask & ~mask | address & mask

    # -- accessed and dirty ------------------------------------------------------------------------------------------

    def accessed_fault(self, item: int, level: int) -> bool:
        """The leaf's accessed flag is clear, and that is a fault (Arm, where hardware does not set it)."""
        return False

    def with_accessed(self, item: int, level: int) -> int:
        """What the hardware turns `item` into when a walk uses it."""
        return item

    def with_dirty(self, item: int, level: int) -> int:
        """What the hardware turns a leaf into when it is written through."""
        return item

    def is_dirty(self, item: int, level: int) -> bool:
        """Software's view: this leaf has been written through."""
        return False

    def with_clean(self, item: int, level: int) -> int:
        """What software turns a dirty leaf into."""
        return item

    # -- what software writes ----------------------------------------------------------------------------------------

    @abstractmethod
    def table_bits(self) -> int:
        """The attribute bits of a table pointer."""

    def table_item(self, pa: int, level: int) -> int:
        """A table pointer of `level` to the table at `pa`."""
        return pa | self.table_bits()

    @abstractmethod
    def leaf_bits(self, prot: int, level: int) -> int:
        """The attribute bits of a leaf for the IOMMU_READ, IOMMU_WRITE and their kin in `prot`."""

    def leaf_sizes(self, level: int) -> int:
        """The sizes of pages that software makes of items of `level`, as a bitmap."""
        return 1 << self.item_lg2(level) if level <= self.max_leaf_level else 0

    def leaf_address(self, pa: int, lg2: int, level: int) -> int:
        """What stands in a leaf for the page of 1 << `lg2` bytes at `pa`: address and size. It stands in every item."""
        return pa
