"""Steps that the tests of iommufd share: one short call for each thing that a test does to the kernel.

Each step issues one ioctl through its declaration in `uapi.iommufd` and returns what a test wants to know of the
reply. Nothing is checked here and nothing retried: an errno reaches the test as OSError, to be taken by `fails`.
Client memory with holes and protections is in `conformance.arena`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from conformance.arena import Arena
from uapi.backend import File
from uapi.iommufd import (
    IOMMU_DESTROY,
    IOMMU_HWPT_ALLOC,
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_ALLOW_IOVAS,
    IOMMU_IOAS_COPY,
    IOMMU_IOAS_IOVA_RANGES,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FILE,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
    IOMMU_IOAS_UNMAP,
    IOMMU_OPTION,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_OP_SET,
)

PAGE = 4096
MiB = 1 << 20
GiB = 1 << 30
U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1

FIXED = IOMMU_IOAS_MAP_FIXED_IOVA
READ = IOMMU_IOAS_MAP_READABLE
WRITE = IOMMU_IOAS_MAP_WRITEABLE
RW = READ | WRITE

#: A user address that nothing is mapped at. Without a domain, MAP never looks at user memory: any address is accepted.
NOWHERE = 0x7000_0000_0000

_SCRATCH = Arena(16)


def errno_name(number: int | None) -> str:
    """The symbol of an errno, "success" for 0."""
    if not number:
        return "success"
    # Python's table has the alias of the two.
    return errno.errorcode.get(number, str(number)).replace("ENOTSUP", "EOPNOTSUPP")


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """The block must raise OSError with this errno; anything else fails the test."""
    __tracebackhide__ = True
    try:
        yield
    except OSError as error:
        if error.errno != number:
            pytest.fail(f"{errno_name(error.errno)}, expected {errno_name(number)}", pytrace=True)
        return
    pytest.fail(f"success, expected {errno_name(number)}")


def answer(call: Any, *args: Any, **kwargs: Any) -> int:
    """The errno of a call, 0 for success."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or 0
    return 0


def ioas_alloc(iommu: File) -> int:
    """IOMMU_IOAS_ALLOC; the new id."""
    return IOMMU_IOAS_ALLOC(iommu).out_ioas_id


def hwpt_alloc(iommu: File, dev_id: int, pt_id: int, flags: int = 0, **fields: int) -> int:
    """HWPT_ALLOC for a bound device on an IOAS; its id."""
    return IOMMU_HWPT_ALLOC(iommu, dev_id=dev_id, pt_id=pt_id, flags=flags, **fields).out_hwpt_id


def destroy(iommu: File, object_id: int) -> None:
    """IOMMU_DESTROY."""
    IOMMU_DESTROY(iommu, id=object_id)


def map_user(iommu: File, ioas: int, va: int, length: int, iova: int | None = None, prot: int = RW) -> int:
    """IOMMU_IOAS_MAP, at `iova` if given, else where the kernel likes; the IOVA."""
    flags = prot if iova is None else prot | FIXED
    return IOMMU_IOAS_MAP(iommu, flags=flags, ioas_id=ioas, user_va=va, length=length, iova=iova or 0).iova


def map_file(iommu: File, ioas: int, fd: int, start: int, length: int, iova: int | None = None, prot: int = RW) -> int:
    """IOMMU_IOAS_MAP_FILE, at `iova` if given, else where the kernel likes; the IOVA."""
    flags = prot if iova is None else prot | FIXED
    return IOMMU_IOAS_MAP_FILE(iommu, flags=flags, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova or 0).iova


def copy(
    iommu: File, dst: int, src: int, src_iova: int, length: int, dst_iova: int | None = None, prot: int = RW
) -> int:
    """IOMMU_IOAS_COPY, to `dst_iova` if given, else where the kernel likes; the destination's IOVA."""
    flags = prot if dst_iova is None else prot | FIXED
    return IOMMU_IOAS_COPY(
        iommu,
        flags=flags,
        dst_ioas_id=dst,
        src_ioas_id=src,
        length=length,
        dst_iova=dst_iova or 0,
        src_iova=src_iova,
    ).dst_iova


def unmap(iommu: File, ioas: int, iova: int, length: int) -> int:
    """IOMMU_IOAS_UNMAP; the bytes unmapped."""
    return IOMMU_IOAS_UNMAP(iommu, ioas_id=ioas, iova=iova, length=length).length


def unmap_all(iommu: File, ioas: int) -> int:
    """IOMMU_IOAS_UNMAP of everything; the bytes unmapped."""
    return unmap(iommu, ioas, 0, U64_MAX)


def is_mapped(iommu: File, ioas: int, iova: int) -> bool:
    """Whether an area covers `iova`, asked by copying that one byte to a scratch IOAS, which changes nothing.

    For an IOAS without a domain of the test's own: the scratch IOAS takes an id for the length of the call.
    """
    scratch = ioas_alloc(iommu)
    try:
        return answer(copy, iommu, scratch, ioas, iova, 1, dst_iova=0, prot=READ) == 0
    finally:
        destroy(iommu, scratch)


def place(data: bytes) -> int:
    """Put bytes at the start of a page that all steps share; its address. The next `place` overwrites them.

    An address that a call gets shows its offset in the page in the recorded calls, so what is pointed to should not
    lie wherever the allocator likes.
    """
    _SCRATCH.write(_SCRATCH.address, data)
    return _SCRATCH.address


def iova_ranges(iommu: File, ioas: int, room: int = 16) -> list[tuple[int, int]]:
    """IOMMU_IOAS_IOVA_RANGES; the usable (start, last) pairs."""
    address = place(bytes(16 * room))
    reply = IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas, num_iovas=room, allowed_iovas=address)
    return list(struct.iter_unpack("<QQ", _SCRATCH.read(address, 16 * reply.num_iovas)))


def iova_alignment(iommu: File, ioas: int) -> int:
    """The alignment that IOMMU_IOAS_IOVA_RANGES reports, in bytes."""
    address = place(bytes(16 * 16))
    return IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=ioas, num_iovas=16, allowed_iovas=address).out_iova_alignment


def allow_iovas(iommu: File, ioas: int, ranges: Iterable[tuple[int, int]]) -> None:
    """IOMMU_IOAS_ALLOW_IOVAS with these (start, last) pairs, 4096 at most."""
    data = b"".join(struct.pack("<QQ", start, last) for start, last in ranges)
    IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=ioas, num_iovas=len(data) // 16, allowed_iovas=place(data))


def option_get(iommu: File, option: int, object_id: int = 0) -> int:
    """IOMMU_OPTION with OP_GET; the value."""
    return IOMMU_OPTION(iommu, option_id=option, op=IOMMU_OPTION_OP_GET, object_id=object_id).val64


def option_set(iommu: File, option: int, value: int, object_id: int = 0) -> None:
    """IOMMU_OPTION with OP_SET."""
    IOMMU_OPTION(iommu, option_id=option, op=IOMMU_OPTION_OP_SET, object_id=object_id, val64=value)


@contextlib.contextmanager
def memfd(length: int) -> Iterator[int]:
    """The descriptor of a fresh memfd of `length` bytes."""
    fd = os.memfd_create("iommulab", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)
