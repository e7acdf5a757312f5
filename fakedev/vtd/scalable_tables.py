"""The tables of scalable mode, as a VT-d unit reads them: from a source and a PASID to a PASID-table entry.

Mirrors the VT-d specification 9.2 and 9.4 to 9.6, and the conditions SRT, SCT.1 to SCT.4, SPD and SPT.1 to SPT.4 of
table 30 in 7.1.3. What a unit lacks makes the fields for it reserved. Left out: memory types, host permission tables.
"""

from __future__ import annotations

from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.pgtable.vtd_ss import VtdSecondStage
from fakedev.pgtable.walker import Update, load_word, updater
from fakedev.pgtable.x86_64 import X86FirstStage
from fakedev.vtd import entries, faults, regs
from fakedev.vtd.faults import Refused

#: In a tag of the IOTLB: a first stage took part.
FIRST_STAGE = 1 << 36


class Context:
    """A scalable context entry as it is cached, or (with a `reason`) the knowledge that a source has none."""

    __slots__ = (
        "device_tlb",
        "directory",
        "fpd",
        "page_requests",
        "pasids",
        "privileged",
        "reason",
        "rid_pasid",
        "top_pasid",
        "translated_pasids",
    )

    def __init__(self, reason: int = 0, fpd: bool = False) -> None:
        self.reason = reason
        self.fpd = fpd
        self.directory = self.rid_pasid = self.top_pasid = 0
        self.device_tlb = self.page_requests = self.pasids = self.translated_pasids = self.privileged = False


class Pasid:
    """A PASID-table entry as it is cached, with the formats to read its tables by."""

    __slots__ = (
        "canonical",
        "did",
        "dirty",
        "first",
        "first_root",
        "first_top",
        "fpd",
        "limit",
        "pasid",
        "pgtt",
        "reason",
        "second",
        "second_root",
        "second_top",
        "snoop",
        "supervisor",
        "tag",
        "update_first",
        "update_second",
    )

    def __init__(self, pasid: int, reason: int = 0, fpd: bool = False) -> None:
        self.pasid = pasid
        self.reason = reason
        self.fpd = fpd
        self.did = self.tag = self.pgtt = 0
        self.first: X86FirstStage | None = None
        self.first_root = self.first_top = 0
        #: Bits of a canonical address below the sign's copies.
        self.canonical = 0
        self.second: VtdSecondStage | None = None
        self.second_root = self.second_top = 0
        #: Bits of an address that the second stage takes.
        self.limit = 0
        #: SSADE: the second stage keeps accessed and dirty bits.
        self.dirty = False
        #: PWSNP: without it no walk may update an entry.
        self.snoop = False
        self.supervisor = False
        #: How walks of either stage set bits in items; None: they do not.
        self.update_first: Update | None = None
        self.update_second: Update | None = None


class TableReader:
    """Reads the tables of one unit's memory, as its capabilities let it."""

    def __init__(self, memory: PhysicalMemory, caps: regs.Capabilities, host_bits: int) -> None:
        self._memory = memory
        self._caps = caps
        self._beyond = (1 << 64) - (1 << host_bits)
        self._store = updater(memory)
        self._second = {
            dirty: VtdSecondStage(host_bits, caps.sllps, caps.snoop_control, device_tlb=False, dirty_tracking=dirty)
            for dirty in (False, True)
        }
        self._first = {
            (wpe, eafe): X86FirstStage(host_bits, caps.first_stage_gigabytes, wpe=wpe, eafe=eafe)
            for wpe in (False, True)
            for eafe in (False, True)
        }
        self._sm_reserved_low = (
            entries.SM_RESERVED_LOW
            | entries.SM_HPTE
            | (0 if caps.device_tlb else entries.SM_DTE)
            | (0 if caps.pasid else entries.SM_PASIDE)
            | (0 if caps.page_request else entries.SM_PRE)
            | (0 if caps.translated_pasid else entries.SM_EPTR)
            | self._beyond
        )
        self._sm_reserved_high = (
            entries.SM_RESERVED_HIGH
            | (0 if caps.rid_pasid else entries.RID_PASID_MASK)
            | (0 if caps.rid_priv else entries.RID_PRIV)
        )
        did_mask = caps.ndoms - 1
        address = entries.ADDRESS_MASK
        # The manual reserves AW with it, but Linux sets AW in every entry, and QEMU takes that.
        second = address | entries.PASID_SSADE
        first = address | entries.FSPM_MASK << entries.FSPM_SHIFT | entries.PASID_WPE
        self._pasid_reserved = (
            entries.PASID_RESERVED_0
            | (0 if caps.second_stage else second)
            | (0 if caps.second_stage_dirty else entries.PASID_SSADE)
            | self._beyond,
            entries.PASID_RESERVED_1
            | entries.PASID_DID_MASK & ~did_mask
            | (0 if caps.walk_coherency else entries.PASID_PWSNP)
            | (0 if caps.snoop_control else entries.PASID_PGSNP),
            entries.PASID_RESERVED_2
            | (0 if caps.first_stage else first)
            | (0 if caps.supervisor else entries.PASID_SRE)
            | (0 if caps.extended_accessed else entries.PASID_EAFE)
            | self._beyond,
        )

    def context(self, root: int, rid: int) -> Context:
        """The context entry of a source as it is in memory."""
        memory = self._memory
        devfn = rid & 0xFF
        try:
            half = load_word(memory, (root & entries.ADDRESS_MASK) + (rid >> 8) * 16 + (devfn >> 7) * 8)
        except BusAbort:
            return Context(faults.SM_ROOT_TABLE_ERROR)
        if not half & entries.ENTRY_PRESENT:
            return Context(faults.SM_ROOT_NOT_PRESENT)
        if half & (entries.ROOT_RESERVED_LOW | self._beyond):
            return Context(faults.SM_ROOT_RESERVED)
        where = (half & entries.ADDRESS_MASK) + (devfn & 0x7F) * entries.SM_CONTEXT_BYTES
        try:
            low, high, third, fourth = (load_word(memory, where + 8 * n) for n in range(4))
        except BusAbort:
            return Context(faults.SM_CONTEXT_TABLE_ERROR)
        context = Context(0, bool(low & entries.ENTRY_FPD))
        if not low & entries.ENTRY_PRESENT:
            context.reason = faults.SM_CONTEXT_NOT_PRESENT
            return context
        if low & self._sm_reserved_low or high & self._sm_reserved_high or third or fourth:
            context.reason = faults.SM_CONTEXT_RESERVED
            return context
        context.directory = low & entries.ADDRESS_MASK
        context.device_tlb = bool(low & entries.SM_DTE)
        context.page_requests = bool(low & entries.SM_PRE)
        context.pasids = bool(low & entries.SM_PASIDE)
        context.translated_pasids = bool(low & entries.SM_EPTR)
        context.rid_pasid = high & entries.RID_PASID_MASK
        context.privileged = bool(high & entries.RID_PRIV)
        directory_bits = (low >> entries.SM_PDTS_SHIFT & entries.SM_PDTS_MASK) + 7
        context.top_pasid = (1 << directory_bits + entries.PASID_TABLE_BITS) - 1
        if (context.page_requests and not context.device_tlb) or context.rid_pasid > context.top_pasid:
            context.reason = faults.SM_CONTEXT_INVALID
        return context

    def pasid(self, context: Context, pasid: int) -> Pasid:
        """The entry of a PASID as directory and table have it in memory."""
        memory = self._memory
        try:
            directory = load_word(memory, context.directory + (pasid >> entries.PASID_TABLE_BITS) * 8)
        except BusAbort:
            return Pasid(pasid, faults.DIRECTORY_ERROR, context.fpd)
        fpd = context.fpd or bool(directory & entries.ENTRY_FPD)
        if not directory & entries.ENTRY_PRESENT:
            return Pasid(pasid, faults.DIRECTORY_NOT_PRESENT, fpd)
        if directory & (entries.DIRECTORY_RESERVED | self._beyond):
            return Pasid(pasid, faults.DIRECTORY_RESERVED, fpd)
        where = (directory & entries.ADDRESS_MASK) + (pasid & entries.PASID_TABLE_MASK) * entries.PASID_ENTRY_BYTES
        try:
            words = [load_word(memory, where + 8 * n) for n in range(8)]
        except BusAbort:
            return Pasid(pasid, faults.PASID_TABLE_ERROR, fpd)
        entry = Pasid(pasid, 0, fpd or bool(words[0] & entries.ENTRY_FPD))
        if not words[0] & entries.ENTRY_PRESENT:
            entry.reason = faults.PASID_NOT_PRESENT
        elif any(word & mask for word, mask in zip(words, self._pasid_reserved, strict=False)) or any(words[3:]):
            entry.reason = faults.PASID_RESERVED
        elif not self._program(entry, words):
            entry.reason = faults.PASID_INVALID
        return entry

    def _program(self, entry: Pasid, words: list[int]) -> bool:
        """Take the fields of a present entry; False if they make no sense."""
        caps = self._caps
        low, middle, high = words[0], words[1], words[2]
        pgtt = entry.pgtt = low >> entries.PGTT_SHIFT & entries.PGTT_MASK
        known = {
            entries.PGTT_FIRST: caps.first_stage,
            entries.PGTT_SECOND: caps.second_stage,
            entries.PGTT_NESTED: caps.nested,
            entries.PGTT_PASS_THROUGH: caps.pass_through,
        }
        if not known.get(pgtt, False):
            return False
        entry.did = middle & entries.PASID_DID_MASK
        entry.snoop = bool(middle & entries.PASID_PWSNP) and caps.walk_coherency
        entry.supervisor = bool(high & entries.PASID_SRE)
        entry.tag = entry.did | entry.pasid << 16
        if pgtt in (entries.PGTT_SECOND, entries.PGTT_NESTED):
            aw = low >> entries.PASID_AW_SHIFT & entries.PASID_AW_MASK
            if aw not in (1, 2, 3) or not caps.sagaw >> aw & 1:
                return False
            entry.dirty = bool(low & entries.PASID_SSADE)
            entry.second = self._second[entry.dirty]
            entry.second_root, entry.second_top = low & entries.ADDRESS_MASK, aw + 1
            entry.limit = min(caps.mgaw, 30 + 9 * aw)
        if pgtt in (entries.PGTT_FIRST, entries.PGTT_NESTED):
            fspm = high >> entries.FSPM_SHIFT & entries.FSPM_MASK
            if fspm > entries.FSPM_5_LEVELS or (fspm == entries.FSPM_5_LEVELS and not caps.first_stage_5_levels):
                return False
            entry.first = self._first[bool(high & entries.PASID_WPE), bool(high & entries.PASID_EAFE)]
            entry.first_root, entry.first_top = high & entries.ADDRESS_MASK, 3 + fspm
            entry.canonical = 47 + 9 * fspm
            entry.tag |= FIRST_STAGE
            if pgtt == entries.PGTT_NESTED and entry.first_root >> entry.limit:
                return False
        entry.update_first = self._updater(entry, first=True)
        entry.update_second = self._updater(entry, first=False) if entry.dirty else None
        return True

    def _updater(self, entry: Pasid, first: bool) -> Update:
        """The compare and swap of accessed and dirty bits, with the faults that it can meet."""

        def update(pa: int, old: int, new: int) -> int:
            if not entry.snoop:
                raise Refused(faults.FS_UPDATE_WITHOUT_SNOOP if first else faults.SS_UPDATE_WITHOUT_SNOOP, entry.fpd)
            try:
                return self._store(pa, old, new)
            except BusAbort:
                raise Refused(faults.FS_UPDATE_FAILED if first else faults.SS_UPDATE_FAILED, entry.fpd) from None

        return update
