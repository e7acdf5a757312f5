"""vIOMMUs, vDEVICEs and their queues, after viommu.c of drivers/iommu/iommufd.

The IOMMUs of the model's machines offer none, as a real VT-d does not: here are the argument checks in the kernel's
order up to the driver's EOPNOTSUPP.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.hwpt import HwptNested
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.user_data import UserData, UserDataArray
from uapi.iommufd import (
    IOMMU_HW_QUEUE_ALLOC,
    IOMMU_HW_QUEUE_TYPE_DEFAULT,
    IOMMU_VDEVICE_ALLOC,
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VEVENTQ_TYPE_DEFAULT,
    IOMMU_VIOMMU_ALLOC,
    IOMMU_VIOMMU_TYPE_DEFAULT,
    iommu_hw_queue_alloc,
    iommu_vdevice_alloc,
    iommu_veventq_alloc,
    iommu_viommu_alloc,
)

_VEVENTQ_DEPTH_MAX = 1 << 19


class Viommu(Object):
    """`struct iommufd_viommu`. No driver makes one."""

    __slots__ = ()

    def cache_invalidate(self, array: UserDataArray) -> None:
        """The driver's `cache_invalidate`. EOPNOTSUPP: it has none."""
        array.entry_num = 0
        raise KernelError(errno.EOPNOTSUPP, "the vIOMMU has no cache that a user invalidates")


def viommu_alloc_hwpt_nested(viommu: Viommu, idev: IommufdDevice, flags: int, user_data: UserData) -> HwptNested:
    """iommufd_viommu_alloc_hwpt_nested(). EOPNOTSUPP: the driver has no nested domains for its vIOMMUs."""
    raise KernelError(errno.EOPNOTSUPP, "the vIOMMU has no nested domains")


@table.handles(IOMMU_VIOMMU_ALLOC)
def viommu_alloc(ucmd: UserCommand[Context, iommu_viommu_alloc]) -> None:
    """EOPNOTSUPP: flags or no type. ENOENT: device. EOPNOTSUPP: its IOMMU has no vIOMMUs."""
    cmd = ucmd.cmd
    if cmd.flags or cmd.type == IOMMU_VIOMMU_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}")
    ucmd.ctx.objects.get(cmd.dev_id, IommufdDevice)
    raise KernelError(errno.EOPNOTSUPP, "the device's IOMMU has no vIOMMUs")


@table.handles(IOMMU_VDEVICE_ALLOC)
def vdevice_alloc(ucmd: UserCommand[Context, iommu_vdevice_alloc]) -> None:
    """ENOENT: no such vIOMMU."""
    ucmd.ctx.objects.get(ucmd.cmd.viommu_id, Viommu)


@table.handles(IOMMU_VEVENTQ_ALLOC)
def veventq_alloc(ucmd: UserCommand[Context, iommu_veventq_alloc]) -> None:
    """EOPNOTSUPP: flags, reserved bits or no type. EINVAL: a depth of 0 or above 2^19. ENOENT: no such vIOMMU."""
    cmd = ucmd.cmd
    if cmd.flags or cmd.__reserved or cmd.type == IOMMU_VEVENTQ_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}, or __reserved")
    if not 0 < cmd.veventq_depth <= _VEVENTQ_DEPTH_MAX:
        raise KernelError(errno.EINVAL, f"a queue of {cmd.veventq_depth} events")
    ucmd.ctx.objects.get(cmd.viommu_id, Viommu)


@table.handles(IOMMU_HW_QUEUE_ALLOC)
def hw_queue_alloc(ucmd: UserCommand[Context, iommu_hw_queue_alloc]) -> None:
    """EOPNOTSUPP: flags or no type. EINVAL: length 0. EOVERFLOW: the range wraps. ENOENT: no such vIOMMU."""
    cmd = ucmd.cmd
    if cmd.flags or cmd.type == IOMMU_HW_QUEUE_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}")
    if not cmd.length:
        raise KernelError(errno.EINVAL, "length is zero")
    if cmd.nesting_parent_iova + cmd.length - 1 > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{cmd.nesting_parent_iova:#x} + {cmd.length:#x} wraps")
    ucmd.ctx.objects.get(cmd.viommu_id, Viommu)
