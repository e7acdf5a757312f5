"""vIOMMUs of the mock driver, after drivers/iommu/iommufd/selftest.c at 7.3.

Each stands on a nesting parent, may publish two pages, invalidates the words that stand for caches of mock devices, and
has two hardware queues, of which the second depends on the first.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import alloc_page, injecting, kmalloc
from kernel_model.iommu.core import Domain, IommuDriver
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommu.mock.nested import MockNestedDomain
from kernel_model.iommu.viommu import ViommuDriver
from kernel_model.process import PAGE_SIZE
from uapi.cstruct import offsetofend
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID
from uapi.iommufd_test import (
    IOMMU_HW_QUEUE_TYPE_SELFTEST,
    IOMMU_TEST_HW_QUEUE_MAX,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_DEV_CACHE_ID_MAX,
    MOCK_DEV_CACHE_NUM,
    iommu_viommu_invalidate_selftest,
    iommu_viommu_selftest,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.hw_queue import HwQueue
    from kernel_model.iommufd.user_data import UserData, UserDataArray
    from kernel_model.iommufd.viommu import Viommu

_DATA_MIN = offsetofend(iommu_viommu_selftest, "out_data")
_PUBLISHED = 2 * PAGE_SIZE
#: The largest array of entries that kzalloc() gives: 4 MiB (KMALLOC_MAX_SIZE).
_MOST_ENTRIES = (4 << 20) // 12


class MockViommuNestedDomain(MockNestedDomain):
    """A nested domain within a vIOMMU: only devices with a vDEVICE there can be attached."""

    viommu: Viommu

    def viommu_of(self, device: MockDevice) -> tuple[Viommu | None, int]:
        return self.viommu, self.viommu.get_vdev_id(device)


class MockViommu(ViommuDriver):
    """`struct mock_viommu`."""

    def __init__(self, viommu: Viommu, parent: Domain, user_data: UserData | None) -> None:
        """mock_viommu_init(). With data: EINVAL by its length; EFAULT; ENOMEM."""
        super().__init__(viommu, parent, user_data)
        self._mmap_offset = 0
        self.hw_queues: list[HwQueue | None] = [None] * IOMMU_TEST_HW_QUEUE_MAX
        if user_data is not None:
            self._loopback(user_data)

    def _loopback(self, user_data: UserData) -> None:
        kind = IOMMU_VIOMMU_TYPE_SELFTEST
        data = user_data.copy_from(iommu_viommu_selftest, kind, _DATA_MIN)
        if injecting:
            alloc_page("the vIOMMU's two pages")
        published = self.viommu.ctx.published
        self._mmap_offset = published.alloc(self.viommu, _PUBLISHED)
        published.write(self._mmap_offset, data.in_data.to_bytes(4, "little"))
        data.out_data = data.in_data
        data.out_mmap_offset, data.out_mmap_length = self._mmap_offset, _PUBLISHED
        try:
            user_data.copy_to(data, kind, _DATA_MIN)
        except KernelError:
            published.destroy(self.viommu, self._mmap_offset)
            raise

    def destroy(self) -> None:
        if self._mmap_offset:
            self.viommu.ctx.published.destroy(self.viommu, self._mmap_offset)

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """mock_viommu_alloc_domain_nested(). Those of `MockNestedDomain.alloc`."""
        if flags & ~IOMMU_HWPT_ALLOC_PASID:
            raise KernelBug(f"flags {flags:#x} have come as far as the driver")
        iommu: IommuDriver = self.viommu.iommu
        domain = MockViommuNestedDomain.alloc(iommu, user_data)
        assert isinstance(domain, MockViommuNestedDomain)
        domain.viommu = self.viommu
        return domain

    def cache_invalidate(self, array: UserDataArray) -> None:
        """mock_viommu_cache_invalidate(): all entries are read, then done up to the first that is wrong.

        ENOMEM: too many, and `entry_num` stays. EINVAL: another type. Those of `UserDataArray.copy_full`. For each
        entry: EOPNOTSUPP flags; EINVAL no such word, asked even where all of them go; EINVAL no such vDEVICE.
        """
        kind = IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST
        if not array.entry_num and array.type == kind:
            return
        if array.entry_num > _MOST_ENTRIES:
            raise KernelError(errno.ENOMEM, f"{array.entry_num} entries at once")
        if injecting:
            kmalloc("an array of invalidations", array.entry_num * 12)
        done = 0
        try:
            for entry in array.copy_full(iommu_viommu_invalidate_selftest, kind):
                if entry.flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:
                    raise KernelError(errno.EOPNOTSUPP, f"flags {entry.flags:#x} of entry {done}")
                if entry.cache_id > MOCK_DEV_CACHE_ID_MAX:
                    raise KernelError(errno.EINVAL, f"word {entry.cache_id} of entry {done}")
                device = self.viommu.find_dev(entry.vdev_id)
                if device is None:
                    raise KernelError(errno.EINVAL, f"no device is {entry.vdev_id:#x} in the vIOMMU, entry {done}")
                if not isinstance(device, MockDevice):
                    raise KernelBug(f"{device.name} is no mock device")
                if entry.flags:
                    device.cache = [0] * MOCK_DEV_CACHE_NUM
                else:
                    device.cache[entry.cache_id] = 0
                done += 1
        finally:
            array.entry_num = done

    # -- hardware queues ---------------------------------------------------------------------------------------------

    def has_hw_queue(self, kind: int) -> bool:
        return kind == IOMMU_HW_QUEUE_TYPE_SELFTEST

    def hw_queue_init_phys(self, queue: HwQueue, index: int, base_pa: int) -> None:
        """mock_hw_queue_init_phys(). EINVAL: no such index. EEXIST: it is taken. EIO: the one before is not there."""
        if index >= IOMMU_TEST_HW_QUEUE_MAX:
            raise KernelError(errno.EINVAL, f"queue {index}")
        if self.hw_queues[index] is not None:
            raise KernelError(errno.EEXIST, f"queue {index} is there")
        before = self.hw_queues[index - 1] if index else None
        if index and before is None:
            raise KernelError(errno.EIO, f"queue {index - 1} is not there")
        if base_pa != self.parent.iova_to_phys(queue.base_addr):
            raise KernelBug(f"{queue.base_addr:#x} is pinned at another place than it is mapped to")
        if before is not None:
            queue.depend(before)
        self.hw_queues[index] = queue
        queue.driver_destroy = lambda: self._hw_queue_destroy(queue, before)

    def _hw_queue_destroy(self, queue: HwQueue, before: HwQueue | None) -> None:
        """mock_hw_queue_destroy(). It forgets queue 0 whatever queue goes: the driver never notes a queue's index. So
        index 1 stays taken once it was, and index 0 can be had again while the first queue is still there."""
        self.hw_queues[0] = None
        if before is not None:
            queue.undepend(before)
