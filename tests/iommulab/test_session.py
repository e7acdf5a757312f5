"""iommulab/session.py: nothing that a command started outlives it, and the command cleans up after itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from iommulab.session import Session, kill

#: A leader that ignores SIGTERM, and a grandchild behind it.
_STUBBORN = "trap '' TERM; sleep 600 & echo $! >$0; wait; sleep 600"


def until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return holds()


def alive(session: int) -> list[str]:
    """What of a session is alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_kill_ends_the_grandchildren_too(tmp_path: Path) -> None:
    process = Session(["/bin/sh", "-c", "sleep 600 & echo $! >$0; wait", str(tmp_path / "pid")])
    assert until(lambda: (tmp_path / "pid").exists())
    kill(process)
    assert until(lambda: not alive(process.pid))
    assert process.returncode == -signal.SIGTERM


def test_what_a_killed_command_started_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from iommulab.session import Session;"
        f"print(Session(['/bin/sh', '-c', {_STUBBORN!r}, sys.argv[1]]).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        session = int(command.stdout.readline())
        assert until(lambda: (tmp_path / "pid").exists())
        command.kill()
    assert until(lambda: not alive(session)), alive(session)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stopped_conformance_run_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "tmp").mkdir()
    report, record = tmp_path / "report", tmp_path / "run.json"
    command = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "iommulab",
            "conformance",
            "-n1",
            f"--report={report}",
            f"--record={record}",
            "vfio_irqs",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    assert until(lambda: any(path.stat().st_size for path in (tmp_path / "tmp").glob("*/events.*")), 60)
    sessions = children(command.pid)
    command.send_signal(number)
    said, _ = command.communicate(timeout=60)
    assert "Traceback" not in said
    assert command.returncode == 128 + number
    assert until(lambda: not any(alive(session) for session in sessions))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list(report.iterdir()) == []
    assert not record.exists()
