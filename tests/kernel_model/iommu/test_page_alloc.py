"""The page allocator."""

import errno

import pytest

from fakedev.memory import PhysicalMemory
from kernel_model.errors import KernelBug, KernelError
from kernel_model.page_alloc import PageAllocator


@pytest.fixture
def memory():
    memory = PhysicalMemory((1 << 20) + 3 * 4096)
    yield memory
    memory.close()


def test_pages_are_zero_also_when_used_again(memory):
    pages = PageAllocator(memory)
    page = pages.alloc()
    memory.write(page, b"x" * 4096)
    pages.free(page)
    assert pages.alloc() == page
    assert memory.read(page, 4096) == bytes(4096)


def test_the_same_calls_give_the_same_pages(memory):
    assert [PageAllocator(memory).alloc() for _ in range(2)] == [0x100000] * 2


def test_live_counts_what_is_out(memory):
    pages = PageAllocator(memory)
    taken = [pages.alloc() for _ in range(3)]
    assert pages.live == 3
    with pytest.raises(KernelError) as caught:
        pages.alloc()
    assert caught.value.errno == errno.ENOMEM
    for page in taken:
        pages.free(page)
    assert pages.live == 0


def test_a_double_free_is_a_bug_of_the_model(memory):
    pages = PageAllocator(memory)
    page = pages.alloc()
    pages.free(page)
    with pytest.raises(KernelBug):
        pages.free(page)
