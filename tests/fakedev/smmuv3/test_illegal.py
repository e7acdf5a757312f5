"""SteIllegal() and CdIllegal() of Arm IHI 0070 (5.2.2, 5.4.2): a row for each illegal encoding, and legal ones."""

import pytest

from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events
from fakedev.smmuv3.regs import STALL_FORCED, STALL_NEVER
from tests.fakedev.smmuv3.bench import PAGE, RID, Bench

VA = 0x1234000

#: What is illegal: the features, the Config, what is changed in the STE.
ILLEGAL_STES = {
    "V is clear": ({}, e.CONFIG_S1, {"words": [e.STE_0_CONFIG.put(5), 0]}),
    "stage 1 not implemented": ({"stage1": False}, e.CONFIG_S1, {}),
    "stage 1 of both not implemented": ({"stage1": False}, e.CONFIG_NESTED, {}),
    "stage 2 not implemented": ({"stage2": False}, e.CONFIG_S2, {}),
    "stage 2 of both not implemented": ({"stage2": False}, e.CONFIG_NESTED, {}),
    "split-stage ATS with stage 1 alone": ({}, e.CONFIG_S1, {"w1": e.STE_1_EATS.put(2)}),
    "split-stage ATS with stage 2 alone": ({}, e.CONFIG_S2, {"w1": e.STE_1_EATS.put(2)}),
    "split-stage ATS with stalls": ({}, e.CONFIG_NESTED, {"w1": e.STE_1_EATS.put(2), "w2": e.STE_2_S2S}),
    "full ATS with stalls at stage 2": ({}, e.CONFIG_S2, {"w1": e.STE_1_EATS.put(1), "w2": e.STE_2_S2S}),
    "S1STALLD without a stall model": ({"stall_model": STALL_NEVER}, e.CONFIG_S1, {"w1": e.STE_1_S1STALLD}),
    "S1STALLD with forced stalls": ({"stall_model": STALL_FORCED}, e.CONFIG_S1, {"w1": e.STE_1_S1STALLD}),
    "S1CDMax beyond SSIDSIZE": ({"ssid_bits": 4}, e.CONFIG_S1, {"cdmax": 5, "w1": 1}),
    "two-level CD table, 4K, not implemented": (
        {"two_level_cd_table": False},
        e.CONFIG_S1,
        {"cdmax": 8, "w0": e.STE_0_S1FMT.put(1), "w1": 2},
    ),
    "two-level CD table, 64K, not implemented": (
        {"two_level_cd_table": False},
        e.CONFIG_S1,
        {"cdmax": 8, "w0": e.STE_0_S1FMT.put(2), "w1": 2},
    ),
    "S1ContextPtr beyond OAS": ({"oas": 40}, e.CONFIG_S1, {"cds": 1 << 40}),
    "S1ContextPtr beyond IAS": ({"oas": 44}, e.CONFIG_NESTED, {"cds": 1 << 44, "t0sz": 20, "ps": 4}),
    "S2S without a stall model": ({"stall_model": STALL_NEVER}, e.CONFIG_S2, {"w2": e.STE_2_S2S}),
    "S2S clear with forced stalls": ({"stall_model": STALL_FORCED}, e.CONFIG_S2, {}),
    "S2AA64 clear": ({}, e.CONFIG_S2, {"clear2": e.STE_2_S2AA64}),
    "S2HA without HTTU": ({"httu": 0}, e.CONFIG_S2, {"w2": e.STE_2_S2HA}),
    "S2HD without HTTU": ({"httu": 0}, e.CONFIG_S2, {"w2": e.STE_2_S2HD}),
    "S2HD with access flags only": ({"httu": 1}, e.CONFIG_S2, {"w2": e.STE_2_S2HA | e.STE_2_S2HD}),
    "S2TG reserved": ({}, e.CONFIG_S2, {"tg": 3}),
    "S2TG 64K not implemented": ({"granules": (12,)}, e.CONFIG_S2, {"tg": 1, "sl0": 1, "t0sz": 24}),
    "S2TG 16K not implemented": ({"granules": (12,)}, e.CONFIG_S2, {"tg": 2, "sl0": 1, "t0sz": 24}),
    "S2TTB beyond S2PS": ({}, e.CONFIG_S2, {"ps": 2, "root": 1 << 40}),
    "S2TTB beyond OAS": ({"oas": 44}, e.CONFIG_S2, {"ps": 5, "root": 1 << 44, "t0sz": 20}),
    "S2TTB beyond 48 bits with 4K": ({"oas": 52}, e.CONFIG_S2, {"ps": 6, "root": 1 << 48}),
    "S2T0SZ too small": ({}, e.CONFIG_S2, {"t0sz": 15}),
    "S2T0SZ smaller than 64 - IAS": ({"oas": 44}, e.CONFIG_S2, {"t0sz": 19, "ps": 4}),
    "S2T0SZ too large": ({}, e.CONFIG_S2, {"t0sz": 40, "sl0": 0}),
    "S2SL0 starts too low": ({}, e.CONFIG_S2, {"t0sz": 16, "sl0": 0}),
    "S2SL0 starts too high": ({}, e.CONFIG_S2, {"t0sz": 34, "sl0": 2}),
    "S2SL0 reserved": ({}, e.CONFIG_S2, {"t0sz": 24, "sl0": 3}),
    "S2SL0 level 0 with 40-bit addresses": ({"oas": 40}, e.CONFIG_S2, {"t0sz": 24, "sl0": 2, "ps": 2}),
    "S2ENDI": ({}, e.CONFIG_S2, {"w2": e.STE_2_S2ENDI}),
    "S2VMID beyond 8 bits": ({"vmid16": False}, e.CONFIG_S2, {"w2": 0x100}),
    "S2VMID beyond 8 bits with stage 1 alone": ({"vmid16": False}, e.CONFIG_S1, {"w2": 0x100}),
}

#: The same with what makes them legal.
LEGAL_STES = {
    "abort ignores everything else": ({}, e.CONFIG_ABORT, {"w1": e.STE_1_EATS.put(2), "w2": e.STE_2_S2ENDI}, False),
    "reserved Config aborts": ({}, 3, {}, False),
    "bypass ignores stage fields": ({"stage1": False}, e.CONFIG_BYPASS, {"w0": 1 << 50, "w2": e.STE_2_S2HA}, True),
    "stage 1 ignores stage 2 fields": ({}, e.CONFIG_S1, {"w2": e.STE_2_S2ENDI | e.STE_2_S2TG.put(3)}, True),
    "stage 2 ignores stage 1 fields": ({"ssid_bits": 0}, e.CONFIG_S2, {"w0": 31 << 59, "w1": e.STE_1_S1STALLD}, True),
    "split-stage ATS with both": ({}, e.CONFIG_NESTED, {"w1": e.STE_1_EATS.put(2)}, True),
    "EATS is ignored without ATS": (
        {"ats": False, "pri": False},
        e.CONFIG_S2,
        {"w1": e.STE_1_EATS.put(2)},
        True,
    ),
    "EATS 3 means none without a DPT": ({}, e.CONFIG_S2, {"w1": e.STE_1_EATS.put(3)}, True),
    "S1STALLD where stalls are a choice": ({}, e.CONFIG_S1, {"w1": e.STE_1_S1STALLD}, True),
    "S1CDMax is ignored without substreams": ({"ssid_bits": 0}, e.CONFIG_S1, {"cdmax": 20}, True),
    "S2S where stalls are a choice": ({}, e.CONFIG_S2, {"w2": e.STE_2_S2S}, True),
    "S2HA with access flags": ({"httu": 1}, e.CONFIG_S2, {"w2": e.STE_2_S2HA}, True),
    "S2HD alone does nothing": ({}, e.CONFIG_S2, {"w2": e.STE_2_S2HD}, True),
    "S2PS reserved is the largest": ({}, e.CONFIG_S2, {"ps": 7}, True),
    "S2VMID of 16 bits": ({}, e.CONFIG_S2, {"w2": 0xFF00}, True),
    "S2VMID is ignored without stage 2": ({"stage2": False, "vmid16": False}, e.CONFIG_S1, {"w2": 0xFF00}, True),
    "STRW is ignored without EL2": ({}, e.CONFIG_S1, {"w1": e.STE_1_STRW.put(3)}, True),
}


def set_up(features, config, changes):
    """A bench with one page mapped at both stages (VA to PAGE; IPAs of the first GiB to themselves)."""
    bench = Bench(**features)
    changes = dict(changes)
    cleared = changes.pop("clear2", 0)
    if "words" not in changes:
        words = bench.ste_words(config, **changes)
        words[2] &= ~cleared
        changes = {"words": words}
    bench.ste(config, **changes)
    bench.cd(w0=e.CD_0_S if features.get("stall_model") == STALL_FORCED else 0)
    bench.map(VA, PAGE)
    bench.identity2()
    return bench


@pytest.mark.parametrize("what", ILLEGAL_STES)
def test_illegal_ste_is_c_bad_ste(what):
    bench = set_up(*ILLEGAL_STES[what])
    event = bench.fault(VA)
    bench.close()
    assert event["words"] == [RID << 32 | events.C_BAD_STE, 0, 0, 0]


@pytest.mark.parametrize("what", LEGAL_STES)
def test_legal_ste_records_nothing(what):
    features, config, changes, goes = LEGAL_STES[what]
    bench = set_up(features, config, changes)
    went, event = bench.goes(VA), bench.event()
    bench.close()
    assert (went, event) == (goes, None)


ILLEGAL_CDS = {
    "V is clear": ({}, {"words": [e.CD_0_AA64 | e.CD_0_A, 0]}, 0),
    "S with S1STALLD": ({}, {"w0": e.CD_0_S}, e.STE_1_S1STALLD),
    "A is clear with TERM_MODEL": ({}, {"clear": e.CD_0_A}, 0),
    "S without a stall model": ({"stall_model": STALL_NEVER}, {"w0": e.CD_0_S}, 0),
    "S clear with forced stalls": ({"stall_model": STALL_FORCED}, {}, 0),
    "ENDI": ({}, {"w0": e.CD_0_ENDI}, 0),
    "AA64 is clear": ({}, {"clear": e.CD_0_AA64}, 0),
    "HA without HTTU": ({"httu": 0}, {"w0": e.CD_0_HA}, 0),
    "HD without HTTU": ({"httu": 0}, {"w0": e.CD_0_HD}, 0),
    "HD with access flags only": ({"httu": 1}, {"w0": e.CD_0_HA | e.CD_0_HD}, 0),
    "ASID beyond 8 bits": ({"asid16": False}, {"asid": 0x100}, 0),
    "T0SZ too small": ({}, {"t0sz": 15}, 0),
    "T0SZ too large": ({}, {"t0sz": 40}, 0),
    "T1SZ too small": ({}, {"t1sz": 15, "epd1": False}, 0),
    "T1SZ too large": ({}, {"t1sz": 40, "epd1": False}, 0),
    "T0SZ of 52 bits with 4K": ({"oas": 52, "vax52": True}, {"t0sz": 12}, 0),
    "TG0 reserved": ({}, {"tg0": 3}, 0),
    "TG0 64K not implemented": ({"granules": (12, 14)}, {"tg0": 1}, 0),
    "TG0 16K not implemented": ({"granules": (12, 16)}, {"tg0": 2}, 0),
    "TG1 reserved": ({}, {"tg1": 0, "epd1": False}, 0),
    "TG1 16K not implemented": ({"granules": (12,)}, {"tg1": 1, "epd1": False}, 0),
    "TTB0 beyond IPS": ({}, {"ips": 0, "root": 1 << 32}, 0),
    "TTB0 beyond OAS": ({"oas": 40}, {"ips": 5, "root": 1 << 40}, 0),
    "TTB0 beyond 48 bits with 4K": ({"oas": 52}, {"ips": 6, "root": 1 << 48}, 0),
    "TTB1 beyond IPS": ({}, {"ips": 0, "w2": 1 << 32, "epd1": False}, 0),
}

LEGAL_CDS = {
    "T1SZ is ignored with EPD1": {"t1sz": 3},
    "TG1 is ignored with EPD1": {"tg1": 0},
    "TTB1 is ignored with EPD1": {"ips": 0, "w2": 1 << 40},
    "IPS reserved is the largest": {"ips": 7},
    "HD alone does nothing": {"w0": e.CD_0_HD},
    "S where stalls are a choice": {"w0": e.CD_0_S},
    "ASID of 16 bits": {"asid": 0xFFFF},
    "T0SZ of 25 bits": {"t0sz": 39},
}


def set_up_cd(features, changes, w1=0):
    bench = Bench(**features)
    bench.ste(w1=w1)
    changes = dict(changes)
    cleared = changes.pop("clear", 0)
    words = changes.get("words") or bench.cd_words(**changes)
    bench.cd(words=[words[0] & ~cleared, *words[1:]])
    bench.map(VA, PAGE)
    return bench


@pytest.mark.parametrize("what", ILLEGAL_CDS)
def test_illegal_cd_is_c_bad_cd(what):
    bench = set_up_cd(*ILLEGAL_CDS[what])
    event = bench.fault(VA)
    bench.close()
    assert event["words"] == [RID << 32 | events.C_BAD_CD, 0, 0, 0]


@pytest.mark.parametrize("what", LEGAL_CDS)
def test_legal_cd_translates(what):
    bench = set_up_cd({}, LEGAL_CDS[what])
    if LEGAL_CDS[what].get("t0sz") == 39:
        bench.map(VA, PAGE, levels=2)
    went, event = bench.goes(VA), bench.event()
    bench.close()
    assert (went, event) == (True, None)


def test_disabled_ttb0_makes_its_fields_ignored_and_its_addresses_translation_faults():
    bench = set_up_cd({}, {"w0": e.CD_0_EPD0 | e.CD_0_ENDI, "t0sz": 3, "tg0": 3})
    event = bench.fault(VA)
    bench.close()
    assert (event["id"], event["s2"], event["class"]) == (events.F_TRANSLATION, 0, events.CLASS_IN)


def test_cds_illegal_for_one_ste_are_legal_for_another():
    bench = set_up_cd({}, {"w0": e.CD_0_S}, e.STE_1_S1STALLD)
    assert bench.fault(VA)["id"] == events.C_BAD_CD
    bench.ste()
    bench.forget()
    assert bench.goes(VA)
    bench.close()
