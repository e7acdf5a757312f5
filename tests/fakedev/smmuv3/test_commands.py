"""The command queue: what each TLBI removes and leaves, errors, SYNC's signals, stalls (Arm IHI 0070 chapter 4)."""

import pytest

from fakedev.dma import WRITE, Outcome
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from fakedev.smmuv3.regs import STALL_FORCED, STALL_MAX, STALL_NEVER
from tests.fakedev.smmuv3.bench import (
    ASID,
    CMDQ,
    NOWHERE,
    PAGE,
    QUEUE_LOG2,
    RID,
    S1_LEAF,
    S1_TABLES,
    S2_TABLES,
    VMID,
    Bench,
)

VA = 0x1234000
GLOBAL_LEAF = S1_LEAF & ~(1 << 11)
FAULT = "fault"


def hole(bench, va=VA, tables=S1_TABLES, level=0):
    """Take a leaf away in memory, and no more."""
    bench.word(tables[3 - level] + 8 * (va >> 12 + 9 * level & 511), 0)


@pytest.fixture
def one(bench):
    bench.ste()
    bench.cd()
    bench.map(VA, PAGE)
    assert bench.goes(VA)
    hole(bench)
    return bench


# -- which TLBI removes what -----------------------------------------------------------------------------------------

TLBIS = {
    "NH_ALL": (c.tlbi_nh_all(VMID), True, True, False),
    "NH_ALL of another VMID": (c.tlbi_nh_all(VMID + 1), False, False, False),
    "NH_ASID": (c.tlbi_nh_asid(VMID, ASID), True, False, False),
    "NH_ASID of another ASID": (c.tlbi_nh_asid(VMID, ASID + 1), False, False, False),
    "NH_ASID of another VMID": (c.tlbi_nh_asid(VMID + 1, ASID), False, False, False),
    "NH_VA": (c.tlbi_nh_va(VMID, ASID, VA), True, True, False),
    "NH_VA, leaf": (c.tlbi_nh_va(VMID, ASID, VA, leaf=True), True, True, False),
    "NH_VA of another ASID": (c.tlbi_nh_va(VMID, ASID + 1, VA), False, True, False),
    "NH_VA of another VMID": (c.tlbi_nh_va(VMID + 1, ASID, VA), False, False, False),
    "NH_VA of the page before": (c.tlbi_nh_va(VMID, ASID, VA - 0x1000), False, False, False),
    "NH_VA of the page after": (c.tlbi_nh_va(VMID, ASID, VA + 0x1000), False, False, False),
    "NH_VAA": (c.tlbi_nh_vaa(VMID, VA), True, True, False),
    "NH_VAA of another VMID": (c.tlbi_nh_vaa(VMID + 1, VA), False, False, False),
    "S12_VMALL": (c.tlbi_s12_vmall(VMID), True, True, True),
    "S12_VMALL of another VMID": (c.tlbi_s12_vmall(VMID + 1), False, False, False),
    "S2_IPA": (c.tlbi_s2_ipa(VMID, VA), False, False, True),
    "S2_IPA of another VMID": (c.tlbi_s2_ipa(VMID + 1, VA), False, False, False),
    "S2_IPA of the page before": (c.tlbi_s2_ipa(VMID, VA - 0x1000), False, False, False),
    "NSNH_ALL": (c.tlbi_nsnh_all(), True, True, True),
    "CFGI_ALL": (c.cfgi_all(), False, False, False),
    "SYNC": (c.sync(), False, False, False),
    "range before": (c.tlbi_nh_va(VMID, ASID, VA - 0x4000, tg=1, num=3), False, False, False),
    "range that ends with it": (c.tlbi_nh_va(VMID, ASID, VA - 0x3000, tg=1, num=3), True, True, False),
    "range by scale": (c.tlbi_nh_va(VMID, ASID, VA - 0x4000, tg=1, num=1, scale=2), True, True, False),
    "range that ends before": (c.tlbi_nh_va(VMID, ASID, VA - 0x4000, tg=1, num=0, scale=2), False, False, False),
    "everything by scale": (c.tlbi_nh_vaa(VMID, 0, tg=1, num=31, scale=47), True, True, False),
    "level hint": (c.tlbi_nh_va(VMID, ASID, VA, tg=1, ttl=3), True, True, False),
    "wrong level hint": (c.tlbi_nh_va(VMID, ASID, VA, tg=1, ttl=2), False, False, False),
    "wrong granule": (c.tlbi_nh_va(VMID, ASID, VA & -0x10000, tg=3, ttl=3), False, False, False),
    "range of stage 2": (c.tlbi_s2_ipa(VMID, VA - 0x3000, tg=1, num=3), False, False, True),
    "stage 2 level hint": (c.tlbi_s2_ipa(VMID, VA, tg=1, ttl=3), False, False, True),
    "wrong stage 2 level hint": (c.tlbi_s2_ipa(VMID, VA, tg=1, ttl=1), False, False, False),
}


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["stage 1", "global", "stage 2"])
@pytest.mark.parametrize("what", TLBIS)
def test_tlbi_removes_what_it_names(bench, what, kind):
    command, *removes = TLBIS[what]
    if kind == 2:
        bench.ste(e.CONFIG_S2)
        bench.map2(VA, PAGE)
    else:
        bench.ste()
        bench.cd()
        bench.map(VA, PAGE, GLOBAL_LEAF if kind else S1_LEAF)
    assert bench.goes(VA)
    hole(bench, tables=S2_TABLES if kind == 2 else S1_TABLES)
    bench.submit(command)
    assert bench.command_error() is None
    assert bench.goes(VA) != removes[kind]


def test_tlbi_of_one_page_of_a_transfer_leaves_the_others(bench):
    bench.ste()
    bench.cd()
    for n in range(4):
        bench.map(VA + 0x1000 * n, PAGE + 0x1000 * n)
    bench.dma.read(VA, 0x4000)
    for n in range(4):
        hole(bench, VA + 0x1000 * n)
    bench.submit(c.tlbi_nh_va(VMID, ASID, VA + 0x1000))
    assert [bench.goes(VA + 0x1000 * n) for n in range(4)] == [True, False, True, True]


@pytest.mark.parametrize("command", [c.tlbi_nh_va(VMID, ASID, 0x5F000), c.tlbi_nh_va(VMID, ASID, 0x40000, tg=1, ttl=2)])
def test_tlbi_of_any_address_removes_the_whole_block(bench, command):
    bench.ste()
    bench.cd()
    bench.map(0, 0x80_0000, level=1)
    assert bench.goes(0x1000)
    hole(bench, 0, level=1)
    bench.submit(command)
    assert not bench.goes(0x1000)


def test_tlbi_of_any_address_of_a_block_removes_what_stage_2_cut_it_into(bench):
    bench.ste(e.CONFIG_NESTED)
    bench.cd()
    bench.identity2()
    bench.map(0, 0x4000_0000, level=1)
    for n in range(3):
        bench.map2(0x4000_0000 + 0x1000 * n, PAGE + 0x1000 * n)
        assert bench.goes(0x1000 * n)
    hole(bench, 0, level=1)
    bench.submit(c.tlbi_nh_va(VMID, ASID, 0x20_0000))
    assert bench.goes(0x1000)
    bench.submit(c.tlbi_nh_va(VMID, ASID, 0x1F_F000))
    assert [bench.goes(0x1000 * n) for n in range(3)] == [False] * 3


def test_s2_ipa_leaves_what_both_stages_made_together(bench):
    bench.ste(e.CONFIG_NESTED)
    bench.cd()
    bench.identity2()
    bench.map(VA, 0x4000_5000)
    bench.map2(0x4000_5000, PAGE)
    assert bench.goes(VA)
    hole(bench, 0x4000_5000, S2_TABLES)
    bench.submit(c.tlbi_s2_ipa(VMID, 0x4000_5000))
    assert bench.goes(VA)
    bench.submit(c.tlbi_nh_all(VMID))
    assert not bench.goes(VA)


def test_tlb_is_shared_by_streams_of_one_vmid_and_asid(one):
    """The tags are VMID and ASID, not the stream: two CDs with one ASID see each other's translations."""
    one.cd(1, at=0x24_0000, root=S1_TABLES[5])
    one.ste(cds=0x24_0000)
    one.submit(c.cfgi_ste(RID))
    assert one.goes(VA)


@pytest.mark.parametrize(
    "command",
    [
        c.tlbi_nh_va(VMID, ASID, VA, tg=1),
        c.tlbi_nh_vaa(VMID, VA, tg=3),
        c.tlbi_s2_ipa(VMID, VA, tg=2),
        c.tlbi_nh_va(VMID, ASID, VA, tg=2, ttl=1),  # a 16 KiB granule has no leaf at level 1
    ],
)
def test_range_without_a_range_is_cerror_ill(bench, command):
    bench.submit(command)
    assert bench.command_error() == regs.CERROR_ILL


def test_range_fields_are_ignored_without_ril():
    bench = Bench(range_invalidation=False)
    bench.ste()
    bench.cd()
    bench.map(VA, PAGE)
    assert bench.goes(VA)
    hole(bench)
    bench.submit(c.tlbi_nh_va(VMID, ASID, VA - 0x1000, tg=1, num=3))
    assert bench.goes(VA)
    bench.submit(c.tlbi_nh_va(VMID, ASID, VA, tg=1))
    assert not bench.goes(VA)
    assert bench.command_error() is None
    bench.close()


# -- errors ----------------------------------------------------------------------------------------------------------

SSEC = c.SSEC


@pytest.mark.parametrize(
    ("features", "command"),
    [
        ({}, (0x00, 0)),
        ({}, (0x07, 0)),
        ({}, (0x18, 0)),  # TLBI_EL3_ALL
        ({}, (0x20, 0)),  # TLBI_EL2_ALL
        ({}, (0x50, 0)),  # of the Secure queue
        ({}, (0xFF, 0)),
        ({}, (c.cfgi_ste(RID)[0] | SSEC, 0)),
        ({}, (c.cfgi_all()[0] | SSEC, 31)),
        ({}, (c.cfgi_cd(RID, 0)[0] | SSEC, 0)),
        ({}, (c.cfgi_cd_all(RID)[0] | SSEC, 0)),
        ({}, (c.prefetch_config(RID)[0] | SSEC, 0)),
        ({}, (c.resume(RID, 0, True)[0] | SSEC, 0)),
        ({}, (c.stall_term(RID)[0] | SSEC, 0)),
        ({}, (c.SYNC | 3 << 12, 0)),
        ({}, c.pri_resp(RID, 0, 3)),
        ({}, c.atc_inv(RID, 0, 53)),
        ({"stage1": False}, c.cfgi_cd(RID, 0)),
        ({"stage1": False}, c.cfgi_cd_all(RID)),
        ({"stage1": False}, c.tlbi_nh_all(0)),
        ({"stage1": False}, c.tlbi_nh_asid(0, 0)),
        ({"stage1": False}, c.tlbi_nh_va(0, 0, 0)),
        ({"stage1": False}, c.tlbi_nh_vaa(0, 0)),
        ({"stage2": False}, c.tlbi_s2_ipa(0, 0)),
        ({"stage2": False}, c.tlbi_s12_vmall(0)),
        ({"ats": False, "pri": False}, c.atc_inv(RID, 0, 52)),
        ({"pri": False}, c.pri_resp(RID, 0, 2)),
        ({"stall_model": STALL_NEVER}, c.resume(RID, 0, True)),
        ({"stall_model": STALL_NEVER}, c.stall_term(RID)),
    ],
)
def test_illegal_command_stops_the_queue(features, command):
    bench = Bench(**features)
    bench.submit(c.sync(), command, c.sync())
    assert bench.command_error() == regs.CERROR_ILL
    assert bench.reg(regs.CMDQ_CONS) & 0xFFFFF == 1, "the index stays at the command"
    bench.word(CMDQ + 16, c.SYNC)
    bench.acknowledge()
    assert bench.reg(regs.CMDQ_CONS) & 0xFFFFF == 3
    assert bench.command_error() is None
    bench.close()


@pytest.mark.parametrize("stages", [{"stage1": False}, {"stage2": False}, {}])
def test_nsnh_all_is_legal_with_any_stages(stages):
    bench = Bench(**stages)
    bench.submit(c.tlbi_nsnh_all())
    assert bench.command_error() is None
    bench.close()


def test_queue_that_memory_refuses_is_cerror_abt(bench):
    bench.set(regs.CR0, 0)
    bench.set(regs.CMDQ_BASE, NOWHERE | QUEUE_LOG2, 8)
    bench.set(regs.CR0, 0xF)
    bench.set(regs.CMDQ_PROD, 1)
    assert bench.command_error() == regs.CERROR_ABT
    assert bench.reg(regs.CMDQ_CONS) & 0xFFFFF == 0


def test_producer_may_step_back_while_an_error_is_active(bench):
    bench.submit((0, 0), c.sync())
    bench.set(regs.CMDQ_PROD, 0)
    bench.acknowledge()
    assert bench.command_error() is None


def test_indexes_wrap(bench):
    for n in range(5 << QUEUE_LOG2):
        bench.submit(c.sync(), c.sync()) if n % 3 else bench.submit(c.sync())
        assert bench.reg(regs.CMDQ_CONS) == bench.reg(regs.CMDQ_PROD)
    assert bench.reg(regs.CMDQ_PROD) < 2 << QUEUE_LOG2


def test_nothing_is_consumed_while_the_queue_is_off(bench):
    bench.set(regs.CR0, regs.CR0_SMMUEN)
    bench.submit(c.sync())
    assert bench.reg(regs.CMDQ_CONS) == 0
    bench.set(regs.CR0, regs.CR0_SMMUEN | regs.CR0_CMDQEN)
    assert bench.reg(regs.CMDQ_CONS) == 1


def test_invalidation_works_while_translation_is_off(one):
    one.set(regs.CR0, regs.CR0_CMDQEN | regs.CR0_EVENTQEN)
    one.submit(c.tlbi_nsnh_all())
    one.set(regs.CR0, 0xF)
    assert not one.goes(VA)


def other_space(bench, aset):
    """A second address space (SSID 1) without any table; as CD 0 it has `aset`."""
    bench.ste(cdmax=4, w1=e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    bench.cd(0)
    bench.cd(1, w0=aset, asid=ASID + 1, root=S1_TABLES[5])
    bench.map(VA, PAGE, GLOBAL_LEAF)
    bench.forget()
    assert bench.goes(VA)


@pytest.mark.parametrize("aset", [0, e.CD_0_ASET])
def test_global_translations_are_of_one_aset(bench, aset):
    """3.17.1: an entry with ASET == 0 does not match a lookup with ASET == 1, whatever the ASID."""
    other_space(bench, aset)
    assert bench.goes(VA, pasid=1) == (not aset)


@pytest.mark.parametrize("command", [c.tlbi_nh_va(VMID, ASID + 7, VA), c.tlbi_nh_vaa(VMID, VA), c.tlbi_nh_all(VMID)])
@pytest.mark.parametrize("aset", [0, e.CD_0_ASET])
def test_commands_disregard_aset(bench, aset, command):
    """4.4: "commands matching TLB entries on ASID disregard the ASET value"."""
    bench.ste()
    bench.cd(w0=aset)
    bench.map(VA, PAGE, GLOBAL_LEAF)
    assert bench.goes(VA)
    hole(bench)
    assert bench.goes(VA)
    bench.submit(command)
    assert not bench.goes(VA)


# -- SYNC ------------------------------------------------------------------------------------------------------------


def test_sync_writes_its_message(bench):
    bench.submit(c.sync(c.SIG_IRQ, PAGE, 0xCAFE))
    assert bench.memory.read(PAGE, 4) == (0xCAFE).to_bytes(4, "little")


def test_sync_message_that_memory_refuses_is_a_global_error(bench):
    bench.submit(c.sync(c.SIG_IRQ, NOWHERE, 1))
    assert bench.errors() == regs.GERROR_MSI_CMDQ_ABT_ERR
    assert bench.reg(regs.CMDQ_CONS) == 1


def test_sync_without_an_address_is_a_wired_interrupt(bench):
    bench.submit(c.sync(c.SIG_IRQ))
    assert bench.wires == ["cmdq-sync"]


def test_sync_without_signal(bench):
    bench.submit(c.sync())
    assert (bench.wires, bench.messages) == ([], [])


@pytest.mark.parametrize("sev", [True, False])
def test_sync_sends_an_event_where_there_are_some(sev):
    bench = Bench(sev=sev)
    sent = []
    bench.unit.on_event = lambda: sent.append(1)
    bench.submit(c.sync(c.SIG_SEV))
    assert len(sent) == sev
    bench.close()


def test_sync_after_an_endpoint_that_does_not_answer_is_cerror_atc_inv_sync(bench):
    bench.unit.silent_endpoints.add(RID)
    bench.submit(c.atc_inv(RID, 0, 52), c.tlbi_nsnh_all(), c.sync(c.SIG_IRQ, PAGE, 7))
    assert bench.command_error() == regs.CERROR_ATC_INV_SYNC
    assert bench.reg(regs.CMDQ_CONS) & 0xFFFFF == 2
    assert bench.memory.read(PAGE, 4) == bytes(4)
    bench.acknowledge()
    assert bench.reg(regs.CMDQ_CONS) & 0xFFFFF == 3
    assert bench.memory.read(PAGE, 1) == b"\x07"


def test_endpoint_that_refuses_an_invalidation_is_no_error(bench):
    bench.submit(c.atc_inv(RID, 0, 52), c.atc_inv(RID + 1, 0, 0), c.sync())
    assert bench.command_error() is None


# -- stalls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stalling(bench):
    bench.ste()
    bench.cd(w0=e.CD_0_S)
    bench.map(VA, PAGE)
    hole(bench)
    return bench


def test_stalled_request_waits_for_resume(stalling):
    parked = stalling.parks(VA, WRITE)
    event = stalling.event()
    assert (event["id"], event["stall"], event["rnw"], event["address"]) == (events.F_TRANSLATION, 1, 0, VA)
    assert parked.outcome is None
    stalling.map(VA, PAGE)
    stalling.submit(c.resume(RID, event["stag"], retry=True))
    assert parked.outcome == Outcome.RETRY
    assert stalling.goes(VA, WRITE)


def test_stalled_request_is_terminated(stalling):
    parked = stalling.parks(VA)
    stalling.submit(c.resume(RID, stalling.event()["stag"], retry=False))
    assert parked.outcome == Outcome.ABORT


def test_resume_of_another_stream_or_token_does_nothing(stalling):
    parked = stalling.parks(VA)
    stag = stalling.event()["stag"]
    stalling.submit(c.resume(RID + 1, stag, retry=True), c.resume(RID, stag + 1, retry=True), c.stall_term(RID + 1))
    assert parked.outcome is None
    assert stalling.command_error() is None


def test_tokens_differ_while_in_use(stalling):
    waiting = [stalling.parks(VA) for _ in range(5)]
    tags = [stalling.event()["stag"] for _ in waiting]
    assert len(set(tags)) == 5
    stalling.submit(c.resume(RID, tags[2], retry=False))
    assert [parked.outcome for parked in waiting] == [None, None, Outcome.ABORT, None, None]


def test_stall_term_aborts_all_of_a_stream(stalling):
    waiting = [stalling.parks(VA) for _ in range(3)]
    stalling.submit(c.stall_term(RID))
    assert [parked.outcome for parked in waiting] == [Outcome.ABORT] * 3


def test_switching_off_aborts_stalled_requests(stalling):
    parked = stalling.parks(VA)
    stalling.set(regs.CR0, regs.CR0_CMDQEN)
    assert parked.outcome == Outcome.ABORT


def test_invalidation_does_not_resume(stalling):
    parked = stalling.parks(VA)
    stalling.map(VA, PAGE)
    stalling.submit(c.tlbi_nsnh_all(), c.cfgi_all(), c.sync())
    assert parked.outcome is None


def test_stall_that_the_full_queue_cannot_take_is_retried_when_there_is_space(stalling):
    for _ in range(1 << QUEUE_LOG2):
        stalling.parks(VA)
    last = stalling.parks(VA)
    assert last.outcome is None
    prod, cons = stalling.reg(regs.EVENTQ_PROD), stalling.reg(regs.EVENTQ_CONS)
    assert (prod ^ cons) >> 31 == 0, "stalls are never lost, so nothing overflows"
    retried = []
    last.then(retried.append)
    stalling.event()
    assert retried == [Outcome.RETRY]


def test_stall_without_a_token_is_retried_when_one_is_free(stalling):
    """4.7.1: "the STAG value of a stall event record matched by CMD_RESUME is returned to the set of values"."""
    tags = []
    for _ in range(STALL_MAX):
        stalling.parks(VA)
        tags.append(stalling.event()["stag"])
    assert len(set(tags)) == STALL_MAX
    last = stalling.parks(VA)
    assert stalling.event() is None
    assert last.outcome is None
    stalling.submit(c.resume(RID, tags[7], retry=False))
    assert last.outcome == Outcome.RETRY
    other = stalling.parks(VA)
    assert stalling.event()["stag"] == tags[7]
    stalling.submit(c.stall_term(RID))
    assert other.outcome == Outcome.ABORT


def test_r_is_ignored_where_a_request_stalls(stalling):
    words = stalling.cd_words(w0=e.CD_0_S)
    stalling.cd(words=[words[0] & ~e.CD_0_R, *words[1:]])
    stalling.parks(VA)
    assert stalling.event()["stall"] == 1


def test_configuration_errors_never_stall(stalling):
    stalling.ste(w1=e.STE_1_EATS.put(2))
    assert stalling.fault(VA)["stall"] == 0


def test_stage_2_stalls_by_s2s(bench):
    bench.ste(e.CONFIG_S2, w2=e.STE_2_S2S)
    parked = bench.parks(0x5000)
    event = bench.event()
    assert (event["id"], event["s2"], event["stall"], event["last"]) == (events.F_TRANSLATION, 1, 1, 0x5000)
    bench.submit(c.stall_term(RID))
    assert parked.outcome == Outcome.ABORT


def test_forced_stalls():
    bench = Bench(stall_model=STALL_FORCED)
    bench.ste()
    bench.cd(w0=e.CD_0_S)
    bench.parks(VA)
    assert bench.event()["stall"] == 1
    bench.close()
