"""Interrupts of a PCI function for a VFIO client: SET_IRQS.

Mirrors drivers/vfio/pci/vfio_pci_intrs.c. One of INTx and MSI is on at a time. INTx is level-triggered: when it
signals, it is masked by the function's Interrupt Disable bit until the client unmasks it.

Left out: MSI-X, interrupt bypass for KVM.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from fakedev.pci import PCI_INTERRUPT_PIN, PCI_STATUS, PCI_STATUS_INTERRUPT
from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.irq import pci_intx
from kernel_model.vfio.eventfd import EventFd, VirqFd, eventfd_ctx_fdget
from uapi.behaviours import has
from uapi.vfio import (
    VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK,
    VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS,
    VFIO_PCI_REQ_IRQ_INDEX,
)

if TYPE_CHECKING:
    from kernel_model.vfio.pci import VfioPciDevice

_HEADER = struct.Struct("<5I")
_U32_MAX = 0xFFFFFFFF
_DATA_SIZE = {VFIO_IRQ_SET_DATA_NONE: 0, VFIO_IRQ_SET_DATA_BOOL: 1, VFIO_IRQ_SET_DATA_EVENTFD: 4}


class PciInterrupts:
    """The interrupts of one open device."""

    def __init__(self, device: VfioPciDevice) -> None:
        self._device = device
        self._function = device.function
        self._irqs = device.kernel.interrupts
        #: The index that is on, or None.
        self.irq_type: int | None = None
        #: Whether the client disabled INTx in its command register.
        self.virq_disabled = False
        self.msi_qmax = 0
        self._masked = False
        self._trigger: EventFd | None = None
        self._unmask: VirqFd | None = None
        #: Who is signalled by each MSI vector, by the error and by the request signal.
        self._vectors: dict[int, EventFd] = {}
        self._single: dict[int, EventFd] = {}
        #: No endpoint of the model is PCI Express.
        self.has_error_signal = has(device.kernel.release, "error-irq-everywhere")
        #: A descriptor below 0 turns INTx on.
        self._intx_without_trigger = has(device.kernel.release, "intx-without-trigger")

    def count(self, index: int) -> int:
        """vfio_pci_get_irq_count(): how many vectors an index has."""
        if index == VFIO_PCI_INTX_IRQ_INDEX:
            return 1 if self._device.config.vconfig[PCI_INTERRUPT_PIN] else 0
        if index == VFIO_PCI_MSI_IRQ_INDEX:
            return self._function.msi.vectors if self._function.msi is not None else 0
        if index == VFIO_PCI_ERR_IRQ_INDEX:
            return int(self.has_error_signal)
        return int(index == VFIO_PCI_REQ_IRQ_INDEX)

    def set_irqs(self, call: SystemCall, arg: int) -> int:
        """VFIO_DEVICE_SET_IRQS: 0, or how many vectors there are when fewer than asked for.

        EFAULT; EINVAL: argsz, index, range, unknown flags, not one data type, too little data. EFAULT: the data.
        ENOTTY: not one action, or one that the index lacks. Then the index's own.
        """
        argsz, flags, index, start, count = _HEADER.unpack(call.copy_from_user(arg, _HEADER.size))
        vectors = self.count(index)
        known = VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK
        if argsz < _HEADER.size or index >= VFIO_PCI_NUM_IRQS or count >= _U32_MAX - start or flags & ~known:
            raise KernelError(errno.EINVAL, f"argsz {argsz}, index {index}, {start}+{count}, flags {flags:#x}")
        if start >= vectors or start + count > vectors:
            raise KernelError(errno.EINVAL, f"vectors {start}+{count} of {vectors}")
        size = _DATA_SIZE.get(flags & VFIO_IRQ_SET_DATA_TYPE_MASK)
        if size is None:
            raise KernelError(errno.EINVAL, "not exactly one data type")
        if argsz - _HEADER.size < count * size:
            raise KernelError(errno.EINVAL, f"{argsz - _HEADER.size} bytes of data for {count} vectors")
        data = bytes(call.copy_from_user(arg + _HEADER.size, count * size)) if count * size else b""
        action = flags & VFIO_IRQ_SET_ACTION_TYPE_MASK
        kind = flags & VFIO_IRQ_SET_DATA_TYPE_MASK
        if index == VFIO_PCI_INTX_IRQ_INDEX:
            if action == VFIO_IRQ_SET_ACTION_MASK:
                return self._set_intx_mask(start, count, kind, data)
            if action == VFIO_IRQ_SET_ACTION_UNMASK:
                return self._set_intx_unmask(call, start, count, kind, data)
        if action == VFIO_IRQ_SET_ACTION_TRIGGER:
            if index == VFIO_PCI_INTX_IRQ_INDEX:
                return self._set_intx_trigger(call, start, count, kind, data)
            if index in (VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX):
                return self._set_msi_trigger(call, index, start, count, kind, data)
            return self._set_single_trigger(call, index, start, count, kind, data)
        raise KernelError(errno.ENOTTY, f"action {action:#x} on index {index}")

    def disable(self) -> None:
        """Turn off what is on, as the close of the device does."""
        if self.irq_type == VFIO_PCI_INTX_IRQ_INDEX:
            self._intx_disable()
        elif self.irq_type is not None:
            self._msi_disable()
        self.virq_disabled = False
        for eventfd in self._single.values():
            eventfd.put()
        self._single.clear()

    # -- INTx --------------------------------------------------------------------------------------------------------

    @property
    def _is_intx(self) -> bool:
        return self.irq_type == VFIO_PCI_INTX_IRQ_INDEX

    def _send_intx(self) -> None:
        if self._is_intx and not self.virq_disabled and self._trigger is not None:
            self._trigger.signal()

    def intx_mask(self) -> None:
        """Keep the line back. The function's bit follows the client's even while INTx is off."""
        if not self._is_intx:
            pci_intx(self._function, False)
        elif not self._masked:
            self._masked = True
            pci_intx(self._function, False)

    def intx_unmask(self) -> None:
        """Let the line through; if it is up, signal again instead."""
        if not self._is_intx:
            pci_intx(self._function, True)
        elif self._masked and not self.virq_disabled:
            if self._function.config[PCI_STATUS] & PCI_STATUS_INTERRUPT:
                self._send_intx()
            else:
                self._masked = False
                pci_intx(self._function, True)

    def _intx_handler(self) -> None:
        if not self._masked:
            self._masked = True
            pci_intx(self._function, False)
            self._send_intx()

    def _intx_enable(self, trigger: EventFd | None) -> None:
        self._trigger = trigger
        self._masked = self.virq_disabled
        self.irq_type = VFIO_PCI_INTX_IRQ_INDEX
        pci_intx(self._function, not self._masked)
        self._irqs.request_intx(self._function, self._intx_handler)

    def _intx_disable(self) -> None:
        self._drop_unmask()
        self._irqs.free_intx(self._function)
        if self._trigger is not None:
            self._trigger.put()
            self._trigger = None
        self.irq_type = None

    def _drop_unmask(self) -> None:
        if self._unmask is not None:
            self._unmask.disable()
            self._unmask = None

    def _require_intx(self, start: int, count: int) -> None:
        if not self._is_intx or start != 0 or count != 1:
            raise KernelError(errno.EINVAL, "INTx is off, or not its one vector is meant")

    def _set_intx_mask(self, start: int, count: int, kind: int, data: bytes) -> int:
        """EINVAL: INTx is off, or count is not 1. ENOTTY: by eventfd."""
        self._require_intx(start, count)
        if kind == VFIO_IRQ_SET_DATA_EVENTFD:
            raise KernelError(errno.ENOTTY, "INTx cannot be masked by an eventfd")
        if kind == VFIO_IRQ_SET_DATA_NONE or data[0]:
            self.intx_mask()
        return 0

    def _set_intx_unmask(self, call: SystemCall, start: int, count: int, kind: int, data: bytes) -> int:
        """EINVAL: INTx is off, or count is not 1. EBADF, EINVAL: the eventfd. EBUSY: there is one."""
        self._require_intx(start, count)
        if kind == VFIO_IRQ_SET_DATA_EVENTFD:
            (fd,) = struct.unpack("<i", data)
            if fd < 0:
                self._drop_unmask()
            elif self._unmask is not None:
                eventfd_ctx_fdget(call, fd).put()
                raise KernelError(errno.EBUSY, "an eventfd unmasks already")
            else:
                self._unmask = VirqFd(call, fd, self.intx_unmask)
        elif kind == VFIO_IRQ_SET_DATA_NONE or data[0]:
            self.intx_unmask()
        return 0

    def _set_intx_trigger(self, call: SystemCall, start: int, count: int, kind: int, data: bytes) -> int:
        """EINVAL: MSI is on, not the one vector, or a loopback while INTx is off. EBADF, EINVAL: the eventfd."""
        if self._is_intx and not count and kind == VFIO_IRQ_SET_DATA_NONE:
            self._intx_disable()
            return 0
        if self.irq_type not in (None, VFIO_PCI_INTX_IRQ_INDEX) or start != 0 or count != 1:
            raise KernelError(errno.EINVAL, "MSI is on, or not INTx's one vector is meant")
        if kind == VFIO_IRQ_SET_DATA_EVENTFD:
            (fd,) = struct.unpack("<i", data)
            trigger = eventfd_ctx_fdget(call, fd) if fd >= 0 else None
            if self._is_intx:
                old, self._trigger = self._trigger, trigger
                if old is not None:
                    old.put()
            elif trigger is not None or self._intx_without_trigger:
                self._intx_enable(trigger)
            return 0
        if not self._is_intx:
            raise KernelError(errno.EINVAL, "INTx is off")
        if kind == VFIO_IRQ_SET_DATA_NONE or data[0]:
            self._send_intx()
        return 0

    # -- MSI ---------------------------------------------------------------------------------------------------------

    def _set_msi_trigger(self, call: SystemCall, index: int, start: int, count: int, kind: int, data: bytes) -> int:
        """EINVAL: INTx is on, or this is off and something else is asked than to turn it on. ERANGE: on with no vector.

        EBADF, EINVAL: an eventfd; then all vectors of the call are cleared, and a first call turns nothing on.
        """
        is_on = self.irq_type == index
        if is_on and not count and kind == VFIO_IRQ_SET_DATA_NONE:
            self._msi_disable()
            return 0
        if self.irq_type not in (None, index):
            raise KernelError(errno.EINVAL, "another kind of interrupt is on")
        if kind == VFIO_IRQ_SET_DATA_EVENTFD:
            fds = struct.unpack(f"<{count}i", data)
            if is_on:
                self._msi_set_block(call, start, fds)
                return 0
            available = self._msi_enable(start + count)
            if available:
                return available
            try:
                self._msi_set_block(call, start, fds)
            except KernelError:
                self._msi_disable()
                raise
            return 0
        if not is_on:
            raise KernelError(errno.EINVAL, "MSI is off")
        for position in range(count):
            eventfd = self._vectors.get(start + position)
            if eventfd is not None and (kind == VFIO_IRQ_SET_DATA_NONE or data[position]):
                eventfd.signal()
        return 0

    def _msi_enable(self, wanted: int) -> int:
        """Turn MSI on; 0, or the number of vectors where it is less than wanted. ERANGE: none is wanted."""
        available = self._irqs.pci_alloc_irq_vectors(self._function, wanted)
        if available < wanted:
            self._irqs.pci_free_irq_vectors(self._function)
            return available
        self.irq_type = VFIO_PCI_MSI_IRQ_INDEX
        self.msi_qmax = (wanted - 1).bit_length()
        return 0

    def _msi_disable(self) -> None:
        for vector in list(self._vectors):
            self._msi_clear(vector)
        self._irqs.pci_free_irq_vectors(self._function)
        self.irq_type = None

    def _msi_set_block(self, call: SystemCall, start: int, fds: tuple[int, ...]) -> None:
        done = start
        try:
            for fd in fds:
                self._msi_clear(done)
                done += 1
                if fd >= 0:
                    irq = self._irqs.pci_irq_vector(self._function, done - 1)
                    trigger = eventfd_ctx_fdget(call, fd)
                    self._irqs.request_irq(irq, trigger.signal)
                    self._vectors[done - 1] = trigger
        except KernelError:
            for vector in range(start, done):
                self._msi_clear(vector)
            raise

    def _msi_clear(self, vector: int) -> None:
        old = self._vectors.pop(vector, None)
        if old is not None:
            self._irqs.free_irq(self._irqs.pci_irq_vector(self._function, vector))
            old.put()

    # -- error and request -------------------------------------------------------------------------------------------

    def _set_single_trigger(self, call: SystemCall, index: int, start: int, count: int, kind: int, data: bytes) -> int:
        """EINVAL: a loopback without eventfd, data for no vector, a descriptor below -1. EBADF, EINVAL: the eventfd."""
        current = self._single.get(index)
        if kind == VFIO_IRQ_SET_DATA_NONE:
            if current is None:
                raise KernelError(errno.EINVAL, "no eventfd is set")
            if count:
                current.signal()
            else:
                self._replace_single(index, None)
            return 0
        if not count:
            raise KernelError(errno.EINVAL, "data for no vector")
        if kind == VFIO_IRQ_SET_DATA_BOOL:
            if data[0] and current is not None:
                current.signal()
            return 0
        (fd,) = struct.unpack("<i", data)
        if fd < -1:
            raise KernelError(errno.EINVAL, f"descriptor {fd}")
        self._replace_single(index, eventfd_ctx_fdget(call, fd) if fd >= 0 else None)
        return 0

    def _replace_single(self, index: int, eventfd: EventFd | None) -> None:
        old = self._single.pop(index, None)
        if old is not None:
            old.put()
        if eventfd is not None:
            self._single[index] = eventfd
