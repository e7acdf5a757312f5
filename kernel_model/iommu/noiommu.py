"""The domains of devices that have no IOMMU, after hwpt_noiommu.c of drivers/iommu/iommufd at 7.3.

No hardware looks at such a domain. It only remembers which page stands where, so that a client can ask for physical
addresses (IOMMU_IOAS_NOIOMMU_GET_PA) and give those to its device. The kernel keeps it in the format of AMD's first
version; here it is a list of leaves. Left out: the memory of the tables.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import alloc_page, injecting
from kernel_model.interval import U64_MAX
from kernel_model.iommu.core import (
    IOMMU_DOMAIN_UNMANAGED,
    IOMMU_READ,
    IOMMU_WRITE,
    Device,
    Domain,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.mock.table import LeafTable, leaves

if TYPE_CHECKING:
    from kernel_model.iommufd.user_data import UserData

#: Every power of two from 4 KiB on that the format has.
_PAGE_SIZES = ~0xFFF & U64_MAX


class NoiommuDomain(Domain):
    """`struct noiommu_domain`."""

    type = IOMMU_DOMAIN_UNMANAGED

    def __init__(self, owner: IommuDriver) -> None:
        super().__init__(owner)
        self.pgsize_bitmap = _PAGE_SIZES
        self.aperture_start, self.aperture_end = 0, U64_MAX
        self._table = LeafTable()

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        raise KernelBug("a domain without an IOMMU is attached")

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        """See `Domain.map`."""
        if not prot & (IOMMU_READ | IOMMU_WRITE):
            raise KernelError(errno.EINVAL, "a mapping is readable or writable")
        if injecting:
            alloc_page("a table")
        self._table.install(iova, length, leaves(_PAGE_SIZES, iova, pa, length))

    def unmap(self, iova: int, length: int) -> int:
        """See `Domain.unmap`."""
        return self._table.remove(iova, length)

    def iova_to_phys(self, iova: int) -> int | None:
        return self._table.physical(iova)

    def free(self) -> None:
        if self._table:
            raise KernelBug("a no-IOMMU domain is freed with mappings in it")


class NoiommuDriver(IommuDriver):
    """`iommufd_noiommu_ops`: stands in for the driver of an IOMMU that is not there, and only makes domains."""

    name = "noiommu"

    def probe_device(self, device: Device, rid: int) -> None:
        raise KernelBug("no device is behind no IOMMU")

    def capable(self, device: Device, cap: int) -> bool:
        return False

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        raise KernelBug("an IOMMU that is not there is asked what it is")

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        return []

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        """EOPNOTSUPP: flags or data."""
        if flags or user_data is not None:
            raise KernelError(errno.EOPNOTSUPP, "a domain without an IOMMU takes neither flags nor data")
        return NoiommuDomain(self)


#: There is one for all, and it has no state.
NOIOMMU = NoiommuDriver()
