"""HWPT_INVALIDATE of VT-d's nested HWPTs: entries, the count that is written back, and what the device reaches then.

Mirrors intel_nested_cache_invalidate_user() of drivers/iommu/intel/nested.c. What iommufd itself checks is in
test_mock_invalidate. That a device must see a change after the invalidation holds everywhere; whether it goes on with
the old translation before depends on the hardware's caches, and is not asked here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.arena import arena
from conformance.drivers.edu import Edu
from conformance.drivers.fixtures import vtd_guest
from conformance.steps import NOWHERE, PAGE, U32_MAX, U64_MAX, MiB, answer, fails
from conformance.vtd_guest import ENTRY_LENGTH, Guest, entries, flush, invalidation
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_HWPT_INVALIDATE,
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    IOMMU_VTD_INV_FLAGS_LEAF,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd", "nesting")]

LEAF = IOMMU_VTD_INV_FLAGS_LEAF
ALL = (0, U64_MAX)
VA = 0x4000_0000
PATTERN, OLD = bytes(range(256)), b"\xa5" * 256
GOOD = entries((PAGE, 1))

guest = vtd_guest


@pytest.fixture
def nested(guest: Guest) -> int:
    """A nested HWPT (4)."""
    return guest.nested()


def invalidate(iommu: File, hwpt: int, data: bytes | int, number: int, **fields: int) -> tuple[int, int]:
    """The errno of a call, 0 for success, and the entry_num after it."""
    arg = invalidation(hwpt, data, number, **fields)
    return answer(IOMMU_HWPT_INVALIDATE.raw, iommu, arg), arg.entry_num


# -------------------------------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize(
    "entry",
    [
        (0, 0),
        (0, 1),
        (0, 1, LEAF),
        ALL,
        (*ALL, LEAF),
        (0, U64_MAX - 1),
        (PAGE, 0),
        (PAGE, 1),
        (PAGE, U64_MAX - 1),
        (3 * PAGE, 5, LEAF),
        (U64_MAX - PAGE + 1, 1),
        (U64_MAX - PAGE + 1, 2),
        (1 << 63, 1 << 52),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_good_entry(guest: Guest, nested: int, entry: tuple[int, ...], attached: bool) -> None:
    if attached:
        guest.device.attach(nested)
    assert invalidate(guest.iommu, nested, entries(entry), 1) == (0, 1)


@pytest.mark.parametrize(
    ("bad", "number"),
    [
        ((0, 1, 2), errno.EOPNOTSUPP),
        ((0, 1, U32_MAX), errno.EOPNOTSUPP),
        ((0, 1, 0, 1), errno.EOPNOTSUPP),
        ((1, 1, 2), errno.EOPNOTSUPP),
        ((1, 1, 0, 1), errno.EOPNOTSUPP),
        ((1, 1), errno.EINVAL),
        ((2048, 0), errno.EINVAL),
        ((PAGE - 1, U64_MAX), errno.EINVAL),
        ((PAGE, U64_MAX), errno.EINVAL),
        ((U64_MAX, 1), errno.EINVAL),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_bad_entry_ends_the_array_and_those_before_count(
    guest: Guest, nested: int, bad: tuple[int, ...], number: int, before: int
) -> None:
    data = entries(*[(PAGE, 1)] * before, bad, (PAGE, 1))
    assert invalidate(guest.iommu, nested, data, before + 2) == (number, before)


@pytest.mark.parametrize("length", [1, 8, 16, 20, 23])
def test_shorter_entry_is_einval(guest: Guest, nested: int, length: int) -> None:
    assert invalidate(guest.iommu, nested, GOOD, 1, entry_len=length) == (errno.EINVAL, 0)


@pytest.mark.parametrize("length", [25, 32, PAGE])
def test_longer_entry_is_einval_even_with_zeroes_behind(guest: Guest, nested: int, length: int) -> None:
    assert invalidate(guest.iommu, nested, GOOD + bytes(PAGE), 1, entry_len=length) == (errno.EINVAL, 0)


@pytest.mark.parametrize("kind", [IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3, 2, U32_MAX])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_entries_of_another_type_are_einval_even_without_any(guest: Guest, nested: int, kind: int, number: int) -> None:
    assert invalidate(guest.iommu, nested, GOOD * 2, number, data_type=kind) == (errno.EINVAL, 0)


def test_no_entries_ask_for_the_type_alone(guest: Guest, nested: int) -> None:
    for address, length in ((0, 0), (0, ENTRY_LENGTH), (8, 5), (U64_MAX, U32_MAX)):
        assert invalidate(guest.iommu, nested, address, 0, entry_len=length) == (0, 0)


def test_entries_up_to_the_first_that_cannot_be_read(guest: Guest, nested: int) -> None:
    assert invalidate(guest.iommu, nested, NOWHERE, 1) == (errno.EFAULT, 0)
    with arena(2) as memory:
        memory.write(memory.page(1) - 2 * ENTRY_LENGTH - 12, GOOD * 2)
        memory.unmap(1)
        assert invalidate(guest.iommu, nested, memory.page(1) - 2 * ENTRY_LENGTH - 12, 4) == (errno.EFAULT, 2)


def test_parent_and_plain_hwpt_have_no_such_cache(guest: Guest, nested: int) -> None:
    for target in (guest.parent, guest.ioas, guest.device.devid):
        assert invalidate(guest.iommu, target, GOOD, 1) == (errno.EINVAL, 0)


@pytest.mark.parametrize("number", [512, 10_000])
def test_many_entries(kernel: Backend, guest: Guest, nested: int, number: int) -> None:
    guest.device.attach(nested)
    buffer = kernel.buffer(number * ENTRY_LENGTH)
    buffer.view[:] = entries((VA, 1)) * number
    assert invalidate(guest.iommu, nested, buffer.address, number) == (0, number)
    buffer.view[-ENTRY_LENGTH:] = entries((1, 1))
    assert invalidate(guest.iommu, nested, buffer.address, number) == (errno.EINVAL, number - 1)
    buffer.close()


# ------------------------------------------------------------------------------------------------ what the device sees


@pytest.fixture
def running(kernel: Backend, iommu: File, edu: Edu, ioas: int) -> Iterator[Guest]:
    """A guest whose page VA is its page -1; the device holds PATTERN and is attached to its nested HWPT `hwpt`."""
    guest = Guest(kernel, iommu, edu.vfio, ioas)
    edu.vfio.attach(guest.parent)
    guest.write(guest.page(-1), PATTERN)
    edu.load(guest.page(-1), 256)
    guest.map(VA, guest.page(-1))
    guest.hwpt = edu.vfio.attach(guest.nested())
    yield guest
    guest.buffer.close()


def reached(edu: Edu, guest: Guest, va: int = VA) -> int | None:
    """Which of the guest's last three pages a write to `va` reaches: -1, -2, -3 or None."""
    for index in (-1, -2, -3):
        guest.write(guest.page(index), OLD)
    edu.store(va, 256)
    found = [index for index in (-1, -2, -3) if guest.read(guest.page(index), 256) == PATTERN]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize(
    "entry",
    [
        (VA, 1),
        (VA, 1, LEAF),
        (VA - PAGE, 2),
        (VA - 5 * PAGE, 6),
        (VA, 512),
        (VA, 0),
        (0, 0),
        (VA - 16 * MiB, 1 << 20),
        ALL,
        (*ALL, LEAF),
        (0, U64_MAX - 1),
    ],
)
def test_change_of_the_guests_tables_counts_after_an_entry_that_covers_it(
    running: Guest, edu: Edu, entry: tuple[int, ...]
) -> None:
    """An entry without pages covers the block around its address, and all if that is 0."""
    assert reached(edu, running) == -1
    running.map(VA, running.page(-2))
    assert flush(running.iommu, running.hwpt, entry) == 1
    assert reached(edu, running) == -2


def test_entry_taken_away_counts_after_the_invalidation(running: Guest, edu: Edu) -> None:
    assert reached(edu, running) == -1
    running.map(VA, running.page(-1), 0)
    flush(running.iommu, running.hwpt, (VA, 1))
    assert reached(edu, running) is None


def test_entries_before_a_bad_one_are_done(running: Guest, edu: Edu) -> None:
    assert reached(edu, running) == -1
    running.map(VA, running.page(-2))
    data = entries((VA, 1), (1, 1))
    assert invalidate(running.iommu, running.hwpt, data, 2) == (errno.EINVAL, 1)
    assert reached(edu, running) == -2


def test_large_page_of_the_guest_goes_with_all_its_pages(running: Guest, edu: Edu) -> None:
    large = VA + (1 << 30)
    offset = running.page(-1) - running.page(0)
    running.map(large, running.page(0), level=1)
    assert reached(edu, running, large + offset) == -1
    running.write(running.slot(large, 1), bytes(8))
    flush(running.iommu, running.hwpt, (large, 512))
    assert reached(edu, running, large + offset) is None


def test_each_nested_hwpt_has_a_cache_of_its_own(running: Guest, edu: Edu) -> None:
    """The tables of two hwpts give one address two meanings; each keeps its own, whatever is invalidated."""
    first = running.hwpt
    running.root = running.new_table()
    running.map(VA, running.page(-2))
    second = running.nested()
    for _ in range(2):
        assert reached(edu, running) == -1
        edu.vfio.attach(second)
        flush(running.iommu, first, ALL)
        assert reached(edu, running) == -2
        flush(running.iommu, second, ALL)
        edu.vfio.attach(first)


def test_detached_hwpt_is_invalidated_for_nothing(running: Guest, edu: Edu) -> None:
    assert reached(edu, running) == -1
    first = running.hwpt
    edu.vfio.attach(running.parent)
    running.map(VA, running.page(-3))
    edu.vfio.attach(first)  # attaching it anew is invalidation enough
    assert reached(edu, running) == -3
    with fails(errno.EINVAL):
        flush(running.iommu, running.parent, ALL)
