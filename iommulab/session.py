"""What a command starts ends with the command, however that ends.

A guest or a test run leads a session of its own, so that `kill` reaches all of it. On Ctrl-C, SIGTERM and SIGHUP the
`finally` of whoever started it does (`signals_unwind`). For what runs no `finally` (SIGKILL, a crash) a shell waits at
a pipe that only we hold, and kills the session when the pipe closes unsaid. PR_SET_PDEATHSIG would not do: it is the
process's own, and QEMU is a grandchild where virtme-ng starts it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

#: A line says that all is well; the end of the file, that nobody is left to say so. TERM first: it has files to remove.
_GUARD = 'read -r line || { kill -TERM "-$0"; sleep 3; kill -KILL "-$0"; }'
#: Between the end of a session's leader and the last word to the others: they get SIGTERM, too.
GRACE = 0.05
_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_UNWINDING = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. `status` is what a shell calls that: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Session(subprocess.Popen[Any]):
    """A process that leads a session, all of which dies with this process. End it with `kill`."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        super().__init__(command, start_new_session=True, **options)
        self._guard: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, str(self.pid)], stdin=subprocess.PIPE, start_new_session=True, **_QUIET
        )

    def unguard(self) -> None:
        """The session has ended: its number may be another's from now on."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.communicate()


def kill(process: subprocess.Popen[Any]) -> None:
    """End the process and everything it started (it leads its session)."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(GRACE)
    process.wait()
    if isinstance(process, Session):
        process.unguard()


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """Within this the first SIGTERM or SIGHUP raises `Stopped`; more of them are ignored, as the end is under way.

    Signals that the caller ignores (nohup) or handles stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [number for number in _UNWINDING if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, _: object) -> None:
        for one in mine:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
