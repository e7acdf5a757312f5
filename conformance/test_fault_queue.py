"""IOMMU_FAULT_QUEUE_ALLOC and the queue's descriptor, while no device faults.

Mirrors iommufd_fault_alloc() and the file operations of drivers/iommu/iommufd/eventq.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.steps import destroy, fails, hwpt_alloc, ioas_alloc
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, IOMMU_HWPT_ALLOC, IOMMU_HWPT_FAULT_ID_VALID, iommu_hwpt_page_response

pytestmark = pytest.mark.since("6.11")


def queue(kernel: Backend, iommu: File) -> tuple[int, File]:
    """A new fault queue: its object id and its file."""
    reply = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    return reply.out_fault_id, kernel.adopt(reply.out_fault_fd)


@pytest.mark.parametrize("flags", [1, 0x8000_0000])
def test_any_flag_is_eopnotsupp(iommu: File, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_FAULT_QUEUE_ALLOC(iommu, flags=flags)
    assert ioas_alloc(iommu) == 1


def test_queue_is_an_object_and_a_file(kernel: Backend, iommu: File) -> None:
    fault, file = queue(kernel, iommu)
    assert fault == 1
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFD)
    file.close()
    assert flags & fcntl.FD_CLOEXEC


def test_open_file_keeps_the_object(kernel: Backend, iommu: File) -> None:
    fault, file = queue(kernel, iommu)
    with fails(errno.EBUSY):
        destroy(iommu, fault)
    file.close()
    destroy(iommu, fault)
    with fails(errno.ENOENT):
        destroy(iommu, fault)


def test_closed_file_leaves_the_object(kernel: Backend, iommu: File) -> None:
    fault, file = queue(kernel, iommu)
    file.close()
    assert ioas_alloc(iommu) == fault + 1


def test_object_that_is_no_ioas_is_enoent_to_an_ioas_call(kernel: Backend, iommu: File) -> None:
    fault, file = queue(kernel, iommu)
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=fault, pt_id=fault)
    file.close()


def test_file_outlives_the_descriptor_of_the_context(kernel: Backend) -> None:
    iommu = kernel.open("/dev/iommu")
    _, file = queue(kernel, iommu)
    iommu.close()
    assert file.read(40) == b""
    file.close()


@pytest.mark.parametrize("count", [0, 40, 80, 4000])
def test_read_of_an_empty_queue_is_empty(kernel: Backend, iommu: File, count: int) -> None:
    _, file = queue(kernel, iommu)
    assert file.read(count) == b""
    file.close()


@pytest.mark.parametrize("count", [1, 39, 41, 8])
def test_read_of_parts_is_espipe(kernel: Backend, iommu: File, count: int) -> None:
    _, file = queue(kernel, iommu)
    with fails(errno.ESPIPE):
        file.read(count)
    file.close()


@pytest.mark.parametrize("length", [1, 7, 9, 12])
def test_write_of_parts_is_espipe(kernel: Backend, iommu: File, length: int) -> None:
    _, file = queue(kernel, iommu)
    with fails(errno.ESPIPE):
        file.write(bytes(length))
    file.close()


@pytest.mark.parametrize(
    ("cookie", "code"), [(0, 0), (1, 0), (1, 1), (1, 2)], ids=["zero", "success", "invalid", "unknown_code"]
)
def test_response_to_no_fault_is_einval(kernel: Backend, iommu: File, cookie: int, code: int) -> None:
    _, file = queue(kernel, iommu)
    with fails(errno.EINVAL):
        file.write(bytes(iommu_hwpt_page_response(cookie, code)))
    file.close()


def test_poll_of_an_empty_queue_is_writable_alone(kernel: Backend, iommu: File) -> None:
    _, file = queue(kernel, iommu)
    assert file.poll(select.POLLIN | select.POLLOUT) == select.POLLOUT
    file.close()


def test_reply_fault_is_efault_and_leaves_neither_object_nor_descriptor(iommu: File) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_FAULT_QUEUE_ALLOC.make())
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_FAULT_QUEUE_ALLOC.number, memory.page(0))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert ioas_alloc(iommu) == 1


def test_no_descriptor_left_is_emfile_and_leaves_no_object(iommu: File) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with fails(errno.EMFILE):
            IOMMU_FAULT_QUEUE_ALLOC(iommu)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ioas_alloc(iommu) == 1


@pytest.mark.has("fault-queue-on-paging-hwpt")
@pytest.mark.needs("iommu", "root", "vfio_cdev")
def test_hwpt_keeps_the_queue(kernel: Backend, device: VfioDevice, iommu: File, ioas: int) -> None:
    fault, file = queue(kernel, iommu)
    hwpt = IOMMU_HWPT_ALLOC(
        iommu, flags=IOMMU_HWPT_FAULT_ID_VALID, dev_id=device.devid, pt_id=ioas, fault_id=fault
    ).out_hwpt_id
    file.close()
    with fails(errno.EBUSY):
        destroy(iommu, fault)
    destroy(iommu, hwpt)
    destroy(iommu, fault)


@pytest.mark.has("fault-queue-on-paging-hwpt")
@pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd")
def test_device_that_makes_no_page_requests_cannot_attach_to_a_hwpt_that_reports_them(
    kernel: Backend, device: VfioDevice, iommu: File, ioas: int
) -> None:
    """What it was attached to before, it still is."""
    fault, file = queue(kernel, iommu)
    hwpt = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_FAULT_ID_VALID, fault_id=fault)
    with file:
        with fails(errno.ENODEV):
            device.attach(hwpt)
        automatic = device.attach(ioas)
        with fails(errno.ENODEV):
            device.attach(hwpt)
        with fails(errno.EBUSY):
            destroy(iommu, automatic)
        destroy(iommu, hwpt)
