"""Groups, domains, ownership: the vendor-neutral half of the IOMMU subsystem.

Mirrors drivers/iommu/iommu.c at 7.3, with its names less the `iommu_`, its errnos and its order of checks. A *device*
is in exactly one *group* (what the hardware cannot tell apart); a group is in exactly one *domain* (a set of mappings).
At boot that is the default domain, which kernel drivers would use. A user (iommufd, a VFIO container) first claims
the ownership of the group, which puts it in the blocking domain, then attaches domains of its own.

Left out: deferred attach, PASIDs without a handle (a kernel driver's), changing a default domain through sysfs,
recovery around a reset (it concerns ATS-capable devices only), mutexes (no call runs inside another). It is a long
file, as iommu.c is: who owns a group, its domain and its PASIDs' domains are one state, which most functions change.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import spared

if TYPE_CHECKING:
    from fakedev.pci import PciFunction
    from kernel_model.iommu.io_pgfault import FaultParam, IopfGroup, PageRequest
    from kernel_model.iommu.viommu import ViommuDriver
    from kernel_model.iommufd.iova_bitmap import IovaBitmap
    from kernel_model.iommufd.user_data import UserData, UserDataArray
    from kernel_model.iommufd.viommu import Viommu

#: `prot` of a mapping.
IOMMU_READ, IOMMU_WRITE, IOMMU_CACHE, IOMMU_NOEXEC, IOMMU_MMIO, IOMMU_PRIV = 1, 2, 4, 8, 16, 32

#: Types of a domain; DMA is UNMANAGED with a kernel driver's cookie.
IOMMU_DOMAIN_BLOCKED, IOMMU_DOMAIN_IDENTITY, IOMMU_DOMAIN_UNMANAGED, IOMMU_DOMAIN_DMA = 0, 4, 1, 3
IOMMU_DOMAIN_NESTED = 64
_DOMAIN_PAGING = 1

#: What `IommuDriver.capable` is asked (enum iommu_cap).
(
    IOMMU_CAP_CACHE_COHERENCY,
    IOMMU_CAP_NOEXEC,
    IOMMU_CAP_PRE_BOOT_PROTECTION,
    IOMMU_CAP_ENFORCE_CACHE_COHERENCY,
    IOMMU_CAP_DEFERRED_FLUSH,
    IOMMU_CAP_DIRTY_TRACKING,
    IOMMU_CAP_PCI_ATS_SUPPORTED,
) = range(7)

#: Types of a reserved region (enum iommu_resv_type).
IOMMU_RESV_DIRECT, IOMMU_RESV_DIRECT_RELAXABLE, IOMMU_RESV_RESERVED, IOMMU_RESV_MSI, IOMMU_RESV_SW_MSI = range(5)
RESV_TYPE_NAMES = ("direct", "direct-relaxable", "reserved", "msi", "msi")

IOMMU_NO_PASID = 0
#: Flag of `Domain.read_and_clear_dirty`.
IOMMU_DIRTY_NO_CLEAR = 1


@dataclass(frozen=True, slots=True)
class ResvRegion:
    """IOVAs of a device that no mapping may use: [start, start + length)."""

    start: int
    length: int
    prot: int
    type: int

    @property
    def last(self) -> int:
        return self.start + self.length - 1


class AttachHandle:
    """What an attacher leaves in the group to be found again from a fault; subclass it."""

    domain: Domain | None = None

    def prepare_msi(self, domain: Domain, address: int) -> int:
        """Where a device of the group writes to reach the doorbell at `address` through `domain`."""
        return address


class Domain(ABC):
    """`struct iommu_domain`: what a group can be attached to.

    A paging domain maps [aperture_start, aperture_end] (inclusive) in the page sizes of `pgsize_bitmap`; the others
    leave these at 0.
    """

    type = IOMMU_DOMAIN_UNMANAGED
    aperture_start = 0
    aperture_end = 0
    pgsize_bitmap = 0
    #: Whether dirty tracking may be switched on (`domain->dirty_ops`).
    dirty_ops = False
    #: Whether a device's PASID can be attached: there is a `set_dev_pasid`.
    takes_pasids = False
    #: Who gets the page faults of attached devices, as groups (`domain->iopf_handler`).
    iopf_handler: Callable[[IopfGroup], None] | None = None
    #: The HWPT that the domain belongs to (`domain->iommufd_hwpt`).
    iommufd_hwpt: Any = None

    def __init__(self, owner: IommuDriver) -> None:
        #: The driver that made it, which alone can attach it.
        self.owner = owner

    @abstractmethod
    def attach_dev(self, device: Device, old: Domain | None) -> None:
        """Let the hardware translate `device` by this domain. EINVAL: incompatible, another domain may do."""

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """Let the hardware translate requests of `device` with this PASID by this domain instead of `old`."""
        raise KernelBug(f"{type(self).__name__} takes no PASIDs")

    def map(self, iova: int, pa: int, length: int, prot: int) -> None:
        """iommu_map(): map [iova, iova + length) to `pa` and flush what the hardware may have cached.

        All three in bytes. EINVAL: no permission in `prot`; ENXIO: off the smallest page; ERANGE: outside the aperture;
        EADDRINUSE: part of it is mapped; ENOMEM: no page for a table. On an error nothing of it is mapped.
        """
        raise KernelBug(f"{type(self).__name__} has no page table")

    def map_small(self, iova: int, pa: int, length: int, prot: int) -> None:
        """As `map`, in leaves of no more than 4 KiB (iommufd with IOMMU_OPTION_HUGE_PAGES off maps page by page)."""
        done = 0
        try:
            while done < length:
                step = min(4096, length - done)
                self.map(iova + done, pa + done, step, prot)
                done += step
        except KernelError:
            if done:
                self.unmap(iova, done)
            raise

    def unmap(self, iova: int, length: int) -> int:
        """iommu_unmap(): unmap whole leaves from `iova` on, flush, return the bytes unmapped.

        Stops at the first hole. A leaf that reaches beyond the range is unmapped whole, and counted whole.
        """
        raise KernelBug(f"{type(self).__name__} has no page table")

    def iova_to_phys(self, iova: int) -> int | None:
        """The physical address behind `iova`, None where nothing is mapped."""
        return None

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """Drop what a nested domain's hardware caches of the guest's tables; `array.entry_num` becomes the number of
        entries handled, also on an error. EOPNOTSUPP: the driver has no such thing."""
        array.entry_num = 0
        raise KernelError(errno.EOPNOTSUPP, f"{type(self).__name__} has no cache that a user invalidates")

    def set_dirty_tracking(self, enable: bool) -> None:
        """Have the hardware note in the table what devices write to, or no longer; only with `dirty_ops`."""
        raise KernelBug(f"{type(self).__name__} has no dirty tracking")

    def read_and_clear_dirty(self, iova: int, length: int, flags: int, bitmap: IovaBitmap | None) -> None:
        """Report each dirty leaf that meets the range to `bitmap`, whole, and make it clean; only with `dirty_ops`.

        `flags`: IOMMU_DIRTY_NO_CLEAR leaves it dirty. Without a bitmap the leaves are made clean only.
        """
        raise KernelBug(f"{type(self).__name__} has no dirty tracking")

    def enforce_cache_coherency(self) -> bool:
        """Make every later mapping ignore a device's no-snoop attribute; False where the hardware cannot."""
        return False

    def free(self) -> None:  # noqa: B027 - the static domains have nothing to free
        """iommu_domain_free(). KernelBug while a device is attached."""


class IommuDriver(ABC):
    """`struct iommu_ops` of one IOMMU: what a vendor implements."""

    name = ""
    #: The static domains of the driver.
    blocked_domain: Domain | None = None
    identity_domain: Domain | None = None

    #: Its directory in /sys/class/iommu, and the device of the device tree that it is, if it is one.
    sysfs_name = sysfs_parent = ""

    def sysfs_attributes(self) -> dict[str, Callable[[], str]]:
        """What sysfs shows of it: path below its directory to text, without the newline."""
        return {}

    @abstractmethod
    def probe_device(self, device: Device, rid: int) -> None:
        """Take on `device`, whose DMA carries the request id `rid`."""

    def probe_finalize(self, device: Device) -> None:  # noqa: B027 - many drivers have nothing left to do
        """The device is in its default domain: what had to wait for that."""

    @abstractmethod
    def capable(self, device: Device, cap: int) -> bool:
        """Whether the IOMMU has capability `cap` (IOMMU_CAP_*) for `device`."""

    @abstractmethod
    def hw_info(self, device: Device, wanted_type: int) -> tuple[int, bytes]:
        """The type and the bytes for IOMMU_GET_HW_INFO. EOPNOTSUPP for a `wanted_type` it does not have."""

    @abstractmethod
    def domain_alloc_paging_flags(self, device: Device, flags: int, user_data: UserData | None = None) -> Domain:
        """A new paging domain; `flags` are IOMMU_HWPT_ALLOC_*. EOPNOTSUPP for what the hardware cannot, ENOMEM."""

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, user_data: UserData) -> Domain:
        """A nested domain on `parent`. EOPNOTSUPP without nesting."""
        raise KernelError(errno.EOPNOTSUPP, f"{self.name} has no nested translation")

    #: Guests have their own tables of PASIDs, so that faults of any PASID go to the device's nested domain.
    user_pasid_table = False

    def page_response(self, device: Device, fault: PageRequest, code: int) -> None:
        """Answer a page request, and the group that it is the last of, at the device: IOMMU_PAGE_RESP_*."""
        raise KernelBug(f"{self.name} reports no page requests")

    #: Whether `domain_alloc_nested` is there at all (`ops->domain_alloc_nested`).
    has_nested = False

    def viommu_type(
        self, device: Device, kind: int
    ) -> Callable[[Viommu, Domain, UserData | None], ViommuDriver] | None:
        """What makes the driver's half of a vIOMMU of that type for `device`; None where there are none."""
        return None

    @abstractmethod
    def resv_regions(self, device: Device) -> list[ResvRegion]:
        """The device's reserved regions, ascending."""

    def max_pasids(self, device: Device) -> int:
        """How many PASIDs the device may use; 0 without PASID."""
        return 0

    def device_isolated_msi(self, device: Device) -> bool:
        """Whether a device can only raise the interrupts that were set up for it (interrupt remapping)."""
        return False


class Device:
    """A device behind an IOMMU: `struct device` with its `struct dev_iommu`."""

    #: Of the mock driver: such a device holds no context and raises no interrupts.
    is_mock = False

    def __init__(
        self,
        name: str,
        iommu: IommuDriver | None,
        pci: PciFunction | None = None,
        properties: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        #: What the firmware says of it (`device_property_read_bool()`).
        self.properties = properties
        self.iommu = iommu
        self.pci = pci
        self.group: Group | None = None
        #: The firmware wants an identity mapping for it: it can never be blocked, so never be given to a user.
        self.require_direct = False
        #: The driver's own data (`dev_iommu_priv_get()`).
        self.priv: object = None
        #: Set while page requests of the device are taken (`dev->iommu->fault_param`).
        self.fault_param: FaultParam | None = None

    @property
    def max_pasids(self) -> int:
        return self.iommu.max_pasids(self) if self.iommu else 0

    def __repr__(self) -> str:
        return f"<Device {self.name}>"


class Group:
    """`struct iommu_group`: devices that the hardware cannot keep apart."""

    def __init__(self, group_id: int) -> None:
        self.id = group_id
        self.devices: list[Device] = []
        self.default_domain: Domain | None = None
        self.blocking_domain: Domain | None = None
        self.domain: Domain | None = None
        self.owner: object | None = None
        self.owner_cnt = 0
        #: pasid -> what was attached; IOMMU_NO_PASID is the RID's.
        self.pasid_array: dict[int, AttachHandle] = {}

    def __repr__(self) -> str:
        return f"<Group {self.id}: {', '.join(device.name for device in self.devices)}>"


# -- capabilities and regions ----------------------------------------------------------------------------------------


def device_iommu_capable(device: Device, cap: int) -> bool:
    """Whether an IOMMU is there and has `cap` for this device."""
    return device.iommu is not None and device.iommu.capable(device, cap)


def group_has_isolated_msi(group: Group) -> bool:
    """Whether no device of the group can raise an interrupt that was not set up for it."""
    return all(device.iommu is not None and device.iommu.device_isolated_msi(device) for device in group.devices)


def get_resv_regions(device: Device) -> list[ResvRegion]:
    """The device's reserved regions."""
    return device.iommu.resv_regions(device) if device.iommu else []


def get_group_resv_regions(group: Group) -> list[ResvRegion]:
    """The reserved regions of all devices of the group, sorted, overlapping ones of one type merged."""
    merged: list[ResvRegion] = []
    found = {region for device in group.devices for region in get_resv_regions(device)}
    for region in sorted(found, key=lambda r: (r.start, r.type)):
        for index in range(len(merged) - 1, -1, -1):
            top = merged[index]
            if top.type == region.type:
                if region.start <= top.last + 1:
                    length = max(top.last, region.last) - top.start + 1
                    merged[index] = ResvRegion(top.start, length, top.prot, top.type)
                    break
                merged.append(region)
                break
        else:
            merged.append(region)
    return merged


# -- the domain of a group -------------------------------------------------------------------------------------------


def paging_domain_alloc(device: Device) -> Domain:
    """A new paging domain for `device`. ENODEV without an IOMMU; the driver's errors."""
    return paging_domain_alloc_flags(device, 0)


def paging_domain_alloc_flags(device: Device, flags: int) -> Domain:
    """As `paging_domain_alloc`, with IOMMU_HWPT_ALLOC_* flags."""
    if device.iommu is None:
        raise KernelError(errno.ENODEV, f"{device.name} is behind no IOMMU")
    return device.iommu.domain_alloc_paging_flags(device, flags, None)


def group_set_domain(group: Group, new: Domain) -> None:
    """Move every device of the group to `new`; after an error all are where they were."""
    if group.domain is new:
        return
    for index, device in enumerate(group.devices):
        try:
            _device_set_domain(group, device, new, group.domain)
        except KernelError:
            if group.domain is not None:
                for moved in group.devices[:index]:
                    _device_set_domain(group, moved, group.domain, new)
            raise
    group.domain = new


def _group_set_domain_nofail(group: Group, new: Domain | None) -> None:
    if new is None:
        raise KernelBug(f"group {group.id} has no domain to go back to")
    try:
        with spared():  # where a real driver finds no memory here, the kernel warns and goes on
            group_set_domain(group, new)
    except KernelError as error:
        raise KernelBug(f"group {group.id} cannot go back to a core domain") from error


def _device_set_domain(group: Group, device: Device, new: Domain, old: Domain | None) -> None:
    if device.require_direct and (new.type == IOMMU_DOMAIN_BLOCKED or new is group.blocking_domain):
        raise KernelError(errno.EINVAL, f"the firmware requires a 1:1 mapping for {device.name}")
    new.attach_dev(device, old)


def _group_set_core_domain(group: Group) -> None:
    _group_set_domain_nofail(group, group.blocking_domain if group.owner is not None else group.default_domain)


def ops_compatible(driver: IommuDriver, domain: Domain) -> bool:
    """domain_iommu_ops_compatible(): it is of that kind of IOMMU. Whether of that unit, the driver looks itself."""
    return type(domain.owner) is type(driver)


def attach_group(domain: Domain, group: Group) -> None:
    """Attach every device of the group. EBUSY: it is in a domain of somebody's; EINVAL: wrong IOMMU; driver errors."""
    if group.domain is not None and group.domain not in (group.default_domain, group.blocking_domain):
        raise KernelError(errno.EBUSY, f"group {group.id} is attached to another domain")
    driver = group.devices[0].iommu
    if driver is None or not ops_compatible(driver, domain):
        raise KernelError(errno.EINVAL, f"the domain belongs to another IOMMU than group {group.id}")
    group_set_domain(group, domain)


def attach_group_handle(domain: Domain, group: Group, handle: AttachHandle) -> None:
    """As `attach_group`, leaving `handle` to be found by `attach_handle_get`. EBUSY: there is one already."""
    if IOMMU_NO_PASID in group.pasid_array:
        raise KernelError(errno.EBUSY, f"group {group.id} has an attach handle")
    attach_group(domain, group)
    handle.domain = domain
    group.pasid_array[IOMMU_NO_PASID] = handle


def detach_group_handle(domain: Domain, group: Group) -> None:
    """Undo `attach_group_handle`. Cannot fail."""
    _group_set_core_domain(group)
    group.pasid_array.pop(IOMMU_NO_PASID, None)


def replace_group_handle(group: Group, new: Domain, handle: AttachHandle) -> None:
    """Move the group to `new` without a stop in the blocking domain. On an error it stays where it was.

    EINVAL: wrong IOMMU. 7.3.4 does not look, and hands the device to another IOMMU's driver: a mock device that is
    moved to a HWPT of VT-d, or the other way round, takes that kernel down.
    """
    driver = group.devices[0].iommu
    if driver is None or not ops_compatible(driver, new):
        raise KernelError(errno.EINVAL, f"the domain belongs to another IOMMU than group {group.id}")
    group_set_domain(group, new)
    handle.domain = new
    group.pasid_array[IOMMU_NO_PASID] = handle


# -- the domain of a PASID -------------------------------------------------------------------------------------------


def _set_group_pasid(domain: Domain, group: Group, pasid: int, old: Domain | None) -> None:
    """Move a PASID of every device that has PASIDs; after an error all are where they were, or nowhere."""
    capable = [device for device in group.devices if device.max_pasids]
    for index, device in enumerate(capable):
        try:
            domain.set_dev_pasid(device, pasid, old)
        except KernelError:
            for moved in capable[:index]:
                if old is None:
                    _remove_dev_pasid(moved, pasid, domain)
                else:
                    _put_back(moved, pasid, old, domain)
            raise


def _put_back(device: Device, pasid: int, old: Domain, failed: Domain) -> None:
    try:
        old.set_dev_pasid(device, pasid, failed)
    except KernelError as error:
        raise KernelBug(f"{device.name} cannot go back on PASID {pasid}") from error


def _remove_dev_pasid(device: Device, pasid: int, domain: Domain) -> None:
    blocked = device.iommu.blocked_domain if device.iommu is not None else None
    if blocked is None:
        raise KernelBug(f"{device.name} has no blocked domain")
    blocked.set_dev_pasid(device, pasid, domain)


def attach_device_pasid(domain: Domain, device: Device, pasid: int, handle: AttachHandle) -> None:
    """Attach one PASID of the device's whole group. Devices without PASIDs are passed over, and need none.

    In order: ENODEV, no group; EOPNOTSUPP, the domain or the driver takes no PASIDs; EINVAL, another driver's domain,
    PASID 0, or beyond what a device of the group has; EBUSY, the PASID is attached; the driver's errnos.
    """
    group, driver = device.group, device.iommu
    if group is None or driver is None:
        raise KernelError(errno.ENODEV, f"{device.name} is in no IOMMU group")
    if not domain.takes_pasids or driver.blocked_domain is None or not driver.blocked_domain.takes_pasids:
        raise KernelError(errno.EOPNOTSUPP, f"{driver.name} takes no PASIDs")
    if not ops_compatible(driver, domain) or pasid == IOMMU_NO_PASID:
        raise KernelError(errno.EINVAL, f"PASID {pasid} with a domain of {domain.owner.name}")
    for member in group.devices:
        if member.max_pasids and pasid >= member.max_pasids:
            raise KernelError(errno.EINVAL, f"{member.name} has {member.max_pasids} PASIDs")
    if pasid in group.pasid_array:
        raise KernelError(errno.EBUSY, f"PASID {pasid} of group {group.id} is attached")
    _set_group_pasid(domain, group, pasid, None)
    handle.domain = domain
    group.pasid_array[pasid] = handle


def replace_device_pasid(domain: Domain, device: Device, pasid: int, handle: AttachHandle) -> None:
    """Move one PASID of the device's group to `domain`. After an error it is where it was.

    In order: ENODEV and EOPNOTSUPP as in `attach_device_pasid`; EINVAL, another driver's domain, PASID 0, or it is not
    attached; the driver's errnos.
    """
    group, driver = device.group, device.iommu
    if group is None or driver is None:
        raise KernelError(errno.ENODEV, f"{device.name} is in no IOMMU group")
    if not domain.takes_pasids:
        raise KernelError(errno.EOPNOTSUPP, f"{driver.name} takes no PASIDs")
    current = group.pasid_array.get(pasid)
    if not ops_compatible(driver, domain) or pasid == IOMMU_NO_PASID or current is None:
        raise KernelError(errno.EINVAL, f"PASID {pasid} of group {group.id} cannot be replaced")
    if current.domain is not domain:
        _set_group_pasid(domain, group, pasid, current.domain)
    handle.domain = domain
    group.pasid_array[pasid] = handle


def detach_device_pasid(domain: Domain, device: Device, pasid: int) -> None:
    """Undo `attach_device_pasid`. Cannot fail."""
    group = device.group
    if group is None:
        raise KernelBug(f"{device.name} is in no group")
    for member in group.devices:
        if member.max_pasids:
            _remove_dev_pasid(member, pasid, domain)
    group.pasid_array.pop(pasid, None)


def attach_handle_get(group: Group, pasid: int = IOMMU_NO_PASID, domain_type: int = 0) -> AttachHandle:
    """The handle of what is attached. ENOENT: nothing; EBUSY: its domain is of another type."""
    handle = group.pasid_array.get(pasid)
    if handle is None:
        raise KernelError(errno.ENOENT, f"group {group.id} has no attach handle for pasid {pasid}")
    if domain_type and (handle.domain is None or handle.domain.type != domain_type):
        raise KernelError(errno.EBUSY, "the attached domain is of another type")
    return handle


def dma_prepare_msi(device: Device, address: int) -> int:
    """iommu_dma_prepare_msi(): where `device` writes to ring the doorbell at physical `address` through its domain.

    EOPNOTSUPP: it is in a domain that maps no doorbells, such as the blocking one. Then the attacher's errnos.
    """
    group = device.group
    if group is None or group.domain is None or group.domain.type == IOMMU_DOMAIN_IDENTITY:
        return address
    if group.domain.iommufd_hwpt is None:
        raise KernelError(errno.EOPNOTSUPP, f"the domain of {device.name} maps no doorbells")
    handle = group.pasid_array.get(IOMMU_NO_PASID)
    return address if handle is None else handle.prepare_msi(group.domain, address)


# -- ownership -------------------------------------------------------------------------------------------------------


def _take_dma_ownership(group: Group, owner: object) -> None:
    if (group.domain is not None and group.domain is not group.default_domain) or group.pasid_array:
        raise KernelError(errno.EBUSY, f"group {group.id} is not in its default domain")
    if group.blocking_domain is None:
        driver = group.devices[0].iommu
        if driver is not None and driver.blocked_domain is not None:
            group.blocking_domain = driver.blocked_domain
        else:
            group.blocking_domain = paging_domain_alloc(group.devices[0])
    group_set_domain(group, group.blocking_domain)
    group.owner = owner
    group.owner_cnt += 1


def group_claim_dma_owner(group: Group, owner: object) -> None:
    """Own the group alone (a VFIO container). EPERM: somebody owns it; EBUSY, EINVAL as below."""
    if group.owner_cnt:
        raise KernelError(errno.EPERM, f"group {group.id} has an owner")
    _take_dma_ownership(group, owner)


def device_claim_dma_owner(device: Device, owner: object) -> None:
    """Own the group of `device`, possibly with other devices of it for the same `owner`; it is blocked then.

    ENODEV: no group; EPERM: another owner, or a kernel driver; EBUSY: not in its default domain; EINVAL: the firmware
    requires a 1:1 mapping.
    """
    group = device.group
    if group is None:
        raise KernelError(errno.ENODEV, f"{device.name} is in no IOMMU group")
    if group.owner_cnt:
        if group.owner is not owner:
            raise KernelError(errno.EPERM, f"group {group.id} has another owner")
        group.owner_cnt += 1
        return
    _take_dma_ownership(group, owner)


def group_release_dma_owner(group: Group) -> None:
    """Give the group back to the kernel: it returns to its default domain."""
    if not group.owner_cnt or group.owner is None or group.pasid_array:
        raise KernelBug(f"group {group.id} is released without an owner, or while attached")
    group.owner_cnt = 0
    group.owner = None
    _group_set_domain_nofail(group, group.default_domain)


def device_release_dma_owner(device: Device) -> None:
    """Undo one `device_claim_dma_owner`."""
    group = device.group
    if group is None:
        raise KernelBug(f"{device.name} is in no group")
    if group.owner_cnt > 1:
        group.owner_cnt -= 1
    else:
        group_release_dma_owner(group)


def group_dma_owner_claimed(group: Group) -> bool:
    """Whether the group has an owner."""
    return group.owner_cnt > 0


def device_use_default_domain(device: Device) -> None:
    """A kernel driver binds to the device. EBUSY: a user owns the group, or it is in a foreign domain."""
    group = device.group
    if group is None:
        return
    if group.owner_cnt and (group.domain is not group.default_domain or group.owner or group.pasid_array):
        raise KernelError(errno.EBUSY, f"group {group.id} belongs to a user")
    group.owner_cnt += 1


def device_unuse_default_domain(device: Device) -> None:
    """The kernel driver has gone."""
    if device.group is not None:
        if not device.group.owner_cnt or device.group.pasid_array:
            raise KernelBug(f"{device.name} is unbound from a driver that it does not have")
        device.group.owner_cnt -= 1
