"""Two VT-d units: a domain made for the one serves devices behind the other, if that can do what it was made for."""

import errno
import types
from dataclasses import replace

import pytest

from fakedev.dma import DmaAbort
from fakedev.endpoints.edu import Edu
from fakedev.machine import VTD_BASE, Machine
from fakedev.vtd.features import SCALABLE
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.iommu.registry import attach_drivers
from tests.kernel_model.iommu.driver_kernel import driver_kernel
from uapi.iommufd import iommu_hwpt_vtd_s1

NEST_PARENT, DIRTY = 1, 2
IOVA, PA = 0x10_0000, 0x4000_0000


class Two:
    """`first` is behind a unit with everything, `second` behind one that lacks `missing`."""

    def __init__(self, **missing):
        self.box = Machine("two units")
        for number, features in enumerate((SCALABLE, replace(SCALABLE, **missing))):
            unit = self.box.add_vtd(VTD_BASE + 0x1000 * number, features.cap, features.ecap)
            self.box.add(Edu(f"0000:00:1{number}.0", command=4), unit)
        self.first, self.second = attach_drivers(driver_kernel(self.box))
        for device in (self.first, self.second):
            core.device_claim_dma_owner(device, self)

    def attach(self, domain, *devices):
        for device in devices:
            core.attach_group_handle(domain, device.group, core.AttachHandle())


def reads(device):
    try:
        return device.pci.dma.read(IOVA, 4)
    except DmaAbort:
        return None


@pytest.mark.parametrize("flags", [0, NEST_PARENT, DIRTY])
def test_a_domain_serves_both_units_and_both_forget_what_is_unmapped(flags):
    two = Two()
    two.box.memory.write(PA, b"data")
    domain = core.paging_domain_alloc_flags(two.first, flags)
    domain.map(IOVA, PA, 4096, 3)
    two.attach(domain, two.first, two.second)
    assert [reads(two.first), reads(two.second)] == [b"data"] * 2
    domain.unmap(IOVA, 4096)
    assert [reads(two.first), reads(two.second)] == [None] * 2
    domain.map(IOVA, PA, 4096, 3)
    core.detach_group_handle(domain, two.first.group)
    assert [reads(two.first), reads(two.second)] == [None, b"data"]
    two.box.close()


def test_a_domain_has_an_id_of_its_own_in_each_unit():
    two = Two()
    units = [device.iommu.unit for device in (two.first, two.second)]
    other = core.paging_domain_alloc(two.second)
    two.attach(other, two.second)
    domain = core.paging_domain_alloc(two.first)
    two.attach(domain, two.first)
    core.replace_group_handle(two.second.group, domain, core.AttachHandle())
    assert len({other.owner, domain.owner}) == 2
    assert [domain.domain_id(unit) in unit.domain_ids for unit in units] == [True, True]
    core.detach_group_handle(domain, two.second.group)
    with pytest.raises(KeyError):
        domain.domain_id(units[1])
    two.box.close()


@pytest.mark.parametrize(
    ("missing", "flags"),
    [
        ({"ssads": 0}, DIRTY),
        ({"nest": 0}, NEST_PARENT),
        ({"fsts": 0, "fs1gp": 0, "fs5lp": 0, "eafs": 0, "nest": 0}, 0),
        ({"fs1gp": 0}, 0),
        ({"fs5lp": 0}, 0),
        ({"ssts": 0, "nest": 0, "ssads": 0}, DIRTY),
        ({"smpwcs": 0, "ssads": 0, "eafs": 0}, NEST_PARENT),
        ({"smpwcs": 0, "ssads": 0, "eafs": 0}, 0),
        ({"mgaw": 47}, DIRTY),
        ({"sagaw": 0b0110}, NEST_PARENT),
        ({"sslps": 1}, NEST_PARENT),
        ({"sslps": 0}, DIRTY),
        ({"cm": 1}, DIRTY),
    ],
)
def test_what_the_other_unit_cannot_is_einval_at_attach(missing, flags):
    two = Two(**missing)
    domain = core.paging_domain_alloc_flags(two.first, flags)
    two.attach(domain, two.first)
    with pytest.raises(KernelError) as caught:
        two.attach(domain, two.second)
    assert caught.value.errno == errno.EINVAL
    two.box.close()


def test_a_child_may_be_made_for_another_unit_than_its_parent():
    two = Two()
    parent = core.paging_domain_alloc_flags(two.first, NEST_PARENT)
    config = iommu_hwpt_vtd_s1(pgtbl_addr=IOVA, addr_width=48)
    data = types.SimpleNamespace(type=1, copy_from=lambda *_: config)
    nested = two.second.iommu.domain_alloc_nested(two.second, parent, 0, data)
    two.attach(nested, two.first, two.second)
    assert len(parent.cache_tags.tags) == 2
    two.box.close()


def test_a_parent_that_the_unit_cannot_take_is_einval_for_its_child_too():
    two = Two(sslps=0)
    parent = core.paging_domain_alloc_flags(two.first, NEST_PARENT)
    config = iommu_hwpt_vtd_s1(pgtbl_addr=IOVA, addr_width=48)
    data = types.SimpleNamespace(type=1, copy_from=lambda *_: config)
    nested = two.second.iommu.domain_alloc_nested(two.second, parent, 0, data)
    with pytest.raises(KernelError) as caught:
        two.attach(nested, two.second)
    assert caught.value.errno == errno.EINVAL
    two.attach(nested, two.first)
    two.box.close()
