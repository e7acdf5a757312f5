"""Dirty tracking, after hw_pagetable.c and io_pagetable.c of drivers/iommu/iommufd.

No IOMMU of the model's machines tracks dirty pages, so every HWPT answers EOPNOTSUPP after the checks of the arguments.
Left out: the mock driver's tracking. A mock HWPT can be allocated with dirty tracking, and then answers the same.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.hwpt import HwptPaging
from uapi.iommufd import (
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    iommu_hwpt_get_dirty_bitmap,
    iommu_hwpt_set_dirty_tracking,
)


@table.handles(IOMMU_HWPT_SET_DIRTY_TRACKING)
def set_dirty_tracking(ucmd: UserCommand[Context, iommu_hwpt_set_dirty_tracking]) -> None:
    """EOPNOTSUPP: unknown flags. ENOENT: no such paging HWPT. EOPNOTSUPP: it was not allocated with dirty tracking."""
    cmd = ucmd.cmd
    if cmd.flags & ~IOMMU_HWPT_DIRTY_TRACKING_ENABLE:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    ucmd.ctx.objects.get(cmd.hwpt_id, HwptPaging)
    raise KernelError(errno.EOPNOTSUPP, "the HWPT was allocated without dirty tracking")


@table.handles(IOMMU_HWPT_GET_DIRTY_BITMAP)
def get_dirty_bitmap(ucmd: UserCommand[Context, iommu_hwpt_get_dirty_bitmap]) -> None:
    """EOPNOTSUPP: unknown flags or reserved bits. ENOENT. EINVAL: length 0. EOVERFLOW: the range wraps. EINVAL: the
    range is not aligned to the IOAS or to the page size, or that is 0. EOPNOTSUPP: no dirty tracking."""
    cmd = ucmd.cmd
    if cmd.flags & ~IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} or __reserved")
    hwpt = ucmd.ctx.objects.get(cmd.hwpt_id, HwptPaging)
    if not cmd.length:
        raise KernelError(errno.EINVAL, "length is zero")
    end = cmd.iova + cmd.length
    if end - 1 > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{cmd.iova:#x} + {cmd.length:#x} wraps")
    mask = hwpt.ioas.iopt.iova_alignment - 1
    if (cmd.iova | end) & mask:
        raise KernelError(errno.EINVAL, f"the range is not aligned to {mask + 1:#x}")
    if not cmd.page_size or (cmd.iova | end) & (cmd.page_size - 1):
        raise KernelError(errno.EINVAL, f"page size {cmd.page_size:#x}")
    raise KernelError(errno.EOPNOTSUPP, "the HWPT was allocated without dirty tracking")
