"""The mock IOMMU driver, after drivers/iommu/iommufd/selftest.c at 7.3; its domains and devices are in `domain`.

Left out: sysfs of the groups and of the IOMMU.
"""

from __future__ import annotations

import errno
import heapq
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_DIRTY_TRACKING,
    Device,
    Domain,
    Group,
    IommuDriver,
    ResvRegion,
)
from kernel_model.iommu.io_pgfault import IopfQueue
from kernel_model.iommu.mock.array import MockArrayDomain
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommu.mock.domain import MockBlockingDomain, MockPagingDomain
from kernel_model.iommu.mock.nested import MockNestedDomain
from kernel_model.iommu.mock.viommu import MockViommu
from uapi.behaviours import has
from uapi.iommufd import (
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_NONE,
)
from uapi.iommufd_test import (
    IOMMU_HW_INFO_SELFTEST_REGVAL,
    IOMMU_HW_INFO_TYPE_SELFTEST,
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_FLAGS_DEVICE_HUGE_IOVA,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_IOMMUPT_HUGE,
    MOCK_PASID_WIDTH,
    iommu_hwpt_selftest,
    iommu_test_hw_info,
)

if TYPE_CHECKING:
    from kernel_model.iommu.io_pgfault import PageRequest
    from kernel_model.iommufd.user_data import UserData

_PAGING_FLAGS = IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_PASID


class MockIommu(IommuDriver):
    """`mock_ops`, and the devices behind it by number. Group numbers continue those of the machine."""

    name = "iommufd_mock"

    def __init__(self, first_group: int, release: str, *, hidden: bool = False) -> None:
        self.blocked_domain = MockBlockingDomain(self)
        #: Another IOMMU's driver is asked in this one's place, and does not take a mock device.
        self._hidden = hidden
        self._generic_pt = has(release, "mock-generic-pt")
        self._first_group = first_group
        self._iopf_queue = IopfQueue()
        self._free: list[int] = []
        self._next = 0

    # -- mock_dev_create(), mock_dev_destroy() -----------------------------------------------------------------------

    def create_device(self, flags: int, known: int) -> MockDevice:
        """A device in a new group. EINVAL: a flag that is not in `known`; a real IOMMU hides this one."""
        if flags & ~known:
            raise KernelError(errno.EINVAL, f"device flags {flags:#x}")
        if injecting:
            for what in (
                "struct mock_dev",
                "its name",
                "its software node",
                "struct iommu_group",
                "struct group_device",
            ):
                kmalloc(what)
        if self._hidden:
            raise KernelError(errno.EINVAL, "a mock device has no IOMMU where the machine has a real one")
        if self._free:
            number = heapq.heappop(self._free)
        else:
            number = self._next
            self._next += 1
        device = MockDevice(self, self._iopf_queue, number, flags)
        self.probe_device(device, 0)
        return device

    def destroy_device(self, device: MockDevice, unbound: bool) -> None:
        """The number is free again; the group goes with its only device, unless iommufd has lost that."""
        if unbound:
            if device.group is None or device.group.owner_cnt:
                raise KernelBug(f"{device.name} goes while it is bound")
            device.group = None
        heapq.heappush(self._free, device.number)

    def probe_device(self, device: Device, rid: int) -> None:
        assert isinstance(device, MockDevice)
        group = Group(self._first_group + device.number)
        group.devices.append(device)
        group.default_domain = group.domain = self.blocked_domain
        device.group = group

    # -- what iommufd asks -------------------------------------------------------------------------------------------

    def capable(self, device: Device, cap: int) -> bool:
        if cap == IOMMU_CAP_DIRTY_TRACKING:
            return isinstance(device, MockDevice) and device.tracks_dirty
        return cap == IOMMU_CAP_CACHE_COHERENCY

    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        if wanted_type not in (IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_SELFTEST):
            raise KernelError(errno.EOPNOTSUPP, f"the mock has no type {wanted_type:#x}")
        if injecting:
            kmalloc("struct iommu_test_hw_info")
        return IOMMU_HW_INFO_TYPE_SELFTEST, bytes(iommu_test_hw_info(test_reg=IOMMU_HW_INFO_SELFTEST_REGVAL))

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        """EOPNOTSUPP: flags, data of another driver, an unknown kind of table. Then those of `copy_from`."""
        dirty = bool(flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if flags & ~_PAGING_FLAGS or (dirty and not self.capable(device, IOMMU_CAP_DIRTY_TRACKING)):
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        if not self._generic_pt:
            if user_data is not None:
                raise KernelError(errno.EOPNOTSUPP, "a paging domain takes no data")
            huge = isinstance(device, MockDevice) and bool(device.flags & MOCK_FLAGS_DEVICE_HUGE_IOVA)
            return MockArrayDomain(self, huge, dirty)
        kind = MOCK_IOMMUPT_DEFAULT
        if user_data is not None:
            if user_data.type not in (IOMMU_HWPT_DATA_SELFTEST, IOMMU_HWPT_DATA_NONE):
                raise KernelError(errno.EOPNOTSUPP, f"data type {user_data.type:#x}")
            kind = user_data.copy_from(iommu_hwpt_selftest, IOMMU_HWPT_DATA_SELFTEST, 4).pagetable_type
        if kind not in (MOCK_IOMMUPT_DEFAULT, MOCK_IOMMUPT_HUGE):
            raise KernelError(errno.EOPNOTSUPP, f"no page table of type {kind}")
        return MockPagingDomain(self, kind == MOCK_IOMMUPT_HUGE, dirty)

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, user_data: UserData) -> Domain:
        """mock_domain_alloc_nested(). EOPNOTSUPP: flags. Then those of `MockNestedDomain.alloc`."""
        if flags & ~IOMMU_HWPT_ALLOC_PASID:
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        return MockNestedDomain.alloc(self, user_data)

    has_nested = True

    def viommu_type(self, device: Device, kind: int) -> type[MockViommu] | None:
        return MockViommu if kind == IOMMU_VIOMMU_TYPE_SELFTEST else None

    user_pasid_table = True

    def page_response(self, device: Device, fault: PageRequest, code: int) -> None:
        """mock_domain_page_response(): no hardware waits for it."""

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        return []

    def max_pasids(self, device: Device) -> int:
        """A device without the flag has a PASID width too, 0 bits: one PASID, which nothing can be attached to."""
        return 1 << MOCK_PASID_WIDTH if isinstance(device, MockDevice) and device.flags & MOCK_FLAGS_DEVICE_PASID else 1
