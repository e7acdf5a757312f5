"""An SMMUv3 and a device whose requests never wait: HWPTs that would report, and what becomes of requests they refuse.

Mirrors arm_smmu_domain_alloc_paging_flags(), arm_smmu_enable_iopf() and arm_smmu_handle_event() of
drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c. The driver takes a HWPT with a fault queue for any device; one that does
not stall just never reports. Where requests wait is in test_stall.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.mock import fault_queue
from conformance.steps import PAGE, READ, answer, destroy, fails, hwpt_alloc, map_user, unmap
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device", "smmuv3")]

FAULT, PASID = IOMMU_HWPT_FAULT_ID_VALID, IOMMU_HWPT_ALLOC_PASID
PARENT, DIRTY = IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_DIRTY_TRACKING
IOVA = 0x10_0000
PATTERN = bytes(range(256)) * 16


class Setting:
    """A queue, a HWPT that reports to it, and the device attached to that."""

    def __init__(self, kernel: Backend, iommu: File, edu: Edu, ioas: int) -> None:
        self.fault, self.queue = fault_queue(kernel, iommu)
        self.hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, FAULT, fault_id=self.fault)
        edu.vfio.attach(self.hwpt)


@pytest.fixture
def setting(kernel: Backend, iommu: File, edu: Edu, ioas: int) -> Iterator[Setting]:
    made = Setting(kernel, iommu, edu, ioas)
    yield made
    made.queue.close()


@pytest.fixture
def page(kernel: Backend) -> Iterator[Buffer]:
    buffer = kernel.buffer(PAGE)
    yield buffer
    buffer.close()


@pytest.mark.parametrize("fault", [0, FAULT], ids=["", "fault_queue"])
@pytest.mark.parametrize("pasid", [0, PASID], ids=["", "pasid"])
@pytest.mark.parametrize("dirty", [0, DIRTY], ids=["", "dirty"])
@pytest.mark.parametrize("parent", [0, PARENT], ids=["", "parent"])
def test_which_flags_go_together(
    kernel: Backend, iommu: File, edu: Edu, ioas: int, parent: int, dirty: int, pasid: int, fault: int
) -> None:
    """A nesting parent stands alone; dirty tracking is of stage 1, where the unit keeps dirty bits."""
    fault_id, queue = fault_queue(kernel, iommu)
    capable = IOMMU_GET_HW_INFO(iommu, dev_id=edu.vfio.devid).out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING
    wrong = (parent and (dirty or pasid or fault)) or (dirty and not capable)
    fields = {"fault_id": fault_id} if fault else {}
    found = answer(hwpt_alloc, iommu, edu.vfio.devid, ioas, parent | dirty | pasid | fault, **fields)
    assert found == (errno.EOPNOTSUPP if wrong else 0)
    queue.close()


def test_a_device_that_never_waits_attaches_and_does_dma(
    iommu: File, edu: Edu, ioas: int, setting: Setting, page: Buffer
) -> None:
    map_user(iommu, ioas, page.address, PAGE, IOVA)
    page.view[:] = PATTERN
    edu.load(IOVA, PAGE)
    page.view[:] = bytes(PAGE)
    edu.store(IOVA, PAGE)
    assert bytes(page.view) == PATTERN
    assert setting.queue.read(40) == b""


def test_its_faults_are_refused_at_once_and_reported_to_nobody(
    iommu: File, edu: Edu, ioas: int, setting: Setting, page: Buffer
) -> None:
    """A page that is not mapped, one that may only be read, one that was unmapped."""
    edu.store(IOVA, 8)
    assert setting.queue.read(40) == b""
    map_user(iommu, ioas, page.address, PAGE, IOVA, READ)
    page.view[:] = PATTERN
    edu.load(IOVA, PAGE)
    page.view[:] = bytes(PAGE)
    edu.store(IOVA, PAGE)
    assert bytes(page.view) == bytes(PAGE)
    unmap(iommu, ioas, IOVA, PAGE)
    edu.load(IOVA, PAGE)
    map_user(iommu, ioas, page.address, PAGE, IOVA)
    page.view[:] = PATTERN
    edu.store(IOVA, PAGE)
    assert bytes(page.view) == bytes(PAGE)  # what a refused read leaves in the device
    assert setting.queue.read(40) == b""


def test_such_a_hwpt_is_replaced_and_gives_back_the_queue(iommu: File, edu: Edu, ioas: int, setting: Setting) -> None:
    setting.queue.close()
    with fails(errno.EBUSY):
        destroy(iommu, setting.hwpt)
    edu.vfio.attach(ioas)
    with fails(errno.EBUSY):
        destroy(iommu, setting.fault)
    destroy(iommu, setting.hwpt)
    destroy(iommu, setting.fault)


def test_it_takes_the_place_of_another_under_the_device(
    kernel: Backend, iommu: File, edu: Edu, ioas: int, page: Buffer
) -> None:
    """From an automatic HWPT to the one with a queue and back, the device reaches its page throughout."""
    map_user(iommu, ioas, page.address, PAGE, IOVA)
    setting = Setting(kernel, iommu, edu, ioas)
    for number in (ioas, setting.hwpt):
        page.view[:] = PATTERN[number:] + PATTERN[:number]
        edu.load(IOVA, PAGE)
        page.view[:] = bytes(PAGE)
        edu.vfio.attach(number)
        edu.store(IOVA, PAGE)
        assert bytes(page.view) == PATTERN[number:] + PATTERN[:number]
    setting.queue.close()
