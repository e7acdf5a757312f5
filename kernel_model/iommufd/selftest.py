"""IOMMU_TEST_CMD: a client makes mock devices and accesses, and looks behind the scenes.

Mirrors the iommufd half of drivers/iommu/iommufd/selftest.c (CONFIG_IOMMUFD_TEST); the mock driver itself is in
`iommu.mock`. The kernel is one with that option on every machine.

Left out, and EOPNOTSUPP like an unknown operation: DIRTY, MD_CHECK_IOTLB, TRIGGER_IOPF, DEV_CHECK_CACHE,
TRIGGER_VEVENT, PASID_ATTACH, PASID_REPLACE, PASID_DETACH, PASID_CHECK_HWPT, DMABUF_GET, DMABUF_REVOKE; and the fuzzer's
way to give an IOVA (MOCK_FLAGS_ACCESS_SYZ), here and in the IOAS calls. MD_CHECK_REFS counts every page, also those of
huge pages, which the kernel passes over. SET_TEMP_MEMORY_LIMIT has no effect: there are no batches.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from kernel_model.errors import KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommu.core import IOMMU_DOMAIN_UNMANAGED
from kernel_model.iommu.mock.iommu import MockDevice
from kernel_model.iommufd.access import Access, access_create, access_destroy
from kernel_model.iommufd.ctx import Context, table
from kernel_model.iommufd.device import (
    NO_PASID,
    IommufdDevice,
    device_attach,
    device_bind,
    device_detach,
    device_replace,
    device_unbind,
)
from kernel_model.iommufd.hwpt import HwptPaging
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.pages import Runs, UserPages
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from uapi import iommufd_test as abi
from uapi.iommufd_test import IOMMU_TEST_CMD, iommu_test_cmd

TestCommand = UserCommand[Context, iommu_test_cmd]
Operation = Callable[[TestCommand], None]

#: By number: the operation's name and what serves it.
_OPERATIONS: dict[int, tuple[str, Operation]] = {}
_LONGEST_ACCESS = 16 << 20
#: The size of one element of a batch of pages; no limit is smaller.
_BATCH_ELEMENT = 12


def _operation(*names: str) -> Callable[[Operation], Operation]:
    def register(serve: Operation) -> Operation:
        for name in names:
            _OPERATIONS[getattr(abi, name)] = (name, serve)
        return serve

    return register


@table.handles(IOMMU_TEST_CMD)
def test(ucmd: TestCommand) -> None:
    """EOPNOTSUPP: an operation that the release does not have. Otherwise see the operations."""
    name, serve = _OPERATIONS.get(ucmd.cmd.op, ("", None))
    if serve is None or name not in ucmd.ctx.kernel.profile.constants:
        raise KernelError(errno.EOPNOTSUPP, f"no test operation {ucmd.cmd.op}")
    serve(ucmd)


# -- mock devices ----------------------------------------------------------------------------------------------------


class Selftest(Object):
    """`struct selftest_obj`: a mock device and its binding, both of which go with it."""

    __slots__ = ("idev", "mock")

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.idev: IommufdDevice | None = None
        self.mock: MockDevice | None = None

    def destroy(self) -> None:
        """iommufd_selftest_destroy(); of what was made so far, when its birth fails."""
        if self.idev is not None:
            device_detach(self.idev, NO_PASID)
            device_unbind(self.idev)
            self.idev = None
        if self.mock is not None:
            self.ctx.kernel.mock_iommu.destroy_device(self.mock)
            self.mock = None


@_operation("IOMMU_TEST_OP_MOCK_DOMAIN", "IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS")
def _mock_domain(ucmd: TestCommand) -> None:
    """EINVAL: unknown device flags. Then `device_attach`. EFAULT: the reply. On an error nothing is left."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    sobj = Selftest(ctx)
    try:
        flags = cmd.mock_domain_flags.dev_flags if cmd.op == abi.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS else 0
        known = ctx.kernel.profile.mask("MOCK_FLAGS_DEVICE_NO_DIRTY", "MOCK_FLAGS_DEVICE_PASID")
        sobj.mock = ctx.kernel.mock_iommu.create_device(flags, known)
        sobj.idev = device_bind(ctx, sobj.mock)
        hwpt_id = device_attach(sobj.idev, NO_PASID, cmd.id)
        reply = cmd.mock_domain
        reply.out_hwpt_id, reply.out_stdev_id, reply.out_idev_id = hwpt_id, sobj.id, sobj.idev.id
        ucmd.respond()
    except KernelError:
        ctx.objects.abort(sobj)
        raise
    ctx.objects.finalize(sobj)


@_operation("IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE")
def _mock_domain_replace(ucmd: TestCommand) -> None:
    """ENOENT: no such mock device. Then `device_replace`. EFAULT: the reply; the replacement stays."""
    sobj = ucmd.ctx.objects.get(ucmd.cmd.id, Selftest)
    assert sobj.idev is not None
    change = ucmd.cmd.mock_domain_replace
    change.pt_id = device_replace(sobj.idev, NO_PASID, change.pt_id)
    ucmd.respond()


# -- behind the scenes -----------------------------------------------------------------------------------------------


@_operation("IOMMU_TEST_OP_ADD_RESERVED")
def _add_reserved(ucmd: TestCommand) -> None:
    """EINVAL: length 0. EOVERFLOW: the range wraps. ENOENT: no such IOAS. EADDRINUSE: see `IoPagetable.reserve`."""
    start, length = ucmd.cmd.add_reserved.start, ucmd.cmd.add_reserved.length
    if not length:
        raise KernelError(errno.EINVAL, "length is zero")
    last = start + length - 1
    if last > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{start:#x} + {length:#x} wraps")
    ucmd.ctx.objects.get(ucmd.cmd.id, Ioas).iopt.reserve(start, last, None)


@_operation("IOMMU_TEST_OP_MD_CHECK_MAP")
def _md_check_map(ucmd: TestCommand) -> None:
    """ENOENT: no such HWPT. EINVAL: not a mock domain; off its smallest page; other pages are mapped. EFAULT."""
    ctx, check = ucmd.ctx, ucmd.cmd.check_map
    domain = ctx.objects.get(ucmd.cmd.id, HwptPaging).domain
    if domain is None or domain.type != IOMMU_DOMAIN_UNMANAGED or domain.owner is not ctx.kernel.mock_iommu:
        raise KernelError(errno.EINVAL, f"HWPT {ucmd.cmd.id} is no mock domain")
    step = domain.pgsize_bitmap & -domain.pgsize_bitmap
    iova, length, address = check.iova, check.length, check.uptr
    if (iova | length | address) & (step - 1) or address + length > U64_MAX:
        raise KernelError(errno.EINVAL, f"{iova:#x}, {length:#x} or {address:#x} is off the smallest page")
    if not length:
        return
    offset = address & PAGE_MASK
    npages = (offset + length + PAGE_MASK) >> PAGE_SHIFT
    done = 0
    for page in _callers_pages(ucmd.call, address, npages):
        while done < length and offset < PAGE_SIZE:
            if domain.iova_to_phys(iova + done) != page + offset:
                raise KernelError(errno.EINVAL, f"another page stands at {iova + done:#x}")
            done += step
            offset += step
        offset = 0


@_operation("IOMMU_TEST_OP_MD_CHECK_REFS")
def _md_check_refs(ucmd: TestCommand) -> None:
    """EINVAL: off the page, or a wrap. EFAULT. EIO: a page is not pinned `refs` times."""
    check = ucmd.cmd.check_refs
    address, length = check.uptr, check.length
    if (address | length) & PAGE_MASK or address + length > U64_MAX:
        raise KernelError(errno.EINVAL, f"{address:#x} and {length:#x} are not whole pages")
    pinned = [
        run
        for context in ucmd.ctx.kernel.contexts
        for pages in {area.pages for ioas in context.objects.each(Ioas) for area in ioas.iopt.areas.values()}
        for run in pages.pinned_runs
    ]
    for page in _callers_pages(ucmd.call, address, length >> PAGE_SHIFT):
        refs = sum(start <= page < start + (npages << PAGE_SHIFT) for start, npages in pinned)
        if refs != check.refs:
            raise KernelError(errno.EIO, f"the page at {page:#x} is pinned {refs} times")


@_operation("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT")
def _set_memory_limit(ucmd: TestCommand) -> None:
    """EINVAL: less than a batch of one page needs."""
    if ucmd.cmd.memory_limit.limit < _BATCH_ELEMENT:
        raise KernelError(errno.EINVAL, f"a limit of {ucmd.cmd.memory_limit.limit} bytes")


def _callers_pages(call: SystemCall, address: int, npages: int) -> Iterator[int]:
    """get_user_pages_fast(), page after page: the physical address of each of the caller's. EFAULT at its turn."""
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
        raise KernelError(errno.EFAULT, f"{address:#x} is no user address")
    pages = UserPages(call.kernel, call.process, address, npages << PAGE_SHIFT, False)
    with pages.borrowed(0, npages - 1) as runs:
        return runs


def _flat(runs: Runs) -> Iterator[int]:
    for start, npages in runs:
        yield from range(start, start + (npages << PAGE_SHIFT), PAGE_SIZE)


# -- accesses --------------------------------------------------------------------------------------------------------


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


@_operation("IOMMU_TEST_OP_CREATE_ACCESS")
def _create_access(ucmd: TestCommand) -> None:
    """EOPNOTSUPP: flags. ENOMEM: no descriptor is left. Then `Access.attach`. EFAULT: the reply."""
    cmd, ctx, process = ucmd.cmd.create_access, ucmd.ctx, ucmd.call.process
    if cmd.flags & ~abi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    file = AccessFile()
    try:
        fd = ctx.kernel.install_for(process, file)
    except KernelError as error:
        raise KernelError(errno.ENOMEM, "no descriptor is left") from error
    access = access_create(ctx, bool(cmd.flags), file.unmap)
    try:
        access.attach(ucmd.cmd.id)
        cmd.out_access_fd = fd
        ucmd.respond()
    except KernelError:
        access_destroy(access)
        ctx.kernel.close_for(process, fd)
        raise
    file.held = access


@_operation("IOMMU_TEST_OP_ACCESS_REPLACE_IOAS")
def _access_replace_ioas(ucmd: TestCommand) -> None:
    """EBADFD. Then `Access.replace`."""
    _access_file(ucmd).attached.replace(ucmd.cmd.access_replace_ioas.ioas_id)


@_operation("IOMMU_TEST_OP_ACCESS_PAGES")
def _access_pages(ucmd: TestCommand) -> None:
    """ENOMEM: too long. EOPNOTSUPP: flags. EBADFD. EOPNOTSUPP: an access that pins nothing. Then `Access.pin_pages`.
    With an address: EFAULT, or EBADE if other pages are there. EFAULT: the reply. On an error nothing is pinned."""
    cmd = ucmd.cmd.access_pages
    iova, length = cmd.iova, cmd.length
    if length > _LONGEST_ACCESS:
        raise KernelError(errno.ENOMEM, f"{length:#x} bytes")
    if cmd.flags & ~abi.MOCK_FLAGS_ACCESS_WRITE:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    file = _access_file(ucmd)
    access = file.attached
    if not access.needs_pin_pages:
        raise KernelError(errno.EOPNOTSUPP, "the access pins no pages")
    pages = access.pin_pages(iova, length, bool(cmd.flags & abi.MOCK_FLAGS_ACCESS_WRITE))
    try:
        if cmd.uptr:
            start = (cmd.uptr - (iova & PAGE_MASK)) & U64_MAX
            for mine, theirs in zip(pages, _callers_pages(ucmd.call, start, len(pages)), strict=True):
                if mine != theirs:
                    raise KernelError(errno.EBADE, f"the page at {theirs:#x} is not the one at {mine:#x}")
        cmd.out_access_pages_id = file.next_id
        file.next_id += 1
        ucmd.respond()
    except KernelError:
        access.unpin_pages(iova, length)
        raise
    file.items[cmd.out_access_pages_id] = (iova, length)


@_operation("IOMMU_TEST_OP_DESTROY_ACCESS_PAGES")
def _destroy_access_pages(ucmd: TestCommand) -> None:
    """EBADFD. ENOENT: no such pin, or it had to be given back already."""
    file = _access_file(ucmd)
    item = file.items.pop(ucmd.cmd.destroy_access_pages.access_pages_id, None)
    if item is None:
        raise KernelError(errno.ENOENT, "no such pin")
    file.attached.unpin_pages(*item)


@_operation("IOMMU_TEST_OP_ACCESS_RW")
def _access_rw(ucmd: TestCommand) -> None:
    """ENOMEM: too long. EOPNOTSUPP: flags. EBADFD. EFAULT: the caller's data. Then `Access.rw`."""
    cmd, call = ucmd.cmd.access_rw, ucmd.call
    if cmd.length > _LONGEST_ACCESS:
        raise KernelError(errno.ENOMEM, f"{cmd.length:#x} bytes")
    if cmd.flags & ~(abi.MOCK_ACCESS_RW_WRITE | abi.MOCK_ACCESS_RW_SLOW_PATH):
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    access = _access_file(ucmd).attached
    slow = bool(cmd.flags & abi.MOCK_ACCESS_RW_SLOW_PATH)
    if cmd.flags & abi.MOCK_ACCESS_RW_WRITE:
        access.rw(call, cmd.iova, cmd.length, bytes(call.copy_from_user(cmd.uptr, cmd.length)), slow)
    else:
        call.copy_to_user(cmd.uptr, access.rw(call, cmd.iova, cmd.length, None, slow))
