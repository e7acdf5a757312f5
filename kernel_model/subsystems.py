"""What a booting kernel starts, in order: IOMMU drivers, then the character devices, then fault injection."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

from kernel_model.fault_injection_files import register as register_fault_injection
from kernel_model.iommu.registry import attach_drivers
from kernel_model.iommufd.main import register as register_iommufd
from kernel_model.vfio.main import register as register_vfio


def boot(kernel: Kernel) -> None:
    """Bring `kernel` up on its machine."""
    for device in attach_drivers(kernel):
        kernel.devices[device.name] = device
    register_iommufd(kernel)
    register_vfio(kernel)
    register_fault_injection(kernel)
