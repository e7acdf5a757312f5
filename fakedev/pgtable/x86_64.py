"""x86-64 tables of 4 and 5 levels: VT-d's first stage.

Mirrors the VT-d specification, 3.6 "First-Stage Translation" and 9.7 "First-Stage Paging Entries" (revision 5.10), and
drivers/iommu/generic_pt/fmt/x86_64.h. Addresses are checked for canonical form before the walk, by the unit.
Left out: protection keys and memory types.
"""

from __future__ import annotations

from fakedev.pgtable.format import EMPTY, LEAF, PRIVILEGED, TABLE, PageTableFormat, R, W, X, both

FS_P, FS_RW, FS_US = 1 << 0, 1 << 1, 1 << 2
FS_A, FS_D = 1 << 5, 1 << 6
FS_PS = 1 << 7
FS_EA = 1 << 10
FS_PAT_LARGE = 1 << 12
FS_XD = 1 << 63
_WRITE = 2


class X86FirstStage(PageTableFormat):
    """The format as one unit reads it for one PASID-table entry.

    `fs1gp` is the capability for 1 GiB pages; `wpe` the entry's write-protect enable (without it privileged requests
    write everywhere); `eafe` its extended-accessed flag enable. `execute_disable`: bit 63 forbids execution, as AMD's
    guest tables have it; VT-d ignores the bit.
    """

    name = "x86_64"

    def __init__(
        self,
        host_address_bits: int = 52,
        fs1gp: bool = True,
        *,
        wpe: bool = True,
        eafe: bool = False,
        execute_disable: bool = False,
    ) -> None:
        beyond = self.address_mask & -(1 << host_address_bits)
        self.output_bits = host_address_bits
        self.max_leaf_level = 2 if fs1gp else 1
        self._table_reserved = beyond
        self._leaf_reserved = [beyond]
        for level in (1, 2):
            low = (1 << self.item_lg2(level)) - 2 * FS_PAT_LARGE
            self._leaf_reserved.append(beyond | low if level <= self.max_leaf_level else FS_PS)
        self._accessed = FS_A | (FS_EA if eafe else 0)
        self._execute = FS_XD if execute_disable else 0
        self.letters = "RWX" if execute_disable else "RW"
        privileged_write = W << PRIVILEGED
        #: By the bits R/W and U/S.
        self._rights = [
            both(X) | R << PRIVILEGED | (0 if wpe else privileged_write),
            both(X) | R << PRIVILEGED | privileged_write,
            both(X) | both(R) | (0 if wpe else privileged_write),
            both(X | R | W),
        ]
        self.plain_mask = FS_P | FS_RW | FS_US | FS_PS | self._accessed | self._execute | beyond
        self.plain_value = FS_P | FS_RW | FS_US | self._accessed
        self.plain_leaf_mask = self.plain_mask & ~FS_PS | FS_D
        self.plain_leaf_value = self.plain_value | FS_D

    def kind(self, item: int, level: int) -> int:
        if not item & FS_P:
            return EMPTY
        return LEAF if level == 0 or item & FS_PS else TABLE

    def rights(self, item: int, level: int) -> int:
        allowed = self._rights[item >> 1 & 3]
        return allowed & ~both(X) if item & self._execute else allowed

    def reserved(self, item: int, level: int) -> int:
        if level == 0 or item & FS_PS:
            return item & (self._leaf_reserved[level] if level < 3 else FS_PS)
        return item & self._table_reserved

    def with_accessed(self, item: int, level: int) -> int:
        return item | self._accessed

    def with_dirty(self, item: int, level: int) -> int:
        return item | self._accessed | FS_D

    def is_dirty(self, item: int, level: int) -> bool:
        return bool(item & FS_D)

    def with_clean(self, item: int, level: int) -> int:
        return item & ~FS_D

    def table_bits(self) -> int:
        return FS_P | FS_RW | FS_US | FS_A

    def leaf_bits(self, prot: int, level: int) -> int:
        """The kernel's leaves are accessed and, where writable, dirty from the start: no update by the hardware."""
        return FS_P | FS_US | FS_A | (FS_RW | FS_D if prot & _WRITE else 0) | (FS_PS if level else 0)
