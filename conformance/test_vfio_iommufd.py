"""What a bound device adds to iommufd: attachments, who holds whom, reserved regions, pins.

Sources: drivers/iommu/iommufd/device.c, io_pagetable.c. GET_HW_INFO and HWPT_ALLOC are in test_vfio_hwpt. The
aperture and the reserved window are the machine's (layout.py).
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
    PAGE,
    READ,
    U64_MAX,
    allow_iovas,
    answer,
    copy,
    destroy,
    fails,
    hwpt_alloc,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_file,
    map_user,
    memfd,
    option_get,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import DEV_IOMMU, Backend, File
from uapi.iommufd import (
    IOMMU_OPTION_HUGE_PAGES,
    IOMMU_OPTION_RLIMIT_MODE,
)
from uapi.vfio import (
    VFIO_DEVICE_BIND_IOMMUFD,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")


# ------------------------------------------------------------------------------------------------------- who holds whom


def test_device_object_cannot_be_destroyed(device: VfioDevice, iommu: File, ioas: int) -> None:
    with fails(errno.EBUSY):
        destroy(iommu, device.devid)
    device.attach(ioas)
    with fails(errno.EBUSY):
        destroy(iommu, device.devid)


def test_ioas_cannot_be_destroyed_while_attached(device: VfioDevice, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    device.detach()
    destroy(iommu, ioas)


def test_automatic_hwpt_cannot_be_destroyed_while_attached(device: VfioDevice, iommu: File, ioas: int) -> None:
    with fails(errno.EBUSY):
        destroy(iommu, device.attach(ioas))


def test_automatic_hwpt_can_be_attached_by_its_id(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt = device.attach(ioas)
    assert device.attach(hwpt) == hwpt
    device.detach()
    with fails(errno.ENOENT):
        destroy(iommu, hwpt)


def test_attach_never_picks_a_hwpt_of_the_users_own(device: VfioDevice, iommu: File, ioas: int) -> None:
    own = hwpt_alloc(iommu, device.devid, ioas)
    assert device.attach(ioas) != own


def test_replace_of_an_automatic_hwpt_by_ones_own_frees_it(device: VfioDevice, iommu: File, ioas: int) -> None:
    automatic = device.attach(ioas)
    own = hwpt_alloc(iommu, device.devid, ioas)
    device.attach(own)
    with fails(errno.ENOENT):
        destroy(iommu, automatic)
    with fails(errno.EBUSY):
        destroy(iommu, own)


def test_closing_the_device_frees_the_automatic_hwpt_and_keeps_ones_own(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    own = hwpt_alloc(iommu, device.devid, ioas)
    automatic = device.attach(ioas)
    device.close()
    with fails(errno.ENOENT):
        destroy(iommu, automatic)
    with fails(errno.ENOENT):
        destroy(iommu, device.devid)
    destroy(iommu, own)
    destroy(iommu, ioas)


def test_hwpt_outlives_the_device_it_was_made_for(device: VfioDevice, iommu: File, ioas: int) -> None:
    own = hwpt_alloc(iommu, device.devid, ioas)
    map_user_page(iommu, ioas)
    device.close()
    with fails(errno.EBUSY):
        destroy(iommu, ioas)
    destroy(iommu, own)
    assert unmap_all(iommu, ioas) == PAGE


_PAGE = ctypes.create_string_buffer(2 * PAGE)


def map_user_page(iommu: File, ioas: int, iova: int = 0x10000, prot: int | None = None) -> int:
    """Map a page of this process's memory at `iova`."""
    va = (ctypes.addressof(_PAGE) + PAGE - 1) & ~(PAGE - 1)
    return map_user(iommu, ioas, va, PAGE, iova) if prot is None else map_user(iommu, ioas, va, PAGE, iova, prot)


def test_closing_iommufd_does_nothing_while_a_device_is_bound(kernel: Backend, device: VfioDevice, iommu: File) -> None:
    iommu.close()
    device.info()
    with fails(errno.ENOENT):  # the context lives: ids are looked up
        device.attach(99)
    with kernel.open(device.node) as second, kernel.open(DEV_IOMMU) as other:
        with fails(errno.EINVAL):
            VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=other.fileno())
        device.close()
        VFIO_DEVICE_BIND_IOMMUFD(second, iommufd=other.fileno())


def test_attach_after_iommufd_is_closed(device: VfioDevice, iommu: File, ioas: int) -> None:
    iommu.close()
    assert device.attach(ioas) == 3
    device.detach()


def test_rlimit_mode_cannot_be_set_while_a_device_is_bound(device: VfioDevice, iommu: File) -> None:
    with fails(errno.EBUSY):
        option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, 1)


# -------------------------------------------------------------------------------------------- ranges and reserved IOVAs


def test_hwpt_narrows_the_ranges_to_its_aperture(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    assert iova_ranges(iommu, ioas) == layout.aperture
    destroy(iommu, hwpt)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


def test_attach_reserves_the_interrupt_window(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    device.attach(ioas)
    assert iova_ranges(iommu, ioas) == layout.attached
    device.detach()
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]


def test_replace_moves_the_reservation(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    other = ioas_alloc(iommu)
    device.attach(ioas)
    device.attach(other)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    assert iova_ranges(iommu, other) == layout.attached


def test_replace_within_one_ioas_keeps_the_reservation(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    device.attach(ioas)
    device.attach(hwpt_alloc(iommu, device.devid, ioas))
    assert iova_ranges(iommu, ioas) == layout.attached
    device.detach()
    assert iova_ranges(iommu, ioas) == layout.aperture


def test_attach_raises_the_alignment_to_a_page(device: VfioDevice, iommu: File, ioas: int) -> None:
    assert iova_alignment(iommu, ioas) == 1
    device.attach(ioas)
    assert iova_alignment(iommu, ioas) == PAGE
    device.detach()
    assert iova_alignment(iommu, ioas) == 1


@pytest.mark.parametrize("where", ["across", "first", "last"])
def test_map_into_the_interrupt_window_is_einval(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout, where: str
) -> None:
    device.attach(ioas)
    start = layout.msi_start
    iova = {"across": start - PAGE, "first": start, "last": layout.msi_last + 1 - PAGE}[where]
    with fails(errno.EINVAL):
        map_user(iommu, ioas, NOWHERE, 2 * PAGE, iova)


def test_map_beyond_the_aperture_is_einval(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EINVAL):
        map_user_page(iommu, ioas, layout.last + 1)
    map_user_page(iommu, ioas, layout.last + 1 - PAGE)


@pytest.mark.parametrize(("iova", "length"), [(1, PAGE), (0x1800, PAGE), (PAGE, 100), (PAGE, PAGE + 1)])
def test_misaligned_map_is_einval_once_attached(
    device: VfioDevice, iommu: File, ioas: int, iova: int, length: int
) -> None:
    device.attach(ioas)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, NOWHERE, length, iova)


def test_map_of_a_misaligned_address_is_einval_once_attached(device: VfioDevice, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, NOWHERE + 1, PAGE, PAGE)


def test_attach_over_an_area_in_the_interrupt_window_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    map_user_page(iommu, ioas, layout.msi_start + PAGE)
    with fails(errno.EADDRINUSE):
        device.attach(ioas)
    unmap_all(iommu, ioas)
    device.attach(ioas)


def test_attach_over_an_allowed_range_in_the_interrupt_window_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    allow_iovas(iommu, ioas, [(layout.msi_start - PAGE, layout.msi_start)])
    with fails(errno.EADDRINUSE):
        device.attach(ioas)
    allow_iovas(iommu, ioas, [])
    device.attach(ioas)


def test_allowing_a_reserved_range_is_eaddrinuse(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    device.attach(ioas)
    for span in (
        (layout.msi_last, layout.msi_last + 10),
        (layout.last, layout.last + 1),
        (layout.last + 1, layout.last + 2),
    ):
        with fails(errno.EADDRINUSE):
            allow_iovas(iommu, ioas, [span])
    allow_iovas(iommu, ioas, [(layout.msi_last + 1, layout.last)])


def test_replace_over_an_area_in_the_interrupt_window_is_eaddrinuse_and_keeps_the_old(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    other = ioas_alloc(iommu)
    map_user_page(iommu, other, layout.msi_start)
    hwpt = device.attach(ioas)
    with fails(errno.EADDRINUSE):
        device.attach(other)
    with fails(errno.EBUSY):
        destroy(iommu, hwpt)
    assert iova_ranges(iommu, ioas) == layout.attached
    assert iova_ranges(iommu, other) == [(0, U64_MAX)]


def test_hwpt_alloc_does_not_mind_an_area_in_the_interrupt_window(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    map_user_page(iommu, ioas, layout.msi_start)
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EADDRINUSE):
        device.attach(hwpt)


def test_hwpt_alloc_over_an_area_beyond_the_aperture_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    map_user_page(iommu, ioas, layout.last + 1)
    with fails(errno.EADDRINUSE):
        hwpt_alloc(iommu, device.devid, ioas)


def test_hwpt_alloc_over_an_allowed_range_beyond_the_aperture_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    allow_iovas(iommu, ioas, [(0, layout.last + 1)])
    with fails(errno.EADDRINUSE):
        hwpt_alloc(iommu, device.devid, ioas)
    allow_iovas(iommu, ioas, layout.aperture)
    hwpt_alloc(iommu, device.devid, ioas)


@pytest.mark.parametrize(("va", "iova", "length"), [(0, 1, PAGE), (1, PAGE, PAGE), (0, PAGE, PAGE - 1)])
def test_hwpt_alloc_over_a_misaligned_area_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, va: int, iova: int, length: int
) -> None:
    map_user(iommu, ioas, NOWHERE + va, length, iova)
    with fails(errno.EADDRINUSE):
        hwpt_alloc(iommu, device.devid, ioas)


# ----------------------------------------------------------------------------------------------------------------- pins


def test_attach_with_an_area_that_cannot_be_pinned_is_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, PAGE)
    with fails(errno.EFAULT):
        device.attach(ioas)
    unmap_all(iommu, ioas)
    assert device.attach(ioas) == 3  # the failed attempt left no id


def test_hwpt_alloc_with_an_area_that_cannot_be_pinned_is_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    map_user(iommu, ioas, NOWHERE, PAGE, PAGE)
    with fails(errno.EFAULT):
        hwpt_alloc(iommu, device.devid, ioas)
    assert iova_ranges(iommu, ioas) == [(0, U64_MAX)]
    unmap_all(iommu, ioas)


def test_map_of_memory_that_is_not_there_is_efault_once_a_hwpt_exists(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with fails(errno.EFAULT):
        map_user(iommu, ioas, NOWHERE, PAGE, PAGE)
    with fails(errno.ENOENT):
        unmap(iommu, ioas, PAGE, PAGE)


def test_map_that_fails_half_way_leaves_nothing(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with arena(4) as memory:
        memory.unmap(3)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.address, 4 * PAGE, PAGE)
        assert unmap_all(iommu, ioas) == 0
        map_user(iommu, ioas, memory.address, 3 * PAGE, PAGE)
        assert unmap_all(iommu, ioas) == 3 * PAGE


def test_writable_map_of_read_only_memory_is_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with arena(1) as memory:
        memory.read_only(0)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.address, PAGE, PAGE)
        map_user(iommu, ioas, memory.address, PAGE, PAGE, prot=READ)
        unmap_all(iommu, ioas)


def test_map_of_memory_without_access_is_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with arena(1) as memory:
        memory.no_access(0)
        with fails(errno.EFAULT):
            map_user(iommu, ioas, memory.address, PAGE, PAGE, prot=READ)


def test_map_of_a_bar_is_efault(device: VfioDevice, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    bar = device.map_bar(0)
    with fails(errno.EFAULT):
        map_user(iommu, ioas, bar.address, PAGE, PAGE)


@pytest.mark.since("6.13")
@pytest.mark.needs("memfd")
def test_map_file_beyond_the_file_is_einval_once_a_hwpt_exists(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with memfd(2 * PAGE) as fd:
        map_file(iommu, ioas, fd, PAGE, PAGE, PAGE)
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, PAGE, 2 * PAGE, 4 * PAGE)
        with fails(errno.EINVAL):
            map_file(iommu, ioas, fd, 2 * PAGE, PAGE, 4 * PAGE)
    unmap_all(iommu, ioas)


@pytest.mark.since("6.13")
def test_map_file_of_another_kind_of_file_is_einval_once_a_hwpt_exists(
    device: VfioDevice, iommu: File, ioas: int
) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    with open("/proc/version", "rb") as plain, fails(errno.EINVAL):
        map_file(iommu, ioas, plain.fileno(), 0, PAGE, PAGE)


def test_pins_are_counted_once_per_map_and_returned_by_unmap(
    kernel: Backend, device: VfioDevice, iommu: File, ioas: int
) -> None:
    before = kernel.status("VmPin")
    buffer = kernel.buffer(4 * PAGE)
    map_user(iommu, ioas, buffer.address, 4 * PAGE, PAGE)
    assert kernel.status("VmPin") == before  # lazily
    hwpt = hwpt_alloc(iommu, device.devid, ioas)
    assert kernel.status("VmPin") == before + 16
    device.attach(ioas)
    assert kernel.status("VmPin") == before + 16  # two tables, one pin
    copy(iommu, ioas, ioas, PAGE, 2 * PAGE, dst_iova=64 * PAGE)
    assert kernel.status("VmPin") == before + 16  # a copy shares its pages
    map_user(iommu, ioas, buffer.address, PAGE, 128 * PAGE)
    assert kernel.status("VmPin") == before + 20  # a second map does not
    unmap(iommu, ioas, PAGE, 4 * PAGE)
    assert kernel.status("VmPin") == before + 12  # the copy keeps two of the four pages
    unmap_all(iommu, ioas)
    assert kernel.status("VmPin") == before
    device.detach()
    destroy(iommu, hwpt)
    buffer.close()


def test_pins_are_returned_when_the_last_table_goes(
    kernel: Backend, device: VfioDevice, iommu: File, ioas: int
) -> None:
    before = kernel.status("VmPin")
    buffer = kernel.buffer(PAGE)
    map_user(iommu, ioas, buffer.address, PAGE, PAGE)
    device.attach(ioas)
    assert kernel.status("VmPin") == before + 4
    device.detach()
    assert kernel.status("VmPin") == before
    buffer.close()


def test_huge_pages_cannot_be_turned_off_with_a_table_and_an_area(device: VfioDevice, iommu: File, ioas: int) -> None:
    hwpt_alloc(iommu, device.devid, ioas)
    map_user_page(iommu, ioas)
    with fails(errno.EINVAL):
        option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    unmap_all(iommu, ioas)
    option_set(iommu, IOMMU_OPTION_HUGE_PAGES, 0, ioas)
    assert option_get(iommu, IOMMU_OPTION_HUGE_PAGES, ioas) == 0
    map_user_page(iommu, ioas)


def test_auto_iova_avoids_the_interrupt_window(device: VfioDevice, iommu: File, ioas: int, layout: Layout) -> None:
    device.attach(ioas)
    allow_iovas(
        iommu, ioas, [(layout.msi_start - PAGE, layout.msi_start - 1), (layout.msi_last + 1, layout.msi_last + PAGE)]
    )
    va = (ctypes.addressof(_PAGE) + PAGE - 1) & ~(PAGE - 1)
    assert map_user(iommu, ioas, va, PAGE) == layout.msi_start - PAGE
    assert map_user(iommu, ioas, va, PAGE) == layout.msi_last + 1
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, va, PAGE)


def test_unmap_all_while_attached(device: VfioDevice, iommu: File, ioas: int) -> None:
    device.attach(ioas)
    for index in range(1, 5):
        map_user_page(iommu, ioas, index * 0x100000)
    assert unmap_all(iommu, ioas) == 4 * PAGE
    assert answer(unmap, iommu, ioas, 0x100000, PAGE) == errno.ENOENT
