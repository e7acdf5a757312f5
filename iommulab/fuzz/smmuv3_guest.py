"""What a guest of an SMMUv3 has in its memory and hands to its unit: words that are right mostly, and wrong in a bit.

The bits are those of Arm IHI 0070 chapters 4 and 5 and of the VMSAv8-64 descriptors. The guest's memory is the region
"buf", at `RAM` in the nesting parent: a context descriptor, a stage-1 table of 39 bits in pages of 4 KiB, and data.

Left out is what QEMU does otherwise than the manual, as it is the judge here: addresses beyond the unit's size, S1CDMax
without substreams, AP[1], reserved values of CD.IPS; APTable, which it checks before it knows whether there is a page,
and forgets once it has cached one.
"""

from __future__ import annotations

import random

from iommulab.fuzz.memory import PAGE, REGIONS

#: Where the guest has its memory, and the pages of it that hold data.
RAM, PAGES = 0x4000_0000, REGIONS["buf"][1]
DATA = range(16, PAGES)
#: Where the kernel maps doorbells.
SW_MSI = (0x800_0000, 0x80F_FFFF)
#: Addresses that its tables translate.
IOVAS = (0x12_3456_7000, 0x12_3456_8000, 0x12_3460_0000, 0x4000_3000, 0, 0x7F_FFFF_F000)
#: Others that its device asks for.
STRAY = (0x800_0000, 0x808_0000, 1 << 39, 1 << 40, RAM + 16 * PAGE, RAM + 17 * PAGE)

#: A vSTE of stage 1: valid, Config, the context descriptor; walks of that are write-back and inner shareable.
V = 1
ABORT, BYPASS, STAGE1 = 0, 4, 5
STE = (V | STAGE1 << 1 | RAM, 1 << 2 | 1 << 4 | 3 << 6)
#: Bits that a guest may set there, to be changed one at a time: S1Fmt and the pointer; S1DSS, STALLD, EATS and others.
_STE_0 = (V, 1 << 4, 3 << 4, 2 << 4, 1 << 52, 1 << 57)
_STE_1 = (1, 2, 3, 1 << 27, 1 << 28, 2 << 28, 3 << 28, 3 << 30, 0xFC, 1 << 44, 1 << 26, 1 << 19)

_CD = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 2 << 32 | 1 << 41 | 7 << 45 | 1 << 48
#: V, AA64, ENDI, TG0, T0SZ 12 to 40, EPD0, TTB1, AFFD, WXN, TBI, ASET, HA and HD, S and R, ASID, walks.
_CD_BITS = (
    *(1 << bit for bit in (31, 41, 15, 6, 14, 30, 35, 36, 37, 38, 39, 42, 43, 44, 45, 46, 47)),
    *(25 ^ size for size in (12, 16, 28, 32, 39, 40)),
    *(2 << 6, 3 << 6, 3 << 44, 0xFF << 48, 3 << 8, 3 << 12),
)
_TABLE, _LEAF = 3, 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11
_LEAF_BITS = (
    *(1 << bit for bit in (0, 1, 5, 7, 10, 11, 51, 52, 53, 54, 55, 58)),
    *(3 << 8, 7 << 2, 1 << 51 | 1 << 7),
)
_TABLE_BITS = (1 << 59, 3 << 59, 1 << 63, 0x7F << 52, 1 << 2)

#: Opcodes that a guest may send, rather often those with operands; and others.
_TLBI_ALL, _TLBI_ASID, _TLBI_VA, _TLBI_VAA, _TLBI_NSNH = 0x10, 0x11, 0x12, 0x13, 0x30
_CD_OF, _CD_ALL, _ATC = 0x05, 0x06, 0x40
_OPCODES = (_TLBI_ALL, _TLBI_ASID, *3 * (_TLBI_VA,), *2 * (_TLBI_VAA, _ATC, _CD_OF, _CD_ALL), _TLBI_NSNH)
_FOREIGN = (0x00, 0x01, 0x03, 0x04, 0x07, 0x18, 0x20, 0x21, 0x22, 0x28, 0x2A, 0x31, 0x41, 0x44, 0x46, 0x50, 0xFF)


def vste(rng: random.Random) -> tuple[int, int]:
    """The two words of a guest's STE."""
    low, high = STE
    if rng.random() < 0.6:
        config = rng.choice((*5 * (STAGE1,), BYPASS, BYPASS, ABORT, ABORT, 6, 7, 1, 2, 3))
        low ^= (STAGE1 ^ config) << 1
    if rng.random() < 0.1:
        low ^= RAM ^ rng.choice((0, RAM + 64 * PAGE, RAM + 64, 1 << 40))
    if rng.random() < 0.25:
        low ^= rng.choice((*_STE_0, *_STE_0, 1 << rng.choice((*range(6), *range(56, 59)))))
    if rng.random() < 0.3:
        high ^= rng.choice((*_STE_1, 1 << rng.randrange(64)))
    return low, high


def command(rng: random.Random, vsid: int) -> tuple[int, int]:
    """One command; those of a stream are of this one."""
    opcode = rng.choice(_OPCODES) if rng.random() < 0.94 else rng.choice(_FOREIGN)
    low, high = opcode, 0
    if opcode in (_CD_OF, _CD_ALL, _ATC, 3):
        low |= (vsid & 0xFFFF_FFFF) << 32
        if opcode == _CD_OF:
            high = rng.choice((0, 1))
        elif opcode == _ATC:
            high = rng.choice((52, 0, 1, 5, 12, 53, 63)) | rng.choice(IOVAS)
        if rng.random() < 0.15:
            low |= rng.choice((1 << 11, 1 << 12, 1 << 9, 3 << 11))
    elif opcode in (_TLBI_ALL, _TLBI_ASID, _TLBI_VA, _TLBI_VAA):
        low |= rng.choice((0, 0, 0, 1, 2, 7, 0xFFFF)) << 32
        if opcode in (_TLBI_ASID, _TLBI_VA):
            low |= rng.choice((0, 1, 1, 2, 0xFF, 0x100, 0xFFFF)) << 48
        if opcode in (_TLBI_VA, _TLBI_VAA):
            high = rng.choice(IOVAS) | rng.choice((0, 1))
            if rng.random() < 0.4:
                low |= rng.choice((0, 0, 1, 5, 31)) << 12 | rng.choice((0, 0, 1, 2, 31, 32, 39)) << 20
                high |= rng.randrange(4) << 8 | rng.choice((0, 1, 1, 2, 3)) << 10
    if rng.random() < 0.06:
        low ^= 1 << rng.randrange(64)
    if rng.random() < 0.05:
        high ^= 1 << rng.randrange(64)
    return low, high


def flushes(vsids: list[int]) -> list[tuple[int, int]]:
    """Commands after which the unit knows nothing old of these streams."""
    return [*((_CD_ALL | vsid << 32, 0) for vsid in sorted({vsid & 0xFFFF_FFFF for vsid in vsids})), (_TLBI_NSNH, 0)]


class Tables:
    """A context descriptor and a stage-1 table: the words of the guest's memory by their offset in it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.words: dict[int, int] = {}
        self._free = iter(range(2, DATA.start))
        self._descriptor_words()
        for iova in IOVAS[: rng.choice((2, 3, len(IOVAS)))]:
            if rng.random() < 0.85:
                self._map(iova)
        if rng.random() < 0.2:
            at = self._entry(rng.choice(IOVAS[:3]), rng.choice((1, 2)))
            self.words[at] = self.words.get(at, 0) ^ rng.choice(_TABLE_BITS)
        if rng.random() < 0.12:
            self.words[self._entry(IOVAS[2], 2)] = RAM & -(2 << 20) | _LEAF & ~2

    def _descriptor_words(self) -> None:
        rng, cd, ttb = self._rng, _CD, RAM + PAGE
        if rng.random() < 0.3:
            cd ^= rng.choice(_CD_BITS)
        if rng.random() < 0.03:
            ttb = rng.choice((RAM + 64 * PAGE, 0, ttb | 1, ttb | 0x10))
        self.words |= {0: cd, 8: ttb, 24: 0xFF}

    def _entry(self, iova: int, level: int) -> int:
        """Where an address's entry of a level is, with tables above it."""
        at = PAGE
        for above in range(1, level):
            at += (iova >> 39 - 9 * above & 0x1FF) * 8
            if at not in self.words:
                self.words[at] = RAM + next(self._free) * PAGE | _TABLE
            at = (self.words[at] & (1 << 48) - PAGE) - RAM
        return at + (iova >> 39 - 9 * level & 0x1FF) * 8

    def _map(self, iova: int) -> None:
        rng = self._rng
        address = RAM + rng.choice(DATA) * PAGE
        if rng.random() < 0.1:
            address = rng.choice((RAM + 64 * PAGE, *SW_MSI[:1], 0x808_0000, 1 << 40, 0))
        bits = _LEAF ^ rng.choice(_LEAF_BITS) if rng.random() < 0.3 else _LEAF
        self.words[self._entry(iova, 3)] = address | bits
