"""Nested domains and dirty tracking of the VT-d driver on the fake unit: words of the entries, tags, what is stale.

The words are literals from the VT-d specification, 9.6 (revision 5.10).
"""

import errno
import struct
import types
from dataclasses import replace

import pytest

from fakedev.machine import VTD_SCALABLE_CAP, VTD_SCALABLE_ECAP
from fakedev.vtd.features import SCALABLE
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from tests.kernel_model.iommu.scalable_world import DIRTY, GPA, IQT, NEST_PARENT, PA, VA, World

SRE, EAFE, WPE = 1, 2, 4


@pytest.fixture
def world():
    world = World()
    yield world
    world.box.close()


def refusal(call, *args, **kwargs):
    with pytest.raises(KernelError) as caught:
        call(*args, **kwargs)
    return caught.value.errno


def invalidate(domain, *entries):
    """cache_invalidate_user() with (address, npages, flags, reserved) entries; how many are done."""
    block = b"".join(struct.pack("<QQII", *entry) for entry in entries)
    array = types.SimpleNamespace(type=0, entry_num=len(entries), batches=lambda *_: [block])
    domain.cache_invalidate_user(array)
    return array.entry_num


# -- entries ----------------------------------------------------------------------------------------------------------


def test_words_of_a_nested_entry(world):
    parent = world.parent()
    nested = world.nested(parent, table=0x12_3000)
    world.attach(nested)
    low, middle, high, *rest = world.entry(world.edu)
    # P, AW 3 (5 levels), PGTT 3, and the second-stage table; domain id, PWSNP; the first-stage table, 4 levels.
    assert low & 0xFFF == 1 | 3 << 2 | 3 << 6
    assert low & ~0xFFF == parent.table.root
    assert middle == nested.domain_id(world.edu.iommu.unit) | 1 << 87 - 64
    assert (high, rest) == (0x12_3000, [0] * 5)


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        (SRE, 1 << 0),
        (SRE | WPE, 1 << 0 | 1 << 4),
        (WPE, 0),
        (EAFE, 1 << 7),
        (SRE | WPE | EAFE, 1 << 0 | 1 << 4 | 1 << 7),
        (1 << 3 | 1 << 63, 0),
    ],
)
def test_flags_of_the_guest_in_the_third_word(world, flags, bits):
    world.attach(world.nested(world.parent(), flags=flags))
    assert world.entry(world.edu)[2] == GPA | bits


def test_five_levels_are_a_bit_of_the_third_word(world):
    world.attach(world.nested(world.parent(), width=57))
    assert world.entry(world.edu)[2] == GPA | 1 << 2


def test_the_tables_address_is_stored_as_it_is(world):
    world.attach(world.nested(world.parent(), table=GPA | 0xF0F | 1 << 63))
    assert world.entry(world.edu)[2] == GPA | 0xF0F | 1 << 63


def test_a_parent_that_forces_snooping_has_it_in_the_entries_of_its_children(world):
    parent = world.parent()
    assert parent.enforce_cache_coherency()
    world.attach(world.nested(parent))
    assert world.entry(world.edu)[1] >> 88 - 64 & 1


def test_a_parent_that_tracks_has_it_in_the_entries_of_its_children(world):
    parent = world.parent(DIRTY)
    nested = world.nested(parent)
    world.attach(nested)
    world.attach(world.nested(parent), world.dsa, pasid=70)
    for enable in (True, False, True):
        parent.set_dirty_tracking(enable)
        assert [world.entry(*who)[0] >> 9 & 1 for who in ((world.edu,), (world.dsa, 70))] == [enable] * 2
    world.attach(world.nested(parent), world.dsa, pasid=71)
    assert world.entry(world.dsa, 71)[0] >> 9 & 1


def test_a_pasid_has_an_entry_of_its_own(world):
    parent = world.parent()
    world.attach(parent, world.dsa)
    nested = world.nested(parent, table=0x12_3000)
    world.attach(nested, world.dsa, pasid=0x4321)
    assert world.entry(world.dsa)[0] >> 6 & 7 == 2
    assert world.entry(world.dsa, 0x4321)[0] >> 6 & 7 == 3
    core.detach_device_pasid(nested, world.dsa, 0x4321)
    assert world.entry(world.dsa, 0x4321) == [0] * 8
    assert world.entry(world.dsa)[0] & 1


def test_words_are_those_that_a_real_kernel_writes():
    """Linux 7.3.4 on QEMU 10.0.2's unit, whose ECAP was made to offer NEST, SSADS and SMPWC, too: what it showed of the
    entry in /sys/kernel/debug/iommu/intel/dmar_translation_struct, less the table's address and the domain id."""
    ecap = VTD_SCALABLE_ECAP | 1 << 26 | 1 << 45 | 1 << 48
    world = World(types.SimpleNamespace(cap=VTD_SCALABLE_CAP, ecap=ecap))

    def entry():
        low, middle, high, *rest = world.entry(world.edu)
        assert rest == [0] * 5
        return low & 0xFFF, middle & ~0xFFFF, high

    world.attach(core.paging_domain_alloc(world.edu))
    assert entry() == (0x089, 0x80_0000, 0)
    parent = world.parent(DIRTY)
    world.attach(parent)
    assert entry() == (0x089, 0x80_0000, 0)
    parent.set_dirty_tracking(True)
    assert entry() == (0x289, 0x80_0000, 0)
    for table, flags, high in (
        (0x10_0000, 0, 0x10_0000),
        (0x8000_0000_0010_0F0F, 0, 0x8000_0000_0010_0F0F),
        (0x10_0000, SRE | WPE, 0x10_0011),
        (0x10_0000, WPE, 0x10_0000),
        (0x10_0000, 1 << 40, 0x10_0000),
    ):
        world.attach(world.nested(parent, table=table, flags=flags))
        assert entry() == (0x2C9, 0x80_0000, high)
    parent.set_dirty_tracking(False)
    assert entry() == (0x0C9, 0x80_0000, 0x10_0000)
    world.box.close()


# -- what the unit cannot ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "config"),
    [
        ({"srs": 0, "rprivs": 0}, {"flags": SRE}),
        ({"eafs": 0}, {"flags": EAFE}),
        ({"fs5lp": 0}, {"width": 57}),
        ({}, {"width": 39}),
        ({}, {"width": 0}),
    ],
)
def test_what_the_unit_cannot_is_einval_at_attach(missing, config):
    world = World(replace(SCALABLE, **missing))
    parent = world.parent()
    nested = world.nested(parent, **config)
    assert refusal(world.attach, nested) == errno.EINVAL
    assert world.entry(world.edu) == [0] * 8
    assert refusal(world.attach, nested, world.dsa, pasid=5) == errno.EINVAL
    assert (nested.devices, nested.dev_pasids, parent.cache_tags.tags, nested.cache_tags.tags) == ([], [], [], [])
    nested.free()
    parent.free()
    world.box.close()


def test_write_protection_without_supervisor_requests_is_no_error_anywhere():
    world = World(replace(SCALABLE, srs=0, rprivs=0))
    world.attach(world.nested(world.parent(), flags=WPE))
    assert world.entry(world.edu)[2] == GPA
    world.box.close()


def test_without_nesting_there_is_neither_parent_nor_child():
    world = World(replace(SCALABLE, nest=0))
    assert refusal(world.parent) == errno.EOPNOTSUPP
    parent = core.paging_domain_alloc_flags(world.edu, DIRTY)
    assert refusal(world.nested, parent) == errno.EOPNOTSUPP
    world.box.close()


def test_without_dirty_bits_no_domain_tracks():
    world = World(replace(SCALABLE, ssads=0))
    assert refusal(core.paging_domain_alloc_flags, world.edu, DIRTY) == errno.EOPNOTSUPP
    assert not world.edu.iommu.capable(world.edu, core.IOMMU_CAP_DIRTY_TRACKING)
    world.box.close()


def test_order_of_the_refusals_of_a_nested_domain(world):
    other = core.paging_domain_alloc_flags(world.edu, DIRTY)
    assert refusal(world.nested, other, kind=2, hwpt_flags=NEST_PARENT) == errno.EOPNOTSUPP
    assert refusal(world.nested, other, kind=2) == errno.EOPNOTSUPP
    assert refusal(world.nested, other) == errno.EINVAL
    assert refusal(world.nested, core.paging_domain_alloc(world.edu)) == errno.EINVAL


def test_a_replace_of_a_pasid_that_fails_has_torn_the_old_entry_down(world):
    parent = world.parent(DIRTY)
    world.guest_map(VA, GPA + 0x8000)
    good, bad = world.nested(parent), world.nested(parent, width=1)
    world.attach(good, world.dsa, pasid=9)
    assert world.reads(VA, world.dsa, pasid=9) == 0
    handle = core.AttachHandle()
    assert refusal(core.replace_device_pasid, bad, world.dsa, 9, handle) == errno.EINVAL
    assert world.reads(VA, world.dsa, pasid=9) is None
    assert good.dev_pasids
    assert refusal(parent.set_dirty_tracking, True) == errno.EOPNOTSUPP
    core.replace_device_pasid(world.nested(parent), world.dsa, 9, handle)
    assert world.reads(VA, world.dsa, pasid=9) == 0
    parent.set_dirty_tracking(True)


# -- caches -----------------------------------------------------------------------------------------------------------


def test_a_change_of_the_guest_is_stale_until_it_is_invalidated(world):
    parent = world.parent()
    world.words[PA + 0x8000 >> 3], world.words[PA + 0x9000 >> 3] = 8, 9
    world.guest_map(VA, GPA + 0x8000)
    nested = world.nested(parent)
    world.attach(nested)
    assert world.reads(VA) == 8
    world.guest_map(VA, GPA + 0x9000)
    assert world.reads(VA) == 8
    assert invalidate(nested, (VA + 4096, 1, 0, 0)) == 1
    assert world.reads(VA) == 8
    assert invalidate(nested, (VA, 1, 0, 0)) == 1
    assert world.reads(VA) == 9


def test_invalidation_reaches_every_pasid_of_the_domain_and_no_other_domain(world):
    parent = world.parent()
    world.words[PA + 0x8000 >> 3], world.words[PA + 0x9000 >> 3] = 8, 9
    world.guest_map(VA, GPA + 0x8000)
    first, second = world.nested(parent), world.nested(parent)
    for pasid, domain in ((1, first), (2, first), (3, second)):
        world.attach(domain, world.dsa, pasid=pasid)
        assert world.reads(VA, world.dsa, pasid=pasid) == 8
    world.guest_map(VA, GPA + 0x9000)
    invalidate(first, (0, (1 << 64) - 1, 0, 0))
    assert [world.reads(VA, world.dsa, pasid=pasid) for pasid in (1, 2, 3)] == [9, 9, 8]


def test_the_parents_unmap_leaves_nothing_of_its_children_in_the_caches(world):
    parent = world.parent()
    world.guest_map(VA, GPA + 0x8000)
    world.attach(world.nested(parent))
    world.attach(world.nested(parent), world.dsa, pasid=3)
    assert (world.reads(VA), world.reads(VA, world.dsa, pasid=3)) == (0, 0)
    assert parent.unmap(GPA, 64 << 12) == 64 << 12
    assert world.box.tlb_entries == 0
    assert (world.reads(VA), world.reads(VA, world.dsa, pasid=3)) == (None, None)


def test_the_parents_unmap_empties_the_device_tlbs_of_its_children(world):
    """Which of their translations came through the unmapped page nobody knows: all go."""
    port = world.dsa.pci.port
    parent = world.parent()
    world.guest_map(VA, GPA + 0x8000)
    world.attach(world.nested(parent), world.dsa, pasid=3)
    assert port.read(VA, 8, pasid=3) == bytes(8)
    assert len(port.tlb)
    parent.unmap(GPA + 63 * 4096, 4096)
    assert not len(port.tlb)


def test_invalidation_empties_the_device_tlbs_as_far_as_it_goes(world):
    port = world.dsa.pci.port
    parent = world.parent()
    nested = world.nested(parent)
    world.attach(nested, world.dsa, pasid=3)
    for page in (0, 1):
        world.guest_map(VA + page * 4096, GPA + 0x8000)
        port.read(VA + page * 4096, 8, pasid=3)
    before = len(port.tlb)
    invalidate(nested, (VA, 1, 0, 0))
    assert len(port.tlb) == before - 1


def test_tags_of_a_parent_go_with_its_children(world):
    parent = world.parent()
    nested = world.nested(parent)
    world.attach(nested)
    world.attach(nested, world.dsa, pasid=3)
    assert [(tag.type, tag.pasid) for tag in parent.cache_tags.tags] == [(2, 0), (2, 3), (3, 3)]
    core.detach_device_pasid(nested, world.dsa, 3)
    core.detach_group_handle(nested, world.edu.group)
    assert parent.cache_tags.tags == nested.cache_tags.tags == []
    nested.free()
    assert parent.s1_domains == []
    parent.free()


def test_domain_ids_are_the_childrens_own(world):
    unit = world.edu.iommu.unit
    parent = world.parent()
    used = set(unit.domain_ids)
    first, second = world.nested(parent), world.nested(parent)
    world.attach(first)
    world.attach(second, world.dsa)
    assert len({first.domain_id(unit), second.domain_id(unit)} - used) == 2
    core.detach_group_handle(first, world.edu.group)
    core.detach_group_handle(second, world.dsa.group)
    assert unit.domain_ids == used


def test_reading_dirty_bits_flushes_what_it_cleaned_and_nothing_where_all_is_clean(world):
    parent = world.parent(DIRTY)
    world.attach(parent)
    parent.set_dirty_tracking(True)
    world.edu.pci.dma.write(GPA, bytes(8))
    tail = world.box.mmio.read(IQT, 8)
    parent.read_and_clear_dirty(GPA, 0x4000, core.IOMMU_DIRTY_NO_CLEAR, None)
    assert world.box.mmio.read(IQT, 8) == tail
    parent.read_and_clear_dirty(GPA, 0x4000, 0, None)
    after = world.box.mmio.read(IQT, 8)
    assert after != tail
    parent.read_and_clear_dirty(GPA, 0x4000, 0, None)
    assert world.box.mmio.read(IQT, 8) == after
