"""A driver's own structs in the caller's memory, after include/linux/iommu.h.

iommufd hands the caller's type, address and length on to the driver, which says what it expects there.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from typing import TypeVar

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting
from kernel_model.file import SystemCall
from uapi.cstruct import Struct
from uapi.layout import layout_at

S = TypeVar("S", bound=Struct)

#: How many entries of an array are read at once.
_BATCH = 4096

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

    def batches(self, struct: type[S], data_type: int, minimum: int) -> Iterator[bytes | memoryview]:
        """The entries in their order, whole structs, many at once where that can be. What is wrong with an entry, its
        errno as from `copy_from`, comes when it is the entry's turn."""
        # Where copies are to fail, each entry is a copy of its own, as the kernel's are.
        exact = self.entry_len == _sizeof(struct, self.call.kernel.release) and self.type == data_type
        step = _BATCH if exact and not injecting else 1
        for start in range(0, self.entry_num, step):
            count = min(step, self.entry_num - start)
            block = self._block(start, count) if count > 1 else None
            if block is not None:
                yield block
            else:
                for index in range(start, start + count):
                    yield bytes(self.copy_from(struct, data_type, index, minimum))

    def _block(self, start: int, count: int) -> bytes | memoryview | None:
        try:
            return self.call.copy_from_user(self.address + self.entry_len * start, self.entry_len * count)
        except KernelError:
            return None

    def copy_full_bytes(self, struct: type[S], data_type: int) -> bytes | memoryview:
        """iommu_copy_struct_from_full_user_array(): all entries in one piece, shorter ones with zeros behind.

        EINVAL: another type, or no entries. E2BIG: the tail of a longer entry is not zero. EFAULT.
        """
        if self.type != data_type or not self.entry_num:
            raise KernelError(errno.EINVAL, f"{self.entry_num} entries of type {self.type:#x}")
        size, length = _sizeof(struct, self.call.kernel.release), self.entry_len
        if length == size:
            return self.call.copy_from_user(self.address, size * self.entry_num)
        found = bytearray(size * self.entry_num)
        head = min(length, size)
        for index in range(self.entry_num):
            address = self.address + length * index
            if length > size:
                self.call.check_zeroed(address + size, length - size)
            found[size * index : size * index + head] = self.call.copy_from_user(address, head)
        return bytes(found)

    def copy_full(self, struct: type[S], data_type: int) -> list[S]:
        """The same as structs. Errnos as `copy_full_bytes`."""
        data = self.copy_full_bytes(struct, data_type)
        return list((struct * self.entry_num).from_buffer_copy(data))
