"""A client process as the kernel sees it: its memory, its credentials, its limits.

Mirrors the parts of `struct mm_struct`, `struct cred` and `struct user_struct` that iommufd and VFIO look at. The
memory is the real memory of a real process. Reading and writing it never trusts an address: `process_vm_readv(2)` and
`process_vm_writev(2)` answer EFAULT where the kernel's `copy_from_user()` would.

Its pages have physical addresses as kernel_model/placement.py says (`Mm.physical`, `Mm.runs`). Pages of shared files
live elsewhere (`kernel_model/shared_files.py`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import struct
from bisect import bisect_right
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING

import psutil

from kernel_model.errors import KernelError
from kernel_model.interval import merge
from uapi.linux import read_status

if TYPE_CHECKING:
    from kernel_model.client_memory import ClientMemory

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1
#: Bits of a user address on x86-64 with four-level tables.
TASK_BITS = 47
TASK_SIZE = 1 << TASK_BITS

CAP_DAC_OVERRIDE, CAP_SETUID, CAP_IPC_LOCK, CAP_SYS_RAWIO, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 1, 7, 14, 17, 21, 24
ALL_CAPABILITIES = (1 << 41) - 1
#: Larger than any address space.
RLIM_UNLIMITED = 1 << 64
_KEPT_AT_ONCE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _call in (_readv, _writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
_capget = _libc.capget

_PROCMAP_QUERY = 0xC0686611
_PROCMAP_STRUCT = struct.Struct("<13Q")
_COVERING_OR_NEXT = 0x10


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class Vma:
    """One line of /proc/PID/maps."""

    __slots__ = ("device", "end", "exec", "huge", "inode", "offset", "read", "shared", "start", "write")

    def __init__(self, start: int, end: int, perms: str, offset: int, device: tuple[int, int], inode: int) -> None:
        self.start = start
        self.end = end
        self.read = perms[0] == "r"
        self.write = perms[1] == "w"
        self.exec = perms[2] == "x"
        self.shared = perms[3] == "s"
        self.offset = offset
        self.device = device
        self.inode = inode
        #: Whether its pages are those of hugetlbfs.
        self.huge = False


def _nowhere(_mm: Mm, _number: int) -> int:
    raise KernelError(errno.ENOMEM, "an address space of no machine")


class Mm:
    """An address space: `struct mm_struct`."""

    def __init__(self, pid: int, new_place: Callable[[Mm, int], int] = _nowhere, place_lg2: int = TASK_BITS) -> None:
        self.pid = pid
        self.alive = True
        #: Pieces of the address space, by their number, that have a place in the physical one: where.
        self.places: dict[int, int] = {}
        self.place_lg2 = place_lg2
        self._new_place = new_place
        self._in_place = (1 << place_lg2) - 1
        #: Pages charged to VmPin and VmLck by this kernel.
        self.pinned_vm = 0
        self.locked_vm = 0
        #: Pins that lead into its places, (start, length) each: while there are any, no other gets those.
        self.pins: dict[object, tuple[int, int]] = {}
        #: Of an address space that has gone: what was pinned of it, (address, bytes) ascending.
        self.remains: list[tuple[int, bytearray]] = []
        #: Client buffers whose lifetime the model controls; set for the model's own process only.
        self.buffers: ClientMemory | None = None
        self._local = _IoVec()
        self._remote = _IoVec()
        self._local_address = ctypes.addressof(self._local)
        self._remote_address = ctypes.addressof(self._remote)
        self._maps_fd = -1
        self._query_works = True

    def physical(self, address: int) -> int:
        """The physical address of a user address. ENOMEM: the model has no place left for it."""
        number = address >> self.place_lg2
        place = self.places.get(number)
        if place is None:
            place = self.places[number] = self._new_place(self, number)
        return place | address & self._in_place

    def runs(self, start: int, length: int) -> list[tuple[int, int]]:
        """Whole pages: (physical address, how many) of each contiguous piece. ENOMEM, as above."""
        place = self.places.get(start >> self.place_lg2)
        at = start & self._in_place
        if place is not None and at + length <= self._in_place + 1:
            return [(place | at, length >> PAGE_SHIFT)]
        found = []
        end = start + length
        while start < end:
            stop = min((start | self._in_place) + 1, end)
            found.append((self.physical(start), stop - start >> PAGE_SHIFT))
            start = stop
        return found

    def read(self, address: int, length: int) -> bytes:
        """copy_from_user(): `length` bytes or EFAULT."""
        if length == 0:
            return b""
        data = ctypes.create_string_buffer(length)
        if self._transfer(_readv, address, ctypes.addressof(data), length) != length:
            raise KernelError(errno.EFAULT, f"{length} bytes at {address:#x} cannot be read")
        return data.raw

    def read_some(self, address: int, length: int) -> bytes:
        """As much of the range as can be read from its start, possibly nothing."""
        data = ctypes.create_string_buffer(length)
        done = self._transfer(_readv, address, ctypes.addressof(data), length)
        return data.raw[: max(done, 0)]

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """copy_to_user(): all of `data` or EFAULT (what came before the fault has been written)."""
        length = len(data)
        if length == 0:
            return
        source = (ctypes.c_char * length).from_buffer_copy(data)
        if self._transfer(_writev, address, ctypes.addressof(source), length) != length:
            raise KernelError(errno.EFAULT, f"{length} bytes at {address:#x} cannot be written")

    def _transfer(self, call: ctypes._NamedFuncPointer, address: int, local: int, length: int) -> int:
        if address + length > TASK_SIZE or not self.alive:
            return -1
        self._local.base, self._local.length = local, length
        self._remote.base, self._remote.length = address, length
        return int(call(self.pid, self._local_address, 1, self._remote_address, 1, 0))

    def vmas(self, start: int, end: int) -> list[Vma]:
        """The mappings that intersect [start, end), ascending."""
        if not self.alive:
            return []
        if self._query_works:
            try:
                return self._query(start, end)
            except OSError:
                self._query_works = False  # kernels before 6.11
        found = []
        try:
            maps = open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="replace")  # noqa: SIM115
        except OSError:
            return []  # the process has gone
        with maps:
            for line in maps:
                span, perms, offset, device, inode, *_ = line.split(None, 5)
                low, high = (int(part, 16) for part in span.split("-"))
                if high <= start:
                    continue
                if low >= end:
                    break
                major, minor = (int(part, 16) for part in device.split(":"))
                found.append(Vma(low, high, perms, int(offset, 16), (major, minor), int(inode)))
                found[-1].huge = "/anon_hugepage" in line  # a file of hugetlbfs is not known by its name
        return found

    def _query(self, start: int, end: int) -> list[Vma]:
        if self._maps_fd < 0:
            self._maps_fd = os.open(f"/proc/{self.pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        found = []
        address = start
        while address < end:
            block = bytearray(_PROCMAP_STRUCT.pack(104, _COVERING_OR_NEXT, address, *(0,) * 10))
            try:
                fcntl.ioctl(self._maps_fd, _PROCMAP_QUERY, block)
            except FileNotFoundError:
                break
            _, _, _, low, high, flags, page, offset, inode, device, *_ = _PROCMAP_STRUCT.unpack(block)
            if low >= end:
                break
            perms = "".join(letter if flags & 1 << bit else "-" for bit, letter in enumerate("rwxs"))
            found.append(Vma(low, high, perms, offset, (device & 0xFFFFFFFF, device >> 32), inode))
            found[-1].huge = page > PAGE_SIZE
            address = high
        return found

    def pin(self, start: int, length: int) -> Callable[[], None]:
        """Note pages that are to outlive the process; what is returned takes the note back."""
        key = object()
        self.pins[key] = start, length

        def unpin() -> None:
            del self.pins[key]
            if not self.pins:
                self.remains.clear()

        return unpin

    def keep_pinned(self) -> None:
        """The memory is about to go: keep a copy of what is pinned. Pages that are not there any more are left out."""
        self.remains.clear()
        ranges = ((start, start + length - 1) for start, length in self.pins.values())
        for start, last in merge(ranges, 0, TASK_SIZE):
            position, kept = start, bytearray()
            while position <= last:
                piece = self.read_some(position, min(last + 1 - position, _KEPT_AT_ONCE))
                whole = len(piece) & ~PAGE_MASK
                kept += piece[:whole]
                position += whole
                if not whole:
                    self._keep(position - len(kept), kept)
                    position, kept = position + PAGE_SIZE, bytearray()
            self._keep(position - len(kept), kept)

    def _keep(self, address: int, data: bytearray) -> None:
        if data:
            self.remains.append((address, data))

    def remaining(self, address: int, length: int) -> memoryview | None:
        """What was kept at an address; None unless it is the whole range."""
        index = bisect_right(self.remains, address, key=itemgetter(0)) - 1
        if index < 0:
            return None
        start, data = self.remains[index]
        view = memoryview(data)[address - start : address - start + length]
        return view if len(view) == length else None

    def exited(self) -> None:
        """The process is gone: nothing of its memory answers any more, but for what was kept."""
        self.alive = False
        self.close()

    def close(self) -> None:
        if self._maps_fd >= 0:
            os.close(self._maps_fd)
            self._maps_fd = -1


class User:
    """`struct user_struct`: what all processes of one uid share."""

    __slots__ = ("locked_vm", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        #: Pages charged in accounting mode USER.
        self.locked_vm = 0


class Credentials:
    """What the model believes of a client: `struct cred` and RLIMIT_MEMLOCK.

    A client starts as root with every capability, whoever runs the model, so that results do not depend on the host.
    """

    def __init__(self, uid: int = 0, capabilities: int = ALL_CAPABILITIES, memlock: int = RLIM_UNLIMITED) -> None:
        self._uid = uid
        self._capabilities = capabilities
        self._memlock = memlock

    def capable(self, capability: int) -> bool:
        """capable(): whether the effective set has the capability."""
        return bool(self._capabilities >> capability & 1)

    def uid(self) -> int:
        return self._uid

    def memlock(self) -> int:
        """The soft RLIMIT_MEMLOCK in bytes."""
        return self._memlock

    def drop(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self._capabilities &= ~(1 << number)

    def setuid(self, uid: int) -> None:
        """setuid(2) of a root process: all capabilities go with root. EPERM without CAP_SETUID."""
        if uid != self._uid:
            if not self.capable(CAP_SETUID):
                raise KernelError(errno.EPERM, "setuid without CAP_SETUID")
            self._uid = uid
            if uid:
                self._capabilities = 0

    def setrlimit(self, soft: int) -> None:
        self._memlock = RLIM_UNLIMITED if soft == resource.RLIM_INFINITY else soft

    def copy(self) -> Credentials:
        """fork(): a child has what its parent had."""
        return Credentials(self._uid, self._capabilities, self._memlock)


class HostCredentials(Credentials):
    """What the host's kernel says of a process."""

    def __init__(self, pid: int) -> None:
        super().__init__(memlock=0)
        self._pid = pid
        self._head = (ctypes.c_uint32 * 2)(0x20080522, 0 if pid == os.getpid() else pid)
        self._data = (ctypes.c_uint32 * 6)()

    def capable(self, capability: int) -> bool:
        if _capget(self._head, self._data) != 0:
            return False
        return bool(self._data[capability // 32 * 3] >> capability % 32 & 1)

    def uid(self) -> int:
        try:
            return psutil.Process(self._pid).uids().effective
        except psutil.NoSuchProcess:
            return 0

    def memlock(self) -> int:
        try:
            soft, _ = resource.prlimit(self._pid, resource.RLIMIT_MEMLOCK)
        except ProcessLookupError:
            return self._memlock  # what it last was: the account of a process that has gone goes on
        self._memlock = RLIM_UNLIMITED if soft == resource.RLIM_INFINITY else soft
        return self._memlock


class Process:
    """A client: `current` and its group leader."""

    def __init__(self, pid: int, mm: Mm, is_self: bool, credentials: Credentials) -> None:
        self.pid = pid
        self.mm = mm
        self.is_self = is_self
        self.credentials = credentials
        self.capable = credentials.capable
        #: For another process: move a descriptor of ours into it (its number there), and close one there.
        self.give_fd: Callable[[int], int] = lambda fd: fd
        self.close_fd: Callable[[int], object] = os.close

    def stat_fd(self, fd: int) -> os.stat_result:
        """Identify one of the process's descriptors; OSError EBADF if it is not open."""
        if self.is_self:
            return os.fstat(fd)
        try:
            return os.stat(f"/proc/{self.pid}/fd/{fd}")
        except FileNotFoundError:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open") from None

    def take_fd(self, fd: int) -> int:
        """A descriptor of the model's own for the same open file; EBADF if it is not open."""
        try:
            if self.is_self:
                taken = os.dup(fd)
                if fcntl.fcntl(taken, fcntl.F_GETFL) & os.O_PATH:
                    os.close(taken)
                    raise OSError(errno.EBADF, "an O_PATH descriptor")
                return taken
            pidfd = os.pidfd_open(self.pid)
            try:
                taken = int(_libc.syscall(438, pidfd, fd, 0))  # pidfd_getfd
            finally:
                os.close(pidfd)
            if taken < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            return taken
        except OSError as error:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open") from error

    def status(self, field: str) -> int:
        """A kB field of /proc/PID/status as this kernel would print it, in KiB."""
        charged = {"VmPin": self.mm.pinned_vm, "VmLck": self.mm.locked_vm}.get(field, 0)
        return read_status(self.pid, field) + charged * (PAGE_SIZE // 1024)
