"""`iommulab compare A B`: two runs of the suite side by side.

Compared are each test's verdict, its recorded calls (name, errno, result, outputs) and its notes. The inputs are the
test's own and are not compared; neither are the model's reasons, repetitions, and what is marked volatile. A test that
passed here and was skipped there differs, unless it is marked for one side only or the release explains it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conformance.offers import NOT_COMPARED, number, older
from iommulab import differences
from iommulab.errors import UserError
from iommulab.results import Results, Test, area_of, load
from iommulab.terminal import console as make_console
from uapi.behaviours import BY_ID
from uapi.decode import render

#: Differing tests that are printed in full.
SHOWN = 40
NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Differing:
    """One test that is not the same on both sides: a line for each side, and the entry that explains it."""

    test: str
    left: str
    right: str
    entry: differences.Difference | None = None


@dataclass(slots=True)
class Comparison:
    """Two runs set side by side."""

    left: Results
    right: Results
    same: int
    differing: list[Differing]
    stale: list[differences.Difference]

    @property
    def unexplained(self) -> list[Differing]:
        return [one for one in self.differing if one.entry is None]


#: Calls that a client repeats until something happens: how often is chance.
_POLLED = frozenset({"read", "pread", "poll"})


def _comparable(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls one by one, without volatile ones; polling as one call for each new outcome."""
    found: list[dict[str, Any]] = []
    for call in calls:
        if call.get("volatile"):
            continue
        if call["call"] not in _POLLED:
            found += [call] * call.get("times", 1)
        elif not found or _outcome(found[-1]) != _outcome(call):
            found.append(call)
    return found


def _outcome(call: dict[str, Any]) -> tuple[Any, ...]:
    return call["call"], call.get("file"), call.get("client"), call.get("errno"), call.get("ret"), call.get("out") or {}


def _verdict(test: Test) -> str:
    return f"{test.verdict}: {test.reason}" if test.reason else test.verdict


def _one_sided(left: Test, right: Test, releases: tuple[str, str]) -> bool:
    """A skip on one side that the test's own markers explain."""
    for test, other, release in ((left, right, releases[0]), (right, left, releases[1])):
        markers = {**other.markers, **test.markers}
        if test.verdict != "skipped":
            continue
        if "model_only" in markers or "linux_only" in markers:
            return True
        if any(older(release, since) for since in markers.get("since", [])):
            return True
        rows = [(name, BY_ID[row]) for name in ("has", "lacks") for row in markers.get(name, []) if row in BY_ID]
        if any(row.holds(number(release)) != (name == "has") for name, row in rows):
            return True
        if any(test.reason == NOT_COMPARED.get(need) for need in markers.get("needs", [])):
            return True
    return False


def differ(left: Test, right: Test, releases: tuple[str, str]) -> tuple[str, str] | None:
    """How one test differs between two runs: a line for each side, or None."""
    if left.verdict != right.verdict:
        if _one_sided(left, right, releases):
            return None
        return _verdict(left), _verdict(right)
    if left.verdict == "skipped":
        return None
    ours, theirs = _comparable(left.calls), _comparable(right.calls)
    for place in range(max(len(ours), len(theirs))):
        one = ours[place] if place < len(ours) else None
        other = theirs[place] if place < len(theirs) else None
        if one is None or other is None or _outcome(one) != _outcome(other):
            return _numbered(place, one), _numbered(place, other)
    for key in sorted({*left.notes, *right.notes}):
        values = left.notes.get(key), right.notes.get(key)
        if values[0] != values[1]:
            return f"noted {key} = {values[0]}", f"noted {key} = {values[1]}"
    return None


def _numbered(number: int, call: dict[str, Any] | None) -> str:
    return f"call {number + 1}: {render(call)}" if call is not None else f"only {number} calls"


def compare(left: Results, right: Results, entries: Sequence[differences.Difference]) -> Comparison:
    """Set two runs side by side. Entries speak of the real kernel's release (of either side, if both are real)."""
    real = [run.release for run in (left, right) if run.backend == "linux"] or [left.release, right.release]
    ours, theirs = ({test.id: test for test in run.tests} for run in (left, right))
    differing: list[Differing] = []
    same: list[str] = []
    for test_id in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(test_id), theirs.get(test_id)
        if one is None or other is None:
            lines: tuple[str, str] | None = (
                (NOT_RUN if one is None else _verdict(one)),
                (NOT_RUN if other is None else _verdict(other)),
            )
        else:
            lines = differ(one, other, (left.release, right.release))
        if lines is None:
            same.append(test_id)
            continue
        entry = next(filter(None, (differences.entry_for(entries, test_id, release) for release in real)), None)
        differing.append(Differing(test_id, *lines, entry))
    used = {one.entry.test for one in differing if one.entry is not None}
    stale = [
        entry
        for entry in entries
        if entry.test not in used
        and any(entry.holds_for(release) for release in real)
        and any(entry.is_about(test_id) for test_id in same)
    ]
    return Comparison(left, right, len(same), differing, stale)


def print_comparison(console: Console, found: Comparison) -> None:
    """The areas in two columns, then each differing test."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    titles = found.left.title, found.right.title
    table = Table(title="passed / failed / skipped", title_justify="left", box=None, pad_edge=False)
    table.add_column("area")
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("explained", justify="right")
    table.add_column("unexplained", justify="right")
    areas = found.left.areas(), found.right.areas()
    for area in sorted({*areas[0], *areas[1]}):
        cells = [_cell(side.get(area, [])) for side in areas]
        here = [one for one in found.differing if area_of(one.test) == area]
        counts = sum(one.entry is not None for one in here), sum(one.entry is None for one in here)
        row = [area, *cells, *(str(count) if count else "." for count in counts)]
        table.add_row(*row, style="red" if counts[1] else None)
    table.add_section()
    explained = len(found.differing) - len(found.unexplained)
    totals = [_cell(side.tests) for side in (found.left, found.right)]
    table.add_row("all", *totals, str(explained), str(len(found.unexplained)), style="bold")
    console.print(table, soft_wrap=False)
    width = max(map(len, titles))
    for title, missing in zip(titles, missing_on(found), strict=True):
        if missing:
            say(f"\n{len(missing)} tests were not run on {title}, e.g. {missing[0]}")
    shown = [one for one in found.unexplained if NOT_RUN not in (one.left, one.right)]
    shown.sort(key=lambda one: one.left.startswith("skipped") or one.right.startswith("skipped"))
    for one in [*shown[:SHOWN], *(one for one in found.differing if one.entry is not None)]:
        say(f"\n{'KNOWN' if one.entry is not None else 'DIFFERS'} {one.test}")
        say(f"  {titles[0]:{width}}  {one.left}\n  {titles[1]:{width}}  {one.right}")
        if one.entry is not None:
            say(f"  why: {one.entry.values['why']}")
    if len(shown) > SHOWN:
        say(f"\n… and {len(shown) - SHOWN} more that differ")
    for entry in found.stale:
        say(f"\nSTALE {differences.FILE.name}, line {entry.line}: {entry.test} does not differ any more")
    alone = sum(NOT_RUN in (one.left, one.right) for one in found.unexplained)
    say(
        f"\n{found.same} tests are the same; {explained} differ as {differences.FILE.name} says; "
        f"{len(found.unexplained) - alone} differ without an entry"
        + (f"; {alone} ran on one side only" if alone else "")
    )


def missing_on(found: Comparison) -> tuple[list[str], list[str]]:
    """The tests that only the other side ran."""
    left = [one.test for one in found.unexplained if one.left == NOT_RUN]
    return left, [one.test for one in found.unexplained if one.right == NOT_RUN]


def _cell(tests: Sequence[Test]) -> str:
    passed, failed = (sum(test.verdict == verdict for test in tests) for verdict in ("passed", "failed"))
    return f"{passed} / {failed} / {len(tests) - passed - failed}" if tests else NOT_RUN


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("compare", help="two runs of the suite side by side", description=__doc__)
    runs = "a run's .json or .json.gz, or recorded:NAME"
    parser.add_argument("left", metavar="A", help=runs)
    parser.add_argument("right", metavar="B", help=runs)
    parser.add_argument("--differences", type=Path, metavar="FILE", help="default: the suite's DIFFERENCES.md")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 where the runs differ without an entry."""
    if args.differences is not None and not args.differences.is_file():
        raise UserError(f"there is no file {args.differences}")
    entries = differences.load(args.differences or differences.FILE)
    found = compare(load(args.left), load(args.right), entries)
    print_comparison(make_console(), found)
    return 1 if found.unexplained else 0
