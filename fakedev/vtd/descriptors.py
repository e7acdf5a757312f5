"""Descriptors of the invalidation queue, and those of the page request queue.

Mirrors the VT-d specification 6.5.2, 7.6.1 and 7.4.1.1. Functions make the two lower words of a descriptor, constants
take them apart; in a queue of 256-bit descriptors (IQA.DW) two words of zeros follow. Left out: the descriptor of the
host permission table's cache, which no capability offers.
"""

from __future__ import annotations

TYPE_MASK = 0xE0F  # bits 11:9 and 3:0
CC_TYPE, IOTLB_TYPE, DIOTLB_TYPE, IEC_TYPE, WAIT_TYPE = 1, 2, 3, 4, 5
PIOTLB_TYPE, PC_TYPE, PDIOTLB_TYPE, PGRP_TYPE = 6, 7, 8, 9

_ALL = (1 << 64) - 1

GRANULARITY_SHIFT = 4
GLOBAL, DOMAIN, SELECTIVE = 1, 2, 3
DID_SHIFT, DID_MASK = 16, 0xFFFF
PASID_SHIFT, PASID_MASK = 32, 0xF_FFFF

#: Context cache: source id and the function bits of it that are ignored.
CC_SID_SHIFT, CC_FM_SHIFT = 32, 48
CC_RESERVED = _ALL & ~(0x3F | 0xFFFF << 16 | 0xFFFF << 32 | 3 << 48)

#: PASID cache: granularities of its own.
PC_DOMAIN, PC_PASID, PC_GLOBAL = 0, 1, 3
PC_RESERVED = _ALL & ~(0x3F | DID_MASK << 16 | PASID_MASK << 32)

IOTLB_DW, IOTLB_DR = 1 << 6, 1 << 7
IOTLB_IH = 1 << 6
IOTLB_AM_MASK = 0x3F
IOTLB_RESERVED_LOW = _ALL & ~(0xFF | 0xFFFF << 16)
IOTLB_RESERVED_HIGH = 0xF80

#: PASID-based IOTLB: all of a PASID, or some of its pages.
PIOTLB_PASID, PIOTLB_PAGES = 2, 3
PIOTLB_RESERVED_LOW = PC_RESERVED
PIOTLB_RESERVED_HIGH = IOTLB_RESERVED_HIGH

#: Device TLB: S says that the address carries a size (see `device_tlb_range`).
DIOTLB_SID_SHIFT, DIOTLB_S = 32, 1 << 0
DIOTLB_MIP_SHIFT = 16
DIOTLB_PFSID = 0xF << 12 | 0xFFF << 52
DIOTLB_RESERVED_LOW = 0x1F << 4 | 0x7FF << 21 | 0xF << 48
DIOTLB_RESERVED_HIGH = 0xFFE

PDIOTLB_SID_SHIFT, PDIOTLB_GLOBAL, PDIOTLB_S = 16, 1 << 0, 1 << 11
PDIOTLB_MIP_SHIFT = 4
PDIOTLB_RESERVED_HIGH = 0x7FE

IEC_INDEXED, IEC_IM_SHIFT, IEC_IM_MASK, IEC_IIDX_SHIFT = 1 << 4, 27, 0x1F, 32
IEC_RESERVED_LOW = _ALL & ~(0x1F | 0x1F << 27 | 0xFFFF << 32)

WAIT_IF, WAIT_SW, WAIT_FN, WAIT_PD = 1 << 4, 1 << 5, 1 << 6, 1 << 7
WAIT_DATA_SHIFT = 32
WAIT_RESERVED_LOW = 0xFFFF_FF00

PGRP_PP, PGRP_CODE_SHIFT, PGRP_RID_SHIFT, PGRP_GROUP_SHIFT = 1 << 4, 12, 16, 3
PGRP_SUCCESS, PGRP_INVALID, PGRP_FAILURE = 0, 1, 0xF
PGRP_RESERVED_LOW = 0xF << 5 | 0xFFF << 52
#: Bit 2 was once "last page in group" and is ignored.
PGRP_RESERVED_HIGH = _ALL & ~(0x1FF << 3 | 1 << 2)

# Page request descriptors: 4 words; of word 0
PRQ_TYPE, PRQ_BYTES = 1, 32
PRQ_PP, PRQ_RID_SHIFT, PRQ_PASID_SHIFT, PRQ_EXECUTE, PRQ_PRIVILEGED = 1 << 8, 16, 32, 1 << 52, 1 << 53
# and of word 1, below the address.
PRQ_READ, PRQ_WRITE, PRQ_LAST, PRQ_GROUP_SHIFT, PRQ_GROUP_MASK = 1 << 0, 1 << 1, 1 << 2, 3, 0x1FF


def context_cache(did: int, sid: int, function_mask: int, granularity: int) -> tuple[int, int]:
    """Forget cached context entries: all, those of a domain, or one source's."""
    return function_mask << CC_FM_SHIFT | sid << CC_SID_SHIFT | did << DID_SHIFT | granularity << 4 | CC_TYPE, 0


def pasid_cache(did: int, pasid: int, granularity: int) -> tuple[int, int]:
    """Forget cached PASID-table entries: all (PC_GLOBAL), those of a domain, or one PASID's of a domain."""
    return pasid << PASID_SHIFT | did << DID_SHIFT | granularity << 4 | PC_TYPE, 0


def iotlb(did: int, address: int, mask: int, granularity: int, hint: int = 0) -> tuple[int, int]:
    """Forget translations: all, a domain's, or 1 << mask pages of a domain at `address`; drains reads and writes."""
    low = did << DID_SHIFT | granularity << 4 | IOTLB_DW | IOTLB_DR | IOTLB_TYPE
    return low, address & -4096 | (IOTLB_IH if hint else 0) | mask


def pasid_iotlb(did: int, pasid: int, address: int, mask: int, granularity: int, hint: int = 0) -> tuple[int, int]:
    """Forget translations of a PASID in a domain: all (PIOTLB_PASID), or 1 << mask pages of its first stage."""
    low = pasid << PASID_SHIFT | did << DID_SHIFT | granularity << 4 | PIOTLB_TYPE
    return low, address & (1 << 64) - 4096 | (IOTLB_IH if hint else 0) | mask


def sized(address: int, mask: int, s: int) -> int:
    """An address as device-TLB descriptors have it: with `mask`, the size is in its low bits and the bit S is set."""
    if not mask:
        return address & (1 << 64) - 4096
    span = 4096 << mask
    return address & (1 << 64) - span | (span >> 1) - 4096 | s


def device_tlb_range(address: int, has_size: bool) -> tuple[int, int]:
    """What an address of a device-TLB descriptor names: start and bytes.

    With `has_size` (S) the lowest bit from 12 up that is zero gives the size; all ones below it are all addresses.
    """
    page = address >> 12
    if not has_size:
        return page << 12, 4096
    ones = (page ^ page + 1).bit_length() - 1
    length = min(8192 << ones, 1 << 64)
    return address & -length, length


def device_tlb(sid: int, pfsid: int, address: int, mask: int, pending: int = 0) -> tuple[int, int]:
    """Have a device forget 1 << mask pages that it uses without a PASID. `pending`: how many it holds at once (32)."""
    low = _pfsid(pfsid) | sid << DIOTLB_SID_SHIFT | (pending & 0x1F) << DIOTLB_MIP_SHIFT | DIOTLB_TYPE
    return low, sized(address, mask, DIOTLB_S)


def pasid_device_tlb(sid: int, pfsid: int, pasid: int, address: int, mask: int, pending: int = 0) -> tuple[int, int]:
    """Have a device forget 1 << mask pages that it uses with a PASID."""
    low = _pfsid(pfsid) | pasid << PASID_SHIFT | sid << PDIOTLB_SID_SHIFT | PDIOTLB_TYPE
    return low | (pending & 0x1F) << PDIOTLB_MIP_SHIFT, sized(address, mask, PDIOTLB_S)


def _pfsid(pfsid: int) -> int:
    return (pfsid & 0xF) << 12 | pfsid >> 4 << 52


def interrupt_entries(index: int | None = None, mask: int = 0) -> tuple[int, int]:
    """Forget cached interrupt-remapping entries: all, or 1 << mask of them at `index`."""
    if index is None:
        return IEC_TYPE, 0
    return index << IEC_IIDX_SHIFT | mask << IEC_IM_SHIFT | IEC_INDEXED | IEC_TYPE, 0


def wait(status_address: int, status: int, interrupt: bool = False, flags: int = 0) -> tuple[int, int]:
    """When everything before is done, store the 32-bit `status`. `flags`: WAIT_FN, WAIT_PD."""
    low = status << WAIT_DATA_SHIFT | WAIT_SW | (WAIT_IF if interrupt else 0) | flags | WAIT_TYPE
    return low, status_address


def page_group_response(rid: int, pasid: int | None, group: int, code: int) -> tuple[int, int]:
    """Answer a group of page requests: `code` is PGRP_SUCCESS, PGRP_INVALID or PGRP_FAILURE."""
    low = rid << PGRP_RID_SHIFT | code << PGRP_CODE_SHIFT | PGRP_TYPE
    if pasid is not None:
        low |= pasid << PASID_SHIFT | PGRP_PP
    return low, group << PGRP_GROUP_SHIFT
