"""A function with a device TLB and a page request interface behind a unit: everything from the device to the queue."""

import pytest

from fakedev.ats import AtsPort, PageFault
from fakedev.dma import NO_PASID, DmaAbort, Outcome, Parked
from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_ATS_CTRL,
    PCI_ATS_CTRL_ENABLE,
    PCI_EXP_TYPE_RC_END,
    PCI_PASID_CTRL,
    PCI_PRI_ALLOC_REQ,
    PCI_PRI_CTRL,
    AtsCapability,
    ExpressCapability,
    PasidCapability,
    PriCapability,
)
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, regs
from tests.fakedev.vtd.rig import DID, PAGE, PASID, PRQ, STATUS

IOVA = 0x5000
AT_RID = 0x0088  # 00:11.0


class Endpoint(PciFunction):
    def __init__(self):
        super().__init__("0000:00:11.0", (0x1234, 1), 0xFF0000, config_size=4096, command=4)
        self.express = ExpressCapability(self, 0x40, PCI_EXP_TYPE_RC_END)
        ats, pri = AtsCapability(self, 0x100), PriCapability(self, 0x110, capacity=8)
        self.port = AtsPort(self, ats, PasidCapability(self, 0x120), pri)

    def enable(self):
        self.config_write(0x120 + PCI_PASID_CTRL, 2, 1)
        self.config_write(0x110 + PCI_PRI_ALLOC_REQ, 4, 8)
        self.config_write(0x110 + PCI_PRI_CTRL, 2, 1)
        self.config_write(0x100 + PCI_ATS_CTRL, 2, PCI_ATS_CTRL_ENABLE)


@pytest.fixture
def made(rig):
    made = rig()
    made.unit.downstream = made.box.root
    made.device = made.box.add(Endpoint(), made.unit)
    made.port = made.device.port
    made.tables(entries.PGTT_FIRST)
    made.context(rid=AT_RID)
    made.start()
    made.device.enable()
    return made


@pytest.mark.parametrize("pasid", [NO_PASID, PASID])
def test_a_device_tlb_is_used_until_it_is_invalidated(made, pasid):
    made.map_first(IOVA, PAGE)
    made.memory.write(PAGE, b"data")
    assert made.port.read(IOVA, 4, pasid) == b"data"
    made.map_first(IOVA, PAGE + 0x1000)
    made.memory.write(PAGE + 0x1000, b"next")
    made.submit(qi.pasid_iotlb(DID, 0, 0, 0, qi.PIOTLB_PASID), qi.pasid_iotlb(DID, PASID, 0, 0, qi.PIOTLB_PASID))
    assert made.port.read(IOVA, 4, pasid) == b"data"
    if pasid == NO_PASID:
        made.submit(qi.device_tlb(AT_RID, 0, IOVA, 0), qi.wait(STATUS, 1))
    else:
        made.submit(qi.pasid_device_tlb(AT_RID, 0, pasid, IOVA, 0), qi.wait(STATUS, 1))
    assert made.load(STATUS) == 1
    assert made.port.read(IOVA, 4, pasid) == b"next"


def test_a_page_request_waits_for_its_response(made):
    with pytest.raises(Parked) as parked:
        made.port.write(IOVA, b"data", PASID)
    low, high = made.load(PRQ), made.load(PRQ + 8)
    assert (low & 0xFF, low >> 16 & 0xFFFF, low >> 32 & 0xFFFFF) == (1, AT_RID, PASID)
    assert (high & -4096, high & 7) == (IOVA, qi.PRQ_WRITE | qi.PRQ_LAST)
    made.map_first(IOVA, PAGE)
    ended = []
    parked.value.then(ended.append)
    made.submit(qi.page_group_response(AT_RID, PASID, high >> 3 & 0x1FF, qi.PGRP_SUCCESS))
    assert ended == [Outcome.RETRY]
    made.port.write(IOVA, b"data", PASID)
    assert made.memory.read(PAGE, 4) == b"data"


def test_an_invalid_response_ends_the_wait(made):
    with pytest.raises(Parked) as parked:
        made.port.read(IOVA, 4, PASID)
    group = made.load(PRQ + 8) >> 3 & 0x1FF
    made.submit(qi.page_group_response(AT_RID, PASID, group, qi.PGRP_INVALID))
    assert parked.value.outcome == Outcome.ABORT


def test_a_refused_page_request_is_answered_by_the_unit(made):
    made.context(rid=AT_RID, flags=entries.SM_DTE | entries.SM_PASIDE)
    with pytest.raises(Parked) as parked:
        made.port.read(IOVA, 4, PASID)
    assert parked.value.outcome == Outcome.ABORT
    assert made.record()["reason"] == 0x47


def test_a_fault_that_is_not_waited_for(made):
    with pytest.raises(PageFault):
        made.port.read(IOVA, 4, PASID, block=False)
    assert made.record() is None
    assert made.reg(regs.PQT, 8) == 0


def test_a_device_whose_ats_the_context_entry_forbids(made):
    made.map_first(IOVA, PAGE)
    made.context(rid=AT_RID, flags=entries.SM_PASIDE)
    with pytest.raises(DmaAbort):
        made.port.read(IOVA, 4, PASID)
    assert (made.record()["reason"], made.record()["at"]) == (0x44, 1)


def test_an_invalidation_of_a_function_without_ats_times_out(made):
    made.device.config_write(0x100 + PCI_ATS_CTRL, 2, 0)
    made.submit(qi.device_tlb(AT_RID, 0, IOVA, 0), qi.wait(STATUS, 1))
    assert made.reg(regs.FSTS) & regs.FSTS_ITE
    assert made.load(STATUS) == 0
