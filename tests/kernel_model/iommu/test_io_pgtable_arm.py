"""What io-pgtable-arm.c does otherwise than generic_pt, and the formats that it chooses."""

import errno

import pgtable_oracle as oracle
import pytest

from fakedev.memory import PhysicalMemory
from kernel_model.errors import KernelError
from kernel_model.iommu.io_pgtable_arm import (
    ArmPageTable,
    restrict_pgsizes,
    stage1_format,
    stage2_format,
    stage2_sl0,
)
from kernel_model.page_alloc import PageAllocator

K4, K16, K64, M2, M32, M512, G1 = 1 << 12, 1 << 14, 1 << 16, 1 << 21, 1 << 25, 1 << 29, 1 << 30
SIZES = K4 | M2 | G1
ALL = SIZES | K16 | M32 | K64 | M512 | 1 << 42
PRIVILEGED, CACHE, NOEXEC, MMIO = 32, 4, 8, 16


class Tree:
    def __init__(self, fmt=None):
        self.memory = PhysicalMemory(64 << 20)
        self.pages = PageAllocator(self.memory)
        self.table = ArmPageTable(fmt or stage1_format(SIZES, 48, 48), self.memory, self.pages)

    def map(self, iova, pa, length, prot=3):
        for table in self.table.map(iova, pa, length, prot, SIZES):
            self.pages.free(table)

    def unmap(self, iova, length):
        unmapped, freed = self.table.unmap(iova, length)
        for table in freed:
            self.pages.free(table)
        return unmapped

    def word(self, iova):
        """The leaf's word, and its level by the manual."""
        table = self.table.root
        for level in range(4):
            word = int.from_bytes(self.memory.read(table + (iova >> 39 - 9 * level) % 512 * 8, 8), "little")
            if level == 3 or word & 3 != 3:
                return word, level
            table = word & 0xFFFFFFFFF000
        raise AssertionError

    def size(self, iova):
        config = {"granule": 4, "txsz": 16, "oas": 48}
        answer = oracle.arm_stage1(lambda pa: self.memory.words[pa >> 3], self.table.root, iova, config)
        return answer.size


@pytest.mark.parametrize(
    ("prot", "word"),
    [
        (3, 0x4000_5E43),  # valid, page, AP[1], outer shareable, AF, nG
        (1, 0x4000_5EC3),
        (2, 0x4000_5E43),
        (3 | CACHE, 0x4000_5F47),
        (3 | MMIO, 0x4000_5E4B),
        (3 | CACHE | MMIO, 0x4000_5F4B),
        (3 | PRIVILEGED, 0x4000_5E03),
        (3 | NOEXEC, 0x0060_0000_4000_5E43),
    ],
)
def test_the_words_of_stage_1_are_the_kernels(prot, word):
    tree = Tree()
    tree.map(K4, 0x4000_5000, K4, prot)
    assert tree.word(K4) == (word, 3)
    root = int.from_bytes(tree.memory.read(tree.table.root, 8), "little")
    assert root & 0xFFF == 3


@pytest.mark.parametrize(
    ("prot", "fwb", "word"),
    [
        (3, False, 0x4000_56D7),
        (1, False, 0x4000_5657),
        (2, False, 0x4000_5697),
        (3 | CACHE, False, 0x4000_57FF),
        (3 | CACHE, True, 0x4000_57DB),
        (3 | MMIO, False, 0x4000_56C7),
    ],
)
def test_the_words_of_stage_2_are_the_kernels(prot, fwb, word):
    tree = Tree(stage2_format(SIZES, 48, 48, fwb=fwb))
    tree.map(K4, 0x4000_5000, K4, prot)
    assert tree.word(K4) == (word, 3)


def test_dirty_tracking_starts_dirty():
    tree = Tree(stage1_format(SIZES, 48, 48, dirty_tracking=True))
    tree.map(0, 0x4000_5000, K4)
    tree.map(K4, 0x4000_5000, K4, 1)
    assert tree.word(0) == (0x0008_0000_4000_5E43, 3)
    assert tree.word(K4) == (0x4000_5EC3, 3)
    tree.table.read_and_clear_dirty(0, 2 * K4, True, None)
    assert tree.word(0) == (0x0008_0000_4000_5EC3, 3)
    assert tree.word(K4) == (0x4000_5EC3, 3)


def test_a_block_is_not_a_page():
    tree = Tree()
    tree.map(M2, 0x4000_0000, M2)
    assert tree.word(M2) == (0x4000_0E41, 2)


def test_high_addresses_lie_in_low_bits_with_64k():
    tree = Tree(stage1_format(K64 | M512, 48, 52))
    tree.table.map(0, 0xA_5678_0000_0000 + K64, K64, 3, K64)
    words = [tree.memory.words[tree.table.tables()[-1] >> 3]]
    assert words == [0x5678_0001_AE43]
    assert tree.table.iova_to_phys(5) == 0xA_5678_0001_0005


def test_mapping_over_a_leaf_is_eexist():
    tree = Tree()
    tree.map(8 * K4, 0, K4)
    tree.map(M2, M2, M2)
    for iova, length in ((8 * K4, K4), (0, 16 * K4), (M2, M2), (M2 + K4, K4)):
        with pytest.raises(KernelError) as caught:
            tree.map(iova, iova, length)
        assert caught.value.errno == errno.EEXIST
    assert tree.word(0)[0] == 0
    assert tree.size(M2) == M2
    assert tree.size(8 * K4) == K4


def test_a_block_over_a_table_replaces_it_with_all_that_it_maps():
    tree = Tree()
    tree.map(M2 + 3 * K4, 0, K4)
    live = tree.pages.live
    tree.map(M2, M2, M2)
    assert tree.size(M2 + 3 * K4) == M2
    assert tree.pages.live == live - 1
    tree.map(G1 + K4, 0, 3 * M2)
    tree.map(G1, G1, G1)
    assert tree.size(G1) == G1
    assert tree.pages.live == len(tree.table.tables()) == 3


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ((1, 0, K4), errno.EINVAL),
        ((0, 2048, K4), errno.EINVAL),
        ((0, 0, K4 + 8), errno.EINVAL),
        ((0, 0, K4, 0), errno.EINVAL),
        ((1 << 48, 0, K4), errno.ERANGE),
        ((0, 1 << 48, K4), errno.ERANGE),
        (((1 << 48) - K4, 0, 2 * K4), errno.ERANGE),
    ],
)
def test_what_cannot_be_mapped(arguments, number):
    tree = Tree()
    with pytest.raises(KernelError) as caught:
        tree.map(*arguments)
    assert caught.value.errno == number
    assert tree.word(arguments[0])[0] == 0 or arguments[0] >> 48
    assert tree.table.iova_to_phys((1 << 48) - K4) is None


def test_nothing_is_mapped_by_no_length():
    tree = Tree()
    tree.map(0, 0, 0)
    assert tree.pages.live == 1


def test_a_block_sized_piece_unmaps_a_table_with_its_holes():
    tree = Tree()
    tree.map(M2 + K4, K4, K4)
    assert tree.pages.live == 4
    assert tree.unmap(M2, M2) == M2
    assert tree.pages.live == 3
    tree.map(M2 + K4, K4, K4)
    tree.map(G1 - K4, K4, K4)
    assert tree.unmap(0, G1) == G1
    assert tree.pages.live == 2


def test_pages_that_are_unmapped_one_by_one_leave_their_table():
    tree = Tree()
    tree.map(M2, K4, M2)
    live = tree.pages.live
    assert tree.unmap(M2, M2 - K4) == M2 - K4
    assert tree.unmap(2 * M2 - K4, K4) == K4
    assert tree.pages.live == live
    tree.table.free()
    assert tree.pages.live == 0


def test_unmap_stops_at_a_hole():
    tree = Tree()
    tree.map(0, 0, 2 * K4)
    tree.map(3 * K4, 3 * K4, K4)
    assert tree.unmap(0, 4 * K4) == 2 * K4
    assert tree.unmap(0, 4 * K4) == 0
    assert tree.size(3 * K4) == K4


@pytest.mark.parametrize(("iova", "length"), [(M2, K4), (M2 + K4, K4), (M2 + M2 // 2, M2 // 2)])
def test_part_of_a_block_cannot_be_unmapped(iova, length):
    tree = Tree()
    tree.map(M2, M2, M2)
    assert tree.unmap(iova, length) == 0
    assert tree.size(M2) == M2


def test_unmap_off_the_page_or_outside_is_nothing():
    tree = Tree()
    tree.map(0, 0, K4)
    assert tree.unmap(0, 100) == tree.unmap(8, K4) == tree.unmap(1 << 48, K4) == tree.unmap(0, 0) == 0
    assert tree.unmap((1 << 48) - K4, K4) == 0


def test_a_hole_in_a_dirty_range_is_einval():
    tree = Tree(stage1_format(SIZES, 48, 48, dirty_tracking=True))
    tree.map(0, 0, 2 * K4)
    for iova, length in ((0, 3 * K4), (M2, K4), (0, 0), (0, 1 << 49)):
        with pytest.raises(KernelError) as caught:
            tree.table.read_and_clear_dirty(iova, length, False, None)
        assert caught.value.errno == errno.EINVAL
    assert tree.table.read_and_clear_dirty(0, 2 * K4, False, None) == (0, 2 * K4 - 1)


def test_stage_2_has_no_dirty_bits_for_linux():
    tree = Tree(stage2_format(SIZES, 48, 48))
    tree.map(0, 0, K4)
    with pytest.raises(KernelError) as caught:
        tree.table.read_and_clear_dirty(0, K4, False, None)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("offered", "oas", "used"),
    [
        (ALL, 48, SIZES),
        (K16 | M32 | K64 | M512, 48, K16 | M32),
        (K64 | M512 | 1 << 42, 48, K64 | M512),
        (K64 | M512 | 1 << 42, 52, K64 | M512 | 1 << 42),
        (M2, 48, 0),
    ],
)
def test_the_granule_is_4k_where_there_is_a_choice(offered, oas, used):
    assert restrict_pgsizes(offered, oas) == used


@pytest.mark.parametrize("make", [stage1_format, stage2_format])
def test_no_granule_is_einval(make):
    with pytest.raises(KernelError) as caught:
        make(M2, 48, 48)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("sizes", "ias", "oas", "sl0", "root"),
    [
        (SIZES, 48, 48, 2, K4),
        (SIZES, 44, 44, 2, 32 * 8),
        (SIZES, 42, 42, 1, 8 * K4),
        (SIZES, 40, 40, 1, 2 * K4),
        (SIZES, 39, 40, 1, K4),
        (K16 | M32, 48, 48, 2, 2 * K16),
        (K16 | M32, 40, 40, 1, 16 * K16),
        (K16 | M32, 47, 44, 2, K16),
        (K64 | M512, 48, 48, 2, 64 * 8),
        (K64 | M512, 52, 52, 2, 1024 * 8),
    ],
)
def test_the_root_of_stage_2_is_concatenated_only_where_it_must_be(sizes, ias, oas, sl0, root):
    fmt = stage2_format(sizes, ias, oas)
    assert stage2_sl0(fmt) == sl0
    assert 8 << fmt.root_index_bits == root
    tree = Tree(fmt)
    assert tree.pages.live == max(root // K4, 1)
    assert tree.table.root % max(root, K4) == 0
