"""Isolation groups of topologies, as Linux makes them."""

import pytest

from fakedev.bridge import ACS_LINUX, PciBridge
from fakedev.machine import Machine
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_ACS_CTRL, PCI_ACS_SV, PCI_EXP_TYPE_ENDPOINT, AcsCapability, ExpressCapability
from kernel_model.iommu.pci_group import dma_aliases, pci_device_group


def endpoint(address, acs=None, multifunction=False):
    function = PciFunction(address, (1, 2), 0xFF0000, config_size=4096)
    ExpressCapability(function, 0x40, PCI_EXP_TYPE_ENDPOINT)
    if acs is not None:
        AcsCapability(function, 0x100, acs, acs)
    if multifunction:
        function.set_multifunction()
    return function


def conventional(address):
    return PciFunction(address, (1, 2), 0xFF0000)


@pytest.fixture
def groups():
    """The groups of a machine with these functions, each as a set of addresses without "0000:"."""
    boxes = []

    def make(*functions):
        box = Machine("groups")
        boxes.append(box)
        found = {}
        for function in functions:
            box.add(function)
        for function in box.functions:
            group = pci_device_group(box.root, function, lambda other: found.get(other.rid))
            if group is None:
                group = set()
            group.add(function.address[5:])
            found[function.rid] = group
        return [sorted(group) for group in {id(group): group for group in found.values()}.values()]

    yield make
    for box in boxes:
        box.close()


def test_functions_on_the_root_bus_have_groups_of_their_own(groups):
    assert groups(endpoint("0000:00:01.0"), conventional("0000:00:02.0")) == [["00:01.0"], ["00:02.0"]]


def test_functions_of_one_slot_share_a_group(groups):
    both = [endpoint("0000:00:01.0", multifunction=True), endpoint("0000:00:01.1")]
    assert groups(*both) == [["00:01.0", "00:01.1"]]


def test_functions_of_one_slot_with_access_control_do_not(groups):
    both = [endpoint("0000:00:01.0", ACS_LINUX, multifunction=True), endpoint("0000:00:01.1", ACS_LINUX)]
    assert groups(*both) == [["00:01.0"], ["00:01.1"]]


def test_a_function_with_access_control_leaves_the_group_of_those_without(groups):
    slot = [endpoint("0000:00:01.0", multifunction=True), endpoint("0000:00:01.1", ACS_LINUX), endpoint("0000:00:01.2")]
    assert groups(*slot) == [["00:01.0", "00:01.2"], ["00:01.1"]]


def test_services_that_are_not_offered_count_as_there(groups):
    both = [endpoint("0000:00:01.0", PCI_ACS_SV, multifunction=True), endpoint("0000:00:01.1", PCI_ACS_SV)]
    assert len(groups(*both)) == 2


def test_behind_a_root_port_with_access_control_a_function_is_alone(groups):
    assert groups(PciBridge("0000:00:01.0", 1), endpoint("0000:01:00.0")) == [["00:01.0"], ["01:00.0"]]


def test_behind_a_root_port_without_it_the_port_is_in_the_group(groups):
    assert groups(PciBridge("0000:00:01.0", 1, acs=0), endpoint("0000:01:00.0")) == [["00:01.0", "01:00.0"]]


def test_services_that_are_switched_off_do_not_isolate(groups):
    port = PciBridge("0000:00:01.0", 1)
    port.config[0x100 + PCI_ACS_CTRL] = 0
    assert groups(port, endpoint("0000:01:00.0")) == [["00:01.0", "01:00.0"]]


def switch(acs):
    return [
        PciBridge("0000:00:01.0", 1, 4),
        PciBridge("0000:01:00.0", 2, 4, kind="upstream-port"),
        PciBridge("0000:02:00.0", 3, kind="downstream-port", acs=acs),
        PciBridge("0000:02:01.0", 4, kind="downstream-port", acs=acs),
        endpoint("0000:03:00.0"),
        endpoint("0000:04:00.0"),
    ]


def test_below_a_switch_with_access_control_everything_is_alone(groups):
    assert len(groups(*switch(ACS_LINUX))) == 6


def test_below_a_switch_without_it_functions_share_a_group_with_their_port_each(groups):
    # The ports themselves are apart: above them every port has access control, or needs none.
    assert groups(*switch(0)) == [
        ["00:01.0"],
        ["01:00.0"],
        ["02:00.0", "03:00.0"],
        ["02:01.0", "04:00.0"],
    ]


def test_two_functions_behind_a_bridge_to_conventional_pci_share_a_group_with_it(groups):
    bridge = PciBridge("0000:00:01.0", 1, kind="pcie-to-pci")
    assert groups(bridge, conventional("0000:01:01.0"), conventional("0000:01:02.0")) == [
        ["00:01.0", "01:01.0", "01:02.0"]
    ]


def test_a_conventional_bridge_takes_requests_over_by_its_own_id():
    box = Machine("aliases")
    box.add(PciBridge("0000:00:01.0", 1, 2, kind="pcie-to-pci"))
    box.add(PciBridge("0000:01:05.0", 2, kind="pci"))
    function = box.add(conventional("0000:02:00.0"))
    assert [rid for _, rid in dma_aliases(box.root, function)] == [0x200, 0x128, 0x100]
    box.close()
