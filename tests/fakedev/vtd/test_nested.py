"""Nested translation and the sizes of pages: section 3.8 of the manual; and what a person is told of a walk."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE
from fakedev.vtd import entries
from tests.fakedev.vtd.rig import FIRST, PAGE, PASID, SECOND

F, S, N, P = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED, entries.PGTT_PASS_THROUGH
GIB = 1 << 30
#: Second-stage tables for the gigabytes of tables and of the page.
OF_TABLES, OF_PAGE = SECOND[8:16], SECOND[16:24]


def nested(rig, first, second, fspm=0, aw=2):
    """IOVA 5 GiB lies at guest address 3 GiB, in a page of level `first`; that at 1 GiB, in one of level `second`."""
    made = rig()
    made.tables(N, fspm=fspm, aw=aw, second=SECOND[0])
    levels = aw + 2
    tables = [*SECOND[: levels - 2], *OF_TABLES]
    made.map_second(0, 0, level=2, levels=levels, tables=tables)
    tables = [*SECOND[: levels - 2], *OF_PAGE]
    if second == 2:
        made.map_second(3 * GIB, GIB, level=2, levels=levels, tables=tables)
    else:
        made._map(tables, 3 * GIB, GIB, 3, second, levels, 3)
    made.map_first(5 * GIB, 3 * GIB, level=first, levels=4 + fspm)
    made.start()
    return made


@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
@pytest.mark.parametrize(("fspm", "aw"), [(0, 1), (0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("second", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_nested_translation_is_as_wide_as_the_smaller_page(rig, first, second, fspm, aw, pasid):
    made = nested(rig, first, second, fspm, aw)
    size = 1 << 12 + 9 * min(first, second)
    made.memory.write(GIB + size - 4, b"last")
    assert made.dma.read(5 * GIB + size - 4, 4, pasid=pasid) == b"last"
    made.dma.write(5 * GIB, b"first", pasid=pasid)
    assert made.memory.read(GIB, 5) == b"first"
    run = made.unit.translate(made.dma, pasid, 5 * GIB, 4, READ)
    assert run[:3] == (5 * GIB, 5 * GIB + size, -4 * GIB)


def test_three_level_first_stages_do_not_exist_but_three_level_second_stages_do(rig):
    made = rig()
    made.tables(S, aw=1)
    made.map_second(0x3000, PAGE, levels=3)
    made.start()
    assert made.allowed(0x3000, WRITE)


def test_a_first_stage_of_a_guest_is_read_at_guest_addresses(rig):
    """The tables lie elsewhere than the guest thinks."""
    made = rig()
    shift = 0x20_0000
    made.tables(N, first=FIRST[0] + shift)
    made.map_guest()
    made.map_second(PAGE & 0x1FFFFF, PAGE)
    for n in range(512):
        made.word(SECOND[4] + 8 * n, n << 12 | 3)
    made.word(SECOND[2] + 8, SECOND[4] | 3)
    for n in range(3):
        made.word(FIRST[n], FIRST[n + 1] + shift | 7)
    made.word(FIRST[3] + 8 * 3, PAGE & 0x1FFFFF | 7)
    made.start()
    made.memory.write(PAGE, b"data")
    assert made.dma.read(0x3000, 4) == b"data"
    assert made.load(FIRST[3] + 8 * 3) & 0x20


def test_many_pages_of_one_request_are_cached_as_one_run(rig):
    made = rig()
    made.tables(S)
    for n in range(16):
        made.map_second(n << 12, PAGE + (n << 12))
    made.start()
    made.dma.write(0, bytes(16 << 12))
    assert len(made.unit.tlb) == 16
    assert made.unit.translate(made.dma, NO_PASID, 0, 4, READ)[1] == 16 << 12


def test_a_page_around_the_interrupt_range_keeps_what_is_outside(rig):
    made = rig()
    made.tables(S)
    made.map_second(0, 3 * GIB, level=2)
    made.start()
    assert made.unit.translate(made.dma, PASID, 0x1000, 4, READ)[:3] == (0x1000, 0x2000, 3 * GIB)
    assert made.reason(0x3EE0_0000, READ, PASID) == 0x87


@pytest.mark.parametrize(
    ("pgtt", "said"),
    [
        (F, ["first stage of 4 levels from 0x110000", "level 0 table 0x113000[3]"]),
        (S, ["second stage of 4 levels from 0x120000", "level 0 table 0x123000[3]"]),
        (N, ["first stage of 4 levels from 0x110000, second stage of 4 levels", "page of 0x1000 bytes at 0x400000"]),
        (P, ["pass-through"]),
    ],
)
def test_a_walk_is_told_stage_by_stage(rig, pgtt, said):
    made = rig()
    made.tables(pgtt)
    if pgtt == N:
        made.map_guest()
        made.map_second(0, PAGE)
    made.map_first(0x3000, 0)
    if pgtt == S:
        made.map_second(0x3000, 0)
    made.start()
    text = "\n".join(made.unit.explain(0x80, 0x3000, PASID))
    assert "context entry: PASID directory 0x103000, pasid 37" in text
    for part in said:
        assert part in text


def test_what_is_cached_and_not_in_memory_any_more_is_said(rig):
    made = rig()
    made.tables(S)
    made.map_second(0x3000, PAGE)
    made.start()
    made.allowed(0x3000, READ, PASID)
    made.entry(PASID, S, did=9)
    made.context(directory=0x109000)
    text = "\n".join(made.unit.explain(0x80, 0x3000, PASID))
    assert "the context cache still holds PASID directory 0x103000" in text
    assert "present bit in PASID-directory entry is clear" in text
