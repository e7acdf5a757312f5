"""Paging domains of an SMMUv3: tables of stage 1 or 2, who is told of their changes, and the attachment of devices.

Mirrors `struct arm_smmu_domain` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3, in names, checks and the order
of entry writes and invalidations. As there, reading and clearing dirty bits does not flush the TLB: the gather that
iommufd hands down has no page size, without which `arm_smmu_iotlb_sync()` returns.

Left out: SVA's domains, sharing of an ASID with the CPU.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fakedev.smmuv3 import entries as e
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.arm_smmu_v3 import invalidation
from kernel_model.iommu.arm_smmu_v3.attach import Attach, TranslatingDomain
from kernel_model.iommu.arm_smmu_v3.entries import make_nested_ste, make_s1_cd, make_s2_domain_ste
from kernel_model.iommu.arm_smmu_v3.invalidation import Inv, Invalidations
from kernel_model.iommu.arm_smmu_v3.master import Master, master_of
from kernel_model.iommu.core import (
    IOMMU_DIRTY_NO_CLEAR,
    IOMMU_DOMAIN_IDENTITY,
    IOMMU_NO_PASID,
    Device,
    Domain,
    IommuDriver,
)
from kernel_model.iommu.io_pgtable_arm import ArmPageTable, restrict_pgsizes, stage1_format, stage2_format
from kernel_model.iommu.pgtable import best_size
from uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT

if TYPE_CHECKING:
    from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2
    from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
    from kernel_model.iommufd.iova_bitmap import IovaBitmap

#: Bits of a virtual address of the kernel, which a stage-1 domain has no more of.
_VA_BITS = 48


def _lowest_free(taken: set[int], bits: int) -> int | None:
    for number in range(1, 1 << bits):
        if number not in taken:
            taken.add(number)
            return number
    return None


class PagingDomain(TranslatingDomain):
    """`struct arm_smmu_domain` with a table of stage 1 (under an ASID) or stage 2 (under a VMID) of one unit."""

    takes_pasids = True

    def __init__(self, owner: IommuDriver, smmu: SmmuDevice, flags: int, stage1: bool) -> None:
        """arm_smmu_domain_finalise(). EBUSY: no ASID is left; ENOSPC: no VMID is; ENOMEM; EINVAL: no page size."""
        if injecting:
            kmalloc("struct arm_smmu_domain")
        super().__init__(owner)
        self.smmu = smmu
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
        #: Devices that may bypass caches are kept out.
        self.enforces_cache_coherency = False
        #: The devices and PASIDs that are attached, to it or to domains nested in it.
        self.masters: list[tuple[Master, int]] = []

    @property
    def tracker(self) -> PagingDomain:
        return self

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

    def _cd(self, master: Master) -> list[int]:
        if self._s1 is None:
            raise KernelBug("a stage-2 domain has no context descriptor")
        return make_s1_cd(master.options, self._s1, self.table.root, self.tag, dirty_tracking=self.dirty_ops)

    def s2_ste(self, master: Master, ats_enabled: bool, guest: Sequence[int] | None = None) -> list[int]:
        """The entry that translates by this stage-2 table, with a guest's words 0 and 1 in front of it if given."""
        if self._s2 is None:
            raise KernelBug("a stage-1 domain has no stage 2")
        options, root = master.options, self.table.root
        if guest is None:
            return make_s2_domain_ste(options, self._s2, root, self.tag, ats_enabled, fwb=self._fwb)
        return make_nested_ste(options, guest, self._s2, root, self.tag, ats_enabled, fwb=self._fwb)

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev(). EINVAL: of another unit; EBUSY: PASIDs use the CD table that stage 2 has not; ENOMEM.

        After an error nothing has changed.
        """
        master = master_of(device)
        if self.smmu is not master.smmu:
            raise KernelError(errno.EINVAL, "the domain is of another SMMU")
        if self._s2 is not None:
            if master.used_ssids:
                raise KernelError(errno.EBUSY, f"{master.used_ssids} PASIDs of {device.name} are attached")
            state = Attach(master, self, old, IOMMU_NO_PASID)
            master.install_ste(self.s2_ste(master, state.ats_enabled))
            master.clear_cd(IOMMU_NO_PASID)
        else:
            cd = master.alloc_cd(IOMMU_NO_PASID)
            state = Attach(master, self, old, IOMMU_NO_PASID)
            master.write_cd(IOMMU_NO_PASID, cd, self._cd(master))
            master.install_ste(master.cdtable_ste(state.ats_enabled, e.S1DSS_SSID0))
        state.commit()

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """arm_smmu_s1_set_dev_pasid(). EINVAL: of another unit, or of stage 2, or the device itself is; ENOMEM."""
        master = master_of(device)
        if self.smmu is not master.smmu or not self.stage1:
            raise KernelError(errno.EINVAL, "PASIDs take stage-1 domains of the device's SMMU")
        own = device.group.domain if device.group is not None else None
        if not master.cdtab_in_ste and isinstance(own, TranslatingDomain):
            raise KernelError(errno.EINVAL, f"{device.name} is in a stage-2 or a nested domain")
        cd = master.alloc_cd(pasid)
        state = Attach(master, self, old, pasid)
        master.write_cd(pasid, cd, self._cd(master))
        if not (master.cdtab_in_ste and master.ste_ats_enabled == state.ats_enabled):
            identity = own is not None and own.type == IOMMU_DOMAIN_IDENTITY
            s1dss = e.S1DSS_BYPASS if identity else e.S1DSS_TERMINATE
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

    def enforce_cache_coherency(self) -> bool:
        """arm_smmu_enforce_cache_coherency(): yes, while all that are attached do it by themselves."""
        self.enforces_cache_coherency = all(master.canwbs for master, _ in self.masters)
        return self.enforces_cache_coherency

    def set_dirty_tracking(self, enable: bool) -> None:
        """Nothing: the hardware keeps the bits from the start, and iommufd clears them before it asks."""

    def read_and_clear_dirty(self, iova: int, length: int, flags: int, bitmap: IovaBitmap | None) -> None:
        self.table.read_and_clear_dirty(iova, length, not flags & IOMMU_DIRTY_NO_CLEAR, bitmap)

    def free(self) -> None:
        if self.masters:
            raise KernelBug("a domain is freed while a device is attached")
        self.table.free()
        (self.smmu.asids if self.stage1 else self.smmu.vmids).remove(self.tag)
