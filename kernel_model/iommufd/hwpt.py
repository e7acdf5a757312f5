"""HWPTs: a domain of the IOMMU as an object, after hw_pagetable.c of drivers/iommu/iommufd.

A paging HWPT holds what its IOAS maps. An automatic one is made by attaching a device to an IOAS and dies with its last
attachment. A nested one is the guest's own stage on top of a paging one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu import core
from kernel_model.iommu.noiommu import NOIOMMU
from kernel_model.iommufd.ctx import Context
from kernel_model.iommufd.eventq import Fault
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.sw_msi import remove_pages
from kernel_model.iommufd.user_data import UserData, UserDataArray
from uapi.behaviours import has
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.viommu import Viommu

_FLAGS = (
    "IOMMU_HWPT_ALLOC_NEST_PARENT",
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
    "IOMMU_HWPT_FAULT_ID_VALID",
    "IOMMU_HWPT_ALLOC_PASID",
)
_NESTED_FLAGS = ("IOMMU_HWPT_FAULT_ID_VALID", "IOMMU_HWPT_ALLOC_PASID")


class Hwpt(Object):
    """`struct iommufd_hw_pagetable`: what a device can be attached to."""

    __slots__ = ("domain", "fault", "pasid_compat")

    def __init__(self, ctx: Context, flags: int) -> None:
        super().__init__(ctx)
        self.domain: core.Domain | None = None
        #: Where faults of the devices go (IOMMU_HWPT_FAULT_ID_VALID).
        self.fault: Fault | None = None
        self.pasid_compat = bool(flags & IOMMU_HWPT_ALLOC_PASID)

    @property
    def paging(self) -> HwptPaging:
        """The HWPT whose IOAS the devices reach in the end: itself, or the parent of a nested one."""
        raise KernelBug("neither paging nor nested")

    def _free(self) -> None:
        if self.domain is not None:
            self.domain.free()
            self.domain = None
        if self.fault is not None:
            self.fault.users -= 1


class HwptPaging(Hwpt):
    """`struct iommufd_hwpt_paging`."""

    __slots__ = ("auto_domain", "enforces_cache_coherency", "ioas", "nest_parent", "present_sw_msi")

    def __init__(self, ctx: Context, ioas: Ioas, flags: int) -> None:
        super().__init__(ctx, flags)
        self.ioas = ioas
        self.auto_domain = False
        self.enforces_cache_coherency = False
        self.nest_parent = bool(flags & IOMMU_HWPT_ALLOC_NEST_PARENT)
        #: Ids of the MSI doorbell pages that are mapped in it.
        self.present_sw_msi: set[int] = set()
        ioas.users += 1

    @property
    def paging(self) -> HwptPaging:
        return self

    def destroy(self) -> None:
        remove_pages(self)
        if self in self.ioas.hwpts:
            assert self.domain is not None
            self.ioas.hwpts.remove(self)
            self.ioas.iopt.remove_domain(self.domain)
        self._free()
        self.ioas.users -= 1


class HwptNested(Hwpt):
    """`struct iommufd_hwpt_nested`: the guest's own stage on top of a paging HWPT, perhaps within a vIOMMU."""

    __slots__ = ("parent", "viommu")

    def __init__(self, ctx: Context, parent: HwptPaging, viommu: Viommu | None, flags: int) -> None:
        super().__init__(ctx, flags)
        self.parent = parent
        self.viommu = viommu
        #: A vIOMMU holds the parent itself.
        holds: Object = viommu if viommu is not None else parent
        holds.users += 1

    @property
    def paging(self) -> HwptPaging:
        return self.parent

    def cache_invalidate(self, array: UserDataArray) -> None:
        """See `Domain.cache_invalidate_user`."""
        assert self.domain is not None
        self.domain.cache_invalidate_user(array)

    def destroy(self) -> None:
        self._free()
        holds: Object = self.viommu if self.viommu is not None else self.parent
        holds.users -= 1


class Attachment(Protocol):
    """An attachment that `paging_alloc` makes, and undoes when a later step fails."""

    def attach(self, hwpt: HwptPaging) -> None: ...

    def detach(self) -> None: ...


def paging_alloc(
    ctx: Context,
    ioas: Ioas,
    dev: core.Device,
    enforce_cache_coherency: bool,
    flags: int,
    user_data: UserData | None,
    attachment: Attachment | None,
) -> HwptPaging:
    """iommufd_hwpt_paging_alloc(): a domain for the device, filled with what the IOAS maps; not yet visible.

    With `attachment` the device is attached before the domain is filled. EOPNOTSUPP: unknown flags, dirty tracking
    that the device lacks, or faults for a nesting parent. Then the driver's errnos, the attachment's, and those of
    `IoPagetable.add_domain`.
    """
    driver = dev.iommu or NOIOMMU
    known = ctx.kernel.profile.mask(*_FLAGS)
    if not has(ctx.kernel.release, "fault-queue-on-paging-hwpt"):
        known &= ~IOMMU_HWPT_FAULT_ID_VALID
    if flags & ~known:
        raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x}")
    if flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING and not driver.capable(dev, core.IOMMU_CAP_DIRTY_TRACKING):
        raise KernelError(errno.EOPNOTSUPP, "the device's IOMMU tracks no dirty pages")
    if flags & IOMMU_HWPT_FAULT_ID_VALID and flags & IOMMU_HWPT_ALLOC_NEST_PARENT:
        raise KernelError(errno.EOPNOTSUPP, "a nesting parent reports no faults")
    hwpt = HwptPaging(ctx, ioas, flags)
    attached = False
    try:
        hwpt.domain = driver.domain_alloc_paging_flags(dev, flags & ~IOMMU_HWPT_FAULT_ID_VALID, user_data)
        hwpt.domain.iommufd_hwpt = hwpt
        hwpt.enforces_cache_coherency = enforce_cache_coherency and hwpt.domain.enforce_cache_coherency()
        if enforce_cache_coherency and not hwpt.enforces_cache_coherency:
            raise KernelError(errno.EINVAL, "the domain cannot enforce cache coherency")
        if attachment is not None:
            attachment.attach(hwpt)
            attached = True
        ioas.iopt.add_domain(hwpt.domain)
    except KernelError:
        if attached and attachment is not None:
            attachment.detach()
        ctx.objects.abort(hwpt)
        raise
    ioas.hwpts.append(hwpt)
    return hwpt


def nested_alloc(ctx: Context, parent: HwptPaging, dev: core.Device, flags: int, user_data: UserData) -> HwptNested:
    """iommufd_hwpt_nested_alloc(): a nested HWPT directly on `parent`; not yet visible.

    EOPNOTSUPP: flags, no data, or a driver that never nests. EINVAL: the parent is automatic, was not made for nesting,
    or is another driver's. Then the driver's errnos.
    """
    driver = dev.iommu
    known = ctx.kernel.profile.mask(*_NESTED_FLAGS)
    if flags & ~known or not user_data.length or driver is None or not driver.has_nested:
        raise KernelError(errno.EOPNOTSUPP, f"flags {flags:#x} with {user_data.length} bytes of data")
    below = parent.domain
    if parent.auto_domain or not parent.nest_parent or below is None or not core.ops_compatible(driver, below):
        raise KernelError(errno.EINVAL, f"HWPT {parent.id} is no parent for nesting")
    return nested_hwpt(ctx, parent, None, flags, lambda rest: driver.domain_alloc_nested(dev, below, rest, user_data))


def nested_hwpt(
    ctx: Context, parent: HwptPaging, viommu: Viommu | None, flags: int, alloc: Callable[[int], core.Domain]
) -> HwptNested:
    """What both ways to a nested HWPT share: the object, with the domain that `alloc` makes."""
    hwpt = HwptNested(ctx, parent, viommu, flags)
    try:
        hwpt.domain = alloc(flags & ~IOMMU_HWPT_FAULT_ID_VALID)
        hwpt.domain.iommufd_hwpt = hwpt
    except KernelError:
        ctx.objects.abort(hwpt)
        raise
    if hwpt.domain.type != core.IOMMU_DOMAIN_NESTED:
        raise KernelBug("the driver's nested domain is none")
    return hwpt
