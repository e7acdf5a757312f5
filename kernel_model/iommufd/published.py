"""Pages that drivers publish for mmap(2) of /dev/iommu, after iommufd_fops_mmap() of main.c and driver.c.

A range is known by its offset, the lowest free one from the second page on (the kernel's `mt_mmap`), and belongs to an
object, which every mapping of it keeps. All ranges of a context lie in one file without a name, each at its own offset,
so that every mapping of a range is the same memory, also in a process that `iommulab run` serves. Left out: a copy of a
mapping that fork(2) makes keeps its owner only in such a process.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import MappedMemory
from kernel_model.interval import U64_MAX
from kernel_model.process import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from kernel_model.iommufd.object import Object

#: Where the file is made; it must be a file system that tells of the last close (inotify does not watch memfds).
_SHM = "/dev/shm"


class Published:
    """`struct iommufd_mmap`."""

    __slots__ = ("length", "offset", "owner")

    def __init__(self, owner: Object, offset: int, length: int) -> None:
        self.owner = owner
        self.offset = offset
        self.length = length


class PublishedMapping(MappedMemory):
    """One mapping of a range: it keeps the owner and the context."""

    def __init__(self, fd: int, published: Published) -> None:
        super().__init__(fd, published.offset)
        self._owner = published.owner
        self._owner.users += 1
        self._owner.ctx.get()

    def unmapped(self) -> None:
        """iommufd_fops_vma_close()."""
        self._owner.users -= 1
        self._owner.ctx.put()


class PublishedPages:
    """The ranges of one context."""

    __slots__ = ("_fd", "_ranges")

    def __init__(self) -> None:
        self._ranges: SortedDict[int, Published] = SortedDict()
        self._fd = -1

    def alloc(self, owner: Object, length: int) -> int:
        """_iommufd_alloc_mmap(): a range of zeroed pages for `owner`; its offset. ENOMEM."""
        if not length or length & PAGE_MASK:
            raise KernelBug(f"a driver publishes {length:#x} bytes, which are no whole pages")
        if injecting:
            kmalloc("struct iommufd_mmap")
            kmalloc("struct maple_node")
        offset = PAGE_SIZE
        for start, published in self._ranges.items():
            if start - offset >= length:
                break
            offset = start + published.length
        try:
            if self._fd < 0:
                self._fd = _nameless_file()
            if os.fstat(self._fd).st_size < offset + length:
                os.ftruncate(self._fd, offset + length)
            os.pwrite(self._fd, bytes(length), offset)
        except OSError as error:
            raise KernelError(errno.ENOMEM, "no memory for pages to be mapped") from error
        self._ranges[offset] = Published(owner, offset, length)
        return offset

    def destroy(self, owner: Object, offset: int) -> None:
        """_iommufd_destroy_mmap()."""
        published = self._ranges.pop(offset, None)
        if published is None or published.owner is not owner:
            raise KernelBug(f"no pages of object {owner.id} are published at {offset:#x}")

    def write(self, offset: int, data: bytes) -> None:
        """The driver stores into pages that it has published."""
        os.pwrite(self._fd, data, offset)

    def mmap(self, length: int, offset: int, prot: int, flags: int) -> PublishedMapping:
        """iommufd_fops_mmap(). EINVAL: not MAP_SHARED. EPERM: PROT_EXEC. ENXIO: not exactly a published range."""
        if not flags & 1:
            raise KernelError(errno.EINVAL, "/dev/iommu is mapped MAP_SHARED only")
        if prot & 4:
            raise KernelError(errno.EPERM, "/dev/iommu is never executable")
        published = self._ranges.get(offset)
        if published is None or published.length != length:
            raise KernelError(errno.ENXIO, f"{offset:#x}-{(offset + length - 1) & U64_MAX:#x} is no published range")
        return PublishedMapping(self._fd, published)

    def close(self) -> None:
        """The context goes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _nameless_file() -> int:
    try:
        return os.open(_SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.memfd_create("iommufd", os.MFD_CLOEXEC)
