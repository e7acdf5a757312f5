"""Mock devices, and what happens when one meets a domain, after drivers/iommu/iommufd/selftest.c at 7.3.

No hardware is told anything. The driver checks, remembers, and counts the domains of the device that report faults.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import IOMMU_DOMAIN_BLOCKED, Device, Domain, IommuDriver
from kernel_model.iommu.io_pgfault import IopfQueue, iopf_queue_add_device, iopf_queue_remove_device
from uapi.iommufd_test import (
    IOMMU_TEST_DEV_CACHE_DEFAULT,
    IOMMU_TEST_PASID_RESERVED,
    MOCK_DEV_CACHE_NUM,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.viommu import Viommu


class MockDevice(Device):
    """`struct mock_dev`: a device in a group of its own."""

    is_mock = True

    def __init__(self, iommu: IommuDriver, iopf_queue: IopfQueue, number: int, flags: int) -> None:
        super().__init__(f"iommufd_mock{number}", iommu)
        self.number = number
        self.flags = flags
        #: What a vIOMMU's invalidations set (`cache`).
        self.cache = [IOMMU_TEST_DEV_CACHE_DEFAULT] * MOCK_DEV_CACHE_NUM
        #: The domain of its own requests, None before the first attach.
        self.domain: Domain | None = None
        #: The vIOMMU of a nested domain, and the device's id there when it was attached.
        self.viommu: Viommu | None = None
        self.vdev_id = 0
        #: Domains with a fault handler that the device is attached to, its own and those of PASIDs.
        self.iopf_queue = iopf_queue
        self.iopf_refcount = 0
        #: The next attach of PASID 1024 fails.
        self.fails_pasid_1024 = False

    @property
    def tracks_dirty(self) -> bool:
        return not self.flags & MOCK_FLAGS_DEVICE_NO_DIRTY


def _mock(device: Device) -> MockDevice:
    if not isinstance(device, MockDevice):
        raise KernelBug(f"{device.name} is no mock device")
    return device


class MockDomain(Domain):
    """The attach half of every mock domain."""

    takes_pasids = True

    def viommu_of(self, device: MockDevice) -> tuple[Viommu | None, int]:
        """The vIOMMU that the domain is nested in, and the id of `device` there. ENOENT: it has no vDEVICE there."""
        return None, 0

    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """mock_domain_nop_attach(). EINVAL: dirty tracking on a device that is to have none. ENOENT: `viommu_of`."""
        mock = _mock(device)
        if self.dirty_ops and not mock.tracks_dirty:
            raise KernelError(errno.EINVAL, f"{device.name} tracks no dirty pages")
        viommu, vdev_id = self.viommu_of(mock)
        if viommu is not mock.viommu:
            mock.viommu, mock.vdev_id = viommu, vdev_id
        _enable_iopf(mock, self)
        _disable_iopf(mock, mock.domain)
        mock.domain = self

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """mock_domain_set_dev_pasid_nop(). ENOMEM: for PASID 1024, every second time since it was detached, so that
        callers meet a driver's failure."""
        mock = _mock(device)
        if pasid == IOMMU_TEST_PASID_RESERVED:
            fails, mock.fails_pasid_1024 = mock.fails_pasid_1024, not mock.fails_pasid_1024
            if self.type == IOMMU_DOMAIN_BLOCKED:
                mock.fails_pasid_1024 = False
            elif fails:
                raise KernelError(errno.ENOMEM, "PASID 1024 fails on purpose")
        _enable_iopf(mock, self)
        _disable_iopf(mock, old)


def _enable_iopf(mock: MockDevice, domain: Domain) -> None:
    """mock_dev_enable_iopf()."""
    if domain.iopf_handler is None:
        return
    if not mock.iopf_refcount:
        iopf_queue_add_device(mock.iopf_queue, mock)
    mock.iopf_refcount += 1


def _disable_iopf(mock: MockDevice, domain: Domain | None) -> None:
    """mock_dev_disable_iopf()."""
    if domain is None or domain.iopf_handler is None:
        return
    mock.iopf_refcount -= 1
    if not mock.iopf_refcount:
        iopf_queue_remove_device(mock.iopf_queue, mock)
