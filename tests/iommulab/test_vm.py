"""A guest that panics or hangs, for real. Needs QEMU, virtme-ng and a kernel image, and minutes: `make soak`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from iommulab.errors import UserError
from iommulab.follow import Follower, Limits
from iommulab.guest import Guest, make_guest
from iommulab.kernel_images import find_image
from iommulab.progress import SuiteProgress
from iommulab.results import Results
from iommulab.vm import VmLaunch

pytestmark = pytest.mark.soak

#: A stand-in for pytest in the guest.
PROGRAM = """
import json, os, sys, time
events, only, *ids = sys.argv[1:]
left = open(only).read().split() if only != "-" else ids
out = os.open(events, os.O_WRONLY)
def put(**event): os.write(out, (json.dumps(event) + chr(10)).encode())
put(event="begin", backend="linux", release=os.uname().release, python="3", ids=left)
for test in left:
    put(event="start", id=test)
    if test == "panic":
        open("/proc/sys/kernel/sysrq", "w").write("1")
        open("/proc/sysrq-trigger", "w").write("c")
    if test == "hang": time.sleep(600)
    if test == "exit": os._exit(3)
    put(event="result", id=test, verdict="passed", duration=0.1)
put(event="end", status=0)
"""


class Stand(VmLaunch):
    """`VmLaunch` with the stand-in for pytest."""

    def __init__(self, guest: Guest, program: Path, ids: list[str], directory: Path) -> None:
        self._guest, self._program, self._ids, self._directory = guest, program, ids, directory

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        words = [str(only) if only is not None else "-", *self._ids]
        command = f'{sys.executable} {self._program} "$events" {shlex.join(words)}'
        return self._guest.start(command, events, self._log(attempt), self._console(attempt))


def test_a_panic_a_hang_and_an_exit_cost_one_test_each(tmp_path: Path) -> None:
    image = os.environ.get("IOMMULAB_KERNEL_IMAGE")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    try:
        guest = make_guest(find_image(Path(image) if image else None, None), "q35-vtd-legacy", tmp_path)
    except UserError as error:
        pytest.skip(f"{error} (IOMMULAB_KERNEL_IMAGE may name an image)")
    ids = ["a", "panic", "b", "hang", "c", "exit", "d"]
    with SuiteProgress(Console(quiet=True), "vm") as progress:
        limits = Limits(test=20, boot=300, total=1200)
        results = Follower(Stand(guest, program, ids, tmp_path), Results("vm"), limits, progress, tmp_path).run()
    assert {test.id: test.reason or test.verdict for test in results.tests} == {
        "a": "passed",
        "panic": "the guest's kernel panicked: sysrq triggered crash",
        "b": "passed",
        "hang": "no end after 20 s; the guest was stopped",
        "c": "passed",
        "exit": "the guest ended with the test (status 3)",
        "d": "passed",
    }
    assert "sysrq triggered crash" in (tmp_path / "console.1.log").read_text(errors="replace")
