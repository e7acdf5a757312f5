"""/sys/class/iommu: the IOMMUs, what they say of themselves, and which devices are theirs.

Mirrors drivers/iommu/iommu-sysfs.c. User-space drivers look here for an IOMMU's address width (DPDK reads
`/sys/bus/pci/devices/*/iommu/intel-iommu/cap`). Left out: `power` and `uevent`; groups are published with the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kernel_model.iommu.core import Device, IommuDriver
from kernel_model.vfs import FileSystem

_HERE = "/sys/devices/virtual/iommu"


def publish(files: FileSystem, devices: Iterable[Device]) -> None:
    """Make the directories of all IOMMUs in front of `devices`, and the links both ways."""
    seen: set[IommuDriver] = set()
    for device in devices:
        iommu = device.iommu
        if iommu is None:
            continue
        here = f"{_HERE}/{iommu.sysfs_name}"
        if iommu not in seen:
            seen.add(iommu)
            files.add_link(f"/sys/class/iommu/{iommu.sysfs_name}", f"../../devices/virtual/iommu/{iommu.sysfs_name}")
            for name, show in iommu.sysfs_attributes().items():
                files.add_file(f"{here}/{name}", _line(show))
        files.add_link(f"{here}/devices/{device.name}", f"../../../../pci0000:00/{device.name}")
        files.add_link(f"/sys/devices/pci0000:00/{device.name}/iommu", f"../../virtual/iommu/{iommu.sysfs_name}")


def _line(show: Callable[[], str]) -> Callable[[], bytes]:
    return lambda: show().encode() + b"\n"
