"""kernel_model/process.py: a client's memory and what the kernel believes of it."""

from __future__ import annotations

import errno
import os
import resource
from typing import Any

import pytest

from conformance.arena import arena
from kernel_model.errors import KernelError
from kernel_model.kernel import Kernel
from kernel_model.process import (
    ALL_CAPABILITIES,
    CAP_IPC_LOCK,
    CAP_SYS_RESOURCE,
    RLIM_UNLIMITED,
    Credentials,
    HostCredentials,
    Mm,
)

PAGE = 4096


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


@pytest.fixture
def mm() -> Mm:
    return Mm(os.getpid())


def test_memory_is_read_and_written_up_to_a_hole_and_not_beyond(mm: Mm) -> None:
    with arena(3) as memory:
        memory.unmap(2)
        edge = memory.page(2)
        mm.write(edge - 4, b"abcd")
        assert mm.read(edge - 4, 4) == b"abcd"
        assert mm.read_some(edge - 4, 100) == b"abcd"
        assert mm.read_some(edge, 1) == b""
        for address in (edge - 3, edge):
            with refused(errno.EFAULT):
                mm.read(address, 4)
            with refused(errno.EFAULT):
                mm.write(address, b"wxyz")


def test_protection_counts(mm: Mm) -> None:
    with arena(2) as memory:
        memory.read_only(0)
        memory.no_access(1)
        assert mm.read(memory.page(0), 4) == bytes(4)
        for page in (0, 1):
            with refused(errno.EFAULT):
                mm.write(memory.page(page), b"x")
        with refused(errno.EFAULT):
            mm.read(memory.page(1), 1)


@pytest.mark.parametrize("address", [0, 1, (1 << 47) - 1, 1 << 47, 1 << 63, (1 << 64) - 1])
def test_address_outside_the_users_half_is_efault(mm: Mm, address: int) -> None:
    with refused(errno.EFAULT):
        mm.read(address, 2)
    with refused(errno.EFAULT):
        mm.write(address, b"xx")
    assert mm.read(address, 0) == b""
    mm.write(address, b"")


def test_both_ways_to_ask_for_mappings_say_the_same(mm: Mm) -> None:
    with arena(5) as memory:
        memory.read_only(1)
        memory.unmap(2)
        memory.no_access(3)
        found = []
        for _ in range(2):
            vmas = mm.vmas(memory.page(0), memory.page(4))
            found.append([(max(v.start, memory.page(0)), v.end, v.read, v.write, v.shared) for v in vmas])
            mm._query_works = False
        assert found[0] == found[1]
        assert [entry[2:4] for entry in found[0]] == [(True, True), (True, False), (False, False)]
    mm.close()


def test_process_that_is_gone_has_no_mappings() -> None:
    mm = Mm(0x7FFFFFFF)
    assert mm.vmas(0, 1 << 47) == []
    with refused(errno.EFAULT):
        mm.read(PAGE, 1)


def test_credentials_start_as_root_and_can_be_dropped() -> None:
    credentials = Credentials()
    assert (credentials.uid(), credentials.memlock()) == (0, RLIM_UNLIMITED)
    credentials.drop((CAP_IPC_LOCK,))
    assert not credentials.capable(CAP_IPC_LOCK)
    assert credentials.capable(CAP_SYS_RESOURCE)
    copy = credentials.copy()
    copy.setuid(1000)
    assert not copy.capable(CAP_SYS_RESOURCE)
    assert credentials.capable(CAP_SYS_RESOURCE)
    with refused(errno.EPERM):
        copy.setuid(0)
    credentials.setrlimit(resource.RLIM_INFINITY)
    assert credentials.memlock() == RLIM_UNLIMITED


def test_host_credentials_are_what_the_host_says() -> None:
    own = HostCredentials(os.getpid())
    with open("/proc/self/status", encoding="ascii") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    assert own.uid() == os.geteuid()
    for number in range(ALL_CAPABILITIES.bit_length()):
        assert own.capable(number) == bool(effective >> number & 1)
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert own.memlock() == (RLIM_UNLIMITED if soft == resource.RLIM_INFINITY else soft)


def test_host_credentials_of_a_process_that_is_gone_allow_nothing() -> None:
    gone = HostCredentials(0x3FFFFF)
    assert (gone.capable(CAP_IPC_LOCK), gone.memlock()) == (False, 0)


def test_client_of_a_kernel_with_host_credentials_limits_itself() -> None:
    with Kernel("bare", credentials="host") as kernel, kernel.spawn() as client:
        client.setrlimit(resource.RLIMIT_MEMLOCK, PAGE, PAGE)
        assert kernel._processes[client.pid].credentials.memlock() == PAGE
        client.drop_capabilities(CAP_IPC_LOCK)
        assert not kernel._processes[client.pid].capable(CAP_IPC_LOCK)
