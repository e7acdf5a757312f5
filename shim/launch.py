"""Start a program under the filter, serve it, and say how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence

from kernel_model.kernel import Kernel
from shim.seccomp import Installer, Listener
from shim.supervisor import Supervisor

_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)


class CannotRun(Exception):
    """The program could not be started: one sentence."""


def run_program(kernel: Kernel, program: Sequence[str]) -> int:
    """Run a program with its arguments on `kernel`. Its exit status, or minus the number of the signal that killed it.

    Returns when the program and everything that it started have ended. CannotRun: there is no such program, or the
    host's kernel lacks what this needs.
    """
    path = shutil.which(program[0])
    if path is None:
        raise CannotRun(f"there is no program {program[0]!r}")
    installer = Installer()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _become(path, program, installer, theirs)
    theirs.close()
    with ours:
        listener = _listener(ours, pid)
        supervisor = Supervisor(kernel, listener)
        try:
            with _signals(pid):
                supervisor.serve()
        finally:
            supervisor.close()  # calls that still wait get ENOSYS
        _, status = os.waitpid(pid, 0)
        failed = ours.recv(16)
    if failed:
        raise CannotRun(f"{path} cannot be executed: {os.strerror(int(failed))}")
    return os.waitstatus_to_exitcode(status)


def _become(path: str, program: Sequence[str], installer: Installer, theirs: socket.socket) -> None:
    """In the child: filter, hand the listener over, execute. What fails is told to the parent as an errno."""
    try:
        try:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; its child should not
                signal.signal(number, signal.SIG_DFL)
            listener = installer.install()
        except OSError as error:
            theirs.send(str(error.errno).encode())
            return
        socket.send_fds(theirs, [b"L"], [listener])
        os.close(listener)  # or a supervisor that dies would leave this process waiting for itself
        try:
            os.execv(path, list(program))
        except OSError as error:
            theirs.send(str(error.errno).encode())
    finally:
        os._exit(127)


def _listener(ours: socket.socket, pid: int) -> Listener:
    told, fds, _, _ = socket.recv_fds(ours, 16, 1)
    if fds:
        return Listener(fds[0])
    os.waitpid(pid, 0)
    number = int(told or errno.EIO)
    if number == errno.EBUSY:
        raise CannotRun("this process runs under a seccomp supervisor already, and there can be one only")
    raise CannotRun(
        "this kernel does not offer seccomp user notification (Linux 5.19 or newer is needed): " + os.strerror(number)
    )


@contextlib.contextmanager
def _signals(pid: int) -> Iterator[None]:
    """The terminal's signals are the program's business; what is sent to us alone is passed on to it."""

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGQUIT)}
    before |= {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
