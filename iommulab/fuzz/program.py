"""What a fuzzed program is: a list of calls in plain values, and its compiled form.

A call has the ioctl's name, or the test operation's, and the fields that are not zero. A value is a number, or a
string:

    "@3.out_ioas_id"    what call 3 left in that field (also when it failed)
    "@5.36"             four bytes at that place of what call 5 read
    "@4.data_uptr:8"    eight bytes at that place of what call 4's pointer points to
    "&buf+0x1800"       an address: a region of `memory.REGIONS` and an offset
    "*00ff..."          the address of these bytes
    ">64+3"             the address of 64 zero bytes for the kernel to write, this much off alignment
    "#iommufd"          the descriptor of the iommufd itself

So a program is JSON as it stands, and calls can be dropped from it: what referred to them becomes 0. Besides ioctls
there are `read`, `write`, `close` and `poll` of a file that a call opened, `mmap` of the iommufd, and `munmap` and
`mprotect` of the program's memory. `RAW_0x3b96` is a request that no kernel has.

With hardware there are `open` of a device (number -1: of another iommufd) and `eventfd`, whose field "fd" later calls
refer to, ioctls on such a file (`Call.file`), `pread`, `pwrite` and `mmap` of its regions, and what the device is told
to do (`iommulab.fuzz.edu_steps`); `poke` writes a guest's tables into the program's memory: zeros, but for pairs of an
offset and a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from iommulab.fuzz import edu_steps
from iommulab.fuzz.executor import (
    CLOSE,
    DETACH,
    EDU,
    EVENTFD,
    FD_IOCTL,
    FILE_IOCTL,
    IOCTL,
    MAIN,
    MMAP,
    OPEN,
    POKE,
    POLL,
    PREAD,
    PROTECT,
    PWRITE,
    READ,
    UNMAP,
    WRITE,
    Step,
)
from iommulab.fuzz.memory import REGIONS, WORK, WORK_SIZE
from uapi import iommufd_test, registry
from uapi.cstruct import Struct, Union, fields_of
from uapi.iommufd_test import IOMMU_TEST_CMD, TEST_OP_MEMBERS, iommu_test_cmd

Value: TypeAlias = "int | str"

#: Outputs that are descriptors; `result_fd` is the result of DMABUF_GET, which the executor puts behind the block.
FD_FIELDS = ("out_access_fd", "out_fault_fd", "out_veventq_fd", "result_fd")
_RESULT_AT = 64
#: What follows a struct and has values of its own: the width of one, how many. They are data0, data1 and so on.
_FOLLOWS = {"VFIO_DEVICE_SET_IRQS": (4, 4), "VFIO_DEVICE_FEATURE": (8, 4)}
_FILE_CALLS = {"read": READ, "write": WRITE, "close": CLOSE, "poll": POLL}
#: What opens a file, with its descriptor in the field "fd".
_OPENERS = {"open": OPEN, "eventfd": EVENTFD}
#: What `edu` does, and the fields of that in order.
EDU_CALLS = {
    "edu_copy": (edu_steps.COPY, ("source", "target", "count")),
    "edu_irq": (edu_steps.IRQ, ("bits",)),
    "edu_liveness": (edu_steps.LIVENESS, ("value",)),
}
_PASID_CALLS = ("IOMMU_TEST_OP_PASID_ATTACH", "IOMMU_TEST_OP_PASID_REPLACE")
_MEMORY_CALLS = {"munmap": UNMAP, "mprotect": PROTECT}
#: The iommufd itself, where a call takes its descriptor.
MAIN_FD = "#iommufd"
#: Longest block that a too large `size` makes; what it says beyond that is whatever follows.
_MAX_BLOCK = 256


@dataclass(slots=True)
class Call:
    """One call. `arg` stands in for the address of the block, `tail` (hex) follows the struct in it.

    An ioctl is one of the iommufd, or of `file`, a reference to its descriptor.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    arg: Value | None = None
    tail: str = ""
    file: Value | None = None

    @property
    def is_ioctl(self) -> bool:
        return self.name in LAYOUTS

    def to_json(self) -> list[Any]:
        more: dict[str, Any] = {}
        if self.arg is not None:
            more["arg"] = self.arg
        if self.tail:
            more["tail"] = self.tail
        if self.file is not None:
            more["file"] = self.file
        return [self.name, self.fields, more] if more else [self.name, self.fields]

    @classmethod
    def from_json(cls, data: list[Any]) -> Call:
        return cls(data[0], data[1], **(data[2] if len(data) > 2 else {}))


@dataclass(slots=True)
class Program:
    """Calls in order. `main_first`: at the end the iommufd itself closes before the files that came from it."""

    calls: list[Call]
    main_first: bool = False

    def to_json(self) -> list[Any]:
        return [self.main_first, *(call.to_json() for call in self.calls)]

    @classmethod
    def from_json(cls, data: list[Any]) -> Program:
        return cls([Call.from_json(call) for call in data[1:]], data[0])


@dataclass(frozen=True, slots=True)
class Layout:
    """A call's block: the request, the struct's size, where each field is, and what is set beforehand."""

    request: int
    size: int
    fields: dict[str, tuple[int, int]]
    preset: bytes


def _members(struct: type[Struct] | type[Union], base: int = 0) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for member in fields_of(struct):
        descriptor = getattr(struct, member.name)
        if member.spec.anonymous:
            found |= _members(member.ctype, base + descriptor.offset)
        elif isinstance(member.ctype, type) and issubclass(member.ctype, Struct | Union):
            found |= {f"{member.name}.{k}": v for k, v in _members(member.ctype, base + descriptor.offset).items()}
        else:
            found[member.name] = (base + descriptor.offset, min(descriptor.size, 8))
    return found


def _layouts() -> dict[str, Layout]:
    table = {}
    for name, ioctl in registry.ioctls().items():
        size_of = ioctl.size.to_bytes(4, "little") if ioctl.size_field else b""
        members = _members(ioctl.struct) if ioctl.struct is not None else {}
        if name in _FOLLOWS:
            width, count = _FOLLOWS[name]
            members |= {f"data{index}": (ioctl.size + index * width, width) for index in range(count)}
        table[name] = Layout(ioctl.number, ioctl.size, members, size_of)
    head = {name: place for name, place in _members(iommu_test_cmd).items() if "." not in name}
    for op, member in TEST_OP_MEMBERS.items():
        inner = {k.partition(".")[2]: v for k, v in _members(iommu_test_cmd).items() if k.startswith(member + ".")}
        preset = IOMMU_TEST_CMD.size.to_bytes(4, "little") + int(op).to_bytes(4, "little")
        # `id` of the union's member, where it has one of its own, is called `index` here.
        if "id" in inner:
            inner["index"] = inner.pop("id")
        if op == iommufd_test.IOMMU_TEST_OP_DMABUF_GET:
            inner["result_fd"] = (IOMMU_TEST_CMD.size + _RESULT_AT, 4)
        table[TEST_OPS[op]] = Layout(IOMMU_TEST_CMD.number, IOMMU_TEST_CMD.size, head | inner, preset)
    return table


#: Requests of no ioctl: below and in holes of the table, and right ones with size bits.
RAW = (0x3B7F, 0x3B96, 0x3B9F, 0x3BA1, 0x3BFF, 0xC0043B81, 0x3A81)

#: Names of the test operations, by number.
TEST_OPS = {
    value: name
    for name, value in vars(iommufd_test).items()
    if name.startswith("IOMMU_TEST_OP_") and isinstance(value, int)
}
LAYOUTS = _layouts()
LAYOUTS |= {f"RAW_{number:#x}": Layout(number, 16, {"size": (0, 4)}, b"\x0c\0\0\0") for number in RAW}


@dataclass(slots=True)
class Compiled:
    """A program as the executor takes it, and what is where in its work region: (start, end, call, field)."""

    image: bytes
    steps: list[Step]
    places: list[tuple[int, int, int, str]]


def address(value: str) -> int:
    """The number behind "&region+offset"."""
    name, _, offset = value[1:].partition("+")
    return REGIONS[name][0] + (int(offset, 0) if offset else 0)


class _Compiler:
    """Three passes: room for blocks, then inputs, then outputs (behind everything, so that no overrun changes a later
    call's block); then values; then steps."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.image = bytearray()
        self.places: list[tuple[int, int, int, str]] = []
        #: Where each call's block is, and what pointers point to; the data of reads is there by the name "data".
        self.blocks: list[int] = []
        self.pointed: dict[tuple[int, str], int] = {}
        #: Where the number of the iommufd is, if a call asks for it.
        self.main: int | None = None

    def run(self) -> Compiled:
        for index, call in enumerate(self.calls):
            self._block(index, call)
        for wanted in "*>":
            for index, call in enumerate(self.calls):
                for name, value in call.fields.items():
                    if isinstance(value, str) and value[0] == wanted:
                        self._target(index, name, value)
                if call.name in ("read", "pread") and wanted == ">":
                    self._target(index, "data", f">{read_count(call)}")
        if any(value == MAIN_FD for call in self.calls for value in call.fields.values()):
            self.main = self._allot(4)
        steps = [self._step(index, call) for index, call in enumerate(self.calls)]
        if self.main is not None:
            steps.insert(0, (MAIN, self.main))
        attached = [call.fields.get("pasid", 0) for call in self.calls if call.name in _PASID_CALLS]
        if attached:
            steps.append((DETACH, tuple(sorted({pasid for pasid in attached if isinstance(pasid, int)}))))
        if len(self.image) + 256 > WORK_SIZE:
            raise ValueError("the program is too long for its memory")
        return Compiled(bytes(self.image), steps, self.places)

    def _allot(self, length: int, skew: int = 0) -> int:
        start = (len(self.image) + 7) // 8 * 8 + skew
        self.image += bytes(start + length - len(self.image))
        return start

    def _block(self, index: int, call: Call) -> None:
        layout = LAYOUTS.get(call.name)
        room = 0
        if layout is not None:
            size = call.fields.get("size", call.fields.get("argsz", 0))
            asked = min(size, _MAX_BLOCK) if isinstance(size, int) else 0
            room = max(layout.size + len(call.tail) // 2, asked)
            room = max(room, *(offset + size for offset, size in layout.fields.values())) if layout.fields else room
        elif call.name == "write":
            room = len(call.fields["words"]) * 4
        elif call.name == "mmap" or call.name in _OPENERS:
            room = 8
        elif call.name in EDU_CALLS:
            room = 24
        start = self._allot(room)
        self.blocks.append(start)
        if layout is not None:
            self.image[start : start + len(layout.preset)] = layout.preset
            tail = bytes.fromhex(call.tail)
            self.image[start + layout.size : start + layout.size + len(tail)] = tail
            self.places.append((start, start + room, index, ""))

    def _target(self, index: int, name: str, value: str) -> None:
        if value[0] == "*":
            data = bytes.fromhex(value[1:])
            start = self._allot(len(data))
            self.image[start : start + len(data)] = data
            self.places.append((start, start + len(data), index, f"*{name}"))
        else:
            length, _, skew = value[1:].partition("+")
            start = self._allot(int(length), int(skew or 0))
            self.places.append((start, start + int(length), index, f"*{name}"))
        self.pointed[index, name] = start

    def _source(self, value: Value) -> tuple[int, int] | None:
        """Where "@k.field" is, and how many bytes; None for anything else, or where there is no such call."""
        if not isinstance(value, str) or value[0] != "@":
            return None
        text, _, name = value[1:].partition(".")
        index = int(text)
        if index >= len(self.calls):  # a question about what was cut off with the end of the program
            return None
        name, _, inside = name.partition(":")
        if inside:
            found = self.pointed.get((index, name))
            return None if found is None else (found + int(inside), 8)
        if name.isdigit():
            return (self.pointed[index, "data"] + int(name), 4) if (index, "data") in self.pointed else None
        if self.calls[index].name in _OPENERS:
            return (self.blocks[index], 4) if name == "fd" else None
        layout = LAYOUTS.get(self.calls[index].name)
        if layout is None or name not in layout.fields:
            return None
        offset, size = layout.fields[name]
        return self.blocks[index] + offset, size

    def _put(self, at: int, size: int, index: int, name: str, value: Value) -> tuple[tuple[int, int, int], ...]:
        """Write a value into the image; what can only be written at run time is returned as patches."""
        if isinstance(value, str):
            if value[0] in "@#":
                found = (self.main or 0, 4) if value == MAIN_FD else self._source(value)
                return () if found is None else ((at, found[0], min(size, found[1])),)
            value = address(value) if value[0] == "&" else WORK + self.pointed[index, name]
        self.image[at : at + size] = (value & ((1 << size * 8) - 1)).to_bytes(size, "little")
        return ()

    def _step(self, index: int, call: Call) -> Step:
        layout = LAYOUTS.get(call.name)
        block = self.blocks[index]
        patches: tuple[tuple[int, int, int], ...] = ()
        if layout is not None:
            for name, value in call.fields.items():
                offset, size = layout.fields[name]
                patches += self._put(block + offset, size, index, name, value)
            arg = WORK + block if call.arg is None else call.arg
            fd = next((block + layout.fields[name][0] for name in FD_FIELDS if name in layout.fields), -1)
            where = address(arg) if isinstance(arg, str) else arg
            if call.file is not None:
                return (FILE_IOCTL, self._file(call.file), layout.request, where, patches)
            if "result_fd" in layout.fields:
                return (FD_IOCTL, layout.request, where, fd, patches)
            return (IOCTL, layout.request, where, fd if call.arg is None else -1, patches)
        if call.name in _MEMORY_CALLS:
            more = (call.fields["prot"],) if call.name == "mprotect" else ()
            return (_MEMORY_CALLS[call.name], address(call.fields["address"]), call.fields["length"], *more)
        if call.name == "mmap":
            patches = self._put(block, 8, index, "offset", call.fields["offset"])
            more = (self._file(call.fields["fd"]),) if "fd" in call.fields else ()
            return (MMAP, block, *(call.fields[name] for name in ("length", "prot", "flags")), patches, *more)
        if call.name == "poke":
            return (POKE, address(call.fields["address"]), call.fields["length"], call.fields["words"])
        if call.name in _OPENERS:
            return (_OPENERS[call.name], block, call.fields.get("device", 0))
        slot = self._file(call.fields["fd"])
        if call.name in EDU_CALLS:
            kind, names = EDU_CALLS[call.name]
            for number, name in enumerate(names):
                patches += self._put(block + 8 * number, 8, index, name, call.fields.get(name, 0))
            return (EDU, slot, block, kind, patches)
        if call.name == "pread":
            return (PREAD, slot, read_count(call), call.fields["offset"], self.pointed[index, "data"])
        if call.name == "pwrite":
            data = bytes.fromhex(call.fields["data"][1:])
            return (PWRITE, slot, self.pointed[index, "data"], len(data), (), call.fields["offset"])
        if call.name == "read":
            return (READ, slot, read_count(call), self.pointed[index, "data"])
        if call.name == "write":
            words = call.fields["words"]
            for number, value in enumerate(words):
                patches += self._put(block + number * 4, 4, index, "words", value)
            return (WRITE, slot, block, max(len(words) * 4 + call.fields.get("more", 0), 0), patches)
        return (_FILE_CALLS[call.name], slot)

    def _file(self, value: Value) -> int:
        """Where the number of a file is."""
        found = self._source(value)
        return found[0] if found is not None else WORK_SIZE - 4


def read_count(call: Call) -> int:
    """The count of a read as it is made."""
    return min(max(int(call.fields["count"]), 0), 512)


def compile_program(program: Program) -> Compiled:
    """The bytes and steps of a program. ValueError where they do not fit into the work region."""
    return _Compiler(program.calls).run()


def without(program: Program, dropped: set[int]) -> Program:
    """The program without these calls; what referred to them is 0, other references follow their calls."""
    places: dict[int, int] = {}
    for index in range(len(program.calls)):
        if index not in dropped:
            places[index] = len(places)

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, str) and value[0] == "@":
            index, _, name = value[1:].partition(".")
            return f"@{places[int(index)]}.{name}" if int(index) in places else 0
        return value

    calls = [
        Call(
            call.name,
            {name: moved(value) for name, value in call.fields.items()},
            call.arg,
            call.tail,
            moved(call.file),
        )
        for index, call in enumerate(program.calls)
        if index not in dropped
    ]
    return Program(calls, program.main_first)
