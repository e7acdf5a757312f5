"""DMA through the IOMMU, seen from a device: what arrives, what is refused, and from when on.

edu copies between memory and its own buffer, so one copy from memory to memory is two transfers. A refused write leaves
memory as it was; a refused read leaves zeros in the device's buffer. On QEMU each transfer takes 100 ms of guest time,
so tests share no more of them than they need.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import BUFFER_SIZE, IRQ_OF_DMA, REG_DMA_CMD, Edu, signals
from conformance.drivers.edu import DMA_IRQ as WITH_IRQ
from conformance.drivers.vfio import PCI_COMMAND_MASTER
from conformance.layout import Layout
from conformance.steps import (
    PAGE,
    READ,
    WRITE,
    copy,
    destroy,
    ioas_alloc,
    map_file,
    map_user,
    memfd,
    unmap,
    unmap_all,
)
from uapi.backend import DEV_IOMMU, Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device")

IOVA = 0x10_0000
#: Two pages: the first is the source, the second the destination.
PATTERN = bytes(range(256)) * (PAGE // 256)
OLD = b"\xa5" * PAGE


@pytest.fixture
def pages(kernel: Backend) -> Iterator[Buffer]:
    """Two pages of client memory: a pattern, and what was there before."""
    buffer = kernel.buffer(2 * PAGE)
    buffer.view[:PAGE] = PATTERN
    buffer.view[PAGE:] = OLD
    yield buffer
    buffer.close()


def second(pages: Buffer) -> bytes:
    return bytes(pages.view[PAGE:])


def is_refused(edu: Edu, pages: Buffer, iova: int) -> bool:
    """Whether a write of the device to `iova` left the second page as it was."""
    pages.view[PAGE:] = OLD
    edu.store(iova, PAGE)
    return second(pages) == OLD


# -------------------------------------------------------------------------------------------------------- the device


def test_edu_answers(edu: Edu) -> None:
    assert edu.liveness(0xCAFE0001) == 0x3501FFFE
    assert [edu.factorial(n) for n in (0, 1, 5, 10)] == [1, 1, 120, 3628800]


# ----------------------------------------------------------------------------------------------------- bytes arrive


def test_memcpy_by_dma(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_memcpy_at_the_iova_that_the_kernel_chose(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    iova = map_user(iommu, ioas, pages.address, 2 * PAGE)
    edu.memcpy(iova + PAGE, iova, PAGE)
    assert second(pages) == PATTERN


def test_memcpy_of_several_buffers(edu: Edu, kernel: Backend, iommu: File, ioas: int) -> None:
    length = BUFFER_SIZE * 2 + 100
    with_room = 3 * PAGE
    data = os.urandom(length)
    buffer = kernel.buffer(2 * with_room)
    buffer.view[:length] = data
    map_user(iommu, ioas, buffer.address, 2 * with_room, IOVA)
    edu.memcpy(IOVA + with_room, IOVA, length)
    assert bytes(buffer.view[with_room : with_room + length]) == data
    assert bytes(buffer.view[with_room + length :]) == bytes(with_room - length)
    buffer.close()


def test_single_byte_at_an_odd_address(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA + 0x123, 1, at=7)
    edu.store(IOVA + PAGE + 0xFFF, 1, at=7)
    assert second(pages) == OLD[:-1] + PATTERN[0x123:0x124]


def test_transfer_across_a_page_boundary(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA + 1, 256)
    edu.store(IOVA + PAGE - 128, 256)
    assert bytes(pages.view[PAGE - 128 : PAGE + 128]) == PATTERN[1:257]


def test_transfer_across_two_areas(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    """Two mappings that touch in IOVA space and are swapped in memory."""
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA)
    map_user(iommu, ioas, pages.address, PAGE, IOVA + PAGE)
    pages.view[:] = PATTERN + OLD
    edu.load(IOVA + PAGE - 128, 256)
    edu.store(IOVA, 256)
    assert second(pages)[:256] == OLD[:128] + PATTERN[:128]


def test_one_page_at_two_iovas(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + (1 << 30))
    map_user(iommu, ioas, pages.address + PAGE, PAGE, 1 << 40)
    edu.load(IOVA, PAGE)
    edu.store(IOVA + (1 << 30), 64)
    edu.store((1 << 40) + 64, 64, at=64)
    assert second(pages)[:129] == PATTERN[:128] + OLD[:1]


def test_what_the_cpu_writes_after_map_is_what_the_device_reads(
    edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    pages.view[:4] = b"late"
    edu.memcpy(IOVA + PAGE, IOVA, 4)
    assert second(pages)[:4] == b"late"


def test_mapping_made_before_attach_is_there(edu: Edu, iommu: File, pages: Buffer) -> None:
    other = ioas_alloc(iommu)
    map_user(iommu, other, pages.address, 2 * PAGE, IOVA)
    edu.vfio.attach(other)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_private_memory_of_the_test(edu: Edu, iommu: File, ioas: int) -> None:
    """Any ordinary memory of the client, whoever allocated it."""
    area = mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:5] = b"hello"
    anchor = ctypes.c_char.from_buffer(area)
    map_user(iommu, ioas, ctypes.addressof(anchor), 2 * PAGE, IOVA)
    edu.memcpy(IOVA + PAGE, IOVA, 5)
    assert area[PAGE : PAGE + 5] == b"hello"
    unmap_all(iommu, ioas)
    del anchor
    area.close()


def test_memory_of_the_process_that_mapped_it(kernel: Backend, edu: Edu, iommu: File, ioas: int) -> None:
    """An address means the memory of whoever calls MAP, not of whoever opened the device."""
    with kernel.spawn() as client:
        theirs = client.receive(iommu)
        address = client.allocate(2 * PAGE)
        client.poke(address, PATTERN)
        map_user(theirs, ioas, address, 2 * PAGE, IOVA)  # type: ignore[arg-type]
        edu.memcpy(IOVA + PAGE, IOVA, PAGE)
        assert client.peek(address + PAGE, PAGE) == PATTERN
        unmap_all(iommu, ioas)


@pytest.mark.needs("huge_pages")
def test_huge_page(edu: Edu, kernel: Backend, iommu: File, ioas: int) -> None:
    size = 2 << 20
    buffer = kernel.buffer(size, huge=True)
    buffer.view[:4] = b"head"
    buffer.view[size - 4 :] = b"tail"
    map_user(iommu, ioas, buffer.address, size, size)
    edu.load(size + size - 4, 4)
    edu.store(size + size // 2, 4)
    assert bytes(buffer.view[size // 2 : size // 2 + 8]) == b"tail" + bytes(4)
    unmap_all(iommu, ioas)
    buffer.close()


# ---------------------------------------------------------------------------------------------------------- memfd, COPY


@pytest.mark.since("6.13")
@pytest.mark.needs("memfd")
def test_memfd_by_map_file(edu: Edu, iommu: File, ioas: int) -> None:
    with memfd(4 * PAGE) as fd:
        os.pwrite(fd, PATTERN, PAGE)
        map_file(iommu, ioas, fd, PAGE, 2 * PAGE, IOVA)
        edu.memcpy(IOVA + PAGE, IOVA, PAGE)
        assert os.pread(fd, PAGE, 2 * PAGE) == PATTERN
        assert os.pread(fd, PAGE, 0) == os.pread(fd, PAGE, 3 * PAGE) == bytes(PAGE)


@pytest.mark.needs("memfd")
def test_memfd_mapped_into_the_client_is_the_same_memory(edu: Edu, iommu: File, ioas: int) -> None:
    with memfd(2 * PAGE) as fd:
        area = mmap.mmap(fd, 2 * PAGE)
        anchor = ctypes.c_char.from_buffer(area)
        map_user(iommu, ioas, ctypes.addressof(anchor), 2 * PAGE, IOVA)
        os.pwrite(fd, PATTERN, 0)
        edu.memcpy(IOVA + PAGE, IOVA, PAGE)
        assert area[PAGE:] == PATTERN
        assert os.pread(fd, PAGE, PAGE) == PATTERN
        unmap_all(iommu, ioas)
        del anchor
        area.close()


@pytest.mark.since("6.13")
@pytest.mark.needs("memfd")
def test_memfd_stays_mapped_after_its_descriptor_closes(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    with memfd(2 * PAGE) as fd:
        os.pwrite(fd, PATTERN, 0)
        map_file(iommu, ioas, fd, 0, PAGE, IOVA)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + PAGE)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_copy_into_another_ioas_reaches_the_same_memory(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    other = ioas_alloc(iommu)
    map_user(iommu, other, pages.address, 2 * PAGE, 0)
    copy(iommu, ioas, other, 0, 2 * PAGE, dst_iova=IOVA)
    unmap_all(iommu, other)
    destroy(iommu, other)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_copy_for_reading_only_refuses_writes(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    copy(iommu, ioas, ioas, IOVA + PAGE, PAGE, dst_iova=2 * IOVA, prot=READ)
    edu.load(IOVA, PAGE)
    assert is_refused(edu, pages, 2 * IOVA)
    assert not is_refused(edu, pages, IOVA + PAGE)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_read_only_mapping_refuses_writes_and_gives_reads(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + PAGE, prot=READ)
    edu.load(IOVA, PAGE)
    assert is_refused(edu, pages, IOVA + PAGE)
    edu.load(IOVA + PAGE, PAGE)
    edu.store(IOVA, PAGE)
    assert bytes(pages.view[:PAGE]) == OLD


@pytest.mark.has("vtd-write-only")
def test_write_only_mapping_takes_writes_and_refuses_reads_where_tables_can_say_so(
    edu: Edu, iommu: File, ioas: int, pages: Buffer, layout: Layout
) -> None:
    """A second stage of VT-d can; a first stage, and SMMUv3's stage 1, let read whoever may write."""
    map_user(iommu, ioas, pages.address, PAGE, IOVA, prot=WRITE)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + PAGE, prot=WRITE)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == (bytes(PAGE) if layout.write_only else PATTERN)


def test_unmapped_write_leaves_memory_as_it_was(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.store(IOVA + 2 * PAGE, PAGE)
    assert bytes(pages.view) == PATTERN + OLD


def test_unmapped_read_leaves_zeros_in_the_device(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.memcpy(IOVA + PAGE, 4 * IOVA, PAGE)
    assert second(pages) == bytes(PAGE)


def test_transfer_off_the_end_of_a_mapping_does_the_part_inside(
    edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, 256)
    edu.store(IOVA + 2 * PAGE - 64, 256)
    assert second(pages) == OLD[:-64] + PATTERN[:64]


def test_nothing_arrives_without_bus_master(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.vfio.disable(PCI_COMMAND_MASTER)
    assert is_refused(edu, pages, IOVA + PAGE)
    edu.vfio.enable(PCI_COMMAND_MASTER)
    assert not is_refused(edu, pages, IOVA + PAGE)


def test_the_iova_is_no_physical_address(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    """An empty IOAS lets nothing through, wherever the device aims."""
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    edu.load(IOVA, PAGE)
    unmap_all(iommu, ioas)
    for address in (0, 0x1000, pages.address & ((1 << 39) - 1) & ~0xFFF):
        assert is_refused(edu, pages, address)


# -------------------------------------------------------------------------------------------------------- from when on


def test_unmap_takes_effect_at_once(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)  # both pages are cached in the IOTLB now
    assert second(pages) == PATTERN
    unmap(iommu, ioas, IOVA, 2 * PAGE)
    assert is_refused(edu, pages, IOVA + PAGE)
    assert bytes(pages.view[:PAGE]) == PATTERN


def test_map_after_a_refused_transfer_takes_effect_at_once(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    edu.load(IOVA, PAGE)
    assert is_refused(edu, pages, IOVA + PAGE)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + PAGE)
    assert not is_refused(edu, pages, IOVA + PAGE)
    assert second(pages) == PATTERN


def test_remap_moves_the_iova_to_other_memory(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.store(IOVA, PAGE)
    unmap(iommu, ioas, IOVA, PAGE)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA)
    pages.view[:PAGE] = OLD
    edu.store(IOVA, PAGE)
    assert bytes(pages.view) == OLD + PATTERN


def test_unmap_of_one_area_leaves_its_neighbour(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    map_user(iommu, ioas, pages.address + PAGE, PAGE, IOVA + PAGE)
    edu.load(IOVA, PAGE)
    unmap(iommu, ioas, IOVA, PAGE)
    assert not is_refused(edu, pages, IOVA + PAGE)


# --------------------------------------------------------------------------------------------------- address spaces


def test_two_ioases_do_not_see_each_other(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    other = ioas_alloc(iommu)
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    map_user(iommu, other, pages.address + PAGE, PAGE, 2 * IOVA)
    edu.load(IOVA, PAGE)
    assert is_refused(edu, pages, 2 * IOVA)
    edu.vfio.attach(other)
    assert not is_refused(edu, pages, 2 * IOVA)
    edu.load(IOVA, PAGE)  # of the other IOAS: refused, zeros
    edu.store(2 * IOVA, PAGE)
    assert second(pages) == bytes(PAGE)


def test_replace_switches_the_memory_behind_an_iova(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    other = ioas_alloc(iommu)
    map_user(iommu, ioas, pages.address, PAGE, IOVA)
    map_user(iommu, other, pages.address + PAGE, PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.vfio.attach(other)
    edu.store(IOVA, PAGE)
    assert second(pages) == PATTERN
    edu.vfio.attach(ioas)
    pages.view[:PAGE] = OLD
    edu.store(IOVA, PAGE)
    assert bytes(pages.view[:PAGE]) == PATTERN


def test_nothing_arrives_after_detach(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.vfio.detach()
    assert is_refused(edu, pages, IOVA + PAGE)
    edu.vfio.attach(ioas)
    assert not is_refused(edu, pages, IOVA + PAGE)


def test_a_hwpt_of_the_users_own_translates(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=edu.vfio.devid, pt_id=ioas).out_hwpt_id
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.vfio.attach(hwpt)
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_two_hwpts_of_one_ioas_translate_alike(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=edu.vfio.devid, pt_id=ioas).out_hwpt_id
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    edu.vfio.attach(hwpt)
    assert not is_refused(edu, pages, IOVA + PAGE)
    unmap_all(iommu, ioas)
    assert is_refused(edu, pages, IOVA + PAGE)


def test_mapping_survives_the_close_of_iommufd_while_bound(
    kernel: Backend, edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    iommu.close()
    edu.memcpy(IOVA + PAGE, IOVA, PAGE)
    assert second(pages) == PATTERN


def test_another_iommufd_does_not_see_the_first_ones_mappings(
    kernel: Backend, edu: Edu, iommu: File, ioas: int, pages: Buffer
) -> None:
    with kernel.open(DEV_IOMMU) as other:
        foreign = ioas_alloc(other)
        map_user(iommu, ioas, pages.address, PAGE, IOVA)
        map_user(other, foreign, pages.address + PAGE, PAGE, IOVA + PAGE)
        edu.load(IOVA, PAGE)
        assert is_refused(edu, pages, IOVA + PAGE)


# -------------------------------------------------------------------------------------------------------- completion


def test_interrupt_at_the_end_of_a_transfer(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    eventfd = edu.enable_msi()
    edu.load(IOVA, PAGE, flags=WITH_IRQ)
    assert signals(eventfd) == 1
    assert edu.irq_status() == IRQ_OF_DMA
    edu.acknowledge(IRQ_OF_DMA)
    edu.store(IOVA + PAGE, PAGE)
    assert signals(eventfd, 0.05) == 0
    assert second(pages) == PATTERN


def test_command_register_shows_the_transfer_done(edu: Edu, iommu: File, ioas: int, pages: Buffer) -> None:
    map_user(iommu, ioas, pages.address, 2 * PAGE, IOVA)
    edu.load(IOVA, PAGE)
    assert edu.bar.read(REG_DMA_CMD, 8) & 1 == 0


def test_refused_transfer_still_completes_with_its_interrupt(edu: Edu) -> None:
    eventfd = edu.enable_msi()
    edu.load(IOVA, PAGE, flags=WITH_IRQ)
    assert signals(eventfd) == 1
    edu.acknowledge(IRQ_OF_DMA)
