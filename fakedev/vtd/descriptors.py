"""Descriptors of the invalidation queue, 128 bits each.

Mirrors the VT-d specification 6.5.2: context-cache (1), IOTLB (2), interrupt-entry-cache (4) and wait (5) descriptors.
Functions make the two words; constants take them apart. Left out: device-TLB and PASID descriptors.
"""

from __future__ import annotations

TYPE_MASK = 0xE0F  # bits 11:9 and 3:0
CC_TYPE, IOTLB_TYPE, DIOTLB_TYPE, IEC_TYPE, WAIT_TYPE = 1, 2, 3, 4, 5

GRANULARITY_SHIFT = 4
GLOBAL, DOMAIN, SELECTIVE = 1, 2, 3
DID_SHIFT, DID_MASK = 16, 0xFFFF

#: Context cache: source id and the function bits of it that are ignored.
CC_SID_SHIFT, CC_FM_SHIFT = 32, 48
CC_RESERVED = ((1 << 64) - 1) & ~(0x3F | 0xFFFF << 16 | 0xFFFF << 32 | 3 << 48)

IOTLB_DW, IOTLB_DR = 1 << 6, 1 << 7
IOTLB_IH = 1 << 6
IOTLB_AM_MASK = 0x3F
IOTLB_RESERVED_LOW = ((1 << 64) - 1) & ~(0xFF | 0xFFFF << 16)
IOTLB_RESERVED_HIGH = 0xF80

WAIT_IF, WAIT_SW, WAIT_FN = 1 << 4, 1 << 5, 1 << 6
WAIT_DATA_SHIFT = 32
WAIT_RESERVED_LOW = 0xFFFF_FF80


def context_cache(did: int, sid: int, function_mask: int, granularity: int) -> tuple[int, int]:
    """Forget cached context entries: all, those of a domain, or one source's."""
    return function_mask << CC_FM_SHIFT | sid << CC_SID_SHIFT | did << DID_SHIFT | granularity << 4 | CC_TYPE, 0


def iotlb(did: int, address: int, mask: int, granularity: int, hint: int = 0) -> tuple[int, int]:
    """Forget translations: all, a domain's, or 1 << mask pages of a domain at `address`; drains reads and writes."""
    low = did << DID_SHIFT | granularity << 4 | IOTLB_DW | IOTLB_DR | IOTLB_TYPE
    return low, address & -4096 | (IOTLB_IH if hint else 0) | mask


def wait(status_address: int, status: int, interrupt: bool = False) -> tuple[int, int]:
    """When everything before is done, store the 32-bit `status`."""
    return status << WAIT_DATA_SHIFT | WAIT_SW | (WAIT_IF if interrupt else 0) | WAIT_TYPE, status_address
