"""Table 30 of the manual (7.1.3), a row a test: scalable mode, each kind of request, and what is recorded of it."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE, DmaAbort
from fakedev.vtd import entries, faults, regs
from fakedev.vtd.features import NEEDS
from tests.fakedev.vtd.rig import (
    DID,
    DIRECTORY,
    FIRST,
    FLAGS,
    LOWER,
    NOWHERE,
    PAGE,
    PASID,
    PASIDS,
    RID,
    ROOT,
    SECOND,
    SNOOP,
    UPPER,
)

F, S, N, P = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED, entries.PGTT_PASS_THROUGH
IOVA = 0x3000

#: Of every kind of table: (condition, reason, kind of tables, what is wrong).
TABLES = [
    ("SRT.1", 0x38, S, lambda r: (r.set(regs.RTADDR, NOWHERE | 1 << 10, 8), r.set(regs.GCMD, 0xC4 << 24))),
    ("SRT.2", 0x39, S, lambda r: r.root(high=0)),
    ("SRT.3", 0x3A, S, lambda r: r.root(high=UPPER | 1 | 1 << 7)),
    ("SCT.1", 0x40, S, lambda r: r.root(high=NOWHERE | 1)),
    ("SCT.2", 0x41, S, lambda r: r.context((0, 0, 0, 0))),
    ("SCT.3 bits 8:7", 0x42, S, lambda r: r.context((DIRECTORY | 0xE09 | 1 << 7, 0, 0, 0))),
    ("SCT.3 HPTE", 0x42, S, lambda r: r.context(flags=FLAGS | entries.SM_HPTE)),
    ("SCT.3 word 1", 0x42, S, lambda r: r.context((DIRECTORY | 0xE09, 1 << 21, 0, 0))),
    ("SCT.3 word 2", 0x42, S, lambda r: r.context((DIRECTORY | 0xE09, 0, 1, 0))),
    ("SCT.3 word 3", 0x42, S, lambda r: r.context((DIRECTORY | 0xE09, 0, 0, 1 << 63))),
    ("SCT.4.1", 0x43, S, lambda r: r.context(flags=entries.SM_PRE | entries.SM_PASIDE)),
    ("SCT.4.2", 0x43, S, lambda r: r.context(pdts=0, rid_pasid=1 << 13)),
    ("SPD.1", 0x50, S, lambda r: r.context(directory=NOWHERE)),
    ("SPD.2", 0x51, S, lambda r: r.word(DIRECTORY, 0)),
    ("SPD.3", 0x52, S, lambda r: r.word(DIRECTORY, PASIDS | 1 | 1 << 5)),
    ("SPT.1", 0x58, S, lambda r: r.word(DIRECTORY, NOWHERE | 1)),
    ("SPT.2", 0x59, S, lambda r: [r.entry(p, words=(0,) * 8) for p in (0, PASID)]),
    ("SPT.3 bit 5", 0x5A, S, lambda r: r.change_entry(0, 1 << 5)),
    ("SPT.3 bits 11:10", 0x5A, S, lambda r: r.change_entry(0, 1 << 10)),
    ("SPT.3 word 1", 0x5A, S, lambda r: r.change_entry(1, 1 << 16)),
    ("SPT.3 memory types", 0x5A, S, lambda r: r.change_entry(1, 1 << 32)),
    ("SPT.3 word 2", 0x5A, S, lambda r: r.change_entry(2, 1 << 1)),
    ("SPT.3 word 3", 0x5A, S, lambda r: r.change_entry(3, 1)),
    ("SPT.3 word 4", 0x5A, S, lambda r: r.change_entry(4, 1)),
    ("SPT.3 word 7", 0x5A, S, lambda r: r.change_entry(7, 1 << 63)),
    ("SPT.4.1 0", 0x5B, S, lambda r: r.tables(S, aw=0)),
    ("SPT.4.1 4", 0x5B, N, lambda r: r.tables(N, aw=4)),
    ("SPT.4.2 0", 0x5B, S, lambda r: r.tables(0)),
    ("SPT.4.2 5", 0x5B, S, lambda r: r.tables(5)),
    ("SPT.4.2 7", 0x5B, S, lambda r: r.tables(7)),
    ("SPT.4.3", 0x5B, F, lambda r: r.tables(F, fspm=2)),
    ("SPT.4.3 nested", 0x5B, N, lambda r: r.tables(N, fspm=3)),
    ("SPT.4.4", 0x5B, N, lambda r: r.tables(N, aw=1, first=1 << 39)),
    ("SFS.1", 0x70, F, lambda r: r.word(FIRST[1], NOWHERE | 7)),
    ("SFS.2 leaf", 0x71, F, lambda r: r.map_first(IOVA, PAGE, 6)),
    ("SFS.2 root", 0x71, F, lambda r: r.word(FIRST[0], 0)),
    ("SFS.3 PML4E", 0x72, F, lambda r: r.word(FIRST[0], FIRST[1] | 0x87)),
    ("SFS.3 2 MiB", 0x72, F, lambda r: r.map_first(0, PAGE | 1 << 13, level=1)),
    ("SFS.4", 0x73, F, lambda r: r.tables(F, first=NOWHERE)),
    ("SFS.5 leaf", 0x74, N, lambda r: (r.tables(N, aw=1, second=SECOND[1]), r.map_first(IOVA, 1 << 39))),
    ("SFS.5 table", 0x74, N, lambda r: (r.tables(N, aw=1, second=SECOND[1]), r.word(FIRST[1], 1 << 39 | 7))),
    ("SFS.6", 0x75, N, lambda r: r.map_second(FIRST[0], FIRST[0], 2)),
    ("SFS.7", 0x76, N, lambda r: r.map_second(FIRST[3], FIRST[3], 2)),
    ("SFS.8", 0x77, N, lambda r: r.map_second(FIRST[3], FIRST[3], 1)),
    ("SFS.9", 0x90, F, lambda r: r.tables(F, flags_1=0)),
    ("SSS.1", 0x78, S, lambda r: r.word(SECOND[1], NOWHERE | 3)),
    ("SSS.1 nested", 0x78, N, lambda r: r.word(SECOND[1], NOWHERE | 3)),
    ("SSS.2", 0x79, S, lambda r: r.map_second(IOVA, PAGE, 0)),
    ("SSS.2 none of both", 0x79, S, lambda r: (r.map_second(IOVA, PAGE, 1), r.word(SECOND[2], SECOND[3] | 2))),
    ("SSS.2 of a table", 0x79, N, lambda r: r.map_second(FIRST[2], 0, 0)),
    ("SSS.2 of the page", 0x79, N, lambda r: r.map_first(IOVA, 1 << 30)),
    ("SSS.3 PML4E", 0x7A, S, lambda r: r.word(SECOND[0], SECOND[1] | 0x83)),
    ("SSS.3 2 MiB", 0x7A, S, lambda r: r.map_second(0, PAGE | 1 << 12, level=1)),
    ("SSS.3 nested", 0x7A, N, lambda r: r.word(SECOND[0], SECOND[1] | 0x83)),
    ("SSS.4", 0x7B, S, lambda r: r.tables(S, second=NOWHERE)),
    ("SSS.4 nested", 0x7B, N, lambda r: r.tables(N, second=NOWHERE)),
    ("SSS.5", 0x7C, S, lambda r: r.tables(S, dirty=True, flags_1=0)),
    ("SGN.2", 0x81, F, lambda r: r.map_first(IOVA, PAGE, 3)),
    ("SGN.2 table", 0x81, F, lambda r: r.word(FIRST[2], FIRST[3] | 3)),
    ("SGN.2 nested", 0x81, N, lambda r: r.map_first(IOVA, PAGE, 3)),
    ("SGN.7", 0x86, S, lambda r: r.map_second(IOVA, PAGE, 2)),
    ("SGN.7 nested", 0x86, N, lambda r: r.map_second(PAGE & 0x1FFFFF, PAGE, 2)),
    ("SGN.8.1 second", 0x87, S, lambda r: r.map_second(IOVA, 0xFEE00000)),
    ("SGN.8.1 first", 0x87, F, lambda r: r.map_first(IOVA, 0xFEEFF000)),
]


def prepared(rig, pgtt, **kwargs):
    """A rig whose IOVA is mapped, in tables of one kind."""
    made = rig(**kwargs)
    made.tables(pgtt)
    if pgtt == N:
        made.map_guest()
        made.map_first(IOVA, PAGE & 0x1FFFFF)
        made.map_second(PAGE & 0x1FFFFF, PAGE)
    elif pgtt == F:
        made.map_first(IOVA, PAGE)
    else:
        made.map_second(IOVA, PAGE)
    made.start()
    return made


@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
@pytest.mark.parametrize("pgtt", [F, S, N, P])
def test_without_a_fault_every_kind_of_table_translates(rig, pgtt, pasid):
    made = prepared(rig, pgtt)
    made.memory.write(IOVA if pgtt == P else PAGE, b"data")
    assert made.dma.read(IOVA, 4, pasid=pasid) == b"data"
    made.dma.write(IOVA + 8, b"more", pasid=pasid)
    assert made.memory.read((IOVA if pgtt == P else PAGE) + 8, 4) == b"more"
    assert made.record() is None


@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
@pytest.mark.parametrize(("condition", "reason", "pgtt", "wrong"), TABLES, ids=[row[0] for row in TABLES])
def test_a_condition_is_refused_and_recorded_with_its_reason(rig, condition, reason, pgtt, wrong, pasid):
    made = prepared(rig, pgtt)
    wrong(made)
    assert not made.allowed(IOVA, READ, pasid)
    expected = {"reason": reason, "type": "read", "sid": RID, "address": IOVA, "at": 0}
    if pasid != NO_PASID:
        expected |= {"pasid": PASID, "exe": 0, "priv": 0}
    assert made.record() == expected
    assert f"fault {reason:02x}h" in made.box.last_faults[-1]


@pytest.mark.parametrize("where", ["context", "directory", "pasid"])
@pytest.mark.parametrize(("condition", "reason", "pgtt", "wrong"), TABLES, ids=[row[0] for row in TABLES])
def test_fault_processing_disabled_silences_qualified_conditions_only(rig, condition, reason, pgtt, wrong, where):
    made = prepared(rig, pgtt)
    wrong(made)
    place = {"context": UPPER, "directory": DIRECTORY, "pasid": PASIDS}[where]
    made.word(place, made.load(place) | entries.ENTRY_FPD)
    assert not made.allowed(IOVA, READ)
    read = {"context": 0x40, "directory": 0x50, "pasid": 0x58}[where]
    seen = reason > read
    silent = seen and reason not in faults.UNQUALIFIED
    assert (made.record() is None) == silent


PASID_CONDITIONS = [
    ("SCT.6", 0x45, lambda r: r.context(flags=FLAGS & ~entries.SM_PASIDE & ~entries.SM_EPTR), PASID),
    ("SCT.7", 0x46, lambda r: r.context(pdts=0), 1 << 13),
    ("SCT.9", 0x48, lambda r: r.context(rid_pasid=PASID), PASID),
    ("SGN.10", 0x89, lambda r: None, 1 << 16),
]


@pytest.mark.parametrize(("condition", "reason", "wrong", "pasid"), PASID_CONDITIONS)
def test_conditions_of_requests_with_a_pasid(rig, condition, reason, wrong, pasid):
    made = prepared(rig, S, pss=15)
    wrong(made)
    assert made.reason(IOVA, WRITE, pasid) == reason
    assert made.record()["pasid"] == pasid
    made.clear()
    assert made.allowed(IOVA, WRITE) or reason == 0x48


def test_eptr_without_paside_is_invalid_for_requests_without_a_pasid(rig):
    made = prepared(rig, S)
    made.context(flags=entries.SM_DTE | entries.SM_EPTR)
    assert made.reason(IOVA) == 0x43
    made.clear()
    assert made.reason(IOVA, READ, PASID) == 0x45


@pytest.mark.parametrize("pgtt", [F, S, N])
def test_a_write_without_permission_is_85(rig, pgtt):
    made = prepared(rig, pgtt)
    if pgtt == S:
        made.map_second(IOVA, PAGE, 1)
    else:
        made.map_first(IOVA, PAGE & 0x1FFFFF if pgtt == N else PAGE, 5)
    assert made.allowed(IOVA, READ)
    assert made.reason(IOVA, WRITE) == 0x85
    assert made.record()["type"] == "write"


def test_a_write_that_the_second_stage_of_two_forbids_is_85_and_leaves_the_dirty_bit_alone(rig):
    made = prepared(rig, N)
    leaf = made.map_first(IOVA, PAGE & 0x1FFFFF)
    made.map_second(PAGE & 0x1FFFFF, PAGE, 1)
    assert made.reason(IOVA, WRITE) == 0x85
    assert made.load(leaf) & 0x60 == 0x20


@pytest.mark.parametrize(
    ("fspm", "address", "reason"),
    [
        (0, 1 << 47, 0x80),
        (0, (1 << 64) - (1 << 48), 0x80),
        (0, (1 << 64) - (1 << 47), None),
        (0, (1 << 47) - 4096, None),
        (1, 1 << 56, 0x80),
        (1, (1 << 56) - 4096, None),
        (1, (1 << 64) - (1 << 56), None),
    ],
)
def test_first_stage_addresses_are_canonical(rig, fspm, address, reason):
    made = rig()
    made.tables(F, fspm=fspm)
    made.map_first(address & (1 << 57) - 1, PAGE, levels=4 + fspm)
    made.start()
    assert made.reason(address) == reason


@pytest.mark.parametrize(("aw", "mgaw", "width"), [(1, 56, 39), (2, 56, 48), (3, 56, 57), (3, 49, 50)])
def test_an_address_beyond_the_second_stage_is_84(rig, aw, mgaw, width):
    made = rig(mgaw=mgaw)
    made.tables(S, aw=aw)
    made.map_second((1 << width) - 4096, PAGE, levels=aw + 2)
    made.start()
    assert made.reason((1 << width) - 4096) is None
    assert made.reason(1 << width) == 0x84


def test_pass_through_beyond_the_host_width_is_83_and_to_the_interrupt_range_87(rig):
    made = rig(host_address_bits=46)
    made.tables(P)
    made.start()
    assert made.reason(1 << 46) == 0x83
    made.clear()
    assert made.reason(0xFEE00000, READ, PASID) == 0x87
    made.clear()
    assert made.reason(0xFEF00000, READ, PASID) is None


def test_bits_beyond_the_host_width_are_reserved_everywhere(rig):
    made = prepared(rig, N, host_address_bits=40)
    assert made.allowed(IOVA)
    for change, reason in (
        (lambda: made.root(high=UPPER | 1 | 1 << 40), 0x3A),
        (lambda: made.context(directory=DIRECTORY | 1 << 40), 0x42),
        (lambda: made.word(DIRECTORY, PASIDS | 1 | 1 << 40), 0x52),
        (lambda: made.change_entry(0, 1 << 40), 0x5A),
        (lambda: made.change_entry(2, 1 << 51), 0x5A),
        (lambda: made.map_first(IOVA, 1 << 40), 0x72),
        (lambda: made.map_second(PAGE & 0x1FFFFF, 1 << 40), 0x7A),
    ):
        made.unit.reset()
        made.clear()
        made.tables(N)
        made.map_first(IOVA, PAGE & 0x1FFFFF)
        made.map_second(PAGE & 0x1FFFFF, PAGE)
        made.start()
        change()
        assert made.reason(IOVA) == reason


# -- privilege and execution -----------------------------------------------------------------------------------------


def test_supervisor_requests_need_sre(rig):
    made = prepared(rig, F)
    assert made.reason(IOVA, READ, PASID, privileged=True) == 0x5D
    assert made.record()["priv"] == 1
    made.clear()
    made.unit.invalidate_pasids(3, 0, 0)
    made.change_entry(2, entries.PASID_SRE)
    assert made.allowed(IOVA, READ, PASID, privileged=True)


@pytest.mark.parametrize(
    ("wpe", "bits", "user", "supervisor"),
    [
        (0, 1, (0x81, 0x81), (None, None)),
        (1, 1, (0x81, 0x81), (None, 0x85)),
        (1, 3, (0x81, 0x81), (None, None)),
        (0, 5, (None, 0x85), (None, None)),
        (1, 5, (None, 0x85), (None, 0x85)),
        (1, 7, (None, None), (None, None)),
    ],
)
def test_rights_of_the_first_stage_by_privilege(rig, wpe, bits, user, supervisor):
    made = rig()
    made.tables(F, flags_2=entries.PASID_SRE | (entries.PASID_WPE if wpe else 0))
    made.map_first(IOVA, PAGE, bits)
    made.start()
    for privileged, expected in ((False, user), (True, supervisor)):
        for access, reason in zip((READ, WRITE), expected, strict=True):
            assert made.reason(IOVA, access, PASID, privileged=privileged) == reason
            made.clear()


def test_rid_priv_gives_requests_without_a_pasid_privilege(rig):
    made = rig()
    made.tables(F, flags_2=entries.PASID_SRE)
    made.map_first(IOVA, PAGE, 3)
    made.context(privileged=True)
    made.start()
    assert made.allowed(IOVA, WRITE)
    made.unit.reset()
    made.entry(0, F)
    made.start()
    assert made.reason(IOVA) == 0x5D
    assert "priv" not in made.record()


@pytest.mark.parametrize(
    ("version", "ers", "reason"), [(0x10, 0, 0x5C), (0x70, 0, 0x5C), (0x80, 0, 0x34), (0x10, 1, None)]
)
def test_execute_requests(rig, version, ers, reason):
    made = prepared(rig, F, version=version, ers=ers)
    assert made.reason(IOVA, READ, PASID, execute=True) == reason
    if reason:
        assert made.record()["exe"] == 1


# -- modes of the root-table address register ------------------------------------------------------------------------


def without(feature):
    """The changes that switch a feature off, and what depends on it."""
    off = {feature}
    while more := {name for name, needs in NEEDS.items() if off & set(needs)} - off:
        off |= more
    return dict.fromkeys(off, 0)


@pytest.mark.parametrize(
    ("mode", "changes", "reason"),
    [
        (1, {"smts": 0}, 0x30),
        (2, {}, 0x30),
        (3, {"adms": 0}, 0x30),
        (3, {}, 0x33),
    ],
)
@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
def test_modes_without_translation_refuse_everything(rig, mode, changes, reason, pasid):
    if "smts" in changes:
        changes = without("smts")
    made = rig(mode=mode, **changes)
    made.tables()
    made.start()
    assert made.reason(IOVA, READ, pasid) == reason


def test_a_pasid_in_legacy_mode_is_31_and_a_page_request_32(rig):
    made = rig(mode=0)
    made.start()
    assert made.reason(IOVA, READ, PASID) == 0x31
    made.clear()
    made.page_request()
    assert made.record() == {
        "reason": 0x32,
        "type": "page",
        "sid": RID,
        "address": 0x1000,
        "at": 0,
        "pasid": PASID,
        "exe": 0,
        "priv": 0,
    }
    assert made.functions.responses == [(RID, PASID, 3, 1)]


# -- features that are absent make their fields reserved -------------------------------------------------------------

RESERVED = [
    (without("dt"), lambda r: r.context(flags=entries.SM_DTE), 0x42),
    ({"prs": 0, "sms": 0}, lambda r: r.context(flags=entries.SM_DTE | entries.SM_PRE), 0x42),
    ({"pasid": 0, "ptrs": 0}, lambda r: r.context(flags=entries.SM_PASIDE), 0x42),
    ({"ptrs": 0}, lambda r: r.context(flags=entries.SM_DTE | entries.SM_PASIDE | entries.SM_EPTR), 0x42),
    ({"rps": 0}, lambda r: r.context(rid_pasid=5), 0x42),
    ({"rprivs": 0}, lambda r: r.context(privileged=True), 0x42),
    ({"ssads": 0}, lambda r: r.tables(S, dirty=True), 0x5A),
    ({"sc": 0}, lambda r: r.change_entry(1, entries.PASID_PGSNP), 0x5A),
    (without("smpwcs"), lambda r: r.change_entry(1, SNOOP), 0x5A),
    ({"srs": 0, "rprivs": 0}, lambda r: r.change_entry(2, entries.PASID_SRE), 0x5A),
    ({"eafs": 0}, lambda r: r.tables(F, flags_2=entries.PASID_EAFE), 0x5A),
    (without("fsts"), lambda r: r.change_entry(2, FIRST[0]), 0x5A),
    (without("fsts"), lambda r: r.tables(S, first=0, flags_2=0x10), 0x5A),
    ({"nd": 2}, lambda r: r.tables(S, did=0x100), 0x5A),
    ({"nest": 0}, lambda r: r.tables(N), 0x5B),
    ({"pt": 0}, lambda r: r.tables(P), 0x5B),
    ({"ssts": 0, "nest": 0}, lambda r: r.tables(P), None),
    ({"fs5lp": 0}, lambda r: r.tables(F, fspm=1), 0x5B),
    ({"sagaw": 0b0110}, lambda r: r.tables(S, aw=3), 0x5B),
    ({"fs1gp": 0}, lambda r: (r.tables(F), r.map_first(0, 1 << 30, level=2)), 0x72),
    ({"sslps": 1}, lambda r: r.map_second(0, 1 << 30, level=2), 0x7A),
    ({"sslps": 0}, lambda r: r.map_second(0, 2 << 20, level=1), 0x7A),
    ({"sc": 0}, lambda r: r.map_second(IOVA, PAGE, 3 | 1 << 11), 0x7A),
]


@pytest.mark.parametrize(("changes", "wrong", "reason"), RESERVED)
def test_a_feature_that_the_unit_lacks_makes_its_fields_reserved(rig, changes, wrong, reason):
    made = rig(**changes)
    made.root()
    made.context(flags=0)
    made.word(DIRECTORY, PASIDS | 1)
    made.entry(0, S, words=(SECOND[0] | 2 << 2 | S << 6 | 1, DID, 0, 0, 0, 0, 0, 0))
    made.entry(PASID, S, words=(SECOND[0] | 2 << 2 | S << 6 | 1, DID, 0, 0, 0, 0, 0, 0))
    made.map_second(IOVA, PAGE)
    wrong(made)
    made.start()
    assert made.reason(IOVA) == reason


# -- the log ---------------------------------------------------------------------------------------------------------


def test_the_records_are_a_ring_and_overflow_is_told(rig):
    made = prepared(rig, S)
    for n in range(9):
        assert not made.allowed(0x10_0000 + n * 4096)
    assert made.reg(regs.FSTS) == regs.FSTS_PPF | regs.FSTS_PFO
    assert [made.record(n)["address"] for n in range(8)] == [0x10_0000 + n * 4096 for n in range(8)]
    for n in range(5):
        made.set(made.fault_offset + 16 * n + 12, 1 << 31)
    assert not made.allowed(0x20_0000)
    assert made.record(0) is None
    made.set(regs.FSTS, regs.FSTS_PFO)
    assert made.reg(regs.FSTS) == regs.FSTS_PPF
    assert not made.allowed(0x20_0000)
    assert made.record(0)["address"] == 0x20_0000


def test_fri_is_the_first_pending_record(rig):
    made = prepared(rig, S)
    for _ in range(3):
        made.allowed(0x10_0000)
    for n in range(3):
        made.set(made.fault_offset + 16 * n + 12, 1 << 31)
    assert made.reg(regs.FSTS) & 2 == 0
    made.allowed(0x10_0000)
    assert made.reg(regs.FSTS) == 3 << 8 | regs.FSTS_PPF


def test_the_index_begins_anew_when_translation_is_off(rig):
    made = prepared(rig, S)
    made.allowed(0x10_0000)
    made.set(made.fault_offset + 12, 1 << 31)
    made.set(regs.GCMD, regs.QIE)
    made.set(regs.GCMD, regs.TE | regs.QIE)
    made.allowed(0x10_0000)
    assert made.record(0) is not None


def test_a_unit_without_pasids_and_device_tlbs_has_no_such_fields(rig):
    made = rig(mode=0, **without("dt"), pasid=0)
    made.start()
    assert made.reason(IOVA, READ, PASID) == 0x31
    assert "pasid" not in made.record()


def test_a_request_through_the_lower_context_table(rig):
    made = prepared(rig, S)
    made.dma.rid = 0x0010
    assert made.reason(IOVA) == 0x41
    made.clear()
    made.context(rid=0x0010)
    assert made.allowed(IOVA)
    made.unit.invalidate_contexts(1, 0, 0, 0)
    made.root(low=LOWER | 1 | 2)
    assert made.reason(IOVA) == 0x3A
    made.dma.rid = 0x0110
    made.clear()
    assert made.reason(IOVA) == 0x39
    with pytest.raises(DmaAbort):
        made.dma.read(ROOT, 4)
