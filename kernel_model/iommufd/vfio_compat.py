"""VFIO's type 1 container on an iommufd, after vfio_compat.c of drivers/iommu/iommufd.

`IOMMU_VFIO_IOAS` says which IOAS the container calls work on; they are translated to it. What differs from a real
container (spec by the kernel's Documentation/userspace-api/iommufd.rst): no dirty pages, no vaddr updates, no entry
limit, and type 1 (not v2) really cuts mappings, which it can because it never maps large pages.

Left out: no-IOMMU mode. Only a group of VFIO's older interface puts a context into it, and the model has none.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import Struct
from typing import Any

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.ioctl import UserCommand
from kernel_model.iommufd.ctx import CompatHandler, Context, compat_calls, table
from kernel_model.iommufd.io_pagetable import IOMMU_CACHE, IOMMU_READ, IOMMU_WRITE
from kernel_model.iommufd.ioas import Ioas, map_user
from kernel_model.process import PAGE_MASK, PAGE_SIZE
from uapi.cstruct import offsetofend
from uapi.ioctl import Ioctl
from uapi.iommufd import (
    IOMMU_VFIO_IOAS,
    IOMMU_VFIO_IOAS_CLEAR,
    IOMMU_VFIO_IOAS_GET,
    IOMMU_VFIO_IOAS_SET,
    iommu_vfio_ioas,
)
from uapi.vfio import (
    VFIO_API_VERSION,
    VFIO_CHECK_EXTENSION,
    VFIO_DMA_CC_IOMMU,
    VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_GET_API_VERSION,
    VFIO_IOMMU_GET_INFO,
    VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    VFIO_IOMMU_UNMAP_DMA,
    VFIO_NOIOMMU_IOMMU,
    VFIO_SET_IOMMU,
    VFIO_TYPE1_IOMMU,
    VFIO_UNMAP_ALL,
    VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
    vfio_iommu_type1_info,
)

_CAP_HEADER, _DMA_AVAIL, _IOVA_CAP, _IOVA_RANGE = Struct("<HHI"), Struct("<HHII"), Struct("<HHIII"), Struct("<QQ")
_U32, _U32_MAX = Struct("<I"), 0xFFFFFFFF


@table.handles(IOMMU_VFIO_IOAS)
def vfio_ioas(ucmd: UserCommand[Context, iommu_vfio_ioas]) -> None:
    """EOPNOTSUPP: reserved bits or an unknown operation. GET: ENODEV if none is set; EFAULT. SET: ENOENT."""
    cmd, ctx = ucmd.cmd, ucmd.ctx
    if cmd.__reserved:
        raise KernelError(errno.EOPNOTSUPP, "__reserved is not zero")
    if cmd.op == IOMMU_VFIO_IOAS_GET:
        cmd.ioas_id = _compat_ioas(ctx).id
        ucmd.respond()
    elif cmd.op == IOMMU_VFIO_IOAS_SET:
        ctx.vfio_ioas = ctx.objects.get(cmd.ioas_id, Ioas)
    elif cmd.op == IOMMU_VFIO_IOAS_CLEAR:
        ctx.vfio_ioas = None
    else:
        raise KernelError(errno.EOPNOTSUPP, f"no operation {cmd.op}")


def _compat_ioas(ctx: Context) -> Ioas:
    if ctx.vfio_ioas is None:
        raise KernelError(errno.ENODEV, "no IOAS is set for VFIO")
    return ctx.vfio_ioas


def _serves(ioctl: Ioctl[Any]) -> Callable[[CompatHandler], CompatHandler]:
    def register(handler: CompatHandler) -> CompatHandler:
        compat_calls[ioctl.number] = handler
        return handler

    return register


@_serves(VFIO_GET_API_VERSION)
def get_api_version(ctx: Context, call: SystemCall, arg: int) -> int:
    """The version of VFIO's interface, 0. Never fails."""
    return VFIO_API_VERSION


@_serves(VFIO_CHECK_EXTENSION)
def check_extension(ctx: Context, call: SystemCall, arg: int) -> int:
    """1 or 0. ENODEV: cache coherency is asked for without an IOAS."""
    # No-IOMMU is what the kernel's configuration can, not what this context is in.
    if arg in (VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL, VFIO_NOIOMMU_IOMMU):
        return 1
    if arg == VFIO_DMA_CC_IOMMU:
        return int(all(hwpt.enforces_cache_coherency for hwpt in _compat_ioas(ctx).hwpts))
    return 0


@_serves(VFIO_SET_IOMMU)
def set_iommu(ctx: Context, call: SystemCall, arg: int) -> int:
    """EINVAL: neither type 1 nor v2. ENODEV: no IOAS. Type 1 switches large pages off, with the errnos of that."""
    if arg not in (VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU):
        raise KernelError(errno.EINVAL, f"no IOMMU type {arg}")
    ioas = _compat_ioas(ctx)
    if arg == VFIO_TYPE1_IOMMU:
        ioas.iopt.set_large_pages(False)
    return 0


@_serves(VFIO_IOMMU_MAP_DMA)
def map_dma(ctx: Context, call: SystemCall, arg: int) -> int:
    """EFAULT. EINVAL: argsz or flags. ENODEV: no IOAS. Then as IOMMU_IOAS_MAP at a fixed IOVA."""
    cmd = vfio_iommu_type1_dma_map.from_buffer_copy(call.copy_from_user(arg, 32))
    if cmd.argsz < 32 or cmd.flags & ~(VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE):
        raise KernelError(errno.EINVAL, f"argsz {cmd.argsz}, flags {cmd.flags:#x}")
    prot = IOMMU_CACHE
    if cmd.flags & VFIO_DMA_MAP_FLAG_READ:
        prot |= IOMMU_READ
    if cmd.flags & VFIO_DMA_MAP_FLAG_WRITE:
        prot |= IOMMU_WRITE
    map_user(ctx, call.process, _compat_ioas(ctx), cmd.vaddr, cmd.size, cmd.iova, prot)
    return 0


@_serves(VFIO_IOMMU_UNMAP_DMA)
def unmap_dma(ctx: Context, call: SystemCall, arg: int) -> int:
    """EFAULT. EINVAL: argsz or flags. ENODEV: no IOAS. EINVAL: a range together with ALL. Type 1 first cuts at both
    ends, with `IoPagetable.cut`'s errnos. Then as IOMMU_IOAS_UNMAP, but an empty range is a success with size 0, and
    the bytes unmapped are written back on an error too."""
    cmd = vfio_iommu_type1_dma_unmap.from_buffer_copy(call.copy_from_user(arg, 24))
    if cmd.argsz < 24 or cmd.flags & ~VFIO_DMA_UNMAP_FLAG_ALL:
        raise KernelError(errno.EINVAL, f"argsz {cmd.argsz}, flags {cmd.flags:#x}")
    iopt = _compat_ioas(ctx).iopt
    first, last = cmd.iova, cmd.iova + cmd.size - 1
    error: KernelError | None = None
    unmapped = 0
    if cmd.flags & VFIO_DMA_UNMAP_FLAG_ALL:
        if cmd.iova or cmd.size:
            raise KernelError(errno.EINVAL, "ALL takes no range")
        first, last = 0, U64_MAX
    elif iopt.disable_large_pages:
        iopt.cut(last & U64_MAX)
        if first:
            iopt.cut(first - 1)
    try:
        if not cmd.size and not cmd.flags & VFIO_DMA_UNMAP_FLAG_ALL:
            raise KernelError(errno.EINVAL, "size is zero")
        if last > U64_MAX:
            raise KernelError(errno.EOVERFLOW, f"{cmd.iova:#x} + {cmd.size:#x} wraps")
        for length in iopt.unmap_each(first, last):
            unmapped += length
    except KernelError as failed:
        error = failed
    cmd.size = unmapped & U64_MAX
    call.copy_to_user(arg, bytes(cmd)[:24])
    if error is not None:
        raise error
    return 0


@_serves(VFIO_IOMMU_GET_INFO)
def get_info(ctx: Context, call: SystemCall, arg: int) -> int:
    """EFAULT. EINVAL: argsz below 16. ENODEV: no IOAS. Capabilities that do not fit are left out; argsz returns what
    all of them need."""
    minsz = offsetofend(vfio_iommu_type1_info, "iova_pgsizes")
    info = vfio_iommu_type1_info.from_buffer_copy(bytes(call.copy_from_user(arg, minsz)) + bytes(8))
    if info.argsz < minsz:
        raise KernelError(errno.EINVAL, f"argsz {info.argsz}")
    room, size = info.argsz, 24
    ioas = _compat_ioas(ctx)
    ranges = ioas.iopt.ranges()
    # DMA_AVAIL stands first. Its `next` is written when the second capability's turn comes.
    avail_at, iova_at = size, size + 16
    total = iova_at + _IOVA_CAP.size + len(ranges) * _IOVA_RANGE.size
    if room >= avail_at + _DMA_AVAIL.size:
        call.copy_to_user(arg + avail_at, _DMA_AVAIL.pack(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 0, _U32_MAX))
    for index, span in enumerate(ranges):
        at = iova_at + _IOVA_CAP.size + index * _IOVA_RANGE.size
        if room >= at + _IOVA_RANGE.size:
            call.copy_to_user(arg + at, _IOVA_RANGE.pack(*span))
    if room >= total:
        call.copy_to_user(arg + iova_at, _IOVA_CAP.pack(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0, len(ranges), 0))
    if room >= iova_at:
        call.copy_to_user(arg + avail_at + 4, _U32.pack(iova_at))
    info.flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS
    info.iova_pgsizes = _page_sizes(ioas)
    info.cap_offset = size if room >= total else 0
    info.argsz = total
    call.copy_to_user(arg, bytes(info)[: min(room, size)])
    return 0


def _page_sizes(ioas: Ioas) -> int:
    """iommufd_get_pagesizes(): what every domain has, sizes below a page shown as a page."""
    sizes = U64_MAX
    for domain in ioas.iopt.domains:
        sizes &= domain.pgsize_bitmap
    if sizes & PAGE_MASK:
        sizes = sizes & ~PAGE_MASK | PAGE_SIZE
    return max(sizes, ioas.iopt.iova_alignment)
