"""SET_IRQS of a vfio-pci device: the checks in their order, MSI, INTx, and the error and request signals.

Sources: drivers/vfio/vfio_main.c (`vfio_set_irqs_validate_and_prepare`), pci/vfio_pci_core.c (`..._set_irqs`),
pci/vfio_pci_intrs.c. edu has one INTx pin, one MSI vector and no MSI-X.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from conformance.arena import arena
from conformance.drivers.edu import Edu, signals
from conformance.drivers.vfio import PCI_COMMAND_MASTER, VfioDevice, irq_set
from conformance.steps import NOWHERE, fails
from uapi.vfio import (
    VFIO_DEVICE_SET_IRQS,
    VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

NONE, BOOL, EVENTFD = VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD
MASK, UNMASK, TRIGGER = VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_ACTION_TRIGGER
INTX, MSI, MSIX = VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX
ERR, REQ = VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX
#: No signal is expected: how long to wait for one that must not come, in seconds.
SILENCE = 0.05
BAD_FD = 0x7FFFFFFF


@pytest.fixture
def attached(device: VfioDevice, ioas: int) -> VfioDevice:
    """The device where it can have MSIs: on Arm the domain that it is in has to map the doorbell.

    Where it has not, turning them on is ENOSPC; 7.3.4 then has lost the vector for good (`its_irq_domain_alloc()` does
    not give back what it took), so that no test here asks for it.
    """
    device.attach(ioas)
    return device


@pytest.fixture
def second() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def plain_file() -> Iterator[int]:
    """A descriptor that is no eventfd."""
    fd = os.memfd_create("iommulab")
    yield fd
    os.close(fd)


def fds(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


# ------------------------------------------------------------------------------------------------- checks, in order


def test_argument_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_SET_IRQS.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 19])
def test_argsz_below_20_is_einval(device: VfioDevice, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_SET_IRQS.raw(device.file, irq_set(NONE | TRIGGER, MSI, 0, 0, argsz=argsz))


@pytest.mark.parametrize("index", [5, 6, 0xFFFFFFFF])
def test_index_that_does_not_exist_is_einval(device: VfioDevice, index: int) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(NONE | TRIGGER, index, 0, 0)


@pytest.mark.parametrize("flag", [64, 1 << 31])
def test_unknown_flag_is_einval(device: VfioDevice, flag: int) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(NONE | TRIGGER | flag, REQ, 0, 1)


@pytest.mark.parametrize(
    ("start", "count"),
    [(1, 0), (1, 1), (0, 2), (0xFFFFFFFF, 1), (0xFFFFFFFF, 0xFFFFFFFF), (0, 0xFFFFFFFF), (1, 0xFFFFFFFE)],
)
def test_vectors_beyond_the_last_are_einval(device: VfioDevice, start: int, count: int) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(NONE | TRIGGER, MSI, start, count)


def test_an_index_without_vectors_cannot_even_be_disabled(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(NONE | TRIGGER, MSIX, 0, 0)


@pytest.mark.parametrize("data", [0, NONE | BOOL, BOOL | EVENTFD, NONE | BOOL | EVENTFD])
def test_data_type_must_be_exactly_one(device: VfioDevice, data: int) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(data | TRIGGER, REQ, 0, 1, bytes(8))


@pytest.mark.parametrize(("data", "argsz"), [(BOOL, 20), (EVENTFD, 20), (EVENTFD, 23)])
def test_data_shorter_than_count_is_einval(device: VfioDevice, data: int, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_SET_IRQS.raw(device.file, irq_set(data | TRIGGER, REQ, 0, 1, bytes(8), argsz=argsz))


def test_data_that_cannot_be_read_is_efault(device: VfioDevice) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 20, bytes(irq_set(EVENTFD | TRIGGER, MSI, 0, 1, argsz=24)))
        with fails(errno.EFAULT):
            VFIO_DEVICE_SET_IRQS.raw(device.file, memory.page(1) - 20)


def test_data_is_read_before_the_action_is_looked_at(device: VfioDevice) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 20, bytes(irq_set(EVENTFD, MSI, 0, 1, argsz=24)))
        with fails(errno.EFAULT):
            VFIO_DEVICE_SET_IRQS.raw(device.file, memory.page(1) - 20)


def test_data_none_reads_no_data(device: VfioDevice) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 20, bytes(irq_set(NONE | TRIGGER, REQ, 0, 1, argsz=5000)))
        with fails(errno.EINVAL):  # from the request signal that has no eventfd
            VFIO_DEVICE_SET_IRQS.raw(device.file, memory.page(1) - 20)


@pytest.mark.parametrize("action", [0, MASK | UNMASK, MASK | TRIGGER, UNMASK | TRIGGER, MASK | UNMASK | TRIGGER])
@pytest.mark.parametrize("index", [INTX, MSI, REQ], ids=["intx", "msi", "req"])
def test_action_must_be_exactly_one(device: VfioDevice, index: int, action: int) -> None:
    with fails(errno.ENOTTY):
        device.set_irqs(NONE | action, index, 0, 1)


@pytest.mark.parametrize("action", [MASK, UNMASK], ids=["mask", "unmask"])
@pytest.mark.parametrize(
    "index", [MSI, pytest.param(ERR, marks=pytest.mark.since("7.3")), REQ], ids=["msi", "err", "req"]
)
def test_only_intx_can_be_masked(device: VfioDevice, index: int, action: int) -> None:
    with fails(errno.ENOTTY):
        device.set_irqs(NONE | action, index, 0, 1)


# -------------------------------------------------------------------------------------------------------------- MSI


def test_msi_disable_when_off_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.disable_irqs(MSI)


def test_msi_disable_twice_is_einval(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.disable_irqs(MSI)
    with fails(errno.EINVAL):
        attached.disable_irqs(MSI)


@pytest.mark.parametrize(("data", "payload"), [(NONE, b""), (BOOL, b"\1")], ids=["none", "bool"])
def test_msi_loopback_when_off_is_einval(device: VfioDevice, data: int, payload: bytes) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(data | TRIGGER, MSI, 0, 1, payload)


def test_msi_enable_with_no_vectors_is_erange(device: VfioDevice) -> None:
    with fails(errno.ERANGE):
        device.set_irqs(EVENTFD | TRIGGER, MSI, 0, 0)


def test_msi_loopback_none_signals(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd) == 2


def test_msi_loopback_bool_signals_where_it_is_nonzero(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.set_irqs(BOOL | TRIGGER, MSI, 0, 1, b"\0")
    assert signals(eventfd, SILENCE) == 0
    attached.set_irqs(BOOL | TRIGGER, MSI, 0, 1, b"\x80")
    assert signals(eventfd) == 1


def test_msi_with_bad_descriptor_is_ebadf_and_stays_off(attached: VfioDevice) -> None:
    with fails(errno.EBADF):
        attached.signal_on(MSI, [BAD_FD])
    with fails(errno.EINVAL):
        attached.disable_irqs(MSI)


def test_msi_with_another_kind_of_file_is_einval_and_stays_off(attached: VfioDevice, plain_file: int) -> None:
    with fails(errno.EINVAL):
        attached.signal_on(MSI, [plain_file])
    with fails(errno.EINVAL):
        attached.disable_irqs(MSI)


@pytest.mark.parametrize("fd", [-1, -2])
def test_msi_enabled_without_eventfd_is_on_and_silent(attached: VfioDevice, fd: int) -> None:
    attached.signal_on(MSI, [fd])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    attached.disable_irqs(MSI)


def test_msi_signals_the_eventfd_of_the_latest_call(attached: VfioDevice, eventfd: int, second: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.signal_on(MSI, [second])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(second) == 1
    assert signals(eventfd, SILENCE) == 0


def test_msi_vector_is_cleared_by_a_negative_descriptor(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.signal_on(MSI, [-1])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd, SILENCE) == 0
    attached.disable_irqs(MSI)


def test_msi_vector_is_cleared_by_a_failing_call_but_msi_stays_on(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    with fails(errno.EBADF):
        attached.signal_on(MSI, [BAD_FD])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd, SILENCE) == 0
    attached.disable_irqs(MSI)


def test_msi_eventfd_call_with_no_vectors_changes_nothing_while_on(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.set_irqs(EVENTFD | TRIGGER, MSI, 0, 0)
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd) == 1


def test_msi_can_be_enabled_again(attached: VfioDevice, eventfd: int) -> None:
    for _ in range(3):
        attached.signal_on(MSI, [eventfd])
        attached.disable_irqs(MSI)
    attached.signal_on(MSI, [eventfd])
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd) == 1


def test_msi_eventfd_outlives_the_callers_descriptor(attached: VfioDevice, eventfd: int) -> None:
    duplicate = os.dup(eventfd)
    attached.signal_on(MSI, [duplicate])
    os.close(duplicate)
    attached.set_irqs(NONE | TRIGGER, MSI, 0, 1)
    assert signals(eventfd) == 1


def test_close_turns_msi_off(attached: VfioDevice, kernel: object, iommu: object, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.close()
    again = VfioDevice(kernel, attached.address)  # type: ignore[arg-type]
    again.bind(iommu)  # type: ignore[arg-type]
    with fails(errno.EINVAL):
        again.disable_irqs(MSI)
    again.close()


def test_device_msi_reaches_the_eventfd(edu: Edu) -> None:
    eventfd = edu.enable_msi()
    edu.raise_irq(0x5)
    assert signals(eventfd) == 1
    assert edu.irq_status() == 0x5
    edu.acknowledge(0x5)
    assert edu.irq_status() == 0


def test_every_device_msi_counts(edu: Edu) -> None:
    eventfd = edu.enable_msi()
    for bit in (1, 2, 4):
        edu.raise_irq(bit)
        assert signals(eventfd) == 1
    edu.acknowledge(7)
    assert signals(eventfd, SILENCE) == 0


@pytest.mark.needs("vtd")
def test_device_msi_needs_no_attachment(device: VfioDevice) -> None:
    edu = Edu(device)
    eventfd = edu.enable_msi()
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)
    edu.remove()


def test_device_msi_needs_bus_master(edu: Edu) -> None:
    eventfd = edu.enable_msi()
    edu.vfio.disable(PCI_COMMAND_MASTER)
    edu.raise_irq(1)
    assert signals(eventfd, SILENCE) == 0
    edu.vfio.enable(PCI_COMMAND_MASTER)
    edu.acknowledge(1)


def test_device_msi_after_disable_is_not_seen(edu: Edu) -> None:
    eventfd = edu.enable_msi()
    edu.vfio.disable_irqs(MSI)
    edu.raise_irq(1)
    assert signals(eventfd, SILENCE) == 0
    edu.acknowledge(1)
    edu.vfio.signal_on(MSI, [eventfd])


# ------------------------------------------------------------------------------------------------------------- INTx


def test_intx_loopback_signals(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
    device.set_irqs(BOOL | TRIGGER, INTX, 0, 1, b"\0")
    device.set_irqs(BOOL | TRIGGER, INTX, 0, 1, b"\1")
    assert signals(eventfd) == 2


@pytest.mark.parametrize("action", [MASK, UNMASK, TRIGGER], ids=["mask", "unmask", "trigger"])
@pytest.mark.parametrize(("data", "payload"), [(NONE, b""), (BOOL, b"\1")], ids=["none", "bool"])
def test_intx_when_off_is_einval(device: VfioDevice, action: int, data: int, payload: bytes) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(data | action, INTX, 0, 1, payload)


def test_intx_disable_when_off_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.disable_irqs(INTX)


def test_intx_disable_twice_is_einval(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    device.disable_irqs(INTX)
    with fails(errno.EINVAL):
        device.disable_irqs(INTX)


@pytest.mark.parametrize("action", [MASK, UNMASK], ids=["mask", "unmask"])
def test_intx_mask_of_no_vector_is_einval(device: VfioDevice, eventfd: int, action: int) -> None:
    device.signal_on(INTX, [eventfd])
    with fails(errno.EINVAL):
        device.set_irqs(NONE | action, INTX, 0, 0)


def test_intx_eventfd_call_with_no_vector_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.set_irqs(EVENTFD | TRIGGER, INTX, 0, 0)


def test_intx_with_bad_descriptor_is_ebadf_and_stays_off(device: VfioDevice) -> None:
    with fails(errno.EBADF):
        device.signal_on(INTX, [BAD_FD])
    with fails(errno.EINVAL):
        device.disable_irqs(INTX)


def test_intx_with_another_kind_of_file_is_einval(device: VfioDevice, plain_file: int) -> None:
    with fails(errno.EINVAL):
        device.signal_on(INTX, [plain_file])


@pytest.mark.since("6.9")
def test_intx_with_negative_descriptor_turns_it_on(device: VfioDevice) -> None:
    device.signal_on(INTX, [-1])
    device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
    device.disable_irqs(INTX)


def test_intx_bad_descriptor_keeps_the_former_one(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    with fails(errno.EBADF):
        device.signal_on(INTX, [BAD_FD])
    device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
    assert signals(eventfd) == 1


def test_intx_signals_the_eventfd_of_the_latest_call(device: VfioDevice, eventfd: int, second: int) -> None:
    device.signal_on(INTX, [eventfd])
    device.signal_on(INTX, [second])
    device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
    assert (signals(second), signals(eventfd, SILENCE)) == (1, 0)


def test_intx_while_msi_is_on_is_einval(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    with fails(errno.EINVAL):
        attached.signal_on(INTX, [eventfd])
    with fails(errno.EINVAL):
        attached.disable_irqs(INTX)


def test_msi_while_intx_is_on_is_einval(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    with fails(errno.EINVAL):
        device.signal_on(MSI, [eventfd])
    with fails(errno.EINVAL):
        device.disable_irqs(MSI)


def test_intx_mask_by_eventfd_is_enotty(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    with fails(errno.ENOTTY):
        device.set_irqs(EVENTFD | MASK, INTX, 0, 1, fds(eventfd))


def test_intx_masking_is_idempotent_and_does_not_stop_the_loopback(device: VfioDevice, eventfd: int) -> None:
    device.signal_on(INTX, [eventfd])
    device.set_irqs(NONE | MASK, INTX, 0, 1)
    device.set_irqs(BOOL | MASK, INTX, 0, 1, b"\1")
    device.set_irqs(NONE | TRIGGER, INTX, 0, 1)
    assert signals(eventfd) == 1
    device.set_irqs(BOOL | UNMASK, INTX, 0, 1, b"\0")
    device.set_irqs(NONE | UNMASK, INTX, 0, 1)
    device.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert signals(eventfd, SILENCE) == 0


def test_intx_unmask_eventfd_is_installed_once(device: VfioDevice, eventfd: int, second: int) -> None:
    device.signal_on(INTX, [eventfd])
    device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(second))
    with fails(errno.EBUSY):
        device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(second))
    device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(-1))
    device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(-1))
    device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(second))


def test_intx_unmask_eventfd_must_be_one(device: VfioDevice, eventfd: int, plain_file: int) -> None:
    device.signal_on(INTX, [eventfd])
    with fails(errno.EBADF):
        device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(BAD_FD))
    with fails(errno.EINVAL):
        device.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(plain_file))


def test_device_intx_signals_once_and_again_after_unmask(edu: Edu, eventfd: int) -> None:
    edu.vfio.signal_on(INTX, [eventfd])
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    assert signals(eventfd, SILENCE) == 0  # the line is still up, and masked
    edu.vfio.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)
    edu.vfio.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert signals(eventfd, SILENCE) == 0
    edu.raise_irq(2)
    assert signals(eventfd) == 1
    edu.acknowledge(2)


def test_device_intx_waits_while_masked(edu: Edu, eventfd: int) -> None:
    edu.vfio.signal_on(INTX, [eventfd])
    edu.vfio.set_irqs(NONE | MASK, INTX, 0, 1)
    edu.raise_irq(1)
    assert signals(eventfd, SILENCE) == 0
    edu.vfio.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)


def test_device_intx_is_unmasked_by_an_eventfd(edu: Edu, eventfd: int, second: int) -> None:
    edu.vfio.signal_on(INTX, [eventfd])
    edu.vfio.set_irqs(EVENTFD | UNMASK, INTX, 0, 1, fds(second))
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    os.eventfd_write(second, 1)
    edu.irq_status()  # any call: the model looks at its eventfds when it is called
    assert signals(eventfd) == 1
    edu.acknowledge(1)


def test_device_intx_respects_the_virtual_disable_bit(edu: Edu, eventfd: int) -> None:
    edu.vfio.signal_on(INTX, [eventfd])
    edu.vfio.enable(0x400)
    edu.raise_irq(1)
    assert signals(eventfd, SILENCE) == 0
    edu.vfio.disable(0x400)
    assert signals(eventfd) == 1
    edu.acknowledge(1)


# ------------------------------------------------------------------------------------------------ error and request


@pytest.mark.parametrize("index", [pytest.param(ERR, marks=pytest.mark.since("7.3")), REQ], ids=["err", "req"])
class TestSingleSignal:
    """The error and the request signal share their rules."""

    def test_loopback_signals(self, device: VfioDevice, eventfd: int, index: int) -> None:
        device.signal_on(index, [eventfd])
        device.set_irqs(NONE | TRIGGER, index, 0, 1)
        device.set_irqs(BOOL | TRIGGER, index, 0, 1, b"\1")
        device.set_irqs(BOOL | TRIGGER, index, 0, 1, b"\0")
        assert signals(eventfd) == 2

    def test_loopback_none_without_eventfd_is_einval(self, device: VfioDevice, index: int) -> None:
        with fails(errno.EINVAL):
            device.set_irqs(NONE | TRIGGER, index, 0, 1)

    def test_loopback_bool_without_eventfd_does_nothing(self, device: VfioDevice, index: int) -> None:
        device.set_irqs(BOOL | TRIGGER, index, 0, 1, b"\1")

    def test_clear_when_unset_is_einval(self, device: VfioDevice, index: int) -> None:
        with fails(errno.EINVAL):
            device.disable_irqs(index)

    def test_clear_by_count_zero(self, device: VfioDevice, eventfd: int, index: int) -> None:
        device.signal_on(index, [eventfd])
        device.disable_irqs(index)
        with fails(errno.EINVAL):
            device.set_irqs(NONE | TRIGGER, index, 0, 1)

    def test_clear_by_descriptor_minus_one(self, device: VfioDevice, eventfd: int, index: int) -> None:
        device.signal_on(index, [eventfd])
        device.signal_on(index, [-1])
        with fails(errno.EINVAL):
            device.set_irqs(NONE | TRIGGER, index, 0, 1)

    def test_clear_by_descriptor_minus_one_when_unset(self, device: VfioDevice, index: int) -> None:
        device.signal_on(index, [-1])

    @pytest.mark.parametrize("fd", [-2, -0x80000000])
    def test_other_negative_descriptor_is_einval(self, device: VfioDevice, index: int, fd: int) -> None:
        with fails(errno.EINVAL):
            device.signal_on(index, [fd])

    def test_bad_descriptor_keeps_the_former_one(
        self, device: VfioDevice, eventfd: int, plain_file: int, index: int
    ) -> None:
        device.signal_on(index, [eventfd])
        with fails(errno.EBADF):
            device.signal_on(index, [BAD_FD])
        with fails(errno.EINVAL):
            device.signal_on(index, [plain_file])
        device.set_irqs(NONE | TRIGGER, index, 0, 1)
        assert signals(eventfd) == 1

    @pytest.mark.parametrize("data", [BOOL, EVENTFD], ids=["bool", "eventfd"])
    def test_data_for_no_vector_is_einval(self, device: VfioDevice, index: int, data: int) -> None:
        with fails(errno.EINVAL):
            device.set_irqs(data | TRIGGER, index, 0, 0)

    def test_stands_beside_msi(self, attached: VfioDevice, eventfd: int, second: int, index: int) -> None:
        attached.signal_on(MSI, [eventfd])
        attached.signal_on(index, [second])
        attached.set_irqs(NONE | TRIGGER, index, 0, 1)
        assert (signals(second), signals(eventfd, SILENCE)) == (1, 0)
