"""Physical addresses of clients' memory: inside what the machine's IOMMU can put out, and pieces kept whole."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

from fakedev.machine import Machine
from fakedev.memory import PhysicalMemory
from kernel_model.errors import KernelError
from kernel_model.iommufd.pages import UserPages
from kernel_model.kernel import Kernel
from kernel_model.placement import Placement

G1 = 1 << 30


def narrow(bits, ram_start=0):
    return Machine("narrow", PhysicalMemory(64 << 20, ram_start, address_bits=bits))


@pytest.mark.parametrize("bits", [36, 40, 42, 44, 48, 52])
def test_every_place_and_window_is_in_the_address_space_and_they_do_not_overlap(bits):
    memory = PhysicalMemory(64 << 20, address_bits=bits)
    placement = Placement(memory)
    size = 1 << placement.place_lg2
    spans = []
    while True:
        try:
            spans.append((placement.take(), size))
        except KernelError:
            break
    assert len(spans) >= 15
    spans += [(placement.first_file + n * placement.file_size, placement.file_size) for n in range(placement.files)]
    spans.sort()
    assert spans[0][0] >= 1 << 32
    assert all(start % size == 0 for start, size in spans)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    assert sum(spans[-1]) == 1 << bits
    memory.close()


def test_fewer_bits_than_the_model_needs_are_refused():
    memory = PhysicalMemory(64 << 20, address_bits=32)
    with pytest.raises(ValueError, match="needs 36"):
        Placement(memory)
    memory.close()


@pytest.mark.parametrize("bits", [44, 48, 52])
def test_pages_keep_their_place_in_a_gigabyte_and_are_the_clients_memory(bits):
    with Kernel(narrow(bits)) as kernel, kernel.buffer(3 << 20) as buffer:
        pages = UserPages(kernel, kernel.process, buffer.address, 3 << 20, True)
        runs = pages.pin(0, pages.npages - 1)
        (where, count), *rest = runs
        assert (count, rest) == (768, [])
        assert where % G1 == buffer.address % G1
        assert where + (3 << 20) <= 1 << bits
        kernel.memory.write(where + 5, b"by a device")
        assert bytes(buffer.view[5:16]) == b"by a device"
        pages.unpin(0, pages.npages - 1)


def test_memory_across_two_places_is_in_two_runs():
    with Kernel(narrow(36)) as kernel:  # where a place has 128 MiB
        size = 1 << kernel.process.mm.place_lg2
        with kernel.buffer(2 * size) as buffer:
            pages = UserPages(kernel, kernel.process, buffer.address, 2 * size, True)
            runs = pages.pin(0, pages.npages - 1)
            assert sum(count for _, count in runs) == pages.npages
            border = -(-buffer.address // size) * size - buffer.address
            for offset in (0, border - 2, border, 2 * size - 8):
                buffer.view[offset : offset + 4] = os.urandom(4)
            position = 0
            for where, count in runs:
                piece = kernel.memory.read(where, 4)
                assert piece == bytes(buffer.view[position : position + 4])
                position += count * 4096
            pages.unpin(0, pages.npages - 1)


def test_two_clients_have_different_places_and_an_exited_one_gives_them_back():
    with Kernel(narrow(44)) as kernel:
        free = len(kernel._placement._free)
        with kernel.spawn() as one, kernel.spawn() as other:
            address = one.allocate(4096)
            first, second = (kernel._processes[client.pid].mm.physical(address) for client in (one, other))
            assert first != second
            assert first % G1 == second % G1
            one.poke(address, b"one")
            assert kernel.memory.read(first, 3) == b"one"
        assert len(kernel._placement._free) == free


def test_shared_file_is_at_one_place_below_the_limit_of_the_machine():
    with Kernel(narrow(44)) as kernel:
        fd = os.memfd_create("shared")
        os.ftruncate(fd, 4096)
        status = os.fstat(fd)
        file = kernel.shared_files.get((status.st_dev, status.st_ino), fd, 4096)
        assert 1 << 43 <= file.window < 1 << 44
        kernel.memory.write(file.window, b"x")
        assert os.pread(fd, 1, 0) == b"x"
        with pytest.raises(KernelError, match="no room"):
            kernel.shared_files.get((status.st_dev, status.st_ino + 1), os.dup(fd), (8 << 30) + 1)
        kernel.shared_files.put(file)
