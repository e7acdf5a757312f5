"""Operations that look behind the scenes, after drivers/iommu/iommufd/selftest.c.

MD_CHECK_REFS passes over compound pages as the kernel does. To the model these are pages of hugetlbfs: whether the host
made a transparent huge page of ordinary memory does not change an answer. Left out: SET_TEMP_MEMORY_LIMIT says no more
than how often a pin can fail: there are no batches.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.iommu.core import IOMMU_DOMAIN_UNMANAGED
from kernel_model.iommu.mock.attach import MockDevice
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.hwpt import HwptPaging
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.selftest.operations import TestCommand, callers_pages, operation
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from uapi.behaviours import has
from uapi.iommufd_test import MOCK_DEV_CACHE_ID_MAX, MOCK_PAGE_SIZE

#: The size of one element of a batch of pages; no limit is smaller.
_BATCH_ELEMENT = 12


@operation("IOMMU_TEST_OP_ADD_RESERVED")
def _add_reserved(ucmd: TestCommand) -> None:
    """EINVAL: length 0. EOVERFLOW: the range wraps. ENOENT: no such IOAS. EADDRINUSE: see `IoPagetable.reserve`."""
    start, length = ucmd.cmd.add_reserved.start, ucmd.cmd.add_reserved.length
    if not length:
        raise KernelError(errno.EINVAL, "length is zero")
    last = start + length - 1
    if last > U64_MAX:
        raise KernelError(errno.EOVERFLOW, f"{start:#x} + {length:#x} wraps")
    ucmd.ctx.objects.get(ucmd.cmd.id, Ioas).iopt.reserve(start, last, None)


@operation("IOMMU_TEST_OP_MD_CHECK_MAP")
def _md_check_map(ucmd: TestCommand) -> None:
    """ENOENT: no such HWPT. EINVAL: not a mock domain; off its smallest page; other pages are mapped. EFAULT."""
    ctx, check = ucmd.ctx, ucmd.cmd.check_map
    off_the_page = (check.iova | check.length | check.uptr) % MOCK_PAGE_SIZE
    if off_the_page and not has(ctx.kernel.release, "mock-check-map-looks-first"):
        raise KernelError(errno.EINVAL, "an argument is off the page of every mock domain")
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
    for page in callers_pages(ucmd.call, address, npages):
        while done < length and offset < PAGE_SIZE:
            if domain.iova_to_phys(iova + done) != page + offset:
                raise KernelError(errno.EINVAL, f"another page stands at {iova + done:#x}")
            done += step
            offset += step
        offset = 0


@operation("IOMMU_TEST_OP_MD_CHECK_REFS")
def _md_check_refs(ucmd: TestCommand) -> None:
    """EINVAL: off the page, or a wrap. EFAULT. EIO: a page outside huge ones is not pinned `refs` times."""
    check = ucmd.cmd.check_refs
    address, length = check.uptr, check.length
    if (address | length) & PAGE_MASK or address + length > U64_MAX:
        raise KernelError(errno.EINVAL, f"{address:#x} and {length:#x} are not whole pages")
    pinned = [
        run
        for context in (*ucmd.ctx.kernel.contexts, *ucmd.ctx.kernel.lost_contexts)
        for pages in {area.pages for ioas in context.objects.each(Ioas) for area in ioas.iopt.areas.values()}
        for run in pages.pinned_runs
    ]
    compound = list(_compound(ucmd.call, address, length))
    for index, page in enumerate(callers_pages(ucmd.call, address, length >> PAGE_SHIFT)):
        where = address + (index << PAGE_SHIFT)
        if any(start <= where < end for start, end in compound):
            continue
        refs = sum(start <= page < start + (npages << PAGE_SHIFT) for start, npages in pinned)
        if refs != check.refs:
            raise KernelError(errno.EIO, f"the page at {page:#x} is pinned {refs} times")


def _compound(call: SystemCall, address: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of the caller's range, as [start, end), that are made of huge pages."""
    mm = call.process.mm
    buffer = mm.buffers.find(address, length) if mm.buffers is not None else None
    if buffer is not None and buffer.huge:
        yield address, address + length
    else:
        yield from ((vma.start, vma.end) for vma in mm.vmas(address, address + length) if vma.huge)


@operation("IOMMU_TEST_OP_DEV_CHECK_CACHE")
def _dev_check_cache(ucmd: TestCommand) -> None:
    """ENOENT: no such device. EINVAL: no such entry, or it holds something else."""
    check = ucmd.cmd.check_dev_cache
    device = ucmd.ctx.objects.get(ucmd.cmd.id, IommufdDevice).dev
    if not isinstance(device, MockDevice) or check.id > MOCK_DEV_CACHE_ID_MAX or device.cache[check.id] != check.cache:
        raise KernelError(errno.EINVAL, f"entry {check.id} is not {check.cache:#x}")


@operation("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT")
def _set_memory_limit(ucmd: TestCommand) -> None:
    """EINVAL: less than a batch of one page needs."""
    if ucmd.cmd.memory_limit.limit < _BATCH_ELEMENT:
        raise KernelError(errno.EINVAL, f"a limit of {ucmd.cmd.memory_limit.limit} bytes")
    ucmd.ctx.kernel.faults.temp_memory_limit = ucmd.cmd.memory_limit.limit
