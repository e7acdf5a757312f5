"""A device behind a VT-d unit: what it can, and what of it is switched on.

Mirrors `struct device_domain_info` of drivers/iommu/intel/iommu.h and, of iommu.c at 7.3, what probe_device finds out
and what switches ATS, PASIDs, PRI and page faults on and off. Left out: virtual functions, devices whose device TLB has
to be flushed twice, the SATC table of the firmware.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.machine import Machine
from fakedev.pcie import PCI_EXP_TYPE_PCI_BRIDGE, PCI_EXP_TYPE_ROOT_PORT
from kernel_model import pci_ats
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import Device, Domain
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.io_pgfault import iopf_queue_add_device, iopf_queue_remove_device

if TYPE_CHECKING:
    from kernel_model.iommu.intel.domain import DmarDomain
    from kernel_model.iommu.intel.pasid import PasidTable

_PAGE_SHIFT = 12
#: As many page requests as the unit's queue holds.
PRQ_DEPTH = 0x10000 >> 5


class DeviceInfo:
    """`struct device_domain_info`. `rid` is the request id that its DMA carries."""

    def __init__(self, device: Device, unit: IntelUnit, rid: int, machine: Machine) -> None:
        self.device = device
        self.unit = unit
        self.rid = rid
        self._root = machine.root
        #: The domain of requests without a PASID: its own, not blocked or identity.
        self.domain: DmarDomain | None = None
        #: Requests without a PASID are not blocked.
        self.attached = False
        #: In scalable mode.
        self.pasid_table: PasidTable | None = None
        self.ats_supported = self.ats_enabled = False
        #: Invalidations that the device TLB takes at once; what the physical function of a throttled one is.
        self.ats_qdep = self.pfsid = 0
        #: PCI_PASID_EXEC and PCI_PASID_PRIV that the function has.
        self.pasid_features = 0
        self.pasid_supported = self.pasid_enabled = False
        self.pri_supported = self.pri_enabled = False
        #: PASIDs of the function, whatever the unit can.
        self.function_pasids = 0
        #: Attachments that take page faults.
        self.iopf_refcount = 0
        self._find_services(machine)

    def _find_services(self, machine: Machine) -> None:
        function, unit = self.device.pci, self.unit
        if function is None:
            return
        if unit.caps.device_tlb and pci_ats.ats_supported(function) and self._ats_allowed(machine):
            self.ats_supported = True
            self.ats_qdep = pci_ats.ats_queue_depth(function)
            if unit.caps.device_tlb_throttle:
                self.pfsid = function.rid
        try:
            self.function_pasids = pci_ats.max_pasids(function)
            features = pci_ats.pasid_features(function)
        except KernelError:
            pass  # it has none
        else:
            if unit.pasid_supported:
                self.pasid_supported, self.pasid_features = True, features
        if unit.scalable and self.ats_supported and unit.caps.page_request and unit.caps.page_request_drain:
            self.pri_supported = pci_ats.pri_supported(function)

    def _ats_allowed(self, machine: Machine) -> bool:
        """dmar_ats_supported(): it is integrated, or the firmware's ATSR lists its root port."""
        assert self.device.pci is not None
        for bridge in machine.root.upstream(self.device.pci):
            if bridge.express_type == PCI_EXP_TYPE_ROOT_PORT:
                return machine.atsr_all_ports
            if bridge.express_type in (None, PCI_EXP_TYPE_PCI_BRIDGE):
                return False
        return True

    # -- switching on and off ----------------------------------------------------------------------------------------

    def enable_pasid(self) -> None:
        """PASIDs come on before ATS, or the device's behaviour is undefined."""
        if self.pasid_supported and self.device.pci is not None:
            try:
                pci_ats.enable_pasid(self._root, self.device.pci, self.pasid_features)
            except KernelError:
                return
            self.pasid_enabled = True

    def enable_ats(self) -> None:
        """iommu_enable_pci_ats()."""
        if self.ats_supported and self.device.pci is not None and pci_ats.ats_page_aligned(self.device.pci):
            pci_ats.enable_ats(self.device.pci, _PAGE_SHIFT)
            self.ats_enabled = True

    def disable_ats(self) -> None:
        """iommu_disable_pci_ats()."""
        if self.ats_enabled and self.device.pci is not None:
            if pci_ats.ats_enabled(self.device.pci):  # a reset may have been before
                pci_ats.disable_ats(self.device.pci)
            self.ats_enabled = False

    def enable_pri(self) -> None:
        """iommu_enable_pci_pri(): if responses carry the PASID, or there are none."""
        function = self.device.pci
        if not self.ats_enabled or not self.pri_supported or function is None:
            return
        if self.pasid_enabled and not pci_ats.prg_resp_pasid_required(function):
            return
        try:
            pci_ats.reset_pri(function)
            pci_ats.enable_pri(function, PRQ_DEPTH)
        except KernelError:
            return
        self.pri_enabled = True

    # -- page faults -------------------------------------------------------------------------------------------------

    def enable_iopf(self) -> None:
        """intel_iommu_enable_iopf(). ENODEV: the device makes no page requests; ENOMEM."""
        if not self.pri_enabled:
            raise KernelError(errno.ENODEV, f"{self.device.name} makes no page requests")
        if not self.iopf_refcount:
            iopf_queue_add_device(self.unit.iopf_queue, self.device)
        self.iopf_refcount += 1

    def disable_iopf(self) -> None:
        """intel_iommu_disable_iopf()."""
        if not self.pri_enabled or not self.iopf_refcount:
            raise KernelBug(f"page faults of {self.device.name} are off already")
        self.iopf_refcount -= 1
        if not self.iopf_refcount:
            iopf_queue_remove_device(self.unit.iopf_queue, self.device)

    def iopf_for_domain_set(self, domain: Domain | None) -> None:
        """Take page faults if `domain` wants them. As `enable_iopf`."""
        if domain is not None and domain.iopf_handler is not None:
            self.enable_iopf()

    def iopf_for_domain_remove(self, domain: Domain | None) -> None:
        """`domain` wants them no longer."""
        if domain is not None and domain.iopf_handler is not None:
            self.disable_iopf()

    def iopf_for_domain_replace(self, new: Domain | None, old: Domain | None) -> None:
        """First the one, then the other. As `enable_iopf`."""
        self.iopf_for_domain_set(new)
        self.iopf_for_domain_remove(old)


def info_of(device: Device) -> DeviceInfo:
    """What the driver knows of a device that it has probed."""
    info = device.priv
    if not isinstance(info, DeviceInfo):
        raise KernelBug(f"{device.name} is not behind a VT-d unit")
    return info
