"""Nothing that a hostile device does reaches memory that it has no mapping for, on the VT-d unit."""

from itertools import pairwise

import pytest

from fakedev.bridge import PciBridge
from fakedev.endpoints.hostile import Hostile
from fakedev.machine import VTD_LEGACY_CAP, VTD_LEGACY_ECAP, Machine
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_ACS_CTRL, PCI_ACS_SV, PCI_ACS_TB, PCI_EXP_TYPE_ENDPOINT, PCI_EXP_TYPE_RC_END
from fakedev.tlp import PRG_SUCCESS, Invalidation, PageRequest, PageResponse
from tests.fakedev.agent import Bench

BASE = 0xFED90000
GCMD, RTADDR, CCMD, IOTLB = 0x18, 0x20, 0x28, 0xF8
TE, SRTP = 1 << 31, 1 << 30
ROOT, CONTEXT, TABLE = 0x10_0000, 0x10_1000, 0x11_0000
SECRET, OWN, VICTIMS = 0x20_0000, 0x30_0000, 0x40_0000
IOVA = 0x5000
HOSTILE, VICTIM = 0x0080, 0x0088


class VtdBench:
    """A hostile function and a victim, each with one page mapped at IOVA, behind a VT-d unit."""

    def __init__(self):
        self.box = Machine("hostile")
        self.memory = self.box.memory
        self.unit = self.box.add_vtd(BASE, VTD_LEGACY_CAP, VTD_LEGACY_ECAP)
        self.device = self.box.add(Hostile("0000:00:10.0", command=6), self.unit)
        self.victim = self.box.add(PciFunction("0000:00:11.0", (1, 2), 0, command=6), self.unit)
        self.memory.write(SECRET, b"secret")
        self._word(ROOT, CONTEXT | 1)
        for number, (rid, page) in enumerate(((HOSTILE, OWN), (VICTIM, VICTIMS))):
            tables = [TABLE + 0x4000 * number + 0x1000 * level for level in range(4)]
            self._word(CONTEXT + 16 * rid, tables[0] | 1)
            self._word(CONTEXT + 16 * rid + 8, number + 1 << 8 | 2)
            for table, below in pairwise(tables):
                self._word(table, below | 3)
            self._word(tables[3] + 8 * (IOVA >> 12), page | 3)
        self._set(RTADDR, ROOT, 8)
        self._set(GCMD, SRTP)
        self._set(GCMD, TE)

    def _word(self, pa, value):
        self.memory.write(pa, value.to_bytes(8, "little"))

    def _set(self, offset, value, width=4):
        self.box.mmio.write(BASE + offset, width, value)

    def detach(self):
        """Take the hostile function's context entry away, and invalidate as a driver does."""
        self._word(CONTEXT + 16 * HOSTILE, 0)
        self._set(CCMD, 1 << 63 | 1 << 61, 8)
        self._set(IOTLB, 1 << 63 | 1 << 60, 8)


@pytest.fixture
def bench():
    bench = VtdBench()
    yield bench
    bench.box.close()


def test_its_own_page_it_reaches(bench):
    assert bench.device.smash(IOVA, b"mine")
    assert bench.memory.read(OWN, 4) == b"mine"


@pytest.mark.parametrize("address", [SECRET, 0, IOVA + 4096, IOVA - 4096, (1 << 64) - 4096, 1 << 48])
def test_addresses_that_are_not_mapped_it_does_not_reach(bench, address):
    assert bench.device.steal(address, 6) is None
    assert not bench.device.smash(address, b"gotcha")
    assert bench.memory.read(SECRET, 6) == b"secret"


def test_an_access_that_starts_in_its_page_ends_with_it(bench):
    assert not bench.device.smash(IOVA + 4090, b"twelve bytes")
    assert bench.memory.read(OWN + 4096, 6) == bytes(6)


@pytest.mark.parametrize("pasid", [0, 1, 0xFFFFF])
def test_a_pasid_that_nobody_set_up_leads_nowhere(bench, pasid):
    assert bench.device.steal(IOVA, 4, pasid=pasid) is None


def test_translated_requests_are_refused_where_ats_is_off_in_the_tables(bench):
    assert bench.device.steal_translated(SECRET, 6) is None
    assert not bench.device.smash_translated(SECRET, b"gotcha")
    assert bench.device.learn(IOVA) is None
    assert bench.memory.read(SECRET, 6) == b"secret"


def test_a_flood_of_page_requests_leads_nowhere(bench):
    bench.device.flood(100)
    assert bench.device.steal(SECRET, 6) is None
    assert bench.device.steal(IOVA, 4) == bytes(4)


def test_bus_master_off_it_still_reaches_only_its_page(bench):
    bench.device.config_write(4, 2, 0)
    assert not bench.device.dma.enabled
    assert bench.device.smash(IOVA, b"mine")
    assert bench.device.steal(SECRET, 6) is None


def test_after_a_detach_it_reaches_nothing(bench):
    assert bench.device.smash(IOVA, b"mine")
    bench.detach()
    assert bench.device.steal(IOVA, 4) is None
    assert not bench.device.smash(IOVA, b"late")
    assert bench.memory.read(OWN, 4) == b"mine"


def test_in_the_name_of_nobody_it_reaches_nothing(bench):
    for rid in (0, 0x00FF, 0x0100, 0xFFFF):
        assert bench.device.steal(IOVA, 4, rid=rid) is None


@pytest.mark.parametrize("kind", [PCI_EXP_TYPE_RC_END, PCI_EXP_TYPE_ENDPOINT])
def test_in_the_root_complex_no_other_name_is_believed(bench, kind):
    """VT-d specification 3.12.4; so the kernel puts these functions into groups of their own, without ACS."""
    device = bench.box.add(Hostile("0000:00:12.0", kind=kind, command=6), bench.unit)
    for rid in (HOSTILE, VICTIM):
        assert device.steal(IOVA, 4, rid=rid) is None
        assert not device.smash(IOVA, b"fake", rid=rid)
        assert device.learn(IOVA, rid=rid) is None
        assert device.steal_translated(VICTIMS, 4, rid=rid) is None
        assert not device.forge_interrupt(0x55, rid=rid)
        assert device.flood(3, rid=rid) == 0
    assert bench.memory.read(VICTIMS, 4) == bytes(4)
    assert bench.memory.read(OWN, 4) == bytes(4)


def test_behind_a_port_without_source_validation_it_reaches_what_the_other_has_and_no_more(bench):
    # Nobody there can tell: this is why the kernel wants source validation between groups.
    bench.box.add(PciBridge("0000:00:01.0", 1, acs=0), bench.unit)
    device = bench.box.add(Hostile("0000:01:00.0", command=6), bench.unit)
    assert device.smash(IOVA, b"fake", rid=VICTIM)
    assert bench.memory.read(VICTIMS, 4) == b"fake"
    assert device.steal(SECRET, 6, rid=VICTIM) is None


def test_behind_a_port_with_source_validation_no_other_name_is_believed(bench):
    bench.box.add(PciBridge("0000:00:01.0", 1), bench.unit)
    device = bench.box.add(Hostile("0000:01:00.0", command=6), bench.unit)
    for rid in (HOSTILE, VICTIM, 0x0200):
        assert device.steal(IOVA, 4, rid=rid) is None
        assert not device.smash(IOVA, b"fake", rid=rid)
    assert bench.memory.read(VICTIMS, 4) == bytes(4)


# -- with address translation services, on an agent that lets it -----------------------------------------------------


@pytest.fixture
def trusting():
    bench = Bench()
    bench.device = bench.add(Hostile("0000:00:10.0"))
    bench.agent.map(IOVA, OWN)
    yield bench
    bench.box.close()


def test_it_completes_invalidations_and_keeps_the_translation(trusting):
    trusting.device.config_write(0x106, 2, 0x8000)
    trusting.device.learn(IOVA)
    assert trusting.agent.unmap(IOVA, trusting.device.rid)
    assert trusting.device.use_kept(IOVA, b"late")
    assert trusting.memory.read(OWN, 4) == b"late"


def test_what_it_kept_is_worth_nothing_once_the_agent_takes_no_translated_requests(trusting):
    trusting.device.learn(IOVA)
    trusting.agent.trusts_translated = False
    assert not trusting.device.use_kept(IOVA, b"late")
    assert trusting.memory.read(OWN, 4) == bytes(4)


def test_behind_a_port_with_translation_blocking_it_uses_nothing_that_it_kept(trusting):
    """VT-d specification 4.2.2: requests with an address type do not reach the agent; page requests and others do."""
    port = trusting.add(PciBridge("0000:00:01.0", 1))
    device = trusting.add(Hostile("0000:01:00.0"))
    assert device.learn(IOVA).allowed
    assert device.use_kept(IOVA, b"fine")
    port.config_write(0x100 + PCI_ACS_CTRL, 2, PCI_ACS_SV | PCI_ACS_TB)
    trusting.agent.kinds()
    assert not device.use_kept(IOVA, b"late")
    assert device.steal_translated(OWN, 4) is None
    assert device.learn(IOVA) is None
    assert trusting.agent.kinds() == []
    assert device.steal(IOVA, 4) == b"fine"
    assert device.flood(1) == 1


def test_a_page_request_is_whose_port_it_comes_from(trusting):
    device = trusting.device
    device.dma.send_page_request(PageRequest(VICTIM, -1, IOVA, 1, 3, True))
    assert trusting.agent.page_requests == [PageRequest(device.rid, -1, IOVA, 1, 3, True)]


def test_it_may_leave_an_invalidation_without_an_answer(trusting):
    trusting.device.port.completes = False
    assert not trusting.box.root.invalidate(trusting.device.rid, Invalidation(-1, 0, 1 << 64))


def test_responses_to_what_it_never_asked_do_no_harm(trusting):
    trusting.box.root.respond(trusting.device.rid, PageResponse(-1, 77, PRG_SUCCESS))
    assert trusting.device.flood(600) == 600
