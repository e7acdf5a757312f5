"""One pair of hands for every IOMMU that can be judged: QEMU's through qtest, ours through a `Machine`.

A *case* is data: a list of steps, each a list whose first member is one of

    ["w", pa, value]              store a 64-bit word
    ["d", rid, iova, pa ...]      a device writes 4 bytes; the pas are where they may turn up
    ["i", word ...]               commands or descriptors to the unit, and wait until they are done
    ["l", pa]                     load a 64-bit word

`play` does the steps on a rig and gives an answer for each "d" and "l": for a load the word; for DMA a list of the pa
that the data turned up at (BLOCKED, or ELSEWHERE for none of those named) and the words of the fault or event records
that it left. Afterwards every word is 0 again and nothing is cached, so cases do not depend on each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeAlias

Case: TypeAlias = list[list]
BLOCKED, ELSEWHERE = -1, -2
#: What iommu-testdev writes.
PATTERN = 0x12345678


class Rig(ABC):
    """Memory, a unit that translates, and devices. What gives an answer may be late: `settle` has all of them."""

    @abstractmethod
    def word(self, pa: int, value: int) -> None:
        """Store a 64-bit word."""

    @abstractmethod
    def look(self, pa: int) -> None:
        """Load a 64-bit word. Answers."""

    @abstractmethod
    def dma(self, rid: int, iova: int, where: list[int]) -> None:
        """Let a device write PATTERN; then the words at `where` are 0 again and the records are clear. Answers."""

    @abstractmethod
    def invalidate(self, words: Iterable[int]) -> None:
        """Give the unit commands."""

    @abstractmethod
    def invalidate_all(self) -> None:
        """Nothing is cached afterwards."""

    @abstractmethod
    def settle(self) -> list:
        """The answers since the last time."""


def play(rig: Rig, case: Case) -> None:
    """Do the steps of a case. The answers are to be had from `rig.settle`, `count(case)` of them."""
    touched = {}
    for kind, *rest in case:
        if kind == "w":
            rig.word(*rest)
            touched[rest[0]] = True
        elif kind == "d":
            rig.dma(rest[0], rest[1], rest[2:])
        elif kind == "i":
            rig.invalidate(rest)
        elif kind == "l":
            rig.look(rest[0])
        else:
            raise ValueError(kind)
    for pa in touched:
        rig.word(pa, 0)
    rig.invalidate_all()


def count(case: Case) -> int:
    """How many answers a case gives."""
    return sum(step[0] in "dl" for step in case)


def play_all(rig: Rig, cases: list[Case]) -> list[list]:
    """The answers of each case."""
    for case in cases:
        play(rig, case)
    answers = iter(rig.settle())
    return [[next(answers) for _ in range(count(case))] for case in cases]
