"""What a person sees while a long command runs: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iommulab.results import Test, area_of

#: Seconds between two plain lines.
PLAIN_EVERY = 10.0


class Meter:
    """Context manager: how far something is. `total` may be told later."""

    def __init__(self, console: Console, title: str, total: int | None = None) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._started = self._said = time.monotonic()
        self._live = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[what]}"),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        self._task = self._live.add_task(title, total=total, what="") if self._live is not None else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False)

    def status(self, text: str) -> None:
        """What is being waited for."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, what=text)
        else:
            self.say(f"{self._title}: {text}")

    def reached(self, done: int, what: str, details: str) -> None:
        """`done` of the total: `what` beside the bar; `details` with the time where there is no terminal."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=self._total, what=what)
        elif time.monotonic() - self._said >= PLAIN_EVERY and (self._total is None or done < self._total):
            self._said = time.monotonic()
            self.say(f"{self._title}: {done} of {self._total}, {details}, {self._said - self._started:.0f} s")


class SuiteProgress(Meter):
    """How far a run of the suite is; tell it what happens."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title)
        self._done = 0
        self._failed = 0

    def total(self, count: int) -> None:
        self._total = count
        if self._live is None:
            self.say(f"{self._title}: {count} tests")

    def finished(self, test: Test) -> None:
        self._done += 1
        self._failed += test.verdict == "failed"
        if test.verdict == "failed":
            self.say(f"FAILED {test.id}: {test.reason}")
        area = area_of(test.id)
        self.reached(self._done, area, f"{self._failed} failed, at {area}")
