"""Accesses: the kernel's own use of an IOAS without DMA, after the second half of device.c of drivers/iommu/iommufd.

An access is attached to one IOAS at a time, pins pages of it or copies to and from them, and is told when a range is
about to be unmapped; then it must let go of its pins. The kernel's own, of hardware queues, are in `hw_queue`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from fakedev.memory import BusAbort
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, iommufd_should_fail, usercopy
from kernel_model.file import SystemCall
from kernel_model.interval import U64_MAX
from kernel_model.iommufd.ctx import Context
from kernel_model.iommufd.io_pagetable import IOMMU_READ, IOMMU_WRITE, Area
from kernel_model.iommufd.ioas import Ioas
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.pages import Pages, UserPages
from kernel_model.process import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: Called with (iova, length): the owner unpins what it has pinned there.
Unmap = Callable[[int, int], None]


class Access(Object):
    """`struct iommufd_access`. Its owner is a user until `access_destroy`, and it holds the context."""

    __slots__ = ("_ioas_unpin", "ioas", "iova_alignment", "needs_pin_pages", "unmap")

    def __init__(self, ctx: Context, needs_pin_pages: bool, unmap: Unmap) -> None:
        super().__init__(ctx)
        self.ioas: Ioas | None = None
        #: Where pins are given back; while the IOAS changes, pins are still there but no new ones are made.
        self._ioas_unpin: Ioas | None = None
        self.needs_pin_pages = needs_pin_pages
        self.iova_alignment = PAGE_SIZE if needs_pin_pages else 1
        self.unmap = unmap

    def destroy(self) -> None:
        if self.ioas is not None:
            self.change_ioas(None)
        self.ctx.put()

    # -- which IOAS --------------------------------------------------------------------------------------------------

    def attach(self, ioas_id: int) -> None:
        """iommufd_access_attach(). ENOENT: no such IOAS. EADDRINUSE: a mapping of it is misaligned for the access."""
        if self.ioas is not None:
            raise KernelBug("an access is attached twice")
        self.change_ioas(self.ctx.objects.get(ioas_id, Ioas))

    def replace(self, ioas_id: int) -> None:
        """iommufd_access_replace(): ENOENT also if the access is attached to none."""
        if self.ioas is None:
            raise KernelError(errno.ENOENT, "the access is attached to no IOAS")
        self.change_ioas(self.ctx.objects.get(ioas_id, Ioas))

    def change_ioas(self, new: Ioas | None) -> None:
        """EBUSY: within a change. EADDRINUSE: see `IoPagetable.add_access`. On an error nothing has changed."""
        current = self.ioas
        if current is not self._ioas_unpin:
            raise KernelError(errno.EBUSY, "the access is being moved")
        if current is new:
            return
        self.ioas = None
        if new is not None:
            try:
                new.iopt.add_access(self)
            except KernelError:
                self.ioas = current
                raise
            new.users += 1
        if current is not None:
            self.unmap(0, U64_MAX)
            current.iopt.remove_access(self)
            current.users -= 1
        self.ioas = self._ioas_unpin = new

    # -- using it ----------------------------------------------------------------------------------------------------

    def pin_pages(self, iova: int, length: int, write: bool) -> list[int]:
        """iommufd_access_pin_pages(): the physical address of each page of [iova, iova + length).

        EINVAL: length 0. EOVERFLOW. ENOENT: no IOAS. For each area EINVAL if it is being unmapped or does not lie at
        page boundaries of its memory; EPERM; the pin's errnos. ENOENT: a gap. On an error nothing is pinned.
        """
        found: list[int] = []
        done = iova
        try:
            for area, first, last in self._areas(iova, length):
                final = last == iova + length - 1
                end = area.start_byte + area.length
                if area.prevent_access or _start_byte(area, first) & PAGE_MASK or (not final and end & PAGE_MASK):
                    raise KernelError(errno.EINVAL, f"the mapping at {area.iova:#x} is going, or is misaligned")
                _check_prot(area, write)
                _check_kind(area)
                if injecting:
                    area.pages.access_can_fail(*_indexes(area, first, last))
                runs = area.pages.pin(*_indexes(area, first, last))
                area.num_accesses += 1
                found += [pa + (index << PAGE_SHIFT) for pa, npages in runs for index in range(npages)]
                done = last + 1
        except KernelError:
            if done > iova:
                assert self.ioas is not None
                _unpin(self.ioas, iova, done - 1)
            raise
        return found

    def unpin_pages(self, iova: int, length: int) -> None:
        """iommufd_access_unpin_pages(): exactly what one `pin_pages` took."""
        if self._ioas_unpin is None:
            raise KernelBug("an access unpins without an IOAS")
        _unpin(self._ioas_unpin, iova, iova + length - 1)

    def rw(self, call: SystemCall, iova: int, length: int, data: bytes | None, slow: bool) -> bytes:
        """iommufd_access_rw(): write `data`, or return what is there.

        EINVAL: length 0. EOVERFLOW. ENOENT: no IOAS. For each area EINVAL if it is being unmapped; EPERM; EFAULT and
        the pin's errnos. ENOENT: a gap. What came before an error has been written.
        """
        parts: list[bytes] = []
        for area, first, last in self._areas(iova, length):
            if area.prevent_access:
                raise KernelError(errno.EINVAL, f"the mapping at {area.iova:#x} is going")
            _check_prot(area, data is not None)
            _check_kind(area)
            part = None if data is None else data[first - iova : last + 1 - iova]
            parts.append(_rw(call, area.pages, _start_byte(area, first), last - first + 1, part, slow))
        return b"".join(parts)

    def _areas(self, iova: int, length: int) -> Iterator[tuple[Area, int, int]]:
        if not length:
            raise KernelError(errno.EINVAL, "length is zero")
        last = iova + length - 1
        if last > U64_MAX:
            raise KernelError(errno.EOVERFLOW, f"{iova:#x} + {length:#x} wraps")
        if self.ioas is None:
            raise KernelError(errno.ENOENT, "the access is attached to no IOAS")
        return self.ioas.iopt.contiguous(iova, last)


def _start_byte(area: Area, iova: int) -> int:
    return area.start_byte + iova - area.iova


def _indexes(area: Area, first: int, last: int) -> tuple[int, int]:
    return _start_byte(area, first) >> PAGE_SHIFT, _start_byte(area, last) >> PAGE_SHIFT


def _check_prot(area: Area, write: bool) -> None:
    if not area.prot & (IOMMU_WRITE if write else IOMMU_READ) or (write and not area.pages.writable):
        raise KernelError(errno.EPERM, f"the mapping at {area.iova:#x} forbids that")


def _check_kind(area: Area) -> None:
    if area.pages.is_dmabuf:
        raise KernelError(errno.EINVAL, f"the mapping at {area.iova:#x} is of a dma-buf")


def _unpin(ioas: Ioas, iova: int, last: int) -> None:
    for area, first, end in ioas.iopt.contiguous(iova, last):
        area.num_accesses -= 1
        area.pages.unpin(*_indexes(area, first, end))


def _rw(call: SystemCall, pages: Pages, start: int, length: int, data: bytes | None, slow: bool) -> bytes:
    """iopt_pages_rw_access(): a plain copy in the mapping process, else by one page or through the pages' pins."""
    if isinstance(pages, UserPages):
        if not slow and pages.process is call.process:
            if injecting:
                usercopy("a copy to or from the mapped memory")
            return _copy(pages, start, length, data)
        if start >> PAGE_SHIFT == (start + length - 1) >> PAGE_SHIFT and pages.process.mm.alive:
            return _rw_page(pages, start, length, data)
    return _rw_slow(pages, start, length, data)


def _copy(pages: UserPages, start: int, length: int, data: bytes | None) -> bytes:
    mm = pages.process.mm
    if data is None:
        return bytes(mm.read(pages.uptr + start, length))
    mm.write(pages.uptr + start, data)
    return b""


def _rw_page(pages: UserPages, start: int, length: int, data: bytes | None) -> bytes:
    """iopt_pages_rw_page(): the page that is at the address now, whatever is pinned, for no more than this copy does.

    A read asks for no writing though the mapping is writable, and a file that needs write-back is allowed; both are so
    of process_vm_readv(2) too, which `Mm` copies with.
    """
    if injecting:
        iommufd_should_fail(errno.EINVAL, "iopt_pages_rw_page()")
    if pages.kernel.maps_device(pages.process, pages.uptr + start, length):
        raise KernelError(errno.EFAULT, f"{pages.uptr + start:#x} maps device memory")
    return _copy(pages, start, length, data)


def _rw_slow(pages: Pages, start: int, length: int, data: bytes | None) -> bytes:
    """iopt_pages_rw_slow(): pinned pages where they are, the others as a pin for the whole mapping would find them."""
    first, last = start >> PAGE_SHIFT, (start + length - 1) >> PAGE_SHIFT
    if injecting:
        pages.reader_can_fail(first, last)
    memory = pages.kernel.memory
    parts: list[bytes] = []
    offset, done = start & PAGE_MASK, 0
    with pages.borrowed(first, last) as runs:
        try:
            for pa, npages in runs:
                size = min((npages << PAGE_SHIFT) - offset, length - done)
                if data is None:
                    parts.append(bytes(memory.read(pa + offset, size)))
                else:
                    memory.write(pa + offset, data[done : done + size])
                done += size
                offset = 0
        except BusAbort as abort:  # memory that a real pin would have kept
            raise KernelError(errno.EFAULT, "the memory has gone") from abort
    return b"".join(parts)


def access_create(ctx: Context, needs_pin_pages: bool, unmap: Unmap) -> Access:
    """iommufd_access_create(): visible at once, with the caller as its user."""
    access = Access(ctx, needs_pin_pages, unmap)
    access.users += 1
    ctx.get()
    ctx.objects.finalize(access)
    return access


def access_destroy(access: Access) -> None:
    """iommufd_access_destroy()."""
    access.ctx.objects.destroy_user(access)
