"""Running kbuild's make: progress on the terminal, all of its output in a log, one sentence where it fails."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from iommulab.errors import UserError
from iommulab.session import Session, kill

#: A line of kbuild's own: the step, then the file.
_STEP = re.compile(r"  ([A-Z][A-Z0-9_.-]+) +(\S+)")
PLAIN_EVERY = 30.0


def run_make(command: Sequence[str], log: Path, console: Console, what: str) -> None:
    """Run one make; its steps are counted on the terminal, everything goes to the log. UserError where it fails."""
    steps, said, started = 0, time.monotonic(), time.monotonic()
    # KCONFIG_* and make's own variables of the caller would change the build.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("KCONFIG_", "MAKE"))}
    with (
        log.open("a") as file,
        console.status(what) as status,
        Session(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if found := _STEP.match(line):
                    steps += 1
                    now = time.monotonic()
                    if console.is_terminal:
                        status.update(f"{what}: {steps} steps, {now - started:.0f} s, {found.group(2)}")
                    elif now - said > PLAIN_EVERY:
                        said = now
                        console.print(f"{what}: {steps} steps, {now - started:.0f} s", highlight=False)
            process.wait()
        finally:
            kill(process)
    if process.returncode != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "***" in line] or lines[-1:]
        raise UserError(f"{what} failed: {errors[0] if errors else 'no output'} (the whole of it is in {log})")
