"""A small user-space VFIO library: one PCI function through its character device.

Finds functions in sysfs, hands them to vfio-pci, and wraps the calls of Documentation/driver-api/vfio.rst ("IOMMUFD
and VFIO device cdev"): open, BIND, ATTACH, regions, config space, BARs, interrupts by eventfd. Only what the suite's
drivers need; a test of an ioctl's own rules calls the ioctl.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType

from uapi.backend import Backend, File, Mapping
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_RESET,
    VFIO_DEVICE_SET_IRQS,
    VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
    vfio_device_info,
    vfio_irq_info,
    vfio_region_info,
)

PCI_DEVICES = "/sys/bus/pci/devices"
#: vfio-pci puts the region's index above bit 40 of the file offset.
REGION_SHIFT = 40
CONFIG_REGION = 7
PCI_COMMAND, PCI_COMMAND_MEMORY, PCI_COMMAND_MASTER = 0x04, 0x2, 0x4
_FORMAT = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


def attribute(kernel: Backend, path: str) -> str:
    """The text of a sysfs attribute, without the newline."""
    with kernel.open(path, os.O_RDONLY | os.O_CLOEXEC) as file:
        return file.read(4096).decode().rstrip("\n")


def store(kernel: Backend, path: str, text: str) -> None:
    """Write a sysfs attribute."""
    with kernel.open(path, os.O_WRONLY | os.O_CLOEXEC) as file:
        file.write(text.encode())


def functions(kernel: Backend, vendor: int, device: int) -> list[str]:
    """Addresses ("0000:00:10.0") of the PCI functions with these ids, in order; none where there is no PCI."""
    found = []
    try:
        addresses = sorted(kernel.listdir(PCI_DEVICES))
    except OSError:
        return []
    for address in addresses:
        ids = [int(attribute(kernel, f"{PCI_DEVICES}/{address}/{name}"), 16) for name in ("vendor", "device")]
        if ids == [vendor, device]:
            found.append(address)
    return found


def driver_of(kernel: Backend, address: str) -> str | None:
    """The name of the kernel driver that has the function, None if none has."""
    try:
        return os.path.basename(kernel.readlink(f"{PCI_DEVICES}/{address}/driver"))
    except OSError:
        return None


def take(kernel: Backend, address: str) -> None:
    """Give the function to vfio-pci. A function that another driver has is left alone: RuntimeError."""
    driver = driver_of(kernel, address)
    if driver == "vfio-pci":
        return
    if driver is not None:
        raise RuntimeError(f"{address} belongs to {driver}")
    store(kernel, f"{PCI_DEVICES}/{address}/driver_override", "vfio-pci")
    store(kernel, "/sys/bus/pci/drivers_probe", address)
    if driver_of(kernel, address) != "vfio-pci":
        raise RuntimeError(f"vfio-pci did not take {address}")


def node(kernel: Backend, address: str) -> str:
    """The character device of a function that vfio-pci has."""
    names = [n for n in kernel.listdir(f"{PCI_DEVICES}/{address}/vfio-dev") if n.startswith(("vfio", "noiommu-vfio"))]
    return f"/dev/vfio/devices/{names[0]}"


def iommu_group(kernel: Backend, address: str) -> int:
    """The number of the function's IOMMU group."""
    return int(os.path.basename(kernel.readlink(f"{PCI_DEVICES}/{address}/iommu_group")))


def irq_set(flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int | None = None) -> bytearray:
    """The argument of VFIO_DEVICE_SET_IRQS: the struct and what follows it."""
    size = 20 + len(data) if argsz is None else argsz
    return bytearray(struct.pack("<IIIII", size, flags, index, start, count) + data)


class VfioDevice:
    """An open VFIO character device. `close()` (or leaving the context) unbinds and resets it."""

    def __init__(self, kernel: Backend, address: str) -> None:
        """Take the function and open its node. It refuses everything but BIND until `bind()`."""
        take(kernel, address)
        self.kernel = kernel
        self.address = address
        self.node = node(kernel, address)
        self.file: File = kernel.open(self.node)
        self.iommu: File | None = None
        self.devid = 0
        self._mappings: list[Mapping] = []

    def bind(self, iommu: File) -> int:
        """BIND to an open /dev/iommu: the device's object id there."""
        self.iommu = iommu
        self.devid = VFIO_DEVICE_BIND_IOMMUFD(self.file, iommufd=iommu.fileno()).out_devid
        return self.devid

    def attach(self, pt_id: int) -> int:
        """ATTACH to an IOAS or HWPT (a replacement if attached): the id of the HWPT that translates now."""
        return VFIO_DEVICE_ATTACH_IOMMUFD_PT(self.file, pt_id=pt_id).pt_id

    def detach(self) -> None:
        VFIO_DEVICE_DETACH_IOMMUFD_PT(self.file)

    def attach_pasid(self, pasid: int, pt_id: int) -> int:
        """ATTACH of one PASID to a HWPT (a replacement if it is attached): the id of the HWPT."""
        reply = VFIO_DEVICE_ATTACH_IOMMUFD_PT(self.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=pasid, pt_id=pt_id)
        return reply.pt_id

    def detach_pasid(self, pasid: int) -> None:
        VFIO_DEVICE_DETACH_IOMMUFD_PT(self.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=pasid)

    def info(self) -> vfio_device_info:
        return VFIO_DEVICE_GET_INFO(self.file)

    def region(self, index: int) -> vfio_region_info:
        return VFIO_DEVICE_GET_REGION_INFO(self.file, index=index)

    def irq(self, index: int) -> vfio_irq_info:
        return VFIO_DEVICE_GET_IRQ_INFO(self.file, index=index)

    def reset(self) -> None:
        VFIO_DEVICE_RESET.raw(self.file)

    def read(self, region: int, offset: int, width: int) -> int:
        """Read a little-endian number by pread, as the kernel's access of that width."""
        data = self.file.pread(width, (region << REGION_SHIFT) + offset)
        return int(struct.unpack(_FORMAT[width], data)[0])

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.file.pwrite(struct.pack(_FORMAT[width], value), (region << REGION_SHIFT) + offset)

    def config_read(self, offset: int, width: int) -> int:
        return self.read(CONFIG_REGION, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        self.write(CONFIG_REGION, offset, width, value)

    def enable(self, bits: int = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER) -> None:
        """Set bits of PCI_COMMAND: VFIO hands a function over without bus master."""
        self.config_write(PCI_COMMAND, 2, self.config_read(PCI_COMMAND, 2) | bits)

    def disable(self, bits: int) -> None:
        """Clear bits of PCI_COMMAND."""
        self.config_write(PCI_COMMAND, 2, self.config_read(PCI_COMMAND, 2) & ~bits)

    def map_bar(self, index: int) -> Mapping:
        """Map a whole BAR; unmapped by `close()` at the latest."""
        info = self.region(index)
        mapping = self.file.mmap(info.size, info.offset)
        self._mappings.append(mapping)
        return mapping

    def set_irqs(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> int:
        """SET_IRQS: 0, or the number of vectors available when that is fewer than asked for."""
        return VFIO_DEVICE_SET_IRQS.raw(self.file, irq_set(flags, index, start, count, data))

    def signal_on(self, index: int, eventfds: list[int], start: int = 0) -> None:
        """Have interrupts from `start` on signal these eventfds (-1: none)."""
        data = struct.pack(f"<{len(eventfds)}i", *eventfds)
        left = self.set_irqs(VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, index, start, len(eventfds), data)
        if left:
            raise RuntimeError(f"{self.address} has only {left} vectors")

    def disable_irqs(self, index: int) -> None:
        self.set_irqs(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, 0)

    def close(self) -> None:
        for mapping in self._mappings:
            mapping.close()
        self._mappings.clear()
        self.file.close()

    def __enter__(self) -> VfioDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
