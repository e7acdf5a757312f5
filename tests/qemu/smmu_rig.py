"""SMMUv3 in QEMU and ours, behind one interface, set up in the same way.

RAM is 1 GiB from 1 GiB up; nothing answers from 2 to 3 GiB and above 2 TiB. Functions write and read where they are
told; their requester ids are the StreamIDs. Events are collected from the event queue: as many as there have been.
"""

from __future__ import annotations

from collections.abc import Iterable

from fakedev.machine import Machine
from fakedev.memory import PhysicalMemory
from fakedev.smmuv3 import commands, regs
from fakedev.smmuv3.unit import SmmuV3
from tests.qemu.hands import OurRig, QemuRig, Stores

BASE, ECAM, BARS = 0x0905_0000, 0x3F00_0000, 0x1000_0000
RAM, RAM_END = 1 << 30, 2 << 30
STREAMS, SCRATCH, COMMANDS, EVENTS = RAM + 0x10_0000, RAM + 0x10_8000, RAM + 0x11_0000, RAM + 0x20_0000
#: The requester ids of the functions that write, and of those that read: on both sides of 80h.
RIDS, READERS = (0x08, 0x09, 0x10, 0x88), (0x18, 0x19, 0x20, 0xA0)
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
_STREAM_LOG2, _COMMAND_LOG2, _EVENT_LOG2 = 8, 8, 15
_ON = regs.CR0_CMDQEN | regs.CR0_EVENTQEN | regs.CR0_SMMUEN
_EVENT_INDEX = (1 << _EVENT_LOG2 + 1) - 1
#: A two-level stream table: 64 streams a level 2 table, which a case puts where it likes.
SPLIT = 6


def _setup(two_level: bool) -> Stores:
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
        (regs.CR0, 4, _ON),
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


class QemuSmmu(QemuRig):
    """QEMU's SMMUv3 of `-machine virt`."""

    def __init__(self, program: str, two_level: bool = False) -> None:
        machine = "-machine virt,acpi=off,gic-version=3,iommu=smmuv3,highmem-ecam=off -cpu max -smp 1 -m 1G -net none"
        super().__init__(program, machine.split(" "), BASE, BARS, SCRATCH, RIDS, READERS)
        self._queue = Queue()
        self._events = 0
        #: The records of the requests since the last time, in the queue's order.
        self._waiting: list[list[int]] = []
        self._registers(_setup(two_level))
        self.qemu.ask(self._commands)
        self._commands.clear()
        names = {"idr0": regs.IDR0, "idr1": regs.IDR1, "idr3": regs.IDR3, "idr5": regs.IDR5}
        values = self.qemu.ask([f"readl {BASE + offset:#x}" for offset in names.values()])
        self.identification = dict(zip(names, values, strict=True))

    def _config(self, rid: int, offset: int, width: int, value: int) -> None:
        self._say(f"write{'l' if width == 4 else 'w'} {ECAM + (rid << 12) + offset:#x} {value:#x}")

    def _bypass(self, on: bool) -> Stores:
        return [(regs.CR0, 4, _ON & ~regs.CR0_SMMUEN if on else _ON)]

    def _ask_for_records(self) -> None:
        self._last = self._say(f"readl {BASE + regs.EVENTQ_PROD:#x}")

    def _clear_records(self) -> None:
        """They stay in the queue, which has room for those of all cases of a batch."""

    def _records(self, replies: list[int], at: int) -> list[int]:
        new = (replies[at] & _EVENT_INDEX) - self._events & _EVENT_INDEX
        self._events = replies[at] & _EVENT_INDEX
        found, self._waiting = self._waiting[:new], self._waiting[new:]
        return [word for record in found for word in record]

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self._register(regs.CMDQ_PROD, 4, self._queue.index)

    def invalidate_all(self) -> None:
        self.invalidate(_ALL)

    def _check_and_send(self) -> list[int]:
        first = self._say(f"readl {BASE + regs.CMDQ_CONS:#x}", f"readl {BASE + regs.GERROR:#x}")
        self._ask_for_records()
        replies = self.qemu.ask(self._commands)
        _check_queue(replies[first], replies[first + 1], self._queue.index)
        end = replies[self._last] & _EVENT_INDEX
        asked = []
        for index in range(end - self._events & _EVENT_INDEX):
            at = EVENTS + 32 * (self._events + index & (1 << _EVENT_LOG2) - 1)
            asked += [f"readq {at + 8 * n:#x}" for n in range(4)]
        words = self.qemu.ask(asked)
        self._waiting = [words[n : n + 4] for n in range(0, len(words), 4)]
        return replies

    def settle(self) -> list:
        answers = super().settle()
        self._register(regs.EVENTQ_CONS, 4, self._events)
        return answers


class OurSmmu(OurRig):
    """Our unit with the features of `-machine virt`'s."""

    def __init__(self, two_level: bool = False, **features) -> None:
        self.box = box = Machine("judged", PhysicalMemory(RAM_END))
        self.plug(SmmuV3(box.memory, regs.Features(**features), send_interrupt=box.root.interrupt), (*RIDS, *READERS))
        self._queue = Queue()
        self._events = 0
        for offset, width, value in _setup(two_level):
            self.unit.write(offset, width, value)

    def _take_records(self) -> list[int]:
        events = []
        end = self.unit.read(regs.EVENTQ_PROD, 4) & _EVENT_INDEX
        while self._events != end:
            at = EVENTS + 32 * (self._events & (1 << _EVENT_LOG2) - 1)
            events += [int.from_bytes(self.memory.read(at + 8 * n, 8), "little") for n in range(4)]
            self._events = self._events + 1 & _EVENT_INDEX
        self.unit.write(regs.EVENTQ_CONS, 4, self._events)
        return events

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self.unit.write(regs.CMDQ_PROD, 4, self._queue.index)

    def invalidate_all(self) -> None:
        self.invalidate(_ALL)

    def _check(self) -> None:
        _check_queue(self.unit.read(regs.CMDQ_CONS, 4), self.unit.read(regs.GERROR, 4), self._queue.index)


def _check_queue(consumed: int, errors: int, produced: int) -> None:
    if consumed != produced or errors:
        raise AssertionError(f"the command queue stopped: CONS {consumed:#x}, GERROR {errors:#x}")
