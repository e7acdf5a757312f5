"""What a vSMMU does that no client sees: the order of stores and commands, ATS at the device, units side by side.

Clients' part of it is in conformance/test_smmuv3_*.py.
"""

from __future__ import annotations

import errno
import struct
from types import SimpleNamespace

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import answer, destroy, hwpt_alloc, ioas_alloc
from conformance.vsmmu import (
    ATC_INV,
    BYPASS,
    CFGI_CD,
    EATS,
    LEAF,
    NH_ASID,
    NH_VA,
    NSNH_ALL,
    S1,
    STE_1,
    Guest,
    V,
    asid,
    make_cd,
    sid,
    viommu_alloc,
    vmid,
)
from fakedev.dma import DmaAbort
from fakedev.machines.file import load
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from kernel_model import pci_ats
from kernel_model.iommu.arm_smmu_v3.vsmmu_commands import validate
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_INVALIDATE

VSID, IOVA, A, B = 0x1234, 0x12_3456_7000, 16, 17
EDU, DSA = "0000:00:10.0", "0000:00:11.0"


class World:
    """A kernel with a guest on one of its devices, and a log of the unit's commands."""

    def __init__(self, machine, address=EDU):
        self.kernel = Kernel(machine)
        self.iommu = self.kernel.open(DEV_IOMMU)
        self.vfio = VfioDevice(self.kernel, address)
        self.vfio.bind(self.iommu)
        self.vfio.enable()
        self.device = self.kernel.devices[address]
        self.master = self.device.priv
        self.smmu = self.master.smmu
        self.guest = Guest(self.kernel, self.iommu, self.vfio)
        self.guest.write(A, b"A")
        self.guest.write(B, b"B")
        self.batches = []
        self.at_sync = lambda: None
        issue = self.smmu.cmdq.issue

        def noting(batch, sync=True):
            self.batches.append((list(batch), sync))
            issue(batch, sync)
            self.at_sync()

        self.smmu.cmdq.issue = noting

    @property
    def ste(self):
        return list(self.smmu.ste(self.master.sid))

    def read(self, iova):
        try:
            return bytes(self.device.pci.dma.read(iova, 1))
        except DmaAbort:
            return None

    def close(self):
        self.guest.close()
        self.vfio.close()
        self.iommu.close()
        self.kernel.close()


@pytest.fixture
def make():
    worlds = []

    def build(machine="virt-smmuv3", address=EDU):
        worlds.append(World(machine, address))
        return worlds[-1]

    yield build
    for world in worlds:
        world.close()


# -- commands --------------------------------------------------------------------------------------------------------


def test_commands_carry_the_host_s_vmid_and_stream(make):
    world = make()
    world.guest.vdevice(VSID)
    world.batches.clear()
    world.guest.invalidate(
        (NH_VA | asid(7) | vmid(99), IOVA | LEAF), (NSNH_ALL, 0), (CFGI_CD | sid(VSID), LEAF), (NH_ASID | asid(7), 0)
    )
    ((commands, sync),) = world.batches
    assert sync
    (own,) = world.smmu.vmids
    assert commands == [
        c.tlbi_nh_va(own, 7, IOVA, leaf=True),
        c.tlbi_nh_all(own),
        c.cfgi_cd(world.master.sid, 0),
        c.tlbi_nh_asid(own, 7),
    ]


def test_63_commands_go_at_a_time_with_a_sync_each(make):
    world = make()
    world.batches.clear()
    assert world.guest.invalidate(*[(NH_ASID | asid(n), 0) for n in range(130)]) == 130
    assert [(len(batch), sync) for batch, sync in world.batches] == [(63, True), (63, True), (4, True)]
    (own,) = world.smmu.vmids
    assert [command for batch, _ in world.batches for command in batch] == [c.tlbi_nh_asid(own, n) for n in range(130)]


@pytest.mark.parametrize(("good", "issued"), [(0, 0), (62, 0), (63, 63), (64, 63), (125, 63), (126, 126), (140, 126)])
def test_what_was_counted_since_the_last_63_is_never_issued(make, good, issued):
    """As in the kernel, where it is an oversight."""
    world = make()
    world.batches.clear()
    arg = world.guest.invalidation(*[(NH_ASID | asid(1), 0)] * good, (c.SYNC, 0))
    assert answer(IOMMU_HWPT_INVALIDATE.raw, world.iommu, arg) == errno.EIO
    assert arg.entry_num == good
    assert sum(len(batch) for batch, _ in world.batches) == issued


def _unit(**features):
    plain = {"asid_bits": 16, "range_inv": True, "ds": False, "ats": True, "ssid_bits": 8}
    return SimpleNamespace(**(plain | features))


@pytest.mark.parametrize(
    ("command", "feature", "with_it", "without"),
    [
        ((NH_VA | 255 << 56, 0), {"asid_bits": 8}, False, True),
        ((NH_ASID | 1 << 56, 0), {"asid_bits": 8}, False, True),
        ((NH_VA | 1 << 12, 1 << 10), {"range_inv": False}, False, True),
        ((NH_VA, 1 << 10 | 1 << 8), {"range_inv": False}, False, True),
        ((NH_VA | 32 << 20, 1 << 10), {"ds": True}, True, False),
        ((NH_VA, 2 << 10 | 1 << 8), {"ds": True}, True, False),
        ((ATC_INV, 0), {"ats": False}, False, True),
        ((ATC_INV | 1 << 11, 0), {"ssid_bits": 0}, False, True),
        ((ATC_INV | 1 << 12, 0), {"ssid_bits": 0}, False, True),
        ((ATC_INV | 1 << 9, 0), {"ssid_bits": 0}, False, True),
        ((CFGI_CD | 1 << 12, 0), {"ssid_bits": 0}, False, True),
        ((CFGI_CD | 1 << 11, 0), {"ssid_bits": 0}, False, False),
    ],
)
def test_a_unit_s_features_decide_over_fields(command, feature, with_it, without):
    assert validate(_unit(**feature), *command) is with_it
    assert validate(_unit(), *command) is without


# -- the stream table entry ------------------------------------------------------------------------------------------


def _kinds(world):
    """Attachable HWPTs, and what the device reads at IOVA with each: stage 1 leads to A or B, without it to nothing."""
    guest = world.guest
    guest.vdevice(VSID)
    guest.map(IOVA, guest.page(A))
    other = guest.new_table()
    guest.map(IOVA, guest.page(B), root=other)
    low = guest.page(24)
    guest.write(24, struct.pack("<8Q", *make_cd(guest.page(other), tag=2)))
    return {
        "a": (guest.nested(), b"A"),
        "b": (guest.nested((V | S1 | low, STE_1)), b"B"),
        "bypass": (guest.nested((V | BYPASS, 0)), None),
        "abort": (guest.nested((V, 0)), None),
        "parent": (guest.parent, None),
    }


_HITLESS = {
    ("a", "b"),
    ("b", "a"),
    *((one, two) for one in ("a", "b") for two in ("bypass", "parent", "abort")),
    *((two, one) for one in ("a", "b") for two in ("bypass", "parent", "abort")),
}


@pytest.mark.parametrize(("first", "second"), sorted(_HITLESS))
def test_at_no_moment_of_an_attachment_is_there_a_third_way(make, first, second):
    """The device, between any two stores, reads by the old entry or by the new one, and nothing else is refused."""
    world = make()
    kinds = _kinds(world)
    world.vfio.attach(kinds[first][0])
    assert world.read(IOVA) == kinds[first][1]
    seen = []
    world.at_sync = lambda: seen.append((world.read(IOVA), bool(world.ste[0] & e.STE_0_V)))
    world.vfio.attach(kinds[second][0])
    world.at_sync = lambda: None
    assert world.read(IOVA) == kinds[second][1]
    found = [what for what, _ in seen]
    assert set(found) <= {kinds[first][1], kinds[second][1]}
    assert found == sorted(found, key=lambda what: what == kinds[second][1])  # no way back
    assert all(valid for _, valid in seen)


def test_an_entry_that_has_to_break_is_invalid_in_between(make):
    """From a guest's to a stage 1 of the host's: tables and VMID change at once."""
    world = make()
    kinds = _kinds(world)
    world.vfio.attach(kinds["a"][0])
    host = hwpt_alloc(world.iommu, world.vfio.devid, world.guest.ioas)
    seen = []
    world.at_sync = lambda: seen.append((world.read(IOVA), bool(world.ste[0] & e.STE_0_V)))
    world.vfio.attach(host)
    assert (None, False) in seen
    assert {what for what, _ in seen} <= {b"A", None}


def test_a_guest_s_entry_is_the_parent_s_with_its_own_words(make):
    world = make("virt-smmuv3-max")
    guest = world.guest
    guest.vdevice(VSID)
    world.vfio.attach(guest.parent)
    below = world.ste
    world.vfio.attach(guest.nested((V | S1 | guest.page(24) | 3 << 59, STE_1 | 2)))
    entry = world.ste
    assert entry[0] == V | e.STE_0_CONFIG.put(e.CONFIG_NESTED) | guest.page(24) | 3 << 59
    assert entry[1] == below[1] | STE_1 | 2 | e.STE_1_MEV
    assert entry[2:] == below[2:]
    assert below[1] & e.STE_1_S2FWB


# -- ATS -------------------------------------------------------------------------------------------------------------


def test_ats_is_off_before_the_entry_forbids_it_and_on_after_the_entry_allows_it(make):
    world = make("virt-smmuv3-max", DSA)
    guest, function = world.guest, world.device.pci
    guest.vdevice(VSID)
    low, high = guest.ste()
    off, on = guest.nested((low, high)), guest.nested((low, high | EATS[1]))
    world.vfio.attach(on)
    assert pci_ats.ats_enabled(function)
    states = []
    world.at_sync = lambda: states.append((e.STE_1_EATS.get(world.ste[1]), pci_ats.ats_enabled(function)))
    world.vfio.attach(off)
    assert (e.EATS_NONE, True) not in states
    assert states[-1] == (e.EATS_NONE, False)
    states.clear()
    world.vfio.attach(on)
    assert (e.EATS_NONE, True) not in states
    assert (e.EATS_FULL, False) in states
    assert pci_ats.ats_enabled(function)


def test_a_device_s_tlb_is_flushed_when_its_guest_changes(make):
    world = make("virt-smmuv3-max", DSA)
    guest = world.guest
    guest.vdevice(VSID)
    low, high = guest.ste()
    first, second = (guest.nested((low, high | EATS[1])) for _ in range(2))
    world.vfio.attach(first)
    world.batches.clear()
    world.vfio.attach(second)
    whole = c.atc_inv(world.master.sid, 0, c.ATC_SIZE_ALL)
    assert [whole] in [batch for batch, _ in world.batches]


# -- what gives out vSMMUs -------------------------------------------------------------------------------------------

_TWO_UNITS = """
name = "two-units"
board = "virt"
[[iommu]]
name = "one"
kind = "smmuv3"
base = 0x0905_0000
{one}
[[iommu]]
name = "two"
kind = "smmuv3"
base = 0x0907_0000
[[device]]
kind = "edu"
address = "0000:00:10.0"
iommu = "one"
properties = [{first}]
[[device]]
kind = "edu"
address = "0000:00:11.0"
iommu = "{second_iommu}"
properties = [{second}]
"""


def _two(tmp_path, one="", first='"canwbs"', second='"canwbs"', second_iommu="two"):
    path = tmp_path / "two.toml"
    path.write_text(_TWO_UNITS.format(one=one, first=first, second=second, second_iommu=second_iommu))
    return load(path)


def test_a_parent_of_another_unit_is_einval(make, tmp_path):
    world = make(_two(tmp_path))
    guest = world.guest
    with VfioDevice(world.kernel, "0000:00:11.0") as other:
        dev_id = other.bind(world.iommu)
        foreign = hwpt_alloc(world.iommu, dev_id, guest.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT)
        assert answer(viommu_alloc, world.iommu, world.vfio.devid, foreign) == errno.EINVAL
        assert answer(viommu_alloc, world.iommu, dev_id, guest.parent) == errno.EINVAL
        second = viommu_alloc(world.iommu, dev_id, foreign)
        assert answer(guest.vdevice, VSID, second) == errno.EINVAL
        assert answer(guest.nested, viommu=second) == errno.EINVAL
        bypass = guest.nested((V | BYPASS, 0))
        for target in (bypass, guest.parent):
            assert answer(other.attach, target) == errno.EINVAL
        destroy(world.iommu, second)


def test_without_coherent_devices_there_are_vsmmus_only_where_stage_2_can_force_write_back(make, tmp_path):
    with_fwb = make(_two(tmp_path, first=""))
    assert with_fwb.smmu.s2fwb
    assert not with_fwb.master.canwbs
    path = tmp_path / "without"
    path.mkdir()
    kernel = Kernel(_two(path, first="", one="features = { s2fwb = false }"))
    with kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, EDU) as device:
        dev_id = device.bind(iommu)
        parent = hwpt_alloc(iommu, dev_id, ioas_alloc(iommu), IOMMU_HWPT_ALLOC_NEST_PARENT)
        assert answer(viommu_alloc, iommu, dev_id, parent) == errno.EOPNOTSUPP
        assert answer(viommu_alloc, iommu, dev_id, 99) == errno.EOPNOTSUPP


def test_a_device_that_may_bypass_caches_is_kept_out_of_a_domain_that_forbids_it(make, tmp_path):
    world = make(_two(tmp_path, second="", second_iommu="one"))
    guest = world.guest
    with VfioDevice(world.kernel, "0000:00:11.0") as other:
        other.bind(world.iommu)
        bypass = guest.nested((V | BYPASS, 0))
        for target in (guest.parent, bypass):
            assert answer(other.attach, target) == errno.EINVAL
        world.vfio.attach(bypass)
        assert world.read(guest.page(A)) == b"A"


def test_a_unit_without_two_stages_has_no_nesting(tmp_path):
    machine = _two(tmp_path, one="features = { stage2 = false }")
    with Kernel(machine) as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, EDU) as device:
        dev_id = device.bind(iommu)
        ioas = ioas_alloc(iommu)
        assert answer(hwpt_alloc, iommu, dev_id, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT) == errno.EOPNOTSUPP
        plain = hwpt_alloc(iommu, dev_id, ioas)
        assert answer(viommu_alloc, iommu, dev_id, plain) == errno.EOPNOTSUPP


def test_nothing_is_left_of_a_guest(make):
    world = make()
    pages, vmids = world.kernel.pages.live, set(world.smmu.vmids)
    guest = Guest(world.kernel, world.iommu, world.vfio)
    vdevice = guest.vdevice(VSID)
    nested = guest.nested()
    world.vfio.attach(nested)
    guest.map(IOVA, guest.page(A))
    assert world.read(IOVA) is not None
    world.vfio.detach()
    assert world.master.vmaster is None
    for number in (nested, vdevice, guest.viommu, guest.parent, guest.ioas):
        destroy(world.iommu, number)
    guest.close()
    assert (world.kernel.pages.live, set(world.smmu.vmids)) == (pages, vmids)
