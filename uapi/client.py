"""A second client process, driven over a socket.

`ChildProcess` forks a child that executes small commands: system calls on its own descriptors, allocations in its own
memory, changes of its own credentials. `LinuxClient` puts the `Client` protocol on it for the real kernel. The model
uses the same child for memory, credentials and lifetime, and executes the calls itself.

Messages are pickled tuples with a length in front; descriptors travel as SCM_RIGHTS.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any

from uapi.backend import Argument, File

_HEAD = struct.Struct("<Q")


def _send(sock: socket.socket, message: object, fds: list[int] | None = None) -> None:
    body = pickle.dumps(message)
    data = _HEAD.pack(len(body)) + body
    sent = socket.send_fds(sock, [data], fds) if fds else sock.send(data)
    sock.sendall(data[sent:])


def _receive(sock: socket.socket) -> tuple[Any, list[int]]:
    head, fds, _flags, _address = socket.recv_fds(sock, _HEAD.size, 8)
    while len(head) < _HEAD.size:
        more = sock.recv(_HEAD.size - len(head)) if head else b""
        if not more:
            raise EOFError
        head += more
    left = _HEAD.unpack(head)[0]
    parts = []
    while left:
        part = sock.recv(min(left, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return pickle.loads(b"".join(parts)), fds


class _Executor:
    """The child's side: each public method is one command."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._maps: dict[int, mmap.mmap] = {}
        self.received: list[int] = []

    def _check(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def ready(self) -> None:
        """Answers that the child runs, and holds nothing of its parent's."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags)

    def keep(self) -> int:
        return self.received.pop(0)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, arg: int | bytes) -> tuple[int, bytes]:
        call = self._libc.ioctl
        call.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
        if isinstance(arg, int):
            return self._check(call(fd, request, arg)), b""
        block = ctypes.create_string_buffer(arg, len(arg))
        result = call(fd, request, ctypes.addressof(block))
        if result < 0:
            return -ctypes.get_errno(), block.raw
        return result, block.raw

    def allocate(self, length: int) -> int:
        area = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self._maps[address] = area
        return address

    def free(self, address: int, length: int) -> None:
        if self._maps.pop(address, None) is None:
            self._check(self._libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length)))

    def peek(self, address: int, length: int) -> bytes:
        return ctypes.string_at(address, length)

    def poke(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def setrlimit(self, which: int, soft: int, hard: int) -> None:
        resource.setrlimit(which, (soft, hard))

    def setuid(self, uid: int) -> None:
        os.setuid(uid)

    def drop_capabilities(self, numbers: tuple[int, ...]) -> None:
        head = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        self._check(self._libc.capget(head, data))
        for number in numbers:
            word, bit = number // 32 * 3, ~(1 << number % 32) & 0xFFFFFFFF
            data[word] &= bit  # effective
            data[word + 1] &= bit  # permitted
            data[word + 2] &= bit  # inheritable
        self._check(self._libc.capset(head, data))

    def run(self, sock: socket.socket) -> None:
        while True:
            try:
                (command, args), fds = _receive(sock)
            except (EOFError, OSError):
                return
            self.received += fds
            try:
                answer: tuple[str, Any] = ("ok", getattr(self, command)(*args))
            except OSError as error:
                answer = ("errno", error.errno)
            except Exception as error:
                answer = ("bug", repr(error))
            _send(sock, answer)


class ChildProcess:
    """A forked child that executes commands until its socket closes."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                # Descriptors that the parent happens to have open are not the child's: a second holder would keep
                # files of the kernel under test alive.
                for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
                    if fd > 2 and fd != theirs.fileno():
                        with contextlib.suppress(OSError):
                            os.close(fd)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _Executor().run(theirs)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self._sock: socket.socket | None = ours
        # Until it has closed what it inherited, the child is a second holder of every file of this process.
        self.call("ready")

    def call(self, command: str, *args: Any, fds: list[int] | None = None) -> Any:
        """Execute one command in the child. OSError with the child's errno; ESRCH after `exit`."""
        if self._sock is None:
            raise ProcessLookupError(3, "the client has exited")
        _send(self._sock, (command, args), fds)
        (kind, value), _ = _receive(self._sock)
        if kind == "errno":
            raise OSError(value, os.strerror(value))
        if kind == "bug":
            raise RuntimeError(f"client process: {value}")
        return value

    def pass_fd(self, fd: int) -> int:
        """Send a descriptor; its number in the child."""
        return int(self.call("keep", fds=[fd]))

    def exit(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            os.waitpid(self.pid, 0)


class ClientBase:
    """The part of `Client` that is the same for both kernels."""

    def __init__(self) -> None:
        self._child = ChildProcess()
        self.pid = self._child.pid

    def allocate(self, length: int) -> int:
        return int(self._child.call("allocate", length))

    def free(self, address: int, length: int) -> None:
        self._child.call("free", address, length)

    def peek(self, address: int, length: int) -> bytes:
        data: bytes = self._child.call("peek", address, length)
        return data

    def poke(self, address: int, data: bytes) -> None:
        self._child.call("poke", address, data)

    def setrlimit(self, resource: int, soft: int, hard: int) -> None:
        self._child.call("setrlimit", resource, soft, hard)

    def drop_capabilities(self, *numbers: int) -> None:
        self._child.call("drop_capabilities", numbers)

    def setuid(self, uid: int) -> None:
        self._child.call("setuid", uid)

    def exit(self) -> None:
        self._child.exit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exit()


class LinuxRemoteFile:
    """A file open in a `LinuxClient`."""

    def __init__(self, child: ChildProcess, fd: int, path: str) -> None:
        self._child = child
        self._fd = fd
        self.path = path

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        if isinstance(arg, int):
            result, _ = self._child.call("ioctl", self._fd, request, arg)
            return int(result)
        result, after = self._child.call("ioctl", self._fd, request, bytes(arg))
        memoryview(arg).cast("B")[:] = after
        if result < 0:
            raise OSError(-result, os.strerror(-result), self.path)
        return int(result)

    def close(self) -> None:
        self._child.call("close", self._fd)


class LinuxClient(ClientBase):
    """A second process on the real kernel."""

    def __init__(self, read_status: Callable[[int, str], int]) -> None:
        super().__init__()
        self._read_status = read_status

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> LinuxRemoteFile:
        return LinuxRemoteFile(self._child, self._child.call("open", path, flags), path)

    def receive(self, file: File) -> LinuxRemoteFile:
        return LinuxRemoteFile(self._child, self._child.pass_fd(file.fileno()), file.path)

    def status(self, field: str) -> int:
        return self._read_status(self.pid, field)

    def __enter__(self) -> LinuxClient:
        return self
