"""vDEVICEs: a device's place in a vIOMMU, after viommu.c of drivers/iommu/iommufd and the pre-destroy half of device.c.

A device has one vDEVICE at most. It does not keep the device: when the device goes, so does its vDEVICE, and leaves its
id behind as a tombstone, so that a client that still means the vDEVICE does not meet another object there. Left out:
how kernels before 6.17 did this.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.viommu import Viommu
from uapi.iommufd import IOMMU_VDEVICE_ALLOC, iommu_vdevice_alloc


class Vdevice(Object):
    """`struct iommufd_vdevice`."""

    __slots__ = ("idev", "viommu", "virt_id")

    def __init__(self, viommu: Viommu, idev: IommufdDevice, virt_id: int) -> None:
        super().__init__(viommu.ctx)
        self.viommu = viommu
        self.idev = idev
        #: The guest's name for the device: a stream id, a device id.
        self.virt_id = virt_id
        viommu.users += 1
        idev.vdev = self

    def destroy(self) -> None:
        """iommufd_vdevice_abort(): also where the virtual id was never its own."""
        if self.viommu.vdevs.get(self.virt_id) is self:
            del self.viommu.vdevs[self.virt_id]
        self.viommu.users -= 1
        self.idev.vdev = None


@table.handles(IOMMU_VDEVICE_ALLOC)
def vdevice_alloc(ucmd: UserCommand[Context, iommu_vdevice_alloc]) -> None:
    """ENOENT: vIOMMU, then device. EINVAL: the device is behind another IOMMU. EEXIST: it has a vDEVICE, or another
    device has the virtual id. EFAULT: the reply; then there is no vDEVICE."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    viommu = ctx.objects.get(cmd.viommu_id, Viommu)
    idev = ctx.objects.get(cmd.dev_id, IommufdDevice)
    if idev.dev.iommu is not viommu.iommu:
        raise KernelError(errno.EINVAL, f"device {idev.id} is not behind the vIOMMU's IOMMU")
    if idev.vdev is not None:
        raise KernelError(errno.EEXIST, f"device {idev.id} has a vDEVICE")
    vdev = Vdevice(viommu, idev, cmd.virt_id)
    try:
        if injecting:
            kmalloc("struct xa_node")
        if cmd.virt_id in viommu.vdevs:
            raise KernelError(errno.EEXIST, f"{cmd.virt_id:#x} is another device's virtual id")
        viommu.vdevs[cmd.virt_id] = vdev
        cmd.out_vdevice_id = vdev.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(vdev)
        raise
    ctx.objects.finalize(vdev)
