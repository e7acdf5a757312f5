"""The translation cache: tags, runs, large pages, and invalidation of exactly what is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakedev.tlb import Tlb

PAGE = 4096


def page_run(first, count, delta=0x1000000, allowed=3):
    return first * PAGE, (first + count) * PAGE, delta, allowed


def test_a_run_is_found_by_any_of_its_pages_and_counts_each():
    tlb = Tlb()
    run = page_run(16, 4)
    tlb.insert(1, run, 12)
    assert [tlb.lookup(1, (16 + n) * PAGE + 5) for n in range(4)] == [run] * 4
    assert tlb.lookup(1, 15 * PAGE) is None
    assert tlb.lookup(1, 20 * PAGE) is None
    assert tlb.lookup(2, 16 * PAGE) is None
    assert (len(tlb), tlb.count(1), tlb.count(2)) == (4, 4, 0)


def test_invalidating_a_page_inside_a_run_keeps_its_neighbours_and_no_run_reaches_over_it():
    tlb = Tlb()
    tlb.insert(1, page_run(0, 8), 12)
    tlb.clear_range(1, 3 * PAGE, PAGE)
    assert tlb.lookup(1, 3 * PAGE) is None
    assert tlb.lookup(1, 2 * PAGE) == page_run(0, 3)
    assert tlb.lookup(1, 7 * PAGE) == page_run(4, 4)


def test_invalidating_any_part_of_a_large_page_drops_it():
    for lg2 in (21, 30):
        tlb = Tlb()
        tlb.insert(1, (1 << lg2, 2 << lg2, 0, 3), lg2)
        tlb.clear_range(1, (1 << lg2) - PAGE, PAGE)
        assert tlb.lookup(1, (1 << lg2) + 77)
        tlb.clear_range(1, (2 << lg2) - PAGE, PAGE)
        assert tlb.lookup(1, (1 << lg2) + 77) is None


def test_a_tag_is_cleared_alone():
    tlb = Tlb()
    tlb.insert(1, page_run(0, 1), 12)
    tlb.insert(2, page_run(0, 1), 12)
    tlb.clear_tag(1)
    assert (tlb.lookup(1, 0), tlb.lookup(2, 0)) == (None, page_run(0, 1))
    tlb.clear()
    assert len(tlb) == 0


def test_runs_that_continue_each_other_are_joined_up_to_the_request():
    tlb = Tlb()
    for n in range(6):
        tlb.insert(1, page_run(n, 1), 12)
    tlb.insert(1, page_run(6, 1, delta=0), 12)
    first = tlb.lookup(1, 0)
    assert tlb.extend(1, first, 3 * PAGE) == page_run(0, 3)
    assert tlb.extend(1, tlb.lookup(1, 0), 100 * PAGE) == page_run(0, 6)
    assert tlb.lookup(1, 5 * PAGE) == page_run(0, 6)


def test_a_full_cache_empties_itself():
    tlb = Tlb(capacity=4)
    for n in range(5):
        tlb.insert(1, page_run(n, 1), 12)
    assert len(tlb) == 0


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8),
    st.lists(st.tuples(st.integers(0, 52), st.integers(0, 4)), max_size=8),
)
def test_pages_named_are_gone_and_all_others_stay(runs, cleared):
    tlb = Tlb()
    expected = {}
    for first, count in runs:
        if first in expected:
            continue  # only what misses is inserted
        start, stop, _, _ = tlb.insert(1, page_run(first, count), 12)
        expected.update(dict.fromkeys(range(start // PAGE, stop // PAGE)))
    for first, order in cleared:
        base = first >> order << order
        tlb.clear_range(1, base * PAGE, PAGE << order)
        for page in range(base, base + (1 << order)):
            expected.pop(page, None)
    found = {page for page in range(64) if tlb.lookup(1, page * PAGE)}
    assert tlb.slots == len(tlb) == len(found)
    assert found == set(expected)
    for page in found:
        start, stop, _, _ = tlb.lookup(1, page * PAGE)
        assert all(n in found for n in range(start // PAGE, stop // PAGE))


@pytest.mark.parametrize("lg2", [14, 16, 21, 25, 29, 30, 39])
def test_entries_have_any_page_size(lg2):
    tlb = Tlb()
    start = 3 << lg2
    run = (start, start + (1 << lg2), -start, 3)
    tlb.insert(1, run, lg2)
    assert tlb.lookup(1, start + (1 << lg2) - 1) == run
    assert tlb.lookup(1, start - 1) is None
    tlb.clear_range(1, start - 4096, 4096)
    assert len(tlb) == 1
    tlb.clear_range(1, start + (1 << lg2) - 4096, 4096)
    assert (len(tlb), tlb.slots) == (0, 0)


def test_runs_are_the_entries_that_reach_into_a_range():
    tlb = Tlb()
    pages = (0x1000, 0x4000, 0, 3)
    large = (0x20_0000, 0x40_0000, 0, 3)
    tlb.insert(7, pages, 12)
    tlb.insert(7, large, 21)
    tlb.insert(8, (0x1000, 0x2000, 0, 3), 12)
    assert tlb.tags() == [7, 8]
    assert tlb.runs(7, 0, 1 << 64) == [pages, large]
    assert tlb.runs(7, 0x3FFF, 1) == [pages]
    assert tlb.runs(7, 0x4000, 0x1F_C000) == []
    assert tlb.runs(9, 0, 1 << 64) == []
