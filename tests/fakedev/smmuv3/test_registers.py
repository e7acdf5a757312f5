"""Registers, the event queue, global errors and interrupts (Arm IHI 0070 chapters 6 and 7)."""

import pytest

from fakedev.machine import SMMU_BASE
from fakedev.memory import BusAbort
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from fakedev.smmuv3.regs import QEMU_VIRT, Features
from tests.fakedev.smmuv3.bench import EVENTQ, NOWHERE, PAGE, QUEUE_LOG2, RID, Bench

VA = 0x1234000


@pytest.fixture
def idle():
    bench = Bench(start=False)
    yield bench
    bench.close()


def test_identification_is_qemus():
    """As read from QEMU 11.1.3's `-machine virt,iommu=smmuv3`."""
    bench = Bench(QEMU_VIRT, start=False)
    found = [bench.reg(4 * n) for n in range(8)]
    bench.close()
    assert found == [0x0D44101B, 0x02730010, 0, 0x1414, 0, 0x74, 0, 1]


@pytest.mark.parametrize(
    ("change", "offset", "bits"),
    [
        ({"stage1": False}, regs.IDR0, 1 << 1),
        ({"stage2": False}, regs.IDR0, 1 << 0),
        ({"coherent": False}, regs.IDR0, 1 << 4),
        ({"httu": 0}, regs.IDR0, 2 << 6),
        ({"pri": False}, regs.IDR0, 1 << 16),
        ({"asid16": False}, regs.IDR0, 1 << 12),
        ({"msi": False}, regs.IDR0, 1 << 13),
        ({"vmid16": False}, regs.IDR0, 1 << 18),
        ({"two_level_cd_table": False}, regs.IDR0, 1 << 19),
        ({"two_level_stream_table": False}, regs.IDR0, 1 << 27),
        ({"ssid_bits": 0}, regs.IDR1, 20 << 6),
        ({"sid_bits": 0}, regs.IDR1, 16),
        ({"cmdq_log2": 0}, regs.IDR1, 19 << 21),
        ({"eventq_log2": 0}, regs.IDR1, 19 << 16),
        ({"priq_log2": 0}, regs.IDR1, 19 << 11),
        ({"s2fwb": False}, regs.IDR3, 1 << 8),
        ({"range_invalidation": False}, regs.IDR3, 1 << 10),
        ({"granules": (12,)}, regs.IDR5, 3 << 5),
        ({"oas": 32}, regs.IDR5, 5),
    ],
)
def test_each_feature_is_a_field(change, offset, bits):
    names = {regs.IDR0: "idr0", regs.IDR1: "idr1", regs.IDR3: "idr3", regs.IDR5: "idr5"}
    every, without = Features(), Features().but(**change)
    if "pri" in change:
        assert every.idr3 ^ without.idr3 == 1 << 5
    assert getattr(every, names[offset]) ^ getattr(without, names[offset]) == bits


@pytest.mark.parametrize(
    "change",
    [
        {"stage1": False, "stage2": False},
        {"oas": 43},
        {"granules": ()},
        {"granules": (13,)},
        {"ssid_bits": 21},
        {"sid_bits": 33},
        {"ats": False},
        {"stall_model": 3},
        {"httu": 3},
        {"arch_minor": 0},
        {"cmdq_log2": 20},
    ],
)
def test_features_that_no_smmu_has_are_refused(change):
    with pytest.raises(ValueError, match=r"."):
        Features().but(**change)


def test_identification_cannot_be_written(idle):
    before = [idle.reg(4 * n) for n in range(8)]
    for n in range(8):
        idle.set(4 * n, 0xFFFFFFFF)
    assert [idle.reg(4 * n) for n in range(8)] == before


def test_cr0_is_acknowledged_at_once(idle):
    idle.set(regs.CR0, 0xFFFFFFFF)
    assert idle.reg(regs.CR0) == idle.reg(regs.CR0ACK) == 0x1F
    idle.set(regs.CR0ACK, 0)
    assert idle.reg(regs.CR0ACK) == 0x1F


def test_cr0_without_pri_and_ats():
    bench = Bench(QEMU_VIRT, start=False)
    bench.set(regs.CR0, 0xFFFFFFFF)
    assert bench.reg(regs.CR0ACK) == 0xD
    bench.close()


def test_irq_ctrl_is_acknowledged(idle):
    idle.set(regs.IRQ_CTRL, 0xFF)
    assert idle.reg(regs.IRQ_CTRLACK) == 7


@pytest.mark.parametrize(
    ("offset", "width", "enable"),
    [
        (regs.STRTAB_BASE, 8, regs.CR0_SMMUEN),
        (regs.STRTAB_BASE_CFG, 4, regs.CR0_SMMUEN),
        (regs.CR2, 4, regs.CR0_SMMUEN),
        (regs.CMDQ_BASE, 8, regs.CR0_CMDQEN),
        (regs.CMDQ_CONS, 4, regs.CR0_CMDQEN),
        (regs.EVENTQ_BASE, 8, regs.CR0_EVENTQEN),
        (regs.EVENTQ_PROD, 4, regs.CR0_EVENTQEN),
        (regs.PRIQ_BASE, 8, regs.CR0_PRIQEN),
        (regs.PRIQ_PROD, 4, regs.CR0_PRIQEN),
    ],
)
def test_guarded_registers_keep_their_value_while_enabled(idle, offset, width, enable):
    idle.set(offset, 2, width) if width == 4 else idle.set(offset, 0x40_0002, width)
    value = idle.reg(offset, width)
    assert value
    idle.set(regs.CR0, enable)
    idle.set(offset, 0, width)
    assert idle.reg(offset, width) == value
    idle.set(regs.CR0, 0)
    idle.set(offset, 0, width)
    assert idle.reg(offset, width) == 0


@pytest.mark.parametrize("name", ["GERROR", "EVENTQ", "PRIQ"])
def test_interrupt_configuration_is_guarded(idle, name):
    offset = getattr(regs, f"{name}_IRQ_CFG0")
    idle.set(offset, 0x1000, 8)
    idle.set(regs.IRQ_CTRL, 7)
    idle.set(offset, 0x2000, 8)
    assert idle.reg(offset, 8) == 0x1000


def test_8_byte_registers_are_reached_by_halves(idle):
    idle.set(regs.STRTAB_BASE, 0x8765_4000)
    idle.set(regs.STRTAB_BASE + 4, 0x4000_000A)
    assert idle.reg(regs.STRTAB_BASE, 8) == 0x4000_000A_8765_4000


def test_what_is_not_there_reads_zero(idle):
    idle.set(0xFF0, 1)
    assert (idle.reg(0xFF0), idle.reg(0xA8), idle.reg(0x1FFFC)) == (0, 0, 0)
    with pytest.raises(BusAbort):
        idle.box.mmio.read(SMMU_BASE + regs.WINDOW_SIZE, 4)


def test_reset_forgets_everything(bench):
    bench.ste()
    bench.cd()
    bench.map(VA, PAGE)
    assert bench.goes(VA)
    bench.unit.reset()
    assert (bench.reg(regs.CR0), len(bench.unit.tlb), bench.unit.configuration.stes) == (0, 0, {})
    assert bench.goes(PAGE), "a bypass"


# -- event queue -----------------------------------------------------------------------------------------------------


def fill(bench):
    for n in range(1 << QUEUE_LOG2):
        assert not bench.goes(0x1000 * n)


def overflown(bench):
    return bool((bench.reg(regs.EVENTQ_PROD) ^ bench.reg(regs.EVENTQ_CONS)) >> 31)


def test_full_queue_is_no_overflow_yet(bench):
    bench.ste()
    bench.cd()
    fill(bench)
    assert not overflown(bench)
    assert bench.reg(regs.EVENTQ_PROD) == 1 << QUEUE_LOG2


def test_overflow_toggles_once_until_acknowledged(bench):
    bench.ste()
    bench.cd()
    fill(bench)
    bench.goes(0xA000)
    bench.goes(0xB000)
    assert overflown(bench)
    assert bench.errors() == 0, "an overflow is not a global error"
    first = bench.event()
    assert first["address"] == 0
    assert overflown(bench)
    bench.goes(0xC000)  # with space there is, events are recorded in spite of the overflow
    assert bench.reg(regs.EVENTQ_PROD) & 0x7F == (1 << QUEUE_LOG2) + 1
    bench.set(regs.EVENTQ_CONS, 1 << 31 | 1)
    assert not overflown(bench)
    bench.goes(0xD000)
    assert overflown(bench)


def test_indexes_wrap(bench):
    bench.ste()
    bench.cd()
    for n in range(5 << QUEUE_LOG2):
        assert bench.fault(0x1000 * n)["address"] == 0x1000 * n


def test_nothing_is_recorded_while_the_queue_is_off(bench):
    bench.set(regs.CR0, regs.CR0_SMMUEN)
    assert not bench.goes(VA)
    assert bench.reg(regs.EVENTQ_PROD) == 0


def test_record_that_memory_refuses_is_a_global_error(bench):
    bench.set(regs.CR0, 0)
    bench.set(regs.EVENTQ_BASE, NOWHERE | QUEUE_LOG2, 8)
    bench.set(regs.CR0, 0xF)
    assert not bench.goes(VA)
    assert (bench.errors(), bench.reg(regs.EVENTQ_PROD)) == (regs.GERROR_EVENTQ_ABT_ERR, 0)
    assert not bench.goes(VA)
    assert bench.reg(regs.GERROR) == regs.GERROR_EVENTQ_ABT_ERR, "an active error does not toggle"
    bench.acknowledge()
    assert not bench.goes(VA)
    assert (bench.reg(regs.GERROR), bench.errors()) == (0, regs.GERROR_EVENTQ_ABT_ERR)


def test_queue_is_no_larger_than_implemented():
    bench = Bench(eventq_log2=2, cmdq_log2=2)
    bench.ste()
    bench.cd()
    for _ in range(5):
        bench.goes(VA)
    assert bench.reg(regs.EVENTQ_PROD) == 1 << 31 | 4
    bench.close()


# -- interrupts ------------------------------------------------------------------------------------------------------

DOORBELL = 0xFEE0_1000


def with_interrupts(bench, address=DOORBELL):
    for n, name in enumerate(("GERROR", "EVENTQ", "PRIQ")):
        base = getattr(regs, f"{name}_IRQ_CFG0")
        bench.set(base, address, 8)
        bench.set(base + 8, 0x10 + n)
    bench.set(regs.IRQ_CTRL, 7)


def test_event_interrupt_comes_when_the_queue_is_no_longer_empty(bench):
    with_interrupts(bench)
    bench.goes(VA)
    bench.goes(VA)
    assert bench.messages == [(DOORBELL, 0x11)]
    bench.event()
    bench.goes(VA)
    assert len(bench.messages) == 1
    bench.event(), bench.event()
    bench.goes(VA)
    assert len(bench.messages) == 2


def test_error_interrupt(bench):
    with_interrupts(bench)
    bench.submit((0, 0))
    assert bench.messages == [(DOORBELL, 0x10)]


def test_no_interrupt_without_its_enable(bench):
    with_interrupts(bench)
    bench.set(regs.IRQ_CTRL, 0)
    bench.goes(VA)
    bench.submit((0, 0))
    assert bench.messages == []


def test_message_that_memory_refuses_is_a_global_error(bench):
    with_interrupts(bench, NOWHERE)
    bench.goes(VA)
    assert bench.errors() == regs.GERROR_MSI_EVENTQ_ABT_ERR | regs.GERROR_MSI_GERROR_ABT_ERR


def test_message_to_memory_is_a_store(bench):
    with_interrupts(bench, PAGE)
    bench.goes(VA)
    assert bench.memory.read(PAGE, 4) == b"\x11\0\0\0"


def test_wired_interrupts_without_msi():
    bench = Bench(msi=False)
    bench.set(regs.IRQ_CTRL, 7)
    bench.goes(VA)
    bench.submit(c.sync(c.SIG_IRQ, PAGE, 1), (0, 0))
    assert bench.wires == ["eventq", "cmdq-sync", "gerror"]
    assert bench.memory.read(PAGE, 4) == bytes(4)
    assert bench.reg(regs.EVENTQ_IRQ_CFG0, 8) == 0
    bench.close()


def test_handler_may_submit_commands_from_inside(bench):
    """An interrupt's handler that stores to registers while commands are being consumed."""
    with_interrupts(bench)

    def handler(address, data):
        bench.messages.append(data)
        bench.word(0x20_0000 + 16, c.SYNC)
        bench.acknowledge()

    bench.box.interrupt_sink = handler
    bench.submit(c.sync(), (0, 0), c.sync())
    assert (bench.messages, bench.reg(regs.CMDQ_CONS) & 0x7F) == ([0x10], 3)


# -- in words --------------------------------------------------------------------------------------------------------


def test_explain_tells_the_way_and_what_is_stale(bench):
    bench.ste(e.CONFIG_NESTED)
    bench.cd()
    bench.identity2()
    bench.map(VA, 0x40005000)
    bench.map2(0x40005000, PAGE)
    assert bench.goes(VA)
    bench.ste(e.CONFIG_ABORT)
    text = "\n".join(bench.unit.explain(RID, VA))
    assert "still holds the STE" in text
    bench.ste(e.CONFIG_NESTED)
    bench.cd(asid=77)
    text = "\n".join(bench.unit.explain(RID, VA))
    assert "still holds CD 0" in text
    assert f"page of 0x1000 bytes at {PAGE:#x}" in text


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda bench: None, "illegal (V is clear)"),
        (lambda bench: bench.ste(e.CONFIG_ABORT), "abort"),
        (lambda bench: bench.ste(), "CD 0: illegal (V is clear)"),
        (lambda bench: (bench.ste(), bench.cd()), "not present"),
        (lambda bench: (bench.ste(), bench.cd(t0sz=39)), "outside the 25 bits"),
        (lambda bench: (bench.ste(), bench.cd(w0=e.CD_0_EPD0)), "EPD"),
        (lambda bench: bench.ste(e.CONFIG_S2), "stage 2 level 3"),
        (lambda bench: bench.ste(e.CONFIG_BYPASS), "bypass"),
        (lambda bench: bench.ste(cds=NOWHERE), "F_CD_FETCH"),
        (lambda bench: bench.ste(e.CONFIG_NESTED), "does not translate the CD"),
        (lambda bench: bench.set(regs.CR0, 0), "off: bypass"),
    ],
)
def test_explain_names_what_stops_a_request(bench, prepare, words):
    prepare(bench)
    assert words in "\n".join(bench.unit.explain(RID, 0x7000_0000))


def test_explain_changes_nothing(bench):
    bench.ste(e.CONFIG_NESTED)
    bench.cd()
    bench.identity2()
    bench.map(VA, PAGE)
    before = (len(bench.unit.tlb), dict(bench.unit.configuration.stes))
    bench.unit.explain(RID, VA)
    assert (len(bench.unit.tlb), dict(bench.unit.configuration.stes)) == before


def test_refused_requests_are_told_in_words(bench):
    bench.ste()
    bench.cd()
    bench.goes(VA)
    assert "F_TRANSLATION, at stage 1 for the request" in bench.box.last_faults[-1]


def test_events_have_their_names():
    assert events.NAMES[0x10] == "F_TRANSLATION"
    assert events.NAMES[0x0A] == "C_BAD_CD"
    assert EVENTQ % (32 << QUEUE_LOG2) == 0
