"""The DMA engine with work queues: descriptors, faults reported and waited for, PASIDs, commands."""

import pytest

from fakedev.dma import DmaRequest, Outcome, Parked
from fakedev.endpoints import dsa
from fakedev.endpoints.dsa import Dsa
from fakedev.pcie import PCI_ATS_CTRL, PCI_ATS_CTRL_ENABLE, PCI_PASID_CTRL, PCI_PRI_ALLOC_REQ, PCI_PRI_CTRL
from fakedev.tlp import NO_PASID, PRG_FAILURE, PRG_INVALID, PRIVILEGED, READ
from tests.fakedev.agent import Bench

SRC, DST, REC, LIST = 0x10000, 0x20000, 0x30000, 0x40000
PA = {SRC: 0x40_0000, DST: 0x41_0000, REC: 0x42_0000, LIST: 0x43_0000}
DONE = dsa.FLAG_CRAV | dsa.FLAG_RCR
BLOCK = DONE | dsa.FLAG_BOF


class DsaBench(Bench):
    def __init__(self, ats=True):
        super().__init__()
        self.device = self.add(Dsa("0000:00:10.0", bar_address=0xE000_0000, portals_address=0xE010_0000, ats=ats))
        self.mmio, self.portals = self.device.bars[0], self.device.bars[2]

    def services(self, ats=True, pri=32, pasid=True):
        device = self.device
        device.config_write(0x120 + PCI_PASID_CTRL, 2, 5 if pasid else 0)
        device.config_write(0x110 + PCI_PRI_ALLOC_REQ, 4, pri)
        device.config_write(0x110 + PCI_PRI_CTRL, 2, 1 if pri else 0)
        device.config_write(0x100 + PCI_ATS_CTRL, 2, PCI_ATS_CTRL_ENABLE if ats else 0)

    def pages(self, *iovas, pasid=NO_PASID, allowed=3, count=4):
        for iova in iovas:
            for n in range(count):
                self.agent.map(iova + 4096 * n, PA[iova] + 4096 * n, allowed, pasid)

    def command(self, number, operand=0):
        self.mmio.write(dsa.CMD, 4, number << 20 | operand)
        return self.mmio.read(dsa.CMDSTS, 4)

    def queue(self, index=0, size=16, mode=dsa.WQ_DEDICATED | dsa.WQ_BOF, pasid=None):
        """Configure and enable a queue, and the device."""
        if pasid is not None:
            mode |= pasid << dsa.WQ_PASID_SHIFT | dsa.WQ_PASID_EN
        at = dsa.WQCFG + index * dsa.WQCFG_SIZE
        self.mmio.write(at, 4, size)
        self.mmio.write(at + 8, 4, mode)
        self.mmio.write(at + 12, 4, 21 | 5 << 5)
        self.command(dsa.CMD_ENABLE_DEVICE)
        assert self.command(dsa.CMD_ENABLE_WQ, index) == 0

    def submit(self, opcode, src=0, dst=0, count=0, *, flags=DONE, record=REC, index=0, pasid=0, handle=0):
        data = descriptor(opcode, src, dst, count, flags, record, pasid, handle)
        for at in range(0, 64, 8):
            self.portals.write(index * 0x4000 + at, 8, int.from_bytes(data[at : at + 8], "little"))

    def record(self, iova=REC):
        data = self.memory.read(PA[REC] + iova - REC, 32)
        return data[0], data[1], int.from_bytes(data[4:8], "little"), int.from_bytes(data[8:16], "little")

    def swerr(self):
        low = self.mmio.read(dsa.SWERR, 8)
        return low & 3, low >> 8 & 0xFF, self.mmio.read(dsa.SWERR + 16, 8)


def descriptor(opcode, src=0, dst=0, count=0, flags=DONE, record=REC, pasid=0, handle=0):
    head = pasid | flags << 32 | opcode << 56
    words = b"".join(word.to_bytes(8, "little") for word in (head, record, src, dst))
    return (words + count.to_bytes(4, "little") + handle.to_bytes(2, "little")).ljust(64, b"\0")


@pytest.fixture
def bench():
    bench = DsaBench()
    yield bench
    bench.box.close()


@pytest.fixture
def ready(bench):
    """Everything on, a dedicated queue without PASID that may block, pages mapped."""
    bench.services()
    bench.pages(SRC, DST, REC, LIST)
    bench.queue()
    return bench


# -- operations ------------------------------------------------------------------------------------------------------


def test_a_move_over_pages_copies_and_completes(ready):
    data = bytes(range(256)) * 40
    ready.memory.write(PA[SRC] + 100, data)
    ready.submit(dsa.OP_MEMMOVE, SRC + 100, DST + 7, len(data))
    assert ready.memory.read(PA[DST] + 7, len(data)) == data
    assert ready.record() == (dsa.COMP_SUCCESS, 0, len(data), 0)


def test_a_fill_repeats_its_pattern(ready):
    ready.submit(dsa.OP_MEMFILL, 0x8877665544332211, DST + 4090, 20)
    pattern = bytes.fromhex("1122334455667788")
    assert ready.memory.read(PA[DST] + 4090, 20) == (pattern * 3)[:20]


@pytest.mark.parametrize("mode", [0, dsa.WQ_ATS_DISABLE])
def test_a_queue_sends_of_a_pasids_prefix_what_software_has_enabled(bench, mode):
    bench.services()
    bench.pages(DST, REC, pasid=9)
    bench.queue(mode=dsa.WQ_DEDICATED | dsa.WQ_PRIV | mode, pasid=9)
    for control, privileged in ((5, PRIVILEGED), (1, 0)):
        bench.device.config_write(0x120 + PCI_PASID_CTRL, 2, control)
        bench.agent.seen.clear()
        bench.submit(dsa.OP_MEMFILL, 0, DST, 8)
        assert {access & PRIVILEGED for _, pasid, _, access in bench.agent.seen if pasid == 9} == {privileged}
    bench.device.config_write(0x120 + PCI_PASID_CTRL, 2, 0)
    bench.agent.seen.clear()
    bench.submit(dsa.OP_MEMFILL, 0, DST, 8)
    assert bench.agent.seen == []


@pytest.mark.parametrize(("change", "result", "done"), [(None, 0, 6000), (4999, 1, 4999)])
def test_a_comparison_says_whether_and_where(ready, change, result, done):
    if change is not None:
        ready.memory.write(PA[DST] + change, b"x")
    ready.submit(dsa.OP_COMPARE, SRC, DST, 6000)
    assert ready.record() == (dsa.COMP_SUCCESS, result, done, 0)


def test_a_no_op_without_a_record_leaves_nothing(ready):
    ready.submit(dsa.OP_NOOP, flags=0)
    assert ready.record()[0] == 0


def test_a_batch_runs_its_descriptors_in_order(ready):
    ready.memory.write(PA[SRC], b"batch")
    first = descriptor(dsa.OP_MEMMOVE, SRC, DST, 5, flags=0)
    second = descriptor(dsa.OP_MEMMOVE, DST, DST + 4096, 5, record=REC + 64)
    ready.memory.write(PA[LIST], first + second)
    ready.submit(dsa.OP_BATCH, LIST, 0, 2)
    assert ready.memory.read(PA[DST] + 4096, 5) == b"batch"
    assert ready.record(REC + 64)[0] == dsa.COMP_SUCCESS
    assert ready.record() == (dsa.COMP_SUCCESS, 0, 2, 0)


def test_a_batch_with_a_failure_says_so_and_finishes_the_others(ready):
    wrong = descriptor(0x77, record=REC + 64)
    good = descriptor(dsa.OP_MEMFILL, 0x2A, DST, 1, record=REC + 96)
    ready.memory.write(PA[LIST], wrong + good)
    ready.submit(dsa.OP_BATCH, LIST, 0, 2)
    assert ready.record(REC + 64)[0] == dsa.COMP_BAD_OPCODE
    assert ready.record(REC + 96)[0] == dsa.COMP_SUCCESS
    assert ready.record() == (dsa.COMP_BATCH_FAIL, 0, 2, 0)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"opcode": 0x77}, dsa.COMP_BAD_OPCODE),
        ({"opcode": dsa.OP_NOOP, "flags": DONE | 0x200}, dsa.COMP_INVALID_FLAGS),
        ({"opcode": dsa.OP_MEMFILL, "count": 0}, dsa.COMP_TRANSFER_SIZE),
        ({"opcode": dsa.OP_MEMFILL, "count": (1 << 21) + 1}, dsa.COMP_TRANSFER_SIZE),
        ({"opcode": dsa.OP_MEMMOVE, "src": DST + 4, "count": 8}, dsa.COMP_OVERLAP),
        ({"opcode": dsa.OP_BATCH, "src": LIST, "count": 1}, dsa.COMP_DESCRIPTOR_COUNT),
        ({"opcode": dsa.OP_BATCH, "src": LIST, "count": 33}, dsa.COMP_DESCRIPTOR_COUNT),
        ({"opcode": dsa.OP_BATCH, "src": LIST + 8, "count": 2}, dsa.COMP_LIST_ALIGNMENT),
    ],
)
def test_a_wrong_descriptor_moves_nothing_and_says_why(ready, fields, status):
    ready.submit(**{"dst": DST, **fields})
    assert ready.record() == (status, 0, 0, 0)


def test_an_interrupt_comes_where_the_handle_says(ready):
    messages = []
    ready.box.interrupt_sink = lambda *message: messages.append(message)
    ready.device.config_write(0x84, 4, 0xFEE00000)
    ready.device.config_write(0x8C, 2, 0x40)
    ready.device.config_write(0x82, 2, 0x31)
    ready.submit(dsa.OP_NOOP, flags=DONE | dsa.FLAG_RCI, handle=3)
    assert messages == [(0xFEE00000, 0x43)]


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_fault_is_reported_with_how_far_it_came(ready):
    del ready.agent.pages[NO_PASID][DST + 4096]
    ready.submit(dsa.OP_MEMFILL, 0x2A, DST + 16, 8192)
    assert ready.record() == (dsa.COMP_PAGE_FAULT | dsa.COMP_WRITE, 0, 4080, DST + 4096)
    assert not ready.agent.page_requests


def test_a_fault_on_reading_is_no_write(ready):
    del ready.agent.pages[NO_PASID][SRC]
    ready.submit(dsa.OP_MEMMOVE, SRC + 8, DST, 8)
    assert ready.record() == (dsa.COMP_PAGE_FAULT, 0, 0, SRC + 8)


def test_a_blocked_descriptor_goes_on_where_it_stopped_after_the_answer(ready):
    del ready.agent.pages[NO_PASID][DST + 4096]
    ready.submit(dsa.OP_MEMFILL, 0x2A2A2A2A2A2A2A2A, DST, 8192, flags=BLOCK)
    assert ready.record()[0] == 0
    assert ready.memory.read(PA[DST] + 4095, 2) == b"\x2a\0"
    ready.agent.map(DST + 4096, PA[DST] + 4096)
    ready.agent.answer(pasid=False)
    assert ready.record() == (dsa.COMP_SUCCESS, 0, 8192, 0)
    assert ready.memory.read(PA[DST], 8192) == b"\x2a" * 8192


@pytest.mark.parametrize("code", [PRG_INVALID, PRG_FAILURE])
def test_a_blocked_descriptor_ends_with_the_fault_after_a_bad_answer(ready, code):
    del ready.agent.pages[NO_PASID][DST]
    ready.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    ready.agent.answer(code, pasid=False)
    assert ready.record() == (dsa.COMP_PAGE_FAULT_IR | dsa.COMP_WRITE, 0, 0, DST)
    assert ready.memory.read(PA[DST], 8) == bytes(8)


def test_other_descriptors_pass_a_blocked_one(ready):
    del ready.agent.pages[NO_PASID][DST]
    ready.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    ready.submit(dsa.OP_NOOP, record=REC + 64)
    assert (ready.record()[0], ready.record(REC + 64)[0]) == (0, dsa.COMP_SUCCESS)


def test_when_every_engine_is_blocked_descriptors_wait_in_the_queue(ready):
    for n in range(4):
        del ready.agent.pages[NO_PASID][DST + 4096 * n]
        ready.submit(dsa.OP_MEMFILL, 0x2A, DST + 4096 * n, 8, flags=BLOCK)
    ready.submit(dsa.OP_NOOP, record=REC + 64)
    assert ready.record(REC + 64)[0] == 0
    ready.agent.answer(PRG_INVALID, pasid=False)
    assert ready.record(REC + 64)[0] == dsa.COMP_SUCCESS


def test_blocking_needs_the_queue_to_allow_it(bench):
    bench.services()
    bench.pages(REC)
    bench.queue(mode=dsa.WQ_DEDICATED)
    bench.submit(dsa.OP_NOOP, flags=BLOCK)
    assert bench.record()[0] == dsa.COMP_INVALID_FLAGS


def test_a_queue_without_page_requests_reports_instead_of_blocking(bench):
    bench.services()
    bench.pages(REC)
    bench.queue(mode=dsa.WQ_DEDICATED | dsa.WQ_BOF | dsa.WQ_PRS_DISABLE)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    assert bench.record()[0] == dsa.COMP_PAGE_FAULT | dsa.COMP_WRITE


def test_a_queue_without_ats_sends_untranslated_requests(bench):
    bench.services()
    bench.pages(REC, DST)
    bench.queue(mode=dsa.WQ_DEDICATED | dsa.WQ_ATS_DISABLE)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 8)
    assert set(bench.agent.kinds()) == {"untranslated"}
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST + 0x8000, 8)
    assert bench.record()[0] == dsa.COMP_HARDWARE | dsa.COMP_WRITE


def test_a_refused_translation_request_is_no_page_fault(bench):
    bench.services()
    bench.pages(REC)
    bench.queue(pasid=5)
    bench.submit(dsa.OP_NOOP)
    assert bench.swerr() == (1, dsa.COMP_RECORD_FAULT, REC)


def test_a_record_that_cannot_be_written_is_a_software_error_and_the_next_an_overflow(ready):
    ready.submit(dsa.OP_NOOP, record=REC + 8)
    assert ready.swerr() == (1, dsa.COMP_RECORD_ALIGNMENT, REC + 8)
    ready.submit(dsa.OP_NOOP, record=REC + 8)
    assert ready.swerr()[0] == 3
    assert ready.mmio.read(dsa.INTCAUSE, 4) == dsa.INTC_ERR
    ready.mmio.write(dsa.SWERR, 4, 3)
    ready.mmio.write(dsa.INTCAUSE, 4, 1)
    assert (ready.swerr()[0], ready.mmio.read(dsa.INTCAUSE, 4)) == (0, 0)


def test_a_record_on_a_missing_page_waits_for_it(ready):
    del ready.agent.pages[NO_PASID][REC]
    ready.submit(dsa.OP_NOOP)
    assert [request.address for request in ready.agent.page_requests] == [REC]
    ready.agent.map(REC, PA[REC])
    ready.agent.answer(pasid=False)
    assert ready.record()[0] == dsa.COMP_SUCCESS


# -- PASIDs ----------------------------------------------------------------------------------------------------------


def test_a_dedicated_queue_uses_its_own_pasid(bench):
    bench.services()
    bench.pages(REC, DST, pasid=5)
    bench.queue(pasid=5)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 1, pasid=9)
    assert bench.record()[0] == dsa.COMP_SUCCESS
    assert {(kind, pasid) for kind, pasid, *_ in bench.agent.seen} == {("translation request", 5), ("translated", -1)}


def test_a_shared_queue_uses_the_pasid_of_the_descriptor(bench):
    bench.services()
    bench.pages(REC, DST, pasid=9)
    bench.queue(mode=0, pasid=0)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 1, pasid=9)
    assert bench.record()[0] == dsa.COMP_SUCCESS
    assert {(kind, pasid) for kind, pasid, *_ in bench.agent.seen} == {("translation request", 9), ("translated", -1)}


def test_a_read_only_page_of_a_pasid_is_not_written(bench):
    bench.services()
    bench.pages(REC, pasid=5)
    bench.pages(DST, pasid=5, allowed=READ)
    bench.queue(pasid=5)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 1)
    assert bench.record()[0] == dsa.COMP_PAGE_FAULT | dsa.COMP_WRITE
    assert bench.memory.read(PA[DST], 1) == b"\0"


# -- commands --------------------------------------------------------------------------------------------------------


def test_the_capabilities_say_what_there_is(bench):
    assert bench.mmio.read(dsa.VERSION, 4) == 0x100
    assert bench.mmio.read(dsa.WQCAP, 8) & 0xFFFFFF == 128 | 8 << 16
    assert bench.mmio.read(dsa.OPCAP, 8) == 0x3F
    assert bench.mmio.read(dsa.OFFSETS, 8) == 0x8_0005_0004
    bench.mmio.write(dsa.WQCAP, 8, 0)
    assert bench.mmio.read(dsa.WQCAP, 8) & 0xFFFFFF == 128 | 8 << 16


def test_commands_fail_with_the_code_of_what_is_missing(bench):
    assert bench.command(31) == dsa.ERR_COMMAND
    assert bench.command(dsa.CMD_ENABLE_WQ, 0) == dsa.ERR_DEVICE_NOT_ENABLED
    bench.device.config_write(4, 2, 2)
    assert bench.command(dsa.CMD_ENABLE_DEVICE) == dsa.ERR_BUS_MASTER
    bench.device.config_write(4, 2, 6)
    assert bench.command(dsa.CMD_ENABLE_DEVICE) == 0
    assert bench.command(dsa.CMD_ENABLE_DEVICE) == dsa.ERR_DEVICE_ENABLED
    assert bench.command(dsa.CMD_ENABLE_WQ, 99) == dsa.ERR_WQ_INDEX
    assert bench.command(dsa.CMD_ENABLE_WQ, 0) == dsa.ERR_WQ_SIZE
    assert bench.command(dsa.CMD_DRAIN_WQ, 1) == dsa.ERR_WQ_NOT_ENABLED
    bench.mmio.write(dsa.WQCFG, 4, 4)
    assert bench.command(dsa.CMD_ENABLE_WQ, 0) == dsa.ERR_WQ_PASID
    bench.mmio.write(dsa.WQCFG + 8, 4, dsa.WQ_DEDICATED)
    assert bench.command(dsa.CMD_ENABLE_WQ, 0) == 0
    assert bench.command(dsa.CMD_ENABLE_WQ, 0) == dsa.ERR_WQ_ENABLED


def test_the_configuration_of_an_enabled_queue_keeps(ready):
    ready.mmio.write(dsa.WQCFG, 4, 99)
    assert ready.mmio.read(dsa.WQCFG, 4) == 16
    assert ready.command(dsa.CMD_DISABLE_WQ, 1) == 0
    ready.mmio.write(dsa.WQCFG, 4, 99)
    assert ready.mmio.read(dsa.WQCFG, 4) == 99


def test_a_descriptor_for_a_disabled_queue_is_a_software_error(ready):
    ready.submit(dsa.OP_NOOP, index=1)
    assert ready.swerr()[:2] == (1, dsa.SWERR_NO_QUEUE)


@pytest.mark.parametrize(("command", "operand"), [(dsa.CMD_DRAIN_ALL, 0), (dsa.CMD_DRAIN_WQ, 1)])
def test_a_drain_is_active_while_a_descriptor_waits(ready, command, operand):
    del ready.agent.pages[NO_PASID][DST]
    ready.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    assert ready.command(command, operand) == dsa.CMDSTS_ACTIVE
    ready.agent.answer(PRG_INVALID, pasid=False)
    assert ready.mmio.read(dsa.CMDSTS, 4) == 0


def test_a_drain_of_another_pasid_waits_for_nothing(bench):
    bench.services()
    bench.pages(REC, pasid=5)
    bench.queue(pasid=5)
    bench.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    assert bench.command(dsa.CMD_DRAIN_PASID, 6) == 0
    assert bench.command(dsa.CMD_DRAIN_PASID, 5) == dsa.CMDSTS_ACTIVE


@pytest.mark.parametrize(
    ("command", "operand"),
    [(dsa.CMD_ABORT_WQ, 1), (dsa.CMD_RESET_WQ, 1), (dsa.CMD_ABORT_ALL, 0), (dsa.CMD_RESET_DEVICE, 0)],
)
def test_an_aborted_descriptor_writes_nothing_even_when_its_page_comes(ready, command, operand):
    del ready.agent.pages[NO_PASID][DST]
    ready.submit(dsa.OP_MEMFILL, 0x2A, DST, 8, flags=BLOCK)
    assert ready.command(command, operand) == 0
    ready.agent.map(DST, PA[DST])
    ready.agent.answer(pasid=False)
    assert ready.memory.read(PA[DST], 8) == bytes(8)
    assert ready.record()[0] == 0


def test_a_function_level_reset_leaves_a_disabled_device(ready):
    ready.device.config_write(0x48, 2, 0x8000)
    assert ready.mmio.read(dsa.GENSTS, 4) == dsa.STATE_DISABLED
    assert ready.mmio.read(dsa.WQCFG, 4) == 0
    assert not ready.device.dma.enabled


# -- without ATS -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.RETRY, dsa.COMP_SUCCESS), (Outcome.ABORT, dsa.COMP_HARDWARE), (Outcome.RAZ_WI, dsa.COMP_SUCCESS)],
)
def test_a_device_without_ats_waits_where_the_iommu_stalls(outcome, status):
    bench = DsaBench(ats=False)
    device, parked = bench.device, []
    device.config_write(0x100 + PCI_PASID_CTRL, 2, 1)
    bench.pages(SRC, DST, REC, pasid=7)
    bench.memory.write(PA[SRC], b"data")
    translate = bench.agent.translate

    def stall_once(port, pasid, address, length, access):
        if address == SRC and not parked:
            parked.append(Parked(DmaRequest(port.rid, pasid, address, length, access)))
            raise parked[0]
        return translate(port, pasid, address, length, access)

    bench.agent.translate = stall_once
    bench.queue(pasid=7)
    bench.submit(dsa.OP_MEMMOVE, SRC, DST, 4)
    assert bench.record()[0] == 0
    assert parked[0].request.pasid == 7
    parked[0].resolve(outcome)
    assert bench.record()[0] == status
    expected = {Outcome.RETRY: b"data"}.get(outcome, bytes(4))
    assert bench.memory.read(PA[DST], 4) == expected
    assert device.port.page_requests is None
    bench.box.close()
