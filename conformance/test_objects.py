"""Object ids and lifetimes, as far as IOASes alone can show them.

Mirrors the object table of drivers/iommu/iommufd/main.c: ids are the lowest free ones from 1, an id that an ioctl
reserved comes back when the ioctl fails, and DESTROY looks at nothing but the users count.
"""

from __future__ import annotations

import errno
import random

import pytest

from conformance.arena import Arena, arena
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    answer,
    destroy,
    fails,
    ioas_alloc,
    map_user,
)
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_DESTROY, IOMMU_IOAS_ALLOC


def test_ids_count_from_one(iommu: File) -> None:
    assert [ioas_alloc(iommu) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_destroyed_id_is_reused_at_once(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    destroy(iommu, ioas)
    assert ioas_alloc(iommu) == ioas


def test_lowest_free_id_is_taken_first(iommu: File) -> None:
    for _ in range(6):
        ioas_alloc(iommu)
    destroy(iommu, 5)
    destroy(iommu, 2)
    destroy(iommu, 4)
    assert [ioas_alloc(iommu) for _ in range(4)] == [2, 4, 5, 7]


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_always_the_lowest_free(iommu: File, seed: int) -> None:
    rng = random.Random(seed)
    live: set[int] = set()
    for _ in range(60):
        if live and rng.random() < 0.45:
            victim = rng.choice(sorted(live))
            destroy(iommu, victim)
            live.remove(victim)
        else:
            expected = next(number for number in range(1, 100) if number not in live)
            assert ioas_alloc(iommu) == expected
            live.add(expected)


@pytest.mark.parametrize("object_id", [0, 1, 2, 0x7FFF_FFFF, 0x8000_0000, U32_MAX])
def test_destroy_of_an_unknown_id_is_enoent(iommu: File, object_id: int) -> None:
    with fails(errno.ENOENT):
        destroy(iommu, object_id)


def test_second_destroy_is_enoent(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    destroy(iommu, ioas)
    with fails(errno.ENOENT):
        destroy(iommu, ioas)


def test_destroy_leaves_its_neighbours_alone(iommu: File) -> None:
    first, second, third = (ioas_alloc(iommu) for _ in range(3))
    destroy(iommu, second)
    map_user(iommu, first, NOWHERE, PAGE)
    map_user(iommu, third, NOWHERE, PAGE)


def test_mappings_do_not_keep_an_ioas_alive(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, PAGE)
    destroy(iommu, ioas)
    with fails(errno.ENOENT):
        map_user(iommu, ioas, NOWHERE, PAGE)


def test_reused_id_is_a_fresh_ioas(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE)
    destroy(iommu, ioas)
    assert ioas_alloc(iommu) == ioas
    map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE)


def test_failing_allocation_leaves_no_gap(iommu: File) -> None:
    assert ioas_alloc(iommu) == 1
    assert answer(IOMMU_IOAS_ALLOC, iommu, flags=1) == errno.EOPNOTSUPP
    assert ioas_alloc(iommu) == 2


def test_allocation_whose_reply_faults_is_undone(iommu: File) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_IOAS_ALLOC.make())
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, memory.page(0))
    with fails(errno.ENOENT):
        destroy(iommu, 1)
    assert ioas_alloc(iommu) == 1


def test_destroy_does_not_write_its_argument(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    arg = IOMMU_DESTROY.make(id=ioas)
    IOMMU_DESTROY.raw(iommu, arg)
    assert (arg.size, arg.id) == (8, ioas)


@pytest.mark.needs("iommu")
def test_closing_ends_a_context_with_mapped_ioases(kernel: Backend) -> None:
    with kernel.open("/dev/iommu") as iommu:
        for _ in range(8):
            ioas = ioas_alloc(iommu)
            map_user(iommu, ioas, NOWHERE, 16 * PAGE)
            map_user(iommu, ioas, NOWHERE, 16 * PAGE)
    with kernel.open("/dev/iommu") as iommu:
        assert ioas_alloc(iommu) == 1


def test_many_objects_can_live_at_once(iommu: File) -> None:
    ids = [ioas_alloc(iommu) for _ in range(300)]
    assert ids == list(range(1, 301))
    for number in reversed(ids):
        destroy(iommu, number)
    assert ioas_alloc(iommu) == 1
