"""Virtual SMMUs: a guest's stage 1 over a stage-2 domain, its invalidations and its events.

Mirrors drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c at 7.3. A vSMMU lends its guest the VMID of the nesting
parent, so that two vSMMUs on one parent share their guests' ASIDs. Left out: devices with several streams, which
`arm_vsmmu_vdevice_init()` refuses (a PCI function has one); the queues of a Tegra241 (`IOMMU_VIOMMU_TYPE_
TEGRA241_CMDQV`, hardware queues and information of their own), whose types are EOPNOTSUPP as without that hardware.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.arm_smmu_v3.attach import Attach, TranslatingDomain
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.domain import PagingDomain
from kernel_model.iommu.arm_smmu_v3.entries import STE_0_NESTING_ALLOWED, STE_1_NESTING_ALLOWED
from kernel_model.iommu.arm_smmu_v3.master import Master, Vmaster, master_of
from kernel_model.iommu.arm_smmu_v3.vsmmu_commands import validate
from kernel_model.iommu.core import IOMMU_DOMAIN_NESTED, IOMMU_NO_PASID, Device, Domain
from kernel_model.iommu.viommu import ViommuDriver
from uapi.iommufd import (
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
    iommu_hwpt_arm_smmuv3,
    iommu_viommu_arm_smmuv3_invalidate,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.hw_queue import HwQueue
    from kernel_model.iommufd.user_data import UserData, UserDataArray
    from kernel_model.iommufd.viommu import Viommu

#: Commands that go to the queue in one piece: as many as fit beside a SYNC (CMDQ_BATCH_ENTRIES - 1).
_BATCH = 63
#: The largest array of commands that kzalloc() gives: 4 MiB (KMALLOC_MAX_SIZE).
_MOST_COMMANDS = (4 << 20) // 16
_COMMAND = struct.Struct("<QQ")
_OF_STREAMS = frozenset((c.ATC_INV, c.CFGI_CD, c.CFGI_CD_ALL))


def hw_info(smmu: SmmuDevice, wanted_type: int) -> tuple[int, bytes]:
    """arm_smmu_hw_info(). EOPNOTSUPP: another type."""
    if wanted_type not in (IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_ARM_SMMUV3):
        raise KernelError(errno.EOPNOTSUPP, f"no hardware information of type {wanted_type}")
    return IOMMU_HW_INFO_TYPE_ARM_SMMUV3, struct.pack("<II6III", 0, 0, *smmu.idr, smmu.iidr, smmu.aidr)


def has_viommus(master: Master, kind: int) -> bool:
    """arm_smmu_get_viommu_size(): nothing of a guest's may bypass the caches that VFIO does not maintain."""
    smmu = master.smmu
    return smmu.nesting and (master.canwbs or smmu.s2fwb) and kind == IOMMU_VIOMMU_TYPE_ARM_SMMUV3


class GuestStream(Vmaster):
    """`struct arm_smmu_vmaster`: a device's name in a vIOMMU, as it was when the device was attached there."""

    def __init__(self, viommu: Viommu, vsid: int) -> None:
        self._viommu = viommu
        self._vsid = vsid

    def report_event(self, record: Sequence[int]) -> None:
        """arm_vmaster_report_event(). Errnos of `Viommu.report_event`."""
        low = events.EVT_0_SID.set(record[0], self._vsid & 0xFFFF_FFFF)
        self._viommu.report_event(IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, struct.pack("<4Q", low, *record[1:]))


def _validate_vste(low: int, high: int) -> tuple[int, int, bool]:
    """arm_smmu_validate_vste(): the words as the driver keeps them, and whether the guest wants ATS. EIO."""
    if not low & e.STE_0_V:
        return 0, 0, False
    if low & ~STE_0_NESTING_ALLOWED or high & ~STE_1_NESTING_ALLOWED:
        raise KernelError(errno.EIO, f"a vSTE {low:#x} {high:#x} with bits that are not a guest's")
    config, eats = e.STE_0_CONFIG.get(low), e.STE_1_EATS.get(high)
    if config not in (e.CONFIG_ABORT, e.CONFIG_BYPASS, e.CONFIG_S1):
        raise KernelError(errno.EIO, f"a vSTE with Config {config}")
    if eats not in (e.EATS_NONE, e.EATS_FULL):
        raise KernelError(errno.EIO, f"a vSTE with EATS {eats}")
    return low, e.STE_1_EATS.set(high, 0), config == e.CONFIG_S1 and eats == e.EATS_FULL


class NestedDomain(TranslatingDomain):
    """`struct arm_smmu_nested_domain`: words 0 and 1 of a guest's STE over the vIOMMU's parent."""

    type = IOMMU_DOMAIN_NESTED

    def __init__(self, vsmmu: Vsmmu, ste: tuple[int, int], enable_ats: bool) -> None:
        super().__init__(vsmmu.viommu.iommu)
        self._vsmmu = vsmmu
        self._ste = ste
        self._enable_ats = enable_ats

    @property
    def tracker(self) -> PagingDomain:
        return self._vsmmu.s2_parent

    def make_vmaster(self, master: Master) -> Vmaster | None:
        """arm_smmu_attach_prepare_vmaster(). ENOENT: stage 1 without a vDEVICE, where commands and events would have
        no name for the device. ENOMEM."""
        try:
            vsid = self._vsmmu.viommu.get_vdev_id(master.device)
        except KernelError:
            if e.STE_0_CONFIG.get(self._ste[0]) in (e.CONFIG_ABORT, e.CONFIG_BYPASS):
                return None
            raise
        if injecting:
            kmalloc("struct arm_smmu_vmaster")
        return GuestStream(self._vsmmu.viommu, vsid)

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev_nested(). EINVAL: of another unit; EBUSY: PASIDs of the host's are attached. Then those
        of `Attach`. The guest's EATS decides over the device's ATS: who thinks it is off sends no invalidations."""
        master = master_of(device)
        if self._vsmmu.smmu is not master.smmu:
            raise KernelError(errno.EINVAL, "the domain is of another SMMU")
        if master.used_ssids:
            raise KernelError(errno.EBUSY, f"{master.used_ssids} PASIDs of {device.name} are attached")
        stage1 = e.STE_0_CONFIG.get(self._ste[0]) == e.CONFIG_S1
        state = Attach(master, self, old, IOMMU_NO_PASID, disable_ats=stage1 and not self._enable_ats)
        master.install_ste(self.tracker.s2_ste(master, state.ats_enabled, self._ste))
        state.commit()


class Vsmmu(ViommuDriver):
    """`struct arm_vsmmu`."""

    def __init__(self, smmu: SmmuDevice, viommu: Viommu, parent: Domain, user_data: UserData | None) -> None:
        """arm_vsmmu_init(); data is not looked at. EINVAL: the parent is of another unit."""
        super().__init__(viommu, parent, user_data)
        if not isinstance(parent, PagingDomain) or parent.smmu is not smmu:
            raise KernelError(errno.EINVAL, "the parent is of another SMMU")
        self.smmu = smmu
        self.s2_parent = parent

    def destroy(self) -> None:
        pass

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """arm_vsmmu_alloc_domain_nested(). EOPNOTSUPP: flags. Those of `UserData.copy_from`. EIO: the vSTE. ENOMEM."""
        if flags:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}: a guest's CD table is its own")
        data = user_data.copy_from(iommu_hwpt_arm_smmuv3, IOMMU_HWPT_DATA_ARM_SMMUV3, 16)
        low, high, enable_ats = _validate_vste(data.ste[0], data.ste[1])
        if injecting:
            kmalloc("struct arm_smmu_nested_domain")
        return NestedDomain(self, (low, high), enable_ats)

    # -- invalidation ------------------------------------------------------------------------------------------------

    def cache_invalidate(self, array: UserDataArray) -> None:
        """arm_vsmmu_cache_invalidate(): commands go to the unit 63 at a time, each time with a SYNC.

        ENOMEM: too many, and `entry_num` stays. Those of `UserDataArray.copy_full`. EIO: a command that is no guest's,
        or a stream that is no vDEVICE; `entry_num` is its index, though those since the last 63 are never issued.
        """
        if array.entry_num > _MOST_COMMANDS:
            raise KernelError(errno.ENOMEM, f"{array.entry_num} commands at once")
        if injecting:
            kmalloc("an array of commands", array.entry_num * 16)
        done = 0
        try:
            data = array.copy_full_bytes(iommu_viommu_arm_smmuv3_invalidate, IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3)
            batch: list[tuple[int, int]] = []
            for low, high in _COMMAND.iter_unpack(data):
                batch.append(self._convert(low, high))
                done += 1
                if len(batch) == _BATCH:
                    self.smmu.cmdq.issue(batch)
                    batch = []
            if batch:
                self.smmu.cmdq.issue(batch)
        finally:
            array.entry_num = done

    def _convert(self, low: int, high: int) -> tuple[int, int]:
        """arm_vsmmu_convert_user_cmd(): the host's VMID or stream in place of the guest's. EIO."""
        if not validate(self.smmu, low, high):
            raise KernelError(errno.EIO, f"command {low:#x} {high:#x} is none that a guest may send")
        opcode = low & 0xFF
        if opcode == c.TLBI_NSNH_ALL:
            return c.tlbi_nh_all(self.s2_parent.tag)
        if opcode not in _OF_STREAMS:
            return c.TLBI_VMID.set(low, self.s2_parent.tag), high
        device = self.viommu.find_dev(c.SID.get(low))
        if device is None:
            raise KernelError(errno.EIO, f"no vDEVICE is stream {c.SID.get(low):#x}")
        return c.SID.set(low, master_of(device).sid), high

    # -- hardware queues ---------------------------------------------------------------------------------------------

    def has_hw_queue(self, kind: int) -> bool:
        return False

    def hw_queue_init_phys(self, queue: HwQueue, index: int, base_pa: int) -> None:
        raise KernelBug("an SMMUv3 has no hardware queues")
