"""The dirty bitmap in the caller's memory against a plain one: leaf by leaf, page by page, with pages that fault.

`Plain` keeps the window of pinned pages as the kernel's iova_bitmap.c does, so that gathering, halving and the closed
form of `IovaBitmap` are held against it.
"""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest

from kernel_model.errors import KernelError
from kernel_model.iommufd.iova_bitmap import IovaBitmap

PAGE = 4096
MASK = (1 << 64) - 1


class Memory:
    """A caller's memory of a few pages, some of which cannot be written; and the caller."""

    def __init__(self, base: int, npages: int, bad: set[int], filling: int) -> None:
        self.base, self.npages, self.bad = base, npages, bad
        self.data = bytearray([filling]) * (npages * PAGE)
        self.kernel = self
        self.process = SimpleNamespace(mm=self)

    def _good(self, address: int) -> bool:
        page = (address - self.base) // PAGE
        return 0 <= page < self.npages and page not in self.bad

    def read(self, address: int, length: int) -> bytes:
        if not all(self._good(where) for where in {*range(address, address + length, PAGE), address + length - 1}):
            raise KernelError(errno.EFAULT, "")
        return bytes(self.data[address - self.base : address - self.base + length])

    def write(self, address: int, data: bytes) -> None:
        for index, byte in enumerate(data):
            if not self._good(address + index):
                raise KernelError(errno.EFAULT, "")
            self.data[address + index - self.base] = byte

    def vmas(self, start: int, end: int) -> list[SimpleNamespace]:
        pages = [self.base + page * PAGE for page in range(self.npages) if page not in self.bad]
        found = [SimpleNamespace(start=at, end=at + PAGE, write=True) for at in pages]
        return [vma for vma in found if vma.end > start and vma.start < end]

    def maps_device(self, process: object, start: int, length: int) -> bool:
        return False


class Plain:
    """iova_bitmap_set() with its window, one leaf and one page at a time."""

    WINDOW = 512

    def __init__(self, memory: Memory, iova: int, length: int, page_size: int, data: int) -> None:
        self.memory, self.iova, self.length, self.data = memory, iova, length, data
        self.shift = (page_size & -page_size).bit_length() - 1
        self.total = ((length - 1) >> self.shift) // 8 + 1
        self.index = self.npages = 0
        self.mapped_iova = self.mapped_length = self.offset = 0

    def advance(self, iova: int) -> bool:
        index = (((iova - self.iova) & MASK) >> self.shift) // 8
        if index >= self.total:
            return False
        self.index, self.npages = index, 0
        address = self.data + index
        wanted = min(-(-(self.total - index) // PAGE) + (address % PAGE != 0), self.WINDOW)
        while self.npages < wanted and self.memory._good(address // PAGE * PAGE + self.npages * PAGE):
            self.npages += 1
        if not self.npages:
            return False
        self.offset = address % PAGE
        self.mapped_iova = self.iova + ((index * 8) << self.shift)
        room = min(self.total - index, self.npages * PAGE - self.offset) * 8 << self.shift
        self.mapped_length = min(room, self.iova + self.length - self.mapped_iova)
        return True

    def set(self, iova: int, length: int) -> None:
        while True:
            inside = self.mapped_iova <= iova and iova + length <= self.mapped_iova + self.mapped_length
            if not (self.npages and inside) and not self.advance(iova):
                return
            first = ((iova - self.mapped_iova) >> self.shift) + self.offset * 8
            last = ((iova + length - 1 - self.mapped_iova) >> self.shift) + self.offset * 8
            start = (self.data + self.index) // PAGE * PAGE - self.memory.base
            for bit in range(first, last + 1):
                if bit // 8 >= self.npages * PAGE:
                    left = (last - bit + 1) << self.shift
                    iova, length = iova + length - left, left
                    break
                self.memory.data[start + bit // 8] |= 1 << bit % 8
            else:
                return


@pytest.mark.parametrize("seed", range(150))
def test_bitmap_is_what_the_kernels_loop_makes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr("kernel_model.iommufd.iova_bitmap._WINDOW_PAGES", 2)
    monkeypatch.setattr("kernel_model.iommufd.iova_bitmap._CHUNK", chance.choice([64, 4096, 1 << 18]))
    monkeypatch.setattr(Plain, "WINDOW", 2)
    shift = chance.choice([11, 12, 14, 20])
    pages = chance.choice([1 << chance.randint(max(shift - 12, 0), shift + 4)] * 5 + [3 << 11, 5 << 12])
    grain = max(pages & -pages, 1 << 11)
    start = chance.randrange(1, 64) << 22
    span = 3 * PAGE * 8 * (pages & -pages)
    iova = start + chance.randrange(4) * grain
    length = min(max(span // grain, 1), chance.randint(1, 3 << 15)) * grain
    length = min(length, 3000 << shift) // grain * grain or grain
    bad = {page for page in range(8) if chance.random() < chance.choice([0, 0.3])}
    made = [Memory(0x10000, 8, bad, filling) for filling in [chance.choice([0, 0x11])] for _ in range(2)]
    data = 0x10000 + PAGE * chance.randint(0, 2) + chance.choice([0, 1, 8, 2048, 4090, chance.randrange(PAGE)])
    bitmap = IovaBitmap(made[0], iova, length, pages, data)  # type: ignore[arg-type]
    plain = Plain(made[1], iova, length, pages, data)
    position = iova >> shift << shift
    while position < iova + length:
        size = chance.choice([shift, shift, 11]) if position != iova >> shift << shift else shift
        count = chance.choice([1, 3, 17, 400, 2000])
        count = min(count, -(-(iova + length - position) >> size) or 1)
        dirty = chance.choice([chance.getrandbits(count), chance.getrandbits(count) & chance.getrandbits(count), 1])
        if chance.random() < 0.3:
            dirty = (1 << count) - 1
        if position & ((1 << size) - 1) == 0:
            if dirty:
                bitmap.set_leaves(position, size, count, dirty)
            for index in range(count):
                if dirty >> index & 1:
                    plain.set(position + (index << size), 1 << size)
        position += count << size
        position = -(-position >> shift) << shift if chance.random() < 0.8 else position
    bitmap.flush()
    assert made[0].data == made[1].data


def test_nothing_is_written_where_nothing_is_dirty() -> None:
    memory = Memory(0x10000, 2, {0, 1}, 0)
    bitmap = IovaBitmap(memory, 0, 1 << 20, 4096, 0x10000)  # type: ignore[arg-type]
    bitmap.flush()
    assert memory.data == bytes(2 * PAGE)


@pytest.mark.parametrize("seed", range(80))
def test_leaf_of_many_pages_of_the_bitmap(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    window = chance.choice([1, 2, 3, 512])
    monkeypatch.setattr("kernel_model.iommufd.iova_bitmap._WINDOW_PAGES", window)
    monkeypatch.setattr(Plain, "WINDOW", window)
    shift, pages = 20, chance.choice([8, 16, 32])  # a leaf is 16, 8 or 4 KiB of the bitmap
    iova = (1 << 30) + chance.choice([0, 2048, 4096, 1 << 19, (1 << 20) - 4096])
    length = chance.randint(1, 3 << 8) * 4096
    bad = {page for page in range(12) if chance.random() < 0.1}
    made = [Memory(0x10000, 12, bad, 0) for _ in range(2)]
    data = 0x10000 + chance.randrange(2 * PAGE)
    bitmap = IovaBitmap(made[0], iova, length, pages, data)  # type: ignore[arg-type]
    plain = Plain(made[1], iova, length, pages, data)
    first = iova >> shift
    count = ((iova + length - 1) >> shift) - first + 1
    dirty = chance.getrandbits(count) | 1 << (count - 1)
    bitmap.set_leaves(first << shift, shift, count, dirty)
    bitmap.flush()
    for index in range(count):
        if dirty >> index & 1:
            plain.set((first + index) << shift, 1 << shift)
    assert made[0].data == made[1].data
