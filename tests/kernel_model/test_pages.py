"""kernel_model/iommufd/pages.py: pins against a dictionary of pages, and where pages come from."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakedev.memory import BusAbort
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommufd.ctx import ACCOUNT_MM, ACCOUNT_NONE, ACCOUNT_USER
from kernel_model.iommufd.pages import FilePages, Pages, Runs, UserPages, filesystem_type
from kernel_model.kernel import Kernel
from kernel_model.process import Credentials, Mm, Process, User
from tests.kernel_model.raw_memory import address_in, libc

PAGE = 4096
PAGES = 24


class FakeKernel:
    """Accounts and nothing else."""

    def __init__(self) -> None:
        self.users: dict[int, User] = {}

    def user(self, uid: int) -> User:
        return self.users.setdefault(uid, User(uid))


class FakePages(Pages):
    """Pages that lie where a table says, some of which cannot be pinned."""

    def __init__(self, process: Process, places: list[int | None]) -> None:
        super().__init__(FakeKernel(), process, 0, len(places) * PAGE, True)  # type: ignore[arg-type]
        self.places = places
        self.held = 0

    def resolve(self, first: int, last: int) -> Runs:
        self.held += 1
        self.hold(self.let_go)
        runs: Runs = []
        for place in self.places[first : last + 1]:
            if place is None:
                raise KernelError(errno.EFAULT, "a hole")
            if runs and runs[-1][0] + runs[-1][1] * PAGE == place * PAGE:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((place * PAGE, 1))
        return runs

    def let_go(self) -> None:
        self.held -= 1


def client(memlock: int = 1 << 40) -> Process:
    return Process(1, Mm(1), False, Credentials(1000, 0, memlock))


def flat(runs: Runs) -> list[int]:
    return [address // PAGE + index for address, npages in runs for index in range(npages)]


#: Steps of a page's place from its neighbour's: 1 is contiguous.
layouts = st.lists(st.sampled_from([1, 1, 1, 5, None]), min_size=PAGES, max_size=PAGES)
calls = st.lists(st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(0, PAGES - 1)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(layouts, calls, st.integers(0, PAGES), st.sampled_from([ACCOUNT_NONE, ACCOUNT_USER, ACCOUNT_MM]))
def test_pins_count_as_a_dictionary_of_pages_counts(
    steps: list[int | None], script: list[tuple[bool, int, int]], limit: int, mode: int
) -> None:
    places: list[int | None] = []
    position = 0
    for step in steps:
        position += step or 1
        places.append(None if step is None else position)
    process = client(limit * PAGE)
    pages = FakePages(process, places)
    pages.account_mode = mode
    counts: Counter[int] = Counter()
    pinned: list[tuple[int, int]] = []
    for pin, one, other in script:
        first, last = min(one, other), max(one, other)
        if pin:
            fresh = [index for index in range(first, last + 1) if not counts[index]]
            wrong = any(places[index] is None for index in fresh)
            over = mode != ACCOUNT_NONE and len(fresh) + sum(c > 0 for c in counts.values()) > limit and bool(fresh)
            held = pages.held
            if wrong or over:
                with pytest.raises(KernelError, match=rf"\[Errno {errno.EFAULT if wrong else errno.ENOMEM}\]"):
                    pages.pin(first, last)
                assert pages.held == held
            else:
                assert flat(pages.pin(first, last)) == places[first : last + 1]
                counts.update(range(first, last + 1))
                pinned.append((first, last))
        elif pinned:
            first, last = pinned.pop(one % len(pinned))
            pages.unpin(first, last)
            counts.subtract(range(first, last + 1))
        there = sum(count > 0 for count in counts.values())
        user = pages.kernel.user(1000).locked_vm
        assert (pages.npinned, process.mm.pinned_vm) == (there, there)
        assert (user, process.mm.locked_vm) == (there * (mode == ACCOUNT_USER), there * (mode == ACCOUNT_MM))
        assert bool(pages._pinned) == bool(there)
    for first, last in pinned:
        pages.unpin(first, last)
    assert (pages.npinned, process.mm.pinned_vm, pages.held) == (0, 0, 0)
    pages.put()


def test_pages_freed_while_pinned_are_a_bug() -> None:
    pages = FakePages(client(), [1])
    pages.pin(0, 0)
    with pytest.raises(KernelBug):
        pages.put()


def test_process_with_cap_ipc_lock_pays_in_vmpin_alone() -> None:
    process = Process(1, Mm(1), False, Credentials(1000, 1 << 14, 0))
    pages = FakePages(process, [1, 2])
    pages.pin(0, 1)
    assert (process.mm.pinned_vm, process.mm.locked_vm, pages.kernel.user(1000).locked_vm) == (2, 0, 0)


# -- pages of memory and of files --------------------------------------------------------------------------------------


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def user_pages(kernel: Kernel, address: int, length: int, writable: bool = True) -> UserPages:
    return UserPages(kernel, kernel.process, address, length, writable)


def file_pages(kernel: Kernel, fd: int, start: int, length: int, writable: bool = True) -> FilePages:
    return FilePages(kernel, kernel.process, fd, start, length, writable)


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


def test_physical_address_is_the_window_with_the_virtual_address(kernel: Kernel) -> None:
    with mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = address_in(memory)
        pages = user_pages(kernel, address + 100, PAGE)
        (where, npages), *more = pages.pin(0, 1)
        assert (where, npages, more) == (kernel.process.mm.physical(address), 2, [])
        memory[100:104] = b"here"
        assert kernel.memory.read(where + 100, 4) == b"here"
        pages.unpin(0, 1)


def test_two_mappings_of_a_memfd_and_its_offsets_are_one_page(kernel: Kernel, memfd: int) -> None:
    with mmap.mmap(memfd, 8 * PAGE) as one, mmap.mmap(memfd, 4 * PAGE, offset=4 * PAGE) as other:
        kinds = [
            (user_pages(kernel, address_in(one), 8 * PAGE), 5),
            (user_pages(kernel, address_in(other), 4 * PAGE), 1),
            (file_pages(kernel, memfd, 5 * PAGE, PAGE), 0),
        ]
        places = {pages.pin(index, index)[0] for pages, index in kinds}
        assert len(places) == 1
        assert len(kernel.shared_files) == 1
        for pages, index in kinds:
            pages.unpin(index, index)
            pages.put()
        assert len(kernel.shared_files) == 0


def test_refused_range_leaves_no_hold_of_the_file_before_its_hole(kernel: Kernel, memfd: int) -> None:
    """The first piece of the range is a memfd, the second cannot be pinned."""
    with mmap.mmap(memfd, 2 * PAGE) as memory:
        address = address_in(memory)
        libc_munmap(address + PAGE, PAGE)
        pages = user_pages(kernel, address, 2 * PAGE)
        with refused(errno.EFAULT):
            pages.pin(0, 1)
        assert len(kernel.shared_files) == 0
        libc_restore(address + PAGE, PAGE)


def test_refused_file_system_leaves_no_hold_of_the_file_before_it(
    kernel: Kernel, memfd: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A shared writable mapping of a file that needs write-back, straight after a memfd."""
    path = tmp_path_factory.mktemp("files") / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = address_in(memory)
        map_fixed(address, PAGE, memfd)
        map_fixed(address + PAGE, PAGE, file.fileno())
        if not kernel.process.mm.vmas(address, address + 1)[0].shared or on_tmpfs(file.fileno()):
            pytest.skip("the temporary directory is on a tmpfs")
        pages = user_pages(kernel, address, 2 * PAGE)
        with refused(errno.EFAULT):
            pages.pin(0, 1)
        assert len(kernel.shared_files) == 0
        libc_restore(address, 2 * PAGE)


def test_dma_writes_a_file_that_was_first_pinned_for_reading(kernel: Kernel, memfd: int) -> None:
    with (
        mmap.mmap(memfd, PAGE, prot=mmap.PROT_READ) as reading,
        mmap.mmap(memfd, PAGE) as writing,
    ):
        first = user_pages(kernel, address_in(reading), PAGE, writable=False)
        second = user_pages(kernel, address_in(writing), PAGE)
        assert first.pin(0, 0) == second.pin(0, 0)
        kernel.memory.write(second.resolve(0, 0)[0][0], b"written")
        assert writing[:7] == b"written"
        for pages in (first, second):
            pages.unpin(0, 0)


def test_pin_of_a_read_only_mapping_for_writing_is_efault(kernel: Kernel, memfd: int) -> None:
    with mmap.mmap(memfd, PAGE, prot=mmap.PROT_READ) as memory, refused(errno.EFAULT):
        user_pages(kernel, address_in(memory), PAGE).pin(0, 0)


def test_descriptor_for_reading_is_enough_to_write_by_dma(kernel: Kernel, memfd: int) -> None:
    """memfd_pin_folios() does not ask how the file was opened."""
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    pages = file_pages(kernel, reader, 0, PAGE)
    os.close(reader)
    where = pages.pin(0, 0)[0][0]
    kernel.memory.write(where, b"written")
    assert os.pread(memfd, 7, 0) == b"written"
    pages.unpin(0, 0)
    pages.put()


def test_truncated_file_aborts_the_bus_and_does_not_crash(kernel: Kernel, memfd: int) -> None:
    pages = file_pages(kernel, memfd, 0, 4 * PAGE)
    where = pages.pin(0, 3)[0][0]
    kernel.memory.write(where, bytes(4 * PAGE))
    os.ftruncate(memfd, PAGE)
    kernel.memory.write(where, b"still there")
    for access in (lambda: kernel.memory.read(where + PAGE, 1), lambda: kernel.memory.write(where + PAGE, b"!")):
        with pytest.raises(BusAbort):
            access()
    os.ftruncate(memfd, 4 * PAGE)
    assert kernel.memory.read(where + PAGE, 4) == bytes(4)
    pages.unpin(0, 3)
    pages.put()


def test_dma_to_a_sealed_file_aborts(kernel: Kernel) -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    pages = file_pages(kernel, fd, 0, PAGE)
    where = pages.pin(0, 0)[0][0]
    assert kernel.memory.read(where + 4000, 96) == bytes(96)
    with pytest.raises(BusAbort):
        kernel.memory.write(where, b"lost")
    pages.unpin(0, 0)
    pages.put()
    os.close(fd)


def test_file_beyond_the_models_window_is_enomem(kernel: Kernel) -> None:
    fd = os.memfd_create("vast")
    os.ftruncate(fd, 1 << 42)
    pages = file_pages(kernel, fd, 1 << 41, PAGE)
    with refused(errno.ENOMEM):
        pages.pin(0, 0)
    pages.put()
    os.close(fd)


def test_file_that_is_too_short_is_einval(kernel: Kernel, memfd: int) -> None:
    pages = file_pages(kernel, memfd, 15 * PAGE, 2 * PAGE)
    pages.pin(0, 0)
    with refused(errno.EINVAL):
        pages.pin(0, 1)
    pages.unpin(0, 0)
    pages.put()


def test_file_that_is_no_shared_memory_is_einval_when_it_is_pinned(kernel: Kernel) -> None:
    ends = os.pipe()
    pages = file_pages(kernel, ends[0], 0, PAGE)
    with refused(errno.EINVAL):
        pages.pin(0, 0)
    pages.put()
    for end in ends:
        os.close(end)


def test_descriptor_that_is_not_open_is_ebadf(kernel: Kernel) -> None:
    for fd in (-1, -(1 << 31), 1 << 20, (1 << 31) - 1):
        with refused(errno.EBADF):
            file_pages(kernel, fd, 0, PAGE)


def test_pages_of_a_file_keep_it_open(kernel: Kernel) -> None:
    fd = os.memfd_create("kept")
    os.ftruncate(fd, PAGE)
    pages = file_pages(kernel, fd, 0, PAGE)
    os.close(fd)
    pages.pin(0, 0)
    pages.unpin(0, 0)
    pages.put()


def test_hole_in_the_middle_is_efault_and_charges_nothing(kernel: Kernel) -> None:
    with mmap.mmap(-1, 3 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = address_in(memory)
        libc_munmap(address + PAGE, PAGE)
        pages = user_pages(kernel, address, 3 * PAGE)
        with refused(errno.EFAULT):
            pages.pin(0, 2)
        assert kernel.process.mm.pinned_vm == 0
        pages.pin(2, 2)
        pages.unpin(2, 2)
        libc_restore(address + PAGE, PAGE)


def test_range_above_the_users_half_is_efault(kernel: Kernel) -> None:
    for address in ((1 << 47) - PAGE, 1 << 47, 0xFFFF_8000_0000_0000):
        with refused(errno.EFAULT):
            user_pages(kernel, address, 2 * PAGE).pin(0, 1)


def test_wrapping_address_is_eoverflow(kernel: Kernel) -> None:
    with refused(errno.EOVERFLOW):
        user_pages(kernel, (1 << 64) - PAGE, PAGE)


def test_dead_process_has_no_pages(kernel: Kernel) -> None:
    with kernel.spawn() as other:
        address = other.allocate(PAGE)
        process = kernel._processes[other.pid]
        pages = UserPages(kernel, process, address, PAGE, True)
        pages.pin(0, 0)
        pages.unpin(0, 0)
        os.kill(other.pid, 9)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with refused(errno.EFAULT):
            pages.pin(0, 0)
        with pytest.raises(KernelError):
            process.mm.read(address, 1)


# -- helpers: holes in memory that Python's mmap owns ------------------------------------------------------------------


def libc_munmap(address: int, length: int) -> None:
    assert libc.munmap(address, length) == 0


def libc_restore(address: int, length: int) -> None:
    """Something there again, so that Python may unmap its whole mapping."""
    assert libc.mmap(address, length, 0, 0x32, -1, 0) == address


def map_fixed(address: int, length: int, fd: int) -> None:
    assert libc.mmap(address, length, 3, 0x11, fd, 0) == address


def on_tmpfs(fd: int) -> bool:
    return filesystem_type(fd) == 0x01021994
