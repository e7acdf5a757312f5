"""Queues that a client reads from a descriptor, after eventq.c of drivers/iommu/iommufd: what all share, and faults.

A queue is an object and a file; the file holds the object, so DESTROY is EBUSY until it is closed. Faults come in
groups: read whole, under one cookie, and answered by writing the cookie back. What came through an attachment is
answered INVALID when that ends.
"""

from __future__ import annotations

import errno
import heapq
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from struct import Struct

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import POLLIN, POLLOUT, POLLRDNORM, FileDescription, SystemCall
from kernel_model.ioctl import UserCommand
from kernel_model.iommu import core
from kernel_model.iommu.io_pgfault import (
    IOMMU_PAGE_RESP_INVALID,
    IOMMU_PAGE_RESP_SUCCESS,
    IopfGroup,
    iopf_group_response,
)
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import AttachHandle
from kernel_model.iommufd.object import Object
from uapi.behaviours import has
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, iommu_fault_alloc

#: iommu_hwpt_pgfault and iommu_hwpt_page_response.
_FAULT, _RESPONSE = Struct("<6IQ2I"), Struct("<2I")

#: Takes the bytes that belong at an offset of the reader's buffer. EFAULT.
Store = Callable[[int, bytes], None]


class EventqFile(FileDescription):
    """The descriptor of a queue (`iommufd_eventq_fops`). It holds the object and the context."""

    def __init__(self, queue: Object) -> None:
        self.queue = queue
        queue.users += 1
        queue.ctx.get()

    @abstractmethod
    def fetch(self, count: int, store: Store) -> int:
        """Take what fits into `count` bytes off the queue; the bytes stored. What cannot be stored stays."""

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        """Never blocks; empty is 0 bytes. ESPIPE: an offset. Then those of `fetch`."""
        data = bytearray()

        def store(start: int, piece: bytes) -> None:
            data[start : start + len(piece)] = piece

        return bytes(data[: self._fetch(count, offset, store)])

    def read_to(self, call: SystemCall, address: int, count: int, offset: int | None) -> int:
        """As `read`, with EFAULT."""
        return self._fetch(count, offset, lambda start, piece: call.copy_to_user(address + start, piece))

    def _fetch(self, count: int, offset: int | None, store: Store) -> int:
        if offset is not None:
            raise KernelError(errno.ESPIPE, "events are read from the front")
        return self.fetch(count, store)

    def set_readable(self, readable: bool) -> None:
        """Wake who waits in poll(2)."""
        self.queue.ctx.kernel.set_readable(self, readable)

    def release(self) -> None:
        self.queue.users -= 1
        self.queue.ctx.put()


class Fault(Object):
    """`struct iommufd_fault`."""

    __slots__ = ("_free_cookies", "_next_cookie", "deliver", "file", "response")

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        #: Groups that nobody has read, oldest first.
        self.deliver: deque[IopfGroup] = deque()
        #: Groups that nobody has answered, by cookie.
        self.response: dict[int, IopfGroup] = {}
        #: The descriptor, while it is open.
        self.file: FaultFile | None = None
        self._free_cookies: list[int] = []
        self._next_cookie = 1

    def handle(self, group: IopfGroup) -> None:
        """iommufd_fault_iopf_handler()."""
        self.deliver.append(group)
        self.wake()

    def wake(self) -> None:
        """Tell those who poll whether there is something to read."""
        if self.file is not None:
            self.file.set_readable(bool(self.deliver))

    def expect(self, group: IopfGroup) -> None:
        """Give the group the lowest free cookie, from 1 on. ENOMEM."""
        if injecting:
            kmalloc("struct xa_node")
        if self._free_cookies:
            group.cookie = heapq.heappop(self._free_cookies)
        else:
            group.cookie = self._next_cookie
            self._next_cookie += 1
        self.response[group.cookie] = group

    def take(self, cookie: int) -> IopfGroup | None:
        """The group of a cookie, which is free again; None where no group has it.

        Cookie 0 is kept back only by a mark of the kernel's table, which is there while the table is not empty, and
        which a client takes away by naming it.
        """
        group = self.response.pop(cookie, None)
        if group is not None or (cookie == 0 and self.response and 0 not in self._free_cookies):
            heapq.heappush(self._free_cookies, cookie)
        return group

    def auto_response(self, handle: core.AttachHandle) -> None:
        """iommufd_auto_response_faults(): what came through `handle` is answered INVALID and gone."""
        self._abandon(lambda group: group.handle is handle)

    def destroy(self) -> None:
        """iommufd_fault_destroy(): so is everything."""
        self._abandon(lambda group: True)

    def _abandon(self, which: Callable[[IopfGroup], bool]) -> None:
        unread = [group for group in self.deliver if which(group)]
        if unread:
            self.deliver = deque(group for group in self.deliver if not which(group))
            self.wake()
        read = [cookie for cookie, group in sorted(self.response.items()) if which(group)]
        for group in [*unread, *(self.response[cookie] for cookie in read)]:
            iopf_group_response(group, IOMMU_PAGE_RESP_INVALID)
        for cookie in read:
            self.take(cookie)


class FaultFile(EventqFile):
    """The descriptor of a fault queue (`iommufd_fault_fops`)."""

    path = "anon_inode:[iommufd-pgfault]"

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault
        fault.file = self

    def release(self) -> None:
        self.fault.file = None
        super().release()

    def fetch(self, count: int, store: Store) -> int:
        """iommufd_fault_fops_read(). ESPIPE: a count that is no multiple of a fault's 40 bytes. EINVAL: less than the
        first group needs. ENOMEM. EFAULT: for the first group; a later one ends the read."""
        if count % _FAULT.size:
            raise KernelError(errno.ESPIPE, "faults are read whole")
        fault, done = self.fault, 0
        while fault.deliver:
            group = fault.deliver[0]
            if len(group.faults) * _FAULT.size > count - done:
                if not done and has(fault.ctx.kernel.release, "fault-read-too-small"):
                    raise KernelError(errno.EINVAL, f"a group of {len(group.faults)} faults is waiting")
                break
            try:
                fault.expect(group)
                for index, message in enumerate(_messages(group)):
                    store(done + index * _FAULT.size, message)
            except KernelError:
                if fault.response.get(group.cookie) is group:
                    fault.take(group.cookie)
                if not done:
                    raise
                break
            fault.deliver.popleft()
            done += len(group.faults) * _FAULT.size
        if done:
            fault.wake()
        return done

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        """iommufd_fault_fops_write(). ESPIPE: an offset, or no multiple of a response's 8 bytes. For each response:
        EINVAL for an unknown code, or a cookie that no group has. An error after the first one ends the write."""
        content = memoryview(data).cast("B")
        return self._answer(len(content), offset, lambda start: content[start : start + _RESPONSE.size])

    def write_from(self, call: SystemCall, address: int, count: int, offset: int | None) -> int:
        """As `write`, with EFAULT."""
        return self._answer(count, offset, lambda start: call.copy_from_user(address + start, _RESPONSE.size))

    def _answer(self, count: int, offset: int | None, load: Callable[[int], bytes | memoryview]) -> int:
        if offset is not None or count % _RESPONSE.size:
            raise KernelError(errno.ESPIPE, "responses are written whole")
        done = 0
        while done < count:
            try:
                cookie, code = _RESPONSE.unpack(load(done))
                if code not in (IOMMU_PAGE_RESP_SUCCESS, IOMMU_PAGE_RESP_INVALID):
                    raise KernelError(errno.EINVAL, f"a response of {code}")
                group = self.fault.take(cookie)
                if group is None:
                    raise KernelError(errno.EINVAL, f"no fault with cookie {cookie} is outstanding")
            except KernelError:
                if not done:
                    raise
                break
            iopf_group_response(group, code)
            done += _RESPONSE.size
        return done

    def poll(self) -> int:
        return POLLOUT | (POLLIN | POLLRDNORM if self.fault.deliver else 0)


def _messages(group: IopfGroup) -> list[bytes]:
    """iommufd_compose_fault_message(), of each request. The device is the one that attached the group."""
    handle = group.handle
    if not isinstance(handle, AttachHandle):
        raise KernelBug("the fault came through no attachment of iommufd")
    return [
        _FAULT.pack(fault.flags, handle.idev.id, fault.pasid, fault.grpid, fault.perm, 0, fault.addr, 0, group.cookie)
        for fault in group.faults
    ]


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
