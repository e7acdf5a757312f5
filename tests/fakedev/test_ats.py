"""The device TLB and the page request interface, against a translation agent of a few lines."""

import pytest

from fakedev.ats import AtsPort, PageFault
from fakedev.dma import DmaAbort, Outcome, Parked
from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_ATS_CTRL,
    PCI_ATS_CTRL_ENABLE,
    PCI_EXP_TYPE_RC_END,
    PCI_PASID_CTRL,
    PCI_PRI_ALLOC_REQ,
    PCI_PRI_CTRL,
    PCI_PRI_STATUS,
    PCI_PRI_STATUS_RF,
    PCI_PRI_STATUS_STOPPED,
    PCI_PRI_STATUS_UPRGI,
    AtsCapability,
    ExpressCapability,
    PasidCapability,
    PriCapability,
)
from fakedev.tlp import (
    EXECUTE,
    NO_PASID,
    PRG_FAILURE,
    PRG_INVALID,
    PRG_SUCCESS,
    PRIVILEGED,
    READ,
    WRITE,
    Invalidation,
    PageRequest,
    PageResponse,
    Translation,
)
from tests.fakedev.agent import Bench

IOVA, PA = 0x5000, 0x20_0000
ATS, PRI, PASID = 0x100, 0x110, 0x120


class Endpoint(PciFunction):
    def __init__(self):
        super().__init__("0000:00:10.0", (0x1234, 1), 0xFF0000, config_size=4096)
        self.express = ExpressCapability(self, 0x40, PCI_EXP_TYPE_RC_END)
        ats, pri = AtsCapability(self, ATS), PriCapability(self, PRI, capacity=8)
        self.port = AtsPort(self, ats, PasidCapability(self, PASID, execute=True), pri)
        self.pri = self.port.page_requests


@pytest.fixture
def bench():
    bench = Bench()
    bench.device = bench.add(Endpoint())
    yield bench
    bench.box.close()


def enable(device, ats=True, pri=0, pasid=0):
    """Switch on: PASIDs (control bits), page requests (allocation), ATS, in the order that software has to."""
    if pasid:
        device.config_write(PASID + PCI_PASID_CTRL, 2, pasid)
    if pri:
        device.config_write(PRI + PCI_PRI_ALLOC_REQ, 4, pri)
        device.config_write(PRI + PCI_PRI_CTRL, 2, 1)
    if ats:
        device.config_write(ATS + PCI_ATS_CTRL, 2, PCI_ATS_CTRL_ENABLE)


def status(device):
    return device.config_read(PRI + PCI_PRI_STATUS, 2)


def park(call, *arguments, **options):
    """What a call that must wait raised, and where its outcome goes."""
    with pytest.raises(Parked) as caught:
        call(*arguments, **options)
    outcomes = []
    caught.value.then(outcomes.append)
    return outcomes


# -- the device TLB --------------------------------------------------------------------------------------------------


def test_without_ats_requests_are_untranslated(bench):
    bench.agent.map(IOVA, PA)
    bench.device.port.write(IOVA, b"data")
    assert bench.memory.read(PA, 4) == b"data"
    assert bench.agent.kinds() == ["untranslated"]


def test_with_ats_a_translation_is_asked_for_once(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.write(IOVA, b"data")
    assert bench.device.port.read(IOVA, 4) == b"data"
    assert bench.agent.kinds() == ["translation request", "translated", "translated"]


def test_a_translation_is_used_until_an_invalidation_names_it(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.memory.write(PA, b"old!")
    assert bench.device.port.read(IOVA, 4) == b"old!"
    bench.agent.unmap(IOVA, bench.device.rid, invalidate=False)
    assert bench.device.port.read(IOVA, 4) == b"old!"
    assert bench.box.root.invalidate(bench.device.rid, Invalidation(NO_PASID, IOVA, 4096))
    with pytest.raises(PageFault):
        bench.device.port.read(IOVA, 4)


def test_an_invalidation_of_another_page_leaves_a_translation(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.read(IOVA, 4)
    bench.box.root.invalidate(bench.device.rid, Invalidation(NO_PASID, IOVA + 4096, 4096))
    assert len(bench.device.port.tlb) == 1


def test_an_invalidation_inside_a_large_page_takes_all_of_it(bench):
    tlb = bench.device.port.tlb
    tlb.insert(NO_PASID, 0, Translation(0x20_0000, 0x20_0000, PA, READ))
    tlb.invalidate(Invalidation(NO_PASID, 0x30_0000, 4096))
    assert len(tlb) == 0


@pytest.mark.parametrize(("named", "everyone", "left"), [(3, False, 2), (3, True, 0), (NO_PASID, False, 0)])
def test_an_invalidation_is_of_one_pasid_or_of_all(bench, named, everyone, left):
    tlb = bench.device.port.tlb
    for pasid in (NO_PASID, 3, 4):
        tlb.insert(pasid, 0, Translation(IOVA, 4096, PA, READ))
    tlb.invalidate(Invalidation(named, 0, 1 << 64, everyone))
    assert len(tlb) == left


def test_a_function_whose_ats_is_off_completes_no_invalidation(bench):
    assert not bench.box.root.invalidate(bench.device.rid, Invalidation(NO_PASID, 0, 1 << 64))
    assert not bench.box.root.invalidate(bench.device.rid + 1, Invalidation(NO_PASID, 0, 1 << 64))


def test_enabling_ats_empties_the_device_tlb(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.read(IOVA, 4)
    bench.device.config_write(ATS + PCI_ATS_CTRL, 2, 0)
    enable(bench.device)
    assert len(bench.device.port.tlb) == 0


def test_a_read_asks_for_reading_and_a_write_asks_again(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.read(IOVA, 4)
    bench.device.port.write(IOVA, b"data")
    asked = [access for kind, _, _, access in bench.agent.seen if kind == "translation request"]
    assert asked == [READ, WRITE]


def test_an_answer_that_allows_nothing_is_not_kept(bench):
    enable(bench.device)
    for _ in range(2):
        with pytest.raises(PageFault):
            bench.device.port.read(IOVA, 4)
    assert bench.agent.kinds() == ["translation request"] * 2


def test_an_untranslated_only_answer_has_the_request_go_untranslated(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.tlb.insert(NO_PASID, 0, Translation(IOVA, 4096, 0, WRITE, untranslated=True))
    bench.device.port.write(IOVA, b"data")
    assert bench.agent.kinds() == ["untranslated"]
    assert bench.memory.read(PA, 4) == b"data"


def test_a_transfer_over_two_pages_uses_two_translations(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.agent.map(IOVA + 4096, PA + 0x8000)
    bench.device.port.write(IOVA + 4094, b"data")
    assert bench.memory.read(PA + 4094, 2) + bench.memory.read(PA + 0x8000, 2) == b"data"
    assert bench.device.port.read(IOVA + 4094, 4) == b"data"


def test_an_agent_that_trusts_no_translated_request_aborts_it(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.agent.trusts_translated = False
    with pytest.raises(DmaAbort):
        bench.device.port.write(IOVA, b"data")
    assert bench.memory.read(PA, 4) == bytes(4)


def test_a_translated_request_cannot_be_an_interrupt(bench):
    enable(bench.device)
    with pytest.raises(DmaAbort):
        bench.device.dma.write_translated(0xFEE00000, bytes(4))


def test_an_interrupt_of_a_function_with_ats_is_untranslated(bench):
    messages = []
    bench.box.interrupt_sink = lambda *message: messages.append(message)
    enable(bench.device)
    bench.device.port.write(0xFEE00010, b"\x55\0\0\0")
    assert messages == [(0xFEE00010, 0x55)]


def test_bus_master_off_stops_translated_requests_and_translation_requests(bench):
    enable(bench.device)
    bench.agent.map(IOVA, PA)
    bench.device.port.read(IOVA, 4)
    bench.device.config_write(4, 2, 0)
    for address in (IOVA, IOVA + 0x10000):
        with pytest.raises(DmaAbort):
            bench.device.port.read(address, 4)


# -- PASIDs ----------------------------------------------------------------------------------------------------------


def test_a_pasid_that_software_has_not_enabled_never_leaves_the_function(bench):
    bench.agent.map(IOVA, PA, pasid=3)
    with pytest.raises(DmaAbort):
        bench.device.port.read(IOVA, 4, 3)
    assert not bench.agent.seen


def test_a_pasid_wider_than_the_capability_never_leaves_the_function(bench):
    enable(bench.device, ats=False, pasid=1)
    with pytest.raises(DmaAbort):
        bench.device.port.read(IOVA, 4, 1 << 20)
    assert not bench.agent.seen


@pytest.mark.parametrize(("control", "carried"), [(1, 0), (3, EXECUTE), (5, PRIVILEGED), (7, EXECUTE | PRIVILEGED)])
@pytest.mark.parametrize("ats", [False, True])
def test_the_prefix_carries_the_bits_that_software_enabled(bench, control, carried, ats):
    enable(bench.device, ats=ats, pasid=control)
    bench.agent.map(IOVA, PA, READ | EXECUTE, pasid=3)
    bench.device.port.read(IOVA, 4, 3, privileged=True, execute=True)
    assert bench.agent.seen[0][1:] == (3, IOVA, READ | carried)


def test_pasids_have_translations_of_their_own(bench):
    enable(bench.device, pasid=1)
    for pasid in (NO_PASID, 3, 4):
        bench.agent.map(IOVA, PA + 4096 * (pasid + 1), pasid=pasid)
        bench.device.port.write(IOVA, bytes([pasid + 1] * 4), pasid)
    for pasid in (NO_PASID, 3, 4):
        assert bench.memory.read(PA + 4096 * (pasid + 1), 4) == bytes([pasid + 1] * 4)


def test_a_pasid_without_an_iommu_is_aborted(bench):
    lone = bench.box.root.add(PciFunction("0000:00:11.0", (1, 2), 0, command=4), None)
    lone.dma.write(PA, b"data")
    with pytest.raises(DmaAbort):
        lone.dma.write(PA, b"more", 3)
    assert bench.memory.read(PA, 4) == b"data"


def test_a_port_forgets_the_runs_of_pasids(bench):
    enable(bench.device, ats=False, pasid=1)
    bench.agent.map(IOVA, PA, pasid=3)
    bench.device.port.read(IOVA, 4, 3)
    bench.device.port.read(IOVA, 4, 3)
    assert bench.agent.kinds() == ["untranslated"]
    bench.device.dma.forget()
    bench.device.port.read(IOVA, 4, 3)
    assert bench.agent.kinds() == ["untranslated"]


# -- page requests ---------------------------------------------------------------------------------------------------


def test_a_page_that_is_not_there_is_asked_for_and_the_request_goes_on_after_success(bench):
    enable(bench.device, pri=4, pasid=1)
    bench.agent.pages[3] = {}
    outcomes = park(bench.device.port.write, IOVA + 0x123, b"data", 3)
    assert bench.agent.page_requests == [PageRequest(bench.device.rid, 3, IOVA, WRITE, 0, True)]
    assert outcomes == []
    bench.agent.map(IOVA, PA, pasid=3)
    bench.agent.answer()
    assert outcomes == [Outcome.RETRY]
    bench.device.port.write(IOVA + 0x123, b"data", 3)
    assert bench.memory.read(PA + 0x123, 4) == b"data"


def test_an_invalid_response_aborts_the_request_and_leaves_the_interface_on(bench):
    enable(bench.device, pri=4)
    outcomes = park(bench.device.port.read, IOVA, 4)
    bench.agent.answer(PRG_INVALID)
    assert outcomes == [Outcome.ABORT]
    assert bench.device.pri.enabled
    assert status(bench.device) == 0x8000


@pytest.mark.parametrize("code", [PRG_FAILURE, 2, 7])
def test_a_failure_turns_the_interface_off_and_sets_rf(bench, code):
    enable(bench.device, pri=4)
    outcomes = [park(bench.device.port.read, IOVA + 4096 * n, 4) for n in range(5)]
    bench.agent.answer(code)
    assert outcomes == [[Outcome.ABORT]] * 5
    assert status(bench.device) & PCI_PRI_STATUS_RF
    with pytest.raises(PageFault):
        bench.device.port.read(IOVA, 4)


def test_after_a_failure_responses_are_ignored_until_software_enables_again(bench):
    enable(bench.device, pri=4)
    park(bench.device.port.read, IOVA, 4)
    bench.agent.answer(PRG_FAILURE)
    bench.box.root.respond(bench.device.rid, PageResponse(NO_PASID, 5, PRG_SUCCESS))
    assert not status(bench.device) & PCI_PRI_STATUS_UPRGI
    bench.device.config_write(PRI + PCI_PRI_STATUS, 2, PCI_PRI_STATUS_RF)
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 0)
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 1)
    assert status(bench.device) == 0x8000
    park(bench.device.port.read, IOVA, 4)


def test_a_response_to_no_group_sets_uprgi(bench):
    enable(bench.device, pri=4)
    outcomes = park(bench.device.port.read, IOVA, 4)
    bench.box.root.respond(bench.device.rid, PageResponse(NO_PASID, 5, PRG_SUCCESS))
    assert status(bench.device) & PCI_PRI_STATUS_UPRGI
    assert outcomes == []


def test_a_response_without_the_pasid_of_its_group_sets_uprgi(bench):
    enable(bench.device, pri=4, pasid=1)
    bench.agent.pages[3] = {}
    outcomes = park(bench.device.port.read, IOVA, 4, 3)
    bench.agent.answer(pasid=False)
    assert status(bench.device) & PCI_PRI_STATUS_UPRGI
    assert outcomes == []


def test_no_more_requests_are_outstanding_than_software_allotted(bench):
    enable(bench.device, pri=2)
    outcomes = [park(bench.device.port.read, IOVA + 4096 * n, 4) for n in range(3)]
    assert len(bench.agent.page_requests) == 2
    bench.agent.answer()
    assert len(bench.agent.page_requests) == 2
    assert [request.address for request in bench.agent.page_requests] == [IOVA + 4096, IOVA + 8192]
    assert outcomes == [[Outcome.RETRY], [], []]


def test_a_group_has_one_index_and_its_last_request_says_so(bench):
    enable(bench.device, pri=8)
    parked = bench.device.pri.ask(NO_PASID, [(IOVA, READ), (IOVA + 4096, WRITE), (IOVA + 8192, READ)])
    sent = bench.agent.page_requests
    assert [(request.address, request.group, request.last) for request in sent] == [
        (IOVA, 0, False),
        (IOVA + 4096, 0, False),
        (IOVA + 8192, 0, True),
    ]
    bench.agent.answer()
    assert parked.outcome == Outcome.RETRY


def test_stopped_is_set_once_a_disabled_interface_has_nothing_outstanding(bench):
    assert status(bench.device) & PCI_PRI_STATUS_STOPPED
    enable(bench.device, pri=4)
    assert not status(bench.device) & PCI_PRI_STATUS_STOPPED
    park(bench.device.port.read, IOVA, 4)
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 0)
    assert not status(bench.device) & PCI_PRI_STATUS_STOPPED
    bench.agent.answer()
    assert status(bench.device) & PCI_PRI_STATUS_STOPPED


def test_a_disabled_interface_gives_up_the_groups_that_waited_for_credit(bench):
    enable(bench.device, pri=1)
    sent, waiting = (park(bench.device.port.read, IOVA + 4096 * n, 4) for n in range(2))
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 0)
    assert (sent, waiting) == ([], [Outcome.ABORT])


def test_reset_counts_while_the_interface_is_off_and_drops_what_is_outstanding(bench):
    enable(bench.device, pri=4)
    outcomes = park(bench.device.port.read, IOVA, 4)
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 3)
    assert outcomes == []
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 0)
    bench.device.config_write(PRI + PCI_PRI_CTRL, 2, 2)
    assert outcomes == [Outcome.ABORT]
    assert bench.device.config_read(PRI + PCI_PRI_CTRL, 2) == 0
    assert status(bench.device) & PCI_PRI_STATUS_STOPPED
    bench.agent.answer()
    assert status(bench.device) & PCI_PRI_STATUS_UPRGI


def test_without_page_requests_a_missing_page_is_a_page_fault(bench):
    enable(bench.device)
    with pytest.raises(PageFault) as caught:
        bench.device.port.write(IOVA + 8, b"data")
    assert (caught.value.address, caught.value.access) == (IOVA + 8, WRITE)


def test_a_device_that_does_not_block_gets_a_page_fault_and_asks_for_nothing(bench):
    enable(bench.device, pri=4)
    with pytest.raises(PageFault):
        bench.device.port.write(IOVA, b"data", block=False)
    assert not bench.agent.page_requests


def test_the_stop_marker_is_a_last_request_for_nothing(bench):
    enable(bench.device, pri=4, pasid=1)
    bench.device.pri.stop(3)
    assert [request.is_stop_marker for request in bench.agent.page_requests] == [True]


def test_a_function_level_reset_ends_waiting_requests_and_switches_everything_off(bench):
    enable(bench.device, pri=4, pasid=1)
    bench.agent.map(IOVA, PA)
    bench.device.port.read(IOVA, 4)
    outcomes = park(bench.device.port.read, IOVA + 4096, 4)
    bench.device.config_write(0x40 + 8, 2, 0x8000)
    assert outcomes == [Outcome.ABORT]
    assert len(bench.device.port.tlb) == 0
    assert not bench.device.port.enabled
    assert not bench.device.pri.enabled
    assert not bench.device.port.pasid.enabled
    assert status(bench.device) == 0x8100


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_an_outcome_that_is_there_already_is_told_at_once():
    parked = Parked(None)
    parked.resolve(Outcome.RAZ_WI)
    outcomes = []
    parked.then(outcomes.append)
    parked.resolve(Outcome.ABORT)
    assert outcomes == [Outcome.RAZ_WI]
