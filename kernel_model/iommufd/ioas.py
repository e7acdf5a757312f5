"""The IOAS object and its ioctls, after ioas.c of drivers/iommu/iommufd.

Here are the argument checks in the kernel's order; what a mapping is, is in `io_pagetable` and `pages`.
"""

from __future__ import annotations

import contextlib
import errno
from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING

from kernel_model.dma_buf import DmaBuf, host_size
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommu.noiommu import NOIOMMU
from kernel_model.iommufd.ctx import ACCOUNT_MM, ACCOUNT_USER, Context, table
from kernel_model.iommufd.io_pagetable import IOMMU_CACHE, IOMMU_READ, IOMMU_WRITE, IoPagetable
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.pages import FilePages, Pages, UserPages
from kernel_model.iommufd.pages_dmabuf import DmabufPages
from kernel_model.process import CAP_SYS_RAWIO, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Process
from uapi.behaviours import has
from uapi.iommufd import (
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_ALLOW_IOVAS,
    IOMMU_IOAS_CHANGE_PROCESS,
    IOMMU_IOAS_COPY,
    IOMMU_IOAS_IOVA_RANGES,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FILE,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
    IOMMU_IOAS_NOIOMMU_GET_PA,
    IOMMU_IOAS_UNMAP,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_OP_SET,
    iommu_ioas_alloc,
    iommu_ioas_allow_iovas,
    iommu_ioas_change_process,
    iommu_ioas_copy,
    iommu_ioas_iova_ranges,
    iommu_ioas_map,
    iommu_ioas_map_file,
    iommu_ioas_noiommu_get_pa,
    iommu_ioas_unmap,
    iommu_option,
)
from uapi.iommufd_test import MOCK_FLAGS_ACCESS_SYZ

if TYPE_CHECKING:
    from kernel_model.iommufd.hwpt import HwptPaging

_RANGE = Struct("<QQ")
_ACCESS_FLAGS = IOMMU_IOAS_MAP_WRITEABLE | IOMMU_IOAS_MAP_READABLE
_MAP_FLAGS = IOMMU_IOAS_MAP_FIXED_IOVA | _ACCESS_FLAGS


class Ioas(Object):
    """`struct iommufd_ioas`."""

    __slots__ = ("hwpts", "iopt")

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.iopt = IoPagetable()
        #: Paging HWPTs made on this IOAS, oldest first.
        self.hwpts: list[HwptPaging] = []

    def destroy(self) -> None:
        self.iopt.destroy()


@table.handles(IOMMU_IOAS_ALLOC)
def ioas_alloc(ucmd: UserCommand[Context, iommu_ioas_alloc]) -> None:
    """EOPNOTSUPP: flags. EFAULT: the reply; then there is no IOAS."""
    if ucmd.cmd.flags:
        raise KernelError(errno.EOPNOTSUPP, "no flags are defined")
    objects = ucmd.ctx.objects
    ioas = Ioas(ucmd.ctx)
    try:
        ucmd.cmd.out_ioas_id = ioas.id
        ucmd.respond()
    except KernelError:
        objects.abort(ioas)
        raise
    objects.finalize(ioas)


@table.handles(IOMMU_IOAS_IOVA_RANGES)
def ioas_iova_ranges(ucmd: UserCommand[Context, iommu_ioas_iova_ranges]) -> None:
    """EOPNOTSUPP: reserved bits. ENOENT. EFAULT. EMSGSIZE: more ranges than room, after the reply was written."""
    cmd, call = ucmd.cmd, ucmd.call
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    iopt = ucmd.ctx.objects.get(cmd.ioas_id, Ioas).iopt
    room = cmd.num_iovas
    ranges = iopt.ranges()
    for index, span in enumerate(ranges[:room]):
        call.copy_to_user(cmd.allowed_iovas + index * _RANGE.size, _RANGE.pack(*span))
    cmd.num_iovas = len(ranges)
    cmd.out_iova_alignment = iopt.iova_alignment
    ucmd.respond()
    if len(ranges) > room:
        raise KernelError(errno.EMSGSIZE, f"{len(ranges)} ranges, room for {room}")


@table.handles(IOMMU_IOAS_ALLOW_IOVAS)
def ioas_allow_iovas(ucmd: UserCommand[Context, iommu_ioas_allow_iovas]) -> None:
    """EOPNOTSUPP: reserved bits. ENOENT. For each range EFAULT; EINVAL if start >= last or it overlaps an earlier one.
    EADDRINUSE: a range is reserved. On an error the old list stays."""
    cmd = ucmd.cmd
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    iopt = ucmd.ctx.objects.get(cmd.ioas_id, Ioas).iopt
    firsts: list[int] = []  # ascending, with the end of each: the caller may have given a million
    lasts: list[int] = []
    for index in range(cmd.num_iovas):
        address = (cmd.allowed_iovas + index * _RANGE.size) & U64_MAX
        first, last = _RANGE.unpack(ucmd.call.copy_from_user(address, _RANGE.size))
        if first >= last:
            raise KernelError(errno.EINVAL, f"the range {first:#x}-{last:#x}")
        where = bisect_right(firsts, last)
        if where and lasts[where - 1] >= first:
            raise KernelError(errno.EINVAL, f"the range {first:#x}-{last:#x} overlaps an earlier one")
        if injecting:
            kmalloc("struct iopt_allowed")
        firsts.insert(where, first)
        lasts.insert(where, last)
    iopt.set_allowed(list(zip(firsts, lasts, strict=True)))


def _prot(flags: int) -> int:
    prot = IOMMU_CACHE
    if flags & IOMMU_IOAS_MAP_WRITEABLE:
        prot |= IOMMU_WRITE
    if flags & IOMMU_IOAS_MAP_READABLE:
        prot |= IOMMU_READ
    return prot


def map_user(ctx: Context, process: Process, ioas: Ioas, address: int, length: int, iova: int | None, prot: int) -> int:
    """iopt_map_user_pages(): EOVERFLOW the address wraps; EINVAL length 0; then `IoPagetable.map_pages`."""
    pages = UserPages(ctx.kernel, process, address, length, bool(prot & IOMMU_WRITE))
    return _map_common(ctx, ioas, pages, address & PAGE_MASK, length, iova, prot)


def _map_common(
    ctx: Context, ioas: Ioas, pages: Pages, start_byte: int, length: int, iova: int | None, prot: int
) -> int:
    """iopt_map_common()."""
    if ctx.account_mode == ACCOUNT_MM and pages.account_mode == ACCOUNT_USER:
        pages.account_mode = ACCOUNT_MM
    return ioas.iopt.map_pages([(pages, start_byte, length)], length, iova, prot)


@table.handles(IOMMU_IOAS_MAP)
def ioas_map(ucmd: UserCommand[Context, iommu_ioas_map]) -> None:
    """In order: EOPNOTSUPP unknown flags or reserved bits; EOVERFLOW iova or length 2^64-1; EINVAL neither readable nor
    writeable; ENOENT; EOVERFLOW the address wraps; EINVAL length 0; then `IoPagetable.map_pages`. EFAULT: the reply;
    the mapping stays."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags & ~_MAP_FLAGS or cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} or __reserved")
    if cmd.iova == U64_MAX or cmd.length == U64_MAX:
        raise KernelError(errno.EOVERFLOW, "iova or length is 2^64-1")
    if not cmd.flags & _ACCESS_FLAGS:
        raise KernelError(errno.EINVAL, "neither readable nor writeable")
    ioas = ctx.objects.get(cmd.ioas_id, Ioas)
    iova = cmd.iova if cmd.flags & IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.iova = map_user(ctx, ucmd.call.process, ioas, cmd.user_va, cmd.length, iova, _prot(cmd.flags))
    ucmd.respond()


@table.handles(IOMMU_IOAS_MAP_FILE)
def ioas_map_file(ucmd: UserCommand[Context, iommu_ioas_map_file]) -> None:
    """As MAP, with the file's checks in the place of the address's: EINVAL length 0; EOVERFLOW start + length wraps;
    `DmabufPages`' errnos for a dma-buf; EBADF. Whether a file can be pinned shows when a domain needs it."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.flags & ~_MAP_FLAGS:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    if cmd.iova == U64_MAX or cmd.length == U64_MAX:
        raise KernelError(errno.EOVERFLOW, "iova or length is 2^64-1")
    if not cmd.flags & _ACCESS_FLAGS:
        raise KernelError(errno.EINVAL, "neither readable nor writeable")
    ioas = ctx.objects.get(cmd.ioas_id, Ioas)
    if not cmd.length:
        raise KernelError(errno.EINVAL, "length is zero")
    if cmd.start + cmd.length - 1 > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{cmd.start:#x} + {cmd.length:#x} wraps")
    writable = bool(cmd.flags & IOMMU_IOAS_MAP_WRITEABLE)
    pages = _file_pages(ctx, ucmd.call, cmd, writable)
    iova = cmd.iova if cmd.flags & IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.iova = _map_common(ctx, ioas, pages, cmd.start & PAGE_MASK, cmd.length, iova, _prot(cmd.flags))
    ucmd.respond()


def _file_pages(ctx: Context, call: SystemCall, cmd: iommu_ioas_map_file, writable: bool) -> Pages:
    kernel, process = ctx.kernel, call.process
    found = kernel.lookup(cmd.fd, process)
    if isinstance(found, DmaBuf):
        return DmabufPages(kernel, process, found, cmd.start, cmd.length, writable)
    size = None if found is not None else host_size(process, cmd.fd)
    if size is not None and has(kernel.release, "dma-buf-in-map-file"):
        return DmabufPages(kernel, process, DmaBuf(size), cmd.start, cmd.length, writable)
    return FilePages(kernel, process, cmd.fd, cmd.start, cmd.length, writable)


@table.handles(IOMMU_IOAS_COPY)
def ioas_copy(ucmd: UserCommand[Context, iommu_ioas_copy]) -> None:
    """In order: EOPNOTSUPP unknown flags; EOVERFLOW length or an iova 2^64-1; EINVAL neither readable nor writeable;
    ENOENT source IOAS; EINVAL, EOVERFLOW, ENOENT source range; ENOENT destination IOAS; then
    `IoPagetable.map_pages`."""
    cmd, objects = ucmd.cmd, ucmd.ctx.objects
    if cmd.flags & MOCK_FLAGS_ACCESS_SYZ:  # a kernel with CONFIG_IOMMUFD_TEST
        cmd.flags &= ~MOCK_FLAGS_ACCESS_SYZ
        with contextlib.suppress(KernelError):
            cmd.src_iova = objects.get(cmd.src_ioas_id, Ioas).iopt.nth_area_iova(cmd.src_iova)
    if cmd.flags & ~_MAP_FLAGS:
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x}")
    if U64_MAX in (cmd.length, cmd.src_iova, cmd.dst_iova):
        raise KernelError(errno.EOVERFLOW, "length or an iova is 2^64-1")
    if not cmd.flags & _ACCESS_FLAGS:
        raise KernelError(errno.EINVAL, "neither readable nor writeable")
    slices = objects.get(cmd.src_ioas_id, Ioas).iopt.slices(cmd.src_iova, cmd.length)
    try:
        destination = objects.get(cmd.dst_ioas_id, Ioas)
    except KernelError:
        for pages, _, _ in slices:
            pages.put()
        raise
    iova = cmd.dst_iova if cmd.flags & IOMMU_IOAS_MAP_FIXED_IOVA else None
    cmd.dst_iova = destination.iopt.map_pages(slices, cmd.length, iova, _prot(cmd.flags))
    ucmd.respond()


@table.handles(IOMMU_IOAS_UNMAP)
def ioas_unmap(ucmd: UserCommand[Context, iommu_ioas_unmap]) -> None:
    """iova 0 with length 2^64-1 unmaps everything, even nothing. Otherwise ENOENT IOAS; EOVERFLOW 2^64-1 or a wrap;
    EINVAL length 0; then `IoPagetable.unmap_range`; ENOENT nothing was there."""
    cmd = ucmd.cmd
    iopt = ucmd.ctx.objects.get(cmd.ioas_id, Ioas).iopt
    if cmd.iova == 0 and cmd.length == U64_MAX:
        cmd.length = iopt.unmap_range(0, U64_MAX)
    else:
        if cmd.iova == U64_MAX or cmd.length == U64_MAX:
            raise KernelError(errno.EOVERFLOW, "iova or length is 2^64-1")
        if not cmd.length:
            raise KernelError(errno.EINVAL, "length is zero")
        last = cmd.iova + cmd.length - 1
        if last > U64_MAX:
            raise KernelError(errno.EOVERFLOW, f"{cmd.iova:#x} + {cmd.length:#x} wraps")
        unmapped = iopt.unmap_range(cmd.iova, last)
        if not unmapped:
            raise KernelError(errno.ENOENT, f"nothing is mapped in {cmd.iova:#x}-{last:#x}")
        cmd.length = unmapped
    ucmd.respond()


def option_huge_pages(ucmd: UserCommand[Context, iommu_option]) -> None:
    """IOMMU_OPTION_HUGE_PAGES: ENOENT no such IOAS; EOPNOTSUPP unknown operation; EINVAL a value that is not 0 or 1;
    see `IoPagetable.set_large_pages`."""
    cmd = ucmd.cmd
    iopt = ucmd.ctx.objects.get(cmd.object_id, Ioas).iopt
    if cmd.op == IOMMU_OPTION_OP_GET:
        cmd.val64 = int(not iopt.disable_large_pages)
    elif cmd.op == IOMMU_OPTION_OP_SET:
        if cmd.val64 not in (0, 1):
            raise KernelError(errno.EINVAL, f"HUGE_PAGES {cmd.val64}")
        iopt.set_large_pages(bool(cmd.val64))
    else:
        raise KernelError(errno.EOPNOTSUPP, f"no operation {cmd.op}")


@table.handles(IOMMU_IOAS_CHANGE_PROCESS)
def ioas_change_process(ucmd: UserCommand[Context, iommu_ioas_change_process]) -> None:
    """EOPNOTSUPP: reserved bits. EINVAL: a mapping of any IOAS of the context is not of a file. ENOMEM: the caller's
    account cannot take the pinned pages; then nothing has changed. EINVAL, and all is changed: a process that has gone
    paid from its own account."""
    if ucmd.cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    owned: dict[int, FilePages] = {}
    for ioas in ucmd.ctx.objects.each(Ioas):
        for area in ioas.iopt.areas.values():
            if not isinstance(area.pages, FilePages):
                raise KernelError(errno.EINVAL, f"the mapping at {area.iova:#x} is not of a file")
            owned[id(area.pages)] = area.pages
    _charge_process(ucmd, list(owned.values()))


def _charge_process(ucmd: UserCommand[Context, iommu_ioas_change_process], owned: list[FilePages]) -> None:
    process, kernel = ucmd.call.process, ucmd.ctx.kernel
    moving = [pages for pages in owned if pages.process is not process]
    for mode in (ACCOUNT_USER, ACCOUNT_MM):
        npages = sum(pages.npinned for pages in moving if pages.account_mode == mode)
        charged = kernel.user(process.credentials.uid()).locked_vm if mode == ACCOUNT_USER else process.mm.locked_vm
        if npages and charged + npages > process.credentials.memlock() >> PAGE_SHIFT:
            raise KernelError(errno.ENOMEM, f"{charged} + {npages} pages are over RLIMIT_MEMLOCK")
    dead = [pages for pages in moving if pages.account_mode == ACCOUNT_MM and not pages.process.mm.alive]
    for pages in moving:
        pages.change_process(process)
    if dead:  # their own account cannot be had; the kernel notices after the change, with a WARNING
        raise KernelError(errno.EINVAL, "the process that paid has gone")


@table.handles(IOMMU_IOAS_NOIOMMU_GET_PA)
def ioas_noiommu_get_pa(ucmd: UserCommand[Context, iommu_ioas_noiommu_get_pa]) -> None:
    """In order: EPERM without CAP_SYS_RAWIO; EOPNOTSUPP flags or reserved bits; EINVAL length 0; EOVERFLOW iova 2^64-1;
    ENOENT no such IOAS, nothing mapped; EINVAL: a dma-buf that was revoked; EOPNOTSUPP: the mapping is in no no-IOMMU
    domain. EFAULT: the reply. The length becomes that of the contiguous memory within the mapping, and no longer."""
    cmd = ucmd.cmd
    if not ucmd.call.process.capable(CAP_SYS_RAWIO):
        raise KernelError(errno.EPERM, "physical addresses are shown with CAP_SYS_RAWIO")
    if cmd.flags or cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "flags or __reserved")
    if not cmd.length:
        raise KernelError(errno.EINVAL, "length is zero")
    if cmd.iova == U64_MAX:
        raise KernelError(errno.EOVERFLOW, "iova is 2^64-1")
    iopt = ucmd.ctx.objects.get(cmd.ioas_id, Ioas).iopt
    cmd.out_phys, cmd.length = _get_phys(iopt, cmd.iova, cmd.length)
    ucmd.respond()


def _get_phys(iopt: IoPagetable, iova: int, most: int) -> tuple[int, int]:
    """iopt_get_phys(): the physical address at `iova`, and how many bytes are contiguous from there."""
    area = iopt.area_at(iova, iova)
    if area is None:
        raise KernelError(errno.ENOENT, f"nothing is mapped at {iova:#x}")
    if area.pages.revoked:
        raise KernelError(errno.EINVAL, "the dma-buf is revoked")
    if not area.pinned or iopt.domains[0].owner is not NOIOMMU:
        raise KernelError(errno.EOPNOTSUPP, f"{iova:#x} is mapped for no device without an IOMMU")
    found = iopt.domains[0].iova_to_phys(iova)
    if found is None:
        raise KernelBug(f"{iova:#x} is in an area and in no table")
    length = min(PAGE_SIZE - (iova & PAGE_MASK), area.last - iova + 1)
    physical = found
    while length < most and iova + PAGE_SIZE <= area.last:
        iova += PAGE_SIZE
        physical += PAGE_SIZE
        if iopt.domains[0].iova_to_phys(iova) != physical:
            break
        length += PAGE_SIZE
    return found, min(length, most)
