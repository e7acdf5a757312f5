"""Endpoints with ATS and PRI: translation, translated and page requests (Arm IHI 0070, 3.9 and chapter 8)."""

import pytest

from fakedev.dma import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE, DmaAbort
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from fakedev.tlp import PRG_FAILURE, PRG_INVALID, PRG_SUCCESS, Invalidation, PageRequest, PageResponse, Translation
from tests.fakedev.smmuv3.bench import PAGE, PRIQ, QUEUE_LOG2, RID, S1_LEAF, S1_TABLES, S2_LEAF, Bench

VA = 0x1234000
RO, AF, DBM = 1 << 7, 1 << 10, 1 << 51
FULL, SPLIT = e.STE_1_EATS.put(1), e.STE_1_EATS.put(2)
RW = READ | WRITE
CHECKED = 0xF | regs.CR0_ATSCHK


class Endpoints:
    """Where messages to endpoints go."""

    def __init__(self):
        self.sent = []

    def invalidate(self, rid, request):
        self.sent.append((rid, request))
        return True

    def respond(self, rid, response):
        self.sent.append((rid, response))
        return True


@pytest.fixture
def ats(bench):
    bench.unit.downstream = bench.endpoints = Endpoints()
    bench.ste(w1=FULL)
    bench.cd()
    bench.map(VA, PAGE)
    return bench


def ask(bench, address=VA, access=RW, pasid=NO_PASID):
    return bench.dma.request_translation(address, access, pasid)


def refused(bench, address=VA, access=RW, pasid=NO_PASID):
    with pytest.raises(DmaAbort):
        ask(bench, address, access, pasid)
    return bench.event()


# -- translation requests --------------------------------------------------------------------------------------------


def test_answer_has_the_page_and_its_rights(ats):
    assert ask(ats, VA + 0x123) == Translation(VA, 0x1000, PAGE, RW)


def test_answer_for_a_block_is_the_block(ats):
    ats.map(0x4020_0000, 0x60_0000, level=1)
    assert ask(ats, 0x4021_0000) == Translation(0x4020_0000, 0x20_0000, 0x60_0000, RW)


def test_answer_for_a_read_only_page_has_no_write(ats):
    ats.map(VA, PAGE, S1_LEAF | RO)
    assert ask(ats).allowed == READ


@pytest.mark.parametrize("bits", [0, S1_LEAF & ~AF, S1_LEAF & ~(1 << 6)])
def test_page_that_is_not_there_is_an_answer_without_rights(ats, bits):
    """Missing, not accessed, privileged only: a success with R == W == 0, and no event."""
    ats.map(VA, PAGE, bits)
    if not bits:
        ats.word(S1_TABLES[3] + 8 * (VA >> 12 & 511), 0)
    answer = ask(ats)
    assert (answer.allowed, answer.start, answer.length, ats.event()) == (0, VA, 0x1000, None)


def test_stalls_do_not_apply_to_translation_requests(ats):
    ats.cd(w0=e.CD_0_S)
    assert ask(ats, 0x9000).allowed == 0
    assert ats.event() is None


def test_execution_and_privilege_with_a_pasid(ats):
    ats.ste(cdmax=4, w1=FULL | e.STE_1_S1DSS.put(e.S1DSS_SSID0))
    ats.cd(1)
    assert ask(ats, access=RW, pasid=1).allowed == RW
    assert ask(ats, access=READ | EXECUTE, pasid=1).allowed & EXECUTE
    assert ask(ats, access=RW | EXECUTE | PRIVILEGED, pasid=1).allowed == RW


def test_no_write_leaves_the_page_clean(ats):
    ats.cd(w0=e.CD_0_HA | e.CD_0_HD)
    ats.map(VA, PAGE, S1_LEAF | RO | DBM)
    leaf = S1_TABLES[3] + 8 * (VA >> 12 & 511)
    assert ask(ats, access=READ).allowed == READ
    assert ats.load(leaf) & RO
    assert ask(ats, access=RW).allowed == RW
    assert not ats.load(leaf) & RO


def test_ats_that_the_ste_does_not_allow_is_f_bad_ats_treq(ats):
    ats.ste()
    event = refused(ats, VA + 0x10)
    asked = events.EVT_1_TREQ_R | events.EVT_1_TREQ_W | 1
    assert event["words"] == [RID << 32 | events.F_BAD_ATS_TREQ, asked, VA, 0]


def test_ats_of_a_bypassed_stream_is_f_bad_ats_treq(ats):
    ats.ste(e.CONFIG_BYPASS, w1=FULL)
    assert refused(ats)["id"] == events.F_BAD_ATS_TREQ


def test_ats_while_the_unit_is_off_is_f_bad_ats_treq(ats):
    ats.set(regs.CR0, regs.CR0_EVENTQEN)
    assert refused(ats)["id"] == events.F_BAD_ATS_TREQ


@pytest.mark.parametrize("words", [[0], [e.STE_0_V]])
def test_ats_of_an_invalid_or_aborted_stream_records_nothing(ats, words):
    ats.ste(words=words)
    assert refused(ats) is None


def test_ats_with_a_bad_cd_records_nothing(ats):
    ats.cd(words=[0])
    assert refused(ats) is None


def test_full_ats_through_both_stages(ats):
    ats.ste(e.CONFIG_NESTED, w1=FULL)
    ats.identity2()
    ats.map(VA, 0x4000_5000)
    ats.map2(0x4000_5000, PAGE, S2_LEAF & ~(1 << 7))
    assert ask(ats) == Translation(VA, 0x1000, PAGE, READ)


def test_split_stage_ats_answers_ipas(ats):
    ats.set(regs.CR0, CHECKED)
    ats.ste(e.CONFIG_NESTED, w1=SPLIT)
    ats.identity2()
    ats.map(VA, 0x4000_5000)
    ats.map2(0x4000_5000, PAGE)
    assert ask(ats) == Translation(VA, 0x1000, 0x4000_5000, RW)
    ats.memory.write(PAGE, b"here")
    assert ats.dma.read_translated(0x4000_5000, 4) == b"here"
    with pytest.raises(DmaAbort):
        ats.dma.read_translated(0x4000_6000, 4)
    event = ats.event()
    assert (event["id"], event["s2"], event["address"]) == (events.F_TRANSLATION, 1, 0x4000_6000)


def test_split_stage_ats_without_atschk_is_none(ats):
    ats.ste(e.CONFIG_NESTED, w1=SPLIT)
    assert refused(ats)["id"] == events.F_BAD_ATS_TREQ


# -- translated requests ---------------------------------------------------------------------------------------------


def passes(bench, access=READ):
    try:
        bench.dma.read_translated(PAGE, 4) if access == READ else bench.dma.write_translated(PAGE, b"late")
    except DmaAbort:
        return False
    return True


def test_translated_requests_pass_unchecked_without_atschk(ats):
    ats.ste(e.CONFIG_ABORT)
    assert passes(ats, WRITE)


def test_translated_requests_pass_with_full_ats(ats):
    ats.set(regs.CR0, CHECKED)
    assert passes(ats, WRITE)
    assert ats.memory.read(PAGE, 4) == b"late"


@pytest.mark.parametrize("config", [e.CONFIG_S1, e.CONFIG_BYPASS])
def test_translated_requests_that_the_ste_does_not_allow_are_f_transl_forbidden(ats, config):
    ats.set(regs.CR0, CHECKED)
    ats.ste(config)
    assert not passes(ats, WRITE)
    assert ats.event()["words"] == [RID << 32 | events.F_TRANSL_FORBIDDEN, 0, PAGE, 0]


def test_translated_requests_of_aborted_and_invalid_streams_record_nothing(ats):
    ats.set(regs.CR0, CHECKED)
    for words in ([e.STE_0_V], [0]):
        ats.ste(words=words)
        ats.forget()
        assert not passes(ats)
        assert ats.event() is None


def test_invalid_streams_of_translated_requests_are_recorded_with_rec_cfg_ats(ats):
    ats.set(regs.CR0, 0)
    ats.set(regs.CR2, regs.CR2_RECINVSID | regs.CR2_REC_CFG_ATS)
    ats.set(regs.CR0, CHECKED)
    ats.ste(words=[0])
    assert not passes(ats)
    assert ats.event()["id"] == events.C_BAD_STE


def test_translated_requests_while_the_unit_is_off_are_refused(ats):
    ats.set(regs.CR0, 0)
    assert not passes(ats)


# -- invalidations and page requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "request_"),
    [
        (c.atc_inv(RID, VA + 0x3000, 2), Invalidation(NO_PASID, 0x1234000, 0x4000)),
        (c.atc_inv(RID, VA, c.ATC_SIZE_ALL), Invalidation(NO_PASID, 0, 1 << 64)),
        (c.atc_inv(RID, VA, 0, ssid=7), Invalidation(7, VA, 0x1000)),
        (c.atc_inv(RID, VA, 0, ssid=7, everywhere=True), Invalidation(7, VA, 0x1000, True)),
        (c.atc_inv(RID, VA, 0, everywhere=True), Invalidation(NO_PASID, VA, 0x1000)),
    ],
)
def test_atc_inv_is_an_invalidation_request(ats, command, request_):
    ats.submit(command, c.sync())
    assert ats.endpoints.sent == [(RID, request_)]
    assert ats.command_error() is None


def test_commands_to_endpoints_are_ignored_while_the_unit_is_off(ats):
    ats.set(regs.CR0, regs.CR0_CMDQEN)
    ats.submit(c.atc_inv(RID, 0, 52), c.pri_resp(RID, 1, c.PRI_SUCCESS))
    assert (ats.endpoints.sent, ats.command_error()) == ([], None)


def page(address=VA, access=READ, group=3, last=True, pasid=NO_PASID):
    return PageRequest(RID, pasid, address, access, group, last)


def test_page_request_is_a_record_of_the_pri_queue(ats):
    ats.dma.send_page_request(page(pasid=9, access=RW | EXECUTE | PRIVILEGED))
    assert ats.reg(regs.PRIQ_PROD) == 1
    flags = 0b111111 << 58
    assert (ats.load(PRIQ), ats.load(PRIQ + 8)) == (RID | 9 << 32 | flags, VA | 3)
    ats.dma.send_page_request(page(last=False, access=WRITE, group=511))
    assert (ats.load(PRIQ + 16), ats.load(PRIQ + 24)) == (RID | 1 << 61, VA | 511)


@pytest.mark.parametrize(
    ("response", "code"),
    [(c.PRI_SUCCESS, PRG_SUCCESS), (c.PRI_INVALID, PRG_INVALID), (c.PRI_FAILURE, PRG_FAILURE)],
)
def test_page_responses(ats, response, code):
    ats.submit(c.pri_resp(RID, 3, response), c.pri_resp(RID, 4, response, ssid=9))
    assert ats.endpoints.sent == [(RID, PageResponse(NO_PASID, 3, code)), (RID, PageResponse(9, 4, code))]


@pytest.mark.parametrize("lo", [0, 1])
def test_pri_interrupt_when_the_queue_fills_or_on_the_last_of_a_group(ats, lo):
    ats.set(regs.PRIQ_IRQ_CFG0, 0xFEE0_0000, 8)
    ats.set(regs.PRIQ_IRQ_CFG2, lo << 31)
    ats.set(regs.IRQ_CTRL, regs.IRQ_PRIQ)
    counts = []
    for last in (False, False, True, True):
        ats.dma.send_page_request(page(last=last))
        counts.append(len(ats.messages))
    assert counts == ([0, 0, 1, 2] if lo else [1, 1, 1, 1])


def test_page_request_while_the_queue_is_off_is_answered_with_failure(ats):
    for cr0 in (0xF & ~regs.CR0_PRIQEN, 0xF & ~regs.CR0_SMMUEN):
        ats.set(regs.CR0, cr0)
        ats.endpoints.sent.clear()
        ats.dma.send_page_request(page(pasid=9))
        assert ats.endpoints.sent == [(RID, PageResponse(NO_PASID, 3, PRG_FAILURE))]


def fill(bench):
    for _ in range(1 << QUEUE_LOG2):
        bench.dma.send_page_request(page(last=False))


@pytest.mark.parametrize(("pps", "ppar", "answered"), [(True, 0, 9), (False, e.STE_1_PPAR, 9), (False, 0, NO_PASID)])
def test_page_request_that_the_full_queue_cannot_take(pps, ppar, answered):
    bench = Bench(pps=pps)
    bench.unit.downstream = endpoints = Endpoints()
    bench.ste(w1=FULL | ppar)
    fill(bench)
    bench.dma.send_page_request(page(last=False))
    assert endpoints.sent == [], "no answer but to the last"
    assert bench.reg(regs.PRIQ_PROD) >> 31 == 1
    bench.dma.send_page_request(page(pasid=9))
    assert endpoints.sent == [(RID, PageResponse(answered, 3, PRG_SUCCESS))]
    bench.set(regs.PRIQ_CONS, 1 << QUEUE_LOG2)  # space, but the overflow is not acknowledged
    bench.dma.send_page_request(page())
    assert bench.reg(regs.PRIQ_PROD) & 0xFFFF == 1 << QUEUE_LOG2
    bench.set(regs.PRIQ_CONS, 1 << 31 | 1 << QUEUE_LOG2)
    bench.dma.send_page_request(page())
    assert bench.reg(regs.PRIQ_PROD) & 0xFFFF == (1 << QUEUE_LOG2) + 1
    bench.close()


def test_overflow_with_a_pasid_and_no_ste_is_answered_with_failure():
    bench = Bench(pps=False)
    bench.unit.downstream = endpoints = Endpoints()
    fill(bench)
    bench.dma.send_page_request(page(pasid=9))
    assert endpoints.sent == [(RID, PageResponse(NO_PASID, 3, PRG_FAILURE))]
    bench.close()


def test_stop_markers_are_never_answered(ats):
    marker = page(access=0, pasid=9)
    assert marker.is_stop_marker
    ats.dma.send_page_request(marker)
    assert ats.load(PRIQ) == RID | 9 << 32 | 1 << 62 | 1 << 63
    ats.set(regs.CR0, 0)
    ats.dma.send_page_request(marker)
    assert ats.endpoints.sent == []
