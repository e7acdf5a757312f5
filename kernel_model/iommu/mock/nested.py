"""Nested domains of the mock driver, after drivers/iommu/iommufd/selftest.c at 7.3.

Such a domain translates nothing: it is a few words that stand for what an IOTLB holds of the guest's own tables. An
invalidation zeroes them, and MD_CHECK_IOTLB looks at them.
"""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import IOMMU_DOMAIN_NESTED, IommuDriver
from kernel_model.iommu.mock.attach import MockDomain
from uapi.cstruct import offsetofend
from uapi.iommufd_test import (
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    MOCK_NESTED_DOMAIN_IOTLB_ID_MAX,
    MOCK_NESTED_DOMAIN_IOTLB_NUM,
    iommu_hwpt_invalidate_selftest,
    iommu_hwpt_selftest,
)

if TYPE_CHECKING:
    from kernel_model.iommufd.user_data import UserData, UserDataArray

_DATA_MIN = offsetofend(iommu_hwpt_selftest, "iotlb")
_ENTRY = iommu_hwpt_invalidate_selftest
_ENTRY_MIN = offsetofend(_ENTRY, "iotlb_id")
#: An entry as one number, flags below and the word's number above: bits that no right entry has, and the flag.
_WRONG = (0xFFFFFFFF ^ MOCK_NESTED_DOMAIN_IOTLB_ID_MAX) << 32 | 0xFFFFFFFF ^ IOMMU_TEST_INVALIDATE_FLAG_ALL
_ALL = IOMMU_TEST_INVALIDATE_FLAG_ALL
_WORDS = range(MOCK_NESTED_DOMAIN_IOTLB_NUM)


@functools.lru_cache(32)
def _each(bits: int, number: int) -> int:
    """These bits in so many entries behind each other."""
    return int.from_bytes(bits.to_bytes(8, "little") * number, "little")


class MockNestedDomain(MockDomain):
    """`struct mock_iommu_domain_nested`."""

    type = IOMMU_DOMAIN_NESTED

    def __init__(self, owner: IommuDriver, iotlb: int) -> None:
        super().__init__(owner)
        self.iotlb = [iotlb] * MOCK_NESTED_DOMAIN_IOTLB_NUM

    @classmethod
    def alloc(cls, owner: IommuDriver, user_data: UserData) -> MockNestedDomain:
        """__mock_domain_alloc_nested(). EOPNOTSUPP: data of another driver. Then those of `UserData.copy_from`."""
        if user_data.type != IOMMU_HWPT_DATA_SELFTEST:
            raise KernelError(errno.EOPNOTSUPP, f"data type {user_data.type:#x}")
        data = user_data.copy_from(iommu_hwpt_selftest, IOMMU_HWPT_DATA_SELFTEST, _DATA_MIN)
        if injecting:
            kmalloc("struct mock_iommu_domain_nested")
        return cls(owner, data.iotlb)

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """mock_domain_cache_invalidate_user(): entry by entry, up to the first that is wrong.

        EINVAL: data of another driver, even without entries. For each entry: EINVAL by its length; EFAULT; EOPNOTSUPP
        flags; EINVAL no such word, asked even where all of them go.
        """
        done = 0
        try:
            if array.type != IOMMU_HWPT_INVALIDATE_DATA_SELFTEST:
                raise KernelError(errno.EINVAL, f"data type {array.type:#x}")
            for block in array.batches(_ENTRY, IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, _ENTRY_MIN):
                number = len(block) // 8
                entries = int.from_bytes(block, "little")
                if wrong := entries & _each(_WRONG, number):
                    number = ((wrong & -wrong).bit_length() - 1) // 64  # those before the first wrong one
                self._drop(block[: number * 8])
                done += number
                if wrong:
                    raise _refusal(entries >> 64 * number & (1 << 64) - 1, done)
        finally:
            array.entry_num = done

    def _drop(self, entries: bytes | memoryview) -> None:
        """The words that right entries name. Thousands of entries go at once, without a look at each."""
        if int.from_bytes(entries, "little") & _each(_ALL, len(entries) // 8):
            self.iotlb = [0] * MOCK_NESTED_DOMAIN_IOTLB_NUM
        else:
            named = bytes(entries[4::8])
            self.iotlb = [0 if index in named else self.iotlb[index] for index in _WORDS]


def _refusal(entry: int, number: int) -> KernelError:
    flags, index = entry & 0xFFFFFFFF, entry >> 32
    if flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:
        return KernelError(errno.EOPNOTSUPP, f"flags {flags:#x} of entry {number}")
    return KernelError(errno.EINVAL, f"word {index} of entry {number}")
