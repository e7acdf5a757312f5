"""Client memory behind physical addresses.

`ClientMemory` holds the buffers that `Kernel.buffer()` gave out. Such memory cannot vanish under a DMA: closing a
buffer while the model may still reach it only marks it, so copies go directly, without asking the host's kernel.

`MmBacking` is what answers for a place of an address space in the physical one: directly inside a live buffer
of the model's own process, by `process_vm_readv/writev` elsewhere, from what was kept of a process that has gone, and
with `BusAbort` where the memory is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
from bisect import bisect_right

from fakedev.memory import BusAbort
from kernel_model.errors import KernelError
from kernel_model.process import PAGE_SIZE, Mm
from uapi.buffers import HUGE_PAGE, AnonymousBuffer


class ClientBuffer(AnonymousBuffer):
    """A buffer whose memory outlives `close()` for as long as it is pinned."""

    def __init__(self, owner: ClientMemory, length: int, huge: bool) -> None:
        # Huge pages of the host are not needed for `huge`: to the model they differ from ordinary memory at a 2 MiB
        # boundary in nothing, because its pages are contiguous anyway.
        super().__init__(max(length, HUGE_PAGE) if huge else length)
        pages = (length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        self.end = self.address + pages
        self.huge = huge
        self.pins = 0
        skip = self.address - ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        #: The buffer's whole pages, for the model.
        self.direct = memoryview(self._map)[skip : skip + pages]
        self._owner = owner
        self._closed = False

    @property
    def view(self) -> memoryview:
        if getattr(self, "_closed", False):
            raise ValueError("the buffer is closed")
        return super().view

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.closed(self)

    def free(self) -> None:
        """Give the memory back to the host. BufferError: somebody still has a view of it; then it goes with that."""
        self.direct.release()
        super().close()


class ClientMemory:
    """The live buffers of one process, found by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[ClientBuffer] = []
        self._last: ClientBuffer | None = None

    def allocate(self, length: int, huge: bool) -> ClientBuffer:
        made = ClientBuffer(self, length, huge)
        index = bisect_right(self._starts, made.address)
        self._starts.insert(index, made.address)
        self._buffers.insert(index, made)
        return made

    def find(self, address: int, length: int) -> ClientBuffer | None:
        """The buffer that holds the whole range."""
        last = self._last
        if last is not None and last.address <= address and address + length <= last.end:
            return last
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        found = self._buffers[index]
        if address + length > found.end:
            return None
        self._last = found
        return found

    def pin(self, address: int, length: int) -> None:
        found = self.find(address, length)
        if found is not None:
            found.pins += 1

    def unpin(self, address: int, length: int) -> None:
        found = self.find(address, length)
        if found is not None and found.pins:
            found.pins -= 1
            if found.pins == 0 and found._closed:
                with contextlib.suppress(BufferError):  # not what this call is about
                    self._free(found)

    def closed(self, buffer: ClientBuffer) -> None:
        if buffer.pins == 0:
            self._free(buffer)

    def _free(self, buffer: ClientBuffer) -> None:
        index = bisect_right(self._starts, buffer.address) - 1
        del self._starts[index], self._buffers[index]
        if self._last is buffer:
            self._last = None
        buffer.free()


class MmBacking:
    """The memory of one address space from `start` on, as the physical address space sees it."""

    def __init__(self, mm: Mm, start: int) -> None:
        self._mm = mm
        self._start = start

    def view(self, offset: int, length: int) -> memoryview | None:
        buffers = self._mm.buffers
        address = self._start + offset
        if buffers is None:
            return None if self._mm.alive else self._mm.remaining(address, length)
        found = buffers.find(address, length)
        if found is None:
            return None
        start = address - found.address
        return found.direct[start : start + length]

    def read(self, offset: int, length: int) -> bytes:
        view = self.view(offset, length)
        if view is not None:
            return bytes(view)
        try:
            return self._mm.read(self._start + offset, length)
        except KernelError as error:
            raise BusAbort(self._mm.physical(self._start + offset)) from error

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = self.view(offset, len(data))
        if view is not None:
            view[:] = data
            return
        try:
            self._mm.write(self._start + offset, data)
        except KernelError as error:
            raise BusAbort(self._mm.physical(self._start + offset)) from error
