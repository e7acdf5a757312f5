"""Root and context entries of VT-d's legacy mode.

Mirrors the VT-d specification 9.1 "Root Entry" and 9.3 "Context Entry". The driver writes them with `root_entry` and
`context_entry`; the unit reads them with the masks. Left out: the scalable-mode entries.
"""

from __future__ import annotations

ENTRY_PRESENT = 1 << 0
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000

ROOT_RESERVED_LOW = 0xFFE
#: Everything in the upper word of a legacy root entry is reserved.
ROOT_RESERVED_HIGH = (1 << 64) - 1

CONTEXT_FPD = 1 << 1
TT_SHIFT, TT_MASK = 2, 3
#: Translation types: tables without and with device TLBs, pass-through.
TT_MULTI_LEVEL, TT_DEV_IOTLB, TT_PASS_THROUGH = 0, 1, 2
CONTEXT_RESERVED_LOW = 0xFF0

AW_MASK = 7
DID_SHIFT, DID_MASK = 8, 0xFFFF
CONTEXT_RESERVED_HIGH = ((1 << 64) - 1) & ~(0x7F | DID_MASK << DID_SHIFT)


def root_entry(context_table: int) -> tuple[int, int]:
    """A present root entry: the words that point to the context table of a bus."""
    return context_table | ENTRY_PRESENT, 0


def context_entry(tt: int, table: int, aw: int, did: int) -> tuple[int, int]:
    """A present context entry: translation type, second-stage table, address width (levels - 2), domain id."""
    return table | tt << TT_SHIFT | ENTRY_PRESENT, did << DID_SHIFT | aw


def context_did(high: int) -> int:
    """The domain id in a context entry's upper word."""
    return high >> DID_SHIFT & DID_MASK
