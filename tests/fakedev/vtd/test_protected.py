"""Protected memory regions (11.4.8 of the manual)."""

import pytest

from fakedev.dma import NO_PASID, READ, WRITE, DmaAbort
from fakedev.vtd import entries, regs
from tests.fakedev.vtd.rig import PASID

LOW = 0x40_0000


def protected(rig, low=LOW, limit=LOW, **kwargs):
    made = rig(plmr=1, phmr=1, **kwargs)
    made.tables(entries.PGTT_SECOND)
    made.map_second(0, 0, level=2)
    made.set(regs.PLMBASE, low)
    made.set(regs.PLMLIMIT, limit)
    made.set(regs.PHMBASE, 0x60_0000, 8)
    made.set(regs.PHMLIMIT, 0x7F_FFFF, 8)
    made.set(regs.PMEN, regs.PMEN_EPM)
    return made


@pytest.mark.parametrize(("translating", "pasid"), [(False, NO_PASID), (True, NO_PASID), (True, PASID)])
def test_no_dma_reaches_a_region(rig, translating, pasid):
    made = protected(rig)
    if translating:
        made.start()
    for address, allowed in ((0x3FFFFC, True), (LOW, False), (0x5FFFFC, False), (0x600000, False), (0x800000, True)):
        for access in (READ, WRITE):
            assert made.allowed(address, access, pasid) == allowed
    assert made.record() is None


def test_a_transfer_stops_at_a_region(rig):
    made = protected(rig)
    made.start()
    with pytest.raises(DmaAbort) as stopped:
        made.dma.write(LOW - 16, bytes(range(32)))
    assert stopped.value.address == LOW
    assert made.memory.read(LOW - 16, 32) == bytes(range(16)) + bytes(16)


def test_translated_requests_are_stopped_too(rig):
    made = protected(rig)
    made.start()
    assert made.dma.read_translated(LOW - 4, 4) == bytes(4)
    with pytest.raises(DmaAbort):
        made.dma.read_translated(LOW, 4)


def test_a_limit_below_its_base_protects_nothing_and_the_bits_below_2_mib_are_fixed(rig):
    made = protected(rig, low=0x40_0FFF, limit=0x20_0000)
    made.start()
    assert made.reg(regs.PLMBASE) == 0x40_0000
    assert made.allowed(LOW)


def test_switching_them_off_opens_the_memory_again(rig):
    made = protected(rig)
    made.start()
    assert not made.allowed(LOW)
    assert made.reg(regs.PMEN) == regs.PMEN_EPM | regs.PMEN_PRS
    made.set(regs.PMEN, 0)
    assert made.reg(regs.PMEN) == 0
    assert made.allowed(LOW)


def test_without_the_capability_the_registers_are_read_only(rig):
    made = rig()
    for offset in (regs.PMEN, regs.PLMBASE, regs.PHMBASE):
        made.set(offset, 0xFFFFFFFF)
        assert made.reg(offset) == 0
