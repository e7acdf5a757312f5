"""What the IOMMUs themselves cost on the model: part of what `iommulab bench` measures.

For each unit and kind of tables: a translation that is cached, one that is not (with the tables above it cached, and
with nothing cached), DMA, filling a table, and invalidations of a page, of 2 MiB and of a whole domain; and a nested
HWPT's invalidation with 10,000 entries. Beside each stands a limit of the same run: `dict.get` for what is a lookup,
`memmove` for what moves as many bytes. Invalidations are timed as the driver gives them to its queue, with one
translation cached.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple, cast

from conformance import vsmmu, vtd_guest
from conformance.drivers.vfio import VfioDevice, functions
from conformance.steps import hwpt_alloc, ioas_alloc, map_user
from fakedev.caching import caching
from fakedev.dma import NO_PASID, READ, DmaPort
from iommulab.measure import EDU, KIB, MIB, best
from iommulab.measure.dma import memmove_figures
from kernel_model.iommu.arm_smmu_v3 import invalidation
from kernel_model.iommu.arm_smmu_v3.domain import PagingDomain as SmmuDomain
from kernel_model.iommu.core import IOMMU_READ, IOMMU_WRITE, Domain
from kernel_model.iommu.intel.domain import PagingDomain as IntelDomain
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_INVALIDATE, iommu_hwpt_invalidate

PAGE, TABLE = 4 * KIB, 2 * MIB
#: Where the buffer is mapped, and where the fill goes.
_IOVA, _FREE = 1 << 30, 3 << 30
_PAGES = 256
ENTRIES = 10_000


class Figure(NamedTuple):
    """Microseconds, those of the limit that it stands beside, and the most that their ratio should be."""

    name: str
    microseconds: float
    limit: float
    budget: float | None = None


class Setting:
    """A device behind a unit, with a buffer of 1 MiB at _IOVA."""

    def __init__(self, kernel: Kernel, address: str, domain: Domain | None, port: DmaPort) -> None:
        self.kernel = kernel
        self.port = port
        self.unit = kernel.machine.units[0]
        #: The domain whose tables the driver fills.
        self.domain = domain if domain is not None else self.attached(kernel, address)

    @staticmethod
    def attached(kernel: Kernel, address: str) -> Domain:
        group = kernel.devices[address].group
        assert group is not None
        assert group.domain is not None
        return group.domain


@contextmanager
def _device(kernel: Kernel, iommu: File) -> Iterator[VfioDevice]:
    with VfioDevice(kernel, functions(kernel, *EDU)[0]) as device:
        device.bind(iommu)
        device.enable()
        yield device


@contextmanager
def _plain(machine: str, flags: int = 0) -> Iterator[Setting]:
    """One stage, whichever the driver takes for these flags."""
    with Kernel(machine) as kernel, kernel.open(DEV_IOMMU) as iommu, _device(kernel, iommu) as device:
        ioas = ioas_alloc(iommu)
        buffer = kernel.buffer(MIB)
        map_user(iommu, ioas, buffer.address, MIB, _IOVA)
        device.attach(hwpt_alloc(iommu, device.devid, ioas, flags))
        yield Setting(kernel, device.address, None, kernel.machine.function(device.address).dma)


@contextmanager
def _nested_smmu() -> Iterator[Setting]:
    with Kernel("virt-smmuv3") as kernel, kernel.open(DEV_IOMMU) as iommu, _device(kernel, iommu) as device:
        guest = vsmmu.Guest(kernel, iommu, device)
        buffer = kernel.buffer(MIB)
        map_user(iommu, guest.ioas, buffer.address, MIB, _IOVA << 1)
        for n in range(_PAGES):
            guest.map(_IOVA + n * PAGE, (_IOVA << 1) + n * PAGE)
        device.attach(guest.parent)
        parent = Setting.attached(kernel, device.address)
        guest.enter()
        yield Setting(kernel, device.address, parent, kernel.machine.function(device.address).dma)
        guest.close()


@contextmanager
def _nested_vtd() -> Iterator[Setting]:
    with Kernel("q35-vtd-max") as kernel, kernel.open(DEV_IOMMU) as iommu, _device(kernel, iommu) as device:
        guest = vtd_guest.Guest(kernel, iommu, device, ioas_alloc(iommu))
        buffer = kernel.buffer(MIB)
        map_user(iommu, guest.ioas, buffer.address, MIB, _IOVA << 1)
        for n in range(_PAGES):
            guest.map(_IOVA + n * PAGE, (_IOVA << 1) + n * PAGE)
        device.attach(guest.parent)
        parent = Setting.attached(kernel, device.address)
        device.attach(guest.nested())
        yield Setting(kernel, device.address, parent, kernel.machine.function(device.address).dma)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Setting]]] = {
    "VT-d legacy": partial(_plain, "q35-vtd-legacy"),
    "VT-d second stage": partial(_plain, "q35-vtd"),
    "VT-d first stage": partial(_plain, "q35-vtd-fs"),
    "VT-d nested": _nested_vtd,
    "SMMUv3 stage 1": partial(_plain, "virt-smmuv3"),
    "SMMUv3 stage 2": partial(_plain, "virt-smmuv3", IOMMU_HWPT_ALLOC_NEST_PARENT),
    "SMMUv3 nested": _nested_smmu,
}


def unit_figures(seconds: float) -> Iterator[Figure]:
    """All of them, setting by setting."""
    for label, make in SETTINGS.items():
        with make() as setting:
            yield from _setting_figures(label, setting, seconds)
    yield from _entries_figures(seconds)


def _setting_figures(label: str, setting: Setting, seconds: float) -> Iterator[Figure]:
    unit, port = setting.unit, setting.port
    # Measured anew beside each setting: a machine is not as fast now as a minute later.
    lookup = lookup_figure(seconds)
    moves = {name.removeprefix("memmove "): cost for name, cost in memmove_figures(seconds)}
    addresses = [_IOVA + n * PAGE for n in range(_PAGES)]
    translate = unit.translate

    def miss() -> None:
        unit.tlb.clear()
        for address in addresses:
            translate(port, NO_PASID, address, 1, READ)

    translate(port, NO_PASID, _IOVA, 1, READ)
    yield Figure(f"{label}: TLB hit", best(partial(translate, port, NO_PASID, _IOVA, 1, READ), seconds=seconds), lookup)
    yield Figure(f"{label}: TLB miss", best(miss, seconds=seconds) / _PAGES, lookup)
    setting.kernel.machine.set_caching(caching("never"))
    yield Figure(f"{label}: nothing cached", best(miss, seconds=seconds) / _PAGES, lookup)
    setting.kernel.machine.set_caching(caching("always"))
    for length, size, budget in ((PAGE, "4 KiB", 3.0), (MIB, "1 MiB", 1.5)):
        data = bytes(length)
        cost = best(partial(port.write, _IOVA, data), seconds=seconds)
        yield Figure(f"{label}: DMA write {size}", cost, moves[size], budget)
        cost = best(partial(port.read, _IOVA, length), seconds=seconds)
        yield Figure(f"{label}: DMA read {size}", cost, moves[size], budget)
    domain = setting.domain

    def fill() -> None:
        domain.map_small(_FREE, 0x1000, TABLE, IOMMU_READ | IOMMU_WRITE)
        domain.unmap(_FREE, TABLE)

    yield Figure(f"{label}: table of 512 pages, filled and emptied", best(fill, seconds=seconds), moves["4 KiB"])
    for what, invalidate in _invalidations(domain):

        def again(invalidate: Callable[[], object] = invalidate) -> None:
            translate(port, NO_PASID, _IOVA, 1, READ)
            invalidate()

        yield Figure(f"{label}: miss and invalidation of {what}", best(again, seconds=seconds), lookup)


def _invalidations(domain: Domain) -> Iterator[tuple[str, Callable[[], object]]]:
    """As the driver asks for them: a page, 2 MiB of pages, and everything."""
    if isinstance(domain, IntelDomain):
        flush = domain.cache_tags.flush_range
        yield "a page", partial(flush, _IOVA, _IOVA + PAGE - 1, 1)
        yield "2 MiB", partial(flush, _IOVA, _IOVA + TABLE - 1, 1)
        yield "a domain", domain.cache_tags.flush_all
    elif isinstance(domain, SmmuDomain):
        smmu, invs = domain.smmu, domain.invs

        def some(length: int) -> None:
            for batch in invs.batches(_IOVA, length, PAGE, True):
                smmu.cmdq.issue(batch)

        kind = invalidation.S1_ASID if domain.stage1 else invalidation.S2_VMID
        everything = [invalidation.whole(invalidation.Inv(kind, domain.tag))]
        yield "a page", partial(some, PAGE)
        yield "2 MiB", partial(some, TABLE)
        yield "a domain", partial(smmu.cmdq.issue, everything)


def _entries_figures(seconds: float) -> Iterator[Figure]:
    """A guest that names a page in each of 10,000 entries of one call."""
    lookup = lookup_figure(seconds)
    with Kernel("q35-vtd-max") as kernel, kernel.open(DEV_IOMMU) as iommu, _device(kernel, iommu) as device:
        guest = vtd_guest.Guest(kernel, iommu, device, ioas_alloc(iommu))
        nested = guest.nested()
        device.attach(nested)
        buffer = kernel.buffer(ENTRIES * vtd_guest.ENTRY_LENGTH)
        buffer.view[:] = vtd_guest.entries(*((_IOVA + n * PAGE, 1) for n in range(ENTRIES)))
        arg = cast(iommu_hwpt_invalidate, vtd_guest.invalidation(nested, buffer.address, ENTRIES))
        cost = best(partial(_all_done, iommu, arg), seconds=seconds)
        yield Figure(f"VT-d nested: HWPT_INVALIDATE, each of {ENTRIES:,} entries", cost / ENTRIES, lookup)
    with Kernel("virt-smmuv3") as kernel, kernel.open(DEV_IOMMU) as iommu, _device(kernel, iommu) as device:
        guest_smmu = vsmmu.Guest(kernel, iommu, device)
        guest_smmu.enter()
        buffer = kernel.buffer(ENTRIES * 16)
        commands = ((vsmmu.NH_VA | vsmmu.asid(1), _IOVA + n * PAGE | vsmmu.LEAF) for n in range(ENTRIES))
        buffer.view[:] = b"".join(struct.pack("<QQ", *command) for command in commands)
        arg = guest_smmu.invalidation(data_uptr=buffer.address, entry_num=ENTRIES)
        cost = best(partial(_all_done, iommu, arg), seconds=seconds)
        yield Figure(f"SMMUv3 nested: HWPT_INVALIDATE, each of {ENTRIES:,} entries", cost / ENTRIES, lookup)
        guest_smmu.close()


def _all_done(iommu: File, arg: iommu_hwpt_invalidate) -> None:
    IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    if arg.entry_num != ENTRIES:
        raise OSError(f"{arg.entry_num} of {ENTRIES} entries are done")


def lookup_figure(seconds: float) -> float:
    """`dict.get` of an int, among as many as a warm TLB has."""
    table = dict.fromkeys(range(_PAGES), 0)
    return best(partial(table.get, 17), seconds=seconds)
