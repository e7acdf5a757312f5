"""A kernel by descriptors and numbers, as the executor sees it: here the running one; `model.ModelDoor` is the other.

Needs only the standard library, `uapi` and the suite's drivers of devices.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from typing import Protocol

from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import node, take
from uapi.backend import DEV_IOMMU, Backend
from uapi.linux import LinuxBackend, LinuxFile, read_status

#: What poll asks for.
POLL_EVENTS = select.POLLIN | select.POLLOUT | select.POLLRDNORM


class Door(Protocol):
    """A kernel, by descriptors; errors are negative errnos."""

    def open(self) -> int: ...

    def open_device(self, number: int) -> int:
        """The VFIO character device of this edu function; ENODEV where there are fewer."""

    def ioctl(self, fd: int, request: int, address: int) -> int: ...

    def read(self, fd: int, count: int) -> bytes | int: ...

    def write(self, fd: int, data: bytes) -> int: ...

    def pread(self, fd: int, count: int, offset: int) -> bytes | int: ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...

    def poll(self, fd: int) -> int: ...

    def close(self, fd: int) -> int: ...

    def mmap(self, fd: int, length: int, offset: int, prot: int, flags: int) -> Mapping | int: ...

    def pinned(self) -> int:
        """VmPin of this process in KiB."""

    def signalled(self) -> None:
        """An eventfd was written to: who waits for it is called now."""


_libc_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class Mapping(Protocol):
    """Pages of the kernel's, mapped."""

    def read(self, offset: int, width: int) -> int: ...

    def close(self) -> None: ...


class Devices:
    """The edu functions of a kernel, given to vfio-pci when the first is asked for."""

    def __init__(self, kernel: Backend) -> None:
        self._kernel = kernel
        self._nodes: list[str] | None = None

    def open(self, number: int) -> int:
        """A new descriptor of a function's character device; a negative errno, ENODEV where there is none."""
        try:
            if self._nodes is None:
                addresses = edu_functions(self._kernel)
                for address in addresses:
                    take(self._kernel, address)
                self._nodes = [node(self._kernel, address) for address in addresses]
            if number >= len(self._nodes):
                return -errno.ENODEV
            return self._kernel.open(self._nodes[number]).fileno()
        except RuntimeError:  # another driver has it
            return -errno.ENODEV
        except OSError as error:
            return -(error.errno or 0)


class LinuxDoor:
    """The kernel that runs this process."""

    def __init__(self) -> None:
        self._devices = Devices(LinuxBackend())

    def open(self) -> int:
        return os.open(DEV_IOMMU, os.O_RDWR | os.O_CLOEXEC)

    def open_device(self, number: int) -> int:
        return self._devices.open(number)

    def ioctl(self, fd: int, request: int, address: int) -> int:
        result = int(_libc_ioctl(fd, request, address))
        return result if result >= 0 else -ctypes.get_errno()

    def read(self, fd: int, count: int) -> bytes | int:
        try:
            return os.read(fd, count)
        except OSError as error:
            return -(error.errno or 0)

    def write(self, fd: int, data: bytes) -> int:
        try:
            return os.write(fd, data)
        except OSError as error:
            return -(error.errno or 0)

    def pread(self, fd: int, count: int, offset: int) -> bytes | int:
        try:
            return os.pread(fd, count, offset)
        except OSError as error:
            return -(error.errno or 0)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        try:
            return os.pwrite(fd, data, offset)
        except OSError as error:
            return -(error.errno or 0)

    def poll(self, fd: int) -> int:
        poller = select.poll()
        poller.register(fd, POLL_EVENTS)
        ready = poller.poll(0)
        return ready[0][1] if ready else 0

    def close(self, fd: int) -> int:
        try:
            os.close(fd)
        except OSError as error:
            return -(error.errno or 0)
        return 0

    def mmap(self, fd: int, length: int, offset: int, prot: int, flags: int) -> Mapping | int:
        try:
            return LinuxFile(fd, DEV_IOMMU).mmap(length, offset, prot, flags)
        except OSError as error:
            return -(error.errno or 0)

    def pinned(self) -> int:
        return read_status(os.getpid(), "VmPin")

    def signalled(self) -> None:
        """A kernel does that as the write returns."""
