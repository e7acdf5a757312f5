"""/sys/class/iommu: the IOMMUs, what they say of themselves, and which devices are theirs.

Mirrors drivers/iommu/iommu-sysfs.c; an IOMMU's directory is below its parent device, or among the virtual ones.
User-space drivers look here for an IOMMU's address width (DPDK reads `/sys/bus/pci/devices/*/iommu/intel-iommu/cap`).
Left out: `power` and `uevent`; groups are published with the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kernel_model.iommu.core import Device, IommuDriver
from kernel_model.vfs import FileSystem

_DEVICES = "/sys/devices"


def pci_root(host_bridge: str) -> str:
    """Where the functions of the first PCI bus are, below a host bridge that the device tree names."""
    return f"{_DEVICES}/platform/{host_bridge}/pci0000:00" if host_bridge else f"{_DEVICES}/pci0000:00"


def publish(files: FileSystem, devices: Iterable[Device], root: str) -> None:
    """Make the directories of all IOMMUs in front of `devices`, and the links both ways."""
    seen: set[IommuDriver] = set()
    for device in devices:
        iommu = device.iommu
        if iommu is None:
            continue
        parent = f"{_DEVICES}/{f'platform/{iommu.sysfs_parent}' if iommu.sysfs_parent else 'virtual'}"
        here = f"{parent}/iommu/{iommu.sysfs_name}"
        if iommu not in seen:
            seen.add(iommu)
            files.add_link_to(f"/sys/class/iommu/{iommu.sysfs_name}", here)
            if iommu.sysfs_parent:
                files.add_link_to(f"{here}/device", parent)
            for name, show in iommu.sysfs_attributes().items():
                files.add_file(f"{here}/{name}", _line(show))
        files.add_link_to(f"{here}/devices/{device.name}", f"{root}/{device.name}")
        files.add_link_to(f"{root}/{device.name}/iommu", here)


def _line(show: Callable[[], str]) -> Callable[[], bytes]:
    return lambda: show().encode() + b"\n"
