"""IOMMU_IOAS_MAP_FILE into a domain: which files can be pinned, which pages come, and who sees what is written there.

Mirrors pin_memfd_pages() of drivers/iommu/iommufd/pages.c and memfd_pin_folios() of mm/gup.c: files of shmem and
hugetlbfs, up to their size, however the descriptor was opened. The checks before a pin are in test_ioas_map_file.py.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.mock import APERTURE, SMALL, access_pages, access_rw, check_map, check_refs, create_access, mock_domain
from conformance.steps import (
    PAGE,
    READ,
    WRITE,
    MiB,
    copy,
    fails,
    hwpt_alloc,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, File

pytestmark = [pytest.mark.needs("iommu", "mock", "memfd"), pytest.mark.since("6.13")]

START = APERTURE[0]
SIZE = 4 * PAGE
DATA = bytes(number % 253 for number in range(SIZE))
RW_WRITE = abi.MOCK_ACCESS_RW_WRITE


class Seen:
    """A shared mapping of a file, with its address."""

    def __init__(self, fd: int, length: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self.map = mmap.mmap(fd, length, prot=prot)
        self._view = memoryview(self.map)
        if prot & mmap.PROT_WRITE:
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


@pytest.fixture
def hwpt(iommu: File, ioas: int) -> int:
    return mock_domain(iommu, ioas).hwpt


@pytest.fixture
def fd() -> Iterator[int]:
    """A memfd of SIZE bytes and a page, which holds DATA."""
    with memfd(SIZE + PAGE) as number:
        os.pwrite(number, DATA, 0)
        yield number


@pytest.fixture
def access(iommu: File, ioas: int) -> Iterator[int]:
    number = create_access(iommu, ioas, pin=False)
    yield number
    os.close(number)


def contents(kernel: Backend, iommu: File, access: int, iova: int, length: int) -> bytes:
    buffer = kernel.buffer(length)
    access_rw(iommu, access, iova, length, buffer.address)
    data = bytes(buffer.view[:length])
    buffer.close()
    return data


# -- which pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "length"), [(0, SIZE), (PAGE, 2 * PAGE), (SMALL, SMALL), (SMALL, 2 * PAGE), (3 * PAGE, PAGE)]
)
def test_domain_holds_the_pages_of_the_file(
    iommu: File, ioas: int, hwpt: int, fd: int, start: int, length: int
) -> None:
    seen = Seen(fd, SIZE)
    assert seen.map[:8] == DATA[:8]
    iova = map_file(iommu, ioas, fd, start, length)
    assert iova % PAGE == start % PAGE
    check_map(iommu, hwpt, iova, length, seen.address + start)
    first, last = start // PAGE, (start + length - 1) // PAGE
    for page in range(SIZE // PAGE):
        check_refs(iommu, seen.address + page * PAGE, PAGE, int(first <= page <= last))
    unmap(iommu, ioas, iova, length)
    check_refs(iommu, seen.address, SIZE, 0)


def test_pages_of_a_hole_are_pages_of_the_file(iommu: File, ioas: int, hwpt: int) -> None:
    with memfd(SIZE + PAGE) as fd:
        seen = Seen(fd, SIZE)
        map_file(iommu, ioas, fd, 0, SIZE, iova=START)
        check_map(iommu, hwpt, START, SIZE, seen.address)


def test_file_and_its_mapping_are_the_same_pages(iommu: File, ioas: int, hwpt: int, fd: int) -> None:
    seen = Seen(fd, SIZE)
    map_user(iommu, ioas, seen.address, SIZE, iova=START)
    map_file(iommu, ioas, fd, 0, SIZE, iova=2 * START)
    check_map(iommu, hwpt, START, SIZE, seen.address)
    check_map(iommu, hwpt, 2 * START, SIZE, seen.address)
    check_refs(iommu, seen.address, SIZE, 2)
    copy(iommu, ioas, ioas, 2 * START, SIZE)
    check_refs(iommu, seen.address, SIZE, 2)


def test_what_is_written_on_one_side_is_read_on_the_other(
    kernel: Backend, iommu: File, ioas: int, hwpt: int, fd: int, access: int
) -> None:
    map_file(iommu, ioas, fd, 0, SIZE, iova=START)
    os.pwrite(fd, b"by write(2)", PAGE - 5)
    assert contents(kernel, iommu, access, START + PAGE - 5, 11) == b"by write(2)"
    buffer = kernel.buffer(PAGE)
    buffer.view[:9] = b"by access"
    access_rw(iommu, access, START + 2 * PAGE - 4, 9, buffer.address, RW_WRITE)
    assert os.pread(fd, 9, 2 * PAGE - 4) == b"by access"


def test_access_reads_a_file_without_a_domain(kernel: Backend, iommu: File, ioas: int, fd: int, access: int) -> None:
    map_file(iommu, ioas, fd, PAGE, 2 * PAGE, iova=7)
    assert contents(kernel, iommu, access, 7 + PAGE - 3, 6) == DATA[2 * PAGE - 3 : 2 * PAGE + 3]
    with fails(errno.EPERM):
        map_file(iommu, ioas, fd, 0, PAGE, iova=4 * PAGE, prot=WRITE)
        contents(kernel, iommu, access, 4 * PAGE, 1)


def test_mapping_outlives_descriptor_and_name(kernel: Backend, iommu: File, ioas: int, hwpt: int, access: int) -> None:
    with memfd(SIZE + PAGE) as fd:
        os.pwrite(fd, DATA, 0)
        map_file(iommu, ioas, fd, 0, SIZE, iova=START)
    assert contents(kernel, iommu, access, START, SIZE) == DATA


# -- which files -----------------------------------------------------------------------------------------------------


def refused(iommu: File, ioas: int, fd: int, length: int = PAGE) -> None:
    """EINVAL, and nothing is mapped."""
    with fails(errno.EINVAL):
        map_file(iommu, ioas, fd, 0, length)
    assert unmap_all(iommu, ioas) == 0


def test_files_of_other_file_systems_are_einval(iommu: File, ioas: int, hwpt: int) -> None:
    with open("/proc/self/status", "rb") as status, open("/dev/zero", "r+b", buffering=0) as zero:
        refused(iommu, ioas, status.fileno())
        refused(iommu, ioas, zero.fileno())
    refused(iommu, ioas, iommu.fileno())
    made = create_access(iommu, ioas)
    refused(iommu, ioas, made)
    os.close(made)
    reader, writer = os.pipe()
    left, right = socket.socketpair()
    refused(iommu, ioas, reader)
    refused(iommu, ioas, left.fileno())
    os.close(reader)
    os.close(writer)
    left.close()
    right.close()
    directory = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    refused(iommu, ioas, directory)
    os.close(directory)


def test_file_of_a_tmpfs_is_as_good_as_a_memfd(kernel: Backend, iommu: File, ioas: int, hwpt: int, access: int) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    path = Path(f"/dev/shm/iommulab-{os.getpid()}")
    path.write_bytes(DATA + bytes(PAGE))
    try:
        fd = os.open(path, os.O_RDWR)
        path.unlink()
        map_file(iommu, ioas, fd, 0, SIZE, iova=START)
        os.close(fd)
        assert contents(kernel, iommu, access, START, SIZE) == DATA
    finally:
        path.unlink(missing_ok=True)


def test_read_only_descriptor_can_be_mapped_for_writing(
    kernel: Backend, iommu: File, ioas: int, hwpt: int, fd: int, access: int
) -> None:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    map_file(iommu, ioas, reader, 0, SIZE, iova=START)
    os.close(reader)
    buffer = kernel.buffer(PAGE)
    buffer.view[:2] = b"ok"
    access_rw(iommu, access, START, 2, buffer.address, RW_WRITE)
    assert os.pread(fd, 2, 0) == b"ok"


def test_path_descriptor_is_ebadf(iommu: File, ioas: int, fd: int) -> None:
    path = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    with fails(errno.EBADF):
        map_file(iommu, ioas, path, 0, PAGE)
    os.close(path)


@pytest.mark.parametrize(
    "seals", [fcntl.F_SEAL_WRITE, 0x10, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL]
)
def test_seals_do_not_matter(kernel: Backend, iommu: File, ioas: int, hwpt: int, access: int, seals: int) -> None:
    """0x10 is F_SEAL_FUTURE_WRITE."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE + PAGE)
    os.pwrite(fd, DATA, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    map_file(iommu, ioas, fd, 0, SIZE, iova=START)
    os.close(fd)
    assert contents(kernel, iommu, access, START, SIZE) == DATA
    assert unmap_all(iommu, ioas) == SIZE


@pytest.mark.needs("huge_pages")
@pytest.mark.needs("hugetlb_memfd")
@pytest.mark.parametrize(("start", "length"), [(0, 2 * MiB), (PAGE, PAGE), (2 * MiB - PAGE, 2 * PAGE), (0, 4 * MiB)])
def test_hugetlb_memfd(iommu: File, ioas: int, hwpt: int, start: int, length: int) -> None:
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 6 * MiB)
        seen = Seen(fd, 6 * MiB)
        seen.map[0] = 1
        iova = map_file(iommu, ioas, fd, start, length)
        check_map(iommu, hwpt, iova, length, seen.address + start)
        assert unmap(iommu, ioas, iova, length) == length
    finally:
        os.close(fd)


# -- up to where -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "start", "length", "fits"),
    [
        (SIZE, 0, SIZE, True),
        (SIZE + 1, 0, SIZE, True),
        (SIZE, 0, SIZE - PAGE, True),
        (SIZE, SIZE - SMALL, SMALL, True),
        (SIZE - 1, 0, SIZE, False),
        (SIZE - 1, SIZE - PAGE, SMALL, False),
        (SIZE - PAGE + 1, SIZE - PAGE, SMALL, False),
        (SIZE, 0, SIZE + SMALL, False),
        (SIZE, SIZE, PAGE, False),
        (0, 0, PAGE, False),
    ],
)
def test_last_page_must_be_whole(
    iommu: File, ioas: int, hwpt: int, size: int, start: int, length: int, fits: bool
) -> None:
    with memfd(size) as fd:
        if fits:
            map_file(iommu, ioas, fd, start, length)
        else:
            with fails(errno.EINVAL):
                map_file(iommu, ioas, fd, start, length)
    assert unmap_all(iommu, ioas) == (length if fits else 0)


def test_size_counts_when_the_domain_comes(kernel: Backend, iommu: File, ioas: int) -> None:
    with memfd(0) as fd:
        map_file(iommu, ioas, fd, 0, SIZE, iova=START)
        with fails(errno.EINVAL):
            mock_domain(iommu, ioas)
        os.ftruncate(fd, SIZE)
        mock_domain(iommu, ioas)
        mock_domain(iommu, ioas)


def test_second_domain_does_not_ask_for_the_size(iommu: File, ioas: int, hwpt: int, fd: int) -> None:
    map_file(iommu, ioas, fd, 0, SIZE, iova=START)
    device = mock_domain(iommu, ioas)
    os.ftruncate(fd, 0)
    hwpt_alloc(iommu, device.idev, ioas)
    assert unmap(iommu, ioas, START, SIZE) == SIZE
    with fails(errno.EINVAL):
        map_file(iommu, ioas, fd, 0, SIZE, iova=START)


def test_pinning_access_takes_the_files_pages(iommu: File, ioas: int, fd: int) -> None:
    seen = Seen(fd, SIZE)
    map_file(iommu, ioas, fd, PAGE, 2 * PAGE, iova=START)
    pinning = create_access(iommu, ioas)
    access_pages(iommu, pinning, START + PAGE, PAGE, seen.address + 2 * PAGE)
    with fails(errno.EBADE):
        access_pages(iommu, pinning, START, PAGE, seen.address)
    check_refs(iommu, seen.address + 2 * PAGE, PAGE, 1)
    check_refs(iommu, seen.address + PAGE, PAGE, 0)
    os.close(pinning)
    check_refs(iommu, seen.address, SIZE, 0)


def test_only_readable(kernel: Backend, iommu: File, ioas: int, hwpt: int, fd: int, access: int) -> None:
    map_file(iommu, ioas, fd, 0, SIZE, iova=START, prot=READ)
    buffer = kernel.buffer(PAGE)
    with fails(errno.EPERM):
        access_rw(iommu, access, START, 1, buffer.address, RW_WRITE)
    with fails(errno.EPERM):
        copy(iommu, ioas, ioas, START, PAGE)
    assert contents(kernel, iommu, access, START, 8) == DATA[:8]
