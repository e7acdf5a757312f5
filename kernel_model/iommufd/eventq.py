"""Queues that a client reads from a descriptor, after eventq.c of drivers/iommu/iommufd.

A fault queue is an object and a file; the file holds the object, so DESTROY is EBUSY until it is closed. No IOMMU of
the model's machines reports faults to user space yet: a queue can be made, given to a HWPT, read (empty) and polled.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.file import POLLOUT, POLLWRNORM, FileDescription, SystemCall
from kernel_model.ioctl import UserCommand
from kernel_model.iommu.core import AttachHandle
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.object import Object
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, iommu_fault_alloc

_FAULT_SIZE, _RESPONSE_SIZE = 40, 8


class Fault(Object):
    """`struct iommufd_fault`."""

    __slots__ = ()

    def auto_response(self, handle: AttachHandle) -> None:
        """iommufd_auto_response_faults(): what came through `handle` is answered INVALID and gone."""


class FaultFile(FileDescription):
    """The descriptor of a fault queue. It holds the object and the context."""

    path = "anon_inode:[iommufd-pgfault]"

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        fault.users += 1
        fault.ctx.get()

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        """Never blocks; empty is 0 bytes. ESPIPE: an offset, or a count that is no multiple of a fault's 40 bytes."""
        if offset is not None or count % _FAULT_SIZE:
            raise KernelError(errno.ESPIPE, "faults are read whole, from the front")
        return b""

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        """ESPIPE: an offset, or no multiple of a response's 8 bytes. EINVAL: an unknown code, or, since no fault is
        outstanding, any cookie."""
        if offset is not None or len(data) % _RESPONSE_SIZE:
            raise KernelError(errno.ESPIPE, "responses are written whole")
        if not data:
            return 0
        raise KernelError(errno.EINVAL, "no fault with that cookie is outstanding")

    def poll(self) -> int:
        return POLLOUT | POLLWRNORM

    def release(self) -> None:
        self._fault.users -= 1
        self._fault.ctx.put()


@table.handles(IOMMU_FAULT_QUEUE_ALLOC)
def fault_alloc(ucmd: UserCommand[Context, iommu_fault_alloc]) -> None:
    """EOPNOTSUPP: flags. EMFILE. EFAULT: the reply; then there is neither object nor descriptor."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags:
        raise KernelError(errno.EOPNOTSUPP, "no flags are defined")
    fault = Fault(ctx)
    file = FaultFile(fault)
    try:
        fd = ctx.kernel.install_for(ucmd.call.process, file)
    except KernelError:
        ctx.objects.abort(fault)
        raise
    cmd.out_fault_id = fault.id
    cmd.out_fault_fd = fd
    try:
        ucmd.respond()
    except KernelError:
        ctx.kernel.close_for(ucmd.call.process, fd)
        ctx.objects.abort(fault)
        raise
    ctx.objects.finalize(fault)
