"""A release is what its headers had: flags that came later are refused, capabilities that came later are not shown."""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.mock import mock_domain
from conformance.mock_dirty import tracked_hwpt
from conformance.steps import fails
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU
from uapi.cstruct import OLDEST
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_GET_DIRTY_BITMAP,
    IOMMU_IOAS_ALLOC,
)
from uapi.version import MAINLINE

EDU = "0000:00:10.0"


@pytest.mark.parametrize(("release", "error"), [("6.12", errno.EOPNOTSUPP), ("6.13", 0), ("7.3", 0)])
def test_hwpt_flag_pasid_came_with_6_13(release: str, error: int) -> None:
    with Kernel(version=release) as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, EDU) as device:
        dev_id = device.bind(iommu)
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        got = 0
        try:
            IOMMU_HWPT_ALLOC(iommu, dev_id=dev_id, pt_id=ioas, flags=IOMMU_HWPT_ALLOC_PASID)
        except OSError as failed:
            got = failed.errno or 0
        assert got == error


@pytest.mark.parametrize(("release", "error"), [("6.16", errno.EOPNOTSUPP), ("6.17", 0)])
def test_hw_info_flag_input_type_came_with_6_17(release: str, error: int) -> None:
    with Kernel(version=release) as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, EDU) as device:
        dev_id = device.bind(iommu)
        got = 0
        try:
            IOMMU_GET_HW_INFO(iommu, dev_id=dev_id, flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE)
        except OSError as failed:
            got = failed.errno or 0
        assert got == error


@pytest.mark.parametrize(("release", "shown"), [("6.12", 0), ("7.3", IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED)])
def test_hw_info_tells_of_missing_ats_since_7_2(release: str, shown: int) -> None:
    with Kernel(version=release) as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, EDU) as device:
        assert IOMMU_GET_HW_INFO(iommu, dev_id=device.bind(iommu)).out_capabilities == shown


@pytest.mark.parametrize(("release", "there"), [("6.5", False), ("6.6", True)])
def test_vfio_device_nodes_came_with_6_6(release: str, there: bool) -> None:
    with Kernel(version=release) as kernel:
        try:
            kernel.listdir("/dev/vfio/devices")
            found = True
        except OSError:
            found = False
        assert found == there


@pytest.mark.parametrize("machine", ["q35-vtd-legacy", "mock"])
@pytest.mark.parametrize(
    ("release", "beside"), [("6.7", True), ("6.8", False), ("6.12.117", False), ("6.16", False), ("6.17", True)]
)
def test_mock_device_beside_a_real_iommu_came_with_6_17(release: str, beside: bool, machine: str) -> None:
    with Kernel(machine, release) as kernel, kernel.open(DEV_IOMMU) as iommu:
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        if beside or machine == "mock":
            assert mock_domain(iommu, ioas).stdev == 2
            return
        for page_table in (ioas, 99):
            with fails(errno.EINVAL):
                mock_domain(iommu, page_table)
        assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == ioas + 1


@pytest.mark.parametrize(
    ("release", "error"),
    [
        ("6.12.95", errno.EOVERFLOW),
        ("6.12.117", errno.EINVAL),
        ("6.13", errno.EOVERFLOW),
        ("7.2", errno.EOVERFLOW),
        ("7.3", errno.EINVAL),
    ],
)
def test_dirty_bitmap_of_no_bytes_is_einval_since_7_3(release: str, error: int) -> None:
    with Kernel("mock", release) as kernel, kernel.open(DEV_IOMMU) as iommu:
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        hwpt = tracked_hwpt(iommu, mock_domain(iommu, ioas).idev, ioas)
        with fails(error):
            IOMMU_HWPT_GET_DIRTY_BITMAP(iommu, hwpt_id=hwpt, iova=4096, length=0, page_size=4096)


@pytest.mark.parametrize("release", [release for release in MAINLINE if release != OLDEST])
def test_every_release_boots_on_every_machine(release: str) -> None:
    for machine in ("bare", "mock", "q35-vtd-legacy"):
        with Kernel(machine, release) as kernel, kernel.open(DEV_IOMMU) as iommu:
            assert kernel.release == release
            assert IOMMU_IOAS_ALLOC(iommu).out_ioas_id == 1
