"""What of dirty tracking `iommulab bench` measures: the mock driver's, as one client of any backend.

The calls read without clearing, so that each round finds the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from uapi import iommufd_test as abi
from uapi.backend import DEV_IOMMU, Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
    IOMMU_OPTION,
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_OPTION_OP_SET,
)
from uapi.iommufd_test import IOMMU_TEST_CMD

MIB, GIB = 1 << 20, 1 << 30
_FLAGS = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE
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
    ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
    IOMMU_OPTION(iommu, option_id=IOMMU_OPTION_HUGE_PAGES, op=IOMMU_OPTION_OP_SET, object_id=ioas, val64=0)
    hwpt = _tracked(iommu, ioas, abi.MOCK_IOMMUPT_DEFAULT)
    with closing(kernel.buffer(GIB)) as memory:
        IOMMU_IOAS_MAP(iommu, ioas_id=ioas, flags=_FLAGS, user_va=memory.address, length=GIB, iova=GIB)
        yield from _figures(kernel, iommu, hwpt, GIB, GIB, "GET_DIRTY_BITMAP 1 GiB, 4 KiB leaves", best)


def _huge(kernel: Backend, iommu: File, best: Best) -> Iterator[tuple[str, float]]:
    memory = _huge_buffer(kernel)
    if memory is None:
        return
    with closing(memory):
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        hwpt = _tracked(iommu, ioas, abi.MOCK_IOMMUPT_HUGE)
        arg = IOMMU_IOAS_MAP.make(ioas_id=ioas, flags=_FLAGS, user_va=memory.address, length=memory.length)
        for iova in range(0, 128 * GIB, memory.length):
            arg.iova = iova
            iommu.ioctl(IOMMU_IOAS_MAP.number, arg)
        yield from _figures(kernel, iommu, hwpt, 0, 128 * GIB, "GET_DIRTY_BITMAP 128 GiB, 1 MiB leaves", best)


def _huge_buffer(kernel: Backend) -> Buffer | None:
    for length in (64 * MIB, 2 * MIB):
        try:
            return kernel.buffer(length, huge=True)
        except OSError:
            continue
    return None


def _tracked(iommu: File, ioas: int, table: int) -> int:
    """A HWPT with a table of this type, with tracking on."""
    mock = IOMMU_TEST_CMD.make(op=abi.IOMMU_TEST_OP_MOCK_DOMAIN, id=IOMMU_IOAS_ALLOC(iommu).out_ioas_id)
    IOMMU_TEST_CMD.raw(iommu, mock)
    data = abi.iommu_hwpt_selftest(pagetable_type=table)
    hwpt = IOMMU_HWPT_ALLOC(
        iommu,
        dev_id=mock.mock_domain.out_idev_id,
        pt_id=ioas,
        flags=IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
        data_type=abi.IOMMU_HWPT_DATA_SELFTEST,
        data_len=ctypes.sizeof(data),
        data_uptr=ctypes.addressof(data),
    ).out_hwpt_id
    IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, hwpt_id=hwpt, flags=IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    return int(hwpt)


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
