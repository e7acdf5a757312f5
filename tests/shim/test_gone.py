"""Pinned memory of programs that have ended: what the supervisor keeps of it, and what it cannot keep."""

from __future__ import annotations

import pytest

from tests.shim.test_run import WHY_NOT, run_python

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no seccomp user notification here: {WHY_NOT}")

PROGRAM = """
import ctypes, mmap, signal, threading
sys.path.insert(0, os.getcwd())
from conformance.mock import access_rw, create_access, mock_domain
from conformance.steps import PAGE, ioas_alloc, map_user
from uapi.linux import LinuxFile

iommu = LinuxFile(fd, "/dev/iommu")
ioas = ioas_alloc(iommu)
mock_domain(iommu, ioas)
child = os.fork()
if child == 0:
    private = mmap.mmap(-1, 3 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[:] = b"kept" * (3 * PAGE // 4)
    map_user(iommu, ioas, ctypes.addressof(ctypes.c_char.from_buffer(private)), 3 * PAGE, iova=1 << 24)
    END
    os._exit(9)
os.waitpid(child, 0)
access = create_access(iommu, ioas, pin=False)
data = ctypes.create_string_buffer(3 * PAGE)
try:
    access_rw(iommu, access, 1 << 24, 3 * PAGE, ctypes.addressof(data))
    print("read", data.raw == b"kept" * (3 * PAGE // 4))
except OSError as error:
    print("errno", error.errno)
"""


def outcome(end: str) -> str:
    done = run_python(PROGRAM.replace("END", end), "--machine", "mock")
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "os.execv('/bin/true', ['true'])",
    ],
    ids=["exit", "execve"],
)
def test_pinned_pages_outlive_the_process(end: str) -> None:
    assert outcome(end) == "read True"


def test_failing_execve_changes_nothing() -> None:
    end = """
    try:
        os.execv('/no/such', ['x'])
    except OSError:
        private[:] = b"kept" * (3 * PAGE // 4)
    os._exit(0)
""".strip()
    assert outcome(end) == "read True"


def test_pinned_pages_of_a_killed_process_are_gone() -> None:
    """A way out that nobody is asked about. A real pin would have kept them."""
    assert outcome("os.kill(os.getpid(), signal.SIGKILL)") == "errno 14"
