"""TRIGGER_VEVENT, after drivers/iommu/iommufd/selftest.c."""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.selftest.operations import TestCommand, operation
from uapi.iommufd_test import IOMMU_VEVENTQ_TYPE_SELFTEST


@operation("IOMMU_TEST_OP_TRIGGER_VEVENT")
def _trigger_vevent(ucmd: TestCommand) -> None:
    """ENOENT: no such device, not attached within a vIOMMU, or its virtual id there is 0. Then `Viommu.report_event`.
    The virtual id is that of the attachment, which the vDEVICE need not outlive."""
    device = ucmd.ctx.objects.get(ucmd.cmd.trigger_vevent.dev_id, IommufdDevice).dev
    if not isinstance(device, MockDevice) or device.viommu is None or not device.vdev_id:
        raise KernelError(errno.ENOENT, f"{device.name} is attached within no vIOMMU")
    virt_id = (device.vdev_id & 0xFFFFFFFF).to_bytes(4, "little")
    device.viommu.report_event(IOMMU_VEVENTQ_TYPE_SELFTEST, virt_id)
