"""Which cached translations a change of a domain's tables concerns, and their invalidation.

Mirrors drivers/iommu/intel/cache.c at 7.3: a *cache tag* says that the hardware of a unit may hold translations of this
domain under a domain id. Left out: tags of device TLBs and of nested domains.
"""

from __future__ import annotations

from fakedev.vtd import descriptors as qi
from kernel_model.iommu.intel.dmar import IntelUnit


class CacheTags:
    """The tags of one domain, in the order in which they were assigned."""

    def __init__(self) -> None:
        self._users: dict[tuple[IntelUnit, int], int] = {}

    def assign(self, unit: IntelUnit, did: int) -> None:
        self._users[unit, did] = self._users.get((unit, did), 0) + 1

    def unassign(self, unit: IntelUnit, did: int) -> None:
        left = self._users[unit, did] - 1
        if left:
            self._users[unit, did] = left
        else:
            del self._users[unit, did]

    def flush_range(self, start: int, last: int, hint: int = 0) -> None:
        """After an unmap of [start, last]; `hint` says that no table was freed."""
        for unit, did in self._users:
            unit.submit([_descriptor(unit, did, start, last, hint)])

    def flush_range_np(self, start: int, last: int) -> None:
        """After a map of [start, last], which only hardware with caching mode needs to hear of."""
        for unit, did in self._users:
            if unit.caps.caching_mode:
                unit.submit([_descriptor(unit, did, start, last, 0)])


def _descriptor(unit: IntelUnit, did: int, start: int, last: int, hint: int) -> tuple[int, int]:
    """One aligned power of two of pages that spans the range; the whole domain if the unit cannot do that many."""
    order = max((start ^ last).bit_length() - 12, 0)
    if not unit.caps.page_selective or order > unit.caps.am_max:
        return qi.iotlb(did, 0, 0, qi.DOMAIN)
    return qi.iotlb(did, start & -(4096 << order), order, qi.SELECTIVE, hint)
