"""A driver's own structs in the caller's memory, after include/linux/iommu.h.

iommufd hands the caller's type, address and length on to the driver, which says what it expects there.
"""

from __future__ import annotations

import errno
from typing import TypeVar

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from uapi.cstruct import Struct

S = TypeVar("S", bound=Struct)


class UserData:
    """`struct iommu_user_data`: one struct."""

    __slots__ = ("address", "call", "length", "type")

    def __init__(self, call: SystemCall, data_type: int, address: int, length: int) -> None:
        self.call = call
        self.type = data_type
        self.address = address
        self.length = length

    def copy_from(self, struct: type[S], data_type: int, minimum: int) -> S:
        """iommu_copy_struct_from_user(): the struct, with what the caller left out zero.

        EINVAL: another type; less than `minimum` bytes; more than the struct has. EFAULT.
        """
        found = struct()
        room = memoryview(found).cast("B")
        if self.type != data_type or not minimum <= self.length <= len(room):
            raise KernelError(errno.EINVAL, f"{self.length} bytes of data of type {self.type:#x}")
        room[: self.length] = self.call.copy_from_user(self.address, self.length)
        return found

    def copy_to(self, struct: Struct, data_type: int, minimum: int) -> None:
        """iommu_copy_struct_to_user(): as much of the struct as the caller has room for. Errnos as `copy_from`."""
        data = bytes(struct)
        if self.type != data_type or not minimum <= self.length <= len(data):
            raise KernelError(errno.EINVAL, f"{self.length} bytes of data of type {self.type:#x}")
        self.call.copy_to_user(self.address, data[: self.length])


class UserDataArray:
    """`struct iommu_user_data_array`: `entry_num` structs of `entry_len` bytes each."""

    __slots__ = ("address", "call", "entry_len", "entry_num", "type")

    def __init__(self, call: SystemCall, data_type: int, address: int, entry_len: int, entry_num: int) -> None:
        self.call = call
        self.type = data_type
        self.address = address
        self.entry_len = entry_len
        #: In: how many there are. Out: how many the driver has handled.
        self.entry_num = entry_num

    def copy_from(self, struct: type[S], data_type: int, index: int, minimum: int) -> S:
        """iommu_copy_struct_from_user_array(): entry `index`. Errnos as `UserData.copy_from`."""
        entry = UserData(self.call, self.type, self.address + self.entry_len * index, self.entry_len)
        return entry.copy_from(struct, data_type, minimum)
