"""What `iommulab bench` measures of events: 100,000 of the mock driver's go through a vEVENTQ, as one client sees it.

Each figure is one pass over all of them, in microseconds an event. Nothing without the mock driver, or on a kernel
whose mock driver has no vEVENTQs (before 6.15).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from uapi import iommufd as api
from uapi import iommufd_test as mock
from uapi.backend import DEV_IOMMU, Backend, File
from uapi.iommufd_test import IOMMU_TEST_CMD

EVENTS = 100_000
#: A header and the mock's data.
_EVENT = 12
_VIRT_ID = 0x99


def vevent_figures(kernel: Backend, events: int = EVENTS) -> Iterator[tuple[str, float]]:
    """The device reports so many events; then they are read, 64 KiB at a time. OSError where an event is lost."""
    with kernel.open(DEV_IOMMU) as iommu:
        try:
            device, queue = _queue(kernel, iommu, events)
        except OSError:
            return
        trigger = IOMMU_TEST_CMD.make(op=mock.IOMMU_TEST_OP_TRIGGER_VEVENT)
        trigger.trigger_vevent.dev_id = device
        number, call = IOMMU_TEST_CMD.number, iommu.ioctl
        begin = time.perf_counter()
        for _ in range(events):
            call(number, trigger)
        yield f"{events:,} vEVENTs, reported", (time.perf_counter() - begin) / events * 1e6

        size = 0
        begin = time.perf_counter()
        while data := queue.read(1 << 16):
            size += len(data)
        took = time.perf_counter() - begin
        queue.close()
        if size != events * _EVENT:
            raise OSError(f"{size} bytes of events, not {events * _EVENT}")
        yield f"{events:,} vEVENTs, read 64 KiB at a time", took / events * 1e6


def _queue(kernel: Backend, iommu: File, depth: int) -> tuple[int, File]:
    """A mock device attached within a vIOMMU, and the queue of its events."""
    ioas = api.IOMMU_IOAS_ALLOC(iommu).out_ioas_id
    made = IOMMU_TEST_CMD.make(op=mock.IOMMU_TEST_OP_MOCK_DOMAIN, id=ioas)
    IOMMU_TEST_CMD.raw(iommu, made)
    device, stdev = made.mock_domain.out_idev_id, made.mock_domain.out_stdev_id
    flags = api.IOMMU_HWPT_ALLOC_NEST_PARENT
    parent = api.IOMMU_HWPT_ALLOC(iommu, flags=flags, dev_id=device, pt_id=ioas).out_hwpt_id
    viommu = api.IOMMU_VIOMMU_ALLOC(
        iommu, type=mock.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=device, hwpt_id=parent
    ).out_viommu_id
    with_data = kernel.buffer(os.sysconf("SC_PAGESIZE"))
    nested = api.IOMMU_HWPT_ALLOC(
        iommu,
        dev_id=device,
        pt_id=viommu,
        data_type=mock.IOMMU_HWPT_DATA_SELFTEST,
        data_len=4,
        data_uptr=with_data.address,
    ).out_hwpt_id
    with_data.close()
    api.IOMMU_VDEVICE_ALLOC(iommu, viommu_id=viommu, dev_id=device, virt_id=_VIRT_ID)
    replace = IOMMU_TEST_CMD.make(op=mock.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE, id=stdev)
    replace.mock_domain_replace.pt_id = nested
    IOMMU_TEST_CMD.raw(iommu, replace)
    reply = api.IOMMU_VEVENTQ_ALLOC(iommu, viommu_id=viommu, type=mock.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=depth)
    return device, kernel.adopt(reply.out_veventq_fd)
