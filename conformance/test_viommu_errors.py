"""The ioctls of vIOMMUs, vDEVICEs, their queues and invalidation, where no vIOMMU can be: their first checks.

Mirrors the heads of the handlers in drivers/iommu/iommufd/viommu.c, eventq.c and hw_pagetable.c, and the physical
addresses of no-IOMMU devices where there are none.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.steps import PAGE, U32_MAX, U64_MAX, fails, ioas_alloc
from uapi.backend import File
from uapi.ioctl import Ioctl
from uapi.iommufd import (
    IOMMU_HW_QUEUE_ALLOC,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_VDEVICE_ALLOC,
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VIOMMU_ALLOC,
)

VIOMMU, VDEVICE, VEVENTQ, QUEUE = IOMMU_VIOMMU_ALLOC, IOMMU_VDEVICE_ALLOC, IOMMU_VEVENTQ_ALLOC, IOMMU_HW_QUEUE_ALLOC

#: The ioctl, its fields and the answer in a context whose object 1 is an IOAS.
ROWS: list[tuple[Ioctl[Any], dict[str, int], int]] = [
    (VIOMMU, {"flags": 1, "type": 1, "dev_id": 99}, errno.EOPNOTSUPP),
    (VIOMMU, {"type": 0, "dev_id": 99}, errno.EOPNOTSUPP),
    (VIOMMU, {"type": 1, "dev_id": 99}, errno.ENOENT),
    (VIOMMU, {"type": 1, "dev_id": 1}, errno.ENOENT),
    (VIOMMU, {"type": U32_MAX, "dev_id": 0, "__reserved": 1}, errno.ENOENT),
    (VDEVICE, {"viommu_id": 0}, errno.ENOENT),
    (VDEVICE, {"viommu_id": 1, "dev_id": 1}, errno.ENOENT),
    (VDEVICE, {"viommu_id": 99, "virt_id": U64_MAX}, errno.ENOENT),
    (VEVENTQ, {"flags": 1, "type": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
    (VEVENTQ, {"__reserved": 1, "type": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
    (VEVENTQ, {"type": 0, "veventq_depth": 1}, errno.EOPNOTSUPP),
    (VEVENTQ, {"type": 1, "veventq_depth": 0}, errno.EINVAL),
    (VEVENTQ, {"type": 1, "veventq_depth": 1, "viommu_id": 1}, errno.ENOENT),
    (VEVENTQ, {"type": 1, "veventq_depth": 1 << 19, "viommu_id": 99}, errno.ENOENT),
    (QUEUE, {"flags": 1, "type": 1}, errno.EOPNOTSUPP),
    (QUEUE, {"type": 0, "length": PAGE}, errno.EOPNOTSUPP),
    (QUEUE, {"type": 1, "length": 0, "nesting_parent_iova": U64_MAX}, errno.EINVAL),
    (QUEUE, {"type": 1, "length": 2, "nesting_parent_iova": U64_MAX}, errno.EOVERFLOW),
    (QUEUE, {"type": 1, "length": 1, "nesting_parent_iova": U64_MAX, "viommu_id": 99}, errno.ENOENT),
    (QUEUE, {"type": 1, "length": PAGE, "viommu_id": 1}, errno.ENOENT),
]


def came(op: Ioctl[Any], fields: dict[str, int]) -> str:
    """The release of an ioctl, or of the last field that a row uses."""
    return "6.17" if op is VIOMMU and "__reserved" in fields else op.since


@pytest.mark.parametrize(
    ("op", "fields", "number"),
    [pytest.param(op, fields, number, marks=pytest.mark.since(came(op, fields))) for op, fields, number in ROWS],
)
def test_check(iommu: File, op: Ioctl[Any], fields: dict[str, int], number: int) -> None:
    ioas_alloc(iommu)
    with fails(number):
        op(iommu, **fields)
    assert ioas_alloc(iommu) == 2


@pytest.mark.since("7.2")
@pytest.mark.parametrize("depth", [(1 << 19) + 1, U32_MAX])
def test_veventq_deeper_than_2_to_the_19_is_einval(iommu: File, depth: int) -> None:
    with fails(errno.EINVAL):
        VEVENTQ(iommu, type=1, veventq_depth=depth, viommu_id=99)


@pytest.mark.since("6.13")
@pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd")
@pytest.mark.parametrize("kind", [1, 2, U32_MAX])
def test_vtd_has_no_viommus(device: VfioDevice, iommu: File, ioas: int, kind: int) -> None:
    """Before the HWPT is looked for."""
    with fails(errno.EOPNOTSUPP):
        VIOMMU(iommu, type=kind, dev_id=device.devid, hwpt_id=99)


# -------------------------------------------------------------------------------------------------------- invalidation


INVALIDATE: list[tuple[dict[str, int], int]] = [
    ({"__reserved": 1, "entry_num": 1}, errno.EOPNOTSUPP),
    ({"hwpt_id": 0, "entry_num": 0}, errno.ENOENT),
    ({"hwpt_id": 99, "entry_num": 0, "entry_len": U32_MAX}, errno.ENOENT),
    ({"hwpt_id": 99, "entry_num": 1, "entry_len": 8, "data_uptr": 8}, errno.ENOENT),
    pytest.param({"hwpt_id": 1, "entry_num": 0}, errno.EINVAL, marks=pytest.mark.has("invalidate-any-object")),
    ({"hwpt_id": 99, "entry_num": 1, "entry_len": 0, "data_uptr": 8}, errno.EINVAL),
    ({"hwpt_id": 99, "entry_num": 1, "entry_len": 8, "data_uptr": 0}, errno.EINVAL),
]


@pytest.mark.since("6.8")
@pytest.mark.parametrize(("fields", "number"), INVALIDATE)
def test_invalidate_writes_0_entries_back_when_it_fails(iommu: File, fields: dict[str, int], number: int) -> None:
    ioas_alloc(iommu)
    arg = IOMMU_HWPT_INVALIDATE.make(**fields)
    with fails(number):
        IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    assert arg.entry_num == 0


@pytest.mark.since("6.8")
@pytest.mark.has("invalidate-caps")
@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"entry_num": 1, "entry_len": PAGE + 1}, errno.EINVAL),
        ({"entry_num": (1 << 19) + 1, "entry_len": 8}, errno.EINVAL),
        ({"entry_num": 1 << 19, "entry_len": PAGE}, errno.ENOENT),
    ],
)
def test_invalidate_has_limits(iommu: File, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_HWPT_INVALIDATE(iommu, hwpt_id=99, data_uptr=8, **fields)


@pytest.mark.since("6.8")
def test_invalidate_that_cannot_write_back_is_efault(iommu: File) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_HWPT_INVALIDATE.make(hwpt_id=99))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HWPT_INVALIDATE.number, memory.page(0))


@pytest.mark.has("invalidate-any-object")
@pytest.mark.needs("iommu", "root", "vfio_cdev")
def test_invalidate_of_a_paging_hwpt_is_einval(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    for object_id in (hwpt, ioas, device.devid):
        with fails(errno.EINVAL):
            IOMMU_HWPT_INVALIDATE(iommu, hwpt_id=object_id)
