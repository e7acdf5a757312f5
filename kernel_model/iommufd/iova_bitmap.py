"""The bitmap that GET_DIRTY_BITMAP fills in the caller's memory, after iova_bitmap.c of drivers/iommu/iommufd.

The kernel pins the bitmap a window of 512 pages at a time, when a dirty leaf asks for it. A page that cannot be pinned
is no error: what is to be set there, and the rest of that leaf, is lost. So is a leaf that starts before the range, and
one that reaches beyond the range's end sets bits as far as the pinned pages go.
"""

from __future__ import annotations

from kernel_model.bitmask import narrow, ones, widen
from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: How many pages a window has: what fits into a page of pointers.
_WINDOW_PAGES = PAGE_SIZE // 8


class IovaBitmap:
    """`struct iova_bitmap`: bit i at the address `data` stands for the i-th piece of [iova, iova + length).

    A piece is as large as the lowest set bit of `page_size`.
    """

    __slots__ = ("_call", "_data", "_iova", "_last", "_shift", "_total")

    def __init__(self, call: SystemCall, iova: int, length: int, page_size: int, data: int) -> None:
        self._call = call
        self._iova = iova
        self._last = iova + length - 1
        self._shift = (page_size & -page_size).bit_length() - 1
        self._data = data
        #: Bytes of the bitmap.
        self._total = ((length - 1) >> self._shift + 3) + 1

    def set(self, iova: int, length: int) -> None:
        """iova_bitmap_set(): the bits of [iova, iova + length), as far as their pages can be written."""
        while True:
            index = ((iova - self._iova) & U64_MAX) >> self._shift + 3
            if index >= self._total:
                return
            address = (self._data + index) & U64_MAX
            offset = address & PAGE_MASK
            wanted = ((self._total - index + PAGE_MASK) >> PAGE_SHIFT) + bool(offset)
            npages = self._pinnable(address - offset, min(wanted, _WINDOW_PAGES))
            if not npages:
                return
            base = self._iova + (index << self._shift + 3)
            first = ((iova - base) & U64_MAX) >> self._shift
            last = ((iova + length - 1 - base) & U64_MAX) >> self._shift
            room = ((npages << PAGE_SHIFT) - offset) * 8
            self._or(address, ones(min(last + 1, room) - first) << first)
            if last < room:
                return
            left = (last + 1 - room) << self._shift
            iova += length - left
            length = left

    def set_leaves(self, iova: int, shift: int, count: int, dirty: int) -> None:
        """`set` for each bit of `dirty`: bit i is the i-th of `count` leaves of 1 << `shift` bytes from `iova` on."""
        size = 1 << shift
        if iova < self._iova and dirty & 1:
            self.set(iova, size)
            dirty ^= 1
        beyond = iova + (count << shift) - 1 > self._last and dirty >> (count - 1)
        self._set_inside(iova, shift, dirty ^ (1 << (count - 1)) if beyond else dirty)
        if beyond:
            self.set(iova + ((count - 1) << shift), size)

    def _set_inside(self, iova: int, shift: int, dirty: int) -> None:
        """`set_leaves` for leaves within the range: at once, and if that faults, in halves."""
        if not dirty:
            return
        skipped = (dirty & -dirty).bit_length() - 1
        dirty >>= skipped
        iova += skipped << shift
        offset = iova - self._iova
        if shift >= self._shift:
            mask = widen(dirty, 1 << (shift - self._shift))
        else:
            ratio = 1 << (self._shift - shift)
            mask = narrow(dirty << ((offset >> shift) & (ratio - 1)), ratio)
        bit = offset >> self._shift
        address = self._data + (bit >> 3)
        try:
            self._or(address, mask << (bit & 7))
        except KernelError:
            self._set_around_a_fault(iova, shift, dirty, address, (mask.bit_length() + 14) >> 3)

    def _set_around_a_fault(self, iova: int, shift: int, dirty: int, address: int, length: int) -> None:
        count = dirty.bit_length()
        if count == 1:
            self.set(iova, 1 << shift)
        elif self._writable(address, length):
            half = count // 2
            self._set_inside(iova, shift, dirty & ones(half))
            self._set_inside(iova + (half << shift), shift, dirty >> half)

    def _or(self, address: int, mask: int) -> None:
        """Set the mask's bits from `address` on. EFAULT: some of it cannot be written; it may have been up to there."""
        length = (mask.bit_length() + 7) >> 3
        there = int.from_bytes(self._call.copy_from_user(address, length), "little")
        self._call.copy_to_user(address, (there | mask).to_bytes(length, "little"))

    def _pinnable(self, address: int, npages: int) -> int:
        """How many of the pages from `address` on can be pinned for writing, up to the first that cannot."""
        end = position = address
        for start, stop in self._writable(address, npages << PAGE_SHIFT):
            if start > position:
                break
            end = position = stop
        return min((end - address) >> PAGE_SHIFT, npages)

    def _writable(self, address: int, length: int) -> list[tuple[int, int]]:
        """The parts of the range that are mapped for writing, as [start, end)."""
        process = self._call.process
        found = []
        for vma in process.mm.vmas(address, address + length):
            start, stop = max(vma.start, address), min(vma.end, address + length)
            if vma.write and not self._call.kernel.maps_device(process, start, stop - start):
                found.append((start, stop))
        return found
