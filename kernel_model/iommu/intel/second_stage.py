"""Domains with a second-stage table: all of legacy mode, and in scalable mode what the first stage cannot do.

Mirrors the second-stage half of drivers/iommu/intel/iommu.c at 7.3: parents of nested domains and domains with dirty
tracking are of this stage.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from fakedev.memory import ADDRESS_BITS
from fakedev.pgtable.vtd_ss import SS_SNP, VtdSecondStage
from fakedev.vtd import entries
from kernel_model.errors import KernelError
from kernel_model.iommu.core import IOMMU_DIRTY_NO_CLEAR, IOMMU_NO_PASID, IOMMU_WRITE
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.cache import CacheTags
from kernel_model.iommu.intel.context import context_set
from kernel_model.iommu.intel.device import DeviceInfo
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.domain import DmarDomain, PagingDomain, alloc_dmar_domain
from kernel_model.iommu.pgtable import PageTable

if TYPE_CHECKING:
    from kernel_model.iommu.intel.iommu import IntelIommu
    from kernel_model.iommufd.iova_bitmap import IovaBitmap


def second_stage_width(mgaw: int, sagaw: int) -> tuple[int, int]:
    """compute_vasz_lg2_ss(): bits of an IOVA and the top level, the widest that both registers allow."""
    if mgaw > 48 and sagaw >= 1 << 3:
        return min(57, mgaw), 4
    if mgaw > 39 and sagaw >= 1 << 2:
        return min(48, mgaw), 3 + _ffs(sagaw >> 3)
    if mgaw > 30 and sagaw >= 1 << 1:
        return min(39, mgaw), 2 + _ffs(sagaw >> 2)
    raise KernelError(errno.EOPNOTSUPP, "the unit has no usable address width")


def _ffs(value: int) -> int:
    """The position of the lowest set bit counted from 1; 0 for 0."""
    return (value & -value).bit_length()


def _page_sizes(sllps: int) -> int:
    return 1 << 12 | (sllps & 1) << 21 | (sllps >> 1 & 1) << 30


def _walks_snoop(unit: IntelUnit) -> bool:
    """iommu_paging_structure_coherency()."""
    return unit.caps.walk_coherency if unit.scalable else bool(unit.caps.ecap & 1)


class SecondStageDomain(PagingDomain):
    """A `struct dmar_domain` whose table is the second stage.

    `nested_parent`: others will be nested on it. `dirty`: it may track what is written to.
    """

    def __init__(
        self,
        owner: IntelIommu,
        unit: IntelUnit,
        address_bits: int,
        top_level: int,
        *,
        nested_parent: bool = False,
        dirty: bool = False,
    ) -> None:
        alloc_dmar_domain()
        caps = unit.caps
        fmt = VtdSecondStage(ADDRESS_BITS, caps.sllps, caps.snoop_control, caps.device_tlb)
        table = PageTable(fmt, owner.memory, owner.pages, top_level, address_bits)
        super().__init__(owner, table, CacheTags(), caps.write_buffer_flush or caps.caching_mode)
        self.pgsize_bitmap = _page_sizes(caps.sllps)
        self._walk_snoop = _walks_snoop(unit)
        self.nested_parent = nested_parent
        self.dirty_ops = dirty
        #: Entries have dirty tracking on.
        self.dirty_tracking = False
        #: Those that are nested on it, the newest first.
        self.s1_domains: list[DmarDomain] = []

    def check_compatible(self, unit: IntelUnit) -> None:
        """paging_domain_compatible_second_stage()."""
        caps = unit.caps
        if self.dirty_ops and not unit.ssads_supported:
            raise KernelError(errno.EINVAL, "the unit has no dirty bits")
        if self.nested_parent and not unit.nested_supported:
            raise KernelError(errno.EINVAL, "the unit has no nested translation")
        if unit.scalable and not caps.second_stage:
            raise KernelError(errno.EINVAL, "the unit has no second stage")
        if self._walk_snoop and not _walks_snoop(unit):
            raise KernelError(errno.EINVAL, "the unit's walks do not snoop")
        if caps.mgaw < self.table.address_bits or not caps.sagaw >> self.table.top_level - 1 & 1:
            raise KernelError(errno.EINVAL, "the unit does not have the domain's address width")
        if self.pgsize_bitmap & ~_page_sizes(caps.sllps):
            raise KernelError(errno.EINVAL, "the unit does not have the domain's page sizes")
        if (caps.write_buffer_flush or caps.caching_mode) and not self.iotlb_sync_map:
            raise KernelError(errno.EINVAL, "the unit wants to hear of new mappings")
        if self.force_snooping and not caps.snoop_control:
            raise KernelError(errno.EINVAL, "the unit has no snoop control")

    def setup(self, info: DeviceInfo, pasid: int) -> None:
        """domain_setup_second_level(); in legacy mode domain_context_mapping()."""
        did, table, aw = self.domain_id(info.unit), self.table.root, self.table.top_level - 1
        if info.unit.scalable:
            pasid_entries.setup_second_level(info, pasid, did, table, aw, dirty=self.dirty_tracking)
        else:
            kind = entries.TT_DEV_IOTLB if info.ats_supported else entries.TT_MULTI_LEVEL
            context_set(info, kind, table, aw, did)
            info.enable_ats()

    def _map(self, iova: int, pa: int, length: int, prot: int, sizes: int) -> None:
        """EINVAL: a nested domain's parent takes no read-only mappings (erratum 772415 of some units)."""
        if self.nested_parent and not prot & IOMMU_WRITE:
            raise KernelError(errno.EINVAL, "a read-only mapping in a nesting parent")
        super()._map(iova, pa, length, prot, sizes)

    # -- dirty tracking ----------------------------------------------------------------------------------------------

    def set_dirty_tracking(self, enable: bool) -> None:
        """intel_iommu_set_dirty_tracking(): in the entries of all that is attached, here and to what is nested on it.

        EOPNOTSUPP: an entry without a second stage. After an error all are as they were.
        """
        if self.dirty_tracking == enable:
            return
        users: list[DmarDomain] = [self, *self.s1_domains]
        try:
            for user in users:
                _set_dirty_tracking(user, enable)
        except KernelError:
            for user in users:
                with contextlib.suppress(KernelError):
                    _set_dirty_tracking(user, not enable)
            raise
        self.dirty_tracking = enable

    def read_and_clear_dirty(self, iova: int, length: int, flags: int, bitmap: IovaBitmap | None) -> None:
        """What became clean is flushed, so that the next write to it is noted again."""
        clear = not flags & IOMMU_DIRTY_NO_CLEAR
        seen = self.table.read_and_clear_dirty(iova, length, clear, bitmap)
        if seen is not None and clear:
            self.cache_tags.flush_range(*seen, hint=1)

    def enforce_cache_coherency(self) -> bool:
        """Each leaf made from now on has a bit for it."""
        if not self._support_force_snooping():
            return False
        self.table.extra_leaf_bits |= SS_SNP
        self.force_snooping = True
        return True


def _set_dirty_tracking(domain: DmarDomain, enable: bool) -> None:
    """domain_set_dirty_tracking()."""
    for info in domain.devices:
        pasid_entries.setup_dirty_tracking(info, IOMMU_NO_PASID, enable)
    for info, pasid in domain.dev_pasids:
        pasid_entries.setup_dirty_tracking(info, pasid, enable)
