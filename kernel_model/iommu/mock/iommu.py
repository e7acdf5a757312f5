"""The mock IOMMU: devices that do nothing, and domains that only remember what was mapped.

Mirrors the driver half of drivers/iommu/iommufd/selftest.c at 7.3. No hardware looks at a mock domain, so its table is
a sorted list of extents instead of words in RAM; pages of it are checked by the operations of `iommufd.selftest`.

Left out: nested domains and vIOMMUs, dirty bits (a domain may be allocated with dirty tracking, and the device's flag
counts, but nothing is ever switched on), PASID attachment, I/O page faults, sysfs of the groups and of the IOMMU.
"""

from __future__ import annotations

import errno
import heapq
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import (
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_DIRTY_TRACKING,
    IOMMU_DOMAIN_BLOCKED,
    IOMMU_READ,
    IOMMU_WRITE,
    Device,
    Domain,
    Group,
    IommuDriver,
    ResvRegion,
)
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
    MOCK_APERTURE_LAST,
    MOCK_APERTURE_START,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_HUGE_PAGE_SIZE,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_IOMMUPT_HUGE,
    MOCK_PASID_WIDTH,
    iommu_hwpt_selftest,
    iommu_test_hw_info,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.hwpt import UserData

_PAGING_FLAGS = IOMMU_HWPT_ALLOC_DIRTY_TRACKING | IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_PASID
#: Every power of two from 2 KiB up to half of what three levels of 512 entries and a top level reach.
_DEFAULT_PAGE_SIZES = 0x1F_FFFF_F800
_HUGE_PAGE_SIZES = MOCK_HUGE_PAGE_SIZE | 4096
#: Where the table of a huge domain ends: three levels.
_HUGE_LAST = (1 << 38) - 1


class MockDevice(Device):
    """`struct mock_dev`: a device in a group of its own."""

    is_mock = True

    def __init__(self, iommu: MockIommu, number: int, flags: int) -> None:
        super().__init__(f"iommufd_mock{number}", iommu)
        self.number = number
        self.flags = flags

    @property
    def tracks_dirty(self) -> bool:
        return not self.flags & MOCK_FLAGS_DEVICE_NO_DIRTY


class _MockDomain(Domain):
    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """mock_domain_nop_attach(). EINVAL: dirty tracking on a device that is to have none."""
        if self.dirty_ops and isinstance(device, MockDevice) and not device.tracks_dirty:
            raise KernelError(errno.EINVAL, f"{device.name} tracks no dirty pages")


class MockBlockingDomain(_MockDomain):
    """The static domain that translates nothing; also the default of every mock group."""

    type = IOMMU_DOMAIN_BLOCKED


class MockPagingDomain(_MockDomain):
    """`struct mock_iommu_domain`."""

    def __init__(self, owner: IommuDriver, huge: bool, dirty: bool) -> None:
        super().__init__(owner)
        self.dirty_ops = dirty
        self.pgsize_bitmap = _HUGE_PAGE_SIZES if huge else _DEFAULT_PAGE_SIZES
        self.aperture_start = 0 if huge else MOCK_APERTURE_START
        self.aperture_end = _HUGE_LAST if huge else MOCK_APERTURE_LAST
        #: iova -> (length, physical address).
        self._extents: SortedDict[int, tuple[int, int]] = SortedDict()

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        """See `Domain.map`."""
        if not prot & (IOMMU_READ | IOMMU_WRITE):
            raise KernelError(errno.EINVAL, "a mapping is readable or writable")
        if (iova | pa | length) & ((self.pgsize_bitmap & -self.pgsize_bitmap) - 1) or not length:
            raise KernelError(errno.ENXIO, f"{iova:#x} or {length:#x} is off the smallest page")
        if iova < self.aperture_start or iova + length - 1 > self.aperture_end:
            raise KernelError(errno.ERANGE, f"{iova:#x} + {length:#x} is outside the aperture")
        after = self._extents.bisect_left(iova + length)
        if after and self._end(after - 1) > iova:
            raise KernelError(errno.EADDRINUSE, f"{iova:#x} + {length:#x} is partly mapped")
        self._extents[iova] = (length, pa)

    def _end(self, index: int) -> int:
        start, (length, _) = self._extents.peekitem(index)
        return int(start) + int(length)

    def unmap(self, iova: int, length: int) -> int:
        """See `Domain.unmap`. What one `map` made goes whole."""
        done = 0
        while done < length:
            found = self._extents.pop(iova + done, None)
            if found is None:
                break
            done += found[0]
        return done

    def iova_to_phys(self, iova: int) -> int | None:
        index = self._extents.bisect_right(iova) - 1
        if index < 0:
            return None
        start, (length, pa) = self._extents.peekitem(index)
        return int(pa) + iova - int(start) if iova < start + length else None

    def free(self) -> None:
        if self._extents:
            raise KernelBug("a mock domain is freed with mappings in it")


class MockIommu(IommuDriver):
    """`mock_ops`, and the devices behind it by number. Group numbers continue those of the machine."""

    name = "iommufd_mock"

    def __init__(self, first_group: int) -> None:
        self.blocked_domain = MockBlockingDomain(self)
        self._first_group = first_group
        self._free: list[int] = []
        self._next = 0

    # -- mock_dev_create(), mock_dev_destroy() -----------------------------------------------------------------------

    def create_device(self, flags: int, known: int) -> MockDevice:
        """A device in a new group. EINVAL: a flag that is not in `known`."""
        if flags & ~known:
            raise KernelError(errno.EINVAL, f"device flags {flags:#x}")
        if self._free:
            number = heapq.heappop(self._free)
        else:
            number = self._next
            self._next += 1
        device = MockDevice(self, number, flags)
        self.probe_device(device, 0)
        return device

    def destroy_device(self, device: MockDevice) -> None:
        """The number is free again; the group goes with its only device."""
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
        return IOMMU_HW_INFO_TYPE_SELFTEST, bytes(iommu_test_hw_info(test_reg=IOMMU_HW_INFO_SELFTEST_REGVAL))

    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: object | None = None) -> Domain:
        """EOPNOTSUPP: flags, data of another driver, an unknown kind of table. Then those of `_copy`."""
        dirty = bool(flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if flags & ~_PAGING_FLAGS or (dirty and not self.capable(device, IOMMU_CAP_DIRTY_TRACKING)):
            raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
        kind = MOCK_IOMMUPT_DEFAULT
        if user_data is not None:
            kind = _copy(user_data).pagetable_type  # type: ignore[arg-type]
        if kind not in (MOCK_IOMMUPT_DEFAULT, MOCK_IOMMUPT_HUGE):
            raise KernelError(errno.EOPNOTSUPP, f"no page table of type {kind}")
        return MockPagingDomain(self, kind == MOCK_IOMMUPT_HUGE, dirty)

    def resv_regions(self, device: Device) -> list[ResvRegion]:
        return []

    def max_pasids(self, device: Device) -> int:
        return 1 << MOCK_PASID_WIDTH if isinstance(device, MockDevice) and device.flags & MOCK_FLAGS_DEVICE_PASID else 0


def _copy(data: UserData) -> iommu_hwpt_selftest:
    """iommu_copy_struct_from_user(). EOPNOTSUPP: another driver's type. EINVAL: NONE, too short or too long. EFAULT."""
    if data.type not in (IOMMU_HWPT_DATA_SELFTEST, IOMMU_HWPT_DATA_NONE):
        raise KernelError(errno.EOPNOTSUPP, f"data type {data.type:#x}")
    config = iommu_hwpt_selftest()
    size = len(bytes(config))
    if data.type != IOMMU_HWPT_DATA_SELFTEST or not 4 <= data.length <= size:
        raise KernelError(errno.EINVAL, f"{data.length} bytes of data of type {data.type:#x}")
    memoryview(config).cast("B")[: data.length] = data.call.copy_from_user(data.address, data.length)
    return config
