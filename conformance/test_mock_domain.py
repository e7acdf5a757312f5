"""Mock devices: their ids, their attachment, and what of them lives how long.

Mirrors iommufd_test_mock_domain() and its kin of drivers/iommu/iommufd/selftest.c. A mock device is three objects: the
SELFTEST object with the lowest free id, the DEVICE, and, attached to an IOAS, an automatic HWPT.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.mock import (
    APERTURE,
    SMALL,
    command,
    memory_limit,
    mock_domain,
    mock_domain_flags,
    mock_replace,
    run,
)
from conformance.steps import (
    PAGE,
    U64_MAX,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_user,
    place,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
)

pytestmark = pytest.mark.needs("iommu", "mock")

NO_DIRTY = abi.MOCK_FLAGS_DEVICE_NO_DIRTY
PASID = abi.MOCK_FLAGS_DEVICE_PASID


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [0, 24, 0xFFFF_FFFF])
def test_unknown_operation_is_eopnotsupp(iommu: File, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        run(iommu, op)


def test_block_without_its_last_member_is_einval(iommu: File) -> None:
    arg = command(abi.IOMMU_TEST_OP_MOCK_DOMAIN)
    arg.size = abi.IOMMU_TEST_CMD.min_size - 1
    with fails(errno.EINVAL):
        abi.IOMMU_TEST_CMD.raw(iommu, arg)


def test_reserved_word_is_not_looked_at(iommu: File, ioas: int) -> None:
    arg = command(abi.IOMMU_TEST_OP_MOCK_DOMAIN, ioas)
    setattr(arg, "__reserved", 1)
    abi.IOMMU_TEST_CMD.raw(iommu, arg)
    assert arg.mock_domain.out_stdev_id == ioas + 1


@pytest.mark.parametrize("limit", [0, 1, 11])
def test_memory_limit_below_one_batch_element_is_einval(iommu: File, limit: int) -> None:
    with fails(errno.EINVAL):
        memory_limit(iommu, limit)


@pytest.mark.parametrize("limit", [12, 16])
def test_small_memory_limit_changes_nothing_that_shows(kernel: Backend, iommu: File, ioas: int, limit: int) -> None:
    memory_limit(iommu, limit)
    try:
        with kernel.buffer(8 * PAGE) as buffer:
            mock_domain(iommu, ioas)
            assert map_user(iommu, ioas, buffer.address, 8 * PAGE, iova=APERTURE[0]) == APERTURE[0]
            destroy_all(iommu, ioas)
    finally:
        memory_limit(iommu, 65536)


def destroy_all(iommu: File, ioas: int) -> None:
    """The one mock device on `ioas`, then the IOAS."""
    destroy(iommu, ioas + 1)
    destroy(iommu, ioas)


# -- ids and lifetimes -----------------------------------------------------------------------------------------------


def test_ids_are_selftest_device_hwpt_in_a_row(iommu: File, ioas: int) -> None:
    assert mock_domain(iommu, ioas) == (ioas + 1, ioas + 3, ioas + 2)


def test_second_device_shares_the_automatic_hwpt(iommu: File, ioas: int) -> None:
    first = mock_domain(iommu, ioas)
    second = mock_domain(iommu, ioas)
    assert second == (ioas + 4, first.hwpt, ioas + 5)


def test_device_on_a_hwpt_by_id_joins_it(iommu: File, ioas: int) -> None:
    first = mock_domain(iommu, ioas)
    assert mock_domain(iommu, first.hwpt).hwpt == first.hwpt


@pytest.mark.parametrize("number", [0, 99])
def test_unknown_page_table_is_enoent_and_leaves_no_id(iommu: File, ioas: int, number: int) -> None:
    with fails(errno.ENOENT):
        mock_domain(iommu, number)
    assert ioas_alloc(iommu) == ioas + 1


def test_device_as_a_page_table_is_einval_and_leaves_no_id(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(errno.EINVAL):
        mock_domain(iommu, mock.idev)
    assert ioas_alloc(iommu) == ioas + 4


@pytest.mark.parametrize(
    "flags", [pytest.param(2, marks=pytest.mark.has("mock-generic-pt")), pytest.param(8), pytest.param(1 << 31)]
)
@pytest.mark.since("6.7")
def test_unknown_device_flags_are_einval(iommu: File, ioas: int, flags: int) -> None:
    with fails(errno.EINVAL):
        mock_domain_flags(iommu, ioas, flags)
    assert ioas_alloc(iommu) == ioas + 1


@pytest.mark.parametrize("flags", [0, NO_DIRTY, PASID, NO_DIRTY | PASID])
@pytest.mark.since("6.15")
def test_known_device_flags_are_taken(iommu: File, ioas: int, flags: int) -> None:
    assert mock_domain_flags(iommu, ioas, flags) == (ioas + 1, ioas + 3, ioas + 2)


def test_flags_of_the_plain_operation_are_not_looked_at(iommu: File, ioas: int) -> None:
    reply = run(iommu, abi.IOMMU_TEST_OP_MOCK_DOMAIN, ioas, "mock_domain_flags", dev_flags=0xFF)
    assert reply.mock_domain.out_stdev_id == ioas + 1


def test_device_is_destroyed_through_its_selftest_object_only(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(errno.EBUSY):
        destroy(iommu, mock.idev)
    with fails(errno.EBUSY):
        destroy(iommu, mock.hwpt)
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    destroy(iommu, mock.stdev)
    for number in mock:
        with fails(errno.ENOENT):
            destroy(iommu, number)
    destroy(iommu, ioas)


def test_ids_of_a_destroyed_device_are_used_again(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    destroy(iommu, mock.stdev)
    assert mock_domain(iommu, ioas) == mock


def test_automatic_hwpt_stays_until_its_last_device_goes(iommu: File, ioas: int) -> None:
    first = mock_domain(iommu, ioas)
    second = mock_domain(iommu, ioas)
    destroy(iommu, first.stdev)
    with fails(errno.EBUSY):
        destroy(iommu, second.hwpt)
    destroy(iommu, second.stdev)
    with fails(errno.ENOENT):
        destroy(iommu, second.hwpt)


def test_reply_that_cannot_be_written_undoes_the_device(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), command(abi.IOMMU_TEST_OP_MOCK_DOMAIN, ioas))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))
    assert ioas_alloc(iommu) == ioas + 1
    destroy(iommu, ioas)


def test_close_tears_everything_down_at_once(kernel: Backend) -> None:
    iommu = kernel.open("/dev/iommu")
    with kernel.buffer(PAGE) as buffer:
        ioas = ioas_alloc(iommu)
        mock_domain(iommu, ioas)
        mock_domain(iommu, ioas)
        map_user(iommu, ioas, buffer.address, PAGE, iova=APERTURE[0])
        iommu.close()
        with kernel.open("/dev/iommu") as again:
            run(
                again,
                abi.IOMMU_TEST_OP_MD_CHECK_REFS,
                0,
                "check_refs",
                length=PAGE,
                uptr=buffer.address,
                refs=0,
            )


# -- what the domain restricts ---------------------------------------------------------------------------------------


def test_default_domain_narrows_the_ranges_to_its_aperture(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    assert iova_ranges(iommu, ioas) == [APERTURE]
    assert iova_alignment(iommu, ioas) == SMALL
    destroy(iommu, mock.stdev)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert iova_alignment(iommu, ioas) == 1


def alloc_selftest(iommu: File, dev: int, pt: int, data: bytes, flags: int = 0, length: int | None = None) -> int:
    """HWPT_ALLOC with the mock driver's data; the id."""
    return IOMMU_HWPT_ALLOC(
        iommu,
        dev_id=dev,
        pt_id=pt,
        flags=flags,
        data_type=abi.IOMMU_HWPT_DATA_SELFTEST,
        data_len=len(data) if length is None else length,
        data_uptr=place(data),
    ).out_hwpt_id


def words(*values: int) -> bytes:
    """32-bit words in a row."""
    return b"".join(value.to_bytes(4, "little") for value in values)


@pytest.mark.since("6.19")
def test_huge_domain_has_4_kib_pages_and_a_wide_aperture(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    other = ioas_alloc(iommu)
    alloc_selftest(iommu, mock.idev, other, words(0, abi.MOCK_IOMMUPT_HUGE))
    assert iova_alignment(iommu, other) == PAGE
    assert iova_ranges(iommu, other) == [(0, (1 << 38) - 1)]


@pytest.mark.parametrize("data", [words(0), words(0, 0), words(7, 0)], ids=["short", "zero", "iotlb"])
@pytest.mark.since("6.19")
def test_driver_data_of_the_default_domain(iommu: File, ioas: int, data: bytes) -> None:
    mock = mock_domain(iommu, ioas)
    other = ioas_alloc(iommu)
    alloc_selftest(iommu, mock.idev, other, data)
    assert iova_ranges(iommu, other) == [APERTURE]


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (words(0, 2), errno.EOPNOTSUPP),
        (words(0, 0xFFFF_FFFF), errno.EOPNOTSUPP),
        (b"\0\0\0", errno.EINVAL),
        (words(0, 0) + b"\0", errno.EINVAL),
        (words(0, 0) + b"\1", errno.EINVAL),
    ],
    ids=["type_2", "type_max", "short", "long_zero", "long"],
)
@pytest.mark.since("6.19")
def test_bad_driver_data_is_refused(iommu: File, ioas: int, data: bytes, number: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(number):
        alloc_selftest(iommu, mock.idev, ioas, data)


@pytest.mark.since("6.19")
def test_driver_data_that_cannot_be_read_is_efault(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(errno.EFAULT):
        IOMMU_HWPT_ALLOC(
            iommu, dev_id=mock.idev, pt_id=ioas, data_type=abi.IOMMU_HWPT_DATA_SELFTEST, data_len=8, data_uptr=0
        )


@pytest.mark.since("6.19")
def test_driver_data_of_another_type_is_eopnotsupp(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_ALLOC(iommu, dev_id=mock.idev, pt_id=ioas, data_type=1, data_len=8, data_uptr=place(bytes(8)))


@pytest.mark.parametrize(
    "flags", [IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_PASID]
)
@pytest.mark.since("6.13")
def test_allocation_flags_of_the_driver_are_taken(iommu: File, ioas: int, flags: int) -> None:
    mock = mock_domain(iommu, ioas)
    assert hwpt_alloc(iommu, mock.idev, ioas, flags) == ioas + 4


@pytest.mark.since("6.7")
def test_dirty_tracking_on_a_device_without_is_eopnotsupp(iommu: File, ioas: int) -> None:
    mock = mock_domain_flags(iommu, ioas, NO_DIRTY)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, mock.idev, ioas, IOMMU_HWPT_ALLOC_DIRTY_TRACKING)


@pytest.mark.since("6.7")
def test_device_without_dirty_tracking_cannot_attach_to_a_domain_with_it(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    tracked = hwpt_alloc(iommu, mock.idev, ioas, IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    with fails(errno.EINVAL):
        mock_domain_flags(iommu, tracked, NO_DIRTY)
    plain = mock_domain_flags(iommu, ioas, NO_DIRTY)
    with fails(errno.EINVAL):
        mock_replace(iommu, plain.stdev, tracked)
    assert mock_domain(iommu, tracked).hwpt == tracked


# -- replace ---------------------------------------------------------------------------------------------------------


@pytest.mark.since("6.6")
def test_replace_of_an_unknown_device_is_enoent(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    for number in (0, ioas, mock.idev, mock.hwpt, 99):
        with fails(errno.ENOENT):
            mock_replace(iommu, number, ioas)


@pytest.mark.since("6.6")
@pytest.mark.parametrize("number", [0, 99])
def test_replace_by_an_unknown_page_table_is_enoent(iommu: File, ioas: int, number: int) -> None:
    mock = mock_domain(iommu, ioas)
    with fails(errno.ENOENT):
        mock_replace(iommu, mock.stdev, number)


@pytest.mark.since("6.6")
def test_replace_by_an_object_of_another_kind_is_einval(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    for number in (mock.stdev, mock.idev):
        with fails(errno.EINVAL):
            mock_replace(iommu, mock.stdev, number)


@pytest.mark.since("6.6")
def test_replace_by_the_same_changes_nothing(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    assert mock_replace(iommu, mock.stdev, ioas) == mock.hwpt
    assert mock_replace(iommu, mock.stdev, mock.hwpt) == mock.hwpt


@pytest.mark.since("6.6")
def test_replace_rotates_and_the_automatic_hwpt_goes(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    made = [hwpt_alloc(iommu, mock.idev, ioas) for _ in range(2)]
    assert made == [ioas + 4, ioas + 5]
    assert mock_replace(iommu, mock.stdev, made[0]) == made[0]
    with fails(errno.ENOENT):
        destroy(iommu, mock.hwpt)
    with fails(errno.EBUSY):
        destroy(iommu, made[0])
    assert mock_replace(iommu, mock.stdev, made[1]) == made[1]
    destroy(iommu, made[0])
    assert mock_replace(iommu, mock.stdev, ioas) == mock.hwpt
    destroy(iommu, made[1])


@pytest.mark.since("6.6")
def test_replace_by_another_ioas_frees_the_old_one(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    other = ioas_alloc(iommu)
    assert mock_replace(iommu, mock.stdev, other) == other + 1
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert iova_ranges(iommu, other) == [APERTURE]
    destroy(iommu, ioas)
    with fails(errno.EBUSY):
        destroy(iommu, other)


@pytest.mark.since("6.6")
def test_reply_of_a_replace_that_cannot_be_written_keeps_the_effect(iommu: File, ioas: int) -> None:
    mock = mock_domain(iommu, ioas)
    other = ioas_alloc(iommu)
    with arena(1) as memory:
        op = abi.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE
        Arena.write(memory.page(0), command(op, mock.stdev, "mock_domain_replace", pt_id=other))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))
    destroy(iommu, ioas)
    assert iova_ranges(iommu, other) == [APERTURE]


# -- what the driver says of the device ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, NO_DIRTY, PASID, NO_DIRTY | PASID])
@pytest.mark.since("7.2")
def test_hw_info_of_a_mock_device(iommu: File, ioas: int, flags: int) -> None:
    mock = mock_domain_flags(iommu, ioas, flags)
    with arena(1) as memory:
        reply = IOMMU_GET_HW_INFO(iommu, dev_id=mock.idev, data_len=8, data_uptr=memory.page(0))
        assert memory.read(memory.page(0), 8) == words(0, abi.IOMMU_HW_INFO_SELFTEST_REGVAL)
    assert (reply.data_len, reply.out_data_type) == (8, abi.IOMMU_HW_INFO_TYPE_SELFTEST)
    dirty = 0 if flags & NO_DIRTY else IOMMU_HW_CAP_DIRTY_TRACKING
    assert reply.out_capabilities == dirty | IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    assert reply.out_max_pasid_log2 == (abi.MOCK_PASID_WIDTH if flags & PASID else 0)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [(0, 0), (abi.IOMMU_HW_INFO_TYPE_SELFTEST, 0), (1, errno.EOPNOTSUPP), (0xFEED_BEEE, errno.EOPNOTSUPP)],
)
@pytest.mark.since("6.17")
def test_hw_info_has_one_type(iommu: File, ioas: int, wanted: int, number: int) -> None:
    mock = mock_domain(iommu, ioas)
    flags = IOMMU_HW_INFO_FLAG_INPUT_TYPE
    if number:
        with fails(number):
            IOMMU_GET_HW_INFO(iommu, flags=flags, dev_id=mock.idev, in_data_type=wanted)
    else:
        reply = IOMMU_GET_HW_INFO(iommu, flags=flags, dev_id=mock.idev, in_data_type=wanted)
        assert reply.out_data_type == abi.IOMMU_HW_INFO_TYPE_SELFTEST
