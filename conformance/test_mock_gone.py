"""Memory of two processes: what fork() shares, and what stays of a process that has gone.

A page that is pinned outlives its process: a domain keeps it, an access keeps it, and who asks later gets it from them.
A page that nobody has pinned went with the process: EFAULT. Mirrors pfn_reader and iopt_pages_rw_access() of
drivers/iommu/iommufd/pages.c.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterator

import pytest

from conformance.mock import (
    APERTURE,
    access_pages,
    access_rw,
    check_map,
    check_refs,
    create_access,
    destroy_pages,
    mock_domain,
)
from conformance.steps import (
    PAGE,
    READ,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    map_file,
    map_user,
    memfd,
    option_set,
    unmap,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, Buffer, Client, File
from uapi.iommufd import IOMMU_IOAS_CHANGE_PROCESS, IOMMU_OPTION_RLIMIT_MODE

pytestmark = pytest.mark.needs("iommu", "mock")

START = APERTURE[0]
PAGES = 4
CAP_IPC_LOCK = 14
SIZE = PAGES * PAGE
RW_WRITE, SLOW = abi.MOCK_ACCESS_RW_WRITE, abi.MOCK_ACCESS_RW_SLOW_PATH
DATA = bytes(number % 251 for number in range(SIZE))


@pytest.fixture
def client(kernel: Backend) -> Iterator[Client]:
    with kernel.spawn() as client:
        yield client


@pytest.fixture
def buffer(kernel: Backend) -> Buffer:
    return kernel.buffer(SIZE)


@pytest.fixture
def access(iommu: File, ioas: int) -> Iterator[int]:
    fd = create_access(iommu, ioas, pin=False)
    yield fd
    os.close(fd)


@pytest.fixture
def pinning(iommu: File, ioas: int) -> Iterator[int]:
    fd = create_access(iommu, ioas)
    yield fd
    os.close(fd)


def map_of_client(iommu: File, ioas: int, client: Client) -> None:
    """The client maps its own DATA at START."""
    address = client.allocate(SIZE)
    client.poke(address, DATA)
    map_user(client.receive(iommu), ioas, address, SIZE, iova=START)


def contents(iommu: File, access: int, buffer: Buffer, first: int = 0, last: int = SIZE - 1, flags: int = 0) -> bytes:
    length = last - first + 1
    access_rw(iommu, access, START + first, length, buffer.address, flags)
    return bytes(buffer.view[:length])


# -- a process that has gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, SLOW], ids=["plain", "slow"])
def test_pages_in_a_domain_stay(
    iommu: File, ioas: int, client: Client, access: int, buffer: Buffer, flags: int
) -> None:
    mock_domain(iommu, ioas)
    map_of_client(iommu, ioas, client)
    client.exit()
    assert contents(iommu, access, buffer, flags=flags) == DATA
    for first, last in ((3, 11), (PAGE - 3, PAGE + 5), (0, 0), (SIZE - 1, SIZE - 1)):
        assert contents(iommu, access, buffer, first, last, flags) == DATA[first : last + 1]


def test_pages_in_a_domain_can_still_be_written(
    iommu: File, ioas: int, client: Client, access: int, buffer: Buffer
) -> None:
    mock_domain(iommu, ioas)
    map_of_client(iommu, ioas, client)
    client.exit()
    buffer.view[:16] = b"written when dead"[:16]
    access_rw(iommu, access, START + PAGE - 8, 16, buffer.address, RW_WRITE)
    assert contents(iommu, access, buffer, PAGE - 8, PAGE + 7) == b"written when dead"[:16]
    assert contents(iommu, access, buffer, 0, PAGE - 9) == DATA[: PAGE - 8]


def test_second_domain_takes_them_from_the_first(
    iommu: File, ioas: int, client: Client, access: int, buffer: Buffer
) -> None:
    first = mock_domain(iommu, ioas)
    map_of_client(iommu, ioas, client)
    client.exit()
    second = mock_domain(iommu, ioas)
    destroy(iommu, first.stdev)
    assert contents(iommu, access, buffer) == DATA
    destroy(iommu, second.stdev)
    with fails(errno.EFAULT):
        contents(iommu, access, buffer)
    with fails(errno.EFAULT):
        mock_domain(iommu, ioas)
    assert unmap_all(iommu, ioas) == SIZE


@pytest.mark.since("6.6")
def test_new_hwpt_takes_them_from_the_first(
    iommu: File, ioas: int, client: Client, access: int, buffer: Buffer
) -> None:
    device = mock_domain(iommu, ioas)
    map_of_client(iommu, ioas, client)
    client.exit()
    hwpt_alloc(iommu, device.idev, ioas)
    destroy(iommu, device.stdev)
    assert contents(iommu, access, buffer) == DATA


def test_copy_takes_them_from_the_source(iommu: File, ioas: int, client: Client, buffer: Buffer) -> None:
    other = ioas_alloc(iommu)
    mock_domain(iommu, ioas)
    mock_domain(iommu, other)
    map_of_client(iommu, ioas, client)
    client.exit()
    copy(iommu, other, ioas, START + PAGE, 2 * PAGE, dst_iova=START)
    assert unmap_all(iommu, ioas) == SIZE
    access = create_access(iommu, other, pin=False)
    assert contents(iommu, access, buffer, 0, 2 * PAGE - 1) == DATA[PAGE : 3 * PAGE]
    os.close(access)


def test_copy_of_what_is_not_pinned_is_efault(iommu: File, ioas: int, client: Client) -> None:
    other = ioas_alloc(iommu)
    mock_domain(iommu, other)
    map_of_client(iommu, ioas, client)
    client.exit()
    with fails(errno.EFAULT):
        copy(iommu, other, ioas, START, SIZE, dst_iova=START)
    assert unmap_all(iommu, other) == 0


@pytest.mark.parametrize("flags", [0, SLOW], ids=["plain", "slow"])
def test_pages_that_an_access_pinned_stay(
    iommu: File, ioas: int, client: Client, access: int, pinning: int, buffer: Buffer, flags: int
) -> None:
    map_of_client(iommu, ioas, client)
    item = access_pages(iommu, pinning, START + PAGE, 2 * PAGE, 0)
    client.exit()
    assert contents(iommu, access, buffer, PAGE, 3 * PAGE - 1, flags) == DATA[PAGE : 3 * PAGE]
    for first, last in ((0, 0), (PAGE - 1, PAGE), (3 * PAGE - 1, 3 * PAGE), (0, SIZE - 1)):
        with fails(errno.EFAULT):
            contents(iommu, access, buffer, first, last, flags)
    assert access_pages(iommu, pinning, START + 2 * PAGE, PAGE, 0) == item + 1
    with fails(errno.EFAULT):
        access_pages(iommu, pinning, START, 2 * PAGE, 0)
    destroy_pages(iommu, pinning, item)
    assert contents(iommu, access, buffer, 2 * PAGE, 3 * PAGE - 1, flags) == DATA[2 * PAGE : 3 * PAGE]
    with fails(errno.EFAULT):
        contents(iommu, access, buffer, PAGE, PAGE)


def test_write_into_pages_of_which_some_are_gone_writes_nothing(
    iommu: File, ioas: int, client: Client, access: int, pinning: int, buffer: Buffer
) -> None:
    map_of_client(iommu, ioas, client)
    access_pages(iommu, pinning, START, PAGE, 0)
    client.exit()
    buffer.view[:] = bytes(SIZE)
    with fails(errno.EFAULT):
        access_rw(iommu, access, START, 2 * PAGE, buffer.address, RW_WRITE)
    assert contents(iommu, access, buffer, 0, PAGE - 1) == DATA[:PAGE]


def test_domain_needs_all_the_pages(iommu: File, ioas: int, client: Client, pinning: int) -> None:
    map_of_client(iommu, ioas, client)
    access_pages(iommu, pinning, START, PAGE, 0)
    client.exit()
    with fails(errno.EFAULT):
        mock_domain(iommu, ioas)


def test_domain_takes_what_an_access_pinned(
    iommu: File, ioas: int, client: Client, access: int, pinning: int, buffer: Buffer
) -> None:
    map_of_client(iommu, ioas, client)
    item = access_pages(iommu, pinning, START, SIZE, 0)
    client.exit()
    mock_domain(iommu, ioas)
    destroy_pages(iommu, pinning, item)
    assert contents(iommu, access, buffer) == DATA


def test_context_closes_with_pages_of_a_dead_process(kernel: Backend, client: Client) -> None:
    with kernel.open("/dev/iommu") as other:
        ioas = ioas_alloc(other)
        mock_domain(other, ioas)
        map_of_client(other, ioas, client)
        client.exit()


def test_two_dead_processes(kernel: Backend, iommu: File, ioas: int, access: int, buffer: Buffer) -> None:
    mock_domain(iommu, ioas)
    for number in range(2):
        with kernel.spawn() as client:
            address = client.allocate(PAGE)
            client.poke(address, bytes([number + 1]) * PAGE)
            map_user(client.receive(iommu), ioas, address, PAGE, iova=START + number * PAGE)
    assert contents(iommu, access, buffer, PAGE - 1, PAGE) == b"\1\2"


@pytest.mark.since("6.13")
@pytest.mark.parametrize("domain", [False, True])
def test_file_does_not_need_its_process(
    iommu: File, ioas: int, client: Client, access: int, buffer: Buffer, domain: bool
) -> None:
    """Pages of a file are found by the file. The account of the process that has gone still pays."""
    if domain:
        mock_domain(iommu, ioas)
    with memfd(SIZE + PAGE) as fd:
        os.pwrite(fd, DATA, 0)
        remote = client.receive(iommu)
        keep = client.receive(Passed(fd))
        map_file(remote, ioas, keep.fileno(), 0, SIZE, iova=START)
        client.exit()
        mock_domain(iommu, ioas)
        assert contents(iommu, access, buffer) == DATA


class Passed:
    """A descriptor that `Client.receive` passes on."""

    path = "memfd"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


# -- fork ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain_first", [False, True])
def test_pinned_pages_stay_the_parents(kernel: Backend, iommu: File, ioas: int, domain_first: bool) -> None:
    """fork() shares pages until one side writes; a pinned page is the parent's, before and after."""
    buffer = kernel.buffer(SIZE)
    buffer.view[:] = DATA
    hwpt = mock_domain(iommu, ioas).hwpt if domain_first else 0
    map_user(iommu, ioas, buffer.address, SIZE, iova=START)
    with kernel.spawn() as child:
        hwpt = hwpt or mock_domain(iommu, ioas).hwpt
        buffer.view[:4] = b"mine"
        check_map(iommu, hwpt, START, SIZE, buffer.address)
        remote = child.receive(iommu)
        with fails(errno.EINVAL):
            check_map(remote, hwpt, START, PAGE, buffer.address)
        assert child.peek(buffer.address, 4) == DATA[:4]
        child.poke(buffer.address, b"kid!")
        assert bytes(buffer.view[:4]) == b"mine"
    check_map(iommu, hwpt, START, SIZE, buffer.address)


def test_readable_map_unshares_too(kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(PAGE)
    buffer.view[:4] = b"both"
    with kernel.spawn() as child:
        map_user(iommu, ioas, buffer.address, PAGE, iova=START, prot=READ)
        hwpt = mock_domain(iommu, ioas).hwpt
        check_map(iommu, hwpt, START, PAGE, buffer.address)
        with fails(errno.EINVAL):
            check_map(child.receive(iommu), hwpt, START, PAGE, buffer.address)


def test_shared_memory_is_one_page_in_both(kernel: Backend, iommu: File, ioas: int) -> None:
    with mmap.mmap(-1, PAGE) as shared:
        shared[:5] = b"first"
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        with kernel.spawn() as child:
            remote = child.receive(iommu)
            map_user(remote, ioas, address, PAGE, iova=START)
            hwpt = mock_domain(iommu, ioas).hwpt
            check_map(iommu, hwpt, START, PAGE, address)
            check_map(remote, hwpt, START, PAGE, address)
            check_refs(iommu, address, PAGE, 1)
        check_map(iommu, hwpt, START, PAGE, address)
        del address


def test_shared_memory_of_a_dead_process_goes_on(
    kernel: Backend, iommu: File, ioas: int, access: int, buffer: Buffer
) -> None:
    with mmap.mmap(-1, PAGE) as shared:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        mock_domain(iommu, ioas)
        with kernel.spawn() as child:
            map_user(child.receive(iommu), ioas, address, PAGE, iova=START)
        shared[:5] = b"later"
        assert contents(iommu, access, buffer, 0, 4) == b"later"
        buffer.view[:5] = b"still"
        access_rw(iommu, access, START, 5, buffer.address, RW_WRITE)
        assert shared[:5] == b"still"


@pytest.mark.needs("root")
def test_pages_are_unpinned_from_a_dead_account(kernel: Backend, iommu: File, ioas: int, client: Client) -> None:
    """The user's locked pages go down although the process that was charged has gone."""
    address = client.allocate(SIZE)
    client.setrlimit(resource.RLIMIT_MEMLOCK, SIZE, SIZE)
    client.setuid(54322)
    mock_domain(iommu, ioas)
    map_user(client.receive(iommu), ioas, address, SIZE, iova=START)
    client.exit()
    for expected in (errno.ENOMEM, 0):
        with kernel.spawn() as second:
            other = second.allocate(SIZE)
            second.setrlimit(resource.RLIMIT_MEMLOCK, SIZE, SIZE)
            second.setuid(54322)
            remote = second.receive(iommu)
            if expected:
                with fails(expected):
                    map_user(remote, ioas, other, PAGE, iova=2 * START)
                assert unmap(iommu, ioas, START, SIZE) == SIZE
            else:
                map_user(remote, ioas, other, SIZE, iova=2 * START)


@pytest.fixture
def heir(kernel: Backend) -> Iterator[Client]:
    with kernel.spawn() as client:
        client.drop_capabilities(CAP_IPC_LOCK)
        yield client


def map_file_of_the_dead(iommu: File, client: Client) -> None:
    """A client that has to pay maps SIZE bytes of a memfd into a domain, and is no more."""
    ioas = ioas_alloc(iommu)
    mock_domain(iommu, ioas)
    client.drop_capabilities(CAP_IPC_LOCK)
    with memfd(SIZE + PAGE) as fd:
        kept = client.receive(Passed(fd))
        map_file(client.receive(iommu), ioas, kept.fileno(), 0, SIZE, iova=START)
    assert client.status("VmPin") == SIZE // 1024
    client.exit()


@pytest.mark.since("6.14")
@pytest.mark.needs("root")
def test_change_process_takes_over_from_the_dead(iommu: File, client: Client, heir: Client) -> None:
    map_file_of_the_dead(iommu, client)
    IOMMU_IOAS_CHANGE_PROCESS(heir.receive(iommu))
    assert heir.status("VmPin") == SIZE // 1024
    assert heir.status("VmLck") == 0


@pytest.mark.since("6.14")
@pytest.mark.model_only("7.3.4 prints a WARNING at ioas.c:618")
def test_change_process_from_the_dead_in_mode_mm_is_einval_and_done(iommu: File, client: Client, heir: Client) -> None:
    """The account of the dead is not to be had, which is noticed after the heir has been charged."""
    option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, 1)
    map_file_of_the_dead(iommu, client)
    with fails(errno.EINVAL):
        IOMMU_IOAS_CHANGE_PROCESS(heir.receive(iommu))
    assert heir.status("VmPin") == heir.status("VmLck") == SIZE // 1024
