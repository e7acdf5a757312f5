"""Arm VMSAv8-64 tables as an SMMUv3 reads them: stage 1 and stage 2, granules of 4, 16 and 64 KiB.

Mirrors the Arm architecture manual (DDI 0487), chapter D8 "The AArch64 Virtual Memory System Architecture", and what
Arm IHI 0070 (SMMUv3) says of CD and STE fields that change it; drivers/iommu/io-pgtable-arm.c writes these tables.
The manual counts levels from the root (3 holds pages); here level 0 holds pages: level = 3 - the manual's.

A descriptor that the manual reserves (a block at a wrong level, 0b01 at the last) is invalid: a translation fault.
Left out: the formats of FEAT_LPA2 (52 bits with 4 and 16 KiB), permission indirection, memory attributes and
shareability, which the model has no use for, and NS.
"""

from __future__ import annotations

from fakedev.pgtable.format import (
    ALL_RIGHTS,
    EMPTY,
    LEAF,
    PRIVILEGED,
    TABLE,
    PageTableFormat,
    R,
    W,
    X,
    both,
)

VALID, TABLE_OR_PAGE = 1 << 0, 1 << 1
_TYPE = VALID | TABLE_OR_PAGE
AP1_UNPRIVILEGED, AP2_READ_ONLY = 1 << 6, 1 << 7
S2AP_R, S2AP_W = 1 << 6, 1 << 7
SH_OUTER, SH_INNER = 2 << 8, 3 << 8
AF = 1 << 10
NG = 1 << 11
DBM = 1 << 51
CONTIGUOUS = 1 << 52
PXN, UXN = 1 << 53, 1 << 54
S2XN = 3 << 53
PXN_TABLE, UXN_TABLE = 1 << 59, 1 << 60
AP_TABLE_NO_UNPRIVILEGED, AP_TABLE_READ_ONLY = 1 << 61, 1 << 62
_HIERARCHICAL = PXN_TABLE | UXN_TABLE | AP_TABLE_NO_UNPRIVILEGED | AP_TABLE_READ_ONLY
ATTRINDX_SHIFT = MEMATTR_SHIFT = 2
#: The memory types that Linux uses: indices into MAIR (stage 1), and stage 2's own codes.
ATTRINDX_CACHE, ATTRINDX_DEVICE = 1, 2
MEMATTR_WRITE_BACK, MEMATTR_NON_CACHEABLE, MEMATTR_DEVICE, MEMATTR_FWB_WRITE_BACK = 0xF, 0x5, 0x1, 0x6

#: Bits of `prot` (include/linux/iommu.h).
_READ, _WRITE, _CACHE, _NOEXEC, _MMIO, _PRIV = 1, 2, 4, 8, 16, 32

#: log2 of how many items a contiguous hint joins, by granule and level. UNVERIFIED: none for blocks of 4 TiB.
_CONTIGUOUS_LG2 = {12: (4, 4, 4), 14: (7, 5, 0), 16: (5, 5, 0)}


def stage2_top_level(granule_lg2: int, sl0: int, input_bits: int, output_bits: int) -> int | None:
    """The level of a stage-2 root by STE.S2SL0 (D8.2.4 and 5.2 "S2SL0"); None for a combination that is illegal.

    `output_bits` is what the unit implements (IDR5.OAS): what levels there are depends on it, and not on S2PS.
    """
    level = (1 if granule_lg2 == 12 else 0) + sl0
    if sl0 == 3:
        if granule_lg2 != 12:
            return None
        level = 0  # FEAT_TTST: one level of 4 KiB tables
    if granule_lg2 == 12 and level == 3 and output_bits <= 42:
        return None
    if granule_lg2 == 14 and level == 2 and output_bits <= 40:
        return None
    if granule_lg2 == 16 and level == 2 and output_bits <= 42:
        return None
    index_bits = granule_lg2 - 3
    root_bits = input_bits - granule_lg2 - index_bits * level
    return level if 1 <= root_bits <= index_bits + 4 else None


class _Arm64(PageTableFormat):
    """What the stages have in common.

    `input_bits` is 64 - TxSZ, `output_bits` the effective output size (CD.IPS or STE.S2PS, at most OAS), `lpa` whether
    the unit has addresses of 52 bits: then 64 KiB descriptors carry bits 51:48. `affd`: a clear accessed flag is no
    fault; `ha`, `hd`: the hardware sets it, and the dirty state.
    """

    reserved_is_address_size = True

    def __init__(
        self,
        granule_lg2: int,
        input_bits: int,
        output_bits: int,
        top_level: int,
        lpa: bool | None,
        affd: bool,
        ha: bool,
        hd: bool,
    ) -> None:
        self.granule_lg2 = granule_lg2
        self.index_bits = granule_lg2 - 3
        self.input_bits = input_bits
        self.output_bits = output_bits
        self.top_level = top_level
        self.root_index_bits = input_bits - self.item_lg2(top_level)
        wide = granule_lg2 == 16 and (output_bits == 52 if lpa is None else lpa)
        self.max_leaf_level = {12: 2, 14: 1, 16: 2 if wide else 1}[granule_lg2]
        self.address_mask = (1 << 48) - (1 << granule_lg2)
        self._high = 0xF000 if wide else 0
        self._beyond = self.address_mask & -(1 << output_bits)
        self._beyond_high = self._high if output_bits < 52 else 0
        self._contiguous = _CONTIGUOUS_LG2[granule_lg2]
        self._faults_on_af = not affd and not ha
        self._ha = AF if ha else 0
        self._hd = hd and ha
        #: AF must be set for a plain leaf, unless nobody looks at it.
        self._af_plain = AF if self._faults_on_af or ha else 0

    def kind(self, item: int, level: int) -> int:
        if not item & VALID:
            return EMPTY
        if item & TABLE_OR_PAGE:
            return TABLE if level else LEAF
        return LEAF if 0 < level <= self.max_leaf_level else EMPTY

    def reserved(self, item: int, level: int) -> int:
        address = item & self.address_mask
        if level and not item & TABLE_OR_PAGE:
            address &= -(1 << self.item_lg2(level))
        return address & self._beyond | item & self._beyond_high

    def table_address(self, item: int, level: int) -> int:
        return item & self.address_mask | (item & self._high) << 36

    def leaf_lg2(self, item: int, level: int) -> int:
        lg2 = self.item_lg2(level)
        if item & CONTIGUOUS:
            joined = lg2 + self._contiguous[level]
            if joined <= self.input_bits:
                return joined
        return lg2

    def output(self, item: int, level: int, address: int) -> int:
        mask = (1 << self.item_lg2(level)) - 1
        return item & self.address_mask & ~mask | (item & self._high) << 36 | address & mask

    def accessed_fault(self, item: int, level: int) -> bool:
        return self._faults_on_af and not item & AF

    def with_accessed(self, item: int, level: int) -> int:
        return item if level and item & TABLE_OR_PAGE else item | self._ha

    def address_bits_of(self, pa: int) -> int:
        """`pa` as it stands in a descriptor."""
        return pa & self.address_mask | pa >> 36 & 0xF000

    def table_bits(self) -> int:
        return _TYPE

    def table_item(self, pa: int, level: int) -> int:
        return self.address_bits_of(pa) | _TYPE

    def leaf_address(self, pa: int, lg2: int, level: int) -> int:
        return self.address_bits_of(pa)


class Arm64Stage1(_Arm64):
    """Stage 1, the tables of one TTB.

    `hierarchical` is false with CD.HADx; `one_privilege` is a stream world without EL0 (EL2, EL3): AP[1] and PXN mean
    nothing there. `wxn`: what may be written is not executable; `pan`: privileged requests have no data access to what
    unprivileged ones have.
    """

    name = "arm_64_lpae_s1"

    def __init__(
        self,
        granule_lg2: int = 12,
        input_bits: int = 48,
        output_bits: int = 48,
        *,
        lpa: bool | None = None,
        affd: bool = False,
        ha: bool = False,
        hd: bool = False,
        hierarchical: bool = True,
        one_privilege: bool = False,
        wxn: bool = False,
        pan: bool = False,
    ) -> None:
        index_bits = granule_lg2 - 3
        top_level = -(-(input_bits - granule_lg2) // index_bits) - 1
        super().__init__(granule_lg2, input_bits, output_bits, top_level, lpa, affd, ha, hd)
        self._hierarchical = hierarchical
        self._one = one_privilege
        self._wxn = wxn
        self._pan = pan
        self.plain_mask = _TYPE | self._beyond | self._high | (_HIERARCHICAL if hierarchical else 0)
        self.plain_value = _TYPE
        permissions = AP1_UNPRIVILEGED | AP2_READ_ONLY | PXN | UXN
        self.plain_leaf_mask = _TYPE | permissions | self._af_plain | CONTIGUOUS | self._beyond | self._high
        self.plain_leaf_value = _TYPE | AP1_UNPRIVILEGED | self._af_plain
        self.plain_leaf_rights = self.settle(self.rights(self.plain_leaf_value, 0))

    def rights(self, item: int, level: int) -> int:
        if level and item & TABLE_OR_PAGE:
            return self._rights_of_table(item) if self._hierarchical and item & _HIERARCHICAL else ALL_RIGHTS
        data = R if item & AP2_READ_ONLY and not (self._hd and item & DBM) else R | W
        if self._one:
            return both(data | (0 if item & UXN else X))
        allowed = data << PRIVILEGED
        if item & AP1_UNPRIVILEGED:
            allowed |= data
        if not item & UXN:
            allowed |= X
        if not item & PXN:
            allowed |= X << PRIVILEGED
        return allowed

    def _rights_of_table(self, item: int) -> int:
        allowed = ALL_RIGHTS
        if item & AP_TABLE_READ_ONLY:
            allowed &= ~both(W)
        if item & UXN_TABLE:
            allowed &= ~(both(X) if self._one else X)
        if not self._one:
            if item & AP_TABLE_NO_UNPRIVILEGED:
                allowed &= ~(R | W)
            if item & PXN_TABLE:
                allowed &= ~(X << PRIVILEGED)
        return allowed

    def settle(self, rights: int) -> int:
        if rights & W and not self._one:
            rights &= ~(X << PRIVILEGED)  # what EL0 may write, EL1 does not execute
        if self._wxn:
            if rights & W:
                rights &= ~X
            if rights & W << PRIVILEGED:
                rights &= ~(X << PRIVILEGED)
        if self._pan and rights & (R | W) and not self._one:
            rights &= ~((R | W) << PRIVILEGED)
        return rights

    def with_dirty(self, item: int, level: int) -> int:
        return item & ~AP2_READ_ONLY if self._hd and item & DBM else item

    def is_dirty(self, item: int, level: int) -> bool:
        return item & (DBM | AP2_READ_ONLY) == DBM

    def with_clean(self, item: int, level: int) -> int:
        return item | AP2_READ_ONLY

    def leaf_bits(self, prot: int, level: int) -> int:
        """arm_lpae_prot_to_pte() for stage 1. With `hd` a writable leaf starts dirty, as the kernel's do."""
        bits = VALID | (0 if level else TABLE_OR_PAGE) | NG | AF
        if prot & (_READ | _WRITE) == _READ:
            bits |= AP2_READ_ONLY
        elif self._hd:
            bits |= DBM
        if not prot & _PRIV:
            bits |= AP1_UNPRIVILEGED
        if prot & _MMIO:
            bits |= ATTRINDX_DEVICE << ATTRINDX_SHIFT
        elif prot & _CACHE:
            bits |= ATTRINDX_CACHE << ATTRINDX_SHIFT
        if prot & _NOEXEC:
            bits |= UXN | PXN
        return bits | (SH_INNER if prot & _CACHE else SH_OUTER)


class Arm64Stage2(_Arm64):
    """Stage 2. `top_level` is that of the root (`stage2_top_level`); the root may be up to 16 tables in a row.

    `xnx`: execution is told apart by privilege (SMMU_IDR3.XNX). `fwb`: STE.S2FWB, for what software writes.
    """

    name = "arm_64_lpae_s2"

    def __init__(
        self,
        granule_lg2: int = 12,
        input_bits: int = 48,
        output_bits: int = 48,
        top_level: int | None = None,
        *,
        lpa: bool | None = None,
        affd: bool = False,
        ha: bool = False,
        hd: bool = False,
        xnx: bool = False,
        fwb: bool = False,
    ) -> None:
        if top_level is None:
            top_level = -(-(input_bits - granule_lg2) // (granule_lg2 - 3)) - 1
        super().__init__(granule_lg2, input_bits, output_bits, top_level, lpa, affd, ha, hd)
        self._xnx = xnx
        self._fwb = fwb
        self.plain_mask = _TYPE | self._beyond | self._high
        self.plain_value = _TYPE
        rights = S2AP_R | S2AP_W
        self.plain_leaf_mask = _TYPE | rights | S2XN | self._af_plain | CONTIGUOUS | self._beyond | self._high
        self.plain_leaf_value = _TYPE | rights | self._af_plain

    def rights(self, item: int, level: int) -> int:
        if level and item & TABLE_OR_PAGE:
            return ALL_RIGHTS
        data = item >> 6 & (R | W)
        if self._hd and item & DBM:
            data |= W
        execute = item >> 53 & 3
        if not self._xnx:
            execute &= 2
        return both(data) | (both(X), X, 0, X << PRIVILEGED)[execute]

    def with_dirty(self, item: int, level: int) -> int:
        return item | S2AP_W if self._hd and item & DBM else item

    def is_dirty(self, item: int, level: int) -> bool:
        return item & (DBM | S2AP_W) == DBM | S2AP_W

    def with_clean(self, item: int, level: int) -> int:
        return item & ~S2AP_W

    def leaf_bits(self, prot: int, level: int) -> int:
        """arm_lpae_prot_to_pte() for stage 2."""
        bits = VALID | (0 if level else TABLE_OR_PAGE) | AF | (prot & (_READ | _WRITE)) << 6
        if prot & _MMIO:
            memory = MEMATTR_DEVICE
        elif prot & _CACHE:
            memory = MEMATTR_FWB_WRITE_BACK if self._fwb else MEMATTR_WRITE_BACK
        else:
            memory = MEMATTR_NON_CACHEABLE
        bits |= memory << MEMATTR_SHIFT
        if prot & _NOEXEC:
            bits |= S2XN
        return bits | (SH_INNER if prot & _CACHE else SH_OUTER)
