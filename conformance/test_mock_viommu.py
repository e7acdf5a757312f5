"""IOMMU_VIOMMU_ALLOC on the mock driver: checks, data in and out, lifetime; and invalidation of a device's caches.

Mirrors iommufd_viommu_alloc_ioctl() of drivers/iommu/iommufd/viommu.c, iommufd_viommu_alloc_hwpt_nested() of
hw_pagetable.c, and mock_viommu_init() and mock_viommu_cache_invalidate() of selftest.c.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.mock import mock_domain, mock_replace
from conformance.mock_guest import (
    CACHE_DEFAULT,
    INVALIDATE_TYPE,
    VIOMMU_TYPE,
    Guest,
    check_cache,
    guest,
    invalidate,
    invalidation,
    nested_hwpt,
    vdevice_alloc,
    viommu_alloc,
)
from conformance.steps import PAGE, U32_MAX, answer, destroy, fails, hwpt_alloc, ioas_alloc, place
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_VIOMMU_ALLOC,
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV,
)

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.13")]

SELFTEST = abi.IOMMU_HWPT_DATA_SELFTEST
ALL = abi.IOMMU_TEST_INVALIDATE_FLAG_ALL


@pytest.fixture
def ids(iommu: File) -> Guest:
    return guest(iommu)


# -- allocation ------------------------------------------------------------------------------------------------------


def test_viommu_takes_the_lowest_free_id(iommu: File, ids: Guest) -> None:
    assert ids == (1, 2, 3, 5, 6)
    assert viommu_alloc(iommu, ids.idev, ids.parent) == 7


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(0, errno.EOPNOTSUPP, id="default"),
        pytest.param(IOMMU_VIOMMU_TYPE_ARM_SMMUV3, errno.EOPNOTSUPP, id="smmuv3"),
        pytest.param(IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV, errno.EOPNOTSUPP, id="tegra241"),
        pytest.param(0xDEAD, errno.EOPNOTSUPP, id="dead"),
        pytest.param(U32_MAX, errno.EOPNOTSUPP, id="last"),
    ],
)
def test_type_that_is_not_the_mocks_is_refused(iommu: File, ids: Guest, kind: int, number: int) -> None:
    with fails(number):
        viommu_alloc(iommu, ids.idev, ids.parent, kind)
    with fails(number):  # before the HWPT is looked for
        viommu_alloc(iommu, ids.idev, 99, kind)


def test_order_of_the_checks(iommu: File, ids: Guest) -> None:
    for fields, number in (
        ({"flags": 1, "type": VIOMMU_TYPE, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"type": 0, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"type": VIOMMU_TYPE, "dev_id": 99, "hwpt_id": 99}, errno.ENOENT),
        ({"type": VIOMMU_TYPE, "dev_id": ids.stdev, "hwpt_id": ids.parent}, errno.ENOENT),
        ({"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": 0}, errno.ENOENT),
        ({"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": ids.ioas}, errno.ENOENT),
        ({"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": ids.viommu}, errno.ENOENT),
        ({"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": 4}, errno.EINVAL),
    ):
        assert answer(IOMMU_VIOMMU_ALLOC, iommu, **fields) == number, fields
    assert ioas_alloc(iommu) == ids.viommu + 1


def test_parent_must_be_a_nesting_parent(iommu: File, ids: Guest) -> None:
    plain = hwpt_alloc(iommu, ids.idev, ids.ioas)
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    with fails(errno.EINVAL):
        viommu_alloc(iommu, ids.idev, plain)
    with fails(errno.ENOENT):
        viommu_alloc(iommu, ids.idev, nested)


def test_parent_may_track_dirty_pages_and_carry_pasids(iommu: File, ids: Guest) -> None:
    flags = IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    parent = hwpt_alloc(iommu, ids.idev, ids.ioas, flags)
    assert viommu_alloc(iommu, ids.idev, parent) == parent + 1


@pytest.mark.since("6.17")
def test_reserved_word_is_not_looked_at(iommu: File, ids: Guest) -> None:
    fields = {"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": ids.parent, "__reserved": U32_MAX}
    assert IOMMU_VIOMMU_ALLOC(iommu, **fields).out_viommu_id == ids.viommu + 1


def test_viommu_holds_its_parent(iommu: File, ids: Guest) -> None:
    with fails(errno.EBUSY):
        destroy(iommu, ids.parent)
    destroy(iommu, ids.viommu)
    destroy(iommu, ids.parent)


def test_viommu_needs_no_attachment_and_holds_no_device(iommu: File, ids: Guest) -> None:
    destroy(iommu, ids.stdev)
    with fails(errno.ENOENT):
        viommu_alloc(iommu, ids.idev, ids.parent)
    destroy(iommu, ids.viommu)
    destroy(iommu, ids.parent)
    destroy(iommu, ids.ioas)


def test_several_viommus_share_a_parent(iommu: File, ids: Guest) -> None:
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    destroy(iommu, ids.viommu)
    with fails(errno.EBUSY):
        destroy(iommu, ids.parent)
    destroy(iommu, other)
    destroy(iommu, ids.parent)


def test_reply_that_cannot_be_written_leaves_no_viommu(iommu: File, ids: Guest) -> None:
    with arena(1) as memory:
        arg = IOMMU_VIOMMU_ALLOC.make(type=VIOMMU_TYPE, dev_id=ids.idev, hwpt_id=ids.parent)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_VIOMMU_ALLOC.number, memory.page(0))
    destroy(iommu, ids.viommu)
    destroy(iommu, ids.parent)


# -- the driver's data -----------------------------------------------------------------------------------------------

DATA = abi.iommu_viommu_selftest


def with_data(iommu: File, ids: Guest, length: int, in_data: int = 0xBEEF) -> bytes:
    """VIOMMU_ALLOC with so many bytes of the mock's data; the bytes afterwards, 32 of them."""
    address = place(bytes(DATA(in_data=in_data, out_data=0x1111)).ljust(32, b"\xaa"))
    IOMMU_VIOMMU_ALLOC(iommu, type=VIOMMU_TYPE, dev_id=ids.idev, hwpt_id=ids.parent, data_len=length, data_uptr=address)
    return Arena.read(address, 32)


@pytest.mark.since("6.17")
@pytest.mark.parametrize("length", range(8, 25))
def test_data_comes_back_as_far_as_the_caller_has_room(kernel: Backend, iommu: File, ids: Guest, length: int) -> None:
    before = bytes(DATA(in_data=0xBEEF, out_data=0x1111)).ljust(32, b"\xaa")
    after = with_data(iommu, ids, length)
    full = bytes(DATA(in_data=0xBEEF, out_data=0xBEEF, out_mmap_offset=PAGE, out_mmap_length=2 * PAGE))
    assert after[:length] == full[:length]
    assert after[length:] == before[length:]
    kernel.note("data", after.hex())


@pytest.mark.since("6.17")
@pytest.mark.parametrize("length", [1, 4, 7, 25, 32, PAGE, U32_MAX])
def test_data_of_another_size_is_einval(iommu: File, ids: Guest, length: int) -> None:
    with fails(errno.EINVAL):
        with_data(iommu, ids, length)
    assert viommu_alloc(iommu, ids.idev, ids.parent) == ids.viommu + 1


@pytest.mark.since("6.17")
def test_no_length_means_no_data(iommu: File, ids: Guest) -> None:
    IOMMU_VIOMMU_ALLOC(iommu, type=VIOMMU_TYPE, dev_id=ids.idev, hwpt_id=ids.parent, data_len=0, data_uptr=8)


@pytest.mark.since("6.17")
def test_data_that_cannot_be_read_or_written_is_efault(iommu: File, ids: Guest) -> None:
    fields = {"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": ids.parent, "data_len": 24}
    with arena(1) as memory:
        with fails(errno.EFAULT):
            IOMMU_VIOMMU_ALLOC(iommu, data_uptr=8, **fields)
        Arena.write(memory.page(0), DATA(in_data=1))
        memory.read_only(0)
        with fails(errno.EFAULT):
            IOMMU_VIOMMU_ALLOC(iommu, data_uptr=memory.page(0), **fields)
    # Neither an id nor a place to map is left behind.
    assert DATA.from_buffer_copy(with_data(iommu, ids, 24)[:24]).out_mmap_offset == PAGE
    assert viommu_alloc(iommu, ids.idev, ids.parent) == ids.viommu + 2


# -- nested HWPTs ----------------------------------------------------------------------------------------------------


def test_nested_hwpt_holds_the_viommu_alone(iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    assert nested == ids.viommu + 1
    with fails(errno.EBUSY):
        destroy(iommu, ids.viommu)
    destroy(iommu, nested)
    destroy(iommu, ids.viommu)
    destroy(iommu, ids.parent)


def test_nested_hwpt_checks(kernel: Backend, iommu: File, ids: Guest) -> None:
    data = place(bytes(8))
    good = {"dev_id": ids.idev, "pt_id": ids.viommu, "data_type": SELFTEST, "data_len": 4, "data_uptr": data}
    for change, number in (
        ({"flags": IOMMU_HWPT_ALLOC_NEST_PARENT}, errno.EOPNOTSUPP),
        ({"flags": IOMMU_HWPT_ALLOC_DIRTY_TRACKING}, errno.EOPNOTSUPP),
        ({"flags": 1 << 31}, errno.EOPNOTSUPP),
        ({"flags": 1 << 31 | IOMMU_HWPT_FAULT_ID_VALID, "fault_id": 99}, errno.EOPNOTSUPP),
        ({"data_type": 0, "data_len": 0}, errno.EOPNOTSUPP),
        ({"data_type": SELFTEST, "data_len": 0}, errno.EINVAL),
        ({"data_type": 0, "data_len": 4}, errno.EINVAL),
        ({"data_type": 1}, errno.EOPNOTSUPP),
        ({"data_type": SELFTEST + 1}, errno.EOPNOTSUPP),
        ({"data_len": 3}, errno.EINVAL),
        ({"data_len": 9}, errno.EINVAL),
        ({"data_uptr": 8}, errno.EFAULT),
        ({"flags": IOMMU_HWPT_FAULT_ID_VALID, "fault_id": 99}, errno.ENOENT),
        ({"flags": IOMMU_HWPT_FAULT_ID_VALID, "fault_id": ids.viommu}, errno.ENOENT),
    ):
        assert answer(IOMMU_HWPT_ALLOC, iommu, **(good | change)) == number, change
    assert IOMMU_HWPT_ALLOC(iommu, **good).out_hwpt_id == ids.viommu + 1
    carries_pasids = IOMMU_HWPT_ALLOC(iommu, **(good | {"flags": IOMMU_HWPT_ALLOC_PASID})).out_hwpt_id
    assert carries_pasids == ids.viommu + 2
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    kernel.adopt(queue.out_fault_fd).close()
    nested_hwpt(iommu, ids.idev, ids.viommu, IOMMU_HWPT_FAULT_ID_VALID, queue.out_fault_id)
    with fails(errno.EBUSY):
        destroy(iommu, queue.out_fault_id)


def test_any_device_behind_the_iommu_may_have_a_nested_hwpt(iommu: File, ids: Guest) -> None:
    other = mock_domain(iommu, ids.ioas)
    nested_hwpt(iommu, other.idev, ids.viommu)


@pytest.mark.needs("root", "vfio_cdev")
def test_device_behind_another_iommu_has_no_place_in_the_viommu(device: VfioDevice, iommu: File) -> None:
    """EINVAL before the flags are looked at; and its own IOMMU has no vIOMMU for the mock's parent."""
    ids = guest(iommu)
    for flags in (0, 1 << 31):
        with fails(errno.EINVAL):
            nested_hwpt(iommu, device.devid, ids.viommu, flags)
    with fails(errno.EOPNOTSUPP):
        viommu_alloc(iommu, device.devid, ids.parent)


def test_attaching_needs_a_vdevice(iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    with fails(errno.ENOENT):
        mock_replace(iommu, ids.stdev, nested)
    with fails(errno.ENOENT):
        mock_domain(iommu, nested)
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    vdevice = vdevice_alloc(iommu, other, ids.idev, 1)
    with fails(errno.ENOENT):  # of another vIOMMU
        mock_replace(iommu, ids.stdev, nested)
    destroy(iommu, vdevice)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    assert mock_replace(iommu, ids.stdev, nested) == nested
    with fails(errno.EBUSY):
        destroy(iommu, nested)


def test_attachment_outlives_the_vdevice(iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    mock_replace(iommu, ids.stdev, nested)
    destroy(iommu, vdevice)
    mock_replace(iommu, ids.stdev, ids.parent)
    with fails(errno.ENOENT):
        mock_replace(iommu, ids.stdev, nested)
    destroy(iommu, nested)


# -- closing ---------------------------------------------------------------------------------------------------------


def test_close_takes_everything_down(kernel: Backend, iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    mock_replace(iommu, ids.stdev, nested)
    iommu.close()
    with kernel.open("/dev/iommu") as again:
        assert guest(again) == ids


# -- invalidation ----------------------------------------------------------------------------------------------------


def caches(iommu: File, idev: int) -> list[int | None]:
    """The device's cache words, None for one that is neither 0 nor the default."""
    return [
        next((value for value in (0, CACHE_DEFAULT) if answer(check_cache, iommu, idev, index, value) == 0), None)
        for index in range(abi.MOCK_DEV_CACHE_NUM)
    ]


FULL = [CACHE_DEFAULT] * 4


def test_check_cache(iommu: File, ids: Guest) -> None:
    assert caches(iommu, ids.idev) == FULL
    for idev, index, value, number in (
        (99, 0, CACHE_DEFAULT, errno.ENOENT),
        (ids.stdev, 0, CACHE_DEFAULT, errno.ENOENT),
        (ids.idev, 0, 1, errno.EINVAL),
        (ids.idev, 4, CACHE_DEFAULT, errno.EINVAL),
        (ids.idev, U32_MAX, CACHE_DEFAULT, errno.EINVAL),
    ):
        with fails(number):
            check_cache(iommu, idev, index, value)


@pytest.fixture
def virtual(iommu: File, ids: Guest) -> Guest:
    """With the device as 0x99 in the vIOMMU."""
    vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    return ids


def test_entries_are_done_in_order_up_to_the_first_bad_one(iommu: File, virtual: Guest) -> None:
    good = [invalidation(0x99, 0), invalidation(0x99, 2)]
    for bad, number in (
        (invalidation(0x99, 1, flags=2), errno.EOPNOTSUPP),
        (invalidation(0x99, 1, flags=U32_MAX), errno.EOPNOTSUPP),
        (invalidation(0x99, 4), errno.EINVAL),
        (invalidation(0x99, 4, flags=ALL), errno.EINVAL),
        (invalidation(0x98, 1), errno.EINVAL),
        (invalidation(0, 1), errno.EINVAL),
        (invalidation(0x98, 4, flags=2), errno.EOPNOTSUPP),
    ):
        data = place(b"".join(map(bytes, [*good, bad, invalidation(0x99, 3)])))
        arg = IOMMU_HWPT_INVALIDATE.make(
            hwpt_id=virtual.viommu, data_uptr=data, data_type=INVALIDATE_TYPE, entry_len=12, entry_num=4
        )
        with fails(number):
            IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
        assert arg.entry_num == 2
    assert caches(iommu, virtual.idev) == [0, CACHE_DEFAULT, 0, CACHE_DEFAULT]


def test_flag_all_takes_every_word(iommu: File, virtual: Guest) -> None:
    assert invalidate(iommu, virtual.viommu, invalidation(0x99, 1, flags=ALL)) == 1
    assert caches(iommu, virtual.idev) == [0] * 4


def test_entry_finds_the_device_by_its_virtual_id(iommu: File, virtual: Guest) -> None:
    other = mock_domain(iommu, virtual.ioas)
    vdevice = vdevice_alloc(iommu, virtual.viommu, other.idev, 0)
    assert invalidate(iommu, virtual.viommu, invalidation(0, 3), invalidation(0x99, 1)) == 2
    assert caches(iommu, other.idev) == [*FULL[:3], 0]
    assert caches(iommu, virtual.idev) == [CACHE_DEFAULT, 0, CACHE_DEFAULT, CACHE_DEFAULT]
    destroy(iommu, vdevice)
    with fails(errno.EINVAL):
        invalidate(iommu, virtual.viommu, invalidation(0, 3))


def test_virtual_ids_have_64_bits_and_entries_32(iommu: File, ids: Guest) -> None:
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1 << 32 | 7)
    with fails(errno.EINVAL):
        invalidate(iommu, ids.viommu, invalidation(7, 0))


def test_no_entries_ask_for_the_type(iommu: File, virtual: Guest) -> None:
    assert invalidate(iommu, virtual.viommu) == 0
    assert invalidate(iommu, virtual.viommu, length=0) == 0
    for kind in (0, 1, abi.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST_INVALID):
        with fails(errno.EINVAL):
            invalidate(iommu, virtual.viommu, kind=kind)


@pytest.mark.parametrize("kind", [0, 1, abi.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST_INVALID])
def test_entries_of_another_type_are_einval(iommu: File, virtual: Guest, kind: int) -> None:
    arg = IOMMU_HWPT_INVALIDATE.make(
        hwpt_id=virtual.viommu, data_uptr=place(bytes(12)), data_type=kind, entry_len=12, entry_num=1
    )
    with fails(errno.EINVAL):
        IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    assert arg.entry_num == 0


@pytest.mark.parametrize("length", [1, 4, 8, 11, 13, 16, 64, PAGE])
def test_entry_of_another_length_is_cut_or_filled_up(iommu: File, ids: Guest, length: int) -> None:
    """What is missing is zero: here the whole of vdev_id from 4 bytes down, cache_id from 8."""
    vdevice_alloc(iommu, ids.viommu, ids.idev, 0)
    assert invalidate(iommu, ids.viommu, invalidation(0, 0), length=length) == 1
    assert caches(iommu, ids.idev) == [0, *FULL[1:]]


@pytest.mark.parametrize("length", [13, 16, PAGE])
def test_longer_entry_must_end_in_zeroes(iommu: File, virtual: Guest, length: int) -> None:
    """All entries are read before the first is done."""
    entry = bytes(invalidation(0x99, 0)).ljust(length, b"\0")
    bad = entry[:-1] + b"\1"
    with arena(2) as memory:
        address = memory.page(1) - length if length < PAGE else memory.page(0)
        count = 2 if length == PAGE else 1
        Arena.write(address, (entry + bad)[-length * count :])
        arg = IOMMU_HWPT_INVALIDATE.make(
            hwpt_id=virtual.viommu, data_uptr=address, data_type=INVALIDATE_TYPE, entry_len=length, entry_num=count
        )
        with fails(errno.E2BIG):
            IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    assert arg.entry_num == 0
    assert caches(iommu, virtual.idev) == FULL


def test_entries_that_cannot_be_read_are_efault_and_none_is_done(iommu: File, virtual: Guest) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        for length in (12, 16):
            address = memory.page(1) - length
            Arena.write(address, bytes(invalidation(0x99, 0)).ljust(length, b"\0"))
            arg = IOMMU_HWPT_INVALIDATE.make(
                hwpt_id=virtual.viommu, data_uptr=address, data_type=INVALIDATE_TYPE, entry_len=length, entry_num=2
            )
            with fails(errno.EFAULT):
                IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
            assert arg.entry_num == 0
    assert caches(iommu, virtual.idev) == FULL


def test_several_hundred_entries(iommu: File, virtual: Guest) -> None:
    entries = [invalidation(0x99, index % 4) for index in range(300)]
    assert invalidate(iommu, virtual.viommu, *entries) == 300
    assert caches(iommu, virtual.idev) == [0] * 4


def test_invalidation_of_something_without_a_cache_is_einval(iommu: File, virtual: Guest) -> None:
    vdevice = virtual.viommu + 1
    for object_id in (virtual.parent, virtual.ioas, virtual.idev, vdevice):
        with fails(errno.EINVAL):
            invalidate(iommu, object_id, invalidation(0x99, 0))


@pytest.mark.since("7.2")
def test_more_entries_than_fit_the_kernels_memory(kernel: Backend, iommu: File, virtual: Guest) -> None:
    """The largest number that is allowed needs 6 MiB for the mock; entry_num is then left alone."""
    arg = IOMMU_HWPT_INVALIDATE.make(
        hwpt_id=virtual.viommu, data_uptr=8, data_type=INVALIDATE_TYPE, entry_len=12, entry_num=1 << 19
    )
    with fails(errno.ENOMEM):
        IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    kernel.note("entry_num", arg.entry_num)
