"""What the caches of a machine keep: tables until a command names them, nothing, or what chance says."""

from dataclasses import replace

import pytest

from fakedev.caching import Caching, caching
from fakedev.dma import READ, WRITE
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries
from fakedev.vtd.features import SCALABLE
from tests.fakedev.smmuv3.bench import ASID, S1_TABLES, S2_TABLES, VMID, Bench
from tests.fakedev.vtd.rig import DID, FIRST, PAGE, PASID, SECOND, Rig

IOVA, OTHER = 0x3000, 0x5000
F, S, N = entries.PGTT_FIRST, entries.PGTT_SECOND, entries.PGTT_NESTED
IPA = 0x4000_0000


@pytest.fixture
def vtd():
    """A warm unit: IOVA was used, OTHER is mapped by the same table, and then the item above their table goes."""
    made = []

    def make(way="always", pgtt=S, features=SCALABLE, write=READ):
        rig = Rig(features)
        made.append(rig)
        rig.box.set_caching(caching(way))
        rig.tables(pgtt)
        if pgtt == N:
            rig.map_guest()
            rig.map_second(PAGE & 0x1FFFFF, PAGE)
        for iova in (IOVA, OTHER):
            if pgtt == S:
                rig.map_second(iova, PAGE)
            else:
                rig.map_first(iova, PAGE & 0x1FFFFF if pgtt == N else PAGE)
        rig.start()
        assert rig.allowed(IOVA, write, PASID)
        rig.word(SECOND[2] if pgtt == S else FIRST[2], 0)
        return rig

    yield make
    for rig in made:
        rig.close()


#: Of tables 23 and 24 the columns of the paging-structure caches: what of (second stage, first stage) is still walked.
ROWS = [
    (qi.iotlb(0, 0, 0, qi.GLOBAL), False, False),
    (qi.iotlb(DID, 0, 0, qi.DOMAIN), False, False),
    (qi.iotlb(DID + 1, 0, 0, qi.DOMAIN), True, True),
    (qi.iotlb(DID, IOVA, 0, qi.SELECTIVE), False, False),
    (qi.iotlb(DID, IOVA, 0, qi.SELECTIVE, hint=1), True, False),
    (qi.iotlb(DID, 1 << 21, 9, qi.SELECTIVE), True, False),
    (qi.pasid_iotlb(DID, PASID, 0, 0, qi.PIOTLB_PASID), True, False),
    (qi.pasid_iotlb(DID, PASID + 1, 0, 0, qi.PIOTLB_PASID), True, True),
    (qi.pasid_iotlb(DID, PASID, IOVA, 0, qi.PIOTLB_PAGES), True, False),
    (qi.pasid_iotlb(DID, PASID, IOVA, 0, qi.PIOTLB_PAGES, hint=1), True, True),
]


@pytest.mark.parametrize("row", range(len(ROWS)))
@pytest.mark.parametrize("pgtt", [S, F, N])
def test_vtd_tables_go_as_the_manual_says(vtd, pgtt, row):
    descriptor, second, first = ROWS[row]
    rig = vtd(pgtt=pgtt)
    rig.submit(descriptor)
    assert rig.allowed(OTHER, READ, PASID) == (second if pgtt == S else first)


def test_vtd_walks_anew_without_the_caches(vtd):
    rig = vtd("never")
    assert not rig.allowed(OTHER, READ, PASID)
    assert not rig.allowed(IOVA, READ, PASID)
    assert not len(rig.unit.tlb)
    assert not rig.unit.scalable.pasids
    assert not rig.unit.scalable.contexts


def test_caching_mode_keeps_an_absent_table_until_its_range_is_named(vtd):
    rig = vtd(features=replace(SCALABLE, cm=True), way="always")
    rig.submit(qi.iotlb(DID, 0, 0, qi.DOMAIN))
    assert not rig.allowed(OTHER, READ, PASID)
    rig.word(SECOND[2], SECOND[3] | 3)
    assert not rig.allowed(IOVA, READ, PASID)  # another page of the same absent table
    rig.submit(qi.iotlb(DID, 1 << 21, 0, qi.SELECTIVE))
    assert not rig.allowed(IOVA, READ, PASID)
    rig.submit(qi.iotlb(DID, IOVA, 0, qi.SELECTIVE))
    assert rig.allowed(OTHER, READ, PASID)


def test_rights_of_the_tables_are_kept_with_them(vtd):
    rig = vtd()
    rig.word(SECOND[2], SECOND[3] | 1)  # read only, which nobody is told
    assert rig.allowed(OTHER, WRITE, PASID)
    rig.submit(qi.iotlb(DID, 0, 0, qi.DOMAIN))
    assert not rig.allowed(OTHER, WRITE, PASID)


SMMU_ROWS = [
    (c.tlbi_nsnh_all(), False, False),
    (c.tlbi_nh_all(VMID), False, True),
    (c.tlbi_nh_asid(VMID, ASID), False, True),
    (c.tlbi_nh_asid(VMID, ASID + 1), True, True),
    (c.tlbi_nh_va(VMID, ASID, IOVA, False), False, True),
    (c.tlbi_nh_va(VMID, ASID, IOVA, True), True, True),
    (c.tlbi_nh_va(VMID, ASID, 1 << 21, False), True, True),
    (c.tlbi_s2_ipa(VMID, IPA + IOVA, False), True, False),
    (c.tlbi_s2_ipa(VMID, IPA + IOVA, True), True, True),
    (c.tlbi_s12_vmall(VMID), False, False),
]


@pytest.mark.parametrize("row", range(len(SMMU_ROWS)))
@pytest.mark.parametrize("stage", [1, 2])
def test_smmu_tables_go_with_commands_that_are_not_for_leaves_alone(stage, row):
    command, first, second = SMMU_ROWS[row]
    bench = Bench()
    bench.box.set_caching(caching("always"))
    iova = IOVA
    if stage == 1:
        bench.ste(e.CONFIG_NESTED, cdmax=0)
        bench.cd()
        bench.identity2()
        bench.identity2(1)
        for page in (IOVA, OTHER):
            bench.map(page, PAGE)
    else:
        iova = IPA + IOVA
        bench.ste(e.CONFIG_S2)
        for page in (IOVA, OTHER):
            bench.map2(IPA + page, PAGE)
    assert bench.goes(iova)
    if stage == 1:
        bench.word(S1_TABLES[2], 0)
    else:
        bench.word(S2_TABLES[2], 0)
    bench.submit(command)
    other = iova - IOVA + OTHER
    assert bench.goes(other) == (first if stage == 1 else second)
    bench.close()


def test_chance_is_the_same_for_the_same_seed_and_both_keeps_and_drops():
    def decisions(text):
        way = caching(text)
        return [way.keep() for _ in range(64)]

    assert decisions("random:5") == decisions("random:5")
    assert decisions("random:5") != decisions("random:6")
    assert set(decisions("random")) == {True, False}


def test_at_random_a_cache_is_found_empty_now_and_then():
    way = caching("random:1")
    emptied = []
    way.droppable(lambda: emptied.append(1))
    for _ in range(100):
        way.before_request()
    assert 10 < len(emptied) < 90


@pytest.mark.parametrize("text", ["", "sometimes", "random:", "random:x", "always:1", "Never"])
def test_a_way_that_there_is_not_is_a_value_error(text):
    with pytest.raises(ValueError, match="caching is always, never, random or random:SEED"):
        caching(text)


def test_a_machine_without_being_told_keeps_leaves():
    assert isinstance(Rig().box.caching, Caching)
    assert Rig().unit.caching.name == "leaves"
