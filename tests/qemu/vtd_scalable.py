"""Random cases for VT-d's scalable mode, without PASIDs: first stage, second stage, pass-through.

As in `vtd_legacy`, *wild* cases have anything wrong anywhere, *stale* ones change memory under a good translation. The
way of a request is root entry, context entry, PASID directory, PASID-table entry (that of PASID 0), tables. First-stage
tables are looked at afterwards: accessed and dirty bits.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fakedev.vtd import descriptors, entries
from tests.qemu.rig import Case, as_reads
from tests.qemu.vtd_legacy import (
    CONTEXTS,
    READ,
    TABLES,
    WRITE,
    address,
    invalidation,
    leaf_address,
    nowhere,
    path,
    stray_bits,
    write,
)
from tests.qemu.vtd_rig import RAM, READERS, RIDS, ROOT

#: Context entries of devices from 16 up; CONTEXTS + 32 * rid holds for all.
UPPER = CONTEXTS + 0x1000
DIRECTORY, PASIDS = 0x10_4000, 0x10_5000
FIRST, SECOND = entries.PGTT_FIRST, entries.PGTT_SECOND
_P, _W, _U, _A, _D, _PS = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
#: Bits of a first-stage entry that hardware ignores without memory types and EAFE: some of them are drawn.
_IGNORED = 3 << 3 | 1 << 8 | 1 << 9 | 1 << 11 | 0x7FF << 52


def store(pa: int, words: tuple[int, ...]) -> list[list]:
    """The steps that store words one after the other."""
    return [["w", pa + 8 * n, word] for n, word in enumerate(words)]


def root_words(random: Random, rid: int) -> tuple[int, int]:
    """Both halves of the root entry; what is wrong is wrong in the one for `rid`."""
    words = [CONTEXTS | 1, UPPER | 1]
    half = rid >> 7
    luck = random.random()
    if luck < 0.02:
        words[half] &= ~1
    elif luck < 0.04:
        words[half] = nowhere(random) | 1
    elif luck < 0.06:
        words[half] |= stray_bits(random, 1)
    return words[0], words[1]


def context_words(random: Random) -> list[int]:
    words = [*entries.scalable_context_entry(DIRECTORY, 0)]
    luck = random.random()
    if luck < 0.02:
        words[0] &= ~1
    elif luck < 0.04:
        words[0] = nowhere(random) | 1
    elif luck < 0.06:
        words[0] |= 1 << random.choice((7, 8, *range(48, 64)))
    elif luck < 0.08:
        words[1] |= 1 << random.randrange(21, 64)
    elif luck < 0.10:
        words[0] |= 2
    return words


def directory_word(random: Random) -> int:
    luck = random.random()
    if luck < 0.02:
        return PASIDS
    if luck < 0.04:
        return nowhere(random) | 1
    return PASIDS | 1


def pasid_words(random: Random, pgtt: int, aw: int, did: int) -> list[int]:
    """The entry of PASID 0."""
    luck = random.random()
    fpd = random.random() < 0.05
    if fpd:
        pass
    elif luck < 0.03:
        pgtt = random.choice((0, 4, 4, 5, 6, 7))
    elif luck < 0.06 and pgtt == SECOND:
        aw = random.choice((0, 3, 4, 5, 6, 7))
    where = TABLES[0] if random.random() > 0.02 else nowhere(random)
    if pgtt == FIRST:
        words = [*entries.pasid_entry(pgtt, did, first=where, aw=2, flags_1=entries.PASID_PWSNP)]
    else:
        words = [*entries.pasid_entry(pgtt, did, second=where, aw=aw)]
    if fpd:
        words[0] |= 2
    elif luck > 0.98:
        words[0] &= ~1
    return words


def first_path(random: Random, iova: int, tables: list[int], good: bool) -> list[tuple[int, int]]:
    """The words of a first-stage walk."""
    words = []
    last = random.choices((0, 1, 2), (12, 3, 1))[0]
    for n, level in enumerate(range(3, -1, -1)):
        where = tables[n] + (iova >> 12 + 9 * level & 511) * 8
        bits = _P | _W | _U | (random.getrandbits(64) & _IGNORED if random.random() < 0.3 else 0)
        seen = random.random() < 0.5
        if seen:
            bits |= _A
        flawless = good
        if not good and random.random() < 0.07:
            bits &= ~random.choice((_P, _W, _W, _U))
            good = flawless = True
        if level == last:
            base = leaf_address(random, level)
            while good and base >= RAM:
                base = leaf_address(random, level)
            item = base | bits | (_PS if level else 0) | (_D if seen else 0)
        else:
            item = tables[n + 1] | bits
            if not good and random.random() < 0.02:
                item = nowhere(random) | bits
            if level == 3 and not flawless and random.random() < 0.02:
                item |= _PS
        if not flawless and random.random() < 0.04:
            item |= 1 << random.randrange(12, 52)
        words.append((where, item))
        if level == last:
            break
    return words


def second_path(random: Random, iova: int, levels: int, good: bool, need: int = WRITE) -> list[tuple[int, int]]:
    """The words of a second-stage walk, as in legacy mode but for SNP."""
    return [(where, item & ~(1 << 11)) for where, item in path(random, iova, levels, TABLES, good, need)]


def _iova(random: Random, pgtt: int, levels: int, good: bool) -> int:
    iova = address(random, levels)
    if pgtt == FIRST:
        if not good and random.random() < 0.04:
            return iova ^ 1 << random.randrange(47, 64)
        return iova | -(iova >> 47 & 1) << 48 & (1 << 64) - 1
    if not good and random.random() < 0.04:
        iova |= 1 << random.randrange(38, 64)
    return iova


def wild(random: Random, pgtt: int, rids: tuple[int, ...] = RIDS, need: int = WRITE) -> Case:
    """Anything wrong anywhere; nothing changes after the first write."""
    rid, did, aw = random.choice(rids), random.randrange(1, 200), random.choice((1, 2))
    levels = 4 if pgtt == FIRST else aw + 2
    case = store(ROOT, root_words(random, rid))
    case += store(CONTEXTS + 32 * rid, tuple(context_words(random)))
    case += store(DIRECTORY, (directory_word(random),))
    case += store(PASIDS, tuple(pasid_words(random, pgtt, aw, did)))
    iova = _iova(random, pgtt, levels, good=False)
    if pgtt == FIRST:
        words = first_path(random, iova, TABLES, False)
    else:
        words = second_path(random, iova, levels, False, need)
    case += [["w", where, item] for where, item in words]
    case.append(write(rid, iova, words))
    for _ in range(random.randrange(3)):
        near = iova & -4096 | random.randrange(0, 4096, 4)
        if random.random() < 0.5 and (pgtt == SECOND or all(item & 7 == 7 for _, item in words)):
            near ^= 1 << random.choice((12, 13, 21))
        neighbours = [other for other in rids if other >> 7 == rid >> 7]
        case.append(write(random.choice(neighbours) if random.random() < 0.1 else rid, near, words))
    return case


def stale(random: Random, pgtt: int) -> Case:
    """A good translation, a change, and the writes before and after its invalidation."""
    rid, did, aw = random.choice(RIDS), random.randrange(1, 200), random.choice((1, 2))
    levels = 4 if pgtt == FIRST else aw + 2
    case = store(ROOT, entries.scalable_root_entry(CONTEXTS, UPPER))
    case += store(CONTEXTS + 32 * rid, entries.scalable_context_entry(DIRECTORY, 0))
    case += store(DIRECTORY, (entries.directory_entry(PASIDS),))
    if pgtt == FIRST:
        entry = entries.pasid_entry(pgtt, did, first=TABLES[0], aw=2, flags_1=entries.PASID_PWSNP)
    else:
        entry = entries.pasid_entry(pgtt, did, second=TABLES[0], aw=aw)
    case += store(PASIDS, entry)
    iova = _iova(random, pgtt, levels, good=True)
    words = first_path(random, iova, TABLES, True) if pgtt == FIRST else second_path(random, iova, levels, True)
    case += [["w", where, item] for where, item in words]
    every = list(words)
    case.append(write(rid, iova, every))
    if pgtt == FIRST:
        case += [["l", where] for where, _ in words]
    where, item = words[-1]
    leaf = levels - len(words)
    if pgtt == FIRST:
        new = random.choice((0, item & ~_W, leaf_address(random, leaf) | _P | _W | _U | item & _PS))
    else:
        new = random.choice((0, item & ~2, leaf_address(random, leaf) | 3 | item & _PS))
    case.append(["w", where, new])
    every.append((where, new))
    case.append(write(rid, iova, every))
    case.append(["i", *(first_invalidation(random, did, iova) if pgtt == FIRST else invalidation(random, did, iova))])
    case.append(write(rid, iova, every))
    if pgtt == FIRST and new & _P and new & _W and new < RAM:
        case.append(["l", where])
    return case


def first_invalidation(random: Random, did: int, iova: int) -> tuple[int, int]:
    """A descriptor that may or may not name a first-stage address of PASID 0."""
    luck = random.random()
    if luck < 0.2:
        return descriptors.iotlb(did, 0, 0, random.choice((descriptors.GLOBAL, descriptors.DOMAIN)))
    other = did ^ (random.random() < 0.2)
    pasid = random.random() < 0.1
    if luck < 0.4:
        return descriptors.pasid_iotlb(other, int(pasid), 0, 0, descriptors.PIOTLB_PASID)
    mask = random.choice((0, 0, 1, 4, 9, 18))
    at = iova ^ random.choice((0, 0, 1 << 12, 1 << 13, 1 << 21, 1 << 30))
    return descriptors.pasid_iotlb(other, int(pasid), at & -(4096 << mask), mask, descriptors.PIOTLB_PAGES)


def cases(pgtt: int) -> Callable[[int], Case]:
    """The cases of one PGTT, by seed."""

    def case(seed: int) -> Case:
        random = Random(seed)
        return (wild if random.random() < 0.65 else stale)(random, pgtt)

    return case


def reads(pgtt: int) -> Callable[[int], Case]:
    """As `cases`, with reads."""
    return lambda seed: as_reads(wild(Random(seed), pgtt, READERS, READ))


def change(seed: int) -> Case:
    """A good second-stage translation; then its context, directory or PASID entry changes and is invalidated.

    Before the invalidation the old way is in the IOTLB; after all that the manual asks for (table 28) it is gone.
    """
    random = Random(seed)
    rid, did, aw = random.choice(RIDS), random.randrange(1, 200), random.choice((1, 2))
    other_directory, other_table = 0x10_C000, 0x10_D000
    case = store(ROOT, entries.scalable_root_entry(CONTEXTS, UPPER))
    case += store(CONTEXTS + 32 * rid, entries.scalable_context_entry(DIRECTORY, 0))
    case += store(DIRECTORY, (entries.directory_entry(PASIDS),))
    case += store(PASIDS, entries.pasid_entry(SECOND, did, second=TABLES[0], aw=aw))
    iova = _iova(random, SECOND, aw + 2, good=True)
    old = second_path(random, iova, aw + 2, True)
    new = [(where, item & ~(1 << 11)) for where, item in path(random, iova, aw + 2, TABLES[4:], True)]
    case += [["w", where, item] for where, item in (*old, *new)]
    step = write(rid, iova, [*old, *new])
    case.append(step)
    case += store(other_table, entries.pasid_entry(SECOND, did, second=TABLES[4], aw=aw))
    what, gone = random.randrange(3), random.random() < 0.3
    if what == 0:
        table, word = (TABLES[0] if gone else TABLES[4]), entries.pasid_entry(SECOND, did, aw=aw)[0]
        case += [["w", PASIDS, table | word & ~gone]]
    elif what == 1:
        case += [["w", DIRECTORY, 0 if gone else entries.directory_entry(other_table)]]
    else:
        case += store(other_directory, (entries.directory_entry(other_table),))
        case += [["w", CONTEXTS + 32 * rid, 0 if gone else other_directory | 1]]
    case.append(step)
    granularity = random.choice((descriptors.GLOBAL, descriptors.SELECTIVE))
    pasid = random.choice((descriptors.PC_DOMAIN, descriptors.PC_PASID, descriptors.PC_GLOBAL))
    commands = [
        *descriptors.context_cache(0, rid, 0, granularity),
        *descriptors.pasid_cache(did, 0, pasid),
        *descriptors.iotlb(did, 0, 0, random.choice((descriptors.GLOBAL, descriptors.DOMAIN))),
    ]
    return [*case, ["i", *commands], step]
