"""The contract of the size word, for every ioctl of /dev/iommu, made from the declarations.

Mirrors the head of iommufd_fops_ioctl() and copy_struct_from_user(): a size below the last required field is EINVAL;
what is missing up to the kernel's struct reads as zero; what is beyond it must be zero, else E2BIG, and is read before
the struct itself; there is no upper bound.

Each ioctl is called with fields to which its handler has one certain answer that needs no object and makes none
(`ANSWERS`). That answer says that the block was accepted.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from conformance.arena import arena
from conformance.steps import PAGE, READ, U32_MAX, answer, errno_name
from uapi.backend import File
from uapi.ioctl import Ioctl
from uapi.registry import ioctls

ANSWERS: dict[str, tuple[dict[str, int], int]] = {
    "IOMMU_DESTROY": ({}, errno.ENOENT),
    "IOMMU_IOAS_ALLOC": ({"flags": 1}, errno.EOPNOTSUPP),
    "IOMMU_IOAS_ALLOW_IOVAS": ({}, errno.ENOENT),
    "IOMMU_IOAS_COPY": ({"flags": READ}, errno.ENOENT),
    "IOMMU_IOAS_IOVA_RANGES": ({}, errno.ENOENT),
    "IOMMU_IOAS_MAP": ({"flags": READ}, errno.ENOENT),
    "IOMMU_IOAS_UNMAP": ({}, errno.ENOENT),
    "IOMMU_OPTION": ({"option_id": 99}, errno.EOPNOTSUPP),
    "IOMMU_VFIO_IOAS": ({}, errno.ENODEV),
    "IOMMU_HWPT_ALLOC": ({}, errno.ENOENT),
    "IOMMU_GET_HW_INFO": ({}, errno.ENOENT),
    "IOMMU_HWPT_SET_DIRTY_TRACKING": ({}, errno.ENOENT),
    "IOMMU_HWPT_GET_DIRTY_BITMAP": ({}, errno.ENOENT),
    "IOMMU_HWPT_INVALIDATE": ({}, errno.ENOENT),
    "IOMMU_FAULT_QUEUE_ALLOC": ({"flags": 1}, errno.EOPNOTSUPP),
    "IOMMU_IOAS_MAP_FILE": ({"flags": READ}, errno.ENOENT),
    "IOMMU_VIOMMU_ALLOC": ({}, errno.EOPNOTSUPP),
    "IOMMU_VDEVICE_ALLOC": ({}, errno.ENOENT),
    "IOMMU_IOAS_CHANGE_PROCESS": ({"__reserved": 1}, errno.EOPNOTSUPP),
    "IOMMU_VEVENTQ_ALLOC": ({}, errno.EOPNOTSUPP),
    "IOMMU_HW_QUEUE_ALLOC": ({}, errno.EOPNOTSUPP),
    "IOMMU_IOAS_NOIOMMU_GET_PA": ({"flags": 1}, errno.EOPNOTSUPP),
}

#: Writes its entry_num back even when it fails.
WRITES_ON_FAILURE = {"IOMMU_HWPT_INVALIDATE"}

OPS = ioctls("linux/iommufd.h")


def rows(chosen: Iterable[Ioctl[Any]]) -> list[Any]:
    return [pytest.param(op, marks=pytest.mark.since(op.since), id=op.name) for op in chosen]


ops = pytest.mark.parametrize("op", rows(OPS.values()))
growing = pytest.mark.parametrize("op", rows(op for op in OPS.values() if op.min_size < op.size))


def block(op: Ioctl[Any], size: int | None = None, tail: bytes = b"") -> bytearray:
    """The struct with the certain answer, its size word as told, and what follows it."""
    fields, _ = ANSWERS[op.name]
    return bytearray(bytes(op.make(**fields, size=op.size + len(tail) if size is None else size)) + tail)


def accepted(op: Ioctl[Any], got: int) -> None:
    assert errno_name(got) == errno_name(ANSWERS[op.name][1])


def refused(got: int, number: int) -> None:
    assert errno_name(got) == errno_name(number)


def test_every_ioctl_has_its_row() -> None:
    assert set(ANSWERS) == set(OPS)


@ops
def test_exact_size_is_accepted(iommu: File, op: Ioctl[Any]) -> None:
    accepted(op, answer(iommu.ioctl, op.number, block(op)))


@ops
def test_size_below_the_last_required_field_is_einval(iommu: File, op: Ioctl[Any]) -> None:
    for size in (0, 1, 4, op.min_size - 1):
        refused(answer(iommu.ioctl, op.number, block(op, size)), errno.EINVAL)


@growing
def test_any_size_from_the_last_required_field_on_is_accepted(iommu: File, op: Ioctl[Any]) -> None:
    for size in range(op.min_size, op.size):
        accepted(op, answer(iommu.ioctl, op.number, block(op, size)))


@growing
def test_fields_beyond_the_given_size_are_not_looked_at(iommu: File, op: Ioctl[Any]) -> None:
    data = block(op, op.min_size)
    data[op.min_size :] = b"\xff" * (op.size - op.min_size)
    accepted(op, answer(iommu.ioctl, op.number, data))


@growing
def test_smallest_block_may_end_at_the_edge_of_memory(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        address = memory.page(1) - op.min_size
        memory.write(address, bytes(block(op, op.min_size)[: op.min_size]))
        accepted(op, answer(iommu.ioctl, op.number, address))


@ops
def test_larger_size_with_a_zero_tail_is_accepted(iommu: File, op: Ioctl[Any]) -> None:
    for extra in (1, 3, 4, 8, 17, PAGE):
        accepted(op, answer(iommu.ioctl, op.number, block(op, tail=bytes(extra))))


@ops
def test_larger_size_with_a_byte_set_in_the_tail_is_e2big(iommu: File, op: Ioctl[Any]) -> None:
    for extra, position in ((1, 0), (8, 0), (8, 7), (17, 16), (PAGE, 1), (PAGE, PAGE - 1)):
        tail = bytearray(extra)
        tail[position] = 0x80
        refused(answer(iommu.ioctl, op.number, block(op, tail=bytes(tail))), errno.E2BIG)


@ops
def test_byte_just_behind_the_given_size_does_not_matter(iommu: File, op: Ioctl[Any]) -> None:
    accepted(op, answer(iommu.ioctl, op.number, block(op, op.size + 8, tail=bytes(8) + b"\xff")))


@ops
def test_block_may_end_at_the_edge_of_memory(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        address = memory.page(1) - op.size
        memory.write(address, bytes(block(op)))
        accepted(op, answer(iommu.ioctl, op.number, address))


@ops
@pytest.mark.parametrize("edge", ["unmapped", "no_access"])
def test_block_that_runs_over_the_edge_is_efault(iommu: File, op: Ioctl[Any], edge: str) -> None:
    with arena(2) as memory:
        if edge == "unmapped":
            memory.unmap(1)
        else:
            memory.no_access(1)
        for inside in sorted({1, 3, 4, 7, min(8, op.size - 1), op.size - 4, op.size - 1}):
            address = memory.page(1) - inside
            memory.write(address, bytes(block(op)[:inside]))
            refused(answer(iommu.ioctl, op.number, address), errno.EFAULT)


@ops
def test_too_small_a_size_is_einval_whatever_follows_it(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        address = memory.page(1) - 4
        memory.write(address, (op.min_size - 1).to_bytes(4, "little"))
        refused(answer(iommu.ioctl, op.number, address), errno.EINVAL)


@ops
def test_tail_that_runs_over_the_edge_is_efault(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        for inside, size in itertools.product((0, 1, 8, 64), (op.size + 65, op.size + PAGE, U32_MAX)):
            address = memory.page(1) - op.size - inside
            memory.write(address, bytes(block(op, size, tail=bytes(inside))))
            refused(answer(iommu.ioctl, op.number, address), errno.EFAULT)


@ops
def test_byte_set_in_the_tail_before_the_edge_is_e2big(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        for size in (op.size + 65, op.size + PAGE, U32_MAX):
            address = memory.page(1) - op.size - 64
            memory.write(address, bytes(block(op, size, tail=bytes(50) + b"\x01" + bytes(13))))
            refused(answer(iommu.ioctl, op.number, address), errno.E2BIG)


@ops
def test_tail_in_memory_without_access_is_efault(iommu: File, op: Ioctl[Any]) -> None:
    with arena(2) as memory:
        memory.no_access(1)
        address = memory.page(1) - op.size
        memory.write(address, bytes(block(op, op.size + 8)))
        refused(answer(iommu.ioctl, op.number, address), errno.EFAULT)


@ops
def test_tail_comes_before_the_handler(iommu: File, op: Ioctl[Any]) -> None:
    """All fields wrong and a byte in the tail: E2BIG."""
    data = bytearray(b"\xff" * (op.size + 1))
    data[:4] = len(data).to_bytes(4, "little")
    refused(answer(iommu.ioctl, op.number, data), errno.E2BIG)


@pytest.mark.parametrize("op", rows(op for name, op in OPS.items() if name not in WRITES_ON_FAILURE))
def test_failing_call_writes_nothing_back(iommu: File, op: Ioctl[Any]) -> None:
    with arena(1) as memory:
        memory.write(memory.page(0), bytes(block(op)))
        memory.read_only(0)
        accepted(op, answer(iommu.ioctl, op.number, memory.page(0)))


@ops
def test_other_bits_of_the_command_are_enotty_after_the_size_word(iommu: File, op: Ioctl[Any]) -> None:
    for wrong in (1 << 31, 1 << 30, op.size << 16, 1 << 8):
        refused(answer(iommu.ioctl, op.number ^ wrong, block(op, 0)), errno.ENOTTY)
        refused(answer(iommu.ioctl, op.number ^ wrong, 0), errno.EFAULT)
