"""What the SMMUv3 driver makes of transactions that stall, of page requests, and of queues that overflow.

Clients' part of it is in conformance/test_stall.py; here are the registers, and what reaches no client: the log, the
answers to page requests that nobody takes, records that were lost.
"""

import pytest

from fakedev.ats import AtsPort
from fakedev.bridge import PciBridge
from fakedev.dma import DmaAbort, Outcome, Parked
from fakedev.machine import SMMU_BASE, Machine
from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_EXP_TYPE_ENDPOINT,
    PCI_EXP_TYPE_RC_END,
    PCI_PRI_STATUS,
    PCI_PRI_STATUS_RF,
    AtsCapability,
    ExpressCapability,
    PasidCapability,
    PriCapability,
)
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import regs
from fakedev.smmuv3.regs import Features
from fakedev.tlp import READ, WRITE
from kernel_model import pci_ats
from kernel_model.errors import KernelBug
from kernel_model.iommu import core
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.iommu import ArmSmmuV3
from kernel_model.iommu.io_pgfault import (
    IOMMU_PAGE_RESP_INVALID,
    IOMMU_PAGE_RESP_SUCCESS,
    PageRequest,
    iopf_group_response,
)
from kernel_model.page_alloc import PageAllocator
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID

K4, G1 = 1 << 12, 1 << 30
PA = 0x2000_0000
RW = core.IOMMU_READ | core.IOMMU_WRITE


class World:
    """Two functions with PASIDs: one with ATS, one of which the firmware says that it can stall; no real one has both,
    and the driver would make an illegal STE of stage 2 for it. Interrupts wait while `held`."""

    def __init__(self, features=None):
        self.box = Machine("small")
        self.unit = self.box.add_smmu(features=features)
        self.smmu = SmmuDevice(self.box, PageAllocator(self.box.memory), SMMU_BASE)
        self.smmu.reset()
        self.held = False
        self.box.wired_sink = lambda _base, name: None if self.held else self.smmu.interrupt(name)
        self.driver = ArmSmmuV3(self.smmu, self.box.root)
        self.plain, self.stalling = (self._add(n, p) for n, p in ((1, frozenset()), (2, frozenset(["dma-can-stall"]))))
        self.groups = []

    def _add(self, number, properties):
        function = PciFunction(f"0000:00:{number:02x}.0", (0x1234, 0x11E8), 0xFF0000, config_size=4096, command=4)
        ExpressCapability(function, 0x40, PCI_EXP_TYPE_RC_END)
        pasids = PasidCapability(function, 0x100, bits=16)
        if not properties:
            ats, pri = AtsCapability(function, 0x110), PriCapability(function, 0x120)
            self.port = AtsPort(function, ats, pasids, pri)
        self.box.add(function, self.unit, properties)
        device = core.Device(function.address, self.driver, function, properties)
        self.driver.probe_device(device, function.rid)
        device.group = core.Group(number)
        device.group.devices.append(device)
        return device

    def attach(self, device, flags=0, pasid=0):
        """A domain whose faults go to `groups`."""
        domain = self.driver.domain_alloc_paging_flags(device, flags)
        domain.iopf_handler = self.groups.append
        if pasid:
            core.attach_device_pasid(domain, device, pasid, core.AttachHandle())
        else:
            core.attach_group_handle(domain, device.group, core.AttachHandle())
        return domain

    def stall(self, iova, **more):
        """A read of the device that stalls: the outcomes so far."""
        with pytest.raises(Parked) as parked:
            self.stalling.pci.dma.read(iova, 8, **more)
        outcomes = []
        parked.value.then(outcomes.append)
        return outcomes

    def interrupt(self, name="eventq"):
        self.held = False
        self.smmu.interrupt(name)


@pytest.fixture
def make():
    worlds = []

    def build(features=None):
        worlds.append(World(features))
        return worlds[-1]

    yield build
    for world in worlds:
        world.box.close()


@pytest.fixture
def world(make):
    return make()


# -- who stalls ------------------------------------------------------------------------------------------------------


def test_only_the_device_that_firmware_names_stalls(world):
    for device in (world.plain, world.stalling):
        world.attach(device)
    with pytest.raises(DmaAbort):
        world.plain.pci.dma.read(G1, 8)
    assert world.stall(G1) == []
    assert [device.fault_param is not None for device in (world.plain, world.stalling)] == [False, True]
    assert world.smmu.iopf.devices == [world.stalling]
    ste = world.smmu.ste(world.plain.pci.rid)
    assert ste[1] & e.STE_1_S1STALLD
    assert not world.smmu.ste(world.stalling.pci.rid)[1] & e.STE_1_S1STALLD


def test_the_firmwares_word_is_nothing_to_a_unit_that_cannot_stall(make):
    world = make(Features(stall_model=regs.STALL_NEVER))
    world.attach(world.stalling)
    with pytest.raises(DmaAbort):
        world.stalling.pci.dma.read(G1, 8)
    assert world.stalling.fault_param is None
    assert not world.smmu.ste(world.stalling.pci.rid)[1] & e.STE_1_S1STALLD


def test_a_unit_that_always_stalls_needs_no_word(make):
    world = make(Features(stall_model=regs.STALL_FORCED))
    world.attach(world.plain)
    with pytest.raises(Parked):
        world.plain.pci.dma.read(G1, 8)
    (group,) = world.groups
    assert group.device is world.plain


def test_the_answer_to_a_device_that_does_not_stall_is_a_bug(world):
    with pytest.raises(KernelBug):
        world.driver.page_response(world.plain, PageRequest(1, 0, 0, 1, G1), IOMMU_PAGE_RESP_SUCCESS)


# -- what is reported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, IOMMU_HWPT_ALLOC_NEST_PARENT], ids=["stage 1", "stage 2"])
def test_a_stall_is_reported_and_ends_as_it_is_answered(world, flags):
    domain = world.attach(world.stalling, flags)
    first, second = world.stall(G1 + 5), world.stall(G1 + K4)
    one, two = world.groups
    assert [(f.flags, f.perm, f.addr) for g in (one, two) for f in g.faults] == [(2, 1, G1 + 5), (2, 1, G1 + K4)]
    assert one.faults[0].grpid != two.faults[0].grpid
    domain.map(G1, PA, K4, RW)
    iopf_group_response(two, IOMMU_PAGE_RESP_INVALID)
    iopf_group_response(one, IOMMU_PAGE_RESP_SUCCESS)
    assert (first, second) == ([Outcome.RETRY], [Outcome.ABORT])
    assert not len(world.unit.stalls)


def test_a_pasid_is_named_and_gets_its_own_handler(world):
    own = world.attach(world.stalling, IOMMU_HWPT_ALLOC_PASID)
    other = world.attach(world.stalling, IOMMU_HWPT_ALLOC_PASID, pasid=7)
    world.stall(G1, pasid=7)
    world.stall(G1 + K4)
    one, two = world.groups
    assert [(f.flags, f.pasid, f.addr) for g in (one, two) for f in g.faults] == [(3, 7, G1), (2, 0, G1 + K4)]
    assert (one.handle.domain, two.handle.domain) == (other, own)
    core.detach_device_pasid(other, world.stalling, 7)
    assert world.stalling.fault_param is not None


def test_a_permission_that_is_missing_stalls_as_a_write(world):
    domain = world.attach(world.stalling)
    domain.map(G1, PA, K4, core.IOMMU_READ)
    with pytest.raises(Parked):
        world.stalling.pci.dma.write(G1 + 8, b"x")
    assert [(f.perm, f.addr) for f in world.groups[0].faults] == [(2, G1 + 8)]


def test_a_substream_without_a_descriptor_does_not_stall(world):
    world.attach(world.stalling, IOMMU_HWPT_ALLOC_PASID)
    with pytest.raises(DmaAbort):
        world.stalling.pci.dma.read(G1, 8, pasid=9)
    assert not world.groups
    assert world.smmu.log[-1] == "event: C_BAD_CD client: 0000:00:02.0 sid: 0x10 ssid: 0x9"


def test_a_stall_of_a_domain_without_handler_is_ended_and_logged(world):
    world.attach(world.stalling).iopf_handler = None
    assert world.stall(G1) == [Outcome.ABORT]
    assert " stall " in world.smmu.log[-1]


# -- too many --------------------------------------------------------------------------------------------------------


def test_stalls_that_the_queue_does_not_take_are_reported_when_it_does(make):
    world = make(Features(eventq_log2=2))
    domain = world.attach(world.stalling)
    world.held = True
    outcomes = [world.stall(G1 + n * K4) for n in range(7)]
    assert not world.groups
    world.interrupt()
    # The transactions that waited unrecorded were sent anew, by nobody here: the bench has no engine behind them.
    assert [g.faults[0].addr for g in world.groups] == [G1 + n * K4 for n in range(4)]
    assert outcomes == [[]] * 4 + [[Outcome.RETRY]] * 3
    assert "EVTQ overflow detected -- events lost" not in world.smmu.log
    domain.map(G1, PA, 4 * K4, RW)
    for group in world.groups:
        iopf_group_response(group, IOMMU_PAGE_RESP_SUCCESS)
    assert outcomes == [[Outcome.RETRY]] * 7


def test_events_that_are_lost_are_logged_once_and_acknowledged(make):
    world = make(Features(eventq_log2=2))
    world.attach(world.plain)
    world.held = True
    for n in range(9):
        with pytest.raises(DmaAbort):
            world.plain.pci.dma.read(G1 + n * K4, 8)
    prod, cons = (world.smmu.readl(register) for register in (regs.EVENTQ_PROD, regs.EVENTQ_CONS))
    assert (prod ^ cons) & regs.Q_OVERFLOW_FLAG
    world.interrupt()
    assert [line for line in world.smmu.log if "overflow" in line] == ["EVTQ overflow detected -- events lost"]
    assert sum("F_TRANSLATION" in line for line in world.smmu.log) == 4
    assert world.smmu.readl(regs.EVENTQ_PROD) == world.smmu.readl(regs.EVENTQ_CONS)
    with pytest.raises(DmaAbort):
        world.plain.pci.dma.read(0x5000, 8)
    assert world.smmu.log[-2].endswith("iova: 0x5000 ipa: 0x0")


# -- page requests ---------------------------------------------------------------------------------------------------


@pytest.fixture
def asking(world):
    """The driver switches PASIDs and ATS of the first function on, and never its page requests: the test does."""
    world.attach(world.plain, IOMMU_HWPT_ALLOC_PASID)
    function = world.plain.pci
    assert (pci_ats.pasid_enabled(function), world.port.enabled, pci_ats.pri_enabled(function)) == (True, True, False)
    pci_ats.enable_pri(function, 8)
    return world


def ask(world, pasid, *pages):
    outcomes = []
    world.port.page_requests.ask(pasid, pages).then(outcomes.append)
    return outcomes


def test_a_group_of_page_requests_is_logged_and_refused_at_its_last(asking):
    assert ask(asking, 5, (G1, READ), (G1 + K4, WRITE)) == [Outcome.ABORT]
    assert [line for line in asking.smmu.log if "access" in line] == [
        "\tsid 0x00000008.0x00005: [0] unprivileged R access at iova 0x0000000040000000",
        "\tsid 0x00000008.0x00005: [0L] unprivileged W access at iova 0x0000000040001000",
    ]
    assert not asking.groups
    status = 0x120 + PCI_PRI_STATUS
    assert asking.plain.pci.config_read(status, 2) & PCI_PRI_STATUS_RF  # and the interface is off until it is reset


def test_page_requests_beyond_the_queue_are_answered_by_the_unit_and_the_loss_is_logged(make):
    world = make(Features(priq_log2=1))
    world.attach(world.plain, IOMMU_HWPT_ALLOC_PASID)
    pci_ats.enable_pri(world.plain.pci, 8)
    world.held = True
    kept = [ask(world, 5, (G1 + n * K4, READ)) for n in range(2)]
    assert kept == [[], []]
    assert ask(world, 5, (0x5000, READ)) == [Outcome.RETRY]
    world.interrupt("priq")
    assert kept == [[Outcome.ABORT]] * 2
    assert "PRIQ overflow detected -- requests lost" in world.smmu.log
    assert world.smmu.readl(regs.PRIQ_PROD) == world.smmu.readl(regs.PRIQ_CONS)


# -- PASIDs that cannot be switched on ---------------------------------------------------------------------------------


def test_pasids_behind_a_port_without_access_control_are_counted_and_off(world):
    """7.3 then writes behind its table of descriptors; the model stops where the kernel would corrupt memory."""
    world.box.add(PciBridge("0000:00:05.0", 1, kind="root-port", acs=0), world.unit)
    function = PciFunction("0000:01:00.0", (0x1234, 0x11E8), 0xFF0000, config_size=4096, command=4)
    ExpressCapability(function, 0x40, PCI_EXP_TYPE_ENDPOINT)
    PasidCapability(function, 0x100, bits=16)
    world.box.add(function, world.unit)
    device = core.Device(function.address, world.driver, function)
    world.driver.probe_device(device, function.rid)
    device.group = core.Group(9)
    device.group.devices.append(device)
    assert (pci_ats.pasid_enabled(function), device.max_pasids) == (False, 1 << 16)
    domain = world.driver.domain_alloc_paging_flags(device, IOMMU_HWPT_ALLOC_PASID)
    core.attach_group_handle(domain, device.group, core.AttachHandle())
    with pytest.raises(KernelBug, match="beyond its 1 descriptors"):
        core.attach_device_pasid(domain, device, 5, core.AttachHandle())
