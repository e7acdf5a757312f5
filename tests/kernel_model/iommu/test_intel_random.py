"""Random changes of domains and attachments through the VT-d driver, against a dict of pages.

After each change devices read through every way that they have: without a PASID, with one, and by translations that
they asked for and keep themselves. The caches of unit and device keep all that they may, so a store without its
invalidation, or an invalidation of another domain, PASID or range, shows as a stale word.
"""

import random

import pytest

from fakedev.ats import PageFault
from fakedev.caching import caching
from fakedev.dma import DmaAbort
from fakedev.vtd.features import SCALABLE, Features
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from tests.kernel_model.iommu.scalable_world import DIRTY, PASID, World

K4, M2 = 1 << 12, 1 << 21
PA = 0x4000_0000
PASIDS = (0, 1, 5, 64)
UNITS = {
    "everything": {},
    "caching mode": {"cm": 1},
    "second stage": {"fsts": 0, "fs5lp": 0, "fs1gp": 0, "nest": 0, "eafs": 0},
    "second stage, caching mode": {"fsts": 0, "fs5lp": 0, "fs1gp": 0, "nest": 0, "eafs": 0, "cm": 1},
    "first stage, 4 levels": {"ssts": 0, "nest": 0, "ssads": 0, "fs5lp": 0},
    "no page-selective invalidation": {"psi": 0},
    "no device TLBs": {"dt": 0, "prs": 0, "pds": 0, "sms": 0, "nwfs": 0, "ptrs": 0},
}


class Bench(World):
    """Three domains, and what a dict says is mapped in each."""

    def __init__(self, unit, chance):
        super().__init__(Features(**{**SCALABLE.__dict__, **unit}))
        self.box.set_caching(caching("always"))
        self.chance = chance
        second = self.edu.iommu.unit.ssads_supported and self.edu.iommu.unit.caps.second_stage
        flags = (PASID, PASID, PASID | (DIRTY if second else 0))
        self.domains = [core.paging_domain_alloc_flags(self.dsa, flag) for flag in flags]
        #: By domain: the physical address of each page, and the mappings as (IOVA, length), which go as a whole.
        self.pages = [{} for _ in self.domains]
        self.areas = [[] for _ in self.domains]
        #: Which domain (device, PASID) is in.
        self.inside = {}
        for n in range(0, 4 * M2, K4):
            self.words[PA + n >> 3] = n + 1

    def change_mappings(self):
        chance, which = self.chance, self.chance.randrange(3)
        domain, pages = self.domains[which], self.pages[which]
        large = chance.random() < 0.2
        iova = M2 * chance.randrange(4) if large else M2 * chance.randrange(4) + K4 * chance.choice((0, 1, 2, 3, 511))
        length = M2 if large else K4 * chance.choice((1, 1, 2, 4))
        if chance.random() < 0.6:
            pa = PA + M2 * chance.randrange(4) + (0 if large else K4 * chance.randrange(500))
            wanted = range(iova, iova + length, K4)
            if not any(page in pages for page in wanted):
                domain.map(iova, pa, length, 3)
                pages.update((page, pa + page - iova) for page in wanted)
                self.areas[which].append((iova, length))
        elif self.areas[which]:
            iova, length = self.areas[which].pop(chance.randrange(len(self.areas[which])))
            assert domain.unmap(iova, length) == length
            for page in range(iova, iova + length, K4):
                del pages[page]

    def change_attachment(self):
        chance = self.chance
        device = chance.choice((self.edu, self.dsa))
        pasid = chance.choice(PASIDS) if device is self.dsa else 0
        now, to = self.inside.get((device, pasid)), chance.choice((None, 0, 1, 2))
        group, handle = device.group, core.AttachHandle()
        if to == now:
            return
        if pasid and to is None:
            core.detach_device_pasid(self.domains[now], device, pasid)
        elif pasid and now is None:
            core.attach_device_pasid(self.domains[to], device, pasid, handle)
        elif pasid:
            core.replace_device_pasid(self.domains[to], device, pasid, handle)
        elif to is None:
            core.detach_group_handle(self.domains[now], group)
        elif now is None:
            core.attach_group_handle(self.domains[to], group, handle)
        else:
            core.replace_group_handle(group, self.domains[to], handle)
        self.inside[device, pasid] = to

    def found(self, device, pasid, iova, translated):
        named = {"pasid": pasid} if pasid else {}
        port = device.pci.port if translated else device.pci.dma
        if translated:
            named["block"] = False
        try:
            return int.from_bytes(port.read(iova, 8, **named), "little")
        except (DmaAbort, PageFault):
            return None

    def wanted(self, device, pasid, iova):
        which = self.inside.get((device, pasid))
        pa = None if which is None else self.pages[which].get(iova)
        return None if pa is None else self.words[pa >> 3]

    def check(self, count):
        for _ in range(count):
            iova = M2 * self.chance.randrange(4) + K4 * self.chance.choice((0, 1, 2, 3, 4, 511))
            for device in (self.edu, self.dsa):
                for pasid in PASIDS if device is self.dsa else (0,):
                    for translated in (False, True) if device is self.dsa else (False,):
                        found = self.found(device, pasid, iova, translated)
                        said = f"{device.name}, PASID {pasid}, {iova:#x}, translated {translated}"
                        assert found == self.wanted(device, pasid, iova), said


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("unit", UNITS)
def test_devices_find_what_is_mapped_after_every_change(unit, seed):
    bench = Bench(UNITS[unit], random.Random(f"{unit} {seed}"))
    for _ in range(250):
        bench.chance.choice((bench.change_mappings, bench.change_mappings, bench.change_attachment))()
        bench.check(2)
    bench.box.close()


def test_nothing_is_left_when_all_is_taken_back():
    bench = Bench({}, random.Random(1))
    unit = bench.edu.iommu.unit
    before = unit.pages.live, set(unit.domain_ids)
    for domain in [core.paging_domain_alloc_flags(bench.dsa, flag) for flag in (PASID, PASID | DIRTY)]:
        domain.map(0, PA, M2 + K4, 3)
        bench.attach(domain, bench.dsa)
        for pasid in PASIDS[1:]:
            bench.attach(domain, bench.dsa, pasid)
            assert bench.found(bench.dsa, pasid, M2, True) == 1 + M2
        for pasid in PASIDS[1:]:
            core.detach_device_pasid(domain, bench.dsa, pasid)
        core.detach_group_handle(domain, bench.dsa.group)
        domain.free()
        assert not domain.cache_tags.tags
    assert (bench.box.tlb_entries, len(bench.dsa.pci.port.tlb)) == (0, 0)
    assert (unit.pages.live, set(unit.domain_ids)) == before
    with pytest.raises(KernelError):
        core.attach_device_pasid(bench.domains[0], bench.dsa, 1 << 20, core.AttachHandle())
    bench.box.close()
