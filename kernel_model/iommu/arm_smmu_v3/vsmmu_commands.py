"""Which commands a guest may hand to the unit's queue, which is everybody's.

Mirrors arm_vsmmu_validate_user_cmd() and arm_vsmmu_validate_range() of drivers/iommu/arm/arm-smmu-v3/
arm-smmu-v3-iommufd.c at 7.3: no bit gets through with which the unit might stop at an illegal command.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fakedev.smmuv3 import commands as c

if TYPE_CHECKING:
    from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice

_RANGE = c.TLBI_NUM.mask | c.TLBI_SCALE.mask
#: The bit of SCALE that only units with 52-bit pages have.
_SCALE_52 = c.TLBI_SCALE.put(32)
#: By opcode: the bits of both words that may be set, opcode included.
_Masks = dict[int, tuple[int, int]]


@cache
def _allowed(asid_bits: int, range_inv: bool, ds: bool, ats: bool, ssids: bool) -> _Masks:
    op = c.OPCODE.mask
    vmid, asid = c.TLBI_VMID.mask, c.TLBI_ASID.put((1 << asid_bits) - 1)
    va_low, va_high = op | vmid, c.CFGI_LEAF | c.TLBI_VA_MASK
    if range_inv:
        va_low |= _RANGE if ds else _RANGE & ~_SCALE_52
        va_high |= c.TLBI_TG.mask | c.TLBI_TTL.mask
    ssid = c.SSID.mask if ssids else 0
    found = {
        c.TLBI_NSNH_ALL: (op, 0),
        c.TLBI_NH_VA: (va_low | asid, va_high),
        c.TLBI_NH_VAA: (va_low, va_high),
        c.TLBI_NH_ASID: (op | vmid | asid, 0),
        c.TLBI_NH_ALL: (op | vmid, 0),
        c.CFGI_CD: (op | c.SID.mask | ssid, c.CFGI_LEAF),
        c.CFGI_CD_ALL: (op | c.SID.mask, 0),
    }
    if ats:
        low = op | c.SID.mask | (c.SSV | ssid | c.ATC_GLOBAL if ssids else 0)
        found[c.ATC_INV] = low, c.ATC_SIZE.mask | c.TLBI_VA_MASK
    return found


def _range_is_reserved(smmu: SmmuDevice, low: int, high: int) -> bool:
    """arm_vsmmu_validate_range()."""
    ranged, ttl, tg = bool(low & _RANGE), c.TLBI_TTL.get(high), c.TLBI_TG.get(high)
    if not tg:
        return ranged or bool(ttl)
    if tg == 2 and ttl == 1 and not smmu.ds:
        return True
    return not ranged and not ttl


def validate(smmu: SmmuDevice, low: int, high: int) -> bool:
    """Whether a guest may send the command."""
    opcode = low & 0xFF
    masks = _allowed(smmu.asid_bits, smmu.range_inv, smmu.ds, smmu.ats, bool(smmu.ssid_bits)).get(opcode)
    if masks is None or low & ~masks[0] or high & ~masks[1]:
        return False
    if opcode in (c.TLBI_NH_VA, c.TLBI_NH_VAA) and smmu.range_inv:
        return not _range_is_reserved(smmu, low, high)
    return opcode != c.ATC_INV or c.ATC_SIZE.get(high) <= c.ATC_SIZE_ALL
