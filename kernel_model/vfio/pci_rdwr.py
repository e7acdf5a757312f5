"""Access to BARs: pread, pwrite, mappings, and stores that an eventfd triggers.

Mirrors drivers/vfio/pci/vfio_pci_rdwr.c and the mmap half of vfio_pci_core.c. An access is cut into loads or stores of
8, 4, 2 or 1 bytes, as wide as alignment and length allow; each asks whether the client has memory on.

Where Linux sends SIGBUS (a mapping is touched while memory is off, or in low power), a load gives all ones and a store
is dropped.

Left out: the MSI-X table's hole, expansion ROMs, VGA, I/O port BARs.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fakedev.pci import Bar
from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.vfio.eventfd import VirqFd
from uapi.backend import MAP_SHARED
from uapi.behaviours import has
from uapi.vfio import VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_NUM_REGIONS

if TYPE_CHECKING:
    from kernel_model.vfio.pci import VfioPciDevice

PAGE_SIZE = 4096
OFFSET_SHIFT = 40
OFFSET_MASK = (1 << OFFSET_SHIFT) - 1
#: VFIO_PCI_IOEVENTFD_MAX
IOEVENTFD_MAX = 1000


class BarMapping:
    """A mapping of part of a BAR."""

    def __init__(self, regions: BarRegions, bar: Bar, start: int) -> None:
        self._regions = regions
        self._bar = bar
        self._start = start

    def read(self, offset: int, width: int) -> int:
        at = self._start + offset
        if not self._regions.can_be_touched or at + width > self._bar.size:
            return (1 << 8 * width) - 1
        return self._bar.read(at, width)

    def write(self, offset: int, width: int, value: int) -> None:
        at = self._start + offset
        if self._regions.can_be_touched and at + width <= self._bar.size:
            self._bar.write(at, width, value)

    def unmapped(self) -> None:
        """Nothing to do: the registers know no mappings."""


class IoEventFd:
    """`struct vfio_pci_ioeventfd`: a store that an eventfd triggers."""

    def __init__(self, regions: BarRegions, bar: Bar, position: int, width: int, data: int) -> None:
        self._regions = regions
        self._bar = bar
        self._position = position
        self._width = width
        self._data = data & (1 << 8 * width) - 1
        self.virqfd: VirqFd

    def fire(self) -> None:
        if self._regions.memory_enabled:
            self._bar.write(self._position, self._width, self._data)


class BarRegions:
    """The BARs of one open device."""

    def __init__(self, device: VfioPciDevice) -> None:
        self._device = device
        self._bars = device.function.bars
        self._ioeventfds: dict[tuple[int, int, int, int], IoEventFd] = {}
        self._widths = (8, 4, 2, 1) if has(device.kernel.release, "bar-access-64-bits") else (4, 2, 1)

    @property
    def memory_enabled(self) -> bool:
        return self._device.config.memory_enabled

    @property
    def can_be_touched(self) -> bool:
        """vfio_pci_vmf_insert_pfn(): whether a page of a mapping can be faulted in."""
        return not self._device.low_power and self.memory_enabled

    def is_mappable(self, index: int) -> bool:
        """vfio_pci_probe_mmaps(): memory, and a page of its own."""
        bar = self._bars[index]
        if bar is None or not bar.is_memory:
            return False
        return bar.size >= PAGE_SIZE or self._device.function.bar_address(index) % PAGE_SIZE == 0

    def _bar(self, index: int) -> Bar:
        bar = self._bars[index]
        if bar is None or not self._device.function.bar_address(index):
            raise KernelError(errno.EINVAL, f"there is no BAR {index}")
        return bar

    def _accesses(self, index: int, position: int, count: int) -> tuple[Bar, list[tuple[int, int]]]:
        """The accesses for a range. EINVAL: no such BAR, or the range starts beyond it; its end is cut off."""
        bar = self._bar(index)
        if position >= bar.size:
            raise KernelError(errno.EINVAL, f"{position:#x} is beyond BAR {index}")
        end = position + min(count, bar.size - position)
        found = []
        while position < end:
            width = next(w for w in self._widths if position % w == 0 and position + w <= end)
            found.append((position, width))
            position += width
        return bar, found

    def _require_memory(self, bar: Bar) -> None:
        if bar.is_memory and not self.memory_enabled:
            raise KernelError(errno.EIO, "memory decoding is off")

    def read(self, index: int, position: int, count: int) -> bytes:
        """vfio_pci_bar_rw() for reading. EINVAL: no BAR, or beyond it. EIO: memory is off."""
        bar, accesses = self._accesses(index, position, count)
        data = bytearray()
        for at, width in accesses:
            self._require_memory(bar)
            data += bar.read(at, width).to_bytes(width, "little")
        return bytes(data)

    def write(self, index: int, position: int, data: bytes | bytearray | memoryview) -> int:
        """vfio_pci_bar_rw() for writing: the bytes written. Errnos as `read`."""
        bar, accesses = self._accesses(index, position, len(data))
        done = 0
        for at, width in accesses:
            self._require_memory(bar)
            bar.write(at, width, int.from_bytes(data[done : done + width], "little"))
            done += width
        return done

    def mmap(self, length: int, offset: int, flags: int) -> BarMapping:
        """vfio_pci_core_mmap(). EINVAL: not shared, no BAR with a page of its own, or beyond its last page."""
        index, start = offset >> OFFSET_SHIFT, offset & OFFSET_MASK
        if index >= VFIO_PCI_NUM_REGIONS or not flags & MAP_SHARED:
            raise KernelError(errno.EINVAL, f"a mapping of region {index} with flags {flags:#x}")
        if index > VFIO_PCI_BAR5_REGION_INDEX or not self.is_mappable(index):
            raise KernelError(errno.EINVAL, f"region {index} cannot be mapped")
        bar = self._bar(index)
        if start + length > -(-bar.size // PAGE_SIZE) * PAGE_SIZE:
            raise KernelError(errno.EINVAL, f"{start:#x}+{length:#x} leaves BAR {index}")
        return BarMapping(self, bar, start)

    # -- ioeventfd ---------------------------------------------------------------------------------------------------

    def ioeventfd(self, call: SystemCall, offset: int, data: int, width: int, fd: int) -> None:
        """vfio_pci_ioeventfd(): add a store, or remove it (fd -1).

        EINVAL: not within a BAR. EEXIST: there is the same. ENODEV: there is none to remove. ENOSPC: 1000 are there.
        EBADF, EINVAL: the eventfd.
        """
        index, position = offset >> OFFSET_SHIFT, offset & OFFSET_MASK
        bar = self._bars[index] if index <= VFIO_PCI_BAR5_REGION_INDEX else None
        if bar is None or position + width > bar.size:
            raise KernelError(errno.EINVAL, f"{width} bytes at {offset:#x} are not within a BAR")
        key = (index, position, data, width)
        if key in self._ioeventfds:
            if fd != -1:
                raise KernelError(errno.EEXIST, "the same store has an eventfd already")
            self._ioeventfds.pop(key).virqfd.disable()
            return
        if fd < 0:
            raise KernelError(errno.ENODEV, "no such store has an eventfd")
        if len(self._ioeventfds) >= IOEVENTFD_MAX:
            raise KernelError(errno.ENOSPC, f"{IOEVENTFD_MAX} stores have eventfds")
        ioeventfd = IoEventFd(self, bar, position, width, data)
        ioeventfd.virqfd = VirqFd(call, fd, ioeventfd.fire)
        self._ioeventfds[key] = ioeventfd

    def close(self) -> None:
        """The device closes: no eventfd stores any more."""
        for ioeventfd in self._ioeventfds.values():
            ioeventfd.virqfd.disable()
        self._ioeventfds.clear()
