"""Record what a client asked of a kernel and what it got.

`Recorder` wraps a `Backend` (and the files, mappings, buffers and clients it hands out) and is a `Backend` itself. Its
log is what `iommulab compare` sets side by side and what a failing test prints. A call is stored raw; decoding by the
declarations of `uapi`, and replacing what differs from run to run (descriptors, addresses) by tokens, happen when the
log is read. Object ids, IOVAs and errnos stay as they are: the kernel chooses them by rule.

Not recorded: raw stores through a mapping's memoryview, and what a test does beside the backend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from uapi.backend import (
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    Argument,
    Backend,
    Buffer,
    Client,
    Closing,
    File,
    Mapping,
    Readable,
    RemoteFile,
)
from uapi.decode import Call, Event, decode

#: Calls kept for one test; what comes after is only counted.
LIMIT = 4000
#: Bytes of an argument or of data that are kept.
KEEP = 4096

T = TypeVar("T")


class _Log:
    """The raw events of one recorder, in order."""

    __slots__ = ("dropped", "events", "held", "notes", "serial")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.held: list[Any] = []
        self.notes: dict[str, Any] = {}
        self.dropped = 0
        self.serial = 0

    def add(self, event: Event) -> None:
        if len(self.events) < LIMIT:
            self.events.append(event)
        else:
            self.dropped += 1

    def hold(self, thing: T) -> T:
        """Remember what `release_all` must close."""
        self.held.append(thing)
        return thing

    def number(self) -> int:
        self.serial += 1
        return self.serial


def _content(arg: Argument) -> int | bytes:
    if isinstance(arg, int):
        return arg
    if isinstance(arg, bytearray | memoryview):
        return bytes(arg[:KEEP])
    return bytes(arg)[:KEEP]


class RecordedRemoteFile:
    """A `RemoteFile`, or the ioctl half of a `File`, that logs."""

    def __init__(self, log: _Log, inner: File | RemoteFile, path: str, client: int = 0) -> None:
        self._log = log
        self.inner: Any = inner
        self.path = path
        self._client = client
        self._serial = log.number()
        self._open = True
        log.add(("file", client, self._serial, inner.fileno(), path))

    def fileno(self) -> int:
        return int(self.inner.fileno())

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        before = _content(arg)
        try:
            result: int = self.inner.ioctl(request, arg)
        except OSError as error:
            after = _content(arg)
            why = getattr(error, "why", "")
            self._log.add(
                ("ioctl", self._client, self._serial, self.path, request, type(arg), before, after, error.errno, 0, why)
            )
            raise
        after = _content(arg)
        self._log.add(
            ("ioctl", self._client, self._serial, self.path, request, type(arg), before, after, 0, result, "")
        )
        return result

    def close(self) -> None:
        if self._open:
            self._open = False
            self._log.add(("close", self._client, self._serial))
            self.inner.close()

    def __repr__(self) -> str:
        return f"<recorded {self.inner!r}>"


class RecordedFile(RecordedRemoteFile, Closing):
    """A `File` that logs."""

    def _call(self, name: str, inputs: dict[str, Any], call: Callable[..., Any], *args: Any) -> Any:
        try:
            result = call(*args)
        except OSError as error:
            self._log.add(("call", name, self._serial, inputs, error.errno, None, getattr(error, "why", "")))
            raise
        kept = bytes(result[:KEEP]) if isinstance(result, bytes) else result
        self._log.add(("call", name, self._serial, inputs, 0, kept, ""))
        return result

    def read(self, count: int) -> bytes:
        data: bytes = self._call("read", {"count": count}, self.inner.read, count)
        return data

    def write(self, data: Readable) -> int:
        return int(self._call("write", {"data": bytes(data[:KEEP])}, self.inner.write, data))

    def pread(self, count: int, offset: int) -> bytes:
        data: bytes = self._call("pread", {"count": count, "offset": offset}, self.inner.pread, count, offset)
        return data

    def pwrite(self, data: Readable, offset: int) -> int:
        inputs = {"data": bytes(data[:KEEP]), "offset": offset}
        return int(self._call("pwrite", inputs, self.inner.pwrite, data, offset))

    def read_to(self, address: int, count: int) -> int:
        return int(self._call("read_to", {"count": count}, self.inner.read_to, address, count))

    def write_from(self, address: int, count: int) -> int:
        return int(self._call("write_from", {"count": count}, self.inner.write_from, address, count))

    def mmap(
        self, length: int, offset: int = 0, prot: int = PROT_READ | PROT_WRITE, flags: int = MAP_SHARED
    ) -> RecordedMapping:
        inputs = {"length": length, "offset": offset, "prot": prot}
        try:
            inner = self.inner.mmap(length, offset, prot, flags)
        except OSError as error:
            self._log.add(("call", "mmap", self._serial, inputs, error.errno, None, getattr(error, "why", "")))
            raise
        self._log.add(("call", "mmap", self._serial, inputs, 0, 0, ""))
        return self._log.hold(RecordedMapping(self._log, inner, self._serial))

    def poll(self, events: int, timeout: float = 0) -> int:
        return int(self._call("poll", {"events": events}, self.inner.poll, events, timeout))


class RecordedMapping(Closing):
    """A `Mapping` that logs its sized accesses. How often a client polls a register is not compared."""

    def __init__(self, log: _Log, inner: Mapping, owner: int) -> None:
        self._log = log
        self.inner = inner
        self._serial = log.number()
        self._owner = owner
        self._open = True
        log.add(("memory", 0, self._serial, "map", inner.address, inner.length))

    @property
    def address(self) -> int:
        return self.inner.address

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def view(self) -> memoryview:
        return self.inner.view

    def read(self, offset: int, width: int) -> int:
        value = self.inner.read(offset, width)
        self._log.add(("mmio", "load", self._owner, offset, width, value))
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        self._log.add(("mmio", "store", self._owner, offset, width, value))
        self.inner.write(offset, width, value)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._log.add(("forget", 0, self._serial))
            self.inner.close()


class RecordedBuffer(Closing):
    """A `Buffer` whose address range the log knows."""

    def __init__(self, log: _Log, inner: Buffer) -> None:
        self._log = log
        self.inner = inner
        self._serial = log.number()
        self._open = True
        self.address = inner.address
        self.length = inner.length
        log.add(("memory", 0, self._serial, "buf", inner.address, inner.length))

    @property
    def view(self) -> memoryview:
        return self.inner.view

    def close(self) -> None:
        if self._open:
            self.inner.close()
            self._open = False
            self._log.add(("forget", 0, self._serial))


class RecordedClient:
    """A `Client` that logs."""

    def __init__(self, log: _Log, inner: Client) -> None:
        self._log = log
        self.inner = inner
        self.pid = inner.pid
        self._serial = log.number()
        self._areas: dict[int, int] = {}

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> RecordedRemoteFile:
        try:
            inner = self.inner.open(path, flags)
        except OSError as error:
            self._log.add(("open", self._serial, path, error.errno, getattr(error, "why", "")))
            raise
        self._log.add(("open", self._serial, path, 0, ""))
        return RecordedRemoteFile(self._log, inner, path, self._serial)

    def receive(self, file: File) -> RecordedRemoteFile:
        inner = self.inner.receive(getattr(file, "inner", file))
        return RecordedRemoteFile(self._log, inner, file.path, self._serial)

    def allocate(self, length: int) -> int:
        address = self.inner.allocate(length)
        self._areas[address] = self._log.number()
        self._log.add(("memory", self._serial, self._areas[address], "mem", address, length))
        return address

    def free(self, address: int, length: int) -> None:
        self.inner.free(address, length)
        if address in self._areas:
            self._log.add(("forget", self._serial, self._areas.pop(address)))

    def peek(self, address: int, length: int) -> bytes:
        return self.inner.peek(address, length)

    def poke(self, address: int, data: bytes) -> None:
        self.inner.poke(address, data)

    def setrlimit(self, resource: int, soft: int, hard: int) -> None:
        self.inner.setrlimit(resource, soft, hard)

    def drop_capabilities(self, *numbers: int) -> None:
        self.inner.drop_capabilities(*numbers)

    def setuid(self, uid: int) -> None:
        self.inner.setuid(uid)

    def status(self, field: str) -> int:
        return self.inner.status(field)

    def exit(self) -> None:
        self.inner.exit()

    def __enter__(self) -> RecordedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exit()


class Recorder:
    """A `Backend` that passes every call on to another one and keeps a log."""

    def __init__(self, backend: Backend) -> None:
        self.inner = backend
        self.name = backend.name
        self.release = backend.release
        self._log = _Log()

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> RecordedFile:
        try:
            inner = self.inner.open(path, flags)
        except OSError as error:
            self._log.add(("open", 0, path, error.errno, getattr(error, "why", "")))
            raise
        self._log.add(("open", 0, path, 0, ""))
        return self._log.hold(RecordedFile(self._log, inner, path))

    def adopt(self, fd: int) -> RecordedFile:
        inner = self.inner.adopt(fd)
        return self._log.hold(RecordedFile(self._log, inner, inner.path))

    def listdir(self, path: str) -> Sequence[str]:
        return self.inner.listdir(path)

    def readlink(self, path: str) -> str:
        return self.inner.readlink(path)

    def buffer(self, length: int, *, huge: bool = False) -> RecordedBuffer:
        return self._log.hold(RecordedBuffer(self._log, self.inner.buffer(length, huge=huge)))

    def spawn(self) -> RecordedClient:
        return self._log.hold(RecordedClient(self._log, self.inner.spawn()))

    def status(self, field: str) -> int:
        return self.inner.status(field)

    def note(self, key: str, value: Any) -> None:
        """Keep an observation of the test's own (a number, string, list or dict) to be compared between kernels."""
        self._log.notes[key] = value

    @property
    def notes(self) -> dict[str, Any]:
        return self._log.notes

    def calls(self) -> list[Call]:
        """The log so far, decoded."""
        return list(decode(self._log.events))

    @property
    def dropped(self) -> int:
        """Calls past the limit that were only counted."""
        return self._log.dropped

    def release_all(self) -> None:
        """Close what the test left open, newest first: clients, files and mappings before the memory they pin."""
        buffers = [thing for thing in self._log.held if isinstance(thing, RecordedBuffer)]
        users = [thing for thing in self._log.held if not isinstance(thing, RecordedBuffer)]
        for thing in [*reversed(users), *reversed(buffers)]:
            # A view that a failed assertion still holds keeps its buffer; a descriptor may have been closed by hand.
            with contextlib.suppress(OSError, BufferError, ValueError):
                if isinstance(thing, RecordedClient):
                    thing.exit()
                else:
                    thing.close()
        self._log.held.clear()

    def close(self) -> None:
        self.release_all()
        self.inner.close()
