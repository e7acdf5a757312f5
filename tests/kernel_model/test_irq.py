"""MSIs of machines with a GIC: the doorbell is memory behind the IOMMU, and its service knows who writes."""

from __future__ import annotations

import errno

import pytest

from fakedev.dma import DmaAbort
from fakedev.machines.virt import ITS_BASE
from fakedev.memory import PhysicalMemory
from fakedev.pci import PCI_COMMAND, PCI_COMMAND_MASTER
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.kernel import Kernel

DOORBELL = ITS_BASE + 0x1_0040


@pytest.fixture
def kernel():
    with Kernel("virt-smmuv3-max") as kernel:
        yield kernel


def function_of(kernel, address):
    function = kernel.devices[address].pci
    function.config_write(PCI_COMMAND, 2, PCI_COMMAND_MASTER)
    return function


def translate_doorbell(kernel, address, iova):
    """Put the function into a domain of its own in which `iova` is the page of the doorbell."""
    device = kernel.devices[address]
    domain = core.paging_domain_alloc(device)
    domain.map(iova, DOORBELL & ~0xFFF, 4096, core.IOMMU_WRITE | core.IOMMU_MMIO)
    domain.iommufd_hwpt = object()
    core.group_set_domain(device.group, domain)
    handle = core.AttachHandle()
    handle.prepare_msi = lambda _domain, there: iova | there & 0xFFF
    device.group.pasid_array[core.IOMMU_NO_PASID] = handle


def test_message_goes_through_the_smmu_to_the_doorbell(kernel):
    edu = function_of(kernel, "0000:00:10.0")
    translate_doorbell(kernel, "0000:00:10.0", 0x800_0000)
    assert kernel.interrupts.pci_alloc_irq_vectors(edu, 1) == 1
    assert (edu.msi.address, edu.msi.data) == (0x800_0040, 0)
    rung = []
    kernel.interrupts.request_irq(kernel.interrupts.pci_irq_vector(edu, 0), lambda: rung.append(1))
    edu.msi.notify()
    edu.msi.notify()
    assert rung == [1, 1]
    kernel.machine.last_faults.clear()
    with pytest.raises(DmaAbort):
        edu.dma.write(DOORBELL, bytes(4))  # its physical address is no IOVA
    assert "F_TRANSLATION" in kernel.machine.last_faults[0]


def test_functions_count_their_events_from_0_and_are_told_apart(kernel):
    rung = []
    for number, address in enumerate(("0000:00:10.0", "0000:00:11.0")):
        function = function_of(kernel, address)
        translate_doorbell(kernel, address, 0x800_0000 + 4096 * number)
        kernel.interrupts.pci_alloc_irq_vectors(function, 1)
        assert (function.msi.address, function.msi.data) == (0x800_0040 + 4096 * number, 0)
        kernel.interrupts.request_irq(
            kernel.interrupts.pci_irq_vector(function, 0), lambda address=address: rung.append(address)
        )
        function.msi.notify()
    assert rung == ["0000:00:10.0", "0000:00:11.0"]


@pytest.mark.parametrize(("offset", "data"), [(0, bytes(8)), (0, bytes(2)), (4, bytes(4)), (-4, bytes(4))])
def test_only_a_word_to_the_doorbell_rings_it(kernel, offset, data):
    edu = function_of(kernel, "0000:00:10.0")
    translate_doorbell(kernel, "0000:00:10.0", 0)
    kernel.interrupts.pci_alloc_irq_vectors(edu, 1)
    rung = []
    kernel.interrupts.request_irq(kernel.interrupts.pci_irq_vector(edu, 0), lambda: rung.append(1))
    with pytest.raises(DmaAbort):
        edu.dma.write(0x40 + offset, data)
    edu.dma.write(0x40, bytes(4))
    assert rung == [1]


def test_event_that_the_function_has_not_is_nobodys(kernel):
    edu = function_of(kernel, "0000:00:10.0")
    translate_doorbell(kernel, "0000:00:10.0", 0)
    edu.dma.write(0x40, bytes(4))
    kernel.interrupts.pci_alloc_irq_vectors(edu, 1)
    edu.dma.write(0x40, b"\1\0\0\0")


def test_vector_that_was_asked_for_where_no_doorbell_is_mapped_is_lost(kernel):
    edu = function_of(kernel, "0000:00:10.0")
    core.group_set_domain(kernel.devices["0000:00:10.0"].group, kernel.devices["0000:00:10.0"].iommu.blocked_domain)
    for _ in range(2):
        with pytest.raises(KernelError) as caught:
            kernel.interrupts.pci_alloc_irq_vectors(edu, 1)
        assert caught.value.errno == errno.ENOSPC
        translate_doorbell(kernel, "0000:00:10.0", 0)


def test_dma_reaches_memory_around_the_doorbell():
    memory = PhysicalMemory(1 << 20, 1 << 30)
    memory.write(1 << 30, b"first")
    assert memory.read(1 << 30, 5) == b"first"
    for address in (0, (1 << 30) - 4, (1 << 30) + (1 << 20)):
        with pytest.raises(Exception, match="nothing answers"):
            memory.read(address, 4)
    memory.close()
