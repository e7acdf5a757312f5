"""A VT-d unit in scalable mode without a driver: tables by hand, after the manual's figures."""

from dataclasses import replace

from fakedev.dma import NO_PASID, READ, DmaAbort
from fakedev.machine import Machine
from fakedev.pci import PciFunction
from fakedev.tlp import PageRequest
from fakedev.vtd import entries, regs
from fakedev.vtd.features import SCALABLE

BASE = 0xFED90000
ROOT, LOWER, UPPER, DIRECTORY, PASIDS = 0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000, 0x10_4000
QUEUE, STATUS, PRQ = 0x10_6000, 0x10_7000, 0x10_8000
FIRST = [0x11_0000 + 0x1000 * n for n in range(8)]
SECOND = [0x12_0000 + 0x1000 * n for n in range(32)]
PAGE = 0x40_0000
RID = 0x0080
DID = 7
PASID = 0x25
NOWHERE = 1 << 50
TE, SRTP, QIE = regs.TE, regs.SRTP, regs.QIE
FLAGS = entries.SM_DTE | entries.SM_PASIDE | entries.SM_PRE | entries.SM_EPTR
SNOOP = entries.PASID_PWSNP


class Functions:
    """What the unit tells functions; `answers` is whether they complete invalidations."""

    def __init__(self):
        self.invalidations = []
        self.responses = []
        self.answers = True
        self.on_response = None

    def invalidate(self, rid, request):
        self.invalidations.append((rid, *request))
        return self.answers

    def respond(self, rid, response):
        self.responses.append((rid, *response))
        if self.on_response:
            self.on_response()
        return True


class Rig:
    """One function behind one unit, and hands to build tables with."""

    def __init__(self, features=SCALABLE, version=0x10, host_address_bits=52, mode=1, **changes):
        features = replace(features, **changes)
        self.features = features
        self.box = Machine("rig")
        self.memory = self.box.memory
        self.unit = self.box.add_vtd(BASE, features.cap, features.ecap)
        self.unit.__init__(
            self.memory,
            features.cap,
            features.ecap,
            version=version,
            host_address_bits=host_address_bits,
            send_interrupt=self.box.root.interrupt,
            on_fault=self.box.last_faults.append,
        )
        self.functions = self.unit.downstream = Functions()
        self.function = self.box.add(PciFunction("0000:00:10.0", (1, 2), 0, command=4), self.unit)
        self.dma = self.function.dma
        self.messages = []
        self.box.interrupt_sink = lambda address, data: self.messages.append((address, data))
        self.tail = 0
        self.mode = mode
        self.fault_offset = features.fro * 16
        self.records_read = 0

    # -- words and registers

    def word(self, pa, value):
        self.memory.write(pa, value.to_bytes(8, "little"))

    def load(self, pa):
        return int.from_bytes(self.memory.read(pa, 8), "little")

    def words(self, pa, values):
        self.memory.write(pa, b"".join(value.to_bytes(8, "little") for value in values))

    def reg(self, offset, width=4):
        return self.box.mmio.read(BASE + offset, width)

    def set(self, offset, value, width=4):
        self.box.mmio.write(BASE + offset, width, value)

    def start(self):
        self.set(regs.RTADDR, ROOT | self.mode << 10, 8)
        self.set(regs.GCMD, SRTP)
        self.set(regs.IQA, QUEUE | regs.IQA_DW, 8)
        self.set(regs.GCMD, QIE)
        self.set(regs.FECTL, 0)
        if self.features.prs:
            self.set(regs.PQA, PRQ, 8)
        self.set(regs.GCMD, TE | QIE)

    # -- tables

    def tables(self, pgtt=entries.PGTT_SECOND, pasid=PASID, **entry):
        """Root, context and directory; the same PASID entry for `pasid` and for requests without one."""
        self.root()
        self.context()
        self.word(DIRECTORY, entries.directory_entry(PASIDS))
        for number in (0, pasid):
            self.entry(number, pgtt, **entry)

    def root(self, low=LOWER | 1, high=UPPER | 1):
        self.words(ROOT, (low, high))

    def context(self, words=None, flags=FLAGS, pdts=7, rid_pasid=0, privileged=False, directory=DIRECTORY, rid=RID):
        if words is None:
            words = entries.scalable_context_entry(directory, pdts, flags, rid_pasid, privileged)
        table = UPPER if rid & 0x80 else LOWER
        self.words(table + (rid & 0x7F) * 32, words)

    def entry(self, pasid, pgtt=entries.PGTT_SECOND, did=DID, words=None, **fields):
        if words is None:
            fields = {"second": SECOND[0], "aw": 2, "first": FIRST[0], "flags_1": SNOOP} | fields
            if pgtt in (entries.PGTT_FIRST, entries.PGTT_PASS_THROUGH):
                fields["second"] = fields["aw"] = 0
            words = entries.pasid_entry(pgtt, did, **fields)
        self.words(PASIDS + 64 * pasid, words)

    def change_entry(self, word, bits, pasids=(0, PASID)):
        """Set bits of a word of PASID entries that are there."""
        for pasid in pasids:
            where = PASIDS + 64 * pasid + 8 * word
            self.word(where, self.load(where) | bits)

    def map_first(self, iova, gpa, bits=7, level=0, levels=4, upper=7):
        """First-stage entries for one leaf. Returns where the leaf is."""
        return self._map(FIRST, iova, gpa, bits, level, levels, upper)

    def map_second(self, gpa, pa, bits=3, level=0, levels=4, upper=3, tables=SECOND):
        return self._map(tables, gpa, pa, bits, level, levels, upper)

    def _map(self, tables, address, pa, bits, level, levels, upper):
        for n, above in enumerate(range(levels - 1, level, -1)):
            self.word(tables[n] + 8 * (address >> 12 + 9 * above & 511), tables[n + 1] | upper)
        where = tables[levels - 1 - level] + 8 * (address >> 12 + 9 * level & 511)
        self.word(where, pa | bits | (0x80 if level else 0))
        return where

    def map_guest(self, bits=3):
        """Second-stage identity for the first 2 MiB, where all tables are: with 4 KiB pages."""
        self.map_second(0, 0, bits)
        self.words(SECOND[3] + 8, ((n << 12) | bits for n in range(1, 512)))

    # -- the queue

    def submit(self, *descriptors):
        for words in descriptors:
            self.words(QUEUE + self.tail, (*words, 0, 0)[:4])
            self.tail = (self.tail + 32) % 4096
        self.set(regs.IQT, self.tail)

    # -- requests and faults

    def record(self, index=0):
        offset = self.fault_offset + 16 * index
        low, high = self.reg(offset, 8), self.reg(offset + 8, 8)
        if not high >> 63:
            return None
        kind = high >> 62 & 1, high >> 28 & 1
        found = {
            "reason": high >> 32 & 0xFF,
            "type": {(0, 0): "write", (0, 1): "page", (1, 0): "read", (1, 1): "atomic"}[kind],
            "sid": high & 0xFFFF,
            "address": low,
            "at": high >> 60 & 3,
        }
        if high >> 31 & 1:
            found |= {"pasid": high >> 40 & 0xFFFFF, "exe": high >> 30 & 1, "priv": high >> 29 & 1}
        return found

    def clear(self):
        for n in range(self.features.nfr + 1):
            self.set(self.fault_offset + 16 * n + 12, 1 << 31)
        self.set(regs.FSTS, 1)
        self.set(regs.GCMD, 0)
        self.set(regs.GCMD, QIE)  # the ring begins anew
        self.tail = 0
        self.set(regs.IQT, 0)
        self.set(regs.GCMD, TE | QIE)

    def allowed(self, address, access=READ, pasid=NO_PASID, length=4, **flags):
        try:
            if access == READ:
                self.dma.read(address, length, pasid=pasid, **flags)
            else:
                self.dma.write(address, bytes(length), pasid=pasid, **flags)
        except DmaAbort:
            return False
        return True

    def reason(self, *args, **kwargs):
        """The fault reason of a request; None if it was allowed."""
        if self.allowed(*args, **kwargs):
            return None
        found = self.record()
        return found and found["reason"]

    def page_request(self, address=0x1000, access=READ, pasid=PASID, group=3, last=True):
        self.dma.send_page_request(PageRequest(RID, pasid, address, access, group, last))

    def close(self):
        self.box.close()
