"""PCI Express capabilities as software sees them in configuration space."""

import pytest

from fakedev.dma import DmaPort
from fakedev.machine import Machine
from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_ACS_CTRL,
    PCI_ACS_RR,
    PCI_ACS_SV,
    PCI_ATS_CTRL,
    PCI_EXP_TYPE_RC_END,
    PCI_PASID_CTRL,
    PCI_PRI_ALLOC_REQ,
    PCI_PRI_CTRL,
    PCI_PRI_STATUS,
    AcsCapability,
    AtsCapability,
    ExpressCapability,
    PasidCapability,
    PriCapability,
)


@pytest.fixture
def function():
    box = Machine("express")
    function = PciFunction("0000:00:10.0", (1, 2), 0xFF0000, config_size=4096)
    ExpressCapability(function, 0x40, PCI_EXP_TYPE_RC_END)
    function.services = (
        AtsCapability(function, 0x100, queue_depth=4),
        PriCapability(function, 0x110, capacity=16, response_pasid=False),
        PasidCapability(function, 0x120, bits=8, execute=True, privileged=False),
        AcsCapability(function, 0x130, PCI_ACS_SV | PCI_ACS_RR),
    )
    yield box.add(function)
    box.close()


def test_the_chain_of_extended_capabilities(function):
    found, at = [], 0x100
    while at:
        header = function.config_read(at, 4)
        found.append((at, header & 0xFFFF, header >> 16 & 15))
        at = header >> 20
    assert found == [(0x100, 0x0F, 1), (0x110, 0x13, 1), (0x120, 0x1B, 1), (0x130, 0x0D, 1)]


@pytest.mark.parametrize(
    ("offset", "width", "written", "read"),
    [
        (0x104, 2, 0xFFFF, 0x64),  # ATS capability: depth 4, page aligned, global invalidate
        (0x100 + PCI_ATS_CTRL, 2, 0xFFFF, 0x801F),
        (0x110 + PCI_PRI_CTRL, 2, 0x0001, 0x0001),
        (0x110 + PCI_PRI_STATUS, 2, 0xFFFF, 0x0100),
        (0x118, 4, 0xFFFFFFFF, 16),
        (0x110 + PCI_PRI_ALLOC_REQ, 4, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x124, 2, 0, 0x0802),  # PASIDs of 8 bits, with execute
        (0x120 + PCI_PASID_CTRL, 2, 0xFFFF, 0x0003),
        (0x130 + PCI_ACS_CTRL, 2, 0xFFFF, 0x0005),
        (0x140, 4, 0xFFFFFFFF, 0),  # nothing is there
        (0x48, 2, 0x7FFF, 0x7FFF),
        (0x44, 4, 0, 0x10008000),
        (0x64, 4, 0, 0x00200000),
    ],
)
def test_registers_keep_what_they_can(function, offset, width, written, read):
    function.config_write(offset, width, written)
    assert function.config_read(offset, width) == read


def test_the_smallest_translation_unit_is_the_controls_field(function):
    function.config_write(0x100 + PCI_ATS_CTRL, 2, 9)
    assert function.services[0].stu_lg2 == 21


def test_a_function_gets_no_more_requests_than_it_has_room_for(function):
    function.config_write(0x110 + PCI_PRI_ALLOC_REQ, 4, 1000)
    assert function.services[1].allocation == 16


def test_a_function_level_reset_clears_controls_and_reads_zero(function):
    function.config_write(0x100 + PCI_ATS_CTRL, 2, 0x8000)
    function.config_write(0x48, 2, 0x8000)
    assert function.config_read(0x48, 2) == 0
    assert not function.services[0].enabled
    assert "flr" in function.reset_methods


@pytest.mark.parametrize("offset", [0xFF8, 0x152, 0x100])
def test_a_capability_that_does_not_fit_is_refused(function, offset):
    with pytest.raises(ValueError, match="extended capability"):
        PriCapability(function, offset)


def test_a_function_with_256_bytes_has_no_extended_capabilities():
    with pytest.raises(ValueError, match="no extended configuration space"):
        AtsCapability(PciFunction("0000:00:01.0", (1, 2), 0), 0x100)


@pytest.mark.parametrize("bits", [0, 21])
def test_pasids_have_1_to_20_bits(function, bits):
    with pytest.raises(ValueError, match="1 to 20"):
        PasidCapability(function, 0x200, bits=bits)


class Doorbell:
    """Memory that tells who writes to it."""

    def __init__(self, told):
        self.told = told

    def write(self, offset, data):
        self.told.append((offset, data))


def test_where_no_range_is_for_interrupts_a_write_there_is_a_write_to_memory():
    box = Machine("arm")
    messages = []
    port = DmaPort(8, box.memory, None, lambda *message: messages.append(message), msi_window=(0, 0))
    port.set_enabled(True)
    box.memory.add_window(0xFEE0_0000, 0x1000, Doorbell(messages))
    port.write(0xFEE0_0040, b"\x55\0\0\0")
    assert [(offset, bytes(data)) for offset, data in messages] == [(0x40, b"\x55\0\0\0")]
    box.close()
