"""The ioctls of HWPTs, after hw_pagetable.c of drivers/iommu/iommufd. The object itself is in `hwpt`."""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.eventq import Fault
from kernel_model.iommufd.hwpt import Hwpt, HwptNested, HwptPaging, nested_alloc, paging_alloc
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.user_data import UserData, UserDataArray
from kernel_model.iommufd.viommu import Viommu, viommu_alloc_hwpt_nested
from uapi.behaviours import has
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_DATA_NONE,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_INVALIDATE,
    iommu_hwpt_alloc,
    iommu_hwpt_invalidate,
)

#: The most entries of one invalidation, and the longest entry.
_INVALIDATE_ENTRIES_MAX, _INVALIDATE_ENTRY_LENGTH_MAX = 1 << 19, 4096


@table.handles(IOMMU_HWPT_ALLOC)
def hwpt_alloc(ucmd: UserCommand[Context, iommu_hwpt_alloc]) -> None:
    """In order: EOPNOTSUPP reserved bits; EINVAL data without a type or a type without data; ENOENT device; EINVAL no
    such page table, or one of a wrong kind; `paging_alloc`, `nested_alloc` or `viommu_alloc_hwpt_nested`; ENOENT fault
    queue; EFAULT the reply. On an error there is no HWPT."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    if (cmd.data_type == IOMMU_HWPT_DATA_NONE) != (cmd.data_len == 0):
        raise KernelError(errno.EINVAL, f"data type {cmd.data_type} with {cmd.data_len} bytes")
    idev = ctx.objects.get(cmd.dev_id, IommufdDevice)
    try:
        parent = ctx.objects.get(cmd.pt_id, Object)
    except KernelError as error:
        raise KernelError(errno.EINVAL, f"no object has the id {cmd.pt_id}") from error
    data = UserData(ucmd.call, cmd.data_type, cmd.data_uptr, cmd.data_len)
    hwpt: Hwpt
    if isinstance(parent, Ioas):
        paging_data = data if data.length else None
        hwpt = paging_alloc(ctx, parent, idev.dev, idev.enforce_cache_coherency, cmd.flags, paging_data, None)
    elif isinstance(parent, HwptPaging):
        hwpt = nested_alloc(ctx, parent, idev.dev, cmd.flags, data)
    elif isinstance(parent, Viommu):
        hwpt = viommu_alloc_hwpt_nested(parent, idev, cmd.flags, data)
    else:
        raise KernelError(errno.EINVAL, f"object {cmd.pt_id} is no page table")
    try:
        if cmd.flags & IOMMU_HWPT_FAULT_ID_VALID:
            hwpt.fault = ctx.objects.get(cmd.fault_id, Fault)
            hwpt.fault.users += 1
            assert hwpt.domain is not None
            hwpt.domain.iopf_handler = hwpt.fault.handle
        cmd.out_hwpt_id = hwpt.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(hwpt)
        raise
    ctx.objects.finalize(hwpt)


@table.handles(IOMMU_HWPT_INVALIDATE)
def hwpt_invalidate(ucmd: UserCommand[Context, iommu_hwpt_invalidate]) -> None:
    """EOPNOTSUPP: reserved bits. EINVAL: entries without an address or a length, too long or too many. ENOENT. EINVAL:
    an object that has no cache of its own. Then the driver's. `entry_num` is written back in every case, as the number
    of entries handled, 0 where the driver was not asked; EFAULT, over any other errno, if it cannot be."""
    cmd = ucmd.cmd
    array = UserDataArray(ucmd.call, cmd.data_type, cmd.data_uptr, cmd.entry_len, cmd.entry_num)
    done = 0
    try:
        if cmd.__reserved:
            raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
        bad_entry = not cmd.data_uptr or not 0 < cmd.entry_len <= _INVALIDATE_ENTRY_LENGTH_MAX
        if cmd.entry_num and (bad_entry or cmd.entry_num > _INVALIDATE_ENTRIES_MAX):
            raise KernelError(errno.EINVAL, f"{cmd.entry_num} entries of {cmd.entry_len} bytes")
        target = ucmd.ctx.objects.get(cmd.hwpt_id, Object)
        if not isinstance(target, HwptNested | Viommu):
            number = errno.EINVAL if has(ucmd.ctx.kernel.release, "invalidate-any-object") else errno.ENOENT
            raise KernelError(number, f"object {cmd.hwpt_id} has no cache of its own")
        try:
            target.cache_invalidate(array)
        finally:
            done = array.entry_num
    finally:
        cmd.entry_num = done
        ucmd.respond()
