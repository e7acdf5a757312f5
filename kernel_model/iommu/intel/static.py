"""The two domains without tables, and taking a device out of whatever it is in.

Mirrors blocking_domain, identity_domain and device_block_translation() of drivers/iommu/intel/iommu.c at 7.3. Blocked
is no entry at all, in legacy mode no context entry, in scalable mode no PASID-table entry.
"""

from __future__ import annotations

import errno

from fakedev.vtd import entries
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import IOMMU_DOMAIN_BLOCKED, IOMMU_DOMAIN_IDENTITY, IOMMU_NO_PASID, Device, Domain
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.context import context_clear, context_set
from kernel_model.iommu.intel.device import info_of
from kernel_model.iommu.intel.dmar import FLPT_DEFAULT_DID


def block_translation(device: Device) -> None:
    """device_block_translation(): take the entry away, so that every request without a PASID is refused."""
    info = info_of(device)
    if not info.attached:
        return
    domain = info.domain
    if domain is not None:
        domain.unassign_tags(info, IOMMU_NO_PASID)
    if info.unit.scalable:
        pasid_entries.tear_down_entry(info, IOMMU_NO_PASID)
    else:
        context_clear(info)
        info.disable_ats()
    info.attached = False
    if domain is not None:
        domain.devices.remove(info)
        domain.detach_unit(info.unit)
        info.domain = None


def remove_dev_pasid(domain: Domain | None, device: Device, pasid: int) -> None:
    """domain_remove_dev_pasid(): forget that a PASID was in `domain`, if that keeps account of it."""
    if isinstance(domain, PasidUser):
        domain.remove_dev_pasid(device, pasid)


class PasidUser(Domain):
    """A domain that keeps account of the PASIDs that are attached to it: all but the two here."""

    takes_pasids = True

    def remove_dev_pasid(self, device: Device, pasid: int) -> None:
        """A PASID of the device is no longer in the domain."""
        raise KernelBug(f"{type(self).__name__} keeps no account of PASIDs")


class BlockedDomain(Domain):
    """No translation at all: nothing is present."""

    type = IOMMU_DOMAIN_BLOCKED
    takes_pasids = True

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        info = info_of(device)
        info.iopf_for_domain_remove(info.domain)
        block_translation(device)

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        info = info_of(device)
        pasid_entries.tear_down_entry(info, pasid)
        info.iopf_for_domain_remove(old)
        remove_dev_pasid(old, device, pasid)


class IdentityDomain(Domain):
    """Pass-through."""

    type = IOMMU_DOMAIN_IDENTITY
    takes_pasids = True

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        block_translation(device)
        info = info_of(device)
        info.iopf_for_domain_remove(old)
        if info.unit.scalable:
            pasid_entries.setup_pass_through(info, IOMMU_NO_PASID)
        else:
            context_set(info, entries.TT_PASS_THROUGH, 0, info.unit.msagaw, FLPT_DEFAULT_DID)
        info.attached = True

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """EOPNOTSUPP: the unit has no PASIDs; as `pasid.setup_pass_through`."""
        info = info_of(device)
        if not info.unit.pasid_supported:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no PASIDs")
        info.iopf_for_domain_replace(self, old)
        try:
            if old is not None:
                pasid_entries.tear_down_entry(info, pasid)
            pasid_entries.setup_pass_through(info, pasid)
        except KernelError:
            info.iopf_for_domain_replace(old, self)
            raise
        remove_dev_pasid(old, device, pasid)

    def iova_to_phys(self, iova: int) -> int | None:
        return iova
