"""A guest behind a nesting VT-d unit: its memory in a nesting parent, and first-stage tables that it keeps there.

The words of the tables are those of the VT-d specification, 9.7 (revision 5.10), with literals. Nothing is checked
here: an errno reaches the test as OSError.
"""

from __future__ import annotations

import struct

from conformance.drivers.vfio import VfioDevice
from conformance.steps import PAGE, hwpt_alloc, map_user, place
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
    iommu_hw_info_vtd,
    iommu_hwpt_vtd_s1,
)

#: Bits of first-stage entries: present, writable, for user requests, accessed, dirty, large page, extended accessed.
P, RW, US, A, D, PS, EA = 0x1, 0x2, 0x4, 0x20, 0x40, 0x80, 0x400
ADDRESS = 0x000F_FFFF_FFFF_F000
#: Where the guest's memory begins in its physical space, and how many pages it has. 2 MiB aligned.
GPA, PAGES = 0x20_0000, 32
#: Lengths of the two structs.
S1_LENGTH, ENTRY_LENGTH = 24, 24
_HW_INFO_LENGTH = 24


def registers(iommu: File, dev_id: int) -> tuple[int, int]:
    """CAP and ECAP of the unit that the device is behind."""
    where = place(bytes(_HW_INFO_LENGTH))
    IOMMU_GET_HW_INFO(iommu, dev_id=dev_id, data_len=_HW_INFO_LENGTH, data_uptr=where)
    found = iommu_hw_info_vtd.from_address(where)
    return found.cap_reg, found.ecap_reg


def first_stage(pgtbl_addr: int = 0, addr_width: int = 48, flags: int = 0, reserved: int = 0) -> bytes:
    """Data for HWPT_ALLOC."""
    data = bytes(iommu_hwpt_vtd_s1(flags=flags, pgtbl_addr=pgtbl_addr, addr_width=addr_width, __reserved=reserved))
    assert len(data) == S1_LENGTH
    return data


def nested_alloc(iommu: File, dev_id: int, parent: int, data: bytes, flags: int = 0, **fields: int) -> int:
    """HWPT_ALLOC of a nested HWPT; the id."""
    given = {"data_type": IOMMU_HWPT_DATA_VTD_S1, "data_len": len(data), "data_uptr": place(data)}
    return hwpt_alloc(iommu, dev_id, parent, flags, **(given | fields))


def entries(*rows: tuple[int, ...]) -> bytes:
    """Entries for an invalidation: (addr, npages, flags=0, reserved=0) each."""
    return b"".join(struct.pack("<QQII", *row, *(0,) * (4 - len(row))) for row in rows)


def invalidation(hwpt: int, data: bytes | int, number: int, **fields: int) -> object:
    """The block of HWPT_INVALIDATE, with the entries placed, or at an address."""
    address = place(data) if isinstance(data, bytes) else data
    given = {
        "hwpt_id": hwpt,
        "data_uptr": address,
        "data_type": IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
        "entry_len": ENTRY_LENGTH,
        "entry_num": number,
    }
    return IOMMU_HWPT_INVALIDATE.make(**(given | fields))


def flush(iommu: File, hwpt: int, *rows: tuple[int, ...]) -> int:
    """HWPT_INVALIDATE; how many entries are handled."""
    arg = IOMMU_HWPT_INVALIDATE.make(
        hwpt_id=hwpt,
        data_uptr=place(entries(*rows)),
        data_type=IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
        entry_len=ENTRY_LENGTH,
        entry_num=len(rows),
    )
    IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
    return int(arg.entry_num)


class Guest:
    """Guest memory at [GPA, GPA + PAGES pages) of `ioas`, a nesting parent on that IOAS, and tables of `levels`.

    Tables are taken from the front, data pages from the back: page -1 is the last. `root` is the guest-physical address
    of the top table.
    """

    def __init__(
        self, kernel: Backend, iommu: File, device: VfioDevice, ioas: int, flags: int = 0, levels: int = 4
    ) -> None:
        self.iommu, self.device, self.ioas, self.levels = iommu, device, ioas, levels
        self.buffer = kernel.buffer(PAGES * PAGE)
        map_user(iommu, ioas, self.buffer.address, PAGES * PAGE, GPA)
        self.parent = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT | flags)
        #: A nested HWPT, where a fixture makes one.
        self.hwpt = 0
        self._free = 0
        self.root = self.new_table()

    def new_table(self) -> int:
        """The guest-physical address of an empty table."""
        table = GPA + self._free * PAGE
        self._free += 1
        self.write(table, bytes(PAGE))
        return table

    @staticmethod
    def page(index: int) -> int:
        """The guest-physical address of a page; -1 is the last."""
        return GPA + (index % PAGES) * PAGE

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.buffer.view[gpa - GPA : gpa - GPA + length])

    def write(self, gpa: int, data: bytes) -> None:
        self.buffer.view[gpa - GPA : gpa - GPA + len(data)] = data

    def slot(self, va: int, level: int = 0, make: bool = False) -> int:
        """Where the entry for `va` in the table of `level` (0: 4 KiB) is; tables in the way are made if told to."""
        table = self.root
        for at in range(self.levels - 1, level - 1, -1):
            where = table + (va >> 12 + 9 * at & 511) * 8
            if at == level:
                return where
            word = self.word(where)
            if not word & P:
                assert make, f"no table of level {at - 1} for {va:#x}"
                word = self.new_table() | P | RW | US
                self.write(where, struct.pack("<Q", word))
            table = word & ADDRESS
        raise AssertionError(f"level {level}")

    def word(self, where: int) -> int:
        return int(struct.unpack("<Q", self.read(where, 8))[0])

    def entry(self, va: int, level: int = 0) -> int:
        """The entry for `va` in the table of `level`."""
        return self.word(self.slot(va, level))

    def map(self, va: int, gpa: int, bits: int = P | RW | US, level: int = 0) -> None:
        """Write the leaf for `va`: `bits` | `gpa`, in the table of `level`."""
        self.write(self.slot(va, level, make=True), struct.pack("<Q", gpa | bits | (PS if level else 0)))

    def nested(self, flags: int = 0, hwpt_flags: int = 0, **fields: int) -> int:
        """A nested HWPT on these tables; `flags` are IOMMU_VTD_S1_*. The id."""
        width = fields.pop("addr_width", 12 + 9 * self.levels)
        data = first_stage(fields.pop("pgtbl_addr", self.root), width, flags)
        return nested_alloc(self.iommu, self.device.devid, self.parent, data, hwpt_flags, **fields)
