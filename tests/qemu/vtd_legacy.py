"""Random cases for VT-d's legacy mode.

Two kinds. *Wild*: root entry, context entry and tables with anything wrong in them, and writes through them. *Stale*:
good tables, a write, a change in memory, a write that may still go the old way, an invalidation, a write that must go
the new way. A case is drawn from a seed and is data (`rig.Case`).

What is not drawn, since the manual leaves it open what is cached (6.2): changes after a translation that failed for
want of permission; writes by another source of the same domain between a change and its invalidation; a context entry
that is invalidated without its domain's translations.
"""

from __future__ import annotations

from random import Random

from fakedev.vtd import descriptors
from tests.qemu.rig import Case, as_reads
from tests.qemu.vtd_rig import RAM, READERS, RIDS, ROOT

CONTEXTS = 0x10_1000
TABLES = [0x11_0000 + 0x1000 * n for n in range(8)]
PAGES = [0x20_0000 + 0x1000 * n for n in range(8)]
_PRESENT = 1
#: Every IOVA has this bit, so that a large page at 0 lets nobody reach the tables.
_AWAY = 1 << 28


def nowhere(random: Random) -> int:
    """The address of a page that nothing answers at: above RAM, or above any PCI window, within 39 bits."""
    if random.random() < 0.5:
        return random.randrange(RAM, 2 * RAM, 4096)
    return random.randrange(1 << 38, 1 << 39, 4096)


def stray_bits(random: Random, low: int = 2) -> int:
    """One or two bits from `low` up."""
    bits = 1 << random.randrange(low, 64)
    return bits | (1 << random.randrange(low, 64) if random.random() < 0.3 else 0)


def leaf_address(random: Random, level: int) -> int:
    """Where a leaf points: a page, an aligned block in RAM, rarely to nothing or the interrupts' window."""
    luck = random.random()
    if luck < 0.03:
        return nowhere(random) & -(1 << 12 + 9 * level)
    if level == 0 and luck < 0.05:
        return random.randrange(0xFEE0_0000, 0xFEF0_0000, 4096)
    if level == 0:
        return random.choice(PAGES)
    if level == 1:
        return random.randrange(2, 128) << 21
    return 0


def landings(item: int, iova: int) -> list[int]:
    """Where in RAM a leaf may take an IOVA, whatever its level."""
    found = []
    for lg2 in (12, 21, 30):
        pa = (item & 0xFFFF_FFFF_F000 & -(1 << lg2)) | iova & (1 << lg2) - 1
        if pa < RAM and not 0x10_0000 <= pa < 0x20_0000:  # not the tables: what lands is cleared
            found.append(pa)
    return found


def root_words(random: Random) -> tuple[int, int]:
    luck = random.random()
    low, high = CONTEXTS | _PRESENT, 0
    if luck < 0.02:
        low &= ~_PRESENT
    elif luck < 0.04:
        low = nowhere(random) | _PRESENT
    elif luck < 0.07:
        low |= stray_bits(random, 1)
    elif luck < 0.08:
        high |= stray_bits(random, 0)
    return low, high


def context_words(random: Random, did: int, good: bool) -> tuple[int, int, int]:
    """(low, high, levels) of a context entry."""
    aw = random.choice((1, 2))
    low, high = TABLES[0] | _PRESENT, did << 8 | aw
    if good:
        return low, high, aw + 2
    luck = random.random()
    if luck < 0.03:
        low &= ~_PRESENT
    elif luck < 0.07:
        low |= random.randrange(1, 4) << 2
    elif luck < 0.10:
        low = nowhere(random) | _PRESENT
    elif luck < 0.16:
        high = high & ~7 | random.randrange(8)
    elif luck < 0.22:
        low |= 2  # FPD
    elif luck < 0.26:
        return low | stray_bits(random), high, aw + 2
    elif luck < 0.28:
        return low, high | stray_bits(random, 3), aw + 2
    if random.random() < 0.03:
        low |= 2
    return low, high, aw + 2


def address(random: Random, levels: int) -> int:
    iova = random.getrandbits(12 + 9 * levels) & -4 | _AWAY
    return iova


#: The permission bits of an entry.
READ, WRITE = 1, 2


def path(
    random: Random, iova: int, levels: int, tables: list[int], good: bool, need: int = WRITE
) -> list[tuple[int, int]]:
    """The words on the way to `iova` through `tables`, the last of them a leaf; nothing is wrong after one without
    the permission `need`."""
    words = []
    last = random.choices((0, 1, 2), (12, 3, 1))[0]
    for n, level in enumerate(range(levels - 1, -1, -1)):
        where = tables[n] + (iova >> 12 + 9 * level & 511) * 8
        rights = 3
        if not good and random.random() < 0.08:
            rights = random.randrange(4)
            good = good or not rights & need
        if level == last:
            base = leaf_address(random, level)
            if good:  # from here on, or altogether
                while base >= RAM:
                    base = leaf_address(random, level)
            item = base | rights | (1 << 7 if level else 0)
        else:
            item = tables[n + 1] | rights
            if not good and random.random() < 0.02:
                item = nowhere(random) | rights
            if not good and level == 3 and random.random() < 0.02:
                item |= 1 << 7
        if not good and rights & need and random.random() < 0.06:
            item |= stray_bits(random)
        words.append((where, item))
        good = good or not item & need
        if level == last:
            break
    return words


def write(rid: int, iova: int, words: list[tuple[int, int]]) -> list:
    """The step of a write by a device, with all the places where it may turn up."""
    where = sorted({pa for item in (0, *(item for _, item in words)) for pa in landings(item, iova)})
    where += [iova] if iova < RAM and iova not in where else []
    return ["d", rid, iova, *where]


def wild(random: Random, rids: tuple[int, ...] = RIDS, need: int = WRITE) -> Case:
    """Anything wrong anywhere; nothing changes after the first write."""
    case: Case = []
    low, high = root_words(random)
    case += [["w", ROOT, low], ["w", ROOT + 8, high]]
    rid, did = random.choice(rids), random.randrange(1, 200)
    low, high, levels = context_words(random, did, good=False)
    case += [["w", CONTEXTS + 16 * rid, low], ["w", CONTEXTS + 16 * rid + 8, high]]
    iova = address(random, levels)
    if random.random() < 0.04:
        iova |= 1 << random.randrange(38, 64)
    words = path(random, iova, levels, TABLES, False, need)
    case += [["w", where, item] for where, item in words]
    case.append(write(rid, iova, words))
    for _ in range(random.randrange(3)):
        luck = random.random()
        if luck < 0.5:
            near = iova & -4096 | random.randrange(0, 4096, 4)
        elif luck < 0.8:
            near = iova ^ 1 << random.choice((12, 13, 21, 30))
            near |= _AWAY
        else:
            near = address(random, levels)
        case.append(write(random.choice(rids) if random.random() < 0.1 else rid, near, words))
    return case


def stale(random: Random) -> Case:
    """Good tables for one or two sources, a change, and the writes before and after its invalidation."""
    rid, did = random.choice(RIDS), random.randrange(1, 200)
    low, high, levels = context_words(random, did, good=True)
    entry = CONTEXTS + 16 * rid
    case: Case = [["w", ROOT, CONTEXTS | 1], ["w", entry, low], ["w", entry + 8, high]]
    iova = address(random, levels)
    words = path(random, iova, levels, TABLES, good=True)
    case += [["w", where, item] for where, item in words]
    every = list(words)
    case.append(write(rid, iova, every))
    leaf = levels - len(words)
    if random.random() < 0.3:
        return case + _new_context(random, rid, did, iova, levels, every)
    where, item = words[-1]
    new = random.choice((0, item & ~2, leaf_address(random, leaf) | 3 | item & 1 << 7))
    case.append(["w", where, new])
    every.append((where, new))
    case.append(write(rid, iova, every))
    case.append(["i", *invalidation(random, did, iova)])
    case.append(write(rid, iova, every))
    return case


def invalidation(random: Random, did: int, iova: int) -> tuple[int, int]:
    """A descriptor that may or may not name the address; pages of a range, a domain, or all."""
    luck = random.random()
    if luck < 0.2:
        return descriptors.iotlb(0, 0, 0, descriptors.GLOBAL)
    if luck < 0.4:
        return descriptors.iotlb(did ^ (random.random() < 0.3), 0, 0, descriptors.DOMAIN)
    mask = random.choice((0, 0, 1, 4, 9, 18))
    at = iova ^ (random.choice((0, 0, 1 << 12, 1 << 13, 1 << 21, 1 << 30)))
    return descriptors.iotlb(did ^ (random.random() < 0.15), at & -(4096 << mask), mask, descriptors.SELECTIVE)


def _new_context(
    random: Random, rid: int, did: int, iova: int, levels: int, every: list[tuple[int, int]]
) -> list[list]:
    """The context entry is pointed at other tables; a write; both caches are invalidated; a write."""
    others = TABLES[4:]
    words = path(random, iova, levels, others, good=True)
    steps: list[list] = [["w", where, item] for where, item in words]
    every += words
    entry = CONTEXTS + 16 * rid
    gone = random.random() < 0.2
    steps.append(["w", entry, 0 if gone else others[0] | 1])
    steps.append(write(rid, iova, every))
    luck = random.random()
    if luck < 0.3:
        context = descriptors.context_cache(0, 0, 0, descriptors.GLOBAL)
    elif luck < 0.6:
        context = descriptors.context_cache(did, 0, 0, descriptors.DOMAIN)
    else:
        source = rid ^ random.choice((0, 0, 0, 1, 2, 4, 6, 8))
        context = descriptors.context_cache(did, source, random.randrange(4), descriptors.SELECTIVE)
    steps.append(["i", *context, *descriptors.iotlb(did, 0, 0, descriptors.DOMAIN)])
    steps.append(write(rid, iova, every))
    return steps


def case(seed: int) -> Case:
    """The case of a seed."""
    random = Random(seed)
    return wild(random) if random.random() < 0.65 else stale(random)


def reads(seed: int) -> Case:
    """As `case`, with reads."""
    return as_reads(wild(Random(seed), READERS, READ))
