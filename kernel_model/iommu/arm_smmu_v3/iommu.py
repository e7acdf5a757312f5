"""The SMMUv3 driver: domains of both stages, attachment of devices and PASIDs, and what iommufd asks of a vendor.

Mirrors `arm_smmu_ops` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3, in names, checks and the order of entry
writes and invalidations, on a machine that the device tree describes. As there, reading and clearing dirty bits does
not flush the TLB: the gather that iommufd hands down has no page size, without which `arm_smmu_iotlb_sync()` returns.

Left out: vSMMUs (so a nest parent serves as a stage-2 domain only), SVA, the CPU's own page-size errata, enforcing
coherency (no root complex of the model promises what the driver asks of the firmware for that).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from fakedev.pci import RootComplex
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.arm_smmu_v3 import invalidation
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.entries import (
    make_abort_ste,
    make_bypass_ste,
    make_s1_cd,
    make_s2_domain_ste,
)
from kernel_model.iommu.arm_smmu_v3.invalidation import Inv, Invalidations
from kernel_model.iommu.arm_smmu_v3.master import Master
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_DEFERRED_FLUSH,
    IOMMU_CAP_DIRTY_TRACKING,
    IOMMU_CAP_NOEXEC,
    IOMMU_CAP_PCI_ATS_SUPPORTED,
    IOMMU_DIRTY_NO_CLEAR,
    IOMMU_DOMAIN_BLOCKED,
    IOMMU_DOMAIN_IDENTITY,
    IOMMU_MMIO,
    IOMMU_NO_PASID,
    IOMMU_NOEXEC,
    IOMMU_RESV_SW_MSI,
    IOMMU_WRITE,
    Device,
    Domain,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.io_pgfault import (
    IOMMU_PAGE_RESP_SUCCESS,
    PageRequest,
    iopf_queue_add_device,
    iopf_queue_remove_device,
)
from kernel_model.iommu.io_pgtable_arm import ArmPageTable, restrict_pgsizes, stage1_format, stage2_format
from kernel_model.iommu.pgtable import best_size
from uapi.iommufd import (
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
)

if TYPE_CHECKING:
    from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2
    from kernel_model.iommufd.iova_bitmap import IovaBitmap
    from kernel_model.iommufd.user_data import UserData

#: The window of IOVAs in which doorbells of interrupt controllers are mapped.
MSI_IOVA_BASE, MSI_IOVA_LENGTH = 0x800_0000, 0x10_0000
#: Bits of a virtual address of the kernel, which a stage-1 domain has no more of.
_VA_BITS = 48
_STAGE1_FLAGS = (
    0,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_PASID,
)


def _master(device: Device) -> Master:
    master = device.priv
    if not isinstance(master, Master):
        raise KernelBug(f"{device.name} is not behind an SMMUv3")
    return master


def _lowest_free(taken: set[int], bits: int) -> int | None:
    for number in range(1, 1 << bits):
        if number not in taken:
            taken.add(number)
            return number
    return None


class _Attach:
    """`struct arm_smmu_attach_state`: one device, or PASID of it, goes from domain to domain.

    Made after the new domain took the device on; then the entries are written; then `commit`. EINVAL, ENOMEM.
    """

    def __init__(
        self, master: Master, new: Domain, old: Domain | None, ssid: int, *, cd_needs_ats: bool = False
    ) -> None:
        self.master = master
        self.ssid = ssid
        self._old = old if isinstance(old, PagingDomain) else None
        paging = new if isinstance(new, PagingDomain) else None
        self.ats_enabled = (paging is not None or cd_needs_ats) and master.ats_supported()
        self._old_invs = self._old.receivers(master, ssid, master.ats_enabled) if self._old is not None else []
        if paging is not None:
            if injecting:
                kmalloc("struct arm_smmu_master_domain")
            paging.take_on(master, ssid)
            paging.invs.merge(paging.receivers(master, ssid, self.ats_enabled))
        if master.ats_enabled and not self.ats_enabled:
            master.disable_ats()

    def commit(self) -> None:
        """arm_smmu_attach_commit(): device TLBs, then the old domain forgets the device."""
        master = self.master
        if self.ats_enabled and not master.ats_enabled:
            master.enable_ats()
        elif self.ats_enabled:
            master.atc_inv(self.ssid)
        elif master.ats_enabled:
            master.atc_inv(IOMMU_NO_PASID)
        self.forget_old()
        master.ats_enabled = self.ats_enabled

    def forget_old(self) -> None:
        """arm_smmu_remove_master_domain() and arm_smmu_install_old_domain_invs()."""
        if self._old is None:
            return
        self._old.let_go(self.master, self.ssid)
        for inv in self._old.invs.unref(self._old_invs):
            if inv.kind in (invalidation.S1_ASID, invalidation.S2_VMID):
                self.master.smmu.cmdq.issue([invalidation.whole(inv)])


def _attach_ste(device: Device, domain: Domain, old: Domain | None, ste: list[int], s1dss: int) -> None:
    """arm_smmu_attach_dev_ste(): `ste` without stage 1, or the CD table with `s1dss` while PASIDs use it."""
    master = _master(device)
    pasids = bool(master.used_ssids)
    state = _Attach(master, domain, old, IOMMU_NO_PASID, cd_needs_ats=pasids)
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
        master = _master(device)
        receivers = old.receivers(master, pasid, master.ats_enabled) if isinstance(old, PagingDomain) else []
        master.clear_cd(pasid)
        if master.ats_enabled:
            master.atc_inv(pasid)
        if isinstance(old, PagingDomain):
            old.let_go(master, pasid)
            for inv in old.invs.unref(receivers):
                if inv.kind == invalidation.S1_ASID:
                    master.smmu.cmdq.issue([invalidation.whole(inv)])
        domain = device.group.domain if device.group is not None else None
        if not master.used_ssids and domain is not None and not isinstance(domain, PagingDomain):
            domain.attach_dev(device, domain)


class IdentityDomain(Domain):
    """Untranslated."""

    type = IOMMU_DOMAIN_IDENTITY

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        _attach_ste(device, self, old, make_bypass_ste(_master(device).options), e.S1DSS_BYPASS)

    def iova_to_phys(self, iova: int) -> int | None:
        return iova


class PagingDomain(Domain):
    """`struct arm_smmu_domain` with a table of stage 1 (under an ASID) or stage 2 (under a VMID) of one unit."""

    takes_pasids = True

    def __init__(self, owner: ArmSmmuV3, flags: int, stage1: bool) -> None:
        """arm_smmu_domain_finalise(). EBUSY: no ASID is left; ENOSPC: no VMID is; ENOMEM; EINVAL: no page size."""
        if injecting:
            kmalloc("struct arm_smmu_domain")
        super().__init__(owner)
        self.smmu = smmu = owner.smmu
        self.dirty_ops = bool(flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        self.nest_parent = bool(flags & IOMMU_HWPT_ALLOC_NEST_PARENT)
        self.pgsize_bitmap = restrict_pgsizes(smmu.pgsize_bitmap, smmu.oas)
        self._fwb = self.nest_parent and smmu.s2fwb
        self._s1: Arm64Stage1 | None = None
        self._s2: Arm64Stage2 | None = None
        if stage1:
            ias = min(52 if smmu.vax else 48, _VA_BITS)
            self._s1 = stage1_format(smmu.pgsize_bitmap, ias, smmu.oas, dirty_tracking=self.dirty_ops)
            self.table = ArmPageTable(self._s1, smmu.memory, smmu.pages)
        else:
            ias = smmu.oas
            self._s2 = stage2_format(smmu.pgsize_bitmap, ias, smmu.oas, fwb=self._fwb)
            self.table = ArmPageTable(self._s2, smmu.memory, smmu.pages)
        self.aperture_end = (1 << ias) - 1
        taken, bits = (smmu.asids, smmu.asid_bits) if stage1 else (smmu.vmids, smmu.vmid_bits)
        tag = _lowest_free(taken, bits)
        if tag is None:
            self.table.free()
            raise KernelError(errno.EBUSY if stage1 else errno.ENOSPC, "the unit has no free ASID or VMID")
        #: The ASID or the VMID.
        self.tag = tag
        smallest = self.pgsize_bitmap & -self.pgsize_bitmap
        self.invs = Invalidations(smallest.bit_length() - 1, smmu.range_inv)
        #: The devices and PASIDs that are attached.
        self.masters: list[tuple[Master, int]] = []

    @property
    def stage1(self) -> bool:
        return self._s1 is not None

    # -- attachment --------------------------------------------------------------------------------------------------

    def receivers(self, master: Master, ssid: int, ats: bool) -> list[Inv]:
        """arm_smmu_master_build_invs(): who is to be told of changes while this device or PASID is attached."""
        found = [Inv(invalidation.S1_ASID if self.stage1 else invalidation.S2_VMID, self.tag)]
        if self.nest_parent:
            found.append(Inv(invalidation.S2_VMID_S1_CLEAR, self.tag))
        if ats:
            found.append(Inv(invalidation.ATS_FULL if self.nest_parent else invalidation.ATS, master.sid, ssid))
        return found

    def take_on(self, master: Master, ssid: int) -> None:
        """The part of arm_smmu_attach_prepare() that may fail. ENOMEM."""
        if self.iopf_handler is not None and master.stall_enabled:
            if not master.iopf_refcount:
                iopf_queue_add_device(self.smmu.iopf, master.device)
            master.iopf_refcount += 1
        self.masters.append((master, ssid))

    def let_go(self, master: Master, ssid: int) -> None:
        """arm_smmu_remove_master_domain()."""
        self.masters.remove((master, ssid))
        if self.iopf_handler is not None and master.stall_enabled:
            master.iopf_refcount -= 1
            if not master.iopf_refcount:
                iopf_queue_remove_device(self.smmu.iopf, master.device)

    def _cd(self, master: Master) -> list[int]:
        if self._s1 is None:
            raise KernelBug("a stage-2 domain has no context descriptor")
        return make_s1_cd(master.options, self._s1, self.table.root, self.tag, dirty_tracking=self.dirty_ops)

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev(). EINVAL: of another unit; EBUSY: PASIDs use the CD table that stage 2 has not; ENOMEM.

        After an error nothing has changed.
        """
        master = _master(device)
        if self.smmu is not master.smmu:
            raise KernelError(errno.EINVAL, "the domain is of another SMMU")
        if self._s2 is not None:
            if master.used_ssids:
                raise KernelError(errno.EBUSY, f"{master.used_ssids} PASIDs of {device.name} are attached")
            state = _Attach(master, self, old, IOMMU_NO_PASID)
            options, root = master.options, self.table.root
            master.install_ste(make_s2_domain_ste(options, self._s2, root, self.tag, state.ats_enabled, fwb=self._fwb))
            master.clear_cd(IOMMU_NO_PASID)
        else:
            cd = master.alloc_cd(IOMMU_NO_PASID)
            state = _Attach(master, self, old, IOMMU_NO_PASID)
            master.write_cd(IOMMU_NO_PASID, cd, self._cd(master))
            master.install_ste(master.cdtable_ste(state.ats_enabled, e.S1DSS_SSID0))
        state.commit()

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """arm_smmu_s1_set_dev_pasid(). EINVAL: of another unit, or of stage 2, or the device itself is; ENOMEM."""
        master = _master(device)
        if self.smmu is not master.smmu or not self.stage1:
            raise KernelError(errno.EINVAL, "PASIDs take stage-1 domains of the device's SMMU")
        own = device.group.domain if device.group is not None else None
        if not master.cdtab_in_ste and isinstance(own, PagingDomain):
            raise KernelError(errno.EINVAL, f"{device.name} is in a stage-2 domain")
        cd = master.alloc_cd(pasid)
        state = _Attach(master, self, old, pasid)
        master.write_cd(pasid, cd, self._cd(master))
        if not (master.cdtab_in_ste and master.ste_ats_enabled == state.ats_enabled):
            s1dss = e.S1DSS_BYPASS if isinstance(own, IdentityDomain) else e.S1DSS_TERMINATE
            master.install_ste(master.cdtable_ste(state.ats_enabled, s1dss))
        state.commit()

    # -- mappings ----------------------------------------------------------------------------------------------------

    def _flush(self, iova: int, size: int, granule: int, leaf: bool) -> None:
        for batch in self.invs.batches(iova, size, granule, leaf):
            self.smmu.cmdq.issue(batch)

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap)

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        self._map(iova, pa, length, prot, self.pgsize_bitmap & -self.pgsize_bitmap)

    def _map(self, iova: int, pa: int, length: int, prot: int, sizes: int) -> None:
        freed = self.table.map(iova, pa, length, prot, sizes)
        if freed:
            self._flush(iova, length, self.pgsize_bitmap & -self.pgsize_bitmap, leaf=False)
            self._free(freed)

    def unmap(self, iova: int, length: int) -> int:
        """__iommu_unmap(): piece by piece; a run of pages of one size is told to the unit as such."""
        smallest = self.pgsize_bitmap & -self.pgsize_bitmap
        if (iova | length) & smallest - 1:
            return 0
        va, end = iova, iova + length
        gather: tuple[int, int, int] | None = None
        while va < end:
            lg2, stop = best_size(self.pgsize_bitmap, va, va, end)
            unmapped, freed = self.table.unmap_by(va, stop - va, 1 << lg2)
            if unmapped:
                if freed:
                    self._flush(va, unmapped, smallest, leaf=False)
                    self._free(freed)
                if gather is not None and gather[2] != 1 << lg2:
                    self._flush(gather[0], gather[1] - gather[0], gather[2], leaf=True)
                    gather = None
                gather = (va if gather is None else gather[0], va + unmapped, 1 << lg2)
            va += unmapped
            if va < stop:
                break
        if gather is not None:
            self._flush(gather[0], gather[1] - gather[0], gather[2], leaf=True)
        return va - iova

    def _free(self, tables: list[int]) -> None:
        for table in tables:
            self.smmu.pages.free(table)

    def iova_to_phys(self, iova: int) -> int | None:
        return self.table.iova_to_phys(iova)

    def set_dirty_tracking(self, enable: bool) -> None:
        """Nothing: the hardware keeps the bits from the start, and iommufd clears them before it asks."""

    def read_and_clear_dirty(self, iova: int, length: int, flags: int, bitmap: IovaBitmap | None) -> None:
        self.table.read_and_clear_dirty(iova, length, not flags & IOMMU_DIRTY_NO_CLEAR, bitmap)

    def free(self) -> None:
        if self.masters:
            raise KernelBug("a domain is freed while a device is attached")
        self.table.free()
        (self.smmu.asids if self.stage1 else self.smmu.vmids).remove(self.tag)


class ArmSmmuV3(IommuDriver):
    """`arm_smmu_ops`, for one unit."""

    name = "arm-smmu-v3"
    user_pasid_table = True

    def __init__(self, smmu: SmmuDevice, root: RootComplex) -> None:
        self.smmu = smmu
        self._root = root
        self.sysfs_name = f"smmu3.{smmu.base:#018x}"
        self.blocked_domain = BlockedDomain(self)
        self.identity_domain = IdentityDomain(self)

    def probe_device(self, device: Device, rid: int) -> None:
        device.priv = Master(device, self.smmu, rid, self._root)

    def capable(self, device: Device, cap: int) -> bool:
        if cap == IOMMU_CAP_CACHE_COHERENCY:
            return self.smmu.coherent
        if cap in (IOMMU_CAP_NOEXEC, IOMMU_CAP_DEFERRED_FLUSH):
            return True
        if cap == IOMMU_CAP_DIRTY_TRACKING:
            return self.smmu.dirty_bits and self.smmu.coherent
        if cap == IOMMU_CAP_PCI_ATS_SUPPORTED:
            return _master(device).ats_supported()
        return False

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        if wanted_type not in (IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_ARM_SMMUV3):
            raise KernelError(errno.EOPNOTSUPP, f"no hardware information of type {wanted_type}")
        smmu = self.smmu
        return IOMMU_HW_INFO_TYPE_ARM_SMMUV3, struct.pack("<II6III", 0, 0, *smmu.idr, smmu.iidr, smmu.aidr)

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        smmu = self.smmu
        if flags != IOMMU_HWPT_ALLOC_NEST_PARENT and flags not in _STAGE1_FLAGS:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        if user_data is not None:
            raise KernelError(errno.EOPNOTSUPP, "a paging domain takes no data")
        if flags == IOMMU_HWPT_ALLOC_NEST_PARENT:
            if not smmu.nesting:
                raise KernelError(errno.EOPNOTSUPP, "the unit has no nested translation")
            return PagingDomain(self, flags, stage1=False)
        if flags and not smmu.stage1:
            raise KernelError(errno.EOPNOTSUPP, "the unit has no stage 1")
        return PagingDomain(self, flags, stage1=smmu.stage1)

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        prot = IOMMU_WRITE | IOMMU_NOEXEC | IOMMU_MMIO
        return [ResvRegion(MSI_IOVA_BASE, MSI_IOVA_LENGTH, prot, IOMMU_RESV_SW_MSI)]

    def max_pasids(self, device: Device) -> int:
        return min(_master(device).function_pasids, 1 << self.smmu.ssid_bits)

    def page_response(self, device: Device, fault: PageRequest, code: int) -> None:
        """arm_smmu_page_response(): let the stalled transaction try again, or end it."""
        master = _master(device)
        if not master.stall_enabled:
            raise KernelBug(f"{device.name} does not stall")
        retry = code == IOMMU_PAGE_RESP_SUCCESS
        self.smmu.cmdq.issue([c.resume(master.sid, fault.grpid, retry)], sync=False)

    def device_isolated_msi(self, device: Device) -> bool:
        """Interrupt controllers of such machines (the ITS) tell who sends a message."""
        return True
