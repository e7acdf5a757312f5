"""The table of what differs between releases: its rows are whole, and what they name exists."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from uapi.behaviours import BY_ID, EVIDENCE, RUN, SOURCE, TABLE, UNVERIFIED, Behaviour, has
from uapi.changes import abi_changes
from uapi.profile import profile
from uapi.version import MAINLINE, includes, parse

ROOT = Path(__file__).resolve().parents[2]
ALL = [*TABLE, *abi_changes()]


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.id)
def test_row_is_whole(row: Behaviour) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", row.id)
    assert row.since in MAINLINE[1:]
    assert row.evidence in EVIDENCE
    assert all((row.what, row.before, row.area))
    assert row.modelled != bool(row.note), "a row that is not modelled says why, and no other has to"
    for backport in row.backports:
        assert parse(backport).point


def test_ids_are_each_for_one_row() -> None:
    assert len({row.id for row in ALL}) == len(ALL)
    assert len(BY_ID) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_evidence_of_a_run_or_of_source_names_two_releases(row: Behaviour) -> None:
    if row.evidence in (RUN, SOURCE):
        assert row.between is not None
    if row.between is not None:
        without, first = row.between
        assert (row.holds(without), row.holds(first)) == (False, True)
        assert row.evidence != UNVERIFIED


@pytest.mark.parametrize("row", [row for row in ALL if row.test], ids=lambda row: row.id)
def test_test_that_shows_it_exists(row: Behaviour) -> None:
    path, _, name = row.test.partition("::")
    assert (ROOT / path).is_file()
    if name:
        functions = {
            node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions


@pytest.mark.parametrize("row", [row for row in TABLE if row.evidence == RUN], ids=lambda row: row.id)
def test_what_a_run_showed_has_a_test(row: Behaviour) -> None:
    assert row.test


def ids_asked(folder: str, call: str) -> set[str]:
    pattern = re.compile(rf'\b{call}\((?:[^()"]|\([^()]*\))*"([a-z0-9-]+)"\)')
    return {found for path in (ROOT / folder).rglob("*.py") for found in pattern.findall(path.read_text())}


def test_model_asks_for_rows_that_exist_and_for_all_that_are_modelled() -> None:
    asked = ids_asked("kernel_model", "has")
    assert asked == {row.id for row in TABLE if row.modelled}


def test_suite_names_rows_that_exist() -> None:
    assert ids_asked("conformance", "has") | ids_asked("conformance", "lacks") <= BY_ID.keys()


def test_model_compares_no_release_beside_the_table() -> None:
    """What came when is in the table, where it is printed and tested; one lower bound is in the registry of drivers."""
    found = [
        (path.relative_to(ROOT).as_posix(), line)
        for path in (ROOT / "kernel_model").rglob("*.py")
        for line in re.findall(r'includes\(.*"(\d+\.\d+)"', path.read_text())
    ]
    assert found == [("kernel_model/iommu/registry.py", "6.8")]


def test_backport_holds_in_its_series_only() -> None:
    assert [has(release, "fault-read-too-small") for release in ("6.12.95", "6.12.117", "6.13", "6.19", "7.2")] == [
        False,
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(KeyError):
        has("6.12", "no-such-row")


@pytest.mark.parametrize(("older", "newer"), list(pairwise(MAINLINE)))
def test_rows_of_the_headers_are_all_that_the_headers_added(older: str, newer: str) -> None:
    told = " ".join(row.what for row in abi_changes() if row.since == newer)
    for name in profile(newer).ioctls.keys() - profile(older).ioctls.keys():
        assert name in told
    for name in profile(newer).ioctls.keys() & profile(older).ioctls.keys():
        sizes = [profile(release).ioctls[name].size for release in (older, newer)]
        assert sizes[0] == sizes[1] or f"{name} {sizes[0]} -> {sizes[1]} bytes" in told
    if profile(newer).constants.keys() == profile(older).constants.keys() and not told:
        assert profile(newer).ioctls.keys() == profile(older).ioctls.keys()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_release_that_has_a_row_is_followed_by_ones_that_have_it(row: Behaviour) -> None:
    """Along the mainline a row is there for good; a stable release has it before."""
    assert [row.holds(release) for release in MAINLINE] == [includes(release, row.since) for release in MAINLINE]
