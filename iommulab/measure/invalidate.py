"""What `iommulab bench` measures of invalidations: 10,000 entries in one call, and one, on a nested mock HWPT.

Microseconds a call. Nothing without the mock driver, or where it nests nothing (before 6.8).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from conformance.mock import mock_domain, nest_parent, nested_alloc
from conformance.steps import ioas_alloc
from uapi import iommufd as api
from uapi import iommufd_test as mock
from uapi.backend import DEV_IOMMU, Backend

ENTRIES = 10_000

Best = Callable[[Callable[[], object]], float]


def invalidate_figures(kernel: Backend, best: Best) -> Iterator[tuple[str, float]]:
    """One call with so many entries, each of one word; `best` times it. OSError where not all are done."""
    with kernel.open(DEV_IOMMU) as iommu, closing(kernel.buffer(ENTRIES * 8)) as data:
        try:
            ioas = ioas_alloc(iommu)
            device = mock_domain(iommu, ioas).idev
            nested = nested_alloc(iommu, device, nest_parent(iommu, device, ioas))
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
