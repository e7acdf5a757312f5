"""Context entries: which tables a source's requests are translated by.

Mirrors domain_context_mapping_one(), context_setup_pass_through() and domain_context_clear_one() of
drivers/iommu/intel/iommu.c at 7.3 for legacy mode, where the entry points to page tables; for scalable mode, where it
points to the device's PASID directory from its probe on, device_pasid_table_setup() of pasid.c. Left out: entries
copied from an earlier kernel, and a device's removal.
"""

from __future__ import annotations

from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries
from kernel_model.errors import KernelBug
from kernel_model.iommu.intel.device import DeviceInfo


def context_clear(info: DeviceInfo) -> None:
    """Legacy mode: not present first, then the caches, then the rest of the entry."""
    unit = info.unit
    address = unit.context_address(info.rid, allocate=False)
    if address is None:
        return
    low, high = unit.read_entry(address)
    did = entries.context_did(high)
    unit.write_entry(address, (low & ~entries.ENTRY_PRESENT, high))
    unit.flush_context(did, info.rid, qi.SELECTIVE)
    unit.flush_iotlb_domain(did)
    if info.ats_enabled:
        unit.flush_device_tlb(info.rid, info.pfsid, info.ats_qdep)
    unit.write_entry(address, (0, 0))


def context_set(info: DeviceInfo, tt: int, table: int, aw: int, did: int) -> None:
    """Legacy mode: translate by `table`, or not at all. ENOMEM. An entry that is present is left alone."""
    unit = info.unit
    address = unit.context_address(info.rid, allocate=True)
    if address is None or unit.read_entry(address)[0] & entries.ENTRY_PRESENT:
        return
    unit.write_entry(address, entries.context_entry(tt, table, aw, did))
    unit.context_present_cache_flush(did, info.rid)


def setup_sm_context(info: DeviceInfo) -> None:
    """intel_pasid_setup_sm_context(): point to the device's PASID directory; PASID 0 is for requests without. ENOMEM.

    Of a device behind a bridge that takes its requests over, the bridge's request id gets nothing: it stays blocked.
    """
    unit, table = info.unit, info.pasid_table
    if table is None:
        raise KernelBug(f"{info.device.name} has no PASID table")
    address = unit.context_address(info.rid, allocate=True)
    if address is None or unit.read_entry(address)[0] & entries.ENTRY_PRESENT:
        return
    flags = 0
    if info.ats_supported:
        flags |= entries.SM_DTE
    if info.pasid_supported:
        flags |= entries.SM_PASIDE
    if info.pri_supported:
        flags |= entries.SM_PRE
    low, high, _, _ = entries.scalable_context_entry(table.directory, table.pdts, flags, rid_pasid=0)
    unit.write_entry(address, (low, high))
    if unit.caps.caching_mode:  # what is not present is cached under domain 0
        unit.flush_context(0, info.rid, qi.SELECTIVE)
        unit.flush_iotlb_domain(0)
