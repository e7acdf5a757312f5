"""Translation requests, translated requests, page requests: chapters 4 and 7 of the manual."""

import pytest

from fakedev.dma import EXECUTE, NO_PASID, READ, WRITE, DmaAbort
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, regs
from tests.fakedev.vtd.rig import DID, DIRECTORY, FIRST, FLAGS, PAGE, PASID, PRQ, RID, SECOND, UPPER
from tests.fakedev.vtd.test_faults import IOVA, TABLES, prepared

F, S, N, P = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED, entries.PGTT_PASS_THROUGH
RW = READ | WRITE

# The columns of table 30 for translation requests: unsupported request, completer abort; what is neither succeeds
# without a permission.
UNSUPPORTED = {0x39, 0x41, 0x44, 0x45, 0x46, 0x48, 0x89}
COMPLETER_ABORT = {0x38, 0x3A, 0x40, 0x42, 0x43, 0x50, 0x52, 0x58, 0x5A, 0x5B, 0x78, 0x7A, 0x7B, 0x7C, 0x7D, 0x87}


def ask(rig, address, access=RW, pasid=NO_PASID):
    """(start, length, pa, allowed) of the completion; None where it is UR or CA."""
    try:
        found = rig.dma.request_translation(address, access, pasid)
    except DmaAbort:
        return None
    return (found.start, found.length, found.pa if found.allowed else None, found.allowed)


@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
@pytest.mark.parametrize(("condition", "reason", "pgtt", "wrong"), TABLES, ids=[row[0] for row in TABLES])
def test_a_translation_request_gets_what_table_30_says(rig, condition, reason, pgtt, wrong, pasid):
    made = prepared(rig, pgtt)
    wrong(made)
    answer = ask(made, IOVA, READ, pasid)
    if reason in UNSUPPORTED | COMPLETER_ABORT:
        assert answer is None
        expected = {"reason": reason, "type": "read", "sid": RID, "address": IOVA, "at": 1}
        if pasid != NO_PASID:
            expected |= {"pasid": PASID, "exe": 0, "priv": 0}
        assert made.record() == expected
    else:
        assert answer == (IOVA, 4096, None, 0)
        assert made.record() is None


@pytest.mark.parametrize("pgtt", [F, S, N])
@pytest.mark.parametrize(("bits", "asked", "allowed"), [(7, RW, RW), (7, READ, READ), (5, RW, READ), (5, READ, READ)])
def test_a_completion_has_the_effective_permissions(rig, pgtt, bits, asked, allowed):
    made = prepared(rig, pgtt)
    if pgtt == S:
        made.map_second(IOVA, PAGE, bits & 3)
    else:
        made.map_first(IOVA, PAGE & 0x1FFFFF if pgtt == N else PAGE, bits)
    assert ask(made, IOVA + 4, asked) == (IOVA, 4096, PAGE, allowed)
    assert made.record() is None


def test_a_write_only_page_of_the_second_stage(rig):
    made = prepared(rig, S)
    made.map_second(IOVA, PAGE, 2)
    assert ask(made, IOVA) == (IOVA, 4096, PAGE, WRITE)
    assert ask(made, IOVA, READ)[3] == 0


def test_a_translation_for_writing_sets_the_dirty_bit_and_one_for_reading_does_not(rig):
    made = prepared(rig, F)
    leaf = made.map_first(IOVA, PAGE)
    ask(made, IOVA, READ)
    assert made.load(leaf) & 0x60 == 0x20
    ask(made, IOVA, RW)
    assert made.load(leaf) & 0x60 == 0x60


def test_without_the_no_write_flag_every_translation_is_for_writing(rig):
    made = prepared(rig, F, nwfs=0)
    leaf = made.map_first(IOVA, PAGE)
    assert ask(made, IOVA, READ)[3] == RW
    assert made.load(leaf) & 0x40


@pytest.mark.parametrize(("level", "length"), [(1, 2 << 20), (2, 1 << 30)])
def test_a_large_page_is_translated_whole(rig, level, length):
    made = rig()
    made.tables(S)
    made.map_second(0, 1 << 30, level=level)
    made.start()
    assert ask(made, IOVA) == (0, length, 1 << 30, RW)


def test_pass_through_translates_as_much_as_it_can(rig):
    made = rig()
    made.tables(P)
    made.start()
    assert ask(made, 5 << 30) == (5 << 30, 1 << 30, 5 << 30, RW)


def test_an_interrupt_address_is_for_untranslated_writes(rig):
    made = prepared(rig, S)
    found = made.dma.request_translation(0xFEE01000, RW)
    assert (found.allowed, found.untranslated) == (WRITE, True)
    found = made.dma.request_translation(0xFEE01000, READ)
    assert (found.allowed, found.untranslated) == (0, False)


@pytest.mark.parametrize(
    ("reason", "wrong", "pasid"),
    [
        (0x44, lambda r: r.context(flags=0), NO_PASID),
        (0x45, lambda r: r.context(flags=entries.SM_DTE), PASID),
        (0x46, lambda r: r.context(pdts=0), 1 << 13),
        (0x48, lambda r: r.context(rid_pasid=PASID), PASID),
        (0x89, lambda r: None, 1 << 16),
    ],
)
def test_what_a_context_entry_forbids_is_unsupported(rig, reason, wrong, pasid):
    made = prepared(rig, S, pss=15)
    wrong(made)
    assert ask(made, IOVA, RW, pasid) is None
    assert (made.record()["reason"], made.record()["at"]) == (reason, 1)


def test_while_translation_is_off_translation_requests_are_unsupported(rig):
    made = prepared(rig, S)
    made.set(regs.GCMD, regs.QIE)
    assert ask(made, IOVA) is None
    with pytest.raises(DmaAbort):
        made.dma.read_translated(PAGE, 4)
    assert made.record() is None


# -- legacy mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tt", "reason"), [(0, 0xD), (1, None), (2, 0xD)])
def test_the_translation_type_of_legacy_mode_allows_or_blocks(rig, tt, reason):
    made = rig(mode=0)
    made.root(low=UPPER | 1, high=0)
    made.words(UPPER + 16 * RID, (SECOND[0] | tt << 2 | 1, DID << 8 | 2))
    made.map_second(IOVA, PAGE, 1)
    made.start()
    if reason is None:
        assert ask(made, IOVA) == (IOVA, 4096, PAGE, READ)
        assert ask(made, 1 << 48)[3] == 0
        assert ask(made, 0x9000)[3] == 0
        made.memory.write(PAGE, b"data")
        assert made.dma.read_translated(PAGE, 4) == b"data"
        assert made.record() is None
        assert ask(made, IOVA, RW, PASID) is None
        assert made.record()["reason"] == 0x31
    else:
        assert ask(made, IOVA) is None
        assert (made.record()["reason"], made.record()["at"]) == (reason, 1)
        made.clear()
        with pytest.raises(DmaAbort):
            made.dma.read_translated(PAGE, 4)
        assert (made.record()["reason"], made.record()["at"]) == (reason, 2)


# -- translated requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "wrong", "pasid", "address"),
    [
        (None, lambda r: None, NO_PASID, PAGE),
        (None, lambda r: None, PASID, PAGE),
        (None, lambda r: r.word(DIRECTORY, 0), PASID, PAGE),  # the tables behind the context entry play no part
        (0x39, lambda r: r.root(high=0), NO_PASID, PAGE),
        (0x40, lambda r: r.root(high=1 << 45 | 1), PASID, PAGE),
        (0x42, lambda r: r.context((DIRECTORY | 0xE05, 0, 1, 0)), NO_PASID, PAGE),
        (0x43, lambda r: r.context(flags=entries.SM_DTE | entries.SM_EPTR), PASID, PAGE),
        (0x44, lambda r: r.context(flags=entries.SM_PASIDE), NO_PASID, PAGE),
        (0x46, lambda r: r.context(pdts=0), 1 << 13, PAGE),
        (0x48, lambda r: r.context(rid_pasid=PASID), PASID, PAGE),
        (0x49, lambda r: r.context(flags=FLAGS & ~entries.SM_EPTR), PASID, PAGE),
        (0x89, lambda r: None, 1 << 16, PAGE),
        (0x83, lambda r: None, NO_PASID, 1 << 46),
        (0x87, lambda r: None, NO_PASID, 0xFEE0_0000),
        (0x87, lambda r: None, PASID, 0xFEEF_FFFC),
    ],
)
def test_translated_requests(rig, reason, wrong, pasid, address):
    made = prepared(rig, S, pss=15, host_address_bits=46)
    wrong(made)
    if reason is None:
        made.dma.write_translated(address, b"data", pasid)
        assert made.memory.read(address, 4) == b"data"
        return
    with pytest.raises(DmaAbort):
        made.dma.write_translated(address, b"data", pasid)
    assert (made.record()["reason"], made.record()["at"], made.record()["type"]) == (reason, 2, "write")


def test_a_translated_request_ends_where_the_interrupt_range_begins(rig):
    """3.15, 4.2.5: what lies in front of it is written, the rest is a fault of its own."""
    made = prepared(rig, S)
    with pytest.raises(DmaAbort):
        made.dma.read_translated(0xFEE0_0000 - 4, 8)
    assert made.record() is None  # nobody answers in front of it
    with pytest.raises(DmaAbort):
        made.dma.write_translated(0xFEE0_0000, bytes(4))
    assert (made.record()["reason"], made.record()["at"], made.record()["address"]) == (0x87, 2, 0xFEE0_0000)


def test_in_legacy_mode_a_translated_request_to_the_interrupt_range_is_fault_eh(rig):
    made = rig(mode=0)
    made.root(low=UPPER | 1, high=0)
    made.words(UPPER + 16 * RID, (SECOND[0] | 1 << 2 | 1, DID << 8 | 2))
    made.start()
    with pytest.raises(DmaAbort):
        made.dma.write_translated(0xFEE0_0000, bytes(4))
    assert (made.record()["reason"], made.record()["at"]) == (0xE, 2)


@pytest.mark.parametrize(("version", "reason"), [(0x70, None), (0x80, 0x34)])
def test_an_execute_request_is_refused_by_new_hardware_translated_or_not(rig, version, reason):
    """RTA.5 of table 30: untranslated, translation and translated requests."""
    made = prepared(rig, S, version=version, ers=1)
    made.memory.write(PAGE, b"data")
    if reason is None:
        assert made.dma.read_translated(PAGE, 4, PASID, READ | EXECUTE) == b"data"
        return
    for request in (
        lambda: made.dma.read_translated(PAGE, 4, PASID, READ | EXECUTE),
        lambda: made.dma.read(IOVA, 4, PASID, execute=True),
        lambda: made.dma.request_translation(IOVA, READ | EXECUTE, PASID),
    ):
        with pytest.raises(DmaAbort):
            request()
    found = [made.record(n) for n in range(3)]
    assert [(each["reason"], each["at"], each["exe"]) for each in found] == [(0x34, 2, 1), (0x34, 0, 1), (0x34, 1, 1)]


# -- page requests ---------------------------------------------------------------------------------------------------

INVALID_REQUESTS = {0x38, 0x39, 0x3A, 0x40, 0x41, 0x42, 0x43, 0x50, 0x51, 0x52, 0x58, 0x59, 0x5A, 0x5B}


def queued(rig, index=0):
    return [rig.load(PRQ + 32 * index + 8 * n) for n in range(4)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("condition", "reason", "pgtt", "wrong"), TABLES, ids=[row[0] for row in TABLES])
def test_a_page_request_meets_the_conditions_up_to_the_pasid_entry(rig, condition, reason, pgtt, wrong, last):
    made = prepared(rig, pgtt)
    wrong(made)
    made.page_request(IOVA, last=last)
    if reason in INVALID_REQUESTS:
        assert made.reg(regs.PQT, 8) == 0
        assert made.functions.responses == ([(RID, PASID, 3, 1)] if last else [])
        assert (made.record()["reason"], made.record()["type"]) == (reason, "page")
    else:
        assert made.reg(regs.PQT, 8) == 32
        assert made.record() is None


@pytest.mark.parametrize(
    ("reason", "flags", "pasid"),
    [(0x47, FLAGS & ~entries.SM_PRE, PASID), (0x45, FLAGS & ~entries.SM_PASIDE & ~entries.SM_EPTR, PASID)],
)
def test_a_context_entry_can_forbid_page_requests(rig, reason, flags, pasid):
    made = prepared(rig, S)
    made.context(flags=flags)
    made.page_request(pasid=pasid)
    assert (made.record()["reason"], made.functions.responses) == (reason, [(RID, pasid, 3, 1)])


def test_a_page_request_becomes_a_descriptor(rig):
    made = prepared(rig, F)
    made.page_request(0x1234_5000, READ | WRITE | 4 | 8, PASID, group=0x155, last=True)
    made.page_request(IOVA, WRITE, NO_PASID, group=2, last=False)
    assert queued(made) == [
        1 | 1 << 8 | RID << 16 | PASID << 32 | 1 << 52 | 1 << 53,
        0x1234_5000 | 3 | 1 << 2 | 0x155 << 3,
        0,
        0,
    ]
    assert queued(made, 1) == [1 | RID << 16, IOVA | 2 | 2 << 3, 0, 0]
    assert (made.reg(regs.PQT, 8), made.reg(regs.PRS)) == (64, regs.PRS_PPR)
    assert made.functions.responses == []


def test_the_page_request_event(rig):
    made = prepared(rig, F)
    made.set(regs.PEADDR, 0xFEE00000)
    made.set(regs.PEDATA, 0x55)
    made.page_request()
    assert (made.messages, made.reg(regs.PECTL)) == ([], 3 << 30)
    made.set(regs.PECTL, 0)
    made.page_request()
    assert made.messages == [(0xFEE00000, 0x55)]
    made.set(regs.PRS, regs.PRS_PPR)
    made.page_request()
    assert len(made.messages) == 2


def test_a_full_queue_overflows_and_the_hardware_answers(rig):
    made = prepared(rig, F)
    for n in range(127):
        made.page_request(n << 12, last=False)
    assert made.reg(regs.PRS) == regs.PRS_PPR
    made.page_request(last=False)
    assert (made.reg(regs.PRS), made.functions.responses) == (regs.PRS_PPR | regs.PRS_PRO, [])
    made.page_request(group=9)
    assert made.functions.responses == [(RID, PASID, 9, 0)]
    made.set(regs.PQH, 64, 8)
    made.page_request()  # dropped until software has seen the overflow
    assert made.reg(regs.PQT, 8) == 127 * 32
    made.set(regs.PRS, regs.PRS_PRO)
    made.page_request()
    made.page_request()
    assert made.reg(regs.PQT, 8) == 32
    made.page_request()
    assert made.reg(regs.PRS) & regs.PRS_PRO


def test_a_stop_marker_is_queued_and_never_answered(rig):
    made = prepared(rig, F)
    made.page_request(access=0)
    assert queued(made)[1] & 7 == 4
    made.root(high=0)
    made.unit.invalidate_contexts(1, 0, 0, 0)
    made.page_request(access=0)
    assert made.functions.responses == []


@pytest.mark.parametrize(
    ("pasid", "code", "group"), [(PASID, qi.PGRP_SUCCESS, 3), (None, qi.PGRP_INVALID, 0x1FF), (0xFFFFF, 0xF, 0)]
)
def test_a_page_group_response_reaches_its_function(rig, pasid, code, group):
    made = prepared(rig, F)
    made.submit(qi.page_group_response(RID, pasid, group, code))
    assert made.functions.responses == [(RID, NO_PASID if pasid is None else pasid, group, code)]


def test_a_response_may_make_the_function_ask_again_while_the_queue_runs(rig):
    made = prepared(rig, F)
    seen = []

    def ring():
        seen.append(made.reg(regs.IQH, 8))
        if len(seen) == 1:
            made.submit(qi.page_group_response(RID, PASID, 4, 0))

    made.functions.on_response = ring
    made.submit(qi.page_group_response(RID, PASID, 3, 0))
    assert seen == [32, 64]
    assert made.reg(regs.IQH, 8) == made.reg(regs.IQT, 8) == 64


@pytest.mark.parametrize(("pgtt", "other_left"), [(F, True), (S, True), (N, False)])
def test_a_page_request_invalidates_what_it_is_about(rig, pgtt, other_left):
    made = prepared(rig, pgtt)
    other = IOVA + 0x4000
    target = PAGE & 0x1FFFFF if pgtt == N else PAGE
    for iova in (IOVA, other):
        if pgtt == S:
            made.map_second(iova, PAGE)
        else:
            made.map_first(iova, target)
        assert made.allowed(iova, READ, PASID)
        made.word((SECOND if pgtt == S else FIRST)[3] + 8 * (iova >> 12), 0)
    made.page_request(IOVA)
    assert not made.allowed(IOVA, READ, PASID)
    assert made.allowed(other, READ, PASID) == other_left


def test_a_page_request_that_overflows_invalidates_nothing(rig):
    """7.4.1: the implicit invalidation is for requests that meet no error condition; a full queue is one."""
    made = prepared(rig, F)
    leaf = made.map_first(IOVA, PAGE)
    assert made.allowed(IOVA, READ, PASID)
    made.word(leaf, 0)
    for _ in range(127):
        made.page_request(0x10_0000, last=False)
    for overflow in (regs.PRS_PRO, 0):  # the queue is full, then the overflow is pending
        made.page_request(IOVA)
        assert made.allowed(IOVA, READ, PASID)
        made.set(regs.PQH, 64 if overflow else 0, 8)
    made.set(regs.PRS, regs.PRS_PRO)
    made.set(regs.PQH, 64, 8)
    made.page_request(IOVA)
    assert not made.allowed(IOVA, READ, PASID)


def test_a_unit_without_page_requests_has_no_registers_for_them(rig):
    made = rig(prs=0, sms=0)
    made.start()
    made.set(regs.PQA, PRQ, 8)
    assert made.reg(regs.PQA, 8) == 0
    made.page_request()
    assert made.functions.responses == [(RID, PASID, 3, 1)]
