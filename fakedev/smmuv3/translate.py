"""Translation through one stream's tables: stage 1, stage 2, or both, and what the TLB keeps of it.

Mirrors Arm IHI 0070, chapter 15 and 3.4 (address sizes), 3.13 (access flag and dirty state), 3.17 (tags). A refusal is
raised as `Refused`, with the stage and the class of the access; the unit makes the event of it.

A TLB entry's tag is VMID and ASID; entries of stage 2 alone and global ones have tags of their own in the same VMID,
global ones by ASET (3.17.1).
Its size is that of the smaller leaf of the two stages. Beside the rights of both stages it remembers those of stage 1
(a fault says which stage refused), granule and level (TLBI with TG and TTL names them) and the size of the stage 1 leaf
(a TLBI of any address in a block removes all that the block was cut into). What a stage 2 makes of the addresses of CDs
and of stage 1 tables is cached as any stage 2 translation.

A write that stage 1 allows and stage 2 refuses leaves the stage 1 leaf dirty, as it may (13.4.4): its flags are updated
first.

Tables above the leaves are kept where `tables` is given, by the tag of the stage (of stage 1, as IPAs); a TLBI without
Leaf removes them.

Left out: speculative fetches.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.dma import EXECUTE, PRIVILEGED, READ, WRITE, Run
from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.pgtable.arm_64_lpae import MEMATTR_SHIFT, NG, Arm64Stage1, Arm64Stage2
from fakedev.pgtable.format import PRIVILEGED as PRIVILEGED_SHIFT
from fakedev.pgtable.format import R, W, X
from fakedev.pgtable.walker import (
    ACCESSED,
    ADDRESS_SIZE,
    FETCH_FAILED,
    MAPPED,
    NOT_PRESENT,
    Load,
    Walk,
    contiguous_pages,
    loader,
    updater,
    walk,
)
from fakedev.smmuv3 import events
from fakedev.smmuv3.config import Cd, Region, Ste
from fakedev.smmuv3.entries import OVERRIDE_CLEAR, OVERRIDE_SET
from fakedev.tlb import TableCache, Tables, Tlb

# What the fourth number of a run says here, from bit 0: the rights; the rights of stage 1; walk again before refusing;
# the leaf is device memory; TG and TTL as a TLBI names them; log2 of the stage 1 leaf.
RIGHTS, STAGE_1_SHIFT, AGAIN, DEVICE = 0o77, 6, 1 << 12, 1 << 13
TG_SHIFT, TTL_SHIFT, LEAF_SHIFT = 14, 16, 18
_TG = {12: 1, 14: 2, 16: 3}

ASID_BITS = 16
STAGE_2, GLOBAL = 1 << 16, 1 << 17
#: Global translations of both sets of ASIDs (CD.ASET).
GLOBALS = (GLOBAL, GLOBAL | 1)
VMID_SHIFT = 20

_OUTCOMES = {
    NOT_PRESENT: events.F_TRANSLATION,
    ADDRESS_SIZE: events.F_ADDR_SIZE,
    ACCESSED: events.F_ACCESS,
    FETCH_FAILED: events.F_WALK_EABT,
}
_TOP_BYTE = 0xFF << 56


class Refused(Exception):
    """A translation does not happen: the event's number and what the record says of the place.

    `ste` is the stream's, once it is known.
    """

    def __init__(
        self,
        number: int,
        *,
        s2: bool = False,
        klass: int = events.CLASS_IN,
        ipa: int = 0,
        fetch_address: int = 0,
        ttrnw: bool = True,
    ) -> None:
        super().__init__(events.NAMES[number])
        self.ste: Ste | None = None
        self.number = number
        self.s2 = s2
        self.klass = klass
        self.ipa = ipa
        self.fetch_address = fetch_address
        self.ttrnw = ttrnw


class Stream:
    """A stream, or a substream of it, as its STE and CD configure it. `cd` is None where stage 1 is bypassed.

    `needed` are the rights that a request needs, by its access bits, after the STE's overrides.
    """

    __slots__ = ("bypass", "cd", "global_tag", "needed", "sid", "ssid", "ste", "tag")

    def __init__(self, sid: int, ssid: int | None, ste: Ste, cd: Cd | None) -> None:
        self.sid = sid
        self.ssid = ssid
        self.ste = ste
        self.cd = cd
        self.bypass = cd is None and not ste.s2
        base = ste.vmid << VMID_SHIFT
        self.tag = base | (STAGE_2 if cd is None else cd.asid)
        self.global_tag = base | GLOBALS[cd is not None and cd.aset]
        self.needed = tuple(self._needed(access) for access in range(16))

    def _needed(self, access: int) -> int:
        privileged, instruction = attributes(self.ste, access)
        rights = (R if access & READ else 0) | (W if access & WRITE else 0)
        if instruction and access & (READ | EXECUTE):
            rights = X
        return rights << (PRIVILEGED_SHIFT if privileged else 0)


def canonical(cd: Cd, address: int) -> tuple[Region, int]:
    """Which tables hold an address, and the address without what TBI ignores."""
    if address >> 55 & 1:
        return cd.ttb1, address | _TOP_BYTE if cd.ttb1.tbi else address
    return cd.ttb0, address & ~_TOP_BYTE if cd.ttb0.tbi else address


def attributes(ste: Ste, access: int) -> tuple[bool, bool]:
    """Privileged, and an instruction fetch, after PRIVCFG and INSTCFG; writes are data."""
    privileged, instruction = bool(access & PRIVILEGED), bool(access & EXECUTE)
    if ste.privcfg in (OVERRIDE_CLEAR, OVERRIDE_SET):
        privileged = ste.privcfg == OVERRIDE_SET
    if ste.instcfg in (OVERRIDE_CLEAR, OVERRIDE_SET):
        instruction = ste.instcfg == OVERRIDE_SET
    return privileged, instruction and not access & WRITE


def _update_aborted(error: BusAbort) -> Refused:
    """Memory refused the write of a flag in a stage 1 descriptor."""
    return Refused(events.F_WALK_EABT, klass=events.CLASS_TT, fetch_address=error.address & -8)


def _is_device(ste: Ste, item: int) -> bool:
    """A stage 2 leaf names device memory (MemAttr, with and without S2FWB)."""
    memattr = item >> MEMATTR_SHIFT & 0xF
    return not memattr & 4 if ste.s2fwb else not memattr & 0xC


class Translator:
    """The translation of addresses; `tlb` is the cache, `keep()` says whether something may be cached."""

    def __init__(self, memory: PhysicalMemory, tlb: Tlb, keep: Callable[[], bool]) -> None:
        self.memory = memory
        self.tlb = tlb
        self.keep = keep
        #: What is kept of tables; None: each walk begins at its root.
        self.tables: TableCache | None = None
        self.load: Load = loader(memory)
        self._update = updater(memory)
        #: By tag, the sizes (log2) of stage 1 leaves whose entries are smaller.
        self._splintered: dict[int, set[int]] = {}

    # -- requests ----------------------------------------------------------------------------------------------------

    def translate(self, stream: Stream, address: int, length: int, access: int) -> Run:
        """The run that holds `address`, from the TLB or the tables. Raises Refused."""
        needed = stream.needed[access]
        if stream.cd is None:
            if address >> stream.ste.ias_bits:
                raise Refused(events.F_ADDR_SIZE)
            if stream.bypass:
                return 0, 1 << stream.ste.ias_bits, 0, READ | WRITE | EXECUTE
            return self._stage2(stream.ste, address, needed, events.CLASS_IN, length=length)
        region, va = canonical(stream.cd, address)
        if not region.disabled and region.is_outside(va):
            raise Refused(events.F_TRANSLATION)
        tlb = self.tlb
        run = tlb.lookup(stream.tag, va)
        if run is None:
            run = tlb.lookup(stream.global_tag, va)
        if run is not None:
            if run[3] & needed == needed:
                if run[1] < va + length:
                    run = tlb.extend(stream.tag, run, va + length)
            elif run[3] & AGAIN:
                run = None
            else:
                self._refuse_hit(stream, region, va, run, needed)
        if run is None:
            run = self._fill(stream, region, va, length, needed)
        if va != address:
            offset = address - va
            run = (run[0] + offset, run[1] + offset, run[2] - offset, run[3])
        return run

    def translate_split(self, stream: Stream, address: int, length: int, access: int) -> Run:
        """To an IPA, with the rights of both stages: what split-stage ATS gives to an endpoint (13.6.3, 13.6.5).

        From the tables of stage 1; `length` is not looked at. Raises Refused.
        """
        cd, ste = stream.cd, stream.ste
        if cd is None:
            start, stop, _, shape = self.translate(stream, address, 1, access)
            return start, stop, 0, shape
        region, va = canonical(cd, address)
        if region.disabled or region.is_outside(va):
            raise Refused(events.F_TRANSLATION)
        needed = stream.needed[access]
        end, where = self._walk_stage1(stream, region, va, needed, cd.ha)
        if end.outcome != MAPPED:
            self._refuse_walk(end, where)
        if end.rights & needed != needed:
            raise Refused(events.F_PERMISSION)
        second = self._stage2(ste, end.output, needed, events.CLASS_IN)
        lg2 = min(end.lg2, second[3] >> LEAF_SHIFT)
        again = (AGAIN if end.cacheable != end.rights else 0) | second[3] & AGAIN
        start = address & -(1 << lg2)
        shape = end.cacheable & second[3] | again | lg2 << LEAF_SHIFT
        return start, start + (1 << lg2), end.output - address, shape

    def _refuse_hit(self, stream: Stream, region: Region, va: int, run: Run, needed: int) -> None:
        """A cached translation does not allow a request: say which stage it was."""
        if needed & ~(run[3] >> STAGE_1_SHIFT) or not stream.ste.s2:
            raise Refused(events.F_PERMISSION)
        ipa = va
        end = self._walk_stage1(stream, region, va, 0, False)[0]
        if end.outcome == MAPPED:
            ipa = end.output
        raise Refused(events.F_PERMISSION, s2=True, ipa=ipa)

    def _tables_of(self, tag: int, fmt: Arm64Stage1 | Arm64Stage2) -> Tables | None:
        if self.tables is None or not self.keep():
            return None
        return self.tables.of(tag, fmt.granule_lg2, fmt.index_bits)

    # -- stage 1 -----------------------------------------------------------------------------------------------------

    def _walk_stage1(self, stream: Stream, region: Region, va: int, needed: int, update: bool) -> tuple[Walk, int]:
        """The walk, and the physical address of the last descriptor. `update`: whether to keep flags."""
        fmt = region.format
        assert fmt is not None
        ste = stream.ste
        tables = self._tables_of(stream.tag, fmt)
        if not ste.s2:
            change = self._update if update else None
            try:
                end = walk(fmt, self.load, region.root, fmt.top_level, va, needed, change, tables)
            except BusAbort as error:
                raise _update_aborted(error) from None
            return end, end.item_pa
        where = region.root

        def load(ipa: int) -> int:
            nonlocal where
            where = self._stage2_pa(ste, ipa, R, events.CLASS_TT)
            return self.load(where)

        def change_ipa(ipa: int, old: int, new: int) -> int:
            return self._update(self._stage2_pa(ste, ipa, W, events.CLASS_TT), old, new)

        try:
            end = walk(fmt, load, region.root, fmt.top_level, va, needed, change_ipa if update else None, tables)
        except BusAbort as error:
            raise _update_aborted(error) from None
        return end, where

    def _fill(self, stream: Stream, region: Region, va: int, length: int, needed: int) -> Run:
        """Walk for an address that is not cached (or not with these rights); cache and return what is there."""
        if region.disabled:
            raise Refused(events.F_TRANSLATION)
        cd = stream.cd
        fmt = region.format
        assert cd is not None
        assert fmt is not None
        ste = stream.ste
        end, where = self._walk_stage1(stream, region, va, needed, cd.ha)
        if end.outcome != MAPPED:
            self._refuse_walk(end, where)
        if end.rights & needed != needed:
            raise Refused(events.F_PERMISSION)
        tag = stream.tag if end.item & NG else stream.global_tag
        again = AGAIN if end.cacheable != end.rights else 0
        lg2, rights, delta = end.lg2, end.cacheable, end.output - va
        if ste.s2:
            second = self._stage2(ste, end.output, needed, events.CLASS_IN)
            lg2 = min(lg2, second[3] >> LEAF_SHIFT)
            rights &= second[3]
            again |= second[3] & AGAIN
            delta += second[2]
            if lg2 < end.lg2:
                self._splintered.setdefault(tag, set()).add(end.lg2)
        start = va & -(1 << lg2)
        shape = rights | end.cacheable << STAGE_1_SHIFT | again | _shape(fmt, end) | end.lg2 << LEAF_SHIFT
        stop = start + (1 << lg2)
        if lg2 == 12 and not ste.s2:
            stop = start + (contiguous_pages(self.memory, end, va, length) << 12)
        run = (start, stop, delta, shape)
        return self.tlb.insert(tag, run, lg2) if self.keep() else run

    def _refuse_walk(self, end: Walk, where: int) -> None:
        if end.outcome == FETCH_FAILED:
            raise Refused(events.F_WALK_EABT, klass=events.CLASS_TT, fetch_address=where)
        raise Refused(_OUTCOMES[end.outcome])

    # -- stage 2 -----------------------------------------------------------------------------------------------------

    def _stage2_pa(self, ste: Ste, ipa: int, needed: int, klass: int) -> int:
        """Where a CD or a stage 1 descriptor lies."""
        run = self._stage2(ste, ipa, needed, klass)
        return ipa + run[2]

    def cd_pa(self, ste: Ste, address: int) -> int:
        """Where a CD or its level 1 descriptor lies: through stage 2 if the stream has one. Raises Refused."""
        return self._stage2_pa(ste, address, R, events.CLASS_CD) if ste.s2 else address

    def _stage2(self, ste: Ste, ipa: int, needed: int, klass: int, length: int = 1) -> Run:
        """The run of IPAs that holds `ipa`. Raises Refused."""
        tag = ste.vmid << VMID_SHIFT | STAGE_2
        fmt = ste.s2_format
        assert fmt is not None
        run = self.tlb.lookup(tag, ipa)
        if run is None or (run[3] & needed != needed and run[3] & AGAIN):
            run = self._fill_stage2(ste, fmt, tag, ipa, needed, klass, length)
        elif run[1] < ipa + length:
            run = self.tlb.extend(tag, run, ipa + length)
        if run[3] & needed != needed or (run[3] & DEVICE and ste.s2ptw and klass != events.CLASS_IN):
            raise Refused(events.F_PERMISSION, s2=True, klass=klass, ipa=ipa, ttrnw=not needed & W)
        return run

    def _fill_stage2(self, ste: Ste, fmt: Arm64Stage2, tag: int, ipa: int, needed: int, klass: int, length: int) -> Run:
        if ipa >> ste.s2_bits:
            raise Refused(events.F_TRANSLATION, s2=True, klass=klass, ipa=ipa)
        update = self._update if ste.s2_ha else None
        try:
            end = walk(fmt, self.load, ste.s2_root, fmt.top_level, ipa, needed, update, self._tables_of(tag, fmt))
        except BusAbort as error:
            raise Refused(events.F_WALK_EABT, s2=True, klass=klass, ipa=ipa, fetch_address=error.address & -8) from None
        if end.outcome != MAPPED:
            raise Refused(_OUTCOMES[end.outcome], s2=True, klass=klass, ipa=ipa, fetch_address=end.item_pa)
        start = ipa & -(1 << end.lg2)
        stop = start + (contiguous_pages(self.memory, end, ipa, length) << 12 if end.lg2 == 12 else 1 << end.lg2)
        shape = end.cacheable | end.cacheable << STAGE_1_SHIFT | _shape(fmt, end) | end.lg2 << LEAF_SHIFT
        if end.cacheable != end.rights:
            shape |= AGAIN
        if _is_device(ste, end.item):
            shape |= DEVICE
        run = (start, stop, end.output - ipa, shape)
        return self.tlb.insert(tag, run, end.lg2) if self.keep() else run

    # -- invalidation ------------------------------------------------------------------------------------------------

    def invalidate(
        self, tag: int, start: int, length: int, tg: int = 0, ttl: int = 0, last_level: bool = False
    ) -> None:
        """Forget what [start, start + length) of a tag is translated to; without `last_level` tables, too.

        Without `tg`: every entry that reaches into it, whatever its size. With: those of that granule, and with `ttl`
        those whose leaf was at that level.
        """
        tlb = self.tlb
        if self.tables is not None and not last_level:
            self.tables.clear_range(tag, start, length)
        wide = [(start, length)]
        for lg2 in self._splintered.get(tag, ()):
            first = start & -(1 << lg2)
            wide.append((first, (start + length - first + (1 << lg2) - 1) & -(1 << lg2)))
        if not tg and len(wide) == 1:
            tlb.clear_range(tag, start, length)
            return
        for first, size in wide:
            for run in tlb.runs(tag, first, size):
                shape = run[3]
                if tg and (shape >> TG_SHIFT & 3 != tg or (ttl and shape >> TTL_SHIFT & 3 != ttl)):
                    continue
                leaf = 1 << (shape >> LEAF_SHIFT)
                low, high = run[0] & -leaf, run[1] + leaf - 1 & -leaf
                if first == start and size == length:
                    low, high = max(run[0], start), min(run[1], start + length)
                elif high <= start or low >= start + length:
                    continue
                tlb.clear_range(tag, max(low, run[0]), min(high, run[1]) - max(low, run[0]))

    def tags(self) -> set[int]:
        """The tags of which anything is kept."""
        return {*self.tlb.tags(), *(() if self.tables is None else self.tables.tags())}

    def invalidate_tags(self, wanted: Callable[[int], bool]) -> None:
        """Forget all entries of some tags."""
        for tag in self.tlb.tags():
            if wanted(tag):
                self.tlb.clear_tag(tag)
                self._splintered.pop(tag, None)
        if self.tables is not None:
            for tag in self.tables.tags():
                if wanted(tag):
                    self.tables.clear_tag(tag)

    def clear(self) -> None:
        """Forget everything."""
        self.tlb.clear()
        if self.tables is not None:
            self.tables.clear()
        self._splintered.clear()


def _shape(fmt: Arm64Stage1 | Arm64Stage2, end: Walk) -> int:
    """Granule and level of a leaf as TLBI commands name them."""
    return _TG[fmt.granule_lg2] << TG_SHIFT | (3 - end.level & 3) << TTL_SHIFT
