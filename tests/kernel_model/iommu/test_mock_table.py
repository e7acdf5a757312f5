"""The mock driver's table against a plain one: a dict with an entry for every 2 KiB."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_model.errors import KernelError
from kernel_model.iommu.mock.table import LeafTable, leaves

UNIT = 2048
SPACE = 96
SIZES = {"default": sum(1 << shift for shift in range(11, 37)), "huge": 1 << 20 | 1 << 12, "two": 1 << 11 | 1 << 14}


class Plain:
    """Every unit by itself: which leaf it belongs to, and where it leads."""

    def __init__(self, sizes: int) -> None:
        self.sizes = [1 << shift for shift in range(40) if sizes >> shift & 1]
        self.leaf: dict[int, tuple[int, int]] = {}
        self.pa: dict[int, int] = {}
        self.dirty: set[tuple[int, int]] = set()

    def map(self, iova: int, pa: int, length: int) -> bool:
        if any(where in self.leaf for where in range(iova, iova + length, UNIT)):
            return False
        while length:
            size = max(size for size in self.sizes if size <= length and iova % size == pa % size == 0)
            for offset in range(0, size, UNIT):
                self.leaf[iova + offset] = iova, size
                self.pa[iova + offset] = pa + offset
            iova, pa, length = iova + size, pa + size, length - size
        return True

    def unmap(self, iova: int, length: int) -> int:
        position = iova
        while position < iova + length:
            start, size = self.leaf.get(position, (-1, 0))
            if start != position:
                break
            for offset in range(0, size, UNIT):
                del self.leaf[position + offset], self.pa[position + offset]
            self.dirty.discard((start, size))
            position += size
        return position - iova

    def write(self, address: int) -> None:
        if (found := self.leaf.get(address // UNIT * UNIT)) is not None:
            self.dirty.add(found)

    def read(self, iova: int, length: int, clear: bool) -> set[tuple[int, int]]:
        seen = {(start, size) for start, size in self.dirty if start < iova + length and start + size > iova}
        if clear:
            self.dirty -= seen
        return seen


class Collected:
    """In place of a bitmap: the leaves that were reported."""

    def __init__(self) -> None:
        self.leaves: list[tuple[int, int]] = []

    def set_leaves(self, iova: int, shift: int, count: int, dirty: int) -> None:
        assert 0 < dirty < 1 << count
        self.leaves += [(iova + (i << shift), 1 << shift) for i in range(count) if dirty >> i & 1]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("seed", range(40))
def test_table_does_what_a_plain_one_does(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(f"{kind} {seed}")
    monkeypatch.setattr("kernel_model.iommu.mock.table._ROW", chance.choice([1, 4, 1024]))
    smallest = SIZES[kind] & -SIZES[kind]
    # For the large leaves of "huge" the space is the same number of larger units.
    scale = chance.choice([smallest, 64 << 10]) if kind == "huge" else smallest
    table, plain = LeafTable(), Plain(SIZES[kind])

    def place() -> tuple[int, int]:
        start = chance.randrange(SPACE)
        return start * scale, chance.randint(1, min(SPACE - start, 40)) * scale

    for _ in range(80):
        iova, length = place()
        what = chance.random()
        if what < 0.4:
            pa = iova if chance.random() < 0.5 else chance.randrange(SPACE) * scale
            try:
                table.install(iova, length, leaves(SIZES[kind], iova, pa, length))
            except KernelError:  # EADDRINUSE
                assert not plain.map(iova, pa, length)
            else:
                assert plain.map(iova, pa, length)
        elif what < 0.55:
            assert table.remove(iova, length) == plain.unmap(iova, length)
        elif what < 0.8:
            page = chance.choice([scale, scale // 2, 2 * scale, 3 * scale, scale * 16, 5000])
            bits = chance.getrandbits(max(length // page, 1))
            table.set_dirty(iova, page, bits)
            for index in range(bits.bit_length()):
                if bits >> index & 1:
                    plain.write(iova + index * page)
        else:
            clear, found = chance.random() < 0.6, Collected()
            table.read_dirty(iova, length, clear, found)  # type: ignore[arg-type]
            assert found.leaves == sorted(plain.read(iova, length, clear))
        assert bool(table) == bool(plain.leaf)
        probe = chance.randrange(SPACE * scale)
        base = plain.pa.get(probe // UNIT * UNIT)
        assert table.physical(probe) == (None if base is None else base + probe % UNIT)


@given(st.integers(0, 1 << 12), st.integers(0, 1 << 12), st.integers(1, 1 << 12), st.sampled_from(sorted(SIZES)))
@settings(max_examples=300, deadline=None)
def test_leaves_are_the_largest_that_fit(iova: int, pa: int, length: int, kind: str) -> None:
    smallest = SIZES[kind] & -SIZES[kind]
    plain = Plain(SIZES[kind])
    made = list(leaves(SIZES[kind], iova * smallest, pa * smallest, length * smallest))
    assert plain.map(iova * smallest, pa * smallest, length * smallest)
    flat = [(run.iova + (i << run.shift), 1 << run.shift) for run in made for i in range(run.count)]
    assert flat == sorted(set(plain.leaf.values()))
    for run in made:
        assert plain.pa[run.iova] == run.pa


@pytest.mark.parametrize(("iova", "pa", "length"), [(1, 0, 2048), (0, 1024, 2048), (0, 0, 2049)])
def test_what_is_off_the_smallest_page_is_enxio(iova: int, pa: int, length: int) -> None:
    with pytest.raises(KernelError) as caught:
        list(leaves(SIZES["default"], iova, pa, length))
    assert caught.value.errno == errno.ENXIO


def test_a_gibibyte_of_small_leaves_is_one_row() -> None:
    table = LeafTable()
    table.install(0, 1 << 30, leaves(4096, 0, 0, 1 << 30))
    assert len(table._runs) == 1
    assert table.remove(4096, 1 << 29) == 1 << 29
    assert [(run.iova, run.count) for run in table._runs.values()] == [(0, 1), ((1 << 29) + 4096, (1 << 17) - 1)]
