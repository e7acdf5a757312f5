"""IOMMU_IOAS_MAP_FILE on an IOAS without a domain: its checks, and what little it looks at in the file.

Mirrors iommufd_ioas_map_file() and iopt_map_file_pages(). dma-bufs and what a pin of a file does are elsewhere.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    FIXED,
    PAGE,
    READ,
    RW,
    U64_MAX,
    WRITE,
    MiB,
    fails,
    map_file,
    map_user,
    memfd,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_IOAS_MAP_FILE, IOMMU_OPTION_HUGE_PAGES

pytestmark = pytest.mark.since("6.13")

LONGEST = U64_MAX - PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    with memfd(64 * PAGE) as number:
        yield number


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": RW | 8}, errno.EOPNOTSUPP),
        ({"flags": 0x8000_0000}, errno.EOPNOTSUPP),
        ({"iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED | RW, "iova": U64_MAX}, errno.EOVERFLOW),
        ({"length": U64_MAX}, errno.EOVERFLOW),
        ({"flags": 0}, errno.EINVAL),
        ({"flags": FIXED}, errno.EINVAL),
        ({"ioas_id": 0}, errno.ENOENT),
        ({"ioas_id": 99}, errno.ENOENT),
        ({"length": 0}, errno.EINVAL),
        ({"start": U64_MAX, "length": 2}, errno.EOVERFLOW),
        ({"start": 2 * PAGE, "length": LONGEST}, errno.EOVERFLOW),
        ({"fd": -1}, errno.EBADF),
        ({"fd": 1 << 20}, errno.EBADF),
        ({"length": LONGEST + 1}, errno.EINVAL),
        ({"flags": FIXED | RW, "iova": U64_MAX - 1, "length": 3}, errno.EOVERFLOW),
    ],
)
def test_check(iommu: File, ioas: int, fd: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_MAP_FILE(iommu, **{"flags": RW, "ioas_id": ioas, "fd": fd, "length": PAGE, **fields})
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 8, "iova": U64_MAX}, errno.EOPNOTSUPP),
        ({"flags": 0, "iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": 0, "ioas_id": 99}, errno.EINVAL),
        ({"ioas_id": 99, "fd": -1}, errno.ENOENT),
        ({"ioas_id": 99, "length": 0}, errno.ENOENT),
        ({"length": 0, "fd": -1}, errno.EINVAL),
        ({"length": 0, "start": U64_MAX}, errno.EINVAL),
        ({"start": U64_MAX, "length": 2, "fd": -1}, errno.EOVERFLOW),
        ({"length": LONGEST + 1, "fd": -1}, errno.EBADF),
        ({"flags": FIXED | RW, "iova": U64_MAX - 1, "length": 3, "fd": -1}, errno.EBADF),
    ],
)
def test_order_of_checks(iommu: File, ioas: int, fd: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_MAP_FILE(iommu, **{"flags": RW, "ioas_id": ioas, "fd": fd, "length": PAGE, **fields})


@pytest.mark.parametrize("prot", [READ, WRITE, RW], ids=["read", "write", "read_write"])
def test_memfd_maps(iommu: File, ioas: int, fd: int, prot: int) -> None:
    assert map_file(iommu, ioas, fd, 0, 4 * PAGE, iova=0x10000, prot=prot) == 0x10000
    assert unmap(iommu, ioas, 0x10000, 4 * PAGE) == 4 * PAGE


def test_range_beyond_the_end_of_the_file_is_accepted(iommu: File, ioas: int, fd: int) -> None:
    assert map_file(iommu, ioas, fd, 64 * PAGE, PAGE, iova=PAGE) == PAGE
    assert map_file(iommu, ioas, fd, 1 << 62, PAGE, iova=2 * PAGE) == 2 * PAGE


def test_range_may_end_at_2_to_the_64(iommu: File, ioas: int, fd: int) -> None:
    """Unlike a user address: the last byte is what must not wrap."""
    assert map_file(iommu, ioas, fd, U64_MAX - PAGE + 1, PAGE, iova=PAGE) == PAGE


@pytest.mark.parametrize("kind", ["pipe", "directory", "null", "read_only", "socket"])
def test_any_kind_of_file_is_accepted(iommu: File, ioas: int, kind: str) -> None:
    fds: list[int] = []
    if kind == "pipe":
        fds += os.pipe()
    elif kind == "directory":
        fds.append(os.open("/", os.O_RDONLY))
    elif kind == "null":
        fds.append(os.open("/dev/null", os.O_RDWR))
    elif kind == "read_only":
        fds.append(os.open("/proc/self/exe", os.O_RDONLY))
    else:
        fds += [end.detach() for end in socket.socketpair()]
    try:
        assert map_file(iommu, ioas, fds[0], 0, PAGE, iova=PAGE) == PAGE
    finally:
        for number in fds:
            os.close(number)


def test_iommufd_itself_is_a_file_too(iommu: File, ioas: int) -> None:
    """The mapping then holds its own context open: unmapped before the end."""
    assert map_file(iommu, ioas, iommu.fileno(), 0, PAGE, iova=PAGE) == PAGE
    unmap_all(iommu, ioas)


def test_path_descriptor_is_ebadf(iommu: File, ioas: int) -> None:
    fd = os.open("/", os.O_PATH)
    try:
        with fails(errno.EBADF):
            map_file(iommu, ioas, fd, 0, PAGE)
    finally:
        os.close(fd)


def test_closed_descriptor_is_ebadf(iommu: File, ioas: int) -> None:
    with memfd(PAGE) as fd:
        pass
    with fails(errno.EBADF):
        map_file(iommu, ioas, fd, 0, PAGE)


def test_file_may_be_closed_once_it_is_mapped(iommu: File, ioas: int) -> None:
    with memfd(PAGE) as fd:
        map_file(iommu, ioas, fd, 0, PAGE, iova=PAGE)
    assert unmap(iommu, ioas, PAGE, PAGE) == PAGE


def test_map_over_an_existing_area_is_eexist(iommu: File, ioas: int, fd: int) -> None:
    map_user(iommu, ioas, 0, PAGE, iova=PAGE)
    with fails(errno.EEXIST):
        map_file(iommu, ioas, fd, 0, PAGE, iova=PAGE)


@pytest.mark.parametrize(
    ("start", "length", "iova"),
    [
        (0, PAGE, PAGE),
        (0, 3 * PAGE, 4 * PAGE),
        (0, 8 * MiB, 2 * MiB),
        (PAGE, 16 * PAGE, PAGE),
        (8 * PAGE, 16 * PAGE, 8 * PAGE),
        (8 * PAGE + 0x10, 16 * PAGE, PAGE + 0x10),
        (MiB, 4 * MiB, MiB),
    ],
)
def test_automatic_iova_follows_the_file_offset(
    iommu: File, ioas: int, fd: int, start: int, length: int, iova: int
) -> None:
    assert map_file(iommu, ioas, fd, start, length) == iova


def test_offset_within_the_page_must_suit_the_ioas(iommu: File, ioas: int, fd: int) -> None:
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    with fails(errno.EINVAL):
        map_file(iommu, ioas, fd, 0x800, PAGE, iova=PAGE)
    with fails(errno.EINVAL):
        map_file(iommu, ioas, fd, 0x800, PAGE)


def test_reply_changes_nothing_but_the_iova(iommu: File, ioas: int, fd: int) -> None:
    reply = IOMMU_IOAS_MAP_FILE(iommu, flags=RW, ioas_id=ioas, fd=fd, start=PAGE, length=PAGE, iova=5)
    fields = (reply.size, reply.flags, reply.ioas_id, reply.fd, reply.start, reply.length, reply.iova)
    assert fields == (40, RW, ioas, fd, PAGE, PAGE, PAGE)


def test_reply_fault_is_efault_and_the_area_stays(iommu: File, ioas: int, fd: int) -> None:
    with arena(1) as memory:
        arg = IOMMU_IOAS_MAP_FILE.make(flags=RW | FIXED, ioas_id=ioas, fd=fd, length=PAGE, iova=PAGE)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_MAP_FILE.number, memory.page(0))
    assert unmap(iommu, ioas, PAGE, PAGE) == PAGE


def test_descriptor_is_looked_up_in_the_caller(kernel: Backend, iommu: File, ioas: int) -> None:
    """Another process's numbers mean nothing: what is open here is EBADF there."""
    with memfd(PAGE) as fd, kernel.spawn() as client:
        high = os.dup2(fd, 200)
        try:
            remote = client.receive(iommu)
            arg = IOMMU_IOAS_MAP_FILE.make(flags=RW, ioas_id=ioas, fd=high, length=PAGE)
            with fails(errno.EBADF):
                remote.ioctl(IOMMU_IOAS_MAP_FILE.number, arg)
        finally:
            os.close(high)
