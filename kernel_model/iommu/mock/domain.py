"""Domains of the mock driver after drivers/iommu/iommufd/selftest.c at 7.3; devices and attaching are in `attach`.

No hardware looks at a mock domain, so its table is a sorted list of extents instead of words in RAM; pages of it are
checked by the operations of `iommufd.selftest`. Left out: dirty bits (a domain may be allocated with dirty tracking,
and the device's flag counts, but nothing is ever switched on).
"""

from __future__ import annotations

import errno

from sortedcontainers import SortedDict

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import IOMMU_DOMAIN_BLOCKED, IOMMU_READ, IOMMU_WRITE, IommuDriver
from kernel_model.iommu.mock.attach import MockDevice as MockDevice
from kernel_model.iommu.mock.attach import MockDomain as MockDomain
from uapi.iommufd_test import MOCK_APERTURE_LAST, MOCK_APERTURE_START, MOCK_HUGE_PAGE_SIZE

#: Every power of two from 2 KiB up to half of what three levels of 512 entries and a top level reach.
_DEFAULT_PAGE_SIZES = 0x1F_FFFF_F800
_HUGE_PAGE_SIZES = MOCK_HUGE_PAGE_SIZE | 4096
#: Where the table of a huge domain ends: three levels.
_HUGE_LAST = (1 << 38) - 1


class MockBlockingDomain(MockDomain):
    """The static domain that translates nothing; also the default of every mock group."""

    type = IOMMU_DOMAIN_BLOCKED


class MockPagingDomain(MockDomain):
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
