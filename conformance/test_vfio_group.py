"""Two devices of one IOMMU group: ownership, attach, replace and detach.

Mirrors the parts of drivers/iommu/iommufd/device.c that are about `struct iommufd_group`, and the ownership of groups
in drivers/iommu/iommu.c. It needs a machine whose two `edu` functions no access control keeps apart:
`iommulab conformance --machine q35-vtd-multifunction vfio_group`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from conformance.drivers.edu import BUFFER_SIZE, Edu, edu_functions
from conformance.drivers.vfio import VfioDevice, iommu_group, take
from conformance.layout import Layout
from conformance.steps import PAGE, U64_MAX, destroy, fails, hwpt_alloc, ioas_alloc, iova_ranges, map_user
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
)

pytestmark = [pytest.mark.needs("iommu", "edu_pair"), pytest.mark.since("6.6")]

IOVA = 0x10_0000

Pair = tuple[VfioDevice, VfioDevice]


@pytest.fixture
def pair(kernel: Backend) -> Iterator[Pair]:
    """Both functions, open and not bound."""
    # Not recorded: whether vfio-pci has them already depends on the tests before.
    inner = getattr(kernel, "inner", kernel)
    addresses = edu_functions(inner)[:2]
    for address in addresses:
        take(inner, address)
    with ExitStack() as stack:
        first, second = (stack.enter_context(VfioDevice(kernel, address)) for address in addresses)
        yield first, second


@pytest.fixture
def bound(iommu: File, pair: Pair) -> Pair:
    """Both bound to `iommu`, objects 1 and 2."""
    for device in pair:
        device.bind(iommu)
    return pair


def attach_both(pair: Pair, pt_id: int) -> int:
    """Attach one after the other; the HWPT."""
    return [device.attach(pt_id) for device in pair][-1]


# -- ownership --------------------------------------------------------------------------------------------------------


def test_functions_of_one_slot_share_a_group(kernel: Backend, pair: Pair) -> None:
    groups = [iommu_group(kernel, device.address) for device in pair]
    assert groups[0] == groups[1]


def test_both_bind_to_one_iommufd(bound: Pair) -> None:
    assert [device.devid for device in bound] == [1, 2]


def test_second_iommufd_is_refused_until_both_are_closed(kernel: Backend, iommu: File, bound: Pair) -> None:
    first, second = bound
    with kernel.open("/dev/iommu") as other:
        second.close()
        with VfioDevice(kernel, second.address) as again:
            with fails(errno.EPERM):
                again.bind(other)
            first.close()
            assert again.bind(other) == 1


def test_group_is_blocked_until_one_attaches(kernel: Backend, iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    buffer = kernel.buffer(PAGE)
    map_user(iommu, ioas, buffer.address, PAGE, IOVA)
    first.attach(ioas)
    driver = Edu(second)
    driver.store(IOVA, 16)
    buffer.view[:16] = b"\xa5" * 16
    driver.load(IOVA, 16)
    driver.store(IOVA + 32, 16)
    assert bytes(buffer.view[32:48]) == b"\xa5" * 16
    first.detach()
    buffer.view[:64] = bytes(64)
    driver.store(IOVA, 16)
    assert bytes(buffer.view[:64]) == bytes(64)
    driver.remove()
    buffer.close()


# -- attach -----------------------------------------------------------------------------------------------------------


def test_second_joins_on_the_same_ioas(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt = first.attach(ioas)
    assert second.attach(ioas) == hwpt == ioas + 1


def test_second_joins_by_the_hwpts_id(iommu: File, bound: Pair) -> None:
    first, second = bound
    hwpt = first.attach(ioas_alloc(iommu))
    assert second.attach(hwpt) == hwpt


def test_second_cannot_go_elsewhere_and_no_hwpt_is_left(iommu: File, bound: Pair) -> None:
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    first.attach(here)
    own = hwpt_alloc(iommu, second.devid, here)
    for number in (there, own):
        with fails(errno.EINVAL):
            second.attach(number)
    assert iova_ranges(iommu, there) == [(0, U64_MAX)]
    destroy(iommu, own)
    destroy(iommu, there)
    assert ioas_alloc(iommu) == there


def test_refused_second_leaves_no_reservation(iommu: File, bound: Pair, layout: Layout) -> None:
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    first.attach(here)
    other = hwpt_alloc(iommu, second.devid, there)
    with fails(errno.EINVAL):
        second.attach(other)
    assert iova_ranges(iommu, there) == layout.aperture


def test_each_member_holds_the_hwpt(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt = hwpt_alloc(iommu, first.devid, ioas)
    for device in bound:
        device.attach(hwpt)
    first.detach()
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    second.detach()
    destroy(iommu, hwpt)


def test_automatic_hwpt_goes_with_the_last_member(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt = attach_both(bound, ioas)
    first.detach()
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    second.detach()
    with fails(errno.ENOENT):
        destroy(iommu, hwpt)


def test_member_that_left_leaves_the_other_attached(kernel: Backend, iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    buffer = kernel.buffer(PAGE)
    map_user(iommu, ioas, buffer.address, PAGE, IOVA)
    for device in bound:
        device.attach(ioas)
    first.close()
    driver = Edu(second)
    buffer.view[:16] = b"\x5a" * 16
    driver.load(IOVA, 16)
    driver.store(IOVA + BUFFER_SIZE - 16, 16)
    assert bytes(buffer.view[PAGE - 16 :]) == b"\x5a" * 16
    driver.remove()
    buffer.close()


def test_member_that_left_may_come_back_to_the_same_only(iommu: File, bound: Pair) -> None:
    first, _ = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    hwpt = attach_both(bound, here)
    first.detach()
    with fails(errno.EINVAL):
        first.attach(there)
    assert first.attach(here) == hwpt


def test_reservation_stays_until_the_last_member_leaves(iommu: File, bound: Pair, layout: Layout) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt = hwpt_alloc(iommu, first.devid, ioas)
    for device in bound:
        device.attach(hwpt)
    assert iova_ranges(iommu, ioas) == layout.attached
    first.detach()
    assert iova_ranges(iommu, ioas) == layout.attached
    second.detach()
    assert iova_ranges(iommu, ioas) == layout.aperture


# -- replace ----------------------------------------------------------------------------------------------------------


def test_replace_of_one_moves_both(kernel: Backend, iommu: File, bound: Pair) -> None:
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    buffer = kernel.buffer(2 * PAGE)
    map_user(iommu, here, buffer.address, PAGE, IOVA)
    map_user(iommu, there, buffer.address + PAGE, PAGE, IOVA)
    for device in bound:
        device.attach(here)
    driver = Edu(second)
    buffer.view[:16], buffer.view[PAGE : PAGE + 16] = b"\x11" * 16, b"\x22" * 16
    first.attach(there)
    driver.load(IOVA, 16)
    driver.store(IOVA + 16, 16)
    assert bytes(buffer.view[PAGE + 16 : PAGE + 32]) == b"\x22" * 16
    assert bytes(buffer.view[16:32]) == bytes(16)
    driver.remove()
    buffer.close()


def test_replace_moves_the_holds_and_the_reservations_of_both(iommu: File, bound: Pair, layout: Layout) -> None:
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    old, new = hwpt_alloc(iommu, first.devid, here), hwpt_alloc(iommu, first.devid, there)
    for device in bound:
        device.attach(old)
    assert first.attach(new) == new
    assert iova_ranges(iommu, here) == layout.aperture
    assert iova_ranges(iommu, there) == layout.attached
    destroy(iommu, old)
    first.detach()
    with fails(errno.EBUSY):
        destroy(iommu, new)
    assert iova_ranges(iommu, there) == layout.attached
    second.detach()
    destroy(iommu, new)


def test_automatic_hwpt_of_both_goes_with_a_replace_of_one(iommu: File, bound: Pair) -> None:
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    old = attach_both(bound, here)
    new = second.attach(there)
    with fails(errno.ENOENT):
        destroy(iommu, old)
    assert first.attach(there) == new
    assert iova_ranges(iommu, here) == [(0, U64_MAX)]


def test_replace_by_a_member_that_is_not_attached_is_einval(iommu: File, bound: Pair) -> None:
    """VFIO asks for a first attachment then, which has to be the group's."""
    first, second = bound
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    hwpt = first.attach(here)
    with fails(errno.EINVAL):
        second.attach(there)
    assert second.attach(here) == hwpt


@pytest.mark.parametrize("both", [False, True])
def test_replace_over_an_area_in_the_interrupt_window_is_eaddrinuse_and_moves_nobody(
    kernel: Backend, iommu: File, bound: Pair, both: bool, layout: Layout
) -> None:
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    buffer = kernel.buffer(PAGE)
    map_user(iommu, there, buffer.address, PAGE, layout.msi_start)
    old = bound[0].attach(here)
    if both:
        bound[1].attach(here)
    with fails(errno.EADDRINUSE):
        bound[0].attach(there)
    assert bound[0].attach(old) == old
    assert iova_ranges(iommu, here) == layout.attached
    assert iova_ranges(iommu, there) == [(0, U64_MAX)]
    buffer.close()


# -- PASIDs: of the group, as everything ------------------------------------------------------------------------------


def pasid_attach(device: VfioDevice, pasid: int, pt_id: int) -> int:
    return VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=pasid, pt_id=pt_id).pt_id


def pasid_detach(device: VfioDevice, pasid: int) -> None:
    VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=pasid)


@pytest.mark.since("6.15")
def test_second_joins_on_a_pasid_or_is_refused(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt, other = (hwpt_alloc(iommu, first.devid, ioas, IOMMU_HWPT_ALLOC_PASID) for _ in range(2))
    assert pasid_attach(first, 1, hwpt) == hwpt
    with fails(errno.EINVAL):
        pasid_attach(second, 1, other)
    assert pasid_attach(second, 1, hwpt) == hwpt
    assert pasid_attach(second, 2, other) == other
    pasid_detach(first, 1)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    pasid_detach(second, 1)
    destroy(iommu, hwpt)


@pytest.mark.since("6.15")
def test_replace_of_a_pasid_moves_it_for_both(iommu: File, bound: Pair) -> None:
    ioas = ioas_alloc(iommu)
    hwpt, other = (hwpt_alloc(iommu, bound[0].devid, ioas, IOMMU_HWPT_ALLOC_PASID) for _ in range(2))
    for device in bound:
        pasid_attach(device, 1, hwpt)
    assert pasid_attach(bound[1], 1, other) == other
    destroy(iommu, hwpt)
    pasid_detach(bound[1], 1)
    with fails(errno.EBUSY):
        destroy(iommu, other)


@pytest.mark.since("6.15")
def test_hwpt_of_one_member_decides_over_the_pasids_of_the_other(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt = hwpt_alloc(iommu, first.devid, ioas, IOMMU_HWPT_ALLOC_PASID)
    first.attach(ioas)
    with fails(errno.EINVAL):
        pasid_attach(second, 1, hwpt)
    first.attach(hwpt)
    assert pasid_attach(second, 1, hwpt) == hwpt
    with fails(errno.EINVAL):
        first.attach(ioas)


@pytest.mark.since("6.15")
def test_close_of_one_member_detaches_its_pasids_only(iommu: File, bound: Pair) -> None:
    first, second = bound
    ioas = ioas_alloc(iommu)
    hwpt, other = (hwpt_alloc(iommu, second.devid, ioas, IOMMU_HWPT_ALLOC_PASID) for _ in range(2))
    pasid_attach(first, 1, hwpt)
    pasid_attach(second, 1, hwpt)
    pasid_attach(first, 2, other)
    first.close()
    destroy(iommu, other)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
