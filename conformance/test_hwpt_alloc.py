"""IOMMU_HWPT_ALLOC and IOMMU_GET_HW_INFO for a bound device: paging HWPTs, their lives, what the IOMMU tells.

Mirrors iommufd_hwpt_alloc(), iommufd_hwpt_paging_alloc() and iommufd_get_hw_info(). The device is edu behind VT-d,
which QEMU has without nesting and without dirty tracking, or behind SMMUv3. Attaching is in test_vfio_cdev.py; what a
new HWPT does to the IOVA space, in test_ioas_reserved.py; what is SMMUv3's own, in the areas named after it.
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from conformance.arena import Arena, arena
from conformance.drivers.vfio import VfioDevice
from conformance.layout import Layout
from conformance.offers import sysfs
from conformance.steps import (
    NOWHERE,
    PAGE,
    U32_MAX,
    U64_MAX,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_ranges,
    map_user,
    unmap_all,
)
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_DEFAULT,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HWPT_ALLOC,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_FAULT_ID_VALID,
    iommu_hw_info,
    iommu_hw_info_arm_smmuv3,
    iommu_hw_info_vtd,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

NEST_PARENT, DIRTY = IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_DIRTY_TRACKING
VTD_SIZE = ctypes.sizeof(iommu_hw_info_vtd)
#: Length of the driver's part, by the type that the driver tells.
SIZES = {
    IOMMU_HW_INFO_TYPE_INTEL_VTD: VTD_SIZE,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3: ctypes.sizeof(iommu_hw_info_arm_smmuv3),
}
PASID, FAULT = IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID


def test_hwpt_takes_the_next_id(device: VfioDevice, iommu: File, ioas: int) -> None:
    assert (device.devid, ioas) == (1, 2)
    assert hwpt_alloc(iommu, device.devid, ioas) == 3
    assert hwpt_alloc(iommu, device.devid, ioas) == 4


@pytest.mark.since("6.11")
def test_reply_changes_nothing_but_the_id(device: VfioDevice, iommu: File, ioas: int) -> None:
    reply = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas, out_hwpt_id=77, fault_id=55)
    assert (reply.size, reply.flags, reply.dev_id, reply.pt_id, reply.fault_id) == (48, 0, device.devid, ioas, 55)
    assert reply.out_hwpt_id == 3


def test_smallest_struct_is_enough(device: VfioDevice, iommu: File, ioas: int) -> None:
    arg = IOMMU_HWPT_ALLOC.make(size=IOMMU_HWPT_ALLOC.min_size, dev_id=device.devid, pt_id=ioas, data_len=U32_MAX)
    IOMMU_HWPT_ALLOC.raw(iommu, arg)
    assert arg.out_hwpt_id == 3


def test_missing_page_table_is_einval(device: VfioDevice, iommu: File) -> None:
    """Not ENOENT, as elsewhere."""
    for pt_id in (0, 99, U32_MAX):
        with fails(errno.EINVAL):
            hwpt_alloc(iommu, device.devid, pt_id)


def test_device_as_page_table_is_einval(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EINVAL):
        hwpt_alloc(iommu, device.devid, device.devid)


def test_other_object_as_device_is_enoent(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    for dev_id in (ioas, hwpt):
        with fails(errno.ENOENT):
            hwpt_alloc(iommu, dev_id, ioas)


@pytest.mark.parametrize("flags", [16, 0x8000_0000, U32_MAX])
def test_unknown_flag_is_eopnotsupp(device: VfioDevice, iommu: File, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, flags=flags)
    assert ioas_alloc(iommu) == 3


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(NEST_PARENT, marks=pytest.mark.needs("no_nesting")),
        pytest.param(NEST_PARENT | PASID, marks=pytest.mark.needs("no_nesting")),
        pytest.param(DIRTY, marks=pytest.mark.needs("no_dirty")),
        pytest.param(NEST_PARENT | DIRTY, marks=pytest.mark.needs("no_dirty")),
        pytest.param(DIRTY | FAULT, marks=pytest.mark.needs("no_dirty")),
    ],
)
def test_flag_that_the_iommu_cannot_serve_is_eopnotsupp(device: VfioDevice, iommu: File, ioas: int, flags: int) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, flags=flags)
    assert ioas_alloc(iommu) == 3


@pytest.mark.since("6.13")
def test_pasid_flag_is_accepted_without_pasids(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas, flags=PASID)
    assert device.attach(hwpt) == hwpt


@pytest.mark.has("fault-queue-on-paging-hwpt")
@pytest.mark.parametrize("flags", [FAULT, FAULT | PASID])
def test_unknown_fault_queue_is_enoent_and_undoes_the_hwpt(
    device: VfioDevice, iommu: File, ioas: int, flags: int
) -> None:
    for fault_id in (0, 99, ioas):
        with fails(errno.ENOENT):
            hwpt_alloc(iommu, device.devid, ioas, flags=flags, fault_id=fault_id)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert ioas_alloc(iommu) == 3


@pytest.mark.since("6.11")
def test_fault_queue_with_nest_parent_is_eopnotsupp_before_it_is_looked_up(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, flags=FAULT | NEST_PARENT, fault_id=99)


@pytest.mark.since("6.7")
@pytest.mark.parametrize("data_type", [IOMMU_HWPT_DATA_VTD_S1, 7, U32_MAX])
def test_driver_data_for_a_paging_hwpt_is_eopnotsupp(
    device: VfioDevice, iommu: File, ioas: int, data_type: int
) -> None:
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, ioas, data_type=data_type, data_len=24)


def test_nesting_without_data_is_eopnotsupp(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, hwpt)


@pytest.mark.since("6.7")
@pytest.mark.needs("vtd")
def test_nesting_on_a_hwpt_that_is_no_nest_parent_is_einval(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EINVAL):
        hwpt_alloc(iommu, device.devid, hwpt, data_type=IOMMU_HWPT_DATA_VTD_S1, data_len=24)


@pytest.mark.since("6.7")
def test_nesting_with_a_flag_for_parents_is_eopnotsupp(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EOPNOTSUPP):
        hwpt_alloc(iommu, device.devid, hwpt, flags=NEST_PARENT, data_type=IOMMU_HWPT_DATA_VTD_S1, data_len=24)


@pytest.mark.since("6.7")
@pytest.mark.needs("vtd")
def test_nesting_on_an_automatic_hwpt_is_einval(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = device.attach(ioas)
    with fails(errno.EINVAL):
        hwpt_alloc(iommu, device.devid, hwpt, data_type=IOMMU_HWPT_DATA_VTD_S1, data_len=24)


def test_hwpt_keeps_its_ioas_alive(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    destroy(iommu, hwpt)
    destroy(iommu, ioas)


def test_hwpt_does_not_keep_the_device_alive(cdev: VfioDevice, iommu: File, ioas: int) -> None:
    cdev.bind(iommu)
    hwpt = hwpt_alloc(iommu, cdev.devid, ioas)
    cdev.close()
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    destroy(iommu, hwpt)
    destroy(iommu, ioas)


def test_two_hwpts_share_one_ioas(device: VfioDevice, kernel: Backend, iommu: File, ioas: int) -> None:
    buffer = kernel.buffer(2 * PAGE)
    first = hwpt_alloc(iommu, device.devid, ioas)
    map_user(iommu, ioas, buffer.address, PAGE, iova=PAGE)
    second = hwpt_alloc(iommu, device.devid, ioas)
    map_user(iommu, ioas, buffer.address, PAGE, iova=2 * PAGE)
    destroy(iommu, first)
    assert unmap_all(iommu, ioas) == 2 * PAGE
    destroy(iommu, second)


def test_hwpt_that_cannot_pin_is_efault_and_leaves_nothing(device: VfioDevice, iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE)
    with fails(errno.EFAULT):
        hwpt_alloc(iommu, device.devid, ioas)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert unmap_all(iommu, ioas) == PAGE
    assert hwpt_alloc(iommu, device.devid, ioas) == 3


def test_reply_fault_is_efault_and_undoes_the_hwpt(device: VfioDevice, iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        Arena.write(memory.page(0), IOMMU_HWPT_ALLOC.make(dev_id=device.devid, pt_id=ioas))
        memory.read_only(0)
        with fails(errno.EFAULT):
            iommu.ioctl(IOMMU_HWPT_ALLOC.number, memory.page(0))
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert ioas_alloc(iommu) == 3


# ----------------------------------------------------------------------------------------------------------- hw info


def hw_info(iommu: File, device: VfioDevice) -> tuple[iommu_hw_info, iommu_hw_info_vtd]:
    """GET_HW_INFO with exact room, of VT-d; the reply and the driver's part."""
    with arena(1) as memory:
        reply = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=VTD_SIZE, data_uptr=memory.address)
        return reply, iommu_hw_info_vtd.from_buffer_copy(memory.read(memory.address, VTD_SIZE))


@pytest.mark.needs("vtd")
@pytest.mark.since("7.2")
def test_hw_info_tells_of_vtd(device: VfioDevice, iommu: File, layout: Layout) -> None:
    reply, _ = hw_info(iommu, device)
    assert (reply.out_data_type, reply.data_len) == (IOMMU_HW_INFO_TYPE_INTEL_VTD, VTD_SIZE)
    dirty = IOMMU_HW_CAP_DIRTY_TRACKING if layout.dirty else 0
    assert (reply.out_capabilities, reply.out_max_pasid_log2) == (IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED | dirty, 0)


@pytest.mark.needs("vtd")
def test_hw_info_registers_are_those_of_the_unit(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    """As sysfs shows them; every unit of the suite has 3 levels or more and queued invalidation."""
    reply, info = hw_info(iommu, device)
    plain = getattr(kernel, "inner", kernel)  # older recorded runs do not have these
    shown = [int(sysfs(plain, f"/sys/class/iommu/dmar0/intel-iommu/{name}"), 16) for name in ("cap", "ecap")]
    assert (reply.data_len, [info.cap_reg, info.ecap_reg]) == (VTD_SIZE, shown)
    assert info.cap_reg >> 8 & 0b1110
    assert info.ecap_reg & 1 << 1


def test_hw_info_without_room_tells_the_length(device: VfioDevice, iommu: File) -> None:
    reply = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=0, data_uptr=8)
    assert reply.data_len == SIZES[reply.out_data_type]


@pytest.mark.needs("vtd")
@pytest.mark.parametrize("room", [1, 8, 23, 24, 25, 64])
def test_hw_info_fills_the_room_and_zeroes_the_rest(device: VfioDevice, iommu: File, room: int) -> None:
    whole = bytes(hw_info(iommu, device)[1])
    with arena(1) as memory:
        memory.write(memory.address, b"\xa5" * 80)
        reply = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=room, data_uptr=memory.address)
        assert reply.data_len == VTD_SIZE
        assert memory.read(memory.address, 80) == (whole + bytes(80))[:room] + b"\xa5" * (80 - room)


@pytest.mark.parametrize("address", [0, NOWHERE, U64_MAX - 7], ids=["null", "unmapped", "wraps"])
@pytest.mark.parametrize("room", [1, 24, 32])
def test_hw_info_into_bad_memory_is_efault(device: VfioDevice, iommu: File, room: int, address: int) -> None:
    with fails(errno.EFAULT):
        IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=room, data_uptr=address)


def test_hw_info_zeroes_up_to_the_edge_then_faults(device: VfioDevice, iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        with fails(errno.EFAULT):
            IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=65, data_uptr=memory.page(1) - 64)
        assert memory.read(memory.page(1) - 64, 24) != bytes(24)


@pytest.mark.since("6.17")
def test_hw_info_of_a_type_that_the_driver_has(device: VfioDevice, iommu: File) -> None:
    own = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_data_type
    for wanted in (IOMMU_HW_INFO_TYPE_DEFAULT, own):
        reply = IOMMU_GET_HW_INFO(iommu, flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE, dev_id=device.devid, in_data_type=wanted)
        assert reply.out_data_type == own in SIZES


@pytest.mark.since("6.17")
@pytest.mark.parametrize(
    "data_type",
    [
        pytest.param(IOMMU_HW_INFO_TYPE_ARM_SMMUV3, marks=pytest.mark.needs("vtd")),
        pytest.param(IOMMU_HW_INFO_TYPE_INTEL_VTD, marks=pytest.mark.needs("smmuv3")),
        0xFEED_BEEF,
    ],
)
def test_hw_info_of_a_type_that_the_driver_has_not_is_eopnotsupp(
    device: VfioDevice, iommu: File, data_type: int
) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_GET_HW_INFO(iommu, flags=IOMMU_HW_INFO_FLAG_INPUT_TYPE, dev_id=device.devid, in_data_type=data_type)


@pytest.mark.since("6.17")
def test_hw_info_ignores_the_type_without_the_flag(device: VfioDevice, iommu: File) -> None:
    reply = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, in_data_type=0xFEED_BEEF)
    assert reply.out_data_type in SIZES


def test_hw_info_reply_is_cut_to_the_given_size(device: VfioDevice, iommu: File) -> None:
    arg = IOMMU_GET_HW_INFO.make(size=IOMMU_GET_HW_INFO.min_size, dev_id=device.devid, out_capabilities=U64_MAX)
    IOMMU_GET_HW_INFO.raw(iommu, arg)
    assert arg.out_data_type in SIZES
    assert arg.out_capabilities == U64_MAX


def test_hw_info_needs_no_attachment_and_makes_none(device: VfioDevice, iommu: File) -> None:
    IOMMU_GET_HW_INFO(iommu, dev_id=device.devid)
    assert ioas_alloc(iommu) == 2
