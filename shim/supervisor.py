"""The supervisor: answers the trapped system calls of a program from a model kernel.

Opens of the model's paths, ioctls, reads, writes and mmaps of the model's files are answered; everything else goes on
to the host's kernel. A file of the model is a real descriptor in the program, one end of a socketpair, so dup, fork and
SCM_RIGHTS are the host's own, and the last close hangs up the model's end, which each call notices first. A read-only
sysfs attribute, and /proc/PID/status with the model's VmPin and VmLck, are memfds that hold the text. Before a process
exits or executes another program, the model keeps what is pinned of its memory.

Left out: mapping registers into the program (ENODEV where the model would allow it), stat, access, readlink and
directories of the model's paths, reads and writes through a descriptor that dup2(2) moved out of the trapped range,
preadv and pwritev; pinned pages that a process unmaps, or one that ends by a signal or by exit(2): they are gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from struct import Struct

from kernel_model.errors import KernelError
from kernel_model.file import MAX_RW_COUNT, FileDescription, MappedMemory, SystemCall, check_range
from kernel_model.kernel import Kernel
from kernel_model.process import PAGE_SIZE, Process
from kernel_model.vfs import SysfsFile
from shim import seccomp
from shim.clients import Client, Clients, free_numbers
from shim.mappings import Mappings
from shim.seccomp import Listener, Notification
from uapi.backend import PROT_WRITE
from uapi.iommufd import IOMMU_DESTROY

_AT_FDCWD = -100
_MAP_ANONYMOUS = 0x20
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030
_PATH_MAX = 4096
_IOV_MAX = 1024
_STATUS = re.compile(r"/proc/(?:self|thread-self|(\d+))/status")
_FAIL_NTH = re.compile(r"/proc/(self|thread-self|\d+)(?:/task/(\d+))?/fail-nth")
_IOVEC = Struct("<QQ")
#: What the program's exception reports end at, so that a loop in it does not fill the terminal.
_REPORTS = 20


class NotServed(Exception):
    """The call is not for the model: the host's kernel executes it."""


class Supervisor:
    """Serves the programs behind one listener."""

    def __init__(self, kernel: Kernel, listener: Listener) -> None:
        self.kernel = kernel
        self._listener = listener
        self._clients = Clients(kernel)
        self._events = select.epoll()
        self._events.register(listener.fileno(), select.EPOLLIN)
        self._mappings = Mappings(kernel, listener)
        self._events.register(self._mappings.fileno(), select.EPOLLIN)
        self._reports = 0
        self._call: Notification | None = None
        #: Descriptors that the call being served hands out, by their numbers in the caller.
        self._given: dict[int, tuple[int, int]] = {}
        self._handlers: dict[int, Callable[[Notification], int]] = {
            seccomp.OPEN: lambda call: self._open(call, _AT_FDCWD, call.args[0], call.args[1]),
            seccomp.OPENAT: lambda call: self._open(call, _signed(call.args[0]), call.args[1], call.args[2]),
            seccomp.OPENAT2: self._openat2,
            seccomp.IOCTL: self._ioctl,
            seccomp.READ: lambda call: self._read(call, None),
            seccomp.PREAD64: lambda call: self._read(call, _offset(call.args[3])),
            seccomp.WRITE: lambda call: self._write(call, None),
            seccomp.PWRITE64: lambda call: self._write(call, _offset(call.args[3])),
            seccomp.READV: lambda call: self._vectored(call, self._read_at),
            seccomp.WRITEV: lambda call: self._vectored(call, self._write_at),
            seccomp.MMAP: self._mmap,
            seccomp.DUP: lambda call: self._dup(call, 0),
            seccomp.FCNTL: self._fcntl,
            seccomp.EXECVE: self._execve,
            seccomp.EXECVEAT: self._execve,
            seccomp.EXIT_GROUP: self._exit,
        }

    def serve(self) -> None:
        """Until no process has the filter any more."""
        listener = self._listener.fileno()
        while True:
            trapped = 0
            for fd, events in self._events.poll():
                if fd == listener:
                    trapped = events
                elif fd == self._mappings.fileno():
                    self._mappings.closed()
                else:
                    self._exited(fd)
            if trapped & select.EPOLLIN:
                call = self._listener.receive()
                if call is not None:
                    self._answer(call)
            elif trapped & select.EPOLLHUP:
                return

    def close(self) -> None:
        self._mappings.close()
        self._clients.close()
        self._events.close()
        self._listener.close()

    # -- one call ----------------------------------------------------------------------------------------------------

    def _answer(self, call: Notification) -> None:
        """Serve a call. Whatever goes wrong here, the caller gets an answer."""
        self._call = call
        if self._mappings:
            self._mappings.called(call.tid)
        try:
            value = self._handlers[call.number](call)
            self._hand_out(call)
        except NotServed:
            self._listener.let_through(call)
        except KernelError as error:
            self._listener.respond(call, 0, error.errno or errno.EIO)
        except Exception as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            self._listener.respond(call, 0, number)
            if number not in (errno.ESRCH, errno.ENOENT):  # not a caller that was killed meanwhile
                self._report(call, error)
        else:
            self._listener.respond(call, value)
        finally:
            for fd, _ in self._given.values():
                os.close(fd)
            self._given.clear()
            self._call = None

    def _report(self, call: Notification, error: Exception) -> None:
        self._reports += 1
        if self._reports > _REPORTS:
            return
        args = ", ".join(f"{value:#x}" for value in call.args)
        print(f"iommulab run: system call {call.number}({args}) of {call.tid} failed inside:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)

    def _exited(self, pidfd: int) -> None:
        client = self._clients.by_pidfd(pidfd)
        self._events.unregister(pidfd)
        if client is not None:
            self._clients.remove(client)

    def _client(self, call: Notification) -> Process:
        client, new = self._clients.of(call.tid)
        if new:
            self._events.register(client.pidfd, select.EPOLLIN)
            self._prepare(client)
        return client.process

    def _prepare(self, client: Client) -> None:
        process = client.process
        process.give_fd = lambda fd: self._give(process, fd, os.O_CLOEXEC)
        process.close_fd = self._take_back

    # -- descriptors -------------------------------------------------------------------------------------------------

    def _give(self, process: Process, fd: int, flags: int) -> int:
        """Hand out a descriptor of ours with the answer; its number in the caller. EMFILE."""
        number = next((free for free in free_numbers(process.pid) if free not in self._given), None)
        if number is None:
            os.close(fd)
            raise KernelError(errno.EMFILE, "the caller has no free descriptor")
        self._given[number] = fd, flags & os.O_CLOEXEC
        return number

    def _take_back(self, number: int) -> None:
        os.close(self._given.pop(number)[0])

    def _hand_out(self, call: Notification) -> None:
        for number, (fd, flags) in self._given.items():
            self._listener.add_fd(call, fd, number, flags)

    def _file(self, call: Notification, fd: int) -> tuple[FileDescription, SystemCall]:
        """The model's file behind a descriptor of the caller. NotServed: it is none, or it is not open."""
        process = self._client(call)
        try:
            description = self.kernel.lookup(fd, process)
        except KernelError:
            description = None
        if description is None:
            raise NotServed
        return description, self._system_call(call, process)

    def _system_call(self, call: Notification, process: Process) -> SystemCall:
        """The call as the kernel, which has been entered, knows it: of that process, and for that thread's fail-nth."""
        if self.kernel.failing is not None:
            self.kernel.failing.begin(call.tid)
        return SystemCall(self.kernel, process)

    # -- open --------------------------------------------------------------------------------------------------------

    def _openat2(self, call: Notification) -> int:
        how = self._client(call).mm.read(call.args[2], 8)
        return self._open(call, _signed(call.args[0]), call.args[1], int.from_bytes(how, "little"))

    def _open(self, call: Notification, directory: int, address: int, flags: int) -> int:
        path = self._path(call, directory, address)
        status = _STATUS.fullmatch(path)
        if status is not None:
            return self._open_status(call, status[1])
        fail_nth = _FAIL_NTH.fullmatch(path)
        if fail_nth is None and not self._is_ours(path):
            raise NotServed
        flags &= 0xFFFFFFFF
        process = self._client(call)
        if fail_nth is not None:
            path = self._fail_nth_path(call.tid, process.pid, *fail_nth.groups())
        with self.kernel.entered():
            system_call = self._system_call(call, process)
            description = self.kernel.files.open(system_call, path, flags)
            if isinstance(description, SysfsFile) and description.access == os.O_RDONLY:
                return self._give_text(call, description.read(system_call, 1 << 20, 0), flags)
            return self._give(process, self.kernel.install(description, path), flags)

    def _path(self, call: Notification, directory: int, address: int) -> str:
        """The absolute path that an open names; NotServed where it cannot be one of ours."""
        data = b""
        while b"\0" not in data:
            part = _read_memory(call.tid, address + len(data), PAGE_SIZE - (address + len(data)) % PAGE_SIZE)
            if not part or len(data) > _PATH_MAX:
                raise NotServed
            data += part
        path = os.fsdecode(data.partition(b"\0")[0])
        if not path:
            raise NotServed
        if not path.startswith("/"):
            base = "cwd" if directory == _AT_FDCWD else f"fd/{directory}"
            try:
                path = os.path.join(os.readlink(f"/proc/{call.tid}/{base}"), path)
            except OSError:
                raise NotServed from None
        return os.path.normpath(path) if "/." in path or "//" in path else path

    def _is_ours(self, path: str) -> bool:
        if path == "/dev/iommu" or path.startswith("/dev/vfio/"):
            return True
        if not path.startswith("/sys/"):
            return False
        try:
            self.kernel.files.listdir(path)
        except OSError as error:
            return error.errno == errno.ENOTDIR
        return False

    @staticmethod
    def _fail_nth_path(tid: int, pid: int, whose: str, task: str | None) -> str:
        """The path without "self", which in the model is the supervisor."""
        if whose == "thread-self":
            return f"/proc/{pid}/task/{tid}/fail-nth"
        owner = pid if whose == "self" else int(whose)
        return f"/proc/{owner}/task/{task or owner}/fail-nth"

    def _open_status(self, call: Notification, pid: str | None) -> int:
        """/proc/PID/status of a client that the model has charged, with what it charged."""
        with contextlib.suppress(OSError):
            client = self._clients.known(int(pid) if pid else call.tid)
            if client is not None:
                with self.kernel.entered():
                    pass  # a close before this open has released its pins
                mm = client.process.mm
                charged = {"VmPin": mm.pinned_vm, "VmLck": mm.locked_vm}
                with open(f"/proc/{client.process.pid}/status", encoding="utf-8", errors="surrogateescape") as status:
                    text = re.sub(
                        r"(?m)^(VmPin|VmLck):\s*(\d+) kB$",
                        lambda m: f"{m[1]}:\t{int(m[2]) + charged[m[1]] * (PAGE_SIZE // 1024):8} kB",
                        status.read(),
                    )
                return self._give_text(call, text.encode("utf-8", "surrogateescape"), 0)
        raise NotServed

    def _give_text(self, call: Notification, text: bytes, flags: int) -> int:
        """A descriptor of the caller from which `text` can be read."""
        made = os.memfd_create("attribute", os.MFD_CLOEXEC)
        try:
            os.write(made, text)
            reader = os.open(f"/proc/self/fd/{made}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(made)
        try:
            return self._listener.add_fd(call, reader, None, flags & os.O_CLOEXEC)
        finally:
            os.close(reader)

    # -- calls on the model's files ----------------------------------------------------------------------------------

    def _ioctl(self, call: Notification) -> int:
        with self.kernel.entered():
            description, system_call = self._file(call, _signed(call.args[0]))
            if self._mappings and call.args[1] & 0xFFFFFFFF == IOMMU_DESTROY.number:
                self._mappings.look(description, self._clients.pids())
            return description.ioctl(system_call, call.args[1] & 0xFFFFFFFF, call.args[2])

    def _read(self, call: Notification, offset: int | None) -> int:
        with self.kernel.entered():
            description, system_call = self._file(call, _signed(call.args[0]))
            return self._read_at(description, system_call, call.args[1], call.args[2], offset)

    def _read_at(
        self, description: FileDescription, call: SystemCall, address: int, count: int, offset: int | None
    ) -> int:
        if description.access == os.O_WRONLY:
            raise KernelError(errno.EBADF, "the file is not open for reading")
        check_range(address, count)
        return description.read_to(call, address, min(count, MAX_RW_COUNT), offset)

    def _write(self, call: Notification, offset: int | None) -> int:
        with self.kernel.entered():
            description, system_call = self._file(call, _signed(call.args[0]))
            return self._write_at(description, system_call, call.args[1], call.args[2], offset)

    def _write_at(
        self, description: FileDescription, call: SystemCall, address: int, count: int, offset: int | None
    ) -> int:
        if description.access == os.O_RDONLY:
            raise KernelError(errno.EBADF, "the file is not open for writing")
        check_range(address, count)
        return description.write_from(call, address, min(count, MAX_RW_COUNT), offset)

    def _vectored(
        self, call: Notification, one: Callable[[FileDescription, SystemCall, int, int, int | None], int]
    ) -> int:
        """readv(2) and writev(2): a call for each segment, as for a file without iterators."""
        with self.kernel.entered():
            description, system_call = self._file(call, _signed(call.args[0]))
            if call.args[2] > _IOV_MAX:
                raise KernelError(errno.EINVAL, f"{call.args[2]} segments")
            total = 0
            for address, count in _IOVEC.iter_unpack(system_call.copy_from_user(call.args[1], call.args[2] * 16)):
                try:
                    done = one(description, system_call, address, count, None)
                except KernelError:
                    if total:
                        break
                    raise
                total += done
                if done < count:
                    break
            return total

    def _mmap(self, call: Notification) -> int:
        _, length, prot, flags, fd, offset = call.args
        if flags & _MAP_ANONYMOUS or not length or offset % PAGE_SIZE:
            raise NotServed
        with self.kernel.entered():
            description, system_call = self._file(call, _signed(fd))
            pages = -(-length // PAGE_SIZE) * PAGE_SIZE
            shared_write = flags & 1 and prot & PROT_WRITE
            if description.access == os.O_WRONLY or (shared_write and description.access == os.O_RDONLY):
                raise KernelError(errno.EACCES, "the file is not open for that access")
            region = description.mmap(system_call, pages, offset, prot, flags & 0xFFFFFFFF)
            if isinstance(region, MappedMemory):
                self._mappings.map(call, system_call.process, _signed(fd), description, region)
                raise NotServed
            region.unmapped()
            raise OSError(errno.ENODEV, f"{description.path}: mappings of registers are not served yet")

    def _dup(self, call: Notification, flags: int) -> int:
        """A copy that is trapped as the original is."""
        with self.kernel.entered():
            self._file(call, _signed(call.args[0]))
            process = self._client(call)
            return self._give(process, process.take_fd(_signed(call.args[0])), flags)

    def _fcntl(self, call: Notification) -> int:
        command = call.args[1] & 0xFFFFFFFF
        if command not in (_F_DUPFD, _F_DUPFD_CLOEXEC) or call.args[2] > seccomp.FIRST_FD:
            raise NotServed
        return self._dup(call, os.O_CLOEXEC if command == _F_DUPFD_CLOEXEC else 0)

    def _execve(self, call: Notification) -> int:
        client = self._clients.known(call.tid)
        if client is not None:
            client.execve_begins()
            self._memory_goes(client)
        raise NotServed

    def _exit(self, call: Notification) -> int:
        client = self._clients.known(call.tid)
        if client is not None:
            self._memory_goes(client)
        raise NotServed

    def _memory_goes(self, client: Client) -> None:
        """Pinned pages stay when a process exits or executes another program."""
        if client.process.mm.pins:
            self.kernel.process_exits(client.process)


def _read_memory(tid: int, address: int, length: int) -> bytes:
    """Memory of a thread that need not be a client of the model; short or empty where there is none."""
    try:
        fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, address)
        finally:
            os.close(fd)
    except (OSError, OverflowError):
        return b""


def _signed(value: int) -> int:
    """An int argument."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _offset(value: int) -> int:
    if value >> 63:
        raise KernelError(errno.EINVAL, "a negative file offset")
    return value
