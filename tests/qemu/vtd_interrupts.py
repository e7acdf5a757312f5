"""Random cases for VT-d's interrupt remapping: entries with anything wrong in them, and messages that name them or not.

QEMU reads entries anew for each message, so a change is followed by an invalidation that names the entry, and only then
by a message. A message's data have 16 bits, as edu's capability has; so the reserved ones are never set here.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fakedev.vtd import descriptors, irte
from tests.qemu.rig import Case
from tests.qemu.vtd_rig import ENTRIES_LG2, INTERRUPTS, READERS

_ENTRIES = 1 << ENTRIES_LG2


def entry(random: Random, rid: int, extended: bool) -> tuple[int, int]:
    """The words of an entry that `rid` may use, or that has something wrong."""
    vector, destination = random.randrange(0x10, 0xFF), random.choice((0, 1, 2, 5, 0xFF, random.getrandbits(8)))
    if extended and random.random() < 0.5:
        destination = random.getrandbits(32)
    flags = random.choice((0, irte.REDIRECTION_HINT, irte.LOGICAL, irte.LEVEL, irte.LEVEL | irte.LOGICAL))
    delivery = random.choice((irte.FIXED, irte.FIXED, irte.LOWEST_PRIORITY))
    svt, sq, sid = irte.SVT_SID, 0, rid
    luck = random.random()
    if luck < 0.10:
        sid ^= 1 << random.randrange(16)
    elif luck < 0.30:
        sq, sid = random.randrange(4), rid ^ random.choice((0, 1, 2, 4, 6, 7, 8, 0x100))
    elif luck < 0.36:
        svt, sid = irte.SVT_NONE, random.getrandbits(16)
    elif luck < 0.44:
        svt, sid = irte.SVT_BUS, random.choice((0, 0, 0x0101, 0x0505))
    low, high = irte.entry(vector, destination, sid, svt=svt, sq=sq, extended=extended, flags=flags, delivery=delivery)
    low |= random.getrandbits(4) << 8
    luck = random.random()
    if luck < 0.06:
        low &= ~irte.PRESENT
    elif luck < 0.14:
        low |= 1 << random.choice((12, 13, 14, *range(24, 32)))
    elif luck < 0.20:
        high |= 1 << random.randrange(20, 64)
    if random.random() < 0.08:
        low |= irte.FPD
    return low, high


def cases(extended: bool) -> Callable[[int], Case]:
    """The cases of a table in one mode, by seed."""

    def case(seed: int) -> Case:
        random = Random(seed)
        rid = random.choice(READERS)
        index = random.randrange(_ENTRIES - 4)
        steps: Case = []
        for n in range(4):
            steps += _entry(index + n, entry(random, rid, extended))
        for _ in range(random.randrange(1, 4)):
            steps.append(_message(random, rid, index))
        if random.random() < 0.4:
            changed = index + random.randrange(4)
            steps += _entry(changed, entry(random, rid, extended))
            named = random.choice(((None, 0), (changed, 0), (changed, 2), (index, 3)))
            steps.append(["i", *descriptors.interrupt_entries(*named)])
            if named == (index, 3):  # which may not hold it
                steps.append(["i", *descriptors.interrupt_entries(changed)])
            steps.append(["m", rid, *irte.message(changed, random.choice((0, None)))])
        return steps

    return case


def _entry(index: int, words: tuple[int, int]) -> list[list]:
    where = INTERRUPTS + irte.ENTRY_BYTES * index
    return [["w", where, words[0]], ["w", where + 8, words[1]]]


def _message(random: Random, rid: int, index: int) -> list:
    """A message of the four entries, or one that goes astray."""
    luck = random.random()
    if luck < 0.06:
        sent = irte.message(random.choice((_ENTRIES, _ENTRIES + 5, 0x4000, 0x8000 | index, 0xFFFF)))
    elif luck < 0.10:
        sent = irte.message(_ENTRIES - 1, random.choice((1, 2, 0x7FFF)))
    elif luck < 0.14:
        sent = irte.message(random.randrange(_ENTRIES))
    elif luck < 0.5:
        n = random.randrange(4)
        sent = irte.message(index + n - (less := random.randrange(n + 1)), less)
    else:
        sent = irte.message(index + random.randrange(4), random.choice((0, None)))
    if sent[0] & irte.SHV == 0 and random.random() < 0.5:
        sent = sent[0], random.getrandbits(16)
    return ["m", random.choice(READERS) if random.random() < 0.1 else rid, *sent]
