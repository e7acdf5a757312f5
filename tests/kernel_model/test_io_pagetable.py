"""kernel_model/iommufd/io_pagetable.py against a dictionary of pages, with domains that fail when they are told to."""
# ruff: noqa: PT017 - whether a call fails, and how, is what the oracle says

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_model.errors import KernelError
from kernel_model.interval import U64_MAX
from kernel_model.iommu.core import Domain
from kernel_model.iommufd.io_pagetable import IOMMU_READ, IOMMU_WRITE, IoPagetable
from kernel_model.iommufd.pages import Pages, Runs
from kernel_model.process import Credentials, Mm, Process, User

PAGE = 4096
TOP = 32  # pages of the small universe


class Accounts:
    """As much of a kernel as pins see."""

    def __init__(self) -> None:
        self.process = Process(1, Mm(1), False, Credentials())
        self._user = User(0)

    def user(self, uid: int) -> User:
        return self._user


class TestPages(Pages):
    """Page n of the mapping lies at `base` + n; a page in `bad` cannot be pinned."""

    __test__ = False

    def __init__(self, kernel: Accounts, base: int, npages: int, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(kernel, kernel.process, 0, npages * PAGE, True)  # type: ignore[arg-type]
        self.base = base
        self.bad = bad

    @property
    def alignment_address(self) -> int:
        return self.base * PAGE

    def resolve(self, first: int, last: int) -> Runs:
        if self.bad & set(range(first, last + 1)):
            raise KernelError(errno.EFAULT, "a bad page")
        # In two pieces, so that one area takes several maps.
        middle = (first + last) // 2
        pieces = [(first, middle), (middle + 1, last)] if first < last else [(first, last)]
        return [((self.base + start) * PAGE, end - start + 1) for start, end in pieces]


class FakeDomain:
    """A page table as a dictionary. `budget` maps succeed, then one fails with ENOMEM."""

    def __init__(self, smallest: int = PAGE, first: int = 0, last: int = U64_MAX) -> None:
        self.pgsize_bitmap = smallest | 1 << 21
        self.aperture_start, self.aperture_end = first, last
        self.pages: dict[int, tuple[int, int]] = {}
        self.budget = 1 << 40

    def map(self, iova: int, address: int, length: int, prot: int) -> None:
        assert length
        assert (iova | address | length) % PAGE == 0
        if self.budget <= 0:
            raise KernelError(errno.ENOMEM, "told to fail")
        self.budget -= 1
        for offset in range(0, length, PAGE):
            assert iova + offset not in self.pages
            self.pages[iova + offset] = (address + offset, prot)

    map_small = Domain.map_small

    def unmap(self, iova: int, length: int) -> int:
        for offset in range(0, length, PAGE):
            del self.pages[iova + offset]  # unmapping what is not mapped is a bug of the caller
        return length


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


class Oracle:
    """What an IOAS holds: of every mapped page its physical page and protection; and where areas begin."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int]] = {}
        self.areas: list[tuple[int, int]] = []  # (first page, pages)

    def free(self, first: int, npages: int) -> bool:
        return not any(start < first + npages and first < start + length for start, length in self.areas)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_maps_copies_and_domains_hold_what_a_dictionary_holds(seed: int, large: bool) -> None:
    rng = random.Random(seed)
    kernel = Accounts()
    spaces = [(IoPagetable(), Oracle()) for _ in range(2)]
    for iopt, _ in spaces:
        iopt.disable_large_pages = not large
        iopt.recalculate_alignment()
    for _ in range(25):
        iopt, oracle = rng.choice(spaces)
        for domain in iopt.domains:
            domain.budget = rng.choice([0, 1, 2, 3, 1 << 40, 1 << 40])  # type: ignore[attr-defined]
        step = rng.choice([_map, _map, _copy, _copy, _unmap, _add_domain, _remove_domain])
        step(rng, kernel, iopt, oracle, rng.choice(spaces))
        for space, wanted in spaces:
            _compare(space, wanted)
        _compare_pins(kernel, [space for space, _ in spaces])
    for iopt, _ in spaces:
        for domain in list(iopt.domains):
            iopt.remove_domain(domain)
        iopt.destroy()
        assert iopt.reserved == []
    assert kernel.process.mm.pinned_vm == 0


def _map(rng: random.Random, kernel: Accounts, iopt: IoPagetable, oracle: Oracle, _other: Any) -> None:
    first, npages, base = rng.randrange(1, TOP), rng.randrange(1, 6), rng.randrange(1 << 20)
    bad = frozenset([rng.randrange(npages)]) if rng.random() < 0.2 else frozenset()
    pages = TestPages(kernel, base, npages, bad)
    prot = rng.choice([IOMMU_READ, IOMMU_READ | IOMMU_WRITE])
    fixed = rng.random() < 0.7
    try:
        iova = iopt.map_pages([(pages, 0, npages * PAGE)], npages * PAGE, first * PAGE if fixed else None, prot)
    except KernelError as error:
        assert pages.users == 0
        last = (first + npages) * PAGE - 1
        if fixed and iopt.reserved_hit(first * PAGE, last):
            assert error.errno == errno.EINVAL
        elif fixed and not oracle.free(first, npages):
            assert error.errno == errno.EEXIST
        elif error.errno == errno.ENOSPC:
            assert iopt.reserved  # a domain's aperture ends within the small universe
            assert not fixed
        else:
            assert iopt.domains
            assert error.errno in ((errno.EFAULT,) if bad else (errno.ENOMEM,))
        return
    assert not fixed or iova == first * PAGE
    assert oracle.free(iova // PAGE, npages)
    oracle.areas.append((iova // PAGE, npages))
    for index in range(npages):
        oracle.pages[iova // PAGE + index] = (base + index, prot)


def _copy(rng: random.Random, kernel: Accounts, iopt: IoPagetable, oracle: Oracle, other: Any) -> None:
    source, there = other
    first, npages, to = rng.randrange(1, TOP), rng.randrange(1, 5), rng.randrange(1, TOP)
    whole = all(page in there.pages for page in range(first, first + npages))
    try:
        slices = source.slices(first * PAGE, npages * PAGE)
    except KernelError as error:
        assert (error.errno, whole) == (errno.ENOENT, False)
        return
    assert whole
    try:
        iopt.map_pages(slices, npages * PAGE, to * PAGE, IOMMU_READ)
    except KernelError:
        return
    assert oracle.free(to, npages)
    position = to
    for pages, start_byte, length in slices:
        oracle.areas.append((position, length // PAGE))
        assert isinstance(pages, TestPages)
        for index in range(length // PAGE):
            oracle.pages[position] = (pages.base + start_byte // PAGE + index, IOMMU_READ)
            position += 1
    assert [oracle.pages[to + i][0] for i in range(npages)] == [there.pages[first + i][0] for i in range(npages)]


def _unmap(rng: random.Random, kernel: Accounts, iopt: IoPagetable, oracle: Oracle, _other: Any) -> None:
    first, npages = rng.randrange(0, TOP), rng.randrange(1, 12)
    touched = sorted(area for area in oracle.areas if area[0] < first + npages and first < sum(area))
    gone = []
    for area in touched:
        if area[0] < first or sum(area) > first + npages:
            break
        gone.append(area)
    try:
        assert iopt.unmap_range(first * PAGE, (first + npages) * PAGE - 1) == PAGE * sum(area[1] for area in gone)
        assert gone == touched
    except KernelError as error:
        assert (error.errno, gone == touched) == (errno.ENOENT, False)
    for area in gone:
        oracle.areas.remove(area)
        for page in range(area[0], sum(area)):
            del oracle.pages[page]


def _add_domain(rng: random.Random, kernel: Accounts, iopt: IoPagetable, oracle: Oracle, _other: Any) -> None:
    domain = FakeDomain(last=rng.choice([U64_MAX, (TOP + 8) * PAGE - 1, TOP // 2 * PAGE - 1]))
    domain.budget = rng.choice([0, 2, 1 << 40, 1 << 40])
    reserved = list(iopt.reserved)
    alignment = iopt.iova_alignment
    try:
        iopt.add_domain(domain)  # type: ignore[arg-type]
    except KernelError as error:
        assert error.errno in (errno.ENOMEM, errno.EFAULT, errno.EADDRINUSE)
        assert domain.pages == {}
        assert (iopt.reserved, iopt.iova_alignment) == (reserved, alignment)


def _remove_domain(rng: random.Random, kernel: Accounts, iopt: IoPagetable, oracle: Oracle, _other: Any) -> None:
    if iopt.domains:
        domain = rng.choice(iopt.domains)
        iopt.remove_domain(domain)
        assert domain.pages == {}  # type: ignore[attr-defined]


def _compare(iopt: IoPagetable, oracle: Oracle) -> None:
    areas = [(area.iova // PAGE, area.length // PAGE) for area in iopt.areas.values()]
    assert areas == sorted(oracle.areas)
    wanted = {page * PAGE: (place * PAGE, prot) for page, (place, prot) in oracle.pages.items()}
    for domain in iopt.domains:
        assert domain.pages == wanted  # type: ignore[attr-defined]
    if iopt._holes is not None:
        assert not any(first * PAGE in iopt._holes._last for first, _ in areas)


def _compare_pins(kernel: Accounts, spaces: list[IoPagetable]) -> None:
    pinned: dict[int, set[int]] = {}
    for iopt in spaces:
        for area in iopt.areas.values():
            assert area.pinned == bool(iopt.domains)
            if area.pinned:
                pinned.setdefault(id(area.pages), set()).update(range(area.first_index, area.last_index + 1))
    assert kernel.process.mm.pinned_vm == sum(map(len, pinned.values()))


# -- facts -------------------------------------------------------------------------------------------------------------


def lazily(iopt: IoPagetable, kernel: Accounts, iova: int, npages: int) -> None:
    iopt.map_pages([(TestPages(kernel, 1, npages), 0, npages * PAGE)], npages * PAGE, iova, IOMMU_READ)


def test_area_may_reach_the_last_byte_of_the_space() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    lazily(iopt, kernel, U64_MAX - PAGE + 1, 1)
    assert iopt.unmap_range(0, U64_MAX) == PAGE


def test_half_of_the_space_is_mapped_lazily_and_unmapped_again() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    lazily(iopt, kernel, 0, 1 << 51)
    assert kernel.process.mm.pinned_vm == 0
    assert iopt.unmap_range(0, U64_MAX) == 1 << 63


def test_fixed_map_that_wraps_is_eoverflow() -> None:
    with refused(errno.EOVERFLOW):
        lazily(IoPagetable(), Accounts(), U64_MAX - PAGE + 1, 2)


def test_automatic_iova_avoids_reserved_and_mapped_ranges() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    iopt.reserve(0, 4 * PAGE - 1, "owner")
    lazily(iopt, kernel, 4 * PAGE, 2)
    pages = TestPages(kernel, 1, 1)
    assert iopt.map_pages([(pages, 0, PAGE)], PAGE, None, IOMMU_READ) == 6 * PAGE


def test_automatic_iova_stays_in_the_allowed_ranges() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    iopt.set_allowed([(10 * PAGE, 12 * PAGE - 1)])
    for expected in (10 * PAGE, 11 * PAGE):
        assert iopt.map_pages([(TestPages(kernel, 1, 1), 0, PAGE)], PAGE, None, IOMMU_READ) == expected
    with refused(errno.ENOSPC):
        iopt.map_pages([(TestPages(kernel, 1, 1), 0, PAGE)], PAGE, None, IOMMU_READ)


def test_domain_with_larger_pages_than_the_processors_is_einval() -> None:
    with refused(errno.EINVAL):
        IoPagetable().add_domain(FakeDomain(smallest=1 << 16))  # type: ignore[arg-type]


def test_domain_whose_aperture_misses_an_area_is_eaddrinuse_and_reserves_nothing() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    lazily(iopt, kernel, 8 * PAGE, 1)
    for domain in (FakeDomain(first=9 * PAGE), FakeDomain(last=8 * PAGE - 1)):
        with refused(errno.EADDRINUSE):
            iopt.add_domain(domain)  # type: ignore[arg-type]
        assert (iopt.reserved, iopt.domains) == ([], [])


def test_first_domain_that_goes_is_replaced_by_the_last() -> None:
    iopt = IoPagetable()
    domains = [FakeDomain() for _ in range(3)]
    for domain in domains:
        iopt.add_domain(domain)  # type: ignore[arg-type]
    iopt.remove_domain(domains[0])  # type: ignore[arg-type]
    assert iopt.domains == [domains[2], domains[1]]


def test_reservations_go_with_their_owner_alone() -> None:
    iopt = IoPagetable()
    iopt.reserve(0, 10, "one")
    iopt.reserve(5, 20, "other")
    iopt.unreserve("one")
    assert iopt.ranges() == [(0, 4), (21, U64_MAX)]


def test_large_pages_go_off_only_while_no_domain_can_have_used_them() -> None:
    iopt, kernel = IoPagetable(), Accounts()
    iopt.add_domain(FakeDomain())  # type: ignore[arg-type]
    lazily(iopt, kernel, PAGE, 1)
    with refused(errno.EINVAL):
        iopt.set_large_pages(False)
    iopt.unmap_range(0, U64_MAX)
    iopt.set_large_pages(False)
    assert iopt.iova_alignment == PAGE
