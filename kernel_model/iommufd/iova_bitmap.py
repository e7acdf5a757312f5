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
#: How many bytes of the bitmap are stored at once, unless a single row of leaves has more. Below 128 KiB, from where on
#: the C library maps fresh pages for every copy.
_CHUNK = 64 << 10


class IovaBitmap:
    """`struct iova_bitmap`: bit i at the address `data` stands for the i-th piece of [iova, iova + length).

    A piece is as large as the lowest set bit of `page_size`. What `set_leaves` was told reaches the caller's memory by
    `flush` at the latest.
    """

    __slots__ = ("_base", "_call", "_chunk", "_data", "_iova", "_last", "_pending", "_shift", "_total")

    def __init__(self, call: SystemCall, iova: int, length: int, page_size: int, data: int) -> None:
        self._call = call
        self._iova = iova
        self._last = iova + length - 1
        self._shift = (page_size & -page_size).bit_length() - 1
        self._data = data
        #: Bytes of the bitmap.
        self._total = ((length - 1) >> self._shift + 3) + 1
        #: Bits for the bitmap's bytes from `_base` on that are still to be stored, and the leaves that they are of.
        self._chunk = bytearray()
        self._base = 0
        self._pending: list[tuple[int, int, int]] = []

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
            self._or(address, widen(ones(min(last + 1, room) - first) << first, 1))
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
        """`set_leaves` for leaves within the range."""
        if not dirty:
            return
        skipped = (dirty & -dirty).bit_length() - 1
        dirty >>= skipped
        iova += skipped << shift
        offset = iova - self._iova
        bit = offset >> self._shift
        if shift >= self._shift:
            data = widen(dirty, 1 << (shift - self._shift))
        else:
            ratio = 1 << (self._shift - shift)
            data = widen(narrow(dirty << ((offset >> shift) & (ratio - 1)), ratio), 1)
        if bit & 7:
            data = widen(int.from_bytes(data, "little") << (bit & 7), 1)
        self._store(bit >> 3, data)
        self._pending.append((iova, shift, dirty))

    def _store(self, start: int, data: bytes) -> None:
        """Have the bits of `data` set from the bitmap's byte `start` on."""
        if self._pending and (start < self._base or start + len(data) > self._base + _CHUNK):
            self.flush()
        if not self._pending:
            self._base = start
            self._chunk = bytearray()
        start -= self._base
        common = len(self._chunk) - start
        if common > 0:
            common = min(common, len(data))
            self._chunk[start : start + common] = _united(self._chunk[start : start + common], data[:common])
            self._chunk += data[common:]
        else:
            self._chunk += bytes(-common) + data

    def flush(self) -> None:
        """Store what is pending: at once, and if that faults, in halves."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        address = (self._data + self._base) & U64_MAX
        try:
            self._or(address, self._chunk)
        except KernelError:
            if self._writable(address, len(self._chunk)):
                self._halve(pending)

    def _halve(self, leaves: list[tuple[int, int, int]]) -> None:
        iova, shift, dirty = leaves[0]
        count = dirty.bit_length()
        middle = (count + 1) // 2
        if len(leaves) > 1:
            parts = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
        elif count > 1:
            parts = [(iova, shift, dirty & ones(middle))], [(iova + (middle << shift), shift, dirty >> middle)]
        else:
            self.set(iova, 1 << shift)
            return
        for part in parts:
            for piece in part:
                self._set_inside(*piece)
            self.flush()

    def _or(self, address: int, bits: bytes | bytearray) -> None:
        """Set the bits from `address` on. EFAULT: some of it cannot be written; it may have been up to there."""
        mm = self._call.process.mm  # through pinned pages: not a copy_to_user() that fault injection may fail
        mm.write(address, _united(mm.read(address, len(bits)), bits))

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


def _united(there: bytes | bytearray | memoryview, bits: bytes | bytearray) -> bytes | bytearray:
    """The bits that are set in either of two strings of one length; by pages, as most are empty or set already."""
    size = len(bits)
    if there == bytes(size) or there == bits:
        return bits
    if size > PAGE_SIZE:
        return b"".join(
            _united(there[start : start + PAGE_SIZE], bits[start : start + PAGE_SIZE])
            for start in range(0, size, PAGE_SIZE)
        )
    return (int.from_bytes(there, "little") | int.from_bytes(bits, "little")).to_bytes(size, "little")
