"""Mappings of the model's plain memory in a program: mmap(2) of /dev/iommu, where a driver has published pages.

The supervisor cannot make a mapping in another process; the host's kernel can, of a file of its own. So the program's
descriptor is replaced by one of the file that the pages lie in, at the offset that the program gives, and the call goes
on as it was made. From then on that descriptor is an alias of the model's file: it has the inode of the pages' file,
and calls on it find the same open file of the model.

What a real kernel keeps by the mapping itself is kept here: the owner of the pages, as long as some process of the
program maps them (/proc/PID/maps says so, when it matters), and the open file, until no descriptor and no mapping of
the pages' file is left (inotify tells, and a lease can then be had). Where /dev/shm is missing the pages lie in a
memfd, which inotify does not watch: then the open file stays until the program ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import time
from collections.abc import Iterable

import psutil

from kernel_model.file import FileDescription, MappedMemory
from kernel_model.kernel import Kernel
from kernel_model.process import Process
from shim.seccomp import Listener, Notification

_IN_CLOSE = 0x18
_IN_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_FLAGS = re.compile(r"^flags:\s*([0-7]+)", re.M)
_MAPS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)", re.M)
#: How often, and how long after, the file is looked at again when inotify has told of a close that is not over yet.
_LOOKS, _PAUSE = 20, 0.0005


class _Mapping:
    """A mapping that the program was let go on to make."""

    __slots__ = ("length", "memory", "tid")

    def __init__(self, memory: MappedMemory, length: int, tid: int) -> None:
        self.memory = memory
        self.length = length
        #: The thread that makes it, until it makes another call; 0 afterwards.
        self.tid = tid


class _Alias:
    """An open file of the model that has mappings."""

    __slots__ = ("description", "fd", "held", "key", "mappings", "watch")

    def __init__(self, description: FileDescription, fd: int, held: int, watch: int) -> None:
        self.description = description
        #: The model's own descriptor of the pages' file.
        self.fd = fd
        #: A copy of the descriptor of the model's file, which keeps it open.
        self.held = held
        self.watch = watch
        status = os.fstat(fd)
        self.key = (status.st_ino, status.st_dev)
        self.mappings: list[_Mapping] = []


class Mappings:
    """All of one program."""

    def __init__(self, kernel: Kernel, listener: Listener) -> None:
        self._kernel = kernel
        self._listener = listener
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._checked(self._libc.inotify_init1(_IN_NONBLOCK_CLOEXEC))
        self._aliases: list[_Alias] = []

    def fileno(self) -> int:
        """Readable where `closed` has something to do."""
        return self._inotify

    def __bool__(self) -> bool:
        return bool(self._aliases)

    # -- making one --------------------------------------------------------------------------------------------------

    def map(
        self, call: Notification, process: Process, fd: int, description: FileDescription, memory: MappedMemory
    ) -> None:
        """Prepare the program for going on with mmap(2) of `fd`. On an OSError nothing is kept."""
        length = -(-call.args[1] // 4096) * 4096
        try:
            alias = self._alias(process, fd, description, memory)
            status = process.stat_fd(fd)
            if (status.st_ino, status.st_dev) != alias.key:
                mode = description.access | os.O_CLOEXEC
                pages = os.open(f"/proc/self/fd/{memory.fd}", mode)
                try:
                    self._listener.add_fd(call, pages, fd, _close_on_exec(process.pid, fd))
                finally:
                    os.close(pages)
        except OSError:
            memory.unmapped()
            raise
        alias.mappings.append(_Mapping(memory, length, call.tid))

    def _alias(self, process: Process, fd: int, description: FileDescription, memory: MappedMemory) -> _Alias:
        for alias in self._aliases:
            if alias.description is description:
                return alias
        path = f"/proc/self/fd/{memory.fd}"
        watch = self._checked(self._libc.inotify_add_watch(self._inotify, path.encode(), _IN_CLOSE))
        alias = _Alias(description, memory.fd, process.take_fd(fd), watch)
        self._kernel.add_alias(alias.key, description)
        self._aliases.append(alias)
        return alias

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(result)

    # -- what becomes of it ------------------------------------------------------------------------------------------

    def called(self, tid: int) -> None:
        """A thread makes a call: its mmap(2) is over."""
        for alias in self._aliases:
            for mapping in alias.mappings:
                if mapping.tid == tid:
                    mapping.tid = 0

    def look(self, description: FileDescription, pids: Iterable[int]) -> None:
        """See which mappings of a file are still there, in these processes and those that they have made."""
        for alias in self._aliases:
            if alias.description is description and alias.mappings:
                mapped = _mapped(alias.key, _with_children(pids))
                for mapping in list(alias.mappings):
                    first, end = mapping.memory.offset, mapping.memory.offset + mapping.length
                    if not mapping.tid and not any(start < end and last > first for start, last in mapped):
                        alias.mappings.remove(mapping)
                        mapping.memory.unmapped()

    def closed(self) -> None:
        """Some descriptor or mapping of a pages' file was its last: let go of what nothing leads to any more."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify, 1 << 16)
        for alias in list(self._aliases):
            if _only_ours(alias):
                self._drop(alias)

    def _drop(self, alias: _Alias) -> None:
        self._aliases.remove(alias)
        self._kernel.remove_alias(alias.key)
        self._libc.inotify_rm_watch(self._inotify, alias.watch)
        with self._kernel.entered():
            for mapping in alias.mappings:
                mapping.memory.unmapped()
        os.close(alias.held)
        with self._kernel.entered():
            pass  # where that was the last descriptor, the model's file closes now

    def close(self) -> None:
        """Nobody is served any more."""
        for alias in list(self._aliases):
            self._drop(alias)
        os.close(self._inotify)


def _close_on_exec(pid: int, fd: int) -> int:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
        found = _FLAGS.search(info.read())
    return int(found[1], 8) & os.O_CLOEXEC if found else 0


def _only_ours(alias: _Alias) -> bool:
    """Whether nobody but the model has the pages' file open: a lease for writing is refused while anybody has.

    inotify tells of a close a moment before it is over.
    """
    for _ in range(_LOOKS):
        try:
            fcntl.fcntl(alias.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            time.sleep(_PAUSE)
        else:
            fcntl.fcntl(alias.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return True
    return False


def _with_children(pids: Iterable[int]) -> set[int]:
    found = set(pids)
    for pid in list(found):
        with contextlib.suppress(psutil.Error):
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return found


def _mapped(key: tuple[int, int], pids: Iterable[int]) -> list[tuple[int, int]]:
    """The parts of a file that are mapped in any of the processes, (offset, end)."""
    inode, device = key
    where = (os.major(device), os.minor(device), inode)
    found = []
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for start, end, offset, major, minor, number in _MAPS.findall(maps.read()):
                if (int(major, 16), int(minor, 16), int(number)) == where:
                    found.append((int(offset, 16), int(offset, 16) + int(end, 16) - int(start, 16)))
    return found
