"""Where QEMU's emulated IOMMUs depart from the manuals, or the manuals leave open what happens.

`DEPARTURES` is the whole list. An entry with `explains` is drawn, and that function says whether a pair of answers
(QEMU's, ours) differs for this reason alone; one without is not drawn by the generators. Everything else that differs
fails. Sections are of the VT-d specification, revision 5.10, and of Arm IHI 0070.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

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
]


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
