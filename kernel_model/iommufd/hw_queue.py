"""Queues in a guest's memory that hardware reads by itself, after viommu.c and driver.c of drivers/iommu/iommufd.

The hardware reads by physical address, so the queue's pages must be contiguous, and must stay: an access of the queue's
own, with an id of its own, pins them in the nesting parent's IOAS, and locks the mappings, so that UNMAP is EBUSY.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.access import Access
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.viommu import Viommu
from kernel_model.process import PAGE_MASK, PAGE_SIZE
from uapi.iommufd import IOMMU_HW_QUEUE_ALLOC, IOMMU_HW_QUEUE_TYPE_DEFAULT, iommu_hw_queue_alloc

#: The largest array of page pointers that kvmalloc() gives.
_MOST_PAGES = 0x7FFF_FFFF // 8


class QueueAccess(Access):
    """An access of the kernel's own (iommufd_access_create_internal()): what it pins it locks, and it holds no context.

    Nobody asks it to let go of anything.
    """

    __slots__ = ()

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx, True, lambda iova, length: None)
        self.users += 1
        ctx.objects.finalize(self)

    def destroy(self) -> None:
        if self.ioas is not None:
            self.change_ioas(None)

    def pin_pages(self, iova: int, length: int, write: bool) -> list[int]:
        found = super().pin_pages(iova, length, write)
        self._lock(iova, length, 1)
        return found

    def unpin_pages(self, iova: int, length: int) -> None:
        self._lock(iova, length, -1)
        super().unpin_pages(iova, length)

    def _lock(self, iova: int, length: int, change: int) -> None:
        if self.ioas is None:
            raise KernelBug("a queue's access has lost its IOAS")
        for area, _, _ in self.ioas.iopt.contiguous(iova, iova + length - 1):
            area.num_locks += change


class QueueMemory:
    """The pinned pages of [iova, iova + length), and the access that has them."""

    __slots__ = ("_access", "_iova", "_length", "base_pa")

    def __init__(self, ctx: Context, ioas: Ioas, iova: int, length: int) -> None:
        """iommufd_hw_queue_alloc_phys(). ERANGE: the pages end beyond 64 bits. ENOMEM: absurdly many. EADDRINUSE: a
        mapping of the IOAS is off the page. Then `Access.pin_pages`. EFAULT: the pages are not contiguous."""
        offset = iova & PAGE_MASK
        if offset + length + PAGE_MASK > U64_MAX:
            raise KernelError(errno.ERANGE, f"{length:#x} bytes from {offset:#x} on, in whole pages")
        npages = (offset + length + PAGE_MASK) // PAGE_SIZE
        if npages > _MOST_PAGES:
            raise KernelError(errno.ENOMEM, f"a queue of {npages} pages")
        if injecting:
            kmalloc("an array of pages", npages * 8)
        self._iova, self._length = iova - offset, npages * PAGE_SIZE
        self._access = QueueAccess(ctx)
        try:
            self._access.change_ioas(ioas)
            pages = self._access.pin_pages(self._iova, self._length, False)
            if pages != list(range(pages[0], pages[0] + self._length, PAGE_SIZE)):
                self._access.unpin_pages(self._iova, self._length)
                raise KernelError(errno.EFAULT, "the queue's pages are not contiguous")
        except KernelError:
            ctx.objects.destroy_user(self._access)
            raise
        #: The physical address of the queue.
        self.base_pa = pages[0] + offset

    def release(self) -> None:
        """iommufd_hw_queue_destroy_access()."""
        self._access.unpin_pages(self._iova, self._length)
        self._access.ctx.objects.destroy_user(self._access)


class HwQueue(Object):
    """`struct iommufd_hw_queue`."""

    __slots__ = ("base_addr", "driver_destroy", "length", "memory", "type", "viommu")

    def __init__(self, viommu: Viommu, kind: int, iova: int, length: int) -> None:
        super().__init__(viommu.ctx)
        self.viommu = viommu
        self.type = kind
        #: The IOVA of its first byte, and its bytes.
        self.base_addr = iova
        self.length = length
        self.memory: QueueMemory | None = None
        #: What the driver wants done when the queue goes.
        self.driver_destroy: Callable[[], None] | None = None

    def pin(self) -> int:
        """Take the queue's memory, and hold the vIOMMU; the physical address."""
        self.memory = QueueMemory(self.ctx, self.viommu.hwpt.ioas, self.base_addr, self.length)
        self.viommu.users += 1
        return self.memory.base_pa

    def depend(self, other: HwQueue) -> None:
        """iommufd_hw_queue_depend(): `other` cannot go before this one."""
        if other is self:
            raise KernelBug("a queue depends on itself")
        other.users += 1

    def undepend(self, other: HwQueue) -> None:
        """iommufd_hw_queue_undepend()."""
        other.users -= 1

    def destroy(self) -> None:
        if self.driver_destroy is not None:
            self.driver_destroy()
        if self.memory is not None:
            self.memory.release()
            self.viommu.users -= 1


@table.handles(IOMMU_HW_QUEUE_ALLOC)
def hw_queue_alloc(ucmd: UserCommand[Context, iommu_hw_queue_alloc]) -> None:
    """EOPNOTSUPP: flags or no type. EINVAL: length 0. EOVERFLOW: the range wraps. ENOENT: vIOMMU. EOPNOTSUPP: it has no
    queues of that type. Then `QueueMemory` and the driver's errnos. EFAULT: the reply. On an error there is no queue,
    and nothing is pinned."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags or cmd.type == IOMMU_HW_QUEUE_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}")
    if not cmd.length:
        raise KernelError(errno.EINVAL, "length is zero")
    if cmd.nesting_parent_iova + cmd.length - 1 > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{cmd.nesting_parent_iova:#x} + {cmd.length:#x} wraps")
    viommu = ctx.objects.get(cmd.viommu_id, Viommu)
    if not viommu.ops.has_hw_queue(cmd.type):
        raise KernelError(errno.EOPNOTSUPP, f"the vIOMMU has no queues of type {cmd.type:#x}")
    queue = HwQueue(viommu, cmd.type, cmd.nesting_parent_iova, cmd.length)
    try:
        viommu.ops.hw_queue_init_phys(queue, cmd.index, queue.pin())
        cmd.out_hw_queue_id = queue.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(queue)
        raise
    ctx.objects.finalize(queue)
