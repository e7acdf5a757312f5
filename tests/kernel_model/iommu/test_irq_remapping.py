"""Interrupt remapping by the VT-d driver: which entries there are when, and whom a message of whose making reaches."""

import dataclasses
import errno

import pytest

from fakedev.bridge import PciBridge
from fakedev.endpoints.edu import Edu
from fakedev.endpoints.hostile import Hostile
from fakedev.machine import VTD_LEGACY_CAP, VTD_LEGACY_ECAP, Machine
from fakedev.pci import PCI_MSI_FLAGS, PciFunction
from fakedev.vtd import irte, regs
from fakedev.vtd.features import Features
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.registry import attach_drivers
from tests.kernel_model.iommu.driver_kernel import driver_kernel

LEGACY = Features.of(VTD_LEGACY_CAP, VTD_LEGACY_ECAP)
CAP = 0x40


class World:
    """A function of eight vectors, a hostile one, and the drivers that boot puts in front of them."""

    def __init__(self, **changes):
        self.box = box = Machine("irq")
        features = dataclasses.replace(LEGACY, **changes)
        self.unit = box.add_vtd(cap=features.cap, ecap=features.ecap)
        self.function = box.add(PciFunction("0000:00:10.0", (1, 2), 0, command=6), self.unit)
        self.function.add_msi(CAP, 3)
        # Behind a port that believes any name: what stops it then is the remapping alone.
        box.add(PciBridge("0000:00:1d.0", 2, acs=0), self.unit)
        self.hostile = box.add(Hostile("0000:02:00.0", command=6), self.unit)
        self.bridge = box.add(PciBridge("0000:00:1c.0", 1, kind="pcie-to-pci"), self.unit)
        self.edu = box.add(Edu("0000:01:02.0", command=4), self.unit)
        kernel = driver_kernel(box)
        self.pages, self.irqs = kernel.pages, kernel.interrupts
        self.device = {device.name: device for device in attach_drivers(kernel)}["0000:00:10.0"]
        self.driver = self.device.iommu.unit
        self.table = self.unit.registers.by_name["IRTA"].value & ~0xFFF
        self.got = []

    def entry(self, index):
        at = (self.table + 16 * index) >> 3
        return tuple(self.box.memory.words[at : at + 2])

    def present(self):
        """Indices of the present entries among the first."""
        return [index for index in range(64) if self.entry(index)[0] & 1]

    def take(self, function=None, wanted=8, handlers=True):
        function = function or self.function
        count = self.irqs.pci_alloc_irq_vectors(function, wanted)
        for index in range(count if handlers else 0):
            vector = self.irqs.pci_irq_vector(function, index)
            self.irqs.request_irq(vector, lambda index=index: self.got.append(index))
        return count

    def give_back(self, function=None):
        function = function or self.function
        for index in range(8):
            try:
                self.irqs.free_irq(self.irqs.pci_irq_vector(function, index))
            except KernelError:
                break
        self.irqs.pci_free_irq_vectors(function)


@pytest.fixture
def world():
    world = World()
    yield world
    world.box.close()


def test_boot_switches_it_on_with_the_old_format_blocked(world):
    status = world.unit.registers.by_name["GSTS"].value
    assert status & (regs.IRE | regs.SIRTP | regs.CFI) == regs.IRE | regs.SIRTP
    assert world.unit.registers.by_name["IRTA"].value & 0xFFF == 0xF  # 64 Ki entries, no extended mode: as in the VM
    assert world.device.iommu.device_isolated_msi(world.device)


def test_a_unit_with_extended_mode_is_used_in_it():
    world = World(eim=1)
    assert world.unit.registers.by_name["IRTA"].value & 0xFFF == regs.IRTA_EIME | 0xF
    world.take(wanted=1)
    world.function.msi.notify()
    assert world.got == [0]


def test_one_unit_without_it_means_none_for_all():
    box = Machine("two")
    without = dataclasses.replace(LEGACY, ir=0)
    first, second = box.add_vtd(), box.add_vtd(0xFED9_1000, without.cap, without.ecap)
    box.add(Edu("0000:00:10.0", command=6), first)
    box.add(Edu("0000:00:11.0", command=6), second)
    kernel = driver_kernel(box)
    irqs = kernel.interrupts
    devices = attach_drivers(kernel)
    assert not any(device.iommu.device_isolated_msi(device) for device in devices)
    assert not first.registers.by_name["GSTS"].value & regs.IRE
    assert irqs.pci_alloc_irq_vectors(devices[0].pci, 1) == 1
    assert devices[0].pci.msi.address == 0xFEE0_0000
    box.close()


def test_without_it_a_function_has_one_vector():
    world = World(ir=0)
    assert world.take() == 1
    assert (world.function.msi.address, world.function.msi.data) == (0xFEE0_0000, 0x40)
    world.function.msi.notify()
    assert world.got == [0]


def test_each_vector_has_an_entry_for_its_function_alone(world):
    assert world.take() == 8
    assert world.present() == list(range(8))
    assert world.entry(2) == (0x42 << 16 | 9, 0x40080)  # as the real kernel's table has it, but for the vector
    assert (world.function.msi.address, world.function.msi.data) == (0xFEE0_0018, 0)
    for vector in range(8):
        world.function.msi.notify(vector)
    assert world.got == list(range(8))


def test_an_allocation_is_a_power_of_two_aligned_to_itself(world):
    world.take(world.edu, 1)
    assert world.take(wanted=5) == 5
    assert world.present() == [0, 8, 9, 10, 11, 12]
    assert world.function.msi.enabled_vectors == 8
    world.function.msi.notify(6)  # a vector beyond those that were asked for
    assert world.got == []
    assert "fault index 0xe [fault reason 0x22]" in world.driver.fault_log[-1]


def test_a_mask_of_handles_that_is_too_small_leaves_one_vector():
    world = World(mhmv=2)
    assert world.take() == 1
    world.function.msi.notify()
    assert world.got == [0]


def test_handlers_come_and_go_with_their_entries(world):
    world.take(wanted=2)
    world.irqs.free_irq(world.irqs.pci_irq_vector(world.function, 1))
    assert world.present() == [0]
    assert world.function.msi.address == 0xFEE0_0018
    world.irqs.free_irq(world.irqs.pci_irq_vector(world.function, 0))
    assert world.present() == []
    assert (world.function.msi.address, world.function.msi.data) == (0, 0)
    world.irqs.request_irq(world.irqs.pci_irq_vector(world.function, 0), lambda: world.got.append("again"))
    assert world.present() == [0]
    world.function.msi.notify()
    assert world.got == ["again"]


def test_vectors_that_are_given_back_leave_nothing(world):
    pages = world.pages.live
    for _ in range(3):
        world.take()
        for vector in range(8):
            world.function.msi.notify(vector)
        world.give_back()
        assert world.present() == []
        assert not world.unit.interrupts.cache
        assert not world.driver.irq_remapping.allocated
    assert world.pages.live == pages
    assert world.got == list(range(8)) * 3


def test_a_handler_keeps_its_vector_from_being_freed(world):
    world.take(wanted=1)
    with pytest.raises(KernelBug):
        world.irqs.pci_free_irq_vectors(world.function)


def test_a_full_table_is_enospc(world):
    world.driver.irq_remapping.allocated[0] = (16, 0, 0)
    with pytest.raises(KernelError) as caught:
        world.take(wanted=1)
    assert caught.value.errno == errno.ENOSPC
    del world.driver.irq_remapping.allocated[0]
    assert world.take() == 8


def test_no_vector_left_is_enospc(world):
    for vector in range(0x40, 0xEC):
        world.irqs._owners[vector] = None
    with pytest.raises(KernelError) as caught:
        world.take(wanted=1)
    assert caught.value.errno == errno.ENOSPC
    assert not world.driver.irq_remapping.allocated


def test_behind_a_bridge_that_takes_requests_over_buses_are_verified(world):
    world.take(world.edu, 1)
    assert world.entry(0)[1] == irte.SVT_BUS << 18 | 0x0101
    world.edu.msi.notify()
    assert world.got == [0]


# ----------------------------------------------------------------------------------------------------- hostile devices


def reached(world, messages):
    """Whom a hostile function's messages reach."""
    world.got.clear()
    for address, data, rid in messages:
        world.hostile.smash(address, data.to_bytes(4, "little"), rid=rid)
    return world.got


def test_messages_of_the_old_format_reach_nobody(world):
    world.take()
    everything = [
        (0xFEE0_0000 | low, data, rid) for low in (0, 4, 8, 12) for data in range(256) for rid in (None, 0x80)
    ]
    assert reached(world, everything) == []


def test_anothers_entries_reach_nobody(world):
    world.take()
    assert reached(world, [(*irte.message(index, None), None) for index in range(16)]) == []
    assert reached(world, [(*irte.message(0, sub), None) for sub in range(16)]) == []
    assert {line.split("[fault reason ")[1][:4] for line in world.driver.fault_log} == {"0x26", "0x22"}


def test_entries_that_nobody_has_reach_nobody_in_anybodys_name(world):
    world.take()
    names = [
        (*irte.message(index, sub), rid)
        for index in (8, 0x100, 0xFFFF)
        for sub in (None, 0, 5)
        for rid in (None, 0x80, 0xFFFF)
    ]
    assert reached(world, names) == []


def test_the_name_of_a_function_without_handlers_reaches_nobody(world):
    world.take()
    world.give_back()
    assert reached(world, [(*irte.message(index), 0x80) for index in range(8)]) == []


def test_a_writer_of_more_or_less_than_a_message_reaches_nobody(world):
    world.take()
    address, _ = irte.message(0)
    world.function.config_write(CAP + PCI_MSI_FLAGS, 2, 0)
    for data in (b"", b"\0", bytes(2), bytes(8), bytes(64)):
        world.hostile.smash(address, data, rid=0x80)
    assert world.got == []
