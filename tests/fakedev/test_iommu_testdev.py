"""iommu-testdev by its specification in QEMU: arming, results, attributes; and what it does with a write that waits."""

import pytest

from fakedev.dma import DmaRequest, Outcome, Parked
from fakedev.endpoints.iommu_testdev import (
    DBELL_ARM,
    ERR_BAD_ATTRS,
    ERR_BAD_LEN,
    ERR_MISMATCH,
    ERR_NOT_ARMED,
    ERR_RD_FAIL,
    ERR_TX_FAIL,
    PATTERN,
    REG_ATTRS,
    REG_DBELL,
    REG_GPA_LO,
    REG_GVA_HI,
    REG_GVA_LO,
    REG_LEN,
    REG_RESULT,
    REG_TRIGGERING,
    RESULT_BUSY,
    RESULT_IDLE,
    IommuTestdev,
)
from tests.fakedev.agent import Bench

IOVA, PA = 0x5000, 0x20_0000
RAM_WORD = PATTERN.to_bytes(4, "little")


@pytest.fixture
def bench():
    bench = Bench()
    bench.device = bench.add(IommuTestdev("0000:00:03.0", bar_address=0xC000_0000))
    bench.agent.map(IOVA, PA)
    yield bench
    bench.box.close()


def set_up(device, iova=IOVA, pa=PA, length=4, attrs=2):
    for register, value in (
        (REG_GVA_LO, iova & 0xFFFF_FFFF),
        (REG_GVA_HI, iova >> 32),
        (REG_GPA_LO, pa),
        (REG_LEN, length),
        (REG_ATTRS, attrs),
        (REG_DBELL, DBELL_ARM),
    ):
        device.bars[0].write(register, 4, value)


def go(device):
    device.bars[0].read(REG_TRIGGERING, 4)
    return device.bars[0].read(REG_RESULT, 4)


def test_it_is_idle_then_busy_then_done(bench):
    bar = bench.device.bars[0]
    assert bar.read(REG_RESULT, 4) == RESULT_IDLE
    set_up(bench.device)
    assert bar.read(REG_RESULT, 4) == RESULT_BUSY
    assert go(bench.device) == 0
    assert bench.memory.read(PA, 4) == RAM_WORD


def test_it_fires_once_for_each_arming(bench):
    set_up(bench.device)
    go(bench.device)
    assert go(bench.device) == ERR_NOT_ARMED


def test_disarmed_it_is_idle(bench):
    set_up(bench.device)
    bench.device.bars[0].write(REG_DBELL, 4, 0)
    assert bench.device.bars[0].read(REG_RESULT, 4) == RESULT_IDLE
    assert go(bench.device) == ERR_NOT_ARMED
    assert bench.memory.read(PA, 4) == bytes(4)


@pytest.mark.parametrize(
    ("settings", "result"),
    [
        ({"length": 0}, ERR_BAD_LEN),
        ({"iova": 0x9000}, ERR_TX_FAIL),
        ({"iova": 1 << 40}, ERR_TX_FAIL),
        ({"pa": PA + 4}, ERR_MISMATCH),
        ({"pa": 0xF000_0000}, ERR_RD_FAIL),
        ({"attrs": 8 | 2 | 1}, ERR_BAD_ATTRS),
        ({"attrs": 8}, ERR_BAD_ATTRS),
        ({"attrs": 8 | 1}, ERR_TX_FAIL),
        ({"attrs": 1}, ERR_TX_FAIL),
        ({"attrs": 8 | 2}, 0),
        ({"length": 4096}, 0),
        ({"length": 7}, 0),
    ],
)
def test_the_result_says_what_became_of_the_write(bench, settings, result):
    set_up(bench.device, **settings)
    assert go(bench.device) == result


def test_a_refused_page_does_not_keep_the_next_from_being_written(bench):
    set_up(bench.device, iova=IOVA - 4, length=8)
    assert go(bench.device) == ERR_TX_FAIL
    assert bench.memory.read(PA, 4) == RAM_WORD


def test_narrow_accesses_do_nothing_and_wide_ones_are_two(bench):
    bar = bench.device.bars[0]
    bar.write(REG_LEN, 2, 9)
    assert bar.read(REG_LEN, 4) == 0
    bar.write(REG_GVA_LO, 8, 0x1_0000_5000)
    assert bar.read(REG_GVA_HI, 4) == 1
    assert bar.read(REG_GVA_LO, 8) == 0x1_0000_5000


def test_without_bus_master_nothing_is_written(bench):
    bench.device.config_write(4, 2, 2)
    set_up(bench.device)
    assert go(bench.device) == ERR_TX_FAIL
    assert bench.memory.read(PA, 4) == bytes(4)


@pytest.mark.parametrize(
    ("outcome", "result", "landed"),
    [(Outcome.RETRY, 0, RAM_WORD), (Outcome.ABORT, ERR_TX_FAIL, bytes(4)), (Outcome.RAZ_WI, ERR_MISMATCH, bytes(4))],
)
def test_a_write_that_waits_is_busy_until_it_ends(bench, monkeypatch, outcome, result, landed):
    parked = Parked(DmaRequest(bench.device.rid, -1, IOVA, 4, 2))

    def stall(*_):
        raise parked

    with monkeypatch.context() as patch:
        patch.setattr(bench.agent, "translate", stall)
        set_up(bench.device)
        assert go(bench.device) == RESULT_BUSY
    parked.resolve(outcome)
    assert bench.device.bars[0].read(REG_RESULT, 4) == result
    assert bench.memory.read(PA, 4) == landed
