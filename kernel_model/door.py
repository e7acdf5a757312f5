"""The client's side of the model's files: what `Kernel.open` returns.

Behind every open file of the model stands a real descriptor, one end of a socketpair; the model holds the other. So
select and asyncio can watch it, dup, fork and SCM_RIGHTS copy it, and its last close, wherever that happens, hangs up
the model's end. A call identifies its file by the descriptor's (device, inode), never by the number, so a `File` whose
number was closed behind its back gives EBADF, and one whose number now names another file reaches that one.

`ModelMapping` is what `File.mmap` returns for registers. `read` and `write` are device accesses. Its bytes are ordinary
memory: a raw store through them is noticed at the next call of any kind and delivered then, in address order, as 4-byte
stores.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap as _mmap
import os
import socket
import time
from collections.abc import Iterable
from resource import RLIMIT_MEMLOCK
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.file import MAX_RW_COUNT, FileDescription, MappedMemory, MappedRegion, SystemCall, check_range
from kernel_model.process import PAGE_SIZE, TASK_SIZE, HostCredentials, Process
from uapi.backend import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, Argument, Closing, File, Readable
from uapi.client import ClientBase
from uapi.linux import LinuxFile, LinuxMapping, address_of

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel


class Descriptor:
    """The model's end of an open file: the socket, its identity (inode and device), and the description behind it."""

    __slots__ = ("description", "fd", "key", "readable", "sock")

    def __init__(self, sock: socket.socket, key: tuple[int, ...], description: FileDescription, fd: int) -> None:
        self.sock = sock
        self.key = key
        self.description = description
        #: The client's end as it was made; by now it may be closed, and the number another file's.
        self.fd = fd
        #: A byte lies in the client's end: poll(2) and select(2) of it say that there is something to read.
        self.readable = False

    def set_readable(self, readable: bool, processes: Iterable[Process]) -> None:
        """What poll(2) of the client's own descriptor is to say. Where no client is found to hold one, it stays."""
        if readable and not self.readable:
            self.sock.send(b"\0")
            self.readable = True
        elif self.readable and not readable:
            for process in processes:
                taken = self._take(process)
                if taken is not None:
                    with socket.socket(fileno=taken) as theirs:
                        theirs.recv(1, socket.MSG_DONTWAIT)
                    self.readable = False
                    return

    def _take(self, process: Process) -> int | None:
        """A copy of the client's end, for the moment."""
        with contextlib.suppress(OSError):
            numbers = os.listdir(f"/proc/{process.pid}/fd")
            for fd in [self.fd, *map(int, numbers)]:
                with contextlib.suppress(OSError):
                    if process.stat_fd(fd)[1:3] == self.key:
                        return process.take_fd(fd)
        return None


def fill(theirs: socket.socket) -> None:
    """Take a client's end the room for anything to be sent, so that poll(2) never finds it writable."""
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the host allows
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(1 << 12), socket.MSG_DONTWAIT)


class ModelMapping(Closing):
    """A mapping of a model's file."""

    def __init__(self, kernel: Kernel, region: MappedRegion, length: int, prot: int) -> None:
        self._kernel = kernel
        self._region = region
        self.length = (length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        self._prot = prot
        self._map = _mmap.mmap(-1, self.length)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._seen: bytes | None = None
        self._open = True
        kernel.mappings.append(self)

    def overlaps(self, start: int, length: int) -> bool:
        return start < self._address + self.length and start + length > self._address

    @property
    def address(self) -> int:
        self._watch()
        return self._address

    @property
    def view(self) -> memoryview:
        self._watch()
        return self._view

    def _watch(self) -> None:
        if self._seen is None:
            self._seen = bytes(self._view)
            self._kernel.watched_mappings.append(self)

    def deliver_raw_stores(self) -> None:
        """Hand every 4-byte word that changed since the last call to the device."""
        if self._seen is None or self._view == self._seen:
            return
        before, after = memoryview(self._seen).cast("I"), self._view.cast("I")
        changed = [(index, after[index]) for index in range(len(after)) if after[index] != before[index]]
        self._seen = bytes(self._view)
        for index, value in changed:
            self._region.write(index * 4, 4, value)

    def _check(self, offset: int, width: int) -> None:
        if not self._open:
            raise ValueError("the mapping is closed")
        if width not in (1, 2, 4, 8) or offset % width or not 0 <= offset <= self.length - width:
            raise ValueError(f"no {width}-byte access at {offset:#x} of a mapping of {self.length:#x} bytes")

    def _remember(self, offset: int, width: int, value: int) -> None:
        data = value.to_bytes(width, "little")
        self._view[offset : offset + width] = data
        if self._seen is not None:
            self._seen = self._seen[:offset] + data + self._seen[offset + width :]

    def read(self, offset: int, width: int) -> int:
        """A load of `width` bytes, served by the device."""
        self._check(offset, width)
        with self._kernel.entered():
            value = self._region.read(offset, width)
        self._remember(offset, width, value)
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """A store of `width` bytes, at the device when this returns."""
        self._check(offset, width)
        value &= (1 << width * 8) - 1
        with self._kernel.entered():
            self._region.write(offset, width, value)
        self._remember(offset, width, value)

    def close(self) -> None:
        """munmap(2). Views taken from the mapping keep their memory, but reach no device any more."""
        if self._open:
            with self._kernel.entered():
                self._open = False
                self._kernel.mappings.remove(self)
                if self in self._kernel.watched_mappings:
                    self._kernel.watched_mappings.remove(self)
                self._region.unmapped()


class MemoryMapping(LinuxMapping):
    """A mapping of plain memory of the model: the host's kernel maps it, and nobody looks at the accesses.

    As after a real munmap(2), views taken from it are of no use once it is closed.
    """

    def __init__(self, kernel: Kernel, memory: MappedMemory, length: int, prot: int) -> None:
        mapped = LinuxFile(memory.fd, "").mmap(length, memory.offset, prot)
        super().__init__(mapped.address, mapped.length)
        self._kernel = kernel
        self._memory = memory
        kernel.mappings.append(self)

    def overlaps(self, start: int, length: int) -> bool:
        return start < self.address + self.length and start + length > self.address

    def close(self) -> None:
        """munmap(2)."""
        if self._open:
            super().close()
            if self._kernel.alive:
                with self._kernel.entered():
                    self._kernel.mappings.remove(self)
                    self._memory.unmapped()


class ModelFile(Closing):
    """An open file of the model, used by the model's own process."""

    def __init__(self, kernel: Kernel, fd: int, path: str) -> None:
        self._kernel = kernel
        self._fd = fd
        self.path = path

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        kernel = self._kernel
        description = kernel.enter_by(self._fd)
        try:
            call = kernel.own_call
            base = address_of(arg)
            if isinstance(arg, int):
                call.trust_nothing()
            else:
                call.trust(base, memoryview(arg).cast("B"))
            return description.ioctl(call, request & 0xFFFFFFFF, base)
        finally:
            kernel.leave()

    def read(self, count: int) -> bytes:
        return self._read(count, None)

    def pread(self, count: int, offset: int) -> bytes:
        return self._read(count, _file_offset(offset))

    def _read(self, count: int, offset: int | None) -> bytes:
        kernel = self._kernel
        with kernel.entered():
            if count < 0:
                raise KernelError(errno.EINVAL, f"a count of {count}")
            description = kernel.description(self._fd)
            if description.access == os.O_WRONLY:
                raise KernelError(errno.EBADF, "the file is not open for reading")
            return description.read(SystemCall(kernel, kernel.process), count, offset)

    def write(self, data: Readable) -> int:
        return self._write(data, None)

    def pwrite(self, data: Readable, offset: int) -> int:
        return self._write(data, _file_offset(offset))

    def _write(self, data: Readable, offset: int | None) -> int:
        kernel = self._kernel
        with kernel.entered():
            description = kernel.description(self._fd)
            if description.access == os.O_RDONLY:
                raise KernelError(errno.EBADF, "the file is not open for writing")
            return description.write(SystemCall(kernel, kernel.process), data, offset)

    def read_to(self, address: int, count: int) -> int:
        kernel = self._kernel
        with kernel.entered():
            description = kernel.description(self._fd)
            if description.access == os.O_WRONLY:
                raise KernelError(errno.EBADF, "the file is not open for reading")
            check_range(address, count)
            return description.read_to(SystemCall(kernel, kernel.process), address, min(count, MAX_RW_COUNT), None)

    def write_from(self, address: int, count: int) -> int:
        kernel = self._kernel
        with kernel.entered():
            description = kernel.description(self._fd)
            if description.access == os.O_RDONLY:
                raise KernelError(errno.EBADF, "the file is not open for writing")
            check_range(address, count)
            return description.write_from(SystemCall(kernel, kernel.process), address, min(count, MAX_RW_COUNT), None)

    def mmap(
        self, length: int, offset: int = 0, prot: int = PROT_READ | PROT_WRITE, flags: int = MAP_SHARED
    ) -> ModelMapping | MemoryMapping:
        """mmap(2) at an address of the kernel's choice, after do_mmap() of mm/mmap.c.

        In order: EINVAL misaligned offset; EBADF; EINVAL length 0; ENOMEM longer than the address space; EOVERFLOW the
        offset wraps; EINVAL neither shared nor private; EACCES access that the file was not opened for; then the
        file's own errnos.
        """
        kernel = self._kernel
        with kernel.entered():
            if offset % PAGE_SIZE:
                raise KernelError(errno.EINVAL, f"mmap at offset {offset:#x}")
            description = kernel.description(self._fd)
            pages = (length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
            if not length:
                raise KernelError(errno.EINVAL, "mmap of no bytes")
            if not 0 < pages <= TASK_SIZE:
                raise KernelError(errno.ENOMEM, f"mmap of {length:#x} bytes")
            offset &= 0xFFFFFFFFFFFFFFFF
            if offset + pages >= 1 << 64:
                raise KernelError(errno.EOVERFLOW, f"mmap of {length:#x} bytes at offset {offset:#x}")
            kind = flags & 0xF
            if kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED | MAP_PRIVATE):
                raise KernelError(errno.EINVAL, f"mmap flags {flags:#x}")
            shared_write = kind != MAP_PRIVATE and prot & PROT_WRITE
            if description.access == os.O_WRONLY or (shared_write and description.access == os.O_RDONLY):
                raise KernelError(errno.EACCES, "the file is not open for that access")
            region = description.mmap(SystemCall(kernel, kernel.process), pages, offset, prot, flags)
            try:
                if isinstance(region, MappedMemory):
                    return MemoryMapping(kernel, region, pages, prot)
                return ModelMapping(kernel, region, pages, prot)
            except OSError as error:
                region.unmapped()
                raise KernelError(errno.ENOMEM, "no room for the mapping") from error

    def poll(self, events: int, timeout: float = 0) -> int:
        """The ready events. Nothing happens in the model between calls, so an unready file stays so for `timeout`."""
        kernel = self._kernel
        with kernel.entered():
            ready = kernel.description(self._fd).poll() & (events | 0x18)
        if not ready and timeout > 0:
            time.sleep(timeout)
        return ready

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._kernel.alive:  # a forked child may close its copy
                with self._kernel.entered():
                    pass  # the last close takes effect now, as close(2) returns

    def __repr__(self) -> str:
        return f"<ModelFile {self._fd} {self.path}>"


def _file_offset(offset: int) -> int:
    if offset < 0:
        raise KernelError(errno.EINVAL, "a negative file offset")
    return offset


class ModelRemoteFile:
    """A file of the model that a second client has open; the model executes its calls."""

    def __init__(self, kernel: Kernel, process: Process, fd: int, path: str, close: object) -> None:
        self._kernel = kernel
        self._process = process
        self._fd = fd
        self.path = path
        self._close = close

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Argument = 0) -> int:
        kernel = self._kernel
        with kernel.entered():
            description = kernel.description(self._fd, self._process)
            if kernel.failing is not None:
                kernel.failing.begin(self._process.pid)
            call = SystemCall(kernel, self._process)
            base = address_of(arg)
            if not isinstance(arg, int):
                call.trust(base, memoryview(arg).cast("B"))
            return description.ioctl(call, request & 0xFFFFFFFF, base)

    def close(self) -> None:
        assert callable(self._close)
        self._close(self._fd)
        with self._kernel.entered():
            pass


class ModelClient(ClientBase):
    """A second client process of the model."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel
        parent = kernel.process.credentials
        host = isinstance(parent, HostCredentials)
        try:
            self._process = kernel.add_process(self.pid, HostCredentials(self.pid) if host else parent.copy())
        except OSError:
            super().exit()
            raise
        self._process.give_fd = self._give
        self._process.close_fd = lambda number: self._child.call("close", number)

    def _give(self, fd: int) -> int:
        """Move a descriptor of ours into the client; its number there."""
        try:
            return self._child.pass_fd(fd)
        finally:
            os.close(fd)

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> ModelRemoteFile:
        kernel = self._kernel
        with kernel.entered():
            if kernel.failing is not None:
                kernel.failing.begin(self._process.pid)
            call = SystemCall(kernel, self._process)
            fd = kernel.install(kernel.files.open(call, path, flags), path)
        return self._file(self._give(fd), path)

    def receive(self, file: File) -> ModelRemoteFile:
        return self._file(self._child.pass_fd(file.fileno()), file.path)

    def _file(self, remote: int, path: str) -> ModelRemoteFile:
        return ModelRemoteFile(self._kernel, self._process, remote, path, self._process.close_fd)

    def setrlimit(self, resource: int, soft: int, hard: int) -> None:
        if isinstance(self._process.credentials, HostCredentials):
            super().setrlimit(resource, soft, hard)
        elif resource == RLIMIT_MEMLOCK:
            self._process.credentials.setrlimit(soft)

    def drop_capabilities(self, *numbers: int) -> None:
        if isinstance(self._process.credentials, HostCredentials):
            super().drop_capabilities(*numbers)
        else:
            self._process.credentials.drop(numbers)

    def setuid(self, uid: int) -> None:
        if isinstance(self._process.credentials, HostCredentials):
            super().setuid(uid)
        else:
            self._process.credentials.setuid(uid)

    def status(self, field: str) -> int:
        return self._process.status(field)

    def exit(self) -> None:
        if self._process.mm.alive and self._kernel.alive:
            self._kernel.process_exits(self._process)
        super().exit()
        self._kernel.process_exited(self._process)

    def __enter__(self) -> ModelClient:
        return self
