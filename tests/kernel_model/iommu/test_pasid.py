"""PASIDs of a group, with drivers that only remember: which devices are told, and what a failure undoes."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu import core
from kernel_model.iommu.core import AttachHandle, Device, Domain, Group, IommuDriver

WIDTH = {"a": 16, "b": 8, "none": 0}


class Remembering(Domain):
    takes_pasids = True

    def __init__(self, owner, name, kind=core.IOMMU_DOMAIN_UNMANAGED, refuses=()):
        super().__init__(owner)
        self.name = name
        self.type = kind
        self.refuses = set(refuses)

    def attach_dev(self, device, old):
        pass

    def set_dev_pasid(self, device, pasid, old):
        if device.name in self.refuses:
            raise KernelError(errno.ENOMEM, "refused")
        if self.type == core.IOMMU_DOMAIN_BLOCKED:
            self.owner.at.pop((device.name, pasid), None)
        else:
            self.owner.at[device.name, pasid] = self


class Driver(IommuDriver):
    def __init__(self):
        self.at = {}
        self.blocked_domain = Remembering(self, "blocked", core.IOMMU_DOMAIN_BLOCKED)

    def probe_device(self, device, rid):
        pass

    def capable(self, device, cap):
        return True

    def hw_info(self, device, wanted_type):
        return 0, b""

    def domain_alloc_paging_flags(self, device, flags, user_data=None):
        return Remembering(self, "paging")

    def resv_regions(self, device):
        return []

    def max_pasids(self, device):
        return WIDTH[device.name]


class OtherDriver(Driver):
    pass


@pytest.fixture
def driver():
    return Driver()


def group_of(driver, *names):
    group = Group(0)
    group.devices = [Device(name, driver) for name in names]
    for device in group.devices:
        device.group = group
    return group


@pytest.fixture
def group(driver):
    return group_of(driver, "a", "none", "b")


def error_of(call, *arguments):
    with pytest.raises(KernelError) as caught:
        call(*arguments)
    return caught.value.errno


def told(driver):
    return {where: domain.name for where, domain in driver.at.items()}


def test_every_device_with_pasids_is_told_and_the_others_are_not(driver, group):
    domain = Remembering(driver, "first", refuses={"none"})
    handle = AttachHandle()
    core.attach_device_pasid(domain, group.devices[0], 5, handle)
    assert told(driver) == {("a", 5): "first", ("b", 5): "first"}
    assert core.attach_handle_get(group, 5) is handle
    assert handle.domain is domain


def test_the_narrowest_device_limits_the_group(driver, group):
    for pasid, expected in ((8, errno.EINVAL), (16, errno.EINVAL)):
        assert error_of(
            core.attach_device_pasid, Remembering(driver, "x"), group.devices[0], pasid, AttachHandle()
        ) == (expected)
    core.attach_device_pasid(Remembering(driver, "x"), group.devices[0], 7, AttachHandle())


def test_a_group_without_pasids_takes_any_number_and_tells_nobody(driver):
    group = group_of(driver, "none")
    device = group.devices[0]
    core.attach_device_pasid(Remembering(driver, "x"), device, 1 << 31, AttachHandle())
    core.replace_device_pasid(Remembering(driver, "y"), device, 1 << 31, AttachHandle())
    assert driver.at == {}
    core.detach_device_pasid(Remembering(driver, "y"), device, 1 << 31)
    assert group.pasid_array == {}


def test_order_of_the_refusals(driver, group):
    device = group.devices[0]
    foreign, without = Remembering(OtherDriver(), "foreign"), Remembering(driver, "without")
    without.takes_pasids = False
    attach = core.attach_device_pasid
    assert error_of(attach, foreign, Device("a", driver), 0, AttachHandle()) == errno.ENODEV
    assert error_of(attach, without, device, 0, AttachHandle()) == errno.EOPNOTSUPP
    assert error_of(attach, foreign, device, 5, AttachHandle()) == errno.EINVAL
    assert error_of(attach, Remembering(driver, "x"), device, 0, AttachHandle()) == errno.EINVAL
    attach(Remembering(driver, "x"), device, 5, AttachHandle())
    assert error_of(attach, Remembering(driver, "x"), device, 5, AttachHandle()) == errno.EBUSY
    assert error_of(attach, Remembering(driver, "x"), device, 9, AttachHandle()) == errno.EINVAL


def test_a_driver_whose_blocked_domain_takes_no_pasids_is_eopnotsupp(driver, group):
    driver.blocked_domain.takes_pasids = False
    domain = Remembering(driver, "x")
    assert error_of(core.attach_device_pasid, domain, group.devices[0], 5, AttachHandle()) == errno.EOPNOTSUPP


def test_replacing_what_is_not_attached_is_einval_and_by_a_domain_without_pasids_eopnotsupp(driver, group):
    device = group.devices[0]
    assert error_of(core.replace_device_pasid, Remembering(driver, "x"), device, 5, AttachHandle()) == errno.EINVAL
    core.attach_device_pasid(Remembering(driver, "x"), device, 5, AttachHandle())
    without = Remembering(driver, "y")
    without.takes_pasids = False
    assert error_of(core.replace_device_pasid, without, device, 5, AttachHandle()) == errno.EOPNOTSUPP
    foreign = Remembering(OtherDriver(), "z")
    assert error_of(core.replace_device_pasid, foreign, device, 5, AttachHandle()) == errno.EINVAL
    loose = Device("a", driver)
    assert error_of(core.replace_device_pasid, foreign, loose, 5, AttachHandle()) == errno.ENODEV


def test_replacing_by_the_same_domain_tells_nobody_and_takes_the_new_handle(driver, group):
    domain, handle = Remembering(driver, "first"), AttachHandle()
    core.attach_device_pasid(domain, group.devices[0], 5, AttachHandle())
    domain.refuses = {"a"}
    core.replace_device_pasid(domain, group.devices[0], 5, handle)
    assert core.attach_handle_get(group, 5) is handle


def test_a_refused_attach_blocks_those_that_were_told(driver, group):
    picky = Remembering(driver, "picky", refuses={"b"})
    assert error_of(core.attach_device_pasid, picky, group.devices[0], 5, AttachHandle()) == errno.ENOMEM
    assert (driver.at, group.pasid_array) == ({}, {})


def test_a_refused_replace_puts_back_those_that_were_told(driver, group):
    first, handle = Remembering(driver, "first"), AttachHandle()
    core.attach_device_pasid(first, group.devices[0], 5, handle)
    picky = Remembering(driver, "picky", refuses={"b"})
    assert error_of(core.replace_device_pasid, picky, group.devices[0], 5, AttachHandle()) == errno.ENOMEM
    assert told(driver) == {("a", 5): "first", ("b", 5): "first"}
    assert core.attach_handle_get(group, 5) is handle


def test_a_driver_that_cannot_put_back_is_a_bug(driver, group):
    first = Remembering(driver, "first")
    core.attach_device_pasid(first, group.devices[0], 5, AttachHandle())
    first.refuses = {"a"}
    with pytest.raises(KernelBug):
        core.replace_device_pasid(Remembering(driver, "picky", refuses={"b"}), group.devices[0], 5, AttachHandle())


def test_pasids_keep_a_new_owner_out(driver, group):
    group.default_domain = group.domain = Remembering(driver, "default")
    core.attach_device_pasid(Remembering(driver, "x"), group.devices[0], 5, AttachHandle())
    assert error_of(core.device_claim_dma_owner, group.devices[0], "me") == errno.EBUSY


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["attach", "replace", "detach"]),
        st.integers(0, 17),
        st.integers(0, 2),
        st.sets(st.sampled_from(["a", "b", "none"]), max_size=1),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(names=st.permutations(["a", "b", "none"]).flatmap(lambda p: st.integers(1, 3).map(lambda n: p[:n])), steps=STEPS)
def test_whatever_happens_all_devices_are_where_the_group_says(names, steps):
    driver = Driver()
    group = group_of(driver, *names)
    domains = [Remembering(driver, str(number)) for number in range(3)]
    for what, pasid, number, refuses in steps:
        before = {pasid: handle.domain for pasid, handle in group.pasid_array.items()}
        domain = domains[number]
        attached = before.get(pasid)
        domain.refuses = refuses if domain not in before.values() else set()
        try:
            if what == "attach":
                core.attach_device_pasid(domain, group.devices[0], pasid, AttachHandle())
            elif what == "replace":
                core.replace_device_pasid(domain, group.devices[0], pasid, AttachHandle())
            elif attached is not None:
                core.detach_device_pasid(attached, group.devices[0], pasid)
        except KernelError:
            assert {pasid: handle.domain for pasid, handle in group.pasid_array.items()} == before
        expected = {
            (device.name, pasid): handle.domain
            for pasid, handle in group.pasid_array.items()
            for device in group.devices
            if device.max_pasids
        }
        assert driver.at == expected
