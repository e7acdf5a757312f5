"""The VT-d driver: domains with second-stage tables, context entries, and what iommufd asks of a vendor.

Mirrors drivers/iommu/intel/iommu.c at 7.3 in legacy mode, in names, checks and the order of table writes and
invalidations. Left out: scalable mode (first stage, PASIDs, nesting, dirty tracking: EOPNOTSUPP here, as on a legacy
unit), ATS, reserved memory regions of the firmware (the machines have none), quirks of chipsets.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.memory import ADDRESS_BITS
from fakedev.pgtable.vtd_ss import SS_SNP, VtdSecondStage
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_ENFORCE_CACHE_COHERENCY,
    IOMMU_DOMAIN_BLOCKED,
    IOMMU_DOMAIN_IDENTITY,
    IOMMU_READ,
    IOMMU_RESV_MSI,
    IOMMU_WRITE,
    Device,
    Domain,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.intel.cache import CacheTags
from kernel_model.iommu.intel.dmar import FLPT_DEFAULT_DID, IntelUnit
from kernel_model.iommu.pgtable import PageTable
from uapi.iommufd import (
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.user_data import UserData


_IOAPIC_START, _IOAPIC_LENGTH = 0xFEE0_0000, 0x10_0000
_SECOND_STAGE_FLAGS = IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_PASID


class DeviceInfo:
    """`struct device_domain_info`: what the driver knows of a device."""

    __slots__ = ("attached", "device", "domain", "rid", "unit")

    def __init__(self, device: Device, unit: IntelUnit, rid: int) -> None:
        self.device = device
        self.unit = unit
        self.rid = rid
        self.domain: SecondStageDomain | None = None
        #: A context entry is present for it.
        self.attached = False


def _info(device: Device) -> DeviceInfo:
    info = device.priv
    if not isinstance(info, DeviceInfo):
        raise KernelBug(f"{device.name} is not behind a VT-d unit")
    return info


def block_translation(device: Device) -> None:
    """device_block_translation(): take the context entry away, so that every DMA of the device is refused."""
    info = _info(device)
    if not info.attached:
        return
    domain = info.domain
    if domain is not None:
        domain.cache_tags.unassign(info.unit, domain.domain_id(info.unit))
    _context_clear(info)
    info.attached = False
    if domain is not None:
        domain.devices.remove(info)
        domain.detach_unit(info.unit)
        info.domain = None


def _context_clear(info: DeviceInfo) -> None:
    """domain_context_clear_one(): not present first, then the caches, then the rest of the entry."""
    unit, rid = info.unit, info.rid
    address = unit.context_address(rid, allocate=False)
    if address is None:
        return
    low, high = unit.read_entry(address)
    did = entries.context_did(high)
    unit.write_entry(address, (low & ~entries.ENTRY_PRESENT, high))
    unit.flush_context(did, rid, qi.SELECTIVE)
    unit.flush_iotlb_domain(did)
    unit.write_entry(address, (0, 0))


def _context_set(info: DeviceInfo, tt: int, table: int, aw: int, did: int) -> None:
    """domain_context_mapping_one() and context_setup_pass_through(). ENOMEM."""
    unit = info.unit
    address = unit.context_address(info.rid, allocate=True)
    if address is None or unit.read_entry(address)[0] & entries.ENTRY_PRESENT:
        return
    unit.write_entry(address, entries.context_entry(tt, table, aw, did))
    unit.context_present_cache_flush(did, info.rid)


class BlockedDomain(Domain):
    """No translation at all: the context entry is not present."""

    type = IOMMU_DOMAIN_BLOCKED
    takes_pasids = True

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        block_translation(device)


class IdentityDomain(Domain):
    """Pass-through."""

    type = IOMMU_DOMAIN_IDENTITY

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        block_translation(device)
        info = _info(device)
        widest = info.unit.caps.sagaw.bit_length() - 1
        _context_set(info, entries.TT_PASS_THROUGH, 0, widest, FLPT_DEFAULT_DID)
        info.attached = True

    def iova_to_phys(self, iova: int) -> int | None:
        return iova


class SecondStageDomain(Domain):
    """`struct dmar_domain` with a second-stage table.

    `takes_pasids` is the driver's, whatever the unit can: a device without PASIDs never gets to `set_dev_pasid`.
    """

    takes_pasids = True

    def __init__(self, owner: IntelIommu, unit: IntelUnit, address_bits: int, top_level: int) -> None:
        if injecting:
            kmalloc("struct dmar_domain")
        super().__init__(owner)
        self._always = owner.always
        caps = unit.caps
        fmt = VtdSecondStage(ADDRESS_BITS, caps.sllps, caps.snoop_control, caps.device_tlb)
        self._pages = owner.pages
        self.table = PageTable(fmt, owner.memory, owner.pages, top_level, address_bits)
        self.pgsize_bitmap = 1 << 12 | (caps.sllps & 1) << 21 | (caps.sllps >> 1 & 1) << 30
        self.aperture_end = (1 << address_bits) - 1
        self.iotlb_sync_map = caps.write_buffer_flush or caps.caching_mode
        self.force_snooping = False
        self.devices: list[DeviceInfo] = []
        self.cache_tags = CacheTags()
        #: unit -> [domain id, users] (`iommu_array`).
        self._ids: dict[IntelUnit, list[int]] = {}

    # -- attachment --------------------------------------------------------------------------------------------------

    def domain_id(self, unit: IntelUnit) -> int:
        """The domain id under which `unit` knows the domain."""
        return self._ids[unit][0]

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """intel_iommu_attach_device(). EINVAL: incompatible unit; ENODEV: it is to report page requests, and no device
        of the model makes any; ENOSPC: no domain id is left; ENOMEM.

        After an error the device is blocked; the core moves it back.
        """
        block_translation(device)
        info = _info(device)
        unit = info.unit
        self._check_compatible(unit)
        if self.iopf_handler is not None:
            raise KernelError(errno.ENODEV, f"{device.name} makes no page requests")
        if injecting:
            kmalloc("struct iommu_domain_info")
        entry = self._ids.get(unit)
        if entry is None:
            did = unit.alloc_domain_id()
            if did is None:
                raise KernelError(errno.ENOSPC, "the unit has no free domain id")
            entry = self._ids[unit] = [did, 0]
        entry[1] += 1
        info.domain = self
        info.attached = True
        self.devices.append(info)
        try:
            _context_set(info, entries.TT_MULTI_LEVEL, self.table.root, self.table.top_level - 1, entry[0])
            if injecting:
                kmalloc("struct cache_tag")
        except KernelError:
            self.cache_tags.assign(unit, entry[0])  # which block_translation() takes away again
            block_translation(device)
            raise
        self.cache_tags.assign(unit, entry[0])

    def detach_unit(self, unit: IntelUnit) -> None:
        """domain_detach_iommu(): one user of the domain id less."""
        entry = self._ids[unit]
        entry[1] -= 1
        if not entry[1]:
            unit.domain_ids.remove(entry[0])
            del self._ids[unit]

    def _check_compatible(self, unit: IntelUnit) -> None:
        caps = unit.caps
        sizes = 1 << 12 | (caps.sllps & 1) << 21 | (caps.sllps >> 1 & 1) << 30
        if caps.mgaw < self.table.address_bits or not caps.sagaw >> self.table.top_level - 1 & 1:
            raise KernelError(errno.EINVAL, "the unit does not have the domain's address width")
        if self.pgsize_bitmap & ~sizes:
            raise KernelError(errno.EINVAL, "the unit does not have the domain's page sizes")
        if (caps.write_buffer_flush or caps.caching_mode) and not self.iotlb_sync_map:
            raise KernelError(errno.EINVAL, "the unit wants to hear of new mappings")
        if self.force_snooping and not caps.snoop_control:
            raise KernelError(errno.EINVAL, "the unit has no snoop control")

    # -- mappings ----------------------------------------------------------------------------------------------------

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap)

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap & -self.pgsize_bitmap)

    def _map(self, iova: int, pa: int, length: int, prot: int, sizes: int) -> None:
        if prot & IOMMU_WRITE:
            prot |= self._always
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

    def enforce_cache_coherency(self) -> bool:
        if not all(info.unit.caps.snoop_control for info in self.devices):
            return False
        self.table.extra_leaf_bits |= SS_SNP
        self.force_snooping = True
        return True

    def free(self) -> None:
        if self.devices:
            raise KernelBug("a domain is freed while a device is attached")
        self.table.free()


class IntelIommu(IommuDriver):
    """`intel_iommu_ops`, for one unit."""

    name = "intel-iommu"
    has_nested = True

    def __init__(self, unit: IntelUnit, number: int = 0, *, write_only: bool = True) -> None:
        self.unit = unit
        #: Older drivers set bit 0 in every entry: "present" in a first stage, but "may be read" in a second.
        self.always = 0 if write_only else IOMMU_READ
        self.sysfs_name = f"dmar{number}"
        self.pages = unit.pages
        self.memory = unit.memory
        self.blocked_domain = BlockedDomain(self)
        self.identity_domain = IdentityDomain(self)

    def sysfs_attributes(self) -> dict[str, Callable[[], str]]:
        unit = self.unit
        return {
            "intel-iommu/version": lambda: f"{unit.version >> 4 & 0xF}:{unit.version & 0xF}",
            "intel-iommu/address": lambda: f"{unit.base:x}",
            "intel-iommu/cap": lambda: f"{unit.caps.cap:x}",
            "intel-iommu/ecap": lambda: f"{unit.caps.ecap:x}",
            "intel-iommu/domains_supported": lambda: str(unit.caps.ndoms),
            "intel-iommu/domains_used": lambda: str(len(unit.domain_ids)),
        }

    def probe_device(self, device: Device, rid: int) -> None:
        device.priv = DeviceInfo(device, self.unit, rid)

    def capable(self, device: Device, cap: int) -> bool:
        if cap == IOMMU_CAP_CACHE_COHERENCY:
            return True
        if cap == IOMMU_CAP_ENFORCE_CACHE_COHERENCY:
            return self.unit.caps.snoop_control
        return False

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        if wanted_type not in (IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_INTEL_VTD):
            raise KernelError(errno.EOPNOTSUPP, f"no hardware information of type {wanted_type}")
        caps = self.unit.caps
        flags = IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17
        return IOMMU_HW_INFO_TYPE_INTEL_VTD, struct.pack("<IIQQ", flags, 0, caps.cap, caps.ecap)

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        if user_data is not None:
            raise KernelError(errno.EOPNOTSUPP, "a paging domain takes no data")
        if flags & ~_SECOND_STAGE_FLAGS:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        if flags & IOMMU_HWPT_ALLOC_NEST_PARENT:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no nested translation")
        if flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no dirty bits")
        address_bits, top_level = second_stage_width(self.unit.caps.mgaw, self.unit.caps.sagaw)
        return SecondStageDomain(self, self.unit, address_bits, top_level)

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        return [ResvRegion(_IOAPIC_START, _IOAPIC_LENGTH, 0, IOMMU_RESV_MSI)]

    def device_isolated_msi(self, device: Device) -> bool:
        return self.unit.caps.interrupt_remapping


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
