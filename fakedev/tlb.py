"""A cache of translations, tagged and invalidated exactly as asked.

One `Tlb` belongs to one IOMMU; entries carry a *tag* (a VT-d domain id, an ASID). An entry covers a run of 4 KiB pages
with one offset and one permission, or one large page; it holds only pages that a request touched, so a page that nobody
used is never cached, and an invalidation removes the pages it names and no others. Whatever a driver forgets to
invalidate is therefore really stale.

A *negative* entry (permission 0) says that nothing is mapped; hardware with VT-d's caching mode keeps such entries.

Left out: paging-structure caches, associativity. When `capacity` 4 KiB slots are filled the cache empties itself.
"""

from __future__ import annotations

from fakedev.dma import Run

#: Sizes of the pages that are cached as one entry, largest first, as log2.
_LARGE = (30, 21)


class _Tagged:
    """The entries of one tag: by 4 KiB page, and by large page."""

    __slots__ = ("large", "pages")

    def __init__(self) -> None:
        self.pages: dict[int, Run] = {}
        self.large: dict[int, dict[int, Run]] = {lg2: {} for lg2 in _LARGE}


class Tlb:
    """See the module. Addresses are in bytes, `lg2` is the log2 of a page's size."""

    __slots__ = ("_tags", "capacity", "slots")

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._tags: dict[int, _Tagged] = {}
        self.capacity = capacity
        #: 4 KiB slots filled since the cache was last empty: an upper bound of what `__len__` counts.
        self.slots = 0

    def __len__(self) -> int:
        """Live entries: 4 KiB pages and large pages."""
        return sum(len(t.pages) + sum(map(len, t.large.values())) for t in self._tags.values())

    def count(self, tag: int) -> int:
        """Live entries of one tag."""
        found = self._tags.get(tag)
        return 0 if found is None else len(found.pages) + sum(map(len, found.large.values()))

    def lookup(self, tag: int, address: int) -> Run | None:
        """The entry that holds `address`."""
        tagged = self._tags.get(tag)
        if tagged is None:
            return None
        run = tagged.pages.get(address >> 12)
        if run is None:
            for lg2, entries in tagged.large.items():
                if entries:
                    run = entries.get(address >> lg2)
                    if run is not None:
                        break
        return run

    def insert(self, tag: int, run: Run, lg2: int) -> Run:
        """Cache `run`: one large page of 1 << lg2 bytes, or (lg2 = 12) a run of 4 KiB pages; what has been cached.

        A run is cut short in front of a page that is cached already, so that no page is in two runs.
        """
        tagged = self._tags.get(tag)
        if tagged is None:
            tagged = self._tags[tag] = _Tagged()
        start, end, delta, allowed = run
        if lg2 > 12:
            tagged.large[lg2][start >> lg2] = run
            self.slots += 1
        elif end - start == 4096:
            tagged.pages[start >> 12] = run
            self.slots += 1
        else:
            pages = tagged.pages
            for number in range((start >> 12) + 1, end >> 12):
                if number in pages:
                    end = number << 12
                    run = (start, end, delta, allowed)
                    break
            pages.update(dict.fromkeys(range(start >> 12, end >> 12), run))
            self.slots += end - start >> 12
        if self.slots > self.capacity:
            self.clear()
        return run

    def extend(self, tag: int, run: Run, end: int) -> Run:
        """Join `run` with the cached runs of 4 KiB pages that continue it, as far as `end`; nothing new is cached."""
        tagged = self._tags.get(tag)
        start, stop, delta, allowed = run
        if tagged is None or tagged.pages.get(start >> 12) is not run:
            return run
        while stop < end:
            more = tagged.pages.get(stop >> 12)
            if more is None or more[2] != delta or more[3] != allowed:
                break
            stop = more[1]
        if stop == run[1]:
            return run
        joined = (start, stop, delta, allowed)
        tagged.pages.update(dict.fromkeys(range(start >> 12, stop >> 12), joined))
        return joined

    def clear(self) -> None:
        """Invalidate everything."""
        self._tags.clear()
        self.slots = 0

    def clear_tag(self, tag: int) -> None:
        """Invalidate all entries of a tag."""
        self._tags.pop(tag, None)
        if not self._tags:
            self.slots = 0

    def clear_range(self, tag: int, start: int, length: int) -> None:
        """Invalidate the pages of a tag in [start, start + length), and every large page that reaches into it."""
        tagged = self._tags.get(tag)
        if tagged is None:
            return
        pages = tagged.pages
        if pages:
            first, end = start >> 12, start + length + 4095 >> 12
            if end - first == 1:
                run = pages.pop(first, None)
                if run is not None and run[1] - run[0] > 4096:
                    self._split(pages, run, first, end)
            else:
                self._clear_pages(pages, first, end)
        for lg2, entries in tagged.large.items():
            if entries:
                low, high = start >> lg2, start + length - 1 >> lg2
                if high - low < len(entries):
                    for number in range(low, high + 1):
                        entries.pop(number, None)
                else:
                    for number in [n for n in entries if low <= n <= high]:
                        del entries[number]

    def _clear_pages(self, pages: dict[int, Run], first: int, end: int) -> None:
        if end - first <= len(pages):
            hit = [n for n in range(first, end) if n in pages]
        else:
            hit = [n for n in pages if first <= n < end]
        cut: set[Run] = set()
        for number in hit:
            run = pages.pop(number)
            if run[0] >> 12 < first or run[1] >> 12 > end:
                cut.add(run)
        for run in cut:
            self._split(pages, run, first, end)

    @staticmethod
    def _split(pages: dict[int, Run], run: Run, first: int, end: int) -> None:
        """What is left of a run after its pages [first, end) have gone, as runs of its own."""
        start, stop, delta, allowed = run
        for low, high in ((start, min(stop, first << 12)), (max(start, end << 12), stop)):
            if low < high:
                rest = (low, high, delta, allowed)
                for number in range(low >> 12, high >> 12):
                    if pages.get(number) is run:
                        pages[number] = rest
