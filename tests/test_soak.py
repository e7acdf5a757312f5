"""`make soak` as far as it can be seen without running it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import soak

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_has_the_table_of_parts() -> None:
    assert soak.markdown() in (ROOT / "docs" / "conformance.md").read_text(), "python -m tests.soak --markdown"


def test_make_runs_it() -> None:
    assert "-m tests.soak $(ARGS)" in (ROOT / "Makefile").read_text()


def test_every_long_test_is_in_a_part() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").rglob("*.py") if "pytest.mark.soak" in path.read_text()}
    named = {word for part in soak.PARTS for command in part.commands for word in command if word.startswith("tests")}
    assert "tests" in named  # whatever has no part of its own
    assert {"qemu", "faults"} <= folders


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["nothing"])
    assert "no part 'nothing'; there are tests, qemu" in capsys.readouterr().err


def test_a_part_that_fails_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    def part(name: str, code: int) -> soak.Part:
        command = [sys.executable, "-c", f"print('this is {name}'); raise SystemExit({code})"]
        return soak.Part(name, "a test", "0", [command], [])

    assert not soak.run([part("one", 3), part("two", 0)], quick=False)
    said = capfd.readouterr().out
    assert "== soak 1/2, one: a test" in said
    assert "this is two" in said
    assert "FAILED (1 of 1 commands)" in said
    assert soak.run([part("three", 0)], quick=False)


def test_the_commands_are_ones_that_there_are() -> None:
    for part in soak.PARTS:
        for command in (*part.commands, *part.quick):
            for word in command:
                if word.startswith("tests/"):
                    assert (ROOT / word).exists(), word
    helped = subprocess.run([*soak.SUITE, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(option in helped for option in ("--fail-nth", "--caching", "--machine", "--report", "--total-time"))
