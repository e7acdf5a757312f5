"""Arguments as large as they can be: each call ends soon, with the kernel's answer.

What bounds the work is the memory that the caller really has: a count is followed entry by entry and stops at the first
page that is not there, a long tail and a long buffer page by page. Lazy mappings cost nothing by their length.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from kernel_model.kernel import Kernel
from uapi.backend import File
from uapi.iommufd import (
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_ALLOW_IOVAS,
    IOMMU_IOAS_COPY,
    IOMMU_IOAS_IOVA_RANGES,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_UNMAP,
)

PAGE = 4096
U64 = (1 << 64) - 1


@pytest.fixture
def iommu(kernel: Kernel) -> Iterator[File]:
    with kernel.open("/dev/iommu") as iommu:
        assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == 1
        yield iommu


def refused(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_lazy_map_of_2_to_the_63_bytes_and_its_pieces(iommu: File) -> None:
    IOMMU_IOAS_MAP(iommu, ioas_id=1, flags=7, user_va=0, length=1 << 63, iova=0)
    IOMMU_IOAS_COPY(iommu, flags=7, dst_ioas_id=1, src_ioas_id=1, length=1 << 62, dst_iova=1 << 63, src_iova=1 << 61)
    assert IOMMU_IOAS_UNMAP(iommu, ioas_id=1, iova=0, length=U64).length == (1 << 63) + (1 << 62)


def test_two_billion_iova_ranges_end_at_the_first_that_is_not_there(kernel: Kernel, iommu: File) -> None:
    with refused(errno.EFAULT):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1, num_iovas=0xFFFFFFFF, allowed_iovas=8)
    buffer = kernel.buffer(PAGE)
    with refused(errno.EINVAL):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1, num_iovas=0xFFFFFFFF, allowed_iovas=buffer.address)
    buffer.close()


def test_many_allowed_ranges_are_not_compared_pair_by_pair(kernel: Kernel, iommu: File) -> None:
    count = 30_000
    order = [index * 7919 % count for index in range(count)]
    buffer = kernel.buffer(16 * count)
    buffer.view[:] = b"".join(struct.pack("<QQ", 2 * index * PAGE, 2 * index * PAGE + PAGE - 1) for index in order)
    IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1, num_iovas=count, allowed_iovas=buffer.address)
    assert IOMMU_IOAS_MAP(iommu, ioas_id=1, flags=6, user_va=PAGE, length=PAGE).iova == 2 * PAGE
    buffer.view[16 * count - 16 :] = struct.pack("<QQ", 0, PAGE)
    with refused(errno.EINVAL):
        IOMMU_IOAS_ALLOW_IOVAS(iommu, ioas_id=1, num_iovas=count, allowed_iovas=buffer.address)
    buffer.close()


def test_room_for_four_billion_ranges_is_not_looked_at(kernel: Kernel, iommu: File) -> None:
    buffer = kernel.buffer(PAGE)
    reply = IOMMU_IOAS_IOVA_RANGES(iommu, ioas_id=1, num_iovas=0xFFFFFFFF, allowed_iovas=buffer.address)
    assert reply.num_iovas == 1
    buffer.close()


def test_size_of_4_gib_ends_where_memory_does(kernel: Kernel, iommu: File) -> None:
    buffer = kernel.buffer(PAGE)
    buffer.view[:4] = b"\xff\xff\xff\xff"
    with refused(errno.EFAULT):
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, (1 << 47) - PAGE)
    buffer.view[100] = 1
    with refused(errno.E2BIG):
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, buffer.address)
    buffer.close()
