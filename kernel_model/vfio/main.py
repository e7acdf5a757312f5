"""The PCI bus and vfio-pci as sysfs shows them, and the nodes of VFIO devices.

Mirrors of drivers/pci/pci-sysfs.c and the driver core what a client walks to find a function and to give it to vfio-pci
(`driver_override`, `drivers_probe`, `bind`, `unbind`); of drivers/iommu/iommu.c the groups; of drivers/vfio/pci/
vfio_pci.c the probe; of drivers/vfio/vfio_main.c the registration: the lowest free number, the node, `vfio-dev/`.

Left out: every other PCI driver; the groups that a device without an IOMMU gets for VFIO's older interface; changing
`enable_unsafe_noiommu_mode` while the kernel runs. `unbind` of an open device is EBUSY, where Linux would wait until it
is closed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.pci import (
    IO,
    MEM64,
    PCI_DEVICE_ID,
    PCI_REVISION_ID,
    PCI_SUBSYSTEM_VENDOR_ID,
    PCI_VENDOR_ID,
    PciFunction,
)
from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.iommu.core import IOMMU_CAP_CACHE_COHERENCY, RESV_TYPE_NAMES, Device, Group, get_group_resv_regions
from kernel_model.iommu.sysfs import pci_root
from kernel_model.process import CAP_SYS_RAWIO
from kernel_model.vfio.cdev import VfioDeviceFile
from kernel_model.vfio.device import VfioDevice
from kernel_model.vfio.pci import VfioPciDevice
from uapi.behaviours import has

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel_model.kernel import Kernel

_BUS = "/sys/bus/pci"
_DRIVER = f"{_BUS}/drivers/vfio-pci"
#: Flags of a resource in sysfs (include/linux/ioport.h).
_IORESOURCE_IO, _IORESOURCE_MEM, _IORESOURCE_PREFETCH, _IORESOURCE_MEM_64 = 0x100, 0x200, 0x2000, 0x100000
_IORESOURCE_SIZEALIGN = 0x40000
_NOIOMMU_MODE = "vfio.enable_unsafe_noiommu_mode=1"
_NO_RESOURCE = f"0x{0:016x} 0x{0:016x} 0x{0:016x}\n"


class VfioPciDriver:
    """The PCI bus with its one driver."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._files = kernel.files
        #: Where sysfs has the functions.
        self._root = pci_root(kernel.machine.host_bridge)
        #: driver_override by address, and the devices that vfio-pci has.
        self._overrides: dict[str, str] = {}
        self._bound: dict[str, VfioPciDevice] = {}
        self._noiommu = _NOIOMMU_MODE in kernel.machine.kernel_arguments and has(kernel.release, "noiommu-cdev")

    # -- what is there at boot ---------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Fill sysfs."""
        files = self._files
        files.add_directory(f"{_BUS}/devices")
        files.add_directory("/dev/vfio")
        files.add_directory("/dev/vfio/devices")
        files.add_directory("/sys/class/vfio-dev")
        files.add_file(f"{_BUS}/drivers_probe", None, self._drivers_probe)
        files.add_file(f"{_DRIVER}/bind", None, self._bind)
        files.add_file(f"{_DRIVER}/unbind", None, self._unbind)
        unsafe = _NOIOMMU_MODE in self._kernel.machine.kernel_arguments
        files.add_file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", _text("Y\n" if unsafe else "N\n"))
        groups: dict[int, Group] = {}
        for device in self._kernel.devices.values():
            if device.pci is not None:
                self._publish_function(device, device.pci)
            if device.group is not None:
                groups[device.group.id] = device.group
        for group in groups.values():
            self._publish_group(group)

    def _publish_function(self, device: Device, function: PciFunction) -> None:
        files, address = self._files, function.address
        here = f"{self._root}/{address}"
        files.add_link_to(f"{_BUS}/devices/{address}", here)
        for name, offset, width, form in (
            ("vendor", PCI_VENDOR_ID, 2, "0x%04x\n"),
            ("device", PCI_DEVICE_ID, 2, "0x%04x\n"),
            ("subsystem_vendor", PCI_SUBSYSTEM_VENDOR_ID, 2, "0x%04x\n"),
            ("subsystem_device", PCI_SUBSYSTEM_VENDOR_ID + 2, 2, "0x%04x\n"),
            ("revision", PCI_REVISION_ID, 1, "0x%02x\n"),
        ):
            files.add_file(f"{here}/{name}", _text(form % function.config_read(offset, width)))
        class_code = function.config_read(PCI_REVISION_ID, 4) >> 8
        files.add_file(f"{here}/class", _text(f"{class_code:#08x}\n"))
        files.add_file(f"{here}/irq", lambda: b"%d\n" % self._kernel.interrupts.irq(function))
        files.add_file(f"{here}/config", lambda: bytes(function.config))
        files.add_file(f"{here}/resource", _text(_resources(function)))
        files.add_file(
            f"{here}/driver_override",
            lambda: f"{self._overrides.get(address, '(null)')}\n".encode(),
            lambda _call, data: self._set_override(address, data),
        )
        if device.group is not None:
            files.add_link_to(f"{here}/iommu_group", f"/sys/kernel/iommu_groups/{device.group.id}")

    def _publish_group(self, group: Group) -> None:
        here = f"/sys/kernel/iommu_groups/{group.id}"
        for device in group.devices:
            self._files.add_link_to(f"{here}/devices/{device.name}", f"{self._root}/{device.name}")
        lines = "".join(
            f"0x{region.start:016x} 0x{region.last:016x} {RESV_TYPE_NAMES[region.type]}\n"
            for region in get_group_resv_regions(group)
        )
        self._files.add_file(f"{here}/reserved_regions", _text(lines))
        self._files.add_file(f"{here}/type", _text("DMA\n"))

    # -- giving functions to the driver ------------------------------------------------------------------------------

    def _set_override(self, address: str, data: bytes) -> None:
        name = data.split(b"\n")[0].decode(errors="replace")
        if name:
            self._overrides[address] = name
        else:
            self._overrides.pop(address, None)

    def _device(self, data: bytes) -> Device:
        """ENODEV: no such function."""
        device = self._kernel.devices.get(data.decode(errors="replace").rstrip("\n"))
        if device is None or device.pci is None:
            raise KernelError(errno.ENODEV, f"no PCI function {data!r}")
        return device

    def _drivers_probe(self, _call: SystemCall, data: bytes) -> None:
        """ENODEV: no such function. EINVAL: vfio-pci refuses it. Nothing happens without an override, or twice."""
        device = self._device(data)
        if self._overrides.get(device.name) == "vfio-pci" and device.name not in self._bound:
            self._probe(device)

    def _bind(self, _call: SystemCall, data: bytes) -> None:
        """ENODEV: no such function, or vfio-pci was not told to take it. EBUSY: it has it. Then as `_drivers_probe`."""
        device = self._device(data)
        if self._overrides.get(device.name) != "vfio-pci":
            raise KernelError(errno.ENODEV, f"{device.name} is not for vfio-pci")
        if device.name in self._bound:
            raise KernelError(errno.EBUSY, f"vfio-pci has {device.name}")
        self._probe(device)

    def _unbind(self, _call: SystemCall, data: bytes) -> None:
        """ENODEV: vfio-pci does not have it. EBUSY: it is open."""
        device = self._device(data)
        vdev = self._bound.get(device.name)
        if vdev is None:
            raise KernelError(errno.ENODEV, f"vfio-pci does not have {device.name}")
        if vdev.open_count:
            raise KernelError(errno.EBUSY, f"{device.name} is open; Linux would wait here")
        del self._bound[device.name]
        here = f"{self._root}/{device.name}"
        for path in (
            f"/dev/vfio/devices/{vdev.name}",
            f"/sys/class/vfio-dev/{vdev.name}",
            f"{here}/vfio-dev",
            f"{here}/driver",
            f"{_DRIVER}/{device.name}",
        ):
            self._files.remove(path)

    def _probe(self, device: Device) -> None:
        """vfio_pci_probe() and __vfio_register_dev(). EINVAL: a bridge; the IOMMU is not cache-coherent; there is none,
        and VFIO was not told to give such devices away."""
        if device.pci is not None and device.pci.secondary:
            raise KernelError(errno.EINVAL, f"{device.name} is a bridge")
        if device.iommu is None:
            if not self._noiommu:
                raise KernelError(errno.EINVAL, f"{device.name} is behind no IOMMU")
        elif not device.iommu.capable(device, IOMMU_CAP_CACHE_COHERENCY):
            raise KernelError(errno.EINVAL, f"the IOMMU of {device.name} is not cache-coherent")
        if device.pci is not None:
            self._kernel.interrupts.pci_assign_irq(device.pci)
        taken = {vdev.index for vdev in self._bound.values()}
        index = next(number for number in range(len(taken) + 1) if number not in taken)
        vdev = VfioPciDevice(self._kernel, device, index)
        self._bound[device.name] = vdev
        here = f"{self._root}/{device.name}"
        name = vdev.name
        self._files.add_link_to(f"{here}/driver", _DRIVER)
        self._files.add_link_to(f"{_DRIVER}/{device.name}", here)
        self._files.add_link_to(f"/sys/class/vfio-dev/{name}", f"{here}/vfio-dev/{name}")
        self._files.add_directory(f"{here}/vfio-dev/{name}")
        self._files.add_node(f"/dev/vfio/devices/{name}", _opener(vdev))


def _opener(vdev: VfioDevice) -> Callable[[SystemCall, int], FileDescription]:
    def opened(call: SystemCall, _flags: int) -> FileDescription:
        """vfio_device_fops_cdev_open(). EPERM: a device without an IOMMU, without CAP_SYS_RAWIO."""
        if vdev.noiommu and not call.process.capable(CAP_SYS_RAWIO):
            raise KernelError(errno.EPERM, "the device has no IOMMU, and the caller no CAP_SYS_RAWIO")
        return VfioDeviceFile(vdev)

    return opened


def _text(text: str) -> Callable[[], bytes]:
    data = text.encode()
    return lambda: data


def _resources(function: PciFunction) -> str:
    """The `resource` attribute: start, end and flags of each BAR; seven lines for windows that functions lack."""
    lines = []
    for index in range(13):
        bar = function.bars[index] if index < 6 else None
        if bar is None:
            lines.append(_NO_RESOURCE)
            continue
        flags = _IORESOURCE_IO if bar.kind == IO else _IORESOURCE_MEM
        flags |= _IORESOURCE_SIZEALIGN | bar.type_bits & 0x9
        flags |= _IORESOURCE_PREFETCH if bar.prefetchable else 0
        flags |= _IORESOURCE_MEM_64 if bar.kind == MEM64 else 0
        start = function.bar_address(index)
        lines.append(f"0x{start:016x} 0x{start + bar.size - 1:016x} 0x{flags:016x}\n")
    return "".join(lines)


def register(kernel: Kernel) -> None:
    """Publish the PCI bus and vfio-pci. The character devices came with 6.6: before, nothing of VFIO is there."""
    if has(kernel.release, "vfio-cdev"):
        VfioPciDriver(kernel).publish()
