"""Nested HWPTs on the mock driver: what they need of their parent, their data, attachment, and what they hold.

Mirrors iommufd_hwpt_nested_alloc() of hw_pagetable.c and mock_domain_alloc_nested() of selftest.c, both in iommufd.
Nested HWPTs in a vIOMMU are in test_mock_viommu.py, invalidations in test_mock_invalidate.py, HWPTs with a fault queue
in test_mock_fault.py.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.mock import (
    APERTURE,
    IOTLB_DEFAULT,
    NESTED_DATA,
    check_iotlb,
    check_map,
    mock_domain,
    mock_domain_flags,
    mock_replace,
    nest_parent,
    nested_alloc,
)
from conformance.steps import (
    PAGE,
    U32_MAX,
    U64_MAX,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_user,
    place,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
)

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.8")]

NEST_PARENT, DIRTY, PASID = (
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_PASID,
)
IOVA = APERTURE[0]


class Ids(NamedTuple):
    """An IOAS (1), a mock device on it (2, 3), its automatic HWPT (4) and a nesting parent (5)."""

    ioas: int
    stdev: int
    idev: int
    auto: int
    parent: int


@pytest.fixture
def ids(iommu: File) -> Ids:
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    return Ids(ioas, device.stdev, device.idev, device.hwpt, nest_parent(iommu, device.idev, ioas))


# -- what is needed --------------------------------------------------------------------------------------------------


def test_nested_hwpts_share_a_parent_and_hold_it(iommu: File, ids: Ids) -> None:
    first, second = nested_alloc(iommu, ids.idev, ids.parent), nested_alloc(iommu, ids.idev, ids.parent)
    assert (first, second) == (6, 7)
    for nested in (second, first):
        with fails(errno.EBUSY):
            destroy(iommu, ids.parent)
        destroy(iommu, nested)
    destroy(iommu, ids.parent)


def test_reply_changes_nothing_but_the_id(iommu: File, ids: Ids) -> None:
    data = place((7).to_bytes(4, "little"))
    reply = IOMMU_HWPT_ALLOC(
        iommu, dev_id=ids.idev, pt_id=ids.parent, data_type=NESTED_DATA, data_len=4, data_uptr=data, out_hwpt_id=99
    )
    assert (reply.out_hwpt_id, reply.dev_id, reply.pt_id) == (6, ids.idev, ids.parent)
    assert (reply.data_type, reply.data_len, reply.data_uptr) == (NESTED_DATA, 4, data)


def test_parent_must_be_made_for_nesting(iommu: File, ids: Ids) -> None:
    plain = hwpt_alloc(iommu, ids.idev, ids.ioas)
    for parent in (plain, ids.auto):
        with fails(errno.EINVAL):
            nested_alloc(iommu, ids.idev, parent)
    assert nested_alloc(iommu, ids.idev, ids.parent) == plain + 1


def test_nested_on_nested_is_einval(iommu: File, ids: Ids) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent)
    with fails(errno.EINVAL):
        nested_alloc(iommu, ids.idev, nested)


def test_device_as_parent_is_einval(iommu: File, ids: Ids) -> None:
    for parent in (ids.stdev, ids.idev, 99):
        with fails(errno.EINVAL):
            nested_alloc(iommu, ids.idev, parent)


def test_object_that_is_no_device_is_enoent(iommu: File, ids: Ids) -> None:
    for device in (ids.ioas, ids.stdev, ids.parent, 99):
        with fails(errno.ENOENT):
            nested_alloc(iommu, device, ids.parent)


def test_other_device_of_the_driver_may_use_the_parent(iommu: File, ids: Ids) -> None:
    other = mock_domain_flags(iommu, ioas_alloc(iommu), abi.MOCK_FLAGS_DEVICE_NO_DIRTY)
    nested = nested_alloc(iommu, other.idev, ids.parent)
    assert mock_replace(iommu, other.stdev, nested) == nested


@pytest.mark.needs("vfio_cdev", "root", "vtd")
def test_parent_of_another_driver_is_einval(device: VfioDevice, iommu: File) -> None:
    """VT-d has the operation, in legacy mode too, so that the parent is looked at before the unit is."""
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    with fails(errno.EINVAL):
        nested_alloc(iommu, device.devid, nest_parent(iommu, mock.idev, ioas))


@pytest.mark.needs("vfio_cdev", "root", "smmuv3")
def test_parent_of_another_driver_is_eopnotsupp_for_an_smmu(device: VfioDevice, iommu: File) -> None:
    """Its driver nests on vIOMMUs only, whatever the parent."""
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    with fails(errno.EOPNOTSUPP):
        nested_alloc(iommu, device.devid, nest_parent(iommu, mock.idev, ioas))


@pytest.mark.parametrize(
    "flags",
    [NEST_PARENT, DIRTY, NEST_PARENT | DIRTY, 16, 0x8000_0000, U32_MAX],
)
def test_flag_that_is_for_paging_hwpts_is_eopnotsupp(iommu: File, ids: Ids, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        nested_alloc(iommu, ids.idev, ids.parent, flags)
    assert ioas_alloc(iommu) == 6


@pytest.mark.since("6.14")
def test_nested_hwpt_may_be_for_pasids(iommu: File, ids: Ids) -> None:
    assert nested_alloc(iommu, ids.idev, ids.parent, PASID) == 6


def test_flags_come_before_the_parents_kind(iommu: File, ids: Ids) -> None:
    with fails(errno.EOPNOTSUPP):
        nested_alloc(iommu, ids.idev, ids.auto, NEST_PARENT)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, ids.idev, ids.auto)


def test_parents_kind_comes_before_the_data(iommu: File, ids: Ids) -> None:
    with fails(errno.EINVAL):
        hwpt_alloc(iommu, ids.idev, ids.auto, data_type=NESTED_DATA + 1, data_len=4)


# -- data ------------------------------------------------------------------------------------------------------------


def with_data(iommu: File, ids: Ids, address: int, length: int, kind: int = NESTED_DATA) -> int:
    return hwpt_alloc(iommu, ids.idev, ids.parent, data_type=kind, data_len=length, data_uptr=address)


def test_nested_hwpt_without_data_is_eopnotsupp(iommu: File, ids: Ids) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, ids.idev, ids.parent)


@pytest.mark.parametrize(("kind", "length"), [(0, 4), (0, U32_MAX), (NESTED_DATA, 0), (1, 0)])
def test_half_a_description_of_the_data_is_einval(iommu: File, ids: Ids, kind: int, length: int) -> None:
    with fails(errno.EINVAL):
        with_data(iommu, ids, place(bytes(8)), length, kind)


@pytest.mark.parametrize("kind", [1, NESTED_DATA - 1, NESTED_DATA + 1, U32_MAX])
@pytest.mark.parametrize("length", [1, 4, 4096])
def test_data_of_another_type_is_eopnotsupp_whatever_its_length(iommu: File, ids: Ids, kind: int, length: int) -> None:
    with fails(errno.EOPNOTSUPP):
        with_data(iommu, ids, 8, length, kind)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 12, 4096, U32_MAX])
@pytest.mark.parametrize("readable", [True, False])
def test_data_of_another_length_is_einval_even_with_zeroes_behind(
    iommu: File, ids: Ids, length: int, readable: bool
) -> None:
    with fails(errno.EINVAL):
        with_data(iommu, ids, place(bytes(PAGE)) if readable else 8, length)


@pytest.mark.since("6.19")
@pytest.mark.parametrize("length", [4, 5, 7, 8])
@pytest.mark.parametrize("table", [0, abi.MOCK_IOMMUPT_HUGE, U32_MAX])
def test_kind_of_page_table_is_not_looked_at(iommu: File, ids: Ids, length: int, table: int) -> None:
    data = abi.iommu_hwpt_selftest(iotlb=0x1234_5678, pagetable_type=table)
    check_iotlb(iommu, with_data(iommu, ids, place(bytes(data)), length), *[0x1234_5678] * 4)


@pytest.mark.parametrize("address", [0, 8, U64_MAX - 3, U64_MAX], ids=["null", "low", "wraps", "last"])
def test_data_that_cannot_be_read_is_efault(iommu: File, ids: Ids, address: int) -> None:
    with fails(errno.EFAULT):
        with_data(iommu, ids, address, 4)
    assert ioas_alloc(iommu) == 6
    destroy(iommu, ids.parent)


def test_data_at_the_edge_of_memory(iommu: File, ids: Ids) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 4, (77).to_bytes(4, "little"))
        check_iotlb(iommu, with_data(iommu, ids, memory.page(1) - 4, 4), 77, 77, 77, 77)
        with fails(errno.EFAULT):
            with_data(iommu, ids, memory.page(1) - 3, 4)


# -- the words of its IOTLB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [0, 1, IOTLB_DEFAULT, U32_MAX])
def test_words_start_as_the_data_says(iommu: File, ids: Ids, word: int) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent, iotlb=word)
    check_iotlb(iommu, nested, word, word, word, word)
    with fails(errno.EINVAL):
        check_iotlb(iommu, nested, word ^ 1)


@pytest.mark.parametrize("index", [4, 5, U32_MAX])
def test_there_are_four_words(iommu: File, ids: Ids, index: int) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent, iotlb=0)
    with fails(errno.EINVAL):
        check_iotlb(iommu, nested, 0, start=index)


def test_words_of_what_is_not_nested_are_enoent(iommu: File, ids: Ids) -> None:
    for number in (0, ids.ioas, ids.stdev, ids.idev, ids.auto, ids.parent, 99):
        with fails(errno.ENOENT):
            check_iotlb(iommu, number, 0)


def test_words_are_each_hwpts_own(iommu: File, ids: Ids) -> None:
    first = nested_alloc(iommu, ids.idev, ids.parent, iotlb=1)
    second = nested_alloc(iommu, ids.idev, ids.parent, iotlb=2)
    check_iotlb(iommu, first, 1, 1, 1, 1)
    check_iotlb(iommu, second, 2, 2, 2, 2)


# -- attaching -------------------------------------------------------------------------------------------------------


def test_replace_rotates_over_nested_and_paging(iommu: File, ids: Ids) -> None:
    """Each attached HWPT is busy, and free again when the device has left; the automatic one dies at the first step."""
    first, second = nested_alloc(iommu, ids.idev, ids.parent), nested_alloc(iommu, ids.idev, ids.parent)
    for target in (first, second, ids.parent, first):
        assert mock_replace(iommu, ids.stdev, target) == target
        with fails(errno.EBUSY):
            destroy(iommu, target)
    destroy(iommu, second)
    with fails(errno.ENOENT):
        destroy(iommu, ids.auto)
    assert mock_replace(iommu, ids.stdev, ids.ioas) == ids.auto
    destroy(iommu, first)
    destroy(iommu, ids.parent)


def test_device_is_made_on_a_nested_hwpt(iommu: File, ids: Ids) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent)
    device = mock_domain(iommu, nested)
    assert device.hwpt == nested
    with fails(errno.EBUSY):
        destroy(iommu, nested)
    destroy(iommu, device.stdev)
    destroy(iommu, nested)


def test_devices_share_a_nested_hwpt(iommu: File, ids: Ids) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent)
    others = [mock_domain(iommu, nested) for _ in range(3)]
    mock_replace(iommu, ids.stdev, nested)
    for other in others:
        destroy(iommu, other.stdev)
        with fails(errno.EBUSY):
            destroy(iommu, nested)
    destroy(iommu, ids.stdev)
    destroy(iommu, nested)


def test_ioas_is_held_through_the_parent(iommu: File, ids: Ids) -> None:
    nested = nested_alloc(iommu, ids.idev, ids.parent)
    destroy(iommu, ids.stdev)
    for number in (ids.ioas, ids.parent):
        with fails(errno.EBUSY):
            destroy(iommu, number)
    for number in (nested, ids.parent, ids.ioas):
        destroy(iommu, number)


def test_nested_hwpt_has_no_mappings_of_its_own(kernel: Backend, iommu: File, ids: Ids) -> None:
    buffer = kernel.buffer(PAGE)
    nested = nested_alloc(iommu, ids.idev, ids.parent)
    mock_replace(iommu, ids.stdev, nested)
    map_user(iommu, ids.ioas, buffer.address, PAGE, iova=IOVA)
    check_map(iommu, ids.parent, IOVA, PAGE, buffer.address)
    with fails(errno.ENOENT):
        check_map(iommu, nested, IOVA, PAGE, buffer.address)
    assert unmap_all(iommu, ids.ioas) == PAGE


def test_nested_hwpt_narrows_nothing(iommu: File, ids: Ids) -> None:
    ioas = ioas_alloc(iommu)
    parent = nest_parent(iommu, ids.idev, ioas)
    before = iova_ranges(iommu, ioas)
    nested = nested_alloc(iommu, ids.idev, parent)
    assert iova_ranges(iommu, ioas) == before == [APERTURE]
    destroy(iommu, nested)
    destroy(iommu, parent)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


def test_nested_hwpt_tracks_no_dirty_pages(iommu: File, ids: Ids) -> None:
    parent = nest_parent(iommu, ids.idev, ids.ioas, DIRTY)
    nested = nested_alloc(iommu, ids.idev, parent)
    with fails(errno.ENOENT):
        IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=nested, flags=1)
    with fails(errno.ENOENT):
        IOMMU_HWPT_GET_DIRTY_BITMAP(iommu, hwpt_id=nested, iova=IOVA, length=PAGE, page_size=PAGE, data=place(b"\0"))


def test_device_without_dirty_tracking_attaches_above_a_tracked_parent(iommu: File, ids: Ids) -> None:
    parent = nest_parent(iommu, ids.idev, ids.ioas, DIRTY)
    nested = nested_alloc(iommu, ids.idev, parent)
    other = mock_domain_flags(iommu, ids.ioas, abi.MOCK_FLAGS_DEVICE_NO_DIRTY)
    with fails(errno.EINVAL):
        mock_replace(iommu, other.stdev, parent)
    assert mock_replace(iommu, other.stdev, nested) == nested


# -- the reply, the end ----------------------------------------------------------------------------------------------


def test_reply_that_cannot_be_written_leaves_no_hwpt(iommu: File, ids: Ids) -> None:
    with arena(1) as memory:
        arg = IOMMU_HWPT_ALLOC.make(dev_id=ids.idev, pt_id=ids.parent, data_type=NESTED_DATA, data_len=4)
        arg.data_uptr = place(bytes(4))
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HWPT_ALLOC.number, memory.page(0))
    assert ioas_alloc(iommu) == 6
    destroy(iommu, ids.parent)


def test_close_takes_an_attached_nested_hwpt_down(kernel: Backend, iommu: File, ids: Ids) -> None:
    buffer = kernel.buffer(PAGE)
    map_user(iommu, ids.ioas, buffer.address, PAGE, iova=IOVA)
    mock_replace(iommu, ids.stdev, nested_alloc(iommu, ids.idev, ids.parent))
    pinned = kernel.status("VmPin")
    iommu.close()
    assert pinned - kernel.status("VmPin") == PAGE // 1024


# -- paging HWPTs: flags together ------------------------------------------------------------------------------------


@pytest.mark.since("6.14")
@pytest.mark.parametrize("flags", [NEST_PARENT | PASID, NEST_PARENT | DIRTY, NEST_PARENT | DIRTY | PASID])
def test_nesting_parent_may_have_more_flags(iommu: File, ids: Ids, flags: int) -> None:
    parent = hwpt_alloc(iommu, ids.idev, ids.ioas, flags)
    assert nested_alloc(iommu, ids.idev, parent) == parent + 1


@pytest.mark.since("6.19")
def test_nesting_parent_with_a_huge_table(iommu: File, ids: Ids) -> None:
    data = abi.iommu_hwpt_selftest(pagetable_type=abi.MOCK_IOMMUPT_HUGE)
    fields = {"data_type": NESTED_DATA, "data_len": 8, "data_uptr": place(bytes(data))}
    ioas = ioas_alloc(iommu)
    parent = hwpt_alloc(iommu, ids.idev, ioas, NEST_PARENT, **fields)
    assert iova_ranges(iommu, ioas) == [(0, (1 << 38) - 1)]
    assert nested_alloc(iommu, ids.idev, parent) == parent + 1


@pytest.mark.has("fault-queue-on-paging-hwpt")
@pytest.mark.parametrize("more", [0, DIRTY, PASID], ids=["alone", "dirty", "pasid"])
def test_nesting_parent_reports_no_faults(kernel: Backend, iommu: File, ids: Ids, more: int) -> None:
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    with kernel.adopt(queue.out_fault_fd):
        for fault_id in (queue.out_fault_id, 99):
            with fails(errno.EOPNOTSUPP):
                hwpt_alloc(iommu, ids.idev, ids.ioas, NEST_PARENT | 4 | more, fault_id=fault_id)
