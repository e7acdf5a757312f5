"""The stream table entries and context descriptors that the driver writes, and which bits of them the hardware reads.

Mirrors the `arm_smmu_make_*` functions of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c and `-iommufd.c` at 7.3, with
`arm_smmu_get_ste_used()`, `arm_smmu_get_ste_update_safe()` and `arm_smmu_get_cd_used()`. Every maker returns the eight
words of a new entry and touches nothing. Left out: SVA's descriptors, big-endian tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3.regs import ADDRESS_SIZES
from kernel_model.iommu.io_pgtable_arm import stage2_sl0

WORDS = e.STE_WORDS
_ONES = (1 << 64) - 1
#: Cacheability and shareability of table walks: write-back with read and write allocation, inner shareable.
_WBRA, _ISH = 1, 3
#: Memory attributes by index: non-cacheable, write-back, device, write-back in outer caches only.
_MAIR = 0xF404_FF44
#: What a guest may set in words 0 and 1 of its STE.
STE_0_NESTING_ALLOWED = (
    e.STE_0_V | e.STE_0_CONFIG.mask | e.STE_0_S1FMT.mask | e.STE_0_S1CONTEXTPTR_MASK | e.STE_0_S1CDMAX.mask
)
STE_1_NESTING_ALLOWED = (
    e.STE_1_S1DSS.mask
    | e.STE_1_S1CIR.mask
    | e.STE_1_S1COR.mask
    | e.STE_1_S1CSH.mask
    | e.STE_1_S1STALLD
    | e.STE_1_EATS.mask
)


@dataclass(frozen=True)
class StreamOptions:
    """What of a unit and a device shapes their STEs and CDs.

    `attr_types_ovr`: the unit can override memory attributes; `stalls`: it can stall, which `stall_enabled` lets the
    device do; `e2h`: streams run in the hypervisor's world.
    """

    attr_types_ovr: bool = False
    stalls: bool = False
    stall_enabled: bool = False
    e2h: bool = False


def make_abort_ste() -> list[int]:
    """Refuse every transaction, without an event."""
    return [e.STE_0_V | e.STE_0_CONFIG.put(e.CONFIG_ABORT)] + [0] * (WORDS - 1)


def make_bypass_ste(options: StreamOptions) -> list[int]:
    """Let every transaction through untranslated."""
    ste = [e.STE_0_V | e.STE_0_CONFIG.put(e.CONFIG_BYPASS)] + [0] * (WORDS - 1)
    if options.attr_types_ovr:
        ste[1] = e.STE_1_SHCFG.put(e.SHCFG_INCOMING)
    return ste


def make_cdtable_ste(
    options: StreamOptions, s1fmt: int, cdtab: int, s1cdmax: int, ats_enabled: bool, s1dss: int
) -> list[int]:
    """Translate by stage 1 with the CD table at `cdtab` of 1 << s1cdmax descriptors.

    `s1dss` says what becomes of transactions without PASID, where there is more than one descriptor.
    """
    ste = [0] * WORDS
    ste[0] = (
        e.STE_0_V
        | e.STE_0_CONFIG.put(e.CONFIG_S1)
        | e.STE_0_S1FMT.put(s1fmt)
        | cdtab & e.STE_0_S1CONTEXTPTR_MASK
        | e.STE_0_S1CDMAX.put(s1cdmax)
    )
    ste[1] = (
        e.STE_1_S1DSS.put(s1dss)
        | e.STE_1_S1CIR.put(_WBRA)
        | e.STE_1_S1COR.put(_WBRA)
        | e.STE_1_S1CSH.put(_ISH)
        | (e.STE_1_S1STALLD if options.stalls and not options.stall_enabled else 0)
        | e.STE_1_EATS.put(e.EATS_FULL if ats_enabled else e.EATS_NONE)
        | e.STE_1_STRW.put(e.STRW_EL2 if options.e2h else e.STRW_NSEL1)
    )
    if options.attr_types_ovr and s1dss == e.S1DSS_BYPASS:
        ste[1] |= e.STE_1_SHCFG.put(e.SHCFG_INCOMING)
    return ste


def make_s2_domain_ste(
    options: StreamOptions, fmt: Arm64Stage2, root: int, vmid: int, ats_enabled: bool, *, fwb: bool = False
) -> list[int]:
    """Translate by the stage-2 table of format `fmt` (written with `fwb` or without) at `root`."""
    ste = [0] * WORDS
    ste[0] = e.STE_0_V | e.STE_0_CONFIG.put(e.CONFIG_S2)
    ste[1] = e.STE_1_EATS.put(e.EATS_FULL if ats_enabled else e.EATS_NONE)
    if fwb:
        ste[1] |= e.STE_1_S2FWB
    if options.attr_types_ovr:
        ste[1] |= e.STE_1_SHCFG.put(e.SHCFG_INCOMING)
    ste[2] = (
        e.STE_2_S2VMID.put(vmid)
        | e.STE_2_S2T0SZ.put(64 - fmt.input_bits)
        | e.STE_2_S2SL0.put(stage2_sl0(fmt))
        | e.STE_2_S2IR0.put(_WBRA)
        | e.STE_2_S2OR0.put(_WBRA)
        | e.STE_2_S2SH0.put(_ISH)
        | e.STE_2_S2TG.put(e.TG0_GRANULES.index(fmt.granule_lg2))
        | e.STE_2_S2PS.put(ADDRESS_SIZES.index(fmt.output_bits))
        | e.STE_2_S2AA64
        | e.STE_2_S2PTW
        | (e.STE_2_S2S if options.stall_enabled else 0)
        | e.STE_2_S2R
    )
    ste[3] = root & e.STE_3_S2TTB_MASK
    return ste


def make_nested_ste(
    options: StreamOptions,
    guest: Sequence[int],
    fmt: Arm64Stage2,
    root: int,
    vmid: int,
    ats_enabled: bool,
    *,
    fwb: bool = False,
) -> list[int]:
    """A guest's STE (its words 0 and 1, without EATS) over the stage-2 table of its memory.

    What the guest has as stage 1 becomes both stages, as bypass stage 2 alone; an invalid STE refuses as abort does.
    """
    config = e.STE_0_CONFIG.get(guest[0]) if guest[0] & e.STE_0_V else e.CONFIG_ABORT
    if config not in (e.CONFIG_S1, e.CONFIG_BYPASS):
        return make_abort_ste()
    ste = make_s2_domain_ste(options, fmt, root, vmid, ats_enabled, fwb=fwb)
    if config == e.CONFIG_S1:
        ste[0] = e.STE_0_CONFIG.set(guest[0], e.CONFIG_NESTED) | e.STE_0_V
        ste[1] |= guest[1] | e.STE_1_MEV
    return ste


def make_s1_cd(
    options: StreamOptions, fmt: Arm64Stage1, root: int, asid: int, *, dirty_tracking: bool = False
) -> list[int]:
    """Translate by the stage-1 table of format `fmt` at `root`, under an ASID of the driver's.

    With `dirty_tracking` the hardware keeps access flags and dirty states.
    """
    cd = [0] * WORDS
    cd[0] = (
        e.CD_0_T0SZ.put(64 - fmt.input_bits)
        | e.CD_0_TG0.put(e.TG0_GRANULES.index(fmt.granule_lg2))
        | e.CD_0_IR0.put(_WBRA)
        | e.CD_0_OR0.put(_WBRA)
        | e.CD_0_SH0.put(_ISH)
        | e.CD_0_EPD1
        | e.CD_0_V
        | e.CD_0_IPS.put(ADDRESS_SIZES.index(fmt.output_bits))
        | e.CD_0_AA64
        | (e.CD_0_S if options.stall_enabled else 0)
        | e.CD_0_R
        | e.CD_0_A
        | e.CD_0_ASET
        | e.CD_0_ASID.put(asid)
    )
    if dirty_tracking:
        cd[0] |= e.CD_0_HA | e.CD_0_HD
    cd[1] = root & e.CD_TTB_MASK
    cd[3] = _MAIR
    return cd


# -- what the hardware reads -----------------------------------------------------------------------------------------


def ste_used(ste: Sequence[int]) -> list[int]:
    """The bits of an STE that the hardware reads, as far as the driver ever sets them."""
    used = [0] * WORDS
    used[0] = e.STE_0_V
    if not ste[0] & e.STE_0_V:
        return used
    config = e.STE_0_CONFIG.get(ste[0])
    used[0] |= e.STE_0_CONFIG.mask
    if config & 1:  # stage 1 translates
        used[0] |= e.STE_0_S1FMT.mask | e.STE_0_S1CONTEXTPTR_MASK | e.STE_0_S1CDMAX.mask
        used[1] |= (
            e.STE_1_S1DSS.mask
            | e.STE_1_S1CIR.mask
            | e.STE_1_S1COR.mask
            | e.STE_1_S1CSH.mask
            | e.STE_1_S1STALLD
            | e.STE_1_STRW.mask
            | e.STE_1_EATS.mask
            | e.STE_1_MEV
        )
        used[2] |= e.STE_2_S2VMID.mask
        if e.STE_1_S1DSS.get(ste[1]) == e.S1DSS_BYPASS:
            used[1] |= e.STE_1_SHCFG.mask
    if config & 2:  # stage 2 translates
        used[1] |= e.STE_1_S2FWB | e.STE_1_EATS.mask | e.STE_1_SHCFG.mask | e.STE_1_MEV
        used[2] |= (
            e.STE_2_S2VMID.mask
            | e.STE_2_S2T0SZ.mask
            | e.STE_2_S2SL0.mask
            | e.STE_2_S2IR0.mask
            | e.STE_2_S2OR0.mask
            | e.STE_2_S2SH0.mask
            | e.STE_2_S2TG.mask
            | e.STE_2_S2PS.mask
            | e.STE_2_S2AA64
            | e.STE_2_S2ENDI
            | e.STE_2_S2PTW
            | e.STE_2_S2S
            | e.STE_2_S2R
        )
        used[3] |= e.STE_3_S2TTB_MASK
    if config == e.CONFIG_BYPASS:
        used[1] |= e.STE_1_SHCFG.mask
    return used


def ste_update_safe(current: Sequence[int], target: Sequence[int]) -> list[int]:
    """Used bits of an STE that may change at any moment of an update.

    EATS, since the attach has switched the device's ATS off by then (but not where the split mode or stalls of stage 2
    come in: with those a passing combination would be an illegal STE); MEV, which only says how many events there are.
    """
    safe = [0] * WORDS
    safe[1] = e.STE_1_MEV
    split = e.STE_1_EATS.put(e.EATS_SPLIT)
    if not (current[1] | target[1]) & split and not (current[2] | target[2]) & e.STE_2_S2S:
        safe[1] |= e.STE_1_EATS.put(e.EATS_FULL)
    return safe


def cd_used(cd: Sequence[int]) -> list[int]:
    """The bits of a CD that the hardware reads: all, less the fields of a table that is switched off."""
    if not cd[0] & e.CD_0_V:
        return [e.CD_0_V] + [0] * (WORDS - 1)
    used = [_ONES] * WORDS
    if cd[0] & e.CD_0_EPD0:
        used[0] &= ~(e.CD_0_T0SZ.mask | e.CD_0_TG0.mask | e.CD_0_IR0.mask | e.CD_0_OR0.mask | e.CD_0_SH0.mask)
        used[1] &= ~e.CD_TTB_MASK
    return used
