"""The walker over every format against readers written from the manuals (`pgtable_oracle`), on random words.

A case is a path of tables for one address, with words that are sometimes nonsense: how the walk ends, where, with which
rights, page and output, and which words the hardware rewrites must all agree.
"""

import random

import pgtable_oracle as oracle
import pytest

from fakedev.memory import BusAbort
from fakedev.pgtable.amdv1 import AmdV1
from fakedev.pgtable.arm_64_lpae import Arm64Stage1, Arm64Stage2, stage2_top_level
from fakedev.pgtable.format import NEEDED
from fakedev.pgtable.vtd_ss import VtdSecondStage
from fakedev.pgtable.walker import (
    ACCESSED,
    ADDRESS_SIZE,
    FETCH_FAILED,
    MAPPED,
    NOT_PRESENT,
    RESERVED_BITS,
    explain,
    walk,
)
from fakedev.pgtable.x86_64 import X86FirstStage

CASES = 400
WORDS = {
    MAPPED: "mapped",
    NOT_PRESENT: "absent",
    RESERVED_BITS: "reserved",
    ADDRESS_SIZE: "too wide",
    ACCESSED: "no access flag",
    FETCH_FAILED: "no answer",
}
#: A request in the oracle's letters, and as access bits.
REQUESTS = {"": 0, "r": 1, "w": 2, "rw": 3, "R": 9, "W": 10, "rx": 5, "x": 4, "X": 12}
HOLE = 0xDEAD_0000


class Words:
    """Memory of words; nothing answers in the page of HOLE."""

    def __init__(self):
        self.words = {}

    def load(self, pa):
        if pa >> 16 == HOLE >> 16:
            raise BusAbort(pa)
        return self.words.get(pa, 0)

    def look(self, pa):
        return None if pa >> 16 == HOLE >> 16 else self.words.get(pa, 0)

    def update(self, pa, old, new):
        there = self.words.get(pa, 0)
        if there == old:
            self.words[pa] = new
        return there


def arm(granule, txsz, oas, sl0=None, **more):
    lpa = more.get("lpa", granule == 64 and oas == 52)
    c = {"granule": granule, "txsz": txsz, "oas": oas, **more, "lpa": lpa}
    lg2 = {4: 12, 16: 14, 64: 16}[granule]
    shared = {key: more[key] for key in ("affd", "ha", "hd") if key in more}
    if sl0 is None:
        own = {key: more[key] for key in ("hierarchical", "wxn", "pan") if key in more}
        fmt = Arm64Stage1(lg2, 64 - txsz, oas, lpa=lpa, one_privilege=more.get("one", False), **shared, **own)
        return fmt, fmt.top_level, 64 - txsz, oracle.arm_stage1, c, lambda level: 3 - level
    c["sl0"] = sl0
    top = stage2_top_level(lg2, sl0, 64 - txsz, oas)
    fmt = Arm64Stage2(lg2, 64 - txsz, oas, top, lpa=lpa, xnx=more.get("xnx", False), **shared)
    return fmt, top, 64 - txsz, oracle.arm_stage2, c, lambda level: 3 - level


def vtd(levels, haw=52, sllps=3, **more):
    c = {"levels": levels, "haw": haw, "gib": bool(sllps & 2), "mib": bool(sllps & 1), **more}
    fmt = VtdSecondStage(haw, sllps, more.get("sc", True), more.get("dt", True), more.get("ssade", False))
    return fmt, levels - 1, 12 + 9 * levels, oracle.vtd_second_stage, c, lambda level: level + 1


def x86(levels, haw=52, gib=True, **more):
    c = {"levels": levels, "haw": haw, "gib": gib, **more}
    fmt = X86FirstStage(
        haw, gib, wpe=more.get("wpe", True), eafe=more.get("eafe", False), execute_disable=more.get("xd", False)
    )
    return fmt, levels - 1, 12 + 9 * levels, oracle.x86_first_stage, c, lambda level: level + 1


def amd(levels, oas=52, ad=False):
    c = {"levels": levels, "oas": oas, "ad": ad}
    return AmdV1(oas, ad), levels - 1, min(12 + 9 * levels, 64), oracle.amd_host, c, lambda level: level + 1


CONFIGURATIONS = {
    "s1-4k-48": arm(4, 16, 48),
    "s1-4k-39": arm(4, 25, 40, ha=True),
    "s1-4k-36-hd": arm(4, 28, 44, ha=True, hd=True),
    "s1-4k-25": arm(4, 39, 32, affd=True),
    "s1-4k-one": arm(4, 16, 48, one=True, ha=True, hd=True),
    "s1-4k-flat": arm(4, 20, 42, hierarchical=False, wxn=True),
    "s1-4k-pan": arm(4, 16, 48, pan=True, wxn=True),
    "s1-16k-48": arm(16, 16, 48),
    "s1-16k-47": arm(16, 17, 44, ha=True, hd=True),
    "s1-16k-36": arm(16, 28, 36, affd=True),
    "s1-64k-48": arm(64, 16, 48),
    "s1-64k-48-lpa": arm(64, 16, 48, lpa=True, affd=True),
    "s1-64k-52": arm(64, 12, 52, ha=True, hd=True),
    "s1-64k-42": arm(64, 22, 40, affd=True),
    "s2-4k-48": arm(4, 16, 48, sl0=2),
    "s2-4k-44-hd": arm(4, 20, 44, sl0=2, ha=True, hd=True, xnx=True),
    "s2-4k-40-concat": arm(4, 24, 40, sl0=1),
    "s2-4k-43-concat16": arm(4, 21, 44, sl0=1, affd=True),
    "s2-4k-30": arm(4, 34, 40, sl0=0),
    "s2-4k-34-concat": arm(4, 30, 40, sl0=0, affd=True),
    "s2-16k-48-concat": arm(16, 16, 48, sl0=2),
    "s2-16k-40-concat": arm(16, 24, 40, sl0=1, ha=True, hd=True),
    "s2-16k-29-concat": arm(16, 35, 40, sl0=0),
    "s2-64k-48": arm(64, 16, 48, sl0=2, xnx=True),
    "s2-64k-52": arm(64, 12, 52, sl0=2),
    "s2-64k-46-concat": arm(64, 18, 46, sl0=1, ha=True),
    "s2-64k-33-concat": arm(64, 31, 42, sl0=0),
    "vtd-3": vtd(3, 39),
    "vtd-4": vtd(4),
    "vtd-4-plain": vtd(4, 46, 0, sc=False, dt=False),
    "vtd-4-2m": vtd(4, 46, 1, sc=False),
    "vtd-4-ad": vtd(4, 48, ssade=True),
    "vtd-5-ad": vtd(5, 52, ssade=True, dt=False),
    "x86-4": x86(4),
    "x86-4-46": x86(4, 46, False, wpe=False),
    "x86-5": x86(5, 52, eafe=True),
    "x86-5-48": x86(5, 48, wpe=False, eafe=True),
    "x86-4-xd": x86(4, 52, xd=True),
    **{f"amd-{levels}": amd(levels) for levels in range(1, 7)},
    "amd-4-ad": amd(4, 48, True),
    "amd-6-ad": amd(6, 52, True),
}


def tables_at(fmt, rng):
    """An address for a table: aligned, within the width or rarely beyond, sometimes where nothing answers."""
    align = 1 << max(fmt.granule_lg2, 16)
    chance = rng.random()
    if chance < 0.02:
        return HOLE & -align
    pa = rng.getrandbits(fmt.output_bits) & -align
    return pa | (rng.getrandbits(52) & -align if chance < 0.05 else 0)


def some_bits(rng, positions, chance):
    return sum(1 << n for n in positions if rng.random() < chance)


def arm_word(fmt, level, rng):
    """A descriptor with every attribute random, some reserved."""
    pa = rng.getrandbits(fmt.output_bits) & -(1 << fmt.granule_lg2)
    if rng.random() < 0.6:
        pa &= -(1 << fmt.item_lg2(level))
    kind = rng.choices((3, 1, 0, 2), (70, 24, 3, 3))[0] if level else rng.choices((3, 1, 0), (92, 5, 3))[0]
    if level and kind == 3:
        pa = tables_at(fmt, rng)
        word = some_bits(rng, range(59, 63), 0.12) | some_bits(rng, (2, 3, 6, 10, 52, 53), 0.2)
    else:
        word = some_bits(rng, (6, 7, 51, 52, 53, 54), 0.35) | some_bits(rng, (2, 5, 8, 9, 11, 55), 0.3)
        word |= (rng.random() < 0.8) << 10
    if rng.random() < 0.04:
        word |= 1 << rng.randrange(36, 48)
    if rng.random() < 0.04:
        word |= 1 << rng.randrange(12, 16)
    return word | fmt.address_bits_of(pa) | kind


def intel_word(fmt, level, rng):
    pa = rng.getrandbits(fmt.output_bits) & -4096
    leaf = level == 0 or rng.random() < 0.25
    if leaf and rng.random() < 0.8:
        pa &= -(1 << fmt.item_lg2(level))
    if not leaf:
        pa = tables_at(fmt, rng)
    word = pa | some_bits(rng, (0, 1, 2), 0.9) | some_bits(rng, (5, 6, 8, 9, 10), 0.4) | some_bits(rng, (52, 63), 0.2)
    if leaf and level:
        word |= 1 << 7
    return word | some_bits(rng, (7, 11, 12, 13, 20, 46, 50, 62), 0.03)


def amd_word(fmt, level, rng):
    following = rng.choices((level, 0, 7, rng.randrange(8)), (70, 10, 15, 5))[0]
    pa = rng.getrandbits(fmt.output_bits) & -4096
    if following == 7:
        lg2 = fmt.item_lg2(level) + rng.randrange(1, 9) if rng.random() < 0.85 else rng.randrange(13, 50)
        pa = pa & -(1 << lg2) | (1 << lg2 - 1) - 4096
    elif following == 0 and rng.random() < 0.8:
        pa &= -(1 << fmt.item_lg2(level))
    elif following:
        pa = tables_at(fmt, rng)
    word = pa | (rng.random() < 0.96) | following << 9 | some_bits(rng, (61, 62), 0.9)
    return word | some_bits(rng, (5, 6, 63), 0.4) | some_bits(rng, (51, 52, 58, 60), 0.02)


def make_path(words, fmt, top, root, address, rng):
    """Tables on the way of `address`, as far as the words lead somewhere."""
    word_of = {"arm": arm_word, "vtd": intel_word, "x86": intel_word, "amd": amd_word}[fmt.name[:3]]
    table, level, root_bits = root, top, fmt.root_index_bits
    while True:
        index = address >> fmt.item_lg2(level) & (1 << (root_bits or fmt.index_bits)) - 1
        root_bits = None
        item = word_of(fmt, level, rng)
        if fmt.name == "amdv1" and rng.random() < 0.1 and level > 1 and (item >> 9 & 7) == level:
            item -= 1 << 9  # skip a level
        words.words[table + 8 * index] = item
        if fmt.kind(item, level) != 1 or level == 0:
            return
        table = fmt.table_address(item, level)
        level = (item >> 9 & 7) - 1 if fmt.name == "amdv1" else level - 1
        if level < 0:
            return


def letters(rights):
    return frozenset(letter for n, letter in enumerate("rwxRWX") if rights >> n & 1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("updates", [False, True], ids=["read", "update"])
def test_a_walk_ends_as_the_manual_says(name, updates):
    fmt, top, address_bits, reader, config, level_name = CONFIGURATIONS[name]
    rng = random.Random(f"{name}{updates}")
    config = dict(config)
    seen = set()
    for case in range(CASES):
        memory = Words()
        address = rng.getrandbits(address_bits)
        if fmt.name == "amdv1" and rng.random() < 0.5:
            address &= ~(0x1FF << rng.choice((21, 30, 39)))
        root = tables_at(fmt, rng) & (1 << fmt.output_bits) - 1 & -(1 << 20)
        make_path(memory, fmt, top, root, address, rng)
        request = rng.choice(list(REQUESTS))
        expected = reader(memory.look, root, address, config, request)
        before = dict(memory.words)
        found = walk(
            fmt, memory.load, root, top, address, NEEDED[REQUESTS[request]], memory.update if updates else None
        )
        label = f"case {case} of {name}: {address:#x} {request!r} {[hex(word) for word in before.values()]} {expected}"
        seen.add(expected.what)
        assert WORDS[found.outcome] == expected.what, label
        assert level_name(found.level) == expected.level, label
        if expected.what == "mapped":
            assert found.output == expected.pa, label
            assert 1 << found.lg2 == expected.size, label
            assert letters(found.rights) == expected.rights, label
        if updates:
            assert memory.words == {**before, **dict(expected.updates)}, label
        else:
            assert memory.words == before
        if updates and expected.what == "mapped":
            # What may be cached needs no further update: a walk with just those rights changes nothing.
            again = dict(memory.words)
            for writing in (2, 16):
                if found.cacheable & writing:
                    walk(fmt, memory.load, root, top, address, writing, memory.update)
            assert memory.words == again, label
            assert found.cacheable | 0o22 == found.rights | 0o22
        assert explain(fmt, memory.load, root, top, address)
    assert {"mapped", "absent"} <= seen


def test_another_agents_store_between_load_and_update_is_seen():
    fmt = VtdSecondStage(dirty_tracking=True)
    memory = Words()
    for level, table in ((3, 0x1000), (2, 0x2000), (1, 0x3000)):
        memory.words[table] = table + 0x1003
        assert level
    memory.words[0x4000] = 0x9000 | 3
    stores = iter([(0x2000, 0x3003 | 1 << 52), (0x4000, 0xA003)])

    def racing(pa, old, new):
        if pa == 0x2000 and memory.words[pa] == 0x3003:
            memory.words[pa] = next(stores)[1]
        if pa == 0x4000 and memory.words[pa] == 0x9003:
            memory.words[pa] = next(stores)[1]
        return memory.update(pa, old, new)

    found = walk(fmt, memory.load, 0x1000, 3, 0x123, 2, racing)
    assert found.output == 0xA123
    assert memory.words[0x4000] == 0xA303
    assert memory.words[0x2000] == 0x3103 | 1 << 52


def test_what_a_load_raises_passes_through():
    class FaultInStage2(Exception):
        pass

    def load(pa):
        raise FaultInStage2

    with pytest.raises(FaultInStage2):
        walk(X86FirstStage(), load, 0x1000, 3, 0)


@pytest.mark.parametrize(
    ("granule_lg2", "sl0", "input_bits", "output_bits", "level"),
    [
        (12, 2, 48, 48, 3),
        (12, 2, 44, 44, 3),
        (12, 2, 40, 42, None),  # four levels need more than 42 bits of output
        (12, 1, 40, 40, 2),
        (12, 1, 43, 44, 2),
        (12, 1, 44, 44, None),  # 32 tables in a row
        (12, 0, 30, 40, 1),
        (12, 0, 35, 40, None),
        (12, 1, 30, 40, None),  # nothing left to index
        (12, 3, 21, 40, 0),
        (14, 2, 48, 48, 2),
        (14, 2, 40, 40, None),
        (14, 1, 40, 40, 1),
        (14, 3, 48, 48, None),
        (16, 2, 48, 48, 2),
        (16, 2, 43, 42, None),
        (16, 1, 46, 46, 1),
        (16, 1, 47, 48, None),
        (16, 0, 33, 42, 0),
    ],
)
def test_the_root_of_stage_2_is_where_sl0_says(granule_lg2, sl0, input_bits, output_bits, level):
    assert stage2_top_level(granule_lg2, sl0, input_bits, output_bits) == level


def test_the_walk_in_words():
    memory = Words()
    memory.words.update({0x1000: 0x2003, 0x2000: 0x3003, 0x3008: 0x4003, 0x4010: 0x9443})
    text = explain(Arm64Stage1(12, 48, 48), memory.load, 0x1000, 3, 0x20_2345)
    assert text[0] == "level 3 table 0x1000[0] = 0x0000000000002003: table 0x2000, RWX"
    assert text[-1].endswith("= 0x0000000000009443: page of 0x1000 bytes at 0x9000, RWX")
    memory.words[0x4010] = 0x90C3
    text = explain(Arm64Stage1(12, 48, 48), memory.load, 0x1000, 3, 0x20_2345)
    assert text[-2].endswith("page of 0x1000 bytes at 0x9000, RX")
    assert text[-1] == "  accessed flag clear"
    memory.words[0x3008] = 0
    text = explain(Arm64Stage1(12, 48, 48), memory.load, 0x1000, 3, 0x20_2345)
    assert text[-1].endswith("not present")
