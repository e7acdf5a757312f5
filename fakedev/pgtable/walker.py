"""One reader for all page table formats: the hardware's walk.

`walk` goes from a root to the leaf that holds an address and says how it ended. The walk reads memory, never a driver's
objects; what it finds is what the words say. `explain` is the same walk in words, for people.
"""

from __future__ import annotations

from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.pgtable.format import LEAF, TABLE, PageTableFormat

#: How a walk ended.
MAPPED, NOT_PRESENT, RESERVED_BITS, FETCH_FAILED = range(4)


class Walk:
    """The end of a walk: `outcome`, the `item` there at `item_pa` of `level`, and READ | WRITE that the path allows."""

    __slots__ = ("item", "item_pa", "level", "outcome", "permissions")

    def __init__(self, outcome: int, level: int, item_pa: int, item: int, permissions: int) -> None:
        self.outcome = outcome
        self.level = level
        self.item_pa = item_pa
        self.item = item
        self.permissions = permissions


def load_word(memory: PhysicalMemory, pa: int) -> int:
    """A 64-bit load of the hardware at an aligned address. BusAbort."""
    if pa + 8 <= memory.ram_size:
        return memory.words[pa >> 3]
    return int.from_bytes(memory.read(pa, 8), "little")


def walk(fmt: PageTableFormat, memory: PhysicalMemory, root: int, top_level: int, address: int) -> Walk:
    """Walk from the table at `root`, which is of `top_level`, to the leaf of `address`."""
    permissions = 3
    table = root
    level = top_level
    while True:
        item_pa = table + ((address >> 12 + 9 * level & 511) << 3)
        try:
            item = load_word(memory, item_pa)
        except BusAbort:
            return Walk(FETCH_FAILED, level, item_pa, 0, 0)
        kind = fmt.kind(item, level)
        if kind != TABLE and kind != LEAF:
            return Walk(NOT_PRESENT, level, item_pa, item, 0)
        if fmt.reserved(item, level):
            return Walk(RESERVED_BITS, level, item_pa, item, 0)
        permissions &= fmt.permissions(item)
        if kind == LEAF:
            return Walk(MAPPED, level, item_pa, item, permissions)
        table = item & fmt.address_mask
        level -= 1


def explain(fmt: PageTableFormat, memory: PhysicalMemory, root: int, top_level: int, address: int) -> list[str]:
    """The same walk, a line an item."""
    lines = []
    table = root
    for level in range(top_level, -1, -1):
        index = address >> fmt.item_lg2(level) & (1 << fmt.index_bits) - 1
        try:
            item = load_word(memory, table + 8 * index)
        except BusAbort:
            lines.append(f"level {level} table {table:#x}: nothing answers there")
            break
        kind = fmt.kind(item, level)
        allowed = "".join(name for bit, name in ((1, "R"), (2, "W")) if fmt.permissions(item) & bit) or "-"
        where = f"level {level} table {table:#x}[{index}] = {item:#018x}"
        reserved = fmt.reserved(item, level)
        if kind == TABLE:
            lines.append(f"{where}: table {item & fmt.address_mask:#x}, {allowed}")
        elif kind == LEAF:
            base = item & fmt.address_mask & -(1 << fmt.item_lg2(level))
            lines.append(f"{where}: page of {1 << fmt.item_lg2(level):#x} bytes at {base:#x}, {allowed}")
        else:
            lines.append(f"{where}: not present")
        if reserved:
            lines.append(f"  reserved bits set: {reserved:#x}")
        if kind != TABLE or reserved:
            break
        table = item & fmt.address_mask
    return lines
