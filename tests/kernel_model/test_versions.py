"""A release is what its headers had: flags that came later are refused, capabilities that came later are not shown."""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.vfio import VfioDevice
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_IOAS_ALLOC,
)

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
