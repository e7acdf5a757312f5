"""Run pytest somewhere and follow its event lines, so that a death or a hang costs one test and not the run.

A `Launch` starts a test process (here, or a guest around it) that writes events to a file. When it ends without having
said so, or a test stays silent past its limit, the tests that were running get the blame and the rest is started again.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from iommulab.errors import UserError
from iommulab.progress import SuiteProgress
from iommulab.results import Results, Test
from iommulab.selection import NOTHING, USAGE, complaint
from iommulab.session import kill

POLL = 0.05
#: A process that dies this often before any test ends is given up.
PATIENCE = 2


class Launch(Protocol):
    """How to start the tests once."""

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        """Start the test process in a session of its own (`iommulab.session`)."""

    def obituary(self, status: int | None, attempt: int) -> str:
        """Why the process of this attempt ended, in one clause. `status` is None where it was killed for a hang."""

    def output(self, attempt: int) -> str:
        """What the process printed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: for one test, until the first event, and for everything."""

    test: float
    boot: float
    total: float


class EventFile:
    """The event lines of one attempt as they arrive."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"")
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # Cut off by the death of its writer.
            if isinstance(event, dict):
                yield event


class Follower:
    """One run of the suite, over as many attempts as it takes."""

    def __init__(
        self, launch: Launch, results: Results, limits: Limits, progress: SuiteProgress, directory: Path
    ) -> None:
        self._launch = launch
        self._results = results
        self._limits = limits
        self._progress = progress
        self._directory = directory
        self._order: list[str] = []
        self._known: set[str] = set()
        self._running: dict[str, float] = {}
        self._ended: int | None = None

    def run(self) -> Results:
        """Follow until every test has a verdict. UserError where the tests cannot be started."""
        started = time.monotonic()
        self._results.started = datetime.now(UTC).isoformat(timespec="seconds")
        attempt = barren = 0
        only: Path | None = None
        while True:
            attempt += 1
            before = len(self._known)
            path = self._directory / f"events.{attempt}.jsonl"
            events = EventFile(path)
            self._forget_attempt()
            process = self._launch.start(path, only, attempt)
            try:
                status, hung = self._watch(process, events, started + self._limits.total)
            finally:
                kill(process)
            for event in events.read():
                self._take(event)
            path.unlink(missing_ok=True)
            if self._ended is not None and not hung:
                self._check_usage(self._ended, attempt)
                self._check_complete(attempt)
                break
            why = self._launch.obituary(None if hung else status, attempt)
            if hung == "total":
                self._blame(f"the run took longer than {self._limits.total:.0f} s; {why}", everything=True)
                break
            if not self._order:
                self._check_usage(status, attempt)
            if hung == "test":
                why = f"no end after {self._limits.test:.0f} s; {why}"
            self._blame(why)
            barren = 0 if len(self._known) > before else barren + 1
            if barren >= PATIENCE:
                raise UserError(f"the tests cannot be started: {why}\n{self._launch.output(attempt)}".rstrip())
            left = [test_id for test_id in self._order if test_id not in self._known]
            if self._order and not left:
                break
            if left:
                only = self._directory / "remaining.txt"
                only.write_text("\n".join(left) + "\n")
                self._progress.say(f"{why}; going on with the remaining {len(left)} tests")
        if only is not None:
            only.unlink(missing_ok=True)
        self._results.duration = time.monotonic() - started
        self._results.sort(self._order)
        return self._results

    def _forget_attempt(self) -> None:
        self._ended = None
        self._running.clear()

    def _watch(self, process: subprocess.Popen[bytes], events: EventFile, deadline: float) -> tuple[int | None, str]:
        """Take events until the process ends or hangs: its status, and "" or which limit it broke."""
        heard = time.monotonic()
        while True:
            status = process.poll()
            for event in events.read():
                heard = time.monotonic()
                self._take(event)
            now = time.monotonic()
            if status is not None:
                return status, ""
            if self._ended is not None and now - heard > 5:
                return 0, ""  # A guest that does not power off.
            if now > deadline:
                return None, "total"
            if self._running:
                if now - min(self._running.values()) > self._limits.test:
                    return None, "test"
            elif now - heard > self._limits.boot:
                return None, "boot"
            time.sleep(POLL)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "begin":
            self._results.backend = event["backend"]
            self._results.release = event["release"]
            self._results.python = event["python"]
            if not self._order:
                self._order = event["ids"]
                self._progress.total(len(self._order))
        elif kind == "start":
            self._running[event["id"]] = time.monotonic()
        elif kind == "result":
            fields = {key: value for key, value in event.items() if key != "event"}
            self._finish(Test(**fields))
        elif kind == "broken":
            self._results.broken.append({"id": event["id"], "text": event["text"]})
        elif kind == "end":
            self._ended = event["status"]

    def _finish(self, test: Test) -> None:
        self._running.pop(test.id, None)
        if test.id not in self._known:
            self._known.add(test.id)
            self._results.tests.append(test)
            self._progress.finished(test)

    def _blame(self, why: str, *, everything: bool = False) -> None:
        now = time.monotonic()
        for test_id, since in list(self._running.items()):
            self._finish(Test(test_id, "failed", why, round(now - since, 3)))
        if everything:
            for test_id in self._order:
                if test_id not in self._known:
                    self._finish(Test(test_id, "failed", f"not run: {why}"))

    def _check_usage(self, status: int | None, attempt: int) -> None:
        """A wrong -k expression, a test that does not exist: pytest says so itself."""
        if status == NOTHING:
            raise UserError("no test matches")
        if status == USAGE:
            raise UserError(complaint(self._launch.output(attempt)) or "pytest refused its arguments")

    def _check_complete(self, attempt: int) -> None:
        """A run that says it ended has a verdict for each of its tests, and has tests."""
        if not self._known and not self._results.broken:
            raise UserError(
                complaint(self._launch.output(attempt)) or f"no test ran\n{self._launch.output(attempt)}".rstrip()
            )
        for test_id in self._order:
            if test_id not in self._known:
                self._finish(Test(test_id, "failed", "not run: the run ended without it"))


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file, "" where there is none."""
    try:
        text = path.read_bytes()[-64 << 10 :].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
