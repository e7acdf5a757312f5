"""Dirty tracking, after hw_pagetable.c and io_pagetable.c of drivers/iommu/iommufd.

What a domain has in its table is the driver's (`core.Domain.read_and_clear_dirty`).
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommu.core import Domain
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.hwpt import HwptPaging
from kernel_model.iommufd.io_pagetable import IoPagetable
from kernel_model.iommufd.iova_bitmap import IovaBitmap
from uapi.behaviours import has
from uapi.iommufd import (
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    iommu_hwpt_get_dirty_bitmap,
    iommu_hwpt_set_dirty_tracking,
)


def _tracked(hwpt: HwptPaging) -> Domain:
    """EOPNOTSUPP: the HWPT was allocated without dirty tracking."""
    assert hwpt.domain is not None
    if not hwpt.domain.dirty_ops:
        raise KernelError(errno.EOPNOTSUPP, "the HWPT was allocated without dirty tracking")
    return hwpt.domain


@table.handles(IOMMU_HWPT_SET_DIRTY_TRACKING)
def set_dirty_tracking(ucmd: UserCommand[Context, iommu_hwpt_set_dirty_tracking]) -> None:
    """Switching on, even again, makes everything clean; switching off leaves what is dirty.

    EOPNOTSUPP: unknown flags. ENOENT: no such paging HWPT. EOPNOTSUPP: it was not allocated with dirty tracking.
    """
    cmd = ucmd.cmd
    if cmd.flags & ~IOMMU_HWPT_DIRTY_TRACKING_ENABLE:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    hwpt = ucmd.ctx.objects.get(cmd.hwpt_id, HwptPaging)
    domain = _tracked(hwpt)
    enable = bool(cmd.flags & IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    if enable:
        for area in hwpt.ioas.iopt.areas.values():
            domain.read_and_clear_dirty(area.iova, area.length, 0, None)
    domain.set_dirty_tracking(enable)


@table.handles(IOMMU_HWPT_GET_DIRTY_BITMAP)
def get_dirty_bitmap(ucmd: UserCommand[Context, iommu_hwpt_get_dirty_bitmap]) -> None:
    """Set the bits of what is dirty, up to the first IOVA that is not mapped. Tracking need not be on.

    Nothing after the checks is an error, neither a hole nor a bitmap that cannot be written: dirty leaves that find no
    bit are made clean all the same. EOPNOTSUPP: unknown flags or reserved bits. ENOENT. EINVAL: length 0. EOVERFLOW:
    the range wraps. EINVAL: the range is not aligned to the IOAS or to the page size, or that is 0. EOPNOTSUPP: no
    dirty tracking.
    """
    cmd = ucmd.cmd
    if cmd.flags & ~IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} or __reserved")
    hwpt = ucmd.ctx.objects.get(cmd.hwpt_id, HwptPaging)
    iova, length, page_size = cmd.iova, cmd.length, cmd.page_size
    if not length and (iova or has(ucmd.ctx.kernel.release, "dirty-bitmap-length-0")):
        known = has(ucmd.ctx.kernel.release, "dirty-bitmap-length-0")
        raise KernelError(errno.EINVAL if known else errno.EOVERFLOW, "length is zero")
    end = iova + (length or U64_MAX + 1)
    if end - 1 > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{iova:#x} + {length:#x} wraps")
    mask = hwpt.ioas.iopt.iova_alignment - 1
    if (iova | end) & mask:
        raise KernelError(errno.EINVAL, f"the range is not aligned to {mask + 1:#x}")
    if not page_size or (iova | end) & (page_size - 1):
        raise KernelError(errno.EINVAL, f"page size {page_size:#x}")
    domain = _tracked(hwpt)
    if injecting:
        kmalloc("struct iova_bitmap")
    mapped = _mapped_from(hwpt.ioas.iopt, iova, end - 1)
    if mapped:
        bitmap = IovaBitmap(ucmd.call, iova, length, page_size, cmd.data)
        domain.read_and_clear_dirty(iova, mapped, cmd.flags, bitmap)
        bitmap.flush()


def _mapped_from(iopt: IoPagetable, iova: int, last: int) -> int:
    """How many bytes from `iova` on, no further than `last`, are mapped without a hole."""
    first = iopt.area_at(iova, iova)
    if first is None:
        return 0
    end = first.last
    for start in iopt.areas.irange(first.last + 1):
        if end >= last or start != end + 1:
            break
        end = iopt.areas[start].last
    return min(end, last) - iova + 1
