"""A stream's way through the tables, in words: what is cached, and what memory says now."""

from __future__ import annotations

from fakedev.memory import BusAbort
from fakedev.pgtable.format import rights_in_words
from fakedev.pgtable.walker import MAPPED, explain, walk
from fakedev.smmuv3.config import Cd, Region, Ste
from fakedev.smmuv3.lookup import Configuration, ConfigurationError
from fakedev.smmuv3.translate import RIGHTS, STAGE_2, VMID_SHIFT, Translator, canonical


def explain_stream(
    configuration: Configuration, translator: Translator, sid: int, pasid: int, address: int
) -> list[str]:
    """From a StreamID, a SubstreamID (-1: none) and an address, a line a step. Changes nothing, caches included."""
    lines = []
    try:
        ste = configuration.read_ste(sid, {})
    except ConfigurationError as error:
        return [f"STE {sid:#x}: {error}"]
    cached = configuration.stes.get(sid)
    if cached is not None and cached.words != ste.words:
        lines.append(f"the configuration cache still holds the STE: {cached}")
    lines.append(f"STE {sid:#x}: {ste}")
    if ste.illegal or ste.aborts:
        return lines
    try:
        cd = _cd(configuration, translator, ste, sid, pasid, lines)
    except ConfigurationError as error:
        return [*lines, str(error)]
    except BusAbort as error:
        return [*lines, f"stage 2 does not translate the CD's IPA {error.address:#x}"]
    if cd is None:
        if ste.s2:
            _stage2(translator, ste, address, lines)
        return lines
    if cd.illegal:
        return lines
    region, va = canonical(cd, address)
    _cached(translator, ste.vmid << VMID_SHIFT | cd.asid, va, "TLB: va", lines)
    _stage1(translator, ste, region, va, lines)
    return lines


def _cd(
    configuration: Configuration, translator: Translator, ste: Ste, sid: int, pasid: int, lines: list[str]
) -> Cd | None:
    index = configuration.cd_index(ste, None if pasid < 0 else pasid)
    if index is None:
        lines.append("stage 1 is bypassed")
        return None

    def locate(ste: Ste, address: int) -> int:
        return _stage2_output(translator, ste, address) if ste.s2 else address

    cd = configuration.read_cd(ste, index, {}, locate)
    cached = configuration.cds.get(sid, {}).get(index)
    if cached is not None and cached.words != cd.words:
        lines.append(f"the configuration cache still holds CD {index}: {cached}")
    lines.append(f"CD {index}: {cd}")
    return cd


def _cached(translator: Translator, tag: int, address: int, what: str, lines: list[str]) -> None:
    run = translator.tlb.lookup(tag, address)
    if run is not None:
        rights = rights_in_words(run[3] & RIGHTS)
        lines.append(f"{what} {run[0]:#x}-{run[1] - 1:#x} at {run[0] + run[2]:#x}, allows {rights}")


def _stage1(translator: Translator, ste: Ste, region: Region, va: int, lines: list[str]) -> None:
    fmt = region.format
    if region.disabled or fmt is None:
        lines.append("no table walk is allowed there (EPD)")
        return
    if region.is_outside(va):
        lines.append(f"outside the {region.bits} bits of its TTB")
        return

    def load(ipa: int) -> int:
        return translator.load(_stage2_output(translator, ste, ipa) if ste.s2 else ipa)

    try:
        lines.extend("stage 1 " + line for line in explain(fmt, load, region.root, fmt.top_level, va))
        end = walk(fmt, load, region.root, fmt.top_level, va)
    except BusAbort:
        lines.append("a stage 1 table is at an IPA that stage 2 does not translate")
        return
    if ste.s2 and end.outcome == MAPPED:
        _stage2(translator, ste, end.output, lines)


def _stage2(translator: Translator, ste: Ste, ipa: int, lines: list[str]) -> None:
    fmt = ste.s2_format
    _cached(translator, ste.vmid << VMID_SHIFT | STAGE_2, ipa, "TLB: ipa", lines)
    if fmt is None or ipa >> ste.s2_bits:
        lines.append(f"IPA {ipa:#x}: outside the {ste.s2_bits} bits of stage 2")
        return
    lines.append(f"IPA {ipa:#x}")
    lines.extend("stage 2 " + line for line in explain(fmt, translator.load, ste.s2_root, fmt.top_level, ipa))


def _stage2_output(translator: Translator, ste: Ste, ipa: int) -> int:
    """Where stage 2's tables in memory put an IPA. BusAbort where they do not."""
    fmt = ste.s2_format
    if fmt is None or ipa >> ste.s2_bits:
        raise BusAbort(ipa)
    end = walk(fmt, translator.load, ste.s2_root, fmt.top_level, ipa)
    if end.outcome != MAPPED:
        raise BusAbort(ipa)
    return end.output
