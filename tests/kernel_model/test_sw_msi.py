"""Doorbell pages of MSIs that the IOMMU translates. No machine has them, so the mock driver's devices get a region."""

import errno

import pytest

from conformance.mock import mock_domain, mock_replace
from conformance.pasids import nest_parent, nested, pasid_attach, pasid_detach, pasid_device, pasid_hwpt
from conformance.steps import destroy, fails, hwpt_alloc, ioas_alloc, iova_ranges
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.iommu.core import IOMMU_RESV_DIRECT_RELAXABLE, IOMMU_RESV_MSI, IOMMU_RESV_SW_MSI, ResvRegion
from kernel_model.iommufd.hwpt import Hwpt
from kernel_model.kernel import Kernel
from uapi.iommufd_test import MOCK_APERTURE_LAST, MOCK_APERTURE_START

START, LENGTH = 0x800_0000, 0x10_0000
#: Of Arm's interrupt translation service, as QEMU has it.
DOORBELL = 0x808_0040
PAGE = 4096
APART = [(MOCK_APERTURE_START, START - 1), (START + LENGTH, MOCK_APERTURE_LAST)]


@pytest.fixture
def world(monkeypatch):
    with Kernel("mock") as kernel:
        kernel.regions = [ResvRegion(START, LENGTH, 0, IOMMU_RESV_SW_MSI)]
        monkeypatch.setattr(kernel.mock_iommu, "resv_regions", lambda device: kernel.regions)
        with kernel.open("/dev/iommu") as iommu:
            yield kernel, iommu


def device_of(kernel, mock):
    (ctx,) = kernel.contexts
    return next(group.group.devices[0] for group in ctx.groups.values() if group.group.devices[0].number == mock)


def domain_of(kernel, hwpt):
    (ctx,) = kernel.contexts
    return ctx.objects.get(hwpt, Hwpt).domain


def ring(kernel, number=0, address=DOORBELL):
    return core.dma_prepare_msi(device_of(kernel, number), address)


def error_of(call, *arguments):
    with pytest.raises(KernelError) as caught:
        call(*arguments)
    return caught.value.errno


def test_the_region_is_reserved(world):
    _, iommu = world
    ioas = ioas_alloc(iommu)
    mock_domain(iommu, ioas)
    assert iova_ranges(iommu, ioas) == APART


def test_each_doorbell_page_gets_the_next_page_of_the_region(world):
    kernel, iommu = world
    mock = mock_domain(iommu, ioas_alloc(iommu))
    assert ring(kernel) == START + 0x40
    assert ring(kernel, address=DOORBELL + PAGE) == START + PAGE + 0x40
    assert ring(kernel, address=DOORBELL + 4) == START + 0x44
    domain = domain_of(kernel, mock.hwpt)
    assert domain.iova_to_phys(START + 0x40) == DOORBELL
    assert domain.iova_to_phys(START + PAGE) == DOORBELL - 0x40 + PAGE


def test_pages_are_numbered_for_the_context_and_mapped_where_they_are_used(world):
    kernel, iommu = world
    first, second = mock_domain(iommu, ioas_alloc(iommu)), mock_domain(iommu, ioas_alloc(iommu))
    assert ring(kernel, 0) == START + 0x40
    assert ring(kernel, 1, DOORBELL + PAGE) == START + PAGE + 0x40
    assert domain_of(kernel, first.hwpt).iova_to_phys(START + PAGE) is None
    assert domain_of(kernel, second.hwpt).iova_to_phys(START) is None
    assert ring(kernel, 1) == START + 0x40
    assert domain_of(kernel, second.hwpt).iova_to_phys(START + 0x40) == DOORBELL


def test_a_domain_that_the_group_enters_gets_the_pages_it_uses(world):
    kernel, iommu = world
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    mock, other = mock_domain(iommu, here), mock_domain(iommu, here)
    ring(kernel, 0)
    ring(kernel, 1, DOORBELL + PAGE)
    moved = mock_replace(iommu, mock.stdev, there)
    assert domain_of(kernel, moved).iova_to_phys(START + 0x40) == DOORBELL
    assert domain_of(kernel, moved).iova_to_phys(START + PAGE) is None
    within = hwpt_alloc(iommu, mock.idev, there)
    mock_replace(iommu, mock.stdev, within)
    assert domain_of(kernel, within).iova_to_phys(START + 0x40) == DOORBELL
    destroy(iommu, other.stdev)


def test_a_first_attachment_brings_the_pages_along(world):
    kernel, iommu = world
    dev = pasid_device(iommu)
    ring(kernel)
    pasid_detach(iommu, dev.stdev, 0)
    assert error_of(ring, kernel) == errno.EOPNOTSUPP  # it is blocked
    hwpt = hwpt_alloc(iommu, dev.idev, dev.ioas)
    assert domain_of(kernel, hwpt).iova_to_phys(START) is None
    pasid_attach(iommu, dev.stdev, 0, hwpt)
    assert domain_of(kernel, hwpt).iova_to_phys(START + 0x40) == DOORBELL


def test_a_nested_domain_has_them_in_its_parent(world):
    kernel, iommu = world
    dev = pasid_device(iommu)
    parent = nest_parent(iommu, dev)
    mock_replace(iommu, dev.stdev, nested(iommu, dev.idev, parent))
    assert ring(kernel) == START + 0x40
    assert domain_of(kernel, parent).iova_to_phys(START + 0x40) == DOORBELL


def test_a_pasid_brings_none(world):
    kernel, iommu = world
    dev = pasid_device(iommu)
    hwpt, other = pasid_hwpt(iommu, dev), pasid_hwpt(iommu, dev)
    mock_replace(iommu, dev.stdev, hwpt)
    ring(kernel)
    pasid_attach(iommu, dev.stdev, 5, other)
    assert domain_of(kernel, other).iova_to_phys(START) is None
    pasid_detach(iommu, dev.stdev, 5)


def test_a_context_has_64_pages(world):
    kernel, iommu = world
    mock_domain(iommu, ioas_alloc(iommu))
    for page in range(64):
        assert ring(kernel, address=DOORBELL + page * PAGE) == START + page * PAGE + 0x40
    assert error_of(ring, kernel, 0, DOORBELL + 64 * PAGE) == errno.EOVERFLOW
    assert ring(kernel) == START + 0x40


def test_pages_of_another_region_are_counted_from_its_start_but_with_the_others(world):
    kernel, iommu = world
    mock_domain(iommu, ioas_alloc(iommu))
    ring(kernel)
    kernel.regions = [ResvRegion(2 * START, LENGTH, 0, IOMMU_RESV_SW_MSI)]
    mock_domain(iommu, ioas_alloc(iommu))
    assert ring(kernel, 1) == 2 * START + 0x40
    for page in range(1, 63):
        ring(kernel, 1, DOORBELL + page * PAGE)
    assert error_of(ring, kernel, 0, DOORBELL + PAGE) == errno.EOVERFLOW


@pytest.mark.parametrize("kind", [IOMMU_RESV_MSI, IOMMU_RESV_DIRECT_RELAXABLE])
def test_without_such_a_region_the_doorbell_is_written_as_it_is(world, kind):
    kernel, iommu = world
    kernel.regions = [ResvRegion(START, LENGTH, 0, kind)]
    ioas = ioas_alloc(iommu)
    mock_domain(iommu, ioas)
    assert ring(kernel) == DOORBELL
    assert len(iova_ranges(iommu, ioas)) == (2 if kind == IOMMU_RESV_MSI else 1)


def test_a_domain_that_cannot_map_the_page_refuses_the_device(world, monkeypatch):
    kernel, iommu = world
    here, there = ioas_alloc(iommu), ioas_alloc(iommu)
    mock = mock_domain(iommu, here)
    ring(kernel)
    hwpt = hwpt_alloc(iommu, mock.idev, there)

    def refuse(*_):
        raise KernelError(errno.ENOMEM, "no page for a table")

    monkeypatch.setattr(domain_of(kernel, hwpt), "map", refuse, raising=False)
    with fails(errno.ENOMEM):
        mock_replace(iommu, mock.stdev, hwpt)
    assert iova_ranges(iommu, here) == APART
    assert iova_ranges(iommu, there) == [(MOCK_APERTURE_START, MOCK_APERTURE_LAST)]


def test_a_first_attachment_that_cannot_map_the_page_gives_the_regions_back(world, monkeypatch):
    kernel, iommu = world
    dev = pasid_device(iommu)
    ring(kernel)
    pasid_detach(iommu, dev.stdev, 0)
    hwpt = hwpt_alloc(iommu, dev.idev, dev.ioas)

    def refuse(*_):
        raise KernelError(errno.ENOMEM, "no page for a table")

    monkeypatch.setattr(domain_of(kernel, hwpt), "map", refuse, raising=False)
    with fails(errno.ENOMEM):
        pasid_attach(iommu, dev.stdev, 0, hwpt)
    assert iova_ranges(iommu, dev.ioas) == [(MOCK_APERTURE_START, MOCK_APERTURE_LAST)]


def test_a_device_without_a_group_or_in_an_identity_domain_writes_as_it_is():
    with Kernel("q35-vtd-legacy") as kernel:
        device = kernel.devices["0000:00:10.0"]
        assert core.dma_prepare_msi(core.Device("x", None), DOORBELL) == DOORBELL
        core.group_set_domain(device.group, device.iommu.identity_domain)
        assert core.dma_prepare_msi(device, DOORBELL) == DOORBELL
