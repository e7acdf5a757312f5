"""kernel_model/client_memory.py: buffers of the model that outlive their close while pinned, and what DMA finds."""

from __future__ import annotations

import pytest

from fakedev.memory import BusAbort
from kernel_model.iommufd.pages import UserPages
from kernel_model.kernel import Kernel

PAGE = 4096


def pinned(kernel: Kernel, address: int, length: int) -> UserPages:
    pages = UserPages(kernel, kernel.process, address, length, True)
    pages.pin(0, pages.npages - 1)
    return pages


def test_buffer_that_is_closed_while_pinned_stays_until_it_is_unpinned(kernel: Kernel) -> None:
    buffer = kernel.buffer(2 * PAGE)
    pages = pinned(kernel, buffer.address, 2 * PAGE)
    where = kernel.process.mm.physical(buffer.address)
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.view
    kernel.memory.write(where, b"still there")
    assert kernel.memory.read(where, 5) == b"still"
    pages.unpin(0, 1)
    assert kernel._buffers._buffers == []
    with pytest.raises(BusAbort):
        kernel.memory.read(where, 1)


def test_buffer_is_pinned_as_often_as_pages_are(kernel: Kernel) -> None:
    buffer = kernel.buffer(PAGE)
    one, other = pinned(kernel, buffer.address, PAGE), pinned(kernel, buffer.address, PAGE)
    buffer.close()
    one.unpin(0, 0)
    assert len(kernel._buffers._buffers) == 1
    other.unpin(0, 0)
    assert kernel._buffers._buffers == []


def test_unpin_does_not_mind_a_view_that_somebody_still_has(kernel: Kernel) -> None:
    """The BufferError is for who closes the buffer, not for a later call that unmaps it."""
    buffer = kernel.buffer(PAGE)
    pages = pinned(kernel, buffer.address, PAGE)
    view = buffer.view[:4]
    buffer.close()
    pages.unpin(0, 0)
    assert kernel._buffers._buffers == []
    view[:] = b"mine"
    view.release()


def test_small_buffer_is_kept_with_its_whole_page(kernel: Kernel) -> None:
    buffer = kernel.buffer(100)
    assert len(buffer.view) == 100
    pages = pinned(kernel, buffer.address, PAGE)
    buffer.close()
    where = kernel.process.mm.physical(buffer.address)
    kernel.memory.write(where + 90, b"x" * 100)
    assert kernel.memory.read(where + 90, 100) == b"x" * 100
    pages.unpin(0, 0)


def test_find_is_for_whole_ranges_in_one_buffer(kernel: Kernel) -> None:
    buffers = [kernel.buffer(size) for size in (PAGE, 3 * PAGE, 2 << 20)]
    memory = kernel._buffers
    for buffer in buffers:
        assert memory.find(buffer.address, buffer.length) is buffer
        assert memory.find(buffer.address + buffer.length - 1, 1) is buffer
        assert memory.find(buffer.address, buffer.length + PAGE) is None
        assert memory.find(buffer.address - 1, 1) is not buffer
    buffers[1].close()
    assert memory.find(buffers[1].address, 1) is None
    buffers[0].close()
    buffers[2].close()


def test_dma_to_memory_that_is_gone_aborts(kernel: Kernel) -> None:
    with kernel.spawn() as client:
        address = client.allocate(2 * PAGE)
        mm = kernel._processes[client.pid].mm
        where = mm.physical(address)
        kernel.memory.write(where, b"to the client")
        assert client.peek(address, 6) == b"to the"
        client.free(address, 2 * PAGE)
        with pytest.raises(BusAbort):
            kernel.memory.write(where, b"x")
        with pytest.raises(BusAbort):
            kernel.memory.read(where, 1)
