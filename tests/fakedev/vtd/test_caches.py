"""Caches and what empties them: tables 17, 23, 24 and 27 of the manual, and the queue that says so."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, regs
from fakedev.vtd.features import SCALABLE, Features
from tests.fakedev.vtd.rig import DID, FIRST, PAGE, PASID, QUEUE, RID, SECOND, STATUS

F, S, N, P = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED, entries.PGTT_PASS_THROUGH
IOVA, OTHER = 0x3000, 0x5000
DONE = 0x1234

WAIT = qi.wait(STATUS, DONE)


def warm(rig, pgtt, **kwargs):
    """A rig that has cached IOVA (and OTHER) with and without the PASID; then nothing is mapped there any more."""
    made = rig(**kwargs)
    made.tables(pgtt)
    if pgtt == N:
        made.map_guest()
        made.map_second(PAGE & 0x1FFFFF, PAGE)
    for iova in (IOVA, OTHER):
        if pgtt == S:
            made.map_second(iova, PAGE)
        else:
            made.map_first(iova, PAGE & 0x1FFFFF if pgtt == N else PAGE)
    made.start()
    for pasid in (NO_PASID, PASID):
        assert made.allowed(IOVA, READ, pasid)
        assert made.allowed(OTHER, READ, pasid)
    if pgtt == S:
        made.word(SECOND[3] + 8 * (IOVA >> 12), 0)
        made.word(SECOND[3] + 8 * (OTHER >> 12), 0)
    elif pgtt == P:
        made.entry(0, S)
        made.entry(PASID, S)
        made.unit.scalable.invalidate_pasids(qi.PC_GLOBAL, 0, 0)
        made.dma.forget()
    else:
        made.word(FIRST[3] + 8 * (IOVA >> 12), 0)
        made.word(FIRST[3] + 8 * (OTHER >> 12), 0)
    return made


def stale(made):
    """What is still translated: (IOVA, OTHER) without the PASID and with it."""
    return [made.allowed(iova, READ, pasid) for pasid in (NO_PASID, PASID) for iova in (IOVA, OTHER)]


ALL, NONE = [True] * 4, [False] * 4
PAGE_GONE = [False, True, False, True]
#: Table 23 and 24: descriptor, and what it leaves of (second stage, pass-through) and of (first stage, nested).
IOTLB_ROWS = [
    (qi.iotlb(0, 0, 0, qi.GLOBAL), NONE, NONE),
    (qi.iotlb(DID, 0, 0, qi.DOMAIN), NONE, NONE),
    (qi.iotlb(DID + 1, 0, 0, qi.DOMAIN), ALL, ALL),
    (qi.iotlb(DID, IOVA, 0, qi.SELECTIVE), PAGE_GONE, NONE),
    (qi.iotlb(DID, IOVA, 0, qi.SELECTIVE, hint=1), PAGE_GONE, NONE),
    (qi.iotlb(DID, 0, 3, qi.SELECTIVE), NONE, NONE),
    (qi.iotlb(DID, 0x8000, 3, qi.SELECTIVE), ALL, NONE),
    (qi.iotlb(DID + 1, IOVA, 0, qi.SELECTIVE), ALL, ALL),
    (qi.pasid_iotlb(DID, PASID, 0, 0, qi.PIOTLB_PASID), [True, True, False, False], [True, True, False, False]),
    (qi.pasid_iotlb(DID, 0, 0, 0, qi.PIOTLB_PASID), [False, False, True, True], [False, False, True, True]),
    (qi.pasid_iotlb(DID + 1, PASID, 0, 0, qi.PIOTLB_PASID), ALL, ALL),
    (qi.pasid_iotlb(DID, PASID, IOVA, 0, qi.PIOTLB_PAGES), ALL, [True, True, False, True]),
    (qi.pasid_iotlb(DID, PASID, 0, 63, qi.PIOTLB_PAGES), ALL, [True, True, False, False]),
    (qi.pasid_iotlb(DID, PASID + 1, IOVA, 0, qi.PIOTLB_PAGES), ALL, ALL),
    (qi.pasid_cache(0, 0, qi.PC_GLOBAL), ALL, ALL),
    (qi.context_cache(0, 0, 0, qi.GLOBAL), ALL, ALL),
]


@pytest.mark.parametrize("pgtt", [F, S, N])
@pytest.mark.parametrize("row", range(len(IOTLB_ROWS)))
def test_an_iotlb_invalidation_takes_what_its_table_says(rig, pgtt, row):
    descriptor, second, first = IOTLB_ROWS[row]
    made = warm(rig, pgtt)
    assert stale(made) == ALL
    made.submit(descriptor, WAIT)
    assert stale(made) == (second if pgtt == S else first)


@pytest.mark.parametrize(
    ("descriptor", "left"),
    [
        (qi.pasid_cache(0, 0, qi.PC_GLOBAL), ALL),
        (qi.iotlb(DID, IOVA, 0, qi.SELECTIVE), NONE),
        (qi.iotlb(DID, 1 << 30, 0, qi.SELECTIVE), ALL),
        (qi.pasid_iotlb(DID, 0, 0, 0, qi.PIOTLB_PASID), [False, False, True, True]),
    ],
)
def test_pass_through_is_cached_as_a_gigabyte(rig, descriptor, left):
    made = warm(rig, P)
    made.submit(descriptor)
    assert stale(made) == left


@pytest.mark.parametrize(
    ("descriptor", "left"),
    [
        (qi.pasid_cache(0, 0, qi.PC_GLOBAL), (False, False)),
        (qi.pasid_cache(DID, 0, qi.PC_DOMAIN), (False, False)),
        (qi.pasid_cache(DID + 1, 0, qi.PC_DOMAIN), (True, True)),
        (qi.pasid_cache(DID, PASID, qi.PC_PASID), (True, False)),
        (qi.pasid_cache(DID, 0, qi.PC_PASID), (False, True)),
        (qi.pasid_cache(DID + 1, PASID, qi.PC_PASID), (True, True)),
        (qi.context_cache(0, 0, 0, qi.GLOBAL), (True, True)),
        (qi.iotlb(0, 0, 0, qi.GLOBAL), (True, True)),
    ],
)
def test_only_a_pasid_cache_invalidation_takes_pasid_entries(rig, descriptor, left):
    made = rig()
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.start()
    assert made.allowed(IOVA)
    assert made.allowed(IOVA, READ, PASID)
    for pasid in (0, PASID):
        made.entry(pasid, words=(0,) * 8)
    made.submit(descriptor, qi.iotlb(0, 0, 0, qi.GLOBAL))
    assert (made.allowed(IOVA), made.allowed(IOVA, READ, PASID)) == left


@pytest.mark.parametrize(
    ("descriptor", "left"),
    [
        (qi.context_cache(0, 0, 0, qi.GLOBAL), False),
        (qi.context_cache(DID + 1, 0, 0, qi.DOMAIN), False),  # contexts have no domain in scalable mode
        (qi.context_cache(DID + 1, RID, 0, qi.SELECTIVE), False),
        (qi.context_cache(DID, RID + 1, 0, qi.SELECTIVE), True),
        (qi.context_cache(DID, RID + 4, 1, qi.SELECTIVE), False),
        (qi.context_cache(DID, RID + 6, 2, qi.SELECTIVE), False),
        (qi.context_cache(DID, RID + 7, 2, qi.SELECTIVE), True),
        (qi.context_cache(DID, RID + 7, 3, qi.SELECTIVE), False),
        (qi.pasid_cache(0, 0, qi.PC_GLOBAL), True),
        (qi.iotlb(0, 0, 0, qi.GLOBAL), True),
    ],
)
def test_only_a_context_invalidation_takes_context_entries(rig, descriptor, left):
    made = rig()
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.start()
    assert made.allowed(IOVA)
    made.context((0, 0, 0, 0))
    made.submit(descriptor)
    assert made.allowed(IOVA) == left


def test_with_caching_mode_what_is_missing_is_cached_but_not_of_a_first_stage(rig):
    made = rig(cm=1)
    made.tables(S)
    made.start()
    assert made.reason(IOVA) == 0x79
    made.map_second(IOVA, PAGE)
    assert not made.allowed(IOVA)
    made.submit(qi.iotlb(DID, IOVA, 0, qi.SELECTIVE))
    assert made.allowed(IOVA)
    made.entry(PASID, F, did=DID + 1)
    made.submit(qi.pasid_cache(DID, PASID, qi.PC_PASID))
    assert not made.allowed(IOVA, READ, PASID)
    made.map_first(IOVA, PAGE)
    assert made.allowed(IOVA, READ, PASID)


def test_a_missing_context_entry_is_cached_with_caching_mode(rig):
    made = rig(cm=1)
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.context((0, 0, 0, 0))
    made.start()
    assert made.reason(IOVA) == 0x41
    made.context()
    assert not made.allowed(IOVA)
    made.submit(qi.context_cache(0, RID, 0, qi.SELECTIVE))
    assert made.allowed(IOVA)


def test_without_caching_mode_a_refused_write_leaves_nothing_behind(rig):
    made = rig()
    made.tables(S)
    made.map_second(IOVA, PAGE, 1)
    made.start()
    assert made.reason(IOVA, WRITE) == 0x85
    made.map_second(IOVA, PAGE, 3)
    assert made.allowed(IOVA, WRITE)
    made.map_second(OTHER, PAGE, 1)
    assert made.allowed(OTHER, READ)
    made.map_second(OTHER, PAGE, 3)
    assert not made.allowed(OTHER, WRITE)  # what the read has cached


def test_entries_of_one_domain_and_pasid_are_shared_by_sources(rig):
    made = rig()
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.start()
    made.allowed(IOVA)
    made.word(SECOND[3] + 8 * (IOVA >> 12), 0)
    made.dma.rid = 0x0010
    made.context(rid=0x0010)
    assert made.allowed(IOVA)


def test_a_set_root_table_pointer_command_empties_the_caches_with_esrtps_only(rig):
    for esrtps in (0, 1):
        made = warm(rig, S, esrtps=esrtps)
        made.set(regs.GCMD, regs.TE | regs.QIE | regs.SRTP)
        assert made.allowed(IOVA) == (not esrtps)


def test_switching_translation_off_empties_the_caches(rig):
    made = warm(rig, S)
    made.set(regs.GCMD, regs.QIE)
    made.set(regs.GCMD, regs.QIE | regs.TE)
    assert not made.allowed(IOVA)


# -- accessed and dirty bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eafe", "read", "written"), [(False, 0x20, 0x60), (True, 0x420, 0x460)])
def test_the_first_stage_keeps_accessed_and_dirty_bits(rig, eafe, read, written):
    made = rig()
    made.tables(F, flags_2=entries.PASID_EAFE if eafe else 0)
    leaf = made.map_first(IOVA, PAGE)
    made.start()
    made.allowed(IOVA, READ)
    assert made.load(leaf) == PAGE | 7 | read
    assert [made.load(FIRST[n]) & 0xFFF for n in range(3)] == [7 | read] * 3
    made.allowed(IOVA, WRITE)
    assert made.load(leaf) == PAGE | 7 | written
    assert made.load(FIRST[2]) & 0x40 == 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_second_stage_keeps_them_where_the_entry_says_so(rig, level):
    for dirty in (False, True):
        made = rig()
        made.tables(S, dirty=dirty)
        leaf = made.map_second(0, 1 << 30, level=level)
        made.start()
        before = made.load(leaf)
        made.allowed(IOVA & (1 << 12 + 9 * level) - 1, READ)
        assert made.load(leaf) == before | (0x100 if dirty else 0)
        made.allowed(IOVA & (1 << 12 + 9 * level) - 1, WRITE)
        assert made.load(leaf) == before | (0x300 if dirty else 0)


def test_a_device_dirties_exactly_its_pages(rig):
    made = rig()
    made.tables(S, dirty=True)
    for n in range(64):
        made.map_second(n << 12, PAGE + (n << 12))
    made.start()
    made.dma.read(0, 64 << 12)
    made.dma.write((10 << 12) + 100, bytes(5 << 12))
    made.dma.write(40 << 12, b"x")
    dirty = [n for n in range(64) if made.load(SECOND[3] + 8 * n) & 0x200]
    assert dirty == [10, 11, 12, 13, 14, 15, 40]


def test_a_cleared_dirty_bit_is_set_again_only_after_an_invalidation(rig):
    made = rig()
    made.tables(S, dirty=True)
    leaf = made.map_second(IOVA, PAGE)
    made.start()
    made.allowed(IOVA, WRITE)
    made.word(leaf, made.load(leaf) & ~0x200)
    made.allowed(IOVA, WRITE)
    assert not made.load(leaf) & 0x200
    made.submit(qi.iotlb(DID, IOVA, 0, qi.SELECTIVE))
    made.allowed(IOVA, READ)
    assert not made.load(leaf) & 0x200
    made.allowed(IOVA, WRITE)
    assert made.load(leaf) & 0x200


def test_nested_tables_are_written_through_the_second_stage_and_dirty_there(rig):
    made = rig()
    made.tables(N, dirty=True)
    made.map_guest()
    made.map_first(IOVA, PAGE & 0x1FFFFF)
    leaf = made.map_second(PAGE & 0x1FFFFF, PAGE)
    made.start()
    made.allowed(IOVA, READ)
    assert made.load(leaf) & 0x300 == 0x100
    made.allowed(IOVA, WRITE)
    assert made.load(leaf) & 0x300 == 0x300
    assert made.load(SECOND[3] + 8 * (FIRST[3] >> 12)) & 0x300 == 0x300


# -- the queue -------------------------------------------------------------------------------------------------------


def test_a_wait_descriptor_of_256_bits(rig):
    made = rig()
    made.start()
    made.submit(WAIT)
    assert made.load(STATUS) == DONE
    assert made.reg(regs.IQH, 8) == 32


BAD = [
    ((0, 0), regs.IQEI_TYPE),
    ((0xA, 0), regs.IQEI_TYPE),
    ((0xF, 0), regs.IQEI_TYPE),
    ((1 << 9 | 5, 0), regs.IQEI_TYPE),
    ((1, 0), regs.IQEI_RESERVED),
    ((1 << 4 | 1, 1), regs.IQEI_RESERVED),
    ((2, 0), regs.IQEI_RESERVED),
    ((DID << 16 | 3 << 4 | 2, 19), regs.IQEI_RESERVED),
    ((DID << 16 | 3 << 4 | 2, 1 << 7), regs.IQEI_RESERVED),
    ((1 << 4 | 6, 0), regs.IQEI_RESERVED),
    ((6, 0), regs.IQEI_RESERVED),
    ((2 << 4 | 6 | 1 << 52, 0), regs.IQEI_RESERVED),
    ((3 << 4 | 6, 1 << 11), regs.IQEI_RESERVED),
    ((2 << 4 | 7, 0), regs.IQEI_RESERVED),
    ((7 | 1 << 63, 0), regs.IQEI_RESERVED),
    ((7, 1), regs.IQEI_RESERVED),
    ((3 | 1 << 4, 0), regs.IQEI_RESERVED),
    ((3 | 1 << 12, 0), regs.IQEI_RESERVED),
    ((3, 1 << 1), regs.IQEI_RESERVED),
    ((8, 1 << 1), regs.IQEI_RESERVED),
    ((8 | 1 << 60, 0), regs.IQEI_RESERVED),
    ((9 | 1 << 5, 0), regs.IQEI_RESERVED),
    ((9, 1), regs.IQEI_RESERVED),
    ((9, 1 << 12), regs.IQEI_RESERVED),
    ((4 | 1 << 12, 0), regs.IQEI_RESERVED),
    ((5 | 1 << 12, 0), regs.IQEI_RESERVED),
    ((5 | 1 << 5, 2), regs.IQEI_RESERVED),
    ((*WAIT, 1, 0), regs.IQEI_RESERVED),
    ((*WAIT, 0, 1 << 63), regs.IQEI_RESERVED),
]


@pytest.mark.parametrize(("bad", "cause"), BAD)
def test_a_malformed_descriptor_stops_the_queue_and_says_why(rig, bad, cause):
    made = rig()
    made.start()
    made.submit(WAIT, bad, qi.wait(STATUS + 8, DONE))
    assert (made.load(STATUS), made.load(STATUS + 8)) == (DONE, 0)
    assert made.reg(regs.FSTS) & 0x70 == regs.FSTS_IQE
    assert made.reg(regs.IQERCD, 8) & 0xF == cause
    assert made.reg(regs.IQH, 8) == 32
    made.words(QUEUE + 32, (*WAIT, 0, 0))
    made.set(regs.FSTS, regs.FSTS_IQE)
    assert made.load(STATUS + 8) == DONE


SETTINGS = [
    (1, {}, 0, 32, regs.IQEI_WIDTH),
    (3, {}, 0, 32, regs.IQEI_WIDTH),
    (2, {}, regs.IQA_DW, 32, regs.IQEI_MODE),
    (1, {}, regs.IQA_DW, 16, regs.IQEI_ALIGNMENT),
    (1, {}, regs.IQA_DW, 0x1000, regs.IQEI_TAIL),
    (0, {}, 0, 0x2000, regs.IQEI_TAIL),
    (0, {}, regs.IQA_DW, 32, None),
    (3, {}, regs.IQA_DW, 32, None),
    (0, {}, 0, 16, None),
]


@pytest.mark.parametrize(("mode", "changes", "width", "tail", "cause"), SETTINGS)
def test_registers_that_do_not_go_together_stop_the_queue(rig, mode, changes, width, tail, cause):
    made = rig(mode=mode, **changes)
    made.start()
    made.set(regs.IQA, QUEUE | width, 8)
    made.words(QUEUE, (*WAIT, 0, 0))
    made.set(regs.IQT, tail)
    assert bool(made.reg(regs.FSTS) & regs.FSTS_IQE) == (cause is not None)
    if cause is not None:
        assert made.reg(regs.IQERCD, 8) & 0xF == cause


def test_descriptors_of_256_bits_need_scalable_or_abort_mode(rig):
    made = rig(features=Features(fro=0x22), mode=0)
    made.start()
    made.submit(WAIT)
    assert made.reg(regs.IQERCD, 8) & 0xF == regs.IQEI_WIDTH


def test_a_queue_out_of_memory_is_a_fetch_error(rig):
    made = rig()
    made.start()
    made.set(regs.IQA, 1 << 50 | regs.IQA_DW, 8)
    made.set(regs.IQT, 32)
    assert made.reg(regs.IQERCD, 8) & 0xF == regs.IQEI_FETCH


@pytest.mark.parametrize(("kind", "mode"), [(6, 0), (7, 0), (8, 0), (9, 0)])
def test_descriptors_of_scalable_mode_are_none_in_legacy_mode(rig, kind, mode):
    made = rig(mode=mode)
    made.start()
    made.submit((kind | 3 << 4, 0))
    assert made.reg(regs.IQERCD, 8) & 0xF == regs.IQEI_TYPE


def test_the_page_request_drain_flag_is_reserved_without_the_capability(rig):
    for pds, cause in ((1, 0), (0, regs.IQEI_RESERVED)):
        made = rig(pds=pds)
        made.start()
        made.submit(qi.wait(STATUS, DONE, flags=qi.WAIT_PD | qi.WAIT_FN))
        assert made.reg(regs.IQERCD, 8) & 0xF == cause


def test_the_completion_event(rig):
    made = rig()
    made.start()
    made.set(regs.IEADDR, 0xFEE00000)
    made.set(regs.IEDATA, 0x44)
    made.submit(qi.wait(STATUS, DONE, interrupt=True))
    assert (made.messages, made.reg(regs.ICS), made.reg(regs.IECTL)) == ([], 1, 3 << 30)
    made.set(regs.IECTL, 0)
    assert (made.messages, made.reg(regs.IECTL)) == ([(0xFEE00000, 0x44)], 0)


# -- device TLBs -----------------------------------------------------------------------------------------------------

ANY = 1 << 64
DEVICE_TLB = [
    (qi.device_tlb(RID, 0, 0x5000, 0), (RID, -1, 0x5000, 0x1000, False)),
    (qi.device_tlb(RID, 0, 0x5000, 1), (RID, -1, 0x4000, 0x2000, False)),
    (qi.device_tlb(0x1234, 0, 0x12345000, 9, pending=5), (0x1234, -1, 0x12200000, 0x200000, False)),
    ((RID << 32 | 3, 0x7FFFFFFFFFFFF001), (RID, -1, 0, ANY, False)),
    (qi.pasid_device_tlb(RID, 0, PASID, 0x5000, 0), (RID, PASID, 0x5000, 0x1000, False)),
    (qi.pasid_device_tlb(RID, 0, PASID, 0xC0005000, 18), (RID, PASID, 0xC0000000, 1 << 30, False)),
    (qi.pasid_device_tlb(RID, 0, PASID, 0, 52), (RID, PASID, 0, ANY, False)),
    ((RID << 16 | 8, 0x5000 | 1), (RID, 0, 0x5000, 0x1000, True)),
]


@pytest.mark.parametrize(("descriptor", "message"), DEVICE_TLB)
def test_a_device_tlb_invalidation_reaches_its_function(rig, descriptor, message):
    made = rig()
    made.start()
    made.submit(descriptor, WAIT)
    assert made.functions.invalidations == [message]
    assert made.load(STATUS) == DONE


def test_the_physical_functions_id_is_a_field_where_the_unit_throttles(rig):
    descriptor = qi.device_tlb(RID, 0xABCD, 0x5000, 0)
    for dit, cause in ((0, regs.IQEI_RESERVED), (1, 0)):
        made = rig(dit=dit)
        made.start()
        made.submit(descriptor)
        assert made.reg(regs.IQERCD, 8) & 0xF == cause


def test_without_device_tlbs_their_descriptors_are_unknown(rig):
    made = rig(dt=0, prs=0, nwfs=0, pds=0, ptrs=0, sms=0)
    made.start()
    made.submit(qi.device_tlb(RID, 0, 0, 0))
    assert made.reg(regs.IQERCD, 8) & 0xF == regs.IQEI_TYPE


def test_a_function_that_does_not_complete_times_out_at_the_next_wait(rig):
    made = rig()
    made.start()
    made.functions.answers = False
    made.submit(qi.device_tlb(RID, 0, 0x5000, 0), qi.iotlb(0, 0, 0, qi.GLOBAL), WAIT)
    assert (made.load(STATUS), made.reg(regs.IQH, 8)) == (0, 64)
    assert made.reg(regs.FSTS) & 0x70 == regs.FSTS_ITE
    assert made.reg(regs.IQERCD, 8) >> 32 & 0xFFFF == RID
    made.submit(WAIT)
    assert made.load(STATUS) == 0
    made.set(regs.FSTS, regs.FSTS_ITE)
    assert (made.load(STATUS), made.reg(regs.IQH, 8)) == (DONE, 128)


# -- capability registers --------------------------------------------------------------------------------------------


def test_features_and_registers_are_the_same_thing():
    assert Features.of(SCALABLE.cap, SCALABLE.ecap) == SCALABLE
    assert Features.of(0x00D2_008C_222F_0686, 0xF0_0F4A).cap == 0x00D2_008C_222F_0686


@pytest.mark.parametrize("wrong", [{"nest": 1}, {"pasid": 1}, {"prs": 1}, {"mgaw": 64}, {"hpts": 1}, {"sslps": 2}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Features(**wrong)
