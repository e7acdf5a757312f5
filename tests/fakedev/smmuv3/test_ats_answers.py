"""What translation requests and translated requests get, case by case (Arm IHI 0070, 3.9.1, 8.1, 13.6 and 13.7)."""

import pytest

from fakedev.dma import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE, DmaAbort
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from fakedev.tlp import PRG_FAILURE, PRG_SUCCESS, PageResponse, Translation
from tests.fakedev.smmuv3.bench import NOWHERE, PAGE, RID, S1_LEAF, S1_TABLES, S2_LEAF, S2_TABLES, Bench
from tests.fakedev.smmuv3.test_ats import CHECKED, FULL, SPLIT, Endpoints, ask, fill, page

VA, IPA = 0x1234000, 0x4000_5000
RO, UNPRIVILEGED, AF, DBM, PXN, UXN = 1 << 7, 1 << 6, 1 << 10, 1 << 51, 1 << 53, 1 << 54
RW = READ | WRITE
SUBSTREAMS = e.STE_1_S1DSS.put(e.S1DSS_SSID0)


@pytest.fixture
def ats(bench):
    """Requests with the PASID 1 have CD 1, others CD 0; both have the same tables."""
    bench.unit.downstream = bench.endpoints = Endpoints()
    bench.ste(cdmax=4, w1=FULL | SUBSTREAMS)
    for index in (0, 1):
        bench.cd(index)
    bench.map(VA, PAGE)
    return bench


def both_stages(bench, eats=SPLIT, leaf=S1_LEAF, leaf2=S2_LEAF, dss=e.S1DSS_SSID0, **fields):
    """VA is IPA is PAGE; the entries for the tables are blocks of 1 GiB."""
    bench.set(regs.CR0, CHECKED)
    bench.ste(e.CONFIG_NESTED, cdmax=4, w1=eats | e.STE_1_S1DSS.put(dss), **fields)
    bench.identity2()
    bench.map(VA, IPA, leaf)
    bench.map2(IPA, PAGE, leaf2)
    bench.forget()


# -- what is granted (13.7.1) ----------------------------------------------------------------------------------------

# The page is privileged-readable and -writable in all rows; who else may what, is in the leaf.
GRANTED = [
    # the table of examples in 13.7
    ("user-RO, X", S1_LEAF | RO, READ, READ),
    ("user-RW, X", S1_LEAF | PXN, RW, RW),
    ("user-RW, XN", S1_LEAF | UXN, READ | EXECUTE, RW),
    ("user-RW, X, asked for", S1_LEAF, RW | EXECUTE, RW | EXECUTE),
    ("user-X only", S1_LEAF & ~UNPRIVILEGED, RW | EXECUTE, 0),
]


@pytest.mark.parametrize(("leaf", "asked", "granted"), [row[1:] for row in GRANTED], ids=[row[0] for row in GRANTED])
def test_permissions_granted_to_a_translation_request(ats, leaf, asked, granted):
    """Write is permitted, not required, where it was not asked for (NW == 1)."""
    ats.map(VA, PAGE, leaf)
    allowed = ask(ats, access=asked, pasid=1).allowed
    assert allowed & ~WRITE == granted & ~WRITE
    if asked & WRITE:
        assert allowed & WRITE == granted & WRITE


@pytest.mark.parametrize(
    ("instcfg", "leaf", "asked", "granted"),
    [
        # "TC.R = ttd_X; TC.Exe = TR.Exe && ttd_X": all reads are fetches
        (e.OVERRIDE_SET, S1_LEAF & ~UNPRIVILEGED, READ | EXECUTE, READ | EXECUTE),
        (e.OVERRIDE_SET, S1_LEAF & ~UNPRIVILEGED, READ, READ),
        (e.OVERRIDE_SET, S1_LEAF | RO | UXN, READ | EXECUTE, 0),
        # "TC.R = ttd_R; TC.Exe = TR.Exe && ttd_R": fetches are reads
        (e.OVERRIDE_CLEAR, S1_LEAF | RO | UXN, READ | EXECUTE, READ | EXECUTE),
        (e.OVERRIDE_CLEAR, S1_LEAF | RO | UXN, READ, READ),
        (e.OVERRIDE_CLEAR, S1_LEAF & ~UNPRIVILEGED, READ | EXECUTE, 0),
    ],
)
def test_instcfg_changes_what_a_translation_request_is_granted(ats, instcfg, leaf, asked, granted):
    ats.ste(cdmax=4, w1=FULL | SUBSTREAMS | e.STE_1_INSTCFG.put(instcfg))
    ats.map(VA, PAGE, leaf)
    assert ask(ats, access=asked, pasid=1).allowed == granted


def test_privcfg_changes_whose_permissions_are_granted(ats):
    """13.7.1: PRIVCFG == Unprivileged, a privileged request, User-RO, Priv-RW: R == 1, W == 0."""
    ats.ste(cdmax=4, w1=FULL | SUBSTREAMS | e.STE_1_PRIVCFG.put(e.OVERRIDE_CLEAR))
    ats.map(VA, PAGE, S1_LEAF | RO)
    assert ask(ats, access=RW | PRIVILEGED, pasid=1).allowed == READ
    ats.ste(cdmax=4, w1=FULL | SUBSTREAMS | e.STE_1_PRIVCFG.put(e.OVERRIDE_SET))
    ats.map(VA, PAGE, S1_LEAF & ~UNPRIVILEGED)
    ats.forget()
    assert ask(ats, access=RW, pasid=1).allowed == RW


def test_translation_request_without_a_pasid_is_unprivileged_data(ats):
    """13.7.1: "if !TR.PASID_present: TR.Priv = 0, TR.Exe = 0"."""
    ats.map(VA, PAGE, S1_LEAF & ~UNPRIVILEGED)
    assert ask(ats, access=RW | EXECUTE | PRIVILEGED).allowed == 0
    ats.map(VA, PAGE)
    ats.forget()
    assert ask(ats, access=RW | EXECUTE).allowed == RW


# -- split-stage ATS (13.6.3, 13.6.5) --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "leaf2", "granted"),
    [
        (S1_LEAF, S2_LEAF, RW),
        (S1_LEAF | RO, S2_LEAF, READ),
        (S1_LEAF, S2_LEAF & ~(1 << 7), READ),
        (S1_LEAF, S2_LEAF & ~(1 << 6), WRITE),
        (S1_LEAF, S2_LEAF & ~AF, 0),
    ],
)
def test_split_stage_answers_are_granted_by_both_stages(ats, leaf, leaf2, granted):
    both_stages(ats, leaf=leaf, leaf2=leaf2)
    assert ask(ats) == Translation(VA, 0x1000, IPA if granted else 0, granted)
    assert ats.event() is None


def test_split_stage_answer_is_as_large_as_the_smaller_leaf(ats):
    both_stages(ats)
    ats.map(0x40_0000, 0x4040_0000, level=1)
    for n in range(512):
        ats.map2(0x4040_0000 + 0x1000 * n, PAGE)
    ats.forget()
    assert ask(ats, 0x40_5000) == Translation(0x40_5000, 0x1000, 0x4040_5000, RW)
    ats.map2(0x4040_0000, 0x80_0000, level=1)
    ats.forget()
    assert ask(ats, 0x40_5000) == Translation(0x40_0000, 0x20_0000, 0x4040_0000, RW)


def test_split_stage_page_that_stage_2_would_make_dirty_is_writable(ats):
    """3.13.7.1: a writable-clean stage 2 descriptor is treated as writable."""
    both_stages(ats, leaf2=S2_LEAF & ~(1 << 7) | DBM, w2=e.STE_2_S2HA | e.STE_2_S2HD)
    assert ask(ats).allowed == RW
    ats.dma.write_translated(IPA, b"late")
    assert ats.load(S2_TABLES[3] + 8 * 5) >> 7 & 1, "dirty at the latest by the write"


def test_split_stage_answer_without_stage_1_is_the_ipa_with_the_rights_of_stage_2(ats):
    """13.6.5: "R and W permissions are granted from the stage 2 permissions for the IPA"."""
    both_stages(ats, leaf2=S2_LEAF & ~(1 << 7), dss=e.S1DSS_BYPASS)
    assert ask(ats, IPA) == Translation(IPA, 0x1000, IPA, READ)
    assert ask(ats, IPA + 0x1000).allowed == 0
    assert ats.event() is None


def test_split_stage_answer_for_a_tagged_address(ats):
    both_stages(ats)
    ats.cd(w0=e.CD_0_TBI0)
    ats.forget()
    tagged = VA | 0x5A << 56
    assert ask(ats, tagged) == Translation(tagged, 0x1000, IPA, RW)


@pytest.mark.parametrize("leaf2", [0, S2_LEAF & ~AF, S2_LEAF & ~(3 << 6)], ids=["none", "AF", "no rights"])
@pytest.mark.parametrize("eats", [FULL, SPLIT])
def test_stage_2_fault_of_a_cd_fetch_is_an_answer_without_rights(ats, eats, leaf2):
    """3.9.1.2: "this includes stage 2 faults for a CD fetch"."""
    both_stages(ats, eats=eats, cds=IPA + 0x1000)
    ats.map2(IPA + 0x1000, PAGE, leaf2)
    if not leaf2:
        ats.word(S2_TABLES[3] + 8 * 6, 0)
    assert ask(ats) == Translation(VA, 0x1000, 0, 0)
    assert ats.event() is None


@pytest.mark.parametrize("config", [e.CONFIG_S1, e.CONFIG_NESTED])
def test_stage_1_that_is_skipped_has_addresses_up_to_ias(ats, config):
    """13.6.5 and 3.9.1.2: the stage 1 Address Size fault of a translation request is R == W == 0."""
    ats.ste(config, cdmax=4, w1=FULL | e.STE_1_S1DSS.put(e.S1DSS_BYPASS))
    ats.identity2()
    ats.forget()
    assert ask(ats, 0x4001_0000 if config == e.CONFIG_S1 else 0x10000).allowed == RW
    assert ask(ats, 1 << 48).allowed == 0


@pytest.mark.parametrize(("granules", "stu"), [((12, 16), 0x1000), ((14, 16), 0x4000), ((16,), 0x1_0000)])
def test_answer_without_rights_is_as_large_as_the_smallest_unit(granules, stu):
    """3.9.1.2: "its translation size is equal to the STU size", the smallest granule there is (3.9.1)."""
    bench = Bench(granules=granules)
    bench.ste(w1=FULL)
    bench.cd(tg0=1)
    assert ask(bench, 0x7654_3210) == Translation(0x7654_3210 & -stu, stu, 0, 0)
    bench.ste(cdmax=4, w1=FULL | e.STE_1_S1DSS.put(e.S1DSS_BYPASS))
    bench.forget()
    assert ask(bench, 0x7654_3210) == Translation(0x7654_3210 & -stu, stu, 0x7654_3210 & -stu, RW)
    bench.close()


# -- translated requests (3.9.1.1, 3.9.1.3) --------------------------------------------------------------------------


class Anything:
    """Memory that answers everywhere."""

    def read(self, offset, length):
        return bytes(length)

    def write(self, offset, data):
        pass

    def view(self, offset, length):
        return None


def translated(bench, address, access=READ, **how):
    try:
        if access & WRITE:
            bench.dma.write_translated(address, b"data", access=access, **how)
        else:
            bench.dma.read_translated(address, 4, access=access, **how)
    except DmaAbort:
        return False
    return True


@pytest.mark.parametrize("cr0", [0xF, CHECKED])
def test_translated_request_beyond_the_physical_addresses_is_aborted(cr0):
    """3.9.1.1: aborted or truncated; no event is recorded."""
    bench = Bench(oas=40)
    bench.set(regs.CR0, cr0)
    bench.ste(w1=FULL)
    bench.memory.add_window(1 << 44, 0x1000, Anything())
    assert not translated(bench, 1 << 44)
    assert bench.event() is None
    bench.close()


def test_translated_request_beyond_ias_is_a_stage_1_address_size_fault_with_split_stage(ats):
    """3.9.1.3, priority 10: before stage 2 looks at it."""
    both_stages(ats, t0sz=25, sl0=1, root=S2_TABLES[1])
    assert not translated(ats, 1 << 48)
    event = ats.event()
    assert (event["id"], event["s2"], event["class"]) == (events.F_ADDR_SIZE, 0, events.CLASS_IN)


def test_translated_request_is_unprivileged_data_without_a_substream(ats):
    """3.9.1.3: PASIDTT == 0, so PnU == 0, InD == 0 and SSV == 0, whatever the prefix says."""
    both_stages(ats, leaf2=S2_LEAF & ~(3 << 6))
    assert not translated(ats, IPA, READ | EXECUTE | PRIVILEGED, pasid=1)
    event = ats.event()
    assert event["id"] == events.F_PERMISSION
    assert (event["ssid"], event["pnu"], event["ind"], event["rnw"]) == (None, 0, 0, 1)
    ats.ste(w1=0)
    ats.forget()
    assert not translated(ats, IPA, READ, pasid=1)
    assert ats.event()["words"] == [RID << 32 | events.F_TRANSL_FORBIDDEN, events.EVT_1_RNW, IPA, 0]


def test_privcfg_is_applied_to_translated_requests_of_split_stage(ats):
    """13.7: "the overrides … are applied to the Translated transaction prior to stage 2 translation"."""
    privileged_x = S2_LEAF & ~(3 << 6) | 3 << 53
    overrides = e.STE_1_PRIVCFG.put(e.OVERRIDE_SET) | e.STE_1_INSTCFG.put(e.OVERRIDE_SET)
    both_stages(ats, eats=SPLIT | overrides, leaf2=privileged_x)
    assert translated(ats, IPA)
    both_stages(ats, leaf2=privileged_x)
    assert not translated(ats, IPA)


# -- what CR2.REC_CFG_ATS records (3.9.1.2, 3.9.1.3, 8.1) ------------------------------------------------------------


def recording(bench, flags):
    bench.set(regs.CR0, 0)
    bench.set(regs.CR2, flags)
    bench.set(regs.CR0, CHECKED)
    return bench


def no_stream(bench):
    bench.set(regs.CR0, 0)
    bench.set(regs.STRTAB_BASE_CFG, 2)
    bench.set(regs.CR0, CHECKED)


CONFIGURATION_ERRORS = {
    events.F_STE_FETCH: lambda bench: bench.set(regs.STRTAB_BASE, NOWHERE, 8),
    events.C_BAD_STE: lambda bench: bench.ste(words=[0]),
    events.C_BAD_SUBSTREAMID: lambda bench: bench.ste(w1=FULL),
    events.F_CD_FETCH: lambda bench: bench.ste(cdmax=4, w1=FULL | SUBSTREAMS, cds=NOWHERE),
    events.C_BAD_CD: lambda bench: bench.cd(1, words=[0]),
    events.F_WALK_EABT: lambda bench: bench.word(S1_TABLES[0], NOWHERE | 3),
}


@pytest.mark.parametrize("number", CONFIGURATION_ERRORS, ids=events.NAMES.get)
def test_errors_of_translation_requests_are_recorded_with_rec_cfg_ats_alone(ats, number):
    for flags, recorded in ((0, False), (regs.CR2_REC_CFG_ATS, True)):
        ats.set(regs.CR0, 0)
        CONFIGURATION_ERRORS[number](ats)
        recording(ats, flags).forget()
        with pytest.raises(DmaAbort):
            ask(ats, pasid=1)
        event = ats.event()
        assert (event is not None and event["id"] == number) == recorded


def test_stream_without_an_ste_is_recorded_with_rec_cfg_ats(ats):
    """Of a translation request only with RECINVSID, too (3.9.1.2); of a translated one without (3.9.1.3)."""
    for flags in (0, regs.CR2_RECINVSID, regs.CR2_REC_CFG_ATS, regs.CR2_REC_CFG_ATS | regs.CR2_RECINVSID):
        recording(ats, flags)
        no_stream(ats)
        with pytest.raises(DmaAbort):
            ask(ats)
        event = ats.event()
        assert (event is not None) == (flags == regs.CR2_REC_CFG_ATS | regs.CR2_RECINVSID)
        assert not translated(ats, PAGE)
        event = ats.event()
        assert (event is not None) == bool(flags & regs.CR2_REC_CFG_ATS)
        assert event is None or event["id"] == events.C_BAD_STREAMID


def test_translation_faults_of_translation_requests_are_never_recorded(ats):
    recording(ats, regs.CR2_REC_CFG_ATS)
    assert ask(ats, 0x9000).allowed == 0
    assert ats.event() is None


def test_rec_cfg_ats_is_of_no_effect_where_idr0_says_so():
    """6.3.12: the field is there when ATSRECERR == 1."""
    bench = Bench(ats_record_errors=False)
    recording(bench, regs.CR2_REC_CFG_ATS | regs.CR2_RECINVSID)
    assert bench.reg(regs.IDR0) >> 23 & 1 == 0
    assert not bench.reg(regs.CR2) & regs.CR2_REC_CFG_ATS
    assert not translated(bench, PAGE)
    assert bench.event() is None
    bench.close()


def test_atsrecerr_goes_with_ats():
    bench = Bench()
    assert bench.reg(regs.IDR0) >> 23 & 1
    bench.close()
    bench = Bench(ats=False, pri=False)
    assert bench.reg(regs.IDR0) >> 23 & 1 == 0
    bench.close()


# -- automatic responses (8.1, 8.2) ----------------------------------------------------------------------------------


def overflown(ste, **changes):
    """A unit whose PRI queue is full."""
    bench = Bench(**changes)
    bench.unit.downstream = bench.endpoints = Endpoints()
    ste(bench)
    fill(bench)
    return bench


@pytest.mark.parametrize("flags", [0, regs.CR2_REC_CFG_ATS])
def test_ste_that_an_overflow_cannot_check_is_recorded_with_rec_cfg_ats(flags):
    bench = overflown(lambda bench: bench.ste(words=[0]), pps=False)
    recording(bench, flags)
    bench.dma.send_page_request(page(pasid=9))
    assert bench.endpoints.sent == [(RID, PageResponse(NO_PASID, 3, PRG_FAILURE))]
    event = bench.event()
    assert (event is not None and event["id"] == events.C_BAD_STE) == bool(flags)
    bench.close()


@pytest.mark.parametrize(("ppar", "pasid"), [(e.STE_1_PPAR, 9), (0, NO_PASID)])
def test_ppar_counts_in_an_ste_that_aborts(ppar, pasid):
    """8.1: "if the associated STE is valid", and one with Config == 0b000 is."""
    bench = overflown(lambda bench: bench.ste(words=[e.STE_0_V, ppar]), pps=False)
    bench.dma.send_page_request(page(pasid=9))
    assert bench.endpoints.sent == [(RID, PageResponse(pasid, 3, PRG_SUCCESS))]
    bench.close()


def test_automatic_response_without_substreams_has_no_pasid():
    """8.1: "When PASIDs are not supported, an automatic response does not have a PASID prefix"."""
    bench = overflown(lambda bench: bench.ste(w1=FULL), ssid_bits=0)
    bench.dma.send_page_request(page(pasid=9))
    assert bench.endpoints.sent == [(RID, PageResponse(NO_PASID, 3, PRG_SUCCESS))]
    assert bench.reg(regs.IDR3) & regs.IDR3_PPS == 0, "6.3.4: RES0 then"
    bench.close()
