"""One pair of hands for every IOMMU that can be judged: QEMU's through qtest, ours through a `Machine`.

A *case* is data: a list of steps, each a list whose first member is one of

    ["w", pa, value]              store a 64-bit word
    ["d", rid, iova, pa ...]      a device writes 4 bytes; the pas are where they may turn up
    ["i", word ...]               commands or descriptors to the unit, and wait until they are done
    ["l", pa]                     load a 64-bit word
    ["r", rid, iova]              a device reads 4 bytes
    ["m", rid, address, data]     a device sends a message signalled interrupt

`play` does the steps on a rig and gives an answer for each but "w" and "i": for a load the word; for a write a list of
the pa that the data turned up at (BLOCKED, or ELSEWHERE for none of those named) and the words of the fault or event
records that it left; for a read what it got, BLOCKED for zeros, and the records; for a message the (address, data)
that it became, or BLOCKED, and the records. Afterwards every word is 0 again and nothing is cached, so cases do not
depend on each other.
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
    def read(self, rid: int, iova: int) -> None:
        """Let a device read 4 bytes; then the records are clear. Answers."""

    @abstractmethod
    def message(self, rid: int, address: int, data: int) -> None:
        """Let a device send a message; then the records are clear. Answers."""

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
        elif kind == "r":
            rig.read(*rest)
        elif kind == "m":
            rig.message(*rest)
        else:
            raise ValueError(kind)
    for pa in touched:
        rig.word(pa, 0)
    rig.invalidate_all()


def count(case: Case) -> int:
    """How many answers a case gives."""
    return sum(step[0] in "dlrm" for step in case)


def play_all(rig: Rig, cases: list[Case]) -> list[list]:
    """The answers of each case."""
    for case in cases:
        play(rig, case)
    answers = iter(rig.settle())
    return [[next(answers) for _ in range(count(case))] for case in cases]


def as_reads(case: Case) -> Case:
    """The case with reads instead of writes: where a write might have turned up is a word that tells where it lies."""
    steps: Case = []
    for step in case:
        if step[0] == "d":
            _, rid, iova, *where = step
            steps += [["w", pa, _mark(pa)] for pa in sorted({pa & -8 for pa in where})]
            steps.append(["r", rid, iova & -4])
        else:
            steps.append(step)
    return steps


def _mark(pa: int) -> int:
    """A word whose halves are not zero and tell where it lies, below 4 GiB."""
    return (0x8000_0000 | pa >> 3) << 32 | pa | 1
