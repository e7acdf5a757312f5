"""IOMMU_VDEVICE_ALLOC on the mock driver: ids, uniqueness, and what becomes of a vDEVICE whose device goes away.

Mirrors iommufd_vdevice_alloc_ioctl() of drivers/iommu/iommufd/viommu.c, iommufd_device_remove_vdev() of device.c and
iommufd_object_tombstone_user().
"""

from __future__ import annotations

import errno

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.mock import mock_domain, mock_replace
from conformance.mock_guest import (
    Guest,
    guest,
    invalidate,
    invalidation,
    nested_hwpt,
    vdevice_alloc,
    veventq_alloc,
    viommu_alloc,
)
from conformance.steps import U64_MAX, answer, destroy, fails, ioas_alloc, option_set
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_OPTION_RLIMIT_MODE, IOMMU_VDEVICE_ALLOC

pytestmark = [pytest.mark.needs("iommu", "mock"), pytest.mark.since("6.13")]


@pytest.fixture
def ids(iommu: File) -> Guest:
    return guest(iommu)


# -- allocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("virt_id", [0, 1, 0x99, 1 << 32, U64_MAX])
def test_any_virtual_id_will_do(iommu: File, ids: Guest, virt_id: int) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, virt_id)
    assert vdevice == ids.viommu + 1
    destroy(iommu, vdevice)
    with fails(errno.ENOENT):
        destroy(iommu, vdevice)
    assert vdevice_alloc(iommu, ids.viommu, ids.idev, virt_id) == vdevice


def test_order_of_the_checks(iommu: File, ids: Guest) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    for fields, number in (
        ({"viommu_id": 99, "dev_id": 99}, errno.ENOENT),
        ({"viommu_id": ids.parent, "dev_id": ids.idev}, errno.ENOENT),
        ({"viommu_id": ids.viommu, "dev_id": 99}, errno.ENOENT),
        ({"viommu_id": ids.viommu, "dev_id": ids.stdev}, errno.ENOENT),
        ({"viommu_id": vdevice, "dev_id": ids.idev}, errno.ENOENT),
        ({"viommu_id": 0, "dev_id": ids.idev}, errno.ENOENT),
        ({"viommu_id": ids.viommu, "dev_id": ids.idev, "virt_id": 1}, errno.EEXIST),
    ):
        assert answer(IOMMU_VDEVICE_ALLOC, iommu, **fields) == number, fields
    assert ioas_alloc(iommu) == vdevice + 1


def test_virtual_id_is_taken_once_in_a_viommu(iommu: File, ids: Guest) -> None:
    one, two = mock_domain(iommu, ids.ioas), mock_domain(iommu, ids.ioas)
    first = vdevice_alloc(iommu, ids.viommu, one.idev, 7)
    with fails(errno.EEXIST):
        vdevice_alloc(iommu, ids.viommu, two.idev, 7)
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    assert other == first + 1  # the refused one has left no id
    vdevice_alloc(iommu, other, two.idev, 7)
    destroy(iommu, first)
    vdevice_alloc(iommu, ids.viommu, one.idev, 7)


@pytest.mark.since("6.17")
def test_device_has_one_vdevice(iommu: File, ids: Guest) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    other = viommu_alloc(iommu, ids.idev, ids.parent)
    for viommu in (ids.viommu, other):
        with fails(errno.EEXIST):
            vdevice_alloc(iommu, viommu, ids.idev, 2)
    destroy(iommu, vdevice)
    vdevice_alloc(iommu, other, ids.idev, 2)


@pytest.mark.since("6.17")
def test_refused_virtual_id_leaves_the_device_free(iommu: File, ids: Guest) -> None:
    other = mock_domain(iommu, ids.ioas)
    vdevice_alloc(iommu, ids.viommu, other.idev, 5)
    with fails(errno.EEXIST):
        vdevice_alloc(iommu, ids.viommu, ids.idev, 5)
    # The refused vDEVICE has not taken the virtual id away from its owner either.
    assert invalidate(iommu, ids.viommu, invalidation(5, 0)) == 1
    vdevice_alloc(iommu, ids.viommu, ids.idev, 6)


def test_vdevice_holds_the_viommu(iommu: File, ids: Guest) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    with fails(errno.EBUSY):
        destroy(iommu, ids.viommu)
    destroy(iommu, vdevice)
    destroy(iommu, ids.viommu)


def test_device_of_the_context_cannot_be_destroyed_by_its_id(iommu: File, ids: Guest) -> None:
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    with fails(errno.EBUSY):
        destroy(iommu, ids.idev)


def test_reply_that_cannot_be_written_leaves_no_vdevice(iommu: File, ids: Guest) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_VDEVICE_ALLOC.make(viommu_id=ids.viommu, dev_id=ids.idev, virt_id=1))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_VDEVICE_ALLOC.number, memory.page(0))
    assert vdevice_alloc(iommu, ids.viommu, ids.idev, 1) == ids.viommu + 1


@pytest.mark.needs("root", "vfio_cdev")
def test_device_behind_another_iommu_is_einval(device: VfioDevice, iommu: File) -> None:
    """The VFIO device is object 1 here."""
    ids = guest(iommu)
    for virt_id in (1, U64_MAX):
        with fails(errno.EINVAL):
            vdevice_alloc(iommu, ids.viommu, device.devid, virt_id)


# -- tombstones ------------------------------------------------------------------------------------------------------


@pytest.mark.since("6.17")
def test_id_of_a_vdevice_whose_device_went_is_never_used_again(iommu: File, ids: Guest) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    destroy(iommu, ids.stdev)
    with fails(errno.ENOENT):
        destroy(iommu, vdevice)
    # The ids of the mock device (2, 3), of its automatic HWPT (4), then those behind the tombstone.
    assert [ioas_alloc(iommu) for _ in range(5)] == [2, 3, 4, vdevice + 1, vdevice + 2]
    with fails(errno.ENOENT):
        destroy(iommu, vdevice)


@pytest.mark.since("6.17")
def test_device_that_goes_frees_the_viommu_and_the_virtual_id(iommu: File, ids: Guest) -> None:
    other = mock_domain(iommu, ids.ioas)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    destroy(iommu, ids.stdev)
    vdevice = vdevice_alloc(iommu, ids.viommu, other.idev, 0x99)
    destroy(iommu, vdevice)
    destroy(iommu, ids.viommu)
    destroy(iommu, ids.parent)


@pytest.mark.since("6.17")
def test_device_goes_while_attached_within_the_viommu(iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    mock_replace(iommu, ids.stdev, nested)
    destroy(iommu, ids.stdev)
    with fails(errno.EINVAL):
        invalidate(iommu, ids.viommu, invalidation(0x99, 0))
    for number in (nested, ids.viommu, ids.parent, ids.ioas):
        destroy(iommu, number)


@pytest.mark.since("6.17")
def test_device_without_a_vdevice_leaves_no_tombstone(iommu: File, ids: Guest) -> None:
    vdevice = vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    destroy(iommu, vdevice)
    destroy(iommu, ids.stdev)
    assert [ioas_alloc(iommu) for _ in range(4)] == [2, 3, 4, vdevice]


@pytest.mark.since("6.17")
@pytest.mark.needs("root")
def test_tombstone_counts_as_an_object(iommu: File, ids: Guest) -> None:
    vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
    for number in (ids.stdev, ids.viommu, ids.parent, ids.ioas):
        destroy(iommu, number)
    for number in range(1, 9):
        with fails(errno.ENOENT):
            destroy(iommu, number)
    with fails(errno.EBUSY):
        option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, 1)


@pytest.mark.since("6.17")
def test_many_tombstones_go_with_the_context(kernel: Backend, iommu: File, ids: Guest) -> None:
    numbers = []
    for _ in range(20):
        device = mock_domain(iommu, ids.ioas)
        numbers.append(vdevice_alloc(iommu, ids.viommu, device.idev, 1))
        destroy(iommu, device.stdev)
    assert numbers == list(range(ids.viommu + 3, ids.viommu + 23))
    iommu.close()
    with kernel.open("/dev/iommu") as again:
        assert guest(again) == ids


@pytest.mark.since("6.17")
@pytest.mark.needs("root", "vfio_cdev")
def test_vfio_device_closes_without_a_vdevice(device: VfioDevice, iommu: File) -> None:
    ids = guest(iommu)
    with fails(errno.EINVAL):
        vdevice_alloc(iommu, ids.viommu, device.devid, 1)
    device.close()
    assert ioas_alloc(iommu) == 1


# -- closing ---------------------------------------------------------------------------------------------------------


@pytest.mark.since("6.15")
def test_close_with_everything_alive(kernel: Backend, iommu: File, ids: Guest) -> None:
    nested = nested_hwpt(iommu, ids.idev, ids.viommu)
    vdevice_alloc(iommu, ids.viommu, ids.idev, 1)
    mock_replace(iommu, ids.stdev, nested)
    _, events = veventq_alloc(kernel, iommu, ids.viommu)
    iommu.close()
    events.close()
    with kernel.open("/dev/iommu") as again:
        assert guest(again) == ids
