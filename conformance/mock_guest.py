"""Steps on vIOMMUs of the mock driver: a guest's IOMMU, its devices, event and hardware queues.

As in `conformance.mock` nothing is checked here: an errno reaches the test as OSError.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from conformance.arena import Arena
from conformance.mock import mock_domain, run
from conformance.steps import hwpt_alloc, ioas_alloc, place
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.cstruct import Struct
from uapi.iommufd import (
    IOMMU_HW_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_VDEVICE_ALLOC,
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VIOMMU_ALLOC,
)

VIOMMU_TYPE = abi.IOMMU_VIOMMU_TYPE_SELFTEST
VEVENTQ_TYPE = abi.IOMMU_VEVENTQ_TYPE_SELFTEST
HW_QUEUE_TYPE = abi.IOMMU_HW_QUEUE_TYPE_SELFTEST
INVALIDATE_TYPE = abi.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST
CACHE_DEFAULT = abi.IOMMU_TEST_DEV_CACHE_DEFAULT
#: Bytes that a vIOMMU of the mock publishes for mmap(2), where it gets data.
PUBLISHED = 8192
#: A vEVENT of the mock: header (flags, sequence) and virt_id.
EVENT = struct.Struct("<III")
HEADER = struct.Struct("<II")


class Guest(NamedTuple):
    """Ids of a mock device and of a vIOMMU on a nesting parent of the device's IOAS."""

    ioas: int
    stdev: int
    idev: int
    parent: int
    viommu: int


def guest(iommu: File) -> Guest:
    """A fresh IOAS (1), a mock device on it (2, 3, automatic HWPT 4), a nesting parent (5) and a vIOMMU (6)."""
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    parent = hwpt_alloc(iommu, device.idev, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT)
    return Guest(ioas, device.stdev, device.idev, parent, viommu_alloc(iommu, device.idev, parent))


def viommu_alloc(iommu: File, dev_id: int, hwpt_id: int, kind: int = VIOMMU_TYPE) -> int:
    """VIOMMU_ALLOC without data; the id."""
    return IOMMU_VIOMMU_ALLOC(iommu, type=kind, dev_id=dev_id, hwpt_id=hwpt_id).out_viommu_id


def publish(iommu: File, ids: Guest, value: int = 0xBEEF) -> tuple[int, int]:
    """A vIOMMU with pages that begin with `value`; its id and their offset."""
    address = place(bytes(abi.iommu_viommu_selftest(in_data=value)))
    fields = {"type": VIOMMU_TYPE, "dev_id": ids.idev, "hwpt_id": ids.parent}
    reply = IOMMU_VIOMMU_ALLOC(iommu, data_len=24, data_uptr=address, **fields)
    data = abi.iommu_viommu_selftest.from_buffer_copy(Arena.read(address, 24))
    assert (data.out_data, data.out_mmap_length) == (value, PUBLISHED)
    return reply.out_viommu_id, data.out_mmap_offset


def nested_hwpt(iommu: File, dev_id: int, viommu: int, flags: int = 0, fault_id: int = 0) -> int:
    """HWPT_ALLOC of a nested HWPT in a vIOMMU, with the mock's data; the id."""
    data = place(bytes(abi.iommu_hwpt_selftest(iotlb=abi.IOMMU_TEST_IOTLB_DEFAULT))[:4])
    kind = abi.IOMMU_HWPT_DATA_SELFTEST
    more = {"fault_id": fault_id} if fault_id else {}
    return hwpt_alloc(iommu, dev_id, viommu, flags, data_type=kind, data_len=4, data_uptr=data, **more)


def vdevice_alloc(iommu: File, viommu: int, dev_id: int, virt_id: int) -> int:
    """VDEVICE_ALLOC; the id."""
    return IOMMU_VDEVICE_ALLOC(iommu, viommu_id=viommu, dev_id=dev_id, virt_id=virt_id).out_vdevice_id


def veventq_alloc(
    kernel: Backend, iommu: File, viommu: int, depth: int = 16, kind: int = VEVENTQ_TYPE
) -> tuple[int, File]:
    """VEVENTQ_ALLOC; the id and the file."""
    reply = IOMMU_VEVENTQ_ALLOC(iommu, viommu_id=viommu, type=kind, veventq_depth=depth)
    return reply.out_veventq_id, kernel.adopt(reply.out_veventq_fd)


def hw_queue_alloc(iommu: File, viommu: int, index: int, iova: int, length: int, kind: int = HW_QUEUE_TYPE) -> int:
    """HW_QUEUE_ALLOC; the id."""
    return IOMMU_HW_QUEUE_ALLOC(
        iommu, viommu_id=viommu, type=kind, index=index, nesting_parent_iova=iova, length=length
    ).out_hw_queue_id


def invalidation(vdev_id: int, cache_id: int = 0, flags: int = 0) -> Struct:
    """An entry for `invalidate`."""
    return abi.iommu_viommu_invalidate_selftest(flags=flags, vdev_id=vdev_id, cache_id=cache_id)


def invalidate(iommu: File, viommu: int, *entries: Struct, kind: int = INVALIDATE_TYPE, length: int = 12) -> int:
    """HWPT_INVALIDATE of a vIOMMU; how many entries it says it has done."""
    data = place(b"".join(bytes(entry).ljust(length, b"\0")[:length] for entry in entries))
    arg = IOMMU_HWPT_INVALIDATE(
        iommu, hwpt_id=viommu, data_uptr=data, data_type=kind, entry_len=length, entry_num=len(entries)
    )
    return arg.entry_num


def check_cache(iommu: File, idev: int, index: int, value: int) -> None:
    """DEV_CHECK_CACHE: word `index` of the mock device's cache is `value`."""
    run(iommu, abi.IOMMU_TEST_OP_DEV_CHECK_CACHE, idev, "check_dev_cache", id=index, cache=value)


def trigger_vevent(iommu: File, idev: int, times: int = 1) -> None:
    """TRIGGER_VEVENT, so many times."""
    for _ in range(times):
        run(iommu, abi.IOMMU_TEST_OP_TRIGGER_VEVENT, 0, "trigger_vevent", dev_id=idev)
