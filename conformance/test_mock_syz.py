"""The fuzzer's way to name an IOVA (MOCK_FLAGS_ACCESS_SYZ): the number of a mapping, and an offset in it.

A kernel with the mock driver takes it in IOMMU_IOAS_COPY, ACCESS_PAGES and ACCESS_RW, after
iommufd_test_syz_conv_iova() of drivers/iommu/iommufd/selftest.c. Where there are not so many mappings, the IOVA is 0.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from conformance.mock import access_pages, access_replace, access_rw, create_access, destroy_pages
from conformance.steps import FIXED, PAGE, READ, RW, U64_MAX, fails, ioas_alloc, map_user, unmap, unmap_all
from uapi import iommufd_test as abi
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_IOAS_COPY

pytestmark = pytest.mark.needs("iommu", "mock")

SYZ = abi.MOCK_FLAGS_ACCESS_SYZ
FIRST, SECOND = 0x10_0000, 0x20_0000


def word(number: int, offset: int = 0) -> int:
    return number | offset << 32


@pytest.fixture
def buffer(kernel: Backend) -> Buffer:
    made = kernel.buffer(4 * PAGE)
    made.view[:] = bytes(range(256)) * (4 * PAGE // 256)
    return made


@pytest.fixture
def ioas(iommu: File, buffer: Buffer) -> int:
    """Two pages at SECOND, mapped first, and two at FIRST."""
    made = ioas_alloc(iommu)
    map_user(iommu, made, buffer.address + 2 * PAGE, 2 * PAGE, iova=SECOND)
    map_user(iommu, made, buffer.address, 2 * PAGE, iova=FIRST)
    return made


@pytest.fixture
def access(iommu: File, ioas: int) -> Iterator[int]:
    fd = create_access(iommu, ioas)
    yield fd
    os.close(fd)


def syz_copy(iommu: File, source: int, iova: int, **fields: int) -> tuple[int, int, int]:
    """COPY one page to a fresh IOAS; the flags, source and destination that come back."""
    given = {"flags": RW | FIXED | SYZ, "dst_ioas_id": ioas_alloc(iommu), "length": PAGE, "dst_iova": PAGE} | fields
    reply = IOMMU_IOAS_COPY(iommu, src_ioas_id=source, src_iova=iova, **given)
    return reply.flags, reply.src_iova, reply.dst_iova


@pytest.mark.parametrize(
    ("number", "offset", "iova"),
    [(0, 0, FIRST), (1, 0, SECOND), (1, PAGE, SECOND + PAGE), (0, 1, FIRST + 1), (0, SECOND - FIRST, SECOND)],
)
def test_copy_counts_mappings_by_iova(iommu: File, ioas: int, number: int, offset: int, iova: int) -> None:
    """The IOVA that was found and the flags without this one come back."""
    assert syz_copy(iommu, ioas, word(number, offset)) == (RW | FIXED, iova, PAGE)


@pytest.mark.parametrize(("number", "offset"), [(2, 0), (0xFFFF_FFFF, 5), (1, 2 * PAGE), (0, 0xFFFF_FFFF)])
def test_copy_of_no_mapping_is_enoent(iommu: File, ioas: int, number: int, offset: int) -> None:
    with fails(errno.ENOENT):
        syz_copy(iommu, ioas, word(number, offset))


def test_number_beyond_the_last_is_iova_0(iommu: File, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=0)
    assert syz_copy(iommu, ioas, word(3, PAGE)) == (RW | FIXED, 0, PAGE)


def test_end_of_the_space_wraps(iommu: File, ioas: int, buffer: Buffer) -> None:
    last = U64_MAX - PAGE + 1
    unmap_all(iommu, ioas)
    map_user(iommu, ioas, buffer.address, PAGE, iova=last)
    map_user(iommu, ioas, buffer.address, PAGE, iova=0)
    assert syz_copy(iommu, ioas, word(1, PAGE)) == (RW | FIXED, 0, PAGE)
    with fails(errno.EOVERFLOW):
        syz_copy(iommu, ioas, word(1, PAGE - 1))


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": RW | FIXED | SYZ | 8}, errno.EOPNOTSUPP),
        ({"flags": RW | FIXED | SYZ << 1}, errno.EOPNOTSUPP),
        ({"flags": FIXED | SYZ}, errno.EINVAL),
        ({"length": U64_MAX}, errno.EOVERFLOW),
        ({"length": 0}, errno.EINVAL),
        ({"dst_ioas_id": 99}, errno.ENOENT),
    ],
)
def test_other_checks_of_copy(iommu: File, ioas: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        syz_copy(iommu, ioas, word(0), **fields)


def test_copy_from_an_unknown_ioas_keeps_the_word(iommu: File) -> None:
    with fails(errno.ENOENT):
        syz_copy(iommu, 99, word(0))
    with fails(errno.EOVERFLOW):  # which is looked at before the IOAS is missed
        syz_copy(iommu, 99, U64_MAX)


def test_copy_of_2_64_less_1_finds_no_mapping(iommu: File, ioas: int) -> None:
    with fails(errno.ENOENT):
        syz_copy(iommu, ioas, U64_MAX)


def test_copy_within_one_ioas(iommu: File, ioas: int) -> None:
    assert syz_copy(iommu, ioas, word(0), dst_ioas_id=ioas, flags=READ | FIXED | SYZ) == (READ | FIXED, FIRST, PAGE)
    assert syz_copy(iommu, ioas, word(0)) == (RW | FIXED, PAGE, PAGE)
    assert unmap(iommu, ioas, PAGE, PAGE) == PAGE


def test_access_copies_by_number(iommu: File, ioas: int, access: int, kernel: Backend, buffer: Buffer) -> None:
    into = kernel.buffer(PAGE)
    access_rw(iommu, access, word(1, 3), 8, into.address, SYZ)
    assert bytes(into.view[:8]) == bytes(range(3, 11))
    into.view[:4] = b"ABCD"
    access_rw(iommu, access, word(0, PAGE), 4, into.address, SYZ | abi.MOCK_ACCESS_RW_WRITE)
    access_rw(iommu, access, word(0, PAGE + 4), 4, into.address, SYZ | abi.MOCK_ACCESS_RW_SLOW_PATH)
    assert bytes(buffer.view[PAGE : PAGE + 4]) == b"ABCD"
    assert bytes(into.view[:4]) == bytes(range(4, 8))
    for bad in (word(2), word(0, 2 * PAGE), U64_MAX):
        with fails(errno.ENOENT):
            access_rw(iommu, access, bad, 4, into.address, SYZ)


def test_access_pins_by_number(iommu: File, ioas: int, access: int, buffer: Buffer) -> None:
    item = access_pages(iommu, access, word(1, PAGE), PAGE, buffer.address + 3 * PAGE, SYZ)
    with fails(errno.EBADE):
        access_pages(iommu, access, word(1), PAGE, buffer.address + 3 * PAGE, SYZ)
    with fails(errno.ENOENT):
        access_pages(iommu, access, word(2), PAGE, 0, SYZ)
    with fails(errno.EINVAL):
        access_pages(iommu, access, word(0), 0, 0, SYZ)
    destroy_pages(iommu, access, item)
    item = access_pages(iommu, access, word(0), 2 * PAGE, buffer.address, SYZ | abi.MOCK_FLAGS_ACCESS_WRITE)
    assert unmap(iommu, ioas, FIRST, 2 * PAGE) == 2 * PAGE
    with fails(errno.ENOENT):
        destroy_pages(iommu, access, item)


@pytest.mark.since("6.6")
def test_numbers_are_of_the_ioas_that_the_access_is_moved_to(
    iommu: File, ioas: int, access: int, kernel: Backend, buffer: Buffer
) -> None:
    into = kernel.buffer(PAGE)
    other = ioas_alloc(iommu)
    access_replace(iommu, access, other)
    with fails(errno.ENOENT):
        access_rw(iommu, access, word(0), 4, into.address, SYZ)
    map_user(iommu, other, buffer.address, PAGE, iova=FIRST - PAGE)
    access_rw(iommu, access, word(0, 6), 4, into.address, SYZ)
    assert bytes(into.view[:4]) == bytes(range(6, 10))
