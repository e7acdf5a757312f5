"""IOMMU_VFIO_IOAS: which IOAS the VFIO compatibility ioctls of a context work on.

Mirrors iommufd_vfio_ioas() of drivers/iommu/iommufd/vfio_compat.c. The ioctls themselves are in test_vfio_compat.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.steps import U32_MAX, destroy, fails, ioas_alloc
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_VFIO_IOAS,
    IOMMU_VFIO_IOAS_CLEAR,
    IOMMU_VFIO_IOAS_GET,
    IOMMU_VFIO_IOAS_SET,
)

GET, SET, CLEAR = IOMMU_VFIO_IOAS_GET, IOMMU_VFIO_IOAS_SET, IOMMU_VFIO_IOAS_CLEAR


def get(iommu: File) -> int:
    return IOMMU_VFIO_IOAS(iommu, op=GET).ioas_id


def set_(iommu: File, ioas: int) -> None:
    IOMMU_VFIO_IOAS(iommu, op=SET, ioas_id=ioas)


def clear(iommu: File) -> None:
    IOMMU_VFIO_IOAS(iommu, op=CLEAR)


def test_get_without_one_is_enodev(iommu: File) -> None:
    ioas_alloc(iommu)
    with fails(errno.ENODEV):
        get(iommu)


def test_set_is_seen_by_get(iommu: File) -> None:
    ioas_alloc(iommu)
    ioas = ioas_alloc(iommu)
    set_(iommu, ioas)
    assert get(iommu) == ioas


def test_set_replaces(iommu: File) -> None:
    first, second = ioas_alloc(iommu), ioas_alloc(iommu)
    set_(iommu, first)
    set_(iommu, second)
    assert get(iommu) == second


@pytest.mark.parametrize("object_id", [0, 2, U32_MAX])
def test_set_of_an_unknown_ioas_is_enoent_and_changes_nothing(iommu: File, object_id: int) -> None:
    ioas = ioas_alloc(iommu)
    set_(iommu, ioas)
    with fails(errno.ENOENT):
        set_(iommu, object_id)
    assert get(iommu) == ioas


def test_clear_forgets(iommu: File) -> None:
    set_(iommu, ioas_alloc(iommu))
    clear(iommu)
    with fails(errno.ENODEV):
        get(iommu)


def test_clear_of_nothing_succeeds(iommu: File) -> None:
    clear(iommu)
    clear(iommu)


@pytest.mark.parametrize("object_id", [0, 77])
def test_clear_ignores_the_id(iommu: File, object_id: int) -> None:
    set_(iommu, ioas_alloc(iommu))
    IOMMU_VFIO_IOAS(iommu, op=CLEAR, ioas_id=object_id)
    with fails(errno.ENODEV):
        get(iommu)


def test_get_ignores_the_id(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    set_(iommu, ioas)
    assert IOMMU_VFIO_IOAS(iommu, op=GET, ioas_id=77).ioas_id == ioas


@pytest.mark.parametrize("op", [3, 4, 0xFFFF])
def test_unknown_op_is_eopnotsupp(iommu: File, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_VFIO_IOAS(iommu, op=op, ioas_id=ioas_alloc(iommu))


@pytest.mark.parametrize("op", [GET, SET, CLEAR, 3], ids=["get", "set", "clear", "unknown"])
def test_reserved_field_is_eopnotsupp(iommu: File, op: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_VFIO_IOAS(iommu, op=op, ioas_id=99, __reserved=1)


def test_it_holds_no_reference(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    set_(iommu, ioas)
    destroy(iommu, ioas)
    with fails(errno.ENODEV):
        get(iommu)


def test_a_new_ioas_with_the_old_id_does_not_take_its_place(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    set_(iommu, ioas)
    destroy(iommu, ioas)
    assert ioas_alloc(iommu) == ioas
    with fails(errno.ENODEV):
        get(iommu)


def test_destroying_another_ioas_does_not_matter(iommu: File) -> None:
    first, second = ioas_alloc(iommu), ioas_alloc(iommu)
    set_(iommu, first)
    destroy(iommu, second)
    assert get(iommu) == first


def test_it_is_the_contexts_own(kernel: Backend, iommu: File) -> None:
    set_(iommu, ioas_alloc(iommu))
    with kernel.open("/dev/iommu") as other, fails(errno.ENODEV):
        get(other)


def test_set_and_clear_reply_nothing(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_VFIO_IOAS.make(op=SET, ioas_id=ioas))
        memory.read_only(0)
        iommu.ioctl(IOMMU_VFIO_IOAS.number, memory.page(0))
    assert get(iommu) == ioas


def test_reply_fault_of_get_is_efault(iommu: File) -> None:
    set_(iommu, ioas_alloc(iommu))
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_VFIO_IOAS.make(op=GET))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_VFIO_IOAS.number, memory.page(0))
