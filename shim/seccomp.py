"""Seccomp user notification: a filter that hands chosen system calls to a supervisor, and the supervisor's end.

Mirrors `linux/seccomp.h` and seccomp_unotify(2) on x86-64. Left out: every other architecture and the x32 and i386
entry points; programs that use them are not served.

A filter traps by number, except that ioctls are trapped by their type byte alone and calls on a descriptor only
where the descriptor lies in [FIRST_FD, END_FD), where the supervisor puts what it hands out. Everything else costs
the program only the run of the filter.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

#: Where the model's descriptors are put, so that calls on other descriptors need not be trapped.
FIRST_FD, END_FD = 768, 1024

# System calls, asm/unistd_64.h.
READ, WRITE, OPEN, MMAP, IOCTL, PREAD64, PWRITE64, READV, WRITEV = 0, 1, 2, 9, 16, 17, 18, 19, 20
DUP, EXECVE, FCNTL, EXIT_GROUP, OPENAT, EXECVEAT, OPENAT2 = 32, 59, 72, 231, 257, 322, 437
# Not exit(2): where no supervisor answers any more, it is how a C library ends after exit_group(2) has failed.
_ALWAYS = (OPEN, OPENAT, OPENAT2, EXECVE, EXECVEAT, EXIT_GROUP)
_BY_FIRST_FD = (READ, WRITE, PREAD64, PWRITE64, READV, WRITEV, DUP, FCNTL)
_IOCTL_TYPE = 0x3B00

_AUDIT_ARCH_X86_64 = 0xC000003E
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_LD_ABS, _AND_K, _JEQ, _JGE, _RET = 0x20, 0x54, 0x15, 0x35, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16
_INSTRUCTION = struct.Struct("<HBBI")

_SYS_SECCOMP = 317
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_NEW_LISTENER, _WAIT_KILLABLE_RECV = 8, 32

_RECV, _SEND, _ADDFD = 0xC0502100, 0xC0182101, 0x40182103
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")
_ADDFD_STRUCT = struct.Struct("<QIIII")
_CONTINUE = 1
_ADDFD_SETFD = 1


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def build_filter() -> bytes:
    """The filter's instructions, as `struct sock_filter`."""
    # Each block is a list of (code, where true, where false, operand); a place is a block's name or None for the next.
    blocks: dict[str, list[tuple[int, str | None, str | None, int]]] = {
        "start": [(_LD_ABS, None, None, _OFFSET_ARCH), (_JEQ, None, "allow", _AUDIT_ARCH_X86_64)],
        "number": [
            (_LD_ABS, None, None, _OFFSET_NR),
            (_JEQ, "ioctl", None, IOCTL),
            *((_JEQ, "notify", None, number) for number in _ALWAYS),
            *((_JEQ, "fd", None, number) for number in _BY_FIRST_FD),
            (_JEQ, "mmap", "allow", MMAP),
        ],
        "ioctl": [
            (_LD_ABS, None, None, _OFFSET_ARGS + 8),
            (_AND_K, None, None, 0xFF00),
            (_JEQ, "notify", "allow", _IOCTL_TYPE),
        ],
        "mmap": [
            (_LD_ABS, None, None, _OFFSET_ARGS + 4 * 8),
            (_JGE, None, "allow", FIRST_FD),
            (_JGE, "allow", "notify", END_FD),
        ],
        "fd": [
            (_LD_ABS, None, None, _OFFSET_ARGS),
            (_JGE, None, "allow", FIRST_FD),
            (_JGE, "allow", "notify", END_FD),
        ],
        "notify": [(_RET, None, None, _RET_USER_NOTIF)],
        "allow": [(_RET, None, None, _RET_ALLOW)],
    }
    places = {}
    length = 0
    for name, block in blocks.items():
        places[name] = length
        length += len(block)
    code = b""
    here = 0
    for block in blocks.values():
        for operation, true, false, operand in block:
            here += 1
            jumps = [0 if place is None else places[place] - here for place in (true, false)]
            code += _INSTRUCTION.pack(operation, *jumps, operand)
    return code


class Installer:
    """Puts the filter on the calling thread. Made before fork(), so that the child needs nothing but system calls."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._code = ctypes.create_string_buffer(build_filter())
        count = len(self._code.raw) // _INSTRUCTION.size
        self._program = _Program(count, ctypes.addressof(self._code))

    def install(self) -> int:
        """The listener's descriptor, close-on-exec.

        OSError EINVAL: the kernel has no user notification with WAIT_KILLABLE_RECV (it is older than 5.19); ENOSYS:
        it has no seccomp; EBUSY: a filter of this thread has a listener already.
        """
        listener = self._seccomp()
        if listener < 0 and ctypes.get_errno() == errno.EACCES:
            # Without CAP_SYS_ADMIN only a thread that can gain no privilege may have a filter.
            self._libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            listener = self._seccomp()
        if listener < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return listener

    def _seccomp(self) -> int:
        flags = _NEW_LISTENER | _WAIT_KILLABLE_RECV
        return int(self._libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(self._program)))


class Notification:
    """A system call that waits for its answer."""

    __slots__ = ("args", "id", "number", "tid")

    def __init__(self, fields: tuple[int, ...]) -> None:
        self.id = fields[0]
        self.tid = fields[1]
        self.number = fields[3]
        self.args = fields[6:]


class Listener:
    """The supervisor's end of a filter."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._blank = bytes(_NOTIFICATION.size)

    def fileno(self) -> int:
        return self._fd

    def receive(self) -> Notification | None:
        """The next call; None if it was cancelled by a signal before it was received."""
        block = bytearray(self._blank)
        try:
            fcntl.ioctl(self._fd, _RECV, block)
        except (FileNotFoundError, InterruptedError):
            return None
        return Notification(_NOTIFICATION.unpack(block))

    def respond(self, call: Notification, value: int, error: int = 0) -> None:
        """The call returns `value`, or fails with the errno `error`. A caller that has been killed is no error."""
        self._send(_RESPONSE.pack(call.id, value, -error, 0))

    def let_through(self, call: Notification) -> None:
        """The host's kernel executes the call as it was made."""
        self._send(_RESPONSE.pack(call.id, 0, 0, _CONTINUE))

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self._fd, _SEND, bytearray(response))
        except FileNotFoundError:
            pass

    def add_fd(self, call: Notification, fd: int, number: int | None, flags: int) -> int:
        """Give the caller a copy of `fd` as `number` (None: the lowest free one), with O_CLOEXEC or 0; its number.

        OSError EMFILE, EBADF: the caller's limit on descriptors; ENOENT: the caller has gone.
        """
        setfd = 0 if number is None else _ADDFD_SETFD
        # A mutable buffer, or the number would not be returned.
        request = bytearray(_ADDFD_STRUCT.pack(call.id, setfd, fd, number or 0, flags))
        return int(fcntl.ioctl(self._fd, _ADDFD, request))

    def close(self) -> None:
        os.close(self._fd)
