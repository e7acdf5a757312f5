"""The IOVA space of an IOAS, after io_pagetable.c of drivers/iommu/iommufd.

An `IoPagetable` holds areas (what is mapped), reserved ranges (what must not be), allowed ranges (where automatic
allocation may go), and the domains that every area is mapped into. All addresses are inclusive `last`, never exclusive
ends: the space reaches up to 2^64-1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.interval import U64_MAX, Holes, complement, merge, place
from kernel_model.iommufd.pages import Pages, Runs
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from kernel_model.iommu.core import Domain
    from kernel_model.iommufd.access import Access

IOMMU_READ, IOMMU_WRITE, IOMMU_CACHE = 1, 2, 4
#: Automatic IOVAs are aligned no further than a huge page (HPAGE_SIZE; PAGE_SIZE in kernels without THP).
MAX_AUTO_ALIGNMENT = 2 << 20
#: How often accesses are asked to let go of one area.
_UNMAP_TRIES = 100


class Area:
    """A mapped range: `length` bytes of `pages` from `start_byte` on, at `iova`."""

    __slots__ = ("iova", "last", "num_accesses", "num_locks", "pages", "pinned", "prevent_access", "prot", "start_byte")

    def __init__(self, iova: int, length: int, pages: Pages, start_byte: int, prot: int) -> None:
        self.iova = iova
        self.last = iova + length - 1
        self.pages = pages
        self.start_byte = start_byte
        self.prot = prot
        #: Whether a domain holds the pages (the kernel's storage_domain).
        self.pinned = False
        self.num_accesses = 0
        self.num_locks = 0
        #: It is being unmapped: no access may begin.
        self.prevent_access = False

    @property
    def length(self) -> int:
        return self.last - self.iova + 1

    @property
    def page_offset(self) -> int:
        return self.start_byte & PAGE_MASK

    @property
    def first_index(self) -> int:
        return self.start_byte >> PAGE_SHIFT

    @property
    def last_index(self) -> int:
        return (self.start_byte + self.last - self.iova) >> PAGE_SHIFT


#: What a fresh IOAS has; a tree of its own costs as much as the rest of IOAS_ALLOC.
_NO_AREAS: SortedDict[int, Area] = SortedDict()

#: A slice of pages on its way to becoming an area: (pages, start byte, length).
Slice = tuple[Pages, int, int]


class IoPagetable:
    """`struct io_pagetable`."""

    def __init__(self) -> None:
        self.areas: SortedDict[int, Area] = _NO_AREAS
        #: (first, last, owner); ranges may overlap.
        self.reserved: list[tuple[int, int, object]] = []
        self.allowed: list[tuple[int, int]] = []
        self.domains: list[Domain] = []
        self.iova_alignment = 1
        self.disable_large_pages = False
        #: Attached accesses by the lowest number that was free.
        self.accesses: dict[int, Access] = {}
        self._holes: Holes | None = None

    # -- looking up --------------------------------------------------------------------------------------------------

    def area_at(self, first: int, last: int) -> Area | None:
        """The lowest area that intersects [first, last]."""
        areas = self.areas
        index = areas.bisect_right(first) - 1
        if index >= 0:
            area: Area = areas.peekitem(index)[1]
            if area.last >= first:
                return area
        index += 1
        if index < len(areas):
            iova, area = areas.peekitem(index)
            if iova <= last:
                return area
        return None

    def contiguous(self, iova: int, last: int) -> Iterator[tuple[Area, int, int]]:
        """The areas of [iova, last] in order with the part of each: (area, first, last). ENOENT at the first gap."""
        position = iova
        while True:
            area = self.area_at(position, position)
            if area is None:
                raise KernelError(errno.ENOENT, f"nothing is mapped at {position:#x}")
            end = min(area.last, last)
            yield area, position, end
            if end == last:
                return
            position = end + 1

    def nth_area_iova(self, word: int) -> int:
        """__iommufd_test_syz_conv_iova(): a fuzzer's IOVA. The low half counts areas, the high half is an offset in
        one; 0 where there are not so many."""
        number, offset = word & 0xFFFFFFFF, word >> 32
        if number >= len(self.areas):
            return 0
        iova: int = self.areas.peekitem(number)[0]
        return (iova + offset) & U64_MAX

    def reserved_hit(self, first: int, last: int) -> bool:
        return any(start <= last and end >= first for start, end, _ in self.reserved)

    def ranges(self) -> list[tuple[int, int]]:
        """What is not reserved, ascending (IOMMU_IOAS_IOVA_RANGES)."""
        return list(complement(((start, end) for start, end, _ in self.reserved), 0, U64_MAX))

    # -- choosing an address -----------------------------------------------------------------------------------------

    def alloc_iova(self, address: int, length: int) -> int:
        """iopt_alloc_iova(): the lowest free place that keeps the alignment of `address`.

        EOVERFLOW: half the space or more. EINVAL: the address is aligned less than the IOAS asks for. ENOSPC.
        """
        if length >= U64_MAX // 2:
            raise KernelError(errno.EOVERFLOW, f"no place for {length:#x} bytes")
        offset = address & PAGE_MASK
        alignment = 1 << (length - 1).bit_length()
        if address:
            alignment = min(alignment, address & -address)
        alignment = min(alignment, MAX_AUTO_ALIGNMENT)
        if alignment < self.iova_alignment:
            raise KernelError(errno.EINVAL, f"{address:#x} is aligned less than {self.iova_alignment:#x}")
        if self._holes is None:
            self._holes = Holes()
            for area in self.areas.values():
                self._holes.take(area.iova, area.last)
        lowest, highest = PAGE_SIZE, U64_MAX - PAGE_SIZE
        spans = merge(self.allowed, lowest, highest) if self.allowed else iter([(lowest, highest)])
        reserved = [(start, end) for start, end, _ in self.reserved]
        for first, last in spans:
            start = place(first, last, length, alignment, offset)
            if start is None:
                continue
            for free_first, free_last in complement(reserved, start, last):
                found = self._holes.find(free_first, free_last, length, alignment, offset)
                if found is not None:
                    return found
        raise KernelError(errno.ENOSPC, f"no free place for {length:#x} bytes aligned to {alignment:#x}")

    def check_iova(self, iova: int, length: int) -> None:
        """iopt_check_iova(): EINVAL misaligned; EOVERFLOW; EINVAL reserved; EEXIST, in this order."""
        if iova & (self.iova_alignment - 1):
            raise KernelError(errno.EINVAL, f"iova {iova:#x} is not aligned to {self.iova_alignment:#x}")
        last = iova + length - 1
        if last > U64_MAX:
            raise KernelError(errno.EOVERFLOW, f"{iova:#x} + {length:#x} wraps")
        if self.reserved_hit(iova, last):
            raise KernelError(errno.EINVAL, f"{iova:#x}-{last:#x} touches a reserved range")
        if self.area_at(iova, last) is not None:
            raise KernelError(errno.EEXIST, f"{iova:#x}-{last:#x} touches a mapping")

    # -- mapping -----------------------------------------------------------------------------------------------------

    def map_pages(self, slices: list[Slice], length: int, iova: int | None, prot: int) -> int:
        """iopt_map_pages(): make one area for each slice, at `iova` or where there is room, and fill the domains.

        Takes over the slices' references. EINVAL: length not aligned. See `alloc_iova`, `check_iova`. EPERM: write
        access to pages mapped without it. EINVAL: a slice starts at a misaligned page offset. Then the pin's errnos.
        On an error nothing is left.
        """
        made: list[Area] = []
        try:
            if injecting:
                for _ in slices:
                    kmalloc("struct iopt_area")
            if length & (self.iova_alignment - 1) or not length:
                raise KernelError(errno.EINVAL, f"length {length:#x} is not aligned to {self.iova_alignment:#x}")
            if iova is None:
                pages, start_byte, _ = slices[0]
                iova = self.alloc_iova(pages.alignment_address + start_byte, length)
            else:
                self.check_iova(iova, length)
            position = iova
            for pages, start_byte, size in slices:
                made.append(self._insert(pages, position, start_byte, size, prot))
                position += size
            filled = 0
            try:
                for area in made:
                    self._fill_domains(area)
                    filled += 1
            except KernelError:
                for area in made[:filled]:
                    self._unfill_domains(area)
                raise
        except KernelError:
            for area in made:
                self._remove(area)
            for pages, _, _ in slices:
                pages.put()
            raise
        return iova

    def _insert(self, pages: Pages, iova: int, start_byte: int, length: int, prot: int) -> Area:
        if prot & IOMMU_WRITE and not pages.writable:
            raise KernelError(errno.EPERM, "the pages were mapped without WRITEABLE")
        if start_byte & PAGE_MASK & (self.iova_alignment - 1):
            raise KernelError(errno.EINVAL, f"the page offset {start_byte & PAGE_MASK:#x} is misaligned")
        if start_byte + length - 1 >> PAGE_SHIFT >= pages.npages:
            raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes and the page offset come to more than 64 bits")
        area = Area(iova, length, pages, start_byte, prot)
        if self.areas is _NO_AREAS:
            self.areas = SortedDict()
        self.areas[iova] = area
        if self._holes is not None:
            self._holes.take(iova, area.last)
        return area

    def _remove(self, area: Area) -> None:
        del self.areas[area.iova]
        if self._holes is not None:
            self._holes.give(area.iova, area.last)

    def _fill_domains(self, area: Area) -> None:
        """iopt_area_fill_domains(): pin the area's pages and map them into every domain, or neither."""
        if not self.domains:
            return
        if injecting:
            area.pages.reader_can_fail(area.first_index, area.last_index)
        runs = area.pages.pin(area.first_index, area.last_index)
        area.pinned = True
        done: list[Domain] = []
        try:
            for domain in self.domains:
                self._map_domain(domain, area, runs)
                done.append(domain)
        except KernelError:
            for domain in done:
                self._unmap_domain(domain, area)
            self._unpin(area)
            raise

    def _unfill_domains(self, area: Area) -> None:
        if area.pinned:
            for domain in self.domains:
                self._unmap_domain(domain, area)
            self._unpin(area)

    def _unpin(self, area: Area) -> None:
        area.pinned = False
        area.pages.unpin(area.first_index, area.last_index)

    def _map_domain(self, domain: Domain, area: Area, runs: Runs) -> None:
        if not area.pages.track(domain, area):
            return
        iova, left, offset = area.iova, area.length, area.page_offset
        prot = area.pages.protection(area.prot)
        map_run = domain.map_small if self.disable_large_pages else domain.map
        try:
            for address, npages in runs:
                size = min((npages << PAGE_SHIFT) - offset, left)
                map_run(iova, address + offset, size, prot)
                iova += size
                left -= size
                offset = 0
        except KernelError:
            area.pages.untrack(domain, area)
            if iova > area.iova:
                domain.unmap(area.iova, iova - area.iova)
            raise
        if left:
            raise KernelBug(f"{left:#x} bytes of an area have no pages")

    def _unmap_domain(self, domain: Domain, area: Area) -> None:
        if area.pages.untrack(domain, area):
            domain.unmap(area.iova, area.length)

    def unmap_range(self, first: int, last: int) -> int:
        """`unmap_each` for callers who need no more than the bytes removed."""
        return sum(self.unmap_each(first, last))

    def unmap_each(self, first: int, last: int) -> Iterator[int]:
        """iopt_unmap_iova_range(): remove the areas inside [first, last], ascending; the bytes of each as it goes.

        ENOENT: an area is not wholly inside. EBUSY: an area is locked. EDEADLOCK: an access does not let go of an
        area. Areas before it are already gone.
        """
        start = first
        tries = 0
        while (area := self.area_at(start, last)) is not None:
            if area.num_locks:
                raise KernelError(errno.EBUSY, f"the mapping at {area.iova:#x} is locked")
            if area.iova < start or area.last > last:
                raise KernelError(errno.ENOENT, f"the mapping {area.iova:#x}-{area.last:#x} is not inside the range")
            if area.iova != start:
                tries = 0
            if area.num_accesses:
                start = area.iova
                area.prevent_access = True
                self._notify_unmap(area)
                tries += 1
                if tries > _UNMAP_TRIES:
                    raise KernelError(errno.EDEADLOCK, f"an access keeps the mapping at {area.iova:#x}")
                continue
            self.remove_area(area)
            yield area.length
            if area.last >= last:
                break
            start = area.last + 1

    def _notify_unmap(self, area: Area) -> None:
        """iommufd_access_notify_unmap(): every access is asked to let go of the area."""
        for _, access in sorted(self.accesses.items()):
            access.unmap(area.iova, area.length)

    def cut(self, iova: int) -> None:
        """iopt_cut_iova(): make `iova` the last byte of an area, if one covers it. It belongs to VFIO type 1.

        EOPNOTSUPP: the area is of a dma-buf. EINVAL: the cut is misaligned, the area is accessed, or a domain may hold
        it in large pages.
        """
        area = self.area_at(iova, iova)
        if area is None or iova in (area.iova, area.last):
            return
        if area.pages.is_dmabuf:
            raise KernelError(errno.EOPNOTSUPP, f"the mapping of a dma-buf at {area.iova:#x} cannot be cut")
        start = iova + 1
        start_byte = area.start_byte + start - area.iova
        if (start | start_byte) & (self.iova_alignment - 1):
            raise KernelError(errno.EINVAL, f"a cut before {start:#x} is not aligned to {self.iova_alignment:#x}")
        if injecting:
            kmalloc("struct iopt_area on the left")
            kmalloc("struct iopt_area on the right")
        if area.num_accesses:
            raise KernelError(errno.EINVAL, "a mapping that is being accessed cannot be cut")
        if area.pinned and not self.disable_large_pages:
            raise KernelError(errno.EINVAL, "the domain may hold the mapping in large pages")
        right = Area(start, area.last - start + 1, area.pages.get(), start_byte, area.prot)
        right.pinned = area.pinned
        area.last = iova
        self.areas[start] = right

    def remove_area(self, area: Area) -> None:
        self._unfill_domains(area)
        self._remove(area)
        area.pages.put()

    def slices(self, iova: int, length: int) -> list[Slice]:
        """iopt_get_pages(): the pages behind a range, with a reference to each. EINVAL, EOVERFLOW, ENOENT."""
        if not length:
            raise KernelError(errno.EINVAL, "length is zero")
        last = iova + length - 1
        if last > U64_MAX:
            raise KernelError(errno.EOVERFLOW, f"{iova:#x} + {length:#x} wraps")
        found: list[Slice] = []
        for area, first, end in self.contiguous(iova, last):
            if injecting:
                kmalloc("struct iopt_pages_list")
            found.append((area.pages, area.start_byte + first - area.iova, end - first + 1))
        for pages, _, _ in found:
            pages.get()
        return found

    # -- restrictions ------------------------------------------------------------------------------------------------

    def set_allowed(self, allowed: list[tuple[int, int]]) -> None:
        """iopt_set_allow_iova(): EADDRINUSE where one meets a reserved range; then the old list stays."""
        if any(self.reserved_hit(first, last) for first, last in allowed):
            raise KernelError(errno.EADDRINUSE, "an allowed range is reserved")
        self.allowed = allowed

    def reserve(self, first: int, last: int, owner: object) -> None:
        """iopt_reserve_iova(): EADDRINUSE where a mapping or an allowed range is."""
        if self.area_at(first, last) is not None or any(a <= last and b >= first for a, b in self.allowed):
            raise KernelError(errno.EADDRINUSE, f"{first:#x}-{last:#x} is mapped or promised")
        if injecting:
            kmalloc("struct iopt_reserved")
        self.reserved.append((first, last, owner))

    def unreserve(self, owner: object) -> None:
        """iopt_remove_reserved_iova()."""
        self.reserved = [entry for entry in self.reserved if entry[2] is not owner]

    # -- domains -----------------------------------------------------------------------------------------------------

    def add_domain(self, domain: Domain) -> None:
        """iopt_table_add_domain(): restrict the space to the domain and map everything into it, or change nothing.

        EINVAL: its smallest page is larger than the CPU's. EADDRINUSE: a mapping is misaligned for it or outside its
        aperture. Then the pins' errnos.
        """
        alignment = max(domain.pgsize_bitmap & -domain.pgsize_bitmap, self.iova_alignment)
        if alignment > PAGE_SIZE:
            raise KernelError(errno.EINVAL, f"the domain's smallest page is {alignment:#x} bytes")
        if alignment != self.iova_alignment:
            self._check_alignment(alignment)
        try:
            if domain.aperture_start:
                self.reserve(0, domain.aperture_start - 1, domain)
            if domain.aperture_end != U64_MAX:
                self.reserve(domain.aperture_end + 1, U64_MAX, domain)
            self._fill_domain(domain)
        except KernelError:
            self.unreserve(domain)
            raise
        self.iova_alignment = alignment
        self.domains.append(domain)

    def _fill_domain(self, domain: Domain) -> None:
        done: list[Area] = []
        first_domain = not self.domains
        try:
            for area in self.areas.values():
                if injecting:
                    area.pages.reader_can_fail(area.first_index, area.last_index)
                runs = area.pages.pin(area.first_index, area.last_index)
                try:
                    self._map_domain(domain, area, runs)
                except KernelError:
                    area.pages.unpin(area.first_index, area.last_index)
                    raise
                if not first_domain:  # the pin that the area already has is enough
                    area.pages.unpin(area.first_index, area.last_index)
                area.pinned = True
                done.append(area)
        except KernelError:
            for area in done:
                self._unmap_domain(domain, area)
                if first_domain:
                    self._unpin(area)
            raise

    def remove_domain(self, domain: Domain) -> None:
        """iopt_table_remove_domain(). Never fails."""
        index = self.domains.index(domain)
        tail = self.domains.pop()
        if index < len(self.domains):
            self.domains[index] = tail
        for area in self.areas.values():
            self._unmap_domain(domain, area)
            if not self.domains:
                self._unpin(area)
        self.unreserve(domain)
        self.recalculate_alignment()

    def add_access(self, access: Access) -> None:
        """iopt_add_access(). EADDRINUSE: a mapping is misaligned for it."""
        number = next(number for number in range(len(self.accesses) + 1) if number not in self.accesses)
        self.accesses[number] = access
        try:
            self.recalculate_alignment()
        except KernelError:
            del self.accesses[number]
            raise

    def remove_access(self, access: Access) -> None:
        """iopt_remove_access()."""
        for number, found in self.accesses.items():
            if found is access:
                del self.accesses[number]
                break
        self.recalculate_alignment()

    def recalculate_alignment(self) -> None:
        """iopt_calculate_iova_alignment(): EADDRINUSE where the areas do not conform to a larger one."""
        alignment = PAGE_SIZE if self.disable_large_pages else 1
        for domain in self.domains:
            alignment = max(alignment, domain.pgsize_bitmap & -domain.pgsize_bitmap)
        alignment = max([alignment, *(access.iova_alignment for access in self.accesses.values())])
        if alignment > self.iova_alignment:
            self._check_alignment(alignment)
        self.iova_alignment = alignment

    def _check_alignment(self, alignment: int) -> None:
        mask = alignment - 1
        for area in self.areas.values():
            if (area.iova | area.length | area.page_offset) & mask:
                raise KernelError(errno.EADDRINUSE, f"the mapping at {area.iova:#x} is not aligned to {alignment:#x}")

    def set_large_pages(self, enable: bool) -> None:
        """IOMMU_OPTION_HUGE_PAGES. Off: EINVAL with both a domain and a mapping; EADDRINUSE for misaligned ones."""
        if enable:
            self.disable_large_pages = False
            self.recalculate_alignment()
        elif not self.disable_large_pages:
            if self.domains and self.areas:
                raise KernelError(errno.EINVAL, "large pages may already be in use")
            self.disable_large_pages = True
            try:
                self.recalculate_alignment()
            except KernelError:
                self.disable_large_pages = False
                raise

    def destroy(self) -> None:
        """Everything goes with the IOAS."""
        self.unmap_range(0, U64_MAX)
        if self.domains or self.accesses:
            raise KernelBug("an IOAS is destroyed while in use")
        self.allowed = []
