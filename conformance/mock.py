"""Steps on the kernel's mock driver: one short call for each operation of IOMMU_TEST_CMD that the tests use.

Like `conformance.steps`, nothing is checked here: an errno reaches the test as OSError.
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

from conformance.steps import hwpt_alloc, ioas_alloc, place
from uapi import iommufd_test as abi
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_FAULT_ID_VALID
from uapi.iommufd_test import IOMMU_TEST_CMD, iommu_test_cmd

#: What the default mock domain translates, inclusive, and its smallest page.
APERTURE = (abi.MOCK_APERTURE_START, abi.MOCK_APERTURE_LAST)
SMALL = abi.MOCK_PAGE_SIZE


class MockDevice(NamedTuple):
    """The ids of one mock device."""

    stdev: int
    hwpt: int
    idev: int


def command(op: int, number: int = 0, member: str = "", **fields: Any) -> iommu_test_cmd:
    """The block of one operation: `fields` go into `member` of its union."""
    arg = IOMMU_TEST_CMD.make(op=op, id=number)
    for name, value in fields.items():
        setattr(getattr(arg, member), name, value)
    return arg


def run(iommu: File, op: int, number: int = 0, member: str = "", **fields: Any) -> iommu_test_cmd:
    """IOMMU_TEST_CMD; the block after the call."""
    arg = command(op, number, member, **fields)
    IOMMU_TEST_CMD.raw(iommu, arg)
    return arg


def mock_domain(iommu: File, pt_id: int) -> MockDevice:
    """MOCK_DOMAIN: a device attached to `pt_id`."""
    reply = run(iommu, abi.IOMMU_TEST_OP_MOCK_DOMAIN, pt_id, "mock_domain").mock_domain
    return MockDevice(reply.out_stdev_id, reply.out_hwpt_id, reply.out_idev_id)


def mock_domain_flags(iommu: File, pt_id: int, flags: int) -> MockDevice:
    """MOCK_DOMAIN_FLAGS: as `mock_domain`, of a device with these MOCK_FLAGS_DEVICE_*."""
    reply = run(
        iommu, abi.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, pt_id, "mock_domain_flags", dev_flags=flags
    ).mock_domain_flags
    return MockDevice(reply.out_stdev_id, reply.out_hwpt_id, reply.out_idev_id)


def mock_replace(iommu: File, stdev: int, pt_id: int) -> int:
    """MOCK_DOMAIN_REPLACE; the id of the HWPT that the device is attached to now."""
    op = abi.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE
    return int(run(iommu, op, stdev, "mock_domain_replace", pt_id=pt_id).mock_domain_replace.pt_id)


def add_reserved(iommu: File, ioas: int, start: int, length: int) -> None:
    """ADD_RESERVED."""
    run(iommu, abi.IOMMU_TEST_OP_ADD_RESERVED, ioas, "add_reserved", start=start, length=length)


def check_map(iommu: File, hwpt: int, iova: int, length: int, uptr: int) -> None:
    """MD_CHECK_MAP: the domain's pages at `iova` are the caller's at `uptr`."""
    run(iommu, abi.IOMMU_TEST_OP_MD_CHECK_MAP, hwpt, "check_map", iova=iova, length=length, uptr=uptr)


def check_refs(iommu: File, uptr: int, length: int, refs: int) -> None:
    """MD_CHECK_REFS: every page at `uptr` is pinned `refs` times."""
    run(iommu, abi.IOMMU_TEST_OP_MD_CHECK_REFS, 0, "check_refs", uptr=uptr, length=length, refs=refs)


def create_access(iommu: File, ioas: int, pin: bool = True, flags: int = 0) -> int:
    """CREATE_ACCESS; the descriptor."""
    flags |= abi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES if pin else 0
    reply = run(iommu, abi.IOMMU_TEST_OP_CREATE_ACCESS, ioas, "create_access", flags=flags)
    return int(reply.create_access.out_access_fd)


def access_pages(iommu: File, access: int, iova: int, length: int, uptr: int, flags: int = 0) -> int:
    """ACCESS_PAGES; the id of the pin."""
    op = abi.IOMMU_TEST_OP_ACCESS_PAGES
    reply = run(iommu, op, access, "access_pages", iova=iova, length=length, uptr=uptr, flags=flags)
    return int(reply.access_pages.out_access_pages_id)


def destroy_pages(iommu: File, access: int, item: int) -> None:
    """DESTROY_ACCESS_PAGES."""
    op = abi.IOMMU_TEST_OP_DESTROY_ACCESS_PAGES
    run(iommu, op, access, "destroy_access_pages", access_pages_id=item)


def access_rw(iommu: File, access: int, iova: int, length: int, uptr: int, flags: int = 0) -> None:
    """ACCESS_RW."""
    op = abi.IOMMU_TEST_OP_ACCESS_RW
    run(iommu, op, access, "access_rw", iova=iova, length=length, uptr=uptr, flags=flags)


def access_replace(iommu: File, access: int, ioas: int) -> None:
    """ACCESS_REPLACE_IOAS."""
    op = abi.IOMMU_TEST_OP_ACCESS_REPLACE_IOAS
    run(iommu, op, access, "access_replace_ioas", ioas_id=ioas)


def memory_limit(iommu: File, limit: int) -> None:
    """SET_TEMP_MEMORY_LIMIT, of the whole kernel."""
    run(iommu, abi.IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT, 0, "memory_limit", limit=limit)


# -- dma-bufs ---------------------------------------------------------------------------------------------------------


def dmabuf_get(iommu: File, length: int, open_flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
    """DMABUF_GET; the ioctl's result, which is the descriptor except on a 7.3 as released, where it is 0."""
    op = abi.IOMMU_TEST_OP_DMABUF_GET
    return IOMMU_TEST_CMD.raw(iommu, command(op, 0, "dmabuf_get", length=length, open_flags=open_flags))


def dmabuf_revoke(iommu: File, fd: int, revoked: int = 1) -> None:
    """DMABUF_REVOKE: the buffer's memory is taken from (or, for new mappings, given back to) everybody."""
    run(iommu, abi.IOMMU_TEST_OP_DMABUF_REVOKE, 0, "dmabuf_revoke", dmabuf_fd=fd, revoked=revoked)


# -- nested HWPTs -----------------------------------------------------------------------------------------------------

IOTLB_DEFAULT = abi.IOMMU_TEST_IOTLB_DEFAULT
NESTED_DATA = abi.IOMMU_HWPT_DATA_SELFTEST
INVALIDATION = abi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST


def nest_parent(iommu: File, idev: int, ioas: int, flags: int = 0) -> int:
    """HWPT_ALLOC of a paging HWPT that nested ones can be put on; its id."""
    return hwpt_alloc(iommu, idev, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT | flags)


def nested_alloc(iommu: File, idev: int, parent: int, flags: int = 0, iotlb: int = IOTLB_DEFAULT, **fields: int) -> int:
    """HWPT_ALLOC of a nested HWPT with the mock's data, `iotlb` in each word; its id."""
    data = place(iotlb.to_bytes(4, "little"))
    return hwpt_alloc(iommu, idev, parent, flags, data_type=NESTED_DATA, data_len=4, data_uptr=data, **fields)


def check_iotlb(iommu: File, hwpt: int, *words: int, start: int = 0) -> None:
    """MD_CHECK_IOTLB: these are the words of a nested HWPT, from `start` on."""
    for index, word in enumerate(words, start):
        run(iommu, abi.IOMMU_TEST_OP_MD_CHECK_IOTLB, hwpt, "check_iotlb", id=index, iotlb=word)


# -- page requests ----------------------------------------------------------------------------------------------------


class PageFault(NamedTuple):
    """A message of a fault queue: iommu_hwpt_pgfault."""

    flags: int
    dev_id: int
    pasid: int
    grpid: int
    perm: int
    addr: int
    length: int
    cookie: int


def trigger_iopf(iommu: File, idev: int, pasid: int = 0, grpid: int = 0x2A, perm: int = 3, addr: int = 0x1000) -> None:
    """TRIGGER_IOPF: the device asks for one page; who hears of it, if anybody, does not show here."""
    op = abi.IOMMU_TEST_OP_TRIGGER_IOPF
    run(iommu, op, 0, "trigger_iopf", dev_id=idev, pasid=pasid, grpid=grpid, perm=perm, addr=addr)


def fault_queue(kernel: Backend, iommu: File) -> tuple[int, File]:
    """FAULT_QUEUE_ALLOC; the id and the file."""
    reply = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    return reply.out_fault_id, kernel.adopt(reply.out_fault_fd)


def page_faults(data: bytes) -> list[PageFault]:
    """What was read from a fault queue."""
    return [PageFault(*fields) for fields in struct.iter_unpack("<5I4xQ2I", data)]


def read_faults(queue: File, room: int = 16) -> list[PageFault]:
    """read(2) of a fault queue with room for so many messages."""
    return page_faults(queue.read(40 * room))


def answer_faults(queue: File, *cookies: int, code: int = 0) -> int:
    """write(2) of a response for each cookie; the bytes taken."""
    return queue.write(b"".join(struct.pack("<II", cookie, code) for cookie in cookies))


class FaultIds(NamedTuple):
    """An IOAS (1), a mock device on it (2, 3; its automatic HWPT 4 is gone by then), a nesting parent (5), a queue (6),
    and a nested HWPT that reports to it (7)."""

    ioas: int
    stdev: int
    idev: int
    parent: int
    fault: int
    hwpt: int


#: A device that reports its faults, and the file of the queue that they reach: the fixture `reporting`.
Reporting = tuple[FaultIds, File]


def cookies(faults: list[PageFault]) -> list[int]:
    return [fault.cookie for fault in faults]


def reporting_device(kernel: Backend, iommu: File) -> tuple[FaultIds, File]:
    """A device that is attached to a HWPT which reports to a queue, and the queue's file."""
    ioas = ioas_alloc(iommu)
    device = mock_domain(iommu, ioas)
    parent = nest_parent(iommu, device.idev, ioas)
    fault, queue = fault_queue(kernel, iommu)
    hwpt = nested_alloc(iommu, device.idev, parent, IOMMU_HWPT_FAULT_ID_VALID, fault_id=fault)
    mock_replace(iommu, device.stdev, hwpt)
    return FaultIds(ioas, device.stdev, device.idev, parent, fault, hwpt), queue
