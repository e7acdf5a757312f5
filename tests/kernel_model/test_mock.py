"""What of the mock driver is the model's own affair: releases, machines, numbers; the rest is in the suite."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from conformance.mock import MockDevice, access_replace, create_access, mock_domain, mock_domain_flags, mock_replace
from conformance.steps import PAGE, destroy, fails, ioas_alloc, map_user
from fakedev.machines.named import MACHINES
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.kernel import Kernel
from uapi import iommufd_test as abi


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with Kernel("mock") as kernel:
        yield kernel


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_every_machine_has_the_mock_driver(machine: str) -> None:
    with Kernel(machine) as kernel, kernel.open("/dev/iommu") as iommu:
        assert mock_domain(iommu, ioas_alloc(iommu)) == MockDevice(2, 4, 3)


def test_machine_mock_is_memory_only(kernel: Kernel) -> None:
    assert kernel.machine.name == "mock"
    assert not kernel.devices
    assert not kernel.machine.units


def test_old_release_has_fewer_operations() -> None:
    with Kernel("mock", "6.2") as kernel, kernel.open("/dev/iommu") as iommu:
        ioas = ioas_alloc(iommu)
        mock = mock_domain(iommu, ioas)
        for late in (
            lambda: mock_replace(iommu, mock.stdev, ioas),
            lambda: mock_domain_flags(iommu, ioas, 0),
            lambda: access_replace(iommu, 0, ioas),
        ):
            with fails(errno.EOPNOTSUPP):
                late()


def test_old_release_has_fewer_device_flags() -> None:
    with Kernel("mock", "6.12") as kernel, kernel.open("/dev/iommu") as iommu:
        ioas = ioas_alloc(iommu)
        mock_domain_flags(iommu, ioas, abi.MOCK_FLAGS_DEVICE_NO_DIRTY)
        with fails(errno.EINVAL):
            mock_domain_flags(iommu, ioas, abi.MOCK_FLAGS_DEVICE_PASID)


def test_numbers_of_devices_are_the_lowest_free(kernel: Kernel) -> None:
    with kernel.open("/dev/iommu") as iommu:
        ioas = ioas_alloc(iommu)

        def names() -> list[str]:
            (context,) = kernel.contexts
            return [idev.dev.name for idev in context.objects.each(IommufdDevice)]

        first, _ = mock_domain(iommu, ioas), mock_domain(iommu, ioas)
        assert names() == ["iommufd_mock0", "iommufd_mock1"]
        destroy(iommu, first.stdev)
        assert names() == ["iommufd_mock1"]
        mock_domain(iommu, ioas)
        assert sorted(names()) == ["iommufd_mock0", "iommufd_mock1"]


def test_every_device_has_a_group_of_its_own_after_those_of_the_machine() -> None:
    with Kernel() as kernel, kernel.open("/dev/iommu") as iommu:
        ioas = ioas_alloc(iommu)
        for _ in range(2):
            mock_domain(iommu, ioas)
        (context,) = kernel.contexts
        groups = [idev.dev.group for idev in context.objects.each(IommufdDevice)]
        assert all(group is not None and len(group.devices) == 1 for group in groups)
        boot = {device.group.id for device in kernel.devices.values() if device.group is not None}
        assert {group.id for group in groups if group is not None} == {len(boot), len(boot) + 1}


def test_nothing_is_left_after_the_last_close(kernel: Kernel) -> None:
    iommu = kernel.open("/dev/iommu")
    ioas = ioas_alloc(iommu)
    with kernel.buffer(4 * PAGE) as buffer:
        mock_domain(iommu, ioas)
        access = create_access(iommu, ioas)
        map_user(iommu, ioas, buffer.address, 4 * PAGE)
        iommu.close()
        os.close(access)
        with kernel.entered():
            pass
        assert not kernel.contexts
        assert (kernel.process.mm.pinned_vm, buffer.pins) == (0, 0)
