"""Queues of a vIOMMU's events for the guest, after the vEVENTQ half of eventq.c and driver.c of drivers/iommu/iommufd.

An event is a header (flags and sequence) and the driver's data. What finds the queue full is lost; one header with
IOMMU_VEVENTQ_FLAG_LOST_EVENTS at the queue's end says so, until an event fits again. Lost events count in the sequence.
"""

from __future__ import annotations

import errno
from collections import deque
from itertools import islice
from struct import Struct

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import POLLIN, POLLRDNORM
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.eventq import EventqFile, Store
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.viommu import Viommu
from uapi.iommufd import (
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VEVENTQ_FLAG_LOST_EVENTS,
    IOMMU_VEVENTQ_TYPE_DEFAULT,
    iommu_veventq_alloc,
)

_DEPTH_MAX = 1 << 19
#: The sequence of an event is below this (INT_MAX + 1).
_SEQUENCES = 1 << 31
_HEADER = Struct("<2I")


class Veventq(Object):
    """`struct iommufd_veventq`."""

    __slots__ = ("depth", "events", "file", "lost", "sequence", "type", "viommu")

    def __init__(self, viommu: Viommu, kind: int, depth: int) -> None:
        super().__init__(viommu.ctx)
        self.viommu = viommu
        self.type = kind
        self.depth = depth
        #: Each with its header, oldest first.
        self.events: deque[bytes] = deque()
        #: The header behind them all that tells of lost events, if any.
        self.lost: bytes | None = None
        self.sequence = 0
        #: The descriptor, while it is open.
        self.file: VeventqFile | None = None
        viommu.users += 1
        viommu.veventqs[kind] = self

    def destroy(self) -> None:
        """iommufd_veventq_abort()."""
        self.viommu.users -= 1
        del self.viommu.veventqs[self.type]

    def report(self, data: bytes) -> None:
        """The queue's half of iommufd_viommu_report_event(). ENOMEM: the event is lost for want of memory."""
        sequence, self.sequence = self.sequence, (self.sequence + 1) % _SEQUENCES
        was_empty = not self.events and self.lost is None
        try:
            if injecting:
                kmalloc("struct iommufd_vevent", gfp_wait=False)
        except KernelError:
            self.lost = _HEADER.pack(IOMMU_VEVENTQ_FLAG_LOST_EVENTS, sequence)
            raise
        else:
            if len(self.events) == self.depth:
                self.lost = _HEADER.pack(IOMMU_VEVENTQ_FLAG_LOST_EVENTS, sequence)
            else:
                self.lost = None
                self.events.append(_HEADER.pack(0, sequence) + data)
        finally:
            if was_empty and self.file is not None:
                self.file.set_readable(True)


class VeventqFile(EventqFile):
    """The descriptor of an event queue (`iommufd_veventq_fops`); it has no write."""

    path = "anon_inode:[iommufd-viommu-event]"

    def __init__(self, queue: Veventq) -> None:
        super().__init__(queue)
        self._events = queue
        queue.file = self

    def release(self) -> None:
        self._events.file = None
        super().release()

    def fetch(self, count: int, store: Store) -> int:
        """iommufd_veventq_fops_read(). EINVAL: less than a header, or than the first event needs. EFAULT: for the first
        event; a later one ends the read."""
        if count < _HEADER.size:
            raise KernelError(errno.EINVAL, f"{count} bytes are less than a header")
        queue = self._events
        events, done = queue.events, self._fetch_at_once(count, store)
        try:
            while events:
                if done + len(events[0]) > count:
                    if not done:
                        raise KernelError(errno.EINVAL, f"the first event has {len(events[0])} bytes")
                    return done
                store(done, events[0])
                done += len(events.popleft())
            if queue.lost is not None and done + _HEADER.size <= count:
                if injecting:
                    kmalloc("a copy of the header of lost events", gfp_wait=False)
                store(done, queue.lost)
                queue.lost = None
                done += _HEADER.size
        except KernelError:
            if not done:
                raise
        finally:
            if done and not self.poll():
                self.set_readable(False)
        return done

    def _fetch_at_once(self, count: int, store: Store) -> int:
        """The events that fit, stored in one piece; none of them where that is not possible."""
        events, fitting, size = self._events.events, 0, 0
        if injecting:
            return 0  # each event has a copy of its own that can fail
        for event in events:
            if size + len(event) > count:
                break
            fitting += 1
            size += len(event)
        try:
            store(0, b"".join(islice(events, fitting)))
        except KernelError:
            return 0
        for _ in range(fitting):
            events.popleft()
        return size

    def poll(self) -> int:
        return POLLIN | POLLRDNORM if self._events.events or self._events.lost is not None else 0


@table.handles(IOMMU_VEVENTQ_ALLOC)
def veventq_alloc(ucmd: UserCommand[Context, iommu_veventq_alloc]) -> None:
    """EOPNOTSUPP: flags, reserved bits or no type. EINVAL: a depth of 0 or above 2^19. ENOENT: vIOMMU. EEXIST: it has a
    queue of that type. EMFILE. EFAULT: the reply. On an error there is neither object nor descriptor."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags or cmd.__reserved or cmd.type == IOMMU_VEVENTQ_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}, or __reserved")
    if not 0 < cmd.veventq_depth <= _DEPTH_MAX:
        raise KernelError(errno.EINVAL, f"a queue of {cmd.veventq_depth} events")
    viommu = ctx.objects.get(cmd.viommu_id, Viommu)
    if cmd.type in viommu.veventqs:
        raise KernelError(errno.EEXIST, f"the vIOMMU has a queue of type {cmd.type:#x}")
    queue = Veventq(viommu, cmd.type, cmd.veventq_depth)
    fd = -1
    try:
        fd = ctx.kernel.install_for(ucmd.call.process, VeventqFile(queue))
        cmd.out_veventq_id = queue.id
        cmd.out_veventq_fd = fd
        ucmd.respond()
    except KernelError:
        if fd >= 0:
            ctx.kernel.close_for(ucmd.call.process, fd)
        ctx.objects.abort(queue)
        raise
    ctx.objects.finalize(queue)
