"""edu's registers against values that were read from QEMU's edu (10.0.2) through its BAR, and its DMA engine."""

import pytest

from fakedev.dma import DmaRequest, Outcome, Parked
from fakedev.endpoints.edu import (
    DMA_RUN,
    DMA_START,
    DMA_TO_PCI,
    REG_DMA_CMD,
    REG_DMA_COUNT,
    REG_DMA_DST,
    REG_DMA_SRC,
    Edu,
)
from fakedev.machine import Machine
from fakedev.machines.named import machine

BUS_MASTER = 0x6

#: What loads of 1, 2, 4 and 8 bytes gave on QEMU after boot, at naturally aligned offsets.
LOADS = {
    0x00: {1: 0, 2: 0, 4: 0x010000ED, 8: 0xFFFFFFFFFFFFFFFF},
    0x04: {1: 0, 2: 0, 4: 0},
    0x08: {1: 0, 2: 0, 4: 0, 8: 0xFFFFFFFFFFFFFFFF},
    0x0C: {1: 0, 2: 0, 4: 0xFFFFFFFF},
    0x20: {1: 0, 2: 0, 4: 0, 8: 0xFFFFFFFFFFFFFFFF},
    0x24: {1: 0, 2: 0, 4: 0},
    0x60: {1: 0, 2: 0, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF},
    0x64: {1: 0, 2: 0, 4: 0xFFFFFFFF},
    0x80: {1: 0, 2: 0, 4: 0, 8: 0},
    0x84: {1: 0, 2: 0, 4: 0xFFFFFFFF},
    0x88: {1: 0, 2: 0, 4: 0, 8: 0},
    0x90: {1: 0, 2: 0, 4: 0, 8: 0},
    0x98: {1: 0, 2: 0, 4: 0, 8: 0},
    0xA0: {1: 0, 2: 0, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF},
    0x40000: {1: 0, 2: 0, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF},
}


@pytest.fixture
def box():
    """The machine with translation off, as before a kernel boots: DMA addresses are physical."""
    box = machine("q35-vtd-legacy")
    yield box
    box.close()


@pytest.fixture
def edu(box):
    edu = box.function("0000:00:10.0")
    edu.config_write(0x04, 2, BUS_MASTER)
    return edu


@pytest.fixture
def bar(edu):
    return edu.bars[0]


@pytest.mark.parametrize(("offset", "width"), [(o, w) for o, widths in LOADS.items() for w in widths])
def test_a_load_gives_what_it_gives_on_qemu(bar, offset, width):
    assert bar.read(offset, width) == LOADS[offset][width]


def test_liveness_inverts_a_4_byte_store_and_ignores_other_widths(bar):
    bar.write(0x04, 4, 0x12345678)
    assert bar.read(0x04, 4) == 0xEDCBA987
    bar.write(0x04, 1, 0xFF)
    assert bar.read(0x04, 4) == 0xEDCBA987


@pytest.mark.parametrize(("n", "result"), [(0, 1), (1, 1), (5, 120), (13, 1932053504), (34, 0), (0x11111111, 0)])
def test_factorial_is_modulo_two_to_the_32(bar, n, result):
    bar.write(0x08, 4, n)
    assert bar.read(0x20, 4) & 1 == 0
    assert bar.read(0x08, 4) == result


def test_only_the_interrupt_bit_of_status_can_be_written(bar):
    bar.write(0x20, 4, 0xFFFFFFFF)
    assert bar.read(0x20, 4) == 0x80
    bar.write(0x08, 4, 3)
    assert bar.read(0x24, 4) == 1
    bar.write(0x20, 4, 0)
    assert bar.read(0x20, 4) == 0


def test_raise_and_acknowledge_drive_the_line(edu, bar):
    bar.write(0x60, 4, 0x11)
    assert bar.read(0x24, 4) == 0x11
    assert edu.config_read(0x06, 2) == 0x18
    bar.write(0x64, 4, 0x01)
    assert (bar.read(0x24, 4), edu.config_read(0x06, 2)) == (0x10, 0x18)
    bar.write(0x64, 4, 0x10)
    assert (bar.read(0x24, 4), edu.config_read(0x06, 2)) == (0, 0x10)


def test_a_dma_register_takes_4_and_8_bytes(bar):
    bar.write(0x80, 8, 0x1122334455667788)
    assert (bar.read(0x80, 8), bar.read(0x80, 4)) == (0x1122334455667788, 0x55667788)
    bar.write(0x80, 4, 0xAABBCCDD)
    assert bar.read(0x80, 8) == 0xAABBCCDD
    bar.write(0x84, 4, 1)
    bar.write(0x80, 2, 1)
    assert bar.read(0x80, 8) == 0xAABBCCDD


def test_a_command_without_run_is_ignored(bar):
    bar.write(0x98, 8, 2)
    assert bar.read(0x98, 8) == 0


def dma(bar, source, target, count, command):
    bar.write(0x80, 8, source)
    bar.write(0x88, 8, target)
    bar.write(0x90, 8, count)
    bar.write(0x98, 8, command)


def test_dma_moves_bytes_in_and_out(box, edu, bar):
    box.memory.write(0x123FF0, bytes(range(64)))
    dma(bar, 0x123FF0, 0x40010, 64, 1)
    assert edu.buffer[0x10:0x50] == bytes(range(64))
    dma(bar, 0x40011, 0x200FFF, 16, 3)
    assert box.memory.read(0x200FFF, 16) == bytes(range(1, 17))
    assert bar.read(0x98, 8) == 2


def test_the_dma_interrupt_comes_as_msi(box, edu, bar):
    got = []
    box.interrupt_sink = lambda address, data: got.append((address, data))
    edu.config_write(0x44, 4, 0xFEE00000)
    edu.config_write(0x4C, 2, 0x41)
    edu.config_write(0x42, 2, 1)
    dma(bar, 0x40000, 0x100000, 0, 7)
    assert got == [(0xFEE00000, 0x41)]
    assert (bar.read(0x98, 8), bar.read(0x24, 4)) == (6, 0x100)


@pytest.mark.parametrize(("start", "count"), [(0x3FFFF, 1), (0x40000, 4097), (0x40FFF, 2), (0, 8), (0x40000, 1 << 63)])
def test_a_transfer_outside_the_buffer_moves_nothing_and_ends(box, edu, bar, start, count):
    edu.buffer[:] = b"b" * 4096
    dma(bar, start, 0x100000, count, 3)
    dma(bar, 0x100000, start, count, 5)
    assert box.memory.read(0x100000, 16) == bytes(16)
    assert edu.buffer == b"b" * 4096
    assert (bar.read(0x98, 8), bar.read(0x24, 4)) == (4, 0x100)


def test_a_refused_read_leaves_zeros_and_the_rest_arrives(box, edu, bar):
    edu.buffer[:] = b"b" * 4096
    box.memory.write(0x7FFFFFF0, b"a" * 16)
    dma(bar, 0x7FFFFFF0, 0x40000, 32, 1)
    assert edu.buffer[:33] == b"a" * 16 + bytes(16) + b"b"


def test_without_bus_master_nothing_moves(box, edu, bar):
    edu.config_write(0x04, 2, 2)
    edu.buffer[:16] = b"b" * 16
    dma(bar, 0x40000, 0x100000, 16, 3)
    assert box.memory.read(0x100000, 16) == bytes(16)
    assert bar.read(0x98, 8) == 2


# -- waiting in the IOMMU --------------------------------------------------------------------------------------------


class Stalling:
    """An IOMMU that parks every request for one page until it is let through."""

    def __init__(self, page):
        self.page = page
        self.parked = []

    def translate(self, port, pasid, address, length, access):
        if address & -4096 == self.page:
            self.parked.append(Parked(DmaRequest(port.rid, pasid, address, length, access)))
            raise self.parked[-1]
        start = address & -4096
        return start, start + 4096, 0, 3


@pytest.fixture
def stalling():
    box = Machine("stalling")
    iommu = Stalling(0x20_1000)
    device = box.root.add(Edu("0000:00:10.0", command=6), iommu)
    device.buffer[:] = b"x" * 4096
    yield box, iommu, device
    box.close()


def start(device, command=DMA_RUN | DMA_TO_PCI, outside=0x20_0FFC, count=8):
    inside, other = (REG_DMA_SRC, REG_DMA_DST) if command & DMA_TO_PCI else (REG_DMA_DST, REG_DMA_SRC)
    device.store(inside, 8, DMA_START)
    device.store(other, 8, outside)
    device.store(REG_DMA_COUNT, 8, count)
    device.store(REG_DMA_CMD, 8, command)


@pytest.mark.parametrize(
    ("outcome", "landed"), [(Outcome.RETRY, b"xxxx"), (Outcome.ABORT, bytes(4)), (Outcome.RAZ_WI, bytes(4))]
)
def test_a_transfer_that_waits_runs_on_when_the_iommu_lets_it(stalling, outcome, landed):
    box, iommu, device = stalling
    start(device)
    assert box.memory.read(0x20_0FFC, 8) == b"xxxx" + bytes(4)
    assert device.load(REG_DMA_CMD, 8) & DMA_RUN
    iommu.page = None
    iommu.parked[0].resolve(outcome)
    assert box.memory.read(0x20_0FFC, 8) == b"xxxx" + landed
    assert not device.load(REG_DMA_CMD, 8) & DMA_RUN


def test_a_read_that_is_ended_while_it_waits_gives_zeros(stalling):
    _, iommu, device = stalling
    start(device, DMA_RUN)
    iommu.parked[0].resolve(Outcome.ABORT)
    assert bytes(device.buffer[:9]) == bytes(8) + b"x"


def test_dma_registers_do_not_change_while_a_transfer_waits(stalling):
    _, iommu, device = stalling
    start(device)
    device.store(REG_DMA_COUNT, 8, 1)
    assert device.load(REG_DMA_COUNT, 8) == 8
    iommu.parked[0].resolve(Outcome.RAZ_WI)
    device.store(REG_DMA_COUNT, 8, 1)
    assert device.load(REG_DMA_COUNT, 8) == 1


def test_an_interrupt_that_waits_comes_when_the_iommu_lets_it(stalling):
    box, iommu, device = stalling
    device.dma.msi_window = (0, 0)  # as on Arm: an interrupt is a write like any other
    device.config_write(0x44, 4, 0x20_1000)
    device.config_write(0x4C, 2, 0x55)
    device.config_write(0x42, 2, 1)
    device.msi.notify()
    assert box.memory.read(0x20_1000, 1) == b"\0"
    iommu.page = None
    iommu.parked[0].resolve(Outcome.RETRY)
    assert box.memory.read(0x20_1000, 1) == b"\x55"
