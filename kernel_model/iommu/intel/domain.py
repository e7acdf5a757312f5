"""Domains with a page table: who is attached under which domain id, and keeping caches and table in step.

Mirrors `struct dmar_domain` and its attachment in drivers/iommu/intel/iommu.c at 7.3, for both stages; what differs
between them is in first_stage.py and second_stage.py. A unit knows a domain by an id, as long as a device or a PASID
behind it is attached. Left out: SVA's domains.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import IOMMU_NO_PASID, IOMMU_READ, IOMMU_WRITE, Device, Domain
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.cache import CacheTags
from kernel_model.iommu.intel.device import DeviceInfo, info_of
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.static import PasidUser, block_translation, remove_dev_pasid
from kernel_model.iommu.pgtable import PageTable

if TYPE_CHECKING:
    from kernel_model.iommu.intel.iommu import IntelIommu


def alloc_dmar_domain() -> None:
    """The memory for a `struct dmar_domain`, which a driver asks for before it makes a table. ENOMEM."""
    if injecting:
        kmalloc("struct dmar_domain")


class DmarDomain(PasidUser):
    """`struct dmar_domain`: what is attached to it, of any kind.

    `takes_pasids` is the driver's, whatever the unit can: a device without PASIDs never gets to `set_dev_pasid`.
    """

    def __init__(self, owner: IntelIommu, cache_tags: CacheTags) -> None:
        super().__init__(owner)
        self.cache_tags = cache_tags
        #: Those whose requests without a PASID it translates, the newest first; and the PASIDs.
        self.devices: list[DeviceInfo] = []
        self.dev_pasids: list[tuple[DeviceInfo, int]] = []
        #: No-snoop requests snoop, too (`enforce_cache_coherency`).
        self.force_snooping = False
        #: unit -> [domain id, users] (`iommu_array`).
        self._ids: dict[IntelUnit, list[int]] = {}

    @abstractmethod
    def check_compatible(self, unit: IntelUnit) -> None:
        """paging_domain_compatible(). EINVAL: the unit cannot do what the domain was made for."""

    @abstractmethod
    def setup(self, info: DeviceInfo, pasid: int) -> None:
        """Have the hardware translate a PASID (IOMMU_NO_PASID: requests without) by the table. The unit's errnos."""

    # -- domain ids --------------------------------------------------------------------------------------------------

    def domain_id(self, unit: IntelUnit) -> int:
        """The domain id under which `unit` knows the domain."""
        return self._ids[unit][0]

    def attach_unit(self, unit: IntelUnit) -> None:
        """domain_attach_iommu(): one user of the domain id more. ENOSPC: the unit has none left; ENOMEM."""
        if injecting:
            kmalloc("struct iommu_domain_info")
        entry = self._ids.get(unit)
        if entry is None:
            did = unit.alloc_domain_id()
            if did is None:
                raise KernelError(errno.ENOSPC, "the unit has no free domain id")
            entry = self._ids[unit] = [did, 0]
        entry[1] += 1

    def detach_unit(self, unit: IntelUnit) -> None:
        """domain_detach_iommu(): one user of the domain id less."""
        entry = self._ids[unit]
        entry[1] -= 1
        if not entry[1]:
            unit.domain_ids.remove(entry[0])
            del self._ids[unit]

    def assign_tags(self, info: DeviceInfo, pasid: int) -> None:
        """cache_tag_assign_domain(). ENOMEM."""
        self.cache_tags.assign_domain(info, self.domain_id(info.unit), pasid)

    def unassign_tags(self, info: DeviceInfo, pasid: int) -> None:
        """cache_tag_unassign_domain()."""
        self.cache_tags.unassign_domain(info, self.domain_id(info.unit), pasid)

    # -- PASIDs ------------------------------------------------------------------------------------------------------

    def add_dev_pasid(self, info: DeviceInfo, pasid: int) -> None:
        """domain_add_dev_pasid(): a PASID of the device is about to be in the domain. As `attach_unit`."""
        if injecting:
            kmalloc("struct dev_pasid_info")
        self.attach_unit(info.unit)
        try:
            self.assign_tags(info, pasid)
        except KernelError:
            self.detach_unit(info.unit)
            raise
        self.dev_pasids.insert(0, (info, pasid))

    def remove_dev_pasid(self, device: Device, pasid: int) -> None:
        info = info_of(device)
        self.dev_pasids.remove((info, pasid))
        self.unassign_tags(info, pasid)
        self.detach_unit(info.unit)

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """intel_iommu_set_dev_pasid(). EOPNOTSUPP: the unit has no PASIDs; else as `attach_dev`.

        The PASID's entry is torn down before the new one is there: until then its requests fault.
        """
        info = info_of(device)
        if not info.unit.pasid_supported:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no PASIDs")
        self.check_compatible(info.unit)
        self.add_dev_pasid(info, pasid)
        try:
            info.iopf_for_domain_replace(self, old)
            try:
                if old is not None:
                    pasid_entries.tear_down_entry(info, pasid)
                self.setup(info, pasid)
            except KernelError:
                info.iopf_for_domain_replace(old, self)
                raise
        except KernelError:
            self.remove_dev_pasid(device, pasid)
            raise
        remove_dev_pasid(old, device, pasid)


class PagingDomain(DmarDomain):
    """A domain with a table of the kernel's.

    `iotlb_sync_map`: new mappings must be told to the hardware, too.
    """

    def __init__(self, owner: IntelIommu, table: PageTable, cache_tags: CacheTags, iotlb_sync_map: bool) -> None:
        super().__init__(owner, cache_tags)
        self._always = owner.always
        self._pages = owner.pages
        self.table = table
        self.aperture_end = (1 << table.address_bits) - 1
        self.iotlb_sync_map = iotlb_sync_map

    # -- attachment --------------------------------------------------------------------------------------------------

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """intel_iommu_attach_device(). EINVAL: incompatible unit; ENODEV: it is to report page requests, and the device
        makes none, or there is no page for a PASID table; ENOSPC: no domain id is left; ENOMEM.

        After an error the device is blocked; the core moves it back.
        """
        block_translation(device)
        info = info_of(device)
        self.check_compatible(info.unit)
        info.iopf_for_domain_replace(self, old)
        try:
            self._attach(info)
        except KernelError:
            info.iopf_for_domain_replace(old, self)
            raise

    def _attach(self, info: DeviceInfo) -> None:
        """dmar_domain_attach_device()."""
        self.attach_unit(info.unit)
        info.domain = self
        info.attached = True
        self.devices.insert(0, info)
        try:
            self.setup(info, IOMMU_NO_PASID)
            self.assign_tags(info, IOMMU_NO_PASID)
        except KernelError:
            block_translation(info.device)
            raise

    # -- mappings ----------------------------------------------------------------------------------------------------

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap)

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap & -self.pgsize_bitmap)

    def _map(self, iova: int, pa: int, length: int, prot: int, sizes: int) -> None:
        if prot & IOMMU_WRITE:
            prot |= self._always & IOMMU_READ
        freed = self.table.map(iova, pa, length, prot, sizes)
        if freed:
            self.cache_tags.flush_range(iova, iova + length - 1)
            self._free(freed)
        if self.iotlb_sync_map:
            self.cache_tags.flush_range_np(iova, iova + length - 1)

    def unmap(self, iova: int, length: int) -> int:
        unmapped, freed = self.table.unmap(iova, length)
        if unmapped:
            self.cache_tags.flush_range(iova, iova + unmapped - 1, hint=not freed)
        self._free(freed)
        return unmapped

    def _free(self, tables: list[int]) -> None:
        for table in tables:
            self._pages.free(table)

    def iova_to_phys(self, iova: int) -> int | None:
        return self.table.iova_to_phys(iova)

    def _support_force_snooping(self) -> bool:
        """domain_support_force_snooping(): every unit in front of an attached device has snoop control."""
        return all(info.unit.caps.snoop_control for info in self.devices)

    def free(self) -> None:
        if self.devices or self.dev_pasids:
            raise KernelBug("a domain is freed while a device is attached")
        self.table.free()
