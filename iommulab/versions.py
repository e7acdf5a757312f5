"""`iommulab versions`: what differs between releases of Linux, how it is known, and what of it was tested where.

Without a release the whole table; with one, what that release does otherwise than the newest. `--coverage` says for
each ioctl of iommufd, and each operation of its mock driver, at which releases the model handles it and how many tests
of the suite call it: on the model of that release, and on real kernels. The counts come from the recorded runs in
`conformance/recorded/`: a test counts for a release that its markers let it run on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from conformance.offers import number
from iommulab.errors import UserError
from iommulab.results import RECORDED, Results, Test, load
from iommulab.terminal import console as make_console
from kernel_model.iommufd.ctx import table as iommufd_table
from kernel_model.iommufd.selftest.operations import served
from uapi import behaviours, iommufd_test, registry
from uapi.behaviours import BY_ID, EVIDENCE, TABLE, Behaviour
from uapi.changes import abi_changes
from uapi.cstruct import OLDEST
from uapi.profile import profile
from uapi.version import MAINLINE, NEWEST, includes, parse

#: The columns of `--coverage`: every release with an iommufd.
RELEASES = tuple(release for release in MAINLINE if release != OLDEST)
#: Loads the files whose handlers make up the table.
import_module("kernel_model.iommufd.main")
_TEST_CMD = "IOMMU_TEST_CMD"
_OPERATION = "IOMMU_TEST_OP_"
_WIDE = 200


def everything() -> list[Behaviour]:
    """All rows, those of the headers included, in order of release."""
    rows = [*TABLE, *abi_changes()]
    return sorted(rows, key=lambda row: (parse(row.since), row.area != "abi"))


def differing(release: str) -> list[Behaviour]:
    """The rows that a release lacks."""
    return [row for row in everything() if not row.holds(release)]


def since_of(row: Behaviour) -> str:
    """("6.13 (after 6.12.117, by 7.2.13)", "7.2; 6.12.117")."""
    text = "; ".join([row.since, *row.backports])
    return f"{text} (after {row.between[0]}, by {row.between[1]})" if row.between else text


def as_json(row: Behaviour) -> dict[str, Any]:
    """A row as `--json` prints it."""
    return {name: getattr(row, name) for name in Behaviour.__dataclass_fields__}


def markdown() -> str:
    """The tables of docs/versions.md."""
    lines = ["| since | what | before | evidence | shown by |", "|---|---|---|---|---|"]
    for row in sorted(TABLE, key=lambda row: parse(row.since)):
        what = row.what if row.modelled else f"{row.what}. Not modelled: {row.note}"
        test = f"`{row.test.partition('::')[0]}`" if row.test else ""
        lines.append(f"| {since_of(row)} | {row.area}: {what} | {row.before} | {row.evidence} | {test} |")
    lines += ["", "| release | what its headers added | evidence |", "|---|---|---|"]
    lines += [f"| {row.since} | {row.what} | {row.evidence} |" for row in abi_changes()]
    return "\n".join(lines)


# -- coverage ---------------------------------------------------------------------------------------------------------


def fits(test: Test, release: str) -> bool:
    """Whether a test's markers let it run on the model of a release."""
    markers = test.markers
    if "linux_only" in markers or any(not includes(release, since) for since in markers.get("since", [])):
        return False
    rows = [(side, BY_ID[row]) for side in ("has", "lacks") for row in markers.get(side, []) if row in BY_ID]
    return all(row.holds(release) == (side == "has") for side, row in rows)


def called(test: Test) -> set[str]:
    """The ioctls that a test issued, and the mock driver's operations by name."""
    found = set()
    for call in test.calls:
        name = call["call"]
        found.add(name)
        if name == _TEST_CMD:
            found.add(_OPERATIONS.get(call.get("in", {}).get("op"), ""))
    return found


_OPERATIONS = {
    value: name for name, value in vars(iommufd_test).items() if name.startswith(_OPERATION) and isinstance(value, int)
}


class Coverage:
    """Tests by ioctl. `real` has a column for each recorded kernel: what passed there."""

    def __init__(self, runs: Sequence[Results]) -> None:
        self.releases = list(dict.fromkeys(number(run.release) for run in runs))
        self.real: dict[str, dict[str, set[str]]] = {release: {} for release in self.releases}
        self._tests: dict[str, tuple[Test, set[str]]] = {}
        for run in runs:
            for test in run.tests:
                if test.verdict != "passed":
                    continue
                names = called(test)
                self._tests[test.id] = test, self._tests.get(test.id, (test, set()))[1] | names
                for name in names:
                    self.real[number(run.release)].setdefault(name, set()).add(test.id)

    def on_model(self, name: str, release: str) -> int:
        """Tests that issue `name` and run on the model of a release."""
        return sum(name in names and fits(test, release) for test, names in self._tests.values())

    def on_real(self, name: str, release: str) -> int:
        return len(self.real[release].get(name, ()))


def subjects() -> Iterator[str]:
    """What coverage has rows for, in the header's order."""
    yield from registry.ioctls("linux/iommufd.h")
    yield from (name for name, one in registry.constants(registry.TEST_HEADER).items() if name.startswith(_OPERATION))


def handled(name: str, release: str) -> bool | None:
    """Whether the model handles an ioctl or operation at a release; None where the release has no such thing."""
    known = profile(release)
    if name.startswith(_OPERATION):
        return name in served() if name in known.constants else None
    return name in iommufd_table.handlers if name in known.ioctls else None


def columns(found: Coverage) -> list[str]:
    """The mainline releases, and the older stable ones that were recorded."""
    stable = [release for release in found.releases if parse(release).series != parse(NEWEST).series]
    return sorted({*RELEASES, *stable}, key=parse)


def coverage_rows(found: Coverage) -> Iterator[dict[str, Any]]:
    """For each subject: `model` by release (null: not there; false: not handled; else a count), `real` by kernel."""
    for name in subjects():
        model: dict[str, int | bool | None] = {}
        for release in columns(found):
            state = handled(name, release)
            model[release] = found.on_model(name, release) if state else state
        yield {
            "name": name,
            "model": model,
            "real": {release: found.on_real(name, release) for release in found.releases},
        }


def coverage_table(found: Coverage) -> Table:
    """A release a column; `.` is a release without it, `!` one where the model does not handle it."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("tests that call")
    for release in columns(found):
        table.add_column(release, justify="right")
    for release in found.releases:
        table.add_column(f"real {release}", justify="right", style="bold")
    for row in coverage_rows(found):
        cells = ["." if count is None else "!" if count is False else str(count) for count in row["model"].values()]
        real = [
            str(count) if count else "." if handled(row["name"], release) is None else "0"
            for release, count in row["real"].items()
        ]
        name = row["name"].removeprefix("IOMMU_").replace("TEST_OP_", "test: ")
        table.add_row(name, *cells, *real)
    return table


# -- the command ------------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("versions", help="what differs between releases of Linux", description=__doc__)
    parser.add_argument("release", nargs="?", metavar="RELEASE", help="only what this one (6.6, 6.12.117) lacks")
    parser.add_argument("--evidence", choices=EVIDENCE, help="only what is known so")
    parser.add_argument("--coverage", action="store_true", help="each ioctl: handled and tested at which release")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--markdown", action="store_true", help="print the tables of docs/versions.md")
    parser.set_defaults(run=run)


def _console() -> Console:
    # A pipe has no width: wide enough for the longest row, so that nothing is cut.
    return make_console() if sys.stdout.isatty() else Console(width=_WIDE, highlight=False)


def run(args: argparse.Namespace) -> int:
    """Print; always 0. UserError: no such release, or options that do not go together."""
    if args.release is not None:
        check_release(args.release)
    if args.coverage and (args.release or args.evidence or args.markdown):
        raise UserError("--coverage is of all releases: it goes with --json only.")
    if args.markdown and (args.release or args.evidence):
        raise UserError("--markdown is the whole table.")
    if args.coverage:
        _print_coverage(args.json)
    elif args.markdown:
        print(markdown())
    else:
        rows = differing(args.release) if args.release else everything()
        rows = [row for row in rows if args.evidence in (None, row.evidence)]
        _print_rows(rows, args)
    return 0


def check_release(name: str) -> None:
    """UserError for what is no release between the oldest and the newest."""
    try:
        series = parse(name).series
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if not parse(RELEASES[0]).series <= series <= parse(NEWEST).series:
        raise UserError(f"{name} is not known here: {RELEASES[0]} to {NEWEST} are.")


def _print_coverage(as_text: bool) -> None:
    runs = [load(str(path)) for path in sorted(RECORDED.glob("[0-9]*.json.gz"))]
    found = Coverage(sorted(runs, key=lambda run: parse(number(run.release))))
    if as_text:
        print(json.dumps(list(coverage_rows(found)), indent=1))
        return
    console = _console()
    console.print(coverage_table(found))
    console.print(
        "\nA number is how many tests call it on the model of that release; . is a release that does not have it,"
        "\n! one whose model does not handle it. `real` is what passed on a real kernel, in the recorded runs."
    )


def _print_rows(rows: Sequence[Behaviour], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps([as_json(row) for row in rows], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("since", "area", "what", f"{args.release} does" if args.release else "before", "evidence"):
        table.add_column(column, overflow="fold")
    for row in rows:
        what = row.what if row.modelled else f"{row.what} (the model does so at every release: {row.note})"
        style = "dim" if row.evidence == behaviours.UNVERIFIED else None
        table.add_row(since_of(row), row.area, what, row.before, row.evidence, style=style)
    console = _console()
    console.print(table)
    told = f"that {args.release} does not have" if args.release else f"between {RELEASES[0]} and {NEWEST}"
    console.print(f"{len(rows)} differences {told}")
