"""vIOMMUs, nested HWPTs and vDEVICEs on an SMMUv3: what they ask for, in which order, and what holds what.

Mirrors iommufd_viommu_alloc_ioctl(), iommufd_viommu_alloc_hwpt_nested() and iommufd_vdevice_alloc_ioctl() of
drivers/iommu/iommufd with arm_smmu_get_viommu_size(), arm_vsmmu_init(), arm_vsmmu_alloc_domain_nested(),
arm_smmu_validate_vste() and arm_smmu_attach_dev_nested() behind them. What devices reach is in test_smmuv3_nested.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.fixtures import smmu_guest
from conformance.drivers.vfio import VfioDevice
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    answer,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_user,
)
from conformance.vsmmu import (
    ABORT,
    BYPASS,
    EATS,
    NESTED,
    RAM,
    S1,
    S1STALLD,
    S2,
    STE_1,
    SW_MSI,
    SW_MSI_LENGTH,
    Guest,
    V,
    viommu_alloc,
)
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_QUEUE_ALLOC,
    IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_HWPT_DATA_NONE,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    IOMMU_VDEVICE_ALLOC,
    IOMMU_VIOMMU_ALLOC,
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV,
)
from uapi.vfio import VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_ATTACH_PASID

pytestmark = [pytest.mark.needs("iommu", "root", "vfio_cdev", "smmuv3", "nesting"), pytest.mark.since("7.3")]

SMMUV3, TEGRA = IOMMU_VIOMMU_TYPE_ARM_SMMUV3, IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV
NEST, PASID, DIRTY = IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT = IOMMU_HWPT_FAULT_ID_VALID

guest = smmu_guest


# -- page tables of the host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (0, 0),
        (NEST, 0),
        (PASID, 0),
        (NEST | PASID, errno.EOPNOTSUPP),
        (NEST | FAULT, errno.EOPNOTSUPP),
        (DIRTY, errno.EOPNOTSUPP),
        (NEST | DIRTY, errno.EOPNOTSUPP),
        (DIRTY | PASID, errno.EOPNOTSUPP),
        (1 << 4, errno.EOPNOTSUPP),
    ],
)
def test_flags_of_a_paging_hwpt(device: VfioDevice, iommu: File, ioas: int, flags: int, number: int) -> None:
    """Dirty bits are stage 1's, if the unit keeps any. PASIDs are refused only where one is attached."""
    capabilities = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_capabilities
    if flags in (DIRTY, DIRTY | PASID) and capabilities & IOMMU_HW_CAP_DIRTY_TRACKING:
        number = 0
    assert answer(hwpt_alloc, iommu, device.devid, ioas, flags) == number


def test_paging_hwpt_takes_no_data(device: VfioDevice, iommu: File, ioas: int) -> None:
    for flags in (0, NEST):
        with fails(errno.EOPNOTSUPP):
            hwpt_alloc(iommu, device.devid, ioas, flags, data_type=2, data_len=16, data_uptr=NOWHERE)


def test_aperture_of_a_stage_2_parent_is_the_unit_s_output_size(device: VfioDevice, iommu: File, ioas: int) -> None:
    """Stage 1 has 48 bits."""
    first = hwpt_alloc(iommu, device.devid, ioas)
    assert iova_ranges(iommu, ioas) == [(0, (1 << 48) - 1)]
    destroy(iommu, first)
    hwpt_alloc(iommu, device.devid, ioas, NEST)
    ((start, last),) = iova_ranges(iommu, ioas)
    assert start == 0
    assert last in {(1 << bits) - 1 for bits in (32, 36, 40, 42, 44, 48, 52)}


def test_a_nest_parent_is_filled_with_what_the_ioas_maps(guest: Guest, iommu: File) -> None:
    """Read-only mappings, too, which VT-d refuses there."""
    map_user(iommu, guest.ioas, guest.ram.address, PAGE, iova=0x1000, prot=2 | 4)
    hwpt_alloc(iommu, guest.device.devid, guest.ioas, NEST)


def test_no_dirty_tracking(guest: Guest, iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=guest.parent, flags=1)
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_GET_DIRTY_BITMAP(
            iommu, hwpt_id=guest.parent, iova=RAM, length=PAGE, page_size=PAGE, data=guest.ram.address
        )
    nested = guest.nested()
    with fails(errno.ENOENT):
        IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=nested, flags=1)


# -- vIOMMUs ---------------------------------------------------------------------------------------------------------


def test_viommu_is_the_next_object(guest: Guest) -> None:
    assert (guest.ioas, guest.parent, guest.viommu) == (2, 3, 4)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"flags": 1, "type": 0, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"type": 0, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"dev_id": 99, "type": 99}, errno.ENOENT),
        ({"dev_id": 2}, errno.ENOENT),
        ({"type": TEGRA, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"type": 3, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"type": U32_MAX}, errno.EOPNOTSUPP),
        ({"hwpt_id": 99}, errno.ENOENT),
        ({"hwpt_id": 2}, errno.ENOENT),
        ({"hwpt_id": 4}, errno.ENOENT),
        ({"hwpt_id": 5}, errno.ENOENT),
        ({"hwpt_id": 6}, errno.EINVAL),
    ],
)
def test_order_of_a_viommu_s_checks(guest: Guest, iommu: File, change: dict[str, int], number: int) -> None:
    """5 is a nested HWPT, 6 one that is no nesting parent."""
    assert guest.nested() == 5
    assert hwpt_alloc(iommu, guest.device.devid, guest.ioas) == 6
    good = {"type": SMMUV3, "dev_id": guest.device.devid, "hwpt_id": guest.parent}
    with fails(number):
        IOMMU_VIOMMU_ALLOC(iommu, **(good | change))
    assert IOMMU_VIOMMU_ALLOC(iommu, **good).out_viommu_id == 7


def test_a_viommu_s_data_is_not_looked_at(guest: Guest, iommu: File) -> None:
    """Nor is the reserved word."""
    fields = {"type": SMMUV3, "dev_id": guest.device.devid, "hwpt_id": guest.parent}
    IOMMU_VIOMMU_ALLOC(iommu, data_len=16, data_uptr=NOWHERE, **fields)
    IOMMU_VIOMMU_ALLOC(iommu, __reserved=1, **fields)


def test_an_automatic_hwpt_is_no_parent(device: VfioDevice, iommu: File, ioas: int) -> None:
    auto = device.attach(ioas)
    with fails(errno.EINVAL):
        viommu_alloc(iommu, device.devid, auto)


def test_viommus_share_a_parent(guest: Guest, iommu: File) -> None:
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    for target in (guest.parent, guest.ioas):
        with fails(errno.EBUSY):
            destroy(iommu, target)
    destroy(iommu, guest.viommu)
    with fails(errno.EBUSY):
        destroy(iommu, guest.parent)
    destroy(iommu, other)
    destroy(iommu, guest.parent)
    destroy(iommu, guest.ioas)


def test_a_viommu_outlives_its_device(guest: Guest, iommu: File, cdev: VfioDevice) -> None:
    cdev.close()
    with fails(errno.ENOENT):
        guest.nested()
    destroy(iommu, guest.viommu)


def test_the_unit_has_no_hardware_queues(guest: Guest, iommu: File) -> None:
    for kind in (IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV, 99):
        with fails(errno.EOPNOTSUPP):
            IOMMU_HW_QUEUE_ALLOC(iommu, viommu_id=guest.viommu, type=kind, nesting_parent_iova=RAM, length=PAGE)


# -- nested HWPTs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"__reserved": 1, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"data_type": IOMMU_HWPT_DATA_NONE, "dev_id": 99}, errno.EINVAL),
        ({"data_len": 0, "dev_id": 99}, errno.EINVAL),
        ({"dev_id": 99, "pt_id": 99}, errno.ENOENT),
        ({"dev_id": 2}, errno.ENOENT),
        ({"pt_id": 99}, errno.EINVAL),
        ({"pt_id": 1}, errno.EINVAL),
        ({"flags": NEST, "data_type": 99}, errno.EOPNOTSUPP),
        ({"flags": DIRTY}, errno.EOPNOTSUPP),
        ({"flags": 1 << 4}, errno.EOPNOTSUPP),
        ({"flags": PASID, "data_type": 99}, errno.EOPNOTSUPP),
        ({"flags": PASID | FAULT, "fault_id": 99}, errno.EOPNOTSUPP),
        ({"flags": 0, "data_type": IOMMU_HWPT_DATA_NONE, "data_len": 0}, errno.EOPNOTSUPP),
        ({"data_type": IOMMU_HWPT_DATA_VTD_S1}, errno.EINVAL),
        ({"data_type": 99, "data_uptr": NOWHERE}, errno.EINVAL),
        ({"data_len": 8}, errno.EINVAL),
        ({"data_len": 15, "data_uptr": NOWHERE}, errno.EINVAL),
        ({"data_len": 17, "data_uptr": NOWHERE}, errno.EINVAL),
        ({"data_len": U32_MAX, "data_uptr": NOWHERE}, errno.EINVAL),
        ({"data_uptr": NOWHERE}, errno.EFAULT),
        ({"flags": FAULT, "fault_id": 99}, errno.ENOENT),
        ({"flags": FAULT, "fault_id": 2}, errno.ENOENT),
        ({"fault_id": 99}, 0),
    ],
)
def test_order_of_a_nested_hwpt_s_checks(guest: Guest, iommu: File, change: dict[str, int], number: int) -> None:
    good = {"dev_id": guest.device.devid, "pt_id": guest.viommu}
    fields = {"data_type": IOMMU_HWPT_DATA_ARM_SMMUV3, "data_len": 16, "data_uptr": guest.ram.address} | good | change
    guest.write(0, bytes(16))
    assert answer(IOMMU_HWPT_ALLOC, iommu, **fields) == number


def test_a_parent_itself_carries_no_nested_hwpt(guest: Guest, iommu: File) -> None:
    """The driver nests in vIOMMUs only, which is said before anything of the data or the parent is looked at."""
    plain = hwpt_alloc(iommu, guest.device.devid, guest.ioas)
    for parent in (guest.parent, plain):
        for change in ({"data_type": 2}, {"data_type": 99}, {"data_uptr": NOWHERE}):
            with fails(errno.EOPNOTSUPP):
                guest.nested(None, parent, 0, **change)


def test_a_nested_hwpt_is_no_parent(guest: Guest) -> None:
    nested = guest.nested()
    with fails(errno.EINVAL):
        guest.nested(viommu=nested)


GOOD_STES = {
    "invalid": (0, 0),
    "invalid, other bits": (U64_MAX & ~1, U64_MAX),
    "abort": (V | ABORT, 0),
    "bypass": (V | BYPASS, 0),
    "stage 1": (V | S1 | RAM, STE_1),
    "every allowed bit": (0xF80F_FFFF_FFFF_FFC0 | V | S1 | 3 << 4, 0xFF | S1STALLD | EATS[1]),
    "bypass with stage 1's fields": (V | BYPASS | RAM | 3 << 4 | 0xF8 << 56, 0xFF | S1STALLD),
    "abort with ATS": (V | ABORT, EATS[1]),
    "bypass with ATS": (V | BYPASS, EATS[1]),
}


@pytest.mark.parametrize("name", GOOD_STES)
def test_vste_is_taken(guest: Guest, name: str) -> None:
    assert guest.nested(GOOD_STES[name]) == guest.viommu + 1


BAD_STES = {
    "Config": [(V | config << 1, 0) for config in (1, 2, 3, 6, 7)],
    "word 0": [(V | config | 1 << bit, 0) for bit in range(52, 59) for config in (S1, ABORT)],
    "word 1": [(V | S1 | RAM, 1 << bit) for bit in (*range(8, 27), *range(30, 64))],
    "EATS": [(V | config, EATS[mode]) for config in (ABORT, BYPASS, S1) for mode in (2, 3)],
    "more than one": [(V | S2, EATS[2]), (V | NESTED, 1 << 63), (U64_MAX, U64_MAX)],
}


@pytest.mark.parametrize("what", BAD_STES)
def test_vste_is_refused(guest: Guest, what: str) -> None:
    for ste in BAD_STES[what]:
        with fails(errno.EIO):
            guest.nested(ste)
    assert guest.nested() == guest.viommu + 1


def test_a_bad_vste_is_told_before_a_missing_fault_queue(guest: Guest) -> None:
    with fails(errno.EIO):
        guest.nested((V | S2, 0), flags=FAULT, fault_id=99)


def test_a_nested_hwpt_holds_the_viommu_and_the_fault_queue(guest: Guest, iommu: File, kernel: Backend) -> None:
    fault = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    kernel.adopt(fault.out_fault_fd).close()
    nested = guest.nested(flags=FAULT, fault_id=fault.out_fault_id)
    for target in (guest.viommu, fault.out_fault_id, guest.parent):
        with fails(errno.EBUSY):
            destroy(iommu, target)
    destroy(iommu, nested)
    destroy(iommu, fault.out_fault_id)
    destroy(iommu, guest.viommu)


# -- vDEVICEs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"viommu_id": 99, "dev_id": 99}, errno.ENOENT),
        ({"viommu_id": 3}, errno.ENOENT),
        ({"dev_id": 99}, errno.ENOENT),
        ({"dev_id": 4}, errno.ENOENT),
        ({"virt_id": 0}, 0),
        ({"virt_id": U32_MAX}, 0),
        ({"virt_id": 1 << 32}, 0),
        ({"virt_id": U64_MAX}, 0),
    ],
)
def test_order_of_a_vdevice_s_checks(guest: Guest, iommu: File, change: dict[str, int], number: int) -> None:
    """A virtual id is any number, though a stream has 32 bits."""
    good = {"viommu_id": guest.viommu, "dev_id": guest.device.devid, "virt_id": 1}
    assert answer(IOMMU_VDEVICE_ALLOC, iommu, **(good | change)) == number


def test_a_device_has_one_vdevice(guest: Guest, iommu: File) -> None:
    """In all vIOMMUs together, and one with the same id says the same."""
    vdevice = guest.vdevice(5)
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    for viommu, vsid in ((guest.viommu, 5), (guest.viommu, 6), (other, 5)):
        with fails(errno.EEXIST):
            guest.vdevice(vsid, viommu)
    destroy(iommu, vdevice)
    assert guest.vdevice(5, other) == vdevice


def test_a_vdevice_holds_its_viommu_and_goes_with_its_device(guest: Guest, iommu: File, cdev: VfioDevice) -> None:
    vdevice = guest.vdevice(5)
    with fails(errno.EBUSY):
        destroy(iommu, guest.viommu)
    cdev.close()
    with fails(errno.ENOENT):
        destroy(iommu, vdevice)
    destroy(iommu, guest.viommu)
    destroy(iommu, guest.parent)
    destroy(iommu, guest.ioas)
    # The vDEVICE's id is not given to others, the rest are.
    assert [ioas_alloc(iommu) for _ in range(5)] == [1, 2, 3, 4, 6]


# -- attachment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stage 1", "bypass", "abort", "invalid"])
@pytest.mark.parametrize("replace", [False, True])
def test_only_a_stage_1_vste_needs_a_vdevice(guest: Guest, iommu: File, name: str, replace: bool) -> None:
    nested = guest.nested(GOOD_STES[name])
    if replace:
        guest.device.attach(guest.parent)
    if name == "stage 1":
        with fails(errno.ENOENT):
            guest.device.attach(nested)
        guest.vdevice(7)
    assert guest.device.attach(nested) == nested
    with fails(errno.EBUSY):
        destroy(iommu, nested)
    guest.device.detach()
    destroy(iommu, nested)


def test_a_vdevice_in_another_viommu_does_not_count(guest: Guest, iommu: File) -> None:
    nested = guest.nested()
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    guest.vdevice(7, other)
    with fails(errno.ENOENT):
        guest.device.attach(nested)
    assert guest.device.attach(guest.nested(viommu=other)) == nested + 3


def test_a_vdevice_may_go_while_the_device_is_attached(guest: Guest, iommu: File) -> None:
    """The same HWPT again is no attachment; another one is, and finds no vDEVICE."""
    vdevice = guest.vdevice(7)
    nested, other = guest.nested(), guest.nested()
    guest.device.attach(nested)
    destroy(iommu, vdevice)
    guest.device.attach(nested)
    with fails(errno.ENOENT):
        guest.device.attach(other)
    guest.device.attach(guest.nested((V | BYPASS, 0)))
    with fails(errno.ENOENT):
        guest.device.attach(nested)


def test_attachments_go_everywhere_and_back(guest: Guest, iommu: File) -> None:
    guest.vdevice(7)
    other_ioas = ioas_alloc(iommu)
    places = [
        guest.nested(),
        guest.nested((V | BYPASS, 0)),
        guest.nested((V | ABORT, 0)),
        guest.parent,
        hwpt_alloc(iommu, guest.device.devid, guest.ioas),
        hwpt_alloc(iommu, guest.device.devid, other_ioas),
    ]
    for first in places:
        for second in places:
            assert guest.device.attach(first) == first
            assert guest.device.attach(second) == second
    guest.device.detach()
    for last in places:
        guest.device.attach(last)
        guest.device.detach()
    with fails(errno.EBUSY):  # nested ones stand on it
        destroy(iommu, guest.parent)
    for target in (*places[:3], *places[4:]):
        destroy(iommu, target)


def test_a_nested_hwpt_goes_to_no_pasid(guest: Guest) -> None:
    """It cannot be made for PASIDs, and the device has none."""
    guest.vdevice(7)
    nested = guest.nested()
    for pt in (nested, guest.parent):
        with fails(errno.EINVAL):
            VFIO_DEVICE_ATTACH_IOMMUFD_PT(guest.device.file, flags=VFIO_DEVICE_ATTACH_PASID, pt_id=pt, pasid=1)


def test_a_nested_hwpt_with_a_fault_queue_is_attached(guest: Guest, iommu: File, kernel: Backend) -> None:
    fault = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    file = kernel.adopt(fault.out_fault_fd)
    guest.vdevice(7)
    nested = guest.nested(flags=FAULT, fault_id=fault.out_fault_id)
    guest.device.attach(nested)
    guest.device.attach(guest.nested())
    guest.device.attach(nested)
    guest.device.detach()
    assert file.read(400) == b""


# -- the window for doorbells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["parent", "nested", "bypass"])
def test_attachment_takes_the_doorbells_window_out_of_the_parent_s_ioas(guest: Guest, iommu: File, below: str) -> None:
    """The IOVA of the parent, which is the guest's address. Detaching gives it back."""
    guest.vdevice(7)
    target = {"parent": guest.parent, "nested": guest.nested(), "bypass": guest.nested((V | BYPASS, 0))}[below]
    ((start, last),) = iova_ranges(iommu, guest.ioas)
    guest.device.attach(target)
    assert iova_ranges(iommu, guest.ioas) == [(start, SW_MSI - 1), (SW_MSI + SW_MSI_LENGTH, last)]
    with fails(errno.EINVAL):
        map_user(iommu, guest.ioas, guest.ram.address, PAGE, iova=SW_MSI)
    guest.device.detach()
    assert iova_ranges(iommu, guest.ioas) == [(start, last)]


def test_a_refused_replacement_in_one_ioas_gives_the_window_back(guest: Guest, iommu: File) -> None:
    """Though the device stays where it was. Nor does a replacement that succeeds take it out again: only another
    attachment does."""
    vdevice = guest.vdevice(7)
    first, second, bypass = guest.nested(), guest.nested(), guest.nested((V | BYPASS, 0))
    ((start, last),) = iova_ranges(iommu, guest.ioas)
    guest.device.attach(first)
    destroy(iommu, vdevice)
    with fails(errno.ENOENT):
        guest.device.attach(second)
    assert iova_ranges(iommu, guest.ioas) == [(start, last)]
    guest.device.attach(bypass)
    assert iova_ranges(iommu, guest.ioas) == [(start, last)]
    guest.device.detach()
    guest.device.attach(bypass)
    assert iova_ranges(iommu, guest.ioas) == [(start, SW_MSI - 1), (SW_MSI + SW_MSI_LENGTH, last)]


def test_memory_in_the_doorbells_window_keeps_the_device_out(guest: Guest, iommu: File) -> None:
    """Said before the vDEVICE is missed."""
    map_user(iommu, guest.ioas, guest.ram.address, PAGE, iova=SW_MSI + SW_MSI_LENGTH - PAGE)
    for target in (guest.nested(), guest.nested((V | ABORT, 0)), guest.parent):
        with fails(errno.EADDRINUSE):
            guest.device.attach(target)
