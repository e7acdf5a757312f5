"""HWPT_SET_DIRTY_TRACKING and HWPT_GET_DIRTY_BITMAP on an IOMMU that cannot track: their checks and their order.

Mirrors iommufd_hwpt_set_dirty_tracking(), iommufd_hwpt_get_dirty_bitmap() and iommufd_check_iova_range(). VT-d in
legacy mode has no dirty bits, so a call without fault ends in EOPNOTSUPP.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.mock import check_map
from conformance.mock_dirty import make_dirty
from conformance.steps import PAGE, U32_MAX, U64_MAX, MiB, fails
from uapi.backend import File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING,
)

pytestmark = [pytest.mark.since("6.7"), pytest.mark.needs("iommu", "root", "vfio_cdev")]

ENABLE, NO_CLEAR = IOMMU_HWPT_DIRTY_TRACKING_ENABLE, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR


@pytest.fixture
def hwpt(device: VfioDevice, iommu: File, ioas: int) -> int:
    """A HWPT on `ioas`, with no device attached. Its id is 3, after device and IOAS."""
    return IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 2, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"flags": U32_MAX}, errno.EOPNOTSUPP),
        ({"hwpt_id": 0}, errno.ENOENT),
        ({"hwpt_id": 1}, errno.ENOENT),
        ({"hwpt_id": 2}, errno.ENOENT),
        ({"hwpt_id": 99, "__reserved": 1}, errno.ENOENT),
        ({"flags": ENABLE}, errno.EOPNOTSUPP),
        ({"flags": 0}, errno.EOPNOTSUPP),
        ({"flags": ENABLE, "__reserved": 1}, errno.EOPNOTSUPP),
    ],
)
def test_set_dirty_tracking(iommu: File, hwpt: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_HWPT_SET_DIRTY_TRACKING(iommu, **{"hwpt_id": hwpt, **fields})


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 2, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"__reserved": 1, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"hwpt_id": 0, "length": 0}, errno.ENOENT),
        ({"hwpt_id": 1}, errno.ENOENT),
        ({"hwpt_id": 2}, errno.ENOENT),
        pytest.param({"length": 0}, errno.EINVAL, marks=pytest.mark.has("dirty-bitmap-length-0")),
        pytest.param(
            {"length": 0, "iova": U64_MAX, "page_size": 0},
            errno.EINVAL,
            marks=pytest.mark.has("dirty-bitmap-length-0"),
        ),
        ({"iova": U64_MAX, "length": 2, "page_size": 0}, errno.EOVERFLOW),
        ({"iova": U64_MAX - PAGE + 1, "length": PAGE + 1}, errno.EOVERFLOW),
        ({"iova": 1, "length": PAGE}, errno.EINVAL),
        ({"iova": 0, "length": PAGE + 1}, errno.EINVAL),
        ({"iova": 2048, "length": 2048}, errno.EINVAL),
        ({"page_size": 0}, errno.EINVAL),
        ({"page_size": 2 * MiB}, errno.EINVAL),
        ({"iova": 2 * MiB, "length": 2 * MiB, "page_size": 2 * MiB}, errno.EOPNOTSUPP),
        ({"iova": 2 * MiB, "length": MiB, "page_size": 2 * MiB}, errno.EINVAL),
        ({"page_size": 1}, errno.EOPNOTSUPP),
        ({"page_size": 3}, errno.EOPNOTSUPP),
        ({"page_size": PAGE + 1}, errno.EINVAL),
        ({"iova": U64_MAX - PAGE + 1}, errno.EOPNOTSUPP),
        ({}, errno.EOPNOTSUPP),
        ({"flags": NO_CLEAR}, errno.EOPNOTSUPP),
        ({"data": 0}, errno.EOPNOTSUPP),
        ({"data": U64_MAX}, errno.EOPNOTSUPP),
    ],
)
def test_get_dirty_bitmap(iommu: File, hwpt: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_HWPT_GET_DIRTY_BITMAP(iommu, **{"hwpt_id": hwpt, "length": PAGE, "page_size": PAGE, **fields})


@pytest.mark.needs("mock")
def test_operations_on_mock_domains_refuse_one_of_real_hardware(iommu: File, hwpt: int) -> None:
    with fails(errno.EINVAL):
        make_dirty(iommu, hwpt, 0, 1, 1)
    with fails(errno.EINVAL):
        check_map(iommu, hwpt, 0, 0, 0)
    with fails(errno.ENOENT):
        make_dirty(iommu, 1, 0, 1, 1)
