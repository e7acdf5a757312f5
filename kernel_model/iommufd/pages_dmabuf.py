"""Pages of a dma-buf, after the dma-buf half of pages.c of drivers/iommu/iommufd.

They are one physical range that the exporter tells once, at the map. Nothing is pinned and nobody pays; accesses cannot
use them, and an area of them is never cut. When the exporter revokes the buffer they leave every domain and do not come
back, while the areas stay where they are. Left out: the exporters of VFIO (a kernel without CONFIG_VFIO_PCI_DMABUF).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.dma_buf import DmaBuf
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, iommufd_should_fail, kmalloc
from kernel_model.iommufd.ctx import ACCOUNT_NONE
from kernel_model.iommufd.pages import Pages, Runs
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Process

if TYPE_CHECKING:
    from kernel_model.iommu.core import Domain
    from kernel_model.iommufd.io_pagetable import Area
    from kernel_model.kernel import Kernel

IOMMU_CACHE, IOMMU_MMIO = 4, 16
_MOST_PAGES = 0xFFFFFFFF


class DmabufPages(Pages):
    """`struct iopt_pages` of type IOPT_ADDRESS_DMABUF."""

    __slots__ = ("_address", "_dmabuf", "_revoked", "_tracked", "start")

    is_dmabuf = True

    def __init__(
        self, kernel: Kernel, process: Process, dmabuf: DmaBuf, start: int, length: int, writable: bool
    ) -> None:
        """EINVAL: beyond the buffer's end. EOPNOTSUPP: its exporter cannot be asked. ENODEV: it is revoked."""
        if dmabuf.size <= start + length - 1 or length // PAGE_SIZE >= _MOST_PAGES:
            raise KernelError(errno.EINVAL, f"the dma-buf ends at {dmabuf.size:#x}")
        super().__init__(kernel, process, start & PAGE_MASK, length, writable)
        if injecting:
            kmalloc("struct dma_buf_attachment")
        self.account_mode = ACCOUNT_NONE
        self.start = start & ~PAGE_MASK
        self._dmabuf = dmabuf
        self._address = dmabuf.map_for_iommufd()
        self._revoked = False
        #: Where they are mapped: the kernel's tracker list.
        self._tracked: list[tuple[Domain, Area]] = []
        dmabuf.attach(self)

    @property
    def alignment_address(self) -> int:
        return self.start

    @property
    def revoked(self) -> bool:
        return self._revoked

    def pin(self, first: int, last: int) -> Runs:
        return [(self._address + self.start + (first << PAGE_SHIFT), last - first + 1)]

    def reader_can_fail(self, first: int, last: int) -> None:
        iommufd_should_fail(errno.ENOMEM, "a batch of pages")

    def unpin(self, first: int, last: int) -> None:
        pass

    def protection(self, prot: int) -> int:
        """batch_to_domain(): as device memory."""
        return prot & ~IOMMU_CACHE | IOMMU_MMIO

    def track(self, domain: Domain, area: Area) -> bool:
        """iopt_dmabuf_track_domain()."""
        if injecting:
            kmalloc("struct iopt_pages_dmabuf_track")
        self._tracked.append((domain, area))
        return not self._revoked

    def untrack(self, domain: Domain, area: Area) -> bool:
        """iopt_dmabuf_untrack_domain()."""
        self._tracked.remove((domain, area))
        return not self._revoked

    def revoke_notify(self) -> None:
        """iopt_revoke_notify()."""
        if not self._revoked:
            for domain, area in self._tracked:
                domain.unmap(area.iova, area.length)
            self._revoked = True

    def released(self) -> None:
        if self._tracked:
            raise KernelBug("pages of a dma-buf are freed while mapped")
        self._dmabuf.detach(self)
