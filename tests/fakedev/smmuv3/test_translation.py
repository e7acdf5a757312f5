"""Stage 1, stage 2 and both: what an address is translated to, and every fault with the fields of its record."""

import pytest

from fakedev.dma import WRITE
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events
from tests.fakedev.smmuv3.bench import NOWHERE, PAGE, RID, S1_LEAF, S1_TABLES, S2_LEAF, S2_TABLES, Bench

VA = 0x1234000
TTB1_TABLES = [0x50_0000 + 0x10000 * n for n in range(4)]
AF, DBM, RO, S2_W = 1 << 10, 1 << 51, 1 << 7, 1 << 7
IN, TT, CD = events.CLASS_IN, events.CLASS_TT, events.CLASS_CD


@pytest.fixture
def one(bench):
    """Stage 1 alone."""
    bench.ste()
    bench.cd()
    bench.memory.write(PAGE, b"here")
    return bench


@pytest.fixture
def two(bench):
    """Stage 2 alone."""
    bench.ste(e.CONFIG_S2)
    bench.memory.write(PAGE, b"here")
    return bench


@pytest.fixture
def both(bench):
    """Both; all structures lie in an IPA that is its PA."""
    bench.ste(e.CONFIG_NESTED)
    bench.cd()
    bench.identity2()
    bench.memory.write(PAGE, b"here")
    return bench


def fields(event, *names):
    return tuple(event[name] for name in names)


# -- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granule", "tg", "t0sz", "levels", "level"),
    [
        (12, 0, 16, 4, 0),
        (12, 0, 16, 4, 1),
        (12, 0, 16, 4, 2),
        (12, 0, 25, 3, 0),
        (12, 0, 34, 2, 0),
        (14, 2, 17, 3, 0),
        (14, 2, 17, 3, 1),
        (14, 2, 16, 4, 0),
        (14, 2, 28, 2, 0),
        (16, 1, 16, 3, 0),
        (16, 1, 16, 3, 1),
        (16, 1, 22, 2, 0),
    ],
)
def test_stage_1_by_granule_and_size(bench, granule, tg, t0sz, levels, level):
    lg2 = granule + (granule - 3) * level
    va, pa = (3 << lg2) & (1 << 64 - t0sz) - 1, 1 << max(lg2, 26)
    bench.ste()
    bench.cd(tg0=tg, t0sz=t0sz)
    bench.map(va, pa, granule=granule, levels=levels, level=level)
    _, end, delta, _ = bench.unit.translate(bench.dma, -1, va + 0x123, 4, 1)
    assert delta == pa - va
    assert end == va + (1 << lg2)


def test_contiguous_hint_is_one_entry(one):
    for n in range(16):
        one.map(0x40000 + 0x1000 * n, PAGE + 0x1000 * n, S1_LEAF | 1 << 52)
    assert one.goes(0x45000)
    assert one.unit.tlb.lookup(9 << 20 | 5, 0x4F000)[:2] == (0x40000, 0x50000)


@pytest.mark.parametrize("address", [1 << 48, 1 << 47 | 1 << 60, (1 << 64) - 0x1000, 1 << 55, 0xFF << 56])
def test_address_outside_ttb0_is_f_translation(one, address):
    """Beyond T0SZ; with a top byte that TBI does not ignore; in TTB1, which EPD1 disables."""
    one.map(0, PAGE)
    assert fields(one.fault(address), "id", "s2", "class", "address") == (events.F_TRANSLATION, 0, IN, address)


def test_both_ttbs(one):
    one.cd(epd1=False, w2=TTB1_TABLES[0], t1sz=25, tg1=2)
    one.map(VA, PAGE)
    high = (1 << 64) - 0x2000
    one.map(high, PAGE + 0x1000, levels=3, tables=TTB1_TABLES)
    one.memory.write(PAGE + 0x1000, b"high")
    assert (one.dma.read(VA, 4), one.dma.read(high, 4)) == (b"here", b"high")
    assert one.fault((1 << 64) - (1 << 39) - 0x1000)["id"] == events.F_TRANSLATION
    assert one.fault(1 << 47)["id"] == events.F_TRANSLATION


def test_ttb1_alone(one):
    one.cd(w0=e.CD_0_EPD0, epd1=False, w2=TTB1_TABLES[0], t1sz=25, tg1=2)
    high = (1 << 64) - 0x2000
    one.map(high, PAGE, levels=3, tables=TTB1_TABLES)
    assert one.dma.read(high, 4) == b"here"
    assert one.fault(VA)["id"] == events.F_TRANSLATION


def test_top_byte_is_ignored_with_tbi(one):
    one.cd(w0=e.CD_0_TBI0)
    one.map(VA, PAGE)
    assert one.dma.read(0xA5 << 56 | VA, 4) == b"here"
    assert one.dma.read(0x5A << 56 | VA, 4) == b"here"
    assert one.unit.tlb.lookup(9 << 20 | 5, VA) is not None
    assert one.fault(0xA5 << 56 | 0x9000)["address"] == 0xA5 << 56 | 0x9000


@pytest.mark.parametrize("level", [3, 2, 1, 0])
def test_hole_at_any_level_is_f_translation(one, level):
    one.map(VA, PAGE)
    table = S1_TABLES[3 - level]
    one.word(table + 8 * (VA >> 12 + 9 * level & 511), 0)
    event = one.fault(VA, WRITE)
    assert event["words"] == [
        RID << 32 | events.F_TRANSLATION,
        events.EVT_1_CLASS.put(IN),
        VA,
        0,
    ]


@pytest.mark.parametrize("level", [3, 2, 1, 0])
def test_address_beyond_ips_at_any_level_is_f_addr_size(one, level):
    one.cd(ips=2)
    one.map(VA, PAGE)
    table = S1_TABLES[3 - level] + 8 * (VA >> 12 + 9 * level & 511)
    one.word(table, one.load(table) | 1 << 40)
    assert fields(one.fault(VA), "id", "s2", "class", "last") == (events.F_ADDR_SIZE, 0, IN, 0)


def test_address_size_comes_before_the_access_flag(one):
    one.cd(ips=2)
    one.map(VA, PAGE | 1 << 40, S1_LEAF & ~AF)
    assert one.fault(VA)["id"] == events.F_ADDR_SIZE


@pytest.mark.parametrize("level", [3, 2, 1, 0])
def test_table_that_memory_refuses_is_f_walk_eabt(one, level):
    one.map(VA, PAGE)
    offset = 8 * (VA >> 12 + 9 * level & 511)
    if level == 3:
        one.cd(root=NOWHERE)
    else:
        above = S1_TABLES[2 - level] + 8 * (VA >> 21 + 9 * level & 511)
        one.word(above, NOWHERE | 3)
    event = one.fault(VA)
    assert fields(event, "id", "s2", "class", "address", "last") == (
        events.F_WALK_EABT,
        0,
        TT,
        VA,
        NOWHERE + offset,
    )


def test_clear_access_flag_is_f_access(one):
    one.map(VA, PAGE, S1_LEAF & ~AF)
    assert fields(one.fault(VA), "id", "s2", "class") == (events.F_ACCESS, 0, IN)


def test_clear_access_flag_goes_with_affd(one):
    one.cd(w0=e.CD_0_AFFD)
    one.map(VA, PAGE, S1_LEAF & ~AF)
    assert one.goes(VA)


def test_access_flag_comes_before_permission(one):
    one.map(VA, PAGE, S1_LEAF & ~AF | RO)
    assert one.fault(VA, WRITE)["id"] == events.F_ACCESS


def test_write_to_read_only_is_f_permission(one):
    one.map(VA, PAGE, S1_LEAF | RO)
    assert one.goes(VA)
    one.dma.forget()
    event = one.fault(VA + 4, WRITE)
    assert event["words"] == [RID << 32 | events.F_PERMISSION, events.EVT_1_CLASS.put(IN), VA + 4, 0]


def test_permission_fault_on_a_cached_translation_is_recorded_again(one):
    one.map(VA, PAGE, S1_LEAF | RO)
    assert [one.fault(VA, WRITE)["id"] for _ in range(3)] == [events.F_PERMISSION] * 3


NO_UNPRIVILEGED, UXN, PXN = 1 << 6, 1 << 54, 1 << 53


@pytest.mark.parametrize(
    ("set_", "clear", "how", "goes"),
    [
        (0, NO_UNPRIVILEGED, {}, False),
        (0, NO_UNPRIVILEGED, {"privileged": True}, True),
        (0, 0, {"execute": True}, True),
        (UXN, 0, {"execute": True}, False),
        (PXN, 0, {"execute": True}, True),
        (0, 0, {"execute": True, "privileged": True}, False),  # what EL0 may write, EL1 does not execute
        (RO, 0, {"execute": True, "privileged": True}, True),
        (RO | PXN, 0, {"execute": True, "privileged": True}, False),
        (0, NO_UNPRIVILEGED, {"execute": True}, True),  # execute-only
    ],
)
def test_privilege_and_execution(bench, set_, clear, how, goes):
    bench.ste(cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    bench.cd(1)
    bench.map(VA, PAGE, (S1_LEAF | set_) & ~clear)
    assert bench.goes(VA, pasid=1, **how) == goes
    if not goes:
        event = bench.event()
        assert fields(event, "id", "ssid", "pnu", "ind", "rnw") == (
            events.F_PERMISSION,
            1,
            int(how.get("privileged", False)),
            int(how.get("execute", False)),
            1,
        )


@pytest.mark.parametrize(
    ("bit", "access", "how", "goes"),
    [
        (1 << 62, WRITE, {}, False),
        (1 << 62, 1, {}, True),
        (1 << 61, 1, {}, False),
        (1 << 61, 1, {"privileged": True}, True),
        (1 << 60, 1, {"execute": True}, False),
        (1 << 59, 1, {"execute": True}, True),
    ],
)
@pytest.mark.parametrize("level", [3, 2, 1])
def test_hierarchical_permissions_and_their_disabling(bench, bit, access, how, goes, level):
    bench.ste(cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    bench.cd(1)
    bench.map(VA, PAGE)
    where = S1_TABLES[3 - level] + 8 * (VA >> 12 + 9 * level & 511)
    bench.word(where, bench.load(where) | bit)
    assert bench.goes(VA, access, pasid=1, **how) == goes
    bench.cd(1, w1=e.CD_HAD)
    bench.forget()
    assert bench.goes(VA, access, pasid=1, **how)


def test_pan_and_wxn(bench):
    bench.ste(cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    bench.map(VA, PAGE)
    bench.cd(1, w0=e.CD_0_PAN)
    assert bench.goes(VA, pasid=1)
    assert bench.fault(VA, pasid=1, privileged=True)["id"] == events.F_PERMISSION
    bench.cd(1, w0=e.CD_0_WXN)
    bench.forget()
    assert bench.fault(VA, pasid=1, execute=True)["id"] == events.F_PERMISSION


@pytest.mark.parametrize(
    ("privcfg", "instcfg", "how", "pnu", "ind"),
    [
        (0, 0, {}, 0, 0),
        (3, 0, {}, 1, 0),
        (2, 0, {"privileged": True}, 0, 0),
        (1, 1, {"privileged": True, "execute": True}, 1, 1),
        (0, 3, {}, 0, 1),
        (0, 2, {"execute": True}, 0, 0),
    ],
)
def test_overrides_are_in_the_record(bench, privcfg, instcfg, how, pnu, ind):
    bench.ste(
        cdmax=4,
        w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0) | e.STE_1_PRIVCFG.put(privcfg) | e.STE_1_INSTCFG.put(instcfg),
    )
    bench.cd(1)
    assert fields(bench.fault(VA, pasid=1, **how), "pnu", "ind", "rnw") == (pnu, ind, 1)
    if not how.get("execute"):
        assert fields(bench.fault(VA, WRITE, pasid=1, **how), "pnu", "ind", "rnw") == (pnu, 0, 0)


def test_no_record_with_r_clear(one):
    words = one.cd_words()
    one.cd(words=[words[0] & ~e.CD_0_R, *words[1:]])
    assert one.fault(VA) is None
    one.cd(words=[words[0] & ~e.CD_0_R, NOWHERE, 0])
    one.forget()
    assert one.fault(VA)["id"] == events.F_WALK_EABT  # R silences the four translation-related faults only


# -- access flag and dirty state -------------------------------------------------------------------------------------


def leaf(bench, tables=S1_TABLES):
    return bench.load(tables[3] + 8 * (VA >> 12 & 511))


def test_hardware_sets_the_access_flag(one):
    one.cd(w0=e.CD_0_HA)
    one.map(VA, PAGE, S1_LEAF & ~AF)
    assert one.goes(VA)
    assert leaf(one) == PAGE | S1_LEAF | 2


def test_hardware_sets_the_dirty_state_with_the_first_write(one):
    one.cd(w0=e.CD_0_HA | e.CD_0_HD)
    one.map(VA, PAGE, S1_LEAF | DBM | RO)
    assert one.goes(VA)
    assert leaf(one) & RO
    assert one.goes(VA, WRITE)
    assert not leaf(one) & RO
    assert one.event() is None


def test_dirty_state_needs_dbm_and_hd(one):
    one.cd(w0=e.CD_0_HA | e.CD_0_HD)
    one.map(VA, PAGE, S1_LEAF | RO)
    assert one.fault(VA, WRITE)["id"] == events.F_PERMISSION
    one.map(VA, PAGE, S1_LEAF | RO | DBM)
    one.cd(w0=e.CD_0_HA)
    one.forget()
    assert one.fault(VA, WRITE)["id"] == events.F_PERMISSION
    assert leaf(one) & RO


def test_each_page_of_one_write_gets_its_own_dirty_state(one):
    one.cd(w0=e.CD_0_HA | e.CD_0_HD)
    for n in range(4):
        one.map(VA + 0x1000 * n, PAGE + 0x1000 * n, S1_LEAF | DBM | RO)
    one.dma.read(VA, 0x4000)
    one.dma.write(VA + 0x1000, bytes(0x1800))
    dirty = [not one.load(S1_TABLES[3] + 8 * ((VA >> 12) + n & 511)) & RO for n in range(4)]
    assert dirty == [False, True, True, False]


def test_software_that_cleans_a_page_without_tlbi_is_not_told_of_the_next_write(one):
    one.cd(w0=e.CD_0_HA | e.CD_0_HD)
    one.map(VA, PAGE, S1_LEAF | DBM | RO)
    assert one.goes(VA, WRITE)
    one.map(VA, PAGE, S1_LEAF | DBM | RO)
    assert one.goes(VA, WRITE)
    assert leaf(one) & RO
    one.forget()
    assert one.goes(VA, WRITE)
    assert not leaf(one) & RO


def test_stage_2_dirty_state_in_a_nested_translation(both):
    both.ste(e.CONFIG_NESTED, w2=e.STE_2_S2HA | e.STE_2_S2HD)
    both.map(VA, 0x40000000)
    both.map2(0x40000000, PAGE, (S2_LEAF & ~S2_W | DBM) & ~AF)
    where = S2_TABLES[3]
    assert both.goes(VA)
    assert both.load(where) & (AF | S2_W) == AF
    assert both.goes(VA, WRITE)
    assert both.load(where) & (AF | S2_W) == AF | S2_W


def test_flag_written_into_a_read_only_stage_1_table_is_f_permission_of_a_write(both):
    """TTRnW tells that it was a write, though the request reads."""
    both.cd(w0=e.CD_0_HA, root=0x40000000)
    for n, table in enumerate(S1_TABLES[:4]):
        both.map2(0x40000000 + 0x10000 * n, table, S2_LEAF if n < 3 else S2_LEAF & ~S2_W)
    tables = [0x40000000 + 0x10000 * n for n in range(4)]
    for n in range(3):
        both.word(S1_TABLES[n] + 8 * (VA >> 39 - 9 * n & 511), tables[n + 1] | 3)
    both.word(S1_TABLES[3] + 8 * (VA >> 12 & 511), PAGE | S1_LEAF & ~AF | 2)
    event = both.fault(VA)
    assert fields(event, "id", "s2", "class", "rnw", "ttrnw", "last") == (
        events.F_PERMISSION,
        1,
        TT,
        1,
        0,
        tables[3],
    )


# -- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granule", "tg", "t0sz", "sl0", "levels"),
    [
        (12, 0, 16, 2, 4),
        (12, 0, 24, 1, 3),  # two concatenated tables
        (12, 0, 21, 1, 3),  # sixteen
        (12, 0, 34, 0, 2),
        (12, 0, 33, 0, 2),  # two
        (14, 2, 17, 2, 3),
        (14, 2, 16, 2, 3),  # two
        (14, 2, 28, 1, 2),
        (14, 2, 24, 1, 2),  # sixteen
        (16, 1, 16, 2, 3),
        (16, 1, 22, 1, 2),
        (16, 1, 19, 1, 2),  # eight
    ],
)
def test_stage_2_by_granule_size_and_start_level(bench, granule, tg, t0sz, sl0, levels):
    root = 0x100_0000
    bench.ste(e.CONFIG_S2, t0sz=t0sz, sl0=sl0, tg=tg, root=root)
    ipa = (1 << 64 - t0sz) - (2 << granule)  # the last but one page: the last concatenated table
    top = levels - 1
    stride = granule - 3
    tables = [root, *S2_TABLES[1:]]
    index = ipa >> granule + stride * top
    bench.word(root + 8 * index, tables[1] | 3)
    for level in range(top - 1, 0, -1):
        bench.word(
            tables[top - level] + 8 * (ipa >> granule + stride * level & (1 << stride) - 1), tables[levels - level] | 3
        )
    bench.word(tables[top] + 8 * (ipa >> granule & (1 << stride) - 1), PAGE | S2_LEAF | 2)
    bench.memory.write(PAGE, b"here")
    assert bench.dma.read(ipa, 4) == b"here"
    assert bench.event() is None


def test_ipa_outside_s2t0sz_is_f_translation_of_stage_2(two):
    two.ste(e.CONFIG_S2, t0sz=25, sl0=1)
    address = 1 << 39
    assert fields(two.fault(address), "id", "s2", "class", "address", "last") == (
        events.F_TRANSLATION,
        1,
        IN,
        address,
        address,
    )


@pytest.mark.parametrize(
    ("bits", "access", "number"),
    [
        (0, 1, events.F_TRANSLATION),
        (S2_LEAF & ~AF, 1, events.F_ACCESS),
        (S2_LEAF & ~S2_W, WRITE, events.F_PERMISSION),
        (S2_LEAF & ~(1 << 6), 1, events.F_PERMISSION),
        (S2_LEAF | 1 << 44, 1, events.F_ADDR_SIZE),
    ],
)
def test_stage_2_faults(two, bits, access, number):
    two.ste(e.CONFIG_S2, ps=4)
    two.map2(0x5000, PAGE, bits)
    if not bits:
        two.word(S2_TABLES[3] + 8 * 5, 0)
    event = two.fault(0x5124, access)
    assert fields(event, "id", "s2", "class", "address", "last", "rnw") == (
        number,
        1,
        IN,
        0x5124,
        0x5000,
        int(access == 1),
    )


def test_stage_2_table_that_memory_refuses_is_f_walk_eabt(two):
    two.word(S2_TABLES[0], NOWHERE | 3)
    event = two.fault(0x5000)
    assert fields(event, "id", "s2", "class", "last") == (events.F_WALK_EABT, 1, IN, NOWHERE)


def test_no_stage_2_record_with_s2r_clear(two):
    words = two.ste_words(e.CONFIG_S2)
    words[2] &= ~e.STE_2_S2R
    two.ste(words=words)
    assert two.fault(0x5000) is None


# -- both ------------------------------------------------------------------------------------------------------------


def test_nested_translation(both):
    both.map(VA, 0x40005000)
    both.map2(0x40005000, PAGE)
    assert both.dma.read(VA, 4) == b"here"


def test_nested_entry_is_as_large_as_the_smaller_leaf(both):
    both.map(0x40000000, 0, level=2)
    both.map2(0x40000000, PAGE)
    assert both.goes(0x40000000 + PAGE)
    assert both.unit.tlb.lookup(9 << 20 | 5, 0x40000000) is not None  # a GiB at both stages
    both.map(VA, 0x40000000)
    both.dma.forget()
    assert both.goes(VA)
    assert both.unit.tlb.lookup(9 << 20 | 5, VA)[:2] == (VA, VA + 0x1000)


def test_stage_1_block_over_scattered_stage_2_pages(both):
    both.map(0x20_0000, 0x4000_0000, level=1)
    for n in range(4):
        both.map2(0x4000_0000 + 0x1000 * n, PAGE + 0x5000 * n)
        both.memory.write(PAGE + 0x5000 * n, bytes([n]))
    assert [both.dma.read(0x20_0000 + 0x1000 * n, 1)[0] for n in range(4)] == [0, 1, 2, 3]
    assert both.fault(0x20_4000)["last"] == 0x4000_4000


def test_stage_1_fault_of_a_nested_translation(both):
    assert fields(both.fault(VA), "id", "s2", "class", "last") == (events.F_TRANSLATION, 0, IN, 0)


def test_output_that_stage_2_does_not_map(both):
    both.map(VA, 0x40005000)
    event = both.fault(VA + 0x123, WRITE)
    assert fields(event, "id", "s2", "class", "address", "last", "rnw") == (
        events.F_TRANSLATION,
        1,
        IN,
        VA + 0x123,
        0x40005000,
        0,
    )


def test_output_beyond_s2t0sz(both):
    both.ste(e.CONFIG_NESTED, t0sz=25, sl0=1, root=S2_TABLES[1])
    both.map(VA, 1 << 40)
    assert fields(both.fault(VA), "id", "s2", "class", "last") == (events.F_TRANSLATION, 1, IN, 1 << 40)


def test_stage_1_table_that_stage_2_does_not_map(both):
    both.map(VA, PAGE)
    both.word(S1_TABLES[1], 0x40007000 | 3)
    event = both.fault(VA, WRITE)
    assert fields(event, "id", "s2", "class", "last", "rnw") == (events.F_TRANSLATION, 1, TT, 0x40007000, 0)


def test_stage_1_table_without_read_permission_at_stage_2(both):
    both.word(S1_TABLES[0], 0x40007000 | 3)
    both.map2(0x40007000, PAGE, S2_LEAF & ~(1 << 6))
    event = both.fault(VA)
    assert fields(event, "id", "s2", "class", "last", "ttrnw") == (events.F_PERMISSION, 1, TT, 0x40007000, 1)


def test_stage_1_table_where_nobody_answers_has_the_physical_address(both):
    both.word(S1_TABLES[0], 0x40007000 | 3)
    both.map2(0x40007000, NOWHERE)
    event = both.fault(VA)
    assert fields(event, "id", "s2", "class", "last") == (events.F_WALK_EABT, 0, TT, NOWHERE)


def test_stage_2_permission_fault_on_a_cached_nested_translation_has_its_ipa(both):
    both.map(VA, 0x40005000)
    both.map2(0x40005000, PAGE, S2_LEAF & ~S2_W)
    assert both.goes(VA)
    event = both.fault(VA, WRITE)
    assert fields(event, "id", "s2", "class", "last") == (events.F_PERMISSION, 1, IN, 0x40005000)


def test_stage_1_permission_comes_before_stage_2(both):
    both.map(VA, 0x40005000, S1_LEAF | RO)
    both.map2(0x40005000, PAGE, S2_LEAF & ~S2_W)
    for _ in range(2):  # from the tables, then from the TLB
        assert fields(both.fault(VA, WRITE), "id", "s2") == (events.F_PERMISSION, 0)
        assert both.goes(VA)
        both.dma.forget()


def test_s2_execute_never_tells_privileges_apart(bench):
    bench.ste(e.CONFIG_NESTED, cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    bench.cd(1)
    bench.identity2()
    bench.map(VA, 0x40005000, S1_LEAF | RO)
    for xn, unprivileged, privileged in ((0, 1, 1), (1, 1, 0), (2, 0, 0), (3, 0, 1)):
        bench.map2(0x40005000, PAGE, S2_LEAF | xn << 53)
        bench.forget()
        assert bench.goes(VA, pasid=1, execute=True) == bool(unprivileged)
        assert bench.goes(VA, pasid=1, execute=True, privileged=True) == bool(privileged)


def test_52_bit_addresses_with_64_kib():
    bench = Bench(oas=52, vax52=True, granules=(16,))
    bench.ste()
    bench.cd(t0sz=12, tg0=1, ips=6)
    va, pa = 1 << 51, 0x000F_0000_0010_0000
    bench.map(va, 0, granule=16, levels=3)
    last = S1_TABLES[2]
    bench.word(S1_TABLES[0] + 8 * (va >> 42), S1_TABLES[1] | 3)
    bench.word(last, pa & (1 << 48) - 1 | (pa >> 48) << 12 | S1_LEAF | 2)
    assert bench.unit.translate(bench.dma, -1, va, 4, 1)[2] == pa - va
    bench.close()
