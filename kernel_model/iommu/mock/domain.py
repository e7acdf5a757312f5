"""Domains of the mock driver after drivers/iommu/iommufd/selftest.c at 7.3; devices and attaching are in `attach`.

The leaves of a paging domain are in `table`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import alloc_page, injecting, kmalloc
from kernel_model.iommu.core import IOMMU_DIRTY_NO_CLEAR, IOMMU_DOMAIN_BLOCKED, IOMMU_READ, IOMMU_WRITE, IommuDriver
from kernel_model.iommu.mock.attach import MockDomain
from kernel_model.iommu.mock.table import LeafTable, Leaves, leaves
from uapi.iommufd_test import MOCK_APERTURE_LAST, MOCK_APERTURE_START, MOCK_HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from kernel_model.iommufd.iova_bitmap import IovaBitmap

#: Every power of two from 2 KiB up to half of what three levels of 512 entries and a top level reach.
_DEFAULT_PAGE_SIZES = 0x1F_FFFF_F800
_HUGE_PAGE_SIZES = MOCK_HUGE_PAGE_SIZE | 4096
#: Where the table of a huge domain ends: three levels.
_HUGE_LAST = (1 << 38) - 1


class MockBlockingDomain(MockDomain):
    """The static domain that translates nothing; also the default of every mock group."""

    type = IOMMU_DOMAIN_BLOCKED


class MockPagingDomain(MockDomain):
    """`struct mock_iommu_domain`."""

    #: Whether the table refuses a mapping for neither reading nor writing.
    needs_access = True

    def __init__(self, owner: IommuDriver, huge: bool, dirty: bool) -> None:
        if injecting:
            kmalloc("struct mock_iommu_domain")
            alloc_page("the top of a table")
        super().__init__(owner)
        self.dirty_ops = dirty
        self.pgsize_bitmap = _HUGE_PAGE_SIZES if huge else _DEFAULT_PAGE_SIZES
        self.aperture_start = 0 if huge else MOCK_APERTURE_START
        self.aperture_end = _HUGE_LAST if huge else MOCK_APERTURE_LAST
        #: MOCK_DIRTY_TRACK: what IOMMU_TEST_OP_DIRTY asks before it makes anything dirty.
        self.tracks_dirty = False
        self.table = LeafTable()

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        """See `Domain.map`."""
        self._check(iova, length, prot)
        self.table.install(iova, length, leaves(self.pgsize_bitmap, iova, pa, length))

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        """See `Domain.map_small`; whole pages at once."""
        if (iova | pa | length) & 4095:
            super().map_small(iova, pa, length, prot)
            return
        self._check(iova, length, prot)
        self.table.install(iova, length, iter([Leaves(iova, pa, 12, length >> 12)]))

    def _check(self, iova: int, length: int, prot: int) -> None:
        if self.needs_access and not prot & (IOMMU_READ | IOMMU_WRITE):
            raise KernelError(errno.EINVAL, "a mapping is readable or writable")
        if iova < self.aperture_start or iova + length - 1 > self.aperture_end:
            raise KernelError(errno.ERANGE, f"{iova:#x} + {length:#x} is outside the aperture")
        if injecting:
            alloc_page("a table")

    def unmap(self, iova: int, length: int) -> int:
        """See `Domain.unmap`."""
        return self.table.remove(iova, length)

    def iova_to_phys(self, iova: int) -> int | None:
        return self.table.physical(iova)

    def set_dirty_tracking(self, enable: bool) -> None:
        self.tracks_dirty = enable

    def read_and_clear_dirty(self, iova: int, length: int, flags: int, bitmap: IovaBitmap | None) -> None:
        self.table.read_dirty(iova, length, not flags & IOMMU_DIRTY_NO_CLEAR, bitmap)

    def free(self) -> None:
        if self.table:
            raise KernelBug("a mock domain is freed with mappings in it")
