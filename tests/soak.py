"""The long runs, one after the other: `make soak`, or `python -m tests.soak [PART …]`.

Each part is a command whose output is shown as it comes; a part that fails does not stop the others. At the end there
is a line a part, and the exit status is 1 if one failed. What a part cannot do here (no QEMU, no kernel image) is in
its own output as a skip with the reason. `--quick` does little of each, to see that all of it still runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

from tests.faults.faults import FAULTS

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-v", "-m", "soak"]
SUITE = [PYTHON, "-m", "iommulab", "conformance"]
#: Machines with an IOMMU, and what their hardware keeps of what it read.
MACHINES = ("q35-vtd-legacy", "q35-vtd", "q35-vtd-fs", "q35-vtd-max", "virt-smmuv3", "virt-smmuv3-max")
CACHING = ("always", "never", "random:1", "random:2")
#: Areas for a quick run of the suite.
FEW = ["ioas_map", "vfio_msi"]


@dataclass(frozen=True)
class Part:
    """`commands` run in order, with --quick `quick`; `hours` is how long the whole takes on two cores."""

    name: str
    what: str
    hours: str
    commands: list[list[str]]
    quick: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


def _caching(tests: list[str], machines: tuple[str, ...], ways: tuple[str, ...]) -> list[list[str]]:
    return [
        [*SUITE, "--machine", machine, "--caching", way, "--report", f"report/{machine}-{way}", *tests]
        for way in ways
        for machine in machines
    ]


PARTS = [
    Part(
        "tests",
        "the project's own tests, the property tests with 2,000 new examples each",
        "1",
        [[PYTHON, "-m", "pytest", "-n", "auto"]],
        [[PYTHON, "-m", "pytest", "-n", "auto", "tests/kernel_model/test_interval.py", "tests/fakedev/test_tlb.py"]],
        {"IOMMULAB_SOAK": "1"},
    ),
    Part(
        "qemu",
        "a live QEMU as judge of the units, 20,000 new cases each",
        "1",
        [[*PYTEST, "tests/qemu"]],
        [[*PYTEST, "tests/qemu"]],
    ),
    Part(
        "faults",
        "one-line faults put into the model, each of which the suite must catch",
        "1",
        [[*PYTEST, "tests/faults"]],
        [[*PYTEST, "tests/faults", "-k", FAULTS[0].name]],
    ),
    Part(
        "long",
        "bad input for ten minutes, fuzzed programs, guests that panic or hang, older releases beside their runs",
        "1",
        [[*PYTEST, "tests", "--ignore", "tests/qemu", "--ignore", "tests/faults"]],
        [[*PYTEST, "tests/kernel_model/test_bad_input.py"]],
        {},
    ),
    Part(
        "caching",
        "the suite on hardware that keeps all it may, that keeps nothing, and that forgets at random",
        "1",
        _caching([], MACHINES, CACHING),
        _caching(FEW, MACHINES[:1], CACHING[:2]),
    ),
    Part(
        "fail-nth-mock",
        "the suite on the mock IOMMU with each allocation failing in turn",
        "1/2",
        [[*SUITE, "--fail-nth", "--machine", "mock", "--report", "report/fail-nth-mock"]],
        [[*SUITE, "--fail-nth", "--machine", "mock", "--report", "report/fail-nth-mock", "ioas_alloc"]],
    ),
    Part(
        "fail-nth",
        "the same on VT-d",
        "2",
        [[*SUITE, "--fail-nth", "--report", "report/fail-nth", "--total-time", "7200"]],
        [[*SUITE, "--fail-nth", "--report", "report/fail-nth", "ioas_alloc"]],
    ),
]
#: What a quick run says to tests that take their measure from the environment (tests/qemu, bad input).
QUICK = {"IOMMULAB_SOAK_QUICK": "1", "BAD_INPUT_SECONDS": "10"}


def run(parts: list[Part], quick: bool) -> bool:
    """Run the parts; whether all went well."""
    begun = time.monotonic()
    told = []
    for number, part in enumerate(parts, 1):
        print(f"\n== soak {number}/{len(parts)}, {part.name}: {part.what}", flush=True)
        since = time.monotonic()
        environment = {**os.environ, **part.environment, **(QUICK if quick else {})}
        codes = [
            subprocess.run(command, env=environment, check=False).returncode
            for command in (part.quick if quick else part.commands)
        ]
        failed = sum(code != 0 for code in codes)
        verdict = "ok" if not failed else f"FAILED ({failed} of {len(codes)} commands)"
        told.append(f"{part.name:14} {verdict:28} {(time.monotonic() - since) / 60:6.1f} min")
    print("\n== soak\n" + "\n".join(told) + f"\nall of it: {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    return not any("FAILED" in line for line in told)


def markdown() -> str:
    """The parts as docs/conformance.md has them."""
    lines = ["| part | what | hours |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{part.name}` | {part.what} | {part.hours} |" for part in PARTS)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default all: {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--quick", action="store_true", help="little of each")
    parser.add_argument("--markdown", action="store_true", help="print the table for the docs")
    given = parser.parse_args(arguments)
    by_name = {part.name: part for part in PARTS}
    for name in given.parts:
        if name not in by_name:
            parser.error(f"no part {name!r}; there are {', '.join(by_name)}")
    if given.markdown:
        print(markdown())
        return 0
    return 0 if run([by_name[name] for name in given.parts] or PARTS, given.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
