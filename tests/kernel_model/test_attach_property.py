"""Random attachments of mock devices: whatever is refused or done, every count is what its holders say."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.mock import mock_domain_flags, mock_replace
from conformance.pasids import nested, pasid_attach, pasid_detach, pasid_replace
from conformance.steps import answer, destroy, hwpt_alloc, ioas_alloc
from kernel_model.iommufd.device import IommufdDevice
from kernel_model.iommufd.hwpt import Hwpt, HwptNested, HwptPaging
from kernel_model.iommufd.object import Object
from kernel_model.iommufd.selftest.devices import Selftest
from kernel_model.kernel import Kernel
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID
from uapi.iommufd_test import MOCK_FLAGS_DEVICE_PASID

#: 1024 fails every second time, 2^20 is beyond all.
PASIDS = st.sampled_from([0, 1, 2, 1024, 1 << 20])
#: An object by its place among those that there are, so that most steps meet something.
PICK = st.integers(0, 11)
STEP = st.one_of(
    st.tuples(st.just("ioas")),
    st.tuples(st.just("device"), PICK, st.sampled_from([0, MOCK_FLAGS_DEVICE_PASID])),
    st.tuples(st.just("hwpt"), PICK, PICK, st.sampled_from([0, 1, 8, 9])),
    st.tuples(st.just("nested"), PICK, PICK, st.sampled_from([0, IOMMU_HWPT_ALLOC_PASID])),
    st.tuples(st.just("replace"), PICK, PICK),
    st.tuples(st.sampled_from(["attach", "pasid_replace"]), PICK, PASIDS, PICK),
    st.tuples(st.just("detach"), PICK, PASIDS),
    st.tuples(st.just("destroy"), PICK),
)
assert (IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID) == (1, 8)


class Bench:
    """A context and its objects."""

    def __init__(self, kernel):
        self.iommu = kernel.open("/dev/iommu")
        (self.ctx,) = kernel.contexts
        self.blocked = kernel.mock_iommu.blocked_domain

    def ids(self, kind=Object):
        return [obj.id for obj in self.ctx.objects.each(kind)]

    def pick(self, place, kind=Object):
        ids = self.ids(kind)
        return ids[place % len(ids)] if ids else 99

    def step(self, what, *args):
        stdev = self.pick(args[0], Selftest) if args else 0
        idev = self.pick(args[0], IommufdDevice) if args else 0
        match what:
            case "ioas":
                ioas_alloc(self.iommu)
            case "device":
                answer(mock_domain_flags, self.iommu, self.pick(args[0]), args[1])
            case "hwpt":
                answer(hwpt_alloc, self.iommu, idev, self.pick(args[1]), args[2])
            case "nested":
                answer(nested, self.iommu, idev, self.pick(args[1], HwptPaging), args[2])
            case "replace":
                answer(mock_replace, self.iommu, stdev, self.pick(args[1]))
            case "attach":
                answer(pasid_attach, self.iommu, stdev, args[1], self.pick(args[2], Hwpt))
            case "pasid_replace":
                answer(pasid_replace, self.iommu, stdev, args[1], self.pick(args[2]))
            case "detach":
                answer(pasid_detach, self.iommu, stdev, args[1])
            case "destroy":
                number = self.pick(args[0])
                if number not in self.ids(Selftest):
                    answer(destroy, self.iommu, number)
                else:
                    self.remove(number)

    def remove(self, stdev):
        """A mock device, with its PASIDs detached first: one that goes without is lost."""
        idev = self.ctx.objects.get(stdev, Selftest).idev
        pasid_detach(self.iommu, stdev, *list(idev.group.attachments))
        destroy(self.iommu, stdev)

    def check(self):
        holds = Counter()
        for hwpt in self.ctx.objects.each(Hwpt):
            holds[hwpt.parent if isinstance(hwpt, HwptNested) else hwpt.ioas] += 1
            if isinstance(hwpt, HwptPaging):
                assert hwpt in hwpt.ioas.hwpts
                assert not hwpt.auto_domain or hwpt.users > 1
        for idev in self.ctx.objects.each(IommufdDevice):
            holds[idev] += 1 + len(idev.group.attachments)
            group = idev.group.group
            assert group.pasid_array.keys() == idev.group.attachments.keys()
            own = group.pasid_array.get(0)
            assert idev.dev.domain is group.domain is (own.domain if own else self.blocked)
            for pasid, attach in idev.group.attachments.items():
                assert list(attach.devices.values()) == [idev]
                assert group.pasid_array[pasid].domain is attach.hwpt.domain
                assert group.pasid_array[pasid].idev is idev
                holds[attach.hwpt] += 1
            if any(idev.group.attachments):
                assert all(attach.hwpt.pasid_compat for attach in idev.group.attachments.values())
        for obj in self.ctx.objects.each(Object):
            assert obj.users == 1 + holds[obj], obj

    def empty(self):
        for stdev in self.ids(Selftest):
            self.remove(stdev)
        for kind in (HwptNested, HwptPaging, Object):
            for number in self.ids(kind):
                destroy(self.iommu, number)
        assert len(self.ctx.objects) == 0
        assert not self.ctx.groups


@settings(max_examples=120, deadline=None)
@given(steps=st.lists(STEP, max_size=40))
def test_counts_are_those_of_the_holders_whatever_happens(steps):
    with Kernel("mock") as kernel:
        bench = Bench(kernel)
        bench.step("ioas")
        bench.step("device", 0, MOCK_FLAGS_DEVICE_PASID)
        bench.step("hwpt", 0, 0, IOMMU_HWPT_ALLOC_PASID)
        bench.step("hwpt", 0, 0, IOMMU_HWPT_ALLOC_PASID | IOMMU_HWPT_ALLOC_NEST_PARENT)
        bench.step("nested", 0, 2, IOMMU_HWPT_ALLOC_PASID)
        for step in steps:
            bench.step(*step)
            bench.check()
        bench.empty()
        bench.iommu.close()
