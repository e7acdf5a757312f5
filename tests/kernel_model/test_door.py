"""Descriptors, mappings and clients: kernel_model/door.py and kernel.py from the client's side."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from kernel_model.errors import KernelBug, KernelError
from kernel_model.file import FileDescription, SystemCall
from kernel_model.kernel import Kernel
from kernel_model.process import TASK_SIZE
from uapi.backend import DEV_IOMMU, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, File
from uapi.iommufd import IOMMU_DESTROY, IOMMU_FAULT_QUEUE_ALLOC, IOMMU_IOAS_ALLOC, IOMMU_IOAS_MAP

PAGE = 4096


class Registers:
    """What a mapping of `Probe` leads to."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def read(self, offset: int, width: int) -> int:
        self.probe.log.append(("read", offset, width))
        return 0x1122334455667788 & (1 << 8 * width) - 1

    def write(self, offset: int, width: int, value: int) -> None:
        if value == 0xBAD:
            raise KernelError(errno.EIO, "told to fail")
        self.probe.log.append(("write", offset, width, value))

    def unmapped(self) -> None:
        self.probe.log.append(("unmapped",))


class Probe(FileDescription):
    """A file that writes down what happens to it."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def ioctl(self, call: SystemCall, request: int, arg: int) -> int:
        self.log.append((request, arg))
        return 7

    def read(self, call: SystemCall, count: int, offset: int | None) -> bytes:
        return b"x" * min(count, 4)

    def write(self, call: SystemCall, data: bytes | bytearray | memoryview, offset: int | None) -> int:
        return len(data)

    def mmap(self, call: SystemCall, length: int, offset: int, prot: int, flags: int) -> Registers:
        self.log.append(("mmap", length, offset))
        return Registers(self)

    def release(self) -> None:
        self.log.append("released")


@pytest.fixture
def probe(kernel: Kernel) -> Probe:
    probe = Probe()
    kernel.files.add_node("/dev/probe", lambda call, flags: probe)
    return probe


def refused(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_last_close_releases_at_once(kernel: Kernel, probe: Probe) -> None:
    kernel.open("/dev/probe").close()
    assert probe.log == ["released"]


def test_dup_keeps_the_file_open(kernel: Kernel, probe: Probe) -> None:
    file = kernel.open("/dev/probe")
    other = os.dup(file.fileno())
    file.close()
    assert probe.log == []
    with kernel.adopt(other) as again:
        assert again.ioctl(1, 2) == 7
    assert probe.log == [(1, 2), "released"]


def test_bare_close_takes_effect_at_the_next_call(kernel: Kernel, probe: Probe) -> None:
    file = kernel.open("/dev/probe")
    os.close(file.fileno())
    with refused(errno.EBADF):
        file.ioctl(1)
    assert probe.log == ["released"]


def test_file_whose_number_was_reused_reaches_the_new_file(kernel: Kernel, probe: Probe) -> None:
    stale = kernel.open("/dev/probe")
    os.close(stale.fileno())
    with kernel.open("/dev/iommu") as iommu:
        assert iommu.fileno() == stale.fileno()
        assert IOMMU_IOAS_ALLOC(stale).out_ioas_id == 1
        IOMMU_DESTROY(iommu, id=1)


def test_number_that_is_another_kind_of_file_is_ebadf(kernel: Kernel) -> None:
    ends = os.pipe()
    stale = kernel.open("/dev/iommu")
    os.dup2(ends[0], stale.fileno())
    with refused(errno.EBADF):
        stale.ioctl(0)
    with refused(errno.EBADF):
        kernel.adopt(ends[1])
    for fd in (*ends, stale.fileno()):
        os.close(fd)


def test_descriptor_is_not_inherited_by_programs(kernel: Kernel) -> None:
    with kernel.open("/dev/iommu") as iommu:
        assert not os.get_inheritable(iommu.fileno())


def test_descriptors_of_one_file_survive_scm_rights(kernel: Kernel, probe: Probe) -> None:
    file = kernel.open("/dev/probe")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [file.fileno()])
        file.close()
        with kernel.open("/dev/iommu"):
            assert probe.log == []
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        kernel.adopt(fds[0]).close()
    assert probe.log == ["released"]


def test_last_close_may_happen_in_a_child(kernel: Kernel, probe: Probe) -> None:
    file = kernel.open("/dev/probe")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    file.close()
    with kernel.open("/dev/iommu"):
        assert probe.log == []
    os.close(writing)
    os.waitpid(child, 0)
    with kernel.open("/dev/iommu"):
        assert probe.log == ["released"]


def in_child(work: Any) -> int:
    """The exit status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except KernelBug:
            os._exit(42)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_kernel_in_a_forked_child_is_a_bug(kernel: Kernel) -> None:
    with kernel.open("/dev/iommu") as iommu:
        assert in_child(lambda: kernel.open("/dev/iommu")) == 42
        assert in_child(lambda: IOMMU_IOAS_ALLOC(iommu)) == 42
        assert in_child(lambda: kernel.status("VmPin")) == 42
        assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == 1


def test_forked_child_may_close_its_copy_of_a_file(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file:
        assert in_child(file.close) == 0
        assert file.ioctl(1, 2) == 7


def test_forked_child_may_have_a_kernel_of_its_own(kernel: Kernel) -> None:
    def work() -> None:
        with Kernel("bare") as own, own.open("/dev/iommu") as iommu:
            assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == 1

    assert in_child(work) == 0


def test_call_of_a_closed_kernel_is_a_bug_but_a_close_is_none(kernel: Kernel) -> None:
    with Kernel("bare") as other:
        file = other.open("/dev/iommu")
    with pytest.raises(KernelBug):
        file.ioctl(0)
    file.close()


def test_closing_the_kernel_hangs_up_its_descriptors() -> None:
    with Kernel("bare") as other:
        file = other.open("/dev/iommu")
        watch = select.poll()
        watch.register(file.fileno(), select.POLLIN)
    assert watch.poll(0)[0][1] & select.POLLHUP
    file.close()


def test_open_without_a_descriptor_left_is_emfile_and_leaves_nothing(kernel: Kernel, probe: Probe) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare[0] + 1, before[1]))
    try:
        with refused(errno.EMFILE):
            kernel.open("/dev/probe")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    os.close(spare[0])
    assert probe.log == ["released"]


# -- access modes and counts -------------------------------------------------------------------------------------------


def test_write_of_a_file_that_is_open_for_reading_is_ebadf(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe", os.O_RDONLY) as file:
        assert file.read(2) == b"xx"
        with refused(errno.EBADF):
            file.write(b"data")
        with refused(errno.EBADF):
            file.write_from(0, 0)
        with refused(errno.EACCES):
            file.mmap(PAGE, prot=PROT_READ | PROT_WRITE)
        file.mmap(PAGE, prot=PROT_READ).close()


def test_read_of_a_file_that_is_open_for_writing_is_ebadf(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe", os.O_WRONLY) as file:
        assert file.write(b"data") == 4
        for read in (lambda: file.read(1), lambda: file.pread(1, 0), lambda: file.read_to(0, 0)):
            with refused(errno.EBADF):
                read()
        with refused(errno.EACCES):
            file.mmap(PAGE, prot=PROT_READ)


def test_read_and_write_at_an_address(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file, closing(kernel.buffer(PAGE)) as buffer:
        assert file.read_to(buffer.address + 8, 3) == 3
        assert bytes(buffer.view[:12]) == bytes(8) + b"xxx" + bytes(1)
        assert file.write_from(buffer.address + 8, 3) == 3
        for address in (0, TASK_SIZE - 2, TASK_SIZE, (1 << 64) - 3):
            for call in (file.read_to, file.write_from):
                with refused(errno.EFAULT):
                    call(address, 3)
        assert file.write_from(TASK_SIZE, 0) == 0


def test_negative_count_or_offset_is_einval(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file:
        for call in (lambda: file.read(-1), lambda: file.pread(-1, 0), lambda: file.pread(1, -1)):
            with refused(errno.EINVAL):
                call()
        with refused(errno.EINVAL):
            file.pwrite(b"x", -1)


@pytest.mark.parametrize(
    ("length", "offset", "flags", "number"),
    [
        (0, 0, MAP_SHARED, errno.EINVAL),
        (PAGE, 1, MAP_SHARED, errno.EINVAL),
        (1 << 47, PAGE, MAP_SHARED, None),
        ((1 << 47) + 1, 0, MAP_SHARED, errno.ENOMEM),
        (-1, 0, MAP_SHARED, errno.ENOMEM),
        (PAGE, -PAGE, MAP_SHARED, errno.EOVERFLOW),
        (PAGE, 0, 0, errno.EINVAL),
        (PAGE, 0, MAP_PRIVATE, 0),
    ],
)
def test_mmap_checks_its_arguments_before_the_file_sees_them(
    kernel: Kernel, probe: Probe, length: int, offset: int, flags: int, number: int | None
) -> None:
    with kernel.open("/dev/probe") as file:
        if number == 0:
            file.mmap(length, offset, flags=flags).close()
            return
        with refused(number or errno.ENOMEM):
            file.mmap(length, offset, flags=flags)
        # Where the host has no room either, the file has seen the mapping come and go.
        assert probe.log == ([] if number else [("mmap", length, offset), ("unmapped",)])


# -- mappings ----------------------------------------------------------------------------------------------------------


def test_access_of_a_mapping_reaches_the_device_at_once(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file, file.mmap(PAGE) as mapping:
        assert mapping.read(8, 4) == 0x55667788
        mapping.write(16, 2, 0x12345)
        assert probe.log[1:] == [("read", 8, 4), ("write", 16, 2, 0x2345)]
    assert probe.log[3:] == [("unmapped",), "released"]


def test_raw_store_is_delivered_at_the_next_call_in_address_order(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file, file.mmap(PAGE) as mapping:
        view = mapping.view
        view[12:16] = b"\x04\x03\x02\x01"
        view[0:8] = bytes(range(8))
        assert probe.log[1:] == []
        kernel.status("VmPin")
        assert probe.log[1:] == [
            ("write", 0, 4, 0x03020100),
            ("write", 4, 4, 0x07060504),
            ("write", 12, 4, 0x01020304),
        ]
        kernel.status("VmPin")
        assert len(probe.log) == 4


def test_store_by_access_is_not_delivered_twice(kernel: Kernel, probe: Probe) -> None:
    with kernel.open("/dev/probe") as file, file.mmap(PAGE) as mapping:
        assert bytes(mapping.view[:4]) == bytes(4)
        mapping.write(0, 4, 5)
        kernel.status("VmPin")
        assert probe.log[1:] == [("write", 0, 4, 5)]


@pytest.mark.parametrize(("offset", "width"), [(0, 3), (2, 4), (PAGE, 1), (PAGE - 4, 8), (-4, 4), (0, 0)])
def test_access_that_no_processor_makes_is_a_value_error(kernel: Kernel, probe: Probe, offset: int, width: int) -> None:
    with kernel.open("/dev/probe") as file, file.mmap(PAGE) as mapping:
        with pytest.raises(ValueError, match=r"no .*access"):
            mapping.read(offset, width)
        with pytest.raises(ValueError, match=r"no .*access"):
            mapping.write(offset, width, 0)


def test_mapping_outlives_the_descriptor(kernel: Kernel, probe: Probe) -> None:
    file = kernel.open("/dev/probe")
    mapping = file.mmap(100)
    assert mapping.length == PAGE
    file.close()
    mapping.write(0, 1, 1)
    assert probe.log[-1] == ("write", 0, 1, 1)
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.read(0, 1)
    assert (kernel.mappings, kernel.watched_mappings) == ([], [])


def test_failing_delivery_leaves_the_kernel_enterable(kernel: Kernel, probe: Probe) -> None:
    """An error on the way in must not keep the lock, nor be taken for being inside a call."""
    with kernel.open("/dev/probe") as file, file.mmap(PAGE) as mapping:
        mapping.view[0:4] = (0xBAD).to_bytes(4, "little")
        with refused(errno.EIO):
            file.ioctl(1)
        assert kernel._depth == 0
        assert file.ioctl(1) == 7


def test_failing_deferred_work_leaves_the_kernel_enterable(kernel: Kernel, probe: Probe) -> None:
    def fail() -> None:
        raise KernelBug("told to fail")

    with kernel.open("/dev/probe") as file:
        kernel.defer(fail)
        with pytest.raises(KernelBug):
            file.ioctl(1)
        assert kernel._depth == 0
        assert file.ioctl(1) == 7


def test_deferred_work_is_done_before_the_call_returns(kernel: Kernel, probe: Probe) -> None:
    done: list[int] = []
    with kernel.entered():
        kernel.defer(lambda: kernel.defer(lambda: done.append(1)))
        assert done == []
    assert done == [1]


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def iommu(kernel: Kernel) -> Iterator[File]:
    with kernel.open("/dev/iommu") as iommu:
        yield iommu


def test_argument_may_be_a_struct_a_buffer_or_an_address(kernel: Kernel, iommu: File) -> None:
    import ctypes

    struct = IOMMU_IOAS_ALLOC.make()
    block = bytearray(bytes(struct))
    words = (ctypes.c_uint32 * 3)(12, 0, 0)
    there = IOMMU_IOAS_ALLOC.make()
    for arg in (struct, block, memoryview(words), ctypes.addressof(there)):
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, arg)
    assert [struct.out_ioas_id, block[8], words[2], there.out_ioas_id] == [1, 2, 3, 4]


def test_number_is_cut_to_32_bits_and_an_address_to_64(iommu: File) -> None:
    struct = IOMMU_IOAS_ALLOC.make()
    iommu.ioctl(IOMMU_IOAS_ALLOC.number | 1 << 40, struct)
    assert struct.out_ioas_id == 1
    for address in (0, -8, 1 << 47, (1 << 64) - 1):
        with refused(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, address)


def test_empty_buffer_is_no_argument(iommu: File) -> None:
    with refused(errno.ENOTTY):
        iommu.ioctl(0x12345678, bytearray())


def test_long_tail_of_zeros_costs_no_loop_in_python(iommu: File) -> None:
    """The tail is compared in C: a gigabyte of zeros is a second's work at most."""
    block = bytearray(64 << 20)
    block[0:4] = len(block).to_bytes(4, "little")
    iommu.ioctl(IOMMU_IOAS_ALLOC.number, block)
    block[-1] = 1
    with refused(errno.E2BIG):
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, block)


# -- clients -----------------------------------------------------------------------------------------------------------


def test_sixteenth_process_is_eagain_and_leaves_no_child(kernel: Kernel) -> None:
    clients = [kernel.spawn() for _ in range(14)]
    children = set(_children())
    with refused(errno.EAGAIN):
        kernel.spawn()
    assert set(_children()) == children
    for client in clients:
        client.exit()
    with kernel.spawn():
        pass


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
        return children.read().split()


def test_close_straight_after_spawn_is_the_last_one(kernel: Kernel, probe: Probe) -> None:
    """The child has let go of what it inherited before `spawn` returns."""
    file = kernel.open("/dev/probe")
    with kernel.spawn():
        file.close()
        assert probe.log == ["released"]


def test_client_that_outlives_the_kernel_ends_quietly() -> None:
    with Kernel("bare") as other:
        client = other.spawn()
    client.exit()


def test_window_of_a_dead_process_is_not_used_again_while_pinned() -> None:
    from kernel_model.iommufd.pages import UserPages

    with Kernel("bare") as kernel:
        client = kernel.spawn()
        process = kernel._processes[client.pid]
        pages = UserPages(kernel, process, client.allocate(PAGE), PAGE, True)
        pages.pin(0, 0)
        places = set(process.mm.places.values())
        client.exit()
        # Of the fifteen address spaces one is this process's, and one the dead one's.
        others = [kernel.spawn() for _ in range(13)]
        assert places == set(process.mm.places.values())
        with refused(errno.EAGAIN):
            kernel.spawn()
        pages.unpin(0, 0)
        pages.put()
        others.append(kernel.spawn())
        assert places == {others[-1]._process.mm.physical(0)}
        for other in others:
            other.exit()


def test_calls_of_a_client_use_its_own_descriptors_and_memory(kernel: Kernel, iommu: File) -> None:
    with kernel.spawn() as client:
        remote = client.receive(iommu)
        address = client.allocate(PAGE)
        client.poke(address, bytes(IOMMU_IOAS_ALLOC.make()))
        remote.ioctl(IOMMU_IOAS_ALLOC.number, address)
        assert client.peek(address + 8, 1) == b"\1"
        remote.close()
        with refused(errno.EBADF):
            remote.ioctl(IOMMU_IOAS_ALLOC.number, address)
    assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == 2


def test_buffer_that_is_closed_while_mapped_lazily_is_gone(kernel: Kernel, iommu: File) -> None:
    ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
    buffer = kernel.buffer(PAGE)
    IOMMU_IOAS_MAP(iommu, ioas_id=ioas, flags=7, user_va=buffer.address, length=PAGE, iova=0)
    buffer.close()
    assert kernel._buffers._buffers == []


def test_descriptors_are_as_before_when_a_kernel_is_closed() -> None:
    before = os.listdir("/proc/self/fd")
    with Kernel("bare") as other, other.open("/dev/iommu"), other.spawn() as client:
        client.open("/dev/iommu")
    assert os.listdir("/proc/self/fd") == before


def test_scm_rights_message_that_nobody_reads_keeps_the_file(kernel: Kernel, probe: Probe) -> None:
    ours, theirs = socket.socketpair()
    file = kernel.open("/dev/probe")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
    ours.sendmsg([b"x"], rights)
    file.close()
    kernel.status("VmPin")
    assert probe.log == []
    ours.close()
    theirs.close()
    kernel.status("VmPin")
    assert probe.log == ["released"]


def test_a_file_without_a_poll_operation_is_always_readable_to_select(kernel: Kernel) -> None:
    with kernel.open(DEV_IOMMU) as iommu:
        assert select.select([iommu], [], [], 0)[0] == [iommu]


def test_an_empty_fault_queue_is_not_readable_to_select(kernel: Kernel) -> None:
    with kernel.open(DEV_IOMMU) as iommu:
        fd = IOMMU_FAULT_QUEUE_ALLOC(iommu).out_fault_fd
        assert select.select([fd], [], [], 0)[0] == []
        os.close(fd)


def test_a_descriptor_made_for_a_client_is_open_in_the_client(kernel: Kernel) -> None:
    with kernel.spawn() as client:
        ours = os.listdir("/proc/self/fd")
        iommu = client.open(DEV_IOMMU)
        arg = IOMMU_FAULT_QUEUE_ALLOC.make()
        iommu.ioctl(IOMMU_FAULT_QUEUE_ALLOC.number, arg)
        assert str(arg.out_fault_fd) in os.listdir(f"/proc/{client.pid}/fd")
        # One end of each of the two socket pairs is the model's; none of the client's ends is.
        assert len(os.listdir("/proc/self/fd")) == len(ours) + 2
