"""Accesses: the kernel's own use of an IOAS, driven through the mock driver.

Mirrors the accesses of drivers/iommu/iommufd/device.c as IOMMU_TEST_CMD makes them: a descriptor each, which pins pages
(and gives them back when a range is unmapped) or copies to and from them.

One long file: making, pinning, moving and copying share the fixtures below, and most rows are of two lines.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

import pytest

from conformance.arena import Arena, arena
from conformance.mock import (
    APERTURE,
    SMALL,
    access_pages,
    access_replace,
    access_rw,
    check_refs,
    command,
    create_access,
    destroy_pages,
    mock_domain,
)
from conformance.steps import (
    PAGE,
    READ,
    U64_MAX,
    WRITE,
    answer,
    copy,
    destroy,
    fails,
    ioas_alloc,
    iova_alignment,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi import iommufd_test as abi
from uapi.backend import Backend, Buffer, Client, File

pytestmark = pytest.mark.needs("iommu", "mock")

START = APERTURE[0]
PAGES = 8
PIN_WRITE = abi.MOCK_FLAGS_ACCESS_WRITE
RW_WRITE, SLOW = abi.MOCK_ACCESS_RW_WRITE, abi.MOCK_ACCESS_RW_SLOW_PATH
TOO_LONG = (16 << 20) + 1


@pytest.fixture
def buffer(kernel: Backend) -> Buffer:
    made = kernel.buffer(PAGES * PAGE)
    made.view[:] = bytes(range(256)) * (PAGES * PAGE // 256)
    return made


@pytest.fixture
def other(kernel: Backend) -> Buffer:
    """The caller's side of a copy."""
    made = kernel.buffer(PAGES * PAGE)
    made.view[:] = bytes(PAGES * PAGE)
    return made


class Accesses:
    """Accesses of a test, closed at its end."""

    def __init__(self, iommu: File) -> None:
        self._iommu = iommu
        self._open: list[int] = []

    def __call__(self, ioas: int, pin: bool = True) -> int:
        fd = create_access(self._iommu, ioas, pin)
        self._open.append(fd)
        return fd

    def close(self, fd: int) -> None:
        self._open.remove(fd)
        os.close(fd)

    def close_all(self) -> None:
        while self._open:
            os.close(self._open.pop())


@pytest.fixture
def accesses(iommu: File) -> Iterator[Accesses]:
    made = Accesses(iommu)
    yield made
    made.close_all()


# -- making and ending -----------------------------------------------------------------------------------------------


def test_access_takes_an_id_that_no_destroy_frees(iommu: File, ioas: int, accesses: Accesses) -> None:
    fd = accesses(ioas)
    assert ioas_alloc(iommu) == ioas + 2
    with fails(errno.EBUSY):
        destroy(iommu, ioas + 1)
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    accesses.close(fd)
    with fails(errno.ENOENT):
        destroy(iommu, ioas + 1)
    destroy(iommu, ioas)


@pytest.mark.parametrize("flags", [2, 4, 1 << 16, 1 << 31])
def test_unknown_flags_of_an_access_are_eopnotsupp(iommu: File, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        create_access(iommu, ioas, flags=flags)
    assert ioas_alloc(iommu) == ioas + 1


@pytest.mark.parametrize("number", [0, 99])
def test_access_to_no_ioas_is_enoent_and_leaves_no_id(iommu: File, ioas: int, number: int) -> None:
    with fails(errno.ENOENT):
        create_access(iommu, number)
    assert ioas_alloc(iommu) == ioas + 1


def test_reply_that_cannot_be_written_undoes_the_access(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), command(abi.IOMMU_TEST_OP_CREATE_ACCESS, ioas))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))
    assert ioas_alloc(iommu) == ioas + 1
    destroy(iommu, ioas)


def test_access_holds_the_context_and_its_mappings(kernel: Backend, buffer: Buffer) -> None:
    iommu = kernel.open("/dev/iommu")
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = create_access(iommu, ioas)
    access_pages(iommu, fd, START, PAGE, buffer.address)
    iommu.close()
    with kernel.open("/dev/iommu") as again:
        check_refs(again, buffer.address, PAGE, 1)
        os.close(fd)
        check_refs(again, buffer.address, PAGE, 0)


@pytest.mark.parametrize("op", ["pages", "rw", pytest.param("replace", marks=pytest.mark.since("6.6")), "destroy"])
def test_descriptor_of_something_else_is_ebadfd(iommu: File, ioas: int, buffer: Buffer, op: str) -> None:
    with memfd(PAGE) as plain:
        for fd in (0x7FFF_FFFF, 0xFFFF_FFFF, plain, iommu.fileno()):
            with fails(errno.EBADFD):
                if op == "pages":
                    access_pages(iommu, fd, START, PAGE, 0)
                elif op == "rw":
                    access_rw(iommu, fd, START, PAGE, buffer.address)
                elif op == "replace":
                    access_replace(iommu, fd, ioas)
                else:
                    destroy_pages(iommu, fd, 0)


# -- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pin", "alignment"), [(True, PAGE), (False, 1)])
def test_alignment_that_an_access_asks_for(
    iommu: File, ioas: int, accesses: Accesses, pin: bool, alignment: int
) -> None:
    fd = accesses(ioas, pin)
    assert iova_alignment(iommu, ioas) == alignment
    accesses.close(fd)
    assert iova_alignment(iommu, ioas) == 1


def test_pinning_access_and_misaligned_mapping_is_eaddrinuse(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address + SMALL, PAGE, iova=START + SMALL)
    with fails(errno.EADDRINUSE):
        accesses(ioas)
    assert ioas_alloc(iommu) == ioas + 1
    accesses(ioas, pin=False)
    unmap_all(iommu, ioas)
    accesses(ioas)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, buffer.address, SMALL, iova=START)


def test_domain_and_access_together_take_the_larger_alignment(iommu: File, ioas: int, accesses: Accesses) -> None:
    mock = mock_domain(iommu, ioas)
    fd = accesses(ioas)
    assert iova_alignment(iommu, ioas) == PAGE
    accesses.close(fd)
    assert iova_alignment(iommu, ioas) == SMALL
    accesses(ioas)
    destroy(iommu, mock.stdev)
    assert iova_alignment(iommu, ioas) == PAGE


# -- pinning ---------------------------------------------------------------------------------------------------------


def test_pins_count_until_they_are_given_back(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=START)
    fd = accesses(ioas)
    first = access_pages(iommu, fd, START, 2 * PAGE, buffer.address)
    second = access_pages(iommu, fd, START + PAGE, PAGE, buffer.address + PAGE)
    assert (first, second) == (0, 1)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    check_refs(iommu, buffer.address + 2 * PAGE, 2 * PAGE, 0)
    destroy_pages(iommu, fd, first)
    check_refs(iommu, buffer.address, PAGE, 0)
    check_refs(iommu, buffer.address + PAGE, PAGE, 1)
    with fails(errno.ENOENT):
        destroy_pages(iommu, fd, first)
    destroy_pages(iommu, fd, second)
    check_refs(iommu, buffer.address, 4 * PAGE, 0)
    assert access_pages(iommu, fd, START, PAGE, buffer.address) == 2


def test_ids_of_pins_belong_to_the_access(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    one, two = accesses(ioas), accesses(ioas)
    assert access_pages(iommu, one, START, PAGE, buffer.address) == 0
    with fails(errno.ENOENT):
        destroy_pages(iommu, two, 0)
    assert access_pages(iommu, two, START, PAGE, buffer.address) == 0
    accesses.close(one)
    check_refs(iommu, buffer.address, PAGE, 1)


@pytest.mark.parametrize("before", [True, False], ids=["pin_first", "domain_first"])
def test_domain_and_access_share_one_pin(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, before: bool
) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    mock = None if before else mock_domain(iommu, ioas)
    item = access_pages(iommu, fd, START, PAGE, buffer.address)
    if mock is None:
        mock = mock_domain(iommu, ioas)
    check_refs(iommu, buffer.address, 2 * PAGE, 1)
    destroy(iommu, mock.stdev)
    check_refs(iommu, buffer.address, PAGE, 1)
    check_refs(iommu, buffer.address + PAGE, PAGE, 0)
    destroy_pages(iommu, fd, item)
    check_refs(iommu, buffer.address, PAGE, 0)


def test_unmap_takes_the_pins_along(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    map_user(iommu, ioas, buffer.address + 2 * PAGE, 2 * PAGE, iova=START + 2 * PAGE)
    fd = accesses(ioas)
    gone = access_pages(iommu, fd, START, PAGE, buffer.address)
    stays = access_pages(iommu, fd, START + 2 * PAGE, PAGE, buffer.address + 2 * PAGE)
    assert unmap(iommu, ioas, START, 2 * PAGE) == 2 * PAGE
    check_refs(iommu, buffer.address, 2 * PAGE, 0)
    check_refs(iommu, buffer.address + 2 * PAGE, PAGE, 1)
    with fails(errno.ENOENT):
        destroy_pages(iommu, fd, gone)
    destroy_pages(iommu, fd, stays)


def test_unmap_that_fails_before_the_area_leaves_its_pins(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    item = access_pages(iommu, fd, START, PAGE, buffer.address)
    with fails(errno.ENOENT):
        unmap(iommu, ioas, START, PAGE)
    check_refs(iommu, buffer.address, PAGE, 1)
    destroy_pages(iommu, fd, item)


def test_pin_over_several_areas_goes_with_any_of_them(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    for index in range(4):
        map_user(iommu, ioas, buffer.address + index * PAGE, PAGE, iova=START + index * PAGE)
    fd = accesses(ioas)
    item = access_pages(iommu, fd, START, 4 * PAGE, buffer.address)
    check_refs(iommu, buffer.address, 4 * PAGE, 1)
    unmap(iommu, ioas, START + 2 * PAGE, PAGE)
    check_refs(iommu, buffer.address, 4 * PAGE, 0)
    with fails(errno.ENOENT):
        destroy_pages(iommu, fd, item)


def test_pin_of_a_copy_is_a_pin_of_the_same_pages(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    source = ioas_alloc(iommu)
    map_user(iommu, source, buffer.address, 2 * PAGE, iova=START)
    copy(iommu, ioas, source, START, 2 * PAGE, dst_iova=0)
    one, two = accesses(source), accesses(ioas)
    access_pages(iommu, one, START, PAGE, buffer.address)
    access_pages(iommu, two, 0, PAGE, buffer.address)
    check_refs(iommu, buffer.address, PAGE, 1)
    accesses.close(one)
    check_refs(iommu, buffer.address, PAGE, 1)
    accesses.close(two)
    check_refs(iommu, buffer.address, PAGE, 0)


def test_other_pages_than_the_callers_are_ebade(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    with fails(errno.EBADE):
        access_pages(iommu, fd, START, PAGE, buffer.address + PAGE)
    check_refs(iommu, buffer.address, 2 * PAGE, 0)
    assert access_pages(iommu, fd, START, PAGE, 0) == 0


@pytest.mark.parametrize(
    ("address", "number"),
    [((1 << 64) - PAGE, errno.EOVERFLOW), ((1 << 64) - 2 * PAGE, errno.EFAULT), (1 << 63, errno.EFAULT)],
    ids=["last_page", "last_but_one", "kernel_half"],
)
def test_pages_beside_an_address_of_nobody(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, address: int, number: int
) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    with fails(number):
        access_pages(iommu, fd, START, PAGE, address)
    check_refs(iommu, buffer.address, 2 * PAGE, 0)


@pytest.mark.parametrize(
    ("iova", "length", "flags", "number"),
    [
        (START, 0, 0, errno.EINVAL),
        (START, TOO_LONG, 0, errno.ENOMEM),
        (START, TOO_LONG, 2, errno.ENOMEM),
        (START, PAGE, 2, errno.EOPNOTSUPP),
        (START, 3 * PAGE, 0, errno.ENOENT),
        (START - PAGE, 2 * PAGE, 0, errno.ENOENT),
        (0, PAGE, 0, errno.ENOENT),
        (START + 1, PAGE, 0, errno.EINVAL),
        (START + SMALL, 1, 0, errno.EINVAL),
        (U64_MAX - PAGE + 1, 2 * PAGE, 0, errno.EOVERFLOW),
    ],
)
def test_pin_that_is_refused_leaves_nothing(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, iova: int, length: int, flags: int, number: int
) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    with fails(number):
        access_pages(iommu, fd, iova, length, buffer.address, flags)
    check_refs(iommu, buffer.address, 2 * PAGE, 0)
    unmap(iommu, ioas, START, 2 * PAGE)


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE + 1])
def test_pin_may_end_anywhere(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, length: int) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    access_pages(iommu, fd, START, length, buffer.address)
    check_refs(iommu, buffer.address, (length + PAGE - 1) // PAGE * PAGE, 1)


@pytest.mark.parametrize(
    ("prot", "flags", "number"),
    [(READ, 0, 0), (READ, PIN_WRITE, errno.EPERM), (WRITE, 0, errno.EPERM), (WRITE, PIN_WRITE, 0)],
)
def test_pin_asks_for_permission(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, prot: int, flags: int, number: int
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START, prot=prot)
    fd = accesses(ioas)
    assert answer(access_pages, iommu, fd, START, PAGE, buffer.address, flags) == number


def test_pin_of_memory_that_is_not_there_is_efault(iommu: File, ioas: int, accesses: Accesses) -> None:
    with arena(2) as memory:
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=START)
        memory.unmap(1)
        fd = accesses(ioas)
        with fails(errno.EFAULT):
            access_pages(iommu, fd, START, 2 * PAGE, 0)
        access_pages(iommu, fd, START, PAGE, memory.page(0))
        unmap_all(iommu, ioas)


def test_access_that_does_not_pin_cannot(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas, pin=False)
    with fails(errno.EOPNOTSUPP):
        access_pages(iommu, fd, START, PAGE, buffer.address)


@pytest.mark.since("6.13")
def test_pin_of_file_pages(iommu: File, ioas: int, accesses: Accesses) -> None:
    with memfd(2 * PAGE) as fd:
        map_file(iommu, ioas, fd, 0, PAGE, iova=START)
        access = accesses(ioas)
        item = access_pages(iommu, access, START, PAGE, 0)
        destroy_pages(iommu, access, item)


def test_reply_of_a_pin_that_cannot_be_written_undoes_it(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas)
    with arena(1) as memory:
        arg = command(abi.IOMMU_TEST_OP_ACCESS_PAGES, fd, "access_pages", iova=START, length=PAGE, uptr=0)
        Arena.write(memory.page(0), arg)
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(abi.IOMMU_TEST_CMD.number, memory.page(0))
    check_refs(iommu, buffer.address, PAGE, 0)
    assert access_pages(iommu, fd, START, PAGE, 0) == 1


# -- another IOAS ----------------------------------------------------------------------------------------------------


@pytest.mark.since("6.6")
def test_access_moves_to_another_ioas_without_its_pins(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas)
    second = ioas_alloc(iommu)
    item = access_pages(iommu, fd, START, PAGE, buffer.address)
    access_replace(iommu, fd, second)
    check_refs(iommu, buffer.address, PAGE, 0)
    with fails(errno.ENOENT):
        destroy_pages(iommu, fd, item)
    with fails(errno.ENOENT):
        access_pages(iommu, fd, START, PAGE, buffer.address)
    assert (iova_alignment(iommu, ioas), iova_alignment(iommu, second)) == (1, PAGE)
    destroy(iommu, ioas)
    with fails(errno.EBUSY):
        destroy(iommu, second)


@pytest.mark.since("6.6")
def test_access_that_moves_to_its_own_ioas_keeps_its_pins(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas)
    item = access_pages(iommu, fd, START, PAGE, buffer.address)
    access_replace(iommu, fd, ioas)
    destroy_pages(iommu, fd, item)


@pytest.mark.since("6.6")
def test_move_that_fails_changes_nothing(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas)
    second = ioas_alloc(iommu)
    map_user(iommu, second, buffer.address, 1, iova=0)
    item = access_pages(iommu, fd, START, PAGE, buffer.address)
    with fails(errno.EADDRINUSE):
        access_replace(iommu, fd, second)
    for number in (0, 99, ioas + 1):
        with fails(errno.ENOENT):
            access_replace(iommu, fd, number)
    check_refs(iommu, buffer.address, PAGE, 1)
    destroy(iommu, second)
    destroy_pages(iommu, fd, item)


# -- copying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [0, SLOW], ids=["plain", "slow"])
@pytest.mark.parametrize("domain", [False, True], ids=["no_domain", "domain"])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (5, 100), (PAGE - 3, 7), (0, 2 * PAGE), (SMALL, 3 * PAGE)])
def test_copy_reads_and_writes_the_mapped_memory(
    iommu: File,
    ioas: int,
    accesses: Accesses,
    buffer: Buffer,
    other: Buffer,
    slow: int,
    domain: bool,
    offset: int,
    length: int,
) -> None:
    if domain:
        mock_domain(iommu, ioas)
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=START)
    fd = accesses(ioas, pin=False)
    access_rw(iommu, fd, START + offset, length, other.address + 1, slow)
    assert bytes(other.view[1 : 1 + length]) == bytes(buffer.view[offset : offset + length])
    assert (other.view[0], other.view[1 + length]) == (0, 0)
    other.view[1 : 1 + length] = bytes(length * [0xA5])
    access_rw(iommu, fd, START + offset, length, other.address + 1, RW_WRITE | slow)
    assert bytes(buffer.view[offset : offset + length]) == bytes(length * [0xA5])
    assert buffer.view[offset + length] == (offset + length) & 0xFF


@pytest.mark.parametrize("slow", [0, SLOW], ids=["plain", "slow"])
def test_copy_crosses_areas(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, other: Buffer, slow: int
) -> None:
    map_user(iommu, ioas, buffer.address + 4 * PAGE, 100, iova=START)
    map_user(iommu, ioas, buffer.address + 10, 200, iova=START + 100)
    fd = accesses(ioas, pin=False)
    access_rw(iommu, fd, START + 50, 150, other.address, slow)
    assert bytes(other.view[:150]) == bytes(range(50, 100)) + bytes(range(10, 110))


def test_copy_into_a_gap_has_written_what_came_before(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, other: Buffer
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas, pin=False)
    other.view[: 2 * PAGE] = bytes(2 * PAGE * [7])
    with fails(errno.ENOENT):
        access_rw(iommu, fd, START, PAGE + 1, other.address, RW_WRITE)
    assert bytes(buffer.view[:PAGE]) == bytes(PAGE * [7])
    assert buffer.view[PAGE] == 0
    with fails(errno.ENOENT):
        access_rw(iommu, fd, START, PAGE + 1, other.address + 2 * PAGE)
    assert bytes(other.view[2 * PAGE : 3 * PAGE]) == bytes(PAGE)


@pytest.mark.parametrize(
    ("iova", "length", "flags", "number"),
    [
        (START, 0, 0, errno.EINVAL),
        (START, TOO_LONG, 0, errno.ENOMEM),
        (START, TOO_LONG, 2, errno.ENOMEM),
        (START, 1, 2, errno.EOPNOTSUPP),
        (START, 1, 8, errno.EOPNOTSUPP),
        (0, 1, 0, errno.ENOENT),
        (U64_MAX, 2, 0, errno.EOVERFLOW),
    ],
)
def test_copy_that_is_refused(
    iommu: File,
    ioas: int,
    accesses: Accesses,
    buffer: Buffer,
    other: Buffer,
    iova: int,
    length: int,
    flags: int,
    number: int,
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas, pin=False)
    with fails(number):
        access_rw(iommu, fd, iova, length, other.address, flags)


@pytest.mark.parametrize("slow", [0, SLOW], ids=["plain", "slow"])
@pytest.mark.parametrize(("prot", "write"), [(READ, RW_WRITE), (WRITE, 0)], ids=["read_only", "write_only"])
def test_copy_asks_for_permission(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, other: Buffer, slow: int, prot: int, write: int
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START, prot=prot)
    fd = accesses(ioas, pin=False)
    with fails(errno.EPERM):
        access_rw(iommu, fd, START, 1, other.address, write | slow)
    access_rw(iommu, fd, START, 1, other.address, (write ^ RW_WRITE) | slow)


@pytest.mark.parametrize("write", [0, RW_WRITE], ids=["read", "write"])
def test_copy_with_a_bad_buffer_is_efault(
    iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, write: int
) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=START)
    fd = accesses(ioas, pin=False)
    with fails(errno.EFAULT):
        access_rw(iommu, fd, START, 16, 0, write)


@pytest.mark.parametrize("slow", [0, SLOW], ids=["plain", "slow"])
@pytest.mark.parametrize("write", [0, RW_WRITE], ids=["read", "write"])
def test_copy_of_memory_that_is_not_there_is_efault(
    iommu: File, ioas: int, accesses: Accesses, other: Buffer, slow: int, write: int
) -> None:
    with arena(2) as memory:
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=START)
        memory.unmap(1)
        fd = accesses(ioas, pin=False)
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START + PAGE, 16, other.address, write | slow)
        access_rw(iommu, fd, START, 16, other.address, write | slow)


def test_plain_copy_reads_read_only_memory_through_a_writable_mapping(
    iommu: File, ioas: int, accesses: Accesses, other: Buffer
) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), b"abcd")
        map_user(iommu, ioas, memory.page(0), PAGE, iova=START)
        memory.read_only(0)
        fd = accesses(ioas, pin=False)
        access_rw(iommu, fd, START, 4, other.address)
        assert bytes(other.view[:4]) == b"abcd"
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START, 4, other.address, RW_WRITE)


@pytest.mark.parametrize("pinned", [False, True], ids=["unpinned", "pinned"])
def test_slow_copy_of_one_page_asks_for_no_more_than_it_does(
    iommu: File, ioas: int, accesses: Accesses, other: Buffer, pinned: bool
) -> None:
    with arena(2) as memory:
        Arena.write(memory.page(0), b"abcd")
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=START)
        fd = accesses(ioas)
        if pinned:
            access_pages(iommu, fd, START, PAGE, memory.page(0))
        memory.read_only(0)
        access_rw(iommu, fd, START, 4, other.address, SLOW)
        assert bytes(other.view[:4]) == b"abcd"
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START, 4, other.address, RW_WRITE | SLOW)
        memory.no_access(0)
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START, 4, other.address, SLOW)


@pytest.mark.parametrize("index", [0, 1])
def test_slow_read_of_two_pages_asks_for_what_the_mapping_may_do(
    iommu: File, ioas: int, accesses: Accesses, other: Buffer, index: int
) -> None:
    with arena(2) as memory:
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=START)
        map_user(iommu, ioas, memory.page(0), 2 * PAGE, iova=START + 4 * PAGE, prot=READ)
        memory.read_only(index)
        fd = accesses(ioas, pin=False)
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START + PAGE - 4, 8, other.address, SLOW)
        access_rw(iommu, fd, START + 5 * PAGE - 4, 8, other.address, SLOW)


def test_slow_copy_of_one_page_finds_what_is_mapped_now(
    iommu: File, ioas: int, accesses: Accesses, other: Buffer
) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), b"old!")
        map_user(iommu, ioas, memory.page(0), PAGE, iova=START)
        fd = accesses(ioas)
        access_pages(iommu, fd, START, PAGE, memory.page(0))
        memory.renew(0)
        Arena.write(memory.page(0), b"new!")
        access_rw(iommu, fd, START, 4, other.address, SLOW)
        assert bytes(other.view[:4]) == b"new!"
        memory.unmap(0)
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START, 4, other.address, SLOW)


def test_copy_leaves_no_pin(iommu: File, ioas: int, accesses: Accesses, buffer: Buffer, other: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=START)
    fd = accesses(ioas)
    access_rw(iommu, fd, START, 2 * PAGE, other.address, SLOW)
    check_refs(iommu, buffer.address, 2 * PAGE, 0)


@pytest.mark.since("6.13")
def test_copy_of_file_pages(iommu: File, ioas: int, accesses: Accesses, other: Buffer) -> None:
    with memfd(3 * PAGE) as file:
        os.pwrite(file, b"file", PAGE - 2)
        map_file(iommu, ioas, file, 0, 2 * PAGE, iova=START)
        fd = accesses(ioas, pin=False)
        access_rw(iommu, fd, START + PAGE - 2, 4, other.address)
        assert bytes(other.view[:4]) == b"file"
        access_rw(iommu, fd, START + PAGE - 1, 1, other.address, RW_WRITE)
        assert os.pread(file, 4, PAGE - 2) == b"ffle"


# -- another process -------------------------------------------------------------------------------------------------


@pytest.fixture
def client(kernel: Backend) -> Iterator[Client]:
    with kernel.spawn() as client:
        yield client


@pytest.mark.parametrize("slow", [0, SLOW], ids=["plain", "slow"])
@pytest.mark.parametrize("domain", [False, True], ids=["no_domain", "domain"])
@pytest.mark.parametrize(("offset", "length"), [(3, 8), (PAGE - 4, 8)], ids=["one_page", "two_pages"])
def test_copy_goes_to_the_process_that_mapped(
    iommu: File,
    ioas: int,
    accesses: Accesses,
    client: Client,
    other: Buffer,
    slow: int,
    domain: bool,
    offset: int,
    length: int,
) -> None:
    address = client.allocate(2 * PAGE)
    client.poke(address + offset, b"abcdefgh")
    map_user(client.receive(iommu), ioas, address, 2 * PAGE, iova=START)
    if domain:
        mock_domain(iommu, ioas)
    fd = accesses(ioas, pin=False)
    access_rw(iommu, fd, START + offset, length, other.address, slow)
    assert bytes(other.view[:length]) == b"abcdefgh"
    other.view[:length] = b"hgfedcba"
    access_rw(iommu, fd, START + offset, length, other.address, RW_WRITE | slow)
    assert client.peek(address + offset, length) == b"hgfedcba"


def test_copy_from_a_process_that_ended_is_efault(
    kernel: Backend, iommu: File, ioas: int, accesses: Accesses, other: Buffer
) -> None:
    with kernel.spawn() as client:
        map_user(client.receive(iommu), ioas, client.allocate(2 * PAGE), 2 * PAGE, iova=START)
    fd = accesses(ioas)
    for length in (8, 2 * PAGE):
        with fails(errno.EFAULT):
            access_rw(iommu, fd, START, length, other.address)
    with fails(errno.EFAULT):
        access_pages(iommu, fd, START, PAGE, 0)
    assert unmap_all(iommu, ioas) == 2 * PAGE


def test_pages_of_another_process_are_not_the_callers(
    iommu: File, ioas: int, accesses: Accesses, client: Client, buffer: Buffer
) -> None:
    remote = client.receive(iommu)
    address = client.allocate(PAGE)
    client.poke(address, b"x")
    map_user(remote, ioas, address, PAGE, iova=START)
    fd = accesses(ioas)
    with fails(errno.EBADE):
        access_pages(iommu, fd, START, PAGE, buffer.address)
    access_pages(iommu, fd, START, PAGE, 0)
    check_refs(remote, address, PAGE, 1)


@pytest.mark.needs("root")
def test_pins_of_an_access_are_paid_by_the_process_that_mapped(
    iommu: File, ioas: int, accesses: Accesses, client: Client
) -> None:
    remote = client.receive(iommu)
    address = client.allocate(4 * PAGE)
    client.setrlimit(resource.RLIMIT_MEMLOCK, 2 * PAGE, 2 * PAGE)
    client.setuid(54321)
    map_user(remote, ioas, address, 4 * PAGE, iova=START)
    fd = accesses(ioas)
    with fails(errno.ENOMEM):
        access_pages(iommu, fd, START, 3 * PAGE, 0)
    assert client.status("VmPin") == 0
    first = access_pages(iommu, fd, START, 2 * PAGE, 0)
    access_pages(iommu, fd, START + PAGE, PAGE, 0)
    with fails(errno.ENOMEM):
        access_pages(iommu, fd, START + 2 * PAGE, PAGE, 0)
    assert client.status("VmPin") == 2 * PAGE // 1024
    destroy_pages(iommu, fd, first)
    access_pages(iommu, fd, START + 2 * PAGE, PAGE, 0)
    assert client.status("VmPin") == 2 * PAGE // 1024
