"""dma-bufs: memory that one driver exports by a descriptor and others import, after drivers/dma-buf/dma-buf.c.

An exporter subclasses `DmaBuf`. An importer that can live with losing the memory attaches, and is told to let go of it
when the exporter revokes it. Left out: a CPU's access (mmap, DMA_BUF_IOCTL_SYNC, seeking to the end for the size),
fences, scatter lists, and other exporters' buffers than the mock driver's: a descriptor of the host's own dma-buf is
known as one (`host_size`), and nothing more can be done with it.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.process import Process


class Importer(Protocol):
    """Who holds an attachment."""

    def revoke_notify(self) -> None:
        """invalidate_mappings(): nothing may reach the memory any more."""


class DmaBuf(FileDescription):
    """`struct dma_buf` and its file. It lives as long as a descriptor or an attachment of it."""

    path = "/dmabuf:"

    def __init__(self, size: int) -> None:
        #: In bytes, whole pages.
        self.size = size
        self._importers: list[Importer] = []
        self._closed = False

    def map_for_iommufd(self) -> int:
        """The physical address of its one physical range. EOPNOTSUPP: this exporter does not tell iommufd."""
        raise KernelError(errno.EOPNOTSUPP, "the exporter tells no physical address")

    def freed(self) -> None:
        """Nobody has it any more."""

    def attach(self, importer: Importer) -> None:
        """dma_buf_dynamic_attach() and dma_buf_pin()."""
        self._importers.append(importer)

    def detach(self, importer: Importer) -> None:
        self._importers.remove(importer)
        self._free_if_unused()

    def invalidate_mappings(self) -> None:
        """dma_buf_invalidate_mappings()."""
        for importer in self._importers:
            importer.revoke_notify()

    def release(self) -> None:
        self._closed = True
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        if self._closed and not self._importers:
            self.freed()


def dma_buf_get(call: SystemCall, fd: int) -> DmaBuf:
    """EBADF: not open. EINVAL: not a dma-buf of the model's."""
    found = call.kernel.lookup(fd, call.process)
    if not isinstance(found, DmaBuf):
        raise KernelError(errno.EINVAL, f"descriptor {fd} is no dma-buf")
    return found


def host_size(process: Process, fd: int) -> int | None:
    """The size of a dma-buf of the host's own kernel behind a descriptor; None if it is no such thing."""
    try:
        if not os.readlink(f"/proc/{process.pid}/fd/{fd}").startswith("/dmabuf:"):
            return None
        taken = process.take_fd(fd)
    except OSError:
        return None
    try:
        return os.lseek(taken, 0, os.SEEK_END)
    finally:
        os.close(taken)
