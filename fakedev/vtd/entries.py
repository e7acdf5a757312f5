"""Entries of the tables between a source and its page tables: root, context, PASID directory, PASID table.

Mirrors the VT-d specification 9.1 to 9.6. The driver writes entries with the functions here, which give their 64-bit
words; the unit reads them with the masks. A scalable context entry has 4 words and a PASID-table entry 8. Left out:
the fields of memory types (PAT, EMTE, CD) and of host permission tables, which no capability offers: reserved.
"""

from __future__ import annotations

ENTRY_PRESENT = 1 << 0
ENTRY_FPD = 1 << 1
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
_ALL = (1 << 64) - 1

# -- root entries (9.1, 9.2) ------------------------------------------------------------------------------------------

#: Of a legacy root entry's lower word, and of each half of a scalable one.
ROOT_RESERVED_LOW = 0xFFE
#: Everything in the upper word of a legacy root entry is reserved.
ROOT_RESERVED_HIGH = _ALL

# -- context entries of legacy mode (9.3) -----------------------------------------------------------------------------

CONTEXT_FPD = ENTRY_FPD
TT_SHIFT, TT_MASK = 2, 3
#: Translation types: tables without and with device TLBs, pass-through.
TT_MULTI_LEVEL, TT_DEV_IOTLB, TT_PASS_THROUGH = 0, 1, 2
CONTEXT_RESERVED_LOW = 0xFF0

AW_MASK = 7
DID_SHIFT, DID_MASK = 8, 0xFFFF
CONTEXT_RESERVED_HIGH = _ALL & ~(0x7F | DID_MASK << DID_SHIFT)

# -- context entries of scalable mode (9.4): bits of word 0, then of word 1 -------------------------------------------

SM_DTE, SM_PASIDE, SM_PRE, SM_HPTE, SM_EPTR = (1 << bit for bit in (2, 3, 4, 5, 6))
SM_PDTS_SHIFT, SM_PDTS_MASK = 9, 7
SM_RESERVED_LOW = 3 << 7
RID_PASID_MASK, RID_PRIV = 0xF_FFFF, 1 << 20
SM_RESERVED_HIGH = _ALL & ~(RID_PASID_MASK | RID_PRIV)
SM_CONTEXT_BYTES = 32

# -- PASID directory (9.5) and table (9.6) ----------------------------------------------------------------------------

#: A PASID: the upper bits choose the directory entry, the lower six the table entry.
PASID_TABLE_BITS, PASID_TABLE_MASK = 6, 0x3F
DIRECTORY_RESERVED = 0xFFC
PASID_ENTRY_BYTES = 64

# Word 0.
PASID_AW_SHIFT, PASID_AW_MASK = 2, 7
PGTT_SHIFT, PGTT_MASK = 6, 7
PGTT_FIRST, PGTT_SECOND, PGTT_NESTED, PGTT_PASS_THROUGH = 1, 2, 3, 4
PASID_SSADE = 1 << 9
PASID_RESERVED_0 = 1 << 5 | 3 << 10
# Word 1.
PASID_DID_MASK = 0xFFFF
PASID_PWSNP, PASID_PGSNP = 1 << 23, 1 << 24
PASID_RESERVED_1 = _ALL & ~(PASID_DID_MASK | PASID_PWSNP | PASID_PGSNP)
# Word 2.
PASID_SRE = 1 << 0
FSPM_SHIFT, FSPM_MASK = 2, 3
FSPM_4_LEVELS, FSPM_5_LEVELS = 0, 1
PASID_WPE, PASID_EAFE = 1 << 4, 1 << 7
PASID_RESERVED_2 = 1 << 1 | 0xF << 8

ScalableContext = tuple[int, int, int, int]
PasidEntry = tuple[int, int, int, int, int, int, int, int]


def root_entry(context_table: int) -> tuple[int, int]:
    """A present root entry: the words that point to the context table of a bus."""
    return context_table | ENTRY_PRESENT, 0


def context_entry(tt: int, table: int, aw: int, did: int) -> tuple[int, int]:
    """A present context entry: translation type, second-stage table, address width (levels - 2), domain id."""
    return table | tt << TT_SHIFT | ENTRY_PRESENT, did << DID_SHIFT | aw


def context_did(high: int) -> int:
    """The domain id in a context entry's upper word."""
    return high >> DID_SHIFT & DID_MASK


def scalable_root_entry(lower: int | None, upper: int | None) -> tuple[int, int]:
    """The words for the context tables of devices 0 to 15 and 16 to 31; None: not present."""
    return (0 if lower is None else lower | ENTRY_PRESENT), (0 if upper is None else upper | ENTRY_PRESENT)


def scalable_context_entry(
    directory: int, pdts: int, flags: int = 0, rid_pasid: int = 0, privileged: bool = False
) -> ScalableContext:
    """A present scalable context entry.

    The PASID directory at `directory` has 1 << (pdts + 7) entries. `flags` are SM_DTE, SM_PASIDE, SM_PRE and their kin;
    a request without a PASID is treated as one with `rid_pasid`, and with privilege if `privileged`.
    """
    low = directory | pdts << SM_PDTS_SHIFT | flags | ENTRY_PRESENT
    return low, rid_pasid | (RID_PRIV if privileged else 0), 0, 0


def directory_entry(table: int) -> int:
    """A present PASID-directory entry."""
    return table | ENTRY_PRESENT


def pasid_entry(
    pgtt: int,
    did: int,
    *,
    second: int = 0,
    aw: int = 0,
    dirty: bool = False,
    first: int = 0,
    fspm: int = FSPM_4_LEVELS,
    flags_1: int = 0,
    flags_2: int = 0,
) -> PasidEntry:
    """A present PASID-table entry.

    `second` is the second-stage table with `aw` (levels - 2) and accessed and dirty bits if `dirty`; `first` the
    first-stage table with the paging mode `fspm`. `flags_1`: PASID_PWSNP, PASID_PGSNP; `flags_2`: PASID_SRE, PASID_WPE,
    PASID_EAFE.
    """
    low = second | aw << PASID_AW_SHIFT | pgtt << PGTT_SHIFT | (PASID_SSADE if dirty else 0) | ENTRY_PRESENT
    return low, did | flags_1, first | fspm << FSPM_SHIFT | flags_2, 0, 0, 0, 0, 0
