"""A VT-d unit without a driver: tables by hand, after the manual's figures, and what the unit makes of them."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE, DmaAbort, TranslationFault
from fakedev.machine import VTD_LEGACY_CAP, VTD_LEGACY_ECAP, Machine
from fakedev.pci import PciFunction
from fakedev.vtd.unit import VtdUnit

BASE = 0xFED90000
GCMD, GSTS, RTADDR, CCMD, FSTS, FECTL, FEDATA, FEADDR = 0x18, 0x1C, 0x20, 0x28, 0x34, 0x38, 0x3C, 0x40
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IVA, IOTLB, FRCD = (
    0x80,
    0x88,
    0x90,
    0x9C,
    0xA0,
    0xA4,
    0xA8,
    0xF0,
    0xF8,
    0x220,
)
TE, SRTP, QIE = 1 << 31, 1 << 30, 1 << 26
ROOT, CONTEXT, QUEUE, STATUS = 0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000
TABLES = [0x11_0000 + 0x1000 * n for n in range(8)]
PAGE = 0x20_0000
RID = 0x0080
DID = 7


class Bench:
    """A machine of one function behind one unit, and hands to build tables with."""

    def __init__(self, cap=VTD_LEGACY_CAP, ecap=VTD_LEGACY_ECAP):
        self.box = Machine("bench")
        self.memory = self.box.memory
        self.unit = self.box.add_vtd(BASE, cap, ecap)
        self.function = self.box.add(PciFunction("0000:00:10.0", (1, 2), 0, command=4), self.unit)
        self.dma = self.function.dma
        self.messages = []
        self.box.interrupt_sink = lambda address, data: self.messages.append((address, data))
        self.tail = 0

    def word(self, pa, value):
        self.memory.write(pa, value.to_bytes(8, "little"))

    def reg(self, offset, width=4):
        return self.box.mmio.read(BASE + offset, width)

    def set(self, offset, value, width=4):
        self.box.mmio.write(BASE + offset, width, value)

    def root(self, low=CONTEXT | 1, high=0):
        self.word(ROOT, low)
        self.word(ROOT + 8, high)

    def context(self, low=None, high=None, *, tt=0, aw=2, did=DID):
        self.word(CONTEXT + 16 * (RID & 0xFF), TABLES[0] | tt << 2 | 1 if low is None else low)
        self.word(CONTEXT + 16 * (RID & 0xFF) + 8, did << 8 | aw if high is None else high)

    def start(self):
        self.set(RTADDR, ROOT, 8)
        self.set(GCMD, SRTP)
        self.set(IQA, QUEUE, 8)
        self.set(GCMD, QIE)
        self.set(FECTL, 0)
        self.set(GCMD, TE | QIE)

    def map(self, iova, pa, bits=3, level=0, levels=4):
        """Entries of `levels` tables for one leaf at `level`."""
        for n, above in enumerate(range(levels - 1, level, -1)):
            self.word(TABLES[n] + 8 * (iova >> 12 + 9 * above & 511), TABLES[n + 1] | 3)
        last = levels - 1 - level
        self.word(TABLES[last] + 8 * (iova >> 12 + 9 * level & 511), pa | bits | (0x80 if level else 0))

    def submit(self, *descriptors):
        for low, high in descriptors:
            self.word(QUEUE + self.tail, low)
            self.word(QUEUE + self.tail + 8, high)
            self.tail = (self.tail + 16) % 4096
        self.set(IQT, self.tail)

    def record(self):
        low, high = self.reg(FRCD, 8), self.reg(FRCD + 8, 8)
        return {
            "pending": high >> 63,
            "read": high >> 62 & 1,
            "reason": high >> 32 & 0xFF,
            "sid": high & 0xFFFF,
            "address": low,
        }

    def clear_record(self):
        self.set(FRCD + 12, 1 << 31)
        self.set(FSTS, 1)


@pytest.fixture
def bench():
    bench = Bench()
    bench.root()
    bench.context()
    bench.start()
    yield bench
    bench.box.close()


def allowed(dma, access, address, length=4):
    try:
        dma.read(address, length) if access == READ else dma.write(address, bytes(length))
    except DmaAbort:
        return False
    return True


# -- registers -------------------------------------------------------------------------------------------------------


def test_the_capabilities_are_those_of_the_vm(bench):
    assert (bench.reg(0x00), bench.reg(0x08, 8), bench.reg(0x10, 8)) == (0x10, 0xD2008C222F0686, 0xF00F4A)
    assert bench.reg(0x0C) == 0x00D2008C


def test_status_follows_the_command_register():
    bench = Bench()
    assert bench.reg(GSTS) == 0
    bench.set(GCMD, SRTP)
    assert bench.reg(GSTS) == SRTP
    bench.set(GCMD, TE)
    assert bench.reg(GSTS) == SRTP | TE
    bench.set(GCMD, 0)
    assert bench.reg(GSTS) == SRTP
    assert bench.reg(GCMD) == 0
    bench.box.close()


def test_while_translation_is_off_addresses_are_physical():
    bench = Bench()
    bench.memory.write(0x5000, b"abcd")
    assert bench.dma.read(0x5000, 4) == b"abcd"
    bench.root(0)
    bench.start()
    assert not allowed(bench.dma, READ, 0x5000)
    bench.box.close()


def test_the_root_table_is_latched_by_srtp_and_not_by_its_register(bench):
    bench.map(0x1000, PAGE)
    bench.set(RTADDR, 0x7000, 8)
    assert allowed(bench.dma, READ, 0x1000)
    bench.set(CCMD, 1 << 63 | 1 << 61, 8)
    assert allowed(bench.dma, READ, 0x1000)
    bench.set(GCMD, TE | QIE | SRTP)
    bench.set(CCMD, 1 << 63 | 1 << 61, 8)
    assert not allowed(bench.dma, READ, 0x1000)
    assert bench.record()["reason"] == 0x1


# -- translation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("aw", "levels"), [(1, 3), (2, 4)])
def test_a_leaf_of_any_size_translates_whole(bench, level, aw, levels):
    bench.context(aw=aw)
    iova, pa, size = 5 << 30, 1 << 30, 1 << 12 + 9 * level
    bench.map(iova, pa, level=level, levels=levels)
    bench.memory.write(pa + size - 4, b"last")
    bench.dma.write(iova, b"first")
    assert bench.memory.read(pa, 5) == b"first"
    assert bench.dma.read(iova + size - 4, 4) == b"last"
    assert not allowed(bench.dma, READ, iova + size)
    assert not allowed(bench.dma, READ, iova - 4)


def test_five_levels_translate_where_the_unit_has_them():
    cap = VTD_LEGACY_CAP & ~(0x3F << 16) | 56 << 16 | 1 << 11
    bench = Bench(cap=cap)
    bench.root()
    bench.context(aw=3)
    bench.start()
    bench.map(1 << 56, PAGE, levels=5)
    assert allowed(bench.dma, WRITE, 1 << 56)
    bench.box.close()


@pytest.mark.parametrize(("bits", "access"), [(1, READ), (2, WRITE), (3, READ), (3, WRITE)])
def test_permissions_of_the_leaf_allow(bench, bits, access):
    bench.map(0x1000, PAGE, bits)
    assert allowed(bench.dma, access, 0x1000)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("bits", "access", "reason"), [(1, WRITE, 5), (2, READ, 6), (0, WRITE, 5), (0, READ, 6)])
def test_lack_of_permission_is_recorded(bench, bits, access, reason, cached):
    bench.map(0x1000, PAGE, bits)
    if cached:
        allowed(bench.dma, READ + WRITE - access, 0x1000)
        bench.clear_record()
    assert not allowed(bench.dma, access, 0x1004)
    assert bench.record() == {"pending": 1, "read": access == READ, "reason": reason, "sid": RID, "address": 0x1000}


def test_permissions_are_anded_along_the_path(bench):
    bench.map(0x1000, PAGE, 3)
    bench.word(TABLES[1], TABLES[2] | 1)
    assert allowed(bench.dma, READ, 0x1000)
    assert not allowed(bench.dma, WRITE, 0x1000)


def test_pass_through_gives_the_address_back_up_to_the_host_width(bench):
    bench.context(tt=2)
    bench.memory.write(0x5000, b"abcd")
    assert bench.dma.read(0x5000, 4) == b"abcd"
    assert not allowed(bench.dma, READ, 1 << 52)
    assert bench.record()["reason"] == 4


def test_one_request_over_many_pages_is_translated_page_by_page(bench):
    for n, pa in enumerate((0x300000, 0x500000, 0x501000, 0x400000)):
        bench.map(0x1000 * (n + 1), pa)
    data = bytes(range(256)) * 63
    bench.dma.write(0x1010, data)
    assert bench.memory.read(0x300010, 0xFF0) == data[:0xFF0]
    assert bench.memory.read(0x500000, 0x2000) == data[0xFF0:0x2FF0]
    assert bench.dma.read(0x1010, len(data)) == data
    assert len(bench.unit.tlb) == 4


# -- faults ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "root entry not present": (0x1, lambda b: b.root(0)),
    "context entry not present": (0x2, lambda b: b.context(0)),
    "address width without support": (0x3, lambda b: b.context(aw=3)),
    "translation type reserved": (0x3, lambda b: b.context(tt=3)),
    "translation type of device TLBs without DT": (0x3, lambda b: b.context(tt=1)),
    "first table out of memory": (0x3, lambda b: b.context(1 << 50 | 1)),
    "second table out of memory": (0x7, lambda b: b.word(TABLES[0], 1 << 50 | 3)),
    "context table out of memory": (0x9, lambda b: b.root(1 << 50 | 1)),
    "reserved bit in the root entry": (0xA, lambda b: b.root(CONTEXT | 1 | 1 << 5)),
    "upper half of the root entry": (0xA, lambda b: b.root(high=1)),
    "reserved bit in the context entry": (0xB, lambda b: b.context(TABLES[0] | 1 | 1 << 5)),
    "snoop bit in a leaf without SC": (0xC, lambda b: b.map(0x1000, PAGE, 3 | 1 << 11)),
    "low address bits of a large leaf": (0xC, lambda b: b.map(0, PAGE | 0x1000, 3, level=1)),
    "large leaf at the top": (0xC, lambda b: b.word(TABLES[0], PAGE | 0x83)),
    "output in the interrupt range": (0xE, lambda b: b.map(0x1000, 0xFEE00000)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_recorded_with_the_manuals_reason(bench, what):
    reason, arrange = FAULTS[what]
    bench.map(0x1000, PAGE)
    arrange(bench)
    assert not allowed(bench.dma, READ, 0x1000)
    assert bench.record() == {"pending": 1, "read": 1, "reason": reason, "sid": RID, "address": 0x1000}
    assert f"fault {reason:02x}h" in bench.box.last_faults[-1]


def test_a_root_table_out_of_memory_is_reason_8(bench):
    bench.set(RTADDR, 1 << 50, 8)
    bench.set(GCMD, TE | QIE | SRTP)
    assert not allowed(bench.dma, READ, 0x1000)
    assert bench.record()["reason"] == 8


@pytest.mark.parametrize(("aw", "beyond"), [(1, 1 << 39), (2, 1 << 48)])
def test_an_address_beyond_the_width_is_reason_4(bench, aw, beyond):
    bench.context(aw=aw)
    assert not allowed(bench.dma, WRITE, beyond)
    assert (bench.record()["reason"], bench.record()["address"]) == (4, beyond & (1 << 48) - 1)  # 11.4.7.6: FI


def test_fault_processing_disabled_keeps_a_qualified_fault_out_of_the_log(bench):
    bench.context(TABLES[0] | 3)
    assert not allowed(bench.dma, READ, 0x1000)
    assert bench.record()["pending"] == 0
    assert "disabled" in bench.box.last_faults[-1]


def test_a_second_fault_overflows_and_is_lost_until_software_clears_both(bench):
    allowed(bench.dma, READ, 0x1000)
    assert bench.reg(FSTS) == 0x2
    allowed(bench.dma, READ, 0x9000)
    assert bench.reg(FSTS) == 0x3
    assert bench.record()["address"] == 0x1000
    bench.set(FRCD + 12, 1 << 31)
    assert bench.reg(FSTS) == 0x1
    allowed(bench.dma, READ, 0x9000)
    assert bench.record()["pending"] == 0
    bench.set(FSTS, 1)
    allowed(bench.dma, WRITE, 0x9000)
    assert bench.record() == {"pending": 1, "read": 0, "reason": 5, "sid": RID, "address": 0x9000}


def test_the_fault_event_is_one_message_until_the_status_is_cleared(bench):
    bench.set(FEADDR, 0xFEE00000)
    bench.set(FEDATA, 0x33)
    allowed(bench.dma, READ, 0x1000)
    allowed(bench.dma, READ, 0x2000)
    assert bench.messages == [(0xFEE00000, 0x33)]
    bench.clear_record()
    allowed(bench.dma, READ, 0x1000)
    assert len(bench.messages) == 2


def test_a_masked_fault_event_is_pending_and_comes_when_unmasked(bench):
    bench.set(FECTL, 1 << 31)
    bench.set(FEADDR, 0xFEE00000)
    allowed(bench.dma, READ, 0x1000)
    assert (bench.messages, bench.reg(FECTL)) == ([], 3 << 30)
    bench.set(FECTL, 0)
    assert (len(bench.messages), bench.reg(FECTL)) == (1, 0)


def test_clearing_the_cause_takes_a_masked_event_back(bench):
    bench.set(FECTL, 1 << 31)
    allowed(bench.dma, READ, 0x1000)
    bench.clear_record()
    bench.set(FECTL, 0)
    assert bench.messages == []


def test_a_dword_write_to_the_interrupt_range_is_never_translated(bench):
    bench.map(0xFEE00000, PAGE)
    bench.dma.write(0xFEE00010, (0x55).to_bytes(4, "little"))
    assert bench.messages == [(0xFEE00010, 0x55)]
    assert not allowed(bench.dma, WRITE, 0xFEE00000, 8)
    assert not allowed(bench.dma, READ, 0xFEE00000)


# -- caches ----------------------------------------------------------------------------------------------------------

PSI, DSI, GLOBAL = 3 << 4, 2 << 4, 1 << 4


def test_what_is_cached_stays_until_it_is_invalidated(bench):
    bench.map(0x1000, PAGE)
    bench.memory.write(PAGE, b"old!")
    assert bench.dma.read(0x1000, 4) == b"old!"
    bench.map(0x1000, PAGE + 0x1000)
    bench.memory.write(PAGE + 0x1000, b"new!")
    assert bench.dma.read(0x1000, 4) == b"old!"
    bench.submit((DID << 16 | PSI | 2, 0x2000))
    assert bench.dma.read(0x1000, 4) == b"old!"
    bench.submit((DID + 1 << 16 | DSI | 2, 0))
    assert bench.dma.read(0x1000, 4) == b"old!"
    bench.submit((DID << 16 | PSI | 2, 0x1000))
    assert bench.dma.read(0x1000, 4) == b"new!"


@pytest.mark.parametrize("descriptor", [(DID << 16 | DSI | 2, 0), (GLOBAL | 2, 0), (DID << 16 | PSI | 2, 0x5000 | 3)])
def test_wider_invalidations_cover_the_page(bench, descriptor):
    bench.map(0x1000, PAGE)
    assert allowed(bench.dma, READ, 0x1000)
    bench.map(0x1000, 0, 0)
    bench.submit(descriptor)
    assert not allowed(bench.dma, READ, 0x1000)


def test_with_caching_mode_a_missing_translation_is_cached_too(bench):
    assert not allowed(bench.dma, READ, 0x1000)
    bench.map(0x1000, PAGE)
    assert not allowed(bench.dma, READ, 0x1000)
    bench.submit((DID << 16 | PSI | 2, 0x1000))
    assert allowed(bench.dma, READ, 0x1000)


def test_without_caching_mode_a_new_mapping_is_seen_at_once():
    bench = Bench(cap=VTD_LEGACY_CAP & ~0x80)
    bench.root()
    bench.context()
    bench.start()
    assert not allowed(bench.dma, READ, 0x1000)
    bench.map(0x1000, PAGE)
    assert allowed(bench.dma, READ, 0x1000)
    bench.box.close()


def test_a_context_entry_is_cached_under_its_domain(bench):
    bench.map(0x1000, PAGE)
    assert allowed(bench.dma, READ, 0x1000)
    bench.context(0)
    assert allowed(bench.dma, READ, 0x1000)
    bench.submit((RID + 8 << 32 | DID << 16 | 3 << 4 | 1, 0), (RID << 32 | DID + 1 << 16 | 3 << 4 | 1, 0))
    assert allowed(bench.dma, READ, 0x1000)
    bench.submit((RID << 32 | DID << 16 | 3 << 4 | 1, 0))
    assert not allowed(bench.dma, READ, 0x1000)


def test_a_missing_context_entry_is_cached_under_domain_0(bench):
    bench.context(0)
    assert not allowed(bench.dma, READ, 0x1000)
    bench.context()
    bench.map(0x1000, PAGE)
    assert not allowed(bench.dma, READ, 0x1000)
    bench.submit((RID << 32 | DID << 16 | 3 << 4 | 1, 0))
    assert not allowed(bench.dma, READ, 0x1000)
    bench.submit((RID << 32 | 3 << 4 | 1, 0), (DID << 16 | DSI | 2, 0))
    assert allowed(bench.dma, READ, 0x1000)


def test_the_registers_invalidate_as_the_queue_does(bench):
    bench.map(0x1000, PAGE)
    assert allowed(bench.dma, READ, 0x1000)
    bench.map(0x1000, 0, 0)
    bench.set(IVA, 0x1000, 8)
    bench.set(IOTLB, 1 << 63 | 3 << 60 | DID << 32, 8)
    assert bench.reg(IOTLB, 8) >> 57 == 3 << 3 | 3
    assert not allowed(bench.dma, READ, 0x1000)
    bench.set(CCMD, 1 << 63 | 3 << 61 | RID << 16 | DID, 8)
    assert bench.reg(CCMD, 8) >> 59 == 3 << 2 | 3


# -- the invalidation queue ------------------------------------------------------------------------------------------


def test_a_wait_descriptor_stores_its_status_and_moves_the_head(bench):
    bench.submit((0x1234 << 32 | 1 << 5 | 5, STATUS))
    assert bench.memory.read(STATUS, 8) == (0x1234).to_bytes(8, "little")
    assert bench.reg(IQH, 8) == 16


def test_a_wait_descriptor_can_interrupt(bench):
    bench.set(IEADDR, 0xFEE00000)
    bench.set(IEDATA, 0x44)
    bench.set(IECTL, 0)
    bench.submit((1 << 4 | 5, 0), (1 << 4 | 5, 0))
    assert (bench.messages, bench.reg(ICS)) == ([(0xFEE00000, 0x44)], 1)
    bench.set(ICS, 1)
    bench.submit((1 << 4 | 5, 0))
    assert len(bench.messages) == 2


def test_the_queue_wraps(bench):
    for n in range(300):
        bench.submit((n << 32 | 1 << 5 | 5, STATUS))
    assert bench.memory.read(STATUS, 4) == (299).to_bytes(4, "little")
    assert bench.reg(IQH, 8) == 300 * 16 % 4096


@pytest.mark.parametrize(
    "bad",
    [
        (0, 0),
        (0xF, 0),
        (3, 0),
        (2, 0),
        (DID << 16 | PSI | 2, 19),
        (1 << 60 | DSI | 2, 0),
        (DSI | 2, 1 << 8),
        (1, 0),
        (1 << 4 | 1 << 51 | 1, 0),
        (1 << 5 | 1 << 9 | 5, STATUS),
        (1 << 5 | 5, 1 << 49),
    ],
)
def test_a_malformed_descriptor_stops_the_queue_with_an_error(bench, bad):
    bench.submit((1 << 32 | 1 << 5 | 5, STATUS), bad, (2 << 32 | 1 << 5 | 5, STATUS))
    assert bench.memory.read(STATUS, 1) == b"\1"
    assert (bench.reg(FSTS) & 0x10, bench.reg(IQH, 8)) == (0x10, 16)
    bench.word(QUEUE + 16, 1 << 5 | 5)
    bench.word(QUEUE + 24, STATUS + 8)
    bench.set(FSTS, 0x10)
    assert bench.memory.read(STATUS, 1) == b"\2"
    assert bench.reg(FSTS) == 0


def test_a_tail_beyond_the_queue_is_an_error(bench):
    bench.set(IQT, 0x1000)
    assert bench.reg(FSTS) & 0x10


def test_nothing_is_executed_while_the_queue_is_off(bench):
    bench.set(GCMD, TE)
    bench.submit((1 << 32 | 1 << 5 | 5, STATUS))
    assert bench.memory.read(STATUS, 1) == b"\0"
    bench.set(GCMD, TE | QIE)
    assert bench.memory.read(STATUS, 1) == b"\1"


def test_a_fault_is_told_with_the_walk(bench):
    bench.map(0x1000, PAGE, 1)
    assert not allowed(bench.dma, WRITE, 0x1000)
    text = bench.box.last_faults[-1]
    assert text.splitlines()[0] == "00:10.0: write to 4 bytes at iova 0x1000: fault 05h, no write permission"
    assert "domain 0x7, 4 levels from 0x110000" in text
    assert text.splitlines()[-1].endswith("page of 0x1000 bytes at 0x200000, R")


@pytest.mark.parametrize("bit", [48, 51, 52, 63])
@pytest.mark.parametrize(("entry", "reason"), [("root", 0xA), ("context", 0xB), ("table", 0xC)])
def test_address_bits_beyond_the_host_address_width_are_reserved(entry, reason, bit):
    bench = Bench()
    unit = VtdUnit(bench.memory, VTD_LEGACY_CAP, VTD_LEGACY_ECAP, host_address_bits=48, send_interrupt=lambda *_: None)
    unit.write(RTADDR, 8, ROOT)
    unit.write(GCMD, 4, SRTP)
    unit.write(GCMD, 4, TE)
    bench.root(CONTEXT | 1 | (1 << bit if entry == "root" else 0))
    bench.context(TABLES[0] | 1 | (1 << bit if entry == "context" else 0))
    bench.map(0x1000, PAGE)
    if entry == "table":
        bench.word(TABLES[0], TABLES[1] | 3 | 1 << bit)
    if entry == "table" and bit >= 52:  # ignored there
        unit.translate(bench.dma, NO_PASID, 0x1000, 4, WRITE)
        return
    with pytest.raises(TranslationFault, match=f"fault {reason:02x}h"):
        unit.translate(bench.dma, NO_PASID, 0x1000, 4, WRITE)


def test_pass_through_ends_at_the_host_address_width():
    bench = Bench()
    unit = VtdUnit(bench.memory, VTD_LEGACY_CAP, VTD_LEGACY_ECAP, host_address_bits=46, send_interrupt=lambda *_: None)
    unit.write(RTADDR, 8, ROOT)
    unit.write(GCMD, 4, SRTP)
    unit.write(GCMD, 4, TE)
    bench.root()
    bench.context(tt=2)
    unit.translate(bench.dma, NO_PASID, (1 << 46) - 4, 4, WRITE)
    with pytest.raises(TranslationFault, match="fault 04h"):
        unit.translate(bench.dma, NO_PASID, 1 << 46, 4, WRITE)


@pytest.mark.parametrize("bit", [11, 62])
def test_bits_11_and_62_of_a_second_stage_table_pointer_are_reserved(bench, bit):
    bench.map(0x1000, PAGE)
    bench.word(TABLES[0], TABLES[1] | 3 | 1 << bit)
    with pytest.raises(DmaAbort):
        bench.dma.write(0x1000, b"1234")
    assert bench.reg(FRCD + 12) & 0xFF == 0xC


@pytest.mark.parametrize("device_tlb", [0, 4])
def test_bit_62_of_a_leaf_is_reserved_with_and_without_device_tlbs(device_tlb):
    bench = Bench(ecap=VTD_LEGACY_ECAP & ~4 | device_tlb)
    bench.root()
    bench.context()
    bench.start()
    bench.map(0x1000, PAGE | 1 << 62)
    with pytest.raises(DmaAbort):
        bench.dma.write(0x1000, b"1234")
    assert bench.reg(FRCD + 12) & 0xFF == 0xC
    bench.box.close()
