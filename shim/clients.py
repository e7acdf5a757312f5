"""The programs' processes: which of the model's `Process` a trapped thread belongs to, and where its descriptors go.

A process becomes a client of the model with its first call that the model answers. It ends with its exit, or with
execve(2), after which it is another client: what was mapped from its old memory has gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from kernel_model.kernel import Kernel
from kernel_model.process import CAP_DAC_OVERRIDE, HostCredentials, Process
from shim.seccomp import END_FD, FIRST_FD

_TGID = re.compile(r"^Tgid:\s*(\d+)", re.M)
_LIMIT = re.compile(r"^Max open files\s+(\d+)", re.M)


class ClientCredentials(HostCredentials):
    """What the host says of a process, but for what the supervisor itself was not given.

    Root in a container lacks capabilities that root has on the machine of the model; as root, a client has those too.
    And whoever may start the supervisor may open the model's nodes.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._own = HostCredentials(os.getpid())

    def capable(self, capability: int) -> bool:
        if super().capable(capability):
            return True
        if self._own.capable(capability):
            return False
        return self.uid() == 0 or (capability == CAP_DAC_OVERRIDE and os.geteuid() != 0)


class Client:
    """A process that uses the model."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        #: While an execve(2) may be under way: the maps of the memory before it.
        self._maps = -1

    def execve_begins(self) -> None:
        if self._maps < 0:
            self._maps = os.open(f"/proc/{self.process.pid}/maps", os.O_RDONLY | os.O_CLOEXEC)

    def has_new_memory(self) -> bool:
        """Whether an execve(2) that began has succeeded: the old memory has no mapping any more."""
        if self._maps < 0:
            return False
        gone = not os.pread(self._maps, 1, 0)
        self._close_maps()
        if not gone:
            self.process.mm.remains.clear()
        return gone

    def _close_maps(self) -> None:
        if self._maps >= 0:
            os.close(self._maps)
            self._maps = -1

    def close(self) -> None:
        self._close_maps()
        os.close(self.pidfd)


class Clients:
    """All of them, by process id."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._by_pid: dict[int, Client] = {}
        self._leaders: dict[int, int] = {}

    def of(self, tid: int) -> tuple[Client, bool]:
        """The client that a thread belongs to, and whether it is a new one.

        OSError: ESRCH, ENOENT the thread has gone; EAGAIN the model has no room for another process.
        """
        pid = self._leader(tid)
        client = self._by_pid.get(pid)
        if client is not None and client.has_new_memory():
            self.remove(client)
            client = None
        if client is not None:
            return client, False
        process = self._kernel.add_process(pid, ClientCredentials(pid))
        try:
            client = Client(process)
        except OSError:
            self._kernel.process_exited(process)
            raise
        self._by_pid[pid] = client
        return client, True

    def known(self, tid: int) -> Client | None:
        """The client that a thread belongs to, if it is one."""
        client = self._by_pid.get(self._leader(tid))
        if client is not None and client.has_new_memory():
            self.remove(client)
            return None
        return client

    def pids(self) -> list[int]:
        """The process ids of all."""
        return list(self._by_pid)

    def by_pidfd(self, pidfd: int) -> Client | None:
        return next((client for client in self._by_pid.values() if client.pidfd == pidfd), None)

    def remove(self, client: Client) -> None:
        """The process has exited, or has new memory."""
        pid = client.process.pid
        del self._by_pid[pid]
        self._leaders = {tid: leader for tid, leader in self._leaders.items() if leader != pid}
        client.close()
        self._kernel.process_exited(client.process)

    def close(self) -> None:
        for client in list(self._by_pid.values()):
            self.remove(client)

    def _leader(self, tid: int) -> int:
        if tid in self._by_pid:
            return tid
        known = self._leaders.get(tid)
        if known is not None and os.path.exists(f"/proc/{known}/task/{tid}"):
            return known
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
            found = _TGID.search(status.read())
        if found is None:
            raise ProcessLookupError(3, f"thread {tid} has gone")
        self._leaders[tid] = int(found[1])
        return self._leaders[tid]


def free_numbers(pid: int) -> Iterator[int]:
    """Descriptor numbers that are free in a process: those that are trapped first, then, below its limit, any."""
    with open(f"/proc/{pid}/limits", encoding="utf-8") as limits:
        found = _LIMIT.search(limits.read())
    end = int(found[1]) if found else END_FD
    taken = set(os.listdir(f"/proc/{pid}/fd"))
    for number in (*range(FIRST_FD, min(END_FD, end)), *range(min(FIRST_FD, end))):
        if str(number) not in taken:
            yield number
