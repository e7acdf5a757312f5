"""Replacing by a HWPT of another IOMMU's driver: refused by the model, while a real 7.3.4 crashes."""

import errno

import pytest

from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import VfioDevice
from conformance.mock import mock_domain, mock_replace
from conformance.steps import fails, hwpt_alloc, ioas_alloc
from kernel_model.kernel import Kernel


@pytest.fixture
def world():
    with Kernel("q35-vtd-legacy") as kernel:
        address = edu_functions(kernel)[0]
        with kernel.open("/dev/iommu") as iommu, VfioDevice(kernel, address) as device:
            device.bind(iommu)
            yield iommu, device


def test_replace_by_a_hwpt_of_another_driver_is_einval_and_keeps_the_old(world):
    iommu, device = world
    mock = mock_domain(iommu, ioas_alloc(iommu))
    ioas = ioas_alloc(iommu)
    own = hwpt_alloc(iommu, device.devid, ioas)
    assert device.attach(own) == own
    with fails(errno.EINVAL):
        mock_replace(iommu, mock.stdev, own)
    with fails(errno.EINVAL):
        device.attach(mock.hwpt)
    assert mock_replace(iommu, mock.stdev, mock.hwpt) == mock.hwpt
    assert device.attach(own) == own


def test_replace_by_an_ioas_passes_over_the_automatic_hwpt_of_another_driver(world):
    iommu, device = world
    ioas = ioas_alloc(iommu)
    mock = mock_domain(iommu, ioas)
    own = device.attach(ioas)
    assert device.attach(ioas) == own != mock.hwpt
    assert mock_replace(iommu, mock.stdev, ioas) == mock.hwpt
