"""What only older kernels do: the old side of rows of uapi/behaviours.py.

The new side is tested where the thing is; a test here runs on releases that lack the row that it names.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.mock import check_map, mock_domain, mock_domain_flags
from conformance.mock_dirty import get_dirty, leaf_sizes, make_dirty, tracked_hwpt
from conformance.steps import (
    NOWHERE,
    PAGE,
    U64_MAX,
    WRITE,
    MiB,
    destroy,
    fails,
    hwpt_alloc,
    iova_ranges,
    map_user,
    option_set,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_GET_HW_INFO,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_OPTION_HUGE_PAGES,
)
from uapi.iommufd_test import iommu_hwpt_selftest

START = abi.MOCK_APERTURE_START
SMALL = abi.MOCK_PAGE_SIZE
HUGE_IOVA = abi.MOCK_FLAGS_DEVICE_HUGE_IOVA

mock = pytest.mark.needs("mock")
device = pytest.mark.needs("iommu", "root", "vfio_cdev")


@pytest.mark.lacks("mmap-of-iommufd")
@pytest.mark.parametrize("flags", [MAP_SHARED, MAP_PRIVATE])
@pytest.mark.parametrize("prot", [PROT_READ, PROT_READ | PROT_EXEC])
def test_mmap_of_iommufd_is_enodev(iommu: File, prot: int, flags: int) -> None:
    with fails(errno.ENODEV):
        iommu.mmap(PAGE, 0, prot, flags).close()


@pytest.mark.lacks("wrap-before-length")
@pytest.mark.parametrize("address", [0, PAGE, NOWHERE, U64_MAX])
def test_map_of_nearly_everything_is_einval(iommu: File, ioas: int, address: int) -> None:
    for length in (U64_MAX - PAGE + 1, U64_MAX - 1):
        with fails(errno.EINVAL):
            map_user(iommu, ioas, address, length)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.since("6.11")
@pytest.mark.lacks("fault-queue-on-paging-hwpt")
@device
def test_fault_queue_on_a_paging_hwpt_is_eopnotsupp(
    kernel: Backend, device: VfioDevice, iommu: File, ioas: int
) -> None:
    """Before the queue is looked up."""
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    for fault_id in (queue.out_fault_id, 0, 99):
        with fails(errno.EOPNOTSUPP):
            IOMMU_HWPT_ALLOC(iommu, flags=IOMMU_HWPT_FAULT_ID_VALID, dev_id=device.devid, pt_id=ioas, fault_id=fault_id)
    kernel.adopt(queue.out_fault_fd).close()
    destroy(iommu, queue.out_fault_id)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


@pytest.mark.since("6.8")
@pytest.mark.lacks("invalidate-any-object")
@device
def test_invalidate_of_a_paging_hwpt_is_enoent(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    for object_id in (hwpt, ioas, device.devid, 99):
        with fails(errno.ENOENT):
            IOMMU_HWPT_INVALIDATE(iommu, hwpt_id=object_id)


@pytest.mark.lacks("vtd-write-only")
@pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device")
def test_write_only_mapping_lets_the_device_read(kernel: Backend, edu: Edu, iommu: File, ioas: int) -> None:
    with kernel.buffer(2 * PAGE) as pages:
        pages.view[:PAGE] = bytes(range(256)) * (PAGE // 256)
        for index in (0, 1):
            map_user(iommu, ioas, pages.address + index * PAGE, PAGE, MiB + index * PAGE, prot=WRITE)
        edu.memcpy(MiB + PAGE, MiB, PAGE)
        assert bytes(pages.view[PAGE:]) == bytes(pages.view[:PAGE])
        unmap_all(iommu, ioas)


# -- the mock driver ------------------------------------------------------------------------------------------------


@pytest.fixture
def pages(kernel: Backend) -> Iterator[Buffer]:
    """A huge page: two runs of 1 MiB, wherever it is."""
    with kernel.buffer(2 * MiB, huge=True) as memory:
        memory.view[:] = bytes(2 * MiB)
        yield memory


@mock
@pytest.mark.lacks("mock-check-map-looks-first")
@pytest.mark.parametrize("arguments", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1024, SMALL, PAGE)])
def test_check_off_the_page_is_einval_before_the_hwpt_is_looked_up(
    iommu: File, ioas: int, arguments: tuple[int, int, int]
) -> None:
    for hwpt in (0, ioas, 99):
        with fails(errno.EINVAL):
            check_map(iommu, hwpt, *arguments)
        with fails(errno.ENOENT):
            check_map(iommu, hwpt, 0, SMALL, PAGE)


@mock
@pytest.mark.since("6.7")
@pytest.mark.lacks("mock-generic-pt")
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_paging_mock_hwpt_takes_no_data(iommu: File, ioas: int, kind: int) -> None:
    idev = mock_domain(iommu, ioas).idev
    data = iommu_hwpt_selftest(pagetable_type=kind)
    fields = {"data_type": abi.IOMMU_HWPT_DATA_SELFTEST, "data_uptr": ctypes.addressof(data)}
    for length in (4, 8):
        with fails(errno.EOPNOTSUPP):
            hwpt_alloc(iommu, idev, ioas, data_len=length, **fields)


@mock
@pytest.mark.since("6.6")
@pytest.mark.lacks("mock-generic-pt")
@pytest.mark.parametrize("length", [0, 4, 8, 12])
def test_hw_info_of_a_mock_device_is_its_register(kernel: Backend, iommu: File, ioas: int, length: int) -> None:
    idev = mock_domain(iommu, ioas).idev
    with kernel.buffer(PAGE) as memory:
        memory.view[:16] = b"\xff" * 16
        reply = IOMMU_GET_HW_INFO(iommu, dev_id=idev, data_len=length, data_uptr=memory.address if length else 0)
        assert (reply.out_data_type, reply.data_len) == (abi.IOMMU_HW_INFO_TYPE_SELFTEST, 8)
        full = bytes(4) + abi.IOMMU_HW_INFO_SELFTEST_REGVAL.to_bytes(4, "little") + bytes(4)
        assert bytes(memory.view[:16]) == full[:length] + b"\xff" * (16 - length)


@mock
@pytest.mark.needs("huge_pages")
@pytest.mark.since("6.8")
@pytest.mark.lacks("mock-generic-pt")
@pytest.mark.parametrize(
    ("flags", "large", "sizes"),
    [
        pytest.param(0, True, [SMALL] * 8, id="small"),
        pytest.param(HUGE_IOVA, True, [MiB, MiB], id="huge"),
        pytest.param(HUGE_IOVA, False, [SMALL] * 8, id="huge_without_huge_pages"),
    ],
)
def test_leaves_are_of_2_KiB_or_with_the_flag_of_1_MiB(
    iommu: File, ioas: int, pages: Buffer, flags: int, large: bool, sizes: list[int]
) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, int(large), ioas)
    made = mock_domain_flags(iommu, ioas, flags)
    hwpt = tracked_hwpt(iommu, made.idev, ioas)
    map_user(iommu, ioas, pages.address, 2 * MiB, iova=START)
    check_map(iommu, hwpt, START, 2 * MiB, pages.address)
    assert leaf_sizes(iommu, hwpt, START, sum(sizes)) == sizes


@mock
@pytest.mark.needs("huge_pages")
@pytest.mark.since("6.8")
@pytest.mark.lacks("mock-generic-pt")
def test_dirty_bit_over_a_hole_counts_for_nothing(iommu: File, ioas: int, pages: Buffer) -> None:
    hwpt = tracked_hwpt(iommu, mock_domain(iommu, ioas).idev, ioas)
    map_user(iommu, ioas, pages.address, PAGE, iova=START)
    assert make_dirty(iommu, hwpt, START, 0b1111, 4, page=SMALL) == 2
    assert get_dirty(iommu, hwpt, START, PAGE, page=SMALL) == 0b11


@mock
@pytest.mark.needs("huge_pages")
@pytest.mark.since("6.8")
@pytest.mark.lacks("mock-generic-pt")
def test_dirty_counts_in_pages_of_2_KiB_whatever_the_page_size(iommu: File, ioas: int, pages: Buffer) -> None:
    """The nth page of 4 KiB is taken for the nth of 2 KiB, so that START's is at half of it."""
    hwpt = tracked_hwpt(iommu, mock_domain(iommu, ioas).idev, ioas)
    map_user(iommu, ioas, pages.address, 2 * PAGE, iova=START)
    assert make_dirty(iommu, hwpt, START, 1, 1, page=PAGE) == 0
    assert make_dirty(iommu, hwpt, 2 * START, 0b101, 3, page=PAGE) == 2
    assert get_dirty(iommu, hwpt, START, 2 * PAGE, page=SMALL) == 0b101
