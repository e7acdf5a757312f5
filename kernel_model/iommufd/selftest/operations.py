"""The table of IOMMU_TEST_CMD's operations, and how they look at the caller's pages."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from kernel_model.errors import KernelError
from kernel_model.fault_injection import spared
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.pages import Runs, UserPages
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from uapi import iommufd_test as abi
from uapi.iommufd_test import IOMMU_TEST_CMD, iommu_test_cmd

TestCommand = UserCommand[Context, iommu_test_cmd]
#: Returns the ioctl's result; None is 0.
Operation = Callable[[TestCommand], "int | None"]

#: By number: the operation's name and what serves it.
_OPERATIONS: dict[int, tuple[str, Operation]] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Serve these operations (IOMMU_TEST_OP_*) by the decorated function."""

    def register(serve: Operation) -> Operation:
        for name in names:
            _OPERATIONS[getattr(abi, name)] = (name, serve)
        return serve

    return register


def served() -> frozenset[str]:
    """The names of all operations that the model has."""
    return frozenset(name for name, _ in _OPERATIONS.values())


@table.handles(IOMMU_TEST_CMD)
def test(ucmd: TestCommand) -> int | None:
    """EOPNOTSUPP: an operation that the release does not have. Otherwise see the operations."""
    name, serve = _OPERATIONS.get(ucmd.cmd.op, ("", None))
    if serve is None or name not in ucmd.ctx.kernel.profile.constants:
        raise KernelError(errno.EOPNOTSUPP, f"no test operation {ucmd.cmd.op}")
    return serve(ucmd)


def callers_pages(call: SystemCall, address: int, npages: int) -> Iterator[int]:
    """get_user_pages_fast(), page after page: the physical address of each of the caller's.

    EFAULT at its turn; EOVERFLOW for the last page of all 64 bits, whose end wraps.
    """
    address &= ~PAGE_MASK
    if not npages:
        return
    try:
        yield from _flat(_locate(call, address, npages))
    except KernelError:
        for index in range(npages):
            yield from _flat(_locate(call, address + (index << PAGE_SHIFT), 1))


def _locate(call: SystemCall, address: int, npages: int) -> Runs:
    if address + (npages << PAGE_SHIFT) > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{npages} pages at {address:#x} wrap")
    with spared():
        pages = UserPages(call.kernel, call.process, address, npages << PAGE_SHIFT, False)
        with pages.borrowed(0, npages - 1) as runs:
            return runs


def _flat(runs: Runs) -> Iterator[int]:
    for start, npages in runs:
        yield from range(start, start + (npages << PAGE_SHIFT), PAGE_SIZE)
