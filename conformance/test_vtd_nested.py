"""Nested HWPTs of VT-d: a guest's first-stage table on a nesting parent, from HWPT_ALLOC to the device's DMA.

Mirrors drivers/iommu/intel/nested.c and intel_pasid_setup_nested() of pasid.c. Little is checked when such a HWPT is
made, the rest when a device is attached to it. Invalidation is in test_vtd_invalidate, dirty tracking in
test_vtd_dirty, PASIDs in test_vtd_pasid.

No emulator at hand nests with VT-d. On QEMU 10.0.2, made to say in ECAP that it does (bits 26, 45 and 48), a real 7.3.4
goes all the way to the PASID-table entry; there it passes the tests of these files that need no nested DMA and no dirty
bits of the hardware, with the same calls as the model.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.arena import arena
from conformance.drivers.edu import Edu
from conformance.drivers.fixtures import vtd_guest
from conformance.drivers.vfio import VfioDevice
from conformance.steps import (
    NOWHERE,
    PAGE,
    READ,
    U32_MAX,
    U64_MAX,
    WRITE,
    allow_iovas,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_user,
    unmap,
)
from conformance.vtd_guest import EA, GPA, PAGES, RW, US, A, D, Guest, P, first_stage, flush, nested_alloc, registers
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_VTD_S1_EAFE,
    IOMMU_VTD_S1_SRE,
    IOMMU_VTD_S1_WPE,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd", "nesting")]

NEST_PARENT, PASID, DIRTY = IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT = IOMMU_HWPT_FAULT_ID_VALID
SRE, EAFE, WPE = IOMMU_VTD_S1_SRE, IOMMU_VTD_S1_EAFE, IOMMU_VTD_S1_WPE
#: A guest-virtual address, and a data page of the guest.
VA, DATA = 0x4000_0000, Guest.page(-1)
PATTERN, OLD = bytes(range(256)), b"\xa5" * 256
MSI_WINDOW = 0xFEE0_0000

guest = vtd_guest


@pytest.fixture
def running(kernel: Backend, iommu: File, edu: Edu, ioas: int) -> Iterator[Guest]:
    """A guest of the device that `edu` drives, which is attached to the IOAS."""
    guest = Guest(kernel, iommu, edu.vfio, ioas)
    guest.write(DATA, PATTERN)
    yield guest
    guest.buffer.close()


def arrives(edu: Edu, guest: Guest, va: int, gpa: int) -> bool:
    """Whether a write of the device to `va` changes the guest's page at `gpa`. The buffer must hold PATTERN."""
    guest.write(gpa, OLD)
    edu.store(va, 256)
    return guest.read(gpa, 256) == PATTERN


def load_pattern(edu: Edu, guest: Guest) -> None:
    """Have the device read PATTERN from the guest's memory, through the nesting parent alone."""
    edu.vfio.attach(guest.parent)
    guest.write(DATA, PATTERN)
    edu.load(DATA, 256)


# ---------------------------------------------------------------------------------------------------------- HWPT_ALLOC


def test_parent_and_nested_hwpt_have_ids_in_a_row(guest: Guest) -> None:
    assert (guest.parent, guest.nested(), guest.nested(hwpt_flags=PASID)) == (3, 4, 5)


@pytest.mark.parametrize("flags", [NEST_PARENT, DIRTY, 1 << 4, 1 << 31])
def test_other_flags_of_a_nested_hwpt_are_eopnotsupp(guest: Guest, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        guest.nested(hwpt_flags=flags)


def test_parent_without_the_flag_is_einval_whatever_the_type(guest: Guest) -> None:
    for flags in (0, PASID):
        plain = hwpt_alloc(guest.iommu, guest.device.devid, guest.ioas, flags)
        for kind in (1, 2, 99):
            with fails(errno.EINVAL):
                nested_alloc(guest.iommu, guest.device.devid, plain, first_stage(), data_type=kind)


def test_nested_hwpt_is_no_parent(guest: Guest) -> None:
    nested = guest.nested()
    with fails(errno.EINVAL):
        nested_alloc(guest.iommu, guest.device.devid, nested, first_stage())


def test_automatic_hwpt_is_no_parent(guest: Guest) -> None:
    automatic = guest.device.attach(ioas_alloc(guest.iommu))
    with fails(errno.EINVAL):
        nested_alloc(guest.iommu, guest.device.devid, automatic, first_stage())


@pytest.mark.parametrize("kind", [IOMMU_HWPT_DATA_ARM_SMMUV3, 3, 99, U32_MAX])
@pytest.mark.parametrize("length", [1, 24])
def test_data_of_another_kind_is_eopnotsupp_before_its_length(guest: Guest, kind: int, length: int) -> None:
    with fails(errno.EOPNOTSUPP):
        nested_alloc(guest.iommu, guest.device.devid, guest.parent, first_stage(), data_type=kind, data_len=length)


@pytest.mark.parametrize("length", [1, 8, 16, 20, 23, 25, 32, 4096, U32_MAX])
def test_data_of_another_length_is_einval_before_its_address(guest: Guest, length: int) -> None:
    for where in ({}, {"data_uptr": NOWHERE}):
        with fails(errno.EINVAL):
            nested_alloc(guest.iommu, guest.device.devid, guest.parent, first_stage(), data_len=length, **where)


def test_data_that_cannot_be_read_is_efault(guest: Guest) -> None:
    with arena(2) as memory:
        memory.no_access(1)
        for where in (0, NOWHERE, memory.page(1), memory.page(1) - 23):
            with fails(errno.EFAULT):
                nested_alloc(guest.iommu, guest.device.devid, guest.parent, first_stage(), data_uptr=where)


def test_data_without_a_type_and_a_type_without_data_are_einval(guest: Guest) -> None:
    for kind, length in ((0, 24), (1, 0)):
        with fails(errno.EINVAL):
            nested_alloc(guest.iommu, guest.device.devid, guest.parent, b"", data_type=kind, data_len=length)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(guest.iommu, guest.device.devid, guest.parent)


@pytest.mark.parametrize(
    "data",
    [
        first_stage(flags=1 << 3),
        first_stage(flags=U64_MAX),
        first_stage(pgtbl_addr=1),
        first_stage(pgtbl_addr=U64_MAX),
        first_stage(addr_width=0),
        first_stage(addr_width=U32_MAX),
        first_stage(reserved=1),
        first_stage(U64_MAX, U32_MAX, U64_MAX, U32_MAX),
    ],
    ids=["flag", "flags", "odd_table", "far_table", "no_width", "width", "reserved", "all"],
)
def test_contents_are_not_looked_at(guest: Guest, data: bytes) -> None:
    assert nested_alloc(guest.iommu, guest.device.devid, guest.parent, data) == 4


def test_device_on_the_ioas_takes_no_data(guest: Guest) -> None:
    with fails(errno.EOPNOTSUPP):
        nested_alloc(guest.iommu, guest.device.devid, guest.ioas, first_stage())


def test_fault_queue_that_is_none_is_enoent_at_last(guest: Guest) -> None:
    for fault_id in (0, 99, guest.parent):
        with fails(errno.ENOENT):
            guest.nested(hwpt_flags=FAULT, fault_id=fault_id)
    with fails(errno.EOPNOTSUPP):
        guest.nested(hwpt_flags=FAULT, fault_id=99, data_type=99)
    destroy(guest.iommu, guest.parent)


def test_parent_outlives_its_children(guest: Guest) -> None:
    nested = guest.nested()
    with fails(errno.EBUSY):
        destroy(guest.iommu, guest.parent)
    destroy(guest.iommu, nested)
    destroy(guest.iommu, guest.parent)


@pytest.mark.parametrize("flags", [NEST_PARENT | FAULT])
def test_parent_with_a_fault_queue_is_eopnotsupp(iommu: File, device: VfioDevice, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, flags, fault_id=99)


def test_parent_takes_no_mapping_that_is_not_writable(guest: Guest) -> None:
    address = guest.buffer.address
    with fails(errno.EINVAL):
        map_user(guest.iommu, guest.ioas, address, PAGE, GPA - PAGE, prot=READ)
    map_user(guest.iommu, guest.ioas, address, PAGE, GPA - PAGE, prot=WRITE)
    destroy(guest.iommu, guest.parent)
    map_user(guest.iommu, guest.ioas, address, PAGE, GPA - 2 * PAGE, prot=READ)
    with fails(errno.EINVAL):
        hwpt_alloc(guest.iommu, guest.device.devid, guest.ioas, NEST_PARENT)
    hwpt_alloc(guest.iommu, guest.device.devid, guest.ioas)


# -------------------------------------------------------------------------------------------------------------- attach


def test_attach_gives_the_id_of_the_nested_hwpt(guest: Guest) -> None:
    nested = guest.nested()
    assert guest.device.attach(nested) == nested
    with fails(errno.EBUSY):
        destroy(guest.iommu, nested)
    guest.device.detach()
    destroy(guest.iommu, nested)


@pytest.mark.parametrize("width", [0, 12, 39, 47, 49, 52, 56, 58, 64, U32_MAX])
def test_address_width_that_is_none_is_einval_at_attach(guest: Guest, width: int) -> None:
    nested = guest.nested(addr_width=width)
    with fails(errno.EINVAL):
        guest.device.attach(nested)
    destroy(guest.iommu, nested)


def test_57_bits_need_five_levels_of_the_unit(guest: Guest) -> None:
    cap, _ = registers(guest.iommu, guest.device.devid)
    nested = guest.nested(addr_width=57)
    if cap >> 60 & 1:
        guest.device.attach(nested)
    else:
        with fails(errno.EINVAL):
            guest.device.attach(nested)


@pytest.mark.parametrize(("flags", "bit"), [(SRE, 31), (EAFE, 34), (SRE | WPE, 31)])
def test_flag_needs_the_units_capability(guest: Guest, flags: int, bit: int) -> None:
    _, ecap = registers(guest.iommu, guest.device.devid)
    nested = guest.nested(flags)
    if ecap >> bit & 1:
        guest.device.attach(nested)
    else:
        with fails(errno.EINVAL):
            guest.device.attach(nested)


def test_write_protection_alone_needs_nothing(guest: Guest) -> None:
    guest.device.attach(guest.nested(WPE | 1 << 40))


def test_fault_queue_of_a_device_without_page_requests_is_enodev_at_attach(kernel: Backend, guest: Guest) -> None:
    queue = IOMMU_FAULT_QUEUE_ALLOC(guest.iommu)
    with kernel.adopt(queue.out_fault_fd):
        nested = guest.nested(hwpt_flags=FAULT, fault_id=queue.out_fault_id)
        with fails(errno.ENODEV):
            guest.device.attach(nested)
        wrong = guest.nested(hwpt_flags=FAULT, fault_id=queue.out_fault_id, addr_width=1)
        with fails(errno.ENODEV):
            guest.device.attach(wrong)


def test_attach_reserves_the_msi_window_in_the_parents_ioas(guest: Guest) -> None:
    nested, before = guest.nested(), iova_ranges(guest.iommu, guest.ioas)
    guest.device.attach(nested)
    ranges = iova_ranges(guest.iommu, guest.ioas)
    assert ranges == [(0, MSI_WINDOW - 1), (MSI_WINDOW + 0x10_0000, before[-1][1])]
    with fails(errno.EADDRINUSE):
        allow_iovas(guest.iommu, guest.ioas, [(MSI_WINDOW, MSI_WINDOW + PAGE - 1)])
    guest.device.detach()
    assert iova_ranges(guest.iommu, guest.ioas) == before


def test_guest_memory_over_the_msi_window_is_eaddrinuse_at_attach(guest: Guest) -> None:
    nested = guest.nested()
    map_user(guest.iommu, guest.ioas, guest.buffer.address, PAGE, MSI_WINDOW)
    for target in (guest.parent, nested):
        with fails(errno.EADDRINUSE):
            guest.device.attach(target)
    unmap(guest.iommu, guest.ioas, MSI_WINDOW, PAGE)
    guest.device.attach(nested)


# ----------------------------------------------------------------------------------------------------------------- DMA


@pytest.mark.parametrize("level", [0, 1], ids=["4K", "2M"])
def test_dma_goes_through_both_stages(running: Guest, edu: Edu, level: int) -> None:
    """The guest maps VA to a guest-physical address, which the parent maps to the client's page."""
    source, target = running.page(-1), running.page(-2)
    if level:
        running.map(VA, GPA, level=1)
        source_va, target_va = VA + source - GPA, VA + target - GPA
    else:
        source_va, target_va = VA, VA + 7 * PAGE
        running.map(source_va, source)
        running.map(target_va, target)
    edu.vfio.attach(running.nested())
    edu.memcpy(target_va, source_va, 256)
    assert running.read(target, 256) == PATTERN


def test_dma_through_five_levels(kernel: Backend, edu: Edu, iommu: File, ioas: int) -> None:
    if not registers(iommu, edu.vfio.devid)[0] >> 60 & 1:
        pytest.skip("the unit has no first stage of five levels")
    guest = Guest(kernel, iommu, edu.vfio, ioas, levels=5)
    guest.write(DATA, PATTERN)
    far = 0x00A5_0000_4000_0000
    guest.map(far, DATA)
    guest.map(far + PAGE, guest.page(-2))
    edu.vfio.attach(guest.nested())
    edu.memcpy(far + PAGE, far, 256)
    assert guest.read(guest.page(-2), 256) == PATTERN
    edu.vfio.attach(ioas)
    guest.buffer.close()


@pytest.mark.parametrize("bit", [1, 8, 11, 58, 63])
def test_reserved_bits_of_the_tables_address_end_all_translation(running: Guest, edu: Edu, bit: int) -> None:
    """The address goes into the PASID-table entry as it is, and the attach succeeds."""
    load_pattern(edu, running)
    running.map(VA, DATA)
    edu.vfio.attach(running.nested(pgtbl_addr=running.root | 1 << bit))
    assert not arrives(edu, running, VA, DATA)


def test_low_bits_of_the_tables_address_are_the_entrys_flags(running: Guest, edu: Edu) -> None:
    """Bit 7 of the word is EAFE, whatever the flags say."""
    if not registers(running.iommu, edu.vfio.devid)[1] >> 34 & 1:
        pytest.skip("the unit has no extended accessed bits")
    running.map(VA, DATA)
    edu.vfio.attach(running.nested(pgtbl_addr=running.root | 1 << 7))
    edu.load(VA, 1)
    assert running.entry(VA) & (A | EA) == A | EA


def test_accessed_and_dirty_bits_are_set_in_the_guests_tables(running: Guest, edu: Edu) -> None:
    load_pattern(edu, running)
    for page in range(3):
        running.map(VA + page * PAGE, running.page(-1 - page))
    edu.vfio.attach(running.nested())
    edu.store(VA, 1)
    edu.load(VA + PAGE, 1)
    flags = [running.entry(VA + page * PAGE) & (A | D) for page in range(3)]
    assert flags == [A | D, A, 0]
    assert [running.entry(VA, level) & (A | D) for level in (1, 2, 3)] == [A, A, A]


def test_extended_accessed_bits_are_set_where_asked_for(running: Guest, edu: Edu) -> None:
    if not registers(running.iommu, edu.vfio.devid)[1] >> 34 & 1:
        pytest.skip("the unit has no extended accessed bits")
    running.map(VA, DATA)
    edu.vfio.attach(running.nested())
    edu.load(VA, 1)
    assert running.entry(VA) & (A | EA) == A
    edu.vfio.attach(running.nested(EAFE))
    edu.load(VA, 1)
    assert [running.entry(VA, level) & (A | EA) for level in range(4)] == [A | EA] * 4


@pytest.mark.parametrize(
    ("bits", "readable", "writable"),
    [
        (P | RW | US, True, True),
        (P | US, True, False),
        (P | RW, False, False),
        (P, False, False),
        (RW | US, False, False),
        (P | RW | US | 1 << 63, True, True),
    ],
    ids=["all", "read_only", "privileged", "privileged_read_only", "not_present", "no_execute"],
)
def test_what_the_guests_entry_allows(running: Guest, edu: Edu, bits: int, readable: bool, writable: bool) -> None:
    load_pattern(edu, running)
    running.map(VA, DATA, bits)
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, VA, DATA) == writable
    running.write(DATA, OLD)
    edu.load(VA, 256)
    edu.vfio.attach(running.parent)
    edu.store(running.page(-2), 256)
    assert (running.read(running.page(-2), 256) == OLD) == readable


def test_write_that_is_refused_leaves_no_dirty_bit(running: Guest, edu: Edu) -> None:
    running.map(VA, DATA, P | US)
    edu.vfio.attach(running.nested())
    edu.store(VA, 4)
    assert not running.entry(VA) & D


def test_guest_physical_address_that_the_parent_does_not_map_is_refused(running: Guest, edu: Edu) -> None:
    """A page, and a table. What the parent maps there later counts at once where nothing was cached."""
    load_pattern(edu, running)
    running.map(VA, GPA + PAGES * PAGE)
    running.map(VA + PAGE, DATA)
    nested = running.nested()
    edu.vfio.attach(nested)
    running.write(DATA, OLD)
    edu.store(VA, 256)
    assert not running.entry(VA) & D
    map_user(running.iommu, running.ioas, running.buffer.address + DATA - GPA, PAGE, GPA + PAGES * PAGE)
    assert arrives(edu, running, VA, DATA)
    outside = running.nested(pgtbl_addr=GPA + 2 * PAGES * PAGE)
    edu.vfio.attach(outside)
    assert not arrives(edu, running, VA + PAGE, DATA)
    edu.vfio.attach(nested)
    assert arrives(edu, running, VA + PAGE, DATA)


@pytest.mark.parametrize("va", [1 << 47, (1 << 48) + VA, 1 << 63])
def test_address_that_is_not_canonical_is_refused(running: Guest, edu: Edu, va: int) -> None:
    load_pattern(edu, running)
    running.map(va & (1 << 48) - 1, DATA)
    edu.vfio.attach(running.nested())
    assert not arrives(edu, running, va, DATA)


def test_upper_half_of_the_guests_addresses(running: Guest, edu: Edu) -> None:
    load_pattern(edu, running)
    running.map(-PAGE & (1 << 48) - 1, DATA)
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, -PAGE & U64_MAX, DATA)


def test_unmap_from_the_parent_ends_the_nested_translation(running: Guest, edu: Edu) -> None:
    """What was cached for the nested HWPT goes too, and the page that is mapped there next is the one that counts."""
    iommu, ioas = running.iommu, running.ioas
    load_pattern(edu, running)
    extra = GPA + PAGES * PAGE
    map_user(iommu, ioas, running.buffer.address + running.page(-2) - GPA, PAGE, extra)
    running.map(VA, extra)
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, VA, running.page(-2))
    unmap(iommu, ioas, extra, PAGE)
    assert not arrives(edu, running, VA, running.page(-2))
    map_user(iommu, ioas, running.buffer.address + running.page(-3) - GPA, PAGE, extra)
    assert arrives(edu, running, VA, running.page(-3))


def test_tables_that_leave_the_parent_are_not_walked_any_more(running: Guest, edu: Edu) -> None:
    load_pattern(edu, running)
    running.map(VA, DATA)
    running.map(VA + PAGE, running.page(-2))
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, VA, DATA)
    unmap(running.iommu, running.ioas, GPA, PAGES * PAGE)
    assert not arrives(edu, running, VA + PAGE, running.page(-2))
    assert not arrives(edu, running, VA, DATA)


def test_guest_turns_its_unit_on_and_off(running: Guest, edu: Edu) -> None:
    """The VMM moves the device between the parent (guest-physical addresses) and the guest's tables."""
    load_pattern(edu, running)
    running.map(VA, DATA)
    first = running.nested()
    edu.vfio.attach(first)
    assert arrives(edu, running, VA, DATA)
    assert not arrives(edu, running, DATA, DATA)
    edu.vfio.attach(running.parent)
    assert arrives(edu, running, DATA, DATA)
    assert not arrives(edu, running, VA, DATA)
    root, running.root = running.root, running.new_table()
    running.map(VA, running.page(-2))
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, VA, running.page(-2))
    running.root = root
    edu.vfio.attach(first)
    assert arrives(edu, running, VA, DATA)


def test_new_mapping_of_the_guest_counts_after_its_invalidation(running: Guest, edu: Edu) -> None:
    load_pattern(edu, running)
    nested = running.nested()
    edu.vfio.attach(nested)
    assert not arrives(edu, running, VA, DATA)
    running.map(VA, DATA)
    assert flush(running.iommu, nested, (VA, 1)) == 1
    assert arrives(edu, running, VA, DATA)
    running.map(VA, running.page(-2))
    assert flush(running.iommu, nested, (VA, 1)) == 1
    assert arrives(edu, running, VA, running.page(-2))
    assert not arrives(edu, running, VA, DATA)


# ------------------------------------------------------------------------------------- attachments that fail half-way


def test_replace_that_fails_shows_the_old_hwpt_and_translates_nothing(running: Guest, edu: Edu) -> None:
    """The driver has blocked the device before it looks at the new HWPT, and nobody puts the old one back."""
    load_pattern(edu, running)
    assert arrives(edu, running, DATA, DATA)
    bad = running.nested(addr_width=39)
    with fails(errno.EINVAL):
        edu.vfio.attach(bad)
    destroy(running.iommu, bad)
    assert not arrives(edu, running, DATA, DATA)
    with fails(errno.EBUSY):
        destroy(running.iommu, running.parent)
    edu.vfio.attach(running.parent)  # no change, as the kernel sees it
    assert not arrives(edu, running, DATA, DATA)
    edu.vfio.detach()
    edu.vfio.attach(running.parent)
    assert arrives(edu, running, DATA, DATA)


def test_another_hwpt_repairs_what_a_failed_replace_left(running: Guest, edu: Edu) -> None:
    load_pattern(edu, running)
    running.map(VA, DATA)
    with fails(errno.EINVAL):
        edu.vfio.attach(running.nested(addr_width=0))
    edu.vfio.attach(running.nested())
    assert arrives(edu, running, VA, DATA)


def test_first_attach_that_fails_leaves_nothing(guest: Guest) -> None:
    bad = guest.nested(addr_width=39)
    with fails(errno.EINVAL):
        guest.device.attach(bad)
    guest.device.detach()
    assert guest.device.attach(guest.parent) == guest.parent
