"""Where QEMU's emulated IOMMUs depart from the manuals, or the manuals leave open what happens.

`DEPARTURES` is the whole list. An entry with `explains` is drawn, and that function says whether a pair of answers
(QEMU's, ours) differs for this reason alone; one without is not drawn by the generators. Everything else that differs
fails. Sections are of the VT-d specification, revision 5.10, and of Arm IHI 0070.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fakedev.smmuv3 import events
from tests.qemu.rig import BLOCKED

Answer: TypeAlias = "int | list[int]"


@dataclass(frozen=True)
class Departure:
    """`unit` is what it was seen on; `section` is where the manual says it."""

    unit: str
    section: str
    manual: str
    qemu: str
    explains: Callable[[list[int], list[int]], bool] | None = None


#: The manual's codes for faults of scalable mode, by QEMU's.
_SCALABLE = {
    0x1: {0x39}, 0x2: {0x41}, 0x3: {0x7B}, 0x4: {0x84}, 0x5: {0x79, 0x85},
    0x6: {0x79, 0x86}, 0x7: {0x78},
    0x9: {0x40}, 0xA: {0x3A}, 0xB: {0x42}, 0xC: {0x7A},
}  # fmt: skip


def _recoded(answer: list[int], reason: int) -> list[int]:
    """An answer of QEMU's with the manual's `reason`, if that is the one for its own."""
    given = _reason(answer)
    if reason not in _SCALABLE.get(given, ()):
        return answer
    return [*answer[:2], answer[2] ^ (given ^ reason) << 32]


def _event(answer: list[int]) -> int:
    """The number of the one event in an SMMUv3's answer, 0 if there is none or several."""
    return answer[1] & 0xFF if len(answer) == 5 else 0


def _masked(answer: list[int], bits: int, page: int = 4096) -> list[int]:
    """An SMMUv3's answer without some bits of the event's word 1, and without the IPA's offset in its page."""
    return [answer[0], answer[1], answer[2] & ~bits, answer[3], answer[4] & -page]


def _on_the_way(theirs: list[int], ours: list[int]) -> bool:
    """Whether the events agree but for S2, RnW, and where in a stage 1 table the item is."""
    if _event(theirs) not in (*_TRANSLATION, events.F_WALK_EABT) or len(ours) != 5:
        return False
    if events.EVT_1_CLASS.mask & ours[2] == events.EVT_1_CLASS.put(events.CLASS_IN):
        return False
    bits = events.EVT_1_S2 | events.EVT_1_RNW
    page = 1 if _event(theirs) == events.F_WALK_EABT else 1 << 16
    return _masked(theirs, bits, page) == _masked(ours, bits, page)


def _reason(answer: list[int]) -> int:
    """The fault reason in a VT-d answer, 0 if there is no record."""
    return answer[2] >> 32 & 0xFF if len(answer) > 2 else 0


DEPARTURES = [
    Departure(
        "vtd",
        "3.9, 7.1.3 LGN.1.3",
        "pass-through of an address beyond the host address width is fault 4h",
        "passes it on; no memory answers, and nothing is recorded",
        lambda theirs, ours: theirs == [BLOCKED] and ours[0] == BLOCKED and _reason(ours) == 4,
    ),
    Departure(
        "vtd",
        "7.1.3 SRT, SCT, SSS, SGN",
        "faults in scalable mode have codes of their own",
        "gives those of legacy mode for root and context entries and for the second stage",
        lambda theirs, ours: (
            len(theirs) == len(ours) == 3
            and theirs[0] == ours[0] == BLOCKED
            and _recoded(theirs, _reason(ours)) == ours
        ),
    ),
    Departure(
        "vtd",
        "3.9, 7.1.3 SGN.4.2",
        "pass-through of an address beyond the host address width is fault 83h",
        "passes it on; no memory answers, and nothing is recorded",
        lambda theirs, ours: theirs == [BLOCKED] and ours[0] == BLOCKED and _reason(ours) == 0x83,
    ),
    Departure(
        "vtd",
        "11.4.7.6 FI",
        "a record has of the address what is below the largest AGAW",
        "has all of it",
        lambda theirs, ours: (
            len(theirs) == len(ours) == 3
            and theirs[0] == ours[0] == BLOCKED
            and ours[1] in [theirs[1] & (1 << agaw) - 1 for agaw in (39, 48, 57)]
            and _recoded(theirs, _reason(ours))[2] == ours[2]
        ),
    ),
    Departure(
        "vtd",
        "7.1.3 SRT",
        "reserved bits of a present half are a fault; for requests by the other half, too, is open (ours: not)",
        "looks at both halves",
    ),
    Departure(
        "vtd",
        "7.1.3 SPT.2",
        "a PASID-table entry that is not present is fault 59h, whatever else it holds",
        "looks at its PGTT and AW first, fault 5Bh",
    ),
    Departure(
        "vtd",
        "7.1.1, 7.1.3 SPT.4",
        "FPD of a PASID directory or table entry keeps an invalid entry from being recorded",
        "records it",
    ),
    Departure(
        "vtd",
        "6.2.3",
        "PASID-table entries may be cached until the PASID cache is invalidated",
        "reads them again, but notices P = 0 only along with the context entry; so both caches go together",
    ),
    Departure("vtd", "7.1.3 SPT.3", "reserved bits in a present PASID-table entry are fault 5Ah", "ignores them"),
    Departure(
        "vtd",
        "7.1.3 SGN.1",
        "first-stage input addresses are canonical in 48 bits",
        "takes the width from AW, the second stage's field; so AW is 2 here, and ours is told of a second stage (SSTS)",
    ),
    Departure(
        "vtd",
        "7.1.3 SFS.9",
        "without SMPWC, or with PWSNP clear, an update of accessed and dirty bits is fault 90h",
        "updates them though SMPWC is 0; so ours is told of SMPWC, and PWSNP is set",
    ),
    Departure(
        "vtd",
        "3.6.2",
        "the dirty bit is set by the first write, whether or not the accessed bit was",
        "sets it only along with the accessed bit; so both are set or neither",
    ),
    Departure("vtd", "9.8", "without snoop control SNP is reserved", "ignores it in scalable mode"),
    Departure(
        "vtd",
        "3.15, 7.1.3 LGN.4",
        "a request whose output address is in FEEx_xxxxh is fault Eh",
        "faults the whole large page that has such addresses",
    ),
    Departure(
        "vtd",
        "7.1.3 LCT.3",
        "reserved bits in a context entry are a qualified fault: FPD keeps it from being recorded",
        "records it",
    ),
    Departure(
        "vtd",
        "7.1.3 (no order given)",
        "several things wrong on one walk: which is reported is open; ours reports what is wrong with entries first",
        "reports want of permission at the entry that lacks it, before it looks at reserved bits there or further down",
    ),
    Departure(
        "vtd",
        "6.2.4",
        "translations may be tagged by domain and shared by its sources",
        "tags them by source, too: what is stale for one source is not for another",
    ),
    Departure(
        "vtd",
        "7.2.1",
        "every fault is recorded while there is a free record",
        "leaves out a fault of a source with a record already, so the harness clears the record each time",
    ),
    Departure(
        "vtd",
        "5.1.4",
        "the source of a message is verified before the entry's fields are looked at: fault 26h comes before 24h",
        "looks at reserved bits first",
        lambda theirs, ours: (
            len(theirs) == len(ours) == 3
            and (_reason(theirs), _reason(ours)) == (0x24, 0x26)
            and theirs[2] ^ ours[2] == 0x2 << 32
            and theirs[:2] == ours[:2]
        ),
    ),
    Departure(
        "vtd",
        "9.9 SVT",
        "with SVT = 10b SID has the first bus above and the last below; SVT = 11b is reserved, fault 24h",
        "takes the upper byte as the last bus, and 11b as another's entry, fault 26h; so both are one bus here",
    ),
    Departure(
        "vtd",
        "5.1.3",
        "the sum of handle and subhandle is compared with the table's size",
        "forgets what is beyond 16 bits of it",
    ),
    Departure(
        "vtd",
        "5.1.4",
        "messages of the compatibility format are blocked, fault 25h, unless CFIS is set",
        "lets them pass",
    ),
    Departure(
        "vtd",
        "9.9",
        "without extended mode bits 63:48 and 39:32 of an entry are reserved; without posted interrupts IM is",
        "ignores them",
    ),
    Departure(
        "vtd",
        "9.9 DLM",
        "011b and 110b are no delivery modes (ours: fault 24h)",
        "passes them on",
    ),
    Departure(
        "vtd",
        "6.4",
        "entries of interrupts may be cached until they are invalidated",
        "reads them again; so what changes is invalidated before the next message",
    ),
    Departure(
        "smmuv3",
        "7.3.10 F_CD_FETCH",
        "FetchAddr is in bits 255:192",
        "puts it into bits 191:128",
        lambda theirs, ours: _event(theirs) == _event(ours) == 9 and [*theirs[:3], 0, theirs[3]] == ours,
    ),
    Departure(
        "smmuv3",
        "7.3.12 to 7.3.16",
        "IPA is bits 51:12 of the address",
        "has the offset in the page, too",
        lambda theirs, ours: _event(theirs) in _TRANSLATION and len(ours) == 5 and _masked(theirs, 0) == ours,
    ),
    Departure(
        "smmuv3",
        "7.3.12 to 7.3.16",
        "a stage 2 fault of the fetch of a CD or of a stage 1 table has S2 = 1, and RnW as the request",
        "has S2 = 0 for tables, and RnW = 1; so R of the CD silences it, not S2R; neither is 0 in nested streams here",
        _on_the_way,
    ),
    Departure(
        "smmuv3",
        "3.3.2",
        "the address of a stage 1 item is translated by stage 2",
        "translates the table's base, TTB0 when it reads the CD, and adds the index; an event's IPA is the base; "
        "so no table is larger than stage 2's granule here, and no input address of a nested stream too wide",
    ),
    Departure(
        "smmuv3",
        "5.2 S1CDMax",
        "without substreams (IDR1.SSIDSIZE = 0) the field means nothing",
        "makes it C_BAD_STE",
    ),
    Departure(
        "smmuv3",
        "3.4",
        "an address beyond the output address size without a stage 1 is F_ADDR_SIZE",
        "is silent",
        lambda theirs, ours: (
            theirs == [BLOCKED]
            and _event(ours) == events.F_ADDR_SIZE
            and ours[3] >> 44 > 0
            and not ours[2] & events.EVT_1_S2
        ),
    ),
    Departure(
        "smmuv3",
        "4.4 TLBI_NH_ASID, TLBI_NH_VA",
        "global translations (nG = 0) go by TLBI_NH_VA of any ASID, and not by TLBI_NH_ASID",
        "does not know nG; so all are non-global here",
    ),
    Departure(
        "smmuv3",
        "4.4 TLBI_NH_VA",
        "any address in a block names the block's translation",
        "keeps of a block what a smaller page of stage 2 holds; nested streams are invalidated at the address in use",
    ),
    Departure(
        "smmuv3",
        "Arm ARM, D8.3",
        "a block descriptor at a level that has none (4 KiB: level 0, 16 KiB: 1, 64 KiB: 1) is F_TRANSLATION",
        "takes it as a block",
    ),
]
_TRANSLATION = events.TRANSLATION_RELATED


def same(theirs: Answer, ours: Answer, unit: str) -> bool:
    """Whether the answers to one step agree, departures aside."""
    if theirs == ours:
        return True
    if isinstance(theirs, int) or isinstance(ours, int):
        return False
    return any(
        departure.explains is not None and departure.unit == unit and departure.explains(theirs, ours)
        for departure in DEPARTURES
    )


def markdown() -> str:
    """The table as docs/qemu.md has it."""
    lines = ["| unit | manual | it says | QEMU 11.1 | here |", "|---|---|---|---|---|"]
    for one in DEPARTURES:
        how = "canonicalised" if one.explains else "avoided"
        lines.append(f"| {one.unit} | {one.section} | {one.manual} | {one.qemu} | {how} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
