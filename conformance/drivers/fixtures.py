"""Fixtures for tests that drive a device.

A device is opened for each test and closed after it: a bind and its close cost some 30 ms in a guest under TCG, and no
state leaks but the device's own registers, which edu's driver puts in order when it probes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import Dsa
from conformance.drivers.edu import Edu, edu_functions
from conformance.drivers.vfio import VfioDevice, take
from conformance.dsa_offers import (
    Ask,
    find_dsa,
    lacks_ats,
    lacks_page_requests,
    lacks_pasids,
    lacks_stalls,
    lacks_waiting,
)
from conformance.layout import LAYOUT, Layout
from conformance.mock import Reporting, reporting_device
from conformance.steps import PAGE
from conformance.vsmmu import Guest as SmmuGuest
from conformance.vtd_guest import Guest as VtdGuest
from uapi.backend import Backend, Buffer, File

#: Where the first edu device is, by kernel: the walk through sysfs costs more than a bind.
_address: dict[tuple[str, str], str] = {}
_dsa_address: dict[tuple[str, str, Ask], str] = {}


@pytest.fixture
def edu_address(kernel: Backend) -> str:
    """Where the edu device is, "0000:00:10.0"."""
    key = (kernel.name, kernel.release)
    if key not in _address:
        addresses = edu_functions(getattr(kernel, "inner", kernel))
        if not addresses:
            pytest.skip("no edu device (PCI 1234:11e8)")
        _address[key] = addresses[0]
    return _address[key]


@pytest.fixture
def cdev(kernel: Backend, edu_address: str) -> Iterator[VfioDevice]:
    """The edu device's VFIO character device, open and not bound."""
    # Not recorded: whether vfio-pci has the device already depends on the tests before.
    take(getattr(kernel, "inner", kernel), edu_address)
    with VfioDevice(kernel, edu_address) as device:
        yield device


@pytest.fixture
def device(iommu: File, cdev: VfioDevice) -> VfioDevice:
    """The edu device bound to `iommu`, its object id 1, attached to nothing."""
    cdev.bind(iommu)
    return cdev


@pytest.fixture
def edu(device: VfioDevice, ioas: int) -> Iterator[Edu]:
    """The edu device's driver, probed; the device is attached to `ioas`."""
    device.attach(ioas)
    driver = Edu(device)
    yield driver
    driver.remove()


@pytest.fixture
def idle_edu(device: VfioDevice) -> Iterator[Edu]:
    """The edu device's driver, probed; the device is attached to nothing. A file's `edu = idle_edu` takes it."""
    driver = Edu(device)
    yield driver
    driver.remove()


@pytest.fixture
def smmu_guest(kernel: Backend, iommu: File, device: VfioDevice) -> Iterator[SmmuGuest]:
    """A guest with a vIOMMU for the edu device, which is attached to nothing."""
    guest = SmmuGuest(kernel, iommu, device)
    yield guest
    guest.close()


@pytest.fixture
def vtd_guest(kernel: Backend, iommu: File, device: VfioDevice, ioas: int) -> Iterator[VtdGuest]:
    """A guest with the edu device, which is attached to nothing: device 1, IOAS 2, parent 3."""
    guest = VtdGuest(kernel, iommu, device, ioas)
    yield guest
    guest.buffer.close()


def _dsa(kernel: Backend, iommu: File, ask: Ask) -> Iterator[Dsa]:
    """The driver of the first DSA that lacks nothing, bound to `iommu` with object id 1, attached to nothing."""
    inner = getattr(kernel, "inner", kernel)
    key = (kernel.name, kernel.release, ask)
    if key not in _dsa_address:
        address, missing = find_dsa(inner, ask)
        if address is None:
            pytest.skip(missing)
        _dsa_address[key] = address
    address = _dsa_address[key]
    take(inner, address)
    with VfioDevice(kernel, address) as device:
        device.bind(iommu)
        driver = Dsa(device)
        yield driver
        if not driver.closed:
            driver.remove()


@pytest.fixture
def dsa(kernel: Backend, iommu: File) -> Iterator[Dsa]:
    """A DSA with PASIDs."""
    yield from _dsa(kernel, iommu, lacks_pasids)


@pytest.fixture
def ats_dsa(kernel: Backend, iommu: File) -> Iterator[Dsa]:
    """One that has ATS."""
    yield from _dsa(kernel, iommu, lacks_ats)


@pytest.fixture
def stalling_dsa(kernel: Backend, iommu: File) -> Iterator[Dsa]:
    """One whose requests an SMMUv3 lets wait."""
    yield from _dsa(kernel, iommu, lacks_stalls)


@pytest.fixture
def asking_dsa(kernel: Backend, iommu: File) -> Iterator[Dsa]:
    """One whose page requests reach its client."""
    yield from _dsa(kernel, iommu, lacks_page_requests)


@pytest.fixture
def waiting_dsa(kernel: Backend, iommu: File) -> Iterator[Dsa]:
    """One whose requests wait for its client, whichever way."""
    yield from _dsa(kernel, iommu, lacks_waiting)


@pytest.fixture
def records(kernel: Backend) -> Iterator[Buffer]:
    """A page for a DSA's completion records."""
    buffer = kernel.buffer(PAGE)
    yield buffer
    buffer.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    """For a signal of the kernel's, with none pending; reading it does not wait."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> Layout:
    """Where the device's domains end, and where interrupts go."""
    found = request.config.stash[LAYOUT]
    assert found is not None, "no device behind an IOMMU that the suite knows"
    return found


@pytest.fixture
def reporting(kernel: Backend, iommu: File) -> Iterator[Reporting]:
    """A mock device that reports its page faults, and the file of their queue."""
    ids, queue = reporting_device(kernel, iommu)
    yield ids, queue
    queue.close()
