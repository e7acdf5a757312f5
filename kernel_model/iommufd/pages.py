"""Where the pages of a mapping come from, who pins them, and who pays, after pages.c of drivers/iommu/iommufd.

One `Pages` is made by one MAP or MAP_FILE and shared by every area that COPY or a split derives from it. A page is
pinned once however many areas and domains use it, and unpinned when the last one goes; two MAPs of one address are two
`Pages` and pin and pay twice. Nothing is looked at before the first pin.

A pin here holds no page of the host's kernel. It checks what the kernel would check (mapped, permitted, of a kind that
can be pinned), finds the physical addresses, keeps memory alive where the model owns it, and charges the account. Left
out: making pages (a hole of a file stays one until it is used), and pages that another process unmaps while pinned:
they are gone, or what is mapped there next.
"""

from __future__ import annotations

import ctypes
import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, iommufd_should_fail, kmalloc
from kernel_model.interval import U64_MAX, complement
from kernel_model.iommufd.ctx import ACCOUNT_MM, ACCOUNT_NONE, ACCOUNT_USER
from kernel_model.process import CAP_IPC_LOCK, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, Process, Vma
from uapi.behaviours import has

if TYPE_CHECKING:
    from kernel_model.iommu.core import Domain
    from kernel_model.iommufd.io_pagetable import Area
    from kernel_model.kernel import Kernel

#: Pages of the host. A kernel that pins more, say of a sparse mapping, runs out of memory on the way.
_HOST_PAGES = os.sysconf("SC_PHYS_PAGES")

#: Physically contiguous pieces of a mapping: (physical address, pages).
Runs = list[tuple[int, int]]

_TMPFS_MAGIC, _HUGETLBFS_MAGIC = 0x01021994, 0x958458F6
_libc = ctypes.CDLL(None, use_errno=True)


def filesystem_type(fd: int) -> int:
    """The magic number of the file system that a descriptor's file is on (statfs(2)'s f_type)."""
    block = (ctypes.c_uint64 * 16)()
    if _libc.fstatfs(fd, block) != 0:
        return 0
    return int(block[0])


class _Pinned:
    """Pages [first, last] of a `Pages`, pinned `count` times."""

    __slots__ = ("count", "first", "last", "runs")

    def __init__(self, first: int, last: int, runs: Runs) -> None:
        self.first = first
        self.last = last
        self.runs = runs
        self.count = 0


class Pages:
    """`struct iopt_pages`. Indexes count 4 KiB pages from the page that holds the first byte."""

    __slots__ = (
        "_holds",
        "_pinned",
        "account_mode",
        "kernel",
        "npages",
        "npinned",
        "process",
        "uid",
        "users",
        "writable",
    )

    def __init__(self, kernel: Kernel, process: Process, page_offset: int, length: int, writable: bool) -> None:
        if length == 0 or length > U64_MAX - PAGE_SIZE:
            raise KernelError(errno.EINVAL, f"a mapping of {length:#x} bytes")
        if injecting:
            kmalloc("struct iopt_pages")
        self.kernel = kernel
        self.process = process
        self.uid = process.credentials.uid()
        self.writable = writable
        # In 64 bits, as the kernel rounds up: a length within two pages of 2^64 comes out as no page at all.
        self.npages = ((length + page_offset + PAGE_MASK) & U64_MAX) >> PAGE_SHIFT
        self.account_mode = ACCOUNT_NONE if process.capable(CAP_IPC_LOCK) else ACCOUNT_USER
        #: Areas that use this.
        self.users = 1
        #: Pages pinned, each counted once.
        self.npinned = 0
        self._pinned: list[_Pinned] = []
        self._holds: list[Callable[[], None]] = []

    #: Accesses cannot use these pages, and an area of them is not cut.
    is_dmabuf = False

    @property
    def revoked(self) -> bool:
        """Whether they have been taken from every domain for good."""
        return False

    def protection(self, prot: int) -> int:
        """The IOMMU_* bits for a domain, from those of the area."""
        return prot

    def track(self, domain: Domain, area: Area) -> bool:
        """An area of these comes into a domain; whether there is something to map."""
        return True

    def untrack(self, domain: Domain, area: Area) -> bool:
        """It leaves the domain; whether something is mapped."""
        return True

    @property
    def alignment_address(self) -> int:
        """The address whose alignment an automatic IOVA keeps, without the area's own start."""
        raise KernelBug("abstract")

    def resolve(self, first: int, last: int) -> Runs:
        """Check pages [first, last] as a pin does and say where they are. The kind's errnos."""
        raise KernelBug("abstract")

    def released(self) -> None:
        """The last area is gone."""

    def get(self) -> Pages:
        self.users += 1
        return self

    def put(self) -> None:
        self.users -= 1
        if self.users == 0:
            if self._pinned:
                raise KernelBug("pages are freed while pinned")
            self.released()

    def pin(self, first: int, last: int) -> Runs:
        """Pin [first, last] once more; where the pages are.

        ENOMEM: the account's limit, after everything was pinned. Otherwise `resolve`'s errnos. After an error all is as
        it was.
        """
        held = len(self._holds)
        try:
            return self._pin(first, last)
        except KernelError:
            self._drop_holds(held)
            raise

    def _pin(self, first: int, last: int) -> Runs:
        if last - first >= _HOST_PAGES:
            raise KernelError(errno.ENOMEM, f"{last - first + 1} pages are more than the machine has")
        if not self._pinned:
            runs = self.resolve(first, last)
            self._charge(last - first + 1)
            piece = _Pinned(first, last, runs)
            piece.count = 1
            self._pinned.append(piece)
            return runs
        fresh: list[_Pinned] = []
        covered = [(piece.first, piece.last) for piece in self._pinned]
        for hole_first, hole_last in complement(covered, first, last):
            fresh.append(_Pinned(hole_first, hole_last, self.resolve(hole_first, hole_last)))
        self._charge(sum(piece.last - piece.first + 1 for piece in fresh))
        self._pinned = sorted([*self._pinned, *fresh], key=lambda piece: piece.first)
        self._split(first)
        self._split(last + 1)
        runs = []
        for piece in self._overlapping(first, last):
            piece.count += 1
            runs += piece.runs
        return _join(runs)

    def reader_can_fail(self, first: int, last: int) -> None:
        """Where a pfn_reader offers to fail: its batch, its list of pages, and each pin that fills the list."""
        iommufd_should_fail(errno.ENOMEM, "a batch of pages")
        at_once = self.kernel.faults.temp_memory_limit // 8
        for number, (hole_first, hole_last) in enumerate(self._unpinned(first, last)):
            if not number:
                iommufd_should_fail(errno.ENOMEM, "a list of pages")
            for _ in range(hole_first, hole_last + 1, at_once):
                iommufd_should_fail(errno.EFAULT, "pin_user_pages()")

    def access_can_fail(self, first: int, last: int) -> None:
        """Where iopt_area_add_access() and iopt_pages_fill_xarray() do; the list of pages is the caller's."""
        kmalloc("struct iopt_pages_access")
        for _ in self._unpinned(first, last):
            iommufd_should_fail(errno.EFAULT, "pin_user_pages()")
        iommufd_should_fail(errno.EINVAL, "pages_to_xarray()")

    def _unpinned(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        return complement([(piece.first, piece.last) for piece in self._pinned], first, last)

    def unpin(self, first: int, last: int) -> None:
        """Take one pin of [first, last] back."""
        self._split(first)
        self._split(last + 1)
        gone = 0
        for piece in self._overlapping(first, last):
            piece.count -= 1
            if piece.count == 0:
                gone += piece.last - piece.first + 1
        if gone:
            self._pinned = [piece for piece in self._pinned if piece.count]
            self._uncharge(gone)
            if not self._pinned:
                self._drop_holds(0)

    @contextmanager
    def borrowed(self, first: int, last: int) -> Iterator[Runs]:
        """Where pages [first, last] are, for the length of a copy: nothing is charged. `resolve`'s errnos."""
        held = len(self._holds)
        try:
            yield _join(self._looked_up(first, last))
        finally:
            self._drop_holds(held)

    def _looked_up(self, first: int, last: int) -> Runs:
        """Pinned pages where they are, the others as a pin would find them."""
        found: list[tuple[int, Runs]] = []
        covered = [(piece.first, piece.last) for piece in self._pinned]
        for piece in self._overlapping(first, last):
            start, stop = max(piece.first, first), min(piece.last, last)
            _, tail = _cut(piece.runs, start - piece.first)
            found.append((start, _cut(tail, stop - start + 1)[0]))
        for start, stop in complement(covered, first, last):
            found.append((start, self.resolve(start, stop)))
        return [run for _, runs in sorted(found) for run in runs]

    def pins(self) -> list[tuple[int, int, int]]:
        """(first, last, how often) of the pages that are pinned."""
        return [(piece.first, piece.last, piece.count) for piece in self._pinned]

    @property
    def pinned_runs(self) -> Runs:
        """Where the pages are that this pins."""
        return [run for piece in self._pinned for run in piece.runs]

    def hold(self, release: Callable[[], None]) -> None:
        """Have `release` called when nothing of this is pinned any more."""
        self._holds.append(release)

    def _drop_holds(self, keep: int) -> None:
        """Release all holds but the oldest `keep`."""
        holds, self._holds = self._holds[keep:], self._holds[:keep]
        for release in holds:
            release()

    def _overlapping(self, first: int, last: int) -> list[_Pinned]:
        return [piece for piece in self._pinned if piece.last >= first and piece.first <= last]

    def _split(self, index: int) -> None:
        """Make a piece start at `index` if one covers it."""
        pieces = self._pinned
        where = bisect_right([piece.first for piece in pieces], index) - 1 if len(pieces) > 1 else 0
        if where < 0 or not pieces:
            return
        piece = pieces[where]
        if not piece.first < index <= piece.last:
            return
        head, tail = _cut(piece.runs, index - piece.first)
        rest = _Pinned(index, piece.last, tail)
        rest.count = piece.count
        piece.last, piece.runs = index - 1, head
        pieces.insert(where + 1, rest)

    def _charge(self, npages: int) -> None:
        """iopt_pages_update_pinned(), upwards. ENOMEM over RLIMIT_MEMLOCK in modes USER and MM."""
        mm = self.process.mm
        if injecting and npages:
            iommufd_should_fail(errno.ENOMEM, "a charge")
        if self.account_mode != ACCOUNT_NONE and npages:
            limit = self.process.credentials.memlock() >> PAGE_SHIFT
            user = self.kernel.user(self.uid)
            charged = user.locked_vm if self.account_mode == ACCOUNT_USER else mm.locked_vm
            if charged + npages > limit:
                raise KernelError(errno.ENOMEM, f"{charged} + {npages} pages are over RLIMIT_MEMLOCK")
            if self.account_mode == ACCOUNT_USER:
                user.locked_vm += npages
            else:
                mm.locked_vm += npages
        mm.pinned_vm += npages
        self.npinned += npages

    def _uncharge(self, npages: int) -> None:
        mm = self.process.mm
        if self.account_mode == ACCOUNT_USER:
            self.kernel.user(self.uid).locked_vm -= npages
        elif self.account_mode == ACCOUNT_MM:
            mm.locked_vm -= npages
        mm.pinned_vm -= npages
        self.npinned -= npages


class UserPages(Pages):
    """Pages by their address in the mapping process (IOMMU_IOAS_MAP)."""

    __slots__ = ("uptr",)

    def __init__(self, kernel: Kernel, process: Process, address: int, length: int, writable: bool) -> None:
        length_first = length > U64_MAX - PAGE_SIZE and not has(kernel.release, "wrap-before-length")
        if address + length > U64_MAX and not length_first:
            raise KernelError(errno.EOVERFLOW, f"{address:#x} + {length:#x} wraps")
        super().__init__(kernel, process, address & PAGE_MASK, length, writable)
        self.uptr = address & ~PAGE_MASK

    @property
    def alignment_address(self) -> int:
        return self.uptr

    def resolve(self, first: int, last: int) -> Runs:
        """EFAULT: unmapped, not permitted, device memory, a dead process, or a writable shared mapping of a file
        system that needs write-back."""
        start = self.uptr + (first << PAGE_SHIFT)
        length = (last - first + 1) << PAGE_SHIFT
        mm = self.process.mm
        if start + length > TASK_SIZE:
            raise KernelError(errno.EFAULT, f"{start:#x} is no user address")
        if mm.buffers is not None and mm.buffers.find(start, length) is not None:
            mm.buffers.pin(start, length)
            self.hold(lambda: mm.buffers.unpin(start, length))  # type: ignore[union-attr]
            return mm.runs(start, length)
        if self.kernel.maps_device(self.process, start, length):
            raise KernelError(errno.EFAULT, f"{start:#x} maps device memory")
        runs: Runs = []
        private: list[tuple[int, int]] = []
        position, end = start, start + length
        for vma in mm.vmas(start, end):
            if vma.start > position or not (vma.write if self.writable else vma.read):
                break
            stop = min(vma.end, end)
            place = self._shared(vma, position)
            if place is None:
                private.append((position, stop - position))
                runs += mm.runs(position, stop - position)
            else:
                runs.append((place, (stop - position) >> PAGE_SHIFT))
            position = stop
        if position < end:
            raise KernelError(
                errno.EFAULT, f"{position:#x} cannot be pinned for {'writing' if self.writable else 'reading'}"
            )
        if not self.process.is_self:
            for piece in private:
                self.hold(mm.pin(*piece))
        return _join(runs)

    def _shared(self, vma: Vma, address: int) -> int | None:
        """Where a page of a shared file is; None for one of the process's own."""
        if vma.shared and vma.inode:
            fd = self._open_mapped(vma)
            if fd is not None:
                if self.writable and filesystem_type(fd) not in (_TMPFS_MAGIC, _HUGETLBFS_MAGIC):
                    os.close(fd)
                    raise KernelError(errno.EFAULT, f"{address:#x} maps a file that needs write-back")
                key = os.makedev(*vma.device), vma.inode
                file = self.kernel.shared_files.get(key, fd, vma.offset + vma.end - vma.start)
                self.hold(lambda: self.kernel.shared_files.put(file))
                return file.window + vma.offset + (address - vma.start)
        return None

    def _open_mapped(self, vma: Vma) -> int | None:
        """A descriptor of the model's own for the file behind a mapping; None where the host allows none."""
        pid = self.process.pid
        flags = os.O_RDWR if vma.write else os.O_RDONLY
        try:
            return os.open(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", flags | os.O_CLOEXEC)
        except OSError:
            pass
        wanted = (os.makedev(*vma.device), vma.inode)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                try:
                    status = os.stat(f"/proc/{pid}/fd/{name}")
                    if (status.st_dev, status.st_ino) == wanted:
                        return os.open(f"/proc/{pid}/fd/{name}", flags | os.O_CLOEXEC)
                except OSError:
                    continue
        except OSError:
            pass
        return None


class FilePages(Pages):
    """Pages by their offset in a memfd (IOMMU_IOAS_MAP_FILE)."""

    __slots__ = ("_fd", "start")

    def __init__(self, kernel: Kernel, process: Process, fd: int, start: int, length: int, writable: bool) -> None:
        """EBADF: `fd` is not open. Any kind of file is accepted until it is pinned."""
        self._fd = process.take_fd(fd)
        try:
            super().__init__(kernel, process, start & PAGE_MASK, length, writable)
        except KernelError:
            os.close(self._fd)
            raise
        self.start = start & ~PAGE_MASK

    @property
    def alignment_address(self) -> int:
        return self.start

    def resolve(self, first: int, last: int) -> Runs:
        """EINVAL: not a file of shmem or hugetlbfs, or the last page ends at or beyond the file's size."""
        if filesystem_type(self._fd) not in (_TMPFS_MAGIC, _HUGETLBFS_MAGIC):
            raise KernelError(errno.EINVAL, "the file is neither shmem nor hugetlbfs")
        status = os.fstat(self._fd)
        begin = self.start + (first << PAGE_SHIFT)
        end = self.start + ((last + 1) << PAGE_SHIFT)
        if end - 1 >= status.st_size:
            raise KernelError(errno.EINVAL, f"the file ends at {status.st_size:#x}, before {end:#x}")
        file = self.kernel.shared_files.get((status.st_dev, status.st_ino), self._reopen(), end)
        self.hold(lambda: self.kernel.shared_files.put(file))
        return [(file.window + begin, last - first + 1)]

    def _reopen(self) -> int:
        """A descriptor for writing if there can be one: a pin does not ask how the client's was opened."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pass
        try:
            return os.dup(self._fd)
        except OSError as error:
            raise KernelError(errno.ENOMEM, "the model has no descriptor left to keep the file by") from error

    def change_process(self, process: Process) -> None:
        """IOMMU_IOAS_CHANGE_PROCESS: `process` owns and pays from now on. The caller has checked its limits."""
        npages, uid = self.npinned, process.credentials.uid()
        old_mm, mm = self.process.mm, process.mm
        if self.account_mode == ACCOUNT_USER:
            self.kernel.user(self.uid).locked_vm -= npages
            self.kernel.user(uid).locked_vm += npages
        elif self.account_mode == ACCOUNT_MM:
            old_mm.locked_vm -= npages
            mm.locked_vm += npages
        if self.account_mode != ACCOUNT_NONE:  # the kernel moves VmPin only together with a charge
            old_mm.pinned_vm -= npages
            mm.pinned_vm += npages
        self.process, self.uid = process, uid

    def released(self) -> None:
        os.close(self._fd)


def _join(runs: Runs) -> Runs:
    joined: Runs = []
    for address, npages in runs:
        if joined and joined[-1][0] + (joined[-1][1] << PAGE_SHIFT) == address:
            joined[-1] = (joined[-1][0], joined[-1][1] + npages)
        else:
            joined.append((address, npages))
    return joined


def _cut(runs: Runs, npages: int) -> tuple[Runs, Runs]:
    """Split runs after `npages` pages."""
    head: Runs = []
    for index, (address, count) in enumerate(runs):
        if npages < count:
            if npages:
                head.append((address, npages))
            return head, [(address + (npages << PAGE_SHIFT), count - npages), *runs[index + 1 :]]
        head.append((address, count))
        npages -= count
    return head, []
