"""The files of fault injection: /proc/PID/task/TID/fail-nth, and the capabilities' directories in debugfs.

Mirrors proc_fail_nth_read() and proc_fail_nth_write() of fs/proc/base.c, fault_create_debugfs_attr() of
lib/fault-inject.c, and how simple attributes are written (fs/libfs.c, fs/debugfs/file.c). Left out: everything else in
/proc, so that these paths can be opened and not listed; stack trace filters.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.fault_injection import EVERYTHING, IOMMUFD, PAGE_ALLOC, SLAB, Attributes, FaultInjection
from kernel_model.file import FileDescription, SystemCall
from kernel_model.process import CAP_DAC_OVERRIDE
from kernel_model.vfs import Directory, Node, Special

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

DEBUGFS = "/sys/kernel/debug"
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_WORDS = {b"y": True, b"t": True, b"1": True, b"on": True, b"n": False, b"f": False, b"0": False, b"of": False}
#: The attributes that every capability has, with the largest value; -1 marks a signed 32-bit one.
_COMMON = {
    "probability": _U64,
    "interval": _U64,
    "times": -1,
    "space": -1,
    "verbose": _U64,
    "verbose_ratelimit_interval_ms": _U32,
    "verbose_ratelimit_burst": _U32,
}
_BOOLS = {SLAB: ("ignore-gfp-wait", "cache-filter"), PAGE_ALLOC: ("ignore-gfp-wait", "ignore-gfp-highmem")}


def parse_integer(data: bytes, largest: int) -> int:
    """kstrtoull() and its kin with base 0. `largest` -1: a signed number of 32 bits. EINVAL, ERANGE."""
    text = data.split(b"\0")[0].decode("latin-1")
    text = text[:-1] if text.endswith("\n") else text
    signed = largest < 0
    negative = signed and text.startswith("-")
    digits = text[1:] if negative or text.startswith("+") else text
    base = 10
    if digits[:2] in ("0x", "0X") and digits[2:3] and digits[2] in "0123456789abcdefABCDEF":
        digits, base = digits[2:], 16
    elif digits.startswith("0"):
        base = 8
    allowed = "0123456789abcdefABCDEF"[: 22 if base == 16 else base]
    if not digits or any(letter not in allowed for letter in digits):
        raise KernelError(errno.EINVAL, f"{text!r} is no number")
    value = -int(digits, base) if negative else int(digits, base)
    low, high = (-(1 << 63), (1 << 63) - 1) if signed else (0, largest)
    if not low <= value <= high:
        raise KernelError(errno.ERANGE, f"{text} is out of range")
    return (value + (1 << 31)) % (1 << 32) - (1 << 31) if signed else value


class FailNth(FileDescription):
    """An open fail-nth of one task."""

    def __init__(self, faults: FaultInjection, path: str, tid: int) -> None:
        self.path = path
        self._faults = faults
        self._tid = tid
        self._position = 0

    def _check_alive(self) -> None:
        """ESRCH: the task has gone."""
        if not os.path.exists(f"/proc/{self._tid}"):
            raise KernelError(errno.ESRCH, f"task {self._tid} has gone")

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        self._check_alive()
        start = self._position if offset is None else offset
        data = f"{self._faults.get_nth(self._tid)}\n".encode()[start : start + count]
        if offset is None:
            self._position += len(data)
        return data

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        """EINVAL: no number. ERANGE: more than 32 bits. ESRCH."""
        nth = parse_integer(bytes(data[:34]), _U32)
        self._check_alive()
        self._faults.set_nth(self._tid, nth)
        return len(data)


class _FailNthNode(Special):
    """The file; it belongs to whom the task belongs to."""

    def __init__(self, kernel: Kernel, pid: int, tid: int | None) -> None:
        self._tid = tid
        self._pid = pid
        self._kernel = kernel
        super().__init__(self._open, 0o644)

    def _open(self, call: SystemCall, flags: int) -> FileDescription:
        # In this process, "thread-self" and "self" are the thread that opens it, respectively the first one.
        tid = threading.get_native_id() if self._tid is None else self._tid
        return FailNth(self._kernel.faults, f"/proc/{self._pid}/task/{tid}/fail-nth", tid)

    def check_open(self, call: SystemCall, flags: int, path: str) -> None:
        """EACCES: to write, for another user than root and the task's own."""
        credentials = call.process.credentials
        own = call.process.pid == self._pid
        if own or credentials.uid() == 0 or credentials.capable(CAP_DAC_OVERRIDE) or not flags & os.O_ACCMODE:
            return
        raise KernelError(errno.EACCES, f"{path} belongs to another user")


class _Numbered(Directory):
    """A directory whose entries are numbers that exist at the moment."""

    def __contains__(self, name: object) -> bool:
        return self._find(str(name)) is not None

    def __getitem__(self, name: str) -> Node:
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        return found

    @abstractmethod
    def _find(self, name: str) -> Node | None:
        """The entry of that number, None if there is none at the moment."""

    def __iter__(self) -> Iterator[str]:
        return iter(())


class _Tasks(_Numbered):
    """/proc/PID/task."""

    def __init__(self, kernel: Kernel, pid: int) -> None:
        super().__init__()
        self._kernel = kernel
        self._pid = pid

    def _find(self, name: str) -> Node | None:
        if not name.isdecimal() or not os.path.exists(f"/proc/{self._pid}/task/{name}"):
            return None
        return Directory({"fail-nth": _FailNthNode(self._kernel, self._pid, int(name))})


class _Processes(_Numbered):
    """/proc: the clients; "self" is this process, a client's supervisor names it by its number."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def _find(self, name: str) -> Node | None:
        kernel = self._kernel
        own = kernel.process.pid
        if name == "thread-self":
            return Directory({"fail-nth": _FailNthNode(kernel, own, None)})
        pid = own if name == "self" else int(name) if name.isdecimal() else 0
        if not kernel.has_process(pid):
            return None
        return Directory({"fail-nth": _FailNthNode(kernel, pid, pid), "task": _Tasks(kernel, pid)})


def register(kernel: Kernel) -> None:
    """Publish the files. The mock driver's own capability came with it, in 6.2; without iommufd there is none."""
    kernel.files.root["proc"] = _Processes(kernel)
    for name in EVERYTHING:
        if name == IOMMUFD and not kernel.files.exists("/dev/iommu"):
            continue
        attributes = kernel.faults.attributes[name]
        for file, largest in _COMMON.items():
            _add_integer(kernel, f"{DEBUGFS}/{name}/{file}", attributes, file.replace("-", "_"), largest)
        for file in ("task-filter", *_BOOLS.get(name, ())):
            _add_bool(kernel, f"{DEBUGFS}/{name}/{file}", attributes, file.replace("-", "_"))
        if name == PAGE_ALLOC:
            _add_integer(kernel, f"{DEBUGFS}/{name}/min-order", attributes, "min_order", _U32)


def _add_integer(kernel: Kernel, path: str, attributes: Attributes, name: str, largest: int) -> None:
    def store(call: SystemCall, data: bytes) -> None:
        """EINVAL: no number. Too many bits are cut off, beyond 64 they are ERANGE."""
        value = parse_integer(data[:23], -1 if largest < 0 else _U64)
        setattr(attributes, name, value if largest < 0 else value & largest)
        kernel.faults.changed()

    kernel.files.add_file(path, lambda: f"{getattr(attributes, name)}\n".encode(), store, mode=0o600)


def _add_bool(kernel: Kernel, path: str, attributes: Attributes, name: str) -> None:
    def store(call: SystemCall, data: bytes) -> None:
        """kstrtobool(); what is no truth value is taken and changes nothing."""
        word = data[:2] if data[:1] in (b"o", b"O") else data[:1]
        if word.lower() in _WORDS:
            setattr(attributes, name, _WORDS[word.lower()])

    kernel.files.add_file(path, lambda: b"Y\n" if getattr(attributes, name) else b"N\n", store, mode=0o600)
