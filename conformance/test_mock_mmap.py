"""mmap(2) of /dev/iommu: the two pages that a vIOMMU of the mock driver publishes.

Mirrors iommufd_fops_mmap() of drivers/iommu/iommufd/main.c, _iommufd_alloc_mmap() of driver.c and mock_viommu_init() of
selftest.c.
"""

from __future__ import annotations

import errno

import pytest

from conformance.mock import APERTURE
from conformance.mock_guest import PUBLISHED, Guest, guest, publish, viommu_alloc
from conformance.steps import PAGE, READ, RW, destroy, fails, map_user
from uapi.backend import MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, Backend, File
from uapi.iommufd import IOMMU_IOAS_ALLOC

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.17")]

SIZE = PUBLISHED


@pytest.fixture
def ids(iommu: File) -> Guest:
    return guest(iommu)


# -- offsets ---------------------------------------------------------------------------------------------------------


def test_offsets_are_the_lowest_free_from_the_second_page_on(iommu: File, ids: Guest) -> None:
    found = [publish(iommu, ids) for _ in range(4)]
    assert [offset for _, offset in found] == [PAGE, 3 * PAGE, 5 * PAGE, 7 * PAGE]
    for index in (2, 0):
        destroy(iommu, found[index][0])
    assert [publish(iommu, ids)[1] for _ in range(3)] == [PAGE, 5 * PAGE, 9 * PAGE]


def test_offsets_are_of_the_context(kernel: Backend, iommu: File, ids: Guest) -> None:
    publish(iommu, ids)
    with kernel.open("/dev/iommu") as other:
        with fails(errno.ENXIO):
            other.mmap(SIZE, PAGE)
        assert publish(other, guest(other))[1] == PAGE


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, SIZE),
        (0, 3 * PAGE),
        (PAGE, PAGE),
        (PAGE, 3 * PAGE),
        (2 * PAGE, PAGE),
        (2 * PAGE, SIZE),
        (3 * PAGE, SIZE),
        (1 << 40, SIZE),
        ((1 << 63) - 4 * PAGE, SIZE),
    ],
)
def test_only_a_whole_range_can_be_mapped(iommu: File, ids: Guest, offset: int, length: int) -> None:
    publish(iommu, ids)
    with fails(errno.ENXIO):
        iommu.mmap(length, offset)


def test_length_is_rounded_up_to_pages(iommu: File, ids: Guest) -> None:
    _, offset = publish(iommu, ids)
    with iommu.mmap(SIZE - PAGE + 1, offset) as mapping:
        assert mapping.length == SIZE
    with fails(errno.ENXIO):
        iommu.mmap(SIZE + 1, offset)


def test_refusals_come_in_order(iommu: File, ids: Guest) -> None:
    publish(iommu, ids)
    for flags, prot, offset, number in (
        (MAP_PRIVATE, PROT_READ | PROT_EXEC, 0, errno.EINVAL),
        (MAP_PRIVATE, PROT_READ, PAGE, errno.EINVAL),
        (MAP_SHARED, PROT_READ | PROT_EXEC, 0, errno.EPERM),
        (MAP_SHARED, PROT_EXEC, PAGE, errno.EPERM),
        (MAP_SHARED, PROT_READ, 0, errno.ENXIO),
        (MAP_SHARED, PROT_READ, PAGE + 1, errno.EINVAL),
    ):
        with fails(number):
            iommu.mmap(SIZE, offset, prot, flags)


def test_viommu_without_data_publishes_nothing(iommu: File, ids: Guest) -> None:
    viommu_alloc(iommu, ids.idev, ids.parent)
    with fails(errno.ENXIO):
        iommu.mmap(SIZE, PAGE)


def test_range_goes_with_its_owner(iommu: File, ids: Guest) -> None:
    viommu, offset = publish(iommu, ids)
    destroy(iommu, viommu)
    with fails(errno.ENXIO):
        iommu.mmap(SIZE, offset)


# -- contents --------------------------------------------------------------------------------------------------------


def test_first_word_is_what_the_caller_gave_and_the_rest_zero(kernel: Backend, iommu: File, ids: Guest) -> None:
    _, offset = publish(iommu, ids, 0x1234_5678)
    with iommu.mmap(SIZE, offset) as mapping:
        assert mapping.read(0, 4) == 0x1234_5678
        assert bytes(mapping.view[4:]) == bytes(SIZE - 4)


def test_mappings_of_one_range_are_the_same_memory(iommu: File, ids: Guest) -> None:
    _, offset = publish(iommu, ids)
    with iommu.mmap(SIZE, offset) as one, iommu.mmap(SIZE, offset) as two:
        one.write(PAGE, 4, 0xCAFE)
        assert two.read(PAGE, 4) == 0xCAFE
        two.view[8] = 0x5A
        assert one.view[8] == 0x5A
        assert one.read(8, 1) == 0x5A


def test_contents_stay_while_the_range_does(iommu: File, ids: Guest) -> None:
    viommu, offset = publish(iommu, ids)
    with iommu.mmap(SIZE, offset) as mapping:
        mapping.write(SIZE - 8, 8, 0x0102_0304_0506_0708)
    with iommu.mmap(SIZE, offset, PROT_READ) as mapping:
        assert mapping.read(SIZE - 8, 8) == 0x0102_0304_0506_0708
    destroy(iommu, viommu)
    assert publish(iommu, ids, 1)[1] == offset
    with iommu.mmap(SIZE, offset) as mapping:
        assert bytes(mapping.view) == b"\1".ljust(SIZE, b"\0")


def test_ranges_do_not_touch(iommu: File, ids: Guest) -> None:
    (_, first), (_, second) = publish(iommu, ids, 1), publish(iommu, ids, 2)
    with iommu.mmap(SIZE, first) as one, iommu.mmap(SIZE, second) as two:
        one.view[:] = b"\xff" * SIZE
        assert two.read(0, 4) == 2
        assert bytes(two.view[4:]) == bytes(SIZE - 4)


def test_pages_are_no_memory_that_a_domain_may_have(iommu: File, ids: Guest) -> None:
    """As a mapping of registers: calls read it, nobody can pin it."""
    _, offset = publish(iommu, ids, IOMMU_IOAS_ALLOC.size)
    with iommu.mmap(SIZE, offset) as mapping:
        for prot in (READ, RW):
            with fails(errno.EFAULT):
                map_user(iommu, ids.ioas, mapping.address, PAGE, APERTURE[0], prot)
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, mapping.address)
        assert mapping.read(8, 4) == ids.viommu + 2


# -- lifetime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE])
def test_mapping_keeps_its_owner(iommu: File, ids: Guest, prot: int) -> None:
    viommu, offset = publish(iommu, ids)
    one, two = iommu.mmap(SIZE, offset, prot), iommu.mmap(SIZE, offset, prot)
    for mapping in (one, two):
        with fails(errno.EBUSY):
            destroy(iommu, viommu)
        mapping.close()
    destroy(iommu, viommu)


def test_refused_mapping_keeps_nothing(iommu: File, ids: Guest) -> None:
    viommu, offset = publish(iommu, ids)
    with fails(errno.ENXIO):
        iommu.mmap(PAGE, offset)
    destroy(iommu, viommu)


def test_mapping_outlives_the_descriptor(kernel: Backend, iommu: File, ids: Guest) -> None:
    _, offset = publish(iommu, ids)
    mapping = iommu.mmap(SIZE, offset)
    iommu.close()
    mapping.write(4, 4, 7)
    assert (mapping.read(0, 4), mapping.read(4, 4)) == (0xBEEF, 7)
    mapping.close()
    with kernel.open("/dev/iommu") as again:
        assert guest(again) == ids


def test_other_objects_go_on_while_mapped(iommu: File, ids: Guest) -> None:
    viommu, offset = publish(iommu, ids)
    other, _ = publish(iommu, ids)
    with iommu.mmap(SIZE, offset):
        destroy(iommu, other)
        destroy(iommu, ids.viommu)
        with fails(errno.EBUSY):
            destroy(iommu, viommu)
        with fails(errno.EBUSY):
            destroy(iommu, ids.parent)
