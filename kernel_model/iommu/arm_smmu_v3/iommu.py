"""The SMMUv3 driver: what the core and iommufd ask of it.

Mirrors `arm_smmu_ops` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3, on a machine that the device tree
describes; domains are in domain.py and attach.py, what only guests ask for in vsmmu.py. Left out: SVA, the CPU's own
page-size errata.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fakedev.pci import RootComplex
from fakedev.smmuv3 import commands as c
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.arm_smmu_v3.attach import BlockedDomain, IdentityDomain
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.domain import PagingDomain
from kernel_model.iommu.arm_smmu_v3.master import Master, master_of
from kernel_model.iommu.arm_smmu_v3.vsmmu import Vsmmu, has_viommus, hw_info
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_DEFERRED_FLUSH,
    IOMMU_CAP_DIRTY_TRACKING,
    IOMMU_CAP_ENFORCE_CACHE_COHERENCY,
    IOMMU_CAP_NOEXEC,
    IOMMU_CAP_PCI_ATS_SUPPORTED,
    IOMMU_MMIO,
    IOMMU_NOEXEC,
    IOMMU_RESV_SW_MSI,
    IOMMU_WRITE,
    Device,
    Domain,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.io_pgfault import IOMMU_PAGE_RESP_SUCCESS, PageRequest
from uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID

if TYPE_CHECKING:
    from kernel_model.iommufd.user_data import UserData
    from kernel_model.iommufd.viommu import Viommu

#: The window of IOVAs in which doorbells of interrupt controllers are mapped.
MSI_IOVA_BASE, MSI_IOVA_LENGTH = 0x800_0000, 0x10_0000
_STAGE1_FLAGS = (
    0,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_PASID,
)


class ArmSmmuV3(IommuDriver):
    """`arm_smmu_ops`, for one unit."""

    name = "arm-smmu-v3"
    user_pasid_table = True

    def __init__(self, smmu: SmmuDevice, root: RootComplex) -> None:
        self.smmu = smmu
        self._root = root
        self.sysfs_name = f"smmu3.{smmu.base:#018x}"
        self.sysfs_parent = f"{smmu.base:x}.smmuv3"
        self.blocked_domain = BlockedDomain(self)
        self.identity_domain = IdentityDomain(self)

    def probe_device(self, device: Device, rid: int) -> None:
        device.priv = Master(device, self.smmu, rid, self._root)

    def capable(self, device: Device, cap: int) -> bool:
        if cap == IOMMU_CAP_CACHE_COHERENCY:
            return self.smmu.coherent
        if cap == IOMMU_CAP_ENFORCE_CACHE_COHERENCY:
            return master_of(device).canwbs
        if cap in (IOMMU_CAP_NOEXEC, IOMMU_CAP_DEFERRED_FLUSH):
            return True
        if cap == IOMMU_CAP_DIRTY_TRACKING:
            return self.smmu.dirty_bits and self.smmu.coherent
        if cap == IOMMU_CAP_PCI_ATS_SUPPORTED:
            return master_of(device).ats_supported()
        return False

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        return hw_info(self.smmu, wanted_type)

    def viommu_type(self, device: Device, kind: int) -> Callable[[Viommu, Domain, UserData | None], Vsmmu] | None:
        return partial(Vsmmu, self.smmu) if has_viommus(master_of(device), kind) else None

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        smmu = self.smmu
        if flags != IOMMU_HWPT_ALLOC_NEST_PARENT and flags not in _STAGE1_FLAGS:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        if user_data is not None:
            raise KernelError(errno.EOPNOTSUPP, "a paging domain takes no data")
        if flags == IOMMU_HWPT_ALLOC_NEST_PARENT:
            if not smmu.nesting:
                raise KernelError(errno.EOPNOTSUPP, "the unit has no nested translation")
            return PagingDomain(self, smmu, flags, stage1=False)
        if flags and not smmu.stage1:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no stage 1")
        return PagingDomain(self, smmu, flags, stage1=smmu.stage1)

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        prot = IOMMU_WRITE | IOMMU_NOEXEC | IOMMU_MMIO
        return [ResvRegion(MSI_IOVA_BASE, MSI_IOVA_LENGTH, prot, IOMMU_RESV_SW_MSI)]

    def max_pasids(self, device: Device) -> int:
        return min(master_of(device).function_pasids, 1 << self.smmu.ssid_bits)

    def page_response(self, device: Device, fault: PageRequest, code: int) -> None:
        """arm_smmu_page_response(): let the stalled transaction try again, or end it."""
        master = master_of(device)
        if not master.stall_enabled:
            raise KernelBug(f"{device.name} does not stall")
        retry = code == IOMMU_PAGE_RESP_SUCCESS
        self.smmu.cmdq.issue([c.resume(master.sid, fault.grpid, retry)], sync=False)

    def device_isolated_msi(self, device: Device) -> bool:
        """Interrupt controllers of such machines (the ITS) tell who sends a message."""
        return True
