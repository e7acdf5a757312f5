"""IOMMU_HWPT_INVALIDATE of a nested HWPT: its entries, and the count that is written back in every case.

Mirrors iommufd_hwpt_invalidate() of drivers/iommu/iommufd/hw_pagetable.c and mock_domain_cache_invalidate_user() of
selftest.c. The checks that need no object are in test_viommu_errors.py, vIOMMUs in test_mock_viommu.py.
"""

from __future__ import annotations

import errno
import struct

import pytest

from conformance.arena import Arena, arena
from conformance.mock import INVALIDATION, check_iotlb, mock_domain, mock_replace, nest_parent, nested_alloc
from conformance.steps import PAGE, U32_MAX, U64_MAX, answer, fails, hwpt_alloc, ioas_alloc, place
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, IOMMU_HWPT_INVALIDATE, iommu_hwpt_invalidate

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.8")]

ALL = abi.IOMMU_TEST_INVALIDATE_FLAG_ALL
#: What each word holds at first.
W = 0x5A
ENTRIES_MAX = 1 << 19


@pytest.fixture
def nested(iommu: File) -> int:
    """A nested HWPT (5) on a parent (... 4) of a mock device (2, 3)."""
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    return nested_alloc(iommu, device.idev, nest_parent(iommu, device.idev, ioas), iotlb=W)


def entries(*pairs: tuple[int, int]) -> bytes:
    """Entries of (flags, word)."""
    return b"".join(struct.pack("<II", *pair) for pair in pairs)


def request(nested: int, data: bytes | int, number: int, **fields: int) -> iommu_hwpt_invalidate:
    """The block of a call, with the data placed, or at an address."""
    address = place(data) if isinstance(data, bytes) else data
    given = {"hwpt_id": nested, "data_uptr": address, "data_type": INVALIDATION, "entry_len": 8, "entry_num": number}
    return IOMMU_HWPT_INVALIDATE.make(**(given | fields))


def invalidate(iommu: File, nested: int, data: bytes | int, number: int, **fields: int) -> tuple[int, int]:
    """The errno of a call, 0 for success, and the entry_num after it."""
    arg = request(nested, data, number, **fields)
    return answer(IOMMU_HWPT_INVALIDATE.raw, iommu, arg), arg.entry_num


# -- entries ---------------------------------------------------------------------------------------------------------


def test_entries_zero_their_words(iommu: File, nested: int) -> None:
    assert invalidate(iommu, nested, entries((0, 1)), 1) == (0, 1)
    check_iotlb(iommu, nested, W, 0, W, W)
    assert invalidate(iommu, nested, entries((0, 3), (0, 0)), 2) == (0, 2)
    check_iotlb(iommu, nested, 0, 0, W, 0)
    assert invalidate(iommu, nested, entries((0, 2), (0, 2), (0, 2)), 3) == (0, 3)
    check_iotlb(iommu, nested, 0, 0, 0, 0)


def test_only_as_many_entries_as_are_counted(iommu: File, nested: int) -> None:
    assert invalidate(iommu, nested, entries((0, 0), (0, 1), (0, 2)), 2) == (0, 2)
    check_iotlb(iommu, nested, 0, 0, W, W)


@pytest.mark.parametrize("word", [0, 3])
def test_flag_all_zeroes_every_word(iommu: File, nested: int, word: int) -> None:
    assert invalidate(iommu, nested, entries((ALL, word)), 1) == (0, 1)
    check_iotlb(iommu, nested, 0, 0, 0, 0)


def test_other_hwpt_keeps_its_words(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    parent = nest_parent(iommu, device.idev, ioas)
    first, second = (nested_alloc(iommu, device.idev, parent, iotlb=W) for _ in range(2))
    assert invalidate(iommu, first, entries((ALL, 0)), 1) == (0, 1)
    check_iotlb(iommu, second, W, W, W, W)


def test_attached_or_not_is_the_same(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    nested = nested_alloc(iommu, device.idev, nest_parent(iommu, device.idev, ioas), iotlb=W)
    mock_replace(iommu, device.stdev, nested)
    assert invalidate(iommu, nested, entries((0, 2)), 1) == (0, 1)
    mock_replace(iommu, device.stdev, ioas)
    check_iotlb(iommu, nested, W, W, 0, W)


@pytest.mark.parametrize("number", [512, 4096, 10_000])
def test_many_entries(kernel: Backend, iommu: File, nested: int, number: int) -> None:
    buffer = kernel.buffer(number * 8)
    buffer.view[:] = entries((0, 2)) * number
    buffer.view[-8:] = entries((0, 1))
    assert invalidate(iommu, nested, buffer.address, number) == (0, number)
    check_iotlb(iommu, nested, W, 0, 0, W)


# -- errors in an entry: what came before is done, and counted -------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "number"),
    [
        pytest.param((2, 1), errno.EOPNOTSUPP, id="flag"),
        pytest.param((U32_MAX, 1), errno.EOPNOTSUPP, id="flags"),
        pytest.param((ALL | 2, 1), errno.EOPNOTSUPP, id="flag_beside_all"),
        pytest.param((0, 4), errno.EINVAL, id="word"),
        pytest.param((0, U32_MAX), errno.EINVAL, id="words_end"),
        pytest.param((ALL, 4), errno.EINVAL, id="word_with_all"),
        pytest.param((2, 4), errno.EOPNOTSUPP, id="flag_before_word"),
    ],
)
def test_entries_stop_at_the_first_bad_one(iommu: File, nested: int, bad: tuple[int, int], number: int) -> None:
    assert invalidate(iommu, nested, entries(bad, (0, 0)), 2) == (number, 0)
    check_iotlb(iommu, nested, W, W, W, W)
    assert invalidate(iommu, nested, entries((0, 0), bad, (0, 1)), 3) == (number, 1)
    check_iotlb(iommu, nested, 0, W, W, W)
    assert invalidate(iommu, nested, entries((0, 3), (0, 2), bad), 3) == (number, 2)
    check_iotlb(iommu, nested, 0, W, 0, 0)


@pytest.mark.parametrize("good", [1023, 1024, 1025, 2047])
def test_bad_entry_far_in(kernel: Backend, iommu: File, nested: int, good: int) -> None:
    buffer = kernel.buffer(4096 * 8)
    buffer.view[:] = entries((0, 0)) * good + entries((4, 1)) + entries((0, 2)) * (4095 - good)
    assert invalidate(iommu, nested, buffer.address, 4096) == (errno.EOPNOTSUPP, good)
    check_iotlb(iommu, nested, 0, W, W, W)


@pytest.mark.parametrize("readable", [0, 1, 2, 511])
def test_entry_that_cannot_be_read_is_efault_at_its_turn(iommu: File, nested: int, readable: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        start = memory.page(1) - readable * 8
        memory.write(start, entries((0, 1)) * readable)
        assert invalidate(iommu, nested, start, readable + 2) == (errno.EFAULT, readable)
    check_iotlb(iommu, nested, W, 0 if readable else W, W, W)


def test_entry_half_in_memory_is_efault(iommu: File, nested: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 12, entries((0, 1)) + bytes(4))
        assert invalidate(iommu, nested, memory.page(1) - 12, 2) == (errno.EFAULT, 1)


@pytest.mark.parametrize("address", [8, U64_MAX - 7, U64_MAX], ids=["low", "last", "wraps"])
def test_entries_in_no_memory_are_efault(iommu: File, nested: int, address: int) -> None:
    assert invalidate(iommu, nested, address, 1) == (errno.EFAULT, 0)


def test_entries_need_no_alignment(kernel: Backend, iommu: File, nested: int) -> None:
    buffer = kernel.buffer(PAGE)
    buffer.view[3:19] = entries((0, 1), (0, 3))
    assert invalidate(iommu, nested, buffer.address + 3, 2) == (0, 2)
    check_iotlb(iommu, nested, W, 0, W, 0)


# -- the description of the entries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 7, 9, 12, 16, 4095, 4096])
def test_entry_of_another_length_is_einval_even_with_zeroes_behind(iommu: File, nested: int, length: int) -> None:
    assert invalidate(iommu, nested, bytes(PAGE), 1, entry_len=length) == (errno.EINVAL, 0)
    check_iotlb(iommu, nested, W, W, W, W)


@pytest.mark.parametrize("kind", [0, 1, abi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID, U32_MAX])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_entries_of_another_type_are_einval_even_without_any(iommu: File, nested: int, kind: int, number: int) -> None:
    assert invalidate(iommu, nested, entries((0, 0), (0, 1)), number, data_type=kind) == (errno.EINVAL, 0)
    check_iotlb(iommu, nested, W, W, W, W)


@pytest.mark.parametrize(("address", "length"), [(0, 0), (0, 8), (8, 0), (8, 8), (8, 5000), (U64_MAX, U32_MAX)])
def test_no_entries_ask_for_the_type_alone(iommu: File, nested: int, address: int, length: int) -> None:
    assert invalidate(iommu, nested, address, 0, entry_len=length) == (0, 0)
    check_iotlb(iommu, nested, W, W, W, W)


def test_entries_at_null_are_einval(iommu: File, nested: int) -> None:
    assert invalidate(iommu, nested, 0, 1) == (errno.EINVAL, 0)


def test_entries_without_a_length_are_einval(iommu: File, nested: int) -> None:
    assert invalidate(iommu, nested, bytes(8), 1, entry_len=0) == (errno.EINVAL, 0)


@pytest.mark.parametrize("length", [4097, U32_MAX])
def test_entry_longer_than_a_page_is_einval(iommu: File, nested: int, length: int) -> None:
    assert invalidate(iommu, nested, bytes(8), 1, entry_len=length) == (errno.EINVAL, 0)


@pytest.mark.has("invalidate-caps")
@pytest.mark.parametrize("number", [ENTRIES_MAX + 1, U32_MAX])
def test_more_entries_than_the_most_are_einval_and_none_is_done(iommu: File, nested: int, number: int) -> None:
    assert invalidate(iommu, nested, entries((0, 0)), number) == (errno.EINVAL, 0)
    check_iotlb(iommu, nested, W, W, W, W)


def test_most_entries_are_tried(iommu: File, nested: int) -> None:
    """As far as there is memory, which here is not far."""
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(0), entries((0, 0)) * 512)
        assert invalidate(iommu, nested, memory.page(0), ENTRIES_MAX) == (errno.EFAULT, 512)


@pytest.mark.parametrize("number", [0, 1])
def test_reserved_word_is_eopnotsupp(iommu: File, nested: int, number: int) -> None:
    assert invalidate(iommu, nested, entries((0, 0)), number, __reserved=1) == (errno.EOPNOTSUPP, 0)
    check_iotlb(iommu, nested, W, W, W, W)


# -- the object ------------------------------------------------------------------------------------------------------


@pytest.mark.has("invalidate-any-object")
@pytest.mark.parametrize("number", [0, 1])
def test_object_without_a_cache_is_einval(kernel: Backend, iommu: File, number: int) -> None:
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    parent, plain = nest_parent(iommu, device.idev, ioas), hwpt_alloc(iommu, device.idev, ioas)
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    with kernel.adopt(queue.out_fault_fd):
        for target in (ioas, *device, parent, plain, queue.out_fault_id):
            assert invalidate(iommu, target, entries((0, 0)), number) == (errno.EINVAL, 0)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_unknown_object_is_enoent(iommu: File, nested: int, number: int) -> None:
    for target in (0, nested + 1, U32_MAX):
        assert invalidate(iommu, target, entries((0, 0), (0, 0)), number) == (errno.ENOENT, 0)


def test_order_of_the_checks(iommu: File, nested: int) -> None:
    """Reserved, then the description, then the object, then the type."""
    assert invalidate(iommu, 99, 0, 1, __reserved=1) == (errno.EOPNOTSUPP, 0)
    assert invalidate(iommu, 99, 0, 1) == (errno.EINVAL, 0)
    assert invalidate(iommu, 99, 8, 1, data_type=0) == (errno.ENOENT, 0)
    assert invalidate(iommu, nested, 8, 1, data_type=0) == (errno.EINVAL, 0)


# -- the reply -------------------------------------------------------------------------------------------------------


def test_reply_changes_nothing_but_the_count(iommu: File, nested: int) -> None:
    arg = request(nested, entries((0, 0), (2, 0)), 2)
    before = bytes(arg)
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    offset = iommu_hwpt_invalidate.entry_num.offset
    assert bytes(arg) == before[:offset] + (1).to_bytes(4, "little") + before[offset + 4 :]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(entries((0, 1)), INVALIDATION), (entries((2, 1)), INVALIDATION), (entries((0, 1)), 0)],
    ids=["done", "bad_entry", "bad_type"],
)
def test_count_that_cannot_be_written_is_efault_whatever_else(iommu: File, nested: int, data: bytes, kind: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), request(nested, data, 1, data_type=kind))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HWPT_INVALIDATE.number, memory.page(0))
    done = kind == INVALIDATION and data == entries((0, 1))
    check_iotlb(iommu, nested, W, 0 if done else W, W, W)


def test_unknown_object_and_a_count_that_cannot_be_written_is_efault(iommu: File, nested: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), request(99, entries((0, 1)), 1))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HWPT_INVALIDATE.number, memory.page(0))
