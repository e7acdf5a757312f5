"""fail-nth and debugfs for unmodified programs: paths, threads, children, and what upstream's iommufd_fail_nth does."""

from __future__ import annotations

import os
import textwrap

import pytest

from tests.shim.test_run import WHY_NOT, run_python

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no seccomp user notification here: {WHY_NOT}")

#: The client's own words for a call that allocates, and for fail-nth.
PRELUDE = textwrap.dedent(
    """
    import ctypes, errno, threading
    def alloc():
        block = bytearray(struct.pack("<III", 12, 0, 0))
        try:
            fcntl.ioctl(fd, 0x3B81, block)
        except OSError as error:
            return errno.errorcode[error.errno]
        return struct.unpack("<III", block)[2]
    def arm(path="/proc/thread-self/fail-nth"):
        return os.open(path, os.O_RDWR)
    def sites(nth):
        found = []
        for number in range(1, 50):
            os.pwrite(nth, b"%d" % number, 0)
            found.append(alloc())
            try:
                left = int(os.pread(nth, 20, 0))
            except OSError:
                left = 1
            try:
                os.pwrite(nth, b"0", 0)
            except OSError:
                os.pwrite(nth, b"0", 0)
            if left:
                return found
    def setting(name, value):
        made = os.open("/sys/kernel/debug/" + name, os.O_WRONLY)
        os.write(made, value)
        os.close(made)
    """
)


def client(program: str) -> str:
    done = run_python(PRELUDE + textwrap.dedent(program), "--machine", "mock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def test_failures_of_a_program_leave_nothing() -> None:
    out = client(
        """
        print(sites(arm()))
        setting("failslab/ignore-gfp-wait", b"N")
        print(sites(arm()))
        """
    )
    assert out.splitlines() == ["['EFAULT', 'EFAULT', 1]", "['EFAULT', 'ENOMEM', 'EFAULT', 2]"]


def test_every_path_of_the_file_is_the_same_task() -> None:
    out = client(
        """
        me = os.getpid()
        os.write(arm(), b"1000")
        for path in ("/proc/self/fail-nth", f"/proc/{me}/fail-nth", f"/proc/self/task/{me}/fail-nth",
                     f"/proc/{me}/task/{me}/fail-nth"):
            print(900 < int(os.pread(arm(path), 20, 0)) <= 1000)
        root = os.open("/proc/self", os.O_RDONLY)
        print(900 < int(os.pread(os.open("fail-nth", os.O_RDWR, dir_fd=root), 20, 0)))
        os.write(arm(), b"0")
        """
    )
    assert out.split() == ["True"] * 5


def test_threads_and_children_have_their_own() -> None:
    out = client(
        """
        nth = arm()
        os.write(nth, b"100")
        def other():
            print(alloc(), os.read(arm(), 20))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        sys.stdout.flush()
        if os.fork() == 0:
            print(alloc(), os.read(arm(), 20))
            print(os.pread(nth, 20, 0)[:1] == b"9" or os.pread(nth, 20, 0))
            sys.stdout.flush()
            os._exit(0)
        os.wait()
        os.write(nth, b"0")
        print(alloc())
        """
    )
    lines = out.splitlines()
    assert lines[:2] == ["1 b'0\\n'", "2 b'0\\n'"]
    assert lines[-1] == "3"


def test_task_that_is_no_clients_is_enoent() -> None:
    out = client(
        """
        for path in ("/proc/self/task/1/fail-nth", "/proc/1/fail-nth"):
            try:
                arm(path)
            except OSError as error:
                print(errno.errorcode[error.errno])
        """
    )
    assert out.split() == ["ENOENT", "ENOENT"]


@pytest.mark.skipif(not os.access("/sys/kernel/debug", os.R_OK), reason="the host has no /sys/kernel/debug to open")
def test_setup_of_upstreams_program() -> None:
    """It opens the directory, then files relative to it, and writes each with one write(2)."""
    out = client(
        """
        debugfs = os.open("/sys/kernel/debug/", os.O_RDONLY | os.O_DIRECTORY)
        for name in ("failslab/ignore-gfp-wait", "fail_page_alloc/ignore-gfp-highmem", "fail_iommufd/task-filter"):
            file = os.open(name, os.O_WRONLY, dir_fd=debugfs)
            print(os.write(file, b"N"))
            os.close(file)
            print(os.read(os.open(name, os.O_RDONLY, dir_fd=debugfs), 8))
        """
    )
    assert out.split() == ["1", "b'N\\n'"] * 3
