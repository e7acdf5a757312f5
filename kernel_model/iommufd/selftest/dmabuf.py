"""The mock driver's dma-bufs, after iommufd_test_dmabuf_*() of drivers/iommu/iommufd/selftest.c.

Left out: close-on-exec as `open_flags` say in a process other than the model's own; there it is always set.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from kernel_model.dma_buf import DmaBuf, dma_buf_get
from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommufd.selftest.operations import TestCommand, operation
from kernel_model.process import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

_LONGEST = 512 * PAGE_SIZE


class MockDmaBuf(DmaBuf):
    """`struct iommufd_test_dma_buf`: zeroed memory, which a device can reach and nobody else."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        super().__init__(size)
        self.revoked = False
        self._files = kernel.shared_files
        fd = os.memfd_create("dmabuf", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        status = os.fstat(fd)
        self._memory = self._files.get((status.st_dev, status.st_ino), fd, size)

    def map_for_iommufd(self) -> int:
        """iommufd_test_dma_buf_iommufd_map(). ENODEV: it is revoked."""
        if self.revoked:
            raise KernelError(errno.ENODEV, "the dma-buf is revoked")
        return self._memory.window

    def freed(self) -> None:
        self._files.put(self._memory)


@operation("IOMMU_TEST_OP_DMABUF_GET")
def _dmabuf_get(ucmd: TestCommand) -> int:
    """The descriptor, or 0 with the fault of 7.3 as released (`Kernel(dmabuf_get="0")`). EINVAL: length 0, or more than
    2 MiB. EMFILE."""
    cmd, kernel, process = ucmd.cmd.dmabuf_get, ucmd.ctx.kernel, ucmd.call.process
    size = (cmd.length + PAGE_MASK) & ~PAGE_MASK
    if not 0 < size <= _LONGEST:
        raise KernelError(errno.EINVAL, f"a dma-buf of {cmd.length:#x} bytes")
    if injecting:
        for what in ("struct iommufd_test_dma_buf", "its memory", "struct dma_buf"):
            kmalloc(what)
    fd = kernel.install_for(process, MockDmaBuf(kernel, size))
    if process.is_self and not cmd.open_flags & os.O_CLOEXEC:
        os.set_inheritable(fd, True)
    return fd if kernel.dmabuf_get == "fd" else 0


@operation("IOMMU_TEST_OP_DMABUF_REVOKE")
def _dmabuf_revoke(ucmd: TestCommand) -> None:
    """EBADF: not open. EINVAL: no dma-buf. EOPNOTSUPP: another exporter's. Mappings go even if it is given back."""
    cmd = ucmd.cmd.dmabuf_revoke
    found = dma_buf_get(ucmd.call, cmd.dmabuf_fd)
    if not isinstance(found, MockDmaBuf):
        raise KernelError(errno.EOPNOTSUPP, "not a dma-buf of the mock driver")
    found.revoked = bool(cmd.revoked)
    found.invalidate_mappings()
