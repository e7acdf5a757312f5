"""Commands to a unit as sections 6.5 and 11.4 of the manual have them, where no other unit could be asked."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, regs
from fakedev.vtd.features import Features
from tests.fakedev.vtd.rig import BASE, DID, PAGE, PASID, QUEUE, RID, ROOT, SECOND, STATUS

F, S = entries.PGTT_FIRST, entries.PGTT_SECOND
IOVA, DONE = 0x3000, 0x1234
IVA, IOTLB = 0xF0, 0xF8
LEGACY = Features(fro=0x22, mamv=9, sagaw=0b1110, mgaw=47)
ICC = IVT = 1 << 63
CONTEXT, TABLES = 0x10_1000, SECOND


def legacy(rig, **kwargs):
    """A unit in legacy mode that has translated IOVA, which is not mapped any more."""
    made = rig(features=LEGACY, mode=0, **kwargs)
    made.words(ROOT, entries.root_entry(CONTEXT))
    made.words(CONTEXT + 16 * RID, entries.context_entry(entries.TT_MULTI_LEVEL, TABLES[0], 2, DID))
    leaf = made.map_second(IOVA, PAGE)
    made.set(regs.RTADDR, ROOT, 8)
    made.set(regs.GCMD, regs.SRTP)
    made.set(regs.GCMD, regs.TE)
    assert made.allowed(IOVA)
    made.word(leaf, 0)
    assert made.allowed(IOVA)
    return made


def iotlb(made, granularity, did=DID, address=IOVA, mask=0):
    """Give the command of 11.4.6.3; IAIG, what was done."""
    made.set(IVA, address | mask, 8)
    made.set(IOTLB, IVT | granularity << 60 | did << 32, 8)
    value = made.reg(IOTLB, 8)
    assert not value & IVT
    return value >> 57 & 3


# -- invalidation by registers (6.5.1, 11.4.6) -----------------------------------------------------------------------


def test_a_command_says_at_which_granularity_it_was_done(rig):
    made = legacy(rig)
    for granularity in (1, 2, 3, 0, 2):
        assert iotlb(made, granularity) == granularity
        made.set(regs.CCMD, ICC | granularity << 61 | RID << 16 | DID, 8)
        assert made.reg(regs.CCMD, 8) >> 59 == granularity << 2 | granularity  # ICC, CIRG, CAIG


def test_the_hardware_of_version_6_takes_no_commands_by_registers(rig):
    for version, done in ((0x50, 1), (0x60, 0)):
        made = legacy(rig, version=version)
        assert iotlb(made, qi.GLOBAL) == done
        assert made.allowed(IOVA) == (not done)
        made.set(regs.CCMD, ICC | 1 << 61, 8)
        assert made.reg(regs.CCMD, 8) >> 59 == 1 << 2 | done


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_outside_of_legacy_mode_commands_by_registers_are_errors(rig, mode):
    made = rig(mode=mode)
    made.tables(S)
    leaf = made.map_second(IOVA, PAGE)
    made.start()
    assert made.allowed(IOVA) == (mode == 1)
    made.word(leaf, 0)
    where = made.features.iro * 16
    made.set(where + 8, IVT | 1 << 60, 8)
    assert made.reg(where + 8, 8) >> 57 == 0b0001000
    made.set(regs.CCMD, ICC | 1 << 61, 8)
    assert made.reg(regs.CCMD, 8) >> 59 == 0b00100
    assert made.allowed(IOVA) == (mode == 1)


def test_a_mask_beyond_mamv_is_an_error_in_the_register_as_in_the_queue(rig):
    made = legacy(rig)
    assert iotlb(made, qi.SELECTIVE, mask=10) == 0
    assert made.allowed(IOVA)
    assert iotlb(made, qi.SELECTIVE, mask=9) == qi.SELECTIVE
    assert not made.allowed(IOVA)


def test_without_page_selective_invalidation_the_register_does_the_whole_domain(rig):
    made = legacy(rig, psi=0)
    assert iotlb(made, qi.SELECTIVE, address=1 << 30) == qi.DOMAIN
    assert not made.allowed(IOVA)


@pytest.mark.parametrize("granularity", [qi.DOMAIN, qi.SELECTIVE])
def test_bits_of_a_domain_id_that_the_unit_does_not_have_are_ignored(rig, granularity):
    made = legacy(rig, nd=2)  # 8 bits
    iotlb(made, granularity, did=DID | 0x4500)
    assert not made.allowed(IOVA)


def test_bits_of_an_address_from_mgaw_up_are_ignored(rig):
    made = legacy(rig)
    iotlb(made, qi.SELECTIVE, address=IOVA | 1 << 48)
    assert not made.allowed(IOVA)


# -- the same by descriptors (6.5.2.2 to 6.5.2.4) --------------------------------------------------------------------

WIDE_DID = DID | 0x4500


@pytest.mark.parametrize(
    ("pgtt", "descriptor"),
    [
        (S, qi.iotlb(WIDE_DID, 0, 0, qi.DOMAIN)),
        (S, qi.iotlb(WIDE_DID, IOVA, 0, qi.SELECTIVE)),
        (S, qi.iotlb(DID, IOVA | 1 << 60, 0, qi.SELECTIVE)),
        (S, qi.pasid_iotlb(WIDE_DID, PASID, 0, 0, qi.PIOTLB_PASID)),
        (F, qi.pasid_iotlb(WIDE_DID, PASID, IOVA, 0, qi.PIOTLB_PAGES)),
    ],
)
def test_descriptors_ignore_bits_beyond_the_units_widths(rig, pgtt, descriptor):
    made = rig(nd=2)
    made.tables(pgtt)
    leaf = made.map_second(IOVA, PAGE) if pgtt == S else made.map_first(IOVA, PAGE)
    made.start()
    assert made.allowed(IOVA, READ, PASID)
    made.word(leaf, 0)
    made.submit(descriptor)
    assert not made.allowed(IOVA, READ, PASID)


def test_the_address_of_a_first_stage_keeps_all_its_bits(rig):
    made = rig(mgaw=47, sagaw=0b110)
    made.tables(F)
    high = IOVA | -1 << 47 & (1 << 64) - 1
    leaf = made.map_first(high, PAGE)
    made.start()
    assert made.allowed(high, READ, PASID)
    made.word(leaf, 0)
    made.submit(qi.pasid_iotlb(DID, PASID, IOVA, 0, qi.PIOTLB_PAGES))
    assert made.allowed(high, READ, PASID)
    made.submit(qi.pasid_iotlb(DID, PASID, high, 0, qi.PIOTLB_PAGES))
    assert not made.allowed(high, READ, PASID)


def test_a_pasid_cache_descriptor_ignores_them_too(rig):
    made = rig(nd=2)
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.start()
    assert made.allowed(IOVA, READ, PASID)
    made.entry(PASID, words=(0,) * 8)
    made.submit(qi.pasid_cache(WIDE_DID, PASID, qi.PC_PASID), qi.iotlb(0, 0, 0, qi.GLOBAL))
    assert not made.allowed(IOVA, READ, PASID)


def test_a_status_address_has_as_many_bits_as_the_host(rig):
    made = rig(host_address_bits=46)
    made.start()
    made.submit(qi.wait(STATUS | 0x3F << 46, DONE))
    assert made.load(STATUS) == DONE


@pytest.mark.parametrize("mask", [19, 40, 63])
def test_page_selective_by_pasid_takes_any_mask_whatever_mamv_says(rig, mask):
    made = rig(mamv=9, psi=0)
    made.start()
    made.submit(qi.pasid_iotlb(DID, PASID, 0, mask, qi.PIOTLB_PAGES), qi.wait(STATUS, DONE))
    assert made.load(STATUS) == DONE


@pytest.mark.parametrize("kind", [6, 7, 8, 9])
def test_in_abort_mode_the_queue_takes_the_descriptors_of_scalable_mode(rig, kind):
    made = rig(mode=3)
    made.start()
    made.submit((kind | 3 << 4 if kind in (6, 7) else kind, 0), qi.wait(STATUS, DONE))
    assert made.load(STATUS) == DONE


def test_a_time_out_is_told_without_a_wait_descriptor_too(rig):
    made = rig()
    made.start()
    made.functions.answers = False
    made.submit(qi.device_tlb(RID, 0, 0x5000, 0))
    assert made.reg(regs.FSTS) & 0x70 == regs.FSTS_ITE
    assert made.reg(regs.IQERCD, 8) >> 32 & 0xFFFF == RID
    assert made.reg(regs.IQH, 8) == 32
    made.submit(qi.wait(STATUS, DONE))
    assert made.load(STATUS) == 0
    made.set(regs.FSTS, regs.FSTS_ITE)
    assert made.load(STATUS) == DONE


def test_a_fenced_wait_with_an_interrupt_is_done_before_what_follows(rig):
    """6.5.2.9, 6.5.2.10: the status is there when the interrupt is; the next descriptor comes after both."""
    made = rig()
    made.start()
    made.set(regs.IEADDR, 0xFEE00000)
    made.set(regs.IEDATA, 0x44)
    made.set(regs.IECTL, 0)
    seen = []
    made.box.interrupt_sink = lambda *message: seen.append((message, made.load(STATUS), made.load(STATUS + 8)))
    made.submit(qi.wait(STATUS, DONE, interrupt=True, flags=qi.WAIT_FN), qi.wait(STATUS + 8, DONE))
    assert seen == [((0xFEE00000, 0x44), DONE, 0)]
    assert made.load(STATUS + 8) == DONE
    made.submit(qi.wait(STATUS, DONE, interrupt=True))
    assert len(seen) == 1  # IWC is still set
    made.set(regs.ICS, 1)
    made.submit(qi.wait(STATUS, DONE, interrupt=True))
    assert len(seen) == 2


def test_an_interrupt_that_is_held_goes_with_its_cause(rig):
    made = rig()
    made.start()
    made.submit(qi.wait(STATUS, DONE, interrupt=True))
    assert made.reg(regs.IECTL) >> 30 == 3
    made.set(regs.ICS, 1)
    made.set(regs.IECTL, 0)
    assert (made.messages, made.reg(regs.IECTL)) == ([], 0)


# -- registers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [regs.FEDATA, regs.IEDATA, regs.PEDATA])
def test_message_data_has_16_bits(rig, data):
    made = rig()
    made.set(data, 0xFFFF_FFFF)
    made.set(data + 4, 0xFFFF_FFFF)
    assert (made.reg(data), made.reg(data + 4)) == (0xFFFF, 0xFFFF_FFFC)


def test_a_unit_without_a_queue_does_not_switch_it_on(rig):
    made = rig(features=LEGACY, qi=0, mode=0)
    made.set(regs.GCMD, regs.QIE)
    assert not made.reg(regs.GSTS) & regs.QIE


def test_the_root_table_address_counts_from_srtp_on(rig):
    made = rig()
    made.tables(S)
    made.map_second(IOVA, PAGE)
    made.start()
    made.set(regs.RTADDR, 3 << 10, 8)
    assert made.allowed(IOVA)
    made.set(regs.GCMD, regs.TE | regs.QIE | regs.SRTP)
    assert made.reason(IOVA) == 0x33


# -- faults ----------------------------------------------------------------------------------------------------------


def test_an_invalidation_error_and_a_fault_make_one_event_until_all_is_served(rig):
    """7.3: no event while any of PPF, PFO, IQE, ICE and ITE is set."""
    made = rig()
    made.tables(S)
    made.start()
    made.set(regs.FEADDR, 0xFEE00000)
    made.set(regs.FEDATA, 0x55)
    made.submit((0, 0))
    assert made.messages == [(0xFEE00000, 0x55)]
    assert made.reason(IOVA) == 0x79
    assert len(made.messages) == 1
    made.set(made.fault_offset + 12, 1 << 31)
    assert not made.allowed(IOVA, WRITE)
    assert made.record(1)["type"] == "write"
    assert len(made.messages) == 1  # IQE is still set
    made.words(QUEUE, (*qi.wait(STATUS, DONE), 0, 0))
    made.set(regs.FSTS, regs.FSTS_IQE)
    assert made.load(STATUS) == DONE
    made.set(made.fault_offset + 16 + 12, 1 << 31)
    assert made.reg(regs.FSTS) & 0x73 == 0
    assert not made.allowed(IOVA)
    assert len(made.messages) == 2


def test_an_overflow_ends_when_software_clears_it_and_recording_goes_on_behind(rig):
    """7.2.1: with PFO nothing is recorded, though records are free; the index stays."""
    made = rig(nfr=1)
    made.tables(S)
    made.start()
    for n in range(3):
        made.allowed(n << 12)
    assert made.reg(regs.FSTS) & 3 == 3
    for n in range(2):
        made.set(made.fault_offset + 16 * n + 12, 1 << 31)
    made.allowed(0x9000)
    assert made.record(0) is made.record(1) is None
    made.set(regs.FSTS, regs.FSTS_PFO)
    made.allowed(0xA000)
    assert made.record(0)["address"] == 0xA000
    assert made.reg(regs.FSTS) >> 8 & 0xFF == 0


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"sagaw": 0b0010, "mgaw": 38}, 39),
        ({"sagaw": 0b0110, "mgaw": 47}, 48),
        ({"sagaw": 0b1110}, 57),
        ({"sagaw": 0, "ssts": 0, "nest": 0, "ssads": 0, "fs5lp": 0}, 48),
        ({"sagaw": 0, "ssts": 0, "nest": 0, "ssads": 0}, 57),
    ],
)
def test_a_record_has_of_the_address_what_the_largest_tables_translate(rig, changes, bits):
    """11.4.7.6: FI, bits 63:N are reserved, N the largest AGAW."""
    made = rig(**changes)
    made.tables(F)
    made.start()
    address = -1 << 46 & (1 << 64) - 4096
    assert made.reason(address, READ, PASID) == 0x71
    assert made.record()["address"] == address & (1 << bits) - 1


@pytest.mark.parametrize("where", ["context", "directory", "table"])
def test_fpd_on_the_way_silences_what_is_qualified_down_to_the_pages(rig, where):
    made = rig()
    made.tables(S)
    made.start()
    if where == "context":
        made.context(flags=entries.SM_DTE | entries.SM_PASIDE | entries.ENTRY_FPD)
    elif where == "directory":
        made.word(0x10_3000, made.load(0x10_3000) | entries.ENTRY_FPD)
    else:
        made.change_entry(0, entries.ENTRY_FPD)
    for pasid in (NO_PASID, PASID):
        assert not made.allowed(IOVA, READ, pasid)
    assert made.record() is None
    made.word(ROOT + 8, 0)  # not qualified: no entry has said anything yet
    made.submit(qi.context_cache(0, 0, 0, qi.GLOBAL))
    assert made.reason(IOVA) == 0x39


def test_a_queue_that_lies_where_no_memory_is_says_so_only_when_it_is_read(rig):
    made = rig()
    made.start()
    made.set(regs.IQA, 1 << 50 | regs.IQA_DW, 8)
    assert not made.reg(regs.FSTS)
    assert made.box.mmio.read(BASE + regs.IQA, 8) == 1 << 50 | regs.IQA_DW
    made.set(regs.IQT, 32)
    assert made.reg(regs.FSTS) & regs.FSTS_IQE
    made.set(regs.IQA, QUEUE | regs.IQA_DW, 8)
    made.words(QUEUE, (*qi.wait(STATUS, DONE), 0, 0))
    made.set(regs.FSTS, regs.FSTS_IQE)
    assert made.load(STATUS) == DONE
