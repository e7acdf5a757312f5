"""The IOAS that VFIO compatible calls use: IOMMU_VFIO_IOAS, after vfio_compat.c of drivers/iommu/iommufd.

Left out: the VFIO container calls on an iommufd descriptor themselves; `Context.vfio_ioctl` answers them ENOTTY.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.ioas import Ioas
from uapi.iommufd import (
    IOMMU_VFIO_IOAS,
    IOMMU_VFIO_IOAS_CLEAR,
    IOMMU_VFIO_IOAS_GET,
    IOMMU_VFIO_IOAS_SET,
    iommu_vfio_ioas,
)


@table.handles(IOMMU_VFIO_IOAS)
def vfio_ioas(ucmd: UserCommand[Context, iommu_vfio_ioas]) -> None:
    """EOPNOTSUPP: reserved bits or an unknown operation. GET: ENODEV if none is set; EFAULT. SET: ENOENT."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    if cmd.op == IOMMU_VFIO_IOAS_GET:
        if ctx.vfio_ioas is None:
            raise KernelError(errno.ENODEV, "no IOAS is set for VFIO")
        cmd.ioas_id = ctx.vfio_ioas.id
        ucmd.respond()
    elif cmd.op == IOMMU_VFIO_IOAS_SET:
        ctx.vfio_ioas = ctx.objects.get(cmd.ioas_id, Ioas)
    elif cmd.op == IOMMU_VFIO_IOAS_CLEAR:
        ctx.vfio_ioas = None
    else:
        raise KernelError(errno.EOPNOTSUPP, f"no operation {cmd.op}")
