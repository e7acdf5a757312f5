"""The VT-d driver in scalable mode: the words of its tables, and the order of its stores and invalidations.

One long file: every test observes the same unit on one bench, through the helpers below.
"""

from types import SimpleNamespace

import pytest

from fakedev.bridge import PciBridge
from fakedev.dma import DmaAbort
from fakedev.endpoints.dsa import Dsa
from fakedev.endpoints.edu import Edu
from fakedev.machine import VTD_FIRST_STAGE_CAP, VTD_FIRST_STAGE_ECAP, VTD_SCALABLE_CAP, VTD_SCALABLE_ECAP, Machine
from fakedev.pci import PciFunction
from fakedev.pcie import PCI_EXP_TYPE_ENDPOINT
from fakedev.vtd import descriptors as qi
from fakedev.vtd.features import SCALABLE, Features
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.iommu.intel import pasid as pasid_entries
from kernel_model.iommu.intel.cache import IOTLB
from kernel_model.iommu.intel.device import info_of
from kernel_model.iommu.intel.first_stage import FirstStageDomain, first_stage_width
from kernel_model.iommu.intel.second_stage import SecondStageDomain
from kernel_model.iommu.registry import attach_drivers
from kernel_model.pci_ats import ats_enabled, pasid_enabled, pri_enabled
from tests.kernel_model.iommu.driver_kernel import driver_kernel
from tests.kernel_model.iommu.scalable_world import DIRTY, NEST_PARENT, PA, PASID, RTADDR, World

K4, M2 = 1 << 12, 1 << 21
CM = {"cm": 1}
FIRST_ONLY = {"ssts": 0, "nest": 0, "ssads": 0}
SECOND_ONLY = {"fsts": 0, "fs5lp": 0, "fs1gp": 0, "nest": 0, "eafs": 0}


def features(**changes):
    return Features(**{**SCALABLE.__dict__, **changes})


@pytest.fixture
def make():
    worlds = []

    def build(**changes):
        worlds.append(World(features(**changes)))
        return worlds[-1]

    yield build
    for world in worlds:
        world.box.close()


@pytest.fixture
def world(make):
    return make()


class Words:
    """The words of memory, with a list of the stores."""

    def __init__(self, words, log):
        self._words, self._log = words, log

    def __getitem__(self, index):
        return self._words[index]

    def __setitem__(self, index, value):
        self._words[index] = value
        self._log.append((index, value))


class Spy:
    """What the driver does in the block: ("store", word of the entry, value), and ("flush", descriptors)."""

    def __init__(self, world, device, pasid=0):
        self.unit = world.edu.iommu.unit
        self.first = info_of(device).pasid_table.entry(pasid)
        self.log = []

    def __enter__(self):
        memory, submit = self.unit.memory, self.unit.submit
        self._undo = memory, submit

        def note(item):
            index, value = item
            if self.first <= index < self.first + 8:
                self.log.append(("store", index - self.first, value))

        spy = Words(memory.words, SimpleNamespace(append=note))
        self.unit.memory = SimpleNamespace(words=spy, ram=memory.ram)
        self.unit.submit = lambda descriptors, **options: (
            self.log.append(("flush", list(descriptors))),
            submit(descriptors, **options),
        )
        return self.log

    def __exit__(self, *_):
        self.unit.memory = self._undo[0]
        del self.unit.submit


def error_of(call, *arguments, **named):
    with pytest.raises(KernelError) as caught:
        call(*arguments, **named)
    return caught.value.errno


# -- the unit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "agaw", "msagaw"),
    [
        ({}, 3, 3),
        ({"fs5lp": 0}, 2, 2),
        (FIRST_ONLY, 3, 3),
        (FIRST_ONLY | {"fs5lp": 0}, 2, 2),
        (SECOND_ONLY, 3, 3),
        (SECOND_ONLY | {"sagaw": 0b0010}, 1, 1),
    ],
)
def test_the_address_width_is_one_that_both_stages_have(make, changes, agaw, msagaw):
    unit = make(**changes).edu.iommu.unit
    assert (unit.agaw, unit.msagaw) == (agaw, msagaw)


def test_registers_tell_the_unit_of_scalable_mode_and_large_descriptors(world):
    assert world.box.mmio.read(RTADDR, 8) >> 10 & 3 == 1
    assert world.box.mmio.read(0xFED9_0090, 8) & 0xFFF == 1 << 11 | 1


def test_the_queue_goes_round(world):
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    for _ in range(300):
        domain.map(K4, PA, K4, 3)
        assert domain.unmap(K4, K4) == K4
    assert world.reads(K4) is None


# -- context entries -------------------------------------------------------------------------------------------------


def context(world, device):
    rid, words = device.pci.rid, world.words
    root = world.box.mmio.read(RTADDR, 8) & ~0xFFF
    table = words[(root >> 3) + (rid >> 8) * 2 + (rid >> 7 & 1)]
    return words[(table & ~0xFFF) + (rid & 0x7F) * 32 >> 3 :][:4].tolist()


def test_the_context_entry_has_the_services_that_unit_and_device_have(make):
    both, no_pri, no_ats = make(), make(prs=0, pds=0, sms=0), make(dt=0, prs=0, pds=0, sms=0, nwfs=0, ptrs=0)
    for world, bits in ((both, 0b11101), (no_pri, 0b01101), (no_ats, 0b01001)):
        low, *rest = context(world, world.dsa)
        assert low & 0x1FF == bits
        assert rest == [0, 0, 0]  # requests without a PASID are for PASID 0
        assert context(world, world.edu)[0] & 0x1FF == 1


@pytest.mark.parametrize(
    ("pss", "pdts", "size"), [(3, 2, 4096), (14, 2, 4096), (15, 3, 8192), (18, 6, 1 << 16), (19, 7, 1 << 17)]
)
def test_the_directory_is_as_large_as_the_pasids_want(make, pss, pdts, size):
    world = make(pss=pss)
    table = info_of(world.dsa).pasid_table
    assert (table.pdts, table.max_pasid) == (pdts, size * 8)
    assert context(world, world.dsa)[0] >> 9 & 7 == pdts
    assert context(world, world.edu)[0] >> 9 & 7 == 2
    assert world.dsa.max_pasids == 2 << pss
    assert world.edu.max_pasids == 0


# -- the words of PASID-table entries --------------------------------------------------------------------------------


def test_words_of_a_first_stage_entry(world):
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    did, agaw = domain.domain_id(world.edu.iommu.unit), 3
    # 5 levels; walks snoop.
    assert world.entry(world.edu) == [1 | agaw << 2 | 1 << 6, did | 1 << 23, domain.table.root | 1 << 2, 0, 0, 0, 0, 0]


def test_words_of_a_first_stage_entry_of_four_levels_whose_walks_do_not_snoop(make):
    world = make(fs5lp=0, smpwcs=0, ssads=0, eafs=0)
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    assert world.entry(world.edu)[:3] == [
        1 | 2 << 2 | 1 << 6,
        domain.domain_id(world.edu.iommu.unit),
        domain.table.root,
    ]


def test_words_of_a_second_stage_entry(make):
    world = make(**SECOND_ONLY)
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    did = domain.domain_id(world.edu.iommu.unit)
    assert world.entry(world.edu) == [domain.table.root | 1 | 3 << 2 | 2 << 6, did | 1 << 23, 0, 0, 0, 0, 0, 0]


def test_words_of_a_pass_through_entry(world):
    world.attach(world.edu.iommu.identity_domain)
    assert world.entry(world.edu) == [1 | 3 << 2 | 4 << 6, 1 | 1 << 23, 0, 0, 0, 0, 0, 0]
    assert world.reads(PA) == 0


# -- the order of stores and invalidations ---------------------------------------------------------------------------


def attached(world, kind, device, pasid):
    """Attach a domain of a kind in front of a spy; what it did."""
    unit = world.edu.iommu.unit
    domain = {
        "first": lambda: core.paging_domain_alloc(device),
        "second": lambda: core.paging_domain_alloc_flags(device, DIRTY),
        "nested": lambda: world.nested(world.parent()),
        "pass-through": lambda: world.edu.iommu.identity_domain,
    }[kind]()
    with Spy(world, device, pasid) as log:
        world.attach(domain, device, pasid)
    return (domain.domain_id(unit) if kind != "pass-through" else 1), log


KINDS = ["first", "second", "nested", "pass-through"]


@pytest.mark.parametrize("pasid", [0, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_becomes_present_by_its_last_store(world, kind, pasid):
    _, log = attached(world, kind, world.dsa, pasid)
    final = world.entry(world.dsa, pasid)
    assert log[:8] == [("store", n, 0) for n in range(8)]
    assert log[8:-2] == [("store", n, final[n]) for n in range(1, 8) if final[n]]
    assert log[-2:] == [("store", 0, final[0] & ~1), ("store", 0, final[0])]
    assert final[0] & 1


@pytest.mark.parametrize("pasid", [0, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_hardware_with_caching_mode_hears_of_a_new_entry(make, kind, pasid):
    world = make(**CM)
    did, log = attached(world, kind, world.dsa, pasid)
    flushes = [entry for entry in log if entry[0] == "flush"]
    assert flushes == log[-2:]
    assert flushes == [
        ("flush", [qi.pasid_cache(did, pasid, qi.PC_PASID)]),
        ("flush", [qi.pasid_iotlb(did, pasid, 0, 0, qi.PIOTLB_PASID)]),
    ]


@pytest.mark.parametrize("pasid", [0, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_goes_is_cleared_when_the_caches_have_forgotten_it(world, kind, pasid):
    did, _ = attached(world, kind, world.dsa, pasid)
    before, group = world.entry(world.dsa, pasid), world.dsa.group
    domain = group.pasid_array[pasid].domain
    with Spy(world, world.dsa, pasid) as log:
        if pasid:
            core.detach_device_pasid(domain, world.dsa, pasid)
        else:
            core.detach_group_handle(domain, group)
    whole = qi.pasid_iotlb(did, pasid, 0, 0, qi.PIOTLB_PASID) if kind in KINDS[::3] else qi.iotlb(did, 0, 0, qi.DOMAIN)
    rid, depth = world.dsa.pci.rid, 0  # 32 at once is 0
    device = qi.pasid_device_tlb(rid, 0, pasid, 0, 52, depth) if pasid else qi.device_tlb(rid, 0, 0, 52, depth)
    assert log == [
        ("store", 0, before[0] & ~1),
        ("flush", [qi.pasid_cache(did, pasid, qi.PC_PASID)]),
        ("flush", [whole]),
        ("flush", [device]),
        *(("store", n, 0) for n in range(8)),
    ]


def test_a_device_without_ats_is_sent_no_invalidation(world):
    attached(world, "first", world.edu, 0)
    with Spy(world, world.edu) as log:
        core.detach_group_handle(world.edu.group.domain, world.edu.group)
    assert [len(entry[1]) for entry in log if entry[0] == "flush"] == [1, 1]


def test_a_replaced_pasid_is_torn_down_first(world):
    first, second = (core.paging_domain_alloc(world.dsa) for _ in range(2))
    world.attach(first, world.dsa, 70)
    with Spy(world, world.dsa, 70) as log:
        core.replace_device_pasid(second, world.dsa, 70, core.AttachHandle())
    present = [value & 1 for kind, where, value in (e for e in log if e[0] == "store") if where == 0]
    assert present == [0, 0, 0, 0, 1]  # P off; cleared; cleared again; without P; with it
    assert not first.dev_pasids
    assert [pasid for _, pasid in second.dev_pasids] == [70]
    assert not first.cache_tags.tags


def test_an_entry_that_is_there_is_ebusy(world):
    attached(world, "first", world.edu, 0)
    assert error_of(pasid_entries.setup_pass_through, info_of(world.edu), 0) == 16


@pytest.mark.parametrize("stage", [FIRST_ONLY, SECOND_ONLY])
def test_a_stage_that_the_unit_lacks_is_einval(make, stage):
    world = make(**stage)
    info = info_of(world.edu)
    if stage is SECOND_ONLY:
        assert error_of(pasid_entries.setup_first_level, info, 0, 2, PA, 4) == 22
    else:
        assert error_of(pasid_entries.setup_second_level, info, 0, 2, PA, 2) == 22


def test_no_page_for_a_pasid_table_is_enodev(world):
    info, unit = info_of(world.dsa), world.edu.iommu.unit
    pages = unit.pages

    def fails(*_):
        raise KernelError(12, "none left")

    unit.pages = SimpleNamespace(alloc=fails)
    assert error_of(pasid_entries.setup_pass_through, info, 1 << 12) == 19
    unit.pages = pages


def test_dirty_tracking_changes_one_bit_and_flushes_the_second_stage(world):
    domain = core.paging_domain_alloc_flags(world.dsa, DIRTY)
    world.attach(domain, world.dsa)
    did, before = domain.domain_id(world.edu.iommu.unit), world.entry(world.dsa)[0]
    with Spy(world, world.dsa) as log:
        domain.set_dirty_tracking(True)
    assert log == [
        ("store", 0, before | 1 << 9),
        ("flush", [qi.pasid_cache(did, 0, qi.PC_PASID)]),
        ("flush", [qi.iotlb(did, 0, 0, qi.DOMAIN)]),
        ("flush", [qi.device_tlb(world.dsa.pci.rid, 0, 0, 52, 0)]),
    ]
    with Spy(world, world.dsa) as log:
        pasid_entries.setup_dirty_tracking(info_of(world.dsa), 0, True)
    assert log == []


# -- domains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "flags", "stage"),
    [
        ({}, 0, FirstStageDomain),
        ({}, PASID, FirstStageDomain),
        ({}, DIRTY, SecondStageDomain),
        ({}, NEST_PARENT, SecondStageDomain),
        ({}, NEST_PARENT | DIRTY | PASID, SecondStageDomain),
        ({}, 16, 95),
        (FIRST_ONLY, 0, FirstStageDomain),
        (FIRST_ONLY, DIRTY, 95),
        (FIRST_ONLY, NEST_PARENT, 95),
        (SECOND_ONLY, 0, SecondStageDomain),
        (SECOND_ONLY, PASID | DIRTY, SecondStageDomain),
        (SECOND_ONLY, NEST_PARENT, 95),
        ({"smpwcs": 0, "ssads": 0, "eafs": 0}, DIRTY, 95),
    ],
)
def test_a_domain_is_of_the_first_stage_if_that_can_do_what_is_asked(make, changes, flags, stage):
    world = make(**changes)
    if isinstance(stage, int):
        assert error_of(core.paging_domain_alloc_flags, world.edu, flags) == stage
    else:
        assert type(core.paging_domain_alloc_flags(world.edu, flags)) is stage


@pytest.mark.parametrize(
    ("mgaw", "five", "width"),
    [(57, True, (57, 4)), (57, False, (48, 3)), (48, True, (48, 3)), (39, False, (39, 3)), (52, True, (52, 4))],
)
def test_the_width_of_a_first_stage_follows_mgaw_and_levels(mgaw, five, width):
    assert first_stage_width(mgaw, five) == width


@pytest.mark.parametrize(
    ("changes", "last", "sizes"), [({}, 56, 0x4020_1000), ({"fs5lp": 0, "fs1gp": 0}, 47, 0x20_1000)]
)
def test_a_first_stage_gives_out_the_lower_half(make, changes, last, sizes):
    world = make(**changes)
    domain = core.paging_domain_alloc(world.edu)
    assert (domain.aperture_start, domain.aperture_end) == (0, (1 << last) - 1)
    assert domain.pgsize_bitmap == sizes
    top = (1 << last) - K4
    domain.map(top, PA, K4, 3)
    world.attach(domain)
    assert world.reads(top) == 0
    assert world.reads(top + K4) is None
    assert error_of(domain.map, top + K4, PA, K4, 3) == 34


def test_a_first_stage_lets_read_what_may_be_written(world):
    domain = core.paging_domain_alloc(world.edu)
    domain.map(K4, PA, K4, core.IOMMU_WRITE)
    domain.map(2 * K4, PA, K4, core.IOMMU_READ)
    world.attach(domain)
    assert world.reads(K4) == 0
    with pytest.raises(Exception, match="0x2000"):
        world.edu.pci.dma.write(2 * K4, b"x")


def test_snooping_is_a_bit_of_the_entries_of_devices_but_not_of_pasids(world):
    domain = core.paging_domain_alloc(world.dsa)
    world.attach(domain, world.dsa)
    world.attach(domain, world.dsa, 5)
    did, before = domain.domain_id(world.edu.iommu.unit), world.entry(world.dsa)[1]
    with Spy(world, world.dsa) as log:
        assert domain.enforce_cache_coherency()
    assert log == [
        ("store", 1, before | 1 << 24),
        ("flush", [qi.pasid_cache(did, 0, qi.PC_PASID)]),
        ("flush", [qi.pasid_iotlb(did, 0, 0, 0, qi.PIOTLB_PASID)]),
        ("flush", [qi.device_tlb(world.dsa.pci.rid, 0, 0, 52, 0)]),
    ]
    assert not world.entry(world.dsa, 5)[1] >> 24 & 1
    world.attach(domain, world.edu)  # one that comes later has it from the start
    assert world.entry(world.edu)[1] >> 24 & 1


def test_snooping_is_refused_without_snoop_control(make):
    world = make(sc=0)
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    assert not domain.enforce_cache_coherency()
    assert not world.edu.iommu.capable(world.edu, core.IOMMU_CAP_ENFORCE_CACHE_COHERENCY)


@pytest.mark.parametrize(
    ("made", "for_unit"),
    [
        ({}, {"fsts": 0, "fs5lp": 0, "fs1gp": 0, "nest": 0, "eafs": 0}),
        ({}, {"smpwcs": 0, "ssads": 0, "eafs": 0}),
        ({}, {"fs5lp": 0}),
        ({}, {"fs1gp": 0}),
        (SECOND_ONLY, SECOND_ONLY | {"sslps": 1}),
        (SECOND_ONLY, SECOND_ONLY | {"mgaw": 47}),
        (SECOND_ONLY, SECOND_ONLY | CM),
    ],
)
def test_a_domain_of_a_better_unit_is_einval(make, made, for_unit):
    domain = core.paging_domain_alloc(make(**made).edu)
    assert error_of(domain.check_compatible, make(**for_unit).edu.iommu.unit) == 22


# -- what a change of a table invalidates ----------------------------------------------------------------------------


def flushed(world, call, *arguments):
    with Spy(world, world.dsa) as log:
        call(*arguments)
    return [entry[1] for entry in log if entry[0] == "flush"]


def test_an_unmap_goes_to_every_cache_in_one_batch(world):
    domain = core.paging_domain_alloc(world.dsa)
    domain.map(M2, PA, 4 * K4, 3)
    for pasid in (0, 5):
        world.attach(domain, world.dsa, pasid)
    world.attach(domain, world.edu)
    did, rid = domain.domain_id(world.edu.iommu.unit), world.dsa.pci.rid
    assert flushed(world, domain.unmap, M2, 4 * K4) == [
        [
            qi.pasid_iotlb(did, 0, M2, 2, qi.PIOTLB_PAGES, 1),
            qi.device_tlb(rid, 0, M2, 2, 0),
            qi.pasid_iotlb(did, 5, M2, 2, qi.PIOTLB_PAGES, 1),
            qi.pasid_device_tlb(rid, 0, 5, M2, 2, 0),
        ]
    ]
    assert domain.cache_tags.tags[0].users == 2  # of both devices


def test_a_batch_has_sixteen_descriptors(world):
    domain = core.paging_domain_alloc(world.dsa)
    domain.map(M2, PA, K4, 3)
    for pasid in range(1, 11):
        world.attach(domain, world.dsa, pasid)
    assert [len(batch) for batch in flushed(world, domain.unmap, M2, K4)] == [16, 4]


def test_an_unmap_of_a_second_stage_goes_by_domain(make):
    world = make(**SECOND_ONLY, mamv=9)
    domain = core.paging_domain_alloc(world.edu)
    domain.map(M2, PA, 8 * M2, 3)
    world.attach(domain)
    did = domain.domain_id(world.edu.iommu.unit)
    assert flushed(world, domain.unmap, M2, M2) == [[qi.iotlb(did, M2, 9, qi.SELECTIVE, 1)]]
    assert flushed(world, domain.unmap, 2 * M2, 6 * M2) == [[qi.iotlb(did, 0, 0, qi.DOMAIN)]]


def test_all_of_a_first_stage_is_one_descriptor(world):
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    did = domain.domain_id(world.edu.iommu.unit)
    assert flushed(world, domain.cache_tags.flush_all) == [[qi.pasid_iotlb(did, 0, 0, 0, qi.PIOTLB_PASID)]]


@pytest.mark.parametrize(("changes", "told"), [(CM, 0), (CM | SECOND_ONLY, 1), (SECOND_ONLY, 0)])
def test_only_a_second_stage_with_caching_mode_tells_of_new_mappings(make, changes, told):
    world = make(**changes)
    domain = core.paging_domain_alloc(world.edu)
    world.attach(domain)
    assert len(flushed(world, domain.map, M2, PA, K4, 3)) == told
    assert world.reads(M2) == 0


def test_nothing_is_cached_after_an_unmap_by_any_device_or_pasid(world):
    domain = core.paging_domain_alloc(world.dsa)
    for pasid in (0, 5):
        world.attach(domain, world.dsa, pasid)
    for length in (K4, M2, 3 * M2 + K4):
        domain.map(M2, PA, length, 3)
        assert world.reads(M2 + length - 8, world.dsa) == 0
        assert world.reads(M2 + length - 8, world.dsa, pasid=5) == 0
        domain.unmap(M2, length)
        assert world.reads(M2 + length - 8, world.dsa) is None
        assert world.reads(M2 + length - 8, world.dsa, pasid=5) is None


# -- devices ---------------------------------------------------------------------------------------------------------


def test_services_come_on_at_probe_and_the_default_domain_knows_of_the_device_tlb(world):
    function = world.dsa.pci
    assert pasid_enabled(function)
    assert ats_enabled(function)
    assert pri_enabled(function)
    domain = world.dsa.group.default_domain
    core.device_release_dma_owner(world.dsa)
    assert [tag.type for tag in domain.cache_tags.tags] == [IOTLB, 1]
    core.device_claim_dma_owner(world.dsa, world)
    assert domain.cache_tags.tags == []


def test_services_that_the_unit_lacks_stay_off(make):
    function = make(dt=0, prs=0, pds=0, sms=0, nwfs=0, ptrs=0, pasid=0).dsa.pci
    assert not pasid_enabled(function)
    assert not ats_enabled(function)
    assert not pri_enabled(function)


def test_pasids_need_a_unit_with_pasids(make):
    world = make(pasid=0, ptrs=0)
    domain = core.paging_domain_alloc(world.dsa)
    assert world.dsa.max_pasids == 0
    for target in (domain, world.dsa.iommu.identity_domain):
        assert error_of(target.set_dev_pasid, world.dsa, 5, None) == 95


def test_a_pasid_of_the_identity_domain_passes_through(world):
    identity = world.dsa.iommu.identity_domain
    world.attach(identity, world.dsa, 5)
    assert world.reads(PA, world.dsa, pasid=5) == 0
    core.detach_device_pasid(identity, world.dsa, 5)
    assert world.reads(PA, world.dsa, pasid=5) is None


# -- what the firmware says ------------------------------------------------------------------------------------------


def booted(*functions, reserved=(), all_ports=False, unit=SCALABLE):
    """The machine and the devices, in front of any client."""
    box = Machine("firmware")
    hardware = box.add_vtd(cap=unit.cap, ecap=unit.ecap)
    box.reserved_memory += reserved
    box.atsr_all_ports = all_ports
    for function in functions:
        box.add(function, hardware)
    return box, attach_drivers(driver_kernel(box))


def function_of(class_code):
    return PciFunction("0000:00:02.0", (0x8086, 1), class_code, command=4)


@pytest.mark.parametrize("unit", [SCALABLE, Features()], ids=["scalable", "legacy"])
def test_reserved_memory_is_mapped_one_to_one_and_its_device_belongs_to_nobody(unit):
    box, (device, other) = booted(
        function_of(0x020000), Edu("0000:00:10.0", command=4), reserved=[(PA, PA + 0x1FFF, [0x10])], unit=unit
    )
    regions = [(r.start, r.last, r.type) for r in core.get_resv_regions(device)]
    assert regions == [(PA, PA + 0x1FFF, core.IOMMU_RESV_DIRECT), (0xFEE0_0000, 0xFEEF_FFFF, core.IOMMU_RESV_MSI)]
    box.memory.write(PA + K4, b"firmware")
    assert device.pci.dma.read(PA + K4, 8) == b"firmware"
    with pytest.raises(DmaAbort):
        device.pci.dma.read(PA + 2 * K4, 8)
    assert error_of(core.device_claim_dma_owner, device, box) == 22
    assert len(core.get_resv_regions(other)) == 1
    core.device_claim_dma_owner(other, box)
    box.close()


@pytest.mark.parametrize("class_code", [0x030000, 0x0C0330])
def test_reserved_memory_of_displays_and_usb_is_relaxable(class_code):
    box, (device,) = booted(function_of(class_code), reserved=[(PA, PA + 0xFFF, [0x10])])
    assert core.get_resv_regions(device)[0].type == core.IOMMU_RESV_DIRECT_RELAXABLE
    assert device.group.default_domain.iova_to_phys(PA) == PA
    core.device_claim_dma_owner(device, box)
    box.close()


@pytest.mark.parametrize("all_ports", [False, True])
def test_behind_a_root_port_ats_is_the_firmwares_word(all_ports):
    port = PciBridge("0000:00:03.0", 1, kind="root-port")
    box, devices = booted(port, Dsa("0000:01:00.0", command=4, kind=PCI_EXP_TYPE_ENDPOINT), all_ports=all_ports)
    info = info_of(devices[1])
    assert info.ats_supported == info.ats_enabled == info.pri_enabled == all_ports
    assert devices[1].iommu.capable(devices[1], core.IOMMU_CAP_PCI_ATS_SUPPORTED) == all_ports
    assert info.pasid_enabled
    box.close()


@pytest.mark.parametrize(
    ("cap", "ecap", "stage"),
    [
        (VTD_SCALABLE_CAP, VTD_SCALABLE_ECAP, SecondStageDomain),
        (VTD_FIRST_STAGE_CAP, VTD_FIRST_STAGE_ECAP, FirstStageDomain),
    ],
    ids=["q35-vtd", "q35-vtd-fs"],
)
def test_units_of_qemu_have_one_stage_each_and_walks_that_do_not_snoop(cap, ecap, stage):
    box, (device,) = booted(Edu("0000:00:10.0", command=4), unit=Features.of(cap, ecap))
    core.device_claim_dma_owner(device, box)
    domain = core.paging_domain_alloc(device)
    domain.map(K4, PA, K4, 3)
    core.attach_group_handle(domain, device.group, core.AttachHandle())
    assert type(domain) is stage
    assert device.pci.dma.read(K4, 4) == bytes(4)
    assert device.iommu.unit.memory.words[info_of(device).pasid_table.entry(0) + 1] >> 16 == 0
    box.close()
