"""dma-bufs in an IOAS: the mock driver makes them, IOMMU_IOAS_MAP_FILE maps them, their exporter revokes them.

Mirrors the dma-buf half of pages.c and iommufd_test_dmabuf_*() of selftest.c in drivers/iommu/iommufd. Nobody but a
device can reach the memory of such a buffer, so the tests of what is mapped copy with `edu`.

A 7.3 as released returns 0 instead of the descriptor: `needs("dmabuf_fd")`.
One long file: everything shares the fixtures below, and most tests are of a few lines.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
from collections.abc import Callable, Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.mock import (
    APERTURE,
    SMALL,
    access_pages,
    access_rw,
    check_map,
    create_access,
    dmabuf_get,
    dmabuf_revoke,
    mock_domain,
)
from conformance.steps import (
    FIXED,
    PAGE,
    READ,
    RW,
    U64_MAX,
    WRITE,
    MiB,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_file,
    map_user,
    memfd,
    option_set,
    unmap,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_IOAS_CHANGE_PROCESS,
    IOMMU_IOAS_MAP_FILE,
    IOMMU_IOAS_NOIOMMU_GET_PA,
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_VFIO_IOAS,
    IOMMU_VFIO_IOAS_SET,
)
from uapi.vfio import VFIO_IOMMU_UNMAP_DMA, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("7.2")]

START = APERTURE[0]
SIZE = 4 * PAGE
PATTERN = bytes(range(256)) * (PAGE // 256)
CAP_IPC_LOCK = 14
#: DMA_HEAP_IOCTL_ALLOC and its struct, linux/dma-heap.h.
HEAP_ALLOC, HEAP_BLOCK = 0xC0184800, struct.Struct("<QIIQ")

with_fd = pytest.mark.needs("dmabuf_fd")
Make = Callable[[int], int]


@pytest.fixture
def make(iommu: File) -> Iterator[Make]:
    """Make a dma-buf of so many bytes."""
    made: list[int] = []

    def get(length: int) -> int:
        made.append(dmabuf_get(iommu, length))
        return made[-1]

    yield get
    for fd in made:
        os.close(fd)


@pytest.fixture
def dmabuf(make: Make) -> int:
    return make(SIZE)


# -- DMABUF_GET, DMABUF_REVOKE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 2 * MiB + 1, 2 * MiB + PAGE, 0xFFFF_F001, 0xFFFF_FFFF])
def test_length_of_nothing_or_beyond_2_mib_is_einval(iommu: File, length: int) -> None:
    with fails(errno.EINVAL):
        dmabuf_get(iommu, length)


@with_fd
@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 2 * MiB - 1, 2 * MiB])
def test_length_is_rounded_up_to_pages(iommu: File, ioas: int, make: Make, length: int) -> None:
    fd = make(length)
    pages = (length + PAGE - 1) // PAGE * PAGE
    with fails(errno.EINVAL):
        map_file(iommu, ioas, fd, 0, pages + 1)
    map_file(iommu, ioas, fd, 0, pages)
    assert unmap_all(iommu, ioas) == pages


@with_fd
@pytest.mark.parametrize(("flags", "cloexec"), [(0, False), (os.O_CLOEXEC, True), (os.O_RDWR | os.O_CLOEXEC, True)])
def test_open_flags_say_whether_execve_closes_it(iommu: File, flags: int, cloexec: bool) -> None:
    fd = dmabuf_get(iommu, PAGE, flags)
    try:
        assert os.get_inheritable(fd) is not cloexec
    finally:
        os.close(fd)


@pytest.mark.parametrize("fd", [-1, 1 << 20])
def test_revoke_of_no_descriptor_is_ebadf(iommu: File, fd: int) -> None:
    with fails(errno.EBADF):
        dmabuf_revoke(iommu, fd)


def test_revoke_of_another_file_is_einval(iommu: File) -> None:
    with memfd(PAGE) as fd, fails(errno.EINVAL):
        dmabuf_revoke(iommu, fd)
    with fails(errno.EINVAL):
        dmabuf_revoke(iommu, iommu.fileno())


@with_fd
def test_revoke_of_a_closed_dma_buf_is_ebadf(iommu: File, ioas: int) -> None:
    fd = dmabuf_get(iommu, PAGE)
    os.close(fd)
    with fails(errno.EBADF):
        dmabuf_revoke(iommu, fd)
    with fails(errno.EBADF):
        map_file(iommu, ioas, fd, 0, PAGE)


@with_fd
def test_revoke_through_another_context(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    with kernel.open("/dev/iommu") as other:
        dmabuf_revoke(other, dmabuf)
    with fails(errno.ENODEV):
        map_file(iommu, ioas, dmabuf, 0, PAGE)


@with_fd
def test_revoking_twice_and_giving_back_twice(iommu: File, ioas: int, dmabuf: int) -> None:
    for revoked in (1, 1, 0x100, 0, 0):
        dmabuf_revoke(iommu, dmabuf, revoked)
    map_file(iommu, ioas, dmabuf, 0, SIZE)


# -- MAP_FILE --------------------------------------------------------------------------------------------------------


@with_fd
@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": RW | 8}, errno.EOPNOTSUPP),
        ({"iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": 0}, errno.EINVAL),
        ({"ioas_id": 99}, errno.ENOENT),
        ({"length": 0}, errno.EINVAL),
        ({"start": U64_MAX, "length": 2}, errno.EOVERFLOW),
        ({"length": SIZE + 1}, errno.EINVAL),
        ({"start": SIZE, "length": 1}, errno.EINVAL),
        ({"start": SIZE - 1, "length": 2}, errno.EINVAL),
        ({"length": 1 << 44}, errno.EINVAL),
        ({"flags": FIXED | RW, "iova": U64_MAX - 1, "length": 3}, errno.EOVERFLOW),
    ],
)
def test_check(iommu: File, ioas: int, dmabuf: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_MAP_FILE(iommu, **{"flags": RW, "ioas_id": ioas, "fd": dmabuf, "length": PAGE, **fields})
    assert unmap_all(iommu, ioas) == 0


@with_fd
def test_order_of_checks_of_a_revoked_buffer(iommu: File, ioas: int, dmabuf: int) -> None:
    dmabuf_revoke(iommu, dmabuf)
    with fails(errno.EINVAL):
        map_file(iommu, ioas, dmabuf, 0, SIZE + 1)
    with fails(errno.EINVAL):
        map_file(iommu, ioas, dmabuf, 0, 0)
    mock_domain(iommu, ioas)
    with fails(errno.ENODEV):  # before the alignment
        map_file(iommu, ioas, dmabuf, 0, 1)
    with fails(errno.ENODEV):  # and before what is at the IOVA
        map_file(iommu, ioas, dmabuf, 0, PAGE, iova=0)


@with_fd
def test_all_of_it_up_to_the_last_byte(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, SIZE - 1, 1)
    map_file(iommu, ioas, dmabuf, 1, SIZE - 1)
    assert unmap_all(iommu, ioas) == SIZE


@with_fd
@pytest.mark.parametrize("domain", [False, True])
@pytest.mark.parametrize("start", [0, PAGE, 2 * PAGE, 3 * PAGE, SMALL, PAGE + SMALL])
def test_automatic_iova_follows_the_start(iommu: File, ioas: int, dmabuf: int, start: int, domain: bool) -> None:
    if domain:
        mock_domain(iommu, ioas)
    iova = map_file(iommu, ioas, dmabuf, start, SIZE - start)
    assert iova % PAGE == start % PAGE
    assert unmap(iommu, ioas, iova, SIZE - start) == SIZE - start


@with_fd
def test_misaligned_for_the_domain_is_einval(iommu: File, ioas: int, dmabuf: int) -> None:
    mock_domain(iommu, ioas)
    for start, length in ((0, 1), (0, PAGE + 1), (1, SMALL)):
        with fails(errno.EINVAL):
            map_file(iommu, ioas, dmabuf, start, length, iova=START)
    map_file(iommu, ioas, dmabuf, SMALL, SMALL, iova=START)


@with_fd
def test_misaligned_area_keeps_a_domain_away(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE - 1, iova=START)
    with fails(errno.EADDRINUSE):
        mock_domain(iommu, ioas)


@with_fd
def test_mapping_outlives_the_descriptor(iommu: File, ioas: int) -> None:
    fd = dmabuf_get(iommu, SIZE)
    map_file(iommu, ioas, fd, 0, SIZE, iova=START)
    os.close(fd)
    mock_domain(iommu, ioas)
    mock_domain(iommu, ioas)
    assert unmap(iommu, ioas, START, SIZE) == SIZE


@with_fd
def test_no_page_of_it_is_anybodys_memory(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    hwpt = mock_domain(iommu, ioas).hwpt
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    buffer = kernel.buffer(PAGE)
    buffer.view[0] = 1
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, START, PAGE, buffer.address)


@with_fd
def test_nothing_is_charged(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    mock_domain(iommu, ioas)
    before = kernel.status("VmPin")
    map_file(iommu, ioas, dmabuf, 0, SIZE)
    assert kernel.status("VmPin") == before


@with_fd
def test_client_that_may_lock_nothing_maps_one(kernel: Backend, iommu: File, ioas: int) -> None:
    mock_domain(iommu, ioas)
    with kernel.spawn() as client:
        client.setrlimit(resource.RLIMIT_MEMLOCK, 0, 0)
        client.drop_capabilities(CAP_IPC_LOCK)
        theirs = client.receive(iommu)
        fd = dmabuf_get(theirs, SIZE)
        IOMMU_IOAS_MAP_FILE(theirs, flags=RW, ioas_id=ioas, fd=fd, length=SIZE)


@with_fd
@pytest.mark.parametrize("large", [0, 1])
def test_with_and_without_large_pages(iommu: File, ioas: int, make: Make, large: int) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, large, ioas)
    mock_domain(iommu, ioas)
    fd = make(2 * MiB)
    iova = map_file(iommu, ioas, fd, 0, 2 * MiB)
    assert unmap(iommu, ioas, iova, 2 * MiB) == 2 * MiB


@with_fd
def test_failing_map_lets_go_of_it(iommu: File, ioas: int, dmabuf: int) -> None:
    map_user(iommu, ioas, 1 << 20, PAGE, iova=START)
    with fails(errno.EEXIST):
        map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    dmabuf_revoke(iommu, dmabuf)
    dmabuf_revoke(iommu, dmabuf, 0)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START + PAGE)


@pytest.mark.linux_only("a host has no other dma-bufs to give to the model")
@pytest.mark.needs("root")
def test_dma_buf_of_another_exporter_is_eopnotsupp(iommu: File, ioas: int) -> None:
    try:
        heap = os.open("/dev/dma_heap/system", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pytest.skip("no system DMA heap")
    block = bytearray(HEAP_BLOCK.pack(SIZE, 0, os.O_RDWR | os.O_CLOEXEC, 0))
    fcntl.ioctl(heap, HEAP_ALLOC, block)
    os.close(heap)
    fd = HEAP_BLOCK.unpack(block)[1]
    try:
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, 0, SIZE + 1)
        with fails(errno.EOPNOTSUPP):
            map_file(iommu, ioas, fd, 0, SIZE)
        with fails(errno.EOPNOTSUPP):
            dmabuf_revoke(iommu, fd)
    finally:
        os.close(fd)


# -- what cannot be done with one ------------------------------------------------------------------------------------


@with_fd
def test_access_neither_pins_nor_copies(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    buffer = kernel.buffer(PAGE)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    pinning, copying = create_access(iommu, ioas), create_access(iommu, ioas, pin=False)
    for flags in (0, 1):
        with fails(errno.EINVAL):
            access_pages(iommu, pinning, START, PAGE, 0, flags)
        with fails(errno.EINVAL):
            access_rw(iommu, copying, START, PAGE, buffer.address, flags)
        with fails(errno.EINVAL):
            access_rw(iommu, copying, START, PAGE, buffer.address, flags | 4)
    assert unmap(iommu, ioas, START, SIZE) == SIZE
    os.close(pinning)
    os.close(copying)


@with_fd
def test_permission_comes_before_the_kind_of_memory(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    buffer = kernel.buffer(PAGE)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START, prot=READ)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=2 * START, prot=WRITE)
    pinning, copying = create_access(iommu, ioas), create_access(iommu, ioas, pin=False)
    for iova, flags in ((START, 1), (2 * START, 0)):
        with fails(errno.EPERM):
            access_pages(iommu, pinning, iova, PAGE, 0, flags)
        with fails(errno.EPERM):
            access_rw(iommu, copying, iova, PAGE, buffer.address, flags)
    os.close(pinning)
    os.close(copying)


@with_fd
def test_copy_from_memory_into_a_dma_buf_stops_there(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    """A copy over a border writes what lies before it."""
    buffer = kernel.buffer(2 * PAGE)
    buffer.view[:PAGE] = PATTERN
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START + PAGE)
    access = create_access(iommu, ioas, pin=False)
    buffer.view[PAGE:] = bytes(reversed(PATTERN))
    with fails(errno.EINVAL):
        access_rw(iommu, access, START + PAGE - 16, 32, buffer.address + PAGE, abi.MOCK_ACCESS_RW_WRITE)
    assert bytes(buffer.view[PAGE - 16 : PAGE]) == bytes(reversed(PATTERN))[:16]
    os.close(access)


@with_fd
def test_change_process_is_einval(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE)
    with fails(errno.EINVAL):
        IOMMU_IOAS_CHANGE_PROCESS(iommu)


@with_fd
def test_it_is_not_cut(iommu: File, ioas: int, dmabuf: int) -> None:
    """Type 1 of VFIO cuts mappings at both ends of what is unmapped, but not these."""
    IOMMU_VFIO_IOAS(iommu, op=IOMMU_VFIO_IOAS_SET, ioas_id=ioas)
    VFIO_SET_IOMMU.raw(iommu, VFIO_TYPE1_IOMMU)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    for iova, size in ((START, PAGE), (START + PAGE, PAGE), (START + 1, 2)):
        with fails(errno.EOPNOTSUPP):
            VFIO_IOMMU_UNMAP_DMA(iommu, iova=iova, size=size)
    assert VFIO_IOMMU_UNMAP_DMA(iommu, iova=START, size=SIZE).size == SIZE


# -- copies ----------------------------------------------------------------------------------------------------------


@with_fd
def test_copy_of_a_part(iommu: File, ioas: int, dmabuf: int) -> None:
    other = ioas_alloc(iommu)
    mock_domain(iommu, other)
    map_file(iommu, ioas, dmabuf, PAGE, 2 * PAGE, iova=START)
    assert copy(iommu, other, ioas, START + PAGE, PAGE) == START
    assert copy(iommu, other, ioas, START + SMALL, SMALL) == START + PAGE + SMALL
    assert unmap_all(iommu, other) == PAGE + SMALL
    assert unmap_all(iommu, ioas) == 2 * PAGE


@with_fd
def test_copy_asks_for_what_the_first_map_had(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, 0, PAGE, iova=START, prot=READ)
    with fails(errno.EPERM):
        copy(iommu, ioas, ioas, START, PAGE)
    copy(iommu, ioas, ioas, START, PAGE, prot=READ)


@with_fd
def test_copy_of_a_revoked_mapping(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    mock_domain(iommu, ioas)
    dmabuf_revoke(iommu, dmabuf)
    copied = copy(iommu, ioas, ioas, START, SIZE)
    mock_domain(iommu, ioas)
    assert unmap(iommu, ioas, copied, SIZE) == SIZE
    assert unmap(iommu, ioas, START, SIZE) == SIZE


# -- revoked ---------------------------------------------------------------------------------------------------------


@with_fd
def test_revoked_buffer_is_enodev_until_it_is_given_back(iommu: File, ioas: int, dmabuf: int) -> None:
    dmabuf_revoke(iommu, dmabuf)
    with fails(errno.ENODEV):
        map_file(iommu, ioas, dmabuf, 0, SIZE)
    dmabuf_revoke(iommu, dmabuf, 0)
    map_file(iommu, ioas, dmabuf, 0, SIZE)


@with_fd
@pytest.mark.parametrize("domains", [0, 1, 2])
def test_revoked_mapping_keeps_its_iova(iommu: File, ioas: int, dmabuf: int, domains: int) -> None:
    for _ in range(domains):
        mock_domain(iommu, ioas)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    dmabuf_revoke(iommu, dmabuf)
    dmabuf_revoke(iommu, dmabuf, 0)
    with fails(errno.EEXIST):
        map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    assert unmap(iommu, ioas, START, SIZE) == SIZE
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    assert unmap(iommu, ioas, START, SIZE) == SIZE


@with_fd
def test_domains_come_and_go_over_a_revoked_mapping(iommu: File, ioas: int, dmabuf: int) -> None:
    first = mock_domain(iommu, ioas)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    dmabuf_revoke(iommu, dmabuf)
    extra = hwpt_alloc(iommu, first.idev, ioas)
    destroy(iommu, first.stdev)
    again = mock_domain(iommu, ioas)
    destroy(iommu, extra)
    destroy(iommu, again.stdev)
    assert unmap(iommu, ioas, START, SIZE) == SIZE


@with_fd
def test_domain_goes_before_the_revocation(iommu: File, ioas: int, dmabuf: int) -> None:
    device = mock_domain(iommu, ioas)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    destroy(iommu, device.stdev)
    dmabuf_revoke(iommu, dmabuf)
    mock_domain(iommu, ioas)
    assert unmap(iommu, ioas, START, SIZE) == SIZE


@with_fd
def test_context_closes_over_a_revoked_mapping(kernel: Backend, iommu: File, dmabuf: int) -> None:
    with kernel.open("/dev/iommu") as other:
        ioas = ioas_alloc(other)
        mock_domain(other, ioas)
        map_file(other, ioas, dmabuf, 0, SIZE)
        dmabuf_revoke(other, dmabuf)
    with kernel.open("/dev/iommu") as other:
        dmabuf_revoke(other, dmabuf, 0)
        map_file(other, ioas_alloc(other), dmabuf, 0, SIZE)


@with_fd
def test_mappings_of_two_contexts_are_revoked_together(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    with kernel.open("/dev/iommu") as other:
        theirs = ioas_alloc(other)
        mock_domain(other, theirs)
        mock_domain(iommu, ioas)
        map_file(other, theirs, dmabuf, 0, SIZE, iova=START)
        map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
        dmabuf_revoke(iommu, dmabuf)
        assert unmap(other, theirs, START, SIZE) == SIZE
        assert unmap(iommu, ioas, START, SIZE) == SIZE


@with_fd
def test_revoked_mapping_is_still_einval_to_an_access(kernel: Backend, iommu: File, ioas: int, dmabuf: int) -> None:
    buffer = kernel.buffer(PAGE)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    dmabuf_revoke(iommu, dmabuf)
    access = create_access(iommu, ioas, pin=False)
    with fails(errno.EINVAL):
        access_rw(iommu, access, START, PAGE, buffer.address)
    os.close(access)


@with_fd
@pytest.mark.since("7.3")
def test_physical_address_of_a_revoked_mapping_is_einval(iommu: File, ioas: int, dmabuf: int) -> None:
    """It is asked before whether the mapping is for a device without an IOMMU."""
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=START)
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=START, length=PAGE)
    dmabuf_revoke(iommu, dmabuf)
    with fails(errno.EINVAL):
        IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=START, length=PAGE)


@with_fd
def test_ranges_do_not_change(iommu: File, ioas: int, dmabuf: int) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE)
    before = iova_ranges(iommu, ioas)
    dmabuf_revoke(iommu, dmabuf)
    assert iova_ranges(iommu, ioas) == before


# -- seen from a device ----------------------------------------------------------------------------------------------

seen_by_a_device = pytest.mark.needs("root", "vfio_cdev", "dma_device", "dmabuf_fd")
IOVA, BACK = 0x10_0000, 0x20_0000


@pytest.fixture
def memory(kernel: Backend, iommu: File, ioas: int) -> Iterator[memoryview]:
    """A page of client memory at BACK, to carry bytes to the dma-buf and from there."""
    buffer = kernel.buffer(PAGE)
    buffer.view[:] = PATTERN
    map_user(iommu, ioas, buffer.address, PAGE, iova=BACK)
    yield buffer.view
    unmap(iommu, ioas, BACK, PAGE)
    buffer.close()


def holds(edu: Edu, memory: memoryview, iova: int) -> bytes:
    """What a device reads at `iova`: zeros where it is refused."""
    memory[:] = b"\x5a" * PAGE
    edu.memcpy(BACK, iova, PAGE)
    return bytes(memory)


@seen_by_a_device
def test_device_writes_and_reads_it(edu: Edu, iommu: File, ioas: int, dmabuf: int, memory: memoryview) -> None:
    map_file(iommu, ioas, dmabuf, PAGE, 2 * PAGE, iova=IOVA)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=2 * BACK)
    edu.memcpy(IOVA + PAGE, BACK, PAGE)
    assert holds(edu, memory, 2 * BACK + 2 * PAGE) == PATTERN
    assert holds(edu, memory, 2 * BACK + PAGE) == bytes(PAGE)


@seen_by_a_device
def test_revoked_mapping_is_refused_and_stays_so(
    edu: Edu, iommu: File, ioas: int, dmabuf: int, memory: memoryview
) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=IOVA)
    edu.memcpy(IOVA, BACK, PAGE)
    dmabuf_revoke(iommu, dmabuf)
    assert holds(edu, memory, IOVA) == bytes(PAGE)
    dmabuf_revoke(iommu, dmabuf, 0)
    assert holds(edu, memory, IOVA) == bytes(PAGE)
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=2 * BACK)
    assert holds(edu, memory, 2 * BACK) == PATTERN


@seen_by_a_device
def test_giving_back_what_was_not_revoked_cuts_its_mappings(
    edu: Edu, iommu: File, ioas: int, dmabuf: int, memory: memoryview
) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=IOVA)
    edu.memcpy(IOVA, BACK, PAGE)
    dmabuf_revoke(iommu, dmabuf, 0)
    assert holds(edu, memory, IOVA) == bytes(PAGE)


@seen_by_a_device
def test_copies_are_revoked_with_it(edu: Edu, iommu: File, ioas: int, dmabuf: int, memory: memoryview) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=IOVA)
    edu.memcpy(IOVA, BACK, PAGE)
    copied = copy(iommu, ioas, ioas, IOVA, PAGE)
    assert holds(edu, memory, copied) == PATTERN
    unmap(iommu, ioas, IOVA, SIZE)
    dmabuf_revoke(iommu, dmabuf)
    assert holds(edu, memory, copied) == bytes(PAGE)


@seen_by_a_device
def test_read_only_mapping(edu: Edu, iommu: File, ioas: int, dmabuf: int, memory: memoryview) -> None:
    map_file(iommu, ioas, dmabuf, 0, SIZE, iova=IOVA, prot=READ)
    edu.memcpy(IOVA, BACK, PAGE)
    assert holds(edu, memory, IOVA) == bytes(PAGE)
