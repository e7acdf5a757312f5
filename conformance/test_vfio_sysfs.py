"""Giving a PCI function to vfio-pci through sysfs, and what a client finds there.

Sources: drivers/base/bus.c, drivers/pci/pci-sysfs.c, drivers/iommu/iommu.c (groups), drivers/vfio/vfio_main.c (nodes).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import edu_functions
from conformance.drivers.vfio import PCI_DEVICES, VfioDevice, attribute, driver_of, iommu_group, node, store, take
from conformance.layout import Layout
from conformance.steps import fails
from uapi.backend import Backend, File

pytestmark = pytest.mark.needs("iommu", "root", "vfio_cdev")

DRIVER = "/sys/bus/pci/drivers/vfio-pci"
PROBE = "/sys/bus/pci/drivers_probe"
NOBODY = "0000:00:1e.7"


@pytest.fixture
def bound(kernel: Backend, edu_address: str) -> Iterator[str]:
    """The address of edu, which vfio-pci has; it gets it back after the test."""
    plain: Backend = getattr(kernel, "inner", kernel)
    take(plain, edu_address)
    yield edu_address
    take(plain, edu_address)


def test_attributes_of_edu(kernel: Backend, edu_address: str) -> None:
    here = f"{PCI_DEVICES}/{edu_address}"
    names = ("vendor", "device", "class", "revision", "subsystem_vendor", "subsystem_device")
    assert [attribute(kernel, f"{here}/{name}") for name in names] == [
        "0x1234",
        "0x11e8",
        "0x00ff00",
        "0x10",
        "0x1af4",
        "0x1100",
    ]
    first = attribute(kernel, f"{here}/resource").split("\n")[0].split()
    assert int(first[1], 16) - int(first[0], 16) == (1 << 20) - 1
    assert first[2] == "0x0000000000040200"


def test_group_lists_its_devices_and_its_reserved_regions(kernel: Backend, edu_address: str, layout: Layout) -> None:
    group = f"/sys/kernel/iommu_groups/{iommu_group(kernel, edu_address)}"
    # On a machine with more functions in the slot, those too.
    assert sorted(kernel.listdir(f"{group}/devices")) == edu_functions(getattr(kernel, "inner", kernel))
    assert attribute(kernel, f"{group}/reserved_regions") == f"{layout.msi_start:#018x} {layout.msi_last:#018x} msi"


def test_override_is_shown_as_written(kernel: Backend, bound: str) -> None:
    path = f"{PCI_DEVICES}/{bound}/driver_override"
    assert attribute(kernel, path) == "vfio-pci"
    store(kernel, path, "other\n")
    assert attribute(kernel, path) == "other"
    store(kernel, path, "\n")
    assert attribute(kernel, path) == "(null)"
    store(kernel, path, "vfio-pci")


def test_unbind_takes_the_node_away_and_probe_brings_it_back(kernel: Backend, bound: str) -> None:
    before = node(kernel, bound)
    store(kernel, f"{DRIVER}/unbind", bound)
    assert driver_of(kernel, bound) is None
    with fails(errno.ENOENT):
        kernel.listdir(f"{PCI_DEVICES}/{bound}/vfio-dev")
    with fails(errno.ENOENT):
        kernel.open(before)
    store(kernel, PROBE, bound)
    assert (driver_of(kernel, bound), node(kernel, bound)) == ("vfio-pci", before)


def test_unbind_of_a_function_that_is_not_bound_is_enodev(kernel: Backend, bound: str) -> None:
    store(kernel, f"{DRIVER}/unbind", bound)
    with fails(errno.ENODEV):
        store(kernel, f"{DRIVER}/unbind", bound)


def test_bind_without_an_override_is_enodev(kernel: Backend, bound: str) -> None:
    store(kernel, f"{DRIVER}/unbind", bound)
    store(kernel, f"{PCI_DEVICES}/{bound}/driver_override", "\n")
    with fails(errno.ENODEV):
        store(kernel, f"{DRIVER}/bind", bound)
    store(kernel, PROBE, bound)
    assert driver_of(kernel, bound) is None


def test_bind_with_an_override(kernel: Backend, bound: str) -> None:
    store(kernel, f"{DRIVER}/unbind", bound)
    store(kernel, f"{DRIVER}/bind", bound)
    assert driver_of(kernel, bound) == "vfio-pci"


def test_bind_of_a_bound_function_is_ebusy(kernel: Backend, bound: str) -> None:
    with fails(errno.EBUSY):
        store(kernel, f"{DRIVER}/bind", bound)


def test_probe_of_a_bound_function_succeeds(kernel: Backend, bound: str) -> None:
    store(kernel, PROBE, bound)
    assert driver_of(kernel, bound) == "vfio-pci"


@pytest.mark.parametrize("path", [PROBE, f"{DRIVER}/bind", f"{DRIVER}/unbind"], ids=["probe", "bind", "unbind"])
def test_address_where_nothing_is_is_enodev(kernel: Backend, edu_address: str, path: str) -> None:
    with fails(errno.ENODEV):
        store(kernel, path, NOBODY)


def test_unbound_function_cannot_be_opened_by_its_old_node_but_anew(kernel: Backend, bound: str, iommu: File) -> None:
    store(kernel, f"{DRIVER}/unbind", bound)
    with VfioDevice(kernel, bound) as device:
        assert device.bind(iommu) == 1
