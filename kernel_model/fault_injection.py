"""Fault injection: allocations, and other steps that can fail, fail when they are told to.

Mirrors lib/fault-inject.c, mm/failslab.c, mm/fail_page_alloc.c, lib/fault-inject-usercopy.c and the fail_iommufd of
drivers/iommu/iommufd/selftest.c, as Documentation/fault-injection/fault-injection.rst describes them. A place of the
model where the kernel allocates asks `kmalloc`, `alloc_page`, `iommufd_should_fail` or `usercopy`, but only while
`injecting` holds anything, so that it costs nothing otherwise:

    if injecting:
        kmalloc("struct iopt_area")

The files that a client sees are in `fault_injection_files`. Left out: a message in the kernel's log for each failure
(`verbose` is kept, and says nothing), make-it-fail (with `task-filter` on, only a task's own fail-nth injects), the
random choice of a real kernel (a probability below 100 comes from a fixed seed), failures in work that a call leaves
behind, and copies of read(2) and write(2) of this process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING

from kernel_model.errors import KernelError

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

#: The capabilities, by the names of their directories in debugfs.
SLAB, PAGE_ALLOC, IOMMUFD, USERCOPY = "failslab", "fail_page_alloc", "fail_iommufd", "fail_usercopy"
#: Those that a lack of memory explains.
MEMORY = (SLAB, PAGE_ALLOC, IOMMUFD)
EVERYTHING = (*MEMORY, USERCOPY)


class Task:
    """`task->fail_nth` of one task, or of none in particular (tid 0)."""

    __slots__ = ("faults", "kinds", "left", "site", "spare")

    def __init__(
        self, faults: FaultInjection, left: int, kinds: Collection[str] | None, spare: Collection[str] = ()
    ) -> None:
        self.faults = faults
        #: The failure is the `left`-th possible one from now; 0: none is awaited.
        self.left = left
        #: What counts, whatever debugfs says; None: all that debugfs does not exclude.
        self.kinds = kinds
        #: Places that do not count.
        self.spare = spare
        #: What failed.
        self.site = ""


#: The task whose call runs, by thread: only while a failure is awaited.
injecting: dict[int, Task] = {}


class Attributes:
    """`struct fault_attr`, and the filters of one capability in front of it."""

    def __init__(self) -> None:
        self.probability = 0
        self.interval = 1
        #: -1: without limit.
        self.times = 1
        #: Bytes (or pages) that may still be had before anything fails.
        self.space = 0
        self.verbose = 2
        self.verbose_ratelimit_interval_ms = 0
        self.verbose_ratelimit_burst = 10
        self.task_filter = False
        self.ignore_gfp_wait = True
        self.ignore_gfp_highmem = True
        self.cache_filter = False
        self.min_order = 1
        self.count = 0
        self._random = Random(0)

    def should_fail(self, size: int) -> bool:
        """The second half of should_fail_ex(), for a task without a fail-nth of its own."""
        if not self.probability or self.task_filter or not self.times:
            return False
        if self.space > size:
            self.space -= size
            return False
        if self.interval > 1:
            self.count += 1
            if self.count % self.interval:
                return False
        return self.probability > self._random.randrange(100)

    def failed(self) -> None:
        if self.times > 0:
            self.times -= 1


class FaultInjection:
    """All of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.attributes = {name: Attributes() for name in EVERYTHING}
        #: By thread id: what is awaited.
        self.tasks: dict[int, Task] = {}
        #: How often each place has failed.
        self.injected: Counter[str] = Counter()
        #: iommufd_test_memory_limit: the bytes of a list of pages, which say how often a pin can fail on its way.
        self.temp_memory_limit = 65536
        self._anybody = Task(self, 0, None)

    # -- fail-nth ----------------------------------------------------------------------------------------------------

    def set_nth(self, tid: int, nth: int) -> None:
        """The task's `nth` possible failure from now on happens; 0 takes that back."""
        self.set_task(tid, Task(self, nth, None))

    def set_task(self, tid: int, task: Task) -> None:
        self.tasks[tid] = task
        self.changed()

    def get_nth(self, tid: int) -> int:
        task = self.tasks.get(tid)
        return 0 if task is None else task.left

    def task_exited(self) -> None:
        """Some process has gone, and what its tasks awaited with it."""
        gone = [tid for tid in self.tasks if not os.path.exists(f"/proc/{tid}")]
        for tid in gone:
            del self.tasks[tid]
        if gone:
            self.changed()

    def changed(self) -> None:
        """An attribute has been set, or what a task awaits."""
        for tid in [tid for tid, task in self.tasks.items() if not task.left]:
            del self.tasks[tid]
        wanted = bool(self.tasks) or any(one.probability for one in self.attributes.values())
        self._kernel.failing = self if wanted else None
        if not wanted:
            injecting.pop(threading.get_ident(), None)

    # -- one call ----------------------------------------------------------------------------------------------------

    def begin(self, tid: int | None = None) -> None:
        """A call of task `tid` (None: of this thread) begins."""
        task = self.tasks.get(threading.get_native_id() if tid is None else tid, self._anybody)
        injecting[threading.get_ident()] = task

    def end(self) -> None:
        """The call is over, or goes on as work that no task is charged for."""
        injecting.pop(threading.get_ident(), None)

    def should_fail(self, task: Task, kind: str, size: int, excluded: bool) -> bool:
        """should_fail_ex(), behind the capability's own filter `excluded`."""
        attributes = self.attributes[kind]
        if task.kinds is not None:
            if kind not in task.kinds:
                return False
        elif excluded:
            return False
        if task.left:
            task.left -= 1
            if task.left:
                return False
        elif task.kinds is not None or not attributes.should_fail(size):
            return False
        attributes.failed()
        return True


def _fails(kind: str, what: str, size: int = 1, *, gfp_wait: bool = True) -> bool:
    task = injecting.get(threading.get_ident())
    if task is None or what in task.spare:
        return False
    attributes = task.faults.attributes[kind]
    if kind == SLAB:
        excluded = (gfp_wait and attributes.ignore_gfp_wait) or attributes.cache_filter
    elif kind == PAGE_ALLOC:
        excluded = attributes.min_order > 0 or (gfp_wait and attributes.ignore_gfp_wait)
    else:
        excluded = False
    if not task.faults.should_fail(task, kind, size, excluded):
        return False
    task.site = what
    task.faults.injected[what] += 1
    return True


def kmalloc(what: str, size: int = 64, *, gfp_wait: bool = True) -> None:
    """An object of the slab allocator. `gfp_wait`: the allocation may sleep (GFP_KERNEL). ENOMEM: it fails."""
    if _fails(SLAB, what, size, gfp_wait=gfp_wait):
        raise KernelError(errno.ENOMEM, f"injected: no memory for {what}")


def alloc_page(what: str) -> None:
    """One page. ENOMEM: it fails."""
    if _fails(PAGE_ALLOC, what):
        raise KernelError(errno.ENOMEM, f"injected: no page for {what}")


def iommufd_should_fail(number: int, what: str) -> None:
    """A place that iommufd itself offers to fail: the errno `number`."""
    if _fails(IOMMUFD, what):
        raise KernelError(number, f"injected: {what}")


def usercopy(what: str) -> None:
    """A copy from or to the caller's memory. EFAULT: it fails."""
    if _fails(USERCOPY, what):
        raise KernelError(errno.EFAULT, f"injected: {what}")


@contextmanager
def spared() -> Iterator[None]:
    """Nothing in the block is a failure's turn: the kernel does this without an allocation that can fail."""
    task = injecting.pop(threading.get_ident(), None)
    try:
        yield
    finally:
        if task is not None:
            injecting[threading.get_ident()] = task


class Injection:
    """`with kernel.fail_nth(n) as injection:` makes the n-th failure of this thread's calls in the block happen."""

    def __init__(self, kernel: Kernel, nth: int, kinds: Collection[str], spare: Collection[str]) -> None:
        if nth < 1:
            raise ValueError(f"the first failure is number 1, not {nth}")
        self._kernel = kernel
        self._tid = threading.get_native_id()
        self._task = Task(kernel.faults, nth, tuple(kinds), frozenset(spare))

    @property
    def injected(self) -> bool:
        """Whether it happened. A call may cope with it and succeed."""
        return not self._task.left

    @property
    def remaining(self) -> int:
        """How many failures before it were still to come; 0 once it happened."""
        return self._task.left

    @property
    def site(self) -> str:
        """What could not be had."""
        return self._task.site

    def __enter__(self) -> Injection:
        self._kernel.faults.set_task(self._tid, self._task)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kernel.faults.set_nth(self._tid, 0)
