"""Operations on the PASIDs of mock devices, after drivers/iommu/iommufd/selftest.c."""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.iommu.core import attach_handle_get
from kernel_model.iommufd.attach import device_attach, device_detach, device_replace
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.hwpt import Hwpt
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.selftest.devices import Selftest
from kernel_model.iommufd.selftest.operations import TestCommand, operation


def _device(ucmd: TestCommand) -> IommufdDevice:
    """ENOENT: no such mock device."""
    idev = ucmd.ctx.objects.get(ucmd.cmd.id, Selftest).idev
    assert idev is not None
    return idev


@operation("IOMMU_TEST_OP_PASID_ATTACH")
def _pasid_attach(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device. Then `device_attach`. EFAULT: the reply; then the PASID is detached again."""
    idev, change = _device(ucmd), ucmd.cmd.pasid_attach
    change.pt_id = device_attach(idev, change.pasid, change.pt_id)
    try:
        ucmd.respond()
    except KernelError:
        device_detach(idev, change.pasid)
        raise


@operation("IOMMU_TEST_OP_PASID_REPLACE")
def _pasid_replace(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device. Then `device_replace`. EFAULT: the reply; the replacement stays."""
    change = ucmd.cmd.pasid_replace
    change.pt_id = device_replace(_device(ucmd), change.pasid, change.pt_id)
    ucmd.respond()


@operation("IOMMU_TEST_OP_PASID_DETACH")
def _pasid_detach(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device. A PASID that is not attached is none."""
    device_detach(_device(ucmd), ucmd.cmd.pasid_detach.pasid)


@operation("IOMMU_TEST_OP_PASID_CHECK_HWPT")
def _pasid_check_hwpt(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device, no such HWPT. EINVAL: it is no HWPT, or not what is attached; without a HWPT,
    anything is attached."""
    check = ucmd.cmd.pasid_check
    idev = _device(ucmd)
    try:
        attached = attach_handle_get(idev.group.group, check.pasid).domain
    except KernelError:
        attached = None
    wanted = None
    if check.hwpt_id:
        target = ucmd.ctx.objects.get(check.hwpt_id, Object)
        if not isinstance(target, Hwpt):
            raise KernelError(errno.EINVAL, f"object {check.hwpt_id} is no HWPT")
        wanted = target.domain
    if attached is not wanted:
        raise KernelError(errno.EINVAL, f"PASID {check.pasid} is attached to something else")
