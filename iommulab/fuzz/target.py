"""The real kernel of a fuzzing run: this one, or one in a guest, behind a stream of frames.

The executor runs as a process of its own (here as root, or in a guest), gets compiled programs and returns answers. Up
to `WINDOW` programs are on their way at a time, so that the kernel works while the next ones are generated. Where it
dies or says nothing for `SILENCE` seconds, the program it was at gets the blame, and what was behind goes to a new
one.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import re
import select
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from iommulab.errors import UserError
from iommulab.follow import tail
from iommulab.fuzz.executor import Step
from iommulab.guest import Guest
from iommulab.results import SUITE
from iommulab.session import Session, kill

WINDOW = 48
#: Seconds for one program, and for a guest to boot.
SILENCE, BOOT = 60.0, 300.0
#: An executor that dies this often before it answers anything is given up.
PATIENCE = 2
PORT = "iommulab.fuzz"
_MODULE = "iommulab.fuzz.executor"
#: What of this package a guest with a root of its own needs.
_FILES = tuple(
    SUITE.parent / "iommulab" / name
    for name in (
        "__init__.py",
        "connect.py",
        *(f"fuzz/{name}.py" for name in ("__init__", "executor", "doors", "edu_steps", "memory")),
    )
)


@dataclass(frozen=True, slots=True)
class Frame:
    """A compiled program on its way; `expected` is the digest of the answer that needs no telling."""

    number: int
    expected: bytes
    image: bytes
    steps: list[Step]
    main_first: bool

    def encode(self) -> bytes:
        body = marshal.dumps((self.number, self.expected, self.image, self.steps, self.main_first))
        return len(body).to_bytes(4, "little") + body


@dataclass(frozen=True, slots=True)
class Died:
    """No answer: why, in one clause."""

    why: str


class Stream(Protocol):
    """A started executor."""

    process: subprocess.Popen[bytes]
    reader: int
    writer: int

    def close(self) -> None: ...

    def obituary(self) -> str:
        """What it said at its end."""


class LinuxStream:
    """The executor on this kernel, as a child process."""

    def __init__(self, directory: Path, command: Sequence[str]) -> None:
        self._log = directory / "executor.log"
        environment = os.environ | {"PYTHONPATH": str(SUITE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        with self._log.open("wb") as log:
            self.process = Session(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.reader = self.process.stdout.fileno()
        self.writer = self.process.stdin.fileno()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        kill(self.process)
        self.process.stdout.close()

    def obituary(self) -> str:
        status = self.process.poll()
        said = tail(self._log, 1)
        return f"the executor ended with status {status}{': ' + said if said else ''}"


class GuestStream:
    """The executor in a guest, over a virtio port with both directions."""

    def __init__(self, guest: Guest, directory: Path, attempt: int) -> None:
        self._console = directory / f"console.{attempt}.log"
        self._output = directory / f"output.{attempt}.log"
        events = directory / "events"
        events.touch()
        path = directory / f"port.{attempt}"
        run = shlex.join([guest.python, "-m", _MODULE])
        command = (
            f'for port in /sys/class/virtio-ports/*; do [ "$(cat "$port/name")" = {PORT} ] && '
            f"exec {run} /dev/${{port##*/}}; done"
        )
        self.process = guest.start(
            f"sh -c {shlex.quote(command)}",
            events,
            self._output,
            self._console,
            f"-chardev socket,id=fuzz,path={path},server=on,wait=off "
            f"-device virtserialport,bus=iommulab.0,chardev=fuzz,name={PORT}",
            _FILES,
        )
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + BOOT
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    why = tail(self._console, 3) or tail(self._output, 3)
                    kill(self.process)
                    raise UserError(f"the guest does not start: {why}") from None
                time.sleep(0.05)
        self.reader = self.writer = self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        kill(self.process)

    def obituary(self) -> str:
        told = tail(self._console, 2000)
        panic = re.search(r"Kernel panic - not syncing: (.*)", told)
        if panic:
            return f"the guest's kernel panicked: {panic.group(1).strip()}"
        oops = re.search(r"(BUG: .*|Oops: .*|general protection fault.*)", told)
        if oops:
            return f"the guest's console says: {oops.group(1).strip()}"
        return f"the guest ended: {tail(self._output, 1) or tail(self._console, 1)}"

    def warnings(self) -> list[str]:
        """Where the guest's kernel warned of itself."""
        return re.findall(r"WARNING: (\S+(?: at \S+)?)", self._console.read_text(errors="replace"))


class Target:
    """A real kernel that answers programs: that of a guest, or without one what `command` reaches (this one).

    Context manager; nothing is started before the first program.
    """

    def __init__(
        self, directory: Path, guest: Guest | None = None, command: Sequence[str] = (sys.executable, "-m", _MODULE)
    ) -> None:
        self._directory = directory
        self._guest = guest
        self._command = command
        self._stream: LinuxStream | GuestStream | None = None
        self._attempt = 0
        self._rest = bytearray()
        #: The kernel's release, once it has answered; warnings of the guest's kernel.
        self.release = ""
        self.warned: list[str] = []

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the executor."""
        if self._stream is not None:
            if isinstance(self._stream, GuestStream):
                self.warned += self._stream.warnings()
            self._stream.close()
            self._stream = None
        self._rest.clear()

    def start(self) -> None:
        """Have an executor that is ready. UserError where none can be had."""
        for _ in range(PATIENCE):
            if self._stream is not None:
                return
            self._attempt += 1
            if self._guest is None:
                self._stream = LinuxStream(self._directory, self._command)
            else:
                self._stream = GuestStream(self._guest, self._directory, self._attempt)
            hello = self._receive(BOOT)
            if isinstance(hello, tuple) and hello[0] == "ready":
                self.release = hello[1]
                os.set_blocking(self._stream.writer, False)
                return
            why = self._stream.obituary()
            self.stop()
        raise UserError(f"the programs cannot be run: {why}")

    def _receive(self, limit: float) -> Any:
        """The next message; None where the stream ends or stays silent."""
        assert self._stream is not None
        deadline = time.monotonic() + limit
        while True:
            if len(self._rest) >= 4:
                length = int.from_bytes(self._rest[:4], "little") + 4
                if len(self._rest) >= length:
                    message = marshal.loads(bytes(self._rest[4:length]))
                    del self._rest[:length]
                    return message
            ready, _, _ = select.select([self._stream.reader], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return None
            try:
                more = os.read(self._stream.reader, 1 << 16)
            except OSError:
                return None
            if not more:
                return None
            self._rest += more

    def _write(self, data: memoryview) -> memoryview:
        """Send what goes without waiting; what is left."""
        assert self._stream is not None
        try:
            return data[os.write(self._stream.writer, data) :]
        except BlockingIOError:
            return data
        except OSError:
            return data[len(data) :]  # the reading end will notice

    def ask(self, frames: Iterator[Frame]) -> Iterator[tuple[Frame, Any]]:
        """Each frame with its answer: the digest, or (results, work, final), or `Died`."""
        pending: deque[Frame] = deque()
        unsent = memoryview(b"")
        more = True
        while True:
            if not unsent and more and len(pending) < WINDOW:
                frame = next(frames, None)
                if frame is None:
                    more = False
                else:
                    pending.append(frame)
                    unsent = memoryview(frame.encode())
            if not pending:
                return
            self.start()
            assert self._stream is not None
            if unsent:
                unsent = self._write(unsent)
            if not self._readable():
                if not unsent and more and len(pending) < WINDOW:
                    continue
                if unsent:  # until there is room, or an answer
                    ready = select.select([self._stream.reader], [self._stream.writer], [], SILENCE)
                    if ready[1]:
                        continue
            message = self._receive(SILENCE)
            if message is None:
                why = self._death()
                self.stop()
                yield pending.popleft(), Died(why)
                unsent = memoryview(b"".join(frame.encode() for frame in pending))
                continue
            frame = pending.popleft()
            assert message[0] == frame.number
            yield frame, message[1] if len(message) == 2 else message[1:]

    def _death(self) -> str:
        """Why no answer came."""
        assert self._stream is not None
        try:
            self._stream.process.wait(3)
        except subprocess.TimeoutExpired:
            said = self._stream.obituary()
            return said if "console says" in said else f"no answer within {SILENCE:.0f} s"
        return self._stream.obituary()

    def _readable(self) -> bool:
        assert self._stream is not None
        return len(self._rest) >= 4 or bool(select.select([self._stream.reader], [], [], 0)[0])
