"""VT-d in QEMU and ours, behind one interface, set up in the same way, in legacy or in scalable mode.

Both have RAM of 1 GiB, nothing from there to 2 GiB and above 256 GiB, the root table, the queue and the status word at
the same addresses, and three functions that write where they are told. Our unit gets QEMU's capability registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fakedev.dma import DmaAbort
from fakedev.machine import Machine
from fakedev.memory import PhysicalMemory
from fakedev.pci import PciFunction
from fakedev.vtd import descriptors, regs
from fakedev.vtd.unit import VtdUnit
from tests.qemu.qtest import Qtest
from tests.qemu.rig import BLOCKED, ELSEWHERE, PATTERN, Rig

BASE = 0xFED9_0000
ROOT, QUEUE, SCRATCH = 0x10_0000, 0x10_2000, 0x10_3000
RECORD = 0x220
#: The requester ids of the three functions.
RIDS = (0x18, 0x19, 0x28)
RAM = 1 << 30
_QUEUE_SIZE = 4096
_CLEAR_RECORD = 1 << 63
_SCALABLE = 1 << 10  # of RTADDR


def _setup(scalable: bool) -> list[tuple[int, int, int]]:
    """The registers that turn translation on: (offset, width, value)."""
    return [
        (regs.FECTL, 4, regs.EVENT_IM),
        (regs.RTADDR, 8, ROOT | (_SCALABLE if scalable else 0)),
        (regs.GCMD, 4, regs.SRTP),
        (regs.IQA, 8, QUEUE | (regs.IQA_DW if scalable else 0)),
        (regs.GCMD, 4, regs.QIE),
        (regs.GCMD, 4, regs.TE | regs.QIE),
    ]


def _everything(scalable: bool) -> list[int]:
    """The descriptors after which nothing is cached."""
    return [
        *descriptors.context_cache(0, 0, 0, descriptors.GLOBAL),
        *(descriptors.pasid_cache(0, 0, descriptors.PC_GLOBAL) if scalable else ()),
        *descriptors.iotlb(0, 0, 0, descriptors.GLOBAL),
    ]


class Queue:
    """Where the next descriptor goes. Those of scalable mode have two more words, of zeros."""

    def __init__(self, scalable: bool) -> None:
        self.scalable = scalable
        self.tail = 0

    def put(self, words: Iterable[int]) -> Iterator[tuple[int, int]]:
        """(address, word) of what is to be stored for descriptors of two words each."""
        given = list(words)
        for n in range(0, len(given), 2):
            for word in [*given[n : n + 2], *((0, 0) if self.scalable else ())]:
                yield QUEUE + self.tail, word
                self.tail = (self.tail + 8) % _QUEUE_SIZE


class QemuVtd(Rig):
    """QEMU's intel-iommu. `options` are more properties of it. Commands are sent when the answers are wanted."""

    def __init__(self, program: str, options: str = "", scalable: bool = False) -> None:
        machine = ["-machine", "q35,kernel-irqchip=split", "-smp", "1", "-m", "1G", "-net", "none"]
        devices = [f"intel-iommu{options}", "iommu-testdev,addr=3,multifunction=on"]
        devices += ["iommu-testdev,addr=3.1", "iommu-testdev,addr=5"]
        self.qemu = Qtest(program, [*machine, *(word for device in devices for word in ("-device", device))])
        self._queue = Queue(scalable)
        self._commands: list[str] = []
        #: What each answer is made of: ("l", index of the reply), or ("d", index of the first reply, pas).
        self._wanted: list[tuple] = []
        self._bars = {}
        for number, rid in enumerate(RIDS):
            self._bars[rid] = bar = 0xC000_0000 + number * 0x10_0000
            for offset, value in ((0x10, bar), (4, 6)):
                self._say(f"outl 0xcf8 {0x8000_0000 | rid << 8 | offset:#x}", f"outl 0xcfc {value:#x}")
            for offset, value in ((0x1C, SCRATCH), (0x20, 0), (0xC, 4), (0x18, 2)):
                self._say(f"writel {bar + offset:#x} {value:#x}")
        for offset, width, value in _setup(scalable):
            self._register(offset, width, value)
        self.cap, self.ecap = self.qemu.ask([f"readq {BASE + regs.CAP:#x}", f"readq {BASE + regs.ECAP:#x}"])
        self.version = self.qemu.ask([*self._commands, f"readl {BASE:#x}"])[-1]
        self._commands.clear()

    def close(self) -> None:
        self.qemu.close()

    def _say(self, *commands: str) -> int:
        """Queue commands; the index of the first."""
        self._commands += commands
        return len(self._commands) - len(commands)

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
        first = self._say(f"readl {bar + 0x10:#x}", f"readq {BASE + RECORD:#x}", f"readq {BASE + RECORD + 8:#x}")
        self._wanted.append(("d", first, tuple(where)))
        self._say(*(f"readl {pa:#x}" for pa in where), *(f"writel {pa:#x} 0" for pa in where))
        self._register(RECORD + 8, 8, _CLEAR_RECORD)
        self._register(regs.FSTS, 4, 0xFF)

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self._register(regs.IQT, 8, self._queue.tail)

    def invalidate_all(self) -> None:
        self.invalidate(_everything(self._queue.scalable))

    def settle(self) -> list:
        replies = self.qemu.ask([*self._commands, f"readl {BASE + regs.FSTS:#x}", f"readq {BASE + regs.IQH:#x}"])
        if replies[-2] & (regs.FSTS_IQE | regs.FSTS_ITE | regs.FSTS_ICE) or replies[-1] != self._queue.tail:
            raise AssertionError(f"the invalidation queue stopped: FSTS {replies[-2]:#x}, head {replies[-1]:#x}")
        answers: list = []
        for kind, first, where in self._wanted:
            if kind == "l":
                answers.append(replies[first])
                continue
            result, low, high = replies[first : first + 3]
            landed = [pa for n, pa in enumerate(where) if replies[first + 3 + n] == PATTERN]
            answers.append(_answer(result == 0xDEAD_0002, landed, low, high))
        self._commands.clear()
        self._wanted.clear()
        return answers


class OurVtd(Rig):
    """Our unit with the given capability registers."""

    def __init__(self, cap: int, ecap: int, bits: int = 48, scalable: bool = False) -> None:
        self.box = box = Machine("judged", PhysicalMemory(RAM))
        self.unit = VtdUnit(
            box.memory, cap, ecap, host_address_bits=bits, send_interrupt=box.root.interrupt, on_fault=None
        )
        box.mmio.add(BASE, self.unit)
        self.memory = box.memory
        self.ports = {}
        for rid in RIDS:
            function = PciFunction(f"0000:00:{rid >> 3:02x}.{rid & 7}", (1, 2), 0, command=4)
            self.ports[rid] = box.root.add(function, self.unit).dma
        self._queue = Queue(scalable)
        self._answers: list = []
        for offset, width, value in _setup(scalable):
            box.mmio.write(BASE + offset, width, value)

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
        mmio = self.box.mmio
        low, high = mmio.read(BASE + RECORD, 8), mmio.read(BASE + RECORD + 8, 8)
        self._answers.append(_answer(blocked, landed, low, high))
        mmio.write(BASE + RECORD + 8, 8, _CLEAR_RECORD)
        mmio.write(BASE + regs.FSTS, 4, 0xFF)

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self.box.mmio.write(BASE + regs.IQT, 8, self._queue.tail)

    def invalidate_all(self) -> None:
        self.invalidate(_everything(self._queue.scalable))

    def settle(self) -> list:
        mmio = self.box.mmio
        status, head = mmio.read(BASE + regs.FSTS, 4), mmio.read(BASE + regs.IQH, 8)
        if status & (regs.FSTS_IQE | regs.FSTS_ITE | regs.FSTS_ICE) or head != self._queue.tail:
            raise AssertionError(f"the invalidation queue stopped: FSTS {status:#x}, head {head:#x}")
        answers, self._answers = self._answers, []
        return answers


def _answer(blocked: bool, landed: list[int], low: int, high: int) -> list[int]:
    fault = [low, high] if high >> 63 else []
    if blocked:
        return [*(landed or [BLOCKED]), *fault]
    return [*(landed or [ELSEWHERE]), *fault]
