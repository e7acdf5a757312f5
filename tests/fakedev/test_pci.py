"""Configuration space of edu against values that Linux read from QEMU's; BARs and interrupts on the bus."""

import pytest

from fakedev.machines.named import machine
from fakedev.pci import MEM64, Bar, PciFunction, rid_of


@pytest.fixture
def box():
    box = machine("q35-vtd-legacy")
    yield box
    box.close()


@pytest.fixture
def edu(box):
    return box.function("0000:00:10.0")


#: The first 80 bytes of edu's space in QEMU 10.0.2, after SeaBIOS and before any driver.
EDU_CONFIG = bytes.fromhex(
    "3412e811 03011000 1000ff00 00000000 0000a0fe 00000000 00000000 00000000"
    "00000000 00000000 00000000 f41a0011 00000000 40000000 00000000 0a010000"
    "05008000 00000000 00000000 00000000"
)

#: (offset, width, written, read back), each on a fresh device; read by Linux 7.3.4 on QEMU 10.0.2.
WRITES = [
    (0x00, 4, 0, 0x11E81234),
    (0x04, 2, 0xFFFF, 0x0507),
    (0x04, 2, 0x0000, 0x0000),
    (0x06, 2, 0xFFFF, 0x0010),
    (0x08, 4, 0, 0x00FF0010),
    (0x0C, 1, 0xFF, 0xFF),
    (0x0D, 1, 0xFF, 0x00),
    (0x0E, 1, 0xFF, 0x00),
    (0x0F, 1, 0xFF, 0x00),
    (0x10, 4, 0xFFFFFFFF, 0xFFF00000),
    (0x14, 4, 0xFFFFFFFF, 0),
    (0x2C, 4, 0xFFFFFFFF, 0x11001AF4),
    (0x30, 4, 0xFFFFFFFF, 0),
    (0x34, 1, 0xFF, 0x40),
    (0x3C, 1, 0xFF, 0xFF),
    (0x3D, 1, 0xFF, 0x01),
    (0x3E, 2, 0xFFFF, 0),
    (0x40, 2, 0xFFFF, 0x0005),
    (0x42, 2, 0xFFFE, 0x00F0),
    (0x44, 4, 0xFFFFFFFF, 0xFFFFFFFC),
    (0x48, 4, 0xFFFFFFFF, 0xFFFFFFFF),
    (0x4C, 2, 0xFFFF, 0xFFFF),
    (0x4E, 2, 0xFFFF, 0xFFFF),
    (0x60, 4, 0xFFFFFFFF, 0xFFFFFFFF),
    (0xFC, 4, 0xFFFFFFFF, 0xFFFFFFFF),
]


def test_edu_shows_the_config_space_that_qemu_shows(edu):
    assert bytes(edu.config[: len(EDU_CONFIG)]) == EDU_CONFIG
    assert not any(edu.config[len(EDU_CONFIG) :])
    assert edu.config_size == 256


@pytest.mark.parametrize(("offset", "width", "written", "read"), WRITES)
def test_a_config_write_leaves_what_it_leaves_on_qemu(edu, offset, width, written, read):
    edu.config_write(offset, width, written)
    assert edu.config_read(offset, width) == read


def test_beyond_the_space_reads_are_ones_and_writes_are_lost(edu):
    assert edu.config_read(0x100, 4) == 0xFFFFFFFF
    assert edu.config_read(0xFE, 4) == 0xFFFFFFFF
    edu.config_write(0xFE, 4, 0)


def test_edu_has_no_reset(edu):
    assert edu.reset_methods == ()


def test_a_bar_answers_at_its_address_while_memory_is_enabled(box, edu):
    assert box.memory.read(0xFEA00000, 4) == (0x010000ED).to_bytes(4, "little")
    edu.config_write(0x04, 2, 0)
    with pytest.raises(Exception, match="nothing answers"):
        box.memory.read(0xFEA00000, 4)
    edu.config_write(0x04, 2, 2)
    edu.config_write(0x10, 4, 0xE0000000)
    assert box.memory.read(0xE0000000, 4) == (0x010000ED).to_bytes(4, "little")
    with pytest.raises(Exception, match="nothing answers"):
        box.memory.read(0xFEA00000, 4)


def test_a_64_bit_bar_is_sized_over_both_registers():
    function = PciFunction("0000:01:00.0", (1, 2), 0, bars=[Bar(1 << 34, MEM64, prefetchable=True)])
    box = machine("bare")
    box.add(function)
    function.config_write(0x10, 4, 0xFFFFFFFF)
    function.config_write(0x14, 4, 0xFFFFFFFF)
    assert (function.config_read(0x10, 4), function.config_read(0x14, 4)) == (0x0000000C, 0xFFFFFFFC)
    box.close()


def test_msi_goes_to_the_interrupt_sink_when_the_function_is_master(box, edu):
    got = []
    box.interrupt_sink = lambda address, data: got.append((address, data))
    edu.config_write(0x44, 4, 0xFEE01004)
    edu.config_write(0x4C, 2, 0x4321)
    edu.msi.notify()
    assert got == []
    edu.config_write(0x42, 2, 1)
    edu.msi.notify()
    assert got == []
    edu.config_write(0x04, 2, 4)
    edu.msi.notify()
    assert got == [(0xFEE01004, 0x4321)]


def test_intx_disable_holds_the_line_back_but_not_the_status_bit(box, edu):
    levels = []
    box.root.intx_sink = lambda function: levels.append(function.intx_asserted)
    edu.set_intx(True)
    assert edu.config_read(0x06, 2) & 0x08
    edu.config_write(0x04, 2, 0x400)
    assert edu.config_read(0x06, 2) & 0x08
    edu.config_write(0x04, 2, 0)
    edu.set_intx(False)
    assert levels == [True, False, True, False]


def test_the_machine_has_the_functions_of_the_vm(box):
    assert [(f.address[8:], f.config_read(0, 4)) for f in box.functions] == [
        ("00.0", 0x29C08086),
        ("01.0", 0x10091AF4),
        ("02.0", 0x25AB8086),
        *((f"0{n}.0", 0x10031AF4) for n in range(3, 9)),
        ("10.0", 0x11E81234),
        ("1f.0", 0x29188086),
        ("1f.2", 0x29228086),
        ("1f.3", 0x29308086),
    ]


@pytest.mark.parametrize("text", ["10.0", "0000:00:20.0", "0000:00:10.8", "0001:00:10.0", "x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="no PCI address"):
        rid_of(text)


def test_a_reset_gives_the_power_on_space_back(edu):
    edu.config_write(0x44, 4, 0xFEE00000)
    edu.config_write(0x04, 2, 0x407)
    edu.reset()
    assert edu.config_read(0x44, 4) == 0
    assert edu.config_read(0x04, 2) == 0
    assert edu.config_read(0x10, 4) == 0xFEA00000
