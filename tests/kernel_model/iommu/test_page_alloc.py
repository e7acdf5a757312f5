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


def test_larger_allocations_are_powers_of_two_aligned_and_zero():
    memory = PhysicalMemory(4 << 20)
    pages = PageAllocator(memory)
    first = pages.alloc()
    large = pages.alloc(0x9000)
    assert large % 0x10000 == 0
    assert pages.live == 17
    assert pages.alloc() == first + 4096  # what alignment skipped is not lost
    memory.write(large + 0x8000, b"x")
    pages.free(large)
    assert pages.live == 2
    assert pages.alloc(0x10000) == large
    assert memory.read(large, 0x10000) == bytes(0x10000)
    with pytest.raises(KernelError) as caught:
        pages.alloc(4 << 20)
    assert caught.value.errno == errno.ENOMEM
    memory.close()
