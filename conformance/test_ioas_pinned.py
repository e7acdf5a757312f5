"""MAP, MAP_FILE and COPY beside a domain: memory is pinned, so bad memory is found out, and nothing half-done stays.

Mirrors iopt_area_fill_domains(), iopt_fill_domain() and the pfn readers of drivers/iommu/iommufd/pages.c. Every test
has a HWPT on its IOAS. What the pins cost is in test_pin_accounting.py; whether the right bytes move, in
test_dma_*.py.
"""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import VfioDevice
from conformance.steps import (
    NOWHERE,
    PAGE,
    READ,
    RW,
    U64_MAX,
    WRITE,
    MiB,
    copy,
    destroy,
    fails,
    ioas_alloc,
    iova_ranges,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC
from uapi.vfio import VFIO_PCI_BAR0_REGION_INDEX

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

IOVA = 0x10_0000


@pytest.fixture
def hwpt(device: VfioDevice, iommu: File, ioas: int) -> int:
    """A HWPT on `ioas`, with no device attached."""
    return IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id


@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("prot", [READ, WRITE, RW], ids=["read", "write", "read_write"])
def test_good_memory_maps(kernel: Backend, iommu: File, ioas: int, prot: int) -> None:
    buffer = kernel.buffer(4 * PAGE)
    assert map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=IOVA, prot=prot) == IOVA
    assert unmap_all(iommu, ioas) == 4 * PAGE


@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("va", [0, NOWHERE, 0x7FFF_FFFF_F000, 0x0001_0000_0000_0000, U64_MAX - 2 * PAGE + 1])
def test_bad_address_is_efault_and_leaves_nothing(iommu: File, ioas: int, va: int) -> None:
    with fails(errno.EFAULT):
        map_user(iommu, ioas, va, PAGE, iova=IOVA)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("hole", [0, 3, 7])
@pytest.mark.parametrize("kind", ["unmapped", "no_access"])
def test_hole_anywhere_is_efault_and_leaves_nothing(iommu: File, ioas: int, hole: int, kind: str) -> None:
    with arena(8) as memory:
        if kind == "unmapped":
            memory.unmap(hole)
        else:
            memory.no_access(hole)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.address, 8 * PAGE, iova=IOVA)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.usefixtures("hwpt")
def test_place_of_a_failed_map_can_be_used(kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(PAGE)
    with fails(errno.EFAULT):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=IOVA)
    assert map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA) == IOVA


@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("prot", [WRITE, RW], ids=["write", "read_write"])
def test_write_to_read_only_memory_is_efault(iommu: File, ioas: int, prot: int) -> None:
    with arena(1) as memory:
        memory.read_only(0)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.address, PAGE, iova=IOVA, prot=prot)


@pytest.mark.usefixtures("hwpt")
def test_read_of_read_only_memory_is_fine(iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.read_only(0)
        assert map_user(iommu, ioas, memory.address, PAGE, iova=IOVA, prot=READ) == IOVA
        unmap_all(iommu, ioas)


@pytest.mark.usefixtures("hwpt")
def test_untouched_memory_is_fine(kernel: Backend, iommu: File, ioas: int) -> None:
    """The pin itself makes the pages."""
    buffer = kernel.buffer(MiB)
    assert map_user(iommu, ioas, buffer.address, MiB, iova=IOVA) == IOVA


@pytest.mark.usefixtures("hwpt")
def test_memory_may_go_while_it_is_pinned(iommu: File, ioas: int) -> None:
    with arena(4) as memory:
        map_user(iommu, ioas, memory.address, 4 * PAGE, iova=IOVA)
    assert unmap(iommu, ioas, IOVA, 4 * PAGE) == 4 * PAGE


@pytest.mark.usefixtures("hwpt")
@pytest.mark.needs("huge_pages")
def test_huge_page_maps(kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(2 * MiB, huge=True)
    assert map_user(iommu, ioas, buffer.address, 2 * MiB, iova=4 * MiB) == 4 * MiB
    assert unmap_all(iommu, ioas) == 2 * MiB


@pytest.mark.usefixtures("hwpt")
def test_registers_of_a_device_are_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    bar = device.map_bar(VFIO_PCI_BAR0_REGION_INDEX)
    with fails(errno.EFAULT):
        map_user(iommu, ioas, bar.address, PAGE, iova=IOVA)


# --------------------------------------------------------------------------------- a domain that comes to lazy areas


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_bad_area_among_good_ones_keeps_the_domain_out(
    device: VfioDevice, kernel: Backend, iommu: File, ioas: int, position: int
) -> None:
    buffer = kernel.buffer(2 * PAGE)
    for index in range(3):
        va = NOWHERE if index == position else buffer.address
        map_user(iommu, ioas, va, 2 * PAGE, iova=IOVA + index * 2 * PAGE)
    with fails(errno.EFAULT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert unmap(iommu, ioas, IOVA + position * 2 * PAGE, 2 * PAGE) == 2 * PAGE
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    assert unmap_all(iommu, ioas) == 4 * PAGE


def test_bad_area_keeps_the_device_out(device: VfioDevice, kernel: Backend, iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=IOVA)
    with fails(errno.EFAULT):
        device.attach(ioas)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    unmap_all(iommu, ioas)
    assert device.attach(ioas) == 3


def test_memory_is_looked_at_when_the_domain_comes(device: VfioDevice, iommu: File, ioas: int) -> None:
    with arena(2) as memory:
        map_user(iommu, ioas, memory.address, 2 * PAGE, iova=IOVA)
        memory.no_access(1)
        with fails(errno.EFAULT):
            device.attach(ioas)
        memory.protect(1, mmap.PROT_READ | mmap.PROT_WRITE)
        device.attach(ioas)


def test_memory_of_a_client_that_is_gone_is_efault(device: VfioDevice, kernel: Backend, iommu: File, ioas: int) -> None:
    with kernel.spawn() as client:
        map_user(client.receive(iommu), ioas, client.allocate(PAGE), PAGE, iova=IOVA)
    with fails(errno.EFAULT):
        device.attach(ioas)


def test_pinned_memory_of_a_client_outlives_it(device: VfioDevice, kernel: Backend, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    with kernel.spawn() as client:
        map_user(client.receive(iommu), ioas, client.allocate(PAGE), PAGE, iova=IOVA)
    assert unmap_all(iommu, ioas) == PAGE


def test_second_domain_takes_pinned_memory_that_is_gone(device: VfioDevice, iommu: File, ioas: int) -> None:
    """The pages come from the first domain: user memory is not looked at again."""
    first = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    with arena(2) as memory:
        map_user(iommu, ioas, memory.address, 2 * PAGE, iova=IOVA)
    second = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    destroy(iommu, first)
    third = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    destroy(iommu, second)
    destroy(iommu, third)
    with fails(errno.EFAULT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)


@pytest.mark.usefixtures("hwpt")
def test_copy_of_a_lazy_area_pins_it(iommu: File, ioas: int) -> None:
    lazy = ioas_alloc(iommu)
    map_user(iommu, lazy, NOWHERE, 4 * PAGE, iova=0)
    with fails(errno.EFAULT):
        copy(iommu, ioas, lazy, 0, PAGE, dst_iova=IOVA)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.usefixtures("hwpt")
def test_copy_pins_only_its_part(iommu: File, ioas: int) -> None:
    lazy = ioas_alloc(iommu)
    with arena(4) as memory:
        map_user(iommu, lazy, memory.address, 4 * PAGE, iova=0)
        memory.unmap(2)
        assert copy(iommu, ioas, lazy, 0, 2 * PAGE, dst_iova=IOVA) == IOVA
        assert copy(iommu, ioas, lazy, 3 * PAGE, PAGE, dst_iova=IOVA + 3 * PAGE) == IOVA + 3 * PAGE
        with fails(errno.EFAULT):
            copy(iommu, ioas, lazy, PAGE, 2 * PAGE, dst_iova=0)
        unmap_all(iommu, ioas)


@pytest.mark.usefixtures("hwpt")
def test_failed_piece_undoes_the_whole_copy(kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(PAGE)
    lazy = ioas_alloc(iommu)
    map_user(iommu, lazy, buffer.address, PAGE, iova=0)
    map_user(iommu, lazy, NOWHERE, PAGE, iova=PAGE)
    with fails(errno.EFAULT):
        copy(iommu, ioas, lazy, 0, 2 * PAGE, dst_iova=IOVA)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.usefixtures("hwpt")
def test_copy_of_pinned_pages_does_not_look_at_memory_again(iommu: File, ioas: int) -> None:
    with arena(2) as memory:
        map_user(iommu, ioas, memory.address, 2 * PAGE, iova=IOVA)
    assert copy(iommu, ioas, ioas, IOVA, 2 * PAGE, dst_iova=2 * IOVA) == 2 * IOVA
    assert unmap(iommu, ioas, IOVA, 2 * PAGE) == 2 * PAGE
    assert copy(iommu, ioas, ioas, 2 * IOVA, PAGE, dst_iova=IOVA) == IOVA


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.since("6.13")
@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize(("start", "length"), [(0, PAGE), (0, 8 * PAGE), (7 * PAGE, PAGE), (3 * PAGE, 2 * PAGE)])
def test_memfd_maps_within_its_size(iommu: File, ioas: int, start: int, length: int) -> None:
    with memfd(8 * PAGE) as fd:
        assert map_file(iommu, ioas, fd, start, length, iova=IOVA) == IOVA
    assert unmap_all(iommu, ioas) == length


@pytest.mark.since("6.13")
@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize(
    ("start", "length"), [(0, 9 * PAGE), (8 * PAGE, PAGE), (7 * PAGE, 2 * PAGE), (64 * PAGE, PAGE), (1 << 40, PAGE)]
)
def test_memfd_beyond_its_size_is_einval(iommu: File, ioas: int, start: int, length: int) -> None:
    with memfd(8 * PAGE) as fd, fails(errno.EINVAL):
        map_file(iommu, ioas, fd, start, length, iova=IOVA)
    assert unmap_all(iommu, ioas) == 0


@pytest.mark.since("6.13")
@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1])
def test_size_of_the_memfd_counts_in_bytes(iommu: File, ioas: int, size: int) -> None:
    """The last byte of the last page must be inside."""
    with memfd(size) as fd:
        if size < PAGE:
            with fails(errno.EINVAL):
                map_file(iommu, ioas, fd, 0, PAGE, iova=IOVA)
        else:
            assert map_file(iommu, ioas, fd, 0, PAGE, iova=IOVA) == IOVA
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, PAGE, PAGE, iova=2 * IOVA)


@pytest.mark.since("6.13")
@pytest.mark.usefixtures("hwpt")
@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/proc/self/exe", "/"])
def test_file_that_is_no_memory_is_einval(iommu: File, ioas: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, 0, PAGE, iova=IOVA, prot=READ)
    finally:
        os.close(fd)


@pytest.mark.since("6.13")
def test_lazy_file_is_found_out_when_the_domain_comes(device: VfioDevice, iommu: File, ioas: int) -> None:
    with memfd(PAGE) as fd:
        map_file(iommu, ioas, fd, 0, 2 * PAGE, iova=IOVA)
        with fails(errno.EINVAL):
            device.attach(ioas)
        os.ftruncate(fd, 2 * PAGE)
        device.attach(ioas)


@pytest.mark.since("6.13")
@pytest.mark.usefixtures("hwpt")
def test_memfd_may_shrink_and_go_while_it_is_pinned(iommu: File, ioas: int) -> None:
    with memfd(4 * PAGE) as fd:
        map_file(iommu, ioas, fd, 0, 4 * PAGE, iova=IOVA)
        os.ftruncate(fd, 0)
    assert unmap_all(iommu, ioas) == 4 * PAGE
