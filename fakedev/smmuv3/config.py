"""What STEs and CDs mean, and which of them are illegal.

Mirrors Arm IHI 0070: SteIllegal() of 5.2.2, CdIllegal() of 5.4.2, and the fields' own descriptions where they say more
(S2ENDI). `decode_ste` and `decode_cd` turn the words into what a translation needs, or into the reason why they are
illegal. Only VMSAv8-64 tables are there (TTF 0b10), so a clear AA64 is illegal; so is A == 0 (TERM_MODEL 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2, stage2_top_level
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3.regs import (
    ADDRESS_SIZES,
    HTTU_ACCESS,
    HTTU_NONE,
    STALL_BOTH,
    STALL_FORCED,
    STALL_NEVER,
    Features,
)

_ONES = (1 << 64) - 1


class Ste:
    """A decoded STE. With `illegal` (why) nothing else is of use."""

    __slots__ = (
        "aborts",
        "eats",
        "ias_bits",
        "illegal",
        "instcfg",
        "ppar",
        "privcfg",
        "s1",
        "s1cdmax",
        "s1contextptr",
        "s1dss",
        "s1fmt",
        "s1stalld",
        "s2",
        "s2_bits",
        "s2_format",
        "s2_ha",
        "s2_root",
        "s2fwb",
        "s2ptw",
        "s2r",
        "s2s",
        "vmid",
        "words",
    )

    def __init__(self, words: tuple[int, ...]) -> None:
        self.words = words
        self.illegal = ""
        self.aborts = self.s1 = self.s2 = False
        self.eats = self.instcfg = self.privcfg = 0
        self.ppar = False
        self.ias_bits = 0
        self.s1cdmax = self.s1contextptr = self.s1dss = self.s1fmt = 0
        self.s1stalld = False
        self.vmid = 0
        self.s2_format: Arm64Stage2 | None = None
        self.s2_root = self.s2_bits = 0
        self.s2_ha = self.s2fwb = self.s2ptw = self.s2r = self.s2s = False

    def __str__(self) -> str:
        if self.illegal:
            return f"illegal ({self.illegal})"
        if self.aborts:
            return "abort"
        stages = [name for name, on in (("stage 1", self.s1), ("stage 2", self.s2)) if on]
        text = " and ".join(stages) or "bypass"
        if self.s1:
            text += f", CDs at {self.s1contextptr:#x} (1 << {self.s1cdmax})"
        if self.s2 and self.s2_format is not None:
            text += f", VMID {self.vmid:#x}, {self.s2_bits}-bit IPAs from {self.s2_root:#x}"
        return text


class Region:
    """One half of a CD's addresses: the tables of TTB0 or TTB1, or none (`disabled`: EPD)."""

    __slots__ = ("bits", "disabled", "format", "root", "tbi")

    def __init__(self, disabled: bool, tbi: bool) -> None:
        self.disabled = disabled
        self.tbi = tbi
        self.bits = 64
        self.format: Arm64Stage1 | None = None
        self.root = 0

    def is_outside(self, va: int) -> bool:
        """An address that TxSZ excludes: its upper bits are not all copies of bit 55."""
        return bool((va ^ (_ONES if va >> 55 & 1 else 0)) >> self.bits)


class Cd:
    """A decoded CD. With `illegal` (why) nothing else is of use."""

    __slots__ = ("aset", "asid", "ha", "illegal", "r", "s", "ttb0", "ttb1", "words")

    def __init__(self, words: tuple[int, ...]) -> None:
        self.words = words
        self.illegal = ""
        self.asid = 0
        self.aset = self.ha = self.r = self.s = False
        self.ttb0 = self.ttb1 = Region(True, False)

    def __str__(self) -> str:
        if self.illegal:
            return f"illegal ({self.illegal})"
        parts = [f"ASID {self.asid:#x}"]
        for name, region in (("TTB0", self.ttb0), ("TTB1", self.ttb1)):
            parts.append(f"{name} disabled" if region.disabled else f"{name} {region.root:#x} ({region.bits} bits)")
        return ", ".join(parts)


def output_bits(features: Features, encoded: int) -> int:
    """The effective IPS or S2PS: capped to OAS, and a reserved value is the largest."""
    return min(ADDRESS_SIZES[min(encoded, 6)], features.oas)


def _txsz_limits(features: Features, granule: int) -> tuple[int, int]:
    """The least and the largest TxSZ but for what IAS says."""
    most = (47 if granule == 16 else 48) if features.small_tables else 39
    return 12 if granule == 16 and features.vax52 else 16, most


def _out_of_range(address: int, bits: int) -> bool:
    return bool(address >> bits)


def decode_ste(features: Features, words: Sequence[int]) -> Ste:
    """The STE in `words` (eight of them)."""
    ste = Ste(tuple(words))
    ste.illegal = _decode_ste(features, ste)
    return ste


def _decode_ste(features: Features, ste: Ste) -> str:
    low, second, third, fourth = ste.words[:4]
    if not low & e.STE_0_V:
        return "V is clear"
    config = e.STE_0_CONFIG.get(low)
    ste.ppar = features.pps or bool(second & e.STE_1_PPAR)
    if config < e.CONFIG_BYPASS:
        ste.aborts = True
        return ""
    ste.s1, ste.s2 = bool(config & 1), bool(config & 2)
    ste.ias_bits = features.oas
    if ste.s1 and not features.stage1:
        return "stage 1 is not implemented"
    if ste.s2 and not features.stage2:
        return "stage 2 is not implemented"
    if features.attr_perms_override:
        ste.privcfg, ste.instcfg = e.STE_1_PRIVCFG.get(second), e.STE_1_INSTCFG.get(second)
    s2s = bool(third & e.STE_2_S2S)
    if features.ats and config != e.CONFIG_BYPASS:
        ste.eats = e.STE_1_EATS.get(second)
        if ste.eats == e.EATS_SPLIT and (config != e.CONFIG_NESTED or s2s):
            return "split-stage ATS without both stages, or with stalls"
        if ste.eats == e.EATS_FULL and ste.s2 and s2s:
            return "ATS with stalls at stage 2"
        if ste.eats == 3:
            ste.eats = e.EATS_NONE
    if ste.s1:
        why = _decode_s1(features, ste)
        if why:
            return why
    if ste.s2:
        why = _decode_s2(features, ste, third, fourth)
        if why:
            return why
    if features.stage2 and (ste.s1 or ste.s2):
        ste.vmid = e.STE_2_S2VMID.get(third)
        if not features.vmid16 and ste.vmid >> 8:
            return "VMIDs have 8 bits"
    return ""


def _decode_s1(features: Features, ste: Ste) -> str:
    low, second = ste.words[:2]
    ste.s1stalld = bool(second & e.STE_1_S1STALLD)
    if ste.s1stalld and features.stall_model != STALL_BOTH:
        return "S1STALLD where stalls are not configurable"
    if features.ssid_bits:
        ste.s1cdmax = e.STE_0_S1CDMAX.get(low)
        if ste.s1cdmax > features.ssid_bits:
            return "S1CDMax is beyond SSIDSIZE"
        if ste.s1cdmax:
            ste.s1fmt, ste.s1dss = e.STE_0_S1FMT.get(low), e.STE_1_S1DSS.get(second)
            if ste.s1fmt == 3:
                ste.s1fmt = e.S1FMT_LINEAR
            if ste.s1fmt and not features.two_level_cd_table:
                return "two-level CD tables are not implemented"
    ste.s1contextptr = low & e.STE_0_S1CONTEXTPTR_MASK
    if _out_of_range(ste.s1contextptr, features.oas):
        return "S1ContextPtr is out of range"
    return ""


def _decode_s2(features: Features, ste: Ste, third: int, fourth: int) -> str:
    ste.s2s, ste.s2r = bool(third & e.STE_2_S2S), bool(third & e.STE_2_S2R)
    if ste.s2s and features.stall_model == STALL_NEVER:
        return "S2S where nothing stalls"
    if not ste.s2s and features.stall_model == STALL_FORCED:
        return "S2S clear where stalls are forced"
    if not third & e.STE_2_S2AA64:
        return "VMSAv8-32 is not implemented"
    ha, hd = bool(third & e.STE_2_S2HA), bool(third & e.STE_2_S2HD)
    if (ha or hd) and features.httu == HTTU_NONE:
        return "S2HA or S2HD where hardware updates nothing"
    if hd and features.httu == HTTU_ACCESS:
        return "S2HD where hardware updates access flags only"
    granule = e.TG0_GRANULES[e.STE_2_S2TG.get(third)]
    if granule is None or granule not in features.granules:
        return "S2TG is reserved or not implemented"
    bits = output_bits(features, e.STE_2_S2PS.get(third))
    ste.s2_root = fourth & e.STE_3_S2TTB_MASK
    if _out_of_range(ste.s2_root, bits) or (granule != 16 and _out_of_range(ste.s2_root, 48)):
        return "S2TTB is out of range"
    s2t0sz = e.STE_2_S2T0SZ.get(third)
    most = _txsz_limits(features, granule)[1]
    if not max(12 if granule == 16 else 16, 64 - ste.ias_bits) <= s2t0sz <= most:
        return "S2T0SZ is out of range"
    ste.s2_bits = 64 - s2t0sz
    sl0 = e.STE_2_S2SL0.get(third)
    if sl0 == 3 and not features.small_tables:
        return "S2SL0 is reserved"
    top_level = stage2_top_level(granule, sl0, ste.s2_bits, features.oas)
    if top_level is None:
        return "S2SL0 does not go with S2T0SZ and S2TG"
    if third & e.STE_2_S2ENDI:
        return "big-endian tables are not implemented"
    ste.s2_ha = ha
    ste.s2ptw = bool(third & e.STE_2_S2PTW)
    ste.s2fwb = features.s2fwb and bool(ste.words[1] & e.STE_1_S2FWB)
    ste.s2_format = Arm64Stage2(
        granule,
        ste.s2_bits,
        bits,
        top_level,
        lpa=features.oas == 52,
        affd=bool(third & e.STE_2_S2AFFD),
        ha=ha,
        hd=hd,
        xnx=features.xnx,
        fwb=ste.s2fwb,
    )
    ste.s2_root &= -_root_alignment(ste.s2_format.root_index_bits, bits)
    return ""


def _root_alignment(index_bits: int | None, bits: int) -> int:
    """What a root table is aligned to: its size, and 64 bytes with 52-bit addresses."""
    return max(8 << (index_bits or 0), 64 if bits == 52 else 16)


def decode_cd(features: Features, ste: Ste, words: Sequence[int]) -> Cd:
    """The CD in `words` (eight of them), reached through `ste`."""
    cd = Cd(tuple(words))
    cd.illegal = _decode_cd(features, ste, cd)
    return cd


def _decode_cd(features: Features, ste: Ste, cd: Cd) -> str:
    low = cd.words[0]
    if not low & e.CD_0_V:
        return "V is clear"
    cd.s, cd.r, cd.aset = bool(low & e.CD_0_S), bool(low & e.CD_0_R), bool(low & e.CD_0_ASET)
    if ste.s1stalld and cd.s:
        return "S where the STE forbids stalls"
    if not low & e.CD_0_A:
        return "A is clear where terminated transactions are always aborted"
    if cd.s and features.stall_model == STALL_NEVER:
        return "S where nothing stalls"
    if not cd.s and features.stall_model == STALL_FORCED:
        return "S clear where stalls are forced"
    epd0, epd1 = bool(low & e.CD_0_EPD0), bool(low & e.CD_0_EPD1)
    if low & e.CD_0_ENDI and not (epd0 and epd1):
        return "big-endian tables are not implemented"
    if not low & e.CD_0_AA64:
        return "VMSAv8-32 is not implemented"
    ha, hd = bool(low & e.CD_0_HA), bool(low & e.CD_0_HD)
    if (ha or hd) and features.httu == HTTU_NONE:
        return "HA or HD where hardware updates nothing"
    if hd and features.httu == HTTU_ACCESS:
        return "HD where hardware updates access flags only"
    cd.ha = ha
    cd.asid = e.CD_0_ASID.get(low)
    if not features.asid16 and cd.asid >> 8:
        return "ASIDs have 8 bits"
    halves = (
        ("0", epd0, e.CD_0_T0SZ, e.TG0_GRANULES[e.CD_0_TG0.get(low)], e.CD_0_TBI0, cd.words[1]),
        ("1", epd1, e.CD_0_T1SZ, e.TG1_GRANULES[e.CD_0_TG1.get(low)], e.CD_0_TBI1, cd.words[2]),
    )
    regions = []
    for name, disabled, size, granule, tbi, word in halves:
        region = Region(disabled, bool(low & tbi))
        regions.append(region)
        if disabled:
            continue
        if granule is None or granule not in features.granules:
            return f"TG{name} is reserved or not implemented"
        least, most = _txsz_limits(features, granule)
        txsz = size.get(low)
        if not least <= txsz <= most:
            return f"T{name}SZ is out of range"
        bits = output_bits(features, e.CD_0_IPS.get(low))
        root = word & e.CD_TTB_MASK
        if _out_of_range(root, bits) or (granule != 16 and _out_of_range(root, 48)):
            return f"TTB{name} is out of range"
        region.bits = 64 - txsz
        region.format = Arm64Stage1(
            granule,
            region.bits,
            bits,
            lpa=features.oas == 52,
            affd=bool(low & e.CD_0_AFFD),
            ha=ha,
            hd=hd,
            hierarchical=not (features.hierarchical_attribute_disable and word & e.CD_HAD),
            wxn=bool(low & e.CD_0_WXN),
            pan=bool(low & e.CD_0_PAN),
        )
        region.root = root & -_root_alignment(region.format.root_index_bits, bits)
    cd.ttb0, cd.ttb1 = regions
    return ""
