"""`iommulab coverage`: every place where the model raises an errno and the suite did not get there.

The suite runs on several machines, for each IOMMU one that has everything: a place that is reached on one is reached.

The places are the `raise KernelError(errno.X, ...)` statements of `kernel_model`, found in its syntax trees; whether a
place was reached is whether its line ran in a run of the whole suite on the model. One that was not reached needs a
reason in `conformance/UNREACHED.md`, in lines of this form, where one line stands for all such places of a function::

    - `kernel_model/iommufd/ioas.py ioas_map EINVAL`: why no test of the suite gets there
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from fakedev.machines.named import MACHINES as NAMED
from iommulab.errors import UserError
from iommulab.results import SUITE
from iommulab.selection import pytest_command, pytest_environment
from iommulab.suite import MODEL, workers_for
from iommulab.terminal import console as make_console

ROOT = SUITE.parent
#: Where the suite is run.
MACHINES = ("q35-vtd-legacy", "q35-vtd-max", "virt-smmuv3-max")
REASONS = SUITE / "UNREACHED.md"
_ENTRY = re.compile(r"- `(\S+\.py) (\S+) (E[A-Z0-9]+|\?)`: *(.*)")


@dataclass(frozen=True, slots=True)
class Site:
    """One `raise KernelError`: where, in which function, the errno ("?" where it is computed) and the reason given."""

    path: str
    line: int
    function: str
    errno: str
    why: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.path, self.function, self.errno


def _sites_in(path: str, node: ast.AST, function: str) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        name = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{function}.{child.name}" if function else child.name
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            call = child.exc
            if isinstance(call.func, ast.Name) and call.func.id == "KernelError":
                number = call.args[0] if call.args else None
                known = isinstance(number, ast.Attribute) and number.attr.startswith("E")
                errno = number.attr if known and isinstance(number, ast.Attribute) else "?"
                why = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
                yield Site(path, child.lineno, name or "(module)", errno, why)
        yield from _sites_in(path, child, name)


def find_sites(package: Path) -> list[Site]:
    """All places of a package that raise an errno, in order of file and line."""
    found: list[Site] = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package.parent).as_posix()
        found += _sites_in(relative, ast.parse(path.read_text(), relative), "")
    return sorted(found, key=lambda site: (site.path, site.line))


def read_reasons(text: str, name: str = REASONS.name) -> dict[tuple[str, str, str], str]:
    """The entries of the file of reasons. UserError that names a malformed line."""
    reasons: dict[tuple[str, str, str], str] = {}
    last: tuple[str, str, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("- "):
            match = _ENTRY.fullmatch(line)
            if match is None:
                raise UserError(f"{name}, line {number}: expected '- `FILE FUNCTION ERRNO`: reason', not {line!r}")
            last = match.group(1), match.group(2), match.group(3)
            if last in reasons:
                raise UserError(f"{name}, line {number}: {' '.join(last)} has a reason already")
            reasons[last] = match.group(4).strip()
        elif last is not None and line.startswith("  "):
            reasons[last] = f"{reasons[last]} {line.strip()}".strip()
        else:
            last = None
    for key, reason in reasons.items():
        if not reason:
            raise UserError(f"{name}: {' '.join(key)} has no reason")
    return reasons


def reached_lines(console: Console, workers: int, machines: Sequence[str]) -> dict[str, set[int]]:
    """Run the suite on the model's machines and return the lines that ran, by file relative to the root."""
    if find_spec("coverage") is None:
        raise UserError("the package coverage is not installed here; install it with: pip install 'iommulab[test]'")
    with tempfile.TemporaryDirectory(prefix="iommulab-reached-") as folder:
        for machine in machines:
            arguments = ["-p", "iommulab.reached", "-q", "--backend", MODEL]
            arguments += [f"--backend-option=machine={machine}", str(SUITE)]
            arguments += ["-p", "xdist", "-n", str(workers)] if workers > 1 else []
            environment = pytest_environment() | {"IOMMULAB_REACHED": folder}
            with console.status(f"running the suite on {machine}"):
                done = subprocess.run(
                    pytest_command(arguments), capture_output=True, text=True, env=environment, cwd=ROOT, check=False
                )
            if done.returncode not in (0, 1):
                raise UserError(f"the suite did not run: {(done.stdout + done.stderr).strip()[-500:]}")
            lines = (done.stdout.strip().splitlines() or [""])[-1]
            console.print(f"the suite on {machine}: {lines.strip('= ')}", markup=False, highlight=False)
        return _read_lines(Path(folder))


def _read_lines(folder: Path) -> dict[str, set[int]]:
    coverage_data = import_module("coverage").CoverageData
    reached: dict[str, set[int]] = {}
    for file in folder.glob("lines*"):
        data = coverage_data(str(file))
        data.read()
        for name in data.measured_files():
            path = Path(name).resolve()
            if path.is_relative_to(ROOT):
                reached.setdefault(path.relative_to(ROOT).as_posix(), set()).update(data.lines(name) or ())
    return reached


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "coverage", help="errno sites of the model that the suite does not reach", description=__doc__
    )
    parser.add_argument("-n", dest="workers", type=int, metavar="N", help="parallel processes")
    parser.add_argument(
        "--machine",
        action="append",
        choices=sorted(NAMED),
        metavar="NAME",
        help=f"a machine to run on, several times if need be (default: {', '.join(MACHINES)})",
    )
    parser.add_argument("--all", action="store_true", help="list those with a reason too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 where a place was not reached and has no reason."""
    console = make_console()
    if args.workers is not None and not 1 <= args.workers <= 256:
        raise UserError(f"-n {args.workers} is not between 1 and 256")
    try:
        reasons = read_reasons(REASONS.read_text())
    except FileNotFoundError:
        reasons = {}
    sites = find_sites(ROOT / "kernel_model")
    reached = reached_lines(console, workers_for(args.workers), args.machine or MACHINES)
    missed = [site for site in sites if site.line not in reached.get(site.path, set())]
    return report(console, sites, missed, reasons, everything=args.all)


def report(
    console: Console,
    sites: Sequence[Site],
    missed: Sequence[Site],
    reasons: dict[tuple[str, str, str], str],
    *,
    everything: bool = False,
) -> int:
    """Print what was missed: 1 where one has no reason, else 0."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    unexplained = [site for site in missed if site.key not in reasons]
    for site in missed if everything else unexplained:
        say(f"{site.path}:{site.line}: {site.function} {site.errno} {site.why}")
        if site.key in reasons:
            say(f"    {reasons[site.key]}")
    for key in sorted(set(reasons) - {site.key for site in missed}):
        say(f"STALE {REASONS.name}: {' '.join(key)} is reached, or is no more")
    say(
        f"{len(sites)} places raise an errno: {len(sites) - len(missed)} reached, "
        f"{len(missed) - len(unexplained)} not reached for a reason, {len(unexplained)} not reached without one"
    )
    return 1 if unexplained else 0
