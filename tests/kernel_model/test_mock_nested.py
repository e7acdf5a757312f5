"""Nested HWPTs on older releases, and structs of a driver in the caller's memory."""

from __future__ import annotations

import errno
import struct
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.mock import INVALIDATION, NESTED_DATA, check_iotlb, mock_domain, nest_parent, nested_alloc
from conformance.steps import answer, fails, hwpt_alloc, ioas_alloc, place
from kernel_model.kernel import Kernel
from uapi.backend import File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID, IOMMU_HWPT_INVALIDATE

WORD = 0x1234_5678


def parent(iommu: File) -> tuple[int, int]:
    """A mock device and a nesting parent for it."""
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    return device.idev, nest_parent(iommu, device.idev, ioas)


@pytest.mark.parametrize(
    ("release", "flags"),
    [("6.8", IOMMU_HWPT_FAULT_ID_VALID), ("6.8", IOMMU_HWPT_ALLOC_PASID), ("6.12", IOMMU_HWPT_ALLOC_PASID)],
)
def test_flag_of_a_later_release_is_eopnotsupp(release: str, flags: int) -> None:
    with Kernel("mock", release) as kernel, kernel.open("/dev/iommu") as iommu:
        device, below = parent(iommu)
        with fails(errno.EOPNOTSUPP):
            nested_alloc(iommu, device, below, flags)
        check_iotlb(iommu, nested_alloc(iommu, device, below, iotlb=WORD), WORD, WORD, WORD, WORD)


@pytest.mark.parametrize(("release", "longest"), [("6.8", 4), ("6.18", 4), ("6.19", 8), ("7.3", 8)])
def test_data_is_as_long_as_the_releases_struct(release: str, longest: int) -> None:
    """Bytes behind it are no struct of a later kernel, but a mistake."""
    with Kernel("mock", release) as kernel, kernel.open("/dev/iommu") as iommu:
        device, below = parent(iommu)
        for length in range(1, 12):
            fields = {"data_type": NESTED_DATA, "data_len": length, "data_uptr": place(bytes(16))}
            expected = 0 if 4 <= length <= longest else errno.EINVAL
            assert answer(lambda fields=fields: hwpt_alloc(iommu, device, below, **fields)) == expected, length


class Words:
    """Four words, and what entries do to them."""

    def __init__(self) -> None:
        self.words = [WORD] * 4

    def invalidate(self, entries: list[tuple[int, int]]) -> tuple[int, int]:
        for number, (flags, index) in enumerate(entries):
            if flags & ~1:
                return errno.EOPNOTSUPP, number
            if index > 3:
                return errno.EINVAL, number
            for word in range(4) if flags else [index]:
                self.words[word] = 0
        return 0, len(entries)


entry = st.tuples(st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 1 << 31]), st.sampled_from([0, 1, 2, 3, 0, 1, 2, 3, 4, -1]))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(entry, max_size=6), max_size=4),
    st.sampled_from([0, 1, 3, 4094, 4095, 4096, 5000]),
    st.integers(0, 4),
)
def test_entries_do_one_by_one_what_the_rules_say(calls: list[list[tuple[int, int]]], good: int, word: int) -> None:
    """Calls of a few entries, each of them behind `good` harmless ones, so that batches end anywhere."""
    with Kernel("mock") as kernel, kernel.open("/dev/iommu") as iommu, closing(kernel.buffer(1 << 16)) as buffer:
        device, below = parent(iommu)
        nested, expected = nested_alloc(iommu, device, below, iotlb=WORD), Words()
        for entries in calls:
            entries = [(0, word % 4)] * good + [(flags, index & 0xFFFFFFFF) for flags, index in entries]
            data = b"".join(struct.pack("<II", *pair) for pair in entries)
            buffer.view[: len(data)] = data
            arg = IOMMU_HWPT_INVALIDATE.make(
                hwpt_id=nested, data_uptr=buffer.address, data_type=INVALIDATION, entry_len=8, entry_num=len(entries)
            )
            outcome = answer(IOMMU_HWPT_INVALIDATE.raw, iommu, arg)
            assert (outcome, arg.entry_num) == expected.invalidate(entries)
            check_iotlb(iommu, nested, *expected.words)
