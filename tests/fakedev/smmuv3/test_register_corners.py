"""Registers and signals where the manual says more than their tables (Arm IHI 0070, 3.4, 3.18.2, 4.1.2, 4.7.3, 6.3)."""

import pytest

from fakedev.dma import READ, WRITE
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from tests.fakedev.smmuv3.bench import CMDQ, EVENTQ, PAGE, PRIQ, QUEUE_LOG2, RID, STRTAB, Bench
from tests.fakedev.smmuv3.test_ats import fill, page
from tests.fakedev.smmuv3.test_ats_answers import Anything

DOORBELL = 0xFEE0_0000
TABLE, QUEUE = 0xFC0, 0x03F


@pytest.fixture
def idle():
    bench = Bench(start=False)
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("cr0", "kept"),
    [
        (regs.CR0_SMMUEN, TABLE),
        (regs.CR0_CMDQEN, QUEUE),
        (regs.CR0_EVENTQEN, QUEUE),
        (regs.CR0_PRIQEN, QUEUE),
        (regs.CR0_SMMUEN | regs.CR0_EVENTQEN, TABLE | QUEUE),
    ],
)
def test_attributes_of_cr1_are_guarded_by_what_uses_them(idle, cr0, kept):
    """6.3.11: tables' by SMMUEN, queues' by each queue's enable; from SMMUv3.2 on a write is ignored."""
    idle.set(regs.CR1, TABLE | QUEUE)
    idle.set(regs.CR0, cr0)
    idle.set(regs.CR1, 0)
    assert idle.reg(regs.CR1) == kept
    idle.set(regs.CR0, 0)
    idle.set(regs.CR1, 0)
    assert idle.reg(regs.CR1) == 0


def test_reserved_bits_of_gbpa_read_zero(idle):
    """6.3.14: Update reads 0 once it is done; 30:21, 15:14 and 7:5 are RES0."""
    idle.set(regs.GBPA, 0xFFFF_FFFF)
    assert idle.reg(regs.GBPA) == 0x001F_3F1F


@pytest.mark.parametrize("access", [READ, WRITE])
def test_bypassing_request_beyond_oas_is_aborted_without_an_event(access):
    """3.4: "… exceeds the size of the OAS, the transaction is terminated with an abort and no event is recorded"."""
    bench = Bench(oas=40)
    bench.memory.add_window((1 << 40) - 0x1000, 0x3000, Anything())
    bench.set(regs.CR0, 0xF & ~regs.CR0_SMMUEN)
    assert bench.goes((1 << 40) - 8, access, 8)
    assert not bench.goes(1 << 40, access, 8)
    assert not bench.goes((1 << 40) - 8, access, 16)
    assert bench.event() is None
    bench.close()


def test_condition_of_the_pri_interrupt_is_there_without_msis():
    """6.3.1 MSI: "the SMMU_PRIQ_IRQ_CFG2.LO bit is not affected by whether MSIs are implemented or not"."""
    bench = Bench(msi=False)
    bench.set(regs.PRIQ_IRQ_CFG2, 0xFFFF_FFFF)
    assert bench.reg(regs.PRIQ_IRQ_CFG2) == regs.PRIQ_IRQ_CFG2_LO
    bench.set(regs.IRQ_CTRL, regs.IRQ_PRIQ)
    bench.set(regs.PRIQ_IRQ_CFG2, 0)
    assert bench.reg(regs.PRIQ_IRQ_CFG2) == regs.PRIQ_IRQ_CFG2_LO, "guarded by its enable"
    bench.close()


@pytest.mark.parametrize("name", ["GERROR", "EVENTQ", "PRIQ"])
def test_reserved_bits_of_interrupt_attributes_read_zero(idle, name):
    offset = getattr(regs, f"{name}_IRQ_CFG2")
    idle.set(offset, 0xFFFF_FFFF)
    assert idle.reg(offset) == (regs.PRIQ_IRQ_CFG2_LO if name == "PRIQ" else 0) | 0x3F


def test_wired_interrupts_come_with_messages(bench):
    """3.18.2: a pulse on the wire, if there is one, and a message, if its address is not zero."""
    for name, data in (("GERROR", 1), ("EVENTQ", 2)):
        bench.set(getattr(regs, f"{name}_IRQ_CFG0"), DOORBELL, 8)
        bench.set(getattr(regs, f"{name}_IRQ_CFG1"), data)
    bench.set(regs.IRQ_CTRL, 7)
    bench.goes(0x1000)
    bench.submit(c.sync(c.SIG_IRQ, PAGE, 0xCAFE), (0, 0))
    assert bench.messages == [(DOORBELL, 2), (DOORBELL, 1)]
    assert bench.memory.read(PAGE, 2) == b"\xfe\xca"
    assert bench.wires == ["eventq", "cmdq-sync", "gerror"]


@pytest.mark.parametrize("sev", [True, False])
def test_command_queue_that_stops_being_full_sends_an_event(sev):
    """4.1.2: a WFE event when an agent could have seen that the queue was full."""
    bench = Bench(sev=sev)
    sent = []
    bench.unit.on_event = lambda: sent.append(1)
    bench.submit(*[c.sync()] * 5)
    assert sent == [], "nobody can have seen it full"
    bench.set(regs.CR0, 0xF & ~regs.CR0_CMDQEN)
    bench.submit(*[c.sync()] * (1 << QUEUE_LOG2))
    assert sent == []
    bench.set(regs.CR0, 0xF)
    assert sent == [1] * sev
    bench.submit(c.sync())
    assert sent == [1] * sev
    bench.close()


@pytest.mark.parametrize(("lo", "interrupts"), [(0, 0), (1, 1)])
def test_last_request_that_overflows_the_pri_queue_interrupts_with_lo(bench, lo, interrupts):
    """6.3.36: "when the message is discarded because of a PRI queue overflow, the interrupt is generated"."""
    fill(bench)
    bench.set(regs.PRIQ_IRQ_CFG0, DOORBELL, 8)
    bench.set(regs.PRIQ_IRQ_CFG2, lo << 31)
    bench.set(regs.IRQ_CTRL, regs.IRQ_PRIQ)
    bench.dma.send_page_request(page(last=False))
    assert bench.messages == []
    bench.dma.send_page_request(page())
    assert len(bench.messages) == interrupts
    bench.set(regs.CR0, 0xF & ~regs.CR0_PRIQEN)
    bench.dma.send_page_request(page())
    assert len(bench.messages) == interrupts, "for any other reason it is not"


def test_stream_table_is_aligned_to_its_size_as_it_is_written():
    """6.3.24: "the literal value of LOG2SIZE", not limited by SIDSIZE."""
    small = Bench(sid_bits=8, start=False)
    small.start(log2=12)
    small.set(regs.CR0, 0)
    small.set(regs.STRTAB_BASE, STRTAB | 0x1_0000, 8)  # 64 << 12 bytes are 256 KiB
    small.set(regs.CR0, 0xF)
    small.ste(e.CONFIG_BYPASS)
    assert small.goes(PAGE)
    small.close()


OAS = 40


@pytest.fixture
def narrow():
    """A unit whose registers are given addresses with a bit beyond its physical addresses."""
    bench = Bench(oas=OAS, start=False)
    beyond = 1 << OAS
    bench.set(regs.CMDQ_BASE, beyond | CMDQ | QUEUE_LOG2, 8)
    bench.set(regs.EVENTQ_BASE, beyond | EVENTQ | QUEUE_LOG2, 8)
    bench.set(regs.PRIQ_BASE, beyond | PRIQ | QUEUE_LOG2, 8)
    bench.set(regs.STRTAB_BASE, beyond | STRTAB, 8)
    bench.set(regs.STRTAB_BASE_CFG, 8)
    bench.set(regs.EVENTQ_IRQ_CFG0, beyond | PAGE, 8)
    bench.set(regs.EVENTQ_IRQ_CFG1, 0xE)
    bench.set(regs.IRQ_CTRL, regs.IRQ_EVENTQ)
    bench.set(regs.CR0, 0xF)
    yield bench
    bench.close()


def test_addresses_in_registers_are_truncated_to_oas(narrow):
    """3.4.3: queues and messages; the base registers need not even store more (6.3)."""
    assert narrow.fault(0x1000)["id"] == events.C_BAD_STE
    assert narrow.memory.read(PAGE, 1) == b"\x0e"
    narrow.dma.send_page_request(page())
    assert narrow.load(PRIQ) & 0xFFFF == RID
    assert narrow.errors() == 0
    assert narrow.reg(regs.CMDQ_BASE, 8) >> OAS == 0


def test_address_of_a_sync_message_is_truncated_to_oas(narrow):
    """4.7.3: what is not zero is sent, and truncated."""
    narrow.submit(c.sync(c.SIG_IRQ, 1 << OAS | PAGE + 8, 0x5C))
    assert narrow.memory.read(PAGE + 8, 1) == b"\x5c"
    narrow.submit(c.sync(c.SIG_IRQ, 1 << OAS, 0x5D))
    assert narrow.memory.read(0, 1) == b"\x5d"
