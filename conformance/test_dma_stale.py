"""Nothing stays behind in the IOMMU's caches: what was mapped, how it was mapped, and in which address space.

Each test lets the device use a translation, changes what it came from, and looks that the device does not see the old
state. A kernel that forgets to invalidate passes as long as the hardware happens not to have kept anything. Pages are
marked with their numbers; edu reads a mark a transfer, each of which takes 100 ms of guest time on QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.steps import PAGE, destroy, hwpt_alloc, ioas_alloc, map_user, unmap
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device")

IOVA = 0x10_0000
BLOCK = 2 << 20
#: Aligned as a large page; and where nothing else is mapped.
HERE, THERE = 256 * BLOCK, 257 * BLOCK
TOLD = 0x40_0000


@pytest.fixture
def pages(kernel: Backend) -> Iterator[Buffer]:
    """Eight pages, each marked with its number from 1."""
    buffer = kernel.buffer(8 * PAGE)
    mark(buffer, 8)
    yield buffer
    buffer.close()


@pytest.fixture
def eye(kernel: Backend, edu: Edu, iommu: File, ioas: int) -> Iterator[Eye]:
    """What the device reads, told through a page of the client's that is mapped at TOLD."""
    with Eye(kernel, edu, iommu) as found:
        found.open(ioas)
        yield found


class Eye:
    """Marks as the device sees them."""

    def __init__(self, kernel: Backend, edu: Edu, iommu: File) -> None:
        self._edu, self._iommu = edu, iommu
        self._page = kernel.buffer(PAGE)
        self._count = 0

    def __enter__(self) -> Eye:
        return self

    def __exit__(self, *_: object) -> None:
        self._page.close()

    def open(self, ioas: int) -> None:
        """Have the page in this IOAS, too."""
        map_user(self._iommu, ioas, self._page.address, PAGE, TOLD)

    def look(self, iova: int, *numbers: int) -> None:
        """The device reads the marks of some pages from an IOVA on into its own buffer."""
        for index, number in enumerate(numbers):
            self._edu.load(iova + number * PAGE, 4, at=4 * index)
        self._count = len(numbers)

    def tell(self) -> list[int]:
        """What it has read: the marks, 0 for pages that it may not read."""
        self._edu.store(TOLD, 4 * self._count)
        return [int.from_bytes(self._page.view[4 * n : 4 * n + 4], "little") for n in range(self._count)]

    def sees(self, iova: int, *numbers: int) -> list[int]:
        self.look(iova, *numbers)
        return self.tell()


def mark(buffer: Buffer, count: int, first: int = 1) -> None:
    for number in range(count):
        buffer.view[number * PAGE : number * PAGE + 4] = (first + number).to_bytes(4, "little")


# ------------------------------------------------------------------------------------------------------- which pages


def test_every_page_of_an_area_goes_with_it(eye: Eye, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 5 * PAGE, IOVA)
    assert eye.sees(IOVA, 0, 3, 4) == [1, 4, 5]
    unmap(iommu, ioas, IOVA, 5 * PAGE)
    assert eye.sees(IOVA, 0, 3, 4) == [0, 0, 0]


def test_every_page_that_was_found_absent_is_there_after_map(eye: Eye, iommu: File, ioas: int, pages: Buffer) -> None:
    assert eye.sees(IOVA, 0, 2) == [0, 0]
    map_user(iommu, ioas, pages.address, 3 * PAGE, IOVA)
    assert eye.sees(IOVA, 0, 2) == [1, 3]


def test_area_next_to_one_that_goes_stays(eye: Eye, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    map_user(iommu, ioas, pages.address + 2 * PAGE, 2 * PAGE, IOVA + 2 * PAGE)
    assert eye.sees(IOVA, 1, 2) == [2, 3]
    unmap(iommu, ioas, IOVA, 2 * PAGE)
    assert eye.sees(IOVA, 1, 2) == [0, 3]


@pytest.mark.needs("nesting")
def test_every_page_of_a_nest_parent_goes_with_its_area(
    eye: Eye, edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    """Such a domain has tables of the second stage, whatever the others have."""
    edu.vfio.attach(hwpt_alloc(iommu, edu.vfio.devid, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT))
    map_user(iommu, ioas, pages.address, 5 * PAGE, IOVA)
    assert eye.sees(IOVA, 0, 4) == [1, 5]
    unmap(iommu, ioas, IOVA, 5 * PAGE)
    assert eye.sees(IOVA, 0, 4) == [0, 0]


# ------------------------------------------------------------------------------------------------------------ tables


def test_table_of_pages_that_are_gone_is_not_used_again(
    eye: Eye, kernel: Backend, iommu: File, ioas: int, pages: Buffer
) -> None:
    """Unmapping a whole table's pages frees it, and the next mapping elsewhere may get it."""
    buffer = kernel.buffer(BLOCK + PAGE)
    mark(buffer, 2, 0x100)
    start = PAGE if buffer.address % BLOCK == 0 else 0  # nothing that a large page could map
    map_user(iommu, ioas, buffer.address + start, BLOCK, HERE)
    assert eye.sees(HERE, 0) == [0x100 + start // PAGE]
    unmap(iommu, ioas, HERE, BLOCK)
    map_user(iommu, ioas, pages.address, 4 * PAGE, THERE)
    assert eye.sees(HERE, 0, 1) == [0, 0]
    map_user(iommu, ioas, pages.address + 4 * PAGE, 4 * PAGE, HERE)
    assert eye.sees(HERE, 0, 1) == [5, 6]
    unmap(iommu, ioas, HERE, 4 * PAGE)
    unmap(iommu, ioas, THERE, 4 * PAGE)
    buffer.close()


@pytest.mark.needs("huge_pages")
def test_large_page_after_pages_that_went_one_by_one(
    eye: Eye, kernel: Backend, iommu: File, ioas: int, pages: Buffer
) -> None:
    """Pages that go by themselves leave their table behind, empty; a large page takes its place."""
    map_user(iommu, ioas, pages.address, PAGE, HERE)
    assert eye.sees(HERE, 0) == [1]
    unmap(iommu, ioas, HERE, PAGE)
    huge = kernel.buffer(BLOCK, huge=True)
    mark(huge, 4, 0x200)
    map_user(iommu, ioas, huge.address, BLOCK, HERE)
    assert eye.sees(HERE, 0, 3) == [0x200, 0x203]
    unmap(iommu, ioas, HERE, BLOCK)
    assert eye.sees(HERE, 1) == [0]
    huge.close()


@pytest.mark.needs("huge_pages")
def test_pages_after_a_large_one(eye: Eye, kernel: Backend, iommu: File, ioas: int, pages: Buffer) -> None:
    huge = kernel.buffer(BLOCK, huge=True)
    mark(huge, 4, 0x200)
    map_user(iommu, ioas, huge.address, BLOCK, HERE)
    assert eye.sees(HERE, 0) == [0x200]
    unmap(iommu, ioas, HERE, BLOCK)
    map_user(iommu, ioas, pages.address, 2 * PAGE, HERE)
    assert eye.sees(HERE, 0, 1, 2) == [1, 2, 0]
    unmap(iommu, ioas, HERE, 2 * PAGE)
    huge.close()


# ---------------------------------------------------------------------------------------------------- address spaces


def test_device_sees_the_address_space_it_is_attached_to_last(
    eye: Eye, edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    other = ioas_alloc(iommu)
    eye.open(other)
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    map_user(iommu, other, pages.address + 2 * PAGE, PAGE, IOVA)
    assert eye.sees(IOVA, 0, 1) == [1, 2]
    edu.vfio.detach()
    edu.vfio.attach(other)
    assert eye.sees(IOVA, 0, 1) == [3, 0]


@pytest.mark.parametrize(
    "flags",
    [0, pytest.param(IOMMU_HWPT_ALLOC_NEST_PARENT, marks=pytest.mark.needs("nesting"))],
    ids=["plain", "nest_parent"],
)
def test_detached_device_sees_nothing_though_its_pages_stay_mapped(
    eye: Eye, edu: Edu, iommu: File, ioas: int, pages: Buffer, flags: int
) -> None:
    keeper = hwpt_alloc(iommu, edu.vfio.devid, ioas, flags)
    edu.vfio.attach(keeper)
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    assert eye.sees(IOVA, 0) == [1]
    edu.vfio.detach()
    eye.look(IOVA, 0, 1)
    edu.vfio.attach(keeper)
    assert eye.tell() == [0, 0]
    assert eye.sees(IOVA, 0, 1) == [1, 2]


def test_replace_between_two_hwpts_of_one_ioas_forgets_nothing_that_is_mapped(
    eye: Eye, edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    first, second = (hwpt_alloc(iommu, edu.vfio.devid, ioas) for _ in range(2))
    edu.vfio.attach(first)
    assert eye.sees(IOVA, 0) == [1]
    edu.vfio.attach(second)
    destroy(iommu, first)
    assert eye.sees(IOVA, 1) == [2]
    unmap(iommu, ioas, IOVA, 2 * PAGE)
    assert eye.sees(IOVA, 0, 1) == [0, 0]


def test_address_space_that_went_leaves_nothing_to_the_next_with_its_place(
    eye: Eye, edu: Edu, iommu: File, pages: Buffer
) -> None:
    """The next one may have the same domain id, ASID or VMID, and the same pages for its tables."""
    edu.vfio.detach()
    first = ioas_alloc(iommu)
    eye.open(first)
    map_user(iommu, first, pages.address, 3 * PAGE, IOVA)
    edu.vfio.attach(first)
    assert eye.sees(IOVA, 0, 1) == [1, 2]
    edu.vfio.detach()
    destroy(iommu, first)
    second = ioas_alloc(iommu)
    eye.open(second)
    map_user(iommu, second, pages.address + 4 * PAGE, PAGE, IOVA + 2 * PAGE)
    edu.vfio.attach(second)
    assert eye.sees(IOVA, 0, 1, 2) == [0, 0, 5]
