"""Page requests in the VT-d driver: what is refused at once, what is reported, and what answers reach the device.

Requests are put on the bus by hand; words are literals from the VT-d specification, 7.4 and 6.5.2.7 (revision 5.10).
"""

from dataclasses import replace

import pytest

from fakedev.tlp import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE, PageRequest
from fakedev.vtd.features import SCALABLE
from kernel_model.errors import KernelError
from kernel_model.iommu import core
from kernel_model.iommu.io_pgfault import IOMMU_PAGE_RESP_FAILURE, IOMMU_PAGE_RESP_SUCCESS, iopf_group_response
from tests.kernel_model.iommu.scalable_world import World

PQH, PQT, PQA, PRS, PECTL = (0xFED9_0000 + offset for offset in (0xC0, 0xC8, 0xD0, 0xDC, 0xE0))
SUCCESS, INVALID, FAILURE = 0, 1, 15
IOVA = 0x5000


class Faulting(World):
    """PASID 5 of the DSA is in a domain whose faults go to `groups`; `answers` has what the function was told."""

    def __init__(self, features=SCALABLE):
        super().__init__(features)
        self.rid = self.dsa.pci.rid
        self.groups, self.answers = [], []
        self.dsa.pci.ats.respond = lambda response: self.answers.append(tuple(response)) or True
        self.domain = core.paging_domain_alloc_flags(self.dsa, 8)
        self.domain.iopf_handler = self.groups.append
        self.attach(self.domain, self.dsa, pasid=5)

    def ask(self, address=IOVA, access=READ, pasid=5, group=7, last=True):
        self.dsa.pci.dma.send_page_request(PageRequest(self.rid, pasid, address, access, group, last))

    def read(self, register, width=8):
        return self.box.mmio.read(register, width)


@pytest.fixture
def world():
    world = Faulting()
    yield world
    world.box.close()


def test_the_queue_has_64_kib_and_its_event_is_on(world):
    assert world.read(PQA) & 7 == 4
    assert world.read(PQA) >> 12
    assert (world.read(PQH), world.read(PQT)) == (0, 0)
    assert world.read(PECTL, 4) == 0


def test_a_unit_without_page_requests_gets_no_queue():
    world = World(replace(SCALABLE, prs=0, sms=0))
    assert world.edu.iommu.unit.prq is None
    domain = core.paging_domain_alloc_flags(world.dsa, 8)
    domain.iopf_handler = print
    with pytest.raises(KernelError):
        world.attach(domain, world.dsa, pasid=5)
    world.box.close()


@pytest.mark.parametrize(("access", "perm"), [(READ, 1), (WRITE, 2), (READ | WRITE, 3), (WRITE | EXECUTE, 6)])
def test_a_request_is_reported_and_its_answer_reaches_the_device(world, access, perm):
    world.ask(access=access)
    (group,) = world.groups
    # PASID valid, last page, and the kernel's own "response needs a PASID".
    assert group.faults == [(1 | 2 | 4, 5, 7, perm, IOVA)]
    assert world.answers == []
    iopf_group_response(group, IOMMU_PAGE_RESP_SUCCESS)
    assert world.answers == [(5, 7, SUCCESS)]
    assert world.read(PQH) == world.read(PQT) == 32
    assert world.read(PRS, 4) == 0


def test_a_request_without_a_pasid_is_for_the_devices_own_domain(world):
    own = core.paging_domain_alloc(world.dsa)
    own.iopf_handler = world.groups.append
    world.attach(own, world.dsa)
    world.ask(pasid=NO_PASID)
    (group,) = world.groups
    assert group.faults == [(2, 0, 7, 1, IOVA)]
    iopf_group_response(group, IOMMU_PAGE_RESP_FAILURE)
    assert world.answers == [(NO_PASID, 7, FAILURE)]


def test_a_group_comes_as_a_whole(world):
    for page, last in ((0, False), (1, False), (2, True)):
        world.ask(IOVA + page * 4096, group=3, last=last)
        assert len(world.groups) == last
    assert [fault.addr for fault in world.groups[0].faults] == [IOVA, IOVA + 4096, IOVA + 8192]


@pytest.mark.parametrize(
    ("address", "access"),
    [
        (1 << 47, READ),
        (1 << 56, WRITE),
        ((1 << 64) - (1 << 48), READ),
        (IOVA, READ | PRIVILEGED),
        (IOVA, WRITE | PRIVILEGED),
        (IOVA, READ | EXECUTE),
        (IOVA, READ | EXECUTE | PRIVILEGED),
    ],
)
def test_what_the_driver_does_not_like_is_answered_invalid_if_it_is_the_last(world, address, access):
    world.ask(address, access, last=False)
    assert world.answers == []
    world.ask(address, access)
    assert (world.answers, world.groups) == ([(5, 7, INVALID)], [])


@pytest.mark.parametrize("address", [(1 << 47) - 4096, (1 << 64) - (1 << 47)])
def test_canonical_addresses_are_reported(world, address):
    world.ask(address)
    assert world.groups[0].faults[0].addr == address


def test_a_stop_marker_is_dropped(world):
    world.ask(address=0, access=0)
    assert (world.answers, world.groups) == ([], [])
    assert world.read(PQH) == 32


def test_a_pasid_that_nobody_handles_is_answered_invalid(world):
    plain = core.paging_domain_alloc_flags(world.dsa, 8)
    world.attach(plain, world.dsa, pasid=6)
    world.ask(pasid=6)
    world.ask(pasid=6, last=False)
    assert (world.answers, world.groups) == ([(6, 7, INVALID)] * 2, [])


def test_a_source_that_is_no_device_with_ats_is_answered_invalid(world):
    del world.edu.iommu.unit.prq.devices[world.rid]
    world.ask()
    assert (world.answers, world.groups) == ([(5, 7, INVALID)], [])


def test_the_queue_wraps(world):
    for number in range(2048 + 3):
        world.ask(group=number & 511)
    assert len(world.groups) == 2051
    assert world.read(PQH) == world.read(PQT) == 3 * 32


def test_after_an_overflow_unfinished_groups_are_forgotten(world):
    """The unit answers the last request of a group that it had no room for; the driver cannot know which were lost."""
    world.box.mmio.write(PECTL, 4, 1 << 31)  # nobody is told
    for number in range(2047):
        world.ask(group=number & 7, last=False)
    world.ask(group=300)
    assert world.answers == [(5, 300, SUCCESS)]
    assert world.read(PRS, 4) == 3
    world.box.mmio.write(PECTL, 4, 0)
    assert world.read(PRS, 4) == 0
    assert world.dsa.fault_param.partial == []
    world.ask(group=1)
    assert len(world.groups[-1].faults) == 1


def test_detaching_a_pasid_drains_with_a_fence_and_both_flushes(world):
    """6.5.2.8 and 7.10: a fence, the PASID's IOTLB and device TLB, and a wait for page requests on the way."""
    unit, seen = world.edu.iommu.unit, []
    submit = unit.submit
    unit.submit = lambda descriptors, drain=False: seen.append((list(descriptors), drain)) or submit(descriptors, drain)
    did = world.domain.domain_id(unit)
    core.detach_device_pasid(world.domain, world.dsa, 5)
    descriptors, drain = seen[-1]
    assert drain
    assert [low & 15 for low, _ in descriptors] == [5, 6, 8]
    assert descriptors[0] == (2 << 32 | 1 << 6 | 5, 0)
    assert descriptors[1][0] >> 32 & 0xFFFFF == 5
    assert descriptors[2][0] >> 16 & 0xFFFF == world.rid
    # info->domain is that of the device itself, of which there is none here, so the driver names domain 1.
    assert descriptors[1][0] >> 16 & 0xFFFF == 1 != did
    assert world.dsa.fault_param is None


def test_a_device_that_takes_no_faults_is_not_drained(world):
    unit, seen = world.edu.iommu.unit, []
    plain = core.paging_domain_alloc(world.edu)
    world.attach(plain)
    submit = unit.submit
    unit.submit = lambda descriptors, drain=False: seen.append(drain) or submit(descriptors, drain)
    core.detach_group_handle(plain, world.edu.group)
    assert seen
    assert not any(seen)


def test_a_nested_domain_gets_the_faults_of_its_device(world):
    parent = world.parent()
    world.guest_map(0x7000_0000, 0x10_0000 + 0x8000)
    nested = world.nested(parent)
    nested.iopf_handler = world.groups.append
    world.attach(nested, world.dsa)
    world.ask(pasid=NO_PASID)
    assert len(world.groups) == 1
    core.detach_group_handle(nested, world.dsa.group)
    world.ask(pasid=NO_PASID)
    assert (len(world.groups), world.answers) == (1, [(NO_PASID, 7, INVALID)])


def test_replacing_by_a_nested_domain_keeps_the_old_ones_claim_on_faults(world):
    """As the kernel does, which takes one for the new domain and gives none back: the device never stops faulting."""
    info = world.dsa.priv
    own = core.paging_domain_alloc(world.dsa)
    nested = world.nested(world.parent())
    own.iopf_handler = nested.iopf_handler = world.groups.append
    world.attach(own, world.dsa)
    assert info.iopf_refcount == 2
    world.attach(nested, world.dsa)
    assert info.iopf_refcount == 3
    core.detach_group_handle(nested, world.dsa.group)
    core.detach_device_pasid(world.domain, world.dsa, 5)
    assert info.iopf_refcount == 1
    assert world.dsa.fault_param is not None
