"""Devices bound to a context: bind, unbind and what they are asked, after device.c of drivers/iommu/iommufd.

VFIO calls `device_bind` and `device_unbind`; a client never does so directly. What devices do to HWPTs is in `attach`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.pcie import PCI_PASID_EXEC, PCI_PASID_PRIV
from kernel_model import pci_ats
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommu import core
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.sw_msi import sw_msi
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_CAP_PCI_PASID_EXEC,
    IOMMU_HW_CAP_PCI_PASID_PRIV,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    iommu_hw_info,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.hwpt import Hwpt
    from kernel_model.iommufd.vdevice import Vdevice


class AttachHandle(core.AttachHandle):
    """`struct iommufd_attach_handle`: leads from a fault, or an MSI, back to the device that attached its group."""

    def __init__(self, idev: IommufdDevice) -> None:
        self.idev = idev

    def prepare_msi(self, domain: core.Domain, address: int) -> int:
        return sw_msi(domain, self.idev, address)


class Attach:
    """`struct iommufd_attach`: what a group is attached to on one PASID, and which devices asked for it."""

    __slots__ = ("devices", "hwpt")

    def __init__(self, hwpt: Hwpt) -> None:
        self.hwpt = hwpt
        self.devices: dict[int, IommufdDevice] = {}


class IommufdGroup:
    """`struct iommufd_group`: an IOMMU group within a context."""

    __slots__ = ("attachments", "group", "noiommu", "required_sw_msi", "sw_msi_start", "users")

    def __init__(self, group: core.Group, noiommu: bool = False) -> None:
        self.group = group
        #: A device without an IOMMU is alone in it, and it is no group of the IOMMU core.
        self.noiommu = noiommu
        self.users = 0
        #: PASID -> what is attached there.
        self.attachments: dict[int, Attach] = {}
        #: Where doorbells of MSIs are mapped; None where the platform translates no MSI.
        self.sw_msi_start: int | None = None
        #: Ids of the doorbell pages that the group's devices write to.
        self.required_sw_msi: set[int] = set()


class IommufdDevice(Object):
    """`struct iommufd_device`."""

    __slots__ = ("dev", "enforce_cache_coherency", "igroup", "vdev")

    def __init__(self, ctx: Context, dev: core.Device) -> None:
        super().__init__(ctx)
        self.dev = dev
        self.igroup: IommufdGroup | None = None
        self.enforce_cache_coherency = False
        #: Its place in a vIOMMU, if it has one.
        self.vdev: Vdevice | None = None

    def destroy(self) -> None:
        if self.igroup is None:
            return
        if not self.igroup.noiommu:
            core.device_release_dma_owner(self.dev)
        self._put_group()
        if not self.dev.is_mock:
            self.ctx.put()

    def _put_group(self) -> None:
        igroup = self.group
        igroup.users -= 1
        if igroup.users == 0 and not igroup.noiommu:
            del self.ctx.groups[igroup.group]

    @property
    def group(self) -> IommufdGroup:
        if self.igroup is None:
            raise KernelBug("the device is not bound")
        return self.igroup


def device_bind(ctx: Context, dev: core.Device) -> IommufdDevice:
    """iommufd_device_bind(): the context owns the device's DMA from now on.

    A device without an IOMMU is taken as it is. EINVAL: the IOMMU is not cache-coherent. ENODEV: no group. EPERM: MSIs
    are not isolated, or somebody else owns the group. EBUSY: the group is in an odd domain.
    """
    idev = IommufdDevice(ctx, dev)
    if dev.iommu is None:
        return _bind_noiommu(idev)
    try:
        driver = dev.iommu
        if not driver.capable(dev, core.IOMMU_CAP_CACHE_COHERENCY):
            raise KernelError(errno.EINVAL, "the device's IOMMU is not cache-coherent")
        group = dev.group
        if group is None:
            raise KernelError(errno.ENODEV, "the device is in no IOMMU group")
        if injecting and group not in ctx.groups:
            kmalloc("struct iommufd_group")
        if not dev.is_mock and not core.group_has_isolated_msi(group) and not ctx.kernel.allow_unsafe_interrupts:
            raise KernelError(errno.EPERM, "the platform does not isolate MSIs")
        core.device_claim_dma_owner(dev, ctx)
    except KernelError:
        ctx.objects.abort(idev)
        raise
    igroup = ctx.groups.get(group)
    if igroup is None:
        igroup = ctx.groups[group] = IommufdGroup(group)
    igroup.users += 1
    idev.igroup = igroup
    idev.enforce_cache_coherency = driver.capable(dev, core.IOMMU_CAP_ENFORCE_CACHE_COHERENCY)
    if not dev.is_mock:
        ctx.get()
    idev.users += 1
    ctx.objects.finalize(idev)
    return idev


def _bind_noiommu(idev: IommufdDevice) -> IommufdDevice:
    """iommufd_bind_noiommu()."""
    ctx = idev.ctx
    if injecting:
        try:
            kmalloc("struct iommufd_group")
        except KernelError:
            ctx.objects.abort(idev)
            raise
    idev.igroup = IommufdGroup(core.Group(-1), noiommu=True)
    idev.igroup.users += 1
    ctx.get()
    idev.users += 1
    ctx.objects.finalize(idev)
    return idev


def device_unbind(idev: IommufdDevice) -> bool:
    """iommufd_device_unbind(): the device must be detached. Its vDEVICE goes with it, and leaves a tombstone.

    False: a PASID is still attached, which only a mock device's client brings about. The object stays then, with what
    it holds, even beyond the context.
    """
    if idev.vdev is not None:
        idev.ctx.objects.tombstone_user(idev.vdev)
    if any(idev.id in attach.devices for attach in idev.group.attachments.values()):
        idev.ctx.objects.lose_user(idev)
        return False
    idev.ctx.objects.destroy_user(idev)
    return True


_CAPABILITIES = (
    "IOMMU_HW_CAP_DIRTY_TRACKING",
    "IOMMU_HW_CAP_PCI_PASID_EXEC",
    "IOMMU_HW_CAP_PCI_PASID_PRIV",
    "IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED",
)


@table.handles(IOMMU_GET_HW_INFO)
def get_hw_info(ucmd: UserCommand[Context, iommu_hw_info]) -> None:
    """EOPNOTSUPP: unknown flags or reserved bytes. ENOENT: device. EOPNOTSUPP: it has no IOMMU, or the driver has no
    such type. EFAULT.

    The driver's struct is cut or zero-padded to the caller's length; `data_len` returns the kernel's own.
    """
    cmd, call = ucmd.cmd, ucmd.call
    profile = ucmd.ctx.kernel.profile
    if cmd.flags & ~profile.mask("IOMMU_HW_INFO_FLAG_INPUT_TYPE"):
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    if any(cmd.__reserved):
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    wanted = cmd.in_data_type if cmd.flags & IOMMU_HW_INFO_FLAG_INPUT_TYPE else IOMMU_HW_INFO_TYPE_DEFAULT
    idev = ucmd.ctx.objects.get(cmd.dev_id, IommufdDevice)
    driver = idev.dev.iommu
    if driver is None:
        raise KernelError(errno.EOPNOTSUPP, "the device has no IOMMU")
    cmd.out_data_type, data = driver.hw_info(idev.dev, wanted)
    room = cmd.data_len
    call.copy_to_user(cmd.data_uptr, data[:room])
    address, left = cmd.data_uptr + len(data), room - len(data)
    while left > 0:
        step = min(left, 1 << 20)
        if address + step - 1 > U64_MAX:
            raise KernelError(errno.EFAULT, "the buffer wraps")
        call.copy_to_user(address, bytes(step))
        address += step
        left -= step
    cmd.data_len = len(data)
    cmd.out_capabilities = 0
    if driver.capable(idev.dev, core.IOMMU_CAP_DIRTY_TRACKING):
        cmd.out_capabilities |= IOMMU_HW_CAP_DIRTY_TRACKING
    if not driver.capable(idev.dev, core.IOMMU_CAP_PCI_ATS_SUPPORTED):
        cmd.out_capabilities |= IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    pasids = driver.max_pasids(idev.dev)
    if pasids and idev.dev.pci is not None:
        control = pci_ats.pasid_status(idev.dev.pci)
        cmd.out_capabilities |= IOMMU_HW_CAP_PCI_PASID_EXEC if control & PCI_PASID_EXEC else 0
        cmd.out_capabilities |= IOMMU_HW_CAP_PCI_PASID_PRIV if control & PCI_PASID_PRIV else 0
    cmd.out_capabilities &= profile.mask(*_CAPABILITIES)
    cmd.out_max_pasid_log2 = pasids.bit_length() - 1 if pasids else 0
    ucmd.respond()
