"""The VT-d driver: what iommufd and the core ask of a vendor.

Mirrors `intel_iommu_ops` of drivers/iommu/intel/iommu.c at 7.3, in names, checks and the order of table writes and
invalidations. Domains are in first_stage.py, second_stage.py and static.py, the tables above them in context.py and
pasid.py. Left out: SVA, removing a device, quirks of chipsets.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.machine import Machine
from fakedev.pci import PCI_REVISION_ID
from kernel_model import pci_ats
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_DIRTY_TRACKING,
    IOMMU_CAP_ENFORCE_CACHE_COHERENCY,
    IOMMU_CAP_PCI_ATS_SUPPORTED,
    IOMMU_NO_PASID,
    IOMMU_READ,
    IOMMU_RESV_DIRECT,
    IOMMU_RESV_DIRECT_RELAXABLE,
    IOMMU_RESV_MSI,
    IOMMU_WRITE,
    Device,
    Domain,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.intel.cache import DEVTLB
from kernel_model.iommu.intel.context import setup_sm_context
from kernel_model.iommu.intel.device import DeviceInfo, info_of
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.first_stage import FirstStageDomain
from kernel_model.iommu.intel.nested import NestedDomain
from kernel_model.iommu.intel.pasid import PasidTable
from kernel_model.iommu.intel.second_stage import SecondStageDomain, second_stage_width
from kernel_model.iommu.intel.static import BlockedDomain, IdentityDomain
from uapi.iommufd import (
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
)

if TYPE_CHECKING:
    from kernel_model.iommu.io_pgfault import PageRequest
    from kernel_model.iommufd.user_data import UserData


_IOAPIC_START, _IOAPIC_LENGTH = 0xFEE0_0000, 0x10_0000
_SECOND_STAGE_FLAGS = IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_PASID
#: Classes whose reserved memory is for the firmware only: the USB controllers, and displays.
_CLASS_USB, _CLASS_DISPLAY = 0x0C03, 0x03


class IntelIommu(IommuDriver):
    """`intel_iommu_ops`, for one unit."""

    name = "intel-iommu"
    has_nested = True

    def __init__(self, unit: IntelUnit, machine: Machine, number: int = 0, *, write_only: bool = True) -> None:
        self.unit = unit
        self._machine = machine
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

    # -- devices -----------------------------------------------------------------------------------------------------

    def probe_device(self, device: Device, rid: int) -> None:
        """intel_iommu_probe_device(). In scalable mode the context entry is there from now on."""
        if self.unit.scalable and device.pci is not None:
            rid = device.pci.rid
        device.priv = info = DeviceInfo(device, self.unit, rid, self._machine)
        if self.unit.prq is not None and device.pci is not None and pci_ats.ats_supported(device.pci):
            self.unit.prq.devices[rid] = device
        if self.unit.scalable:
            info.pasid_table = PasidTable(info)
            setup_sm_context(info)

    def probe_finalize(self, device: Device) -> None:
        """intel_iommu_probe_finalize(): the services come on, with the default domain in place."""
        info = info_of(device)
        info.enable_pasid()
        if self.unit.scalable:
            info.enable_ats()
            if info.ats_enabled and info.domain is not None:
                did = info.domain.domain_id(self.unit)
                info.domain.cache_tags.assign(DEVTLB, info, did, IOMMU_NO_PASID)
        info.enable_pri()

    def page_response(self, device: Device, fault: PageRequest, code: int) -> None:
        if self.unit.prq is None:
            raise KernelBug(f"{self.sysfs_name} has no page requests")
        self.unit.prq.respond(info_of(device), fault, code)

    def capable(self, device: Device, cap: int) -> bool:
        if cap == IOMMU_CAP_CACHE_COHERENCY:
            return True
        if cap == IOMMU_CAP_ENFORCE_CACHE_COHERENCY:
            return self.unit.caps.snoop_control
        if cap == IOMMU_CAP_DIRTY_TRACKING:
            return self.unit.ssads_supported
        if cap == IOMMU_CAP_PCI_ATS_SUPPORTED:
            return info_of(device).ats_supported
        return False

    def max_pasids(self, device: Device) -> int:
        return min(info_of(device).function_pasids, self.unit.max_pasids)

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        if wanted_type not in (IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_INTEL_VTD):
            raise KernelError(errno.EOPNOTSUPP, f"no hardware information of type {wanted_type}")
        caps = self.unit.caps
        flags = IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17
        return IOMMU_HW_INFO_TYPE_INTEL_VTD, struct.pack("<IIQQ", flags, 0, caps.cap, caps.ecap)

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        """The firmware's reserved memory (RMRR) of the device or of a bridge above it, and the interrupts."""
        found = []
        function = device.pci
        if function is not None:
            concerned = {function.rid, *(bridge.rid for bridge in self._machine.root.upstream(function))}
            class_code = function.config_read(PCI_REVISION_ID, 4) >> 8
            harmless = class_code >> 8 == _CLASS_USB or class_code >> 16 == _CLASS_DISPLAY
            kind = IOMMU_RESV_DIRECT_RELAXABLE if harmless else IOMMU_RESV_DIRECT
            for start, last, rids in self._machine.reserved_memory:
                if concerned & set(rids):
                    found.append(ResvRegion(start, last - start + 1, IOMMU_READ | IOMMU_WRITE, kind))
        found.append(ResvRegion(_IOAPIC_START, _IOAPIC_LENGTH, 0, IOMMU_RESV_MSI))
        return sorted(found, key=lambda region: region.start)

    def device_isolated_msi(self, device: Device) -> bool:
        return self.unit.irq_remapping is not None

    # -- domains -----------------------------------------------------------------------------------------------------

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        """intel_iommu_domain_alloc_paging_flags(): the first stage if it can do what `flags` want."""
        unit = self.unit
        if user_data is not None:
            raise KernelError(errno.EOPNOTSUPP, "a paging domain takes no data")
        if unit.scalable and unit.caps.first_stage and not flags & ~IOMMU_HWPT_ALLOC_PASID:
            return FirstStageDomain(self, unit)
        if flags & ~_SECOND_STAGE_FLAGS:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        parent = bool(flags & IOMMU_HWPT_ALLOC_NEST_PARENT)
        dirty = bool(flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if parent and not unit.nested_supported:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no nested translation")
        if dirty and not unit.ssads_supported:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no dirty bits")
        if unit.scalable and not unit.caps.second_stage:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no second stage")
        address_bits, top_level = second_stage_width(unit.caps.mgaw, unit.caps.sagaw)
        return SecondStageDomain(self, unit, address_bits, top_level, nested_parent=parent, dirty=dirty)

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, user_data: UserData) -> Domain:
        return NestedDomain.alloc(self, self.unit, parent, flags, user_data)
