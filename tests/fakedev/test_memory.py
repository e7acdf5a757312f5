"""The physical address space: RAM, windows, and what happens where neither is."""

import pytest

from fakedev.memory import BusAbort, PhysicalMemory


class Bytes:
    """A backing of plain bytes that can forbid views."""

    def __init__(self, size, viewable=True):
        self.data = bytearray(size)
        self.viewable = viewable

    def read(self, offset, length):
        return bytes(self.data[offset : offset + length])

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def view(self, offset, length):
        return memoryview(self.data)[offset : offset + length] if self.viewable else None


@pytest.fixture
def memory():
    memory = PhysicalMemory(1 << 20)
    yield memory
    memory.close()


def test_ram_starts_at_zero_and_is_zero(memory):
    assert memory.read(0, 16) == bytes(16)
    memory.write(0xFFFF8, b"12345678")
    assert memory.words[0xFFFF8 >> 3] == int.from_bytes(b"12345678", "little")
    assert bytes(memory.view(0xFFFFC, 4)) == b"5678"


def test_where_nothing_answers_the_bus_aborts(memory):
    for access in (
        lambda: memory.read(1 << 20, 1),
        lambda: memory.write(1 << 51, b"x"),
        lambda: memory.view(5 << 30, 1),
    ):
        with pytest.raises(BusAbort):
            access()


def test_an_access_that_starts_in_ram_and_leaves_it_aborts(memory):
    with pytest.raises(BusAbort) as caught:
        memory.read((1 << 20) - 4, 8)
    assert caught.value.address == 1 << 20
    with pytest.raises(BusAbort):
        memory.write((1 << 20) - 4, b"12345678")
    assert memory.read((1 << 20) - 4, 4) == b"1234"


def test_a_window_answers_with_offsets_from_its_base(memory):
    backing = Bytes(0x2000)
    memory.add_window(1 << 47, 0x2000, backing)
    memory.write((1 << 47) + 0x1000, b"abc")
    assert backing.data[0x1000:0x1003] == b"abc"
    assert bytes(memory.view((1 << 47) + 0x1001, 2)) == b"bc"
    memory.remove_window(1 << 47)
    with pytest.raises(BusAbort):
        memory.read((1 << 47) + 0x1000, 1)


def test_an_access_over_two_windows_is_split(memory):
    low, high = Bytes(0x1000), Bytes(0x1000, viewable=False)
    memory.add_window(0x20_0000, 0x1000, low)
    memory.add_window(0x20_1000, 0x1000, high)
    memory.write(0x20_0FFE, b"abcd")
    assert (low.data[-2:], high.data[:2]) == (b"ab", b"cd")
    assert memory.read(0x20_0FFE, 4) == b"abcd"
    assert memory.view(0x20_0FFE, 4) is None
    assert memory.view(0x20_1000, 4) is None


def test_windows_do_not_overlap(memory):
    memory.add_window(0x20_0000, 0x2000, Bytes(0x2000))
    for base, size in ((0x20_1000, 0x1000), (0x1F_F000, 0x1001), (0, 0x1000), (1 << 52, 0x1000), (0x30_0000, 0)):
        with pytest.raises(ValueError, match="window"):
            memory.add_window(base, size, Bytes(size))
    with pytest.raises(ValueError, match="no window starts"):
        memory.remove_window(0x20_1000)


@pytest.mark.parametrize("size", [0, 4095, (2 << 30) + 4096])
def test_ram_is_whole_pages_up_to_the_hole(size):
    with pytest.raises(ValueError, match="bytes of RAM"):
        PhysicalMemory(size)
