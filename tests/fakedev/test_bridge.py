"""Bridges: what is behind them, access control services, requests to peers, requester ids."""

import pytest

from fakedev.bridge import ACS_ALL, PciBridge
from fakedev.dma import NO_PASID, READ, WRITE, DmaAbort
from fakedev.endpoints.iommu_testdev import REG_LEN, IommuTestdev
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_ACS_CTRL, PCI_ACS_RR, PCI_ACS_SV
from tests.fakedev.agent import Bench

PEER_BAR = 0xC010_0000
IOVA, PA = 0x5000, 0x20_0000


def switch(bench, acs):
    """A root port, a switch with two downstream ports, a function below each."""
    bench.add(PciBridge("0000:00:01.0", 1, 4))
    bench.add(PciBridge("0000:01:00.0", 2, 4, kind="upstream-port"))
    for slot, bus in ((0, 3), (1, 4)):
        bench.add(PciBridge(f"0000:02:{slot:02x}.0", bus, kind="downstream-port", acs=acs))
    first = bench.add(IommuTestdev("0000:03:00.0", bar_address=0xC000_0000))
    return first, bench.add(IommuTestdev("0000:04:00.0", bar_address=PEER_BAR))


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.box.close()


def test_a_bridge_shows_its_buses_and_kind(bench):
    port = bench.add(PciBridge("0000:00:01.0", 1, 4))
    assert port.config_read(0x18, 4) & 0xFFFFFF == 0x040100
    assert port.config_read(0x0E, 1) == 1
    assert port.config_read(0x42, 2) >> 4 & 15 == 4
    port.config_write(0x18, 4, 0xFFFFFFFF)
    assert port.config_read(0x18, 4) & 0xFFFFFF == 0x040100


def test_acs_services_that_a_port_lacks_cannot_be_switched_on(bench):
    port = bench.add(PciBridge("0000:00:01.0", 1, acs=PCI_ACS_SV))
    port.config_write(0x100 + PCI_ACS_CTRL, 2, 0xFFFF)
    assert port.acs.control == PCI_ACS_SV


@pytest.mark.parametrize("buses", [(0, 0), (3, 2), (1, 256)])
def test_a_bridge_with_impossible_buses_is_refused(buses):
    with pytest.raises(ValueError, match="a bridge from bus"):
        PciBridge("0000:00:01.0", *buses)


def test_the_way_up_goes_through_every_bridge(bench):
    first, _ = switch(bench, ACS_ALL)
    assert [bridge.address for bridge in bench.box.root.upstream(first)] == [
        "0000:02:00.0",
        "0000:01:00.0",
        "0000:00:01.0",
    ]


def test_with_redirection_a_request_to_a_peer_is_translated(bench):
    first, _ = switch(bench, ACS_ALL)
    with pytest.raises(DmaAbort):
        first.dma.read(PEER_BAR, 4)
    assert bench.agent.kinds() == ["untranslated"]


def test_without_redirection_a_switch_gives_it_to_the_peer_past_the_iommu(bench):
    first, second = switch(bench, 0)
    first.dma.write(PEER_BAR + REG_LEN, b"\x07\0\0\0")
    assert second.registers[REG_LEN] == 7
    assert bench.agent.kinds() == []


def test_switching_redirection_on_takes_effect_at_once(bench):
    first, _ = switch(bench, ACS_ALL)
    below = bench.box.root.upstream(first)[0]
    below.config_write(0x100 + PCI_ACS_CTRL, 2, 0)
    first.dma.read(PEER_BAR, 4)
    below.config_write(0x100 + PCI_ACS_CTRL, 2, PCI_ACS_RR)
    with pytest.raises(DmaAbort):
        first.dma.read(PEER_BAR, 4)


@pytest.mark.parametrize("pasid", [NO_PASID, 5])
def test_a_page_around_a_peers_registers_keeps_what_is_outside(bench, pasid):
    """What the port remembers of a translation is not used for what the switch takes out of it."""
    first, second = switch(bench, 0)
    start, stop = PEER_BAR - 0x1000, PEER_BAR + 0x2000
    bench.agent.translate = lambda *_: (start, stop, PA - start, READ | WRITE)
    first.dma.write(start, b"head", pasid=pasid)
    first.dma.write(PEER_BAR + REG_LEN, b"\x07\0\0\0", pasid=pasid)
    assert second.registers[REG_LEN] == 7
    first.dma.write(PEER_BAR + 0x1000, b"tail", pasid=pasid)
    first.dma.write(PEER_BAR + REG_LEN, b"\x08\0\0\0", pasid=pasid)
    assert second.registers[REG_LEN] == 8
    assert (bench.memory.read(PA, 4), bench.memory.read(PA + 0x2000, 4)) == (b"head", b"tail")
    assert bench.memory.read(PA + 0x1000, 0x1000) == bytes(0x1000)


def test_a_peer_that_decodes_no_memory_is_not_there(bench):
    first, second = switch(bench, 0)
    second.config_write(4, 2, 0)
    with pytest.raises(DmaAbort):
        first.dma.read(PEER_BAR, 4)


def test_a_translated_address_of_a_peer_reaches_it_through_the_root_complex(bench):
    first, second = switch(bench, ACS_ALL)
    bench.agent.map(IOVA, PEER_BAR)
    first.dma.write(IOVA + REG_LEN, b"\x09\0\0\0")
    assert second.registers[REG_LEN] == 9


def test_functions_of_one_slot_on_bus_0_are_no_peers(bench):
    first = bench.add(IommuTestdev("0000:00:03.0", bar_address=0xC000_0000))
    bench.add(IommuTestdev("0000:00:03.1", bar_address=PEER_BAR))
    with pytest.raises(DmaAbort):
        first.dma.read(PEER_BAR, 4)


def test_behind_a_bridge_to_conventional_pci_requests_are_the_bridges(bench):
    bench.add(PciBridge("0000:00:01.0", 1, kind="pcie-to-pci"))
    function = bench.add(PciFunction("0000:01:05.0", (1, 2), 0))
    assert function.dma.rid == 0x100


def test_a_bus_that_no_bridge_leads_to_has_no_way_up(bench):
    assert bench.box.root.upstream(bench.add(PciFunction("0000:07:00.0", (1, 2), 0))) == []
