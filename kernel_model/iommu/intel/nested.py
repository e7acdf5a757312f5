"""Nested domains: a guest's first-stage table on top of a second-stage domain, its guest-physical address space.

Mirrors drivers/iommu/intel/nested.c at 7.3. Hardly anything of the guest's words is looked at when such a domain is
made; what the unit cannot do shows when a device is attached, and an address that is no table's reaches the PASID-table
entry as it is, bits of other fields included. A nested domain has a domain id of its own; its parent has cache tags of
that id, so that what the parent unmaps goes from the nested translations, too.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING

from fakedev.vtd import entries
from kernel_model.errors import KernelError
from kernel_model.iommu.core import IOMMU_DOMAIN_NESTED, IOMMU_NO_PASID, Device, Domain
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.cache import CacheTags
from kernel_model.iommu.intel.device import DeviceInfo, info_of
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.domain import DmarDomain, alloc_dmar_domain
from kernel_model.iommu.intel.second_stage import SecondStageDomain
from kernel_model.iommu.intel.static import block_translation
from uapi.cstruct import offsetofend
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
    IOMMU_VTD_INV_FLAGS_LEAF,
    IOMMU_VTD_S1_EAFE,
    IOMMU_VTD_S1_SRE,
    IOMMU_VTD_S1_WPE,
    iommu_hwpt_vtd_s1,
    iommu_hwpt_vtd_s1_invalidate,
)

if TYPE_CHECKING:
    from kernel_model.iommu.intel.iommu import IntelIommu
    from kernel_model.iommufd.user_data import UserData, UserDataArray

_DATA_MIN = offsetofend(iommu_hwpt_vtd_s1, "__reserved")
_ENTRY_MIN = offsetofend(iommu_hwpt_vtd_s1_invalidate, "__reserved")
_UNPACK = Struct("<QQII").iter_unpack
_U64_MAX = (1 << 64) - 1
#: Levels of a first stage by the width of its addresses.
_LEVELS = {48: 4, 57: 5}


class NestedDomain(DmarDomain):
    """A `struct dmar_domain` of a guest. `s2_domain` translates what the guest's table gives."""

    type = IOMMU_DOMAIN_NESTED

    def __init__(self, owner: IntelIommu, s2_domain: SecondStageDomain, s1_cfg: iommu_hwpt_vtd_s1) -> None:
        alloc_dmar_domain()
        super().__init__(owner, CacheTags(by_pasid=True))
        self.s2_domain = s2_domain
        self._s1 = _stage1(s1_cfg)
        s2_domain.s1_domains.insert(0, self)

    @classmethod
    def alloc(cls, owner: IntelIommu, unit: IntelUnit, parent: Domain, flags: int, data: UserData) -> NestedDomain:
        """intel_iommu_domain_alloc_nested(). EOPNOTSUPP: no nesting, flags, another vendor's data; EINVAL: `parent` is
        none for nesting, or the data's length; EFAULT; ENOMEM."""
        if not unit.nested_supported or flags & ~IOMMU_HWPT_ALLOC_PASID:
            raise KernelError(errno.EOPNOTSUPP, f"nested with flags {flags:#x}")
        if data.type != IOMMU_HWPT_DATA_VTD_S1:
            raise KernelError(errno.EOPNOTSUPP, f"data type {data.type:#x}")
        if not isinstance(parent, SecondStageDomain) or not parent.nested_parent:
            raise KernelError(errno.EINVAL, "the parent is none for nesting")
        return cls(owner, parent, data.copy_from(iommu_hwpt_vtd_s1, IOMMU_HWPT_DATA_VTD_S1, _DATA_MIN))

    # -- attachment --------------------------------------------------------------------------------------------------

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """intel_nested_attach_dev(). EINVAL: the unit cannot do the parent's or the guest's stage; ENODEV: no page
        requests, or no page for a PASID table; ENOSPC; ENOMEM. After an error the device is blocked.

        The old domain's claim on page faults is not given up, as the kernel does not.
        """
        block_translation(device)
        info = info_of(device)
        self.check_compatible(info.unit)
        self.attach_unit(info.unit)
        try:
            self.assign_tags(info, IOMMU_NO_PASID)
            try:
                info.iopf_for_domain_set(self)
                try:
                    self.setup(info, IOMMU_NO_PASID)
                except KernelError:
                    info.iopf_for_domain_remove(self)
                    raise
            except KernelError:
                self.unassign_tags(info, IOMMU_NO_PASID)
                raise
        except KernelError:
            self.detach_unit(info.unit)
            raise
        info.domain = self
        info.attached = True
        self.devices.insert(0, info)

    def check_compatible(self, unit: IntelUnit) -> None:
        self.s2_domain.check_compatible(unit)

    def setup(self, info: DeviceInfo, pasid: int) -> None:
        s2_domain = self.s2_domain
        pasid_entries.setup_nested(
            info,
            pasid,
            self.domain_id(info.unit),
            self._s1,
            s2_domain.table.root,
            s2_domain.table.top_level - 1,
            snoop=s2_domain.force_snooping,
            dirty=s2_domain.dirty_tracking,
        )

    def assign_tags(self, info: DeviceInfo, pasid: int) -> None:
        """For itself, and for the parent under the same domain id."""
        did = self.domain_id(info.unit)
        self.cache_tags.assign_domain(info, did, pasid)
        try:
            self.s2_domain.cache_tags.assign_domain(info, did, pasid, nesting=True)
        except KernelError:
            self.cache_tags.unassign_domain(info, did, pasid)
            raise

    def unassign_tags(self, info: DeviceInfo, pasid: int) -> None:
        did = self.domain_id(info.unit)
        self.cache_tags.unassign_domain(info, did, pasid)
        self.s2_domain.cache_tags.unassign_domain(info, did, pasid, nesting=True)

    def free(self) -> None:
        self.s2_domain.s1_domains.remove(self)

    # -- invalidation ------------------------------------------------------------------------------------------------

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """intel_nested_cache_invalidate_user(): entry by entry, up to the first that is wrong.

        EINVAL: data of another vendor, even without entries. For each entry: EINVAL by its length; EFAULT; EOPNOTSUPP
        flags or the reserved word; EINVAL an address off a page, or one other than 0 with all pages. One without pages
        flushes the aligned block around its address.
        """
        done = 0
        try:
            if array.type != IOMMU_HWPT_INVALIDATE_DATA_VTD_S1:
                raise KernelError(errno.EINVAL, f"data type {array.type:#x}")
            for block in array.batches(iommu_hwpt_vtd_s1_invalidate, IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, _ENTRY_MIN):
                for address, npages, flags, reserved in _UNPACK(block):
                    if flags & ~IOMMU_VTD_INV_FLAGS_LEAF or reserved:
                        raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x} of an entry")
                    if address & 4095 or (npages == _U64_MAX and address):
                        raise KernelError(errno.EINVAL, f"address {address:#x} of an entry")
                    last = address + (npages << 12) - 1 & _U64_MAX
                    self.cache_tags.flush_range(address, last, flags & IOMMU_VTD_INV_FLAGS_LEAF)
                    done += 1
        finally:
            array.entry_num = done


def _stage1(s1_cfg: iommu_hwpt_vtd_s1) -> pasid_entries.Stage1Config:
    """The guest's words as fields of a PASID-table entry; 0 levels for a width that is none."""
    flags = s1_cfg.flags
    bits = entries.PASID_EAFE if flags & IOMMU_VTD_S1_EAFE else 0
    if flags & IOMMU_VTD_S1_SRE:
        bits |= entries.PASID_SRE | (entries.PASID_WPE if flags & IOMMU_VTD_S1_WPE else 0)
    return pasid_entries.Stage1Config(s1_cfg.pgtbl_addr, _LEVELS.get(s1_cfg.addr_width, 0), bits)
