"""Mappings of driver pages in programs that `iommulab run` serves, and what they keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

#: What every program begins with: a guest of the mock driver, and a second vIOMMU that has published two pages.
START = """
import errno, os, signal, sys, time
from conformance.mock_guest import PUBLISHED as SIZE, guest, publish
from conformance.steps import answer, destroy, ioas_alloc
from uapi.linux import LinuxBackend
kernel = LinuxBackend()
iommu = kernel.open("/dev/iommu")
ids = guest(iommu)
viommu, offset = publish(iommu, ids)
def destroys(number=None):
    return errno.errorcode.get(answer(destroy, iommu, number or viommu), "0")
"""


def run(program: str) -> str:
    """The program's output, on the model."""
    command = [
        sys.executable,
        "-m",
        "iommulab",
        "run",
        "--machine",
        "mock",
        "--",
        sys.executable,
        "-c",
        START + program,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    if "no user notification" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_mapping_has_the_pages_and_shares_them() -> None:
    out = run("""
one, two = iommu.mmap(SIZE, offset), iommu.mmap(SIZE, offset)
one.write(8, 4, 7)
print(hex(one.read(0, 4)), two.read(8, 4), destroys())
one.close()
print(destroys())
two.close()
print(destroys())
""")
    assert out.split() == ["0xbeef", "7", "EBUSY", "EBUSY", "0"]


def test_calls_on_the_descriptor_go_on_as_before() -> None:
    out = run("""
flags = os.get_inheritable(iommu.fileno())
with iommu.mmap(SIZE, offset):
    print(ioas_alloc(iommu), os.get_inheritable(iommu.fileno()) == flags, os.dup(iommu.fileno()) > 0)
print(destroys(), ioas_alloc(iommu))
""")
    assert out.split() == ["8", "True", "True", "0", "7"]


def test_pages_cannot_be_pinned() -> None:
    out = run("""
from conformance.mock import APERTURE
from conformance.steps import map_user
with iommu.mmap(SIZE, offset) as mapping:
    print(errno.errorcode[answer(map_user, iommu, ids.ioas, mapping.address, 4096, APERTURE[0])])
""")
    assert out == "EFAULT"


def test_refusals() -> None:
    out = run("""
for length, where in ((SIZE, 0), (SIZE // 2, offset), (SIZE * 2, offset), (SIZE, offset + 4096)):
    print(errno.errorcode[answer(iommu.mmap, length, where)])
print(errno.errorcode[answer(iommu.mmap, SIZE, offset, 1, 2)], errno.errorcode[answer(iommu.mmap, SIZE, offset, 5, 1)])
reader = kernel.open("/dev/iommu", os.O_RDONLY)
print(errno.errorcode[answer(reader.mmap, SIZE, offset)], destroys())
""")
    assert out.split() == ["ENXIO"] * 4 + ["EINVAL", "EPERM", "EACCES", "0"]


def test_two_contexts_have_memory_of_their_own() -> None:
    out = run("""
other = kernel.open("/dev/iommu")
number, where = publish(other, guest(other), 5)
with iommu.mmap(SIZE, offset) as one, other.mmap(SIZE, where) as two:
    one.write(4, 4, 1)
    print(hex(one.read(0, 4)), two.read(0, 4), two.read(4, 4), destroys(), answer(destroy, other, number))
print(destroys(), answer(destroy, other, number))
""")
    assert out.split() == ["0xbeef", "5", "0", "EBUSY", "16", "0", "0"]


def test_mapping_keeps_the_context_that_was_closed() -> None:
    """Seen from a duplicate's point of view: pins of the closed context stay until the mapping goes."""
    out = run("""
from conformance.mock import check_refs
from conformance.steps import map_user
from conformance.mock import APERTURE
memory = kernel.buffer(4096)
map_user(iommu, ids.ioas, memory.address, 4096, APERTURE[0])
mapping = iommu.mmap(SIZE, offset)
iommu.close()
again = kernel.open("/dev/iommu")
refs = lambda: [answer(check_refs, again, memory.address, 4096, count) for count in (0, 1)]
print(refs(), hex(mapping.read(0, 4)))
mapping.close()
print(refs())
""")
    assert out.splitlines() == ["[5, 0] 0xbeef", "[0, 5]"]


def test_a_forked_child_keeps_the_owner() -> None:
    out = run("""
mapping = iommu.mmap(SIZE, offset)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.read(reader, 1)
    os._exit(mapping.read(0, 4) & 0xff)
mapping.close()
print(destroys())
os.write(writer, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), destroys())
""")
    assert out.split() == ["EBUSY", str(0xEF), "0"]


def test_a_child_that_is_killed_gives_its_mapping_back() -> None:
    out = run("""
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    mapping = iommu.mmap(SIZE, offset)
    os.write(writer, b"x")
    time.sleep(60)
os.read(reader, 1)
print(destroys())
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(destroys())
""")
    assert out.split() == ["EBUSY", "0"]


def test_part_of_a_mapping_still_keeps_the_owner() -> None:
    out = run("""
import ctypes
mapping = iommu.mmap(SIZE, offset)
libc = ctypes.CDLL(None)
libc.munmap(ctypes.c_void_p(mapping.address), ctypes.c_size_t(4096))
print(destroys())
libc.munmap(ctypes.c_void_p(mapping.address + 4096), ctypes.c_size_t(4096))
print(destroys())
""")
    assert out.split() == ["EBUSY", "0"]
