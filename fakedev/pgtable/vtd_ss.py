"""VT-d second-stage tables, 3 to 5 levels.

Mirrors the VT-d specification, 3.7 "Second-Stage Translation" and 9.8 "Second-Stage Paging Entries", and
drivers/iommu/generic_pt/fmt/vtdss.h. An item is present when its R or W bit is set; permissions are ANDed on the way.
Left out: memory types.
"""

from __future__ import annotations

from fakedev.pgtable.format import EMPTY, LEAF, TABLE, PageTableFormat, R, W, X, both

SS_R, SS_W = 1 << 0, 1 << 1
SS_PS = 1 << 7
SS_A, SS_D = 1 << 8, 1 << 9
SS_SNP = 1 << 11
SS_TM = 1 << 62  # transient mapping, a leaf's; in tables reserved (the manual's IW, without SSIRWE)
_PRESENT = SS_R | SS_W
#: Whatever may be read may be executed; privilege plays no part.
_RIGHTS = (0, both(R | X), both(W), both(R | W | X))


class VtdSecondStage(PageTableFormat):
    """The format as one unit implements it: how wide addresses are, which large pages and bits it has.

    `sllps` is the capability's field (bit 0: 2 MiB, bit 1: 1 GiB); `snoop_control` and `device_tlb` are SC and DT of
    the extended capability: without them SNP and TM are reserved. `dirty_tracking` is SSADE of a PASID-table entry:
    the walker given an `update` then sets accessed and dirty bits, which are ignored without it.
    """

    name = "vtd_ss"
    letters = "RW"

    def __init__(
        self,
        host_address_bits: int = 52,
        sllps: int = 3,
        snoop_control: bool = True,
        device_tlb: bool = True,
        dirty_tracking: bool = False,
    ) -> None:
        beyond = self.address_mask & -(1 << host_address_bits)
        leaf = beyond | (0 if snoop_control else SS_SNP) | (0 if device_tlb else SS_TM)
        self._reserved = [leaf & ~SS_PS]
        for level in (1, 2):
            low = (1 << self.item_lg2(level)) - (1 << self.granule_lg2)
            self._reserved.append(leaf | low if sllps >> level - 1 & 1 else SS_PS)
        self._reserved_in_tables = beyond | SS_SNP | SS_TM
        self.max_leaf_level = {0: 0, 1: 1}.get(sllps, 2)
        self.output_bits = host_address_bits
        self._accessed = SS_A if dirty_tracking else 0
        self._dirty = SS_D if dirty_tracking else 0
        self.plain_mask = _PRESENT | SS_PS | self._reserved_in_tables | self._accessed
        self.plain_value = _PRESENT | self._accessed
        self.plain_leaf_mask = _PRESENT | self._reserved[0] | self._accessed | self._dirty
        self.plain_leaf_value = _PRESENT | self._accessed | self._dirty

    def kind(self, item: int, level: int) -> int:
        if not item & _PRESENT:
            return EMPTY
        return LEAF if level == 0 or item & SS_PS else TABLE

    def rights(self, item: int, level: int) -> int:
        return _RIGHTS[item & _PRESENT]

    def reserved(self, item: int, level: int) -> int:
        if level == 0 or item & SS_PS:
            return item & (self._reserved[level] if level < 3 else SS_PS)
        return item & self._reserved_in_tables

    def with_accessed(self, item: int, level: int) -> int:
        return item | self._accessed

    def with_dirty(self, item: int, level: int) -> int:
        return item | self._dirty

    def is_dirty(self, item: int, level: int) -> bool:
        return bool(item & SS_D)

    def with_clean(self, item: int, level: int) -> int:
        return item & ~SS_D

    def table_bits(self) -> int:
        return SS_R | SS_W

    def leaf_bits(self, prot: int, level: int) -> int:
        return prot & _PRESENT | (SS_PS if level else 0)
