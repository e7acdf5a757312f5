"""What a bound device says of its IOMMU, and the page tables that are made for it: more of GET_HW_INFO and HWPT_ALLOC.

Mirrors iommufd_get_hw_info() and hw_pagetable.c of drivers/iommu/iommufd with the VT-d driver behind them, or that of
SMMUv3. The refusals, and what a reply has room for, are in test_hwpt_alloc; what holds what, and what mappings do
beside a domain, in test_vfio_iommufd.
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import VfioDevice
from conformance.layout import Layout
from conformance.steps import (
    NOWHERE,
    U64_MAX,
    destroy,
    fails,
    hwpt_alloc,
)
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_INVALIDATE,
    iommu_hw_info_vtd,
    iommu_hwpt_invalidate,
)
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

VTD_LENGTH = ctypes.sizeof(iommu_hw_info_vtd)


# ---------------------------------------------------------------------------------------------------------- GET_HW_INFO


@pytest.mark.needs("vtd")
def test_hw_info_says_vtd_and_its_length(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid)
    assert (info.out_data_type, info.data_len) == (IOMMU_HW_INFO_TYPE_INTEL_VTD, VTD_LENGTH)


@pytest.mark.needs("vtd")
def test_hw_info_registers_are_those_of_the_unit(device: VfioDevice, iommu: File) -> None:
    vtd = iommu_hw_info_vtd()
    IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=VTD_LENGTH, data_uptr=ctypes.addressof(vtd))
    assert bytes(vtd)[4:8] == bytes(4)
    assert vtd.cap_reg >> 16 & 0x3F in (47, 56)  # MGAW: guest addresses of 48 or 57 bits
    assert vtd.ecap_reg & 0x2  # queued invalidation


def test_hw_info_whose_padding_cannot_be_written_is_efault(device: VfioDevice, iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        at = memory.page(1) - VTD_LENGTH
        IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=VTD_LENGTH, data_uptr=at)
        with fails(errno.EFAULT):
            IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=VTD_LENGTH + 1, data_uptr=at)


def test_hw_info_of_another_object_is_enoent(device: VfioDevice, iommu: File, ioas: int) -> None:
    with fails(errno.ENOENT):
        IOMMU_GET_HW_INFO(iommu, dev_id=ioas)


@pytest.mark.needs("vtd")
@pytest.mark.since("6.17")
def test_hw_info_ignores_the_type_without_the_flag(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, in_data_type=IOMMU_HW_INFO_TYPE_ARM_SMMUV3)
    assert info.out_data_type == IOMMU_HW_INFO_TYPE_INTEL_VTD


@pytest.mark.since("6.17")
def test_hw_info_asks_the_driver_before_it_writes(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO(
            iommu,
            dev_id=device.devid,
            flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE,
            in_data_type=99,
            data_len=4,
            data_uptr=NOWHERE,
        )


@pytest.mark.since("6.7")
def test_hw_info_offers_dirty_tracking_where_the_unit_has_it(device: VfioDevice, iommu: File, layout: Layout) -> None:
    offered = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING
    assert bool(offered) == layout.dirty


@pytest.mark.since("6.15")
def test_hw_info_has_no_pasids_for_a_device_without_them(device: VfioDevice, iommu: File) -> None:
    assert IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_max_pasid_log2 == 0


@pytest.mark.since("7.2")
def test_hw_info_says_that_ats_cannot_be_used(device: VfioDevice, iommu: File) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, out_capabilities=U64_MAX)
    assert info.out_capabilities & ~IOMMU_HW_CAP_DIRTY_TRACKING == 8


# ----------------------------------------------------------------------------------------------------------- HWPT_ALLOC


def test_hwpt_alloc_takes_the_lowest_free_id(device: VfioDevice, iommu: File, ioas: int) -> None:
    assert hwpt_alloc(iommu, device.devid, ioas) == 3
    assert hwpt_alloc(iommu, device.devid, ioas) == 4
    destroy(iommu, 3)
    assert hwpt_alloc(iommu, device.devid, ioas) == 3


def test_hwpt_alloc_looks_at_the_page_table_before_the_flags(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EINVAL):
        hwpt_alloc(iommu, device.devid, 99, 1 << 31)


@pytest.mark.since("6.15")
def test_attach_of_a_pasid_to_a_device_without_them_succeeds(device: VfioDevice, iommu: File, ioas: int) -> None:
    """The core does not check the PASID where no device of the group can use one: nothing is written anywhere."""
    hwpt = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_ALLOC_PASID)
    reply = VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_ATTACH_PASID, pasid=1, pt_id=hwpt)
    assert reply.pt_id == hwpt
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=1)
    destroy(iommu, hwpt)


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_hwpt_alloc_with_a_fault_queue_that_is_missing_is_enoent(device: VfioDevice, iommu: File, ioas: int) -> None:
    with fails(errno.ENOENT):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas, flags=IOMMU_HWPT_FAULT_ID_VALID, fault_id=99)
    assert hwpt_alloc(iommu, device.devid, ioas) == 3  # the failed one left no id and no reference
    destroy(iommu, 3)
    destroy(iommu, ioas)


@pytest.mark.since("6.11")
def test_hwpt_alloc_ignores_the_fault_id_without_the_flag(device: VfioDevice, iommu: File, ioas: int) -> None:
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas, fault_id=99)


@pytest.mark.has("fault-queue-on-paging-hwpt")
def test_hwpt_holds_its_fault_queue(kernel: Backend, device: VfioDevice, iommu: File, ioas: int) -> None:
    queue = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    kernel.adopt(queue.out_fault_fd).close()
    hwpt = IOMMU_HWPT_ALLOC(
        iommu, dev_id=device.devid, pt_id=ioas, flags=IOMMU_HWPT_FAULT_ID_VALID, fault_id=queue.out_fault_id
    ).out_hwpt_id
    with fails(errno.EBUSY):
        destroy(iommu, queue.out_fault_id)
    destroy(iommu, hwpt)
    destroy(iommu, queue.out_fault_id)


@pytest.mark.since("6.11")
def test_hwpt_alloc_does_not_look_at_the_second_reserved_field_even_with_a_device(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    assert IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas, __reserved2=1).out_hwpt_id == 3


def test_hwpt_alloc_attaches_nothing(device: VfioDevice, iommu: File, ioas: int) -> None:
    destroy(iommu, hwpt_alloc(iommu, device.devid, ioas))


def test_hwpt_alloc_whose_reply_cannot_be_written_leaves_nothing(device: VfioDevice, iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.write(memory.address, IOMMU_HWPT_ALLOC.make(dev_id=device.devid, pt_id=ioas))
        memory.read_only(0)
        with fails(errno.EFAULT):
            IOMMU_HWPT_ALLOC.raw(iommu, memory.address)
    destroy(iommu, ioas)


@pytest.mark.since("6.13")  # before vIOMMUs it was ENOENT
def test_invalidate_of_a_paging_hwpt_is_einval(device: VfioDevice, iommu: File, ioas: int) -> None:
    cmd = iommu_hwpt_invalidate(
        size=ctypes.sizeof(iommu_hwpt_invalidate), hwpt_id=hwpt_alloc(iommu, device.devid, ioas), entry_num=0
    )
    with fails(errno.EINVAL):
        IOMMU_HWPT_INVALIDATE.raw(iommu, cmd)
