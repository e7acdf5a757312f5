"""Nested domains of the mock driver, after drivers/iommu/iommufd/selftest.c at 7.3.

Such a domain translates nothing: it is a few words that stand for what an IOTLB holds of the guest's own tables. An
invalidation zeroes them, and MD_CHECK_IOTLB looks at them.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
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
_UNPACK = Struct("<II").iter_unpack
#: Of an entry's eight bytes: the values of its flags and of the word's number, and those that stay zero.
_FLAGS, _WORDS = bytes((0, IOMMU_TEST_INVALIDATE_FLAG_ALL)), bytes(range(MOCK_NESTED_DOMAIN_IOTLB_ID_MAX + 1))
_ZERO = (1, 2, 3, 5, 6, 7)


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
                entries = bytes(block)
                number, refusal = _check(entries)
                self._drop(entries[: number * 8])
                done += number
                if refusal is not None:
                    raise refusal
        finally:
            array.entry_num = done

    def _drop(self, entries: bytes) -> None:
        """The words that right entries name."""
        if IOMMU_TEST_INVALIDATE_FLAG_ALL in entries[0::8]:
            self.iotlb = [0] * MOCK_NESTED_DOMAIN_IOTLB_NUM
        else:
            named = entries[4::8]
            self.iotlb = [0 if index in named else word for index, word in enumerate(self.iotlb)]


def _check(entries: bytes) -> tuple[int, KernelError | None]:
    """How many entries are right up to the first that is wrong, and what is wrong with that.

    Where all are, as mostly, each byte is compared in all entries at once.
    """
    zeroes = bytes(len(entries) // 8)
    if (
        all(entries[place::8] == zeroes for place in _ZERO)
        and not entries[0::8].translate(None, _FLAGS)
        and not entries[4::8].translate(None, _WORDS)
    ):
        return len(zeroes), None
    for number, (flags, index) in enumerate(_UNPACK(entries)):
        if flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:
            return number, KernelError(errno.EOPNOTSUPP, f"flags {flags:#x} of an entry")
        if index > MOCK_NESTED_DOMAIN_IOTLB_ID_MAX:
            return number, KernelError(errno.EINVAL, f"there is no word {index}")
    raise KernelBug("a wrong entry that is right")
