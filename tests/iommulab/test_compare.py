"""`iommulab compare` and DIFFERENCES.md."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conformance.offers import NOT_COMPARED
from iommulab import differences
from iommulab.cli import main
from iommulab.compare import compare, print_comparison
from iommulab.differences import parse
from iommulab.errors import UserError
from iommulab.results import FORMAT, Results, Test

ID = "test_ioas_map.py::test_x"
ENTRY = """
# Free text

## `test_ioas_map.py::test_x`
- versions: 7.3, 6.12.4
- model: does this
- kernel: does
  that
- why: because
"""


def call(name: str = "IOMMU_IOAS_MAP", **more: Any) -> dict[str, Any]:
    return {"call": name, "file": "fd1", "in": {}, "ret": 0, "out": {}} | more


def pair(left: Test, right: Test, entries: str = "") -> Any:
    ours = Results("model", "model", "7.3", tests=[left])
    theirs = Results("vm", "linux", "7.3.4-test", tests=[right])
    return compare(ours, theirs, parse(entries))


def passed(*calls: dict[str, Any], **more: Any) -> Test:
    return Test(ID, "passed", calls=list(calls), **more)


def test_equal_runs_have_no_difference() -> None:
    found = pair(passed(call()), passed(call()))
    assert (found.same, found.differing) == (1, [])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (passed(call()), passed(call(out={"iova": 4096}))),
        (passed(call()), passed(call(errno="EINVAL"))),
        (passed(call()), passed(call(ret=1))),
        (passed(call()), passed(call(), call())),
        (passed(call()), passed(call(times=2))),
        (passed(call()), passed(call("IOMMU_DESTROY"))),
        (passed(call()), passed(call(file="fd2"))),
        (passed(notes={"seen": 1}), passed(notes={"seen": 2})),
        (passed(), Test(ID, "failed", "no")),
        (passed(), Test(ID, "skipped", "no edu")),
        (Test(ID, "xfailed", "known"), passed()),
        (passed(), Test("test_other.py::test_y", "passed")),
    ],
)
def test_what_differs(left: Test, right: Test) -> None:
    assert pair(left, right).unexplained


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (passed(call(why="no room")), passed(call())),
        (passed(call(**{"in": {"user_va": "ptr+0x0"}})), passed(call())),
        (passed(call("load", volatile=True, times=3)), passed(call("load", volatile=True))),
        (passed(call("pread", times=3)), passed(call("pread"))),
        (passed(call("pread", **{"in": {"offset": 1}}), call("pread")), passed(call("pread"))),
        (Test(ID, "skipped", "one"), Test(ID, "skipped", "other")),
        (passed(markers={"model_only": ["x"]}), Test(ID, "skipped", "model only: x")),
        (Test(ID, "skipped", "linux only: x", markers={"linux_only": ["x"]}), passed()),
        (Test(ID, "skipped", "needs Linux 7.4", markers={"since": ["7.4"]}), passed()),
        (Test(ID, "skipped", NOT_COMPARED["dmabuf_fd"], markers={"needs": ["mock", "dmabuf_fd"]}), passed()),
    ],
)
def test_what_does_not(left: Test, right: Test) -> None:
    assert pair(left, right).differing == []


def test_an_entry_explains() -> None:
    found = pair(passed(call()), passed(call(ret=1)), ENTRY)
    assert found.unexplained == []
    assert found.differing[0].entry.values["kernel"] == "does that"


def test_an_entry_without_parameters_stands_for_all_of_them() -> None:
    left, right = passed(call()), passed(call(ret=1))
    left.id = right.id = f"{ID}[a-b]"
    assert pair(left, right, ENTRY).unexplained == []


def test_an_entry_for_another_release_does_not_explain() -> None:
    other = ENTRY.replace("7.3, 6.12.4", "7.30, 6.12")
    assert pair(passed(call()), passed(call(ret=1)), other).unexplained


def test_an_entry_that_no_longer_differs_is_told() -> None:
    found = pair(passed(), passed(), ENTRY)
    assert [entry.test for entry in found.stale] == [ID]
    out = io.StringIO()
    print_comparison(Console(file=out, width=100), found)
    assert "STALE DIFFERENCES.md, line 4: test_ioas_map.py::test_x does not differ any more" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("## nonsense", "line 1: 'nonsense' is not a test id"),
        (ENTRY.replace("- why: because\n", ""), "no 'why'"),
        (ENTRY.replace("because", ""), "no 'why'"),
        (ENTRY.replace("7.3,", "seven,"), "'seven' is not a release"),
        (ENTRY.replace("- model:", "- modle:"), "line 6: unknown key 'modle'"),
        (ENTRY.replace("- model:", "model:"), "line 6: expected '- key: value'"),
        (ENTRY + "- why: again\n", "'why' is said twice"),
        (ENTRY + ENTRY, "has an entry already"),
    ],
)
def test_malformed_entries_are_errors(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_the_shipped_file_is_well_formed() -> None:
    differences.load()


def test_exit_status_says_whether_runs_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, result in (("a", 0), ("b", 0), ("c.json.gz", 1)):
        Results("model", "model", "7.3", tests=[passed(call(ret=result))]).save(tmp_path / name)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "1 tests are the same" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c.json.gz")]) == 1
    assert "call 1: IOMMU_IOAS_MAP(fd1) = 1" in capsys.readouterr().out


def test_runs_that_ship_can_be_compared_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "recorded:7.3.4", "recorded:7.3.4"]) == 0
    assert "0 differ without an entry" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"format": "iommulab-run/1"}', "\x1f\x8bnot gzip", "\0" * 9, "[" * 99999]
)
def test_what_is_no_run_is_one_sentence(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "is not a run of the conformance suite" in told


@pytest.mark.parametrize(
    "broken",
    [
        {"tests": "none"},
        {"tests": [1]},
        {"tests": [{"verdict": "passed"}]},
        {"tests": [{"id": 7, "verdict": "passed"}]},
        {"tests": [{"id": ID, "verdict": "well"}]},
        {"tests": [{"id": ID, "verdict": "passed", "calls": 5}]},
        {"tests": [{"id": ID, "verdict": "passed", "calls": ["open"]}]},
        {"tests": [{"id": ID, "verdict": "passed", "calls": [{"call": "open", "out": 3}]}]},
        {"tests": [{"id": ID, "verdict": "passed", "markers": 3}]},
        {"tests": [], "release": 7.3},
        {"tests": [], "environment": "vm"},
    ],
)
def test_a_run_with_a_wrong_type_in_it_is_one_sentence(
    tmp_path: Path, broken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"format": FORMAT, "on": "model"} | broken))
    assert main(["compare", str(tmp_path / "a.json"), "recorded:7.3.4"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "is not a run of the conformance suite" in told


def test_tests_that_only_one_side_ran_are_told_apart_from_those_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(Results("model", "model", "7.3"), Results("vm", "linux", "7.3.4", tests=[passed(call())]), [])
    print_comparison(Console(), found)
    assert "0 differ without an entry; 1 ran on one side only" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["/not/there.json", "recorded:0.1", "/"])
def test_a_run_that_cannot_be_read_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", name, name]) == 2
    assert capsys.readouterr().err.count("\n") == 1
