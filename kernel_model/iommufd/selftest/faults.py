"""TRIGGER_IOPF, after drivers/iommu/iommufd/selftest.c: a mock device asks for a page."""

from __future__ import annotations

import contextlib
import errno

from kernel_model.errors import KernelError
from kernel_model.iommu.core import IOMMU_NO_PASID
from kernel_model.iommu.io_pgfault import (
    IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE,
    IOMMU_FAULT_PAGE_REQUEST_PASID_VALID,
    PageRequest,
    report_device_fault,
)
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.selftest.operations import TestCommand, operation


@operation("IOMMU_TEST_OP_TRIGGER_IOPF")
def _trigger_iopf(ucmd: TestCommand) -> None:
    """ENOENT: no such device. EINVAL: not a mock device. Whether anybody handles the request does not show here."""
    request = ucmd.cmd.trigger_iopf
    device = ucmd.ctx.objects.get(request.dev_id, IommufdDevice).dev
    if not device.is_mock:
        raise KernelError(errno.EINVAL, f"{device.name} is no mock device")
    flags = IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE
    if request.pasid != IOMMU_NO_PASID:
        flags |= IOMMU_FAULT_PAGE_REQUEST_PASID_VALID
    with contextlib.suppress(KernelError):
        report_device_fault(device, PageRequest(flags, request.pasid, request.grpid, request.perm, request.addr))
