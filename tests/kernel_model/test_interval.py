"""kernel_model/interval.py against sets of integers in a small universe."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kernel_model.interval import U64_MAX, Holes, complement, merge, place

TOP = 40
spans = st.tuples(st.integers(0, TOP), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
ranges = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(lambda pair: (min(pair), max(pair)))


def points(intervals: list[tuple[int, int]]) -> set[int]:
    return {point for first, last in intervals for point in range(first, last + 1)}


def is_maximal(runs: list[tuple[int, int]]) -> bool:
    return all(before[1] + 1 < after[0] for before, after in itertools.pairwise(runs))


@given(st.lists(spans), ranges)
def test_complement_is_what_no_interval_covers(intervals: list[tuple[int, int]], within: tuple[int, int]) -> None:
    runs = list(complement(intervals, *within))
    assert points(runs) == set(range(within[0], within[1] + 1)) - points(intervals)
    assert is_maximal(runs)


@given(st.lists(spans), ranges)
def test_merge_is_what_the_intervals_cover(intervals: list[tuple[int, int]], within: tuple[int, int]) -> None:
    runs = list(merge(intervals, *within))
    assert points(runs) == points(intervals) & set(range(within[0], within[1] + 1))
    assert is_maximal(runs)


def test_complement_reaches_both_ends_of_the_space() -> None:
    assert list(complement([], 0, U64_MAX)) == [(0, U64_MAX)]
    assert list(complement([(0, U64_MAX)], 0, U64_MAX)) == []
    assert list(complement([(5, U64_MAX)], 0, U64_MAX)) == [(0, 4)]


@given(ranges, st.integers(1, 12), st.sampled_from([1, 2, 4, 8]), st.integers(0, 7))
def test_place_is_the_lowest_aligned_start_that_fits(
    within: tuple[int, int], length: int, alignment: int, offset: int
) -> None:
    offset %= alignment
    first, last = within
    # The offset is put in after the alignment, so a start just below a multiple is passed over.
    start = -(-first // alignment) * alignment + offset
    expected = start if start < last and start + length - 1 <= last else None
    assert place(first, last, length, alignment, offset) == expected


def test_place_gives_up_where_aligning_wraps() -> None:
    assert place(U64_MAX - 10, U64_MAX, 1, 4096, 0) is None


blocks = st.lists(st.tuples(st.integers(0, TOP), st.integers(1, 6), st.booleans()), max_size=40)


def taken(script: list[tuple[int, int, bool]]) -> tuple[Holes, dict[int, int]]:
    """Holes after a script of takes and gives, and the blocks that are there."""
    holes, there = Holes(), {}
    for start, length, give in script:
        if give and there:
            first = sorted(there)[start % len(there)]
            holes.give(first, there.pop(first))
        elif not points(list(there.items())) & set(range(start, start + length)):
            holes.take(start, start + length - 1)
            there[start] = start + length - 1
    return holes, there


@given(blocks, ranges, st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_find_is_the_first_hole_in_which_the_block_has_a_place(
    script: list[tuple[int, int, bool]], within: tuple[int, int], length: int, alignment: int, offset: int
) -> None:
    offset %= alignment
    holes, there = taken(script)
    places = [place(first, last, length, alignment, offset) for first, last in complement(there.items(), *within)]
    expected = next((start for start in places if start is not None), None)
    assert holes.find(*within, length, alignment, offset) == expected


@given(blocks)
def test_holes_are_whole_again_when_every_block_is_gone(script: list[tuple[int, int, bool]]) -> None:
    holes, there = taken(script)
    for first, last in there.items():
        holes.give(first, last)
    assert dict(holes._last) == {0: U64_MAX}
    assert [list(starts) for starts in holes._by_size.values() if starts] == [[0]]


def test_find_works_up_to_the_end_of_the_space() -> None:
    holes = Holes()
    holes.take(0, U64_MAX - 4096)
    assert holes.find(0, U64_MAX, 4096, 4096, 0) == U64_MAX - 4095
    assert holes.find(0, U64_MAX - 1, 4096, 4096, 0) is None
    holes.take(U64_MAX - 4095, U64_MAX)
    assert holes.find(0, U64_MAX, 1, 1, 0) is None
