"""A mock device that goes while a PASID of it is attached. A real 7.3.4 was seen to do the same, with warnings, and to
keep the memory for ever; so no test of the suite does it to a kernel that somebody uses."""

import errno

import pytest

from conformance.mock import MockDevice, check_refs, mock_domain
from conformance.pasids import pasid_attach, ready
from conformance.steps import PAGE, destroy, fails, ioas_alloc, map_user
from kernel_model.kernel import Kernel

P = 5


@pytest.fixture
def kernel():
    with Kernel("mock") as kernel:
        yield kernel


def test_device_that_goes_with_a_pasid_attached_leaves_its_object_and_what_that_holds(kernel):
    with kernel.open("/dev/iommu") as iommu:
        dev, (own,) = ready(iommu)
        pasid_attach(iommu, dev.stdev, P, own)
        destroy(iommu, dev.stdev)
        with fails(errno.ENOENT):
            destroy(iommu, dev.stdev)
        for number in (dev.idev, own, dev.ioas):
            with fails(errno.EBUSY):
                destroy(iommu, number)
        assert ioas_alloc(iommu) == dev.stdev
        assert mock_domain(iommu, dev.ioas) == MockDevice(4, 7, 6)


def test_close_with_a_pasid_attached_ends_and_the_next_context_is_sound(kernel):
    with kernel.open("/dev/iommu") as iommu:
        dev, (own,) = ready(iommu)
        pasid_attach(iommu, dev.stdev, P, own)
    assert not kernel.contexts
    with kernel.open("/dev/iommu") as iommu:
        assert mock_domain(iommu, ioas_alloc(iommu)) == MockDevice(2, 4, 3)


def test_pages_in_what_a_lost_device_holds_stay_pinned_after_the_close(kernel):
    """As on a real 7.3.4, found by a random program; without the PASID nothing is lost and nothing stays."""
    memory = kernel.buffer(2 * PAGE)
    for number, attached in enumerate((False, True)):
        address = memory.address + number * PAGE
        with kernel.open("/dev/iommu") as iommu:
            dev, (own,) = ready(iommu)
            map_user(iommu, dev.ioas, address, PAGE)
            if attached:
                pasid_attach(iommu, dev.stdev, P, own)
            check_refs(iommu, address, PAGE, 1)
        with kernel.open("/dev/iommu") as iommu:
            check_refs(iommu, address, PAGE, number)
