"""A machine with one SMMUv3 and one function, and hands to build tables with: shared by the tests here."""

from contextlib import suppress

from fakedev.dma import READ, DmaAbort, Parked
from fakedev.machine import SMMU_BASE, Machine
from fakedev.pci import PciFunction
from fakedev.smmuv3 import commands as c
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import regs
from fakedev.smmuv3.regs import Features

STRTAB, CMDQ, EVENTQ, PRIQ, CDS = 0x10_0000, 0x20_0000, 0x21_0000, 0x22_0000, 0x23_0000
S1_TABLES = [0x30_0000 + 0x10000 * n for n in range(6)]
S2_TABLES = [0x40_0000 + 0x10000 * n for n in range(8)]
PAGE = 0x80_0000
#: An address that nothing answers.
NOWHERE = 0xF0_0000_0000
RID = 0x0080
ASID, VMID = 5, 9
QUEUE_LOG2 = 6

S1_LEAF = 1 << 0 | 1 << 6 | 1 << 10 | 1 << 11  # valid, unprivileged, accessed, not global
S2_LEAF = 1 << 0 | 3 << 6 | 1 << 10 | 0xF << 2  # valid, read and write, accessed, write-back
PAGE_OR_TABLE = 2


class Bench:
    """`features` of the unit; without `start` nothing is enabled."""

    def __init__(self, features=None, start=True, **changes):
        self.features = (features or Features()).but(**changes)
        self.box = Machine("bench")
        self.memory = self.box.memory
        self.unit = self.box.add_smmu(SMMU_BASE, self.features)
        self.function = self.box.add(PciFunction("0000:00:10.0", (1, 2), 0, command=4), self.unit)
        self.dma = self.function.dma
        self.messages, self.wires = [], []
        self.box.interrupt_sink = lambda address, data: self.messages.append((address, data))
        self.box.wired_sink = lambda base, name: self.wires.append(name)
        if start:
            self.start()

    def start(self, cr0=0xF, log2=8, fmt=0, split=8):
        self.set(regs.CMDQ_BASE, CMDQ | QUEUE_LOG2, 8)
        self.set(regs.EVENTQ_BASE, EVENTQ | QUEUE_LOG2, 8)
        self.set(regs.PRIQ_BASE, PRIQ | QUEUE_LOG2, 8)
        self.set(regs.STRTAB_BASE, STRTAB, 8)
        self.set(regs.STRTAB_BASE_CFG, log2 | fmt << 16 | split << 6)
        self.set(regs.CR2, regs.CR2_RECINVSID)
        self.set(regs.CR0, cr0)

    # -- registers and memory ----------------------------------------------------------------------------------------

    def word(self, pa, value):
        self.memory.write(pa, value.to_bytes(8, "little"))

    def load(self, pa):
        return int.from_bytes(self.memory.read(pa, 8), "little")

    def reg(self, offset, width=4):
        return self.box.mmio.read(SMMU_BASE + offset, width)

    def set(self, offset, value, width=4):
        self.box.mmio.write(SMMU_BASE + offset, width, value)

    # -- structures --------------------------------------------------------------------------------------------------

    def ste(self, config=e.CONFIG_S1, *, sid=RID, at=None, words=None, **fields):
        """Write an STE; `fields` are `w0`..`w3` to be ORed in."""
        if words is None:
            words = self.ste_words(config, **fields)
        where = STRTAB + 64 * sid if at is None else at
        for n in range(8):
            self.word(where + 8 * n, words[n] if n < len(words) else 0)

    def ste_words(self, config, w0=0, w1=0, w2=0, w3=0, t0sz=16, sl0=2, tg=0, ps=5, root=None, cdmax=0, cds=CDS):
        words = [e.STE_0_V | e.STE_0_CONFIG.put(config), 0, 0, 0]
        if config & 1:
            words[0] |= cds | e.STE_0_S1CDMAX.put(cdmax)
        if config & 2:
            words[2] |= e.STE_2_S2T0SZ.put(t0sz) | e.STE_2_S2SL0.put(sl0) | e.STE_2_S2TG.put(tg) | e.STE_2_S2PS.put(ps)
            words[2] |= e.STE_2_S2AA64 | e.STE_2_S2R
            words[3] |= S2_TABLES[0] if root is None else root
        words[2] |= e.STE_2_S2VMID.put(VMID)
        return [words[0] | w0, words[1] | w1, words[2] | w2, words[3] | w3]

    def cd(self, index=0, *, at=None, words=None, **fields):
        words = self.cd_words(**fields) if words is None else words
        where = CDS + 64 * index if at is None else at
        for n in range(8):
            self.word(where + 8 * n, words[n] if n < len(words) else 0)

    def cd_words(self, w0=0, w1=0, w2=0, t0sz=16, tg0=0, ips=5, asid=ASID, root=None, epd1=True, t1sz=16, tg1=2):
        low = e.CD_0_V | e.CD_0_AA64 | e.CD_0_A | e.CD_0_R | e.CD_0_T0SZ.put(t0sz) | e.CD_0_TG0.put(tg0)
        low |= e.CD_0_IPS.put(ips) | e.CD_0_ASID.put(asid) | e.CD_0_T1SZ.put(t1sz) | e.CD_0_TG1.put(tg1)
        low |= e.CD_0_EPD1 if epd1 else 0
        return [low | w0, (S1_TABLES[0] if root is None else root) | w1, w2]

    def map(self, va, pa, bits=S1_LEAF, level=0, levels=4, granule=12, tables=S1_TABLES):
        """A chain of tables with one leaf at `level` (0 holds pages)."""
        index_bits = granule - 3
        for n, above in enumerate(range(levels - 1, level, -1)):
            index = va >> granule + index_bits * above & (1 << index_bits) - 1
            self.word(tables[n] + 8 * index, tables[n + 1] | 3)
        last = tables[levels - 1 - level]
        index = va >> granule + index_bits * level & (1 << index_bits) - 1
        self.word(last + 8 * index, pa | bits | (0 if level else PAGE_OR_TABLE))

    def map2(self, ipa, pa, bits=S2_LEAF, level=0, levels=4, granule=12):
        self.map(ipa, pa, bits, level, levels, granule, S2_TABLES)

    def identity2(self, gibibyte=0):
        """Stage 2: one GiB of IPAs is itself."""
        self.map2(gibibyte << 30, gibibyte << 30, level=2)

    # -- queues ------------------------------------------------------------------------------------------------------

    def submit(self, *commands):
        prod = self.reg(regs.CMDQ_PROD)
        for low, high in commands:
            where = CMDQ + 16 * (prod & (1 << QUEUE_LOG2) - 1)
            self.word(where, low)
            self.word(where + 8, high)
            prod = prod + 1 & (2 << QUEUE_LOG2) - 1
        self.set(regs.CMDQ_PROD, prod)

    def forget(self):
        self.submit(c.cfgi_all(), c.tlbi_nsnh_all())

    def errors(self):
        return self.reg(regs.GERROR) ^ self.reg(regs.GERRORN)

    def command_error(self):
        """The error of the command queue, if one is active."""
        if self.errors() & regs.GERROR_CMDQ_ERR:
            return regs.CMDQ_CONS_ERR.get(self.reg(regs.CMDQ_CONS))
        return None

    def acknowledge(self):
        self.set(regs.GERRORN, self.reg(regs.GERROR))

    def event(self):
        """Take one record from the event queue, as its fields; None if it is empty."""
        mask = (2 << QUEUE_LOG2) - 1
        prod, cons = self.reg(regs.EVENTQ_PROD), self.reg(regs.EVENTQ_CONS)
        if (prod ^ cons) & mask == 0:
            return None
        where = EVENTQ + 32 * (cons & (1 << QUEUE_LOG2) - 1)
        words = [self.load(where + 8 * n) for n in range(4)]
        self.set(regs.EVENTQ_CONS, cons & 1 << 31 | cons + 1 & mask)
        return decode(words)

    # -- requests ----------------------------------------------------------------------------------------------------

    def goes(self, address, access=READ, length=4, **how):
        """Whether a DMA goes through."""
        try:
            if access == READ:
                self.dma.read(address, length, **how)
            else:
                self.dma.write(address, bytes(length), **how)
        except DmaAbort:
            return False
        return True

    def fault(self, address, access=READ, length=4, **how):
        """The event of a DMA that must not go through."""
        assert not self.goes(address, access, length, **how)
        return self.event()

    def parks(self, address, access=READ, **how):
        """The Parked of a DMA that must stall."""
        try:
            self.goes(address, access, **how)
        except Parked as parked:
            return parked
        raise AssertionError("the request did not stall")

    def close(self):
        with suppress(BufferError):
            self.box.close()


def decode(words):
    low, second, address, last = words
    found = {"id": low & 0xFF, "sid": low >> 32, "ssid": low >> 12 & 0xFFFFF if low >> 11 & 1 else None}
    found["address"] = address
    found["stall"], found["stag"] = second >> 31 & 1, second & 0xFFFF
    found["pnu"], found["ind"], found["rnw"] = second >> 33 & 1, second >> 34 & 1, second >> 35 & 1
    found["s2"], found["class"], found["ttrnw"] = second >> 39 & 1, second >> 40 & 3, second >> 44 & 1
    found["last"] = last
    found["words"] = words
    return found
