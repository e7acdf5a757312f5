"""Changing an entry of eight words that hardware may read at any moment, one 64-bit store at a time.

Mirrors `arm_smmu_write_entry()` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3. Words that neither the old nor
the new entry uses can be stored at will; if all that is left differs in one word, storing that word is the change, and
the hardware sees the old entry or the new one and nothing else. Otherwise the entry is made invalid in between, and
what comes then is refused. A *sync* makes the hardware forget what it has cached of the entry; it follows every step
that stored something.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass

from kernel_model.errors import KernelBug
from kernel_model.iommu.arm_smmu_v3.entries import WORDS, cd_used, ste_update_safe, ste_used


@dataclass(frozen=True)
class EntryKind:
    """Which bits of an entry the hardware reads, and which of those may change at any moment."""

    used: Callable[[Sequence[int]], list[int]]
    update_safe: Callable[[Sequence[int], Sequence[int]], list[int]] | None = None


STE = EntryKind(ste_used, ste_update_safe)
CD = EntryKind(cd_used)


def _difference(kind: EntryKind, entry: Sequence[int], target: Sequence[int]) -> tuple[list[int], list[int]]:
    """`entry` with the bits that it does not use set as in `target`, and the words that differ in used bits then."""
    current_used, target_used = kind.used(entry), kind.used(target)
    safe = kind.update_safe(entry, target) if kind.update_safe else [0] * WORDS
    update: list[int] = []
    words: list[int] = []
    for n in range(WORDS):
        if target[n] & ~target_used[n]:
            raise KernelBug(f"word {n} of a new entry has bits {target[n] & ~target_used[n]:#x} that nothing reads")
        kept = current_used[n] & ~(safe[n] & target_used[n] & current_used[n])
        update.append(entry[n] & kept | target[n] & ~kept)
        if update[n] & target_used[n] != target[n]:
            words.append(n)
    return update, words


def write_entry(
    kind: EntryKind, entry: MutableSequence[int] | memoryview[int], target: Sequence[int], sync: Callable[[], None]
) -> None:
    """Make `entry` the same as `target`, without a moment in which it is neither, nor invalid unless there is no way.

    `entry` is stored to word by word; `sync` is called after each step that stored something. KernelBug: `target` has
    bits set that it does not use.
    """

    def store(values: Sequence[int], which: Sequence[int]) -> None:
        changed = False
        for n in which:
            if entry[n] != values[n]:
                entry[n] = values[n]
                changed = True
        if changed:
            sync()

    every = range(WORDS)
    update, words = _difference(kind, list(entry), target)
    if len(words) == 1:
        store(update, [n for n in every if n != words[0]])
        store(target, words)
        store(target, every)
    elif words:
        store([0], [0])
        store(target, every[1:])
        store(target, [0])
    else:
        store(target, every)
