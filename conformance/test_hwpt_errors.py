"""IOMMU_HWPT_ALLOC and IOMMU_GET_HW_INFO where no device is: the checks that come before the device is looked up.

Mirrors the heads of iommufd_hwpt_alloc() and iommufd_get_hw_info(). With a device: test_hwpt_alloc.py.
"""

from __future__ import annotations

import errno

import pytest

from conformance.steps import U32_MAX, U64_MAX, fails, ioas_alloc
from uapi.backend import File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_DATA_VTD_S1,
)

pytestmark = pytest.mark.since("6.6")


@pytest.mark.parametrize("dev_id", [0, 1, 2, U32_MAX], ids=["zero", "ioas", "free", "max"])
def test_hwpt_alloc_for_an_unknown_device_is_enoent(iommu: File, dev_id: int) -> None:
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=dev_id, pt_id=ioas_alloc(iommu))


def test_hwpt_alloc_looks_at_the_device_before_the_page_table(iommu: File) -> None:
    """A missing pt_id would be EINVAL."""
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=98)


@pytest.mark.parametrize("flags", [1, 2, 4, 8, 16, U32_MAX])
def test_hwpt_alloc_looks_at_the_device_before_the_flags(iommu: File, flags: int) -> None:
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, flags=flags, dev_id=99, pt_id=ioas_alloc(iommu))


@pytest.mark.since("6.7")
def test_hwpt_alloc_with_the_reserved_field_is_eopnotsupp(iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=98, __reserved=1, data_len=8)


@pytest.mark.since("6.11")
def test_hwpt_alloc_does_not_look_at_the_second_reserved_field(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=98, __reserved2=1)


@pytest.mark.since("6.7")
@pytest.mark.parametrize(
    ("data_type", "data_len"),
    [(0, 1), (0, U32_MAX), (IOMMU_HWPT_DATA_VTD_S1, 0), (U32_MAX, 0)],
    ids=["length_without_type", "any_length_without_type", "type_without_length", "any_type_without_length"],
)
def test_hwpt_alloc_with_half_a_description_of_its_data_is_einval(iommu: File, data_type: int, data_len: int) -> None:
    with fails(errno.EINVAL):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=98, data_type=data_type, data_len=data_len)


@pytest.mark.since("6.7")
@pytest.mark.parametrize("data_type", [IOMMU_HWPT_DATA_VTD_S1, U32_MAX])
def test_hwpt_alloc_does_not_read_its_data_before_the_device_is_known(iommu: File, data_type: int) -> None:
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=98, data_type=data_type, data_len=8, data_uptr=8)


def test_hwpt_alloc_that_fails_leaves_no_gap(iommu: File) -> None:
    ioas = ioas_alloc(iommu)
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=99, pt_id=ioas)
    assert ioas_alloc(iommu) == ioas + 1


@pytest.mark.parametrize("dev_id", [0, 1, 2, U32_MAX], ids=["zero", "ioas", "free", "max"])
def test_hw_info_of_an_unknown_device_is_enoent(iommu: File, dev_id: int) -> None:
    ioas_alloc(iommu)
    with fails(errno.ENOENT):
        IOMMU_GET_HW_INFO(iommu, dev_id=dev_id)


@pytest.mark.since("6.17")
@pytest.mark.parametrize("flags", [2, 3, 0x8000_0000, U32_MAX])
def test_hw_info_with_an_unknown_flag_is_eopnotsupp(iommu: File, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO(iommu, flags=flags, dev_id=99)


@pytest.mark.since("6.17")
def test_hw_info_knows_the_flag_of_an_input_type(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_GET_HW_INFO(iommu, flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE, dev_id=99, in_data_type=U32_MAX)


@pytest.mark.since("6.15")
@pytest.mark.parametrize("index", [0, 1, 2])
def test_hw_info_with_a_reserved_byte_is_eopnotsupp(iommu: File, index: int) -> None:
    arg = IOMMU_GET_HW_INFO.make(dev_id=99)
    getattr(arg, "__reserved")[index] = 1
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO.raw(iommu, arg)


@pytest.mark.since("6.7")
def test_hw_info_does_not_look_at_its_outputs(iommu: File) -> None:
    with fails(errno.ENOENT):
        IOMMU_GET_HW_INFO(
            iommu, dev_id=99, data_len=U32_MAX, data_uptr=U64_MAX, out_max_pasid_log2=255, out_capabilities=U64_MAX
        )
