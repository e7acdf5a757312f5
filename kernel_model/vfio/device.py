"""VFIO devices: what is registered, opened and bound, whatever bus it is on.

Mirrors drivers/vfio/vfio_main.c (`struct vfio_device`, `vfio_df_open()` and its opposite) and iommufd.c (the
`vfio_iommufd_physical_*` operations). A bus driver subclasses `VfioDevice` and implements what the file operations of
the character device lead to.

Left out: groups and containers, emulated devices (mdev), KVM, device sets (every device is alone).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.file import MappedRegion, SystemCall
from kernel_model.iommu.core import IOMMU_NO_PASID, Device
from kernel_model.iommufd.attach import device_attach, device_detach, device_replace
from kernel_model.iommufd.ctx import Context
from kernel_model.iommufd.device import IommufdDevice, device_bind, device_unbind

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

_INT_MAX = 0x7FFFFFFF


class VfioDevice(ABC):
    """`struct vfio_device`. Registered from construction on; `index` numbers its node."""

    def __init__(self, kernel: Kernel, dev: Device, index: int) -> None:
        self.kernel = kernel
        self.dev = dev
        self.index = index
        #: Given away although nothing guards memory from it (`device->noiommu`).
        self.noiommu = dev.iommu is None
        self.open_count = 0
        self.cdev_opened = False
        self.idev: IommufdDevice | None = None
        self.attached = False
        self.pasids: set[int] = set()

    @property
    def name(self) -> str:
        """Of its node."""
        return f"{'noiommu-' if self.noiommu else ''}vfio{self.index}"

    # -- what the bus driver implements (struct vfio_device_ops) -----------------------------------------------------

    @abstractmethod
    def open_device(self) -> None:
        """The first opener is there: make the device usable."""

    @abstractmethod
    def close_device(self) -> None:
        """The last opener has gone: make the device quiet."""

    @abstractmethod
    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        """An ioctl that the character device does not know. ENOTTY: nor does the driver."""

    @abstractmethod
    def device_feature(self, call: SystemCall, flags: int, data: int, argsz: int) -> int:
        """`data` is the address behind the header, `argsz` the bytes there. ENOTTY: no such feature."""

    @abstractmethod
    def read(self, count: int, position: int) -> bytes:
        """Up to `count` bytes of the region that `position` names. EINVAL: there is none."""

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview, position: int) -> int:
        """Store in the region that `position` names: how many bytes. EINVAL: there is none."""

    @abstractmethod
    def mmap(self, length: int, offset: int, flags: int) -> MappedRegion:
        """Map the region that `offset` names. EINVAL: it cannot be."""

    def match_token_uuid(self, uuid: bytes | None) -> None:
        """Let the binding go on. EINVAL: a token is given and none is known here."""
        if uuid is not None:
            raise KernelError(errno.EINVAL, "a VF token for a device without SR-IOV")

    # -- opening and binding -----------------------------------------------------------------------------------------

    def open(self, ctx: Context) -> int:
        """vfio_df_open() for a character device: bind to `ctx`, open; the object's id there.

        EINVAL: open already. Then the errnos of `device_bind` and of the driver; nothing stays bound on an error.
        """
        if self.open_count:
            raise KernelError(errno.EINVAL, "the device is open through another descriptor")
        idev = device_bind(ctx, self.dev)
        self.idev = idev
        try:
            self.open_device()
        except KernelError:
            self.idev = None
            device_unbind(idev)
            raise
        self.open_count = 1
        return idev.id

    def close(self) -> None:
        """vfio_df_close(): the device is quiet before its DMA is taken away."""
        if self.open_count != 1:
            raise KernelBug("a device is closed that is not open")
        self.close_device()
        self._unbind()
        self.open_count = 0

    def _unbind(self) -> None:
        """vfio_iommufd_physical_unbind()."""
        idev = self._bound
        for pasid in sorted(self.pasids):
            device_detach(idev, pasid)
        self.pasids.clear()
        self.detach_ioas()
        self.idev = None
        device_unbind(idev)

    @property
    def _bound(self) -> IommufdDevice:
        if self.idev is None:
            raise KernelBug("the device is not bound")
        return self.idev

    # -- attaching ---------------------------------------------------------------------------------------------------

    def attach_ioas(self, pt_id: int) -> int:
        """vfio_iommufd_physical_attach_ioas(): attach, or replace what is attached; the HWPT's id."""
        attach = device_replace if self.attached else device_attach
        hwpt_id = attach(self._bound, IOMMU_NO_PASID, pt_id)
        self.attached = True
        return hwpt_id

    def detach_ioas(self) -> None:
        """vfio_iommufd_physical_detach_ioas(): nothing if not attached."""
        if self.attached:
            device_detach(self._bound, IOMMU_NO_PASID)
            self.attached = False

    def pasid_attach_ioas(self, pasid: int, pt_id: int) -> int:
        """vfio_iommufd_physical_pasid_attach_ioas(). ENOSPC: the PASID does not fit an int."""
        if pasid in self.pasids:
            return device_replace(self._bound, pasid, pt_id)
        if pasid > _INT_MAX:
            raise KernelError(errno.ENOSPC, f"PASID {pasid:#x}")
        hwpt_id = device_attach(self._bound, pasid, pt_id)
        self.pasids.add(pasid)
        return hwpt_id

    def pasid_detach_ioas(self, pasid: int) -> None:
        """vfio_iommufd_physical_pasid_detach_ioas(): nothing if not attached."""
        if pasid in self.pasids:
            device_detach(self._bound, pasid)
            self.pasids.discard(pasid)
