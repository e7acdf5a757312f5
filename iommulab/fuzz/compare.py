"""What two answers to one program differ in, said by call and field."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from iommulab.fuzz.executor import IDS, Answer, digest
from iommulab.fuzz.memory import PAGE, REGIONS, WATCHED
from iommulab.fuzz.program import LAYOUTS, Compiled, Program


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same: at which call (-1: in the final state), what, and both values in words."""

    call: int
    what: str
    real: str
    model: str


def outcome(result: int) -> str:
    """A result as a person says it: a number, or the errno's name."""
    return str(result) if result >= 0 else errno.errorcode.get(-result, str(result)).replace("ENOTSUP", "EOPNOTSUPP")


def differences(program: Program, compiled: Compiled, real: Answer, model: Answer) -> list[Difference]:
    """All differences, those of a call in the order of the calls."""
    found = [
        Difference(index, "result", outcome(theirs), outcome(ours))
        for index, (theirs, ours) in enumerate(zip(real[0], model[0], strict=True))
        if theirs != ours
    ]
    for start, end, index, name in compiled.places:
        theirs, ours = real[1][start:end], model[1][start:end]
        if theirs != ours:
            found += _fields(program, index, name, theirs, ours)
    known = max((end for _, end, _, _ in compiled.places), default=0)
    if real[1][known:] != model[1][known:] and not found:
        found.append(Difference(-1, "memory behind the blocks", real[1][known:].hex(), model[1][known:].hex()))
    found.sort(key=lambda difference: difference.call)
    found += _final(real[2], model[2])
    return found or [Difference(-1, "memory", "not the same", "not the same")] if digest(real) != digest(model) else []


def _fields(program: Program, index: int, place: str, theirs: bytes, ours: bytes) -> list[Difference]:
    if place:
        return [Difference(index, place, theirs.hex(" ", 8), ours.hex(" ", 8))]
    found = []
    for name, (offset, size) in LAYOUTS[program.calls[index].name].fields.items():
        if theirs[offset : offset + size] != ours[offset : offset + size]:
            values = [int.from_bytes(block[offset : offset + size], "little") for block in (theirs, ours)]
            found.append(Difference(index, name, *map(hex, values)))
    return found or [Difference(index, "bytes between the fields", theirs.hex(" ", 8), ours.hex(" ", 8))]


def _final(real: dict[str, list[int]], model: dict[str, list[int]]) -> list[Difference]:
    found = []
    for name, theirs in real.items():
        ours = model[name]
        if theirs == ours:
            continue
        if name == "destroy":
            said = [
                (_destroyed(place, theirs, ours), outcome(one), outcome(other))
                for place, (one, other) in enumerate(zip(theirs, ours, strict=False))
                if one != other
            ] or [("a second DESTROY", str(len(theirs)), str(len(ours)))]
            found += [Difference(-1, *item) for item in said[:3]]
        elif name in ("pins", "left"):
            pages = list(zip(_pages(), theirs or [0] * len(ours), ours or [0] * len(theirs), strict=False))
            what = "pins" if name == "pins" else "pins after the last close"
            wrong = [(f"{what} of {page}", str(a), str(b)) for page, a, b in pages if a != b]
            found += [Difference(-1, *item) for item in wrong[:3]]
        else:
            found.append(Difference(-1, f"{name} at the end", str(theirs), str(ours)))
    return found


def _destroyed(place: int, theirs: list[int], ours: list[int]) -> str:
    return f"DESTROY of id {IDS - place} at the end" if place < IDS else "DESTROY again at the end"


def _pages() -> list[str]:
    return [f"{name}+{index * PAGE:#x}" for name in WATCHED for index in range(REGIONS[name][1])]
