"""Devices bound to a context: bind, attach, replace, detach, after device.c of drivers/iommu/iommufd.

VFIO calls the functions at the end; a client never does so directly. All devices of one IOMMU group attach together:
the first attachment of a group moves it, later members join, a replace moves all.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kernel_model.errors import KernelBug, KernelError
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommu import core
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.hwpt import HwptPaging, paging_alloc
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    iommu_hw_info,
)

#: The attachment of the device's own requests, those without a PASID.
NO_PASID = core.IOMMU_NO_PASID


class AttachHandle(core.AttachHandle):
    """`struct iommufd_attach_handle`: leads from a fault back to the device."""

    def __init__(self, idev: IommufdDevice) -> None:
        self.idev = idev


def _set_pasid(dev: core.Device) -> None:
    """The driver's half of iommu_attach_device_pasid(): a device that cannot use PASIDs needs, and gets, nothing.

    EOPNOTSUPP: it can, and no driver of the model translates by PASID.
    """
    if dev.max_pasids:
        raise KernelError(errno.EOPNOTSUPP, "the IOMMU driver has no PASID support")


class Attach:
    """`struct iommufd_attach`: what a group is attached to on one PASID, and which devices asked for it."""

    __slots__ = ("devices", "hwpt")

    def __init__(self, hwpt: HwptPaging) -> None:
        self.hwpt = hwpt
        self.devices: dict[int, IommufdDevice] = {}


class IommufdGroup:
    """`struct iommufd_group`: an IOMMU group within a context."""

    __slots__ = ("attachments", "group", "users")

    def __init__(self, group: core.Group) -> None:
        self.group = group
        self.users = 0
        self.attachments: dict[int, Attach] = {}


class IommufdDevice(Object):
    """`struct iommufd_device`."""

    __slots__ = ("dev", "enforce_cache_coherency", "igroup")

    def __init__(self, ctx: Context, dev: core.Device) -> None:
        super().__init__(ctx)
        self.dev = dev
        self.igroup: IommufdGroup | None = None
        self.enforce_cache_coherency = False

    def destroy(self) -> None:
        if self.igroup is None:
            return
        core.device_release_dma_owner(self.dev)
        self._put_group()
        if not self.dev.is_mock:
            self.ctx.put()

    def _put_group(self) -> None:
        igroup = self.group
        igroup.users -= 1
        if igroup.users == 0:
            del self.ctx.groups[igroup.group]

    @property
    def group(self) -> IommufdGroup:
        if self.igroup is None:
            raise KernelBug("the device is not bound")
        return self.igroup

    # -- attaching one HWPT ------------------------------------------------------------------------------------------

    def hwpt_attach(self, hwpt: HwptPaging, pasid: int) -> None:
        """iommufd_hw_pagetable_attach(). EBUSY: this device is attached already. EINVAL: its group is attached to
        another HWPT. EADDRINUSE: a reserved region of the device is mapped. EINVAL: PASID rules. Then the driver's."""
        igroup = self.group
        attach = igroup.attachments.get(pasid)
        if attach is not None:
            if self.id in attach.devices:
                raise KernelError(errno.EBUSY, f"device {self.id} is attached already")
            if attach.hwpt is not hwpt:
                raise KernelError(errno.EINVAL, f"the group is attached to HWPT {attach.hwpt.id}")
        iopt = hwpt.ioas.iopt
        if pasid == NO_PASID:
            self._enforce_reserved(hwpt)
        if attach is None:
            try:
                self._check_pasid(hwpt, pasid)
                if hwpt.domain is None:
                    raise KernelBug("a HWPT without a domain")
                if pasid == NO_PASID:
                    core.attach_group_handle(hwpt.domain, igroup.group, AttachHandle(self))
                else:
                    _set_pasid(self.dev)
            except KernelError:
                if pasid == NO_PASID:
                    iopt.unreserve(self.dev)
                raise
            attach = igroup.attachments[pasid] = Attach(hwpt)
        hwpt.users += 1
        attach.devices[self.id] = self

    def hwpt_replace(self, hwpt: HwptPaging, pasid: int) -> HwptPaging | None:
        """iommufd_device_do_replace(); the HWPT that one reference is owed for, None if nothing changed.

        EINVAL: not attached. EADDRINUSE: a reserved region of a member is mapped. Then PASID rules and the driver's.
        """
        igroup = self.group
        attach = igroup.attachments.get(pasid)
        if attach is None or self.id not in attach.devices:
            raise KernelError(errno.EINVAL, f"device {self.id} is not attached")
        old = attach.hwpt
        if hwpt is old:
            return None
        members = list(attach.devices.values())
        other_space = hwpt.ioas is not old.ioas
        try:
            if pasid == NO_PASID and other_space:
                for member in members:
                    member._enforce_reserved(hwpt)
            self._check_pasid(hwpt, pasid)
            if hwpt.domain is None:
                raise KernelBug("a HWPT without a domain")
            if pasid == NO_PASID:
                core.replace_group_handle(igroup.group, hwpt.domain, AttachHandle(self))
            else:
                _set_pasid(self.dev)
        except KernelError:
            # As the kernel does: from the target, even where that is the current IOAS.
            if pasid == NO_PASID:
                for member in members:
                    hwpt.ioas.iopt.unreserve(member.dev)
            raise
        if pasid == NO_PASID and other_space:
            for member in members:
                old.ioas.iopt.unreserve(member.dev)
        attach.hwpt = hwpt
        hwpt.users += len(members)
        old.users -= len(members) - 1
        return old

    def hwpt_detach(self, pasid: int) -> None:
        """iommufd_hw_pagetable_detach(): nothing if the group is not attached."""
        igroup = self.group
        attach = igroup.attachments.get(pasid)
        if attach is None:
            return
        hwpt = attach.hwpt
        attach.devices.pop(self.id, None)
        if not attach.devices:
            assert hwpt.domain is not None
            if pasid == NO_PASID:
                core.detach_group_handle(hwpt.domain, igroup.group)
            del igroup.attachments[pasid]
        if pasid == NO_PASID:
            hwpt.ioas.iopt.unreserve(self.dev)
        put_hwpt(hwpt)

    def _check_pasid(self, hwpt: HwptPaging, pasid: int) -> None:
        """iommufd_hwpt_pasid_compat(). EINVAL: a HWPT without the PASID flag meets PASIDs."""
        attachments = self.group.attachments
        if pasid == NO_PASID:
            if not hwpt.pasid_compat and any(number != NO_PASID for number in attachments):
                raise KernelError(errno.EINVAL, "PASIDs are attached, and the HWPT is not for such devices")
            return
        if not hwpt.pasid_compat:
            raise KernelError(errno.EINVAL, "the HWPT is not for PASIDs")
        own = attachments.get(NO_PASID)
        if own is not None and not own.hwpt.pasid_compat:
            raise KernelError(errno.EINVAL, "the device's own HWPT is not for devices with PASIDs")

    def _enforce_reserved(self, hwpt: HwptPaging) -> None:
        """iopt_table_enforce_dev_resv_regions(): EADDRINUSE, with nothing of the device's left reserved."""
        iopt = hwpt.ioas.iopt
        try:
            for region in core.get_resv_regions(self.dev):
                if region.type != core.IOMMU_RESV_DIRECT_RELAXABLE:
                    iopt.reserve(region.start, region.last, self.dev)
        except KernelError:
            iopt.unreserve(self.dev)
            raise


def put_hwpt(hwpt: HwptPaging) -> None:
    """iommufd_hw_pagetable_put(): an automatic HWPT dies with its last attachment."""
    if hwpt.auto_domain:
        hwpt.ctx.objects.put_auto(hwpt)
    else:
        hwpt.users -= 1


# -- what VFIO calls ---------------------------------------------------------------------------------------------------


def device_bind(ctx: Context, dev: core.Device) -> IommufdDevice:
    """iommufd_device_bind(): the context owns the device's DMA from now on.

    EINVAL: the IOMMU is not cache-coherent. ENODEV: no group. EPERM: MSIs are not isolated, or somebody else owns the
    group. EBUSY: the group is in an odd domain.
    """
    idev = IommufdDevice(ctx, dev)
    try:
        driver = dev.iommu
        if driver is None or not driver.capable(dev, core.IOMMU_CAP_CACHE_COHERENCY):
            raise KernelError(errno.EINVAL, "the device's IOMMU is not cache-coherent")
        group = dev.group
        if group is None:
            raise KernelError(errno.ENODEV, "the device is in no IOMMU group")
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


def device_unbind(idev: IommufdDevice) -> None:
    """iommufd_device_unbind(): the device must be detached."""
    idev.ctx.objects.destroy_user(idev)


def device_attach(idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """iommufd_device_attach(): attach to an IOAS (an automatic HWPT) or a HWPT; the HWPT's id.

    ENOENT: no such object. EINVAL: of another kind. Then `IommufdDevice.hwpt_attach` and `paging_alloc`.
    """
    attachment = _Attachment(idev, pasid)
    hwpt_id, _ = _change_pt(idev, pt_id, attachment.attach, attachment)
    idev.users += 1
    return hwpt_id


def device_replace(idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """iommufd_device_replace(): move the device's group to another page table without a gap; the HWPT's id.

    Errnos as `device_attach`, with `IommufdDevice.hwpt_replace`. On an error the old attachment stays.
    """
    hwpt_id, old = _change_pt(idev, pt_id, lambda hwpt: idev.hwpt_replace(hwpt, pasid), None)
    if old is not None:
        put_hwpt(old)
    return hwpt_id


def device_detach(idev: IommufdDevice, pasid: int) -> None:
    """iommufd_device_detach(): nothing happens to a device that is not attached."""
    attach = idev.group.attachments.get(pasid)
    if attach is None:
        return
    idev.hwpt_detach(pasid)
    idev.users -= 1


class _Attachment:
    """A first attachment, as `paging_alloc` makes and undoes it."""

    def __init__(self, idev: IommufdDevice, pasid: int) -> None:
        self._idev = idev
        self._pasid = pasid

    def attach(self, hwpt: HwptPaging) -> None:
        self._idev.hwpt_attach(hwpt, self._pasid)

    def detach(self) -> None:
        self._idev.hwpt_detach(self._pasid)


def _change_pt(
    idev: IommufdDevice,
    pt_id: int,
    do_attach: Callable[[HwptPaging], HwptPaging | None],
    attachment: _Attachment | None,
) -> tuple[int, HwptPaging | None]:
    """iommufd_device_change_pt(): the HWPT's id, and the HWPT that a replace left."""
    target = idev.ctx.objects.get(pt_id, Object)
    if isinstance(target, HwptPaging):
        return target.id, do_attach(target)
    if not isinstance(target, Ioas):
        raise KernelError(errno.EINVAL, f"object {pt_id} is no page table")
    for hwpt in list(target.hwpts):
        if not hwpt.auto_domain:
            continue
        try:
            return hwpt.id, do_attach(hwpt)
        except KernelError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this one does not suit the device, perhaps the next does
                raise
    hwpt = paging_alloc(idev.ctx, target, idev.dev, idev.enforce_cache_coherency, 0, None, attachment)
    old = None
    if attachment is None:
        try:
            old = do_attach(hwpt)
        except KernelError:
            idev.ctx.objects.abort(hwpt)
            raise
    hwpt.auto_domain = True
    idev.ctx.objects.finalize(hwpt)
    return hwpt.id, old


_CAPABILITIES = ("IOMMU_HW_CAP_DIRTY_TRACKING", "IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED")


@table.handles(IOMMU_GET_HW_INFO)
def get_hw_info(ucmd: UserCommand[Context, iommu_hw_info]) -> None:
    """EOPNOTSUPP: unknown flags or reserved bytes. ENOENT: device. EOPNOTSUPP: the driver has no such type. EFAULT.

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
    assert driver is not None
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
    cmd.out_capabilities &= profile.mask(*_CAPABILITIES)
    pasids = driver.max_pasids(idev.dev)
    cmd.out_max_pasid_log2 = pasids.bit_length() - 1 if pasids else 0
    ucmd.respond()
