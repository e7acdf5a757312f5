"""One reader for all page table formats: the hardware's walk.

`walk` goes from a root to the leaf that holds an address and says how it ended. The walk reads memory, never a driver's
objects; what it finds is what the words say. It loads through a function, so that the tables of a first stage can be
read through a second; what that function raises, but BusAbort, passes through. `explain` is the same walk in words.

The walk judges presence, reserved bits and widths, not permission: the caller compares `Walk.rights` with what its
request needs (`fakedev.pgtable.format.NEEDED`).

With `tables` a walk begins at the lowest table that an earlier one found for its address, and adds what it finds: the
paging-structure cache of a unit.

With `update` the walk keeps accessed and dirty bits as the hardware does: it sets the accessed bit of every item it
uses, and the dirty bit of the leaf if `needed` has a right to write and the path allows all of `needed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.pgtable.format import ALL_RIGHTS, LEAF, TABLE, WRITES, PageTableFormat, rights_in_words

if TYPE_CHECKING:
    from fakedev.tlb import Tables

#: How a walk ended. ADDRESS_SIZE and ACCESSED are Arm's; FETCH_FAILED: no memory answers at `item_pa`.
MAPPED, NOT_PRESENT, RESERVED_BITS, FETCH_FAILED, ADDRESS_SIZE, ACCESSED = range(6)

#: `load(pa)`: the 64-bit word at an aligned address. BusAbort.
Load: TypeAlias = Callable[[int], int]
#: `update(pa, old, new)`: compare and swap; the word that was there. BusAbort.
Update: TypeAlias = Callable[[int, int, int], int]


class Walk:
    """The end of a walk: `outcome`, and the `item` there at `item_pa` of `level`.

    Where it is MAPPED: the `rights` of the path, the `output` address of the address walked for, and `lg2`, the log2
    of the page around it. `cacheable` are the rights that a cache may hold: those to write are missing as long as the
    leaf's dirty bit has to be set by the next write, which must walk again.
    """

    __slots__ = ("cacheable", "item", "item_pa", "level", "lg2", "outcome", "output", "rights")

    def __init__(
        self,
        outcome: int,
        level: int,
        item_pa: int,
        item: int,
        rights: int = 0,
        lg2: int = 0,
        output: int = 0,
        cacheable: int = 0,
    ) -> None:
        self.outcome = outcome
        self.level = level
        self.item_pa = item_pa
        self.item = item
        self.rights = rights
        self.lg2 = lg2
        self.output = output
        self.cacheable = cacheable


def load_word(memory: PhysicalMemory, pa: int) -> int:
    """A 64-bit load of the hardware at an aligned address. BusAbort."""
    if memory.ram_start <= pa < memory.ram_end:
        return memory.words[pa >> 3]
    return int.from_bytes(memory.read(pa, 8), "little")


def loader(memory: PhysicalMemory) -> Load:
    """`load_word` for one memory."""
    words, start, end, read = memory.words, memory.ram_start, memory.ram_end, memory.read

    def load(pa: int) -> int:
        if start <= pa < end:
            return words[pa >> 3]
        return int.from_bytes(read(pa, 8), "little")

    return load


def updater(memory: PhysicalMemory) -> Update:
    """Compare and swap of a 64-bit word of one memory."""

    def update(pa: int, old: int, new: int) -> int:
        there = load_word(memory, pa)
        if there == old:
            memory.write(pa, new.to_bytes(8, "little"))
        return there

    return update


def walk(
    fmt: PageTableFormat,
    load: Load,
    root: int,
    top_level: int,
    address: int,
    needed: int = 0,
    update: Update | None = None,
    tables: Tables | None = None,
) -> Walk:
    """Walk from the table at `root`, which is of `top_level`, to the leaf of `address`.

    The caller has checked that `address` is one that the tables can hold; bits above the root's are ignored.
    """
    rights = ALL_RIGHTS
    table = root
    level = top_level
    bits = fmt.index_bits
    shift = fmt.granule_lg2 + bits * level
    mask = (1 << (fmt.root_index_bits or bits)) - 1
    plain_mask, plain_value, address_mask = fmt.plain_mask, fmt.plain_value, fmt.address_mask
    if tables is not None:
        for known in range(top_level):
            found = tables[known].get(address >> fmt.granule_lg2 + bits * (known + 1))
            if found is not None:
                table, rights = found
                level = known
                shift = fmt.granule_lg2 + bits * level
                mask = (1 << bits) - 1
                break
    while True:
        item_pa = table + ((address >> shift & mask) << 3)
        try:
            item = load(item_pa)
        except BusAbort:
            return Walk(FETCH_FAILED, level, item_pa, 0)
        mask = (1 << bits) - 1
        if level:
            if item & plain_mask == plain_value:
                table = item & address_mask
                level -= 1
                if tables is not None:
                    tables[level][address >> shift] = table, rights
                shift -= bits
                continue
        elif item & fmt.plain_leaf_mask == fmt.plain_leaf_value and rights == ALL_RIGHTS:
            output = item & address_mask | address & (1 << shift) - 1
            return Walk(MAPPED, 0, item_pa, item, fmt.plain_leaf_rights, shift, output, fmt.plain_leaf_rights)
        kind = fmt.kind(item, level)
        if kind != TABLE and kind != LEAF:
            return Walk(NOT_PRESENT, level, item_pa, item)
        if fmt.reserved(item, level):
            return Walk(ADDRESS_SIZE if fmt.reserved_is_address_size else RESERVED_BITS, level, item_pa, item)
        if kind == LEAF:
            if fmt.accessed_fault(item, level):
                return Walk(ACCESSED, level, item_pa, item)
            break
        if update is not None:
            item = _update(fmt, update, item_pa, item, level, fmt.with_accessed(item, level))
            if item < 0:
                return walk(fmt, load, root, top_level, address, needed, update, tables)
        rights &= fmt.rights(item, level)
        following = fmt.next_level(item, level, address)
        if following < 0:
            return Walk(NOT_PRESENT, level, item_pa, item)
        table = fmt.table_address(item, level)
        if tables is not None and following == level - 1:
            tables[following][address >> shift] = table, rights
        level = following
        shift = fmt.granule_lg2 + bits * level
    allowed = fmt.settle(rights & fmt.rights(item, level))
    cacheable = allowed
    if update is not None:
        new = fmt.with_accessed(item, level)
        if needed & WRITES and needed & allowed == needed:
            new = fmt.with_dirty(new, level)
        item = _update(fmt, update, item_pa, item, level, new)
        if item < 0:
            return walk(fmt, load, root, top_level, address, needed, update, tables)
        if fmt.with_dirty(item, level) != item:
            cacheable = allowed & ~WRITES
    return Walk(
        MAPPED, level, item_pa, item, allowed, fmt.leaf_lg2(item, level), fmt.output(item, level, address), cacheable
    )


def _update(fmt: PageTableFormat, update: Update, item_pa: int, item: int, level: int, new: int) -> int:
    """Turn `item` into `new`; the new item, or -1 if another agent changed it meanwhile."""
    if new == item:
        return item
    return new if update(item_pa, item, new) == item else -1


def contiguous_pages(memory: PhysicalMemory, end: Walk, address: int, length: int) -> int:
    """How many 4 KiB pages of [address, address + length) continue the leaf at `end` in the same table.

    Units cache no more than these with one walk: pages that a request touches.
    """
    index = end.item_pa >> 3 & 511
    wanted = min((address & 4095) + length + 4095 >> 12, 512 - index)
    if wanted > 1 and memory.ram_start <= end.item_pa and end.item_pa + 8 * wanted <= memory.ram_end:
        first = end.item_pa >> 3
        words = memory.words
        item = end.item
        for n in range(1, wanted):
            item += 4096
            if words[first + n] != item:
                return n
        return wanted
    return 1


def explain(fmt: PageTableFormat, load: Load, root: int, top_level: int, address: int) -> list[str]:
    """The same walk, a line an item."""
    lines = []
    table, level = root, top_level
    bits = fmt.root_index_bits or fmt.index_bits
    while True:
        index = address >> fmt.item_lg2(level) & (1 << bits) - 1
        bits = fmt.index_bits
        try:
            item = load(table + 8 * index)
        except BusAbort:
            lines.append(f"level {level} table {table:#x}: nothing answers there")
            break
        kind = fmt.kind(item, level)
        allowed = rights_in_words(fmt.rights(item, level), fmt.letters)
        where = f"level {level} table {table:#x}[{index}] = {item:#018x}"
        reserved = fmt.reserved(item, level)
        if kind == TABLE:
            lines.append(f"{where}: table {fmt.table_address(item, level):#x}, {allowed}")
        elif kind == LEAF:
            lg2 = fmt.leaf_lg2(item, level)
            base = fmt.output(item, level, address) & -(1 << lg2)
            lines.append(f"{where}: page of {1 << lg2:#x} bytes at {base:#x}, {allowed}")
            if fmt.accessed_fault(item, level):
                lines.append("  accessed flag clear")
        else:
            lines.append(f"{where}: not present")
        if reserved and kind in (TABLE, LEAF):
            what = "output address too wide" if fmt.reserved_is_address_size else "reserved bits set"
            lines.append(f"  {what}: {reserved:#x}")
        if kind != TABLE or reserved:
            break
        table, level = fmt.table_address(item, level), fmt.next_level(item, level, address)
        if level < 0:
            lines.append("  the address has bits set that this pointer skips")
            break
    return lines
