"""Tables of ioctls, and the size rules of iommufd's structs.

A subsystem declares its handlers on an `IoctlTable`; `flatten()` cuts the table down to a release once, when the kernel
boots, so that dispatch is one dictionary lookup and an old kernel's ENOTTY and E2BIG come by construction.

The size rules are those of `iommufd_fops_ioctl()` (drivers/iommu/iommufd/main.c) with `copy_struct_from_user()`
(include/linux/uaccess.h).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from uapi.cstruct import Struct
from uapi.ioctl import Ioctl
from uapi.profile import profile

C = TypeVar("C")
S = TypeVar("S", bound=Struct)


class UserCommand(Generic[C, S]):
    """`struct iommufd_ucmd`: one command on its way through a handler."""

    __slots__ = ("address", "call", "cmd", "ctx", "kernel_size", "user_size")

    def __init__(self, call: SystemCall, ctx: C, cmd: S, address: int, user_size: int, kernel_size: int) -> None:
        self.call = call
        self.ctx = ctx
        self.cmd = cmd
        self.address = address
        self.user_size = user_size
        self.kernel_size = kernel_size

    def respond(self) -> None:
        """iommufd_ucmd_respond(): copy the struct back, no further than the caller's own size. EFAULT."""
        length = min(self.user_size, self.kernel_size)
        self.call.copy_to_user(self.address, memoryview(self.cmd).cast("B")[:length])


#: Returns the ioctl's result; None is 0, as that of all but one test operation.
Handler = Callable[[UserCommand[Any, Any]], "int | None"]


class IoctlEntry:
    """One ioctl as a booted kernel knows it: sizes of its release."""

    __slots__ = ("handler", "min_size", "number", "size", "struct")

    def __init__(self, number: int, struct: type[Struct], min_size: int, size: int, handler: Handler) -> None:
        self.number = number
        self.struct = struct
        self.min_size = min_size
        self.size = size
        self.handler = handler


class IoctlTable:
    """The ioctls of one kind of file: declarations and their handlers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handlers: dict[str, tuple[Ioctl[Any], Handler]] = {}

    def handles(self, ioctl: Ioctl[S]) -> Callable[[Handler], Handler]:
        """Register the decorated function as the ioctl's handler."""

        def register(handler: Handler) -> Handler:
            self.handlers[ioctl.name] = (ioctl, handler)
            return handler

        return register

    def flatten(self, release: str) -> dict[int, IoctlEntry]:
        """The table of `release`, by ioctl number's low byte."""
        table: dict[int, IoctlEntry] = {}
        known = profile(release).ioctls
        for name, (ioctl, handler) in self.handlers.items():
            sizes = known.get(name)
            if sizes is not None and ioctl.struct is not None:
                table[ioctl.nr] = IoctlEntry(ioctl.number, ioctl.struct, sizes.min_size, sizes.size, handler)
        return table


def copy_struct_from_user(call: SystemCall, entry: IoctlEntry, address: int, user_size: int) -> Struct:
    """The command with missing members zero. E2BIG or EFAULT for a tail, which is looked at first; EFAULT."""
    size = entry.size
    if user_size > size:
        call.check_zeroed(address + size, user_size - size)
        user_size = size
    cmd = entry.struct()
    memoryview(cmd).cast("B")[:user_size] = call.copy_from_user(address, user_size)
    return cmd


def dispatch(table: dict[int, IoctlEntry], call: SystemCall, ctx: Any, request: int, address: int) -> int:
    """Serve an ioctl whose number's low byte lies in the table's range, holes included.

    EFAULT: the size word cannot be read. ENOTTY: the command differs in any bit, or is a hole. EINVAL: the size is
    less than the smallest that any kernel accepted. E2BIG, EFAULT: see `copy_struct_from_user`.
    """
    user_size = call.get_u32(address)
    entry = table.get(request & 0xFF)
    if entry is None or entry.number != request:
        raise KernelError(errno.ENOTTY, f"no such ioctl: {request:#x}")
    if user_size < entry.min_size:
        raise KernelError(errno.EINVAL, f"size {user_size} is less than {entry.min_size}")
    cmd = copy_struct_from_user(call, entry, address, user_size)
    return entry.handler(UserCommand(call, ctx, cmd, address, user_size, entry.size)) or 0
