"""The VFIO character device before and around BIND, and ATTACH and DETACH: their errnos and the order of their checks.

Sources: drivers/vfio/device_cdev.c, vfio_main.c (`vfio_device_fops`), iommufd.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import REGION_SHIFT, VfioDevice, iommu_group
from conformance.steps import NOWHERE, PAGE, destroy, fails, ioas_alloc, map_user
from uapi.backend import DEV_IOMMU, MAP_SHARED, PROT_READ, Backend, File
from uapi.iommufd import IOMMU_HWPT_ALLOC
from uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_ATTACH_PASID,
    VFIO_DEVICE_BIND_FLAG_TOKEN,
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_PASID,
    VFIO_DEVICE_FEATURE,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_IOEVENTFD,
    VFIO_DEVICE_PCI_HOT_RESET,
    VFIO_DEVICE_RESET,
    VFIO_DEVICE_SET_IRQS,
    vfio_device_attach_iommufd_pt,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

BOUND_ONLY = [
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_DEVICE_GET_IRQ_INFO,
    VFIO_DEVICE_SET_IRQS,
    VFIO_DEVICE_RESET,
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_DEVICE_PCI_HOT_RESET,
    VFIO_DEVICE_IOEVENTFD,
    VFIO_DEVICE_FEATURE,
]


def bind_block(iommufd: int, flags: int = 0, token: int = 0, argsz: int = 24, tail: bytes = b"") -> bytearray:
    return bytearray(struct.pack("<IIiIQ", argsz, flags, iommufd, 0, token) + tail)


def attach_block(pt_id: int, flags: int = 0, pasid: int = 0, argsz: int = 16, tail: bytes = b"") -> bytearray:
    return bytearray(struct.pack("<IIII", argsz, flags, pt_id, pasid) + tail)


def detach_block(flags: int = 0, pasid: int = 0, argsz: int = 12, tail: bytes = b"") -> bytearray:
    return bytearray(struct.pack("<III", argsz, flags, pasid) + tail)


# ----------------------------------------------------------------------------------------------------- before BIND


@pytest.mark.parametrize("ioctl", BOUND_ONLY, ids=lambda ioctl: ioctl.name)
def test_every_ioctl_but_bind_is_einval_before_bind(cdev: VfioDevice, ioctl: object) -> None:
    # The argument is not looked at: a bad pointer changes nothing.
    with fails(errno.EINVAL):
        cdev.file.ioctl(ioctl.number, 0)  # type: ignore[attr-defined]


def test_unknown_ioctl_is_einval_before_bind(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        cdev.file.ioctl(0x3BFF, 0)


def test_pread_before_bind_is_einval(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        cdev.file.pread(4, 7 << REGION_SHIFT)


def test_empty_pread_before_bind_is_einval(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        cdev.file.pread(0, 7 << REGION_SHIFT)


def test_pwrite_before_bind_is_einval(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        cdev.file.pwrite(b"\6\0", (7 << REGION_SHIFT) + 4)


def test_mmap_before_bind_is_einval(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        cdev.file.mmap(PAGE, 0, PROT_READ, MAP_SHARED)


def test_node_opens_more_than_once(kernel: Backend, cdev: VfioDevice) -> None:
    with kernel.open(cdev.node) as second, kernel.open(cdev.node) as third:
        assert len({cdev.file.fileno(), second.fileno(), third.fileno()}) == 3


def test_sysfs_names_the_node_and_the_group(kernel: Backend, cdev: VfioDevice) -> None:
    device = f"/sys/bus/pci/devices/{cdev.address}"
    assert list(kernel.listdir(f"{device}/vfio-dev")) == [os.path.basename(cdev.node)]
    assert os.path.basename(kernel.readlink(f"{device}/driver")) == "vfio-pci"
    group = iommu_group(kernel, cdev.address)
    assert list(kernel.listdir(f"/sys/kernel/iommu_groups/{group}/devices")) == [cdev.address]


# ------------------------------------------------------------------------------------------------------------ BIND


def test_bind_returns_the_lowest_free_object_id(cdev: VfioDevice, iommu: File) -> None:
    assert [ioas_alloc(iommu), ioas_alloc(iommu), ioas_alloc(iommu)] == [1, 2, 3]
    destroy(iommu, 2)
    assert cdev.bind(iommu) == 2


def test_bind_of_unreadable_argument_is_efault(cdev: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 15])
def test_bind_with_argsz_below_16_is_einval(cdev: VfioDevice, iommu: File, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, bind_block(iommu.fileno(), argsz=argsz))


@pytest.mark.parametrize("argsz", [16, 20, 24])
def test_bind_accepts_argsz(cdev: VfioDevice, iommu: File, argsz: int) -> None:
    block = bind_block(iommu.fileno(), argsz=argsz)
    VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, block)
    assert struct.unpack_from("<I", block, 12) == (1,)


def test_bind_with_zero_tail_binds(cdev: VfioDevice, iommu: File) -> None:
    VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, bind_block(iommu.fileno(), argsz=32, tail=bytes(8)))
    cdev.info()


@pytest.mark.since("6.17")
def test_bind_with_nonzero_tail_is_e2big(cdev: VfioDevice, iommu: File) -> None:
    with fails(errno.E2BIG):
        VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, bind_block(iommu.fileno(), argsz=32, tail=bytes(7) + b"\1"))


@pytest.mark.since("6.17")
def test_bind_looks_at_the_tail_before_the_flags(cdev: VfioDevice, iommu: File) -> None:
    with fails(errno.E2BIG):
        VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, bind_block(iommu.fileno(), flags=~0 & 0xFFFFFFFF, argsz=25, tail=b"\1"))


@pytest.mark.since("6.17")
def test_bind_with_tail_that_cannot_be_read_is_efault(cdev: VfioDevice, iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 24, bytes(bind_block(iommu.fileno(), argsz=32)))
        with fails(errno.EFAULT):
            VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, memory.page(1) - 24)


def test_bind_reads_no_more_than_argsz(cdev: VfioDevice, iommu: File) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 16, bytes(bind_block(iommu.fileno(), argsz=16))[:16])
        VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, memory.page(1) - 16)
        assert memory.read(memory.page(1) - 4, 4) == b"\1\0\0\0"


@pytest.mark.parametrize("flags", [2, 1 << 31])
def test_bind_with_unknown_flag_is_einval(cdev: VfioDevice, iommu: File, flags: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=iommu.fileno(), flags=flags)


def test_bind_to_negative_descriptor_is_einval(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=-1)


def test_bind_to_closed_descriptor_is_ebadf(cdev: VfioDevice) -> None:
    with fails(errno.EBADF):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=0x7FFFFFFF)


def test_bind_to_another_kind_of_file_is_ebadfd(cdev: VfioDevice) -> None:
    other = os.eventfd(0)
    try:
        with fails(errno.EBADFD):
            VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=other)
    finally:
        os.close(other)


def test_bind_to_the_device_itself_is_ebadfd(cdev: VfioDevice) -> None:
    with fails(errno.EBADFD):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=cdev.file.fileno())


def test_bind_looks_at_the_flags_before_the_descriptor(cdev: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=0x7FFFFFFF, flags=2)


@pytest.mark.since("6.17")
def test_bind_with_token_to_a_device_without_sriov_is_einval(cdev: VfioDevice, iommu: File) -> None:
    token = ctypes.create_string_buffer(16)
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(
            cdev.file,
            iommufd=iommu.fileno(),
            flags=VFIO_DEVICE_BIND_FLAG_TOKEN,
            token_uuid_ptr=ctypes.addressof(token),
        )


@pytest.mark.since("6.17")
def test_bind_reads_the_token_before_it_looks_at_the_descriptor(cdev: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_BIND_IOMMUFD(
            cdev.file, iommufd=0x7FFFFFFF, flags=VFIO_DEVICE_BIND_FLAG_TOKEN, token_uuid_ptr=NOWHERE
        )


@pytest.mark.since("6.17")
def test_bind_without_the_token_flag_ignores_the_token(cdev: VfioDevice, iommu: File) -> None:
    VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=iommu.fileno(), token_uuid_ptr=NOWHERE)


def test_bind_of_a_bound_descriptor_is_einval(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(device.file, iommufd=iommu.fileno())


def test_bind_of_a_bound_descriptor_does_not_look_at_iommufd(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(device.file, iommufd=0x7FFFFFFF)


def test_bind_through_a_second_descriptor_is_einval(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    with kernel.open(device.node) as second, fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=iommu.fileno())


def test_bind_through_a_second_descriptor_looks_at_iommufd_first(kernel: Backend, device: VfioDevice) -> None:
    with kernel.open(device.node) as second, fails(errno.EBADF):
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=0x7FFFFFFF)


def test_bind_to_a_second_iommufd_is_einval(kernel: Backend, device: VfioDevice) -> None:
    with kernel.open(device.node) as second, kernel.open(DEV_IOMMU) as other, fails(errno.EINVAL):
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=other.fileno())


def test_second_descriptor_stays_shut_while_the_first_is_bound(kernel: Backend, device: VfioDevice) -> None:
    with kernel.open(device.node) as second, fails(errno.EINVAL):
        VFIO_DEVICE_GET_INFO(second)


def test_failed_bind_leaves_the_device_bindable(cdev: VfioDevice, iommu: File) -> None:
    with fails(errno.EBADF):
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=0x7FFFFFFF)
    with fails(errno.EINVAL):
        cdev.info()
    assert cdev.bind(iommu) == 1


def test_bind_whose_reply_cannot_be_written_binds_nothing(cdev: VfioDevice, iommu: File) -> None:
    with arena(1) as memory:
        memory.write(memory.address, bytes(bind_block(iommu.fileno())))
        memory.read_only(0)
        with fails(errno.EFAULT):
            VFIO_DEVICE_BIND_IOMMUFD.raw(cdev.file, memory.address)
    with fails(errno.EINVAL):
        cdev.info()
    assert cdev.bind(iommu) == 1


def test_close_unbinds(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    device.close()
    with fails(errno.ENOENT):
        destroy(iommu, device.devid)
    with kernel.open(device.node) as again:
        assert VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=iommu.fileno()).out_devid == device.devid


def test_close_frees_the_device_for_another_iommufd(kernel: Backend, device: VfioDevice) -> None:
    device.close()
    with kernel.open(DEV_IOMMU) as other, kernel.open(device.node) as again:
        VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=other.fileno())


def test_device_stays_bound_until_its_last_duplicate_closes(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    duplicate = kernel.adopt(os.dup(device.file.fileno()))
    device.close()
    VFIO_DEVICE_GET_INFO(duplicate)
    with kernel.open(device.node) as again:
        with fails(errno.EINVAL):
            VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=iommu.fileno())
        duplicate.close()
        VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=iommu.fileno())


def test_a_mapping_keeps_the_device_bound(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    info = device.region(0)
    mapping = device.file.mmap(PAGE, info.offset)
    device.close()
    with kernel.open(device.node) as again:
        with fails(errno.EINVAL):
            VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=iommu.fileno())
        mapping.close()
        VFIO_DEVICE_BIND_IOMMUFD(again, iommufd=iommu.fileno())


@pytest.mark.linux_only("the model has no VFIO groups yet")
def test_bind_while_the_group_is_open_is_ebusy(kernel: Backend, cdev: VfioDevice, iommu: File) -> None:
    group = kernel.open(f"/dev/vfio/{iommu_group(kernel, cdev.address)}")
    with fails(errno.EBUSY):
        cdev.bind(iommu)
    with fails(errno.EBUSY):  # before the descriptor is looked at
        VFIO_DEVICE_BIND_IOMMUFD(cdev.file, iommufd=0x7FFFFFFF)
    group.close()
    cdev.bind(iommu)


@pytest.mark.linux_only("the model has no VFIO groups yet")
def test_opening_the_group_of_a_bound_device_is_ebusy(kernel: Backend, device: VfioDevice) -> None:
    with fails(errno.EBUSY):
        kernel.open(f"/dev/vfio/{iommu_group(kernel, device.address)}")


# ------------------------------------------------------------------------------------------- ioctls of a bound device


@pytest.mark.parametrize("number", [0x3B64, 0x3B65, 0x3B66, 0x3B67, 0x3B68, 0x3B6A, 0x3B72, 0x3B73, 0x3B79, 0x3BFF, 0])
def test_unknown_ioctl_is_enotty(device: VfioDevice, number: int) -> None:
    with fails(errno.ENOTTY):
        device.file.ioctl(number, 0)


def test_ioctl_number_is_compared_whole(device: VfioDevice) -> None:
    with fails(errno.ENOTTY):
        device.file.ioctl(VFIO_DEVICE_GET_INFO.number | 0x80000000, 0)


# ---------------------------------------------------------------------------------------------------------- ATTACH


def test_attach_to_an_ioas_returns_an_automatic_hwpt(device: VfioDevice, ioas: int) -> None:
    assert (device.devid, ioas) == (1, 2)
    assert device.attach(ioas) == 3


def test_attach_to_a_hwpt_returns_that_hwpt(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    assert device.attach(hwpt) == hwpt


def test_attach_of_unreadable_argument_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 11])
def test_attach_with_argsz_below_12_is_einval(device: VfioDevice, ioas: int, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, attach_block(ioas, argsz=argsz))


def test_attach_with_argsz_12_reads_no_more(device: VfioDevice, ioas: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 12, bytes(attach_block(ioas, argsz=12))[:12])
        VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, memory.page(1) - 12)


def test_attach_ignores_what_follows_the_struct(device: VfioDevice, ioas: int) -> None:
    VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(
        device.file, attach_block(ioas, argsz=24, pasid=~0 & 0xFFFFFFFF, tail=b"\xff" * 8)
    )


def test_attach_needs_only_12_readable_bytes_whatever_argsz_says(device: VfioDevice, ioas: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 12, bytes(attach_block(ioas, argsz=PAGE))[:12])
        VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, memory.page(1) - 12)


@pytest.mark.parametrize("flags", [2, 1 << 31])
def test_attach_with_unknown_flag_is_einval(device: VfioDevice, ioas: int, flags: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, pt_id=ioas, flags=flags)


def test_attach_looks_at_the_flags_before_the_id(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, pt_id=99, flags=2)


@pytest.mark.parametrize("pt_id", [0, 99, 0xFFFFFFFF])
def test_attach_to_a_missing_object_is_enoent(device: VfioDevice, pt_id: int) -> None:
    with fails(errno.ENOENT):
        device.attach(pt_id)


def test_attach_to_a_device_object_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        device.attach(device.devid)


def test_attach_whose_reply_cannot_be_written_detaches(device: VfioDevice, iommu: File, ioas: int) -> None:
    with arena(1) as memory:
        memory.write(memory.address, bytes(attach_block(ioas)))
        memory.read_only(0)
        with fails(errno.EFAULT):
            VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, memory.address)
    destroy(iommu, ioas)  # nothing holds it


def test_replace_whose_reply_cannot_be_written_detaches_from_both(device: VfioDevice, iommu: File, ioas: int) -> None:
    other = ioas_alloc(iommu)
    device.attach(other)
    with arena(1) as memory:
        memory.write(memory.address, bytes(attach_block(ioas)))
        memory.read_only(0)
        with fails(errno.EFAULT):
            VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, memory.address)
    destroy(iommu, ioas)
    destroy(iommu, other)


def test_attach_again_to_the_same_ioas_changes_nothing(device: VfioDevice, ioas: int) -> None:
    assert device.attach(ioas) == device.attach(ioas)


def test_attach_while_attached_replaces(device: VfioDevice, iommu: File, ioas: int) -> None:
    other = ioas_alloc(iommu)
    first = device.attach(ioas)
    second = device.attach(other)
    assert second != first
    with fails(errno.ENOENT):
        destroy(iommu, first)  # the automatic HWPT went with the attachment
    destroy(iommu, ioas)
    with fails(errno.EBUSY):
        destroy(iommu, other)


def test_replace_by_a_missing_object_keeps_the_attachment(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = device.attach(ioas)
    with fails(errno.ENOENT):
        device.attach(99)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)


def test_replace_by_an_ioas_that_cannot_be_pinned_keeps_the_attachment(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    other = ioas_alloc(iommu)
    map_user(iommu, other, NOWHERE, PAGE)
    hwpt = device.attach(ioas)
    with fails(errno.EFAULT):
        device.attach(other)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    destroy(iommu, other)


@pytest.mark.since("6.15")
def test_attach_of_a_pasid_with_argsz_12_is_einval(device: VfioDevice, ioas: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(
            device.file, attach_block(ioas, flags=VFIO_DEVICE_ATTACH_PASID, pasid=1, argsz=15)
        )


@pytest.mark.since("6.15")
def test_attach_of_a_pasid_that_cannot_be_read_is_efault(device: VfioDevice, ioas: int) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 12, bytes(attach_block(ioas, flags=VFIO_DEVICE_ATTACH_PASID))[:12])
        with fails(errno.EFAULT):
            VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, memory.page(1) - 12)


@pytest.mark.since("6.15")
@pytest.mark.parametrize("pasid", [1 << 31, 0xFFFFFFFF])
def test_attach_of_a_pasid_above_31_bits_is_enospc(device: VfioDevice, pasid: int) -> None:
    with fails(errno.ENOSPC):  # before the id is looked up
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, pt_id=99, flags=VFIO_DEVICE_ATTACH_PASID, pasid=pasid)


@pytest.mark.since("6.15")
def test_attach_of_a_pasid_to_a_missing_object_is_enoent(device: VfioDevice) -> None:
    with fails(errno.ENOENT):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, pt_id=99, flags=VFIO_DEVICE_ATTACH_PASID, pasid=1)


@pytest.mark.since("6.15")
def test_attach_of_a_pasid_to_an_ioas_is_einval(device: VfioDevice, ioas: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_ATTACH_IOMMUFD_PT(device.file, pt_id=ioas, flags=VFIO_DEVICE_ATTACH_PASID, pasid=1)


# ---------------------------------------------------------------------------------------------------------- DETACH


def test_detach_frees_the_automatic_hwpt(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = device.attach(ioas)
    device.detach()
    with fails(errno.ENOENT):
        destroy(iommu, hwpt)
    destroy(iommu, ioas)


def test_detach_keeps_a_hwpt_of_the_users_own(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    device.attach(hwpt)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    device.detach()
    destroy(iommu, hwpt)


def test_detach_of_an_unattached_device_succeeds(device: VfioDevice, ioas: int) -> None:
    device.detach()
    device.attach(ioas)
    device.detach()
    device.detach()


def test_detach_then_attach_makes_the_hwpt_anew(device: VfioDevice, ioas: int) -> None:
    first = device.attach(ioas)
    device.detach()
    assert device.attach(ioas) == first  # the lowest free id again


def test_detach_of_unreadable_argument_is_efault(device: VfioDevice) -> None:
    with fails(errno.EFAULT):
        VFIO_DEVICE_DETACH_IOMMUFD_PT.raw(device.file, NOWHERE)


@pytest.mark.parametrize("argsz", [0, 7])
def test_detach_with_argsz_below_8_is_einval(device: VfioDevice, argsz: int) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_DETACH_IOMMUFD_PT.raw(device.file, detach_block(argsz=argsz))


def test_detach_with_argsz_8_reads_no_more(device: VfioDevice, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 8, bytes(detach_block(argsz=8))[:8])
        VFIO_DEVICE_DETACH_IOMMUFD_PT.raw(device.file, memory.page(1) - 8)
    destroy(iommu, ioas)


def test_detach_ignores_what_follows_the_struct(device: VfioDevice) -> None:
    VFIO_DEVICE_DETACH_IOMMUFD_PT.raw(device.file, detach_block(argsz=16, tail=b"\xff" * 4))


@pytest.mark.parametrize("flags", [2, 1 << 31])
def test_detach_with_unknown_flag_is_einval(device: VfioDevice, iommu: File, ioas: int, flags: int) -> None:
    hwpt = device.attach(ioas)
    with fails(errno.EINVAL):
        VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=flags)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)


@pytest.mark.since("6.15")
def test_detach_of_a_pasid_with_argsz_8_is_einval(device: VfioDevice) -> None:
    with fails(errno.EINVAL):
        VFIO_DEVICE_DETACH_IOMMUFD_PT.raw(device.file, detach_block(flags=VFIO_DEVICE_DETACH_PASID, argsz=11))


@pytest.mark.since("6.15")
def test_detach_of_an_unattached_pasid_succeeds_and_leaves_the_rid(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = device.attach(ioas)
    VFIO_DEVICE_DETACH_IOMMUFD_PT(device.file, flags=VFIO_DEVICE_DETACH_PASID, pasid=5)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)


def test_attach_struct_is_the_callers_to_reuse(device: VfioDevice, ioas: int) -> None:
    """Input and output share pt_id, so a second ATTACH of the same block names the HWPT."""
    block = vfio_device_attach_iommufd_pt(argsz=16, pt_id=ioas)
    VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, block)
    hwpt = block.pt_id
    VFIO_DEVICE_ATTACH_IOMMUFD_PT.raw(device.file, block)
    assert block.pt_id == hwpt
