"""Warm caches with the right invalidations are as good as cold ones, whatever the caches keep.

Pages and blocks of three address spaces and their stage 2 change at random; after each change comes a command that
names it, chosen at random among those that do. Then every address goes where the tables say.
"""

import random

import pytest

from fakedev.caching import caching
from fakedev.machine import SMMU_BASE
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3.unit import SmmuV3
from tests.fakedev.smmuv3.bench import RID, S1_LEAF, S2_LEAF, S2_TABLES, VMID, Bench

SPACES = [[0x100_0000 + 0x10_0000 * n + 0x1_0000 * m for m in range(4)] for n in range(2)]
FRAMES = [0x200_0000 + 0x20_0000 * n for n in range(6)]
IPA = 0x4000_0000
STAGE_1_COMMANDS = ["va", "va leaf", "vaa", "asid", "all", "range", "hint", "s12", "nsnh"]
STAGE_2_COMMANDS = ["ipa and all", "range and all", "ipa and vaa of all", "s12", "nsnh"]


class World:
    """Two CDs (two ASIDs) over one stage 2; `model` maps (space, VA page) and IPA page to what is there."""

    def __init__(self, seed, keep, nested):
        self.random = random.Random(seed)
        self.bench = Bench(start=False)
        if keep is not None:
            bench = self.bench
            unit = SmmuV3(bench.memory, bench.features, send_interrupt=bench.box.root.interrupt, keep=keep)
            bench.box.mmio._windows.clear()
            bench.box.mmio.add(SMMU_BASE, unit, 0x20000)
            bench.unit = bench.dma.iommu = unit
        self.bench.start()
        self.nested = nested
        self.bench.ste(e.CONFIG_NESTED if nested else e.CONFIG_S1, cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
        for ssid, tables in enumerate(SPACES, 1):
            self.bench.cd(ssid, asid=ssid, root=tables[0])
        if nested:
            self.bench.identity2()
        self.pages = [{}, {}]
        self.frames = {}
        for n in range(8):
            self.frames[n] = self.random.choice(FRAMES)
            if nested:
                self.bench.map2(IPA + 0x20_0000 * n, self.frames[n], level=1)

    def output(self, frame):
        return IPA + 0x20_0000 * frame if self.nested else FRAMES[frame % len(FRAMES)]

    def change_stage_1(self):
        choose = self.random
        space, page, block = choose.randrange(2), choose.randrange(8), choose.random() < 0.3
        # No global pages: they would have to be the same in both address spaces.
        frame, allowed = choose.randrange(8), choose.choice([S1_LEAF, S1_LEAF, S1_LEAF | 1 << 7])
        bench, tables = self.bench, SPACES[space]
        if block:
            va = 0x20_0000 * (2 + page % 3)
            bench.map(va, self.output(frame), allowed, level=1, tables=tables)
            length = 0x20_0000
        else:
            va, length = 0x1000 * page, 0x1000
            bench.map(va, self.output(frame) + 0x1000 * page, allowed, tables=tables)
        if choose.random() < 0.2:
            shift, table = (21, tables[2]) if block else (12, tables[3])
            bench.word(table + 8 * (va >> shift & 511), 0)
            allowed = None
        self.pages[space][va] = (frame, allowed)
        asid = space + 1
        somewhere = va + choose.randrange(length)
        ttl = 2 if block else 3
        commands = {
            "va": [c.tlbi_nh_va(VMID, asid, somewhere)],
            "va leaf": [c.tlbi_nh_va(VMID, asid, somewhere, leaf=True)],
            "vaa": [c.tlbi_nh_vaa(VMID, somewhere)],
            "asid": [c.tlbi_nh_asid(VMID, asid)],
            "all": [c.tlbi_nh_all(VMID)],
            "range": [c.tlbi_nh_va(VMID, asid, va, tg=1, num=length // 4096 // 32, scale=5 if block else 0, ttl=ttl)],
            "hint": [c.tlbi_nh_va(VMID, asid, va, leaf=True, tg=1, ttl=ttl)],
            "s12": [c.tlbi_s12_vmall(VMID)],
            "nsnh": [c.tlbi_nsnh_all()],
        }
        bench.submit(*commands[choose.choice(STAGE_1_COMMANDS)], c.sync())

    def change_stage_2(self):
        choose = self.random
        n = choose.randrange(8)
        self.frames[n] = choose.choice([*FRAMES, None])
        ipa = IPA + 0x20_0000 * n
        if self.frames[n] is None:
            self.bench.word(S2_TABLES[2] + 8 * (ipa >> 21 & 511), 0)
        else:
            self.bench.map2(ipa, self.frames[n], S2_LEAF, level=1)
        inside = ipa + choose.randrange(0x20_0000)
        commands = {
            "ipa and all": [c.tlbi_s2_ipa(VMID, inside), c.tlbi_nh_all(VMID)],
            "range and all": [c.tlbi_s2_ipa(VMID, ipa, tg=1, num=1, scale=8, ttl=2), c.tlbi_nh_all(VMID)],
            "ipa and vaa of all": [c.tlbi_s2_ipa(VMID, inside), c.tlbi_nh_vaa(VMID, 0, tg=1, num=31, scale=20)],
            "s12": [c.tlbi_s12_vmall(VMID)],
            "nsnh": [c.tlbi_nsnh_all()],
        }
        self.bench.submit(*commands[choose.choice(STAGE_2_COMMANDS)], c.sync())

    def expected(self, space, va, write):
        start = va & -0x20_0000 if va >= 0x20_0000 else va & -0x1000
        frame, allowed = self.pages[space].get(start, (0, None))
        if allowed is None or (write and allowed & 1 << 7):
            return None
        base = self.frames[frame] if self.nested else FRAMES[frame % len(FRAMES)]
        if base is None:
            return None
        return base + (va & 0x1F_FFFF)

    def check(self):
        """Every address, in a random order, and by transfers of several pages."""
        bench = self.bench
        everything = [(space, va) for space in range(2) for va in [0x1000 * n for n in range(8)]]
        everything += [(space, 0x20_0000 * n + 0x5000) for space in range(2) for n in range(2, 5)]
        self.random.shuffle(everything)
        for space, va in everything:
            for write in (False, True):
                try:
                    run = bench.unit.translate(bench.dma, space + 1, va, self.random.choice([4, 0x3000]), 1 + write)
                    found = va + run[2]
                except Exception:
                    found = None
                assert found == self.expected(space, va, write), bench.unit.explain(RID, va, space + 1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("policy", ["always", "never", "random", "always with tables", "random with tables"])
def test_warm_caches_with_the_right_invalidations_are_as_good_as_cold_ones(policy, nested):
    for seed in range(6):
        rolls = random.Random(seed)
        keep = {"never": lambda: False, "random": lambda rolls=rolls: rolls.random() < 0.5}.get(policy)
        world = World(seed, keep, nested)
        if "tables" in policy:
            world.bench.unit.set_caching(caching("always" if "always" in policy else f"random:{seed}"))
        for _ in range(30):
            world.change_stage_2() if nested and world.random.random() < 0.4 else world.change_stage_1()
            world.check()
        assert world.bench.command_error() is None
        world.bench.close()


def test_a_missing_invalidation_is_seen():
    """The same world is not trivial: without the commands it differs soon."""
    world = World(1, None, nested=True)
    world.bench.submit = lambda *commands: None

    def run():
        for _ in range(30):
            world.change_stage_1()
            world.check()

    with pytest.raises(AssertionError):
        run()
    world.bench.close()


def test_kept_tables_of_both_ttbs_go_by_their_own_granules():
    """Each TTB of a CD has a granule (TG0, TG1): a command finds the tables of both."""
    bench = Bench()
    bench.unit.set_caching(caching("always"))
    bench.ste()
    low, high, wide = 0x1234000, (1 << 64) - 0x10000, [0x60_0000 + 0x10000 * n for n in range(4)]
    bench.cd(epd1=False, w2=wide[0], t1sz=22, tg1=3)
    bench.map(low, 0x80_0000)
    bench.map(high, 0x90_0000, levels=2, granule=16, tables=wide)
    assert bench.goes(low)
    assert bench.goes(high)
    root = wide[0] + 8 * ((1 << 13) - 1)
    bench.word(root, wide[3] | 3)  # another table, which is empty
    bench.submit(c.tlbi_nh_va(VMID, 5, high, leaf=True))
    assert bench.goes(high), "the table is still known"
    bench.submit(c.tlbi_nh_va(VMID, 5, high))
    assert not bench.goes(high)
    bench.close()
