"""The model of the kernel: a `Backend` in this process.

`Kernel(machine, version)` boots the drivers of a fake machine and serves system calls on it. It owns the descriptor
table, the tree of paths, the clients and the run queue; what the calls mean is in the subsystems (`iommufd`, `vfio`,
`iommu`).

Every call goes through `entered()`: hang-ups of closed descriptors and raw stores to mapped registers are dealt with
first, then the call runs, then the run queue drains. There are no threads in the model and no call runs inside another,
so the same calls give the same ids, addresses and events every time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from os import fstat
from typing import TYPE_CHECKING

from fakedev.caching import caching as caching_of
from fakedev.machine import Machine
from fakedev.machines.file import build as build_machine
from kernel_model.client_memory import ClientBuffer, ClientMemory, MmBacking
from kernel_model.digest import Fact, difference, digest, leftovers
from kernel_model.door import Descriptor, MemoryMapping, ModelClient, ModelFile, ModelMapping, fill
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import MEMORY, FaultInjection, Injection, injecting, kmalloc
from kernel_model.file import POLLOUT, FileDescription, SystemCall
from kernel_model.iommu.core import dma_prepare_msi
from kernel_model.irq import interrupts_of
from kernel_model.page_alloc import PageAllocator
from kernel_model.placement import Placement
from kernel_model.process import Credentials, HostCredentials, Mm, Process, User
from kernel_model.shared_files import SharedFiles
from kernel_model.subsystems import boot
from kernel_model.vfs import FileSystem
from uapi.cstruct import OLDEST
from uapi.profile import profile
from uapi.version import NEWEST, parse

if TYPE_CHECKING:
    from kernel_model.iommu.core import Device
    from kernel_model.iommu.mock.iommu import MockIommu
    from kernel_model.iommufd.ctx import Context

_live: weakref.WeakSet[Kernel] = weakref.WeakSet()
_ADDRESS_SPACES = 15


class Entry:
    """The way into the kernel and out again, as a context manager."""

    __slots__ = ("_kernel",)

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __enter__(self) -> None:
        self._kernel.enter()

    def __exit__(self, *_: object) -> None:
        self._kernel.leave()


class Kernel:
    """A kernel of release `version` on `machine` (a name of `fakedev.machines.named`, a path "….toml", or a `Machine`).

    `credentials` "root" makes this process root with every capability in the model's eyes; "host" takes what the host's
    kernel says, so that an unprivileged process pays for its pins. `dmabuf_get` "0" has the mock driver's DMABUF_GET
    return 0 as 7.3 was released, not the descriptor. `caching` is how much the hardware keeps of what it read:
    "always", "never" or "random:SEED" (fakedev/caching.py). Raises ValueError for an unknown machine, release or
    choice, and for hardware that the drivers refuse. Close it, or use it as a context manager: descriptors that are
    still open then belong to no kernel any more.
    """

    name = "model"

    def __init__(
        self,
        machine: str | Machine = "q35-vtd-legacy",
        version: str = "7.3",
        *,
        credentials: str = "root",
        dmabuf_get: str = "fd",
        caching: str = "always",
    ) -> None:
        if not parse(OLDEST).series <= parse(version).series <= parse(NEWEST).series:
            raise ValueError(f"{version} is no release that the model knows: {OLDEST} to {NEWEST}")
        if dmabuf_get not in ("fd", "0"):
            raise ValueError(f"dmabuf_get is 'fd' or '0', not {dmabuf_get!r}")
        self.dmabuf_get = dmabuf_get
        self.release = version
        #: What that release has: ioctls, constants, structs.
        self.profile = profile(version)
        self.machine = build_machine(machine) if isinstance(machine, str) else machine
        self.machine.set_caching(caching_of(caching))
        self.memory = self.machine.memory
        self.pages = PageAllocator(self.memory)
        self.interrupts = interrupts_of(
            self.machine, lambda function, address: dma_prepare_msi(self.devices[function.address], address)
        )
        self._placement = Placement(self.memory)
        self.shared_files = SharedFiles(self.memory, self._placement)
        self.files = FileSystem()
        #: Devices as the driver core knows them, by name ("0000:00:10.0").
        self.devices: dict[str, Device] = {}
        #: The mock driver's IOMMU; iommufd's test calls make its devices.
        self.mock_iommu: MockIommu
        #: Contexts of /dev/iommu that are alive.
        self.contexts: set[Context] = set()
        #: Closed ones that still have objects, which other lost ones hold: their pages stay pinned for ever.
        self.lost_contexts: list[Context] = []
        self.faults = FaultInjection(self)
        #: The same while a failure is awaited, else None: what each call looks at.
        self.failing: FaultInjection | None = None
        #: Module parameter of iommufd: bind devices whose MSIs are not isolated.
        self.allow_unsafe_interrupts = False
        #: Mappings of device registers: all, and those whose raw stores are looked for.
        self.mappings: list[ModelMapping | MemoryMapping] = []
        self.watched_mappings: list[ModelMapping] = []
        self._users: dict[int, User] = {}
        #: Address spaces of exited processes: their places are used again when nothing is pinned there any more.
        self._retired_mms: list[Mm] = []
        self._processes: dict[int, Process] = {}
        #: By (inode, device), in the order of a stat result.
        self._descriptors: dict[tuple[int, ...], Descriptor] = {}
        self._aliases: dict[tuple[int, ...], FileDescription] = {}
        self._hangups = select.epoll()
        self._by_fd: dict[int, Descriptor] = {}
        self._watches: dict[int, Callable[[], None]] = {}
        self._waking = False
        self.queue: deque[Callable[[], None]] = deque()
        self._dead = ""
        self._entry = Entry(self)
        self._lock = threading.RLock()
        self._depth = 0
        self._poll = self._hangups.poll
        self._buffers = ClientMemory()
        if credentials not in ("root", "host"):
            raise ValueError(f"credentials are 'root' or 'host', not {credentials!r}")
        own = HostCredentials(os.getpid()) if credentials == "host" else Credentials()
        self.process = self.add_process(os.getpid(), own)
        self.process.mm.buffers = self._buffers
        #: The call in progress of this process; there is never more than one.
        self.own_call = SystemCall(self, self.process)
        _live.add(self)
        try:
            boot(self)
        except KernelError as error:
            # Linux says so in its log and goes on without the IOMMU; whoever described this machine wants to know.
            self.close()
            raise ValueError(
                f"{machine if isinstance(machine, str) else machine.name}: no driver for it: {error.why}"
            ) from error
        #: Pages of tables and queues that the drivers hold as long as they run.
        self.pages_at_boot = self.pages.live

    # -- the Backend protocol ----------------------------------------------------------------------------------------

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> ModelFile:
        """open(2). ENOENT for a path that the model does not have; otherwise the node's own errnos."""
        with self.entered():
            description = self.files.open(SystemCall(self, self.process), path, flags)
            return ModelFile(self, self.install(description, path), path)

    def adopt(self, fd: int) -> ModelFile:
        with self.entered():
            return ModelFile(self, fd, self.description(fd).path)

    def listdir(self, path: str) -> Sequence[str]:
        with self.entered():
            return self.files.listdir(path)

    def readlink(self, path: str) -> str:
        with self.entered():
            return self.files.readlink(path)

    def buffer(self, length: int, *, huge: bool = False) -> ClientBuffer:
        return self._buffers.allocate(length, huge)

    def spawn(self) -> ModelClient:
        return ModelClient(self)

    def status(self, field: str) -> int:
        with self.entered():
            return self.process.status(field)

    def close(self) -> None:
        """Shut the kernel down. Open descriptors are closed from its side."""
        if self._dead:
            return
        for descriptor in list(self._descriptors.values()):
            self._hang_up(descriptor)
        self.drain()
        self._dead = "the kernel is closed"
        self._hangups.close()
        for process in self._processes.values():
            process.mm.close()
        self.machine.close()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether calls are served: neither closed, nor a copy in a forked child."""
        return not self._dead

    def fail_nth(self, nth: int, kinds: Collection[str] = MEMORY, spare: Collection[str] = ()) -> Injection:
        """In the block that this opens, the `nth` thing that can fail in calls of this thread does.

        `kinds` are what counts: by default the allocations (`fault_injection.MEMORY`), with `EVERYTHING` also copies
        from and to the caller's memory; `spare` names places that do not. It stands above what the files in debugfs
        say. ValueError: `nth` less than 1.
        """
        return Injection(self, nth, kinds, spare)

    def digest(self) -> list[Fact]:
        """What the kernel holds, to be compared: see `kernel_model.digest`."""
        with self.entered():
            return digest(self)

    def difference(self, before: list[Fact], after: list[Fact]) -> list[str]:
        """Where two digests differ, a line each."""
        return difference(before, after)

    def leftovers(self) -> list[str]:
        """What is still held though every descriptor is closed: leaks, a line each."""
        with self.entered():
            return leftovers(self)

    def failure_notes(self) -> list[str]:
        """What the hardware has to say for a failing test's report: refused DMAs, then how the last others went."""
        return [*self.machine.last_faults, *self.machine.explain_transfers()]

    # -- for the subsystems ------------------------------------------------------------------------------------------

    def entered(self) -> Entry:
        """One system call: what happened outside is noticed first, deferred work is done before it returns."""
        return self._entry

    def enter(self) -> None:
        """The beginning of `entered()`. KernelBug: the kernel is closed, or this is a forked child."""
        if self._dead:
            raise KernelBug(self._dead)
        self._lock.acquire()
        self._depth += 1
        if self._depth == 1:
            events = self._poll(0)
            if events or self.watched_mappings or self.queue or self.failing is not None:
                try:
                    self.notice(events)
                except BaseException:
                    self._depth = 0
                    self._lock.release()
                    raise
                if self.failing is not None:
                    self.failing.begin()

    def enter_by(self, fd: int) -> FileDescription:
        """`enter()` and `description(fd)` in one, for the path that every ioctl of this process takes."""
        self.enter()
        try:
            return self._descriptors[fstat(fd)[1:3]].description
        except (OSError, OverflowError, KeyError) as error:
            self.leave()
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open, or not a file of this kernel") from error

    def leave(self) -> None:
        """The end of `entered()`."""
        try:
            if (self.queue or self.failing is not None) and self._depth == 1:
                if self.failing is not None:
                    self.failing.end()
                self.drain()
        finally:
            self._depth -= 1
            self._lock.release()

    def defer(self, work: Callable[[], None]) -> None:
        """Run `work` before the current call returns."""
        self.queue.append(work)

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` called, at the next entry, each time that a descriptor of the model's own becomes readable."""
        self._watches[fd] = call
        self._hangups.register(fd, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """The end of `watch`."""
        self._hangups.unregister(fd)
        del self._watches[fd]

    def wake(self) -> None:
        """Call the watches of descriptors that became readable within this call, by the kernel's own doing.

        What the watches themselves make readable waits for the next entry, so that no circle of them holds a call.
        """
        if self._watches and not self._waking:
            self._waking = True
            try:
                for fd, _ in self._poll(0):
                    if fd in self._watches:
                        self._watches[fd]()
            finally:
                self._waking = False

    def install(self, description: FileDescription, path: str | None = None) -> int:
        """A new descriptor in this process for an open file: O_CLOEXEC. EMFILE; ENOMEM, injected."""
        if path is not None:
            description.path = path
        try:
            if injecting:
                kmalloc("struct file")
            theirs, ours = socket.socketpair()
        except KernelError:
            description.release()
            raise
        except OSError as error:
            description.release()
            raise KernelError(error.errno or errno.EMFILE, "no descriptor is left") from error
        ours.setblocking(False)
        if type(description).poll is FileDescription.poll:
            ours.send(b"\0")  # a file without a poll operation is always ready; select(2) sees this byte
        elif not description.poll() & POLLOUT:
            fill(theirs)
        descriptor = Descriptor(ours, fstat(theirs.fileno())[1:3], description, theirs.fileno())
        self._descriptors[descriptor.key] = descriptor
        self._by_fd[ours.fileno()] = descriptor
        self._hangups.register(ours.fileno(), select.EPOLLHUP | select.EPOLLRDHUP)
        return theirs.detach()

    def set_readable(self, description: FileDescription, readable: bool) -> None:
        """What poll(2) of clients' descriptors of the file is to say from now on: there is something to read."""
        for descriptor in self._descriptors.values():
            if descriptor.description is description:
                descriptor.set_readable(readable, list(self._processes.values()))

    def install_for(self, process: Process, description: FileDescription) -> int:
        """A new descriptor in `process`, the one that made the call. EMFILE."""
        fd = self.install(description)
        if process.is_self:
            return fd
        try:
            return process.give_fd(fd)
        except KernelError:
            self.notice()  # the descriptor is closed
            raise

    def close_for(self, process: Process, fd: int) -> None:
        """Take a descriptor back that the call being served has just installed."""
        process.close_fd(fd)
        self.notice()

    def description(self, fd: int, process: Process | None = None) -> FileDescription:
        """fget(): the open file behind a descriptor of `process` (this one by default). EBADF."""
        found = self.lookup(fd, process)
        if found is None:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not a file of this kernel")
        return found

    def lookup(self, fd: int, process: Process | None = None) -> FileDescription | None:
        """As `description`, but None for an open descriptor that is not the model's. EBADF if it is not open."""
        try:
            status = fstat(fd) if process is None or process.is_self else process.stat_fd(fd)
        except (OSError, OverflowError) as error:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open") from error
        descriptor = self._descriptors.get(status[1:3])
        return self._aliases.get(status[1:3]) if descriptor is None else descriptor.description

    def add_alias(self, key: tuple[int, int], description: FileDescription) -> None:
        """Descriptors of other processes with this (inode, device) too are of the open file, until `remove_alias`."""
        self._aliases[key] = description

    def remove_alias(self, key: tuple[int, int]) -> None:
        del self._aliases[key]

    def maps_device(self, process: Process, start: int, length: int) -> bool:
        """Whether a range of the process's memory is a mapping of a file of this kernel's (VM_PFNMAP)."""
        if process.is_self:
            return any(mapping.overlaps(start, length) for mapping in self.mappings)
        aliases = self._aliases
        return bool(aliases) and any(
            (vma.inode, os.makedev(*vma.device)) in aliases for vma in process.mm.vmas(start, start + length)
        )

    def user(self, uid: int) -> User:
        """The `struct user_struct` of a uid."""
        return self._users.setdefault(uid, User(uid))

    def users(self) -> list[User]:
        """Every user that has been asked for."""
        return list(self._users.values())

    def processes(self) -> list[Process]:
        """The clients."""
        return list(self._processes.values())

    def descriptors(self) -> list[Descriptor]:
        """What is open."""
        return list(self._descriptors.values())

    def add_process(self, pid: int, credentials: Credentials) -> Process:
        """Make a process known as a client. EAGAIN: the model has room for 15 of them."""
        self._forget_mms()
        if len(self._processes) + len(self._retired_mms) >= _ADDRESS_SPACES:
            raise OSError(errno.EAGAIN, "the model has room for 15 client processes")
        mm = Mm(pid, self._new_place, self._placement.place_lg2)
        process = Process(pid, mm, pid == os.getpid(), credentials)
        self._processes[pid] = process
        return process

    def _new_place(self, mm: Mm, number: int) -> int:
        """A place in the physical address space for a piece of an address space. ENOMEM."""
        place, lg2 = self._placement.take(), mm.place_lg2
        self.memory.add_window(place, 1 << lg2, MmBacking(mm, number << lg2))
        return place

    def has_process(self, pid: int) -> bool:
        """Whether a client has this number."""
        return pid in self._processes

    def process_exits(self, process: Process) -> None:
        """A client is about to go, and its memory with it: keep what is pinned. Without this call it is lost."""
        with self.entered():
            process.mm.keep_pinned()

    def process_exited(self, process: Process) -> None:
        """A client is gone: its descriptors have closed, its memory no longer answers, but for what was kept of it."""
        if self._processes.pop(process.pid, None) is not None:
            process.mm.exited()
            if self._dead:
                return
            with self.entered():
                self._retired_mms.append(process.mm)
                self._forget_mms()
                self.faults.task_exited()

    def _forget_mms(self) -> None:
        """Address spaces of exited processes in which nothing is pinned any more."""
        for mm in [mm for mm in self._retired_mms if not mm.pins]:
            self._retired_mms.remove(mm)
            for place in mm.places.values():
                self.memory.remove_window(place)
                self._placement.give(place)
            mm.places.clear()

    def disown(self, reason: str) -> None:
        """Refuse every further call: this copy of the model is in a forked child."""
        self._dead = reason

    # -- inside ------------------------------------------------------------------------------------------------------

    def notice(self, events: list[tuple[int, int]] | None = None) -> None:
        """Deal with closed descriptors, raw stores and leftover work: what happened since the last call."""
        for fd, _ in self._hangups.poll(0) if events is None else events:
            descriptor = self._by_fd.get(fd)
            if descriptor is not None:
                self._hang_up(descriptor)
            elif fd in self._watches:
                self._watches[fd]()
        for mapping in self.watched_mappings:
            mapping.deliver_raw_stores()
        if self.queue:
            self.drain()

    def _hang_up(self, descriptor: Descriptor) -> None:
        fd = descriptor.sock.fileno()
        self._hangups.unregister(fd)
        del self._by_fd[fd], self._descriptors[descriptor.key]
        descriptor.sock.close()
        descriptor.description.release()

    def drain(self) -> None:
        """Do the deferred work, and what that defers."""
        while self.queue:
            self.queue.popleft()()


def _in_forked_child() -> None:
    for kernel in list(_live):
        kernel.disown("a Kernel belongs to the process that made it; a forked child needs one of its own")


os.register_at_fork(after_in_child=_in_forked_child)
