"""Requests that stall in an SMMUv3 until their client answers: what is peculiar to them.

Mirrors arm_smmu_handle_event() and arm_smmu_page_response() of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c, on a device
of which the firmware says "dma-can-stall", in the manner of those of KunPeng 920. Such a fault is one request: its
group's number is the SMMU's token, its address is exact. What every waiting request has is in test_fault_dma.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, HARDWARE, MOVE, ON_WRITE, SUCCESS, WQ_BLOCK, WQ_PRIVILEGED, Dsa
from conformance.mock import answer_faults, read_faults
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.spaces import MORE, NAME, TARGET, PasidFaults, is_shut_out, reached
from conformance.steps import PAGE, fails, hwpt_alloc
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
    IOMMU_PGFAULT_PERM_PRIV,
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "stall")]

FAULT, DIRTY = IOMMU_HWPT_FAULT_ID_VALID, IOMMU_HWPT_ALLOC_DIRTY_TRACKING
TO_READ, TO_WRITE = IOMMU_PGFAULT_PERM_READ, IOMMU_PGFAULT_PERM_WRITE
#: Engines of the device: so many descriptors can wait, and those behind them are not begun.
ENGINES = 4


@pytest.fixture
def setting(kernel: Backend, iommu: File, stalling_dsa: Dsa, records: Buffer) -> Iterator[PasidFaults]:
    made = PasidFaults(kernel, iommu, stalling_dsa, records)
    yield made
    made.file.close()


def test_the_address_is_that_of_the_request(setting: PasidFaults) -> None:
    queue = setting.queue()
    for source, target, address, perm in (
        (MORE + 0x123, TARGET, MORE + 0x123, TO_READ),
        (NAME, MORE + PAGE + 0xFF8, MORE + PAGE + 0xFF8, TO_WRITE),
    ):
        queue.submit(MOVE, source, target, 8)
        (fault,) = read_faults(setting.file)
        assert (fault.addr, fault.perm, fault.flags) == (
            address,
            perm,
            IOMMU_PGFAULT_FLAGS_LAST_PAGE | IOMMU_PGFAULT_FLAGS_PASID_VALID,
        )
        answer_faults(setting.file, fault.cookie, code=1)


def test_a_privileged_request_says_so(setting: PasidFaults) -> None:
    setting.queue(flags=WQ_BLOCK | WQ_PRIVILEGED).submit(FILL, 0, MORE, 8)
    (fault,) = read_faults(setting.file)
    assert fault.perm == TO_WRITE | IOMMU_PGFAULT_PERM_PRIV


def test_each_has_a_token_of_its_own_while_it_waits(setting: PasidFaults) -> None:
    queue = setting.queue()
    jobs = [queue.submit(FILL, n, MORE + n % 4 * PAGE + 8 * n, 8) for n in range(ENGINES + 2)]
    faults = read_faults(setting.file)
    assert [fault.addr for fault in faults] == [MORE + n * (PAGE + 8) for n in range(ENGINES)]
    assert len({fault.grpid for fault in faults}) == ENGINES
    setting.space.map_more(0, 4)
    answer_faults(setting.file, *(fault.cookie for fault in faults))
    assert [job.wait().status for job in jobs] == [SUCCESS] * (ENGINES + 2)
    assert setting.file.read(40) == b""  # those behind them found their pages


def test_an_aborted_request_is_no_word_about_pages(setting: PasidFaults) -> None:
    """The device sees its request fail, as it would have without waiting."""
    job = setting.queue().submit(FILL, 0, MORE, 8)
    (fault,) = read_faults(setting.file)
    answer_faults(setting.file, fault.cookie, code=1)
    assert job.wait().status == HARDWARE | ON_WRITE


def test_a_pasid_that_is_attached_to_nothing_does_not_stall(setting: PasidFaults) -> None:
    assert is_shut_out(setting.queue(1, 6), setting.dsa)
    assert is_shut_out(setting.queue(2, None), setting.dsa)
    assert setting.file.read(40) == b""


def test_stage_2_stalls_too_and_nobody_is_told(setting: PasidFaults) -> None:
    """A nesting parent has no fault queue: the driver ends what stalls."""
    setting.dsa.vfio.detach_pasid(5)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(
            setting.iommu,
            setting.dsa.vfio.devid,
            setting.space.ioas,
            IOMMU_HWPT_ALLOC_NEST_PARENT | FAULT,
            fault_id=setting.fault,
        )
    parent = hwpt_alloc(setting.iommu, setting.dsa.vfio.devid, setting.space.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT)
    setting.dsa.vfio.attach(parent)
    queue = setting.queue(0, None)
    assert reached(queue, [setting.space]) == "s"
    assert queue.submit(FILL, 0, MORE, 8).wait().status == HARDWARE | ON_WRITE
    assert setting.file.read(40) == b""


def test_the_page_that_comes_is_dirty_when_the_request_goes_on(
    kernel: Backend, iommu: File, stalling_dsa: Dsa, records: Buffer
) -> None:
    setting = PasidFaults(kernel, iommu, stalling_dsa, records, DIRTY)
    space = setting.space
    set_tracking(iommu, space.hwpt)
    job = setting.queue().submit(FILL, 0x5A, MORE + PAGE, 8)
    (fault,) = read_faults(setting.file)
    space.map_more(0, 4)
    assert get_dirty(iommu, space.hwpt, MORE, 4 * PAGE) == 0b1111  # as every new mapping is
    answer_faults(setting.file, fault.cookie)
    assert job.wait().status == SUCCESS
    assert get_dirty(iommu, space.hwpt, MORE, 4 * PAGE) == 0b10
    setting.file.close()


def test_what_stalls_when_the_device_goes_is_aborted(setting: PasidFaults) -> None:
    """Without a word of its client, whose queue forgets it."""
    setting.queue().submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    assert setting.file.poll(1) == 1
    setting.space.map_more()
    setting.dsa.close()
    assert setting.file.read(40) == b""
    assert setting.space.more() == bytes(8)
