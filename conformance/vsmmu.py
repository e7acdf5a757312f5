"""A guest behind a virtual SMMUv3: the objects of its vIOMMU, and stage-1 tables in its own memory.

The bits are those of Arm IHI 0070 chapters 4, 5 and 7 and of the VMSAv8-64 descriptors, written down once more: what
the suite builds must not come from what it tests. A guest here has 4 KiB pages, 39-bit virtual addresses, one context
descriptor and its memory at `RAM`; it starts with nothing mapped at stage 1.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from conformance.drivers.vfio import VfioDevice
from conformance.steps import PAGE, hwpt_alloc, ioas_alloc, map_user, place
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_VDEVICE_ALLOC,
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
    IOMMU_VIOMMU_ALLOC,
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
    iommu_hw_info_arm_smmuv3,
    iommu_hwpt_invalidate,
)

#: The guest's memory: its address there (an IOVA of the nesting parent), and pages of it.
RAM, RAM_PAGES = 0x4000_0000, 32
#: Pages of it that hold the context descriptors, the first table, and what tables below are taken from (up to there).
CD_PAGE, TTB_PAGE, TABLE_PAGES = 0, 1, 16
#: The window in which the kernel maps doorbells of interrupt controllers.
SW_MSI, SW_MSI_LENGTH = 0x800_0000, 0x10_0000

#: The vSTE's words: valid and Config; walks of the CD are write-back and inner shareable.
V = 1
ABORT, BYPASS, S1, S2, NESTED = (config << 1 for config in (0, 4, 5, 6, 7))
STE_1 = 1 << 2 | 1 << 4 | 3 << 6
S1STALLD = 1 << 27
EATS = tuple(mode << 28 for mode in range(4))

#: A descriptor's bits. A page and a table look alike.
VALID, TABLE, USER, READ_ONLY, INNER, AF, NOT_GLOBAL = 1, 2, 1 << 6, 1 << 7, 3 << 8, 1 << 10, 1 << 11
PAGE_RW = VALID | TABLE | USER | INNER | AF | NOT_GLOBAL
PAGE_RO = PAGE_RW | READ_ONLY
BLOCK_RW = PAGE_RW & ~TABLE
_PA = (1 << 48) - PAGE

#: Commands.
CFGI_STE, CFGI_ALL, CFGI_CD, CFGI_CD_ALL = 0x03, 0x04, 0x05, 0x06
NH_ALL, NH_ASID, NH_VA, NH_VAA, NSNH_ALL = 0x10, 0x11, 0x12, 0x13, 0x30
ATC_INV, SYNC = 0x40, 0x46
LEAF = 1
SSV, ATC_GLOBAL, ATC_ALL = 1 << 11, 1 << 9, 52

#: Events.
C_BAD_STE, F_STREAM_DISABLED, C_BAD_SUBSTREAMID, C_BAD_CD = 0x04, 0x06, 0x08, 0x0A
F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x10, 0x11, 0x12, 0x13
EVENT_HEADER, EVENT_SIZE = struct.Struct("<II"), 8 + 32


def sid(vsid: int) -> int:
    """A stream id in a command's or an event's first word."""
    return (vsid & 0xFFFF_FFFF) << 32


def ssid(pasid: int) -> int:
    """A PASID in a command's or an event's first word."""
    return pasid << 12


def asid(number: int) -> int:
    return number << 48


def vmid(number: int) -> int:
    return number << 32


def make_cd(ttb: int, tag: int = 1, *, tsz: int = 25, ips: int = 2, more: int = 0) -> list[int]:
    """A context descriptor: one table of 4 KiB pages at `ttb`, ASID `tag`, faults recorded and the access aborted."""
    walk = 1 << 8 | 1 << 10 | 3 << 12
    low = tsz | walk | 1 << 30 | 1 << 31 | ips << 32 | 1 << 41 | 1 << 45 | 1 << 46 | 1 << 47 | asid(tag)
    return [low ^ more, ttb, 0, 0xFF, 0, 0, 0, 0]


class Guest:
    """An IOAS with the guest's memory, a nesting parent on it, a vIOMMU on that; the device attached to nothing.

    Object ids after the device's 1: IOAS 2, parent 3, vIOMMU 4.
    """

    def __init__(self, kernel: Backend, iommu: File, device: VfioDevice) -> None:
        self.kernel = kernel
        self.iommu = iommu
        self.device = device
        self.ram: Buffer = kernel.buffer(RAM_PAGES * PAGE)
        self._words = self.ram.view.cast("B").cast("Q")
        self.ioas = ioas_alloc(iommu)
        map_user(iommu, self.ioas, self.ram.address, self.ram.length, iova=RAM)
        self.parent = hwpt_alloc(iommu, device.devid, self.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT)
        self.viommu = viommu_alloc(iommu, device.devid, self.parent)
        self._tables = iter(range(2, TABLE_PAGES))
        self.set_cd(make_cd(self.page(TTB_PAGE)))

    def close(self) -> None:
        self._words.release()

    # -- memory ------------------------------------------------------------------------------------------------------

    @staticmethod
    def page(index: int) -> int:
        """A page's address for the guest."""
        return RAM + index * PAGE

    def write(self, index: int, data: bytes, offset: int = 0) -> None:
        """Put bytes into a page."""
        start = index * PAGE + offset
        self.ram.view[start : start + len(data)] = data

    def read(self, index: int, count: int, offset: int = 0) -> bytes:
        start = index * PAGE + offset
        return bytes(self.ram.view[start : start + count])

    def set_cd(self, cd: list[int], ssid: int = 0) -> None:
        """Write the context descriptor of a PASID below 64; the hardware may still have the old one."""
        first = CD_PAGE * PAGE // 8 + 8 * ssid
        for n, word in enumerate(cd):
            self._words[first + n] = word

    def new_table(self) -> int:
        """An empty page for a table; its number."""
        return next(self._tables)

    def descriptor(self, iova: int, level: int = 3, root: int = TTB_PAGE) -> int:
        """Where in the guest's memory, in words, the descriptor for an address is, with tables made on the way."""
        at = root * PAGE // 8
        for above in range(1, level):
            at += iova >> 39 - 9 * above & 0x1FF
            if not self._words[at]:
                self._words[at] = self.page(self.new_table()) | VALID | TABLE
            at = ((self._words[at] & _PA) - RAM) // 8
        return at + (iova >> 39 - 9 * level & 0x1FF)

    def map(self, iova: int, address: int, bits: int = PAGE_RW, level: int = 3, root: int = TTB_PAGE) -> None:
        """Stage 1: translate a page of `iova` to the guest's `address`."""
        self._words[self.descriptor(iova, level, root)] = address | bits

    def set_table(self, iova: int, level: int, entry: int, root: int = TTB_PAGE) -> None:
        """Put an entry of any kind."""
        self._words[self.descriptor(iova, level, root)] = entry

    def change(self, iova: int, level: int, bits: int) -> None:
        """Set bits of an entry."""
        self._words[self.descriptor(iova, level)] |= bits

    # -- objects -----------------------------------------------------------------------------------------------------

    def ste(self, config: int = S1) -> tuple[int, int]:
        """The vSTE for this guest's context descriptor."""
        return (V | config | self.page(CD_PAGE), STE_1) if config == S1 else (V | config, 0)

    def nested(self, ste: tuple[int, int] | None = None, viommu: int = 0, flags: int = 0, **fields: int) -> int:
        """HWPT_ALLOC of a nested HWPT with this vSTE; its id."""
        data = struct.pack("<QQ", *(self.ste() if ste is None else ste))
        fields = {"data_type": IOMMU_HWPT_DATA_ARM_SMMUV3, "data_len": 16, "data_uptr": place(data)} | fields
        return hwpt_alloc(self.iommu, self.device.devid, viommu or self.viommu, flags, **fields)

    def vdevice(self, vsid: int, viommu: int = 0) -> int:
        """VDEVICE_ALLOC; the id."""
        return IOMMU_VDEVICE_ALLOC(
            self.iommu, viommu_id=viommu or self.viommu, dev_id=self.device.devid, virt_id=vsid
        ).out_vdevice_id

    def veventq(self, depth: int = 16, viommu: int = 0) -> tuple[int, File]:
        """VEVENTQ_ALLOC for the SMMUv3's events; the id and the file."""
        return veventq_alloc(self.kernel, self.iommu, viommu or self.viommu, depth)

    def enter(self, vsid: int = 0x81, ste: tuple[int, int] | None = None) -> int:
        """A vDEVICE, a nested HWPT, and the device attached to it; the HWPT's id."""
        self.vdevice(vsid)
        nested = self.nested(ste)
        self.device.attach(nested)
        return nested

    def invalidate(self, *commands: tuple[int, int], viommu: int = 0, **fields: int) -> int:
        """HWPT_INVALIDATE of the vIOMMU; entry_num after it. OSError carries no count: see `invalidation`."""
        arg = self.invalidation(*commands, viommu=viommu, **fields)
        IOMMU_HWPT_INVALIDATE.raw(self.iommu, arg)
        return int(arg.entry_num)

    def invalidation(self, *commands: tuple[int, int], viommu: int = 0, **fields: int) -> iommu_hwpt_invalidate:
        """The block of such a call, with the commands placed."""
        given = {
            "hwpt_id": viommu or self.viommu,
            "data_uptr": place(b"".join(struct.pack("<QQ", *command) for command in commands)),
            "data_type": IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
            "entry_len": 16,
            "entry_num": len(commands),
        }
        return IOMMU_HWPT_INVALIDATE.make(**(given | fields))


class Unit(NamedTuple):
    """What of an SMMUv3 decides over a guest's commands and descriptors; `flags`: it keeps access flags."""

    ats: bool
    ssids: bool
    stalls: bool
    flags: bool


def unit(iommu: File, dev_id: int) -> Unit:
    """GET_HW_INFO of a bound device, in these terms."""
    where = place(bytes(40))
    IOMMU_GET_HW_INFO(iommu, dev_id=dev_id, data_len=40, data_uptr=where)
    idr = iommu_hw_info_arm_smmuv3.from_address(where).idr
    return Unit(
        ats=bool(idr[0] & 1 << 10),
        ssids=bool(idr[1] & 0x7C0),
        stalls=idr[0] >> 24 & 3 != 1,
        flags=bool(idr[0] & 0xC0),
    )


def viommu_alloc(iommu: File, dev_id: int, hwpt_id: int, kind: int = IOMMU_VIOMMU_TYPE_ARM_SMMUV3) -> int:
    """VIOMMU_ALLOC; the id."""
    return IOMMU_VIOMMU_ALLOC(iommu, type=kind, dev_id=dev_id, hwpt_id=hwpt_id).out_viommu_id


def veventq_alloc(kernel: Backend, iommu: File, viommu: int, depth: int) -> tuple[int, File]:
    """VEVENTQ_ALLOC; the id and the file."""
    reply = IOMMU_VEVENTQ_ALLOC(iommu, viommu_id=viommu, type=IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, veventq_depth=depth)
    return reply.out_veventq_id, kernel.adopt(reply.out_veventq_fd)
