"""Which cached translations a change of a domain's tables concerns, and their invalidation.

Mirrors drivers/iommu/intel/cache.c at 7.3: a *cache tag* says that the caches of a unit, or of a device, may hold
translations of this domain under a domain id and a PASID. A domain that others are nested on has tags of its nested
domains' ids besides. The descriptors of one flush go to a unit in batches. Left out: write buffer flushes (units that
need them are refused), devices whose device TLB must be flushed twice.
"""

from __future__ import annotations

from fakedev.vtd import descriptors as qi
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import IOMMU_NO_PASID
from kernel_model.iommu.intel.device import DeviceInfo
from kernel_model.iommu.intel.dmar import MAX_AGAW_PFN_WIDTH, IntelUnit

#: enum cache_tag_type.
IOTLB, DEVTLB, NESTING_IOTLB, NESTING_DEVTLB = range(4)
_IOTLBS = (IOTLB, NESTING_IOTLB)
_BATCH = 16


class CacheTag:
    """`struct cache_tag`."""

    __slots__ = ("did", "info", "pasid", "type", "unit", "users")

    def __init__(self, kind: int, info: DeviceInfo, did: int, pasid: int) -> None:
        self.type = kind
        self.unit = info.unit
        #: Of a device TLB: whose.
        self.info = info
        self.did = did
        self.pasid = pasid
        self.users = 1

    def matches(self, kind: int, info: DeviceInfo, did: int, pasid: int) -> bool:
        """cache_tage_match(): a TLB of a unit is one for all devices."""
        if self.type != kind or self.did != did or self.pasid != pasid:
            return False
        return self.unit is info.unit if kind in _IOTLBS else self.info is info


class CacheTags:
    """The tags of one domain, those of a unit one after the other.

    `by_pasid`: the domain's translations are flushed with the PASID, as those of a first stage must be; `first_stage`:
    it is one, whose hardware never caches what is not present.
    """

    def __init__(self, by_pasid: bool = False, first_stage: bool = False) -> None:
        self._by_pasid = by_pasid
        self._first_stage = first_stage
        self._batch_allocated = False
        self.tags: list[CacheTag] = []

    def assign(self, kind: int, info: DeviceInfo, did: int, pasid: int) -> None:
        """cache_tag_assign(). ENOMEM."""
        if injecting:
            kmalloc("struct cache_tag")
        after = 0
        for index, tag in enumerate(self.tags):
            if tag.matches(kind, info, did, pasid):
                tag.users += 1
                return
            if tag.unit is info.unit:
                after = index + 1
        self.tags.insert(after, CacheTag(kind, info, did, pasid))

    def unassign(self, kind: int, info: DeviceInfo, did: int, pasid: int) -> None:
        """cache_tag_unassign(): one that is not there is no error."""
        for tag in self.tags:
            if tag.matches(kind, info, did, pasid):
                tag.users -= 1
                if not tag.users:
                    self.tags.remove(tag)
                return

    def assign_domain(self, info: DeviceInfo, did: int, pasid: int, nesting: bool = False) -> None:
        """__cache_tag_assign_domain() and, `nesting`, -_parent_domain(): the unit's, and the device's own. ENOMEM."""
        if injecting and not self._batch_allocated:
            kmalloc("struct qi_batch")
        self._batch_allocated = True
        iotlb, devtlb = (NESTING_IOTLB, NESTING_DEVTLB) if nesting else (IOTLB, DEVTLB)
        self.assign(iotlb, info, did, pasid)
        if info.ats_enabled:
            try:
                self.assign(devtlb, info, did, pasid)
            except BaseException:
                self.unassign(iotlb, info, did, pasid)
                raise

    def unassign_domain(self, info: DeviceInfo, did: int, pasid: int, nesting: bool = False) -> None:
        """Undo `assign_domain`."""
        self.unassign(NESTING_IOTLB if nesting else IOTLB, info, did, pasid)
        if info.ats_enabled:
            self.unassign(NESTING_DEVTLB if nesting else DEVTLB, info, did, pasid)

    # -- flushes -----------------------------------------------------------------------------------------------------

    def flush_range(self, start: int, last: int, hint: int = 0) -> None:
        """After an unmap of [start, last]; `hint` says that no table was freed."""
        address, order = _aligned(start, last)
        if len(self.tags) == 1 and self.tags[0].type in _IOTLBS:  # by far the most frequent
            tag = self.tags[0]
            tag.unit.submit([self._iotlb(tag, address, order, hint)])
            return
        batch = _Batch()
        for tag in self.tags:
            if tag.type in _IOTLBS:
                batch.add(tag.unit, self._iotlb(tag, address, order, hint))
            elif not tag.unit.translating:
                continue
            elif tag.type == DEVTLB:
                batch.add(tag.unit, _device_tlb(tag, address, order))
            else:  # what of it came through the nested domain's tables nobody knows
                batch.add(tag.unit, _device_tlb(tag, 0, MAX_AGAW_PFN_WIDTH))
        batch.flush()

    def flush_all(self) -> None:
        self.flush_range(0, (1 << 64) - 1)

    def flush_range_np(self, start: int, last: int) -> None:
        """After a map of [start, last], which only hardware with caching mode needs to hear of."""
        if self._first_stage:
            return
        address, order = _aligned(start, last)
        if len(self.tags) == 1 and self.tags[0].type in _IOTLBS:
            tag = self.tags[0]
            if tag.unit.caps.caching_mode:
                tag.unit.submit([self._iotlb(tag, address, order, 0)])
            return
        batch = _Batch()
        for tag in self.tags:
            if tag.unit.caps.caching_mode and tag.type in _IOTLBS:
                batch.add(tag.unit, self._iotlb(tag, address, order, 0))
        batch.flush()

    def _iotlb(self, tag: CacheTag, address: int, order: int, hint: int) -> tuple[int, int]:
        """cache_tag_flush_iotlb(): all of the domain, or of its PASID, where the unit cannot do that many pages."""
        if self._by_pasid:
            if order >= MAX_AGAW_PFN_WIDTH:
                return qi.pasid_iotlb(tag.did, tag.pasid, 0, 0, qi.PIOTLB_PASID)
            return qi.pasid_iotlb(tag.did, tag.pasid, address, order, qi.PIOTLB_PAGES, hint)
        if not tag.unit.caps.page_selective or order > tag.unit.caps.am_max:
            return qi.iotlb(tag.did, 0, 0, qi.DOMAIN)
        return qi.iotlb(tag.did, address, order, qi.SELECTIVE, hint)


class _Batch:
    """`struct qi_batch`: descriptors for one unit at a time."""

    __slots__ = ("descriptors", "unit")

    def __init__(self) -> None:
        self.unit: IntelUnit | None = None
        self.descriptors: list[tuple[int, int]] = []

    def add(self, unit: IntelUnit, descriptor: tuple[int, int]) -> None:
        if unit is not self.unit:
            self.flush()
            self.unit = unit
        self.descriptors.append(descriptor)
        if len(self.descriptors) == _BATCH:
            self.flush()

    def flush(self) -> None:
        if self.unit is not None and self.descriptors:
            self.unit.submit(self.descriptors)
            self.descriptors = []


def _aligned(start: int, last: int) -> tuple[int, int]:
    """calculate_psi_aligned_address(): the aligned power of two of pages that spans the range, and log2 of it."""
    bits = (start & -4096 ^ last).bit_length()
    if bits >= 64:
        return 0, MAX_AGAW_PFN_WIDTH
    order = max(bits - 12, 0)
    return start & -(4096 << order), order


def _device_tlb(tag: CacheTag, address: int, order: int) -> tuple[int, int]:
    info = tag.info
    if tag.pasid == IOMMU_NO_PASID:
        return qi.device_tlb(info.rid, info.pfsid, address, order, info.ats_qdep)
    return qi.pasid_device_tlb(info.rid, info.pfsid, tag.pasid, address, order, info.ats_qdep)
