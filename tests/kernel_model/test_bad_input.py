"""A slice of the bad input (`bad_input.py`) on each run of the tests; `make soak` goes on for longer.

The seeds of the slice are always the same; BAD_INPUT_SECONDS and BAD_INPUT_SEED change how long and from where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.kernel_model.bad_input", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_no_argument_of_any_call_crashes_hangs_or_leaves_something() -> None:
    run("--seed", "1", "--count", "50")


@pytest.mark.soak
def test_no_argument_does_so_in_a_long_run() -> None:
    """From new seeds each time; a failure names its seed."""
    seed = os.environ.get("BAD_INPUT_SEED")
    run("--seconds", os.environ.get("BAD_INPUT_SECONDS", "600"), *(["--seed", seed] if seed else []))


def test_what_is_found_is_told_with_the_calls_that_lead_to_it(tmp_path: Path) -> None:
    """Three calls of which one is needed: a file that reads as something that no kernel raises."""
    program = tmp_path / "program"
    program.write_text('["open", 0, "/dev/iommu", 2]\n["no_such_call", 1]\n["poll", 0, 1]\n')
    command = [sys.executable, "-m", "tests.kernel_model.bad_input", "--child", "--count", "1", "--program"]
    ended = subprocess.run([*command, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "failed " in ended.stdout
    assert "do_no_such_call" in ended.stdout
