"""The door: what a client of the kernel may do, whoever the kernel is.

Two things satisfy `Backend`: `uapi.linux.LinuxBackend`, the real kernel through libc, and `kernel_model.Kernel`, the
model in this process. Both fail with `OSError(errno)` and nothing else. `uapi.trace.Recorder` wraps either.
"""

from __future__ import annotations

import ctypes
import mmap as _mmap
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

#: What an ioctl takes: a ctypes object or a writable buffer (passed by address, trusted for its own length), or an int
#: (passed as it is: a value, or a bare address that the kernel checks).
Argument: TypeAlias = "ctypes.Structure | ctypes.Union | ctypes.Array[Any] | bytearray | memoryview | int"
Readable: TypeAlias = "bytes | bytearray | memoryview"

PROT_READ, PROT_WRITE, PROT_EXEC, PROT_NONE = _mmap.PROT_READ, _mmap.PROT_WRITE, _mmap.PROT_EXEC, 0
MAP_SHARED, MAP_PRIVATE = _mmap.MAP_SHARED, _mmap.MAP_PRIVATE

#: The kernel's node for iommufd.
DEV_IOMMU = "/dev/iommu"


class Closing:
    """What leaving its context closes."""

    __slots__ = ()

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mapping(Protocol):
    """A region that `File.mmap` returned. Leaving the context, or `close()`, unmaps it."""

    @property
    def address(self) -> int:
        """Where the mapping starts in this process."""

    @property
    def length(self) -> int:
        """Bytes mapped, a multiple of the page size."""

    @property
    def view(self) -> memoryview:
        """The mapping's bytes. On the model a raw store through it reaches the device at the next call."""

    def read(self, offset: int, width: int) -> int:
        """One little-endian load of 1, 2, 4 or 8 bytes; ValueError outside the mapping or off natural alignment."""

    def write(self, offset: int, width: int, value: int) -> None:
        """One little-endian store of 1, 2, 4 or 8 bytes; it reaches a device at once."""

    def close(self) -> None: ...

    def __enter__(self) -> Mapping: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class File(Protocol):
    """An open file. `fileno()` is a real descriptor of this process, good for select, dup, fork and passing on."""

    path: str

    def fileno(self) -> int: ...

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        """ioctl(2): the kernel's return value, 0 or positive."""

    def read(self, count: int) -> bytes: ...

    def write(self, data: Readable) -> int: ...

    def pread(self, count: int, offset: int) -> bytes: ...

    def pwrite(self, data: Readable, offset: int) -> int: ...

    def read_to(self, address: int, count: int) -> int:
        """read(2) into the caller's memory at an address, which may be a bad one; the bytes read."""

    def write_from(self, address: int, count: int) -> int:
        """write(2) from an address, which may be a bad one; the bytes written."""

    def mmap(
        self, length: int, offset: int = 0, prot: int = PROT_READ | PROT_WRITE, flags: int = MAP_SHARED
    ) -> Mapping: ...

    def poll(self, events: int, timeout: float = 0) -> int:
        """The poll(2) events that are ready within `timeout` seconds, 0 if none."""

    def close(self) -> None: ...

    def __enter__(self) -> File: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Buffer(Protocol):
    """Client memory that lives until `close()`: page-aligned and zeroed.

    The model keeps such memory alive while it is pinned, so DMA to it takes the direct way.
    """

    @property
    def address(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def view(self) -> memoryview: ...

    def close(self) -> None: ...


class Client(Protocol):
    """A second client process of the same kernel (`Backend.spawn`). Addresses are of its own memory."""

    pid: int

    def open(self, path: str, flags: int = ...) -> RemoteFile: ...

    def receive(self, file: File) -> RemoteFile:
        """Pass an open file to the client, as SCM_RIGHTS does."""

    def allocate(self, length: int) -> int:
        """Map zeroed anonymous memory in the client; its address."""

    def free(self, address: int, length: int) -> None: ...

    def peek(self, address: int, length: int) -> bytes: ...

    def poke(self, address: int, data: bytes) -> None: ...

    def setrlimit(self, resource: int, soft: int, hard: int) -> None: ...

    def drop_capabilities(self, *numbers: int) -> None:
        """Clear these capabilities (CAP_* numbers) from the client's effective and permitted sets."""

    def setuid(self, uid: int) -> None: ...

    def status(self, field: str) -> int:
        """A kB field of /proc/PID/status of the client as this kernel shows it (VmPin, VmLck), in KiB."""

    def exit(self) -> None:
        """End the process and wait for it; its descriptors close. Idempotent."""

    def __enter__(self) -> Client: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RemoteFile(Protocol):
    """A file open in a `Client`."""

    def fileno(self) -> int:
        """The descriptor's number in the client."""

    def ioctl(self, request: int, arg: Argument = 0) -> int: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A kernel."""

    #: "linux" or "model".
    name: str
    #: The kernel's release, as uname says it ("7.3.4-oracle"), or the model's profile ("7.3").
    release: str

    def open(self, path: str, flags: int = ...) -> File: ...

    def adopt(self, fd: int) -> File:
        """A `File` for a descriptor that a call of this kernel returned; the File owns it."""

    def listdir(self, path: str) -> Sequence[str]: ...

    def readlink(self, path: str) -> str: ...

    def buffer(self, length: int, *, huge: bool = False) -> Buffer:
        """Page-aligned zeroed client memory; `huge` asks for 2 MiB pages (OSError ENOMEM where there are none)."""

    def spawn(self) -> Client: ...

    def status(self, field: str) -> int:
        """A kB field of /proc/self/status as this kernel shows it (VmPin, VmLck), in KiB."""

    def close(self) -> None: ...
