"""What a driver does for a virtual IOMMU, after `struct iommufd_viommu_ops` of include/linux/iommufd.h.

A driver that has vIOMMUs returns what makes one from `IommuDriver.viommu_type` (the kernel's `get_viommu_size`); making
it is the kernel's `viommu_init`. The iommufd half is `iommufd.viommu`. Left out: `vdevice_init`, and that a driver may
lack an operation, which iommufd answers with EOPNOTSUPP; the drivers with vIOMMUs have all but hardware queues.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kernel_model.iommu.core import Domain

if TYPE_CHECKING:
    from kernel_model.iommufd.hw_queue import HwQueue
    from kernel_model.iommufd.user_data import UserData, UserDataArray
    from kernel_model.iommufd.viommu import Viommu


class ViommuDriver(ABC):
    """The driver's half of one vIOMMU. Errnos are the driver's."""

    def __init__(self, viommu: Viommu, parent: Domain, user_data: UserData | None) -> None:
        """viommu_init(): `user_data` is None where the caller gave none."""
        self.viommu = viommu
        self.parent = parent

    @abstractmethod
    def destroy(self) -> None:
        """The vIOMMU goes; nothing is left in it."""

    @abstractmethod
    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """A nested domain of the guest's; `flags` is IOMMU_HWPT_ALLOC_PASID or 0."""

    @abstractmethod
    def cache_invalidate(self, array: UserDataArray) -> None:
        """Invalidate for the guest; leaves in `array.entry_num` how many entries are done."""

    @abstractmethod
    def has_hw_queue(self, kind: int) -> bool:
        """Whether there are hardware queues of that type (`get_hw_queue_size`)."""

    @abstractmethod
    def hw_queue_init_phys(self, queue: HwQueue, index: int, base_pa: int) -> None:
        """Let the hardware use the queue's memory at the physical address. Sets `queue.driver_destroy`."""
