"""QEMU without a guest: a client of the qtest protocol over QEMU's stdin and stdout.

Mirrors docs/devel/testing/qtest.rst of QEMU. Commands are lines, and each has one reply line; here they are sent many
at a time (`ask`), because a round trip costs thirty times the command. QEMU 11 or newer is needed: older ones have no
`iommu-testdev`. Left out: interrupt interception, big-endian targets.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time

SMALLEST = 11
#: Seconds without a word from QEMU.
_TIMEOUT = 120.0
#: Bytes of stderr that are kept.
_KEPT = 16 << 20


class QtestError(Exception):
    """QEMU went away, refused a command, or said nothing for too long."""


def find_qemu(architecture: str) -> tuple[str, str]:
    """(the program, "") for "x86_64" or "aarch64"; ("", a sentence that says what is missing) otherwise.

    IOMMULAB_QEMU_X86_64 or IOMMULAB_QEMU_AARCH64 names it, else it is looked for in PATH. It is asked for its version.
    """
    variable = f"IOMMULAB_QEMU_{architecture.upper()}"
    name = f"qemu-system-{architecture}"
    program = os.environ.get(variable) or shutil.which(name) or ""
    wanted = f"{name} {SMALLEST} or newer is needed ({variable} may name it)"
    if not program:
        return "", f"{wanted}; there is none in PATH"
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{wanted}; {program} does not run: {error}"
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found is None or int(found[1]) < SMALLEST:
        return "", f"{wanted}; {program} is {found[0] if found else 'of no known version'}"
    return program, ""


class Qtest:
    """One QEMU. A context manager: at its end the process is gone."""

    def __init__(self, program: str, arguments: list[str], timeout: float = _TIMEOUT) -> None:
        self.timeout = timeout
        tail = ["-nodefaults", "-display", "none", "-accel", "qtest", "-qtest", "stdio", "-qtest-log", "none"]
        self.process = subprocess.Popen(
            [program, *arguments, *tail],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in = self.process.stdin.fileno()
        self._out = self.process.stdout.fileno()
        assert self.process.stderr is not None
        self._err = self.process.stderr.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._err, False)
        self._rest = b""
        self._said = b""

    def __enter__(self) -> Qtest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU; what it still had to say is dropped."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def ask(self, commands: list[str]) -> list[int]:
        """The value of each command's reply, 0 for those that have none. QtestError."""
        if not commands:
            return []
        out = memoryview("\n".join([*commands, ""]).encode())
        sent, replies, deadline = 0, 0, time.monotonic() + self.timeout
        chunks = [self._rest]
        while replies < len(commands):
            left = deadline - time.monotonic()
            readable, writable, _ = select.select(
                [self._out, self._err], [self._in] if sent < len(out) else [], [], max(left, 0.0)
            )
            if left <= 0:
                raise QtestError(f"no reply in {self.timeout} s to {commands[min(replies, len(commands) - 1)]!r}")
            if self._err in readable:
                self._listen()
            if self._out in readable:
                chunk = os.read(self._out, 1 << 20)
                if not chunk:
                    raise QtestError(f"QEMU ended: {self._last_words()}")
                chunks.append(chunk)
                replies += chunk.count(b"\n")
                deadline = time.monotonic() + self.timeout
            if writable:
                try:
                    sent += os.write(self._in, out[sent : sent + (1 << 16)])
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    raise QtestError(f"QEMU ended: {self._last_words()}") from None
        lines = b"".join(chunks).split(b"\n")
        self._rest = lines.pop()
        answers = []
        for line in lines:
            if line == b"OK":
                answers.append(0)
            elif line.startswith(b"OK 0x"):
                answers.append(int(line[3:], 16))
            elif line.startswith(b"OK "):
                answers.append(int(line.split()[1], 0))
            else:
                raise QtestError(f"{commands[len(answers)]!r}: {line.decode(errors='replace')}")
        return answers

    def heard(self) -> list[str]:
        """The lines of traces and complaints since the last time. All that the replies so far caused are there."""
        self._listen()
        whole, _, self._said = self._said.rpartition(b"\n")
        return whole.decode(errors="replace").split("\n")

    def _listen(self) -> None:
        """Take what QEMU has to say on stderr, of which the end is kept: a full pipe would stop it."""
        try:
            while chunk := os.read(self._err, 1 << 16):
                self._said = (self._said + chunk)[-_KEPT:]
        except BlockingIOError:
            pass

    def _last_words(self) -> str:
        self.process.wait(10)
        self._listen()
        return self._said.decode(errors="replace").strip() or f"status {self.process.returncode}"
