"""The VT-d driver on the fake unit: what it says, what it writes, and that nothing stale is left."""

import errno
import struct

import pytest

from fakedev.dma import DmaAbort
from fakedev.endpoints.edu import Edu
from fakedev.machine import VTD_LEGACY_CAP, VTD_LEGACY_ECAP, Machine
from fakedev.machines.named import machine
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu import core
from kernel_model.iommu.intel.second_stage import second_stage_width
from kernel_model.iommu.registry import attach_drivers, groups_of
from tests.kernel_model.iommu.driver_kernel import driver_kernel

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
PA = 0x4000_0000


class World:
    """A machine with its drivers, and no more of a kernel."""

    def __init__(self, box):
        self.box = box
        kernel = driver_kernel(box)
        self.pages, self.files = kernel.pages, kernel.files
        self.devices = {device.name: device for device in attach_drivers(kernel)}
        self.device = self.devices["0000:00:10.0"]
        self.dma = self.device.pci.dma
        self.device.pci.config_write(4, 2, 6)

    def own(self):
        core.device_claim_dma_owner(self.device, self)

    def domain(self):
        return core.paging_domain_alloc(self.device)

    def attach(self, domain):
        core.attach_group_handle(domain, self.device.group, core.AttachHandle())

    def detach(self, domain):
        core.detach_group_handle(domain, self.device.group)

    def refused(self, address):
        try:
            self.dma.read(address, 4)
        except DmaAbort:
            return True
        return False


@pytest.fixture
def world():
    world = World(machine("q35-vtd-legacy"))
    yield world
    world.box.close()


def small_machine(cap=VTD_LEGACY_CAP, ecap=VTD_LEGACY_ECAP):
    box = Machine("small")
    box.add(Edu("0000:00:10.0", command=4), box.add_vtd(cap=cap, ecap=ecap))
    return World(box)


def test_groups_are_those_of_the_vm(world):
    groups = groups_of(list(world.devices.values()))
    assert [[device.name[8:] for device in group.devices] for group in groups] == [
        *([f"0{n}.0"] for n in range(9)),
        ["10.0"],
        ["1f.0", "1f.2", "1f.3"],
    ]
    assert world.device.group.id == 9


def test_the_msi_window_is_the_only_reserved_region(world):
    regions = core.get_group_resv_regions(world.device.group)
    assert [(r.start, r.last, r.type) for r in regions] == [(0xFEE00000, 0xFEEFFFFF, core.IOMMU_RESV_MSI)]


def test_sysfs_shows_what_it_shows_in_the_vm(world):
    here = "/sys/class/iommu/dmar0"
    assert world.files.listdir("/sys/class/iommu") == ["dmar0"]
    assert {name: show() for name, show in world.device.iommu.sysfs_attributes().items()} == {
        "intel-iommu/address": "fed90000",
        "intel-iommu/cap": "d2008c222f0686",
        "intel-iommu/domains_supported": "65536",
        "intel-iommu/domains_used": "11",
        "intel-iommu/ecap": "f00f4a",
        "intel-iommu/version": "1:0",
    }
    assert len(world.files.listdir(f"{here}/intel-iommu")) == 6
    assert len(world.files.listdir(f"{here}/devices")) == 13
    assert world.files.readlink("/sys/devices/pci0000:00/0000:00:10.0/iommu") == "../../virtual/iommu/dmar0"


def test_hw_info_is_the_two_capability_registers(world):
    for wanted in (0, 1):
        kind, data = world.device.iommu.hw_info(world.device, wanted)
        assert (kind, struct.unpack("<IIQQ", data)) == (1, (1, 0, VTD_LEGACY_CAP, VTD_LEGACY_ECAP))
    with pytest.raises(KernelError) as caught:
        world.device.iommu.hw_info(world.device, 2)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_capabilities_follow_the_registers(world):
    iommu, device = world.device.iommu, world.device
    assert iommu.capable(device, core.IOMMU_CAP_CACHE_COHERENCY)
    assert not iommu.capable(device, core.IOMMU_CAP_ENFORCE_CACHE_COHERENCY)
    assert not iommu.capable(device, core.IOMMU_CAP_DIRTY_TRACKING)
    assert not iommu.capable(device, core.IOMMU_CAP_PCI_ATS_SUPPORTED)
    assert iommu.device_isolated_msi(device)
    assert core.group_has_isolated_msi(device.group)


@pytest.mark.parametrize(("flags", "works"), [(0, 1), (8, 1), (1, 0), (2, 0), (4, 0), (16, 0), (9, 0)])
def test_only_the_pasid_flag_is_accepted(world, flags, works):
    if works:
        core.paging_domain_alloc_flags(world.device, flags).free()
    else:
        with pytest.raises(KernelError) as caught:
            core.paging_domain_alloc_flags(world.device, flags)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_a_domain_has_48_bits_and_three_page_sizes(world):
    domain = world.domain()
    assert (domain.aperture_start, domain.aperture_end) == (0, (1 << 48) - 1)
    assert domain.pgsize_bitmap == K4 | M2 | G1


@pytest.mark.parametrize(
    ("mgaw", "sagaw", "width"),
    [(48, 0b110, (48, 3)), (48, 0b1110, (48, 4)), (57, 0b1110, (57, 4)), (39, 0b10, (39, 2)), (39, 0b110, (39, 3))],
)
def test_the_width_of_a_domain_follows_mgaw_and_sagaw(mgaw, sagaw, width):
    assert second_stage_width(mgaw, sagaw) == width


def test_dma_follows_claim_attach_and_detach(world):
    world.box.memory.write(0x70000000, b"data")
    assert world.refused(0x1000)
    world.own()
    domain = world.domain()
    domain.map(0x1000, 0x70000000, K4, 3)
    assert world.refused(0x1000)
    world.attach(domain)
    assert world.dma.read(0x1000, 4) == b"data"
    world.detach(domain)
    assert world.refused(0x1000)


def test_a_map_is_seen_after_the_same_address_faulted(world):
    world.own()
    domain = world.domain()
    world.attach(domain)
    for iova, length in ((0x1000, K4), (M2, M2), (G1, G1)):
        assert world.refused(iova)
        domain.map(iova, 0, length, 3)
        assert not world.refused(iova)


@pytest.mark.parametrize("length", [K4, 3 * K4, M2, M2 + 3 * K4, G1 + M2])
def test_after_an_unmap_nothing_is_cached_and_dma_is_refused(world, length):
    world.own()
    domain = world.domain()
    world.attach(domain)
    domain.map(G1 - K4, M2 - K4, length, 3)
    for offset in range(0, length, max(K4, length // 7 // K4 * K4)):
        assert not world.refused(G1 - K4 + offset)
    assert world.box.tlb_entries
    assert domain.unmap(G1 - K4, length) == length
    assert world.box.tlb_entries == 0
    assert world.refused(G1 - K4)


def test_unmapping_one_area_keeps_the_translations_of_its_neighbours(world):
    world.own()
    domain = world.domain()
    world.attach(domain)
    domain.map(0x1000, PA, K4, 3)
    domain.map(0x2000, PA, K4, 3)
    assert not world.refused(0x1000)
    assert not world.refused(0x2000)
    domain.unmap(0x1000, K4)
    assert world.box.tlb_entries == 1


def test_replacing_the_domain_takes_effect_at_once(world):
    world.own()
    first, second = world.domain(), world.domain()
    world.box.memory.write(0x1000000, b"1111")
    world.box.memory.write(0x2000000, b"2222")
    first.map(0x1000, 0x1000000, K4, 3)
    second.map(0x1000, 0x2000000, K4, 3)
    world.attach(first)
    assert world.dma.read(0x1000, 4) == b"1111"
    core.replace_group_handle(world.device.group, second, core.AttachHandle())
    assert world.dma.read(0x1000, 4) == b"2222"


@pytest.mark.parametrize("cap", [VTD_LEGACY_CAP, VTD_LEGACY_CAP & ~0x80])
def test_a_domain_id_that_is_used_again_brings_no_old_translations(cap):
    world = small_machine(cap=cap)
    world.own()
    first, second = world.domain(), world.domain()
    for domain, text in ((first, b"1111"), (second, b"2222")):
        pa = 0x1000000 * text[0]
        world.box.memory.write(pa, text)
        domain.map(0x1000, pa, K4, 3)
    for domain, text in ((first, b"1111"), (second, b"2222")):
        world.attach(domain)
        assert domain.domain_id(world.device.iommu.unit) == 2
        assert world.dma.read(0x1000, 4) == text
        world.detach(domain)
        assert world.box.tlb_entries == 0
    world.box.close()


def test_a_queue_that_stands_still_is_noticed(world):
    world.own()
    domain = world.domain()
    world.attach(domain)
    for _ in range(300):
        domain.map(0x1000, PA, K4, 3)
        domain.unmap(0x1000, K4)
    world.box.mmio.write(0xFED90018, 4, 1 << 31)
    with pytest.raises(KernelBug):
        domain.map(0x1000, PA, K4, 3)


def test_everything_is_given_back(world):
    before = world.pages.live, world.box.tlb_entries, set(world.device.iommu.unit.domain_ids)
    world.own()
    domain = world.domain()
    world.attach(domain)
    domain.map(0x1000, PA, 5 * M2, 3)
    assert not world.refused(0x1000)
    world.detach(domain)
    domain.free()
    core.device_release_dma_owner(world.device)
    assert (world.pages.live, world.box.tlb_entries, set(world.device.iommu.unit.domain_ids)) == before


def test_domain_ids_are_the_lowest_free_from_2():
    world = small_machine()
    unit = world.device.iommu.unit
    assert unit.domain_ids == {2}
    world.own()
    assert unit.domain_ids == set()
    domain = world.domain()
    assert unit.domain_ids == set()
    world.attach(domain)
    assert domain.domain_id(unit) == 2
    world.box.close()


def test_no_domain_id_left_is_enospc_and_the_group_stays_blocked():
    world = small_machine(cap=VTD_LEGACY_CAP & ~7)
    unit = world.device.iommu.unit
    assert unit.caps.ndoms == 16
    world.own()
    unit.domain_ids.update(range(2, 16))
    with pytest.raises(KernelError) as caught:
        world.attach(world.domain())
    assert caught.value.errno == errno.ENOSPC
    assert world.device.group.domain is world.device.group.blocking_domain
    world.box.close()


def test_the_identity_domain_gives_addresses_back(world):
    world.own()
    world.box.memory.write(0x70000000, b"data")
    identity = world.device.iommu.identity_domain
    world.attach(identity)
    assert world.dma.read(0x70000000, 4) == b"data"
    world.detach(identity)
    assert world.refused(0x70000000)


def test_fault_records_are_logged_and_cleared_each_time(world):
    world.own()
    domain = world.domain()
    world.attach(domain)
    for n in range(3):
        assert world.refused(0x1000 * n)
    with pytest.raises(DmaAbort):
        world.dma.write(0x9000, b"x")
    log = world.device.iommu.unit.fault_log
    assert len(log) == 4
    assert log[2] == (
        "DMAR: [DMA Read NO_PASID] Request device [00:10.0] fault addr 0x2000 [fault reason 0x06] no read permission"
    )
    assert log[3].startswith(
        "DMAR: [DMA Write NO_PASID] Request device [00:10.0] fault addr 0x9000 [fault reason 0x05]"
    )


def test_snoop_control_is_enforced_where_the_unit_has_it():
    world = small_machine(ecap=VTD_LEGACY_ECAP | 1 << 7)
    world.own()
    domain = world.domain()
    domain.map(0x1000, PA, K4, 3)
    assert domain.enforce_cache_coherency()
    domain.map(0x2000, PA, K4, 3)
    world.attach(domain)
    assert not world.refused(0x2000)
    words, root = world.box.memory.words, domain.table.root
    for _ in range(3):
        root = words[root >> 3] & ~0xFFF
    assert [words[(root >> 3) + n] >> 11 & 1 for n in (1, 2)] == [0, 1]
    world.box.close()


def test_a_unit_without_snoop_control_refuses_a_domain_that_enforces_it(world):
    domain = world.domain()
    world.own()
    domain.force_snooping = True
    with pytest.raises(KernelError) as caught:
        world.attach(domain)
    assert caught.value.errno == errno.EINVAL
    world.attach(world.domain())


def test_enforcing_fails_while_attached_to_a_unit_without_snoop_control(world):
    world.own()
    domain = world.domain()
    world.attach(domain)
    assert not domain.enforce_cache_coherency()


def test_without_caching_mode_a_map_queues_nothing():
    for cap, moved in ((VTD_LEGACY_CAP, True), (VTD_LEGACY_CAP & ~0x80, False)):
        world = small_machine(cap=cap)
        world.own()
        domain = world.domain()
        world.attach(domain)
        head = world.box.mmio.read(0xFED90080, 8)
        domain.map(0x1000, PA, K4, 3)
        assert (world.box.mmio.read(0xFED90080, 8) != head) is moved
        assert not world.refused(0x1000)
        world.box.close()
