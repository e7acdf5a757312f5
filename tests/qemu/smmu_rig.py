"""SMMUv3 in QEMU and ours, behind one interface, set up in the same way.

RAM is 1 GiB from 1 GiB up; nothing answers from 2 to 3 GiB and above 2 TiB. Three functions write where they are told;
their requester ids are the StreamIDs. Events are collected from the event queue: as many as there have been.
"""

from __future__ import annotations

from collections.abc import Iterable

from fakedev.dma import DmaAbort
from fakedev.machine import Machine
from fakedev.memory import PhysicalMemory
from fakedev.pci import PciFunction
from fakedev.smmuv3 import commands, regs
from fakedev.smmuv3.unit import SmmuV3
from tests.qemu.qtest import Qtest
from tests.qemu.rig import BLOCKED, ELSEWHERE, PATTERN, Rig

BASE, ECAM, BARS = 0x0905_0000, 0x3F00_0000, 0x1000_0000
RAM, RAM_END = 1 << 30, 2 << 30
STREAMS, SCRATCH, COMMANDS, EVENTS = RAM + 0x10_0000, RAM + 0x10_8000, RAM + 0x11_0000, RAM + 0x20_0000
#: The requester ids of the three functions.
RIDS = (0x08, 0x09, 0x10)
#: What differs between the features of `-machine virt`'s SMMUv3 and ours of all features.
VIRT = {
    "oas": 44,
    "ssid_bits": 0,
    "ats": False,
    "pri": False,
    "msi": False,
    "stall_model": 1,
    "httu": 0,
    "s2fwb": False,
    "xnx": False,
}
_STREAM_LOG2, _COMMAND_LOG2, _EVENT_LOG2 = 6, 8, 15
_EVENT_INDEX = (1 << _EVENT_LOG2 + 1) - 1
#: A two-level stream table: 64 streams a level 2 table, which a case puts where it likes.
SPLIT = 6


def _setup(two_level: bool) -> list[tuple[int, int, int]]:
    """The registers that turn translation on: (offset, width, value)."""
    table = regs.STRTAB_SPLIT.put(SPLIT) | regs.STRTAB_FMT.put(regs.STRTAB_FMT_2LVL) | 8 if two_level else _STREAM_LOG2
    return [
        (regs.CR0, 4, 0),
        (regs.CR1, 4, 0xD75),
        (regs.CR2, 4, regs.CR2_RECINVSID),
        (regs.CMDQ_BASE, 8, COMMANDS | _COMMAND_LOG2),
        (regs.CMDQ_PROD, 4, 0),
        (regs.CMDQ_CONS, 4, 0),
        (regs.EVENTQ_BASE, 8, EVENTS | _EVENT_LOG2),
        (regs.EVENTQ_PROD, 4, 0),
        (regs.EVENTQ_CONS, 4, 0),
        (regs.STRTAB_BASE_CFG, 4, table),
        (regs.STRTAB_BASE, 8, STREAMS),
        (regs.CR0, 4, regs.CR0_CMDQEN | regs.CR0_EVENTQEN | regs.CR0_SMMUEN),
    ]


_ALL = (*commands.cfgi_all(), *commands.tlbi_nsnh_all())


class Queue:
    """Where the next command goes."""

    def __init__(self) -> None:
        self.index = 0

    def put(self, words: Iterable[int]) -> list[tuple[int, int]]:
        """(address, word) of what is to be stored."""
        stores = []
        given = list(words)
        for n in range(0, len(given), 2):
            at = COMMANDS + 16 * (self.index & (1 << _COMMAND_LOG2) - 1)
            stores += [(at, given[n]), (at + 8, given[n + 1])]
            self.index = self.index + 1 & (2 << _COMMAND_LOG2) - 1
        return stores


class QemuSmmu(Rig):
    """QEMU's SMMUv3 of `-machine virt`."""

    def __init__(self, program: str, two_level: bool = False) -> None:
        arguments = "-machine virt,acpi=off,gic-version=3,iommu=smmuv3,highmem-ecam=off -cpu max -smp 1 -m 1G -net none"
        devices = ["iommu-testdev,addr=1,multifunction=on", "iommu-testdev,addr=1.1", "iommu-testdev,addr=2"]
        self.qemu = Qtest(program, [*arguments.split(" "), *(word for one in devices for word in ("-device", one))])
        self._queue = Queue()
        self._events = 0
        self._commands: list[str] = []
        self._wanted: list[tuple] = []
        self._bars = {}
        for number, rid in enumerate(RIDS):
            self._bars[rid] = bar = BARS + number * 0x10_0000
            for offset, value in ((0x10, bar), (4, 6)):
                self._say(f"writel {ECAM + (rid << 12) + offset:#x} {value:#x}")
            for offset, value in ((0x1C, SCRATCH), (0x20, 0), (0xC, 4), (0x18, 2)):
                self._say(f"writel {bar + offset:#x} {value:#x}")
        for offset, width, value in _setup(two_level):
            self._register(offset, width, value)
        self.qemu.ask(self._commands)
        self._commands.clear()
        names = {"idr0": regs.IDR0, "idr1": regs.IDR1, "idr3": regs.IDR3, "idr5": regs.IDR5}
        values = self.qemu.ask([f"readl {BASE + offset:#x}" for offset in names.values()])
        self.identification = dict(zip(names, values, strict=True))

    def close(self) -> None:
        self.qemu.close()

    def _say(self, *said: str) -> int:
        """Queue commands of qtest; the index of the first."""
        self._commands += said
        return len(self._commands) - len(said)

    def _register(self, offset: int, width: int, value: int) -> None:
        self._say(f"write{'l' if width == 4 else 'q'} {BASE + offset:#x} {value:#x}")

    def word(self, pa: int, value: int) -> None:
        self._say(f"writeq {pa:#x} {value:#x}")

    def look(self, pa: int) -> None:
        self._wanted.append(("l", self._say(f"readq {pa:#x}"), ()))

    def dma(self, rid: int, iova: int, where: list[int]) -> None:
        bar = self._bars[rid]
        self._say(f"writel {bar + 4:#x} {iova & 0xFFFF_FFFF:#x}", f"writel {bar + 8:#x} {iova >> 32:#x}")
        self._say(f"writel {bar + 0x14:#x} 1", f"readl {bar:#x}")
        first = self._say(f"readl {bar + 0x10:#x}", f"readl {BASE + regs.EVENTQ_PROD:#x}")
        self._wanted.append(("d", first, tuple(where)))
        self._say(*(f"readl {pa:#x}" for pa in where), *(f"writel {pa:#x} 0" for pa in where))

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self._register(regs.CMDQ_PROD, 4, self._queue.index)

    def invalidate_all(self) -> None:
        self.invalidate(_ALL)

    def settle(self) -> list:
        first = self._say(f"readl {BASE + regs.CMDQ_CONS:#x}", f"readl {BASE + regs.GERROR:#x}")
        replies = self.qemu.ask(self._commands)
        if replies[first] != self._queue.index or replies[first + 1]:
            raise AssertionError(f"the command queue stopped: CONS {replies[first]:#x}, GERROR {replies[first + 1]:#x}")
        ends = [replies[at + 1] & _EVENT_INDEX for kind, at, _ in self._wanted if kind == "d"]
        records = self._read_events(ends[-1]) if ends else []
        answers: list = []
        seen = 0
        for kind, at, where in self._wanted:
            if kind == "l":
                answers.append(replies[at])
                continue
            landed = [pa for n, pa in enumerate(where) if replies[at + 2 + n] == PATTERN]
            new = (replies[at + 1] & _EVENT_INDEX) - self._events & _EVENT_INDEX
            self._events = replies[at + 1] & _EVENT_INDEX
            events = [word for record in records[seen : seen + new] for word in record]
            seen += new
            answers.append(_answer(replies[at] == 0xDEAD_0002, landed, events))
        self._commands.clear()
        self._wanted.clear()
        self._register(regs.EVENTQ_CONS, 4, self._events)
        return answers

    def _read_events(self, end: int) -> list[list[int]]:
        asked = []
        for index in range((end - self._events) & _EVENT_INDEX):
            at = EVENTS + 32 * (self._events + index & (1 << _EVENT_LOG2) - 1)
            asked += [f"readq {at + 8 * n:#x}" for n in range(4)]
        words = self.qemu.ask(asked)
        return [words[n : n + 4] for n in range(0, len(words), 4)]


class OurSmmu(Rig):
    """Our unit with the features of `-machine virt`'s."""

    def __init__(self, two_level: bool = False, **features) -> None:
        self.box = box = Machine("judged", PhysicalMemory(RAM_END))
        self.memory = box.memory
        self.unit = SmmuV3(self.memory, regs.Features(**features), send_interrupt=box.root.interrupt)
        self.ports = {}
        for rid in RIDS:
            function = PciFunction(f"0000:00:{rid >> 3:02x}.{rid & 7}", (1, 2), 0, command=4)
            self.ports[rid] = box.root.add(function, self.unit).dma
        self._queue = Queue()
        self._events = 0
        self._answers: list = []
        for offset, width, value in _setup(two_level):
            self.unit.write(offset, width, value)

    def word(self, pa: int, value: int) -> None:
        self.memory.write(pa, value.to_bytes(8, "little"))

    def look(self, pa: int) -> None:
        self._answers.append(int.from_bytes(self.memory.read(pa, 8), "little"))

    def dma(self, rid: int, iova: int, where: list[int]) -> None:
        blocked = False
        try:
            self.ports[rid].write(iova, PATTERN.to_bytes(4, "little"))
        except DmaAbort:
            blocked = True
        landed = []
        for pa in where:
            if self.memory.read(pa, 4) == PATTERN.to_bytes(4, "little"):
                landed.append(pa)
                self.memory.write(pa, bytes(4))
        events = []
        end = self.unit.read(regs.EVENTQ_PROD, 4) & _EVENT_INDEX
        while self._events != end:
            at = EVENTS + 32 * (self._events & (1 << _EVENT_LOG2) - 1)
            events += [int.from_bytes(self.memory.read(at + 8 * n, 8), "little") for n in range(4)]
            self._events = self._events + 1 & _EVENT_INDEX
        self.unit.write(regs.EVENTQ_CONS, 4, self._events)
        self._answers.append(_answer(blocked, landed, events))

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self.unit.write(regs.CMDQ_PROD, 4, self._queue.index)

    def invalidate_all(self) -> None:
        self.invalidate(_ALL)

    def settle(self) -> list:
        consumed, errors = self.unit.read(regs.CMDQ_CONS, 4), self.unit.read(regs.GERROR, 4)
        if consumed != self._queue.index or errors:
            raise AssertionError(f"the command queue stopped: CONS {consumed:#x}, GERROR {errors:#x}")
        answers, self._answers = self._answers, []
        return answers


def _answer(blocked: bool, landed: list[int], events: list[int]) -> list[int]:
    return [*(landed or [BLOCKED if blocked else ELSEWHERE]), *events]
