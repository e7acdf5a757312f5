"""Which pages a domain holds, and how often each is pinned, while mappings, copies, domains and accesses come and go.

Every combination of start and length in units of the mock driver's 2 KiB is mapped, with one domain and while a second
comes and goes, with the kernel's batches of pages as large as ever and as small as they can be.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from conformance.arena import arena
from conformance.mock import (
    APERTURE,
    SMALL,
    access_pages,
    access_replace,
    check_map,
    check_refs,
    create_access,
    destroy_pages,
    memory_limit,
    mock_domain,
    mock_replace,
)
from conformance.steps import (
    PAGE,
    READ,
    WRITE,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    map_file,
    map_user,
    memfd,
    unmap,
)
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_VFIO_IOAS, IOMMU_VFIO_IOAS_SET
from uapi.vfio import VFIO_IOMMU_MAP_DMA, vfio_iommu_type1_dma_map

pytestmark = pytest.mark.needs("iommu", "mock")

START = APERTURE[0]
PAGES = 4
#: The kernel's own limit, in bytes: 64 KiB.
USUAL_LIMIT = 65536


class Memory(NamedTuple):
    """Four pages of a client, and the descriptor of the memfd that they are of; -1 for ordinary memory."""

    address: int
    fd: int

    def map(self, iommu: File, ioas: int, start: int, length: int) -> int:
        if self.fd < 0:
            return map_user(iommu, ioas, self.address + start, length)
        return map_file(iommu, ioas, self.fd, start, length)


@pytest.fixture(params=["user", pytest.param("file", marks=[pytest.mark.since("6.13"), pytest.mark.needs("memfd")])])
def memory(kernel: Backend, request: pytest.FixtureRequest) -> Iterator[Memory]:
    if request.param == "user":
        with contextlib.closing(kernel.buffer(PAGES * PAGE)) as buffer:
            buffer.view[:] = bytes(PAGES * PAGE)
            yield Memory(buffer.address, -1)
        return
    with memfd(PAGES * PAGE) as fd, mmap.mmap(fd, PAGES * PAGE) as view:
        view[:] = bytes(PAGES * PAGE)
        anchor = ctypes.c_char.from_buffer(view)
        yield Memory(ctypes.addressof(anchor), fd)
        del anchor


@pytest.fixture(params=[None, 16, 48])
def limit(iommu: File, request: pytest.FixtureRequest) -> Iterator[None]:
    """Batches of as many bytes; usually of 64 KiB."""
    if request.param is not None:
        memory_limit(iommu, request.param)
    yield
    memory_limit(iommu, USUAL_LIMIT)


def pieces() -> Iterator[tuple[int, int]]:
    """Every start and length in units of 2 KiB."""
    units = PAGES * PAGE // SMALL
    for first in range(units):
        for last in range(first, units):
            yield first * SMALL, (last - first + 1) * SMALL


def pages_of(start: int, length: int) -> tuple[int, int]:
    """The whole pages that a piece touches: offset and length."""
    first = start // PAGE * PAGE
    return first, -(-(start + length) // PAGE) * PAGE - first


@pytest.mark.usefixtures("limit")
def test_every_piece_is_mapped_and_pinned_once(iommu: File, ioas: int, memory: Memory) -> None:
    hwpt = mock_domain(iommu, ioas).hwpt
    for start, length in pieces():
        iova = memory.map(iommu, ioas, start, length)
        check_map(iommu, hwpt, iova, length, memory.address + start)
        first, whole = pages_of(start, length)
        check_refs(iommu, memory.address + first, whole, 1)
        check_refs(iommu, memory.address, first, 0)
        check_refs(iommu, memory.address + first + whole, PAGES * PAGE - first - whole, 0)
        unmap(iommu, ioas, iova, length)
    check_refs(iommu, memory.address, PAGES * PAGE, 0)


@pytest.mark.since("6.6")
@pytest.mark.usefixtures("limit")
def test_domain_that_comes_and_goes_pins_nothing_anew(iommu: File, ioas: int, memory: Memory) -> None:
    first_device = mock_domain(iommu, ioas)
    for start, length in pieces():
        iova = memory.map(iommu, ioas, start, length)
        second = hwpt_alloc(iommu, first_device.idev, ioas)
        first, whole = pages_of(start, length)
        for hwpt in (first_device.hwpt, second):
            check_map(iommu, hwpt, iova, length, memory.address + start)
        check_refs(iommu, memory.address + first, whole, 1)
        destroy(iommu, second)
        check_refs(iommu, memory.address + first, whole, 1)
        unmap(iommu, ioas, iova, length)
    check_refs(iommu, memory.address, PAGES * PAGE, 0)


@pytest.mark.usefixtures("limit")
def test_first_domain_finds_every_piece_that_was_mapped_before(iommu: File, ioas: int, memory: Memory) -> None:
    made = [(memory.map(iommu, ioas, start, length), start, length) for start, length in pieces()
            if start % PAGE == 0 and length % PAGE == 0]  # fmt: skip
    # Without a domain automatic IOVAs begin below the aperture; take the pieces out and put them into it.
    for iova, _, length in made:
        unmap(iommu, ioas, iova, length)
    position, placed = START, []
    for _, start, length in made:
        if memory.fd < 0:
            map_user(iommu, ioas, memory.address + start, length, position)
        else:
            map_file(iommu, ioas, memory.fd, start, length, position)
        placed.append((position, start, length))
        position += length
    check_refs(iommu, memory.address, PAGES * PAGE, 0)
    device = mock_domain(iommu, ioas)
    for iova, start, length in placed:
        check_map(iommu, device.hwpt, iova, length, memory.address + start)
    for page in range(PAGES):
        count = sum(start <= page * PAGE < start + length for _, start, length in placed)
        check_refs(iommu, memory.address + page * PAGE, PAGE, count)
    destroy(iommu, device.stdev)
    check_refs(iommu, memory.address, PAGES * PAGE, 0)


@pytest.mark.since("6.6")
@pytest.mark.usefixtures("limit")
def test_pins_of_an_access_serve_a_copy_in_an_ioas_with_a_domain(iommu: File, ioas: int, memory: Memory) -> None:
    device = mock_domain(iommu, ioas)
    length = PAGES * PAGE
    sources = [ioas_alloc(iommu) for _ in range(2)]
    iovas = [memory.map(iommu, source, 0, length) for source in sources]
    access = create_access(iommu, sources[0])
    for source, iova in zip(sources, iovas, strict=True):
        access_replace(iommu, access, source)
        check_refs(iommu, memory.address, length, 0)
        item = access_pages(iommu, access, iova, length, memory.address)
        copy(iommu, ioas, source, iova, length, START, prot=WRITE)
        check_map(iommu, device.hwpt, START, length, memory.address)
        check_refs(iommu, memory.address, length, 1)
        destroy_pages(iommu, access, item)
        check_refs(iommu, memory.address, length, 1)
        unmap(iommu, ioas, START, length)
        check_refs(iommu, memory.address, length, 0)


def test_memory_that_is_partly_there_is_not_mapped_at_all(iommu: File, ioas: int) -> None:
    mock_domain(iommu, ioas)
    for missing in ({2, 3}, {0}, {3}, {0, 1, 2, 3}):
        with arena(4) as area:
            area.write(area.address, b"\x01" * 4 * PAGE)
            for page in missing:
                area.unmap(page)
            with fails(errno.EFAULT):
                map_user(iommu, ioas, area.address, 4 * PAGE, START)
            for page in set(range(4)) - missing:
                check_refs(iommu, area.page(page), PAGE, 0)
                map_user(iommu, ioas, area.page(page), PAGE, START)
                unmap(iommu, ioas, START, PAGE)


@pytest.mark.since("6.13")
@pytest.mark.needs("memfd")
def test_file_that_ends_too_early_is_not_mapped(iommu: File, ioas: int) -> None:
    mock_domain(iommu, ioas)
    with memfd(2 * PAGE) as fd:
        for length in (2 * PAGE + SMALL, 3 * PAGE):
            with fails(errno.EINVAL):
                map_file(iommu, ioas, fd, 0, length, START)
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, SMALL, 2 * PAGE, START)
        map_file(iommu, ioas, fd, SMALL, PAGE + SMALL, START)


def test_write_to_a_private_page_that_is_mapped_for_reading_does_not_move_it(iommu: File, ioas: int) -> None:
    hwpt = mock_domain(iommu, ioas).hwpt
    with open(sys.executable, "rb") as program:
        view = mmap.mmap(program.fileno(), PAGE, access=mmap.ACCESS_COPY)
    anchor = ctypes.c_char.from_buffer(view)
    address = ctypes.addressof(anchor)
    iova = map_user(iommu, ioas, address, PAGE, prot=READ)
    check_map(iommu, hwpt, iova, PAGE, address)
    view[:] = b"\x01" * PAGE
    check_map(iommu, hwpt, iova, PAGE, address)
    unmap(iommu, ioas, iova, PAGE)
    del anchor
    view.close()


def _map_for_nothing(iommu: File, address: int) -> None:
    fields = {"flags": 0, "vaddr": address, "iova": START, "size": PAGE}
    VFIO_IOMMU_MAP_DMA(iommu, argsz=ctypes.sizeof(vfio_iommu_type1_dma_map), **fields)


@pytest.mark.lacks("mock-generic-pt")
def test_container_could_map_for_neither_reading_nor_writing(kernel: Backend, iommu: File, ioas: int) -> None:
    IOMMU_VFIO_IOAS(iommu, ioas_id=ioas, op=IOMMU_VFIO_IOAS_SET)
    hwpt = mock_domain(iommu, ioas).hwpt
    with contextlib.closing(kernel.buffer(PAGE)) as buffer:
        _map_for_nothing(iommu, buffer.address)
        check_map(iommu, hwpt, START, PAGE, buffer.address)
        unmap(iommu, ioas, START, PAGE)


@pytest.mark.has("mock-generic-pt")
def test_container_may_map_for_neither_reading_nor_writing_only_without_a_domain(kernel: Backend, iommu: File) -> None:
    """With a domain EINVAL, which the kernel warns of; without one it is mapped, and then no domain comes in."""
    other = ioas_alloc(iommu)
    ioas = ioas_alloc(iommu)
    IOMMU_VFIO_IOAS(iommu, ioas_id=ioas, op=IOMMU_VFIO_IOAS_SET)
    device = mock_domain(iommu, other)
    with contextlib.closing(kernel.buffer(PAGE)) as buffer:
        _map_for_nothing(iommu, buffer.address)
        with fails(errno.EINVAL):
            hwpt_alloc(iommu, device.idev, ioas)
        unmap(iommu, ioas, START, PAGE)
        hwpt_alloc(iommu, device.idev, ioas)
        with fails(errno.EINVAL):
            _map_for_nothing(iommu, buffer.address)
        check_refs(iommu, buffer.address, PAGE, 0)


@pytest.mark.since("6.6")
@pytest.mark.since("6.7")
def test_hwpt_in_use_cannot_be_destroyed_until_another_replaces_it(iommu: File, ioas: int) -> None:
    device = mock_domain(iommu, ioas)
    made = [hwpt_alloc(iommu, device.idev, ioas, flags) for flags in (0, IOMMU_HWPT_ALLOC_NEST_PARENT)]
    for hwpt in made:
        assert mock_replace(iommu, device.stdev, hwpt) == hwpt
        with fails(errno.EBUSY):
            destroy(iommu, hwpt)
    mock_replace(iommu, device.stdev, ioas)
    destroy(iommu, made[1])
    other = mock_domain(iommu, made[0])
    with fails(errno.EBUSY):
        destroy(iommu, made[0])
    destroy(iommu, other.stdev)
    destroy(iommu, made[0])
    with fails(errno.ENOENT):
        mock_replace(iommu, device.stdev, made[0])


@pytest.mark.needs("huge_pages")
@pytest.mark.usefixtures("limit")
def test_pieces_of_a_huge_page_are_mapped(kernel: Backend, iommu: File, ioas: int) -> None:
    hwpt = mock_domain(iommu, ioas).hwpt
    size = 2 << 20
    with contextlib.closing(kernel.buffer(size, huge=True)) as huge:
        huge.view[0] = 1
        for start in range(0, size, size // 4):
            for length in (SMALL, PAGE, 3 * SMALL, 64 * PAGE, size - start - SMALL, size - start):
                if start + length <= size:
                    iova = map_user(iommu, ioas, huge.address + start, length)
                    check_map(iommu, hwpt, iova, min(length, 16 * PAGE), huge.address + start)
                    unmap(iommu, ioas, iova, length)
        check_refs(iommu, huge.address, size, 0)
