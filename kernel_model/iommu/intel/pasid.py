"""PASID directories and tables, and their entries: how each PASID of a device is translated.

Mirrors drivers/iommu/intel/pasid.c at 7.3, with the order of its stores and invalidations: a new entry becomes present
by its last store; one that goes is not present before the caches forget it, and is cleared after that. An entry is
never replaced in place: it is torn down first. Left out: faults that are ignored (SVA's), giving a directory back.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries
from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu.core import IOMMU_NO_PASID
from kernel_model.iommu.intel.device import DeviceInfo
from kernel_model.iommu.intel.dmar import FLPT_DEFAULT_DID, IntelUnit

_WORDS = entries.PASID_ENTRY_BYTES // 8
_PASID_MAX = 1 << 20


class PasidTable:
    """`struct pasid_table`: the directory of one device, with tables made as they are needed. ENOMEM.

    A device without PASIDs has one, too, for requests without a PASID.
    """

    def __init__(self, info: DeviceInfo) -> None:
        if injecting:
            kmalloc("struct pasid_table")
        self._unit = info.unit
        self._words = info.unit.memory.words
        wanted = min(info.function_pasids, info.unit.max_pasids, _PASID_MAX) if info.pasid_supported else 0
        size = 1 << max((wanted >> entries.PASID_TABLE_BITS - 3) - 1, 4095).bit_length()
        self.directory = info.unit.pages.alloc(size)
        self.max_pasid = size << 3
        #: What a context entry says of the directory's size.
        self.pdts = (size >> 3).bit_length() - 8

    def entry(self, pasid: int) -> int:
        """intel_pasid_get_entry(): the index of an entry's first word. ENODEV: there is no page for its table."""
        if pasid >= self.max_pasid:
            raise KernelBug(f"PASID {pasid} is beyond the directory's {self.max_pasid}")
        index = (self.directory >> 3) + (pasid >> entries.PASID_TABLE_BITS)
        pde = self._words[index]
        if pde & entries.ENTRY_PRESENT:
            table = pde & entries.ADDRESS_MASK
        else:
            try:
                table = self._unit.pages.alloc()
            except KernelError as error:
                raise KernelError(errno.ENODEV, "no page for a PASID table") from error
            self._unit.pages.keep(table)
            self._words[index] = entries.directory_entry(table)
        return (table >> 3) + _WORDS * (pasid & entries.PASID_TABLE_MASK)


class Stage1Config(NamedTuple):
    """`struct iommu_hwpt_vtd_s1`: a guest's first stage, its flags as bits of the entry's third word."""

    table: int
    levels: int
    flags: int


def _entry(info: DeviceInfo, pasid: int) -> int:
    if info.pasid_table is None:
        raise KernelBug(f"{info.device.name} has no PASID table")
    return info.pasid_table.entry(pasid)


def _clear(unit: IntelUnit, index: int) -> None:
    words = unit.memory.words
    for n in range(_WORDS):
        words[index + n] = 0


def _setup(info: DeviceInfo, pasid: int, entry: entries.PasidEntry) -> None:
    """Make an entry present. EBUSY: it is; ENODEV: no page for its table."""
    unit = info.unit
    words = unit.memory.words
    index = _entry(info, pasid)
    if words[index] & entries.ENTRY_PRESENT:
        raise KernelError(errno.EBUSY, f"PASID {pasid} of {info.device.name} has an entry")
    _clear(unit, index)
    for n in range(1, _WORDS):
        if entry[n]:
            words[index + n] = entry[n]
    words[index] = entry[0] & ~entries.ENTRY_PRESENT
    words[index] = entry[0]
    if unit.caps.caching_mode:
        did = entry[1] & entries.PASID_DID_MASK
        unit.flush_pasid_cache(did, pasid, qi.PC_PASID)
        unit.flush_piotlb_all(did, pasid)


def setup_first_level(
    info: DeviceInfo, pasid: int, did: int, table: int, levels: int, *, snoop: bool = False, walk_snoop: bool = False
) -> None:
    """intel_pasid_setup_first_level(): `levels` is 4 or 5; `snoop` no-snoop requests, `walk_snoop` the walks.

    EINVAL: the unit has no such first stage; as `_setup`.
    """
    caps = info.unit.caps
    if not caps.first_stage or (levels == 5 and not caps.first_stage_5_levels):
        raise KernelError(errno.EINVAL, f"the unit has no first stage of {levels} levels")
    flags = (entries.PASID_PGSNP if snoop else 0) | (entries.PASID_PWSNP if walk_snoop else 0)
    entry = entries.pasid_entry(entries.PGTT_FIRST, did, aw=info.unit.agaw, first=table, fspm=levels - 4, flags_1=flags)
    _setup(info, pasid, entry)


def setup_second_level(info: DeviceInfo, pasid: int, did: int, table: int, aw: int, *, dirty: bool = False) -> None:
    """intel_pasid_setup_second_level(): `aw` is levels - 2. EINVAL: the unit has no second stage; as `_setup`."""
    caps = info.unit.caps
    if not caps.second_stage:
        raise KernelError(errno.EINVAL, "the unit has no second stage")
    flags = entries.PASID_PWSNP if caps.walk_coherency else 0
    entry = entries.pasid_entry(entries.PGTT_SECOND, did, second=table, aw=aw, dirty=dirty, flags_1=flags)
    _setup(info, pasid, entry)


def setup_pass_through(info: DeviceInfo, pasid: int) -> None:
    """intel_pasid_setup_pass_through(). As `_setup`."""
    flags = entries.PASID_PWSNP if info.unit.caps.walk_coherency else 0
    entry = entries.pasid_entry(entries.PGTT_PASS_THROUGH, FLPT_DEFAULT_DID, aw=info.unit.agaw, flags_1=flags)
    _setup(info, pasid, entry)


def setup_nested(
    info: DeviceInfo,
    pasid: int,
    did: int,
    first: Stage1Config,
    second: int,
    aw: int,
    *,
    snoop: bool = False,
    dirty: bool = False,
) -> None:
    """intel_pasid_setup_nested(): a guest's tables on top of the second stage at `second` with `aw` (levels - 2).

    EINVAL: the unit has no such first stage, or not one of its flags; as `_setup`.
    """
    caps = info.unit.caps
    if first.levels not in (4, 5) or (first.levels == 5 and not caps.first_stage_5_levels):
        raise KernelError(errno.EINVAL, f"a first stage of {first.levels} levels")
    if first.flags & entries.PASID_SRE and not caps.supervisor:
        raise KernelError(errno.EINVAL, "the unit has no supervisor requests")
    if first.flags & entries.PASID_EAFE and not caps.extended_accessed:
        raise KernelError(errno.EINVAL, "the unit has no extended accessed flag")
    flags = first.flags
    if not flags & entries.PASID_SRE:
        flags &= ~entries.PASID_WPE
    entry = entries.pasid_entry(
        entries.PGTT_NESTED,
        did,
        second=second,
        aw=aw,
        dirty=dirty,
        first=first.table,
        fspm=first.levels - 4,
        flags_1=(entries.PASID_PGSNP if snoop else 0) | (entries.PASID_PWSNP if caps.walk_coherency else 0),
        flags_2=flags,
    )
    _setup(info, pasid, entry)


def tear_down_entry(info: DeviceInfo, pasid: int) -> None:
    """intel_pasid_tear_down_entry(): nothing of the PASID is translated any more. One that is not present stays so."""
    unit = info.unit
    words = unit.memory.words
    index = _entry(info, pasid)
    low = words[index]
    if not low & entries.ENTRY_PRESENT:
        return
    did = words[index + 1] & entries.PASID_DID_MASK
    words[index] = low & ~entries.ENTRY_PRESENT
    unit.flush_pasid_cache(did, pasid, qi.PC_PASID)
    if low >> entries.PGTT_SHIFT & entries.PGTT_MASK in (entries.PGTT_PASS_THROUGH, entries.PGTT_FIRST):
        unit.flush_piotlb_all(did, pasid)
    else:
        unit.flush_iotlb_domain(did)
    _flush_device_tlb(info, pasid)
    _clear(unit, index)
    if unit.prq is not None:
        unit.prq.drain(info, pasid)


def _flush_device_tlb(info: DeviceInfo, pasid: int) -> None:
    """devtlb_invalidation_with_pasid()."""
    if not info.ats_enabled:
        return
    if pasid == IOMMU_NO_PASID:
        info.unit.flush_device_tlb(info.rid, info.pfsid, info.ats_qdep)
    else:
        info.unit.flush_pasid_device_tlb(info.rid, info.pfsid, pasid, info.ats_qdep)


def setup_page_snoop_control(info: DeviceInfo, pasid: int) -> None:
    """intel_pasid_setup_page_snoop_control(): from now on the entry's translations snoop."""
    unit = info.unit
    words = unit.memory.words
    index = _entry(info, pasid)
    if not words[index] & entries.ENTRY_PRESENT:
        raise KernelBug(f"PASID {pasid} of {info.device.name} has no entry")
    words[index + 1] |= entries.PASID_PGSNP
    did = words[index + 1] & entries.PASID_DID_MASK
    unit.flush_pasid_cache(did, pasid, qi.PC_PASID)
    unit.flush_piotlb_all(did, pasid)
    _flush_device_tlb(info, pasid)


def setup_dirty_tracking(info: DeviceInfo, pasid: int, enabled: bool) -> None:
    """intel_pasid_setup_dirty_tracking(): have the entry's second stage note accesses, or no longer.

    EOPNOTSUPP: it has no second stage; ENODEV: no page for its table.
    """
    unit = info.unit
    words = unit.memory.words
    index = _entry(info, pasid)
    low = words[index]
    if low >> entries.PGTT_SHIFT & entries.PGTT_MASK not in (entries.PGTT_SECOND, entries.PGTT_NESTED):
        raise KernelError(errno.EOPNOTSUPP, "the translation has no second stage")
    if bool(low & entries.PASID_SSADE) == enabled:
        return
    words[index] = low ^ entries.PASID_SSADE
    did = words[index + 1] & entries.PASID_DID_MASK
    unit.flush_pasid_cache(did, pasid, qi.PC_PASID)
    unit.flush_iotlb_domain(did)
    _flush_device_tlb(info, pasid)
