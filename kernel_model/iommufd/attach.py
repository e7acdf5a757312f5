"""What devices are attached to: attach, replace, detach, after device.c of drivers/iommu/iommufd.

VFIO and the mock devices call the functions at the end. All devices of one IOMMU group attach together: the first
attachment of a group moves it, later members join, a replace moves all; and so for each PASID. Reserved regions are
those of the device's own requests: they go to the IOAS that the HWPT reaches in the end, and only for PASID 0.

Left out: virtual functions with page requests, which no HWPT with faults takes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, iommufd_should_fail, kmalloc
from kernel_model.iommu import core
from kernel_model.iommufd.device import Attach, AttachHandle, IommufdDevice, IommufdGroup
from kernel_model.iommufd.hwpt import Hwpt, HwptPaging, paging_alloc
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.sw_msi import group_setup_msi

#: The attachment of the device's own requests, those without a PASID.
NO_PASID = core.IOMMU_NO_PASID


# -- reserved regions --------------------------------------------------------------------------------------------------


def _enforce_reserved(idev: IommufdDevice, paging: HwptPaging, note_msi: bool) -> None:
    """iopt_table_enforce_dev_resv_regions(). EADDRINUSE: one is mapped or allowed; then none of them stays reserved.

    `note_msi`: remember where the device's doorbells are to be mapped.
    """
    if injecting:
        iommufd_should_fail(errno.EINVAL, "iopt_table_enforce_dev_resv_regions()")
    iopt = paging.ioas.iopt
    regions = core.get_resv_regions(idev.dev)
    try:
        for region in regions:
            if note_msi and region.type == core.IOMMU_RESV_SW_MSI:
                idev.group.sw_msi_start = region.start
            if region.type != core.IOMMU_RESV_DIRECT_RELAXABLE:
                iopt.reserve(region.start, region.last, idev.dev)
    except KernelError:
        iopt.unreserve(idev.dev)
        raise
    kinds = [region.type for region in regions]
    if kinds.count(core.IOMMU_RESV_SW_MSI) > (core.IOMMU_RESV_MSI not in kinds):
        raise KernelBug(f"{idev.dev.name} has MSI regions that exclude each other")


def _attach_reserved(idev: IommufdDevice, paging: HwptPaging) -> None:
    """iommufd_device_attach_reserved_iova(). EADDRINUSE; the errnos of the domain's map for a doorbell."""
    _enforce_reserved(idev, paging, note_msi=True)
    if NO_PASID in idev.group.attachments:
        return
    try:
        group_setup_msi(idev.ctx, idev.group, paging)
    except KernelError:
        paging.ioas.iopt.unreserve(idev.dev)
        raise


def _replace_reserved(idev: IommufdDevice, members: list[IommufdDevice], old: HwptPaging, new: HwptPaging) -> None:
    """iommufd_group_do_replace_reserved_iova(), without its error path. Errnos as `_attach_reserved`."""
    if new.ioas is not old.ioas:
        for member in members:
            _enforce_reserved(member, new, note_msi=False)
    group_setup_msi(idev.ctx, idev.group, new)


def _remove_reserved(members: list[IommufdDevice], paging: HwptPaging) -> None:
    """iommufd_group_remove_reserved_iova()."""
    for member in members:
        paging.ioas.iopt.unreserve(member.dev)


# -- a HWPT and the IOMMU core -----------------------------------------------------------------------------------------


def _check_pasid(igroup: IommufdGroup, hwpt: Hwpt, pasid: int) -> None:
    """iommufd_hwpt_pasid_compat(). EINVAL: a HWPT without the PASID flag meets PASIDs."""
    attachments = igroup.attachments
    if pasid == NO_PASID:
        if not hwpt.pasid_compat and any(number != NO_PASID for number in attachments):
            raise KernelError(errno.EINVAL, "PASIDs are attached, and the HWPT is not for such devices")
        return
    if not hwpt.pasid_compat:
        raise KernelError(errno.EINVAL, "the HWPT is not for PASIDs")
    own = attachments.get(NO_PASID)
    if own is not None and not own.hwpt.pasid_compat:
        raise KernelError(errno.EINVAL, "the device's own HWPT is not for devices with PASIDs")


def _domain(hwpt: Hwpt) -> core.Domain:
    if hwpt.domain is None:
        raise KernelBug("a HWPT without a domain")
    return hwpt.domain


def _hwpt_attach_device(hwpt: Hwpt, idev: IommufdDevice, pasid: int) -> None:
    """iommufd_hwpt_attach_device(). EINVAL: PASID rules. Then those of the IOMMU core."""
    igroup = idev.group
    _check_pasid(igroup, hwpt, pasid)
    if igroup.noiommu:
        return
    if injecting:
        kmalloc("struct iommufd_attach_handle")
    handle = AttachHandle(idev)
    if pasid == NO_PASID:
        core.attach_group_handle(_domain(hwpt), igroup.group, handle)
    else:
        core.attach_device_pasid(_domain(hwpt), idev.dev, pasid, handle)


def _hwpt_replace_device(idev: IommufdDevice, pasid: int, hwpt: Hwpt, old: Hwpt) -> None:
    """iommufd_hwpt_replace_device(). EINVAL: PASID rules. Then those of the IOMMU core."""
    igroup = idev.group
    _check_pasid(igroup, hwpt, pasid)
    if igroup.noiommu:
        return
    old_handle = igroup.group.pasid_array.get(pasid)
    if injecting:
        kmalloc("struct iommufd_attach_handle")
    handle = AttachHandle(idev)
    if pasid == NO_PASID:
        core.replace_group_handle(igroup.group, _domain(hwpt), handle)
    else:
        core.replace_device_pasid(_domain(hwpt), idev.dev, pasid, handle)
    _answer_faults(old, old_handle)


def _hwpt_detach_device(hwpt: Hwpt, idev: IommufdDevice, pasid: int) -> None:
    """iommufd_hwpt_detach_device()."""
    if idev.group.noiommu:
        return
    group = idev.group.group
    handle = group.pasid_array.get(pasid)
    if pasid == NO_PASID:
        core.detach_group_handle(_domain(hwpt), group)
    else:
        core.detach_device_pasid(_domain(hwpt), idev.dev, pasid)
    _answer_faults(hwpt, handle)


def _answer_faults(hwpt: Hwpt, handle: core.AttachHandle | None) -> None:
    """Faults that came through an attachment end with it."""
    if hwpt.fault is not None and handle is not None:
        hwpt.fault.auto_response(handle)


# -- a device and a HWPT -----------------------------------------------------------------------------------------------


def hwpt_attach(hwpt: Hwpt, idev: IommufdDevice, pasid: int) -> None:
    """iommufd_hw_pagetable_attach(). In order: EBUSY, this device is attached already; EINVAL, its group is attached to
    another HWPT; EADDRINUSE, a reserved region of the device is mapped; for the first of the group `_check_pasid` and
    the IOMMU core."""
    igroup = idev.group
    attach = igroup.attachments.get(pasid)
    if injecting and attach is None:
        kmalloc("struct iommufd_attach")
    if attach is not None:
        if idev.id in attach.devices:
            raise KernelError(errno.EBUSY, f"device {idev.id} is attached already")
        if attach.hwpt is not hwpt:
            raise KernelError(errno.EINVAL, f"the group is attached to HWPT {attach.hwpt.id}")
    if pasid == NO_PASID and not igroup.noiommu:
        _attach_reserved(idev, hwpt.paging)
    if attach is None:
        try:
            _hwpt_attach_device(hwpt, idev, pasid)
        except KernelError:
            if pasid == NO_PASID:
                hwpt.paging.ioas.iopt.unreserve(idev.dev)
            raise
        attach = igroup.attachments[pasid] = Attach(hwpt)
    hwpt.users += 1
    attach.devices[idev.id] = idev


def hwpt_detach(idev: IommufdDevice, pasid: int) -> bool:
    """iommufd_hw_pagetable_detach(); False, and nothing happens, if the group is not attached."""
    igroup = idev.group
    attach = igroup.attachments.get(pasid)
    if attach is None:
        return False
    hwpt = attach.hwpt
    attach.devices.pop(idev.id, None)
    if not attach.devices:
        _hwpt_detach_device(hwpt, idev, pasid)
        del igroup.attachments[pasid]
    if pasid == NO_PASID:
        hwpt.paging.ioas.iopt.unreserve(idev.dev)
    put_hwpt(hwpt)
    return True


def _hwpt_replace(hwpt: Hwpt, idev: IommufdDevice, pasid: int) -> Hwpt | None:
    """iommufd_device_do_replace(); the HWPT that one reference is owed for, None if nothing changed.

    EINVAL: not attached. EADDRINUSE: a reserved region of a member is mapped. Then `_check_pasid` and the IOMMU core.
    """
    igroup = idev.group
    attach = igroup.attachments.get(pasid)
    if attach is None or idev.id not in attach.devices:
        raise KernelError(errno.EINVAL, f"device {idev.id} is not attached")
    old = attach.hwpt
    if hwpt is old:
        return None
    members = list(attach.devices.values())
    try:
        if pasid == NO_PASID and not igroup.noiommu:
            _replace_reserved(idev, members, old.paging, hwpt.paging)
        _hwpt_replace_device(idev, pasid, hwpt, old)
    except KernelError:
        # As the kernel does: from the target, even where that is the current IOAS.
        if pasid == NO_PASID:
            _remove_reserved(members, hwpt.paging)
        raise
    if pasid == NO_PASID and hwpt.paging.ioas is not old.paging.ioas:
        _remove_reserved(members, old.paging)
    attach.hwpt = hwpt
    hwpt.users += len(members)
    old.users -= len(members) - 1
    return old


def put_hwpt(hwpt: Hwpt) -> None:
    """iommufd_hw_pagetable_put(): an automatic HWPT dies with its last attachment."""
    if isinstance(hwpt, HwptPaging) and hwpt.auto_domain:
        hwpt.ctx.objects.put_auto(hwpt)
    else:
        hwpt.users -= 1


# -- what VFIO and the mock devices call -------------------------------------------------------------------------------


def device_attach(idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """iommufd_device_attach(): attach to an IOAS (an automatic HWPT) or a HWPT; the HWPT's id.

    ENOENT: no such object. EINVAL: of another kind. Then `hwpt_attach` and `paging_alloc`. An automatic HWPT is for no
    PASID, so that an IOAS with a `pasid` is EINVAL in the end.
    """
    attachment = _Attachment(idev, pasid)
    hwpt_id, _ = _change_pt(idev, pt_id, attachment.attach, attachment)
    idev.users += 1
    return hwpt_id


def device_replace(idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """iommufd_device_replace(): move the device's group to another page table without a gap; the HWPT's id.

    Errnos as `device_attach`, with `_hwpt_replace`. On an error the old attachment stays.
    """
    hwpt_id, old = _change_pt(idev, pt_id, lambda hwpt: _hwpt_replace(hwpt, idev, pasid), None)
    if old is not None:
        put_hwpt(old)
    return hwpt_id


def device_detach(idev: IommufdDevice, pasid: int) -> None:
    """iommufd_device_detach(): nothing happens to a device that is not attached."""
    if hwpt_detach(idev, pasid):
        idev.users -= 1


class _Attachment:
    """A first attachment, as `paging_alloc` makes and undoes it."""

    def __init__(self, idev: IommufdDevice, pasid: int) -> None:
        self._idev = idev
        self._pasid = pasid

    def attach(self, hwpt: Hwpt) -> None:
        hwpt_attach(hwpt, self._idev, self._pasid)

    def detach(self) -> None:
        hwpt_detach(self._idev, self._pasid)


def _change_pt(
    idev: IommufdDevice,
    pt_id: int,
    do_attach: Callable[[Hwpt], Hwpt | None],
    attachment: _Attachment | None,
) -> tuple[int, Hwpt | None]:
    """iommufd_device_change_pt(): the HWPT's id, and the HWPT that a replace left."""
    target = idev.ctx.objects.get(pt_id, Object)
    if isinstance(target, Hwpt):
        return target.id, do_attach(target)
    if not isinstance(target, Ioas):
        raise KernelError(errno.EINVAL, f"object {pt_id} is no page table")
    return _auto_get_domain(idev, target, do_attach, attachment)


def _auto_get_domain(
    idev: IommufdDevice,
    ioas: Ioas,
    do_attach: Callable[[Hwpt], Hwpt | None],
    attachment: _Attachment | None,
) -> tuple[int, Hwpt | None]:
    """iommufd_device_auto_get_domain(): the first automatic HWPT of the IOAS that suits the device, else a new one."""
    for hwpt in list(ioas.hwpts):
        if not hwpt.auto_domain:
            continue
        try:
            return hwpt.id, do_attach(hwpt)
        except KernelError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this one does not suit the device, perhaps the next does
                raise
    hwpt = paging_alloc(idev.ctx, ioas, idev.dev, idev.enforce_cache_coherency, 0, None, attachment)
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
