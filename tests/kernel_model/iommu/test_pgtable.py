"""Map and unmap over a real format, against leaves kept by plain arithmetic and a walk written from the manual."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakedev.memory import PhysicalMemory
from fakedev.pgtable.vtd_ss import VtdSecondStage
from kernel_model.errors import KernelError
from kernel_model.iommu.pgtable import PageTable
from kernel_model.page_alloc import PageAllocator

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
ALL = K4 | M2 | G1


class Tree:
    def __init__(self, top_level=3, address_bits=48):
        self.memory = PhysicalMemory(64 << 20)
        self.pages = PageAllocator(self.memory)
        self.table = PageTable(VtdSecondStage(), self.memory, self.pages, top_level, address_bits)

    def map(self, iova, pa, length, prot=3, sizes=ALL):
        for table in self.table.map(iova, pa, length, prot, sizes):
            self.pages.free(table)

    def unmap(self, iova, length):
        unmapped, freed = self.table.unmap(iova, length)
        for table in freed:
            self.pages.free(table)
        return unmapped


def walk(tree, levels, iova):
    """The manual's walk (3.7), step by step: (base, size, R | W) of the leaf, or None."""
    table, allowed = tree.table.root, 3
    for remaining in range(levels, 0, -1):
        shift = 12 + 9 * (remaining - 1)
        entry = int.from_bytes(tree.memory.read(table + (iova >> shift) % 512 * 8, 8), "little")
        if entry & 3 == 0:
            return None
        allowed &= entry & 3
        if remaining == 1 or entry >> 7 & 1:
            return entry & 0xFFFFFFFFFF000, 1 << shift, allowed
        table = entry & 0xFFFFFFFFFF000
    return None


class Oracle:
    """Leaves by start: (size, pa, prot)."""

    def __init__(self):
        self.leaves = {}

    def hit(self, address):
        for size in (K4, M2, G1):
            start = address // size * size
            if start in self.leaves and self.leaves[start][0] == size:
                return start
        return None

    def taken(self, start, end):
        return any(s < end and start < s + size for s, (size, _, _) in self.leaves.items())

    def map(self, iova, pa, length, prot, sizes):
        if self.taken(iova, iova + length):
            return False
        while length:
            size = max(s for s in (K4, M2, G1) if s & sizes and (iova | pa) % s == 0 and s <= length)
            self.leaves[iova] = (size, pa, prot)
            iova, pa, length = iova + size, pa + size, length - size
        return True

    def unmap(self, iova, length):
        done = 0
        while done < length and iova + done in self.leaves:
            done += self.leaves.pop(iova + done)[0]
        return done


BASES = [0, K4, M2 - 3 * K4, M2, 2 * M2, G1 - M2, G1, 2 * G1 - K4, 3 * G1, (1 << 39) - M2, 1 << 39]
LENGTHS = [K4, 2 * K4, 5 * K4, M2 - K4, M2, M2 + K4, 3 * M2, 3 * M2 + 5 * K4]
address = st.builds(lambda base, pages: base + pages * K4, st.sampled_from(BASES), st.integers(0, 4))
maps = st.tuples(
    st.just("map"),
    address,
    st.sampled_from(LENGTHS),
    st.sampled_from([0, M2, 7 * K4, G1 + 3 * M2, (1 << 47) + K4]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([ALL, K4, K4 | M2]),
)
big = st.tuples(
    st.just("map"),
    st.sampled_from([0, G1 - M2, 4 * G1 - M2 - K4]),
    st.sampled_from([G1, 2 * G1 + M2]),
    st.sampled_from([0, 4 * G1]),
    st.just(3),
    st.just(ALL),
)
unmaps = st.tuples(st.just("unmap"), address, st.sampled_from([*LENGTHS, G1, 1 << 40]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(maps, maps, unmaps, big), max_size=12))
def test_map_and_unmap_agree_with_a_list_of_leaves(operations):
    tree, oracle = Tree(), Oracle()
    for operation in operations:
        if operation[0] == "map":
            _, iova, length, shift, prot, sizes = operation
            pa = iova % G1 + shift
            expected = oracle.map(iova, pa, length, prot, sizes)
            if expected:
                tree.map(iova, pa, length, prot, sizes)
            else:
                with pytest.raises(KernelError) as caught:
                    tree.map(iova, pa, length, prot, sizes)
                assert caught.value.errno == errno.EADDRINUSE
        else:
            _, iova, length = operation
            assert tree.unmap(iova, length) == oracle.unmap(iova, length)
    probes = set()
    for start, (size, pa, prot) in oracle.leaves.items():
        assert walk(tree, 4, start) == (pa, size, prot)
        assert tree.table.iova_to_phys(start + size - 1) == pa + size - 1
        probes |= {start - 1, start + size}
    for probe in probes | set(BASES):
        if probe >= 0 and oracle.hit(probe) is None:
            assert walk(tree, 4, probe) is None
            assert tree.table.iova_to_phys(probe) is None
    assert len(tree.table.tables()) == tree.pages.live
    tree.table.free()
    assert tree.pages.live == 0
    tree.memory.close()


def leaf_sizes(tree, iova, length):
    found, end = [], iova + length
    while iova < end:
        _, size, _ = walk(tree, 4, iova)
        found.append(size)
        iova += size
    return found


def test_each_piece_gets_the_largest_page_that_fits():
    tree = Tree()
    tree.map(M2 - K4, 5 * G1 + M2 - K4, K4 + G1 - M2 + G1 + M2 + K4)
    assert leaf_sizes(tree, M2 - K4, 2 * G1 + 2 * K4) == [K4, *[M2] * 511, G1, M2, K4]


def test_a_physical_address_off_the_large_page_keeps_pages_small():
    tree = Tree()
    tree.map(M2, M2 + K4, M2)
    assert set(leaf_sizes(tree, M2, M2)) == {K4}


def test_page_sizes_are_those_of_the_domain():
    tree = Tree()
    tree.map(0, 0, M2, sizes=K4)
    assert set(leaf_sizes(tree, 0, M2)) == {K4}


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ((0, 0, 0), errno.EINVAL),
        ((0, 0, K4, 0), errno.EINVAL),
        ((0, 0, K4, 4), errno.EINVAL),
        (((1 << 64) - K4, 0, 2 * K4), errno.EOVERFLOW),
        (((1 << 48) - K4, 0, 2 * K4), errno.ERANGE),
        ((1 << 48, 0, K4), errno.ERANGE),
        ((0, 1 << 52, K4), errno.ERANGE),
        ((1, 0, K4), errno.ENXIO),
        ((0, 2048, K4), errno.ENXIO),
        ((2048, 2048, 2 * K4), errno.ENXIO),
    ],
)
def test_what_cannot_be_mapped(arguments, number):
    tree = Tree()
    with pytest.raises(KernelError) as caught:
        tree.map(*arguments)
    assert caught.value.errno == number
    assert tree.pages.live == 1


def test_mapping_over_a_leaf_is_eaddrinuse_and_leaves_the_rest_unmapped():
    tree = Tree()
    tree.map(8 * K4, 0, K4)
    tree.map(M2, M2, M2)
    for iova, length in ((0, 16 * K4), (8 * K4, K4), (M2, M2), (M2 + K4, K4), (0, G1)):
        with pytest.raises(KernelError) as caught:
            tree.map(iova, iova, length)
        assert caught.value.errno == errno.EADDRINUSE
    assert walk(tree, 4, 0) is None
    assert walk(tree, 4, 8 * K4) == (0, K4, 3)
    assert walk(tree, 4, M2) == (M2, M2, 3)


def test_an_empty_table_gives_way_to_a_large_page():
    tree = Tree()
    tree.map(M2, 0, K4)
    assert tree.unmap(M2, K4) == K4
    live = tree.pages.live
    tree.map(M2, M2, M2)
    assert tree.pages.live == live - 1
    assert walk(tree, 4, M2) == (M2, M2, 3)


def test_unmap_stops_at_a_hole():
    tree = Tree()
    tree.map(0, 0, 2 * K4)
    tree.map(3 * K4, 3 * K4, K4)
    assert tree.unmap(0, 4 * K4) == 2 * K4
    assert walk(tree, 4, 3 * K4)
    assert tree.unmap(0, 4 * K4) == 0


def test_unmap_from_inside_a_large_page_unmaps_nothing():
    tree = Tree()
    tree.map(M2, M2, M2)
    assert tree.unmap(M2 + K4, K4) == 0


def test_unmap_of_the_start_of_a_large_page_takes_it_whole():
    tree = Tree()
    tree.map(M2, M2, M2)
    assert tree.unmap(M2, K4) == M2
    assert walk(tree, 4, M2) is None


def test_a_table_is_freed_when_one_unmap_covers_all_it_spans():
    tree = Tree()
    tree.map(M2, K4, M2)
    assert tree.pages.live == 4
    assert tree.unmap(M2, M2) == M2
    assert tree.pages.live == 3
    tree.map(M2, K4, M2)
    assert tree.unmap(M2, M2 - K4) == M2 - K4
    assert tree.unmap(2 * M2 - K4, K4) == K4
    assert tree.pages.live == 4


def test_a_page_can_be_mapped_again_after_its_table_was_freed():
    tree = Tree()
    tree.map(M2 + K4, 0, K4)
    tree.map(M2, K4, K4)
    tree.map(M2 + 2 * K4, K4, M2 - 2 * K4)
    assert tree.unmap(M2, M2) == M2
    tree.map(M2 + K4, 7 * K4, K4)
    assert walk(tree, 4, M2 + K4) == (7 * K4, K4, 3)
    assert tree.unmap(M2 + K4, K4) == K4


@pytest.mark.parametrize(("top_level", "bits"), [(2, 39), (4, 57)])
def test_other_depths(top_level, bits):
    tree = Tree(top_level, bits)
    last = (1 << bits) - K4
    tree.map(last, 0x5000, K4)
    assert walk(tree, top_level + 1, last) == (0x5000, K4, 3)
    assert tree.pages.live == top_level + 1
    assert tree.unmap(last, K4) == K4


def test_running_out_of_pages_is_enomem_and_leaves_nothing_mapped():
    tree = Tree()
    tree.pages._top = tree.pages._next + 4 * K4
    with pytest.raises(KernelError) as caught:
        tree.map(0, K4, 8 * M2)
    assert caught.value.errno == errno.ENOMEM
    assert tree.table.iova_to_phys(0) is None
