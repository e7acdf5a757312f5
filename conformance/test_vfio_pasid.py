"""PASIDs of a VFIO device that has none, behind VT-d in legacy mode: the rules of HWPTs hold, the hardware's do not.

Mirrors drivers/vfio/iommufd.c and drivers/iommu/iommufd/device.c with a PASID; the rules among HWPTs with real PASIDs
are in test_mock_pasid.py, those of the arguments in test_vfio_cdev.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.vfio import VfioDevice
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

pytestmark = [pytest.mark.needs("iommu", "dma_device", "vfio_cdev"), pytest.mark.since("6.15")]


def attach(device: VfioDevice, pasid: int, pt_id: int) -> int:
    """ATTACH of a PASID; the HWPT."""
    reply = VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=pasid, pt_id=pt_id)
    return reply.pt_id


def detach(device: VfioDevice, pasid: int) -> None:
    VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=pasid)


def for_pasids(iommu: File, device: VfioDevice, ioas: int) -> int:
    return hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_ALLOC_PASID)


@pytest.mark.parametrize("pasid", [1, 1 << 20, 0x7FFF_FFFF])
def test_any_number_is_taken_by_a_device_without_pasids(device: VfioDevice, iommu: File, ioas: int, pasid: int) -> None:
    hwpt = for_pasids(iommu, device, ioas)
    assert attach(device, pasid, hwpt) == hwpt
    detach(device, pasid)
    destroy(iommu, hwpt)


def test_attach_of_a_pasid_that_is_attached_is_a_replace(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt, other = for_pasids(iommu, device, ioas), for_pasids(iommu, device, ioas)
    attach(device, 5, hwpt)
    assert attach(device, 5, other) == other
    destroy(iommu, hwpt)
    assert attach(device, 5, other) == other
    with fails(errno.EBUSY):
        destroy(iommu, other)


def test_refused_replace_of_a_pasid_keeps_the_old(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt, plain = for_pasids(iommu, device, ioas), hwpt_alloc(iommu, device.devid, ioas)
    attach(device, 5, hwpt)
    for number in (plain, ioas):
        with fails(errno.EINVAL):
            attach(device, 5, number)
    with fails(errno.ENOENT):
        attach(device, 5, 99)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    destroy(iommu, plain)


def test_hwpt_without_the_flag_is_einval(device: VfioDevice, iommu: File, ioas: int) -> None:
    plain = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EINVAL):
        attach(device, 1, plain)
    device.attach(plain)
    with fails(errno.EINVAL):
        attach(device, 1, for_pasids(iommu, device, ioas))


def test_pasid_zero_with_the_flag_is_the_devices_own_attachment(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    """VFIO counts it among the PASIDs, iommufd does not."""
    hwpt = attach(device, 0, ioas)
    assert iova_ranges(iommu, ioas) == layout.attached
    with fails(errno.EBUSY):
        device.attach(ioas)
    detach(device, 0)
    with fails(errno.ENOENT):
        destroy(iommu, hwpt)


def test_pasid_reserves_nothing(kernel: Backend, device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    hwpt = for_pasids(iommu, device, ioas)
    attach(device, 1, hwpt)
    assert iova_ranges(iommu, ioas) == layout.aperture
    buffer = kernel.buffer(PAGE)
    map_user(iommu, ioas, buffer.address, PAGE, layout.msi_start)
    with fails(errno.EADDRINUSE):
        device.attach(hwpt)
    assert iova_ranges(iommu, ioas) == layout.aperture
    detach(device, 1)
    buffer.close()


def test_own_attachment_reserves_beside_a_pasid_and_gives_back_alone(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    other = ioas_alloc(iommu)
    hwpt, elsewhere = for_pasids(iommu, device, ioas), for_pasids(iommu, device, other)
    attach(device, 1, elsewhere)
    device.attach(hwpt)
    assert (iova_ranges(iommu, ioas), iova_ranges(iommu, other)) == (layout.attached, layout.aperture)
    attach(device, 1, hwpt)
    assert (iova_ranges(iommu, ioas), iova_ranges(iommu, other)) == (layout.attached, layout.aperture)
    detach(device, 1)
    assert iova_ranges(iommu, ioas) == layout.attached
    device.detach()
    assert iova_ranges(iommu, ioas) == layout.aperture


def test_own_attachment_needs_the_flag_while_a_pasid_is_attached(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    other = ioas_alloc(iommu)
    hwpt = for_pasids(iommu, device, ioas)
    attach(device, 1, hwpt)
    for number in (other, hwpt_alloc(iommu, device.devid, ioas)):
        with fails(errno.EINVAL):
            device.attach(number)
    assert iova_ranges(iommu, other) == [(0, U64_MAX)]
    assert iova_ranges(iommu, ioas) == layout.aperture
    assert device.attach(hwpt) == hwpt


def test_refused_replace_within_an_ioas_gives_up_its_reservation(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    """The kernel takes the regions back from the IOAS that the device was to go to, which is where it stays."""
    hwpt, plain = for_pasids(iommu, device, ioas), hwpt_alloc(iommu, device.devid, ioas)
    attach(device, 1, hwpt)
    device.attach(hwpt)
    assert iova_ranges(iommu, ioas) == layout.attached
    with fails(errno.EINVAL):
        device.attach(plain)
    assert iova_ranges(iommu, ioas) == layout.aperture
    device.detach()
    assert iova_ranges(iommu, ioas) == layout.aperture


def test_refused_replace_by_another_ioas_keeps_the_reservation(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    other = ioas_alloc(iommu)
    hwpt = for_pasids(iommu, device, ioas)
    attach(device, 1, hwpt)
    device.attach(hwpt)
    with fails(errno.EINVAL):
        device.attach(other)
    assert iova_ranges(iommu, ioas) == layout.attached
    assert iova_ranges(iommu, other) == [(0, U64_MAX)]


def test_closing_the_device_detaches_every_pasid(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpts = [for_pasids(iommu, device, ioas) for _ in range(3)]
    for pasid, hwpt in enumerate(hwpts, 1):
        attach(device, pasid, hwpt)
    device.attach(hwpts[0])
    device.close()
    for hwpt in hwpts:
        destroy(iommu, hwpt)
    destroy(iommu, ioas)
