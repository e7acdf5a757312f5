"""What a fault of the model is: one line of its source, changed."""

from __future__ import annotations

from typing import NamedTuple

IOMMUFD, VTD, SMMUV3 = "iommufd and VFIO", "VT-d", "SMMUv3"


class Fault(NamedTuple):
    """`line` of `file` turns into `becomes`; both without their indentation. `test` of the suite fails on `machine`.

    `below` is a line above it, where `line` alone stands in the file more than once: the first one after it is meant.
    """

    name: str
    kind: str
    what: str
    file: str
    line: str
    becomes: str
    machine: str
    test: str
    below: str = ""


def changed(fault: Fault, text: str) -> str:
    """The text of the file with the fault in it. LookupError: the line is not there, or it is there twice."""
    lines = text.split("\n")
    start = 0
    if fault.below:
        start = next((n for n, line in enumerate(lines) if line.strip() == fault.below), len(lines))
    places = [n for n, line in enumerate(lines) if n >= start and line.strip() == fault.line]
    if not places or (len(places) > 1 and not fault.below):
        raise LookupError(f"{fault.name}: {fault.file} has {len(places)} lines {fault.line!r}")
    at = places[0]
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines[at] = indent + fault.becomes
    return "\n".join(lines)
