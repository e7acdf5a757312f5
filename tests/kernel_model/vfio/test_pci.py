"""vfio-pci in the model where the suite cannot take it: functions with other features than edu has."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fakedev.machine import Machine
from fakedev.pci import IO, MEM64, Bar, PciFunction
from kernel_model.kernel import Kernel
from uapi.backend import File
from uapi.vfio import (
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_DEVICE_FEATURE,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_SET,
    VFIO_DEVICE_FLAGS_RESET,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_RESET,
    VFIO_DEVICE_SET_IRQS,
    VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_MSI_IRQ_INDEX,
)

ADDRESS = "0000:00:05.0"
CONFIG = 7 << 40
TRIGGER = VFIO_IRQ_SET_ACTION_TRIGGER


class Memory(Bar):
    """A BAR that is memory."""

    def __init__(self, size: int, kind: str = MEM64) -> None:
        super().__init__(size, kind)
        self.words = bytearray(size)

    def read(self, offset: int, width: int) -> int:
        return int.from_bytes(self.words[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        self.words[offset : offset + width] = value.to_bytes(width, "little")


class Resettable(PciFunction):
    """Four MSI vectors, a 64-bit BAR, a small one, an I/O one, and a reset."""

    reset_methods = ("flr",)

    def __init__(self, address: str = ADDRESS) -> None:
        super().__init__(
            address,
            (0xABCD, 0x0001),
            0x020000,
            bars=[Memory(0x4000), None, Memory(0x100, "mem32"), Bar(32, IO)],
            addresses=[0x1_0000_0000, 0, 0xFEA0_0000, 0xC000],
            interrupt_pin=1,
            command=0x103,
        )
        self.add_msi(0x50, vectors_lg2=2)
        self.resets = 0

    def reset_device(self) -> None:
        self.resets += 1


def box(*functions: PciFunction) -> Machine:
    machine = Machine("test")
    unit = machine.add_vtd()
    for function in functions:
        machine.add(function, unit)
    return machine


def take(kernel: Kernel, address: str = ADDRESS) -> None:
    for path, text in (
        (f"/sys/bus/pci/devices/{address}/driver_override", b"vfio-pci"),
        ("/sys/bus/pci/drivers_probe", address.encode()),
    ):
        with kernel.open(path, os.O_WRONLY) as file:
            file.write(text)


@pytest.fixture
def function() -> Resettable:
    return Resettable()


@pytest.fixture
def kernel(function: Resettable) -> Iterator[Kernel]:
    with Kernel(box(function)) as kernel:
        take(kernel)
        yield kernel


@pytest.fixture
def device(kernel: Kernel) -> File:
    iommu = kernel.open("/dev/iommu")
    device = kernel.open("/dev/vfio/devices/vfio0")
    VFIO_DEVICE_BIND_IOMMUFD(device, iommufd=iommu.fileno())
    iommu.close()
    return device


def set_irqs(device: File, flags: int, start: int, count: int, data: bytes = b"") -> int:
    block = struct.pack("<5I", 20 + len(data), flags, VFIO_PCI_MSI_IRQ_INDEX, start, count) + data
    return VFIO_DEVICE_SET_IRQS.raw(device, bytearray(block))


def errno_of(call: Callable[..., object], *args: Any) -> int:
    """The errno of a call, 0 for success."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def eventfds(count: int) -> list[int]:
    return [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]


def count_of(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


# -- reset -------------------------------------------------------------------------------------------------------------


def test_opening_and_closing_reset_the_function(function: Resettable, device: File) -> None:
    assert function.resets == 1
    device.close()
    assert function.resets == 2


def test_reset_is_offered_and_keeps_the_configuration(function: Resettable, device: File) -> None:
    assert VFIO_DEVICE_GET_INFO(device).flags & VFIO_DEVICE_FLAGS_RESET
    device.pwrite(b"\x06\x00", CONFIG + 4)
    before = device.pread(64, CONFIG)
    assert VFIO_DEVICE_RESET.raw(device) == 0
    assert function.resets == 2
    assert device.pread(64, CONFIG) == before
    assert function.bar_address(0) == 0x1_0000_0000


def test_close_puts_the_configuration_back(function: Resettable, device: File) -> None:
    device.pwrite(b"\x06\x04", CONFIG + 4)
    device.close()
    assert bytes(function.config[4:6]) == b"\x03\x01"


# -- regions -----------------------------------------------------------------------------------------------------------


def test_region_sizes_and_what_can_be_mapped(device: File) -> None:
    found = [VFIO_DEVICE_GET_REGION_INFO(device, index=index) for index in range(4)]
    assert [(info.size, info.flags) for info in found] == [(0x4000, 7), (0, 0), (0x100, 7), (32, 3)]


def test_64_bit_bar_is_sized_over_two_registers(device: File) -> None:
    device.pwrite(b"\xff" * 8, CONFIG + 0x10)
    assert struct.unpack("<II", device.pread(8, CONFIG + 0x10)) == (0xFFFFC004, 0xFFFFFFFF)


def test_io_bar_keeps_its_kind(device: File) -> None:
    device.pwrite(b"\xff" * 4, CONFIG + 0x1C)
    assert struct.unpack("<I", device.pread(4, CONFIG + 0x1C)) == (0xFFFFFFE1,)


def test_page_of_a_small_bar_can_be_mapped_but_holds_no_more_than_it(device: File) -> None:
    with device.mmap(4096, 2 << 40) as mapping:
        mapping.write(0, 4, 77)
        assert mapping.read(0, 4) == 77
        mapping.write(0x100, 4, 78)
        assert mapping.read(0x100, 4) == 0xFFFFFFFF
    with pytest.raises(OSError, match="Invalid argument"):
        device.mmap(8192, 2 << 40)


def test_mapping_does_not_answer_while_memory_is_off_or_in_low_power(function: Resettable, device: File) -> None:
    """Linux sends SIGBUS."""
    with device.mmap(4096, 0) as mapping:
        for off, on in (((b"\0\0", 4), (b"\2\0", 4)), (LOW_POWER_ENTRY, LOW_POWER_EXIT)):
            mapping.write(0, 4, 5)
            change(device, off)
            mapping.write(0, 4, 6)
            assert mapping.read(0, 4) == 0xFFFFFFFF
            change(device, on)
            assert mapping.read(0, 4) == 5


LOW_POWER_ENTRY = struct.pack("<II", 8, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)
LOW_POWER_EXIT = struct.pack("<II", 8, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_EXIT)


def change(device: File, what: tuple[bytes, int] | bytes) -> None:
    """Write to configuration space, or call DEVICE_FEATURE."""
    if isinstance(what, bytes):
        VFIO_DEVICE_FEATURE.raw(device, bytearray(what))
    else:
        device.pwrite(what[0], CONFIG + what[1])


def test_write_goes_out_in_the_widest_accesses(function: Resettable, device: File) -> None:
    seen = []
    bar = function.bars[0]
    assert bar is not None
    bar.write = lambda offset, width, value: seen.append((offset, width))  # type: ignore[method-assign]
    device.pwrite(bytes(18), 3)
    assert seen == [(3, 1), (4, 4), (8, 8), (16, 4), (20, 1)]


# -- MSI with several vectors ------------------------------------------------------------------------------------------


def test_more_vectors_than_there_are_is_einval(device: File) -> None:
    assert VFIO_DEVICE_GET_IRQ_INFO(device, index=VFIO_PCI_MSI_IRQ_INDEX).count == 4
    assert errno_of(set_irqs, device, VFIO_IRQ_SET_DATA_NONE | TRIGGER, 0, 5) == errno.EINVAL


def test_each_vector_signals_its_own_eventfd(function: Resettable, device: File) -> None:
    fds = eventfds(3)
    set_irqs(device, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, 0, 3, struct.pack("<3i", *fds))
    device.pwrite(b"\x06\x00", CONFIG + 4)
    assert function.msi is not None
    function.msi.notify(0)
    function.msi.notify(2)
    assert [count_of(fd) for fd in fds] == [1, 0, 1]
    set_irqs(device, VFIO_IRQ_SET_DATA_BOOL | TRIGGER, 0, 3, b"\0\1\1")
    assert [count_of(fd) for fd in fds] == [0, 1, 1]


def test_failing_call_clears_its_vectors_up_to_the_failing_one(function: Resettable, device: File) -> None:
    first, second, third = eventfds(3)
    set_irqs(device, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, 0, 2, struct.pack("<2i", first, second))
    with os.fdopen(os.memfd_create("no eventfd")) as plain:
        data = struct.pack("<2i", third, plain.fileno())
        assert errno_of(set_irqs, device, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, 1, 2, data) == errno.EINVAL
    set_irqs(device, VFIO_IRQ_SET_DATA_NONE | TRIGGER, 0, 4)
    assert [count_of(fd) for fd in (first, second, third)] == [1, 0, 0]


def test_close_leaves_no_vector_behind(function: Resettable, kernel: Kernel, device: File) -> None:
    fds = eventfds(4)
    set_irqs(device, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, 0, 4, struct.pack("<4i", *fds))
    device.close()
    assert function.msi is not None
    assert not function.msi.enabled
    open_before = len(os.listdir("/proc/self/fd"))
    for fd in fds:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == open_before - 4


def test_full_eventfd_does_not_hang_the_model(device: File) -> None:
    fd = os.eventfd(0)
    os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
    set_irqs(device, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, 0, 1, struct.pack("<i", fd))
    set_irqs(device, VFIO_IRQ_SET_DATA_NONE | TRIGGER, 0, 1)
    os.close(fd)


# -- other clients, other releases -------------------------------------------------------------------------------------


def test_another_process_gives_eventfds_of_its_own(kernel: Kernel) -> None:
    with kernel.spawn() as client:
        iommu, device = client.open("/dev/iommu"), client.open("/dev/vfio/devices/vfio0")
        bind = bytearray(struct.pack("<IIiIQ", 24, 0, iommu.fileno(), 0, 0))
        device.ioctl(VFIO_DEVICE_BIND_IOMMUFD.number, bind)
        for fd, error in ((999, errno.EBADF), (iommu.fileno(), errno.EINVAL)):
            block = struct.pack("<5Ii", 24, VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER, VFIO_PCI_MSI_IRQ_INDEX, 0, 1, fd)
            assert errno_of(device.ioctl, VFIO_DEVICE_SET_IRQS.number, bytearray(block)) == error


def test_exit_of_a_process_unbinds_its_device(function: Resettable, kernel: Kernel) -> None:
    with kernel.spawn() as client:
        iommu, device = client.open("/dev/iommu"), client.open("/dev/vfio/devices/vfio0")
        bind = bytearray(struct.pack("<IIiIQ", 24, 0, iommu.fileno(), 0, 0))
        device.ioctl(VFIO_DEVICE_BIND_IOMMUFD.number, bind)
    with kernel.open("/dev/iommu") as own, kernel.open("/dev/vfio/devices/vfio0") as again:
        assert VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=own.fileno()).out_devid == 1


@pytest.mark.parametrize(("version", "error"), [("6.6", 0), ("6.12", 0), ("6.17", errno.E2BIG), ("7.3", errno.E2BIG)])
def test_bind_looks_at_its_tail_since_a_release(version: str, error: int) -> None:
    with Kernel(box(Resettable()), version=version) as kernel:
        take(kernel)
        with kernel.open("/dev/iommu") as iommu, kernel.open("/dev/vfio/devices/vfio0") as device:
            block = bytearray(struct.pack("<IIiIQ", 32, 0, iommu.fileno(), 0, 0) + bytes(7) + b"\1")
            assert errno_of(device.ioctl, VFIO_DEVICE_BIND_IOMMUFD.number, block) == error


def test_release_before_the_character_devices_has_no_vfio() -> None:
    with Kernel(box(Resettable()), version="6.5") as kernel, pytest.raises(FileNotFoundError):
        kernel.listdir("/sys/bus/pci/drivers/vfio-pci")
