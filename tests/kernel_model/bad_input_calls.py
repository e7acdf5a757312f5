"""What bad input consists of: calls drawn at random, as plain lists that JSON can keep.

A call names its pointers, descriptors and files by what they are (`["rw", 100]`, `["memfd", 0]`, slot 3), not by their
numbers, so that a list of calls means the same in the next process and with some of its calls left out. How bad a call
is differs: a call with every field at random never gets past the first check.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

from uapi import registry
from uapi.ioctl import Ioctl

PAGE = 4096
U64 = (1 << 64) - 1
SLOTS = 8
ARENA_PAGES = 24

#: Declared ioctls: iommufd's, VFIO's, the mock driver's; and how often each group is drawn for a file of each kind.
IOMMUFD = [ioctl for name, ioctl in registry.ioctls().items() if name.startswith("IOMMU_")]
VFIO = [ioctl for name, ioctl in registry.ioctls().items() if name.startswith("VFIO_")]
MOCK = list(registry.ioctls(registry.TEST_HEADER).values())
BY_NAME = {ioctl.name: ioctl for ioctl in [*IOMMUFD, *VFIO, *MOCK]}
_DEEP = [BY_NAME[name] for name in (
    "IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_COPY",
    "IOMMU_IOAS_COPY", "IOMMU_IOAS_COPY", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_UNMAP",
    "IOMMU_IOAS_UNMAP", "IOMMU_DESTROY", "IOMMU_HWPT_ALLOC", "IOMMU_HWPT_ALLOC", "IOMMU_OPTION",
    "IOMMU_IOAS_ALLOW_IOVAS",
)]  # fmt: skip
_DEEP_VFIO = [BY_NAME[name] for name in (
    "VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_DETACH_IOMMUFD_PT",
    "VFIO_DEVICE_SET_IRQS", "VFIO_DEVICE_RESET", "VFIO_DEVICE_FEATURE", "VFIO_DEVICE_GET_REGION_INFO",
)]  # fmt: skip

_ON_AREAS = ("IOMMU_IOAS_UNMAP", "IOMMU_IOAS_COPY", "IOMMU_HWPT_GET_DIRTY_BITMAP", "IOMMU_IOAS_NOIOMMU_GET_PA")
_WITH_DATA = ("VFIO_DEVICE_SET_IRQS", "VFIO_DEVICE_FEATURE", "VFIO_DEVICE_PCI_HOT_RESET", "VFIO_DEVICE_GET_INFO",
              "VFIO_DEVICE_GET_REGION_INFO")  # fmt: skip

_LENGTHS = [0, 1, 8, 100, PAGE - 1, PAGE, PAGE, PAGE, 2 * PAGE, 3 * PAGE, 5 * PAGE, 16 * PAGE, PAGE + 1, 2 << 20,
            4 << 20,
            1 << 30, 1 << 32, 1 << 46, 1 << 63, (1 << 63) - 1, U64, U64 - PAGE + 1, U64 - PAGE]  # fmt: skip
_IOVAS = [0, 1, PAGE - 1, 0xFEE00000, 0xFEDFF000, 0xFEEFF000, 1 << 32, (1 << 48) - PAGE, 1 << 48, 1 << 63,
          U64 - PAGE + 1,
          U64 - 1, U64]  # fmt: skip
_INTS = [0, 1, 2, 3, 7, 8, 16, 63, 64, 255, 4095, 4096, 1 << 19, (1 << 19) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_BAD_POINTERS = [0, 1, 8, PAGE - 1, PAGE, (1 << 47) - PAGE, (1 << 47) - 1, 1 << 47, 0x8000_0000_0000_0000,
                 0xFFFF_8880_0000_0000, 0xFFFF_FFFF_FF60_0000, U64 - PAGE + 1, U64 - 7, U64]  # fmt: skip
_FUNCTION, _DRIVER = "/sys/bus/pci/devices/0000:00:10.0", "/sys/bus/pci/drivers/vfio-pci"
_ATTRIBUTES = [
    f"{_FUNCTION}/driver_override",
    "/sys/bus/pci/drivers_probe",
    f"{_FUNCTION}/driver/unbind",
    f"{_DRIVER}/bind",
    f"{_FUNCTION}/config",
]
_ID_KINDS = {
    "dev_id": ["IommufdDevice"],
    "pt_id": ["Ioas", "Ioas", "HwptPaging"],
    "hwpt_id": ["HwptPaging"],
    "fault_id": ["Fault"],
    "id": ["Ioas", "HwptPaging", "HwptPaging", "Fault", "IommufdDevice"],
}
_MEMORY = ["rw", "rw", "rw", "buffer", "buffer", "shared", "big"]
_HOSTILE = ["ro", "none", "hole", "edge", "none-edge", "file", "bar"]


class Generator:
    """Draws calls."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bad = 0.0
        self.ids: dict[str, list[int]] = {}
        self.areas: list[tuple[int, int]] = []
        self.first = self._prologue() if self.rng.random() < 0.8 else []

    def _prologue(self) -> list[list[Any]]:
        """Calls without a fault, most times: a bound and attached device reaches further than chance does."""

        def ioctl(slot: int, name: str, **fields: Any) -> list[Any]:
            fields[BY_NAME[name].size_field or ""] = BY_NAME[name].size
            return ["ioctl", slot, name, BY_NAME[name].number, fields, [], [], ["object"]]

        calls = [
            ["open", 0, "/dev/iommu", 2],
            *[ioctl(0, "IOMMU_IOAS_ALLOC")] * self.rng.choice([1, 2, 3]),
            ["open_node", 1, 0, 2, True],
            ioctl(1, "VFIO_DEVICE_BIND_IOMMUFD", iommufd=["slot", 0]),
            ["mmap", 1, 1 << 20, 0, 3, 1],
            ioctl(1, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", pt_id=1),
        ]
        return calls[: self.rng.choice([2, 4, len(calls), len(calls)])]

    def call(self, kinds: list[str], ids: list[dict[str, list[int]]], areas: list[list[tuple[int, int]]]) -> list[Any]:
        """One call. `kinds` says what is open in each slot ("iommu", "vfio", "queue", "sysfs" or ""), `ids` which
        objects, by class, its context has, and `areas` where they are mapped, with their lengths."""
        rng = self.rng
        if self.first:
            return self.first.pop(0)
        self.bad = rng.choice([0.0, 0.0, 0.0, 0.02, 0.02, 0.1, 0.5])
        open_slots = [slot for slot, kind in enumerate(kinds) if kind]
        roll = rng.random()
        if not open_slots or (len(open_slots) < 3 and roll < 0.2):
            return self._open(rng.randrange(SLOTS))
        slot = rng.choice(
            [slot for slot in open_slots if kinds[slot] in ("iommu", "vfio") or rng.random() < 0.2] or open_slots
        )
        self.ids = ids[slot]
        self.areas = areas[slot][-1:] if rng.random() < 0.3 else rng.sample(areas[slot], min(1, len(areas[slot])))
        if roll < 0.72:
            return self._ioctl(slot, kinds[slot])
        if roll < 0.74:
            return self._open(rng.randrange(2, SLOTS))
        if roll < 0.80:
            return self._io(slot)
        name = rng.choice(_OTHERS)
        return [name, *getattr(self, "_" + name)(slot)]

    def _open(self, slot: int) -> list[Any]:
        roll = self.rng.random()
        if roll < 0.5:
            return ["open", slot, "/dev/iommu", 2]
        return ["open_node", slot, self.rng.randrange(1 << 16), self.rng.choice([0, 1, 2, 2, 2, 2]), roll < 0.85]

    # -- ioctls ------------------------------------------------------------------------------------------------------

    def _ioctl(self, slot: int, kind: str) -> list[Any]:
        rng = self.rng
        roll = rng.random()
        if roll < 0.05:  # no ioctl at all
            number = rng.choice([rng.getrandbits(32), 0x3B80 + rng.randrange(0x40), 0x3B64 + rng.randrange(0x30)])
            return ["raw", slot, number, self.pointer()]
        table = {"iommu": _DEEP, "vfio": _DEEP_VFIO}.get(kind, IOMMUFD)
        if roll < 0.35:
            table = {"vfio": VFIO, "iommu": IOMMUFD}.get(kind, VFIO)
        elif roll < 0.38:
            table = rng.choice([VFIO, IOMMUFD, MOCK])
        ioctl = rng.choice(table)
        if kind == "iommu" and not self.ids.get("Ioas") and rng.random() < 0.6:
            ioctl = BY_NAME["IOMMU_IOAS_ALLOC"]
        if kind == "vfio" and not self.ids and rng.random() < 0.6:
            ioctl = BY_NAME["VFIO_DEVICE_BIND_IOMMUFD"]
        number = ioctl.number
        if rng.random() < 0.02:
            number ^= 1 << rng.randrange(32)
        if ioctl.struct is None:
            return ["raw", slot, number, self.pointer() if rng.random() < 0.5 else rng.choice(_INTS)]
        fields = {}
        for name, ctype in self._members(ioctl):
            fields[name] = self.field(ioctl, name, ctype)
        pokes = [[rng.randrange(ioctl.size + 8), rng.getrandbits(8)] for _ in range(rng.choice([1, 1, 4]))] \
            if rng.random() < self.bad else []  # fmt: skip
        tail: list[Any] = []
        if ioctl.name in _WITH_DATA and rng.random() < 0.9:
            tail = [self._word() for _ in range(rng.choice([1, 1, 2, 4]))]
        elif rng.random() < self.bad:
            tail = [rng.choice([0, 0, 0, 1])] * rng.choice([1, 2, 1024])
        place = ["object"] if rng.random() < 0.7 else self.pointer()
        return ["ioctl", slot, ioctl.name, number, fields, pokes, tail, place]

    def _members(self, ioctl: Ioctl[Any]) -> list[tuple[str, Any]]:
        return [
            (entry[0], entry[1])
            for entry in ioctl.struct._fields_  # type: ignore[union-attr]
            if issubclass(entry[1], ctypes._SimpleCData)
        ]

    def _word(self) -> Any:
        return self.fd() if self.rng.random() < 0.4 else self.rng.choice(_INTS)

    def field(self, ioctl: Ioctl[Any], name: str, ctype: Any) -> Any:
        rng, bad, areas = self.rng, self.bad, self.areas
        bits = 8 * ctypes.sizeof(ctype)
        if rng.random() < bad * 0.3:
            return rng.getrandbits(bits)
        if name == ioctl.size_field:
            if rng.random() >= bad:
                return ioctl.size + (8 if ioctl.name in _WITH_DATA else 0)
            return rng.choice([0, 3, ioctl.min_size - 1, ioctl.min_size, ioctl.size, ioctl.size + 8, 4096, 0xFFFFFFFF])
        if "reserved" in name or name in ("pad", "pasid", "token_uuid_ptr", "out_hwpt_id"):
            return rng.choice(_INTS) if rng.random() < bad else 0
        if name.endswith("_id") or name == "id":
            kinds = _ID_KINDS.get(name, ["Ioas"])
            fitting = [number for kind in kinds for number in self.ids.get(kind, [])]
            if fitting and rng.random() >= bad:
                return rng.choice(fitting)
            return rng.choice([0, 1, 2, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
        if name == "iommufd" and rng.random() >= bad:
            return ["slot", -1]
        if name in ("fd", "iommufd"):
            return self.fd()
        if name in ("user_va", "vaddr", "allowed_iovas", "data_uptr", "data") and bits == 64:
            return self.pointer()
        if areas and name in ("iova", "src_iova", "length") and ioctl.name in _ON_AREAS and rng.random() >= bad + 0.2:
            iova, length = areas[-1]
            part = rng.choice([0, 0, 0, PAGE, 2 * PAGE]) if rng.random() < 0.3 else 0
            if name == "length":
                return max(length - part, 1)
            return iova + (part if name == "src_iova" else 0)
        if name in ("length", "size", "data_len", "val64"):
            if name == "data_len" and ioctl.name != "IOMMU_GET_HW_INFO" and rng.random() >= bad:
                return 0
            return self.length() & ((1 << bits) - 1)
        if "iova" in name and bits == 64:
            return self.iova()
        if name == "start" and bits == 64:
            return rng.choice([0, 0, PAGE, 3 * PAGE, 100, 1 << 41, 1 << 62, U64 - PAGE + 1])
        if name == "flags":
            if ioctl.name in ("IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_COPY"):
                return rng.choice([7, 7, 7, 6, 6, 5, 4, 2, 3, 0]) if rng.random() >= bad else rng.getrandbits(32)
            if ioctl.name == "VFIO_DEVICE_SET_IRQS" and rng.random() >= bad:
                return rng.choice([0x24, 0x24, 0x24, 0x21, 0x22, 0x09, 0x0A, 0x0C, 0x11, 0x12, 0x14])
            if ioctl.name == "VFIO_DEVICE_FEATURE" and rng.random() >= bad:
                return rng.choice([0x10000, 0x20000, 0x30000, 0x50000, 0x60000]) | rng.randrange(14)
            return 0 if rng.random() >= bad else rng.choice([1, 2, 4, 8, 0x80000000, rng.getrandbits(32)])
        if name in ("index", "start", "count", "op", "option_id", "num_iovas", "object_id", "page_size", "data_type"):
            few = [0, 0, 0, 1, 1, 2, 5, 7] if rng.random() >= bad else _INTS
            if few is not _INTS and ioctl.name == "VFIO_DEVICE_SET_IRQS":
                return {"index": rng.choice([1, 1, 1, 0, 3, 4]), "start": 0}.get(name, rng.choice([1, 1, 0]))
            return 0 if name == "data_type" and few is not _INTS else rng.choice(few) & ((1 << bits) - 1)
        return rng.choice(_INTS) & ((1 << bits) - 1) if rng.random() < bad else 0

    # -- values ------------------------------------------------------------------------------------------------------

    def pointer(self) -> Any:
        rng = self.rng
        roll = rng.random()
        offset = rng.choice([0, 0, 0, 0, PAGE, 2 * PAGE, 100, PAGE - 4, 1, rng.randrange(4 * PAGE)])
        if roll < 0.75 - self.bad / 2:
            return [rng.choice(_MEMORY), offset]
        if roll < 0.9:
            return [rng.choice(_HOSTILE), offset]
        return rng.choice([*_BAD_POINTERS, rng.getrandbits(64), rng.getrandbits(46)])

    def length(self) -> int:
        return self.rng.choice(_LENGTHS[5:12] if self.rng.random() >= self.bad + 0.2 else _LENGTHS)

    def iova(self) -> int:
        rng = self.rng
        if rng.random() >= self.bad + 0.05:
            return PAGE * rng.randrange(48)
        return rng.choice([*_IOVAS, rng.getrandbits(64), rng.getrandbits(20)])

    def fd(self) -> Any:
        rng = self.rng
        roll = rng.random()
        if roll < 0.5:
            return ["memfd", rng.randrange(3)]
        if roll < 0.75:
            return [rng.choice(["pipe", "file_fd", "eventfd", "eventfd", "sealed"]), 0]
        if roll < 0.85:
            return ["slot", rng.randrange(SLOTS)]
        return rng.choice([-1, -2, 0x7FFFFFFF, 1 << 20, -0x80000000])

    # -- everything else ---------------------------------------------------------------------------------------------

    def _io(self, slot: int) -> list[Any]:
        rng = self.rng
        offset = rng.choice([0, 1, 39, 40, 4095, 7 << 40, (7 << 40) + 4, (7 << 40) + 0x54, 8 << 40, 9 << 40, 1 << 50,
                             (1 << 63) - 1, -1, rng.randrange(1 << 20), (7 << 40) + rng.randrange(256)])  # fmt: skip
        count = rng.choice([0, 1, 2, 4, 8, 40, 41, 4096, 1 << 20, (1 << 63) - 1, -1])
        data = rng.randbytes(rng.choice([0, 1, 2, 4, 8, 16, 100])).hex()
        return rng.choice([
            ["read", slot, count], ["pread", slot, count, offset], ["write", slot, data],
            ["pwrite", slot, data, offset],
            ["read_to", slot, self.pointer(), count & U64], ["write_from", slot, self.pointer(), count & U64],
            ["poll", slot, rng.getrandbits(16)],
            ["mmap", slot, rng.choice([PAGE, PAGE, 1 << 20, 1, 0, -1, 1 << 46, (1 << 63) - 1]),
             rng.choice([0, 0, 0, PAGE, -PAGE, 1 << 40, 7 << 40, 1]), rng.choice([3, 3, 1, 2, 0, 4, 7]),
             rng.choice([1, 1, 1, 2, 3, 0])],
        ])  # fmt: skip

    def _close(self, slot: int) -> list[Any]:
        return [slot if slot > 1 or self.rng.random() < 0.1 else self.rng.randrange(2, SLOTS)]

    def _store(self, slot: int) -> list[Any]:
        rng = self.rng
        return [
            rng.choice(_ATTRIBUTES),
            rng.choice(["0000:00:10.0", "0000:00:10.0", "vfio-pci", "", "\n", "0000:00:1f.0"]),
        ]

    def _dup(self, slot: int) -> list[Any]:
        return [slot, slot > 1 and self.rng.random() < 0.5]

    def _os_close(self, slot: int) -> list[Any]:
        return self._close(slot)

    def _map_io(self, slot: int) -> list[Any]:
        rng = self.rng
        offset = rng.choice([0, 4, 0x20, 0x24, 0x60, 0x80, 0x88, 0x90, 0x98, 1, rng.randrange(1 << 20)])
        return [
            rng.randrange(3),
            rng.choice("rww"),
            offset,
            rng.choice([1, 2, 4, 4, 8, 8]),
            rng.choice([*_INTS, self.iova()]),
        ]

    def _map_raw(self, slot: int) -> list[Any]:
        rng = self.rng
        return [rng.randrange(3), rng.choice([0, 4, 8, 0x60, 0x80, 0x88, 0x90, 0x98]), rng.getrandbits(32)]

    def _map_close(self, slot: int) -> list[Any]:
        return [self.rng.randrange(3)]

    def _dma(self, slot: int) -> list[Any]:
        rng = self.rng
        inside = 0x40000 + rng.choice([0, 0, 8, 4000, 4096, -8])
        command = rng.choice([1, 3, 3, 7, 5])
        iova = rng.choice([self.iova(), rng.randrange(1 << 20)])
        return [rng.randrange(3), iova, inside, rng.choice([1, 8, 100, 4096, 5000, U64]), command]

    def _buffer(self, slot: int) -> list[Any]:
        return [self.rng.randrange(3), self.rng.choice([1, PAGE, 4 * PAGE, 16 * PAGE, 2 << 20])]

    def _buffer_close(self, slot: int) -> list[Any]:
        return [self.rng.randrange(3), self.rng.random() < 0.3]

    def _memfd(self, slot: int) -> list[Any]:
        return [self.rng.randrange(3), self.rng.choice([0, 1, PAGE, 6 * PAGE, 16 * PAGE, (2 << 20) + PAGE, 1 << 44])]

    def _truncate(self, slot: int) -> list[Any]:
        return [self.rng.randrange(3), self.rng.choice([0, 1, PAGE, 5 * PAGE, 16 * PAGE, 4 << 20])]

    def _page(self, slot: int) -> list[Any]:
        return [self.rng.randrange(ARENA_PAGES), self.rng.choice(["rw", "rw", "ro", "none", "hole"])]

    def _poke(self, slot: int) -> list[Any]:
        rng = self.rng
        words = []
        for _ in range(rng.choice([1, 2, 4, 600])):
            first = self.iova()
            words += [first, first + rng.choice([PAGE - 1, 8 * PAGE - 1, 0, -1])]
        return [[rng.choice(["rw", "buffer", "big"]), rng.choice([0, 100, PAGE])], [word & U64 for word in words]]

    def _client(self, slot: int) -> list[Any]:
        if self.rng.random() < 0.5:
            return [slot, "exit", 0]
        action = self.rng.choice(["give", "open", "rlimit", "setuid", "ioctl", "ioctl", "ioctl"])
        return [slot, action, self._ioctl(slot, "iommu") if action == "ioctl" else self.rng.choice(_INTS)]


_OTHERS = (
    ["close", "dup", "dup", "os_close", "store"] + ["map_io"] * 3 + ["map_raw"] + ["map_close"] + ["dma"] * 4
    + ["buffer"] * 2 + ["buffer_close"] * 2 + ["memfd", "truncate", "page", "page", "poke", "poke"] + ["client"]
)  # fmt: skip
