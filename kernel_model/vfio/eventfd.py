"""Eventfds of clients: `eventfd_ctx_fdget()`, `eventfd_signal()`, and virqfd, which is called when one is signalled.

An eventfd is the client's own, a real one of the host. Mirrors fs/eventfd.c as VFIO uses it and drivers/vfio/virqfd.c.
The model has no threads: a signal by the client is noticed when the next call enters the kernel.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

_NAME = "anon_inode:[eventfd]"


class EventFd:
    """`struct eventfd_ctx`: a reference to a client's eventfd, which outlives the client's descriptor."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN | select.POLLOUT)

    def _ready(self) -> int:
        return sum(events for _, events in self._poll.poll(0))

    @property
    def is_signalled(self) -> bool:
        return bool(self._ready() & select.POLLIN)

    def signal(self) -> None:
        """eventfd_signal(): add one. A counter that is full stays full."""
        if self._ready() & select.POLLOUT:
            os.eventfd_write(self.fd, 1)
            self._kernel.wake()

    def consume(self) -> None:
        """Take back what was signalled."""
        if self.is_signalled:
            os.eventfd_read(self.fd)

    def put(self) -> None:
        os.close(self.fd)


def eventfd_ctx_fdget(call: SystemCall, fd: int) -> EventFd:
    """EBADF: not open. EINVAL: not an eventfd."""
    taken = call.process.take_fd(fd)
    if os.readlink(f"/proc/self/fd/{taken}") != _NAME:
        os.close(taken)
        raise KernelError(errno.EINVAL, f"descriptor {fd} is no eventfd")
    return EventFd(call.kernel, taken)


class VirqFd:
    """`struct virqfd`: `handler` runs after each signal of a client's eventfd, and the signal is consumed.

    A signal that was there before counts, and stays.
    """

    def __init__(self, call: SystemCall, fd: int, handler: Callable[[], None]) -> None:
        """vfio_virqfd_enable(). EBADF, EINVAL: as `eventfd_ctx_fdget`."""
        self._eventfd = eventfd_ctx_fdget(call, fd)
        self._kernel = call.kernel
        self._handler = handler
        self._was_signalled = self._eventfd.is_signalled
        self._kernel.watch(self._eventfd.fd, self._wakeup)
        if self._was_signalled:
            handler()

    def _wakeup(self) -> None:
        if self._was_signalled:
            self._was_signalled = False  # the watch reports the old signal once; it has been dealt with
            return
        # Not asked again whether it is readable: another virqfd of the same eventfd may have consumed the signal.
        self._eventfd.consume()
        self._handler()

    def disable(self) -> None:
        """vfio_virqfd_disable(): no call from now on."""
        self._kernel.unwatch(self._eventfd.fd)
        self._eventfd.put()
