"""The paging domain of mock drivers before 6.19: an array of 2 KiB pages instead of a page table.

After drivers/iommu/iommufd/selftest.c at 6.12. A device with MOCK_FLAGS_DEVICE_HUGE_IOVA gets leaves of 1 MiB too.
"""

from __future__ import annotations

from kernel_model.iommu.core import IommuDriver
from kernel_model.iommu.mock.domain import MockPagingDomain
from kernel_model.iommu.mock.table import leaves
from uapi.iommufd_test import MOCK_HUGE_PAGE_SIZE, MOCK_PAGE_SIZE


class MockArrayDomain(MockPagingDomain):
    """`struct mock_iommu_domain` with its `pfns`."""

    needs_access = False

    def __init__(self, owner: IommuDriver, huge: bool, dirty: bool) -> None:
        super().__init__(owner, False, dirty)
        self.pgsize_bitmap = MOCK_PAGE_SIZE | (MOCK_HUGE_PAGE_SIZE if huge else 0)

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        """See `Domain.map_small`."""
        self._check(iova, length, prot)
        self.table.install(iova, length, leaves(MOCK_PAGE_SIZE, iova, pa, length))
