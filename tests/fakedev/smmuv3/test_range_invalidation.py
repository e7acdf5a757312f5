"""TLBI with TG, TTL, SCALE and NUM against leaves of every granule and level (Arm IHI 0070, 4.4.1.1)."""

import pytest

from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from tests.fakedev.smmuv3.bench import S1_LEAF, S2_LEAF, VMID, Bench

ROOTS = [0x60_0000 + 0x8_0000 * n for n in range(4)]
#: Granule: log2, TG of commands, TG0 of CDs, S2TG, and the leaves: level of ours, TTL of the manual.
GRANULES = {"4K": (12, 1, 0, 0), "16K": (14, 2, 2, 2), "64K": (16, 3, 1, 1)}
LEAVES = [("4K", 0, 3), ("4K", 1, 2), ("4K", 2, 1), ("16K", 0, 3), ("16K", 1, 2), ("64K", 0, 3), ("64K", 1, 2)]
NAMES = [f"{granule} level {ttl}" for granule, _, ttl in LEAVES]


def cached(granule, level, stage):
    """A unit that has one leaf in its TLB, which is not in the tables any more; and where it is."""
    lg2, _, tg0, s2tg = GRANULES[granule]
    leaf_lg2 = lg2 + (lg2 - 3) * level
    address = 3 << max(leaf_lg2, 30)
    bench = Bench()
    levels = 4 if lg2 < 16 else 3
    # 16 KiB stage 2 begins at level 1 with two tables in a row, 64 KiB at level 1; 4 KiB at level 0.
    sizes = {"4K": (16, 2), "16K": (17, 2), "64K": (22, 1)}[granule]
    if stage == 1:
        bench.ste()
        bench.cd(tg0=tg0, root=ROOTS[0])
    else:
        t0sz, sl0 = sizes
        levels = {"4K": 4, "16K": 3, "64K": 2}[granule]
        bench.ste(e.CONFIG_S2, tg=s2tg, t0sz=t0sz, sl0=sl0, root=ROOTS[0])
    bits = S1_LEAF if stage == 1 else S2_LEAF
    bench.map(address, 0, bits, level=level, levels=levels, granule=lg2, tables=ROOTS)
    assert bench.goes(address)
    for table in ROOTS:
        bench.memory.write(table, bytes(0x8_0000))
    assert bench.goes(address), "cached"
    return bench, address, 1 << leaf_lg2


def tlbi(stage, address, **fields):
    if stage == 1:
        return c.tlbi_nh_va(VMID, 5, address, leaf=True, **fields)
    return c.tlbi_s2_ipa(VMID, address, leaf=True, **fields)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES, ids=NAMES)
def test_range_commands_remove_what_they_name(leaf, stage):
    """TG and TTL name the leaf's granule and level, or nothing (TTL == 0); the address is the leaf's."""
    granule, level, mine = leaf
    for tg in (1, 2, 3):
        for ttl in (0, 1, 2, 3):
            if tg == 2 and ttl == 1:
                continue  # as TTL == 0 without 52-bit addresses: tested by itself
            bench, address, _ = cached(granule, level, stage)
            bench.submit(tlbi(stage, address, tg=tg, ttl=ttl, scale=1))
            matches = tg == GRANULES[granule][1] and ttl in (0, mine)
            assert bench.goes(address) != matches, (tg, ttl)
            assert bench.command_error() is None
            bench.close()


@pytest.mark.parametrize("stage", [1, 2])
def test_ttl_1_of_16_kib_is_no_hint(stage):
    bench, address, _ = cached("16K", 1, stage)
    bench.submit(tlbi(stage, address, tg=2, ttl=1, scale=1))
    assert not bench.goes(address)
    bench.submit(tlbi(stage, address, tg=2, ttl=1))
    assert bench.command_error() == 1, "and so NUM == SCALE == 0 are reserved with it"
    bench.close()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES, ids=NAMES)
@pytest.mark.parametrize(("scale", "num"), [(0, 1), (0, 31), (3, 0), (5, 30), (12, 2)])
def test_range_ends_where_num_and_scale_say(leaf, stage, scale, num):
    """Range = ((NUM + 1) << SCALE) * granule from the address: a leaf that it reaches goes, the next one stays."""
    granule, level, _ = leaf
    lg2, tg, _, _ = GRANULES[granule]
    length = (num + 1 << scale) << lg2
    for beyond in (0, 1):
        bench, address, _ = cached(granule, level, stage)
        bench.submit(tlbi(stage, address - length + (1 - beyond << lg2), tg=tg, scale=scale, num=num))
        assert bench.goes(address) == bool(beyond)
        bench.close()


@pytest.mark.parametrize("leaf", LEAVES, ids=NAMES)
def test_command_without_tg_matches_any_address_of_the_leaf(leaf):
    """4.4: "the least significant bits of the address are ignored as needed, given the size of the entry"."""
    granule, level, _ = leaf
    for where in (0, 1):
        bench, address, size = cached(granule, level, 1)
        bench.submit(tlbi(1, address + where * (size - 0x1000)))
        assert not bench.goes(address)
        bench.close()


def test_scale_has_no_effect_without_ril():
    """4.4.1.1: with RIL == 0 the fields are RES0: one address, of any granule."""
    bench = Bench(range_invalidation=False)
    bench.ste()
    bench.cd()
    for n in range(3):
        bench.map(0x1234000 + 0x1000 * n, 0x80_0000)
        assert bench.goes(0x1234000 + 0x1000 * n)
    bench.memory.write(0x33_0000, bytes(0x1000))
    bench.submit(c.tlbi_nh_va(VMID, 5, 0x1235000, tg=1, scale=4, num=7))
    assert [bench.goes(0x1234000 + 0x1000 * n) for n in range(3)] == [True, False, True]
    bench.close()
