"""What a driver does for a virtual IOMMU, after `struct iommufd_viommu_ops` of include/linux/iommufd.h.

A driver that has vIOMMUs returns a class of its own from `IommuDriver.viommu_type` (the kernel's `get_viommu_size`);
making an object of it is the kernel's `viommu_init`. The iommufd half is `iommufd.viommu`. Left out: `vdevice_init`
and queues by IOVA (`hw_queue_init`); no driver of the model needs them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.iommu.core import Domain

if TYPE_CHECKING:
    from kernel_model.iommufd.hw_queue import HwQueue
    from kernel_model.iommufd.user_data import UserData, UserDataArray
    from kernel_model.iommufd.viommu import Viommu


class ViommuDriver:
    """The driver's half of one vIOMMU. The methods' defaults answer for an operation that a driver does not have."""

    def __init__(self, viommu: Viommu, parent: Domain, user_data: UserData | None) -> None:
        """viommu_init(): `user_data` is None where the caller gave none. Errnos are the driver's."""
        self.viommu = viommu
        self.parent = parent

    def destroy(self) -> None:
        """The vIOMMU goes; nothing is left in it."""

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """A nested domain of the guest's; `flags` are IOMMU_HWPT_ALLOC_*."""
        raise KernelError(errno.EOPNOTSUPP, "the vIOMMU has no nested domains")

    def cache_invalidate(self, array: UserDataArray) -> None:
        """Invalidate for the guest; leaves in `array.entry_num` how many entries are done."""
        array.entry_num = 0
        raise KernelError(errno.EOPNOTSUPP, "the vIOMMU has no cache that a user invalidates")

    def has_hw_queue(self, kind: int) -> bool:
        """Whether there are hardware queues of that type (`get_hw_queue_size`)."""
        return False

    def hw_queue_init_phys(self, queue: HwQueue, index: int, base_pa: int) -> None:
        """Let the hardware use the queue's memory at the physical address. Sets `queue.driver_destroy`."""
        raise KernelError(errno.EOPNOTSUPP, "the vIOMMU has no hardware queues")
