"""Page requests of a device (PRI): what is peculiar to them, behind VT-d, which hands them on, and behind an SMMUv3.

Mirrors drivers/iommu/intel/prq.c and intel_iommu_enable_iopf(), and arm_smmu_handle_ppr() of arm-smmu-v3.c, whose
driver switches no page requests on. A device with ATS asks for the translation first; only for what it is told is not
there it asks again, for the page: by its page-aligned address, in a group that is answered as a whole. What every
waiting request has is in test_fault_dma.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import (
    FILL,
    MOVE,
    ON_WRITE,
    PAGE_FAULT,
    REFUSED_PAGE,
    SUCCESS,
    WQ_BLOCK,
    WQ_NO_ATS,
    WQ_NO_PRS,
    Dsa,
)
from conformance.mock import answer_faults, read_faults
from conformance.spaces import MORE, REFUSED, TARGET, PasidFaults, reached
from conformance.steps import PAGE, READ
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "ats")]

TO_READ, TO_WRITE = IOMMU_PGFAULT_PERM_READ, IOMMU_PGFAULT_PERM_WRITE
#: A flag of the kernel's own that VT-d's driver sets and clients see: the answer has to carry the PASID.
NEEDS_PASID = 1 << 2
GO_ON, INVALID = 0, 1
ENGINES = 4


@pytest.fixture
def asking(kernel: Backend, iommu: File, asking_dsa: Dsa, records: Buffer) -> Iterator[PasidFaults]:
    made = PasidFaults(kernel, iommu, asking_dsa, records)
    yield made
    made.file.close()


@pytest.fixture
def silent(kernel: Backend, iommu: File, ats_dsa: Dsa, records: Buffer) -> Iterator[PasidFaults]:
    made = PasidFaults(kernel, iommu, ats_dsa, records)
    yield made
    made.file.close()


# -- VT-d ------------------------------------------------------------------------------------------------------------


@pytest.mark.needs("pri")
def test_the_address_is_the_pages_and_the_access_what_was_tried(asking: PasidFaults) -> None:
    queue = asking.queue()
    for source, target, perm in ((MORE + 0x123, TARGET, TO_READ), (TARGET, MORE + PAGE + 0xFF8, TO_WRITE)):
        queue.submit(MOVE, source, target, 8)
        (fault,) = read_faults(asking.file)
        assert (fault.addr, fault.perm & (TO_READ | TO_WRITE)) == (max(source, target) & -PAGE, perm)
        assert fault.flags == IOMMU_PGFAULT_FLAGS_LAST_PAGE | IOMMU_PGFAULT_FLAGS_PASID_VALID | NEEDS_PASID
        answer_faults(asking.file, fault.cookie, code=INVALID)


@pytest.mark.needs("pri")
def test_each_group_has_a_number_of_its_own_while_it_waits(asking: PasidFaults) -> None:
    queue = asking.queue()
    jobs = [queue.submit(FILL, n, MORE + n % 4 * PAGE, 8) for n in range(ENGINES + 2)]
    faults = read_faults(asking.file)
    assert [fault.addr for fault in faults] == [MORE + n * PAGE for n in range(ENGINES)]
    assert sorted(fault.grpid for fault in faults) == list(range(ENGINES))
    asking.space.map_more(0, 4)
    answer_faults(asking.file, *(fault.cookie for fault in faults))
    assert [job.wait().status for job in jobs] == [SUCCESS] * (ENGINES + 2)
    assert asking.file.read(40) == b""


@pytest.mark.needs("pri")
def test_an_invalid_answer_is_told_as_such_and_the_next_request_is_taken(asking: PasidFaults) -> None:
    queue = asking.queue()
    for _ in range(2):
        job = queue.submit(FILL, 0, MORE + 8, 8)
        (fault,) = read_faults(asking.file)
        answer_faults(asking.file, fault.cookie, code=INVALID)
        found = job.wait()
        assert (found.status, found.done, found.address & -PAGE) == (REFUSED_PAGE | ON_WRITE, 0, MORE)


@pytest.mark.needs("pri")
@pytest.mark.parametrize("flags", [WQ_BLOCK | WQ_NO_PRS, WQ_BLOCK | WQ_NO_ATS], ids=["no_requests", "no_ats"])
def test_a_queue_without_them_is_refused_and_reports_nothing(asking: PasidFaults, flags: int) -> None:
    job = asking.queue(0, 5, flags).submit(FILL, 0, MORE, 8)
    assert job.wait().status & ~ON_WRITE in REFUSED
    assert asking.file.read(40) == b""
    asking.space.map_more()
    assert reached(asking.queue(1, 5, flags), [asking.space]) == "s"


@pytest.mark.needs("pri")
def test_the_translation_that_the_device_keeps_goes_with_the_page(asking: PasidFaults) -> None:
    """After the page has been there and has gone, the device asks for it again."""
    space, queue = asking.space, asking.queue()
    for round_ in range(3):
        job = queue.submit(FILL, round_ * 0x0101010101010101, MORE, 8)
        (fault,) = read_faults(asking.file)
        space.map_more()
        answer_faults(asking.file, fault.cookie)
        assert job.wait().status == SUCCESS
        assert space.more() == bytes([round_]) * 8
        space.unmap_more()


@pytest.mark.needs("pri")
def test_a_table_that_may_only_be_read_is_asked_for_to_write(asking: PasidFaults) -> None:
    space, queue = asking.space, asking.queue()
    space.map_more(0, 1, READ)
    assert queue.move(MORE, TARGET, 8).status == SUCCESS
    job = queue.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    (fault,) = read_faults(asking.file)
    assert (fault.addr, fault.perm & TO_WRITE) == (MORE, TO_WRITE)
    answer_faults(asking.file, fault.cookie, code=INVALID)
    assert job.wait().status == REFUSED_PAGE | ON_WRITE
    assert space.more() == bytes(8)


@pytest.mark.needs("pri")
def test_beyond_48_bits_the_driver_refuses_without_asking_anybody(asking: PasidFaults) -> None:
    job = asking.queue().submit(FILL, 0, 1 << 50, 8)
    assert job.wait().status & ~ON_WRITE in (REFUSED_PAGE, *REFUSED)
    assert asking.file.read(40) == b""


@pytest.mark.needs("pri")
def test_the_interface_is_on_again_after_a_reset(asking: PasidFaults) -> None:
    first = asking.queue().submit(FILL, 0, MORE, 8)
    (fault,) = read_faults(asking.file)
    asking.dsa.vfio.reset()
    asking.dsa.restart()
    assert first.poll() is None
    answer_faults(asking.file, fault.cookie)  # which nobody waits for
    job = asking.queue().submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE, 8)
    (fault,) = read_faults(asking.file)
    asking.space.map_more()
    answer_faults(asking.file, fault.cookie)
    assert (job.wait().status, asking.space.more()) == (SUCCESS, b"Z" * 8)


# -- where page requests are off -------------------------------------------------------------------------------------


@pytest.mark.needs("smmuv3")
@pytest.mark.parametrize("pasid", [5, None])
def test_behind_an_smmuv3_the_device_is_told_that_the_page_is_not_there(silent: PasidFaults, pasid: int | None) -> None:
    """It may not ask for it: the driver leaves its page requests off, so that it has to report the fault itself."""
    if pasid is None:
        silent.dsa.vfio.attach(silent.space.hwpt)
    queue = silent.queue(0, pasid)
    found = queue.submit(FILL, 0, MORE + 8, 8).wait()
    assert (found.status, found.done, found.address) == (PAGE_FAULT | ON_WRITE, 0, MORE + 8)
    assert silent.file.read(40) == b""
    silent.space.map_more()
    assert queue.submit(FILL, 0x5A5A5A5A5A5A5A5A, MORE + 8, 8).wait().status == SUCCESS
    assert silent.space.more(offset=8) == b"Z" * 8
