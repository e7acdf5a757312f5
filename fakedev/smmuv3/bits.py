"""Named bit fields of 64-bit words: how the manual's tables are written down once and used from both sides."""

from __future__ import annotations


class Field:
    """Bits [high:low] of a word, as the manual prints them. `get` takes the value out, `put` makes the word's part.

    ValueError where a value does not fit.
    """

    __slots__ = ("high", "low", "mask", "top")

    def __init__(self, high: int, low: int) -> None:
        self.high = high
        self.low = low
        self.top = (1 << high - low + 1) - 1
        #: The field's bits in place.
        self.mask = self.top << low

    def get(self, word: int) -> int:
        """The field's value in `word`."""
        return word >> self.low & self.top

    def put(self, value: int) -> int:
        """A word with `value` in the field and nothing else."""
        if not 0 <= value <= self.top:
            raise ValueError(f"{value:#x} does not fit into bits {self.high}:{self.low}")
        return value << self.low

    def set(self, word: int, value: int) -> int:
        """`word` with the field replaced."""
        return word & ~self.mask | self.put(value)

    def __repr__(self) -> str:
        return f"Field({self.high}, {self.low})"


def address_mask(high: int, low: int) -> int:
    """The bits [high:low] of an address that a word holds in place."""
    return Field(high, low).mask
