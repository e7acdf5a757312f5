"""The mock driver's page table, after drivers/iommu/generic_pt at 7.3: its `mock` format, AMDv1 on a 2 KiB granule.

No hardware walks it, so there are no words in RAM: what is kept is which leaves there are. `map` chooses them as
pt_compute_best_pgsize() does, and dirty bits, unmapping and lookups go by whole leaves. Equal leaves in a row are one
`Leaves`, with a mask of the dirty ones, so that a gibibyte costs no more than a page.
Left out: the tables above the leaves, hence their memory, and permissions, which nothing shows.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from kernel_model.bitmask import narrow, ones, positions
from kernel_model.errors import KernelError

if TYPE_CHECKING:
    from kernel_model.iommufd.iova_bitmap import IovaBitmap

#: A row of leaves of several runs is reported once it has this many: its mask grows by copying.
_ROW = 1024


class Leaves:
    """`count` leaves of 1 << `shift` bytes from `iova` on, of contiguous physical memory from `pa` on."""

    __slots__ = ("count", "dirty", "iova", "pa", "shift")

    def __init__(self, iova: int, pa: int, shift: int, count: int, dirty: int = 0) -> None:
        self.iova = iova
        self.pa = pa
        self.shift = shift
        self.count = count
        #: Bit i: the i-th leaf is dirty.
        self.dirty = dirty

    @property
    def end(self) -> int:
        return self.iova + (self.count << self.shift)

    def index(self, iova: int) -> int:
        return (iova - self.iova) >> self.shift

    def cut(self, count: int) -> Leaves:
        """Keep the first `count`; the rest."""
        size = count << self.shift
        rest = Leaves(self.iova + size, self.pa + size, self.shift, self.count - count, self.dirty >> count)
        self.count = count
        self.dirty &= ones(count)
        return rest


def best_size(sizes: int, iova: int, pa: int, length: int) -> int:
    """pt_compute_best_pgsize(): the shift of the largest of `sizes` that both addresses and the length allow; -1."""
    limit = iova | pa | 1 << (length.bit_length() - 1)
    return (sizes & ((limit & -limit) * 2 - 1)).bit_length() - 1


def leaves(sizes: int, iova: int, pa: int, length: int) -> Iterator[Leaves]:
    """What maps [iova, iova + length) to `pa`, as few leaves as there can be. ENXIO: off the smallest size."""
    if (iova | pa | length) & ((sizes & -sizes) - 1):
        raise KernelError(errno.ENXIO, f"{iova:#x}, {pa:#x} or {length:#x} is off the smallest page")
    while length:
        shift = best_size(sizes, iova, pa, length)
        span = length
        larger = sizes >> (shift + 1) << (shift + 1)
        larger &= -larger
        if larger and not (iova ^ pa) & (larger - 1):
            span = min(span, larger - (iova & (larger - 1)))
        made = Leaves(iova, pa, shift, span >> shift)
        yield made
        span = made.count << shift
        iova += span
        pa += span
        length -= span


class LeafTable:
    """What is mapped, by IOVA."""

    def __init__(self) -> None:
        self._runs: SortedDict[int, Leaves] = SortedDict()

    def __bool__(self) -> bool:
        return bool(self._runs)

    def _from(self, iova: int) -> Iterator[Leaves]:
        """The runs that end after `iova`, ascending."""
        runs = self._runs
        index = max(runs.bisect_right(iova) - 1, 0)
        for key in runs.islice(index):
            found: Leaves = runs[key]
            if key >= iova or found.end > iova:
                yield found

    def install(self, iova: int, length: int, made: Iterator[Leaves]) -> None:
        """Add leaves for the whole of the range. EADDRINUSE: some of it is mapped; then nothing is added."""
        for there in self._from(iova):
            if there.iova < iova + length:
                raise KernelError(errno.EADDRINUSE, f"{there.iova:#x} is mapped already")
            break
        for run in list(made):
            self._runs[run.iova] = run

    def remove(self, iova: int, length: int) -> int:
        """unmap_range(): drop leaves from `iova` on up to the first hole; the bytes gone, the last leaf whole.

        0 where `iova` is inside a leaf or in a hole.
        """
        position, end = iova, iova + length
        while position < end:
            run = next(self._from(position), None)
            if run is None or run.iova > position:
                break
            if run.iova < position:
                if (position - run.iova) & ((1 << run.shift) - 1):
                    break
                run = run.cut(run.index(position))
                self._runs[position] = run
            if run.end > end and run.index(end - 1) + 1 < run.count:
                rest = run.cut(run.index(end - 1) + 1)
                self._runs[rest.iova] = rest
            del self._runs[position]
            position = run.end
        return position - iova

    def physical(self, iova: int) -> int | None:
        """The physical address behind `iova`."""
        run = next(self._from(iova), None)
        return None if run is None or run.iova > iova else run.pa + iova - run.iova

    def set_dirty(self, iova: int, page_size: int, mask: int) -> None:
        """Make the leaf at `iova` + i * `page_size` dirty for each bit i of `mask`; holes are passed over."""
        count = mask.bit_length()
        data = mask.to_bytes((count + 7) >> 3, "little")
        for run in self._from(iova):
            first = max(-(-(run.iova - iova) // page_size), 0)
            if first >= count:
                return
            stop = min(-(-(run.end - iova) // page_size), count)
            piece = int.from_bytes(data[first >> 3 : (stop + 7) >> 3], "little") >> (first & 7) & ones(stop - first)
            if piece:
                self._set_dirty(run, iova + first * page_size, page_size, piece)

    @staticmethod
    def _set_dirty(run: Leaves, iova: int, page_size: int, mask: int) -> None:
        size = 1 << run.shift
        offset = iova - run.iova
        if size % page_size == 0 and offset % page_size == 0:
            run.dirty |= narrow(mask << offset // page_size, size // page_size)
            return
        dirty = bytearray((run.count + 7) // 8)
        for index in positions(mask):
            leaf = (offset + index * page_size) >> run.shift
            dirty[leaf >> 3] |= 1 << (leaf & 7)
        run.dirty |= int.from_bytes(dirty, "little")

    def read_dirty(self, iova: int, length: int, clear: bool, bitmap: IovaBitmap | None) -> None:
        """read_and_clear_dirty(): report the dirty leaves that meet the range to `bitmap`, whole; `clear` them.

        Runs that touch are reported as one: a report costs more than the rest of what is done for a run.
        """
        last = iova + length - 1
        start = end = shift = row = 0  # what is still to be reported: bit i is the i-th leaf from `start` on
        for run in self._from(iova):
            if run.iova > last:
                break
            dirty = run.dirty
            if not dirty:
                continue
            first, count = 0, run.count
            if run.iova < iova or run.end > last + 1:
                first = run.index(max(iova, run.iova))
                count = run.index(min(last, run.end - 1)) - first + 1
                dirty = dirty >> first & ones(count)
                if not dirty:
                    continue
            if clear:
                run.dirty ^= dirty << first
            if bitmap is None:
                continue
            at = run.iova + (first << run.shift)
            if at == end and shift == run.shift and end - start < _ROW << shift:
                row |= dirty << (at - start >> shift)
            else:
                if row:
                    bitmap.set_leaves(start, shift, end - start >> shift, row)
                start, shift, row = at, run.shift, dirty
            end = at + (count << shift)
        if row and bitmap is not None:
            bitmap.set_leaves(start, shift, end - start >> shift, row)
