"""/dev/iommu itself: the node, DESTROY and OPTION, after main.c of drivers/iommu/iommufd.

Importing this module also loads the files whose handlers make up the table.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import FileDescription, SystemCall
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd import (
    device,
    dirty,
    eventq,
    hw_queue,
    hwpt_ioctl,
    ioas,
    selftest,
    vdevice,
    veventq,
    vfio_compat,
    viommu,
)
from kernel_model.iommufd.ctx import ACCOUNT_MM, ACCOUNT_USER, Context, table
from kernel_model.process import CAP_SYS_RESOURCE
from uapi.backend import DEV_IOMMU
from uapi.cstruct import offsetofend
from uapi.iommufd import (
    IOMMU_DESTROY,
    IOMMU_OPTION,
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_OP_SET,
    IOMMU_OPTION_RLIMIT_MODE,
    iommu_destroy,
    iommu_option,
)

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

_VAL64_OFFSET = offsetofend(iommu_option, "val64") - 8

#: The files that put handlers on the table.
PARTS = (device, dirty, eventq, hw_queue, hwpt_ioctl, ioas, selftest, vdevice, veventq, vfio_compat, viommu)


def register(kernel: Kernel) -> None:
    """Publish /dev/iommu with the ioctls of the kernel's release."""
    entries = table.flatten(kernel.release)
    if not entries:
        return  # a release before 6.2 has no iommufd

    def open_context(call: SystemCall, flags: int) -> FileDescription:
        if injecting:
            kmalloc("struct iommufd_ctx")
        context = Context(kernel, entries)
        kernel.contexts.add(context)
        return context

    kernel.files.add_node(DEV_IOMMU, open_context, 0o660)


@table.handles(IOMMU_DESTROY)
def destroy(ucmd: UserCommand[Context, iommu_destroy]) -> None:
    """ENOENT: no such object. EBUSY: it is in use."""
    ucmd.ctx.objects.remove(ucmd.cmd.id)


@table.handles(IOMMU_OPTION)
def option(ucmd: UserCommand[Context, iommu_option]) -> None:
    """EOPNOTSUPP: reserved bits, an unknown option or operation. Otherwise see the options."""
    cmd = ucmd.cmd
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    if cmd.option_id == IOMMU_OPTION_RLIMIT_MODE:
        _rlimit_mode(ucmd)
    elif cmd.option_id == IOMMU_OPTION_HUGE_PAGES:
        ioas.option_huge_pages(ucmd)
    else:
        raise KernelError(errno.EOPNOTSUPP, f"no option {cmd.option_id}")
    ucmd.call.copy_to_user(ucmd.address + _VAL64_OFFSET, bytes(ctypes.c_uint64(cmd.val64)))


def _rlimit_mode(ucmd: UserCommand[Context, iommu_option]) -> None:
    """EOPNOTSUPP: an object id, or an unknown operation. SET: EPERM without CAP_SYS_RESOURCE; EBUSY once any object
    exists; EINVAL for a value that is not 0 or 1, in this order."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.object_id:
        raise KernelError(errno.EOPNOTSUPP, "RLIMIT_MODE belongs to the context, not to an object")
    if cmd.op == IOMMU_OPTION_OP_GET:
        cmd.val64 = int(ctx.account_mode == ACCOUNT_MM)
    elif cmd.op == IOMMU_OPTION_OP_SET:
        if not ucmd.call.process.capable(CAP_SYS_RESOURCE):
            raise KernelError(errno.EPERM, "RLIMIT_MODE is set with CAP_SYS_RESOURCE")
        if len(ctx.objects):
            raise KernelError(errno.EBUSY, "RLIMIT_MODE is set before the first object exists")
        if cmd.val64 not in (0, 1):
            raise KernelError(errno.EINVAL, f"RLIMIT_MODE {cmd.val64}")
        ctx.account_mode = ACCOUNT_MM if cmd.val64 else ACCOUNT_USER
    else:
        raise KernelError(errno.EOPNOTSUPP, f"no operation {cmd.op}")
