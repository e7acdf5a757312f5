"""Devices without an IOMMU: VFIO gives them away when told to, and iommufd tells where their memory is.

Nothing translates for such a device, so its driver asks for physical addresses (IOMMU_IOAS_NOIOMMU_GET_PA) and gives
those to the device. Mirrors hwpt_noiommu.c and iopt_get_phys() of drivers/iommu/iommufd and the no-IOMMU half of VFIO's
character devices. Runs on the machine "q35-noiommu".
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.mock import dmabuf_get, dmabuf_revoke, mock_domain
from conformance.steps import (
    NOWHERE,
    PAGE,
    READ,
    U64_MAX,
    MiB,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_GET_HW_INFO,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_IOAS_NOIOMMU_GET_PA,
    IOMMU_VIOMMU_ALLOC,
)
from uapi.vfio import VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_ATTACH_PASID

pytestmark = [pytest.mark.needs("iommu", "root", "noiommu"), pytest.mark.since("7.3")]

IOVA = 0x10_0000
CAP_SYS_RAWIO = 17


def get_pa(iommu: File, ioas: int, iova: int, length: int = PAGE) -> tuple[int, int]:
    """The physical address at `iova`, and how many bytes are contiguous."""
    reply = IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=iova, length=length)
    return reply.out_phys, reply.length


@pytest.fixture
def attached(device: VfioDevice, ioas: int) -> int:
    """The HWPT that the device is attached to."""
    return device.attach(ioas)


@pytest.fixture
def buffer(kernel: Backend) -> Buffer:
    return kernel.buffer(4 * PAGE)


# -- the device ------------------------------------------------------------------------------------------------------


def test_node_says_that_there_is_no_iommu(cdev: VfioDevice) -> None:
    assert os.path.basename(cdev.node) == "noiommu-vfio0"


def test_node_opens_with_cap_sys_rawio_only(kernel: Backend, cdev: VfioDevice) -> None:
    with kernel.spawn() as client:
        client.open(cdev.node)
        client.drop_capabilities(CAP_SYS_RAWIO)
        with fails(errno.EPERM):
            client.open(cdev.node)


def test_bind_attach_detach(iommu: File, device: VfioDevice, ioas: int) -> None:
    assert device.devid == 1
    hwpt = device.attach(ioas)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    device.detach()
    with fails(errno.ENOENT):  # it was an automatic one
        destroy(iommu, hwpt)
    destroy(iommu, ioas)


def test_whole_space_is_there(iommu: File, device: VfioDevice, ioas: int) -> None:
    device.attach(ioas)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert iova_alignment(iommu, ioas) == PAGE


def test_attach_again_replaces(iommu: File, device: VfioDevice, ioas: int) -> None:
    other = ioas_alloc(iommu)
    first = device.attach(ioas)
    assert device.attach(ioas) == first
    second = device.attach(other)
    assert second != first
    with fails(errno.ENOENT):
        destroy(iommu, first)
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    assert device.attach(hwpt) == hwpt
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    device.detach()
    destroy(iommu, hwpt)


@pytest.mark.parametrize(("pt_id", "number"), [(0, errno.ENOENT), (99, errno.ENOENT), (1, errno.EINVAL)])
def test_attach_to_no_page_table(device: VfioDevice, ioas: int, pt_id: int, number: int) -> None:
    with fails(number):
        device.attach(pt_id)


def test_misaligned_mapping_keeps_it_away(iommu: File, device: VfioDevice, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE - 1, iova=IOVA)
    with fails(errno.EADDRINUSE):
        device.attach(ioas)


def test_memory_is_pinned(kernel: Backend, iommu: File, device: VfioDevice, ioas: int, buffer: Buffer) -> None:
    before = kernel.status("VmPin")
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=IOVA)
    device.attach(ioas)
    assert kernel.status("VmPin") == before + 16
    with fails(errno.EFAULT):
        map_user(iommu, ioas, NOWHERE, PAGE)
    device.detach()
    assert kernel.status("VmPin") == before


@pytest.mark.parametrize(
    "flags",
    [
        IOMMU_HWPT_ALLOC_NEST_PARENT,
        IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
        IOMMU_HWPT_ALLOC_PASID,
        0x80,
    ],
)
def test_hwpt_takes_no_flags(iommu: File, device: VfioDevice, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, flags)


def test_hwpt_takes_no_data(iommu: File, device: VfioDevice, ioas: int, buffer: Buffer) -> None:
    fields = {"data_type": 1, "data_len": 8, "data_uptr": buffer.address}
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas, **fields)
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=hwpt, **fields)


def test_hwpt_with_a_fault_queue(iommu: File, kernel: Backend, device: VfioDevice, ioas: int) -> None:
    """The flag is iommufd's own business, and no fault ever comes."""
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    hwpt = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_FAULT_ID_VALID, fault_id=queue.out_fault_id)
    assert device.attach(hwpt) == hwpt
    device.detach()
    os.close(queue.out_fault_fd)
    destroy(iommu, hwpt)


def test_nothing_to_ask_an_iommu(iommu: File, device: VfioDevice, ioas: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO(iommu, dev_id=device.devid)
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        IOMMU_VIOMMU_ALLOC(iommu, type=1, dev_id=device.devid, hwpt_id=hwpt)


def test_no_pasids(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    for pt_id in (ioas, hwpt):
        with fails(errno.EINVAL):
            VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=1, pt_id=pt_id)


def test_automatic_hwpt_is_shared_with_a_mock_device(
    iommu: File, device: VfioDevice, ioas: int, buffer: Buffer
) -> None:
    """Whose automatic HWPT it is does not matter to a device without an IOMMU, but then there is no address to get."""
    mock = mock_domain(iommu, ioas)
    assert device.attach(ioas) == mock.hwpt
    iova = map_user(iommu, ioas, buffer.address, PAGE)
    with fails(errno.EOPNOTSUPP):
        get_pa(iommu, ioas, iova)


def test_mock_device_does_not_share_its_hwpt(iommu: File, device: VfioDevice, ioas: int, attached: int) -> None:
    mock = mock_domain(iommu, ioas)
    assert mock.hwpt != attached


# -- NOIOMMU_GET_PA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 1}, errno.EOPNOTSUPP),
        ({"length": 0}, errno.EINVAL),
        ({"iova": U64_MAX}, errno.EOVERFLOW),
        ({"ioas_id": 99}, errno.ENOENT),
        ({"iova": IOVA - 1}, errno.ENOENT),
        ({"iova": IOVA + 4 * PAGE}, errno.ENOENT),
    ],
)
def test_check(iommu: File, ioas: int, attached: int, buffer: Buffer, fields: dict[str, int], number: int) -> None:
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=IOVA)
    with fails(number):
        IOMMU_IOAS_NOIOMMU_GET_PA(iommu, **{"ioas_id": ioas, "iova": IOVA, "length": 1, **fields})


def test_unprivileged_caller_is_eperm(kernel: Backend, iommu: File, ioas: int, attached: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
    with kernel.spawn() as client:
        remote = client.receive(iommu)
        IOMMU_IOAS_NOIOMMU_GET_PA(remote, ioas_id=ioas, iova=IOVA, length=1)
        client.drop_capabilities(CAP_SYS_RAWIO)
        with fails(errno.EPERM):
            IOMMU_IOAS_NOIOMMU_GET_PA(remote, ioas_id=ioas, iova=IOVA, length=0)


def test_before_the_attach_it_is_eopnotsupp(iommu: File, device: VfioDevice, ioas: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
    with fails(errno.EOPNOTSUPP):
        get_pa(iommu, ioas, IOVA)
    device.attach(ioas)
    get_pa(iommu, ioas, IOVA)
    device.detach()
    with fails(errno.EOPNOTSUPP):
        get_pa(iommu, ioas, IOVA)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 1, 1), (0, PAGE, PAGE), (1, 1, 1), (1, PAGE - 1, PAGE - 1), (PAGE - 1, 1, 1), (100, 50, 50)],
)
def test_no_more_than_asked_for(
    iommu: File, ioas: int, attached: int, buffer: Buffer, offset: int, length: int, expected: int
) -> None:
    map_user(iommu, ioas, buffer.address, 4 * PAGE, iova=IOVA)
    base, _ = get_pa(iommu, ioas, IOVA)
    assert base % PAGE == 0
    assert get_pa(iommu, ioas, IOVA + offset, length) == (base + offset, expected)


@pytest.mark.parametrize("length", [PAGE + 1, U64_MAX])
def test_no_more_than_the_mapping(iommu: File, ioas: int, attached: int, buffer: Buffer, length: int) -> None:
    map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
    map_user(iommu, ioas, buffer.address + PAGE, PAGE, iova=IOVA + PAGE)
    assert get_pa(iommu, ioas, IOVA, length)[1] == PAGE
    assert get_pa(iommu, ioas, IOVA + 7, length)[1] == PAGE - 7


@pytest.mark.needs("huge_pages")
def test_huge_page_is_contiguous(kernel: Backend, iommu: File, ioas: int, attached: int) -> None:
    huge = kernel.buffer(2 * MiB, huge=True)
    huge.view[0] = 1
    map_user(iommu, ioas, huge.address, 2 * MiB, iova=IOVA)
    base, length = get_pa(iommu, ioas, IOVA, U64_MAX)
    assert (base % (2 * MiB), length) == (0, 2 * MiB)
    for offset, asked, expected in (
        (PAGE, 3 * PAGE, 3 * PAGE),
        (5, 2 * PAGE, 2 * PAGE),
        (5, 2 * MiB, 2 * MiB - 5),
        (2 * MiB - 1, 2, 1),
        (PAGE + 1, 2 * MiB, 2 * MiB - PAGE - 1),
    ):
        assert get_pa(iommu, ioas, IOVA + offset, asked) == (base + offset, expected)
    huge.close()


def test_two_maps_of_a_page_are_at_one_address(iommu: File, ioas: int, attached: int, buffer: Buffer) -> None:
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=IOVA)
    map_user(iommu, ioas, buffer.address + PAGE, PAGE, iova=4 * IOVA, prot=READ)
    copied = copy(iommu, ioas, ioas, IOVA + PAGE, PAGE)
    second, _ = get_pa(iommu, ioas, IOVA + PAGE)
    assert get_pa(iommu, ioas, 4 * IOVA) == get_pa(iommu, ioas, copied) == (second, PAGE)
    assert get_pa(iommu, ioas, IOVA)[0] != second


def test_page_of_a_file_is_at_one_address(iommu: File, ioas: int, attached: int) -> None:
    with memfd(4 * PAGE) as fd, mmap.mmap(fd, 4 * PAGE) as seen:
        seen[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(seen))
        map_user(iommu, ioas, address, PAGE, iova=IOVA)
        map_file(iommu, ioas, fd, 0, 2 * PAGE, iova=4 * IOVA)
        assert get_pa(iommu, ioas, IOVA) == get_pa(iommu, ioas, 4 * IOVA)
        unmap_all(iommu, ioas)


def test_last_page_of_the_space(iommu: File, ioas: int, attached: int, buffer: Buffer) -> None:
    last = U64_MAX - PAGE + 1
    map_user(iommu, ioas, buffer.address, PAGE, iova=last)
    base, length = get_pa(iommu, ioas, last, U64_MAX)
    assert (base % PAGE, length) == (0, PAGE)
    assert get_pa(iommu, ioas, U64_MAX - 1, 9) == (base + PAGE - 2, 2)


def test_second_hwpt_gives_the_same(iommu: File, device: VfioDevice, ioas: int, buffer: Buffer) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
    base, _ = get_pa(iommu, ioas, IOVA)  # no attachment is needed, only the table
    other = hwpt_alloc(iommu, device.devid, ioas)
    destroy(iommu, hwpt)
    assert get_pa(iommu, ioas, IOVA)[0] == base
    destroy(iommu, other)


@pytest.mark.needs("mock", "dmabuf_fd")
def test_dma_buf_until_it_is_revoked(iommu: File, ioas: int, attached: int) -> None:
    fd = dmabuf_get(iommu, 4 * PAGE)
    map_file(iommu, ioas, fd, 0, 4 * PAGE, iova=IOVA)
    base, length = get_pa(iommu, ioas, IOVA, U64_MAX)
    assert length == 4 * PAGE
    assert get_pa(iommu, ioas, IOVA + PAGE + 1, 10) == (base + PAGE + 1, 10)
    dmabuf_revoke(iommu, fd)
    with fails(errno.EINVAL):
        get_pa(iommu, ioas, IOVA)
    dmabuf_revoke(iommu, fd, 0)
    with fails(errno.EINVAL):
        get_pa(iommu, ioas, IOVA)
    map_file(iommu, ioas, fd, PAGE, PAGE, iova=4 * IOVA)
    assert get_pa(iommu, ioas, 4 * IOVA) == (base + PAGE, PAGE)
    os.close(fd)


# -- what it is for --------------------------------------------------------------------------------------------------


@pytest.fixture
def pages(kernel: Backend, iommu: File, ioas: int) -> Iterator[Buffer]:
    """Two pages of client memory at IOVA: a pattern, and zeros."""
    buffer = kernel.buffer(2 * PAGE)
    buffer.view[:] = bytes(range(256)) * (PAGE // 256) + bytes(PAGE)
    map_user(iommu, ioas, buffer.address, 2 * PAGE, iova=IOVA)
    yield buffer
    unmap(iommu, ioas, IOVA, 2 * PAGE)
    buffer.close()


def test_device_reads_and_writes_at_physical_addresses(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    source, _ = get_pa(iommu, ioas, IOVA)
    destination, _ = get_pa(iommu, ioas, IOVA + PAGE)
    edu.memcpy(destination, source, PAGE)
    assert bytes(pages.view[PAGE:]) == bytes(pages.view[:PAGE])


def test_nothing_stops_it_after_the_detach(device: VfioDevice, edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    source, _ = get_pa(iommu, ioas, IOVA)
    destination, _ = get_pa(iommu, ioas, IOVA + PAGE)
    keep = hwpt_alloc(iommu, device.devid, ioas)
    device.detach()
    edu.memcpy(destination, source, 64)
    assert bytes(pages.view[PAGE : PAGE + 64]) == bytes(range(64))
    destroy(iommu, keep)
