"""How /dev/iommu takes an ioctl apart before any handler sees it.

Mirrors iommufd_fops_ioctl() of drivers/iommu/iommufd/main.c: only the command's nr selects, the size word is read
before the rest of the command is compared, and what lies outside the table goes to the VFIO compatibility switch.
The rules about the size itself are in test_size_contract.py.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from conformance.arena import Arena, arena
from conformance.steps import PAGE, answer, destroy, fails, ioas_alloc
from uapi.backend import MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, Backend, File
from uapi.iommufd import IOMMU_DESTROY, IOMMU_IOAS_ALLOC

IOMMUFD_TYPE = 0x3B

#: Bare addresses that no client can own.
BAD_ADDRESSES = {
    "null": 0,
    "kernel_half": 0xFFFF_8000_0000_0000,
    "non_canonical": 0x0001_0000_0000_0000,
    "last_page": 0xFFFF_FFFF_FFFF_F000,
    "minus_one": 0xFFFF_FFFF_FFFF_FFFF,
    "end_of_user_space": 0x7FFF_FFFF_F000,
}


def command(nr: int, type_: int = IOMMUFD_TYPE, direction: int = 0, size: int = 0) -> int:
    """The kernel's _IOC()."""
    return direction << 30 | size << 16 | type_ << 8 | nr


@pytest.mark.parametrize("nr", [0x00, 0x01, 0x60, 0x7F, 0xA1, 0xC0, 0xFF])
def test_nr_outside_the_table_is_enotty(iommu: File, nr: int) -> None:
    block = ctypes.create_string_buffer(64)
    with fails(errno.ENOTTY):
        iommu.ioctl(command(nr), block)


@pytest.mark.parametrize("nr", [0x00, 0x7F, 0xA1, 0xFF])
def test_nr_outside_the_table_is_enotty_without_a_look_at_the_pointer(iommu: File, nr: int) -> None:
    with fails(errno.ENOTTY):
        iommu.ioctl(command(nr), 0)


@pytest.mark.parametrize("nr", range(0x96, 0xA0))
def test_hole_of_the_table_is_enotty(iommu: File, nr: int) -> None:
    block = ctypes.create_string_buffer(64)
    with fails(errno.ENOTTY):
        iommu.ioctl(command(nr), block)


@pytest.mark.parametrize("nr", [0x80, 0x81, 0x85, 0x89, 0x94, 0x95])
@pytest.mark.parametrize(
    "wrong",
    [{"direction": 1}, {"direction": 2}, {"direction": 3}, {"size": 12}, {"type_": 0x3A}, {"type_": 0}],
    ids=lambda wrong: "_".join(f"{key}{value}" for key, value in wrong.items()),
)
def test_command_that_differs_outside_its_nr_is_enotty(iommu: File, nr: int, wrong: dict[str, int]) -> None:
    block = ctypes.create_string_buffer(64)
    with fails(errno.ENOTTY):
        iommu.ioctl(command(nr, **wrong), block)


@pytest.mark.parametrize("wrong", [{"direction": 3}, {"size": 12}, {"type_": 0}], ids=["direction", "size", "type"])
def test_size_word_is_read_before_the_command_is_compared(iommu: File, wrong: dict[str, int]) -> None:
    with fails(errno.EFAULT):
        iommu.ioctl(command(0x81, **wrong), 0)


def test_command_is_compared_before_the_size_is_judged(iommu: File) -> None:
    block = (ctypes.c_uint32 * 4)(0)
    with fails(errno.ENOTTY):
        iommu.ioctl(command(0x81, direction=3), block)


def test_bits_of_the_request_above_32_are_ignored(iommu: File) -> None:
    arg = IOMMU_IOAS_ALLOC.make()
    assert iommu.ioctl(IOMMU_IOAS_ALLOC.number | 0x1_0000_0000, arg) == 0
    assert arg.out_ioas_id == 1


@pytest.mark.parametrize("address", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_bad_argument_address_is_efault(iommu: File, address: int) -> None:
    with fails(errno.EFAULT):
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, address)


def test_unmapped_argument_is_efault(iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, memory.page(1))


def test_argument_without_read_permission_is_efault(iommu: File) -> None:
    with arena(1) as memory:
        memory.no_access(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, memory.page(0))


@pytest.mark.parametrize("readable", [0, 1, 2, 3])
def test_size_word_that_straddles_into_a_hole_is_efault(iommu: File, readable: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, memory.page(1) - readable)


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 7])
def test_argument_need_not_be_aligned(iommu: File, shift: int) -> None:
    with arena(1) as memory:
        address = memory.page(0) + shift
        Arena.write(address, IOMMU_IOAS_ALLOC.make())
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, address)
        reply = IOMMU_IOAS_ALLOC.struct.from_buffer_copy(memory.read(address, 12))
        assert reply.out_ioas_id == 1


@pytest.mark.parametrize("split", range(1, 12))
def test_argument_may_straddle_two_pages(iommu: File, split: int) -> None:
    with arena(2) as memory:
        address = memory.page(1) - split
        Arena.write(address, IOMMU_IOAS_ALLOC.make())
        iommu.ioctl(IOMMU_IOAS_ALLOC.number, address)
        reply = IOMMU_IOAS_ALLOC.struct.from_buffer_copy(memory.read(address, 12))
        assert reply.out_ioas_id == 1


def test_argument_in_read_only_memory_serves_an_ioctl_that_replies_nothing(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_DESTROY.make(id=ioas))
        memory.read_only(0)
        iommu.ioctl(IOMMU_DESTROY.number, memory.page(0))
    with fails(errno.ENOENT):
        destroy(iommu, ioas)


def test_every_open_is_a_context_of_its_own(kernel: Backend, iommu: File) -> None:
    first = ioas_alloc(iommu)
    with kernel.open("/dev/iommu") as other:
        assert ioas_alloc(other) == first
        destroy(other, first)
        with fails(errno.ENOENT):
            destroy(other, first)
    destroy(iommu, first)


def test_duplicated_descriptor_is_the_same_context(kernel: Backend, iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    with kernel.adopt(os.dup(iommu.fileno())) as twin:
        assert ioas_alloc(twin) == ioas + 1
        destroy(twin, ioas)
    with fails(errno.ENOENT):
        destroy(iommu, ioas)


@pytest.mark.needs("iommu")
def test_context_lives_on_in_a_duplicate(kernel: Backend) -> None:
    iommu = kernel.open("/dev/iommu")
    ioas = ioas_alloc(iommu)
    twin = kernel.adopt(os.dup(iommu.fileno()))
    iommu.close()
    with twin:
        assert ioas_alloc(twin) == ioas + 1


@pytest.mark.needs("iommu")
@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY], ids=["read_only", "write_only"])
def test_access_mode_of_the_open_does_not_matter(kernel: Backend, access: int) -> None:
    with kernel.open("/dev/iommu", access | os.O_CLOEXEC) as iommu:
        assert ioas_alloc(iommu) == 1


def test_read_is_einval(iommu: File) -> None:
    with fails(errno.EINVAL):
        iommu.read(8)


def test_write_is_einval(iommu: File) -> None:
    with fails(errno.EINVAL):
        iommu.write(b"12345678")


@pytest.mark.parametrize(
    ("prot", "flags", "number"),
    [
        (PROT_READ, MAP_SHARED, errno.ENXIO),
        (PROT_READ, MAP_PRIVATE, errno.EINVAL),
        (PROT_READ | PROT_EXEC, MAP_SHARED, errno.EPERM),
    ],
    ids=["nothing_published", "private", "executable"],
)
@pytest.mark.has("mmap-of-iommufd")
def test_mmap_without_a_published_range_fails(iommu: File, prot: int, flags: int, number: int) -> None:
    with fails(number):
        iommu.mmap(PAGE, 0, prot, flags).close()


def test_failing_ioctl_leaves_the_argument_alone(iommu: File) -> None:
    arg = IOMMU_IOAS_ALLOC.make(flags=1, out_ioas_id=0xDEAD_BEEF)
    assert answer(IOMMU_IOAS_ALLOC.raw, iommu, arg) == errno.EOPNOTSUPP
    assert (arg.size, arg.flags, arg.out_ioas_id) == (12, 1, 0xDEAD_BEEF)


def test_page_size_is_4096(iommu: File) -> None:
    """The rest of the suite counts in pages of 4096 bytes."""
    assert mmap.PAGESIZE == PAGE
