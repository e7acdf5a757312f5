"""The SMMUv3 driver on the fake unit: what it says, what devices can reach, and that nothing stale is left.

One long file: all of it runs over the same variants of the unit, on one bench below.
"""

import errno
import random
import struct

import pytest

from fakedev.ats import AtsPort, PageFault
from fakedev.dma import NO_PASID, READ, DmaAbort, Outcome, Parked, TranslationFault
from fakedev.machine import SMMU_BASE, Machine
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_EXP_TYPE_RC_END, AtsCapability, ExpressCapability, PasidCapability
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import regs
from fakedev.smmuv3.regs import QEMU_VIRT, Features
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.invalidation import (
    ATS,
    ATS_FULL,
    S1_ASID,
    S2_VMID,
    S2_VMID_S1_CLEAR,
    Inv,
    Invalidations,
)
from kernel_model.iommu.arm_smmu_v3.iommu import ArmSmmuV3
from kernel_model.iommu.io_pgfault import IOMMU_PAGE_RESP_FAILURE, IOMMU_PAGE_RESP_SUCCESS, iopf_group_response
from kernel_model.page_alloc import PageAllocator
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
)

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
PA = 0x2000_0000
RW = core.IOMMU_READ | core.IOMMU_WRITE


class World:
    """A machine with an SMMU and functions with PASIDs, its driver, and no more of a kernel."""

    def __init__(self, features=None, count=1, ats=False):
        self.box = Machine("small")
        self.unit = self.box.add_smmu(features=features)
        self.pages = PageAllocator(self.box.memory)
        self.smmu = SmmuDevice(self.box, self.pages, SMMU_BASE)
        self.smmu.reset()
        self.box.wired_sink = lambda _base, name: self.smmu.interrupt(name)
        self.driver = ArmSmmuV3(self.smmu, self.box.root)
        self.devices = []
        for number in range(count):
            address = f"0000:00:{number + 1:02x}.0"
            function = PciFunction(address, (0x1234, 0x11E8), 0xFF0000, config_size=4096, command=4)
            ExpressCapability(function, 0x40, PCI_EXP_TYPE_RC_END)
            pasids = PasidCapability(function, 0x100, bits=16)
            self.port = AtsPort(function, AtsCapability(function, 0x110), pasids) if ats else None
            self.box.add(function, self.unit)
            device = core.Device(address, self.driver, function)
            self.driver.probe_device(device, function.rid)
            device.group = core.Group(number)
            device.group.devices.append(device)
            self.devices.append(device)
        self.device = self.devices[0]
        for n in range(4):
            self.box.memory.write(PA + n * K4, f"page {n}".encode())

    def domain(self, flags=0):
        return self.driver.domain_alloc_paging_flags(self.device, flags)

    def attach(self, domain, device=None):
        core.group_set_domain((device or self.device).group, domain)

    def pasid(self, domain, pasid):
        core.attach_device_pasid(domain, self.device, pasid, core.AttachHandle())

    def read(self, address, *, device=None, pasid=None):
        port = (device or self.device).pci.dma
        try:
            return bytes(port.read(address, 6) if pasid is None else port.read(address, 6, pasid=pasid))
        except DmaAbort:
            return None


@pytest.fixture
def make():
    worlds = []

    def build(features=None, count=1, ats=False):
        worlds.append(World(features, count, ats))
        return worlds[-1]

    yield build
    for world in worlds:
        world.box.close()


@pytest.fixture
def world(make):
    return make()


def error_of(call, *arguments):
    with pytest.raises(KernelError) as caught:
        call(*arguments)
    return caught.value.errno


ONLY_STAGE_2 = Features(stage1=False, ssid_bits=0, two_level_cd_table=False)
VARIANTS = {
    "everything": Features(),
    "no ranges": Features(range_invalidation=False),
    "stage 2": ONLY_STAGE_2,
    "stage 2, no ranges": ONLY_STAGE_2.but(range_invalidation=False),
    "QEMU's": QEMU_VIRT,
    "64 KiB": Features(granules=(16,)),
    "linear": Features(two_level_stream_table=False, two_level_cd_table=False, sid_bits=10),
    "8-bit tags": Features(asid16=False, vmid16=False),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def any_world(request, make):
    return make(request.param)


# -- the unit --------------------------------------------------------------------------------------------------------


def test_the_unit_is_on_after_reset_with_its_queues(any_world):
    smmu = any_world.smmu
    wanted = regs.CR0_SMMUEN | regs.CR0_CMDQEN | regs.CR0_EVENTQEN
    assert smmu.readl(regs.CR0ACK) & wanted == wanted
    assert smmu.readl(regs.CMDQ_CONS) == smmu.readl(regs.CMDQ_PROD)


def test_a_unit_that_was_on_is_reset(world):
    world.smmu.reset()
    assert world.smmu.readl(regs.CR0ACK) & regs.CR0_SMMUEN
    assert world.smmu.readl(regs.GBPA) & regs.GBPA_ABORT


def test_a_device_that_is_attached_to_nothing_is_refused_without_an_event(any_world):
    assert any_world.read(PA) is None
    assert not any_world.smmu.log


def test_a_stream_that_nobody_probed_is_refused(world):
    other = world.box.add(PciFunction("0000:02:00.0", (1, 2), 0, command=4), world.unit)
    with pytest.raises(DmaAbort):
        other.dma.read(PA, 4)
    assert world.smmu.log[-1] == "event: C_BAD_STREAMID client: (unassigned sid) sid: 0x200 ssid: 0x0"


def test_a_stream_beyond_the_table_is_erange(make):
    world = make(VARIANTS["linear"])
    device = core.Device("0000:08:00.0", world.driver, None)
    assert error_of(world.driver.probe_device, device, 0x800) == errno.ERANGE


def test_one_stream_of_two_devices_is_enodev(world):
    device = core.Device("0000:09:00.0", world.driver, None)
    assert error_of(world.driver.probe_device, device, world.device.pci.rid) == errno.ENODEV


def test_hardware_information_is_the_identification_registers(world):
    kind, data = world.driver.hw_info(world.device, 0)
    fields = struct.unpack("<10I", data)
    f = world.unit.features
    assert kind == 2
    assert fields == (0, 0, f.idr0, f.idr1, 0, f.idr3, 0, f.idr5, f.iidr, f.aidr)
    assert world.driver.hw_info(world.device, 2) == (kind, data)
    assert error_of(world.driver.hw_info, world.device, 1) == errno.EOPNOTSUPP


def test_capabilities_follow_the_registers(make):
    full, qemu = make(), make(QEMU_VIRT)
    asked = (
        core.IOMMU_CAP_CACHE_COHERENCY,
        core.IOMMU_CAP_ENFORCE_CACHE_COHERENCY,
        core.IOMMU_CAP_NOEXEC,
        core.IOMMU_CAP_DIRTY_TRACKING,
        core.IOMMU_CAP_PCI_ATS_SUPPORTED,
    )
    assert [full.driver.capable(full.device, cap) for cap in asked] == [True, False, True, True, False]
    assert [qemu.driver.capable(qemu.device, cap) for cap in asked] == [True, False, True, False, False]


def test_the_window_for_doorbells_is_reserved(world):
    (region,) = core.get_resv_regions(world.device)
    assert (region.start, region.length, region.type) == (0x800_0000, 0x10_0000, core.IOMMU_RESV_SW_MSI)
    assert region.prot == core.IOMMU_WRITE | core.IOMMU_NOEXEC | core.IOMMU_MMIO


# -- domains ---------------------------------------------------------------------------------------------------------


def test_identity_lets_everything_through(any_world):
    any_world.attach(any_world.driver.identity_domain)
    assert any_world.read(PA) == b"page 0"
    any_world.attach(any_world.driver.blocked_domain)
    assert any_world.read(PA) is None


def test_a_device_reaches_what_is_mapped_and_nothing_after_the_unmap(any_world):
    domain = any_world.domain()
    any_world.attach(domain)
    size = domain.pgsize_bitmap & -domain.pgsize_bitmap
    domain.map(0x10_0000, PA, 4 * size, RW)
    assert any_world.read(0x10_0000) == b"page 0"
    assert any_world.read(0x10_0000 + 3 * size) is not None
    assert domain.unmap(0x10_0000 + size, size) == size
    assert any_world.read(0x10_0000 + size) is None
    assert any_world.read(0x10_0000) == b"page 0"
    assert domain.unmap(0x10_0000, 4 * size) == size
    assert any_world.read(0x10_0000) is None


def test_nothing_stays_of_blocks_and_tables(any_world):
    domain = any_world.domain()
    any_world.attach(domain)
    block = sorted(1 << n for n in range(52) if domain.pgsize_bitmap >> n & 1)[1]
    domain.map(block, PA, 2 * block, RW)
    assert any_world.read(block) == b"page 0"
    assert any_world.read(3 * block - 64) is not None
    assert domain.unmap(block, 2 * block) == 2 * block
    assert any_world.read(block) is None
    assert any_world.read(3 * block - 64) is None
    domain.map_small(block, PA, block, RW) if block == M2 else domain.map(block, PA, block, RW)
    assert any_world.read(block) == b"page 0"
    assert domain.unmap(block, block) == block
    assert any_world.read(block) is None
    domain.map(block, PA, block, RW)
    assert any_world.read(block) == b"page 0"


@pytest.mark.parametrize("features", [Features(), Features(range_invalidation=False), ONLY_STAGE_2])
def test_an_unmap_over_pages_and_blocks_leaves_nothing(make, features):
    world = make(features)
    domain = world.domain()
    world.attach(domain)
    domain.map(M2 - 2 * K4, PA + M2 - 2 * K4, M2 + 5 * K4, RW)
    places = [M2 - 2 * K4, M2 - K4, M2, M2 + 77 * K4, 2 * M2, 2 * M2 + 2 * K4]
    assert all(world.read(place) is not None for place in places)
    assert domain.unmap(M2 - 2 * K4, M2 + 5 * K4) == M2 + 5 * K4
    assert [world.read(place) for place in places] == [None] * len(places)


def test_a_read_only_mapping_cannot_be_written(any_world):
    domain = any_world.domain()
    any_world.attach(domain)
    size = domain.pgsize_bitmap & -domain.pgsize_bitmap
    domain.map(0x10_0000, PA, size, core.IOMMU_READ)
    assert any_world.read(0x10_0000) == b"page 0"
    with pytest.raises(DmaAbort):
        any_world.device.pci.dma.write(0x10_0000, b"x")
    assert "F_PERMISSION" in any_world.smmu.log[-2]


def test_a_fault_is_in_the_kernels_log(world):
    world.attach(world.domain())
    assert world.read(0x1234_5678) is None
    assert list(world.smmu.log) == [
        "event: F_TRANSLATION client: 0000:00:01.0 sid: 0x8 ssid: 0x0 iova: 0x12345678 ipa: 0x0",
        'unpriv data read s1 "Input address caused fault" stag: 0x0',
    ]


def test_events_are_taken_however_many_there_are(make):
    world = make(Features(eventq_log2=3))
    world.attach(world.domain())
    for n in range(50):
        assert world.read(n << 12) is None
    assert world.smmu.log[-2].endswith("iova: 0x31000 ipa: 0x0")
    assert world.smmu.readl(regs.EVENTQ_CONS) == world.smmu.readl(regs.EVENTQ_PROD)


def test_the_command_queue_goes_round(make):
    world = make(Features(cmdq_log2=7))
    domain = world.domain()
    world.attach(domain)
    for _ in range(300):
        domain.map(K4, PA, K4, RW)
        assert world.read(K4) == b"page 0"
        domain.unmap(K4, K4)
        assert world.read(K4) is None


def test_an_illegal_command_is_skipped(world):
    world.smmu.cmdq.issue([(0xFF, 0)])
    assert world.smmu.log[-1].startswith("CMDQ error: Illegal command 0xff")
    assert not world.smmu.readl(regs.GERROR) ^ world.smmu.readl(regs.GERRORN)


def test_moving_between_domains_leaves_nothing_of_the_old(any_world):
    first, second = any_world.domain(), any_world.domain()
    first.map(G1, PA, 1 << 16, RW)
    any_world.attach(first)
    assert any_world.read(G1) == b"page 0"
    any_world.attach(second)
    assert any_world.read(G1) is None
    assert not first.invs
    any_world.attach(any_world.driver.blocked_domain)
    first.free()
    third = any_world.domain()
    assert third.tag == 1
    any_world.attach(third)
    assert any_world.read(G1) is None


def test_both_stages_in_turn(world):
    stage1, stage2 = world.domain(), world.domain(IOMMU_HWPT_ALLOC_NEST_PARENT)
    assert (stage1.stage1, stage2.stage1) == (True, False)
    assert (stage1.aperture_end, stage2.aperture_end) == ((1 << 48) - 1, (1 << 48) - 1)
    stage1.map(G1, PA, K4, RW)
    stage2.map(G1, PA + K4, K4, RW)
    for domain, content in ((stage1, b"page 0"), (stage2, b"page 1"), (stage1, b"page 0")):
        world.attach(domain)
        assert world.read(G1) == content
    stage1.unmap(G1, K4)
    assert world.read(G1) is None


def test_two_devices_in_one_domain(make):
    world = make(count=2)
    domain = world.domain()
    for device in world.devices:
        world.attach(domain, device)
    domain.map(G1, PA, K4, RW)
    assert all(world.read(G1, device=device) == b"page 0" for device in world.devices)
    world.attach(world.driver.blocked_domain)
    assert world.read(G1) is None
    assert world.read(G1, device=world.devices[1]) == b"page 0"
    domain.unmap(G1, K4)
    assert world.read(G1, device=world.devices[1]) is None


def test_flags_decide_on_the_stage(make):
    world, only2 = make(), make(ONLY_STAGE_2)
    assert world.domain(IOMMU_HWPT_ALLOC_PASID).stage1
    assert world.domain(IOMMU_HWPT_ALLOC_PASID | IOMMU_HWPT_ALLOC_DIRTY_TRACKING).dirty_ops
    assert not world.domain(IOMMU_HWPT_ALLOC_NEST_PARENT).stage1
    assert not only2.domain().stage1
    for flags in (
        IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_PASID,
        IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
        IOMMU_HWPT_FAULT_ID_VALID,
        1 << 20,
    ):
        assert error_of(world.domain, flags) == errno.EOPNOTSUPP
    for flags in (IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_ALLOC_DIRTY_TRACKING):
        assert error_of(only2.domain, flags) == errno.EOPNOTSUPP


def test_a_domain_of_another_unit_is_einval(make):
    world, other = make(), make()
    assert error_of(other.domain().attach_dev, world.device, None) == errno.EINVAL


def test_tags_run_out(make):
    world = make(VARIANTS["8-bit tags"])
    domains = [world.domain() for _ in range(255)]
    assert error_of(world.domain) == errno.EBUSY
    domains.pop().free()
    assert world.domain().tag == 255
    [world.domain(IOMMU_HWPT_ALLOC_NEST_PARENT) for _ in range(255)]
    assert error_of(world.domain, IOMMU_HWPT_ALLOC_NEST_PARENT) == errno.ENOSPC


def test_all_pages_of_domains_are_given_back(any_world):
    any_world.attach(any_world.domain())  # its CD table stays with the device
    before = any_world.pages.live
    domain = any_world.domain()
    any_world.attach(domain)
    domain.map(1 << 30, PA, 1 << 29, RW)
    domain.unmap(1 << 30, 1 << 29)
    domain.map(1 << 32, PA, 1 << 16, RW)
    any_world.attach(any_world.driver.blocked_domain)
    domain.free()
    assert any_world.pages.live == before


# -- PASIDs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [Features(), Features(two_level_cd_table=False)])
def test_a_pasid_is_translated_on_its_own(make, features):
    world = make(features)
    assert world.driver.max_pasids(world.device) == 1 << 16
    own, other = world.domain(IOMMU_HWPT_ALLOC_PASID), world.domain(IOMMU_HWPT_ALLOC_PASID)
    own.map(G1, PA, K4, RW)
    other.map(G1, PA + K4, K4, RW)
    world.attach(own)
    world.pasid(other, 5)
    assert (world.read(G1), world.read(G1, pasid=5), world.read(G1, pasid=6)) == (b"page 0", b"page 1", None)
    other.unmap(G1, K4)
    assert (world.read(G1), world.read(G1, pasid=5)) == (b"page 0", None)
    other.map(G1, PA + 2 * K4, K4, RW)
    assert world.read(G1, pasid=5) == b"page 2"
    core.replace_device_pasid(own, world.device, 5, core.AttachHandle())
    assert world.read(G1, pasid=5) == b"page 0"
    core.detach_device_pasid(own, world.device, 5)
    assert (world.read(G1), world.read(G1, pasid=5)) == (b"page 0", None)


@pytest.mark.parametrize(("name", "plain"), [("blocked_domain", None), ("identity_domain", b"page 3")])
def test_pasids_of_a_device_without_a_domain_of_its_own(world, name, plain):
    world.attach(getattr(world.driver, name))
    domain = world.domain(IOMMU_HWPT_ALLOC_PASID)
    domain.map(G1, PA + K4, K4, RW)
    world.pasid(domain, 2000)
    assert (world.read(G1, pasid=2000), world.read(PA + 3 * K4)) == (b"page 1", plain)
    core.detach_device_pasid(domain, world.device, 2000)
    assert (world.read(G1, pasid=2000), world.read(PA + 3 * K4)) == (None, plain)
    assert not world.device.priv.cdtab_in_ste


def test_stage_2_and_pasids_exclude_each_other(world):
    stage1, stage2 = world.domain(IOMMU_HWPT_ALLOC_PASID), world.domain(IOMMU_HWPT_ALLOC_NEST_PARENT)
    world.attach(stage2)
    assert error_of(world.pasid, stage1, 1) == errno.EINVAL
    world.attach(world.driver.blocked_domain)
    assert error_of(world.pasid, stage2, 1) == errno.EINVAL
    world.pasid(stage1, 1)
    assert error_of(stage2.attach_dev, world.device, world.driver.blocked_domain) == errno.EBUSY


# -- dirty bits ------------------------------------------------------------------------------------------------------


class Bitmap:
    def __init__(self):
        self.leaves = set()

    def set_leaves(self, start, lg2, count, mask):
        self.leaves |= {start + (n << lg2) for n in range(count) if mask >> n & 1}


def dirty(domain, flags=0):
    bitmap = Bitmap()
    domain.read_and_clear_dirty(G1, 4 * K4, flags, bitmap)
    return sorted((page - G1) // K4 for page in bitmap.leaves)


def test_writes_are_seen_in_the_dirty_bits(world):
    domain = world.domain(IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    world.attach(domain)
    domain.map(G1, PA, 4 * K4, RW)
    dirty(domain)
    domain.set_dirty_tracking(True)
    assert dirty(domain) == []
    world.device.pci.dma.write(G1 + 2 * K4, b"x")
    world.read(G1)
    assert dirty(domain, core.IOMMU_DIRTY_NO_CLEAR) == [2]
    assert dirty(domain) == [2]
    assert dirty(domain) == []


def test_a_page_written_through_a_cached_translation_stays_clean_as_the_kernel_flushes_nothing(world):
    """`iommu_dirty_bitmap_record()` gathers no page size, and so arm_smmu_iotlb_sync() returns at once."""
    domain = world.domain(IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    world.attach(domain)
    domain.map(G1, PA, 4 * K4, RW)
    dirty(domain)
    world.device.pci.dma.write(G1, b"x")
    assert dirty(domain) == [0]
    world.device.pci.dma.write(G1, b"y")
    assert dirty(domain) == []
    world.smmu.cmdq.issue([c.tlbi_nsnh_all()])
    world.device.pci.dma.write(G1, b"z")
    assert dirty(domain) == [0]


# -- invalidation ----------------------------------------------------------------------------------------------------


def test_a_batch_ends_before_nested_stage_1_and_before_device_tlbs():
    invs = Invalidations(12, ranges=True)
    invs.merge([Inv(S2_VMID, 3), Inv(S2_VMID_S1_CLEAR, 3), Inv(ATS_FULL, 8)])
    assert invs.batches(G1, K4, K4, leaf=True) == [
        [c.tlbi_s2_ipa(3, G1, True, tg=1, ttl=3, scale=0, num=0)],
        [c.tlbi_nh_all(3)],
        [c.atc_inv(8, 0, c.ATC_SIZE_ALL)],
    ]


def test_a_range_is_cut_into_what_a_command_can_say():
    invs = Invalidations(12, ranges=True)
    invs.merge([Inv(S1_ASID, 7)])
    (batch,) = invs.batches(G1, 0x4321 * K4, K4, leaf=True)
    pieces = [((c.TLBI_NUM.get(low) + 1) << c.TLBI_SCALE.get(low), high & c.TLBI_VA_MASK) for low, high in batch]
    assert sum(count for count, _ in pieces) == 0x4321
    assert [at for _, at in pieces] == [G1, G1 + K4, G1 + 0x321 * K4]
    assert invs.batches(G1, M2, M2, leaf=True) == [[c.tlbi_nh_va(0, 7, G1, True, tg=1, ttl=2, scale=9, num=0)]]
    (batch,) = invs.batches(G1, K4, K4, leaf=False)
    assert batch == [c.tlbi_nh_va(0, 7, G1, tg=1, scale=1, num=0)]


def test_without_range_commands_much_is_everything():
    invs = Invalidations(12, ranges=False)
    invs.merge([Inv(S1_ASID, 7)])
    assert invs.batches(G1, 512 * K4, K4, leaf=True) == [[c.tlbi_nh_asid(0, 7)]]
    (batch,) = invs.batches(G1, 3 * K4, K4, leaf=True)
    assert batch == [c.tlbi_nh_va(0, 7, G1 + n * K4, True) for n in range(3)]


def test_a_device_tlb_is_told_of_an_aligned_power_of_two():
    invs = Invalidations(12, ranges=True)
    invs.merge([Inv(ATS, 8, 5)])
    assert invs.batches(7 * K4, 4 * K4, K4, leaf=True) == [[c.atc_inv(8, 0, 4, 5)]]
    assert invs.batches(8 * K4, 4 * K4, K4, leaf=True) == [[c.atc_inv(8, 8 * K4, 2, 5)]]


def test_receivers_are_counted():
    invs = Invalidations(12, ranges=True)
    one, two = [Inv(S1_ASID, 1), Inv(ATS, 8)], [Inv(S1_ASID, 1), Inv(ATS, 9)]
    invs.merge(one)
    invs.merge(two)
    assert len(invs) == 3
    assert invs.unref(one) == [Inv(ATS, 8)]
    assert invs.unref(two) == two
    assert not invs


# -- device TLBs -----------------------------------------------------------------------------------------------------


def through_tlb(world, address, pasid=NO_PASID):
    try:
        return world.port.read(address, 6, pasid)
    except (DmaAbort, PageFault):
        return None


@pytest.mark.parametrize("flags", [0, IOMMU_HWPT_ALLOC_NEST_PARENT], ids=["stage 1", "stage 2"])
def test_a_device_tlb_forgets_what_is_unmapped(make, flags):
    world = make(ats=True)
    assert world.driver.capable(world.device, core.IOMMU_CAP_PCI_ATS_SUPPORTED)
    domain = world.domain(flags)
    domain.map(G1, PA, 2 * K4, RW)
    assert not world.port.enabled
    world.attach(domain)
    assert world.port.enabled
    assert [through_tlb(world, G1), through_tlb(world, G1 + K4)] == [b"page 0", b"page 1"]
    assert len(world.port.tlb) == 2
    domain.unmap(G1, K4)
    assert len(world.port.tlb) == (0 if flags else 1)  # under a guest's tables everything has to go
    assert [through_tlb(world, G1), through_tlb(world, G1 + K4)] == [None, b"page 1"]


def test_ats_follows_the_domain(make):
    world = make(ats=True)
    first, second = world.domain(), world.domain()
    first.map(G1, PA, K4, RW)
    second.map(G1, PA + K4, K4, RW)
    world.attach(first)
    assert through_tlb(world, G1) == b"page 0"
    world.attach(second)
    assert through_tlb(world, G1) == b"page 1"
    world.attach(world.driver.identity_domain)
    assert not world.port.enabled
    assert world.read(PA) == b"page 0"
    world.attach(first)
    assert through_tlb(world, G1) == b"page 0"
    world.attach(world.driver.blocked_domain)
    assert not world.port.enabled
    assert through_tlb(world, G1) is None


def test_a_pasid_has_its_own_part_of_the_device_tlb(make):
    world = make(ats=True)
    own, other = world.domain(IOMMU_HWPT_ALLOC_PASID), world.domain(IOMMU_HWPT_ALLOC_PASID)
    own.map(G1, PA, K4, RW)
    other.map(G1, PA + K4, K4, RW)
    world.attach(own)
    world.pasid(other, 5)
    assert (through_tlb(world, G1), through_tlb(world, G1, 5)) == (b"page 0", b"page 1")
    other.unmap(G1, K4)
    assert (through_tlb(world, G1), through_tlb(world, G1, 5)) == (b"page 0", None)
    other.map(G1, PA + 2 * K4, K4, RW)
    assert through_tlb(world, G1, 5) == b"page 2"
    core.detach_device_pasid(other, world.device, 5)
    assert (through_tlb(world, G1), through_tlb(world, G1, 5)) == (b"page 0", None)


def test_a_pasid_alone_switches_ats_on_and_off(make):
    world = make(ats=True)
    world.attach(world.driver.identity_domain)
    domain = world.domain(IOMMU_HWPT_ALLOC_PASID)
    domain.map(G1, PA, K4, RW)
    world.pasid(domain, 5)
    assert world.port.enabled
    assert through_tlb(world, G1, 5) == b"page 0"
    core.detach_device_pasid(domain, world.device, 5)
    assert not world.port.enabled
    assert world.read(PA) == b"page 0"


# -- stalls ----------------------------------------------------------------------------------------------------------


def stalled(world, address):
    """What became of a read that stalls, as far as it is decided."""
    with pytest.raises(Parked) as parked:
        world.device.pci.dma.read(address, 6)
    outcomes = []
    parked.value.then(outcomes.append)
    return outcomes


def test_a_stalled_transaction_that_nobody_waits_for_is_ended(make):
    world = make(Features(stall_model=regs.STALL_FORCED))
    world.attach(world.domain())
    assert stalled(world, G1) == [Outcome.ABORT]
    assert world.smmu.log[-1] == 'unpriv data read s1 "Input address caused fault" stall stag: 0x0'


@pytest.mark.parametrize(
    ("code", "outcome"), [(IOMMU_PAGE_RESP_SUCCESS, Outcome.RETRY), (IOMMU_PAGE_RESP_FAILURE, Outcome.ABORT)]
)
@pytest.mark.parametrize("flags", [0, IOMMU_HWPT_ALLOC_NEST_PARENT], ids=["stage 1", "stage 2"])
def test_a_stalled_transaction_waits_for_its_answer(make, flags, code, outcome):
    world = make(Features(stall_model=regs.STALL_FORCED))
    domain = world.domain(flags)
    groups = []
    domain.iopf_handler = groups.append
    core.attach_group_handle(domain, world.device.group, core.AttachHandle())
    outcomes = stalled(world, G1)
    (group,) = groups
    assert (outcomes, group.faults[0].addr, group.faults[0].perm) == ([], G1, 1)
    domain.map(G1, PA, K4, RW)
    iopf_group_response(group, code)
    assert outcomes == [outcome]
    world.attach(world.driver.blocked_domain)
    assert world.device.fault_param is None


# -- at random -------------------------------------------------------------------------------------------------------


def translated(world, iova):
    """Where a read of the device goes, None if it is refused."""
    try:
        _, _, delta, rights = world.unit.translate(world.device.pci.dma, NO_PASID, iova, 8, READ)
    except TranslationFault:
        return None
    assert rights & READ
    return iova + delta


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_mapped_unmapped_and_attached_no_device_sees_what_is_not_there(any_world, seed):
    rng = random.Random(seed)
    world = any_world
    domains = [world.domain(), world.domain()]
    if world.smmu.nesting:
        domains.append(world.domain(IOMMU_HWPT_ALLOC_NEST_PARENT))
    sizes = [1 << n for n in range(30) if domains[0].pgsize_bitmap >> n & 1]
    small = sizes[0]
    slots = 4 * sizes[1] // small
    mapped = [{} for _ in domains]
    current = None
    for _ in range(60):
        which = rng.randrange(len(domains))
        domain, pages = domains[which], mapped[which]
        what = rng.random()
        if what < 0.2:
            current = which
            world.attach(domain)
        elif what < 0.6:
            size = rng.choice(sizes)
            count = rng.choice([1, 2, 3, 7]) * size // small
            first = rng.randrange(slots) * small // size * size // small
            target = PA + first * small if rng.random() < 0.8 else PA + (first + 1) * small
            if not any(n in pages for n in range(first, first + count)):  # which iommufd never asks for
                domain.map(G1 + first * small, target, count * small, RW)
                pages |= {first + n: target + n * small for n in range(count)}
        elif pages:
            first = rng.choice(list(pages))
            while first - 1 in pages:
                first -= 1
            last = first
            while last + 1 in pages:
                last += 1
            assert domain.unmap(G1 + first * small, (last + 1 - first) * small) == (last + 1 - first) * small
            for n in range(first, last + 1):
                del pages[n]
        if current is not None:
            visible = mapped[current]
            for n in [*rng.sample(range(slots), 4), *rng.sample(list(visible), min(4, len(visible)))]:
                iova = G1 + n * small
                assert domains[current].iova_to_phys(iova) == visible.get(n)
                assert translated(world, iova) == visible.get(n)
