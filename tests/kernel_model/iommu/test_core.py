"""Groups, ownership and attachment, with a driver that only remembers."""

import errno

import pytest

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu import core
from kernel_model.iommu.core import AttachHandle, Device, Domain, Group, IommuDriver, ResvRegion


class Remembering(Domain):
    def __init__(self, owner, name, kind=core.IOMMU_DOMAIN_UNMANAGED):
        super().__init__(owner)
        self.name = name
        self.type = kind
        self.refuses = set()

    def attach_dev(self, device, old):
        self.owner.log.append((device.name, self.name))
        if device.name in self.refuses:
            raise KernelError(errno.EINVAL, "refused")
        self.owner.at[device.name] = self.name


class Driver(IommuDriver):
    def __init__(self):
        self.log = []
        self.at = {}
        self.blocked_domain = Remembering(self, "blocked", core.IOMMU_DOMAIN_BLOCKED)
        self.regions = {}

    def probe_device(self, device, rid):
        pass

    def capable(self, device, cap):
        return cap == core.IOMMU_CAP_CACHE_COHERENCY

    def hw_info(self, device, wanted_type):
        return 0, b""

    def domain_alloc_paging_flags(self, device, flags, user_data=None):
        return Remembering(self, "paging")

    def resv_regions(self, device):
        return self.regions.get(device.name, [])


class OtherDriver(Driver):
    pass


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def group(driver):
    group = Group(3)
    group.devices = [Device(name, driver) for name in ("a", "b")]
    for device in group.devices:
        device.group = group
    group.default_domain = Remembering(driver, "default", core.IOMMU_DOMAIN_DMA)
    core.group_set_domain(group, group.default_domain)
    return group


def error_of(call, *arguments):
    with pytest.raises(KernelError) as caught:
        call(*arguments)
    return caught.value.errno


def test_claiming_blocks_every_device_of_the_group(driver, group):
    core.device_claim_dma_owner(group.devices[0], "me")
    assert driver.at == {"a": "blocked", "b": "blocked"}
    assert core.group_dma_owner_claimed(group)


def test_one_owner_claims_several_devices_and_the_last_release_gives_the_group_back(driver, group):
    owner = object()
    for device in group.devices:
        core.device_claim_dma_owner(device, owner)
    assert group.owner_cnt == 2
    core.device_release_dma_owner(group.devices[0])
    assert driver.at["a"] == "blocked"
    core.device_release_dma_owner(group.devices[1])
    assert (driver.at, group.owner, group.owner_cnt) == ({"a": "default", "b": "default"}, None, 0)


def test_a_second_owner_is_eperm(group):
    core.device_claim_dma_owner(group.devices[0], object())
    assert error_of(core.device_claim_dma_owner, group.devices[1], object()) == errno.EPERM
    assert error_of(core.group_claim_dma_owner, group, object()) == errno.EPERM


def test_a_group_claim_is_exclusive_even_for_the_same_owner(group):
    core.group_claim_dma_owner(group, "me")
    assert error_of(core.group_claim_dma_owner, group, "me") == errno.EPERM


def test_a_kernel_driver_in_the_group_is_eperm_and_an_owner_keeps_kernel_drivers_out(group):
    core.device_use_default_domain(group.devices[0])
    assert error_of(core.device_claim_dma_owner, group.devices[1], "me") == errno.EPERM
    core.device_unuse_default_domain(group.devices[0])
    core.device_claim_dma_owner(group.devices[1], "me")
    assert error_of(core.device_use_default_domain, group.devices[0]) == errno.EBUSY


def test_a_device_without_a_group_is_enodev(driver):
    assert error_of(core.device_claim_dma_owner, Device("x", driver), "me") == errno.ENODEV


def test_a_group_in_a_foreign_domain_is_ebusy(driver, group):
    core.attach_group(Remembering(driver, "other"), group)
    assert error_of(core.device_claim_dma_owner, group.devices[0], "me") == errno.EBUSY


def test_a_device_that_needs_a_direct_mapping_cannot_be_claimed(driver, group):
    group.devices[1].require_direct = True
    assert error_of(core.device_claim_dma_owner, group.devices[0], "me") == errno.EINVAL
    assert (driver.at, group.owner_cnt) == ({"a": "default", "b": "default"}, 0)


def test_attach_replace_and_detach_move_the_whole_group(driver, group):
    core.device_claim_dma_owner(group.devices[0], "me")
    first, second = Remembering(driver, "first"), Remembering(driver, "second")
    handle = AttachHandle()
    core.attach_group_handle(first, group, handle)
    assert driver.at == {"a": "first", "b": "first"}
    assert core.attach_handle_get(group) is handle
    assert handle.domain is first
    core.replace_group_handle(group, second, AttachHandle())
    assert driver.at == {"a": "second", "b": "second"}
    core.detach_group_handle(second, group)
    assert driver.at == {"a": "blocked", "b": "blocked"}
    assert error_of(core.attach_handle_get, group) == errno.ENOENT


def test_attaching_twice_is_ebusy(driver, group):
    core.attach_group_handle(Remembering(driver, "first"), group, AttachHandle())
    assert error_of(core.attach_group_handle, Remembering(driver, "x"), group, AttachHandle()) == errno.EBUSY
    assert error_of(core.attach_group, Remembering(driver, "x"), group) == errno.EBUSY


def test_a_domain_of_another_iommu_is_einval_and_leaves_no_handle(group):
    assert error_of(core.attach_group_handle, Remembering(OtherDriver(), "x"), group, AttachHandle()) == errno.EINVAL
    assert group.pasid_array == {}


def test_when_one_device_refuses_the_others_go_back(driver, group):
    picky = Remembering(driver, "picky")
    picky.refuses = {"b"}
    assert error_of(core.attach_group_handle, picky, group, AttachHandle()) == errno.EINVAL
    assert (driver.at, group.domain.name) == ({"a": "default", "b": "default"}, "default")
    core.attach_group_handle(Remembering(driver, "first"), group, AttachHandle())
    assert error_of(core.replace_group_handle, group, picky, AttachHandle()) == errno.EINVAL
    assert driver.at == {"a": "first", "b": "first"}


def test_replacing_by_the_same_domain_asks_no_driver(driver, group):
    first = Remembering(driver, "first")
    core.attach_group_handle(first, group, AttachHandle())
    calls = len(driver.log)
    core.replace_group_handle(group, first, AttachHandle())
    assert len(driver.log) == calls


def test_releasing_while_attached_is_a_bug_of_the_model(driver, group):
    core.device_claim_dma_owner(group.devices[0], "me")
    core.attach_group_handle(Remembering(driver, "first"), group, AttachHandle())
    with pytest.raises(KernelBug):
        core.device_release_dma_owner(group.devices[0])


def test_reserved_regions_of_a_group_are_sorted_and_merged_by_type(driver, group):
    msi, direct = core.IOMMU_RESV_MSI, core.IOMMU_RESV_DIRECT
    driver.regions["a"] = [ResvRegion(0x3000, 0x1000, 0, msi), ResvRegion(0x1000, 0x1000, 3, direct)]
    driver.regions["b"] = [ResvRegion(0x1800, 0x1000, 3, direct), ResvRegion(0x2000, 0x800, 0, msi)]
    assert [(r.start, r.last, r.type) for r in core.get_group_resv_regions(group)] == [
        (0x1000, 0x27FF, direct),
        (0x2000, 0x27FF, msi),
        (0x3000, 0x3FFF, msi),
    ]


def test_a_device_without_an_iommu_has_no_capability_and_no_domain():
    device = Device("x", None)
    assert not core.device_iommu_capable(device, core.IOMMU_CAP_CACHE_COHERENCY)
    assert core.get_resv_regions(device) == []
    assert error_of(core.paging_domain_alloc, device) == errno.ENODEV
