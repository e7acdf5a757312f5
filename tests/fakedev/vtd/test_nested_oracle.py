"""Nested translation against a second walk, written from sections 3.6 to 3.8 of the manual: QEMU has none to ask.

Each case is a guest's table of 4 or 5 levels, whose pages and whose target lie at guest addresses that a second stage
of 3 to 5 levels maps with pages of any size and any permission. One request is made, with nothing cached. The oracle
says which conditions of table 30 it meets: it must be refused if there is one, and with one of them; else the address,
and every accessed and dirty bit in memory, must be the oracle's. A translation request gets what neither a read nor a
write would be refused (4.2.3). Two things are open in the manual and not looked at: bits of items on the way to a
fault, and whether reading a first-stage table through SSADE=1 makes its page dirty.
"""

import random

import pytest

from fakedev.dma import PRIVILEGED, READ, WRITE, TranslationFault
from fakedev.vtd import entries
from tests.fakedev.vtd.rig import PASID, Rig

A, D, EA, PS = 1 << 5, 1 << 6, 1 << 10, 1 << 7
SS_A, SS_D = 1 << 8, 1 << 9
ADDRESS = 0x000F_FFFF_FFFF_F000
POOL, TARGET = 0x80_0000, 1 << 30


class Guest:
    """Random tables in a rig's memory, and what a request through them should do."""

    def __init__(self, seed):
        self.random = draw = random.Random(seed)
        self.rig = Rig()
        #: How often an item lacks a permission.
        self.flaws = draw.choice((0, 0.02, 0.1))
        #: What an item of the guest's may have of flags.
        self.preset = draw.choice(((0, A, A | EA), (A | EA | D,)))
        self.next_page = POOL
        self.levels, self.second_levels = draw.choice((4, 5)), draw.choice((3, 4, 5))
        self.dirty, self.wpe, self.eafe = (draw.random() < 0.5 for _ in range(3))
        self.second_root = self.page()
        limit = min(57, 12 + 9 * self.second_levels) - 1
        # Each page of a first-stage table, and the target, in a gigabyte of its own.
        places = draw.sample(range(1, 1 << min(limit, 44) - 30), self.levels + 1)
        self.iova = draw.randrange(1 << 9 * self.levels - 1) << 12
        if draw.random() < 0.3:
            self.iova |= -1 << 11 + 9 * self.levels & (1 << 64) - 1
        leaf = draw.choice((0, 0, 1, 2))
        tables = [place << 30 | draw.randrange(1 << 18) << 12 for place in places]
        where = [self.map_second(gpa) for gpa in tables]
        for level in range(self.levels - 1, leaf - 1, -1):
            n = self.levels - 1 - level
            target = tables[n + 1] if level > leaf else places[-1] << 30 & -1 << 12 + 9 * leaf | self.low(leaf)
            if level == leaf:
                self.target = target
                where.append(self.map_second(target + (self.iova & (1 << 12 + 9 * leaf) - 1)))
            bits = 1 | self.often(2) | self.often(4) | draw.choice(self.preset)
            if level == leaf:
                bits |= draw.choice((0, D)) | (PS if leaf else 0)
            at = where[n] + 8 * (self.iova >> 12 + 9 * level & 511)
            self.rig.word(at, target | (bits if self.often(1) else bits & ~1))
        flags = entries.PASID_SRE | (entries.PASID_WPE if self.wpe else 0) | (entries.PASID_EAFE if self.eafe else 0)
        self.rig.tables(
            entries.PGTT_NESTED,
            first=tables[0],
            fspm=self.levels - 4,
            second=self.second_root,
            aw=self.second_levels - 2,
            dirty=self.dirty,
            flags_2=flags,
        )
        self.first = tables[0]
        self.rig.start()

    def low(self, leaf):
        return 0 if leaf == 2 else self.random.randrange(1 << 18 - 9 * leaf) << 12 + 9 * leaf

    def often(self, bit):
        return 0 if self.random.random() < self.flaws else bit

    def page(self):
        self.next_page += 4096
        return self.next_page - 4096

    def map_second(self, gpa):
        """Map the page of a guest address, somewhere; the physical address of the 4 KiB page that it is in."""
        draw = self.random
        leaf = draw.choice((0, 0, 0, 1))
        table = self.second_root
        for level in range(self.second_levels - 1, -1, -1):
            at = table + 8 * (gpa >> 12 + 9 * level & 511)
            bits = self.often(1) | self.often(2) | draw.choice((0, SS_A))
            if level == leaf:
                size = 1 << 12 + 9 * leaf
                self.next_page = self.next_page + size - 1 & -size
                pa, self.next_page = self.next_page, self.next_page + size
                self.rig.word(at, pa | bits | draw.choice((0, SS_D)) | (PS if leaf else 0))
                return pa | gpa & size - 1 & -4096
            item = self.rig.load(at)
            if not item:
                item = self.page() | bits
                self.rig.word(at, item)
            table = item & ADDRESS
        raise AssertionError

    # -- the oracle --------------------------------------------------------------------------------------------------

    def second(self, gpa):
        """(items on the way, permissions of all together, address and size of the page); None: no permission at all."""
        items, allowed, table = [], 3, self.second_root
        for level in range(self.second_levels - 1, -1, -1):
            at = table + 8 * (gpa >> 12 + 9 * level & 511)
            item = self.rig.load(at)
            items.append(at)
            allowed &= item
            if not item & 3 or not allowed:
                return None
            if level == 0 or item & PS:
                mask = (1 << 12 + 9 * level) - 1
                return items, allowed, item & ADDRESS & ~mask | gpa & mask, mask + 1
            table = item & ADDRESS
        raise AssertionError

    def expect(self, access):
        """(reasons to refuse, physical address, size, {where: bits to be set}, words whose dirty bit is open)."""
        reasons, sets, free = set(), {}, set()
        writes, user = bool(access & WRITE), not access & PRIVILEGED
        table, write_allowed, user_allowed = self.first, True, True
        flags = A | (EA if self.eafe else 0)

        def through(gpa):
            found = self.second(gpa)
            if found is None:
                reasons.add(0x79)
                return None
            if self.dirty:
                for at in found[0]:
                    sets[at] = sets.get(at, 0) | SS_A
            return found

        for level in range(self.levels - 1, -1, -1):
            found = through(table + 8 * (self.iova >> 12 + 9 * level & 511))
            if found is None:
                return reasons, 0, 0, sets, free
            items, allowed, at, _ = found
            if not allowed & 1:
                reasons.add(0x75 if level == self.levels - 1 else 0x76)
            if self.dirty and not allowed & 2:
                reasons.add(0x77)
            item = self.rig.load(at)
            if not item & 1:
                reasons.add(0x71)
                return reasons, 0, 0, sets, free
            write_allowed &= bool(item & 2) or (not user and not self.wpe)
            user_allowed &= bool(item & 4)
            last = level == 0 or item & PS
            wanted = flags | (D if last and writes else 0)
            if wanted & ~item:
                if not allowed & 2:
                    reasons.add(0x77)
                if self.dirty:
                    sets[items[-1]] |= SS_D
            elif self.dirty:
                free.add(items[-1])
            sets[at] = wanted
            if last:
                break
            table = item & ADDRESS
        if user and not user_allowed:
            reasons.add(0x81)
        if writes and not write_allowed:
            reasons.add(0x85)
        mask = (1 << 12 + 9 * level) - 1
        found = through(item & ADDRESS & ~mask | self.iova & mask)
        if found is None:
            return reasons, 0, 0, sets, free
        items, allowed, pa, size = found
        if writes and not allowed & 2:
            reasons.add(0x85)
        if not writes and not allowed & 1:
            reasons.add(0x86)
        if self.dirty and writes:
            sets[items[-1]] |= SS_D
        return reasons, pa, min(size, mask + 1), sets, free - {at for at, bits in sets.items() if bits & SS_D}


def words(guest):
    """All tables, and more."""
    return {at: guest.rig.load(at) for at in range(POOL, min(guest.next_page, POOL + 0x4_0000), 8)}


def assert_flags(rig, before, sets, free, seed):
    for at, word in before.items():
        after, wanted = rig.load(at), word | sets.get(at, 0)
        assert after == wanted or (at in free and after == wanted | SS_D), (seed, hex(at))


@pytest.mark.parametrize("access", [READ, WRITE, READ | PRIVILEGED, WRITE | PRIVILEGED])
@pytest.mark.parametrize("block", range(4))
def test_a_nested_request_does_what_a_second_walk_says(block, access):
    allowed = 0
    for seed in range(40 * block, 40 * block + 40):
        guest = Guest(seed)
        rig = guest.rig
        reasons, pa, size, sets, free = guest.expect(access)
        before = words(guest)
        try:
            run = rig.unit.translate(rig.dma, PASID, guest.iova | 0x123, 4, access)
        except TranslationFault:
            assert rig.record()["reason"] in reasons, (seed, reasons)
        else:
            assert not reasons, (seed, reasons)
            assert run[:3] == (guest.iova & -size, (guest.iova & -size) + size, pa - guest.iova), seed
            assert_flags(rig, before, sets, free, seed)
            allowed += 1
        rig.close()
    assert 8 < allowed < 36


@pytest.mark.parametrize("asked", [READ, READ | WRITE])
@pytest.mark.parametrize("privilege", [0, PRIVILEGED])
def test_a_nested_translation_request_gets_what_a_second_walk_allows(asked, privilege):
    granted = []
    for seed in range(1000, 1080):
        guest = Guest(seed)
        rig = guest.rig
        expected = [guest.expect(READ | privilege)]
        if asked & WRITE:
            expected.append(guest.expect(WRITE | privilege))
        allowed = sum(1 << n for n, (reasons, *_) in enumerate(expected) if not reasons)
        before = words(guest)
        found = rig.dma.request_translation(guest.iova, asked | privilege, PASID)
        assert found.allowed == allowed, (seed, [reasons for reasons, *_ in expected])
        assert rig.record() is None, seed
        if allowed:
            _, pa, size, sets, free = expected[-1] if allowed & WRITE else expected[0]
            assert (found.start, found.pa) == (guest.iova & -size, pa & -size), seed
            assert found.length == size, seed
            assert_flags(rig, before, sets, free, seed)
        granted.append(allowed)
        rig.close()
    assert set(granted) >= {0, asked}
