"""A VT-d unit in scalable mode with its driver, a plain and a PASID-capable device, and the tables of a guest."""

import types

from fakedev.dma import DmaAbort
from fakedev.endpoints.dsa import Dsa
from fakedev.endpoints.edu import Edu
from fakedev.machine import Machine
from fakedev.vtd.features import SCALABLE
from kernel_model.iommu import core
from kernel_model.iommu.registry import attach_drivers
from tests.kernel_model.iommu.driver_kernel import driver_kernel
from uapi.iommufd import iommu_hwpt_vtd_s1

PA, GPA, VA = 0x4000_0000, 0x10_0000, 0x7000_0000
NEST_PARENT, DIRTY, PASID = 1, 2, 8
RTADDR, IQT = 0xFED9_0020, 0xFED9_0088


class World:
    """A unit with a plain and a PASID-capable device, and its driver."""

    def __init__(self, features=SCALABLE):
        self.box = Machine("nesting")
        unit = self.box.add_vtd(cap=features.cap, ecap=features.ecap)
        for function in (Edu("0000:00:10.0", command=4), Dsa("0000:00:11.0", command=4)):
            self.box.add(function, unit)
        self.edu, self.dsa = attach_drivers(driver_kernel(self.box))
        for device in (self.edu, self.dsa):
            core.device_claim_dma_owner(device, self)
        self.words, self.memory = self.box.memory.words, self.box.memory

    def parent(self, flags=0, pages=64):
        """A nesting parent with guest memory: GPA is at PA."""
        parent = core.paging_domain_alloc_flags(self.edu, NEST_PARENT | flags)
        parent.map(GPA, PA, pages << 12, 3)
        return parent

    def nested(self, parent, table=GPA, width=48, flags=0, kind=1, hwpt_flags=0):
        config = iommu_hwpt_vtd_s1(flags=flags, pgtbl_addr=table, addr_width=width)
        data = types.SimpleNamespace(type=kind, copy_from=lambda *_: config)
        return self.edu.iommu.domain_alloc_nested(self.edu, parent, hwpt_flags, data)

    def guest_map(self, va, gpa, bits=7):
        """The guest's tables in its first pages: levels 4 to 1 at GPA, +0x1000, +0x2000, +0x3000."""
        for level in (3, 2, 1):
            where = PA + (3 - level) * 4096 + (va >> 12 + 9 * level & 511) * 8
            self.words[where >> 3] = GPA + (4 - level) * 4096 | 7
        self.words[PA + 3 * 4096 + (va >> 12 & 511) * 8 >> 3] = gpa | bits

    def entry(self, device, pasid=0):
        """The eight words of a PASID-table entry, found as hardware finds them."""
        rid, words = device.pci.rid, self.words
        root = self.box.mmio.read(RTADDR, 8) & ~0xFFF
        contexts = words[(root >> 3) + (rid >> 8) * 2 + (rid >> 7 & 1)] & ~0xFFF
        directory = words[(contexts >> 3) + (rid & 0x7F) * 4] & ~0xFFF
        table = words[(directory >> 3) + (pasid >> 6)] & ~0xFFF
        return words[(table >> 3) + (pasid & 63) * 8 :][:8].tolist()

    def attach(self, domain, device=None, pasid=0):
        device = device or self.edu
        if pasid:
            core.attach_device_pasid(domain, device, pasid, core.AttachHandle())
        elif device.group.pasid_array:
            core.replace_group_handle(device.group, domain, core.AttachHandle())
        else:
            core.attach_group_handle(domain, device.group, core.AttachHandle())

    def reads(self, va, device=None, **how):
        """The first word that a device reads at `va`, None where it is refused."""
        try:
            return int.from_bytes((device or self.edu).pci.dma.read(va, 8, **how), "little")
        except DmaAbort:
            return None
