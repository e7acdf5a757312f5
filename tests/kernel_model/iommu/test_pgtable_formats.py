"""One suite for all formats: map and unmap against a dict of pages and the manuals' walks (`pgtable_oracle`).

`test_pgtable.py` has what is generic_pt's own in detail, `test_io_pgtable_arm.py` what is io-pgtable-arm.c's.
"""

import errno

import pgtable_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakedev.memory import PhysicalMemory
from fakedev.pgtable.amdv1 import AmdV1
from fakedev.pgtable.format import LEAF, TABLE
from fakedev.pgtable.vtd_ss import VtdSecondStage
from fakedev.pgtable.walker import loader, updater, walk
from fakedev.pgtable.x86_64 import X86FirstStage
from kernel_model.errors import KernelError
from kernel_model.iommu.io_pgtable_arm import ArmPageTable, stage1_format, stage2_format, stage2_sl0
from kernel_model.iommu.pgtable import PageTable
from kernel_model.page_alloc import PageAllocator

K4, K16, K64, M2, M32, M512, G1 = 1 << 12, 1 << 14, 1 << 16, 1 << 21, 1 << 25, 1 << 29, 1 << 30
T4 = 1 << 42


class Case:
    """A format as a driver uses it: `make` a table, read it by the manual, and which of the rights a mapping gets."""

    def __init__(self, name, fmt, reader, config, sizes, address_bits=None, top_level=None, written="w"):
        self.name = name
        self.fmt = fmt
        self.reader = reader
        self.config = config
        self.sizes = sizes
        self.address_bits = address_bits or fmt.input_bits
        self.top_level = fmt.top_level if top_level is None else top_level
        self.rights = {1: "r", 2: written, 3: "rw"}
        self.arm = fmt.name.startswith("arm")
        self.page = sizes & -sizes
        self.block = M2 if sizes & M2 else (sizes & sizes - 1) & -(sizes & sizes - 1)

    def make(self, memory, pages):
        if self.arm:
            return ArmPageTable(self.fmt, memory, pages)
        return PageTable(self.fmt, memory, pages, self.top_level, self.address_bits)


def s1(name, sizes, ias, oas, hd=False):
    fmt = stage1_format(sizes, ias, oas, dirty_tracking=hd)
    granule = 1 << fmt.granule_lg2 - 10
    config = {"granule": granule, "txsz": 64 - fmt.input_bits, "oas": fmt.output_bits, "ha": hd, "hd": hd}
    config["lpa"] = granule == 64 and fmt.output_bits == 52
    return Case(name, fmt, oracle.arm_stage1, config, sizes, written="rw")


def s2(name, sizes, ias, oas):
    fmt = stage2_format(sizes, ias, oas)
    granule = 1 << fmt.granule_lg2 - 10
    config = {"granule": granule, "txsz": 64 - fmt.input_bits, "oas": fmt.output_bits, "sl0": stage2_sl0(fmt)}
    config["lpa"] = granule == 64 and fmt.output_bits == 52
    return Case(name, fmt, oracle.arm_stage2, config, sizes)


def vtd(name, levels, sizes=K4 | M2 | G1, ad=False):
    config = {"levels": levels, "ssade": ad}
    fmt = VtdSecondStage(dirty_tracking=ad)
    return Case(name, fmt, oracle.vtd_second_stage, config, sizes, 12 + 9 * levels, levels - 1)


def x86(name, levels):
    bits = 11 + 9 * levels  # the lower half
    return Case(name, X86FirstStage(), oracle.x86_first_stage, {"levels": levels}, K4 | M2 | G1, bits, levels - 1, "rw")


def amd(name, levels, sizes, ad=False):
    bits = min(12 + 9 * levels, 64)
    return Case(name, AmdV1(52, ad), oracle.amd_host, {"levels": levels, "ad": ad}, sizes, bits, levels - 1)


ALL_AMD = (1 << 39) - K4
CASES = [
    s1("s1-4k", K4 | M2 | G1, 48, 48),
    s1("s1-4k-hd", K4 | M2 | G1, 39, 44, hd=True),
    s1("s1-4k-32", K4 | M2, 32, 40),
    s1("s1-16k", K16 | M32, 48, 48, hd=True),
    s1("s1-16k-36", K16 | M32, 36, 40),
    s1("s1-64k", K64 | M512, 48, 48, hd=True),
    s1("s1-64k-52", K64 | M512 | T4, 52, 52, hd=True),
    s2("s2-4k", K4 | M2 | G1, 48, 48),
    s2("s2-4k-44", K4 | M2 | G1, 44, 44),
    s2("s2-4k-42-concat", K4 | M2 | G1, 42, 42),
    s2("s2-4k-40-concat", K4 | M2 | G1, 40, 40),
    s2("s2-16k-concat", K16 | M32, 48, 48),
    s2("s2-16k-40-concat", K16 | M32, 40, 40),
    s2("s2-64k", K64 | M512, 48, 48),
    s2("s2-64k-52", K64 | M512 | T4, 52, 52),
    vtd("vtd-3", 3),
    vtd("vtd-4-ad", 4, ad=True),
    vtd("vtd-5", 5, K4 | M2),
    x86("x86-4", 4),
    x86("x86-5", 5),
    amd("amd-3", 3, ALL_AMD & (1 << 38) - 1),
    amd("amd-4-ad", 4, ALL_AMD, ad=True),
    amd("amd-6", 6, K4 | 1 << 15 | M2 | G1),
]
DIRTY = [case for case in CASES if case.fmt.with_dirty(case.fmt.leaf_bits(3, 0), 0) or case.config.get("hd")]
DIRTY = [case for case in DIRTY if any(case.config.get(key) for key in ("hd", "ssade", "ad"))]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


class Tree:
    """A table, and what is mapped: {page number: (physical page, prot)}; the areas mapped, by start."""

    def __init__(self, case):
        self.case = case
        self.memory = PhysicalMemory(128 << 20)
        self.allocator = PageAllocator(self.memory)
        self.table = case.make(self.memory, self.allocator)
        self.pages = {}
        self.areas = {}
        self.load = loader(self.memory)
        self.root_pages = self.allocator.live

    def map(self, iova, pa, length, prot=3):
        self.free(self.table.map(iova, pa, length, prot, self.case.sizes))
        self.areas[iova] = (pa, length, prot)
        step = self.case.page
        for n in range(length // step):
            self.pages[iova // step + n] = (pa + n * step, prot)

    def unmap(self, iova):
        length = self.areas.pop(iova)[1]
        unmapped, freed = self.table.unmap(iova, length)
        assert unmapped == length
        self.free(freed)
        for n in range(length // self.case.page):
            del self.pages[iova // self.case.page + n]

    def free(self, tables):
        for table in tables:
            self.allocator.free(table)

    def read(self, address):
        return self.case.reader(self.load, self.table.root, address, self.case.config)

    def taken(self, iova, length):
        return any(start < iova + length and iova < start + size for start, (_, size, _) in self.areas.items())

    def check(self, addresses):
        step = self.case.page
        for address in addresses:
            if not 0 <= address < 1 << self.case.address_bits:
                continue
            answer = self.read(address)
            there = self.pages.get(address // step)
            if there is None:
                assert answer.what == "absent", hex(address)
                assert self.table.iova_to_phys(address) is None
            else:
                assert answer.what == "mapped", hex(address)
                assert answer.pa == there[0] + address % step == self.table.iova_to_phys(address)
                assert answer.size & self.case.sizes
                assert {letter for letter in "rw" if letter in answer.rights} == set(self.case.rights[there[1]])

    def valid(self):
        """How many leaves are left in the tables."""
        return sum(self._leaves(self.table.root, self.table.top_level))

    def _leaves(self, table, level):
        entries = 1 << (self.case.fmt.index_bits if level < self.table.top_level else self.root_bits())
        for n in range(entries):
            item = self.load(table + 8 * n)
            kind = self.case.fmt.kind(item, level) if item else None
            if kind == LEAF:
                yield 1
            elif kind == TABLE:
                yield from self._leaves(self.case.fmt.table_address(item, level), level - 1)

    def root_bits(self):
        return self.case.fmt.root_index_bits or self.case.fmt.index_bits

    def pages_of_tables(self):
        below = self.case.fmt.table_bytes() // 4096
        return self.root_pages + (len(self.table.tables()) - 1) * below


# Where things are mapped: near borders of blocks and of the address space, in blocks; then pages off.
where = st.tuples(st.sampled_from([0, 1, 2, 3, 511, 512, 513, -1, -2]), st.integers(-3, 4))
lengths = st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 5, -1]))
maps = st.tuples(
    st.just("map"), where, lengths, st.sampled_from([(0, 0), (3, 0), (5, 7), (-9, 1)]), st.sampled_from([1, 2, 3])
)
unmaps = st.tuples(st.just("unmap"), st.integers(0, 20))


@by_name(CASES)
@settings(max_examples=15, deadline=None)
@given(operations=st.lists(st.one_of(maps, maps, unmaps), min_size=1, max_size=10))
def test_map_and_unmap_against_a_dict_of_pages(case, operations):
    tree = Tree(case)
    probes = {0, case.page - 1, (1 << case.address_bits) - 1}
    for operation in operations:
        if operation[0] == "unmap":
            if tree.areas:
                tree.unmap(sorted(tree.areas)[operation[1] % len(tree.areas)])
            continue
        _, (blocks, pages), (more_blocks, more_pages), shift, prot = operation
        iova = (blocks * case.block + pages * case.page) % (1 << case.address_bits)
        length = more_blocks * case.block + more_pages * case.page
        pa = (iova + shift[0] * case.block + shift[1] * case.page) % (1 << case.fmt.output_bits - 1)
        if length <= 0 or iova + length > 1 << case.address_bits:
            continue
        probes |= {iova - 1, iova, iova + case.page, iova + length // 2, iova + length - 1, iova + length}
        if not tree.taken(iova, length):
            tree.map(iova, pa, length, prot)
        elif iova // case.page in tree.pages:
            before = tree.allocator.live
            with pytest.raises(KernelError) as caught:
                tree.table.map(iova, pa, case.page, prot, case.sizes)
            assert caught.value.errno == (errno.EEXIST if case.arm else errno.EADDRINUSE)
            assert tree.allocator.live == before
    tree.check(probes)
    assert tree.pages_of_tables() == tree.allocator.live
    for iova in list(tree.areas):
        tree.unmap(iova)
    assert not tree.pages
    tree.check(probes)
    assert tree.valid() == 0
    tree.table.free()
    assert tree.allocator.live == 0
    tree.memory.close()


@by_name(CASES)
def test_each_piece_gets_the_largest_page_that_fits(case):
    tree = Tree(case)
    block, page = case.block, case.page
    start, end = block - 2 * page, 4 * block + page
    if end > 1 << case.address_bits:
        end = (1 << case.address_bits) - page
    tree.map(start, start + 16 * block, end - start)
    address = start
    while address < end:
        size = tree.read(address).size
        assert address % size == 0
        assert address + size <= end
        larger = [1 << n for n in range(size.bit_length(), 53) if case.sizes >> n & 1]
        assert not any(address % other == 0 and address + other <= end for other in larger[:1])
        address += size
    assert address == end
    tree.unmap(start)
    assert tree.valid() == 0


@by_name(CASES)
def test_every_size_that_the_driver_offers_is_one_leaf(case):
    for n in range(12, 53):
        size = case.sizes & 1 << n
        if not size or n >= case.address_bits or n >= case.fmt.output_bits:
            continue
        tree = Tree(case)
        assert tree.table.possible_sizes() & size
        tree.free(tree.table.map(size if n + 1 < case.address_bits else 0, size, size, 3, case.sizes))
        for address in (size, 2 * size - 1):
            answer = tree.read(address if n + 1 < case.address_bits else address - size)
            assert (answer.what, answer.pa, answer.size) == ("mapped", address, size)
        assert tree.valid() == 1 << (n - case.fmt.granule_lg2) % case.fmt.index_bits
        assert tree.table.unmap(size if n + 1 < case.address_bits else 0, size)[0] == size
        assert tree.valid() == 0
        tree.memory.close()


@by_name(CASES)
def test_the_highest_addresses_can_be_mapped(case):
    tree = Tree(case)
    last = (1 << case.address_bits) - case.page
    top = (1 << case.fmt.output_bits) - case.page
    tree.map(last, top, case.page)
    tree.check([last, last + case.page - 1, last - 1, 0])
    for iova, pa in ((last, 1 << case.fmt.output_bits), (1 << case.address_bits, 0)):
        if iova >> 64 == 0:
            with pytest.raises(KernelError) as caught:
                tree.table.map(iova, pa, case.page, 3, case.sizes)
            assert caught.value.errno in (errno.ERANGE, errno.EADDRINUSE)
    tree.unmap(last)
    tree.table.free()
    assert tree.allocator.live == 0


@by_name(CASES)
def test_running_out_of_pages_is_enomem_and_leaves_nothing_mapped(case):
    tree = Tree(case)
    tree.allocator._top = tree.allocator._next + 2 * case.fmt.table_bytes() * (tree.table.top_level + 1)
    length = min(1 << case.address_bits, 64 * case.block)
    with pytest.raises(KernelError) as caught:
        tree.table.map(0, case.page, length, 3, case.page)
    assert caught.value.errno == errno.ENOMEM
    assert tree.valid() == 0
    assert tree.table.iova_to_phys(0) is None
    tree.table.free()
    assert tree.allocator.live == 0


class Reported:
    """What read_and_clear_dirty reports, as bytes [start, end)."""

    def __init__(self):
        self.leaves = []

    def set_leaves(self, iova, shift, count, dirty):
        for n in range(count):
            if dirty >> n & 1:
                self.leaves.append((iova + (n << shift), 1 << shift))


@by_name(DIRTY)
@settings(max_examples=15, deadline=None)
@given(writes=st.lists(st.integers(0, 10_000), max_size=12), clear=st.booleans())
def test_dirty_leaves_are_those_that_were_written(case, writes, clear):
    tree = Tree(case)
    block, page = case.block, case.page
    start, length = block - 3 * page, 2 * block + 5 * page
    tree.map(start, start + 8 * block, length)
    tree.table.read_and_clear_dirty(start, length, True, None)  # Arm's leaves start dirty
    leaves, address = {}, start
    while address < start + length:
        leaves[address] = size = tree.read(address).size
        address += size
    written = set()
    update = updater(tree.memory)
    for n in writes:
        address = start + n * page % length + n % page
        found = walk(case.fmt, tree.load, tree.table.root, tree.table.top_level, address, 2, update)
        assert found.cacheable & 2
        written.add(next(at for at, size in leaves.items() if at <= address < at + size))
        reading = start + (n * 7) * page % length
        before = walk(case.fmt, tree.load, tree.table.root, tree.table.top_level, reading, 1, update)
        assert before.output == tree.read(reading).pa
    seen = Reported()
    flushed = tree.table.read_and_clear_dirty(start, length, clear, seen)
    assert sorted(seen.leaves) == sorted((at, leaves[at]) for at in written)
    if written:
        assert flushed == (min(written), max(at + leaves[at] for at in written) - 1)
    else:
        assert flushed is None
    again = Reported()
    tree.table.read_and_clear_dirty(start, length, False, again)
    assert sorted(again.leaves) == ([] if clear else sorted(seen.leaves))
    # A clean leaf may be read from a cache, not written.
    for at in leaves:
        found = walk(case.fmt, tree.load, tree.table.root, tree.table.top_level, at, 1, update)
        assert bool(found.cacheable & 2) is (at in written and not clear)
        assert found.rights & 3 == 3
    tree.unmap(start)
    assert tree.valid() == 0
    tree.memory.close()


@by_name(DIRTY)
def test_what_has_no_dirty_range_is_an_error(case):
    tree = Tree(case)
    for iova, length in ((0, 0), (1 << case.address_bits, case.page), ((1 << 64) - case.page, 2 * case.page)):
        with pytest.raises(KernelError) as caught:
            tree.table.read_and_clear_dirty(iova, length, True, None)
        assert caught.value.errno in (errno.EINVAL, errno.ERANGE, errno.EOVERFLOW)


@by_name([case for case in DIRTY if not case.arm])
def test_a_dirty_leaf_that_begins_before_the_range_is_reported_whole(case):
    tree = Tree(case)
    size = 1 << 16 if case.sizes & 1 << 16 else M2
    tree.map(size, size, size)
    walk(case.fmt, tree.load, tree.table.root, tree.table.top_level, size + size // 2, 2, updater(tree.memory))
    seen = Reported()
    assert tree.table.read_and_clear_dirty(2 * size - K4, K4, True, seen) == (size, 2 * size - 1)
    assert seen.leaves == [(size, size)]
    assert tree.table.read_and_clear_dirty(size, size, False, seen) is None
