"""Of two things that are wrong, the one that comes first on the way is recorded (Arm IHI 0070, 7.3.22).

A write with a SubstreamID through both stages, with every fault that 7.3.22 lists, alone and with each that follows it.
CDs lie in the second GiB of IPAs, tables of stage 1 in the third, and what the write goes to in the fourth.
"""

from itertools import combinations

import pytest

from fakedev.dma import WRITE
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events as ev
from fakedev.smmuv3 import regs
from tests.fakedev.smmuv3.bench import (
    CDS,
    NOWHERE,
    PAGE,
    RID,
    S1_LEAF,
    S1_TABLES,
    S2_LEAF,
    S2_TABLES,
    STRTAB,
    Bench,
)

GIB = 1 << 30
VA, SSID = 0x9_1234_5678, 5
CD, TT, IN = ev.CLASS_CD, ev.CLASS_TT, ev.CLASS_IN
AF, READ_ONLY, S2_WRITE = 1 << 10, 1 << 7, 1 << 7
#: Beyond the 40 bits that CD.IPS and STE.S2PS say.
BEYOND = 1 << 41

#: What is wrong, in the manual's order: number, S2 and CLASS of the record.
ORDER = {
    "stream beyond the table": (ev.C_BAD_STREAMID, 0, 0),
    "STE cannot be read": (ev.F_STE_FETCH, 0, 0),
    "STE is invalid": (ev.C_BAD_STE, 0, 0),
    "substream beyond the table": (ev.C_BAD_SUBSTREAMID, 0, 0),
    "stage 2 has no CD": (ev.F_TRANSLATION, 1, CD),
    "CD cannot be read": (ev.F_CD_FETCH, 0, 0),
    "CD is invalid": (ev.C_BAD_CD, 0, 0),
    "address beyond T0SZ": (ev.F_TRANSLATION, 0, IN),
    "stage 2 has no table": (ev.F_TRANSLATION, 1, TT),
    "table cannot be read": (ev.F_WALK_EABT, 0, TT),
    "root item is invalid": (ev.F_TRANSLATION, 0, IN),
    "root item is too wide": (ev.F_ADDR_SIZE, 0, IN),
    "leaf is invalid": (ev.F_TRANSLATION, 0, IN),
    "leaf is too wide": (ev.F_ADDR_SIZE, 0, IN),
    "leaf is not accessed": (ev.F_ACCESS, 0, IN),
    "leaf is read-only": (ev.F_PERMISSION, 0, IN),
    "IPA beyond S2T0SZ": (ev.F_TRANSLATION, 1, IN),
    "stage 2 table cannot be read": (ev.F_WALK_EABT, 1, IN),
    "stage 2 leaf is invalid": (ev.F_TRANSLATION, 1, IN),
    "stage 2 leaf is too wide": (ev.F_ADDR_SIZE, 1, IN),
    "stage 2 leaf is not accessed": (ev.F_ACCESS, 1, IN),
    "stage 2 leaf is read-only": (ev.F_PERMISSION, 1, IN),
}


def stage_1(bench, wrong):
    """Four levels, whose pointers are IPAs."""
    ipa = (1 << 39) if "IPA beyond S2T0SZ" in wrong else 3 * GIB + 0x5000
    items = [2 * GIB + S1_TABLES[n + 1] | 3 for n in range(3)]
    leaf = ipa | S1_LEAF | 3
    leaf |= BEYOND if "leaf is too wide" in wrong else 0
    leaf &= ~AF if "leaf is not accessed" in wrong else -1
    leaf |= READ_ONLY if "leaf is read-only" in wrong else 0
    items[0] |= BEYOND if "root item is too wide" in wrong else 0
    items[0] *= "root item is invalid" not in wrong
    items.append(leaf * ("leaf is invalid" not in wrong))
    for n, item in enumerate(items):
        bench.word(S1_TABLES[n] + 8 * (VA >> 12 + 9 * (3 - n) & 511), item)


def stage_2(bench, wrong):
    """Three levels: two blocks of 1 GiB, and a page in the fourth GiB."""
    blocks = {
        1: ("stage 2 has no CD", "CD cannot be read"),
        2: ("stage 2 has no table", "table cannot be read"),
    }
    for number, (missing, nowhere) in blocks.items():
        block = (NOWHERE & -GIB if nowhere in wrong else 0) | S2_LEAF | 1
        bench.word(S2_TABLES[1] + 8 * number, block * (missing not in wrong))
    leaf = PAGE | S2_LEAF | 3
    leaf |= BEYOND if "stage 2 leaf is too wide" in wrong else 0
    leaf &= ~AF if "stage 2 leaf is not accessed" in wrong else -1
    leaf &= ~S2_WRITE if "stage 2 leaf is read-only" in wrong else -1
    table = NOWHERE if "stage 2 table cannot be read" in wrong else S2_TABLES[2]
    bench.word(S2_TABLES[1] + 8 * 3, table | 3)
    bench.word(S2_TABLES[2], S2_TABLES[3] | 3)
    bench.word(S2_TABLES[3] + 8 * 5, leaf * ("stage 2 leaf is invalid" not in wrong))


def build(bench, wrong):
    bench.set(regs.CR0, 0)
    bench.set(regs.STRTAB_BASE_CFG, 2 if "stream beyond the table" in wrong else 8)
    bench.set(regs.STRTAB_BASE, NOWHERE if "STE cannot be read" in wrong else STRTAB, 8)
    bench.set(regs.CR0, 0xF)
    cdmax = 2 if "substream beyond the table" in wrong else 4
    fields = {"t0sz": 25, "sl0": 1, "ps": 2, "root": S2_TABLES[1], "cdmax": cdmax, "cds": GIB + CDS}
    bench.ste(e.CONFIG_NESTED, words=[0] if "STE is invalid" in wrong else None, **fields)
    t0sz = 32 if "address beyond T0SZ" in wrong else 16
    words = bench.cd_words(ips=2, t0sz=t0sz, root=2 * GIB + S1_TABLES[0])
    bench.cd(SSID, words=[0] if "CD is invalid" in wrong else words)
    stage_1(bench, wrong)
    stage_2(bench, wrong)
    bench.forget()


@pytest.fixture(scope="module")
def way():
    bench = Bench()
    yield bench
    bench.close()


def recorded(bench, wrong):
    build(bench, wrong)
    event = bench.fault(VA, WRITE, pasid=SSID)
    assert (event["sid"], event["rnw"]) == (RID, 0)
    return event["id"], event["s2"], event["class"]


def test_nothing_is_wrong_with_the_way_itself(way):
    build(way, ())
    way.memory.write(PAGE + 0x678, b"here")
    assert way.goes(VA, WRITE, pasid=SSID)
    assert way.memory.read(PAGE + 0x678, 4) == bytes(4)


@pytest.mark.parametrize("wrong", ORDER)
def test_each_fault_is_recorded_as_what_it_is(way, wrong):
    assert recorded(way, {wrong}) == ORDER[wrong]


@pytest.mark.parametrize("first", list(ORDER)[:-1])
def test_of_two_faults_the_first_is_recorded(way, first):
    for pair in combinations(ORDER, 2):
        if pair[0] == first:
            assert recorded(way, set(pair)) == ORDER[first], pair
