"""A context: one open of /dev/iommu, after main.c of drivers/iommu/iommufd.

The file is the context's first holder; every bound device is another, so closing the descriptor while a device is bound
changes nothing until the device is closed too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.ioctl import IoctlEntry, IoctlTable, dispatch
from kernel_model.iommufd.object import Object, ObjectTable
from kernel_model.iommufd.published import PublishedMapping, PublishedPages
from uapi.behaviours import has
from uapi.iommufd import IOMMUFD_CMD_BASE

if TYPE_CHECKING:
    from kernel_model.iommufd.ioas import Ioas
    from kernel_model.iommufd.sw_msi import SwMsiMap
    from kernel_model.kernel import Kernel

#: Who pays for pinned pages (IOMMU_OPTION_RLIMIT_MODE): nobody, the user, or the address space.
ACCOUNT_NONE, ACCOUNT_USER, ACCOUNT_MM = 0, 1, 2

table = IoctlTable("iommufd")

#: The calls of a VFIO container that an iommufd serves too, by their whole number.
CompatHandler = Callable[["Context", SystemCall, int], int]
compat_calls: dict[int, CompatHandler] = {}


class Context(FileDescription):
    """`struct iommufd_ctx` and its file."""

    path = "/dev/iommu"

    def __init__(self, kernel: Kernel, entries: dict[int, IoctlEntry]) -> None:
        self.kernel = kernel
        self.objects = ObjectTable()
        self.account_mode = ACCOUNT_USER
        #: The IOAS that the VFIO compatible calls work on.
        self.vfio_ioas: Ioas | None = None
        #: Groups with a bound device of this context, by group.
        self.groups: dict[Any, Any] = {}
        #: Pages that drivers publish for mmap(2).
        self.published = PublishedPages()
        #: Doorbell pages of MSIs, by id.
        self.sw_msi: list[SwMsiMap] = []
        self._entries = entries
        self._last = max(entries)
        self._holders = 1

    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        number = request & 0xFF
        if not IOMMUFD_CMD_BASE <= number <= self._last:
            handler = compat_calls.get(request)
            if handler is None:
                raise KernelError(errno.ENOTTY, f"no such ioctl: {request:#x}")
            return handler(self, call, arg)
        return dispatch(self._entries, call, self, request, arg)

    def mmap(self, call: SystemCall, length: int, offset: int, prot: int, flags: int) -> PublishedMapping:
        """Only what a driver has published can be mapped. ENODEV: before 6.17. Then `PublishedPages.mmap`."""
        if not has(self.kernel.release, "mmap-of-iommufd"):
            raise KernelError(errno.ENODEV, "the file cannot be mapped")
        return self.published.mmap(length, offset, prot, flags)

    def get(self) -> None:
        """iommufd_ctx_get(): one holder more."""
        self._holders += 1

    def put(self) -> None:
        """iommufd_ctx_put(): one less; the last one's leaving destroys every object."""
        self._holders -= 1
        if self._holders == 0:
            self.objects.release_all()
            self.published.close()
            self.kernel.contexts.discard(self)
            if any(self.objects.each(Object)):
                self.kernel.lost_contexts.append(self)

    def release(self) -> None:
        self.put()

    def forget(self, obj: Object) -> None:
        """An object leaves the table: the compatible IOAS is not held by being it."""
        if obj is self.vfio_ioas:
            self.vfio_ioas = None


def ctx_from_fd(call: SystemCall, fd: int) -> Context:
    """iommufd_ctx_from_fd(): EBADF for a descriptor that is not open, EBADFD for one of something else."""
    found = call.kernel.lookup(fd, call.process)
    if not isinstance(found, Context):
        raise KernelError(errno.EBADFD, f"descriptor {fd} is not an iommufd")
    return found
