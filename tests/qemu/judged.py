"""The units that QEMU judges: how each is built on both sides, and where its cases come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fakedev.vtd import entries
from tests.qemu import smmu_cases, vtd_interrupts, vtd_legacy, vtd_scalable
from tests.qemu.departures import same
from tests.qemu.qtest import find_qemu
from tests.qemu.rig import Case, Rig, play_all
from tests.qemu.smmu_rig import VIRT, OurSmmu, QemuSmmu
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
    theirs: Callable[[str], tuple[Rig, dict]]
    ours: Callable[[dict], Rig]
    #: How many new cases a live run asks: QEMU takes a hundred times as long for a read.
    live: int = 20_000


#: SSTS and SMPWC of ECAP, which ours is told of where QEMU has not got them (tests/qemu/departures.py says why).
_MORE = 1 << 46 | 1 << 48


def _vtd(options: str, bits: int = 48, scalable: bool = False, **more: bool) -> Callable[[str], tuple[Rig, dict]]:
    def start(program: str) -> tuple[Rig, dict]:
        rig = QemuVtd(program, options, scalable, **more)
        ecap = rig.ecap | (_MORE if scalable else 0)
        return rig, {"cap": rig.cap, "ecap": ecap, "bits": bits, "scalable": scalable, **more}

    return start


def _smmu(program: str) -> tuple[Rig, dict]:
    return QemuSmmu(program), VIRT


def _smmu_two_level(program: str) -> tuple[Rig, dict]:
    return QemuSmmu(program, two_level=True), {**VIRT, "two_level": True}


def _our_smmu(parameters: dict) -> Rig:
    return OurSmmu(**parameters)


def _our_vtd(parameters: dict) -> Rig:
    return OurVtd(**parameters)


UNITS = {
    unit.name: unit
    for unit in (
        Judged("vtd-legacy", "vtd", "x86_64", vtd_legacy.case, _vtd(""), _our_vtd),
        Judged(
            "vtd-legacy-39",
            "vtd",
            "x86_64",
            vtd_legacy.case,
            _vtd(",aw-bits=39,snoop-control=on,device-iotlb=on", 39),
            _our_vtd,
        ),
        Judged(
            "vtd-second",
            "vtd",
            "x86_64",
            vtd_scalable.cases(entries.PGTT_SECOND),
            _vtd(",scalable-mode=on", scalable=True),
            _our_vtd,
        ),
        Judged(
            "vtd-change",
            "vtd",
            "x86_64",
            vtd_scalable.change,
            _vtd(",scalable-mode=on", scalable=True),
            _our_vtd,
        ),
        Judged(
            "vtd-first",
            "vtd",
            "x86_64",
            vtd_scalable.cases(entries.PGTT_FIRST),
            _vtd(",scalable-mode=on,fsts=on", scalable=True),
            _our_vtd,
        ),
        Judged("vtd-reads", "vtd", "x86_64", vtd_legacy.reads, _vtd(""), _our_vtd, live=1000),
        *(
            Judged(
                f"vtd-reads-{name}",
                "vtd",
                "x86_64",
                vtd_scalable.reads(pgtt),
                _vtd(options, scalable=True),
                _our_vtd,
                live=1000,
            )
            for name, pgtt, options in (
                ("second", entries.PGTT_SECOND, ",scalable-mode=on"),
                ("first", entries.PGTT_FIRST, ",scalable-mode=on,fsts=on"),
            )
        ),
        Judged(
            "vtd-interrupts",
            "vtd",
            "x86_64",
            vtd_interrupts.cases(extended=False),
            _vtd(",intremap=on", interrupts=True),
            _our_vtd,
        ),
        Judged(
            "vtd-interrupts-extended",
            "vtd",
            "x86_64",
            vtd_interrupts.cases(extended=True),
            _vtd(",intremap=on,eim=on", interrupts=True, extended=True),
            _our_vtd,
        ),
        Judged("smmuv3-config", "smmuv3", "aarch64", smmu_cases.config, _smmu, _our_smmu),
        Judged("smmuv3-two-level", "smmuv3", "aarch64", smmu_cases.two_level, _smmu_two_level, _our_smmu),
        Judged("smmuv3-reads", "smmuv3", "aarch64", smmu_cases.reads, _smmu, _our_smmu, live=2000),
        *(
            Judged(f"smmuv3-{name}", "smmuv3", "aarch64", smmu_cases.cases(kind), _smmu, _our_smmu)
            for name, kind in (("s1", smmu_cases.S1), ("s2", smmu_cases.S2), ("nested", smmu_cases.NESTED))
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


def record(name: str, cases: int, first: int = 0) -> None:
    """Record QEMU's answers to that many cases from the seed `first`, a multiple of a file's cases."""
    unit = UNITS[name]
    program, missing = find_qemu(unit.architecture)
    if missing:
        sys.exit(missing)
    pairs: list = []
    number = first // PER_FILE
    parameters: dict = {}
    for parameters, case, answers in asked(unit, program, range(first, first + cases)):
        pairs.append([case, answers])
        if len(pairs) == PER_FILE:
            print(save(name, number, {"unit": name, "parameters": parameters, "cases": pairs}))
            pairs, number = [], number + 1
    if pairs:
        print(save(name, number, {"unit": name, "parameters": parameters, "cases": pairs}))


if __name__ == "__main__":
    record(sys.argv[1], *map(int, sys.argv[2:]))
