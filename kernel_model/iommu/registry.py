"""Which driver takes which IOMMU, and the probe of all devices at boot.

A vendor is one line in `_PROBES`. Mirrors `bus_iommu_probe()` of drivers/iommu/iommu.c: devices in the order of the bus
scan, groups numbered as they are made (pci_group.py says which), every group in its default domain (translated, as the
VM boots).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fakedev.pci import PciFunction
from kernel_model.iommu.arm_smmu_v3.device import SmmuDevice
from kernel_model.iommu.arm_smmu_v3.iommu import ArmSmmuV3
from kernel_model.iommu.core import (
    IOMMU_DOMAIN_DMA,
    IOMMU_RESV_DIRECT,
    IOMMU_RESV_DIRECT_RELAXABLE,
    Device,
    Domain,
    Group,
    IommuDriver,
    get_resv_regions,
    group_set_domain,
    paging_domain_alloc,
)
from kernel_model.iommu.intel.dmar import IntelUnit
from kernel_model.iommu.intel.iommu import IntelIommu
from kernel_model.iommu.intel.irq_remapping import IrqRemapping
from kernel_model.iommu.intel.prq import PageRequests
from kernel_model.iommu.mock.iommu import MockIommu
from kernel_model.iommu.pci_group import pci_device_group
from kernel_model.iommu.sysfs import pci_root, publish
from uapi.behaviours import has
from uapi.version import includes

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

#: Vectors of the units' events, faults and page requests: below those that PCI functions get, above the exceptions.
_FIRST_FAULT_VECTOR, _FIRST_REQUEST_VECTOR = 0x20, 0x30
#: A vendor's probe: starts its units; for each request id behind one, the driver of it.
Probe = Callable[["Kernel"], dict[int, IommuDriver]]


def _probe_intel(kernel: Kernel) -> dict[int, IommuDriver]:
    found: dict[int, IommuDriver] = {}
    units = [IntelUnit(kernel.machine, kernel.pages, base) for base, _ in kernel.machine.vtd_units]
    for unit in units:
        unit.enable_qi()
    _enable_irq_remapping(kernel, units)
    for number, (unit, (_, rids)) in enumerate(zip(units, kernel.machine.vtd_units, strict=True)):
        unit.start(kernel.interrupts, _FIRST_FAULT_VECTOR + number)
        if unit.caps.page_request:
            unit.prq = PageRequests(kernel.machine, kernel.pages, unit)
            unit.prq.start(kernel.interrupts, _FIRST_REQUEST_VECTOR + number)
        driver = IntelIommu(unit, kernel.machine, number, write_only=has(kernel.release, "vtd-write-only"))
        found.update(dict.fromkeys(rids, driver))
    return found


def _enable_irq_remapping(kernel: Kernel, units: list[IntelUnit]) -> None:
    """intel_prepare_irq_remapping(): all units remap interrupts or none, and all in the same mode."""
    if not units or not all(unit.caps.interrupt_remapping for unit in units):
        return
    extended = all(unit.caps.extended_interrupts for unit in units)
    root = kernel.machine.root
    for unit, (_, rids) in zip(units, kernel.machine.vtd_units, strict=True):
        unit.irq_remapping = IrqRemapping(unit, root, extended)
        unit.irq_remapping.enable()
        for rid in rids:
            kernel.interrupts.set_msi_domain(root.functions[rid], unit.irq_remapping)


def _probe_smmu(kernel: Kernel) -> dict[int, IommuDriver]:
    found: dict[int, IommuDriver] = {}
    units: dict[int, SmmuDevice] = {}
    for base, rids in kernel.machine.smmu_units:
        unit = units[base] = SmmuDevice(kernel.machine, kernel.pages, base)
        found.update(dict.fromkeys(rids, ArmSmmuV3(unit, kernel.machine.root)))
    if units:
        kernel.machine.wired_sink = lambda base, name: units[base].interrupt(name)
    for unit in units.values():
        unit.reset()
    return found


_PROBES: list[Probe] = [_probe_intel, _probe_smmu]


def attach_drivers(kernel: Kernel) -> list[Device]:
    """Start the IOMMUs of the kernel's machine and make a device of every PCI function, in the order of a bus scan.

    A function behind no IOMMU is a device without group. The mock IOMMU is there on every machine, without devices yet.
    """
    drivers: dict[int, IommuDriver] = {}
    for probe in _PROBES:
        drivers.update(probe(kernel))
    devices: list[Device] = []
    groups: list[Group] = []
    group_of: dict[PciFunction, Group] = {}
    for function in kernel.machine.functions:
        driver = drivers.get(function.rid)
        device = Device(function.address, driver, function, kernel.machine.properties[function.rid])
        devices.append(device)
        if driver is None:
            continue
        driver.probe_device(device, kernel.machine.root.requester_id(function))
        group = pci_device_group(kernel.machine.root, function, group_of.get)
        if group is None:
            group = Group(len(groups))
            groups.append(group)
        group.devices.append(device)
        device.group = group_of[function] = group
        device.require_direct = any(region.type == IOMMU_RESV_DIRECT for region in get_resv_regions(device))
    for group in groups:
        _setup_default_domain(group)
    # From 6.8 a driver without firmware behind it was found by asking the first such driver: the real, if there is one.
    hidden = includes(kernel.release, "6.8") and not has(kernel.release, "mock-beside-a-real-iommu")
    kernel.mock_iommu = MockIommu(len(groups), kernel.release, hidden=hidden and bool(groups))
    publish(kernel.files, devices, pci_root(kernel.machine.host_bridge))
    return devices


def _setup_default_domain(group: Group) -> None:
    domain = paging_domain_alloc(group.devices[0])
    domain.type = IOMMU_DOMAIN_DMA
    group.default_domain = domain
    for device in group.devices:
        _create_direct_mappings(domain, device)
    group_set_domain(group, domain)
    for device in group.devices:
        if device.iommu is not None:
            device.iommu.probe_finalize(device)


def _create_direct_mappings(domain: Domain, device: Device) -> None:
    """iommu_create_device_direct_mappings(): what the firmware wants mapped one to one."""
    page = domain.pgsize_bitmap & -domain.pgsize_bitmap
    for region in get_resv_regions(device):
        if region.type in (IOMMU_RESV_DIRECT, IOMMU_RESV_DIRECT_RELAXABLE):
            for address in range(region.start & -page, region.last + 1, page):
                if domain.iova_to_phys(address) is None:
                    domain.map(address, address, page, region.prot)


def groups_of(devices: list[Device]) -> list[Group]:
    """The groups of `devices` by number."""
    return sorted({d.group.id: d.group for d in devices if d.group is not None}.values(), key=lambda group: group.id)
