"""What GET_HW_INFO says of a device behind an SMMUv3: the unit's identification registers, as they are.

Mirrors arm_smmu_hw_info() of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c behind iommufd_get_hw_info().
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import U32_MAX, fails
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_AMD,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV,
    iommu_hw_info_arm_smmuv3,
)

pytestmark = [pytest.mark.needs("iommu", "root", "vfio_cdev", "smmuv3"), pytest.mark.since("6.13")]

SMMUV3 = IOMMU_HW_INFO_TYPE_ARM_SMMUV3
LENGTH = ctypes.sizeof(iommu_hw_info_arm_smmuv3)


def registers(iommu: File, dev_id: int) -> iommu_hw_info_arm_smmuv3:
    data = iommu_hw_info_arm_smmuv3()
    IOMMU_GET_HW_INFO(iommu, dev_id=dev_id, data_len=LENGTH, data_uptr=ctypes.addressof(data))
    return data


def test_type_and_length(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid)
    assert (info.out_data_type, info.data_len) == (SMMUV3, 40)


def test_registers_are_the_unit_s(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    """Every one of them, compared between kernels."""
    data = registers(iommu, device.devid)
    words = [f"{word:#x}" for word in (*data.idr, data.iidr, data.aidr)]
    kernel.note("IDR0-5, IIDR, AIDR", words)  # type: ignore[attr-defined]
    assert data.idr[0] & 0xF == 0xB  # both stages, AArch64 tables
    assert data.idr[2] == data.idr[4] == 0
    assert data.idr[5] & 0x70  # a granule at least
    assert data.aidr & ~0xFF == 0


@pytest.mark.since("7.3")
def test_no_flag_and_no_reserved_word_is_set(device: VfioDevice, iommu: File) -> None:
    """Without the erratum whose commands have to be repeated."""
    assert bytes(registers(iommu, device.devid))[:8] == bytes(8)


def test_short_room_gets_a_prefix(device: VfioDevice, iommu: File) -> None:
    whole = bytes(registers(iommu, device.devid))
    data = (ctypes.c_uint8 * 64)(*[0xA5] * 64)
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=13, data_uptr=ctypes.addressof(data))
    assert info.data_len == LENGTH
    assert bytes(data) == whole[:13] + b"\xa5" * 51


def test_long_room_is_zeroed_behind(device: VfioDevice, iommu: File) -> None:
    whole = bytes(registers(iommu, device.devid))
    data = (ctypes.c_uint8 * 64)(*[0xA5] * 64)
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=60, data_uptr=ctypes.addressof(data))
    assert info.data_len == LENGTH
    assert bytes(data) == whole + bytes(20) + b"\xa5" * 4


@pytest.mark.since("6.17")
@pytest.mark.parametrize("wanted", [IOMMU_HW_INFO_TYPE_DEFAULT, SMMUV3])
def test_type_that_is_asked_for_is_given(device: VfioDevice, iommu: File, wanted: int) -> None:
    flags = IOMMU_HW_INFO_FLAG_INPUT_TYPE
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, flags=flags, in_data_type=wanted)
    assert (info.out_data_type, info.data_len) == (SMMUV3, LENGTH)


@pytest.mark.since("6.17")
@pytest.mark.parametrize(
    "wanted", [IOMMU_HW_INFO_TYPE_INTEL_VTD, IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV, IOMMU_HW_INFO_TYPE_AMD, 99, U32_MAX]
)
def test_another_type_is_eopnotsupp(device: VfioDevice, iommu: File, wanted: int) -> None:
    """Tegra's too: this unit has none of its queues."""
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO(
            iommu, dev_id=device.devid, flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE, in_data_type=wanted, data_len=LENGTH
        )


@pytest.mark.since("6.17")
def test_type_without_the_flag_is_ignored(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, in_data_type=IOMMU_HW_INFO_TYPE_INTEL_VTD)
    assert info.out_data_type == SMMUV3


@pytest.mark.since("7.2")
def test_device_without_ats_and_pasids_says_so(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid)
    assert info.out_max_pasid_log2 == 0
    assert info.out_capabilities & IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
