"""What `iommulab bench` measures of invalidations: 10,000 entries in one call, and one, on a nested mock HWPT.

Microseconds a call. Nothing without the mock driver, or where it nests nothing (before 6.8).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from uapi import iommufd as api
from uapi import iommufd_test as mock
from uapi.backend import DEV_IOMMU, Backend, Buffer, File
from uapi.iommufd_test import IOMMU_TEST_CMD

ENTRIES = 10_000

Best = Callable[[Callable[[], object]], float]


def invalidate_figures(kernel: Backend, best: Best) -> Iterator[tuple[str, float]]:
    """One call with so many entries, each of one word; `best` times it. OSError where not all are done."""
    with kernel.open(DEV_IOMMU) as iommu, closing(kernel.buffer(ENTRIES * 8)) as data:
        try:
            nested = _nested(iommu, data)
        except OSError:
            return
        data.view[:] = b"".join(struct.pack("<II", 0, index % 4) for index in range(ENTRIES))
        for number in (1, ENTRIES):
            arg = api.IOMMU_HWPT_INVALIDATE.make(
                hwpt_id=nested,
                data_uptr=data.address,
                data_type=mock.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
                entry_len=8,
                entry_num=number,
            )
            yield (
                f"HWPT_INVALIDATE, {number:,} entries",
                best(partial(iommu.ioctl, api.IOMMU_HWPT_INVALIDATE.number, arg)),
            )
            if arg.entry_num != number:
                raise OSError(f"{arg.entry_num} of {number} entries are done")


def _nested(iommu: File, data: Buffer) -> int:
    """A nested HWPT on a mock device's parent."""
    ioas = api.IOMMU_IOAS_ALLOC(iommu).out_ioas_id
    made = IOMMU_TEST_CMD.make(op=mock.IOMMU_TEST_OP_MOCK_DOMAIN, id=ioas)
    IOMMU_TEST_CMD.raw(iommu, made)
    device = made.mock_domain.out_idev_id
    flags = api.IOMMU_HWPT_ALLOC_NEST_PARENT
    parent = api.IOMMU_HWPT_ALLOC(iommu, flags=flags, dev_id=device, pt_id=ioas).out_hwpt_id
    return api.IOMMU_HWPT_ALLOC(
        iommu,
        dev_id=device,
        pt_id=parent,
        data_type=mock.IOMMU_HWPT_DATA_SELFTEST,
        data_len=4,
        data_uptr=data.address,
    ).out_hwpt_id
