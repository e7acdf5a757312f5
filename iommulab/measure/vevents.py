"""What `iommulab bench` measures of events: 100,000 of the mock driver's go through a vEVENTQ, as one client sees it.

Each figure is one pass over all of them, in microseconds an event. Nothing without the mock driver, or on a kernel
whose mock driver has no vEVENTQs (before 6.15).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from conformance.mock import mock_replace
from conformance.mock_guest import guest, nested_hwpt, vdevice_alloc, veventq_alloc
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
    ids = guest(iommu)
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice_alloc(iommu, ids.viommu, ids.idev, _VIRT_ID)
    mock_replace(iommu, ids.stdev, nested)
    return ids.idev, veventq_alloc(kernel, iommu, ids.viommu, depth)[1]
