"""Masks transformed as a whole do what a loop over their bits does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_model.bitmask import narrow, ones, positions, widen

masks = st.one_of(st.integers(0, 1 << 70), st.integers(0, 200).map(ones))
ratios = st.sampled_from([1, 2, 4, 8, 16, 64])


def bits(mask: int) -> set[int]:
    return {index for index in range(mask.bit_length()) if mask >> index & 1}


@settings(deadline=None)
@given(masks, ratios)
def test_widen_repeats_each_bit(mask: int, ratio: int) -> None:
    wide = widen(mask, ratio)
    assert bits(int.from_bytes(wide, "little")) == {bit * ratio + i for bit in bits(mask) for i in range(ratio)}
    assert len(wide) == (mask.bit_length() * ratio + 7) // 8


@settings(deadline=None)
@given(masks, ratios)
def test_narrow_asks_for_any_bit_of_each_group(mask: int, ratio: int) -> None:
    assert bits(narrow(mask, ratio)) == {bit // ratio for bit in bits(mask)}


@settings(deadline=None)
@given(masks, ratios)
def test_narrow_undoes_widen(mask: int, ratio: int) -> None:
    assert narrow(int.from_bytes(widen(mask, ratio), "little"), ratio) == mask


@settings(deadline=None)
@given(masks)
def test_positions_are_the_set_bits_ascending(mask: int) -> None:
    assert list(positions(mask)) == sorted(bits(mask))
