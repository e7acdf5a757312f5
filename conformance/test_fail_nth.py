"""Fault injection as a client sees it: /proc/thread-self/fail-nth, and the capabilities' directories in debugfs.

With failslab's `ignore-gfp-wait` at its default, few things can fail in a call of iommufd, and they are the same on
every kernel: copies from and to the caller's memory, and the places that iommufd itself offers.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from conformance.mock import mock_domain
from conformance.steps import PAGE, destroy, fails, ioas_alloc, map_user
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_IOAS_ALLOC, IOMMU_IOAS_IOVA_RANGES

pytestmark = pytest.mark.needs("fail_nth", "iommu", "root")

DEBUGFS = "/sys/kernel/debug"


@pytest.fixture
def fail_nth(kernel: Backend) -> Iterator[File]:
    """The calling thread's own."""
    with kernel.open("/proc/thread-self/fail-nth") as file:
        yield file
        disarm(file)


def disarm(file: File) -> int:
    """What was still awaited. The read, too, can be what fails, and so can the write."""
    file = getattr(file, "inner", file)
    try:
        left = int(file.pread(20, 0))
    except OSError:
        left = 1
    try:
        file.pwrite(b"0", 0)
    except OSError:
        file.pwrite(b"0", 0)
    return left


def errnos(fail_nth: File, call: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> list[str]:
    """The errno of the call with its first failure, its second, and so on, until none is left to fail."""
    file = getattr(fail_nth, "inner", fail_nth)
    found: list[str] = []
    for nth in range(1, 1000):
        file.pwrite(b"%d" % nth, 0)
        try:
            call()
            name = "OK"
        except OSError as error:
            name = errno.errorcode[error.errno or 0]
        if disarm(fail_nth):
            return found
        found.append(name)
        undo()
    raise AssertionError("there is no end of failures")


@contextmanager
def setting(kernel: Backend, path: str, value: bytes, after: bytes) -> Iterator[None]:
    """A file of debugfs holds `value` in the block, and `after` behind it."""
    _store(kernel, path, value)
    try:
        yield
    finally:
        _store(kernel, path, after)


def _store(kernel: Backend, path: str, value: bytes) -> None:
    with kernel.open(f"{DEBUGFS}/{path}", os.O_WRONLY) as file:
        file.write(value)


def text(kernel: Backend, path: str) -> bytes:
    with kernel.open(f"{DEBUGFS}/{path}", os.O_RDONLY) as file:
        return file.read(64)


def raw(file: File) -> File:
    """Calls on this are not recorded: how many failures there are differs from kernel to kernel."""
    return getattr(file, "inner", file)


# ------------------------------------------------------------------------------------------------------------- the file


def test_nothing_is_awaited_at_first(fail_nth: File) -> None:
    assert fail_nth.read(20) == b"0\n"
    assert fail_nth.read(20) == b""


@pytest.mark.parametrize(
    ("written", "shown"),
    [(b"100", b"100\n"), (b"100\n", b"100\n"), (b"0x64", b"100\n"), (b"0144", b"100\n"), (b"+100", b"100\n")],
)
def test_number_reads_back(fail_nth: File, written: bytes, shown: bytes) -> None:
    assert fail_nth.write(written) == len(written)
    assert fail_nth.pread(20, 0) == shown


def test_offset_of_a_write_means_nothing(fail_nth: File) -> None:
    fail_nth.pwrite(b"100", 4096)
    assert fail_nth.pread(20, 0) == b"100\n"
    assert fail_nth.pwrite(b"0", 7) == 1


def test_read_starts_at_its_offset(fail_nth: File) -> None:
    assert fail_nth.pread(20, 1) == b"\n"
    assert fail_nth.pread(20, 2) == b""


@pytest.mark.parametrize("written", [b"", b"x", b"-1", b"1 ", b" 1", b"1\n\n", b"08", b"0x", b"1y"])
def test_no_number_is_einval(fail_nth: File, written: bytes) -> None:
    if not written:
        pytest.skip("an empty write does not reach the file")
    with fails(errno.EINVAL):
        fail_nth.write(written)


@pytest.mark.parametrize("written", [b"4294967296", b"18446744073709551616", b"0x100000000"])
def test_more_than_32_bits_is_erange(fail_nth: File, written: bytes) -> None:
    with fails(errno.ERANGE):
        fail_nth.write(written)
    assert fail_nth.pread(20, 0) == b"0\n"


def test_self_is_the_first_thread(kernel: Backend) -> None:
    with kernel.open("/proc/self/fail-nth") as one, kernel.open(f"/proc/self/task/{os.getpid()}/fail-nth") as same:
        one.write(b"1000")
        assert 900 < int(raw(same).pread(20, 0)) <= 1000
        raw(same).write(b"0")


@pytest.mark.parametrize("path", ["/proc/self/task/1/fail-nth", "/proc/4194304/fail-nth"])
def test_task_of_another_or_no_process_is_enoent(kernel: Backend, path: str) -> None:
    with fails(errno.ENOENT):
        kernel.open(path)


# ------------------------------------------------------------------------------------------------------- what is failed


def test_copy_of_the_struct_fails_first(kernel: Backend, iommu: File, fail_nth: File) -> None:
    with setting(kernel, "failslab/ignore-gfp-wait", b"Y", b"Y"):
        fail_nth.write(b"1")
        with fails(errno.EFAULT):
            IOMMU_IOAS_ALLOC(iommu)
        assert fail_nth.pread(20, 0) == b"0\n"
        assert ioas_alloc(iommu) == 1


def test_copy_of_the_answer_fails_second_and_leaves_no_object(kernel: Backend, iommu: File, fail_nth: File) -> None:
    ioas_alloc(iommu)  # the first object of a context takes memory for the table of ids, too
    with setting(kernel, "failslab/ignore-gfp-wait", b"Y", b"Y"):
        fail_nth.write(b"2")
        with fails(errno.EFAULT):
            IOMMU_IOAS_ALLOC(iommu)
        assert ioas_alloc(iommu) == 2


def test_finding_an_object_fails_as_if_it_were_not_there(kernel: Backend, iommu: File, fail_nth: File) -> None:
    ioas = ioas_alloc(iommu)
    with setting(kernel, "failslab/ignore-gfp-wait", b"Y", b"Y"):
        fail_nth.write(b"2")
        with fails(errno.ENOENT):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)
    assert fail_nth.pread(20, 0) == b"0\n"


@pytest.mark.needs("mock")
@pytest.mark.has("mock-generic-pt")  # before, a mock domain's own failure was ENOENT
def test_places_where_a_map_can_fail(kernel: Backend, iommu: File, fail_nth: File, ioas: int) -> None:
    mock_domain(iommu, ioas)
    buffer = kernel.buffer(4 * PAGE)
    with setting(kernel, "failslab/ignore-gfp-wait", b"Y", b"Y"):
        found = errnos(
            fail_nth,
            lambda: map_user(raw(iommu), ioas, buffer.address, 4 * PAGE, iova=1 << 24),
        )
    kernel.note("errnos", found)  # type: ignore[attr-defined]
    assert found == ["EFAULT", "ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM", "EFAULT"]


def test_allocations_fail_where_they_may_sleep_too(kernel: Backend, iommu: File, fail_nth: File) -> None:
    with setting(kernel, "failslab/ignore-gfp-wait", b"N", b"Y"):
        found = errnos(fail_nth, lambda: IOMMU_IOAS_ALLOC(raw(iommu)))
    assert {"ENOMEM", "EFAULT"} <= set(found) <= {"ENOMEM", "EFAULT", "OK"}


@pytest.mark.needs("mock")
@pytest.mark.has("mock-generic-pt")
def test_device_whose_making_failed_leaves_nothing(kernel: Backend, iommu: File, fail_nth: File, ioas: int) -> None:
    made: list[int] = []

    def take_back() -> None:
        while made:
            destroy(raw(iommu), made.pop())

    with setting(kernel, "failslab/ignore-gfp-wait", b"N", b"Y"):
        found = errnos(fail_nth, lambda: made.append(mock_domain(raw(iommu), ioas).stdev), take_back)
    # Which of its caches has room for an object decides whether a name that could not be made is missed (ENOENT), and
    # whether an EINVAL shows, which it does on x86 and not on arm64.
    assert {"ENOMEM", "EFAULT"} <= set(found) - {"ENOENT", "EINVAL"} <= {"ENOMEM", "EFAULT", "OK"}
    assert made == [ioas + 1]
    assert ioas_alloc(iommu) == ioas + 4


def test_other_thread_is_not_concerned(kernel: Backend, iommu: File, fail_nth: File) -> None:
    made: list[int] = []
    fail_nth.write(b"1")
    # The thread that starts another needs memory for that, which fails here where the kernel is real.
    assert disarm(fail_nth) in (0, 1)
    thread_may_start, armed = threading.Event(), threading.Event()

    def other() -> None:
        thread_may_start.wait()
        made.append(ioas_alloc(raw(iommu)))
        armed.set()

    thread = threading.Thread(target=other)
    thread.start()
    raw(fail_nth).write(b"1000000")
    thread_may_start.set()
    armed.wait()
    thread.join()
    assert disarm(fail_nth) > 1000
    assert made == [1]


# ------------------------------------------------------------------------------------------------------------- debugfs


@pytest.mark.parametrize("name", ["failslab", "fail_page_alloc", "fail_iommufd", "fail_usercopy"])
def test_defaults(kernel: Backend, name: str) -> None:
    shown = {file: text(kernel, f"{name}/{file}") for file in ("probability", "interval", "space", "task-filter")}
    assert shown == {"probability": b"0\n", "interval": b"1\n", "space": b"0\n", "task-filter": b"N\n"}


def test_fail_nth_counts_as_one_of_the_times(kernel: Backend, iommu: File, fail_nth: File) -> None:
    with setting(kernel, "fail_usercopy/times", b"5", b"1"):
        fail_nth.write(b"1")
        with fails(errno.EFAULT):
            IOMMU_IOAS_ALLOC(iommu)
        assert text(kernel, "fail_usercopy/times") == b"4\n"


def test_probability_fails_every_task_as_often_as_it_may(kernel: Backend, iommu: File, ioas: int) -> None:
    with (
        setting(kernel, "fail_iommufd/times", b"1", b"1"),
        setting(kernel, "fail_iommufd/probability", b"100", b"0"),
    ):
        with fails(errno.ENOENT):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)
        assert text(kernel, "fail_iommufd/times") == b"0\n"
        with fails(errno.EMSGSIZE):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)


def test_interval_and_space_put_it_off(kernel: Backend, iommu: File, ioas: int) -> None:
    with (
        setting(kernel, "fail_iommufd/times", b"-1", b"1"),
        setting(kernel, "fail_iommufd/space", b"2", b"0"),
        setting(kernel, "fail_iommufd/probability", b"100", b"0"),
    ):
        assert text(kernel, "fail_iommufd/times") == b"-1\n"
        with fails(errno.EMSGSIZE):
            IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)
        for _ in range(3):
            with fails(errno.ENOENT):
                IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)
    with (
        setting(kernel, "fail_iommufd/task-filter", b"1", b"off"),
        setting(kernel, "fail_iommufd/probability", b"100", b"0"),
        fails(errno.EMSGSIZE),
    ):
        IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas)


@pytest.mark.parametrize(
    ("path", "written", "error"),
    [
        ("fail_iommufd/probability", b"x", errno.EINVAL),
        ("fail_iommufd/probability", b"18446744073709551616", errno.ERANGE),
        ("fail_iommufd/times", b"--1", errno.EINVAL),
        ("fail_iommufd/times", b"9223372036854775808", errno.ERANGE),
    ],
)
def test_settings_refuse_what_is_no_number(kernel: Backend, path: str, written: bytes, error: int) -> None:
    with kernel.open(f"{DEBUGFS}/{path}", os.O_WRONLY) as file, fails(error):
        file.write(written)


def test_truth_values_that_are_none_change_nothing(kernel: Backend) -> None:
    for written, shown in ((b"maybe", b"Y\n"), (b"off", b"N\n"), (b"o", b"N\n"), (b"On", b"Y\n"), (b"y", b"Y\n")):
        with setting(kernel, "failslab/ignore-gfp-wait", written, b"Y" if shown == b"Y\n" else b"N"):
            assert text(kernel, "failslab/ignore-gfp-wait") == shown
    with setting(kernel, "failslab/ignore-gfp-wait", b"Y", b"Y"):
        assert text(kernel, "failslab/ignore-gfp-wait") == b"Y\n"
