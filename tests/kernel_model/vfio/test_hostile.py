"""A hostile function in a client's hands, on a whole kernel: it reaches what its client has mapped for it, and no more.

Behind each kind of unit stand a hostile function without a port above it, one behind a root port, and an `edu` that
another client has. What is tried at every step is all that the hostile one can do (fakedev/endpoints/hostile.py):
addresses and physical addresses of others, their requester ids, PASIDs, interrupts, page requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import PAGE, ioas_alloc, map_user, unmap
from fakedev.endpoints.hostile import Hostile
from fakedev.tlp import NO_PASID
from kernel_model.kernel import Kernel
from uapi.backend import Buffer, File

MACHINE = """
board = "{board}"

[[iommu]]
kind = "{kind}"
preset = "{preset}"
features = {features}

[[bridge]]
kind = "root-port"
address = "0000:00:03.0"
buses = [1]

[[device]]
kind = "hostile"
address = "0000:00:10.0"

[[device]]
kind = "hostile"
address = "0000:01:00.0"

[[device]]
kind = "edu"
address = "0000:00:11.0"
"""
#: Those with ATS are believed what they say of physical addresses (VT-d 4.2.5): of these that is not tried.
UNITS = {
    "vtd-ats": ("pc", "vtd", "scalable", "{}"),
    "smmuv3-ats": ("virt", "smmuv3", "everything", "{}"),
    "vtd-legacy": ("pc", "vtd", "legacy", "{}"),
    "vtd-scalable": ("pc", "vtd", "scalable", "{ dt = 0, prs = 0, nwfs = 0, pds = 0, ptrs = 0, sms = 0, dit = 0 }"),
    "vtd-second-stage": (
        "pc",
        "vtd",
        "scalable",
        "{ dt = 0, prs = 0, nwfs = 0, pds = 0, ptrs = 0, sms = 0, fsts = 0, nest = 0, fs1gp = 0, fs5lp = 0, eafs = 0 }",
    ),
    "smmuv3": ("virt", "smmuv3", "everything", "{ ats = false, pri = false }"),
}
EDU = "0000:00:11.0"
IOVA, OTHER = 0x10_0000, 0x20_0000


class World:
    """A kernel, a hostile function and its client's page, another client's page behind `edu`, and their secrets."""

    def __init__(self, kernel: Kernel, address: str, trusted: bool) -> None:
        self.kernel, self.address, self.trusted = kernel, address, trusted
        function = kernel.machine.function(address)
        assert isinstance(function, Hostile)
        self.function = function
        self.victim = kernel.machine.function(EDU).rid
        self.other = next(
            f for f in kernel.machine.root.functions.values() if isinstance(f, Hostile) and f is not function
        )
        self.secret: Buffer = kernel.buffer(PAGE)
        self.secret.view[:6] = b"secret"
        self.own: Buffer = kernel.buffer(2 * PAGE)
        self.own.view[PAGE : PAGE + 6] = b"secret"
        #: Where the kernel keeps its tables: the first pages of RAM that are not empty.
        memory = kernel.machine.memory
        start = memory.ram_start
        self.tables = [start + at for at in range(0, 0x40_0000, PAGE) if any(memory.read(start + at, PAGE))]
        assert self.tables

    def attack(self, reached: tuple[int, ...] = ()) -> None:
        """Try everything; `reached` are the IOVAs of pages that it may reach by its own name."""
        function = self.function
        memory = self.kernel.machine.memory
        before = [memory.read(at, PAGE) for at in self.tables]
        targets = [IOVA, OTHER, IOVA + PAGE, 0, (1 << 64) - PAGE, 1 << 38, 1 << 47, *self.tables[:16]]
        targets += [memory.ram_start, memory.ram_end - PAGE, self.secret.address]
        names = [None, self.victim, self.other.rid, 0, 0x18, function.rid ^ 1, 0xFFFF]
        for rid in names:
            for pasid in (NO_PASID, 0, 1, 5, 0xF_FFFF):
                for target in targets:
                    if rid is None and pasid == NO_PASID and target in reached:
                        continue
                    assert function.steal(target, 8, rid=rid, pasid=pasid) is None, (hex(target), rid, pasid)
                    assert not function.smash(target, b"gotcha!!", rid=rid, pasid=pasid), (hex(target), rid, pasid)
            for pa in (*self.tables[:16], memory.ram_start):
                if rid is not None or not self.trusted:
                    assert function.steal_translated(pa, 8, rid=rid) is None
                    assert not function.smash_translated(pa, b"gotcha!!", rid=rid)
            function.flood(4, rid=rid)
            function.flood(4, rid=rid, pasid=5)
            for target in (IOVA, OTHER, 0):
                found = function.learn(target, rid=rid)
                if found is not None and found.allowed and not found.untranslated:
                    assert (rid, self.trusted) == (None, True)
                    assert target in reached
        assert [memory.read(at, PAGE) for at in self.tables] == before
        assert bytes(self.secret.view[:6]) == bytes(self.own.view[PAGE : PAGE + 6]) == b"secret"


@pytest.fixture(params=[f"{unit} {address}" for unit in UNITS for address in ("0000:00:10.0", "0000:01:00.0")])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    unit, address = request.param.split()
    board, kind, preset, features = UNITS[unit]
    path = tmp_path / "hostile.toml"
    text = MACHINE.format(board=board, kind=kind, preset=preset, features=features)
    path.write_text(text, encoding="utf-8")
    with Kernel(machine=str(path)) as kernel:
        yield World(kernel, address, trusted=unit.endswith("ats"))


@pytest.fixture
def victim(world: World) -> Iterator[File]:
    """Another client, whose device has `secret` at IOVA."""
    with world.kernel.open("/dev/iommu") as iommu, VfioDevice(world.kernel, EDU) as device:
        device.bind(iommu)
        ioas = ioas_alloc(iommu)
        map_user(iommu, ioas, world.secret.address, PAGE, IOVA)
        device.attach(ioas)
        device.enable()
        yield iommu


def test_before_any_client_has_it_it_reaches_nothing(world: World, victim: File) -> None:
    world.attack()


def test_in_a_clients_hands_it_reaches_what_is_mapped_while_it_is_mapped(world: World, victim: File) -> None:
    with world.kernel.open("/dev/iommu") as iommu, VfioDevice(world.kernel, world.address) as device:
        device.bind(iommu)
        world.attack()
        ioas, empty = ioas_alloc(iommu), ioas_alloc(iommu)
        map_user(iommu, ioas, world.own.address, PAGE, OTHER)
        device.attach(ioas)
        assert world.function.smash(OTHER, b"mine")
        assert bytes(world.own.view[:4]) == b"mine"
        assert not world.function.smash(OTHER + PAGE - 4, b"8 bytes!")
        world.attack(reached=(OTHER,))
        unmap(iommu, ioas, OTHER, PAGE)
        world.attack()
        map_user(iommu, ioas, world.own.address, PAGE, OTHER)
        assert world.function.steal(OTHER, 4) == b"mine"
        device.attach(empty)
        world.attack()
        device.attach(ioas)
        assert world.function.steal(OTHER, 4) == b"mine"
        device.detach()
        world.attack()
        device.attach(ioas)
        assert world.function.steal(OTHER, 4) == b"mine"
    world.attack()
    assert bytes(world.own.view[:4]) == b"mine"
