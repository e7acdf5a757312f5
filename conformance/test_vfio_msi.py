"""The message that a function holds while a client has its MSI on, and what comes of others that it makes up.

What a client sees of the capability is virtual (test_vfio_region.py); what the function really holds is in sysfs'
`config`. Sources: kernel/irq/msi.c (`msi_domain_activate`, `msi_domain_deactivate`), drivers/pci/msi, and
drivers/iommu/intel/irq_remapping.c for the format.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conformance.drivers.edu import Edu, signals
from conformance.drivers.vfio import PCI_DEVICES, VfioDevice
from conformance.steps import PAGE, map_user
from uapi.backend import Backend, File
from uapi.vfio import VFIO_PCI_MSI_IRQ_INDEX

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device")
remapped = pytest.mark.needs("interrupt_remapping")

MSI = VFIO_PCI_MSI_IRQ_INDEX
#: Where edu's capability is, and its layout: id, next, flags, address, data.
MSI_CAP, LAYOUT = 0x40, "<BBHQH"
ENABLE = 0x1
#: An address of interrupt remapping's format with a subhandle (VT-d specification, table 13), but for its handle.
RANGE, REMAPPABLE, SHV = 0xFEE0_0000, 1 << 4, 1 << 3
HANDLE = 0x7FFF << 5 | 1 << 2
#: No signal is expected: how long to wait for one that must not come, in seconds.
SILENCE = 0.05


class Message(NamedTuple):
    enabled: bool
    address: int
    data: int


NOTHING = (0, 0)


def held(kernel: Backend, address: str) -> Message:
    """What the function really holds."""
    with kernel.open(f"{PCI_DEVICES}/{address}/config", os.O_RDONLY | os.O_CLOEXEC) as file:
        _, _, flags, address_, data = struct.unpack_from(LAYOUT, file.read(256), MSI_CAP)
    return Message(bool(flags & ENABLE), address_, data)


@pytest.fixture
def attached(device: VfioDevice, ioas: int) -> VfioDevice:
    """The device where it can have MSIs: on Arm the domain that it is in has to map the doorbell."""
    device.attach(ioas)
    return device


@pytest.fixture
def plain(kernel: Backend) -> Backend:
    """The kernel without the recorder: which message a function gets is nobody's contract."""
    return getattr(kernel, "inner", kernel)


def test_client_sees_no_message(attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    assert attached.config_read(MSI_CAP + 4, 4) == 0
    assert attached.config_read(MSI_CAP + 8, 4) == 0
    assert attached.config_read(MSI_CAP + 12, 2) == 0


def test_function_holds_nothing_before(plain: Backend, device: VfioDevice) -> None:
    assert held(plain, device.address) == (False, *NOTHING)


def test_function_holds_a_message_even_without_an_eventfd(plain: Backend, attached: VfioDevice) -> None:
    attached.signal_on(MSI, [-1])
    message = held(plain, attached.address)
    assert message.enabled
    assert message.address


@remapped
def test_message_is_remappable(plain: Backend, attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    message = held(plain, attached.address)
    assert message.address & ~HANDLE == RANGE | REMAPPABLE | SHV
    assert message.data == 0


def test_message_is_not_what_the_client_wrote(plain: Backend, attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    message = held(plain, attached.address)
    attached.config_write(MSI_CAP + 4, 4, 0xDEAD0000)
    attached.config_write(MSI_CAP + 12, 2, 0xBEEF)
    assert held(plain, attached.address) == message


def test_message_goes_with_the_vectors_eventfd_and_comes_back(
    plain: Backend, attached: VfioDevice, eventfd: int
) -> None:
    attached.signal_on(MSI, [eventfd])
    message = held(plain, attached.address)
    attached.signal_on(MSI, [-1])
    assert held(plain, attached.address) == (True, *NOTHING)
    attached.signal_on(MSI, [eventfd])
    assert held(plain, attached.address) == message


def test_message_goes_with_msi(plain: Backend, attached: VfioDevice, eventfd: int) -> None:
    attached.signal_on(MSI, [eventfd])
    attached.disable_irqs(MSI)
    assert held(plain, attached.address) == (False, *NOTHING)


def test_message_goes_with_the_device(plain: Backend, cdev: VfioDevice, iommu: File, ioas: int, eventfd: int) -> None:
    cdev.bind(iommu)
    cdev.attach(ioas)
    cdev.signal_on(MSI, [eventfd])
    cdev.close()
    assert held(plain, cdev.address) == (False, *NOTHING)


def test_interrupt_of_a_cleared_vector_is_a_dma_of_zeros_to_0(
    kernel: Backend, edu: Edu, iommu: File, ioas: int
) -> None:
    buffer = kernel.buffer(PAGE)
    buffer.view[:8] = b"\xff" * 8
    map_user(iommu, ioas, buffer.address, PAGE, 0)
    eventfd = edu.enable_msi()
    edu.vfio.signal_on(MSI, [-1])
    edu.raise_irq(1)
    assert signals(eventfd, SILENCE) == 0
    assert bytes(buffer.view[:8]) == bytes(4) + b"\xff" * 4
    edu.acknowledge(1)
    edu.vfio.signal_on(MSI, [eventfd])
    buffer.close()


def test_interrupts_before_the_first_eventfd_are_one_signal_to_it(edu: Edu, eventfd: int) -> None:
    """The vector is pending and raised again when it gets a handler (`check_irq_resend`; a LPI on Arm)."""
    edu.vfio.signal_on(MSI, [-1])
    for cause in (1, 2):
        edu.raise_irq(cause)
        edu.acknowledge(cause)
    edu.vfio.signal_on(MSI, [eventfd])
    assert signals(eventfd) == 1
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)
    edu.vfio.signal_on(MSI, [-1])
    edu.vfio.signal_on(MSI, [eventfd])
    assert signals(eventfd, SILENCE) == 0


def test_interrupt_without_an_eventfd_is_forgotten_with_msi(edu: Edu, eventfd: int) -> None:
    edu.vfio.signal_on(MSI, [-1])
    edu.raise_irq(1)
    edu.acknowledge(1)
    edu.vfio.disable_irqs(MSI)
    edu.vfio.signal_on(MSI, [eventfd])
    assert signals(eventfd, SILENCE) == 0
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)


@pytest.fixture
def armed(kernel: Backend, edu: Edu, iommu: File, ioas: int) -> Iterator[int]:
    """The eventfd of edu's MSI, which is on; what edu sends by DMA is zeros, the data of every remappable message."""
    eventfd = edu.enable_msi()
    zeros = kernel.buffer(PAGE)
    map_user(iommu, ioas, zeros.address, PAGE, PAGE)
    edu.load(PAGE, 4)
    yield eventfd
    zeros.close()


@remapped
def test_function_interrupts_by_writing_its_message_itself(plain: Backend, edu: Edu, armed: int) -> None:
    edu.store(held(plain, edu.vfio.address).address, 4)
    assert signals(armed) == 1


@remapped
def test_function_that_names_another_entry_interrupts_nobody(plain: Backend, edu: Edu, armed: int) -> None:
    address = held(plain, edu.vfio.address).address
    for other in (address ^ 1 << 18, address ^ 1 << 2):
        edu.store(other, 4)
    assert signals(armed, SILENCE) == 0
    edu.raise_irq(1)
    assert signals(armed) == 1
    edu.acknowledge(1)


@remapped
def test_message_of_an_earlier_time_interrupts_nobody(plain: Backend, edu: Edu, armed: int) -> None:
    address = held(plain, edu.vfio.address).address
    edu.vfio.signal_on(MSI, [-1])
    edu.store(address, 4)
    edu.vfio.signal_on(MSI, [armed])
    assert signals(armed, SILENCE) == 0
    edu.raise_irq(1)  # that it was refused is not remembered
    assert signals(armed) == 1
    edu.acknowledge(1)
