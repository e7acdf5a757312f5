"""A device, or a PASID of it, goes from one domain of an SMMUv3 to another; and the domains that translate nothing.

Mirrors `arm_smmu_attach_prepare()` and `arm_smmu_attach_commit()` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at
7.3, with the static domains. Between the two a domain writes the device's entries. Left out: devices whose ATS is
always on.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import TYPE_CHECKING

from fakedev.smmuv3 import entries as e
from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.arm_smmu_v3 import invalidation
from kernel_model.iommu.arm_smmu_v3.entries import make_abort_ste, make_bypass_ste
from kernel_model.iommu.arm_smmu_v3.master import Master, Vmaster, master_of
from kernel_model.iommu.core import IOMMU_DOMAIN_BLOCKED, IOMMU_DOMAIN_IDENTITY, IOMMU_NO_PASID, Device, Domain
from kernel_model.iommu.io_pgfault import iopf_queue_add_device, iopf_queue_remove_device

if TYPE_CHECKING:
    from kernel_model.iommu.arm_smmu_v3.domain import PagingDomain


class TranslatingDomain(Domain):
    """A domain whose devices have to be told of changes (`to_smmu_domain_devices()` finds something)."""

    @property
    @abstractmethod
    def tracker(self) -> PagingDomain:
        """The paging domain that keeps the list of them: itself, or a nested domain's parent."""

    def make_vmaster(self, master: Master) -> Vmaster | None:
        """arm_smmu_attach_prepare_vmaster(): who the device is in a guest, if it is in one. ENOENT, ENOMEM."""
        return None


class Attach:
    """`struct arm_smmu_attach_state`: made once the new domain has taken the device on, before entries are written.

    `cd_needs_ats`: there is a CD table, whatever the domain; `disable_ats`: no ATS, whatever the device can. ENOMEM.
    EINVAL: the domain enforces cache coherency, and the device's root complex does not. Those of `make_vmaster`. After
    an error nothing has changed.
    """

    def __init__(
        self,
        master: Master,
        new: Domain,
        old: Domain | None,
        ssid: int,
        *,
        cd_needs_ats: bool = False,
        disable_ats: bool = False,
    ) -> None:
        self.master = master
        self.ssid = ssid
        self._old = old if isinstance(old, TranslatingDomain) else None
        self._vmaster: Vmaster | None = None
        translating = new if isinstance(new, TranslatingDomain) else None
        self.ats_enabled = (translating is not None or cd_needs_ats) and not disable_ats and master.ats_supported()
        if translating is not None:
            self._vmaster = translating.make_vmaster(master)
            self._take_on(translating)
        if master.ats_enabled and not self.ats_enabled:
            master.disable_ats()

    def _take_on(self, new: TranslatingDomain) -> None:
        if injecting:
            kmalloc("struct arm_smmu_master_domain")
        master, tracker = self.master, new.tracker
        if tracker.enforces_cache_coherency and not master.canwbs:
            raise KernelError(errno.EINVAL, f"{master.device.name} may bypass caches")
        if new.iopf_handler is not None and master.stall_enabled:
            if not master.iopf_refcount:
                iopf_queue_add_device(master.smmu.iopf, master.device)
            master.iopf_refcount += 1
        tracker.masters.append((master, self.ssid))
        tracker.invs.merge(tracker.receivers(master, self.ssid, self.ats_enabled))

    def commit(self) -> None:
        """arm_smmu_attach_commit(): the guest's name for the device, device TLBs, then the old domain forgets it."""
        master = self.master
        master.vmaster = self._vmaster
        if self.ats_enabled and not master.ats_enabled:
            master.enable_ats()
        elif self.ats_enabled:
            master.atc_inv(self.ssid)
        elif master.ats_enabled:
            master.atc_inv(IOMMU_NO_PASID)
        if self._old is not None:
            leave(self._old, master, self.ssid)
        master.ats_enabled = self.ats_enabled


def leave(old: TranslatingDomain, master: Master, ssid: int) -> None:
    """arm_smmu_remove_master_domain() and arm_smmu_install_old_domain_invs(): ATS is still as it was in `old`."""
    tracker = old.tracker
    tracker.masters.remove((master, ssid))
    if old.iopf_handler is not None and master.stall_enabled:
        master.iopf_refcount -= 1
        if not master.iopf_refcount:
            iopf_queue_remove_device(master.smmu.iopf, master.device)
    for inv in tracker.invs.unref(tracker.receivers(master, ssid, master.ats_enabled)):
        if inv.kind in (invalidation.S1_ASID, invalidation.S2_VMID):
            master.smmu.cmdq.issue([invalidation.whole(inv)])


def _attach_ste(device: Device, domain: Domain, old: Domain | None, ste: list[int], s1dss: int) -> None:
    """arm_smmu_attach_dev_ste(): `ste` without stage 1, or the CD table with `s1dss` while PASIDs use it."""
    master = master_of(device)
    master.vmaster = None
    pasids = bool(master.used_ssids)
    state = Attach(master, domain, old, IOMMU_NO_PASID, cd_needs_ats=pasids)
    master.install_ste(master.cdtable_ste(state.ats_enabled, s1dss) if pasids else ste)
    state.commit()
    master.clear_cd(IOMMU_NO_PASID)


class BlockedDomain(Domain):
    """Every transaction is refused, of a PASID or without."""

    type = IOMMU_DOMAIN_BLOCKED
    takes_pasids = True

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        _attach_ste(device, self, old, make_abort_ste(), e.S1DSS_TERMINATE)

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """arm_smmu_blocking_set_dev_pasid(); the last PASID takes the CD table out of the STE, if nothing else is."""
        master = master_of(device)
        master.clear_cd(pasid)
        if master.ats_enabled:
            master.atc_inv(pasid)
        if isinstance(old, TranslatingDomain):
            leave(old, master, pasid)
        domain = device.group.domain if device.group is not None else None
        if not master.used_ssids and isinstance(domain, BlockedDomain | IdentityDomain):
            domain.attach_dev(device, domain)


class IdentityDomain(Domain):
    """Untranslated."""

    type = IOMMU_DOMAIN_IDENTITY

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        _attach_ste(device, self, old, make_bypass_ste(master_of(device).options), e.S1DSS_BYPASS)

    def iova_to_phys(self, iova: int) -> int | None:
        return iova
