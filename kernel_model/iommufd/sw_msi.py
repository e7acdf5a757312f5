"""MSI doorbells behind a translating IOMMU, after the MSI half of driver.c in drivers/iommu/iommufd.

Where an MSI is a write that the IOMMU translates (Arm, virtio-iommu; not x86), the page of the doorbell must be mapped
into every domain of a device that raises interrupts. The IOVA is the same for a whole context: each page gets the next
one of the devices' region of type SW_MSI, and a domain gets the pages that its group needs when it is attached.

The interrupt controller's driver asks by `core.dma_prepare_msi` (kernel_model/irq.py).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import IOMMU_MMIO, IOMMU_READ, IOMMU_WRITE, Domain
from kernel_model.process import PAGE_MASK, PAGE_SIZE

if TYPE_CHECKING:
    from kernel_model.iommufd.ctx import Context
    from kernel_model.iommufd.device import IommufdDevice, IommufdGroup
    from kernel_model.iommufd.hwpt import HwptPaging

#: Doorbell pages of a context (`struct iommufd_sw_msi_maps`).
_PAGES_MAX = 64


@dataclass(frozen=True, slots=True)
class SwMsiMap:
    """`struct iommufd_sw_msi_map`: the doorbell page at `address` is page `pgoff` of the region at `start`."""

    id: int
    start: int
    address: int
    pgoff: int

    @property
    def iova(self) -> int:
        return self.start + self.pgoff * PAGE_SIZE


def _get_map(ctx: Context, address: int, start: int) -> SwMsiMap:
    """iommufd_sw_msi_get_map(). EOVERFLOW: the context has as many doorbell pages as can be told apart."""
    same = [found for found in ctx.sw_msi if found.start == start]
    for found in same:
        if found.address == address:
            return found
    if len(ctx.sw_msi) >= _PAGES_MAX:
        raise KernelError(errno.EOVERFLOW, f"a context has at most {_PAGES_MAX} doorbell pages")
    if injecting:
        kmalloc("struct iommufd_sw_msi_map")
    made = SwMsiMap(len(ctx.sw_msi), start, address, len(same))
    ctx.sw_msi.append(made)
    return made


def _install(paging: HwptPaging, page: SwMsiMap) -> None:
    """iommufd_sw_msi_install(). The errnos of the domain's map."""
    if page.id not in paging.present_sw_msi:
        assert paging.domain is not None
        paging.domain.map(page.iova, page.address, PAGE_SIZE, IOMMU_WRITE | IOMMU_READ | IOMMU_MMIO)
        paging.present_sw_msi.add(page.id)


def group_setup_msi(ctx: Context, igroup: IommufdGroup, paging: HwptPaging) -> None:
    """iommufd_group_setup_msi(): the doorbells that the group uses, into a domain that it is about to enter."""
    if igroup.sw_msi_start is None:
        return
    for page in ctx.sw_msi:
        if page.start == igroup.sw_msi_start and page.id in igroup.required_sw_msi:
            _install(paging, page)


def remove_pages(paging: HwptPaging) -> None:
    """The domain goes. The kernel frees its table with the doorbells in it; a domain of the model is empty by then."""
    for page in paging.ctx.sw_msi:
        if page.id in paging.present_sw_msi and paging.domain is not None:
            paging.domain.unmap(page.iova, PAGE_SIZE)


def sw_msi(domain: Domain, idev: IommufdDevice, address: int) -> int:
    """iommufd_sw_msi(): where a device writes to ring the doorbell at `address`, mapped now into its domain.

    EOVERFLOW: too many doorbell pages. Then the errnos of the domain's map.
    """
    igroup = idev.group
    if igroup.sw_msi_start is None:
        return address
    page = _get_map(idev.ctx, address & ~PAGE_MASK, igroup.sw_msi_start)
    _install(domain.iommufd_hwpt.paging, page)
    igroup.required_sw_msi.add(page.id)
    return page.iova | address & PAGE_MASK
