"""vfio-pci: a PCI function as a VFIO device.

Mirrors drivers/vfio/pci/vfio_pci_core.c: what happens to the function when it is opened and closed, the device's
ioctls, low power. Every function of the model's machines sits on the root bus, so there is no slot or bus to reset, and
a hot reset is ENODEV. Configuration space, BARs and interrupts are in their own files.

Left out: SR-IOV and its tokens, dma-buf (a kernel without CONFIG_VFIO_PCI_DMABUF), I/O port and VGA regions, expansion
ROMs, a real suspend: low power is only the state that clients see.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fakedev.pci import PCI_COMMAND, PCI_COMMAND_IO, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, PciFunction
from kernel_model.errors import KernelBug, KernelError
from kernel_model.file import SystemCall
from kernel_model.iommu.core import Device
from kernel_model.irq import pci_intx
from kernel_model.pci_ats import restore_state, save_state
from kernel_model.vfio.device import VfioDevice
from kernel_model.vfio.eventfd import EventFd, eventfd_ctx_fdget
from kernel_model.vfio.feature import check_feature
from kernel_model.vfio.pci_config import VirtualConfig
from kernel_model.vfio.pci_intrs import PciInterrupts
from kernel_model.vfio.pci_rdwr import OFFSET_MASK, OFFSET_SHIFT, BarMapping, BarRegions
from uapi.cstruct import Struct
from uapi.vfio import (
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_MASK,
    VFIO_DEVICE_FEATURE_SET,
    VFIO_DEVICE_FLAGS_PCI,
    VFIO_DEVICE_FLAGS_RESET,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_IOEVENTFD,
    VFIO_DEVICE_IOEVENTFD_SIZE_MASK,
    VFIO_DEVICE_PCI_HOT_RESET,
    VFIO_DEVICE_RESET,
    VFIO_DEVICE_SET_IRQS,
    VFIO_IRQ_INFO_AUTOMASKED,
    VFIO_IRQ_INFO_EVENTFD,
    VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE,
    VFIO_PCI_BAR5_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS,
    VFIO_PCI_ROM_REGION_INDEX,
    VFIO_PCI_VGA_REGION_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
    vfio_device_info,
    vfio_device_ioeventfd,
    vfio_irq_info,
    vfio_pci_hot_reset,
    vfio_pci_hot_reset_info,
    vfio_region_info,
)

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

S = TypeVar("S", bound=Struct)
_READ_WRITE = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE
_WAKEUP = struct.Struct("<iI")
_HEADER_SIZE = 0x40


class VfioPciDevice(VfioDevice):
    """`struct vfio_pci_core_device`. `config`, `interrupts` and `regions` live from open to close."""

    config: VirtualConfig
    interrupts: PciInterrupts
    regions: BarRegions

    def __init__(self, kernel: Kernel, dev: Device, index: int) -> None:
        super().__init__(kernel, dev, index)
        if dev.pci is None:
            raise KernelBug(f"{dev.name} is no PCI function")
        self.function: PciFunction = dev.pci
        self.reset_works = False
        self._saved = b""
        #: The client asked for low power: its mappings do not answer.
        self.low_power = False
        self._wakeup: EventFd | None = None
        self._ioctls: dict[int, Callable[[SystemCall, int], int]] = {
            VFIO_DEVICE_GET_INFO.number: self._get_info,
            VFIO_DEVICE_GET_REGION_INFO.number: self._get_region_info,
            VFIO_DEVICE_GET_IRQ_INFO.number: self._get_irq_info,
            VFIO_DEVICE_SET_IRQS.number: lambda call, arg: self.interrupts.set_irqs(call, arg),
            VFIO_DEVICE_RESET.number: self._reset,
            VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.number: self._get_pci_hot_reset_info,
            VFIO_DEVICE_PCI_HOT_RESET.number: self._pci_hot_reset,
            VFIO_DEVICE_IOEVENTFD.number: self._ioeventfd,
        }

    # -- opening and closing -----------------------------------------------------------------------------------------

    def open_device(self) -> None:
        """vfio_pci_core_enable(): bus master off, decoding on, reset if that works, and the state kept for the end."""
        function = self.function
        command = function.config_read(PCI_COMMAND, 2) & ~PCI_COMMAND_MASTER
        for bar in function.bars:
            if bar is not None:
                command |= PCI_COMMAND_MEMORY if bar.is_memory else PCI_COMMAND_IO
        function.config_write(PCI_COMMAND, 2, command)
        self.reset_works = self.try_reset_function()
        self._saved = bytes(function.config[:_HEADER_SIZE])
        pci_intx(function, True)
        self.config = VirtualConfig(self)
        self.interrupts = PciInterrupts(self)
        self.regions = BarRegions(self)

    def close_device(self) -> None:
        """vfio_pci_core_disable(): no DMA, no interrupts, then the state from before the opening."""
        function = self.function
        self._end_low_power()
        function.config_write(PCI_COMMAND, 2, function.config_read(PCI_COMMAND, 2) & ~PCI_COMMAND_MASTER)
        self.interrupts.disable()
        self.regions.close()
        self.try_reset_function()
        self._restore(self._saved)
        del self.config, self.interrupts, self.regions

    def try_reset_function(self) -> bool:
        """pci_try_reset_function(): reset with the configuration kept; False where the function has no reset."""
        if not self.function.reset_methods:
            return False
        saved, services = bytes(self.function.config[:_HEADER_SIZE]), save_state(self.function)
        self.function.reset()
        restore_state(self.function, services)
        self._restore(saved)
        return True

    def _restore(self, saved: bytes) -> None:
        """pci_restore_state(): the header from its end to its beginning, so that decoding comes on last."""
        for offset in range(_HEADER_SIZE - 4, -1, -4):
            self.function.config_write(offset, 4, int.from_bytes(saved[offset : offset + 4], "little"))

    # -- the device's file -------------------------------------------------------------------------------------------

    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        handler = self._ioctls.get(request)
        if handler is None:
            raise KernelError(errno.ENOTTY, f"no such ioctl: {request:#x}")
        return handler(call, arg)

    def read(self, count: int, position: int) -> bytes:
        """vfio_pci_rw(). EINVAL: no such region, or one that cannot be read. Then the region's own errnos."""
        if not count:
            return b""
        index, offset = position >> OFFSET_SHIFT, position & OFFSET_MASK
        if index == VFIO_PCI_CONFIG_REGION_INDEX:
            return self.config.read(offset, count)
        if index <= VFIO_PCI_BAR5_REGION_INDEX:
            return self.regions.read(index, offset, count)
        raise KernelError(errno.EINVAL, f"region {index} cannot be read")

    def write(self, data: bytes | bytearray | memoryview, position: int) -> int:
        """As `read`."""
        if not len(data):
            return 0
        index, offset = position >> OFFSET_SHIFT, position & OFFSET_MASK
        if index == VFIO_PCI_CONFIG_REGION_INDEX:
            return self.config.write(offset, data)
        if index <= VFIO_PCI_BAR5_REGION_INDEX:
            return self.regions.write(index, offset, data)
        raise KernelError(errno.EINVAL, f"region {index} cannot be written")

    def mmap(self, length: int, offset: int, flags: int) -> BarMapping:
        return self.regions.mmap(length, offset, flags)

    # -- information -------------------------------------------------------------------------------------------------

    def _get_info(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_GET_INFO. EFAULT; EINVAL: argsz below 16. As much as argsz has room for is written."""
        info = _copy(call, arg, vfio_device_info, 16)
        length = min(info.argsz, ctypes.sizeof(info))
        info.flags = VFIO_DEVICE_FLAGS_PCI | (VFIO_DEVICE_FLAGS_RESET if self.reset_works else 0)
        info.num_regions, info.num_irqs = VFIO_PCI_NUM_REGIONS, VFIO_PCI_NUM_IRQS
        call.copy_to_user(arg, bytes(info)[:length])
        return 0

    def _get_region_info(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_GET_REGION_INFO. EFAULT; EINVAL: argsz below 32, no such region, VGA."""
        info = _copy(call, arg, vfio_region_info, 32)
        index = info.index
        if index == VFIO_PCI_VGA_REGION_INDEX or index >= VFIO_PCI_NUM_REGIONS:
            raise KernelError(errno.EINVAL, f"there is no region {index}")
        info.offset = index << OFFSET_SHIFT
        info.flags = info.size = 0
        if index == VFIO_PCI_CONFIG_REGION_INDEX:
            info.flags, info.size = _READ_WRITE, self.function.config_size
        elif index != VFIO_PCI_ROM_REGION_INDEX:
            bar = self.function.bars[index]
            if bar is not None:
                mappable = VFIO_REGION_INFO_FLAG_MMAP if self.regions.is_mappable(index) else 0
                info.flags, info.size = _READ_WRITE | mappable, bar.size
        call.copy_to_user(arg, bytes(info))
        return 0

    def _get_irq_info(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_GET_IRQ_INFO. EFAULT; EINVAL: argsz below 16, no such index."""
        info = _copy(call, arg, vfio_irq_info, 16)
        if info.index >= VFIO_PCI_NUM_IRQS:
            raise KernelError(errno.EINVAL, f"there is no interrupt {info.index}")
        if info.index == VFIO_PCI_ERR_IRQ_INDEX and not self.interrupts.has_error_signal:
            raise KernelError(errno.EINVAL, "no error signal: the function is not PCI Express")
        info.flags = VFIO_IRQ_INFO_EVENTFD
        if info.index == VFIO_PCI_INTX_IRQ_INDEX:
            info.flags |= VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED
        else:
            info.flags |= VFIO_IRQ_INFO_NORESIZE
        info.count = self.interrupts.count(info.index)
        call.copy_to_user(arg, bytes(info))
        return 0

    # -- reset -------------------------------------------------------------------------------------------------------

    def _reset(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_RESET. EINVAL: the function has no reset."""
        if not self.reset_works:
            raise KernelError(errno.EINVAL, "the function has no reset")
        self.try_reset_function()
        return 0

    def _get_pci_hot_reset_info(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO. EFAULT; EINVAL: argsz below 12. ENODEV: the root bus cannot be reset."""
        _copy(call, arg, vfio_pci_hot_reset_info, 12)
        raise KernelError(errno.ENODEV, "neither slot nor bus can be reset")

    def _pci_hot_reset(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_PCI_HOT_RESET. EFAULT; EINVAL: argsz, flags, groups with a cdev. ENODEV: as above."""
        header = _copy(call, arg, vfio_pci_hot_reset, 12)
        if header.flags:
            raise KernelError(errno.EINVAL, f"flags {header.flags:#x}")
        if bool(header.count) == self.cdev_opened:
            raise KernelError(errno.EINVAL, "groups are named for a device that was opened without one")
        raise KernelError(errno.ENODEV, "neither slot nor bus can be reset")

    # -- eventfds that store -----------------------------------------------------------------------------------------

    def _ioeventfd(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_IOEVENTFD. EFAULT; EINVAL: argsz, not one size, fd below -1. Then `BarRegions.ioeventfd`."""
        cmd = _copy(call, arg, vfio_device_ioeventfd, 28)
        width = cmd.flags & VFIO_DEVICE_IOEVENTFD_SIZE_MASK
        if cmd.flags != width or width.bit_count() != 1 or cmd.fd < -1:
            raise KernelError(errno.EINVAL, f"flags {cmd.flags:#x}, fd {cmd.fd}")
        self.regions.ioeventfd(call, cmd.offset, cmd.data, width, cmd.fd)
        return 0

    # -- low power ---------------------------------------------------------------------------------------------------

    def device_feature(self, call: SystemCall, flags: int, data: int, argsz: int) -> int:
        """vfio_pci_core_ioctl_feature(). ENOTTY: any feature but the low-power ones."""
        feature = flags & VFIO_DEVICE_FEATURE_MASK
        if feature == VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY:
            if check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0):
                self._enter_low_power()
        elif feature == VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP:
            if check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, _WAKEUP.size):
                self._enter_low_power_with_wakeup(call, data)
        elif feature == VFIO_DEVICE_FEATURE_LOW_POWER_EXIT:
            if check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0):
                self._end_low_power()
        else:
            raise KernelError(errno.ENOTTY, f"no feature {feature}")
        return 0

    def _enter_low_power(self) -> None:
        if self.low_power:
            raise KernelError(errno.EINVAL, "the device is in low power")
        self.low_power = True

    def _enter_low_power_with_wakeup(self, call: SystemCall, data: int) -> None:
        """EFAULT. EINVAL: a negative eventfd. EBADF, EINVAL: the eventfd. EINVAL: in low power already."""
        fd, _ = _WAKEUP.unpack(call.copy_from_user(data, _WAKEUP.size))
        if fd < 0:
            raise KernelError(errno.EINVAL, f"eventfd {fd}")
        eventfd = eventfd_ctx_fdget(call, fd)
        try:
            self._enter_low_power()
        except KernelError:
            eventfd.put()
            raise
        self._wakeup = eventfd

    def _end_low_power(self) -> None:
        self.low_power = False
        if self._wakeup is not None:
            self._wakeup.put()
            self._wakeup = None


def _copy(call: SystemCall, arg: int, struct_type: type[S], minimum: int) -> S:
    """The first `minimum` bytes of a struct that starts with argsz. EFAULT; EINVAL: argsz is less than that."""
    cmd = struct_type()
    memoryview(cmd).cast("B")[:minimum] = call.copy_from_user(arg, minimum)
    argsz = int.from_bytes(bytes(cmd)[:4], "little")
    if argsz < minimum:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {minimum}")
    return cmd
