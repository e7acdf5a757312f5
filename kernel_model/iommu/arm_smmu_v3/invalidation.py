"""Which cached translations a change of a domain's tables concerns, and their invalidation.

Mirrors `struct arm_smmu_invs` and `arm_smmu_domain_inv_range()` of drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.c at 7.3:
a domain has a sorted list of what has to be told of its changes (an ASID, a VMID, device TLBs), with users. Left out:
lists over several units (a domain belongs to one), the errata that force a SYNC into the middle of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

from fakedev.smmuv3 import commands as c
from kernel_model.errors import KernelBug

#: Kinds, in the order in which they are told.
S1_ASID, S2_VMID, S2_VMID_S1_CLEAR, ATS, ATS_FULL = range(5)
_RANGE_NUM_MAX = 31


class Inv(NamedTuple):
    """One receiver: an ASID, a VMID or a StreamID (with its SubstreamID)."""

    kind: int
    id: int
    ssid: int = 0


class Invalidations:
    """All receivers of one domain. `page_lg2` is log2 of its smallest page; `ranges`: the unit takes range commands."""

    def __init__(self, page_lg2: int, ranges: bool) -> None:
        self._page_lg2 = page_lg2
        self._ranges = ranges
        self._users: dict[Inv, int] = {}
        self._sorted: list[Inv] = []

    def __len__(self) -> int:
        return len(self._users)

    def merge(self, invs: list[Inv]) -> None:
        """arm_smmu_invs_merge(): one user more for each."""
        for inv in invs:
            self._users[inv] = self._users.get(inv, 0) + 1
        self._sorted = sorted(self._users)

    def unref(self, invs: list[Inv]) -> list[Inv]:
        """arm_smmu_invs_unref(): one user less for each; those that had only this one."""
        gone = []
        for inv in invs:
            left = self._users[inv] - 1
            if left:
                self._users[inv] = left
            else:
                del self._users[inv]
                gone.append(inv)
        self._sorted = sorted(self._users)
        return gone

    def batches(self, iova: int, size: int, granule: int, leaf: bool) -> list[list[tuple[int, int]]]:
        """arm_smmu_domain_inv_range(): the commands after a change of [iova, iova + size), a SYNC after each batch.

        `granule` is the size of the pages that were there, if `leaf` says that no table was.
        """
        found: list[list[tuple[int, int]]] = []
        last: Inv | None = None
        for inv in self._sorted:
            if last is None or _ends_batch(last.kind, inv.kind):
                found.append([])
            found[-1] += self._commands(inv, iova, size, granule, leaf)
            last = inv
        return [batch for batch in found if batch]

    def _commands(self, inv: Inv, iova: int, size: int, granule: int, leaf: bool) -> list[tuple[int, int]]:
        too_big = not self._ranges and size >= granule << granule.bit_length() - 4
        if inv.kind == ATS:
            return [_atc_inv(inv.id, inv.ssid, iova, size)]
        if inv.kind == ATS_FULL:
            return [c.atc_inv(inv.id, 0, c.ATC_SIZE_ALL)]
        if inv.kind == S2_VMID_S1_CLEAR:
            return [] if too_big else [c.tlbi_nh_all(inv.id)]
        if too_big:
            return [whole(inv)]
        return self._pages(inv, iova, size, granule, leaf)

    def _pages(self, inv: Inv, iova: int, size: int, granule: int, leaf: bool) -> list[tuple[int, int]]:
        """arm_smmu_cmdq_batch_add_range()."""
        end = iova + size
        if not self._ranges:
            return [_page(inv, at, leaf, 0, 0, 0, 0) for at in range(iova, end, granule)]
        lg2 = self._page_lg2
        pages = size >> lg2
        ttl = 4 - (granule.bit_length() - 4) // (lg2 - 3) if leaf else 0
        if not leaf and pages & _RANGE_NUM_MAX == 1:
            pages += 1
        found = []
        while iova < end:
            scale = (pages & -pages).bit_length() - 1
            count = pages >> scale & _RANGE_NUM_MAX
            found.append(_page(inv, iova, leaf, (lg2 - 10) // 2, ttl, scale & 31, count - 1))
            iova += count << scale + lg2
            pages -= count << scale
        return found


def _ends_batch(kind: int, following: int) -> bool:
    if kind != S2_VMID_S1_CLEAR and following == S2_VMID_S1_CLEAR:
        return True
    return kind < ATS <= following


def whole(inv: Inv) -> tuple[int, int]:
    """Everything under an ASID or a VMID."""
    if inv.kind == S1_ASID:
        return c.tlbi_nh_asid(0, inv.id)
    if inv.kind == S2_VMID:
        return c.tlbi_s12_vmall(inv.id)
    raise KernelBug(f"receiver {inv} has no command for everything")


def _page(inv: Inv, iova: int, leaf: bool, tg: int, ttl: int, scale: int, num: int) -> tuple[int, int]:
    if inv.kind == S1_ASID:
        return c.tlbi_nh_va(0, inv.id, iova, leaf, tg=tg, ttl=ttl, scale=scale, num=num)
    return c.tlbi_s2_ipa(inv.id, iova, leaf, tg=tg, ttl=ttl, scale=scale, num=num)


def _atc_inv(sid: int, ssid: int, iova: int, size: int) -> tuple[int, int]:
    """arm_smmu_atc_inv_to_cmd(): the smallest aligned power of two of 4 KiB pages that spans the range."""
    first, last = iova >> 12, iova + size - 1 >> 12
    span = (first ^ last).bit_length()
    return c.atc_inv(sid, first >> span << span + 12, span, ssid or None)
