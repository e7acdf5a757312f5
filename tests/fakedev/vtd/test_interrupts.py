"""Interrupt remapping without a driver: the VT-d specification's table 15 and figures 5-2 and 9-9, entry by entry."""

import pytest

from fakedev.bridge import PciBridge
from fakedev.dma import DmaAbort
from fakedev.endpoints.hostile import Hostile
from fakedev.vtd import descriptors as qi
from fakedev.vtd import faults, irte, regs
from tests.fakedev.vtd.rig import NOWHERE, QIE, RID, TE, Rig

TABLE = 0x13_0000
IRE, SIRTP, CFI = regs.IRE, regs.SIRTP, regs.CFI


class Bench(Rig):
    """Remapping is on, with 256 entries; address translation is off."""

    def __init__(self, irta=TABLE | 7, on=IRE, **features):
        super().__init__(**{"nfr": 0, "cm": 0, "esirtps": 0} | features)
        self.set(regs.FECTL, regs.EVENT_IM)
        self.set(regs.IQA, 0x10_6000 | regs.IQA_DW, 8)
        self.set(regs.RTADDR, 0x10_0000 | 1 << 10, 8)
        self.set(regs.GCMD, regs.SRTP)
        self.set(regs.GCMD, QIE)
        self.table(irta)
        self.switch(on)

    def table(self, irta):
        self.set(regs.IRTA, irta, 8)
        self.set(regs.GCMD, QIE | SIRTP | self.reg(regs.GSTS) & (IRE | CFI))

    def switch(self, bits):
        self.set(regs.GCMD, QIE | bits)

    def entry(self, index, words=None, vector=0x41, destination=3, sid=RID, **more):
        self.words(TABLE + 16 * index, words or irte.entry(vector, destination, sid, **more))

    def send(self, address, data=0, length=4):
        """What the processors get of a message; None: the device sees it refused."""
        self.messages.clear()
        try:
            self.dma.write(address, data.to_bytes(length, "little"))
        except DmaAbort:
            assert not self.messages
            return None
        return self.messages[0] if self.messages else ()

    def reason(self):
        """The reason and the index of the fault that is recorded, which is cleared; None if there is none."""
        found = self.record()
        self.set(self.fault_offset + 12, 1 << 31)
        self.set(regs.FSTS, 1)
        if found is None:
            return None
        assert found["sid"] == RID
        return found["reason"], found["address"] >> 48

    def refuses(self, address, data=0):
        """The (reason, index) with which a message is refused."""
        assert self.send(address, data) is None
        return self.reason()


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.box.close()


# ---------------------------------------------------------------------------------------------------- what is remapped


def test_a_message_becomes_what_its_entry_says(bench):
    bench.entry(5)
    assert bench.send(*irte.message(5)) == (0xFEE0_3008, 0x4041)
    assert bench.reason() is None


def test_the_index_is_the_handle_or_handle_and_subhandle(bench):
    for index in range(8):
        bench.entry(index, vector=0x40 + index)
    assert bench.send(0xFEE0_0010 | 5 << 5, 0xFFFF_FFFF)[1] & 0xFF == 0x45  # without SHV data do not matter
    assert bench.send(0xFEE0_0018 | 5 << 5, 2)[1] & 0xFF == 0x47
    assert bench.send(0xFEE0_0018, 6)[1] & 0xFF == 0x46


def test_bit_15_of_the_handle_is_bit_2_of_the_address():
    bench = Bench(TABLE | 0xF)
    bench.entry(0x8003, vector=0x99)
    assert irte.message(0x8003)[0] == 0xFEE0_0000 | 3 << 5 | 0x1C
    assert bench.send(*irte.message(0x8003))[1] & 0xFF == 0x99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": 0}, (0xFEE0_3000, 0x4041)),
        ({"flags": irte.LOGICAL}, (0xFEE0_3004, 0x4041)),
        ({"flags": irte.LEVEL}, (0xFEE0_3000, 0xC041)),
        ({"flags": irte.FPD}, (0xFEE0_3000, 0x4041)),
        ({"flags": 0, "delivery": irte.LOWEST_PRIORITY}, (0xFEE0_3000, 0x4141)),
        ({"flags": 0, "delivery": irte.NMI}, (0xFEE0_3000, 0x4441)),
        ({"flags": 0, "destination": 0xFF}, (0xFEEF_F000, 0x4041)),
    ],
)
def test_each_field_of_an_entry_is_in_the_message(bench, fields, message):
    bench.entry(5, **fields)
    assert bench.send(*irte.message(5)) == message


def test_the_available_bits_of_an_entry_are_ignored(bench):
    low, high = irte.entry(0x41, 3, RID)
    bench.entry(5, (low | 0xF00, high))
    assert bench.send(*irte.message(5))


def test_a_destination_has_32_bits_in_extended_mode():
    bench = Bench(TABLE | regs.IRTA_EIME | 7)
    bench.entry(5, destination=0x1234_5678, extended=True)
    assert bench.send(*irte.message(5)) == (0x1234_5600_FEE7_8008, 0x4041)


def test_extended_mode_is_for_units_that_have_it():
    bench = Bench(TABLE | regs.IRTA_EIME | 7, eim=0)
    assert bench.reg(regs.IRTA, 8) == TABLE | 7


def test_without_remapping_messages_pass_as_they_are():
    bench = Bench(on=0)
    assert bench.send(0xFEE0_0010 | 5 << 5, 7) == (0xFEE0_0010 | 5 << 5, 7)


def test_a_unit_without_remapping_cannot_switch_it_on():
    bench = Bench(ir=0, eim=0)
    assert not bench.reg(regs.GSTS) & (IRE | SIRTP | CFI)
    assert bench.reg(regs.IRTA, 8) == 0
    assert bench.send(0xFEE0_0000, 7) == (0xFEE0_0000, 7)


def test_address_translation_does_not_matter(bench):
    bench.entry(5)
    bench.switch(IRE | TE)
    assert bench.send(*irte.message(5)) == (0xFEE0_3008, 0x4041)


def test_the_units_own_events_are_not_remapped(bench):
    bench.set(regs.FEDATA, 0x21)
    bench.set(regs.FEADDR, 0xFEE0_0000)
    bench.set(regs.FECTL, 0)
    bench.messages.clear()
    with pytest.raises(DmaAbort):
        bench.dma.write(0xFEE0_0000, bytes(4))
    assert bench.messages == [(0xFEE0_0000, 0x21)]


# -------------------------------------------------------------------------------------------------- table 15, by reason


def test_20h_reserved_bits_of_the_data(bench):
    bench.entry(5)
    address, _ = irte.message(5)
    for bit in range(16, 32):
        assert bench.refuses(address, 1 << bit) == (faults.IR_REQUEST_RESERVED, 0)


@pytest.mark.parametrize("size", [0, 3, 7, 15])
def test_21h_index_beyond_the_table(size):
    bench = Bench(TABLE | size)
    entries = 2 << size
    bench.entry(entries - 1)
    assert bench.send(*irte.message(entries - 1))
    if entries < 1 << 16:
        assert bench.refuses(*irte.message(entries)) == (faults.IR_INDEX_BEYOND, entries)
    assert bench.refuses(*irte.message(entries - 1, 1)) == (faults.IR_INDEX_BEYOND, entries & 0xFFFF)


def test_21h_table_beyond_the_host_address_width():
    bench = Bench(1 << 46 | 7, host_address_bits=46)
    assert bench.refuses(*irte.message(5)) == (faults.IR_INDEX_BEYOND, 5)


def test_22h_entry_not_present(bench):
    bench.entry(5, (0, 0))
    assert bench.refuses(*irte.message(5)) == (faults.IR_NOT_PRESENT, 5)
    bench.entry(5, (0xFFFF_FFFF_FFFF_FFFC, 0xFFFF_FFFF_FFFF_FFFF))  # which other bits, does not matter
    assert bench.refuses(*irte.message(5)) == (faults.IR_NOT_PRESENT, 5)


def test_23h_table_that_no_memory_answers():
    bench = Bench(NOWHERE | 7)
    assert bench.refuses(*irte.message(5)) == (faults.IR_TABLE_ERROR, 5)


@pytest.mark.parametrize(
    "bit",
    [12, 13, 14, 15, *range(24, 32), *range(32, 40), *range(48, 64), *range(84, 128)],
)
def test_24h_each_reserved_bit_of_an_entry(bench, bit):
    words = irte.entry(0x41, 3, RID)
    bench.entry(5, tuple(word | 1 << bit >> 64 * n & (1 << 64) - 1 for n, word in enumerate(words)))
    assert bench.refuses(*irte.message(5)) == (faults.IR_RESERVED, 5)


@pytest.mark.parametrize("fields", [{"svt": 3}, {"delivery": 3}, {"delivery": 6}])
def test_24h_reserved_values_of_an_entry(bench, fields):
    bench.entry(5, **fields)
    assert bench.refuses(*irte.message(5)) == (faults.IR_RESERVED, 5)


def test_25h_compatibility_format_is_blocked_unless_software_lets_it_pass(bench):
    assert bench.refuses(0xFEE0_0000, 0x41) == (faults.IR_COMPATIBILITY_BLOCKED, 0)
    bench.switch(IRE | CFI)
    assert bench.reg(regs.GSTS) & CFI
    assert bench.send(0xFEE0_0000, 0x41) == (0xFEE0_0000, 0x41)


def test_25h_compatibility_format_never_passes_in_extended_mode():
    bench = Bench(TABLE | regs.IRTA_EIME | 7, on=IRE | CFI)
    assert bench.refuses(0xFEE0_0000, 0x41) == (faults.IR_COMPATIBILITY_BLOCKED, 0)


@pytest.mark.parametrize(
    ("sq", "allowed"),
    [(0, {0}), (1, {0, 4}), (2, {0, 2, 4, 6}), (3, set(range(8)))],
)
def test_26h_source_by_id_and_qualifier(sq, allowed):
    for function in range(8):
        bench = Bench()
        bench.entry(5, sid=RID | function, sq=sq)
        if function in allowed:
            assert bench.send(*irte.message(5))
        else:
            assert bench.refuses(*irte.message(5)) == (faults.IR_SOURCE_REFUSED, 5)
        bench.entry(6, sid=RID ^ 0x100, sq=sq)
        assert bench.refuses(*irte.message(6)) == (faults.IR_SOURCE_REFUSED, 6)
        bench.box.close()


@pytest.mark.parametrize(("first", "last", "allowed"), [(0, 0, True), (0, 9, True), (1, 9, False), (5, 0, False)])
def test_26h_source_by_range_of_buses(bench, first, last, allowed):
    bench.entry(5, sid=first << 8 | last, svt=irte.SVT_BUS)
    if allowed:
        assert bench.send(*irte.message(5))
    else:
        assert bench.refuses(*irte.message(5)) == (faults.IR_SOURCE_REFUSED, 5)


def test_an_entry_without_verification_is_anybodys(bench):
    bench.entry(5, sid=0x4321, svt=irte.SVT_NONE)
    assert bench.send(*irte.message(5))


def test_the_source_is_verified_before_the_entry_is_looked_at(bench):
    low, high = irte.entry(0x41, 3, RID ^ 1)
    bench.entry(5, (low | 1 << 24, high))
    assert bench.refuses(*irte.message(5)) == (faults.IR_SOURCE_REFUSED, 5)


@pytest.mark.parametrize(
    ("address", "length"), [(0xFEE0_0000, 8), (0xFEE0_0000, 2), (0xFEE0_0002, 4), (0xFEEF_FFF0, 16)]
)
def test_29h_a_write_to_the_range_that_is_no_message(bench, address, length):
    assert bench.send(address, 0, length) is None
    assert bench.reason()[0] == faults.IR_ILLEGAL_REQUEST


def test_29h_a_read_of_the_range(bench):
    with pytest.raises(DmaAbort):
        bench.dma.read(0xFEE0_0000, 4)
    assert bench.reason()[0] == faults.IR_ILLEGAL_REQUEST


def test_a_unit_that_is_off_records_no_illegal_request():
    bench = Bench(on=0)
    with pytest.raises(DmaAbort):
        bench.dma.read(0xFEE0_0000, 4)
    assert bench.reason() is None


def test_2ah_extended_mode_required():
    bench = Bench(eimer=1)
    bench.entry(5)
    assert bench.refuses(*irte.message(5)) == (faults.IR_EXTENDED_MODE_REQUIRED, 0)
    bench = Bench(TABLE | regs.IRTA_EIME | 7, eimer=1)
    bench.entry(5, extended=True)
    assert bench.send(*irte.message(5))


def test_2bh_remapping_required():
    bench = Bench(on=0, irreq=1)
    assert bench.refuses(0xFEE0_0000, 0x41) == (faults.IR_REMAPPING_REQUIRED, 0)


def test_fpd_keeps_qualified_faults_from_being_recorded(bench):
    bench.entry(5, (irte.FPD, 0))
    bench.entry(6, flags=irte.FPD, sid=RID ^ 1)
    low, high = irte.entry(0x41, 3, RID, flags=irte.FPD)
    bench.entry(7, (low | 1 << 24, high))
    for index in (5, 6, 7):
        assert bench.refuses(*irte.message(index)) is None
    assert "fault processing is disabled" in bench.box.last_faults[-1]


def test_every_reason_of_interrupt_remapping_is_tested_here():
    tested = {int(name.split("_")[1][:2], 16) for name in globals() if name[5:7].isalnum() and name[7:9] == "h_"}
    assert tested == {reason for reason in faults.REASONS if 0x20 <= reason < 0x30}


# --------------------------------------------------------------------------------------------- the cache and its owner


def test_a_changed_entry_takes_effect_with_its_invalidation(bench):
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.entry(5, vector=0x77)
    assert bench.send(*irte.message(5))[1] & 0xFF == 0x41
    bench.submit(qi.interrupt_entries(5))
    assert bench.send(*irte.message(5))[1] & 0xFF == 0x77


def test_an_entry_that_was_taken_away_lasts_until_its_invalidation(bench):
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.entry(5, (0, 0))
    assert bench.send(*irte.message(5))
    bench.submit(qi.interrupt_entries())
    assert bench.refuses(*irte.message(5)) == (faults.IR_NOT_PRESENT, 5)


@pytest.mark.parametrize(
    ("index", "mask", "gone"), [(4, 0, {4}), (5, 1, {4, 5}), (6, 2, {4, 5, 6, 7}), (1, 3, set(range(8)))]
)
def test_an_index_mask_names_a_power_of_two_of_entries(bench, index, mask, gone):
    for n in range(10):
        bench.entry(n)
        bench.send(*irte.message(n))
    bench.submit(qi.interrupt_entries(index, mask))
    assert set(range(10)) - set(bench.unit.interrupts.cache) == gone


def test_a_mask_beyond_mhmv_stops_the_queue():
    bench = Bench(mhmv=3)
    bench.submit(qi.interrupt_entries(0, 3))
    assert not bench.reg(regs.FSTS) & regs.FSTS_IQE
    bench.submit(qi.interrupt_entries(0, 4))
    assert bench.reg(regs.FSTS) & regs.FSTS_IQE
    assert bench.reg(regs.IQERCD, 8) & 0xF == regs.IQEI_RESERVED


@pytest.mark.parametrize("cm", [0, 1])
def test_what_is_not_present_is_cached_with_caching_mode_only(cm):
    bench = Bench(cm=cm)
    bench.refuses(*irte.message(5))
    bench.entry(5)
    assert (bench.send(*irte.message(5)) is None) == bool(cm)
    bench.submit(qi.interrupt_entries(5))
    assert bench.send(*irte.message(5))


def test_a_cached_entry_is_still_verified_for_each_source(bench):
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.dma.rid = RID ^ 1
    assert bench.send(*irte.message(5)) is None


@pytest.mark.parametrize("esirtps", [0, 1])
def test_a_new_table_empties_the_cache_of_units_that_say_so(esirtps):
    bench = Bench(esirtps=esirtps)
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.set(regs.IRTA, TABLE + 0x1000 | 7, 8)
    assert bench.send(*irte.message(5))  # the register counts when SIRTP is given
    bench.table(TABLE + 0x1000 | 7)
    assert bool(bench.send(*irte.message(5))) == (not esirtps)


def test_an_interrupt_is_invalidated_in_legacy_mode_too():
    bench = Bench()
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.set(regs.RTADDR, 0x10_0000, 8)
    bench.set(regs.GCMD, regs.SRTP | QIE | IRE)
    bench.set(regs.GCMD, IRE)
    bench.set(regs.IQA, 0x10_6000, 8)
    bench.words(0x10_6000, qi.interrupt_entries())
    bench.set(regs.IQT, 0)
    bench.set(regs.GCMD, QIE | IRE)
    bench.set(regs.IQT, 16)
    assert not bench.unit.interrupts.cache


def test_reset_forgets_the_table(bench):
    bench.entry(5)
    bench.send(*irte.message(5))
    bench.unit.reset()
    assert not bench.unit.interrupts.cache
    assert bench.send(*irte.message(5)) == irte.message(5)


# ----------------------------------------------------------------------------------------------------- hostile devices


def test_a_forged_message_reaches_nobody(bench):
    hostile = bench.box.add(Hostile("0000:00:11.0", command=6), bench.unit)
    bench.entry(5)
    bench.messages.clear()
    for data in range(256):
        assert not hostile.forge_interrupt(data)
    address, data = irte.message(5)
    assert not hostile.smash(address, data.to_bytes(4, "little"))  # another's entry
    for index in (0, 6, 0x100, 0xFFFF):
        assert not hostile.smash(irte.message(index)[0], bytes(4))
    assert bench.messages == []


def test_a_spoofed_requester_id_stops_at_a_port_that_validates_sources(bench):
    port = bench.box.add(PciBridge("0000:00:1c.0", 1), bench.unit)
    hostile = bench.box.add(Hostile("0000:01:00.0", command=6), bench.unit)
    bench.entry(5)
    address, data = irte.message(5)
    assert not hostile.smash(address, data.to_bytes(4, "little"), rid=RID)
    assert bench.messages == []
    port.config_write(0x106, 2, 0)  # who sent it only the port can know
    assert hostile.smash(address, data.to_bytes(4, "little"), rid=RID)
