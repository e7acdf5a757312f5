"""A slice of the bad input (`bad_input.py`) on each run of the tests; `make soak` goes on for longer.

BAD_INPUT_SECONDS and BAD_INPUT_SEED change how long and from where. The default seeds are always the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_argument_of_any_call_crashes_hangs_or_leaves_something() -> None:
    seconds = os.environ.get("BAD_INPUT_SECONDS")
    length = ["--seconds", seconds] if seconds else ["--count", "50"]
    command = [sys.executable, "-m", "tests.kernel_model.bad_input", "--seed", os.environ.get("BAD_INPUT_SEED", "1")]
    ended = subprocess.run([*command, *length], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_what_is_found_is_told_with_the_calls_that_lead_to_it(tmp_path: Path) -> None:
    """Three calls of which one is needed: a file that reads as something that no kernel raises."""
    program = tmp_path / "program"
    program.write_text('["open", 0, "/dev/iommu", 2]\n["no_such_call", 1]\n["poll", 0, 1]\n')
    command = [sys.executable, "-m", "tests.kernel_model.bad_input", "--child", "--count", "1", "--program"]
    ended = subprocess.run([*command, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "failed " in ended.stdout
    assert "do_no_such_call" in ended.stdout
