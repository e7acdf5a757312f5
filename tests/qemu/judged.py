"""The units that QEMU judges: how each is built on both sides, and where its cases come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.qemu import vtd_legacy
from tests.qemu.departures import same
from tests.qemu.qtest import find_qemu
from tests.qemu.rig import Case, Rig, play_all
from tests.qemu.vectors import PER_FILE, save
from tests.qemu.vtd_rig import OurVtd, QemuVtd

#: Cases whose commands are sent to QEMU in one piece.
_BATCH = 200


@dataclass(frozen=True)
class Judged:
    """`theirs` starts QEMU and gives (rig, parameters of the unit); `ours` builds our unit with such parameters."""

    name: str
    kind: str  # of departures.Departure.unit
    architecture: str
    case: Callable[[int], Case]
    theirs: Callable[[str], tuple[QemuVtd, dict]]
    ours: Callable[[dict], Rig]


def _vtd(options: str, bits: int) -> Callable[[str], tuple[QemuVtd, dict]]:
    def start(program: str) -> tuple[QemuVtd, dict]:
        rig = QemuVtd(program, options)
        return rig, {"cap": rig.cap, "ecap": rig.ecap, "bits": bits}

    return start


def _our_vtd(parameters: dict) -> Rig:
    return OurVtd(**parameters)


UNITS = {
    unit.name: unit
    for unit in (
        Judged("vtd-legacy", "vtd", "x86_64", vtd_legacy.case, _vtd("", 48), _our_vtd),
        Judged(
            "vtd-legacy-39",
            "vtd",
            "x86_64",
            vtd_legacy.case,
            _vtd(",aw-bits=39,snoop-control=on,device-iotlb=on", 39),
            _our_vtd,
        ),
    )
}


def asked(unit: Judged, program: str, seeds: range) -> Iterator[tuple[dict, Case, list]]:
    """QEMU's answers to the cases of some seeds: (parameters, case, answers)."""
    rig, parameters = unit.theirs(program)
    try:
        for first in range(seeds.start, seeds.stop, _BATCH):
            cases = [unit.case(seed) for seed in range(first, min(first + _BATCH, seeds.stop))]
            for case, answers in zip(cases, play_all(rig, cases), strict=True):
                yield parameters, case, answers
    finally:
        rig.close()


def differences(unit: Judged, parameters: dict, recorded: list[tuple[Case, list]]) -> list[str]:
    """What ours answers differently from QEMU, in words, departures aside."""
    rig = unit.ours(parameters)
    ours = play_all(rig, [case for case, _ in recorded])
    found = []
    for (case, theirs), mine in zip(recorded, ours, strict=True):
        for number, (one, other) in enumerate(zip(theirs, mine, strict=True)):
            if not same(one, other, unit.kind):
                steps = "\n".join(f"  {step[0]} {' '.join(map(hex, step[1:]))}" for step in case)
                found.append(f"answer {number}: QEMU {words(one)}, ours {words(other)}\n{steps}")
                break
    return found


def words(answer: int | list[int]) -> str:
    """An answer for people."""
    if isinstance(answer, int):
        return f"{answer:#x}"
    return " ".join({-1: "blocked", -2: "elsewhere"}.get(word, f"{word:#x}") for word in answer)


def record(name: str, cases: int) -> None:
    """Record QEMU's answers to the cases of seeds 0 to `cases`."""
    unit = UNITS[name]
    program, missing = find_qemu(unit.architecture)
    if missing:
        sys.exit(missing)
    pairs: list = []
    number = 0
    parameters: dict = {}
    for parameters, case, answers in asked(unit, program, range(cases)):
        pairs.append([case, answers])
        if len(pairs) == PER_FILE:
            print(save(name, number, {"unit": name, "parameters": parameters, "cases": pairs}))
            pairs, number = [], number + 1
    if pairs:
        print(save(name, number, {"unit": name, "parameters": parameters, "cases": pairs}))


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]))
