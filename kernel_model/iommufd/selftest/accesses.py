"""Operations on accesses, after drivers/iommu/iommufd/selftest.c; the access itself is in `iommufd.access`."""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import FileDescription
from kernel_model.interval import U64_MAX
from kernel_model.iommufd.access import Access, access_create, access_destroy
from kernel_model.iommufd.selftest.operations import TestCommand, callers_pages, operation
from kernel_model.process import PAGE_MASK
from uapi import iommufd_test as abi

_LONGEST_ACCESS = 16 << 20


class AccessFile(FileDescription):
    """`struct selftest_access`: an access behind a descriptor, with the pins that were made through it."""

    path = "anon_inode:[iommufd_test_staccess]"

    def __init__(self) -> None:
        self.held: Access | None = None
        #: id -> (iova, length), oldest first.
        self.items: dict[int, tuple[int, int]] = {}
        self.next_id = 0

    @property
    def attached(self) -> Access:
        assert self.held is not None  # nobody has the descriptor before
        return self.held

    def unmap(self, iova: int, length: int) -> None:
        """iommufd_test_access_unmap(): give back every pin that meets the range."""
        last = iova + length - 1
        for number, (start, size) in list(self.items.items()):
            if start <= last and start + size - 1 >= iova:
                del self.items[number]
                self.attached.unpin_pages(start, size)

    def release(self) -> None:
        if self.held is not None:
            self.unmap(0, U64_MAX)
            access_destroy(self.held)
            self.held = None


def _access_file(ucmd: TestCommand) -> AccessFile:
    """EBADFD: not a descriptor of an access."""
    try:
        found = ucmd.ctx.kernel.lookup(ucmd.cmd.id, ucmd.call.process)
    except KernelError:
        found = None
    if not isinstance(found, AccessFile):
        raise KernelError(errno.EBADFD, f"descriptor {ucmd.cmd.id} is no access")
    return found


def _iova(access: Access, word: int, flags: int) -> int:
    """iommufd_test_syz_conv_iova(), where the flag asks for it."""
    if not flags & abi.MOCK_FLAGS_ACCESS_SYZ:
        return word
    return access.ioas.iopt.nth_area_iova(word) if access.ioas is not None else 0


@operation("IOMMU_TEST_OP_CREATE_ACCESS")
def _create_access(ucmd: TestCommand) -> None:
    """EOPNOTSUPP: flags. ENOMEM: no descriptor is left. Then `Access.attach`. EFAULT: the reply."""
    cmd, ctx, process = ucmd.cmd.create_access, ucmd.ctx, ucmd.call.process
    if cmd.flags & ~abi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    if injecting:
        kmalloc("struct selftest_access")
    file = AccessFile()
    try:
        fd = ctx.kernel.install_for(process, file)
    except KernelError as error:
        raise KernelError(errno.ENOMEM, "no descriptor is left") from error
    try:
        access = access_create(ctx, bool(cmd.flags), file.unmap)
    except KernelError:
        ctx.kernel.close_for(process, fd)
        raise
    try:
        access.attach(ucmd.cmd.id)
        cmd.out_access_fd = fd
        ucmd.respond()
    except KernelError:
        access_destroy(access)
        ctx.kernel.close_for(process, fd)
        raise
    file.held = access


@operation("IOMMU_TEST_OP_ACCESS_REPLACE_IOAS")
def _access_replace_ioas(ucmd: TestCommand) -> None:
    """EBADFD. Then `Access.replace`."""
    _access_file(ucmd).attached.replace(ucmd.cmd.access_replace_ioas.ioas_id)


@operation("IOMMU_TEST_OP_ACCESS_PAGES")
def _access_pages(ucmd: TestCommand) -> None:
    """ENOMEM: too long. EOPNOTSUPP: flags. EBADFD. EOPNOTSUPP: an access that pins nothing. Then `Access.pin_pages`.
    With an address: EFAULT, or EBADE if other pages are there. EFAULT: the reply. On an error nothing is pinned."""
    cmd = ucmd.cmd.access_pages
    length = cmd.length
    if length > _LONGEST_ACCESS:
        raise KernelError(errno.ENOMEM, f"{length:#x} bytes")
    if cmd.flags & ~(abi.MOCK_FLAGS_ACCESS_WRITE | abi.MOCK_FLAGS_ACCESS_SYZ):
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    file = _access_file(ucmd)
    access = file.attached
    if not access.needs_pin_pages:
        raise KernelError(errno.EOPNOTSUPP, "the access pins no pages")
    iova = _iova(access, cmd.iova, cmd.flags)
    if injecting:
        kmalloc("an array of pages")
    pages = access.pin_pages(iova, length, bool(cmd.flags & abi.MOCK_FLAGS_ACCESS_WRITE))
    try:
        if cmd.uptr:
            start = (cmd.uptr - (iova & PAGE_MASK)) & U64_MAX
            for mine, theirs in zip(pages, callers_pages(ucmd.call, start, len(pages)), strict=True):
                if mine != theirs:
                    raise KernelError(errno.EBADE, f"the page at {theirs:#x} is not the one at {mine:#x}")
        if injecting:
            kmalloc("struct selftest_access_item")
        cmd.out_access_pages_id = file.next_id
        file.next_id += 1
        ucmd.respond()
    except KernelError:
        access.unpin_pages(iova, length)
        raise
    file.items[cmd.out_access_pages_id] = (iova, length)


@operation("IOMMU_TEST_OP_DESTROY_ACCESS_PAGES")
def _destroy_access_pages(ucmd: TestCommand) -> None:
    """EBADFD. ENOENT: no such pin, or it had to be given back already."""
    file = _access_file(ucmd)
    item = file.items.pop(ucmd.cmd.destroy_access_pages.access_pages_id, None)
    if item is None:
        raise KernelError(errno.ENOENT, "no such pin")
    file.attached.unpin_pages(*item)


@operation("IOMMU_TEST_OP_ACCESS_RW")
def _access_rw(ucmd: TestCommand) -> None:
    """ENOMEM: too long. EOPNOTSUPP: flags. EBADFD. EFAULT: the caller's data. Then `Access.rw`."""
    cmd, call = ucmd.cmd.access_rw, ucmd.call
    if cmd.length > _LONGEST_ACCESS:
        raise KernelError(errno.ENOMEM, f"{cmd.length:#x} bytes")
    if cmd.flags & ~(abi.MOCK_ACCESS_RW_WRITE | abi.MOCK_ACCESS_RW_SLOW_PATH | abi.MOCK_FLAGS_ACCESS_SYZ):
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    access = _access_file(ucmd).attached
    if injecting:
        kmalloc("a copy of the data")
    slow = bool(cmd.flags & abi.MOCK_ACCESS_RW_SLOW_PATH)
    iova = _iova(access, cmd.iova, cmd.flags)
    if cmd.flags & abi.MOCK_ACCESS_RW_WRITE:
        access.rw(call, iova, cmd.length, bytes(call.copy_from_user(cmd.uptr, cmd.length)), slow)
    else:
        call.copy_to_user(cmd.uptr, access.rw(call, iova, cmd.length, None, slow))
