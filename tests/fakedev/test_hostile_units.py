"""The hostile device behind a scalable-mode VT-d unit and behind an SMMUv3: both keep it to the one page it has."""

import pytest

from fakedev.endpoints.hostile import Hostile
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import regs as smmu_regs
from fakedev.vtd import descriptors as qi
from tests.fakedev.smmuv3 import bench as smmu
from tests.fakedev.vtd import rig as vtd

IOVA, SECRET, OTHERS = 0x7000, 0x60_0000, 0x61_0000
HOSTILE = 0x88


class Vtd:
    """Second-stage translation; the context entry allows no device TLB, no page requests, no PASIDs."""

    def __init__(self):
        self.rig = vtd.Rig()
        self.box, self.page = self.rig.box, vtd.PAGE
        self.device = self.box.add(Hostile("0000:00:11.0", command=6), self.rig.unit)
        self.rig.tables()
        self.rig.context(rid=HOSTILE, flags=0)
        self.leaf = self.rig.map_second(IOVA, self.page)
        self.rig.start()

    def unmap(self):
        self.rig.word(self.leaf, 0)
        self.rig.submit(qi.iotlb(0, 0, 0, qi.GLOBAL))


class Smmu:
    """Stage 1 without substreams and with EATS=0, and translated requests are checked."""

    def __init__(self):
        self.bench = smmu.Bench(start=False)
        self.box, self.page = self.bench.box, smmu.PAGE
        self.device = self.box.add(Hostile("0000:00:11.0", command=6), self.bench.unit)
        self.bench.ste(sid=HOSTILE)
        self.bench.cd()
        self.bench.map(IOVA, self.page)
        self.bench.start(0xF | smmu_regs.CR0_ATSCHK)

    def unmap(self):
        self.bench.map(IOVA, 0, bits=0)
        self.bench.submit(c.tlbi_nsnh_all())


@pytest.fixture(params=[Vtd, Smmu])
def world(request):
    world = request.param()
    world.box.memory.write(SECRET, b"secret")
    world.box.memory.write(OTHERS, b"others")
    yield world
    assert world.box.memory.read(SECRET, 6) == b"secret"
    assert world.box.memory.read(OTHERS, 6) == b"others"
    world.box.close()


def test_it_has_its_page(world):
    assert world.device.smash(IOVA, b"mine")
    assert world.box.memory.read(world.page, 4) == b"mine"


@pytest.mark.parametrize("address", [SECRET, OTHERS, 0, IOVA + 4096, (1 << 64) - 4096, 1 << 47, 1 << 56])
def test_it_has_nothing_else(world, address):
    assert world.device.steal(address, 6) is None
    assert not world.device.smash(address, b"gotcha")


@pytest.mark.parametrize("pasid", [0, 1, 0x25, 0xFFFFF])
def test_pasids_that_were_not_given_to_it_lead_nowhere(world, pasid):
    assert world.device.steal(IOVA, 4, pasid=pasid) is None
    assert not world.device.smash(IOVA, b"gotcha", pasid=pasid)


def test_translated_requests_are_refused(world):
    assert world.device.steal_translated(SECRET, 6) is None
    assert not world.device.smash_translated(SECRET, b"gotcha")
    assert not world.device.smash_translated(world.page, b"gotcha")


def test_translation_requests_are_refused(world):
    found = world.device.learn(IOVA)
    assert found is None or not found.allowed


def test_in_the_name_of_nobody_it_has_nothing(world):
    for rid in (0, 0xFF, 0x100, 0xFFFF):
        assert world.device.steal(IOVA, 4, rid=rid) is None


def test_a_flood_of_page_requests_overwrites_nothing(world):
    world.device.flood(3000)
    world.device.flood(100, pasid=5)
    assert world.device.smash(IOVA, b"mine")


def test_after_unmapping_and_invalidation_it_has_nothing(world):
    assert world.device.smash(IOVA, b"mine")
    world.unmap()
    assert world.device.steal(IOVA, 4) is None
    assert not world.device.smash(IOVA, b"late")
    assert world.box.memory.read(world.page, 4) == b"mine"


def test_faults_without_end_leave_the_unit_working(world):
    for number in range(500):
        world.device.smash(SECRET + number, b"x")
    assert world.device.smash(IOVA, b"mine")
