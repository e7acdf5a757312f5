"""IOMMU_HW_QUEUE_ALLOC on the mock driver: the queue's memory is pinned, locked, contiguous; queues depend on others.

Mirrors iommufd_hw_queue_alloc_ioctl() and iommufd_hw_queue_alloc_phys() of drivers/iommu/iommufd/viommu.c,
_iommufd_object_depend() of driver.c, and mock_hw_queue_init_phys() of selftest.c.
"""

from __future__ import annotations

import errno
import os

import pytest

from conformance.arena import Arena, arena
from conformance.mock import APERTURE, SMALL, check_refs, create_access, dmabuf_get
from conformance.mock_guest import HW_QUEUE_TYPE, Guest, guest, hw_queue_alloc, viommu_alloc
from conformance.steps import (
    PAGE,
    READ,
    U64_MAX,
    WRITE,
    answer,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_alignment,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HW_QUEUE_ALLOC,
    IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_VFIO_IOAS,
    IOMMU_VFIO_IOAS_SET,
)
from uapi.vfio import VFIO_DMA_UNMAP_FLAG_ALL, VFIO_IOMMU_UNMAP_DMA

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.17")]

IOVA = APERTURE[0]


@pytest.fixture
def ids(iommu: File) -> Guest:
    return guest(iommu)


@pytest.fixture
def buffer(kernel: Backend, iommu: File, ids: Guest) -> Buffer:
    """Two pages of memory, the first of which is mapped at IOVA and the second behind it, in mappings of their own."""
    found = kernel.buffer(2 * PAGE)
    for index in range(2):
        map_user(iommu, ids.ioas, found.address + index * PAGE, PAGE, IOVA + index * PAGE)
    return found


# -- checks ----------------------------------------------------------------------------------------------------------


def test_order_of_the_checks(iommu: File, ids: Guest, buffer: Buffer) -> None:
    good = {"type": HW_QUEUE_TYPE, "viommu_id": ids.viommu, "nesting_parent_iova": IOVA, "length": PAGE}
    for change, number in (
        ({"flags": 1, "length": 0}, errno.EOPNOTSUPP),
        ({"type": 0, "length": 0}, errno.EOPNOTSUPP),
        ({"length": 0, "nesting_parent_iova": U64_MAX, "viommu_id": 99}, errno.EINVAL),
        ({"length": 2, "nesting_parent_iova": U64_MAX, "viommu_id": 99}, errno.EOVERFLOW),
        ({"length": U64_MAX, "viommu_id": 99}, errno.EOVERFLOW),
        ({"viommu_id": 99, "type": 0xDEAD}, errno.ENOENT),
        ({"viommu_id": ids.parent}, errno.ENOENT),
        ({"type": IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV, "nesting_parent_iova": 0}, errno.EOPNOTSUPP),
        ({"type": 0xDEAD, "nesting_parent_iova": 0}, errno.EOPNOTSUPP),
        ({"nesting_parent_iova": 0, "index": 9}, errno.ENOENT),
        ({"index": 2}, errno.EINVAL),
        ({"index": 0xFFFF_FFFF}, errno.EINVAL),
        ({"index": 1}, errno.EIO),
    ):
        assert answer(IOMMU_HW_QUEUE_ALLOC, iommu, **(good | change)) == number, change
    assert ioas_alloc(iommu) == ids.viommu + 1
    unmap_all(iommu, ids.ioas)  # no failure has left a pin


@pytest.mark.parametrize(
    ("iova", "length", "number"),
    [
        pytest.param(1, U64_MAX, errno.ERANGE, id="offset and length overflow"),
        pytest.param(PAGE - 1, U64_MAX - PAGE, errno.ERANGE, id="they do in whole pages"),
        pytest.param(0, U64_MAX - PAGE + 2, errno.ERANGE, id="rounding up overflows"),
        pytest.param(1, U64_MAX - PAGE + 2, errno.ERANGE, id="rounding up overflows by the offset"),
        pytest.param(0, U64_MAX - PAGE + 1, errno.ENOMEM, id="rounding up just fits"),
        pytest.param(0, 1 << 50, errno.ENOMEM, id="2^38 pages"),
    ],
)
def test_absurd_lengths(iommu: File, ids: Guest, iova: int, length: int, number: int) -> None:
    with fails(number):
        hw_queue_alloc(iommu, ids.viommu, 0, iova, length)
    assert ioas_alloc(iommu) == ids.viommu + 1


def test_queue_takes_a_hidden_id_for_its_access(iommu: File, ids: Guest, buffer: Buffer) -> None:
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    assert queue == ids.viommu + 1
    with fails(errno.EBUSY):
        destroy(iommu, queue + 1)
    assert ioas_alloc(iommu) == queue + 2
    destroy(iommu, queue)
    with fails(errno.ENOENT):
        destroy(iommu, queue + 1)
    assert [ioas_alloc(iommu) for _ in range(2)] == [queue, queue + 1]


def test_reply_that_cannot_be_written_leaves_no_queue(iommu: File, ids: Guest, buffer: Buffer) -> None:
    with arena(1) as memory:
        arg = IOMMU_HW_QUEUE_ALLOC.make(type=HW_QUEUE_TYPE, viommu_id=ids.viommu, nesting_parent_iova=IOVA, length=PAGE)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HW_QUEUE_ALLOC.number, memory.page(0))
    unmap(iommu, ids.ioas, IOVA, PAGE)
    assert ioas_alloc(iommu) == ids.viommu + 1
    destroy(iommu, ids.viommu)


def test_queue_holds_the_viommu_and_the_ioas(iommu: File, ids: Guest, buffer: Buffer) -> None:
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    for number in (ids.viommu, ids.ioas):
        with fails(errno.EBUSY):
            destroy(iommu, number)
    destroy(iommu, queue)
    destroy(iommu, ids.viommu)


def test_close_with_two_queues(kernel: Backend, iommu: File, ids: Guest, buffer: Buffer) -> None:
    for index in range(2):
        hw_queue_alloc(iommu, ids.viommu, index, IOVA + index * PAGE, PAGE)
    iommu.close()
    with kernel.open("/dev/iommu") as again:
        check_refs(again, buffer.address, 2 * PAGE, 0)
        assert guest(again) == ids


# -- indexes ---------------------------------------------------------------------------------------------------------


def test_queues_are_made_in_order_and_destroyed_in_reverse(iommu: File, ids: Guest, buffer: Buffer) -> None:
    with fails(errno.EIO):
        hw_queue_alloc(iommu, ids.viommu, 1, IOVA, PAGE)
    first = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    with fails(errno.EEXIST):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE, PAGE)
    second = hw_queue_alloc(iommu, ids.viommu, 1, IOVA + PAGE, PAGE)
    assert (first, second) == (ids.viommu + 1, ids.viommu + 3)
    with fails(errno.EEXIST):
        hw_queue_alloc(iommu, ids.viommu, 1, IOVA, PAGE)
    with fails(errno.EBUSY):
        destroy(iommu, first)
    destroy(iommu, second)
    destroy(iommu, first)
    hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)


def test_mock_forgets_queue_0_whatever_queue_goes(iommu: File, ids: Guest, buffer: Buffer) -> None:
    """So index 1 is had once in the life of a vIOMMU, and index 0 a second time while the first queue is there."""
    first = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    destroy(iommu, hw_queue_alloc(iommu, ids.viommu, 1, IOVA + PAGE, PAGE))
    again = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    with fails(errno.EEXIST):
        hw_queue_alloc(iommu, ids.viommu, 1, IOVA, PAGE)
    destroy(iommu, first)
    destroy(iommu, again)
    with fails(errno.EEXIST):
        hw_queue_alloc(iommu, ids.viommu, 1, IOVA, PAGE)


def test_index_is_of_the_viommu(iommu: File, ids: Guest, buffer: Buffer) -> None:
    hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    with fails(errno.EIO):
        hw_queue_alloc(iommu, other, 1, IOVA, PAGE)
    hw_queue_alloc(iommu, other, 0, IOVA, PAGE)


# -- the memory ------------------------------------------------------------------------------------------------------


def test_queues_memory_cannot_be_unmapped(iommu: File, ids: Guest, buffer: Buffer) -> None:
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, PAGE)
    with fails(errno.EBUSY):
        unmap_all(iommu, ids.ioas)
    assert unmap(iommu, ids.ioas, IOVA + PAGE, PAGE) == PAGE
    destroy(iommu, queue)
    assert unmap(iommu, ids.ioas, IOVA, PAGE) == PAGE


def test_vfios_unmap_stops_at_the_queues_memory_too(iommu: File, ids: Guest, buffer: Buffer) -> None:
    """And says how much it has unmapped before, which the native call does not."""
    IOMMU_VFIO_IOAS(iommu, ioas_id=ids.ioas, op=IOMMU_VFIO_IOAS_SET)
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE, PAGE)
    arg = VFIO_IOMMU_UNMAP_DMA.make(argsz=24, iova=IOVA, size=2 * PAGE)
    with fails(errno.EBUSY):
        VFIO_IOMMU_UNMAP_DMA.raw(iommu, arg)
    assert arg.size == PAGE
    every = VFIO_IOMMU_UNMAP_DMA.make(argsz=24, flags=VFIO_DMA_UNMAP_FLAG_ALL)
    with fails(errno.EBUSY):
        VFIO_IOMMU_UNMAP_DMA.raw(iommu, every)
    assert every.size == 0
    destroy(iommu, queue)
    assert VFIO_IOMMU_UNMAP_DMA(iommu, argsz=24, iova=IOVA + PAGE, size=PAGE).size == PAGE


def test_mappings_below_the_queues_go_before_ebusy(iommu: File, ids: Guest, buffer: Buffer) -> None:
    hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE, PAGE)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, 2 * PAGE)
    with fails(errno.ENOENT):
        unmap(iommu, ids.ioas, IOVA, PAGE)


def test_each_queue_locks_for_itself(iommu: File, ids: Guest, buffer: Buffer) -> None:
    first = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    second = hw_queue_alloc(iommu, ids.viommu, 1, IOVA + PAGE // 2, PAGE // 2)
    destroy(iommu, second)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, PAGE)
    destroy(iommu, first)
    unmap(iommu, ids.ioas, IOVA, PAGE)


def test_pages_are_pinned_once_with_the_domains(iommu: File, ids: Guest, buffer: Buffer) -> None:
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    destroy(iommu, queue)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)


@pytest.mark.needs("huge_pages")
def test_queue_may_span_mappings_whose_pages_are_contiguous(kernel: Backend, iommu: File, ids: Guest) -> None:
    with kernel.buffer(2 << 20, huge=True) as huge:
        huge.view[0] = 1
        map_user(iommu, ids.ioas, huge.address, 4 * PAGE, IOVA)
        map_user(iommu, ids.ioas, huge.address + 4 * PAGE, 4 * PAGE, IOVA + 4 * PAGE)
        queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE + 8, 5 * PAGE)
        for index in range(2):
            with fails(errno.EBUSY):
                unmap(iommu, ids.ioas, IOVA + index * 4 * PAGE, 4 * PAGE)
        destroy(iommu, queue)
        with fails(errno.ENOENT):  # the last byte is one too far
            hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE, 7 * PAGE + 1)
        destroy_guest(iommu, ids)


def destroy_guest(iommu: File, ids: Guest) -> None:
    for number in (ids.viommu, ids.parent, ids.stdev, ids.ioas):
        destroy(iommu, number)


def test_pages_that_are_not_contiguous_are_efault(kernel: Backend, iommu: File, ids: Guest, buffer: Buffer) -> None:
    """Wherever two pages are, one of the two does not follow the other."""
    for index in range(3):
        map_user(iommu, ids.ioas, buffer.address + index % 2 * PAGE, PAGE, IOVA + (4 + index) * PAGE)
    with fails(errno.EFAULT):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA + 4 * PAGE, 3 * PAGE)
    assert unmap(iommu, ids.ioas, IOVA + 4 * PAGE, 3 * PAGE) == 3 * PAGE


def test_same_page_twice_is_efault(iommu: File, ids: Guest, buffer: Buffer) -> None:
    map_user(iommu, ids.ioas, buffer.address, PAGE, IOVA - PAGE + 8 * PAGE)
    map_user(iommu, ids.ioas, buffer.address, PAGE, IOVA + 8 * PAGE)
    with fails(errno.EFAULT):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA + 7 * PAGE, 2 * PAGE)


def test_hole_in_the_queues_memory_is_enoent(iommu: File, ids: Guest, buffer: Buffer) -> None:
    with fails(errno.ENOENT):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA + PAGE, PAGE + 1)
    with fails(errno.ENOENT):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA - PAGE, 2 * PAGE)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    assert unmap_all(iommu, ids.ioas) == 2 * PAGE


def test_memory_for_reading_will_do_and_for_writing_will_not(kernel: Backend, iommu: File, ids: Guest) -> None:
    with kernel.buffer(PAGE) as memory:
        map_user(iommu, ids.ioas, memory.address, PAGE, IOVA, prot=READ)
        map_user(iommu, ids.ioas, memory.address, PAGE, IOVA + 4 * PAGE, prot=WRITE)
        queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
        with fails(errno.EPERM):
            hw_queue_alloc(iommu, ids.viommu, 1, IOVA + 4 * PAGE, PAGE)
        destroy(iommu, queue)
        destroy_guest(iommu, ids)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (2048, 2048), (2048, 1), (1, 4095), (4095, 1), (8, 64)])
def test_queue_may_lie_anywhere_in_its_pages(iommu: File, ids: Guest, buffer: Buffer, offset: int, length: int) -> None:
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA + offset, length)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, PAGE)
    assert unmap(iommu, ids.ioas, IOVA + PAGE, PAGE) == PAGE
    destroy(iommu, queue)


def test_mapping_off_the_page_is_eaddrinuse(kernel: Backend, iommu: File, ids: Guest) -> None:
    """The hidden access needs whole pages, in all of the IOAS, wherever the queue is."""
    with kernel.buffer(2 * PAGE) as memory:
        map_user(iommu, ids.ioas, memory.address, PAGE, IOVA)
        map_user(iommu, ids.ioas, memory.address, SMALL, IOVA + 8 * PAGE)
        with fails(errno.EADDRINUSE):
            hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
        assert ioas_alloc(iommu) == ids.viommu + 1
        unmap(iommu, ids.ioas, IOVA + 8 * PAGE, SMALL)
        queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
        with fails(errno.EINVAL):
            map_user(iommu, ids.ioas, memory.address, SMALL, IOVA + 8 * PAGE)
        assert iova_alignment(iommu, ids.ioas) == PAGE
        destroy(iommu, queue)
        assert iova_alignment(iommu, ids.ioas) == SMALL
        map_user(iommu, ids.ioas, memory.address, SMALL, IOVA + 8 * PAGE)
        destroy_guest(iommu, ids)


def test_memory_of_a_file_will_do(iommu: File, ids: Guest) -> None:
    with memfd(2 * PAGE) as fd:
        map_file(iommu, ids.ioas, fd, 0, PAGE, IOVA)
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, PAGE)
    destroy(iommu, queue)


@pytest.mark.needs("dmabuf_fd")
def test_memory_of_a_dma_buf_is_einval(iommu: File, ids: Guest) -> None:
    fd = dmabuf_get(iommu, PAGE)
    try:
        map_file(iommu, ids.ioas, fd, 0, PAGE, IOVA)
    finally:
        os.close(fd)
    with fails(errno.EINVAL):
        hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    assert unmap(iommu, ids.ioas, IOVA, PAGE) == PAGE


def test_copy_of_the_queues_memory_is_free(iommu: File, ids: Guest, buffer: Buffer) -> None:
    """The lock is on the mapping, not on the pages."""
    hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    other = ioas_alloc(iommu)
    copy(iommu, other, ids.ioas, IOVA, PAGE, dst_iova=IOVA)
    assert unmap(iommu, other, IOVA, PAGE) == PAGE


def test_accesses_and_queues_live_side_by_side(kernel: Backend, iommu: File, ids: Guest, buffer: Buffer) -> None:
    """EBUSY comes before an access is asked to let go."""
    access = kernel.adopt(create_access(iommu, ids.ioas))
    queue = hw_queue_alloc(iommu, ids.viommu, 0, IOVA, PAGE)
    with fails(errno.EBUSY):
        unmap(iommu, ids.ioas, IOVA, PAGE)
    destroy(iommu, queue)
    assert unmap(iommu, ids.ioas, IOVA, PAGE) == PAGE
    access.close()


def test_memory_is_of_the_parents_ioas(kernel: Backend, iommu: File, ids: Guest, buffer: Buffer) -> None:
    other = ioas_alloc(iommu)
    parent = hwpt_alloc(iommu, ids.idev, other, IOMMU_HWPT_ALLOC_NEST_PARENT)
    viommu = viommu_alloc(iommu, ids.idev, parent)
    with fails(errno.ENOENT):
        hw_queue_alloc(iommu, viommu, 0, IOVA, PAGE)
    map_user(iommu, other, buffer.address, PAGE, IOVA)
    hw_queue_alloc(iommu, viommu, 0, IOVA, PAGE)
    assert unmap(iommu, ids.ioas, IOVA, PAGE) == PAGE
