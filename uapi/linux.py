"""The real kernel, reached through libc.

`fcntl.ioctl` copies small buffers and refuses large integers, so every call goes to libc's own function by ctypes,
which passes the caller's memory as it is. Nothing is interpreted here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Sequence
from typing import Any

from uapi.backend import MAP_SHARED, PROT_READ, PROT_WRITE, Argument, Client, Closing, Readable
from uapi.buffers import AnonymousBuffer
from uapi.client import LinuxClient

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.restype = ctypes.c_int
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value
_read, _write = _libc.read, _libc.write
for _call in (_read, _write):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_WIDTHS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


def address_of(arg: Argument | None) -> int:
    """The number that libc's ioctl gets for `arg`."""
    if isinstance(arg, int):
        return arg & 0xFFFFFFFFFFFFFFFF
    if arg is None:
        return 0
    try:
        return ctypes.addressof(arg)  # type: ignore[arg-type]  # a buffer raises TypeError
    except TypeError:
        return ctypes.addressof((ctypes.c_char * len(arg)).from_buffer(arg))


def _fail(path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


class LinuxMapping(Closing):
    """A mapping of a real file; loads and stores are single accesses of their width."""

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self._open = True

    @property
    def view(self) -> memoryview:
        return memoryview((ctypes.c_uint8 * self.length).from_address(self.address)).cast("B")

    def _cell(self, offset: int, width: int) -> Any:
        if width not in _WIDTHS or offset % width or not 0 <= offset <= self.length - width:
            raise ValueError(f"no {width}-byte access at {offset:#x} of a mapping of {self.length:#x} bytes")
        return _WIDTHS[width].from_address(self.address + offset)

    def read(self, offset: int, width: int) -> int:
        return int(self._cell(offset, width).value)

    def write(self, offset: int, width: int, value: int) -> None:
        self._cell(offset, width).value = value

    def close(self) -> None:
        if self._open:
            self._open = False
            if _munmap(self.address, self.length) != 0:
                raise _fail("munmap")


class LinuxFile(Closing):
    """An open file of the running kernel."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        result = int(_ioctl(self._fd, request, address_of(arg)))
        if result < 0:
            raise _fail(self.path)
        return result

    def read(self, count: int) -> bytes:
        return os.read(self._fd, count)

    def write(self, data: Readable) -> int:
        return os.write(self._fd, data)

    def pread(self, count: int, offset: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def pwrite(self, data: Readable, offset: int) -> int:
        return os.pwrite(self._fd, data, offset)

    def read_to(self, address: int, count: int) -> int:
        return self._moved(_read(self._fd, address, count))

    def write_from(self, address: int, count: int) -> int:
        return self._moved(_write(self._fd, address, count))

    def _moved(self, count: int) -> int:
        if count < 0:
            raise _fail(self.path)
        return int(count)

    def mmap(
        self, length: int, offset: int = 0, prot: int = PROT_READ | PROT_WRITE, flags: int = MAP_SHARED
    ) -> LinuxMapping:
        address = _mmap(None, length, prot, flags, self._fd, offset)
        if address == _MAP_FAILED or address is None:
            raise _fail(self.path)
        page = os.sysconf("SC_PAGESIZE")
        return LinuxMapping(address, (length + page - 1) // page * page)

    def poll(self, events: int, timeout: float = 0) -> int:
        poller = select.poll()
        poller.register(self._fd, events)
        ready = poller.poll(timeout * 1000)
        return ready[0][1] if ready else 0

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"<LinuxFile {self._fd} {self.path}>"


class LinuxBackend:
    """The kernel that runs this process."""

    name = "linux"

    def __init__(self) -> None:
        self.release = os.uname().release

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> LinuxFile:
        return LinuxFile(os.open(path, flags), path)

    def adopt(self, fd: int) -> LinuxFile:
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        return LinuxFile(fd, path)

    def listdir(self, path: str) -> Sequence[str]:
        return sorted(os.listdir(path))

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def buffer(self, length: int, *, huge: bool = False) -> AnonymousBuffer:
        return AnonymousBuffer(length, huge=huge)

    def spawn(self) -> Client:
        return LinuxClient(read_status)

    def status(self, field: str) -> int:
        return read_status(os.getpid(), field)

    def close(self) -> None:
        """Nothing to do: the kernel stays."""


def read_status(pid: int, field: str) -> int:
    """A kB field of /proc/PID/status, in KiB; 0 where the kernel does not print it."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0
