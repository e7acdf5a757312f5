"""Open files: `struct file` with its `file_operations`, and one system call on one.

A `FileDescription` is what the kernel keeps behind a descriptor. Subclasses are the files of a subsystem (a context of
iommufd, a VFIO device, a sysfs attribute) and override what they support; the defaults answer what Linux answers for a
missing operation.

`SystemCall` is one call in progress: who calls, and how to reach that caller's memory. The block that the caller passed
as the argument (a struct or buffer object) is trusted for its own length and read directly; every other address is
checked.
"""

from __future__ import annotations

import errno
import os
from struct import Struct
from typing import TYPE_CHECKING, Protocol

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, usercopy
from kernel_model.process import TASK_SIZE

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel
    from kernel_model.process import Process

_u32 = Struct("<I").unpack_from
_NO_BLOCK = memoryview(b"")
_ZEROES = bytes(1 << 20)
#: The most that a read or a write asks a file for; and what is copied at once, a short count beyond it.
MAX_RW_COUNT, COPY_MAX = 0x7FFFF000, 1 << 24
POLLIN, POLLOUT, POLLERR, POLLHUP, POLLRDNORM, POLLWRNORM = 0x1, 0x4, 0x8, 0x10, 0x40, 0x100


def check_range(address: int, count: int) -> None:
    """What vfs_read() and vfs_write() ask of the caller's range, both unsigned. EFAULT: it is no user memory."""
    if address + count > TASK_SIZE:
        raise KernelError(errno.EFAULT, f"{count} bytes at {address:#x} are no user memory")


class SystemCall:
    """The call being served."""

    __slots__ = ("_base", "_block", "_end", "kernel", "process")

    def __init__(self, kernel: Kernel, process: Process) -> None:
        self.kernel = kernel
        self.process = process
        self.trust_nothing()

    def trust(self, base: int, block: memoryview) -> None:
        """The argument's own bytes: the object `block` at address `base`."""
        self._base = base
        self._end = base + len(block)
        self._block = block

    def trust_nothing(self) -> None:
        """The argument is a value or a bare address."""
        self._base, self._end = 1, 0  # contains nothing, not even an empty range
        self._block = _NO_BLOCK

    def copy_from_user(self, address: int, length: int) -> bytes | memoryview:
        """`length` bytes of the caller's memory; EFAULT where they cannot be read."""
        if injecting:
            usercopy("copy_from_user()")
        if self._base <= address and address + length <= self._end:
            start = address - self._base
            return self._block[start : start + length]
        return self.process.mm.read(address, length)

    def copy_to_user(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` in the caller's memory; EFAULT where it cannot be written."""
        if injecting:
            usercopy("copy_to_user()")
        length = len(data)
        if self._base <= address and address + length <= self._end:
            start = address - self._base
            self._block[start : start + length] = data
            return
        self.process.mm.write(address, data)

    def get_u32(self, address: int) -> int:
        """get_user() of a 32-bit word."""
        if self._base <= address and address + 4 <= self._end:
            value: int = _u32(self._block, address - self._base)[0]
            return value
        return int.from_bytes(self.process.mm.read(address, 4), "little")

    def check_zeroed(self, address: int, length: int) -> None:
        """check_zeroed_user(): E2BIG at the first byte that is not zero, EFAULT at the first that cannot be read."""
        mm = self.process.mm
        inside = min(max(self._end - address, 0), length) if self._base <= address else 0
        if inside:
            start = address - self._base
            if self._block[start : start + inside] != bytes(inside):
                raise KernelError(errno.E2BIG, "a byte beyond the kernel's struct is not zero")
            address += inside
            length -= inside
        step = 4096
        while length:
            chunk = min(length, step - address % min(step, 4096))
            data = mm.read_some(address, chunk)
            if data != _ZEROES[: len(data)]:
                raise KernelError(errno.E2BIG, "a byte beyond the kernel's struct is not zero")
            if len(data) < chunk:
                if chunk > 4096:
                    step = 4096  # find the exact page
                    address += len(data)
                    length -= len(data)
                    continue
                raise KernelError(errno.EFAULT, f"the struct's tail at {address:#x} cannot be read")
            address += chunk
            length -= chunk
            step = min(step * 2, 1 << 20)


class MappedRegion(Protocol):
    """What a file gives to mmap(2): the accesses behind a mapping."""

    def read(self, offset: int, width: int) -> int: ...

    def write(self, offset: int, width: int, value: int) -> None: ...

    def unmapped(self) -> None:
        """The mapping is gone."""


class MappedMemory:
    """What a file gives to mmap(2) where plain memory lies behind it: nobody looks at the accesses.

    The memory is `fd` from `offset` on, both the model's own.
    """

    def __init__(self, fd: int, offset: int) -> None:
        self.fd = fd
        self.offset = offset

    def unmapped(self) -> None:
        """The mapping is gone."""


class FileDescription:
    """An open file. A subclass overrides the operations that it has."""

    #: What `File.path` and /proc/PID/fd show.
    path = "anon_inode:[unknown]"
    #: O_RDONLY, O_WRONLY or O_RDWR: what read(2), write(2) and mmap(2) may do.
    access = os.O_RDWR

    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        raise KernelError(errno.ENOTTY, f"{self.path} has no ioctls")

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        """`offset` None is read(2) at the file's own position."""
        raise KernelError(errno.EINVAL, f"{self.path} cannot be read")

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        raise KernelError(errno.EINVAL, f"{self.path} cannot be written")

    def read_to(self, call: SystemCall, address: int, count: int, offset: int | None) -> int:
        """read(2) as a program makes it; a file whose data is gone once it is read stores piece by piece instead."""
        data = self.read(call, min(count, COPY_MAX), offset)
        call.copy_to_user(address, data)
        return len(data)

    def write_from(self, call: SystemCall, address: int, count: int, offset: int | None) -> int:
        """write(2) as a program makes it."""
        return self.write(call, call.copy_from_user(address, min(count, COPY_MAX)), offset)

    def mmap(self, call: SystemCall, length: int, offset: int, prot: int, flags: int) -> MappedRegion | MappedMemory:
        raise KernelError(errno.ENODEV, f"{self.path} cannot be mapped")

    def poll(self) -> int:
        """The poll(2) events that are ready now. A file without the operation is always ready."""
        return POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM

    def release(self) -> None:
        """The last descriptor is gone."""
