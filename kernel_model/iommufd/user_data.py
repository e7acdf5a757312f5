"""A driver's own structs in the caller's memory, after include/linux/iommu.h.

iommufd hands the caller's type, address and length on to the driver, which says what it expects there.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from typing import TypeVar

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from uapi.cstruct import Struct
from uapi.layout import layout_at

S = TypeVar("S", bound=Struct)

#: How many entries of an array are read at once.
_BATCH = 1024

_sizeof = functools.cache(lambda struct, release: layout_at(struct, release).size)


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

        EINVAL: another type; less than `minimum` bytes; more than the struct has in this release. EFAULT.
        """
        found = struct()
        if self.type != data_type or not minimum <= self.length <= _sizeof(struct, self.call.kernel.release):
            raise KernelError(errno.EINVAL, f"{self.length} bytes of data of type {self.type:#x}")
        memoryview(found).cast("B")[: self.length] = self.call.copy_from_user(self.address, self.length)
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

    def each(self, struct: type[S], data_type: int, minimum: int) -> Iterator[S]:
        """Every entry in turn, as `copy_from` would give it; its errnos come when it is the entry's turn."""
        size, index = self.entry_len, 0
        if size == _sizeof(struct, self.call.kernel.release) and self.type == data_type:
            while index < self.entry_num:
                count = min(_BATCH, self.entry_num - index)
                try:
                    data = self.call.copy_from_user(self.address + size * index, size * count)
                except KernelError:
                    break  # the entry that cannot be read is found below
                yield from (struct * count).from_buffer_copy(data)
                index += count
        for left in range(index, self.entry_num):
            yield self.copy_from(struct, data_type, left, minimum)

    def copy_full(self, struct: type[S], data_type: int) -> list[S]:
        """iommu_copy_struct_from_full_user_array(): all entries, shorter ones with zeros behind.

        EINVAL: another type, or no entries. E2BIG: the tail of a longer entry is not zero. EFAULT.
        """
        if self.type != data_type or not self.entry_num:
            raise KernelError(errno.EINVAL, f"{self.entry_num} entries of type {self.type:#x}")
        size, length = _sizeof(struct, self.call.kernel.release), self.entry_len
        if length == size:
            data = self.call.copy_from_user(self.address, size * self.entry_num)
            return list((struct * self.entry_num).from_buffer_copy(data))
        found = []
        for index in range(self.entry_num):
            address = self.address + length * index
            if length > size:
                self.call.check_zeroed(address + size, length - size)
            entry = struct()
            head = min(length, size)
            memoryview(entry).cast("B")[:head] = self.call.copy_from_user(address, head)
            found.append(entry)
        return found
