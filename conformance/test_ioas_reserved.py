"""What a domain and a device take out of an IOAS: aperture, reserved regions, alignment.

Mirrors iopt_table_add_domain(), iopt_table_enforce_dev_resv_regions(), iopt_reserve_iova() and the checks of the
map path that only show beside a domain. The device is edu behind an IOMMU with pages of 4 KiB and up and one reserved
region, the MSI window; where that and the aperture are is the machine's (layout.py).
"""

from __future__ import annotations

import errno
import struct

import pytest

from conformance.arena import arena
from conformance.drivers.vfio import VfioDevice
from conformance.layout import Layout
from conformance.steps import (
    NOWHERE,
    PAGE,
    U64_MAX,
    MiB,
    allow_iovas,
    answer,
    copy,
    destroy,
    fails,
    ioas_alloc,
    iova_alignment,
    iova_ranges,
    map_user,
    option_get,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC,
    IOMMU_IOAS_IOVA_RANGES,
    IOMMU_OPTION_HUGE_PAGES,
)

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

HUGE = IOMMU_OPTION_HUGE_PAGES
EVERYTHING = [(0, U64_MAX)]


@pytest.fixture
def hwpt(device: VfioDevice, iommu: File, ioas: int) -> int:
    """A HWPT on `ioas`, with no device attached."""
    return IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id


@pytest.fixture
def attached(device: VfioDevice, ioas: int) -> int:
    """`ioas` with the device attached to it."""
    device.attach(ioas)
    return ioas


@pytest.fixture
def page(kernel: Backend) -> Buffer:
    """Pages that can be pinned."""
    return kernel.buffer(16 * PAGE)


# ---------------------------------------------------------------------------------------------- what the ranges show


@pytest.mark.usefixtures("hwpt")
def test_hwpt_narrows_the_ranges_to_its_aperture(iommu: File, ioas: int, layout: Layout) -> None:
    assert iova_ranges(iommu, ioas) == layout.aperture


@pytest.mark.usefixtures("hwpt")
def test_hwpt_raises_the_alignment_to_its_smallest_page(iommu: File, ioas: int) -> None:
    assert iova_alignment(iommu, ioas) == PAGE


def test_attach_reserves_the_msi_window(iommu: File, attached: int, layout: Layout) -> None:
    assert iova_ranges(iommu, attached) == layout.attached


def test_attach_to_a_hwpt_reserves_in_its_ioas(
    device: VfioDevice, iommu: File, ioas: int, hwpt: int, layout: Layout
) -> None:
    device.attach(hwpt)
    assert iova_ranges(iommu, ioas) == layout.attached


def test_bind_alone_reserves_nothing(device: VfioDevice, iommu: File, ioas: int) -> None:
    assert iova_ranges(iommu, ioas) == EVERYTHING


def test_detach_gives_everything_back(device: VfioDevice, iommu: File, attached: int) -> None:
    device.detach()
    assert (iova_ranges(iommu, attached), iova_alignment(iommu, attached)) == (EVERYTHING, 1)


def test_detach_from_a_hwpt_gives_back_the_window_alone(
    device: VfioDevice, iommu: File, ioas: int, hwpt: int, layout: Layout
) -> None:
    device.attach(hwpt)
    device.detach()
    assert (iova_ranges(iommu, ioas), iova_alignment(iommu, ioas)) == (layout.aperture, PAGE)


def test_destroyed_hwpt_gives_the_rest_back(iommu: File, ioas: int, hwpt: int) -> None:
    destroy(iommu, hwpt)
    assert (iova_ranges(iommu, ioas), iova_alignment(iommu, ioas)) == (EVERYTHING, 1)


def test_alignment_stays_a_page_without_the_hwpt_if_huge_pages_are_off(iommu: File, ioas: int, hwpt: int) -> None:
    option_set(iommu, HUGE, 0, ioas)
    destroy(iommu, hwpt)
    assert iova_alignment(iommu, ioas) == PAGE


def test_other_ioas_keeps_its_ranges(iommu: File, attached: int) -> None:
    assert iova_ranges(iommu, ioas_alloc(iommu)) == EVERYTHING


def test_replace_moves_the_window(device: VfioDevice, iommu: File, attached: int, layout: Layout) -> None:
    other = ioas_alloc(iommu)
    device.attach(other)
    assert iova_ranges(iommu, attached) == EVERYTHING
    assert iova_ranges(iommu, other) == layout.attached


def test_array_with_room_for_one_of_two_gets_the_first(iommu: File, attached: int, layout: Layout) -> None:
    with arena(1) as memory:
        arg = IOMMU_IOAS_IOVA_RANGES.make(ioas_id=attached, num_iovas=1, allowed_iovas=memory.address)
        with fails(errno.EMSGSIZE):
            IOMMU_IOAS_IOVA_RANGES.raw(iommu, arg)
        assert (arg.num_iovas, arg.out_iova_alignment) == (2, PAGE)
        assert list(struct.iter_unpack("<QQ", memory.read(memory.address, 32))) == [layout.attached[0], (0, 0)]


# ------------------------------------------------------------------------------------------------- what MAP refuses


@pytest.mark.parametrize(
    ("edge", "offset", "pages"),
    [
        ("msi_start", 0, 1),
        ("msi_last", 1 - PAGE, 1),
        ("msi_start", -PAGE, 2),
        ("msi_last", 1 - PAGE, 2),
        ("msi_start", MiB // 2, 3),
    ],
    ids=["first", "last", "into", "out_of", "inside"],
)
def test_fixed_map_that_touches_the_window_is_einval(
    iommu: File, attached: int, page: Buffer, layout: Layout, edge: str, offset: int, pages: int
) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, attached, page.address, pages * PAGE, iova=getattr(layout, edge) + offset)
    assert unmap_all(iommu, attached) == 0


@pytest.mark.parametrize("below", [True, False], ids=["below", "above"])
def test_fixed_map_beside_the_window_is_fine(
    iommu: File, attached: int, page: Buffer, layout: Layout, below: bool
) -> None:
    iova = layout.msi_start - PAGE if below else layout.msi_last + 1
    assert map_user(iommu, attached, page.address, PAGE, iova=iova) == iova


@pytest.mark.parametrize(
    ("iova", "pages"),
    [(None, 1), (-PAGE, 2), (1 << 63, 1), (U64_MAX - PAGE + 1, 1)],
    ids=["behind", "across", "far", "last"],
)
@pytest.mark.usefixtures("hwpt")
def test_fixed_map_beyond_the_aperture_is_einval(
    iommu: File, ioas: int, page: Buffer, layout: Layout, iova: int | None, pages: int
) -> None:
    if iova is None or iova < 0:
        iova = layout.last + 1 + (iova or 0)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, page.address, pages * PAGE, iova=iova)


@pytest.mark.usefixtures("hwpt")
def test_fixed_map_may_end_with_the_aperture(iommu: File, ioas: int, page: Buffer, layout: Layout) -> None:
    last = layout.last + 1 - PAGE
    assert map_user(iommu, ioas, page.address, PAGE, iova=last) == last


@pytest.mark.usefixtures("hwpt")
def test_reserved_comes_before_an_existing_area(iommu: File, ioas: int, page: Buffer, layout: Layout) -> None:
    map_user(iommu, ioas, page.address, PAGE, iova=layout.last + 1 - PAGE)
    with fails(errno.EINVAL):
        map_user(iommu, ioas, page.address, 2 * PAGE, iova=layout.last + 1 - PAGE)


@pytest.mark.parametrize(
    ("offset", "length", "iova"),
    [(0, PAGE - 1, PAGE), (0, PAGE + 2048, PAGE), (0, PAGE, PAGE + 1), (2048, PAGE, PAGE)],
    ids=["short", "long", "iova", "address"],
)
@pytest.mark.usefixtures("hwpt")
def test_fixed_map_off_the_page_is_einval(
    iommu: File, ioas: int, page: Buffer, offset: int, length: int, iova: int
) -> None:
    with fails(errno.EINVAL):
        map_user(iommu, ioas, page.address + offset, length, iova=iova)


@pytest.mark.usefixtures("hwpt")
def test_automatic_map_off_the_page_is_einval(iommu: File, ioas: int, page: Buffer) -> None:
    for offset, length in ((0, PAGE - 1), (1, PAGE), (2048, PAGE), (2048, 2048)):
        with fails(errno.EINVAL):
            map_user(iommu, ioas, page.address + offset, length)


def test_automatic_iova_goes_from_the_span_below_the_window_to_the_one_above(
    iommu: File, attached: int, page: Buffer, layout: Layout
) -> None:
    allow_iovas(
        iommu,
        attached,
        [(layout.msi_start - PAGE, layout.msi_start - 1), (layout.msi_last + 1, layout.msi_last + 4 * PAGE)],
    )
    iovas = [map_user(iommu, attached, page.address, PAGE) for _ in range(2)]
    assert iovas == [layout.msi_start - PAGE, layout.msi_last + 1]


@pytest.mark.usefixtures("hwpt")
def test_automatic_iova_stays_in_the_aperture(iommu: File, ioas: int, page: Buffer, layout: Layout) -> None:
    allow_iovas(iommu, ioas, [(layout.last + 1 - PAGE, layout.last)])
    assert map_user(iommu, ioas, page.address, PAGE) == layout.last + 1 - PAGE
    with fails(errno.ENOSPC):
        map_user(iommu, ioas, page.address, PAGE)


@pytest.mark.usefixtures("hwpt")
def test_copy_into_a_domain_must_be_of_pages(iommu: File, ioas: int, page: Buffer) -> None:
    source = ioas_alloc(iommu)
    map_user(iommu, source, page.address, 4 * PAGE, iova=0)
    for src_iova, length, dst_iova in ((0, 2048, 0), (2048, PAGE, 0), (0, PAGE, 2048)):
        with fails(errno.EINVAL):
            copy(iommu, ioas, source, src_iova, length, dst_iova=dst_iova)
    assert copy(iommu, ioas, source, PAGE, PAGE, dst_iova=0) == 0


@pytest.mark.usefixtures("hwpt")
def test_copy_out_of_a_domain_may_be_of_bytes(iommu: File, ioas: int, page: Buffer) -> None:
    map_user(iommu, ioas, page.address, 2 * PAGE, iova=0)
    assert copy(iommu, ioas_alloc(iommu), ioas, 5, PAGE, dst_iova=77) == 77


# ----------------------------------------------------------------------------------- what stands in a domain's way


@pytest.mark.parametrize(
    ("va", "length", "iova"),
    [(0, PAGE, 1), (0, PAGE + 1, 0), (1, PAGE, 0), (2048, 2048, 2048)],
    ids=["iova", "length", "address", "half_page"],
)
def test_hwpt_over_a_misfit_area_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer, va: int, length: int, iova: int
) -> None:
    map_user(iommu, ioas, page.address + va, length, iova=iova)
    with fails(errno.EADDRINUSE):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    assert (iova_ranges(iommu, ioas), iova_alignment(iommu, ioas)) == (EVERYTHING, 1)


@pytest.mark.parametrize("where", ["behind", "across", "last"])
def test_hwpt_over_an_area_beyond_its_aperture_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer, layout: Layout, where: str
) -> None:
    iova = {"behind": layout.last + 1, "across": layout.last + 1 - PAGE, "last": U64_MAX - 2 * PAGE + 1}[where]
    map_user(iommu, ioas, page.address, 2 * PAGE, iova=iova)
    with fails(errno.EADDRINUSE):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    assert unmap_all(iommu, ioas) == 2 * PAGE
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)


def test_hwpt_over_an_allowed_range_beyond_its_aperture_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    allow_iovas(iommu, ioas, [(PAGE, layout.last + 1)])
    with fails(errno.EADDRINUSE):
        IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    assert iova_ranges(iommu, ioas) == EVERYTHING
    allow_iovas(iommu, ioas, [(PAGE, layout.last)])
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)


def test_attach_over_an_area_in_the_window_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer, layout: Layout
) -> None:
    map_user(iommu, ioas, page.address, 2 * PAGE, iova=layout.msi_last + 1 - PAGE)
    with fails(errno.EADDRINUSE):
        device.attach(ioas)
    assert (iova_ranges(iommu, ioas), iova_alignment(iommu, ioas)) == (EVERYTHING, 1)
    assert unmap_all(iommu, ioas) == 2 * PAGE
    device.attach(ioas)


def test_hwpt_over_an_area_in_the_window_is_fine_but_attaching_is_not(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer, layout: Layout
) -> None:
    map_user(iommu, ioas, page.address, PAGE, iova=layout.msi_start)
    hwpt = IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas).out_hwpt_id
    with fails(errno.EADDRINUSE):
        device.attach(hwpt)
    assert iova_ranges(iommu, ioas) == layout.aperture


def test_attach_over_an_allowed_range_in_the_window_is_eaddrinuse(
    device: VfioDevice, iommu: File, ioas: int, layout: Layout
) -> None:
    allow_iovas(iommu, ioas, [(0, layout.msi_start)])
    with fails(errno.EADDRINUSE):
        device.attach(ioas)
    assert iova_ranges(iommu, ioas) == EVERYTHING
    allow_iovas(iommu, ioas, [(0, layout.msi_start - 1)])
    device.attach(ioas)


@pytest.mark.parametrize("what", ["window_start", "window_last", "beyond_aperture", "everything"])
def test_allowed_range_that_touches_something_reserved_is_eaddrinuse(
    iommu: File, attached: int, page: Buffer, layout: Layout, what: str
) -> None:
    span = {
        "window_start": (0, layout.msi_start),
        "window_last": (layout.msi_last, layout.msi_last + 1),
        "beyond_aperture": (0, layout.last + 1),
        "everything": (0, U64_MAX),
    }[what]
    allow_iovas(iommu, attached, [(0x40_0000, 0x7F_FFFF)])
    with fails(errno.EADDRINUSE):
        allow_iovas(iommu, attached, [span])
    assert map_user(iommu, attached, page.address, PAGE) == 0x40_0000


def test_allowed_ranges_around_the_window_are_fine(iommu: File, attached: int, layout: Layout) -> None:
    allow_iovas(iommu, attached, layout.attached)


def test_bad_entry_comes_before_a_reserved_one(iommu: File, attached: int) -> None:
    with fails(errno.EINVAL):
        allow_iovas(iommu, attached, [(0, U64_MAX), (5, 5)])


# --------------------------------------------------------------------------------------------- HUGE_PAGES and domains


@pytest.mark.usefixtures("hwpt")
def test_huge_pages_off_beside_a_domain_without_areas_is_fine(iommu: File, ioas: int) -> None:
    option_set(iommu, HUGE, 0, ioas)
    assert option_get(iommu, HUGE, ioas) == 0


@pytest.mark.usefixtures("hwpt")
def test_huge_pages_off_beside_a_domain_with_an_area_is_einval(iommu: File, ioas: int, page: Buffer) -> None:
    map_user(iommu, ioas, page.address, PAGE, iova=0)
    with fails(errno.EINVAL):
        option_set(iommu, HUGE, 0, ioas)
    assert option_get(iommu, HUGE, ioas) == 1
    unmap(iommu, ioas, 0, PAGE)
    option_set(iommu, HUGE, 0, ioas)


def test_huge_pages_may_be_off_before_the_domain_comes(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer
) -> None:
    option_set(iommu, HUGE, 0, ioas)
    map_user(iommu, ioas, page.address, PAGE, iova=0)
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    option_set(iommu, HUGE, 0, ioas)
    assert option_get(iommu, HUGE, ioas) == 0


def test_huge_pages_may_be_switched_on_beside_a_domain_with_areas(
    device: VfioDevice, iommu: File, ioas: int, page: Buffer
) -> None:
    option_set(iommu, HUGE, 0, ioas)
    map_user(iommu, ioas, page.address, PAGE, iova=0)
    IOMMU_HWPT_ALLOC(iommu, dev_id=device.devid, pt_id=ioas)
    option_set(iommu, HUGE, 1, ioas)
    assert (option_get(iommu, HUGE, ioas), iova_alignment(iommu, ioas)) == (1, PAGE)
    assert answer(option_set, iommu, HUGE, 0, ioas) == errno.EINVAL


@pytest.mark.usefixtures("hwpt")
def test_lazy_address_is_no_longer_accepted(iommu: File, ioas: int) -> None:
    with fails(errno.EFAULT):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=0)
