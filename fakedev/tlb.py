"""A cache of translations, tagged and invalidated exactly as asked.

One `Tlb` belongs to one IOMMU; entries carry a *tag* (a VT-d domain id, an ASID). An entry covers a run of 4 KiB pages
with one offset and one permission, or one large page; it holds only pages that a request touched, so a page that nobody
used is never cached, and an invalidation removes the pages it names and no others. Whatever a driver forgets to
invalidate is therefore really stale.

A *negative* entry (permission 0) says that nothing is mapped; hardware with VT-d's caching mode keeps such entries.

`TableCache` keeps where walks found their tables, by the same tags (VT-d 6.2.5, paging-structure caches; Arm: the
intermediate entries of a walk).

Left out: associativity. When `capacity` 4 KiB slots are filled the cache empties itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from fakedev.dma import Run

#: Tables that walks of one tag found: by their level, the addresses that they serve, shifted to one number a table.
Tables: TypeAlias = list[dict[int, tuple[int, int]]]


class _Tagged:
    """The entries of one tag: 4 KiB pages, by the 2 MiB block that they lie in; and larger ones, by log2 of size."""

    __slots__ = ("blocks", "large")

    def __init__(self) -> None:
        self.blocks: dict[int, dict[int, Run]] = {}
        self.large: dict[int, dict[int, Run]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values())) + sum(map(len, self.large.values()))


class Tlb:
    """See the module. Addresses are in bytes, `lg2` is the log2 of a page's size."""

    __slots__ = ("_tags", "capacity", "keep", "slots")

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._tags: dict[int, _Tagged] = {}
        self.capacity = capacity
        #: Asked before each insertion; None: everything is kept.
        self.keep: Callable[[], bool] | None = None
        #: Entries, kept so that the capacity can be tested cheaply.
        self.slots = 0

    def __len__(self) -> int:
        """Live entries: 4 KiB pages and large pages."""
        return sum(map(len, self._tags.values()))

    def count(self, tag: int) -> int:
        """Live entries of one tag."""
        return len(self._tags.get(tag, ()))

    def tags(self) -> list[int]:
        """The tags that have entries."""
        return list(self._tags)

    def runs(self, tag: int, start: int, length: int) -> list[Run]:
        """The entries of a tag that reach into [start, start + length), each once."""
        tagged = self._tags.get(tag)
        if tagged is None:
            return []
        last = start + length - 1
        found: dict[Run, None] = {}
        for block in _between(tagged.blocks, start >> 21, last >> 21):
            pages = tagged.blocks[block]
            found.update(dict.fromkeys(pages[number] for number in _between(pages, start >> 12, last >> 12)))
        for lg2, entries in tagged.large.items():
            found.update(dict.fromkeys(entries[number] for number in _between(entries, start >> lg2, last >> lg2)))
        return list(found)

    def lookup(self, tag: int, address: int) -> Run | None:
        """The entry that holds `address`."""
        tagged = self._tags.get(tag)
        if tagged is None:
            return None
        block = tagged.blocks.get(address >> 21)
        if block is not None:
            run = block.get(address >> 12)
            if run is not None:
                return run
        for lg2, entries in tagged.large.items():
            if entries:
                run = entries.get(address >> lg2)
                if run is not None:
                    return run
        return None

    def insert(self, tag: int, run: Run, lg2: int) -> Run:
        """Cache `run`: one large page of 1 << lg2 bytes, or (lg2 = 12) 4 KiB pages of one block; what has been cached.

        A run is cut short in front of a page that is cached already, so that no page is in two runs.
        """
        if self.keep is not None and not self.keep():
            return run
        tagged = self._tags.get(tag)
        if tagged is None:
            tagged = self._tags[tag] = _Tagged()
        start, end, delta, allowed = run
        if lg2 > 12:
            entries = tagged.large.setdefault(lg2, {})
            self.slots += start >> lg2 not in entries
            entries[start >> lg2] = run
        else:
            pages = tagged.blocks.setdefault(start >> 21, {})
            first = start >> 12
            if end - start == 4096:
                self.slots += first not in pages
                pages[first] = run
            else:
                for number in range(first + 1, end >> 12):
                    if number in pages:
                        end = number << 12
                        run = (start, end, delta, allowed)
                        break
                pages.update(dict.fromkeys(range(first, end >> 12), run))
                self.slots += end - start >> 12
        if self.slots > self.capacity:
            self.clear()
        return run

    def extend(self, tag: int, run: Run, end: int) -> Run:
        """Join `run` with the cached runs of its block that continue it, as far as `end`; nothing new is cached."""
        start, stop, delta, allowed = run
        tagged = self._tags.get(tag)
        pages = None if tagged is None else tagged.blocks.get(start >> 21)
        if pages is None or pages.get(start >> 12) is not run:
            return run
        while stop < end:
            more = pages.get(stop >> 12)
            if more is None or more[2] != delta or more[3] != allowed:
                break
            stop = more[1]
        if stop == run[1]:
            return run
        joined = (start, stop, delta, allowed)
        pages.update(dict.fromkeys(range(start >> 12, stop >> 12), joined))
        return joined

    def clear(self) -> None:
        """Invalidate everything."""
        self._tags.clear()
        self.slots = 0

    def clear_tag(self, tag: int) -> None:
        """Invalidate all entries of a tag."""
        self.slots -= len(self._tags.pop(tag, ()))

    def clear_range(self, tag: int, start: int, length: int) -> None:
        """Invalidate the pages of a tag in [start, start + length), and every large page that reaches into it."""
        tagged = self._tags.get(tag)
        if tagged is None:
            return
        last = start + length - 1
        blocks = tagged.blocks
        if blocks:
            for block in _between(blocks, start >> 21, last >> 21):
                self.slots -= _clear_pages(blocks, block, start >> 12, (last >> 12) + 1)
        for lg2, entries in tagged.large.items():
            if entries:
                for number in _between(entries, start >> lg2, last >> lg2):
                    del entries[number]
                    self.slots -= 1


class TableCache:
    """Where tables lie, found on the way to leaves. `of` gives a walk (fakedev/pgtable/walker.py) those of its tag.

    An entry serves all addresses below its table, and outlives whatever software does to the item that it came from.
    """

    __slots__ = ("_tags",)

    def __init__(self) -> None:
        #: By tag, then by granule and index bits: one tag may have tables of several formats.
        self._tags: dict[int, dict[tuple[int, int], Tables]] = {}

    def of(self, tag: int, granule_lg2: int, index_bits: int) -> Tables:
        """The tables of a tag, for a format of that granule."""
        formats = self._tags.setdefault(tag, {})
        found = formats.get((granule_lg2, index_bits))
        if found is None:
            found = formats[granule_lg2, index_bits] = [{} for _ in range(5)]
        return found

    def __len__(self) -> int:
        return sum(len(level) for formats in self._tags.values() for tables in formats.values() for level in tables)

    def tags(self) -> list[int]:
        """The tags that have entries."""
        return list(self._tags)

    def clear(self) -> None:
        """Invalidate everything."""
        self._tags.clear()

    def clear_tag(self, tag: int) -> None:
        """Invalidate all entries of a tag."""
        self._tags.pop(tag, None)

    def clear_range(self, tag: int, start: int, length: int) -> None:
        """Invalidate the entries of a tag that serve an address in [start, start + length)."""
        last = start + length - 1
        for (granule_lg2, bits), tables in self._tags.get(tag, {}).items():
            for level, entries in enumerate(tables):
                if entries:
                    shift = granule_lg2 + bits * (level + 1)
                    for number in _between(entries, start >> shift, last >> shift):
                        del entries[number]


def _between(entries: Mapping[int, object], low: int, high: int) -> list[int]:
    """The keys of `entries` from low to high, without looking at more than there are."""
    if high - low < len(entries):
        return [number for number in range(low, high + 1) if number in entries]
    return [number for number in entries if low <= number <= high]


def _clear_pages(blocks: dict[int, dict[int, Run]], block: int, first: int, end: int) -> int:
    """Remove the pages [first, end) from a block, and say how many; what is left of a cut run stays, as its own run."""
    if first <= block << 9 and end >= block + 1 << 9:
        return len(blocks.pop(block))
    pages = blocks[block]
    cut: set[Run] = set()
    named = _between(pages, first, end - 1)
    for number in named:
        run = pages.pop(number)
        if run[0] >> 12 < first or run[1] >> 12 > end:
            cut.add(run)
    for run in cut:
        start, stop, delta, allowed = run
        for low, high in ((start, min(stop, first << 12)), (max(start, end << 12), stop)):
            if low < high:
                pages.update(dict.fromkeys(range(low >> 12, high >> 12), (low, high, delta, allowed)))
    if not pages:
        del blocks[block]
    return len(named)
