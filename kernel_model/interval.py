"""Sets of disjoint intervals of integers, and the holes between them.

`Holes` answers the question that automatic IOVA allocation asks: the lowest place in a range where a block of a given
length and alignment fits. Holes are also kept by size, so that a million blocks, or a million holes that are too small,
cost no scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sortedcontainers import SortedDict, SortedList

U64_MAX = 0xFFFFFFFFFFFFFFFF


def complement(intervals: Iterable[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The maximal runs of [first, last] that no interval covers. The intervals may overlap; order does not matter."""
    position = first
    for start, end in sorted(intervals):
        if end < position:
            continue
        if start > last:
            break
        if start > position:
            yield position, start - 1
        position = end + 1
        if position > last:
            return
    if position <= last:
        yield position, last


def merge(intervals: Iterable[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The maximal runs of [first, last] that the intervals cover; neighbours join."""
    run: tuple[int, int] | None = None
    for start, end in sorted(intervals):
        start, end = max(start, first), min(end, last)
        if start > end:
            continue
        if run is not None and start <= run[1] + 1:
            run = (run[0], max(run[1], end))
        else:
            if run is not None:
                yield run
            run = (start, end)
    if run is not None:
        yield run


def place(first: int, last: int, length: int, alignment: int, offset: int) -> int | None:
    """Where in [first, last] a block goes: the first aligned address, with `offset` or-ed in. None if it does not fit.

    The comparison is the kernel's (`__alloc_iova_check_range()` in io_pagetable.c): a span of one byte never fits.
    """
    start = first + alignment - 1
    if start > U64_MAX:
        return None
    start = (start & ~(alignment - 1)) | offset
    if start >= last or last - start < length - 1:
        return None
    return start


class Holes:
    """The holes that a set of disjoint blocks leaves in [0, 2^64)."""

    def __init__(self) -> None:
        self._last: SortedDict[int, int] = SortedDict({0: U64_MAX})
        #: Starts of holes by the bit length of their size.
        self._by_size: dict[int, SortedList[int]] = {65: SortedList([0])}

    def take(self, start: int, last: int) -> None:
        """A block now covers [start, last], all of it inside one hole."""
        index = self._last.bisect_right(start) - 1
        hole_start, hole_last = self._last.peekitem(index)
        self._drop(hole_start, hole_last)
        if hole_start < start:
            self._add(hole_start, start - 1)
        if last < hole_last:
            self._add(last + 1, hole_last)

    def give(self, start: int, last: int) -> None:
        """The block [start, last] is gone: its room joins the holes beside it."""
        index = self._last.bisect_right(start)
        if index < len(self._last):
            after_start, after_last = self._last.peekitem(index)
            if after_start == last + 1:
                self._drop(after_start, after_last)
                last = after_last
        if index > 0:
            before_start, before_last = self._last.peekitem(index - 1)
            if before_last == start - 1:
                self._drop(before_start, before_last)
                start = before_start
        self._add(start, last)

    def find(self, first: int, last: int, length: int, alignment: int, offset: int) -> int | None:
        """The lowest fit in [first, last]; see `place`."""
        index = self._last.bisect_right(first) - 1
        if index >= 0:
            hole_last = min(self._last.peekitem(index)[1], last)
            if hole_last >= first:
                found = place(first, hole_last, length, alignment, offset)
                if found is not None:
                    return found
        best: int | None = None
        best_hole = last + 1
        for size_class, starts in self._by_size.items():
            if size_class < length.bit_length():
                continue
            for start in starts.irange(first, best_hole, inclusive=(False, False)):
                found = place(start, min(self._last[start], last), length, alignment, offset)
                if found is not None:
                    best, best_hole = found, start
                    break
        return best

    def _add(self, start: int, last: int) -> None:
        self._last[start] = last
        self._by_size.setdefault((last - start + 1).bit_length(), SortedList()).add(start)

    def _drop(self, start: int, last: int) -> None:
        del self._last[start]
        self._by_size[(last - start + 1).bit_length()].remove(start)
