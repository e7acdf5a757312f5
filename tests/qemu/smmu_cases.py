"""Random cases for SMMUv3: stage 1, stage 2, nested; kinds of STE; granules of 4, 16 and 64 KiB.

*Wild* cases have anything wrong anywhere, *stale* ones change the leaf under a good translation. What QEMU is known to
do otherwise is not drawn (tests/qemu/departures.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from fakedev.smmuv3 import commands, entries
from tests.qemu.rig import Case, as_reads
from tests.qemu.smmu_rig import RAM, RAM_END, READERS, RIDS, SPLIT, STREAMS

CONTEXT = RAM + 0x40_0000
#: Tables of stage 1 and stage 2 and pages, 64 KiB apart, so that any granule may have them.
FIRST = [RAM + 0x50_0000 + 0x1_0000 * n for n in range(5)]
SECOND = [RAM + 0x60_0000 + 0x1_0000 * n for n in range(16)]
PAGES = [RAM + 0x80_0000 + 0x1_0000 * n for n in range(8)]
_TABLES = range(RAM + 0x10_0000, RAM + 0x80_0000)
_VALID, _TABLE, _PAGE, _AF = 1, 3, 3, 1 << 10
#: Address bits that a leaf takes from the IOVA, by granule (log2), from level 0 (pages) up, where blocks are legal.
LEAVES = {12: (12, 21, 30), 14: (14, 25), 16: (16, 29)}
S1, S2, NESTED = entries.CONFIG_S1, entries.CONFIG_S2, entries.CONFIG_NESTED


@dataclass(frozen=True)
class Regime:
    """One stage's parameters: granule and input size (log2), and the size of output addresses as the field has it."""

    granule: int
    bits: int
    size: int = 4  # 44 bits

    @property
    def stride(self) -> int:
        return self.granule - 3

    @property
    def levels(self) -> int:
        return -(-(self.bits - self.granule) // self.stride)

    def index(self, address: int, level: int) -> int:
        """The item's index at `level` (0: pages)."""
        mask = (1 << self.stride) - 1
        if level == self.levels - 1:
            mask = (1 << self.bits - self.granule - self.stride * level) - 1
        return address >> self.granule + self.stride * level & mask


def regime(random: Random) -> Regime:
    granule = random.choice((12, 12, 14, 16))
    low = {12: 25, 14: 26, 16: 30}[granule]
    return Regime(granule, random.randrange(low, 49))


def second_regime(random: Random) -> Regime:
    """A second stage without concatenated tables: its start level has more than 4 bits of index, or is the first."""
    granule = random.choice((12, 12, 14, 16))
    bits = {12: (random.randrange(26, 31), random.randrange(35, 40)), 14: (random.randrange(30, 37),),
            16: (random.randrange(34, 43),)}[granule]  # fmt: skip
    return Regime(granule, random.choice(bits))


def nowhere(random: Random) -> int:
    """The address of 64 KiB that nothing answers at, within 44 bits."""
    if random.random() < 0.5:
        return random.randrange(RAM_END, RAM_END + RAM, 1 << 16)
    return random.randrange(1 << 42, 1 << 43, 1 << 16)


def landings(item: int, address: int) -> list[int]:
    """Where in RAM a leaf may take an address, whatever its level and granule."""
    found = set()
    for lg2 in {lg2 for sizes in LEAVES.values() for lg2 in sizes}:
        pa = item & 0xFFFF_FFFF_F000 & -(1 << lg2) | address & (1 << lg2) - 1
        if RAM <= pa < RAM_END and pa not in _TABLES:
            found.add(pa)
    return sorted(found)


def ste(random: Random, kind: int, s2: Regime, vmid: int, good: bool) -> list[int]:
    """The words of an STE."""
    words = [0] * 8
    words[0] = entries.STE_0_V | entries.STE_0_CONFIG.put(kind) | CONTEXT
    if kind in (S2, NESTED):
        sl0 = {12: s2.levels - 2, 14: s2.levels - 1, 16: s2.levels - 1}[s2.granule]
        words[2] = (
            vmid
            | entries.STE_2_S2T0SZ.put(64 - s2.bits)
            | entries.STE_2_S2SL0.put(sl0)
            | entries.STE_2_S2TG.put({12: 0, 14: 2, 16: 1}[s2.granule])
            | entries.STE_2_S2PS.put(s2.size)
            | entries.STE_2_S2AA64
            | entries.STE_2_S2R
        )
        words[3] = SECOND[0]
    if not good:
        luck = random.random()
        if luck < 0.02:
            words[0] &= ~1
        elif luck < 0.06:
            words[0] = words[0] & ~0xE | random.choice((0, 4)) << 1
        elif luck < 0.08 and kind != S2:
            words[0] = words[0] & 0xF | nowhere(random)
        elif luck < 0.10 and kind != S1:
            words[3] = nowhere(random)
        elif luck < 0.12 and kind == S2:
            words[2] &= ~entries.STE_2_S2R
    return words


def cd(random: Random, s1: Regime, asid: int, good: bool, nested: bool) -> list[int]:
    """The words of a CD with TTB0 only."""
    words = [0] * 8
    words[0] = (
        entries.CD_0_T0SZ.put(64 - s1.bits)
        | entries.CD_0_TG0.put({12: 0, 14: 2, 16: 1}[s1.granule])
        | entries.CD_0_EPD1
        | entries.CD_0_V
        | entries.CD_0_IPS.put(s1.size)
        | entries.CD_0_AA64
        | entries.CD_0_R
        | entries.CD_0_A
        | entries.CD_0_ASET
        | entries.CD_0_ASID.put(asid)
    )
    words[1] = FIRST[0]
    if not good:
        luck = random.random()
        if luck < 0.02:
            words[0] &= ~entries.CD_0_V
        elif luck < 0.04:
            words[0] |= entries.CD_0_EPD0
        elif luck < 0.06 and not nested:
            words[0] &= ~entries.CD_0_R
        elif luck < 0.08:
            words[0] &= ~entries.CD_0_AA64
        elif luck < 0.10:
            words[1] = nowhere(random)
        elif luck < 0.12:
            words[0] |= entries.CD_0_AFFD
    return words


def output(random: Random, granule: int, level: int, good: bool) -> int:
    """What a leaf points to."""
    if not good and random.random() < 0.04:
        return nowhere(random) & -(1 << LEAVES[granule][level])
    if level == 0:
        return random.choice(PAGES)
    size = 1 << LEAVES[granule][level]
    return RAM + 0x1000_0000 & -size if size < 1 << 29 else RAM


def leaf_bits(random: Random, stage: int, level: int, good: bool) -> int:
    """The low and high attributes of a leaf that may be written to, unless something is wrong with it."""
    bits = _AF | (_PAGE if level == 0 else _VALID)
    bits |= 1 << 6 if stage == 1 else 3 << 6  # AP[1] (unprivileged), S2AP
    if stage == 1:
        bits |= 1 << 11  # nG
    if not good:
        luck = random.random()
        if luck < 0.04:
            bits &= ~_AF
        elif luck < 0.08:
            bits = bits | 1 << 7 if stage == 1 else bits & ~(1 << 7)  # no writes
        elif luck < 0.11:
            bits &= ~1
        elif luck < 0.13 and level == 0:
            bits &= ~2
    return bits


def path(
    random: Random, stage: int, regime: Regime, address: int, tables: list[int], good: bool, to: int | None = None
) -> list[tuple[int, int]]:
    """The words of a walk; the last is a leaf, which points to `to` if that is given."""
    words = []
    top = len(LEAVES[regime.granule]) - 1
    # A block at the start level would be another size where the table is smaller than a granule: not below it.
    last = min(random.choices((0, 1, 2), (12, 4, 1))[0], top, max(regime.levels - 2, 0))
    for n, level in enumerate(range(regime.levels - 1, -1, -1)):
        where = tables[n] + 8 * regime.index(address, level)
        if level == last:
            size = 1 << LEAVES[regime.granule][level]
            base = output(random, regime.granule, level, good) if to is None else to & -size
            item = base | leaf_bits(random, stage, level, good)
        else:
            item = tables[n + 1] | _TABLE
            luck = random.random()
            if not good and luck < 0.02:
                item &= ~1
            elif not good and luck < 0.06:
                item = nowhere(random) | _TABLE
        words.append((where, item))
        if level == last:
            break
    return words


def _store(pa: int, words: list[int]) -> list[list]:
    return [["w", pa + 8 * n, word] for n, word in enumerate(words)]


def write(rid: int, iova: int, words: list[tuple[int, int]], between: list[int]) -> list:
    """The step of a write by a device; `between` are addresses that a second stage may see."""
    where = {pa for _, item in words for address in (iova, *between) for pa in landings(item, address)}
    return ["d", rid, iova, *sorted(where | ({iova} if RAM <= iova < RAM_END and iova not in _TABLES else set()))]


def _low_bits(random: Random, bits: int) -> int:
    """An address of `bits` bits, away from the tables if a large block at the start of RAM holds it."""
    return (random.getrandbits(bits) & -4 | 1 << 24) & (1 << bits) - 1


def draw(
    random: Random, kind: int, good: bool, rids: tuple[int, ...] = RIDS
) -> tuple[Case, int, int, list[tuple[int, int]], list[int], int, int]:
    """The memory of a case: (steps, rid, iova, words, addresses between, asid, vmid)."""
    rid, asid, vmid = random.choice(rids), random.randrange(1, 200), random.randrange(1, 200)
    s1 = regime(random)
    s2 = second_regime(random) if kind != NESTED else Regime(*random.choice(((12, 36), (12, 39), (14, 35), (16, 40))))
    while kind == NESTED and s1.granule > s2.granule:
        s1 = regime(random)
    stream = ste(random, kind, s2, vmid, good)
    config = entries.STE_0_CONFIG.get(stream[0])
    case = _store(STREAMS + 64 * rid, stream)
    iova = _low_bits(random, (s1 if kind != S2 else s2).bits)
    if config == entries.CONFIG_BYPASS:
        iova = random.choice(PAGES) | iova & 0xFFF
    elif not good and kind != NESTED and random.random() < 0.04:
        iova |= 1 << random.randrange(30, 64)
    between: list[int] = []
    if kind == S2:
        words = path(random, 2, s2, iova, SECOND, good)
    else:
        case += _store(CONTEXT, cd(random, s1, asid, good, kind == NESTED))
        words = path(random, 1, s1, iova, FIRST, good)
    if kind == NESTED:
        first, (_, leaf) = words, words[-1]
        sizes = LEAVES[s1.granule]
        between = [leaf & 0xFFFF_FFFF_F000 & -(1 << lg2) | iova & (1 << lg2) - 1 for lg2 in sizes]
        ipa = between[min(s1.levels - len(first), len(sizes) - 1)] if len(first) <= s1.levels else between[0]
        second = Second(random, s2, good)
        for pa in (CONTEXT, *(where for where, _ in first)):
            second.map(pa, pa)
        second.map(ipa, None)
        words = [*first, *second.words.items()]
    case += [["w", where, item] for where, item in words]
    return case, rid, iova, words, between, asid, vmid


class Second:
    """Second-stage tables of several leaves, for nested translation: `words` by address."""

    def __init__(self, random: Random, regime: Regime, good: bool) -> None:
        self.random, self.regime, self.good = random, regime, good
        self.words: dict[int, int] = {}
        self._tables = iter(SECOND[1:])

    def map(self, ipa: int, to: int | None) -> None:
        """A page for `ipa`, at the page of `to` or (None) anywhere; once in a while with something wrong."""
        if ipa >> self.regime.bits:
            return
        table = SECOND[0]
        good = self.good or self.random.random() < 0.6
        for level in range(self.regime.levels - 1, 0, -1):
            where = table + 8 * self.regime.index(ipa, level)
            if where not in self.words:
                self.words[where] = next(self._tables) | _TABLE
            table = self.words[where] & 0xFFFF_FFFF_F000
        where = table + 8 * self.regime.index(ipa, 0)
        if where not in self.words:
            base = output(self.random, self.regime.granule, 0, good) if to is None else to & -(1 << self.regime.granule)
            self.words[where] = base | leaf_bits(self.random, 2, 0, good)


def wild(random: Random, kind: int, rids: tuple[int, ...] = RIDS) -> Case:
    """Anything wrong anywhere; nothing changes after the first write."""
    case, rid, iova, words, between, *_ = draw(random, kind, False, rids)
    case.append(write(rid, iova, words, between))
    for _ in range(random.randrange(3)):
        near = iova & -4096 | random.randrange(0, 4096, 4)
        if random.random() < 0.5:
            near ^= 1 << random.choice((12, 13, 14, 16, 21, 22))
        case.append(write(random.choice(rids) if random.random() < 0.1 else rid, near, words, between))
    return case


def stale(random: Random, kind: int) -> Case:
    """A good translation, a change, and the writes before and after its invalidation."""
    case, rid, iova, words, between, asid, vmid = draw(random, kind, good=True)
    every = list(words)
    case.append(write(rid, iova, every, between))
    if kind == NESTED:
        return case + _nested_change(random, rid, iova, words, between, asid, vmid)
    where, item = words[-1]
    new = random.choice((0, item & ~_AF, item & 0xFFF | random.choice(PAGES) if item & 2 else item & ~1))
    case.append(["w", where, new])
    every.append((where, new))
    case.append(write(rid, iova, every, between))
    case.append(["i", *invalidation(random, kind, iova, asid, vmid)])
    case.append(write(rid, iova, every, between))
    return case


def _nested_change(
    random: Random, rid: int, iova: int, words: list[tuple[int, int]], between: list[int], asid: int, vmid: int
) -> list[list]:
    """Either stage's leaf changes and is invalidated: that of stage 2 with whatever came of it in stage 1."""
    if random.random() < 0.5:
        where, item = words[-1]
        command = random.choice((commands.tlbi_s12_vmall(vmid), commands.tlbi_nsnh_all()))
        new = random.choice((0, item & ~_AF, item & 0xFFF | random.choice(PAGES)))
    else:
        where, item = next((where, item) for where, item in words if item & 1 << 11)  # nG: a leaf of stage 1
        command = invalidation(random, NESTED, iova, asid, vmid)
        new = random.choice((0, item & ~_AF))
    every = [*words, (where, new)]
    steps = [["w", where, new], write(rid, iova, every, between), ["i", *command]]
    return [*steps, write(rid, iova, every, between)]


def invalidation(random: Random, kind: int, iova: int, asid: int, vmid: int) -> tuple[int, int]:
    """A command that may or may not name the translation."""
    if kind == S1:
        vmid = 0
    asid ^= random.random() < 0.15
    vmid ^= random.random() < 0.1
    at = iova ^ (random.choice((0, 0, 0, 1 << 12, 1 << 16, 1 << 22)) if kind != NESTED else 0)
    luck = random.random()
    if luck < 0.1:
        return commands.tlbi_nsnh_all()
    if kind == S2:
        if luck < 0.4:
            return commands.tlbi_s12_vmall(vmid)
        return commands.tlbi_s2_ipa(vmid, at & (1 << 48) - 1)
    if luck < 0.25:
        return commands.tlbi_nh_asid(vmid, asid)
    if luck < 0.35:
        return commands.tlbi_nh_all(vmid)
    if luck < 0.5:
        return commands.tlbi_nh_vaa(vmid, at)
    return commands.tlbi_nh_va(vmid, asid, at)


def cases(kind: int) -> Callable[[int], Case]:
    """The cases of one kind of STE, by seed."""

    def case(seed: int) -> Case:
        random = Random(seed)
        return (wild if random.random() < 0.65 else stale)(random, kind)

    return case


def reads(seed: int) -> Case:
    """As `cases` of any kind, with reads."""
    random = Random(seed)
    return as_reads(wild(random, random.choice((S1, S2, NESTED)), READERS))


def two_level(seed: int) -> Case:
    """A stream found through a two-level table, with stage 1 tables from TTB0 or, for high addresses, TTB1."""
    random = Random(seed)
    good = random.random() < 0.35
    rid, asid = random.choice(RIDS), random.randrange(1, 200)
    level_2 = RAM + 0x18_0000
    span, where = SPLIT + 1, level_2
    luck = random.random()
    if not good and luck < 0.05:
        span = random.choice((0, SPLIT + 2))
    elif not good and luck < 0.10:
        where = nowhere(random)
    s1 = regime(random)
    case: Case = _store(STREAMS + 8 * (rid >> SPLIT), [where | entries.L1STD_SPAN.put(span)])
    case += _store(level_2 + 64 * (rid & (1 << SPLIT) - 1), ste(random, S1, s1, 0, good))
    upper = random.random() < 0.6
    words = cd(random, s1, asid, good or upper, nested=False)
    if upper:
        words[0] &= ~(entries.CD_0_EPD1 | entries.CD_0_T0SZ.mask | entries.CD_0_TG0.mask)
        words[0] |= entries.CD_0_T1SZ.put(64 - s1.bits) | entries.CD_0_TG1.put({12: 2, 14: 1, 16: 3}[s1.granule])
        words[0] |= entries.CD_0_EPD0
        words[2], words[1] = words[1], 0
        if not good and random.random() < 0.05:
            words[0] |= entries.CD_0_EPD1
    case += _store(CONTEXT, words)
    iova = _low_bits(random, s1.bits)
    steps = path(random, 1, s1, iova, FIRST, good)
    case += [["w", at, item] for at, item in steps]
    high = (1 << 64) - (1 << s1.bits) if upper else 0
    if not good and random.random() < 0.05:
        high ^= 1 << random.randrange(s1.bits, 64)
    if entries.STE_0_CONFIG.get(case[1][2]) == entries.CONFIG_BYPASS:
        high, iova = 0, random.choice(PAGES)
    case.append(write(rid, iova | high, steps, [iova]))
    if good:
        at, item = steps[-1]
        case += [["w", at, item & ~_AF], write(rid, iova | high, steps, [iova])]
        case += [["i", *invalidation(random, S1, iova | high, asid, 0)], write(rid, iova | high, steps, [iova])]
    return case


def config(seed: int) -> Case:
    """A good stream whose STE or CD changes: the writes before and after commands that may or may not name it."""
    random = Random(seed)
    kind = random.choice((S1, S2))
    case, rid, iova, words, between, *_ = draw(random, kind, good=True)
    step = write(rid, iova, words, between)
    case.append(step)
    cd_changes = kind == S1 and random.random() < 0.5
    where = CONTEXT if cd_changes else STREAMS + 64 * rid
    old = next(value for _, at, value in case[:-1] if at == where)
    if cd_changes:
        new = random.choice((old & ~entries.CD_0_V, old & ~entries.CD_0_AA64))
    else:
        new = random.choice((old & ~entries.STE_0_V, entries.STE_0_V, 0))
    case += [["w", where, new], step, ["i", *commands.tlbi_nsnh_all()], step]
    sid = rid ^ random.choice((0, 0, 0, 1, 0x18))
    by_range = random.randrange(5)
    aligned = sid & -(2 << by_range)
    naming = [commands.cfgi_ste(sid), commands.cfgi_all(), commands.cfgi_ste_range(aligned, by_range)]
    if cd_changes:
        naming += [commands.cfgi_cd(sid, 0), commands.cfgi_cd_all(sid)]
    case += [["i", *random.choice(naming)], step]
    return [*case, ["i", *commands.tlbi_nsnh_all()], step]
