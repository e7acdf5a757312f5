"""Virtual IOMMUs: a slice of a physical IOMMU for a guest, after viommu.c and driver.c of drivers/iommu/iommufd.

The driver's half is `iommu.viommu`. A vIOMMU holds a nesting parent; nested HWPTs, vDEVICEs, event queues and hardware
queues of the guest hold the vIOMMU. The mock driver and the SMMUv3 driver have them. Tegra241 and AMD are not there:
their types are EOPNOTSUPP, as on a kernel without that hardware.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.ioctl import UserCommand
from kernel_model.iommu import core
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.hwpt import HwptNested, HwptPaging, nested_hwpt
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.user_data import UserData, UserDataArray
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_VIOMMU_ALLOC,
    IOMMU_VIOMMU_TYPE_DEFAULT,
    iommu_viommu_alloc,
)

if TYPE_CHECKING:
    from kernel_model.iommu.viommu import ViommuDriver
    from kernel_model.iommufd.vdevice import Vdevice
    from kernel_model.iommufd.veventq import Veventq

_NESTED_FLAGS = IOMMU_HWPT_FAULT_ID_VALID | IOMMU_HWPT_ALLOC_PASID


class Viommu(Object):
    """`struct iommufd_viommu`."""

    __slots__ = ("driver", "hwpt", "iommu", "vdevs", "veventqs")

    def __init__(self, ctx: Context, hwpt: HwptPaging, iommu: core.IommuDriver) -> None:
        super().__init__(ctx)
        self.hwpt = hwpt
        self.iommu = iommu
        #: None until the driver has said yes.
        self.driver: ViommuDriver | None = None
        #: By virtual id.
        self.vdevs: dict[int, Vdevice] = {}
        #: By type.
        self.veventqs: dict[int, Veventq] = {}
        hwpt.users += 1

    @property
    def ops(self) -> ViommuDriver:
        if self.driver is None:
            raise KernelBug("the vIOMMU is not there yet")
        return self.driver

    def destroy(self) -> None:
        if self.driver is not None:
            self.driver.destroy()
        self.hwpt.users -= 1

    def cache_invalidate(self, array: UserDataArray) -> None:
        """See `ViommuDriver.cache_invalidate`."""
        self.ops.cache_invalidate(array)

    # -- what drivers call (driver.c) --------------------------------------------------------------------------------

    def find_dev(self, vdev_id: int) -> core.Device | None:
        """iommufd_viommu_find_dev(): the device with that virtual id."""
        vdev = self.vdevs.get(vdev_id)
        return None if vdev is None else vdev.idev.dev

    def get_vdev_id(self, device: core.Device) -> int:
        """iommufd_viommu_get_vdev_id(). ENOENT: the device has no vDEVICE here."""
        for virt_id, vdev in self.vdevs.items():
            if vdev.idev.dev is device:
                return virt_id
        raise KernelError(errno.ENOENT, f"{device.name} has no vDEVICE in the vIOMMU")

    def report_event(self, kind: int, data: bytes) -> None:
        """iommufd_viommu_report_event(). EOPNOTSUPP: no queue takes such events. ENOMEM: the event is lost."""
        queue = self.veventqs.get(kind)
        if queue is None:
            raise KernelError(errno.EOPNOTSUPP, f"the vIOMMU has no queue for events of type {kind:#x}")
        queue.report(data)


def viommu_alloc_hwpt_nested(viommu: Viommu, idev: IommufdDevice, flags: int, user_data: UserData) -> HwptNested:
    """The vIOMMU's way in iommufd_hwpt_alloc(): a nested HWPT; not yet visible.

    EINVAL: the device is behind another IOMMU. EOPNOTSUPP: flags, or no data. Then the driver's errnos.
    """
    if idev.dev.iommu is not viommu.iommu:
        raise KernelError(errno.EINVAL, f"device {idev.id} is not behind the vIOMMU's IOMMU")
    if flags & ~_NESTED_FLAGS or not user_data.length:
        raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x} with {user_data.length} bytes of data")
    ops = viommu.ops
    return nested_hwpt(viommu.ctx, viommu.hwpt, viommu, flags, lambda rest: ops.alloc_domain_nested(rest, user_data))


@table.handles(IOMMU_VIOMMU_ALLOC)
def viommu_alloc(ucmd: UserCommand[Context, iommu_viommu_alloc]) -> None:
    """EOPNOTSUPP: flags or no type. ENOENT: device. EOPNOTSUPP: its IOMMU has no vIOMMUs of that type. ENOENT: HWPT.
    EINVAL: the HWPT was not made for nesting. Then the driver's errnos. EFAULT: the reply; then there is no vIOMMU."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags or cmd.type == IOMMU_VIOMMU_TYPE_DEFAULT:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}, type {cmd.type}")
    dev = ctx.objects.get(cmd.dev_id, IommufdDevice).dev
    iommu = dev.iommu
    make = None if iommu is None else iommu.viommu_type(dev, cmd.type)
    if iommu is None or make is None:
        raise KernelError(errno.EOPNOTSUPP, f"the device's IOMMU has no vIOMMUs of type {cmd.type:#x}")
    parent = ctx.objects.get(cmd.hwpt_id, HwptPaging)
    if not parent.nest_parent:
        raise KernelError(errno.EINVAL, f"HWPT {parent.id} is no parent for nesting")
    viommu = Viommu(ctx, parent, iommu)
    try:
        assert parent.domain is not None
        data = UserData(ucmd.call, cmd.type, cmd.data_uptr, cmd.data_len) if cmd.data_len else None
        viommu.driver = make(viommu, parent.domain, data)
        cmd.out_viommu_id = viommu.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(viommu)
        raise
    ctx.objects.finalize(viommu)
