"""What shows of the stage that VT-d translates ordinary HWPTs by, and of the domain ids that it knows them by.

Sources: drivers/iommu/intel/iommu.c, compute_vasz_lg2_fs() and -_ss(), domain_attach_iommu(). A first stage has
canonical addresses, of which a domain takes the lower half; a second stage has one range. Either has pages of 4 KiB,
2 MiB and, where the unit has them, 1 GiB. A unit counts the domains that something behind it is attached to.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.layout import Layout
from conformance.offers import sysfs
from conformance.steps import PAGE, destroy, hwpt_alloc, ioas_alloc, map_user, unmap
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID

pytestmark = [pytest.mark.needs("iommu", "vfio_cdev", "dma_device", "vtd"), pytest.mark.since("6.8")]

MARK = b"0123456789abcdef"


@pytest.fixture
def page(kernel: Backend) -> Iterator[Buffer]:
    """A page with MARK at its start."""
    buffer = kernel.buffer(PAGE)
    buffer.view[:16] = MARK
    yield buffer
    buffer.close()


def reads(edu: Edu, page: Buffer, iova: int, home: int) -> bytes:
    """What the device finds at `iova`, brought to the end of the page, which is mapped at `home`."""
    page.view[PAGE - 16 :] = b"\xa5" * 16
    edu.memcpy(home + PAGE - 16, iova, 16)
    return bytes(page.view[PAGE - 16 :])


def domains_used(kernel: Backend) -> int:
    """How many; not recorded, as it depends on what else is in the machine."""
    return int(sysfs(getattr(kernel, "inner", kernel), "/sys/class/iommu/dmar0/intel-iommu/domains_used"))


def test_dma_reaches_the_last_page_of_the_aperture(
    edu: Edu, iommu: File, ioas: int, page: Buffer, layout: Layout
) -> None:
    last = layout.last + 1 - PAGE
    map_user(iommu, ioas, page.address, PAGE, last)
    assert reads(edu, page, last, last) == MARK
    unmap(iommu, ioas, last, PAGE)
    page.view[:16] = bytes(16)
    edu.store(last, 16)
    assert bytes(page.view[:16]) == bytes(16)


@pytest.mark.parametrize("beyond", ["next_bit", "bit_48", "bit_57", "top_bits"])
def test_an_address_beyond_the_aperture_is_no_other_name_of_one_inside(
    edu: Edu, iommu: File, ioas: int, page: Buffer, layout: Layout, beyond: str
) -> None:
    """Neither does it wrap around, nor does the sign of a canonical address lead to the lower half."""
    home = 0x10_0000
    map_user(iommu, ioas, page.address, PAGE, home)
    bits = {
        "next_bit": layout.last + 1,
        "bit_48": 1 << 48,
        "bit_57": 1 << 57,
        "top_bits": (1 << 64) - 1 & ~layout.last,
    }[beyond]
    assert reads(edu, page, home, home) == MARK
    assert reads(edu, page, home | bits, home) == bytes(16)
    assert reads(edu, page, home, home) == MARK


def test_a_page_of_two_mebibytes_is_reached_at_both_ends(
    kernel: Backend, edu: Edu, iommu: File, ioas: int, page: Buffer
) -> None:
    """If memory and IOVA let the table have one leaf for it, or if not."""
    area = kernel.buffer(4 << 20)
    start = -area.address % (2 << 20)
    home, large = 0x10_0000, 0x4000_0000
    map_user(iommu, ioas, page.address, PAGE, home)
    map_user(iommu, ioas, area.address + start, 2 << 20, large)
    for offset in (0, (2 << 20) - 16):
        area.view[start + offset : start + offset + 16] = MARK[::-1]
        assert reads(edu, page, large + offset, home) == MARK[::-1]
    assert reads(edu, page, large + (2 << 20), home) == bytes(16)
    unmap(iommu, ioas, large, 2 << 20)
    assert reads(edu, page, large, home) == bytes(16)
    area.close()


@pytest.mark.since("6.15")  # the HWPT's flag
def test_a_unit_counts_a_domain_while_a_device_is_attached_to_it(
    kernel: Backend, edu: Edu, iommu: File, ioas: int
) -> None:
    attached = domains_used(kernel)
    spare = hwpt_alloc(iommu, edu.vfio.devid, ioas, IOMMU_HWPT_ALLOC_PASID)
    assert domains_used(kernel) == attached
    assert edu.vfio.attach(spare) == spare
    assert domains_used(kernel) == attached
    edu.vfio.detach()
    assert domains_used(kernel) == attached - 1
    destroy(iommu, spare)
    edu.vfio.attach(ioas_alloc(iommu))
    assert domains_used(kernel) == attached
