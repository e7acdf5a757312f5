"""Bit masks in Python ints, transformed as a whole: bit i of a mask stands for the i-th of many equal things.

A loop over a million bits takes a second; the same by text and bytes operations takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator


def ones(count: int) -> int:
    """A mask of `count` set bits."""
    return (1 << count) - 1


def widen(mask: int, ratio: int) -> bytes:
    """Each bit becomes `ratio` equal ones, a power of two; as bytes, the lowest first and the highest set bit last."""
    if ratio < 8:
        if ratio > 1 and mask:
            text = f"{mask:b}".encode()
            mask = int(text.replace(b"0", b"0" * ratio).replace(b"1", b"1" * ratio), 2)
        return mask.to_bytes((mask.bit_length() + 7) >> 3, "little")
    size = ratio >> 3
    if mask & (mask + 1) == 0:
        return b"\xff" * (mask.bit_length() * size)
    text = f"{mask:b}"[::-1].encode()
    return text.replace(b"0", b"\0" * size).replace(b"1", b"\xff" * size)


def narrow(mask: int, ratio: int) -> int:
    """Each group of `ratio` bits, a power of two, becomes one: whether any of them is set."""
    if ratio == 1 or not mask:
        return mask
    step = 1
    while step < ratio:
        mask |= mask >> step
        step *= 2
    return int(f"{mask:b}"[::-ratio][::-1], 2)


def positions(mask: int) -> Iterator[int]:
    """The set bits, ascending."""
    text = f"{mask:b}"[::-1]
    index = text.find("1")
    while index >= 0:
        yield index
        index = text.find("1", index + 1)
