"""What a person sees while the suite runs: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iommulab.results import Test, area_of

#: Seconds between two plain lines.
PLAIN_EVERY = 10.0


class SuiteProgress:
    """Context manager; tell it what happens."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._total = 0
        self._done = 0
        self._failed = 0
        self._started = time.monotonic()
        self._said = self._started
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
        self._task = self._live.add_task(title, total=None, what="") if self._live is not None else None

    def __enter__(self) -> SuiteProgress:
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

    def total(self, count: int) -> None:
        self._total = count
        if self._live is not None and self._task is not None:
            self._live.update(self._task, total=count, what="")
        else:
            self.say(f"{self._title}: {count} tests")

    def finished(self, test: Test) -> None:
        self._done += 1
        self._failed += test.verdict == "failed"
        if test.verdict == "failed":
            self.say(f"FAILED {test.id}: {test.reason}")
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, what=area_of(test.id))
        elif time.monotonic() - self._said >= PLAIN_EVERY and self._done < self._total:
            self._said = time.monotonic()
            self.say(
                f"{self._title}: {self._done} of {self._total}, {self._failed} failed, "
                f"{self._said - self._started:.0f} s, at {area_of(test.id)}"
            )
