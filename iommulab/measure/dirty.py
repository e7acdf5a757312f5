"""What of dirty tracking `iommulab bench` measures: the mock driver's, as one client of any backend.

The calls read without clearing, so that each round finds the same.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from conformance.mock import mock_domain
from conformance.mock_dirty import tracked_hwpt
from conformance.steps import ioas_alloc, map_user, option_set
from uapi import iommufd_test as abi
from uapi.backend import DEV_IOMMU, Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_OPTION_HUGE_PAGES,
)
from uapi.iommufd_test import IOMMU_TEST_CMD

MIB, GIB = 1 << 20, 1 << 30
_PAGE = 4096

Best = Callable[[Callable[[], object]], float]


def dirty_figures(kernel: Backend, best: Best) -> Iterator[tuple[str, float]]:
    """GET_DIRTY_BITMAP of 1 GiB in leaves of 4 KiB and of 128 GiB in leaves of 1 MiB. Nothing without the mock driver.

    `best` takes a call and says what it costs.
    """
    if not _has_mock(kernel):
        return
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    with kernel.open(DEV_IOMMU) as iommu:
        if available > GIB * 3 // 2:
            yield from _small(kernel, iommu, best)
    with kernel.open(DEV_IOMMU) as iommu:
        yield from _huge(kernel, iommu, best)


def _has_mock(kernel: Backend) -> bool:
    with kernel.open(DEV_IOMMU) as iommu:
        try:
            IOMMU_TEST_CMD(iommu, op=0)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP  # the command is there
    return True


def _small(kernel: Backend, iommu: File, best: Best) -> Iterator[tuple[str, float]]:
    ioas = ioas_alloc(iommu)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    hwpt = tracked_hwpt(iommu, mock_domain(iommu, ioas_alloc(iommu)).idev, ioas)
    with closing(kernel.buffer(GIB)) as memory:
        map_user(iommu, ioas, memory.address, GIB, GIB)
        yield from _figures(kernel, iommu, hwpt, GIB, GIB, "GET_DIRTY_BITMAP 1 GiB, 4 KiB leaves", best)


def _huge(kernel: Backend, iommu: File, best: Best) -> Iterator[tuple[str, float]]:
    memory = _huge_buffer(kernel)
    if memory is None:
        return
    with closing(memory):
        ioas = ioas_alloc(iommu)
        hwpt = tracked_hwpt(iommu, mock_domain(iommu, ioas_alloc(iommu)).idev, ioas, huge=True)
        for iova in range(0, 128 * GIB, memory.length):
            map_user(iommu, ioas, memory.address, memory.length, iova)
        yield from _figures(kernel, iommu, hwpt, 0, 128 * GIB, "GET_DIRTY_BITMAP 128 GiB, 1 MiB leaves", best)


def _huge_buffer(kernel: Backend) -> Buffer | None:
    for length in (64 * MIB, 2 * MIB):
        try:
            return kernel.buffer(length, huge=True)
        except OSError:
            continue
    return None


def _figures(
    kernel: Backend, iommu: File, hwpt: int, iova: int, length: int, name: str, best: Best
) -> Iterator[tuple[str, float]]:
    """With nothing dirty, with every 16th piece of 1 MiB dirty, and with all that there is."""
    with closing(kernel.buffer(length // _PAGE // 8)) as bitmap:
        get = IOMMU_HWPT_GET_DIRTY_BITMAP.make(
            hwpt_id=hwpt,
            flags=IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
            iova=iova,
            length=length,
            page_size=_PAGE,
            data=bitmap.address,
        )
        read = partial(iommu.ioctl, IOMMU_HWPT_GET_DIRTY_BITMAP.number, get)
        yield f"{name}, clean", best(read)
        _make_dirty(iommu, hwpt, iova, length, bitmap, MIB, b"\x01\0")
        yield f"{name}, a few dirty", best(read)
        _make_dirty(iommu, hwpt, iova, length, bitmap, _PAGE, b"\x55")
        yield f"{name}, half dirty" if length == GIB else f"{name}, all dirty", best(read)


def _make_dirty(iommu: File, hwpt: int, iova: int, length: int, bitmap: Buffer, page: int, pattern: bytes) -> None:
    size = length // page // 8
    bitmap.view[:size] = pattern * (size // len(pattern))
    command = IOMMU_TEST_CMD.make(op=abi.IOMMU_TEST_OP_DIRTY, id=hwpt)
    dirty = command.dirty
    dirty.iova, dirty.length, dirty.page_size, dirty.uptr = iova, length, page, bitmap.address
    IOMMU_TEST_CMD.raw(iommu, command)
    bitmap.view[:size] = bytes(size)
