"""Following a test process: what a death or a hang costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from iommulab.errors import UserError
from iommulab.follow import Follower, Limits
from iommulab.progress import SuiteProgress
from iommulab.results import Results

#: A stand-in for pytest: runs the tests it is told to, and misbehaves in those named so.
PROGRAM = """
import json, os, signal, sys, time
events, only, *ids = sys.argv[1:]
left = open(only).read().split() if only != "-" else ids
out = open(events, "a", buffering=1)
def put(**event): out.write(json.dumps(event) + chr(10))
if "dumb" in ids: sys.exit("no luck")
put(event="begin", backend="linux", release="7.3.4", python="3", ids=left)
for test in left:
    put(event="start", id=test)
    if "die" in test: os.kill(os.getpid(), signal.SIGKILL)
    if "torn" in test: out.write('{"event": "res'); out.flush(); os._exit(7)
    if "hang" in test: time.sleep(60)
    put(event="result", id=test, verdict="failed" if "bad" in test else "passed", duration=0.1)
put(event="end", status=0)
"""


class Script:
    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.attempts = 0

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        self.attempts = attempt
        command = [sys.executable, "-c", PROGRAM, str(events), str(only or "-"), *self.ids]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    def obituary(self, status: int | None, attempt: int) -> str:
        return "stopped" if status is None else f"ended with {status}"

    def output(self, attempt: int) -> str:
        return "its last words"


def follow(ids: list[str], tmp_path: Path, *, test: float = 30, total: float = 60) -> tuple[dict[str, str], Script]:
    script = Script(ids)
    with SuiteProgress(Console(quiet=True), "test") as progress:
        limits = Limits(test=test, boot=30, total=total)
        results = Follower(script, Results("vm"), limits, progress, tmp_path).run()
    assert [found.id for found in results.tests] == ids
    return {found.id: found.reason or found.verdict for found in results.tests}, script


def test_every_test_gets_its_verdict(tmp_path: Path) -> None:
    found, script = follow(["a", "bad", "c"], tmp_path)
    assert found == {"a": "passed", "bad": "failed", "c": "passed"}
    assert script.attempts == 1


def test_a_death_costs_one_test(tmp_path: Path) -> None:
    found, script = follow(["a", "die1", "b", "die2", "c"], tmp_path)
    assert found == {"a": "passed", "die1": "ended with -9", "b": "passed", "die2": "ended with -9", "c": "passed"}
    assert script.attempts == 3


def test_a_death_in_the_last_test_ends_the_run(tmp_path: Path) -> None:
    assert follow(["a", "die"], tmp_path)[0] == {"a": "passed", "die": "ended with -9"}


def test_a_line_cut_off_by_death_is_left_out(tmp_path: Path) -> None:
    assert follow(["a", "torn", "b"], tmp_path)[0] == {"a": "passed", "torn": "ended with 7", "b": "passed"}


def test_a_hang_costs_one_test(tmp_path: Path) -> None:
    found, _ = follow(["a", "hang", "b"], tmp_path, test=1)
    assert found == {"a": "passed", "hang": "no end after 1 s; stopped", "b": "passed"}


def test_the_whole_run_has_a_limit(tmp_path: Path) -> None:
    found, script = follow(["a", "hang", "b"], tmp_path, total=1)
    assert found["a"] == "passed"
    assert found["hang"].startswith("the run took longer than 1 s")
    assert found["b"].startswith("not run")
    assert script.attempts == 1


def test_tests_that_cannot_be_started_are_an_error_with_the_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be started: ended with 1\nits last words"):
        follow(["dumb"], tmp_path)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    follow(["a", "die", "b"], tmp_path)
    assert list(tmp_path.iterdir()) == []
