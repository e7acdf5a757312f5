"""Scalable mode of a VT-d unit: from a source, a PASID and an address to a run, or to a fault condition.

Mirrors the VT-d specification, revision 5.10: 3.4.3 (tables), 3.6 to 3.9 (first-stage, second-stage, nested and
pass-through translation), 6.2 (context cache by source, PASID cache by source and PASID), table 30 in 7.1.3 (fault
conditions, in the order in which a request meets them).

IOTLB entries are tagged with domain id, PASID and whether a first stage took part, which is what invalidations go by
(tables 23 and 24), and shared between sources of one domain and PASID; the manual's hardware looks up by source.
UNVERIFIED: the manual does not say in which order conditions of one entry are checked, nor whether a read of a
first-stage table through a second stage with SSADE sets the dirty bit; here it does, as it needs permission to write.
Tables are kept by domain id (second stage), and by domain id and PASID (first stage; in nested translation as guest
addresses, so that the second stage is asked again).
Left out: memory types, host permission tables. With caching mode, missing context entries and
second-stage translations are cached; missing PASID-table entries are not (the manual lets hardware do either, and
Linux's driver would not get rid of them).
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.caching import LEAVES
from fakedev.dma import EXECUTE, MSI_END, MSI_START, NO_PASID, PRIVILEGED, READ, WRITE, Run
from fakedev.memory import PhysicalMemory
from fakedev.pgtable.format import NEEDED, WRITES, R, W
from fakedev.pgtable.walker import (
    FETCH_FAILED,
    MAPPED,
    NOT_PRESENT,
    RESERVED_BITS,
    Load,
    Update,
    Walk,
    contiguous_pages,
    explain,
    load_word,
    loader,
    walk,
)
from fakedev.tlb import TableCache, Tables, Tlb
from fakedev.vtd import descriptors as qi
from fakedev.vtd import entries, faults, regs
from fakedev.vtd.faults import Refused
from fakedev.vtd.scalable_tables import FIRST_STAGE, Context, Pasid, TableReader

#: What a request is, for the checks of a context entry.
UNTRANSLATED, TRANSLATION, TRANSLATED, PAGE_REQUEST = range(4)

#: In the rights of a cached run, beside the six of the path: writing needs no update of a dirty bit; U/S is set.
CLEAN_TO_WRITE, USER = 1 << 6, 1 << 7
_RIGHTS = 0o77
_FULL = _RIGHTS | CLEAN_TO_WRITE | USER
_GIGABYTE = 30


class ScalableMode:
    """The translation of one unit while its root table is a scalable one."""

    def __init__(
        self, memory: PhysicalMemory, caps: regs.Capabilities, tlb: Tlb, host_bits: int, major_version: int
    ) -> None:
        self.memory = memory
        self.caps = caps
        self.tlb = tlb
        self.root = 0
        self._host_bits = host_bits
        self._major_version = major_version
        self._load = loader(memory)
        self._tables = TableReader(memory, caps, host_bits)
        self.contexts: dict[int, Context] = {}
        #: By (source, PASID).
        self.pasids: dict[tuple[int, int], Pasid] = {}
        #: What a plain request needs of both caches, by `rid << 21 | pasid + 1`. Emptied with either.
        self._ready: dict[int, tuple[Pasid, int]] = {}
        self._tags: dict[int, set[int]] = {}
        self.caching = LEAVES
        #: Second-stage tables by domain id, first-stage ones by the tags of the IOTLB.
        self.tables = TableCache()

    # -- requests ----------------------------------------------------------------------------------------------------

    def translate(self, rid: int, pasid: int, address: int, length: int, access: int) -> Run:
        """The run for an untranslated request. Refused."""
        if access & EXECUTE and self._major_version >= 8:
            raise Refused(faults.EXECUTE_REQUESTED)
        found = self._ready.get(rid << 21 | pasid + 1)
        if found is None:
            found = self._find(rid, pasid, UNTRANSLATED)
        entry, implied = found
        if access > 3:
            self._check_prefix(entry, access)
        return self.look_up(entry, address, length, access | implied)

    def look_up(self, entry: Pasid, address: int, length: int, access: int) -> Run:
        """The run for an access through a PASID-table entry: cached, or walked and then cached. Refused."""
        needed = NEEDED[access]
        run = self.tlb.lookup(entry.tag, address)
        if run is not None:
            allowed = run[3]
            if allowed & needed != needed:
                raise Refused(self._denied(entry, allowed, access), entry.fpd)
            if allowed & CLEAN_TO_WRITE or not access & WRITE:
                return run if run[1] >= address + length else self.tlb.extend(entry.tag, run, address + length)
            length = 1  # only this page's dirty bit
        return self._fill(entry, address, length, access, needed)

    def for_translation_request(self, rid: int, pasid: int, access: int) -> tuple[Pasid, int]:
        """The entry for a translation request, and the access with the privilege that RID_PRIV gives. Refused."""
        if access & EXECUTE and self._major_version >= 8:
            raise Refused(faults.EXECUTE_REQUESTED)
        found = self._find(rid, pasid, TRANSLATION)
        if access > 3:
            self._check_prefix(found[0], access)
        return found[0], access | found[1]

    def check_translated(self, rid: int, pasid: int, address: int, access: int) -> None:
        """Whether a translated request may pass. Refused."""
        if access & EXECUTE and self._major_version >= 8:
            raise Refused(faults.EXECUTE_REQUESTED)
        context = self._context(rid)
        self._check_context(context, pasid, TRANSLATED)
        if address >> self._host_bits:
            raise Refused(faults.BEYOND_HOST_WIDTH, context.fpd)
        if MSI_START <= address < MSI_END:
            raise Refused(faults.SM_INTERRUPT_RANGE, context.fpd)

    def for_page_request(self, rid: int, pasid: int) -> Pasid:
        """The entry for a page request, and what its implicit invalidation goes by. Refused."""
        return self._find(rid, pasid, PAGE_REQUEST)[0]

    def _check_prefix(self, entry: Pasid, access: int) -> None:
        """Execute and privilege of the PASID prefix."""
        if access & EXECUTE and not self.caps.execute:
            raise Refused(faults.PASID_NO_EXECUTE, entry.fpd)
        if access & PRIVILEGED and not entry.supervisor:
            raise Refused(faults.PASID_NO_SUPERVISOR, entry.fpd)

    def _find(self, rid: int, pasid: int, kind: int) -> tuple[Pasid, int]:
        """The PASID-table entry of a request, and PRIVILEGED if it has privilege by RID_PRIV. Refused."""
        context = self._context(rid)
        self._check_context(context, pasid, kind)
        number, implied = pasid, 0
        if pasid == NO_PASID:
            number = context.rid_pasid
            implied = PRIVILEGED if context.privileged else 0
        entry = self.pasids.get((rid, number))
        if entry is None:
            entry = self._tables.pasid(context, number)
            if not entry.reason and self.caching.keep():
                self.pasids[rid, number] = entry
        if entry.reason:
            raise Refused(entry.reason, entry.fpd)
        if implied and not entry.supervisor and kind != PAGE_REQUEST:
            raise Refused(faults.PASID_NO_SUPERVISOR, entry.fpd)
        if kind == UNTRANSLATED and self.caching.shortcuts:
            self._ready[rid << 21 | pasid + 1] = entry, implied
        return entry, implied

    # -- context entries ---------------------------------------------------------------------------------------------

    def _context(self, rid: int) -> Context:
        context = self.contexts.get(rid)
        if context is None:
            context = self._tables.context(self.root, rid)
            kept = not context.reason or (self.caps.caching_mode and context.reason in _NOT_PRESENT)
            if kept and self.caching.keep():
                self.contexts[rid] = context
        if context.reason:
            raise Refused(context.reason, context.fpd)
        return context

    def _check_context(self, context: Context, pasid: int, kind: int) -> None:
        """What a context entry says about a kind of request, with or without a PASID. Refused."""
        reason = 0
        has_pasid = pasid != NO_PASID
        if has_pasid and not context.pasids and kind in (UNTRANSLATED, TRANSLATION):
            reason = faults.SM_PASID_DISABLED
        elif context.translated_pasids and not context.pasids:
            reason = faults.SM_CONTEXT_INVALID
        elif kind in (TRANSLATION, TRANSLATED) and not context.device_tlb:
            reason = faults.SM_DEVICE_TLB_DISABLED
        elif kind == PAGE_REQUEST and not context.page_requests:
            reason = faults.SM_PAGE_REQUEST_DISABLED
        elif has_pasid:
            if kind == TRANSLATED and not context.translated_pasids:
                reason = faults.SM_TRANSLATED_PASID_DISABLED
            elif not context.pasids:
                reason = faults.SM_PASID_DISABLED
            elif pasid >> self.caps.pasid_bits and kind != PAGE_REQUEST:
                reason = faults.PASID_BEYOND_UNIT
            elif pasid > context.top_pasid:
                reason = faults.SM_PASID_BEYOND_DIRECTORY
            elif pasid == context.rid_pasid:
                reason = faults.SM_PASID_IS_RID_PASID
        if reason:
            raise Refused(reason, context.fpd)

    # -- walks -------------------------------------------------------------------------------------------------------

    def _fill(self, entry: Pasid, address: int, length: int, access: int, needed: int) -> Run:
        """Walk the tables for an address that is not cached, or whose dirty bit is to be set; cache the result."""
        pgtt = entry.pgtt
        if pgtt == entries.PGTT_PASS_THROUGH:
            if address >> self._host_bits:
                raise Refused(faults.BEYOND_HOST_WIDTH, entry.fpd)
            return self._end(entry, address, 0, _GIGABYTE, _FULL, access, needed)
        if pgtt == entries.PGTT_SECOND:
            if address >> entry.limit:
                raise Refused(faults.SM_BEYOND_ADDRESS_WIDTH, entry.fpd)
            try:
                end = self._walk_second(entry, address, needed)
            except Refused as refused:
                if self.caps.caching_mode and refused.reason == faults.SS_NOT_PRESENT:
                    # With the tables, an item above the leaves is kept that is not present.
                    lg2 = refused.lg2 if self.caching.tables else 12
                    start = address & -(1 << lg2)
                    self._insert(entry, (start, start + (1 << lg2), 0, 0), lg2)
                raise
            rights = end.rights | USER | (0 if entry.dirty and not end.cacheable & WRITES else CLEAN_TO_WRITE)
        else:
            sign = address >> entry.canonical
            if sign and sign != (1 << 64 - entry.canonical) - 1:
                raise Refused(faults.NOT_CANONICAL, entry.fpd)
            if pgtt == entries.PGTT_NESTED:
                return self._fill_nested(entry, address, access, needed)
            end = self._walk_first(entry, address, needed, self._load, entry.update_first)
            rights = _first_rights(end)
        pages = contiguous_pages(self.memory, end, address, length) if end.level == 0 and length > 1 else 1
        return self._end(entry, address, end.output - address, end.lg2, rights, access, needed, pages)

    def _fill_nested(self, entry: Pasid, address: int, access: int, needed: int) -> Run:
        tables = _GuestTables(self, entry)
        reads = needed & ~WRITES
        first = self._walk_first(entry, address, reads, tables.load, tables.update)
        if first.output >> entry.limit:
            raise Refused(faults.FS_BEYOND_SECOND_STAGE, entry.fpd)
        rights = _first_rights(first)
        if rights & needed != needed:
            raise Refused(self._denied(entry, rights, access), entry.fpd)
        needed_second = needed & 7 | needed >> 3
        second = self._walk_second(entry, first.output, needed_second)
        both = rights & (second.rights | ~_RIGHTS)
        if both & needed == needed and needed & WRITES and not rights & CLEAN_TO_WRITE:
            # The page may be written: only now the first stage's dirty bit is due.
            tables.top = True
            first = self._walk_first(entry, address, needed, tables.load, tables.update)
            both |= CLEAN_TO_WRITE
        if entry.dirty and not second.cacheable & WRITES:
            both &= ~CLEAN_TO_WRITE
        lg2 = min(first.lg2, second.lg2)
        return self._end(entry, address, second.output - address, lg2, both, access, needed)

    def _tables_of(self, tag: int) -> Tables | None:
        return self.tables.of(tag, 12, 9) if self.caching.tables and self.caching.keep() else None

    def _walk_first(self, entry: Pasid, address: int, needed: int, load: Load, update: Update | None) -> Walk:
        """A first-stage walk that ends at a leaf. Refused."""
        assert entry.first is not None
        tables = self._tables_of(entry.tag | FIRST_STAGE)
        end = walk(entry.first, load, entry.first_root, entry.first_top, address, needed, update, tables)
        outcome = end.outcome
        if outcome == MAPPED:
            return end
        if outcome == NOT_PRESENT:
            reason = faults.FS_NOT_PRESENT
        elif outcome == RESERVED_BITS:
            reason = faults.FS_RESERVED
        else:
            reason = faults.FS_ROOT_ERROR if end.level == entry.first_top else faults.FS_TABLE_ERROR
        raise Refused(reason, entry.fpd)

    def _walk_second(self, entry: Pasid, address: int, needed: int) -> Walk:
        """A second-stage walk that ends at a leaf which can be read or written. Refused."""
        assert entry.second is not None
        tables, update = self._tables_of(entry.did), entry.update_second
        end = walk(entry.second, self._load, entry.second_root, entry.second_top, address, needed, update, tables)
        outcome = end.outcome
        if outcome == MAPPED:
            if end.rights & (R | W):
                return end
            reason = faults.SS_NOT_PRESENT
        elif outcome == NOT_PRESENT:
            raise Refused(faults.SS_NOT_PRESENT, entry.fpd, entry.second.item_lg2(end.level))
        elif outcome == RESERVED_BITS:
            reason = faults.SS_RESERVED
        else:
            reason = faults.SS_ROOT_ERROR if end.level == entry.second_top else faults.SS_TABLE_ERROR
        raise Refused(reason, entry.fpd)

    def _denied(self, entry: Pasid, rights: int, access: int) -> int:
        """The fault condition of an access that `rights` do not allow."""
        if entry.first is not None:
            if not access & PRIVILEGED and not rights & USER:
                return faults.NO_USER_PERMISSION
        elif not rights & (R | W):
            return faults.SS_NOT_PRESENT
        missing = NEEDED[access] & ~rights
        return faults.SM_NO_WRITE_PERMISSION if missing & WRITES else faults.SM_NO_READ_PERMISSION

    def _end(
        self,
        entry: Pasid,
        address: int,
        delta: int,
        lg2: int,
        rights: int,
        access: int,
        needed: int,
        pages: int = 1,
    ) -> Run:
        """Judge what a walk found, and cache it: not what faults (but see caching mode), nor the interrupt range."""
        output = address + delta
        if MSI_START <= output < MSI_END:
            raise Refused(faults.SM_INTERRUPT_RANGE, entry.fpd)
        denied = rights & needed != needed
        if denied and (entry.first is not None or not self.caps.caching_mode):
            raise Refused(self._denied(entry, rights, access), entry.fpd)
        start = address & -(1 << lg2)
        stop = start + (1 << lg2) * pages
        if start + delta < MSI_END and stop + delta > MSI_START:
            start, lg2 = address & -4096, 12
            stop = start + 4096
        run = self._insert(entry, (start, stop, delta, rights), lg2)
        if denied:
            raise Refused(self._denied(entry, rights, access), entry.fpd)
        return run

    def _insert(self, entry: Pasid, run: Run, lg2: int) -> Run:
        tags = self._tags.get(entry.did)
        if tags is None:
            tags = self._tags[entry.did] = set()
        tags.add(entry.tag)
        return self.tlb.insert(entry.tag, run, lg2)

    # -- invalidation ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything but the IOTLB's entries, which are the unit's."""
        self.contexts.clear()
        self.pasids.clear()
        self._ready.clear()
        self._tags.clear()
        self.tables.clear()

    def droppers(self) -> list[Callable[[], None]]:
        """Its caches, to be emptied at any time."""
        return [self.contexts.clear, self.pasids.clear, self.tables.clear]

    def invalidate_contexts(self, granularity: int, sid: int, keep: int) -> None:
        """6.5.2.1: not tagged with a domain, so that a domain's are all; `keep` are the bits of the source compared."""
        self._ready.clear()
        if granularity == qi.SELECTIVE:
            for rid in [rid for rid in self.contexts if (rid ^ sid) & keep == 0]:
                del self.contexts[rid]
        else:
            self.contexts.clear()

    def invalidate_pasids(self, granularity: int, did: int, pasid: int) -> None:
        """6.5.2.2."""
        self._ready.clear()
        if granularity == qi.PC_GLOBAL:
            self.pasids.clear()
            return
        for key, entry in list(self.pasids.items()):
            if entry.did == did and (granularity == qi.PC_DOMAIN or entry.pasid == pasid):
                del self.pasids[key]

    def invalidate_iotlb(self, granularity: int, did: int, address: int, length: int, hint: int = 0) -> None:
        """6.5.2.3 and table 23."""
        tlb = self.tlb
        if granularity == qi.GLOBAL:
            tlb.clear()
            self._tags.clear()
            self.tables.clear()
            return
        for tag in [tag for tag in self.tables.tags() if tag & FIRST_STAGE and tag & 0xFFFF == did]:
            self.tables.clear_tag(tag)
        if granularity == qi.DOMAIN:
            for tag in self._tags.pop(did, ()):
                tlb.clear_tag(tag)
            self.tables.clear_tag(did)
        else:
            for tag in self._tags.get(did, ()):
                if tag & FIRST_STAGE:
                    tlb.clear_tag(tag)
                else:
                    tlb.clear_range(tag, address, length)
            if not hint:
                self.tables.clear_range(did, address, length)

    def invalidate_pasid_iotlb(
        self, granularity: int, did: int, pasid: int, address: int, length: int, hint: int = 0
    ) -> None:
        """6.5.2.4 and table 24."""
        tag = did | pasid << 16
        if granularity == qi.PIOTLB_PASID:
            self.tlb.clear_tag(tag)
            self.tlb.clear_tag(tag | FIRST_STAGE)
            self.tables.clear_tag(tag | FIRST_STAGE)
        else:
            self.tlb.clear_range(tag | FIRST_STAGE, address, length)
            if not hint:
                self.tables.clear_range(tag | FIRST_STAGE, address, length)

    def invalidate_for_page_request(self, entry: Pasid, address: int) -> None:
        """Table 27."""
        if entry.pgtt == entries.PGTT_FIRST:
            self.invalidate_pasid_iotlb(qi.PIOTLB_PAGES, entry.did, entry.pasid, address, 4096)
        elif entry.pgtt == entries.PGTT_NESTED:
            self.invalidate_iotlb(qi.DOMAIN, entry.did, 0, 0)
        else:
            self.invalidate_iotlb(qi.SELECTIVE, entry.did, address, 4096)

    # -- for people --------------------------------------------------------------------------------------------------

    def explain(self, rid: int, pasid: int, address: int) -> list[str]:
        """The way through the tables as they are in memory, a line a step."""
        context = self._tables.context(self.root, rid)
        cached = self.contexts.get(rid)
        lines = []
        if cached is not None and (cached.directory, cached.rid_pasid) != (context.directory, context.rid_pasid):
            lines.append(f"the context cache still holds PASID directory {cached.directory:#x}")
        if context.reason:
            return [*lines, f"context entry: {faults.REASONS[context.reason]}"]
        number = context.rid_pasid if pasid == NO_PASID else pasid
        lines.append(f"context entry: PASID directory {context.directory:#x}, pasid {number}")
        entry = self._tables.pasid(context, number)
        held = self.pasids.get((rid, number))
        if held is not None and (held.did, held.tag, held.first_root, held.second_root, held.reason) != (
            entry.did,
            entry.tag,
            entry.first_root,
            entry.second_root,
            entry.reason,
        ):
            lines.append(f"the PASID cache still holds domain {held.did:#x}, {_stages(held)}")
        if entry.reason:
            return [*lines, f"PASID entry: {faults.REASONS[entry.reason]}"]
        lines.append(f"PASID entry: domain {entry.did:#x}, {_stages(entry)}")
        run = self.tlb.lookup(entry.tag, address)
        if run is not None:
            allowed = "".join(name for bit, name in ((READ, "R"), (WRITE, "W")) if run[3] & bit) or "nothing"
            lines.append(f"IOTLB: iova {run[0]:#x}-{run[1] - 1:#x} at {run[0] + run[2]:#x}, allows {allowed}")
        if entry.first is not None:
            load = self._load if entry.second is None else _GuestTables(self, entry).peek
            try:
                lines += explain(entry.first, load, entry.first_root, entry.first_top, address)
                end = walk(entry.first, load, entry.first_root, entry.first_top, address)
            except Refused as refused:
                return [*lines, f"second stage of a first-stage table: {refused}"]
            if end.outcome != MAPPED:
                return lines
            address = end.output
        if entry.second is not None:
            lines += explain(entry.second, self._load, entry.second_root, entry.second_top, address)
        return lines

    def peek_second(self, entry: Pasid, address: int) -> Walk:
        """A second-stage walk that changes nothing. Refused."""
        assert entry.second is not None
        end = walk(entry.second, self._load, entry.second_root, entry.second_top, address)
        if end.outcome != MAPPED:
            raise Refused(faults.SS_TABLE_ERROR if end.outcome == FETCH_FAILED else faults.SS_NOT_PRESENT)
        return end


#: What caching mode caches of contexts.
_NOT_PRESENT = {faults.SM_ROOT_NOT_PRESENT, faults.SM_CONTEXT_NOT_PRESENT}


class _GuestTables:
    """First-stage tables as nested translation reaches them: through the second stage (3.8.1)."""

    def __init__(self, mode: ScalableMode, entry: Pasid) -> None:
        self._mode = mode
        self._entry = entry
        #: The next load is of the first table.
        self.top = True
        self._needed = R | W if entry.dirty else R

    def load(self, pa: int) -> int:
        entry = self._entry
        top, self.top = self.top, False
        if pa >> entry.limit:
            raise Refused(faults.FS_BEYOND_SECOND_STAGE, entry.fpd)
        end = self._mode._walk_second(entry, pa, self._needed)
        if not end.rights & R:
            raise Refused(faults.FS_ROOT_NOT_READABLE if top else faults.FS_TABLE_NOT_READABLE, entry.fpd)
        if self._needed & W and not end.rights & W:
            raise Refused(faults.FS_TABLE_NOT_WRITABLE, entry.fpd)
        return load_word(self._mode.memory, end.output)

    def update(self, pa: int, old: int, new: int) -> int:
        entry = self._entry
        end = self._mode._walk_second(entry, pa, R | W)
        if not end.rights & W:
            raise Refused(faults.FS_TABLE_NOT_WRITABLE, entry.fpd)
        assert entry.update_first is not None
        return entry.update_first(end.output, old, new)

    def peek(self, pa: int) -> int:
        return load_word(self._mode.memory, self._mode.peek_second(self._entry, pa).output)


def _first_rights(end: Walk) -> int:
    """The rights of a first-stage walk as a cached run has them."""
    rights = end.rights
    if rights & R:
        rights |= USER
    return rights | CLEAN_TO_WRITE if end.cacheable & WRITES else rights


def _stages(entry: Pasid) -> str:
    parts = []
    if entry.first is not None:
        parts.append(f"first stage of {entry.first_top + 1} levels from {entry.first_root:#x}")
    if entry.second is not None:
        parts.append(f"second stage of {entry.second_top + 1} levels from {entry.second_root:#x}")
    return ", ".join(parts) or "pass-through"
