"""Domains with a first-stage table: the processor's format, scalable mode only.

Mirrors the first-stage half of drivers/iommu/intel/iommu.c at 7.3. Addresses are canonical there, and a domain gives
out the lower half: 47 bits with 4 levels, 56 with 5. The table has no bit for snooping; the PASID-table entry has.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.memory import ADDRESS_BITS
from fakedev.pgtable.x86_64 import X86FirstStage
from kernel_model.errors import KernelError
from kernel_model.iommu.core import IOMMU_NO_PASID
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.cache import CacheTags
from kernel_model.iommu.intel.device import DeviceInfo
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.domain import PagingDomain, alloc_dmar_domain
from kernel_model.iommu.pgtable import PageTable

if TYPE_CHECKING:
    from kernel_model.iommu.intel.iommu import IntelIommu

_1G = 1 << 30


def first_stage_width(mgaw: int, five_levels: bool) -> tuple[int, int]:
    """compute_vasz_lg2_fs(): bits of an address with its sign, and the top level."""
    if mgaw > 48 and five_levels:
        return min(57, mgaw), 4
    return min(48, mgaw), 3


class FirstStageDomain(PagingDomain):
    """A `struct dmar_domain` whose table is the first stage."""

    def __init__(self, owner: IntelIommu, unit: IntelUnit) -> None:
        alloc_dmar_domain()
        caps = unit.caps
        self._vasz_lg2, top_level = first_stage_width(caps.mgaw, caps.first_stage_5_levels)
        fmt = X86FirstStage(ADDRESS_BITS)
        table = PageTable(fmt, owner.memory, owner.pages, top_level, self._vasz_lg2 - 1)
        super().__init__(owner, table, CacheTags(by_pasid=True, first_stage=True), iotlb_sync_map=False)
        self.pgsize_bitmap = table.possible_sizes() & (-1 if caps.first_stage_gigabytes else ~_1G)
        self._walk_snoop = caps.walk_coherency

    def check_compatible(self, unit: IntelUnit) -> None:
        """paging_domain_compatible_first_stage()."""
        caps = unit.caps
        if not unit.scalable or not caps.first_stage:
            raise KernelError(errno.EINVAL, "the unit has no first stage")
        if self._walk_snoop and not caps.walk_coherency:
            raise KernelError(errno.EINVAL, "the unit's walks do not snoop")
        if self._vasz_lg2 > 48 and not caps.first_stage_5_levels:
            raise KernelError(errno.EINVAL, "the unit has no first stage of 5 levels")
        if self.pgsize_bitmap & _1G and not caps.first_stage_gigabytes:
            raise KernelError(errno.EINVAL, "the unit does not have the domain's page sizes")

    def setup(self, info: DeviceInfo, pasid: int) -> None:
        """domain_setup_first_level()."""
        pasid_entries.setup_first_level(
            info,
            pasid,
            self.domain_id(info.unit),
            self.table.root,
            self.table.top_level + 1,
            snoop=self.force_snooping,
            walk_snoop=self._walk_snoop,
        )

    def enforce_cache_coherency(self) -> bool:
        """Entries of attached devices get it at once; those of attached PASIDs do not."""
        if self.force_snooping:
            return True
        if not self._support_force_snooping():
            return False
        self.force_snooping = True
        for info in self.devices:
            pasid_entries.setup_page_snoop_control(info, IOMMU_NO_PASID)
        return True
