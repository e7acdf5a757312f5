"""Stream tables and CD tables of one and two levels: what is found, and what each way of not finding it records."""

import pytest

from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from tests.fakedev.smmuv3.bench import CDS, NOWHERE, PAGE, RID, STRTAB, VMID, Bench

VA = 0x1234000
L2 = 0x18_0000


@pytest.fixture
def mapped(bench):
    bench.cd()
    bench.map(VA, PAGE)
    return bench


def two_level(bench, split=8, log2=16):
    bench.set(regs.CR0, 0)
    bench.start(log2=log2, fmt=regs.STRTAB_FMT_2LVL, split=split)
    return bench


# -- stream table ----------------------------------------------------------------------------------------------------


def test_linear_stream_table(mapped):
    mapped.ste()
    assert mapped.goes(VA)


def test_stream_beyond_log2size_is_c_bad_streamid(mapped):
    mapped.set(regs.CR0, 0)
    mapped.start(log2=7)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.C_BAD_STREAMID, 0, 0, 0]


def test_bad_streams_are_silent_without_recinvsid(mapped):
    mapped.set(regs.CR0, 0)
    mapped.start(log2=7, cr0=0)
    mapped.set(regs.CR2, 0)
    mapped.set(regs.CR0, 0xF)
    assert mapped.fault(VA) is None


@pytest.mark.parametrize("split", [6, 8, 10])
def test_two_level_stream_table(mapped, split):
    two_level(mapped, split)
    mapped.word(STRTAB + 8 * (RID >> split), L2 | split + 1)
    mapped.ste(at=L2 + 64 * (RID & (1 << split) - 1))
    assert mapped.goes(VA)


def test_reserved_split_is_the_smallest(mapped):
    two_level(mapped, 7)
    mapped.word(STRTAB + 8 * (RID >> 6), L2 | 7)
    mapped.ste(at=L2 + 64 * (RID & 63))
    assert mapped.goes(VA)


@pytest.mark.parametrize("span", [0, 12, 31, 10, 8])
def test_bad_span_is_c_bad_streamid(mapped, span):
    """0; reserved; beyond SPLIT + 1; and a second level too short for the stream."""
    two_level(mapped)
    mapped.word(STRTAB, L2 | span)
    mapped.ste(at=L2 + 64 * RID)
    assert mapped.fault(VA)["id"] == events.C_BAD_STREAMID


def test_second_level_is_aligned_to_its_size(mapped):
    two_level(mapped)
    mapped.word(STRTAB, L2 + 0x40 | 9)
    mapped.ste(at=L2 + 64 * RID)
    assert mapped.goes(VA)


def test_ste_that_memory_refuses_is_f_ste_fetch(mapped):
    mapped.set(regs.CR0, 0)
    mapped.start(cr0=0)
    mapped.set(regs.STRTAB_BASE, NOWHERE, 8)
    mapped.set(regs.CR0, 0xF)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.F_STE_FETCH, 0, 0, NOWHERE + 64 * RID]


def test_level_1_descriptor_that_memory_refuses_is_f_ste_fetch(mapped):
    two_level(mapped)
    mapped.set(regs.CR0, 0)
    mapped.set(regs.STRTAB_BASE, NOWHERE, 8)
    mapped.set(regs.CR0, 0xF)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.F_STE_FETCH, 0, 0, NOWHERE]


def test_failed_fetch_is_not_cached(mapped):
    two_level(mapped)
    mapped.word(STRTAB, NOWHERE | 9)
    assert mapped.fault(VA)["id"] == events.F_STE_FETCH
    mapped.ste(at=L2 + 64 * RID)
    mapped.word(STRTAB, L2 | 9)
    mapped.submit(c.cfgi_ste(RID, leaf=False))
    assert mapped.goes(VA)


# -- configurations --------------------------------------------------------------------------------------------------


def test_abort_records_nothing(mapped):
    mapped.ste(e.CONFIG_ABORT)
    assert mapped.fault(VA) is None


def test_bypass_is_the_identity(mapped):
    mapped.ste(e.CONFIG_BYPASS)
    mapped.memory.write(PAGE, b"here")
    assert mapped.dma.read(PAGE, 4) == b"here"


@pytest.mark.parametrize("config", [e.CONFIG_BYPASS, e.CONFIG_S2])
def test_bypassed_stage_1_refuses_what_exceeds_ias(mapped, config):
    """3.4: F_ADDR_SIZE, of stage 1."""
    mapped.ste(config)
    mapped.identity2()
    event = mapped.fault(1 << 48)
    assert (event["id"], event["s2"], event["class"], event["address"]) == (events.F_ADDR_SIZE, 0, 2, 1 << 48)


def test_unit_that_is_off_bypasses(mapped):
    mapped.set(regs.CR0, 0)
    mapped.memory.write(PAGE, b"here")
    assert mapped.dma.read(PAGE, 4) == b"here"


def test_unit_that_is_off_aborts_where_gbpa_says_so(mapped):
    mapped.set(regs.CR0, 0)
    mapped.set(regs.GBPA, regs.GBPA_ABORT)
    assert mapped.goes(PAGE), "without UPDATE nothing is stored"
    mapped.set(regs.GBPA, regs.GBPA_UPDATE | regs.GBPA_ABORT)
    assert mapped.reg(regs.GBPA) == regs.GBPA_ABORT
    assert mapped.fault(PAGE) is None


# -- substreams ------------------------------------------------------------------------------------------------------


def substreams(bench, dss, cdmax=4, fmt=0, **fields):
    bench.ste(cdmax=cdmax, w0=e.STE_0_S1FMT.put(fmt), w1=e.STE_1_S1DSS.put(dss), **fields)


@pytest.mark.parametrize("config", [e.CONFIG_BYPASS, e.CONFIG_S2])
def test_substream_without_stage_1_is_c_bad_substreamid(mapped, config):
    mapped.ste(config)
    event = mapped.fault(VA, pasid=3)
    assert event["words"] == [RID << 32 | 3 << 12 | events.C_BAD_SUBSTREAMID, 0, 0, 0]


def test_substream_where_there_is_one_cd_is_c_bad_substreamid(mapped):
    mapped.ste()
    assert mapped.fault(VA, pasid=0)["id"] == events.C_BAD_SUBSTREAMID


def test_substream_of_a_unit_without_them_is_c_bad_substreamid():
    bench = Bench(ssid_bits=0)
    bench.ste(cdmax=4)
    bench.cd(3)
    assert bench.fault(VA, pasid=3)["id"] == events.C_BAD_SUBSTREAMID
    bench.close()


def test_substream_beyond_s1cdmax_is_c_bad_substreamid(mapped):
    substreams(mapped, e.S1DSS_SSID0)
    event = mapped.fault(VA, pasid=16)
    assert event["words"] == [RID << 32 | 16 << 12 | events.C_BAD_SUBSTREAMID, 0, 0, 0]


def test_substreams_have_cds_of_their_own(mapped):
    substreams(mapped, e.S1DSS_SSID0)
    mapped.cd(7, asid=70)
    assert mapped.goes(VA, pasid=7)
    event = mapped.fault(VA, pasid=6)
    assert (event["id"], event["ssid"]) == (events.C_BAD_CD, 6)


def test_request_without_substream_where_dss_terminates_is_f_stream_disabled(mapped):
    for dss in (e.S1DSS_TERMINATE, 3):
        substreams(mapped, dss)
        mapped.forget()
        event = mapped.fault(VA)
        assert (event["id"], event["ssid"]) == (events.F_STREAM_DISABLED, None)


def test_request_without_substream_where_dss_bypasses(mapped):
    substreams(mapped, e.S1DSS_BYPASS)
    assert mapped.goes(PAGE)


def test_request_without_substream_where_dss_bypasses_goes_through_stage_2(mapped):
    substreams(mapped, e.S1DSS_BYPASS, config=e.CONFIG_NESTED)
    mapped.map2(0x5000, PAGE)
    mapped.memory.write(PAGE, b"here")
    assert mapped.dma.read(0x5000, 4) == b"here"


def test_request_without_substream_where_dss_takes_cd_0(mapped):
    substreams(mapped, e.S1DSS_SSID0)
    assert mapped.goes(VA)


def test_substream_0_where_dss_takes_cd_0_is_f_stream_disabled(mapped):
    substreams(mapped, e.S1DSS_SSID0)
    event = mapped.fault(VA, pasid=0)
    assert (event["id"], event["ssid"]) == (events.F_STREAM_DISABLED, 0)


def test_substream_0_is_one_as_any_other_where_dss_does_not_take_it(mapped):
    substreams(mapped, e.S1DSS_TERMINATE)
    assert mapped.goes(VA, pasid=0)


@pytest.mark.parametrize(("fmt", "log2"), [(e.S1FMT_4K_L2, 6), (e.S1FMT_64K_L2, 10)])
def test_two_level_cd_table(mapped, fmt, log2):
    ssid = 2 << log2 | 5
    substreams(mapped, e.S1DSS_SSID0, cdmax=log2 + 4, fmt=fmt)
    mapped.word(CDS + 8 * 2, L2 | e.L1CD_V)
    mapped.cd(at=L2 + 64 * 5)
    assert mapped.goes(VA, pasid=ssid)


def test_invalid_level_1_cd_is_c_bad_substreamid(mapped):
    substreams(mapped, e.S1DSS_SSID0, cdmax=10, fmt=e.S1FMT_4K_L2)
    mapped.word(CDS, L2)
    assert mapped.fault(VA, pasid=5)["words"] == [RID << 32 | 5 << 12 | events.C_BAD_SUBSTREAMID, 0, 0, 0]


def test_invalid_level_1_cd_of_a_request_without_substream_records_substream_0(mapped):
    substreams(mapped, e.S1DSS_SSID0, cdmax=10, fmt=e.S1FMT_4K_L2)
    mapped.word(CDS, 0)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.C_BAD_SUBSTREAMID, 0, 0, 0]


def test_level_1_cd_beyond_oas_is_c_bad_substreamid(mapped):
    substreams(mapped, e.S1DSS_SSID0, cdmax=10, fmt=e.S1FMT_4K_L2)
    mapped.word(CDS, 1 << 48 | e.L1CD_V)
    assert mapped.fault(VA, pasid=5)["id"] == events.C_BAD_SUBSTREAMID


def test_cd_that_memory_refuses_is_f_cd_fetch(mapped):
    mapped.ste(cds=NOWHERE)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.F_CD_FETCH, 0, 0, NOWHERE]


def test_cd_is_fetched_through_stage_2(mapped):
    mapped.ste(e.CONFIG_NESTED, cds=0x7000)
    mapped.identity2()
    mapped.map2(0x40007000, CDS)  # another GiB, mapped by pages
    mapped.ste(e.CONFIG_NESTED, cds=0x40007000)
    assert mapped.goes(VA)


def test_cd_that_stage_2_does_not_map_is_a_fault_of_class_cd(mapped):
    mapped.ste(e.CONFIG_NESTED)
    event = mapped.fault(VA, pasid=-1)
    assert (event["id"], event["s2"], event["class"]) == (events.F_TRANSLATION, 1, events.CLASS_CD)
    assert (event["address"], event["last"], event["rnw"]) == (VA, CDS & -4096, 1)


def test_cd_whose_page_memory_refuses_is_f_cd_fetch_with_the_physical_address(mapped):
    mapped.ste(e.CONFIG_NESTED, cds=0x7000)
    mapped.map2(0x7000, NOWHERE)
    assert mapped.fault(VA)["words"] == [RID << 32 | events.F_CD_FETCH, 0, 0, NOWHERE]


def test_stage_2_table_that_memory_refuses_while_a_cd_is_fetched_is_f_walk_eabt(mapped):
    mapped.ste(e.CONFIG_NESTED, root=NOWHERE)
    event = mapped.fault(VA)
    assert (event["id"], event["s2"], event["class"], event["last"]) == (
        events.F_WALK_EABT,
        1,
        events.CLASS_CD,
        NOWHERE,
    )


def test_cd_in_a_page_without_read_permission_is_f_permission_of_class_cd(mapped):
    mapped.ste(e.CONFIG_NESTED)
    mapped.map2(CDS, CDS, bits=1 | 2 << 6 | 1 << 10 | 0xF << 2)
    event = mapped.fault(VA)
    assert (event["id"], event["s2"], event["class"], event["last"]) == (events.F_PERMISSION, 1, events.CLASS_CD, CDS)


def test_cd_in_device_memory_is_f_permission_with_s2ptw(mapped):
    device = 1 | 3 << 6 | 1 << 10 | 1 << 2
    mapped.identity2()
    mapped.map2(0x40000000 + CDS, CDS, bits=device)
    mapped.ste(e.CONFIG_NESTED, cds=0x40000000 + CDS)
    assert mapped.goes(VA)
    mapped.ste(e.CONFIG_NESTED, cds=0x40000000 + CDS, w2=e.STE_2_S2PTW)
    mapped.forget()
    event = mapped.fault(VA)
    assert (event["id"], event["s2"], event["class"]) == (events.F_PERMISSION, 1, events.CLASS_CD)


# -- the configuration cache -----------------------------------------------------------------------------------------


def test_ste_stays_until_cfgi_ste(mapped):
    mapped.ste()
    assert mapped.goes(VA)
    mapped.ste(e.CONFIG_ABORT)
    mapped.submit(c.tlbi_nsnh_all(), c.cfgi_ste(RID + 1), c.cfgi_cd(RID, 0), c.cfgi_cd_all(RID), c.sync())
    assert mapped.goes(VA)
    mapped.submit(c.cfgi_ste(RID))
    assert not mapped.goes(VA)


def test_invalid_ste_stays_until_cfgi_ste(mapped):
    assert mapped.fault(VA)["id"] == events.C_BAD_STE
    mapped.ste()
    assert mapped.fault(VA)["id"] == events.C_BAD_STE
    mapped.submit(c.cfgi_ste(RID))
    assert mapped.goes(VA)


def test_cd_stays_until_cfgi_cd(mapped):
    mapped.ste()
    assert mapped.goes(VA)
    mapped.cd(words=[0])
    mapped.submit(c.tlbi_nsnh_all(), c.cfgi_cd(RID, 1), c.cfgi_cd(RID + 1, 0))
    assert mapped.goes(VA)
    mapped.submit(c.cfgi_cd(RID, 0))
    assert mapped.fault(VA)["id"] == events.C_BAD_CD


@pytest.mark.parametrize("command", [c.cfgi_cd_all(RID), c.cfgi_ste(RID), c.cfgi_ste_range(RID + 3, 1), c.cfgi_all()])
def test_wider_commands_forget_cds_too(mapped, command):
    mapped.ste()
    assert mapped.goes(VA)
    mapped.cd(words=[0])
    mapped.submit(command)
    assert mapped.fault(VA)["id"] == events.C_BAD_CD


def test_range_command_leaves_what_lies_outside(mapped):
    mapped.ste()
    assert mapped.goes(VA)
    mapped.ste(e.CONFIG_ABORT)
    mapped.submit(c.cfgi_ste_range(RID + 4, 1), c.cfgi_ste_range(RID - 1, 0))
    assert mapped.goes(VA)
    mapped.submit(c.cfgi_ste_range(RID + 4, 2))
    assert not mapped.goes(VA)


@pytest.mark.parametrize("kept", ["stes", "l1cds", "cds", "streams"])
def test_range_command_names_what_is_left_in_any_cache(bench, kept):
    """4.3: structures are cached one by one, so each may be gone while another stays."""
    substreams(bench, e.S1DSS_SSID0, 8, e.S1FMT_4K_L2)
    bench.word(CDS, CDS + 0x4000 | 1)
    bench.cd(at=CDS + 0x4000 + 64)
    bench.map(VA, PAGE)
    assert bench.goes(VA, pasid=1)
    configuration = bench.unit.configuration
    for name in ("l1stds", "stes", "l1cds", "cds", "streams"):
        if name != kept:
            getattr(configuration, name).clear()
    bench.submit(c.cfgi_ste_range(RID, 3))
    assert not getattr(configuration, kept)


def test_level_1_stream_descriptor_needs_the_command_without_leaf(mapped):
    two_level(mapped)
    mapped.word(STRTAB, 0)
    assert mapped.fault(VA)["id"] == events.C_BAD_STREAMID
    mapped.word(STRTAB, L2 | 9)
    mapped.ste(at=L2 + 64 * RID)
    mapped.submit(c.cfgi_ste(RID, leaf=True))
    assert mapped.fault(VA)["id"] == events.C_BAD_STREAMID
    mapped.submit(c.cfgi_ste(RID, leaf=False))
    assert mapped.goes(VA)


def test_level_1_cd_needs_the_command_without_leaf(mapped):
    substreams(mapped, e.S1DSS_SSID0, cdmax=10, fmt=e.S1FMT_4K_L2)
    mapped.word(CDS, 0)
    assert mapped.fault(VA, pasid=5)["id"] == events.C_BAD_SUBSTREAMID
    mapped.word(CDS, L2 | e.L1CD_V)
    mapped.cd(at=L2 + 64 * 5)
    mapped.submit(c.cfgi_cd(RID, 5, leaf=True))
    assert mapped.fault(VA, pasid=5)["id"] == events.C_BAD_SUBSTREAMID
    mapped.submit(c.cfgi_cd(RID, 4, leaf=False))
    assert mapped.goes(VA, pasid=5)


def test_prefetch_fetches_configuration_and_records_nothing(mapped):
    mapped.ste()
    mapped.submit(c.prefetch_config(RID), c.prefetch_addr(RID, VA), c.prefetch_config(RID + 1), c.prefetch_addr(RID, 0))
    assert mapped.command_error() is None
    assert mapped.event() is None
    assert mapped.unit.tlb.count(VMID << 20 | 5) == 1
    mapped.ste(e.CONFIG_ABORT)
    assert mapped.goes(VA)
