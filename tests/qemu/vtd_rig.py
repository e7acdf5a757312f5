"""VT-d in QEMU and ours, behind one interface, set up in the same way, in legacy or in scalable mode.

Both have RAM of 1 GiB, nothing from there to 2 GiB and above 256 GiB, the root table, the queue, the interrupt table
and the status word at the same addresses, and functions that do what they are told. Our unit gets QEMU's capability
registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fakedev.machine import Machine
from fakedev.memory import PhysicalMemory
from fakedev.vtd import descriptors, regs
from fakedev.vtd.unit import VtdUnit
from tests.qemu.hands import OurRig, QemuRig, Stores

BASE = 0xFED9_0000
ROOT = 0x10_0000
#: Three bits or more from every table: a stray bit in an entry must not lead there.
QUEUE, SCRATCH, INTERRUPTS = 0x1F_0000, 0x1F_1000, 0x1F_2000
RECORD = 0x220
#: The requester ids of the functions that write, and of those that read and interrupt: on both sides of 80h.
RIDS, READERS = (0x18, 0x19, 0x28, 0x88), (0x30, 0x31, 0x38, 0xA0)
#: Of the interrupt table: 256.
ENTRIES_LG2 = 8
RAM = 1 << 30
_QUEUE_SIZE = 4096
_CLEAR_RECORD = 1 << 63
_SCALABLE = 1 << 10  # of RTADDR


def _setup(scalable: bool, interrupts: bool, extended: bool) -> Stores:
    """The registers that turn translation on, or the remapping of interrupts."""
    queue = QUEUE | (regs.IQA_DW if scalable else 0)
    irta = INTERRUPTS | ENTRIES_LG2 - 1 | (regs.IRTA_EIME if extended else 0)
    last = [
        (regs.IRTA, 8, irta),
        (regs.GCMD, 4, regs.SIRTP | regs.QIE),
        (regs.GCMD, 4, regs.IRE | regs.QIE),
    ]
    return [
        (regs.FECTL, 4, regs.EVENT_IM),
        (regs.RTADDR, 8, ROOT | (_SCALABLE if scalable else 0)),
        (regs.GCMD, 4, regs.SRTP),
        (regs.IQA, 8, queue),
        (regs.GCMD, 4, regs.QIE),
        *(last if interrupts else [(regs.GCMD, 4, regs.TE | regs.QIE)]),
    ]


def _everything(scalable: bool) -> list[int]:
    """The descriptors after which nothing is cached."""
    return [
        *descriptors.context_cache(0, 0, 0, descriptors.GLOBAL),
        *(descriptors.pasid_cache(0, 0, descriptors.PC_GLOBAL) if scalable else ()),
        *descriptors.iotlb(0, 0, 0, descriptors.GLOBAL),
        *descriptors.interrupt_entries(),
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


class QemuVtd(QemuRig):
    """QEMU's intel-iommu. `options` are more properties of it."""

    def __init__(
        self, program: str, options: str = "", scalable: bool = False, interrupts: bool = False, extended: bool = False
    ) -> None:
        machine = ["-machine", "q35,kernel-irqchip=split", "-smp", "1", "-m", "1G", "-net", "none"]
        machine += ["-device", f"intel-iommu{options}"]
        if interrupts:
            machine += ["-trace", "enable=vtd_ir_remap_msi*"]
        super().__init__(program, machine, BASE, 0xC000_0000, SCRATCH, RIDS, READERS)
        self._queue = Queue(scalable)
        self._registers(_setup(scalable, interrupts, extended))
        self.cap, self.ecap = self.qemu.ask([f"readq {BASE + regs.CAP:#x}", f"readq {BASE + regs.ECAP:#x}"])
        self.version = self.qemu.ask([*self._commands, f"readl {BASE:#x}"])[-1]
        self._commands.clear()
        self.qemu.heard()

    def _config(self, rid: int, offset: int, width: int, value: int) -> None:
        self._say(f"outl 0xcf8 {0x8000_0000 | rid << 8 | offset & ~3:#x}")
        self._say(f"out{'l' if width == 4 else 'w'} {0xCFC + (offset & 3):#x} {value:#x}")

    def _bypass(self, on: bool) -> Stores:
        return [(regs.GCMD, 4, regs.QIE | (0 if on else regs.TE))]

    def _ask_for_records(self) -> None:
        self._say(f"readq {BASE + RECORD:#x}", f"readq {BASE + RECORD + 8:#x}")

    def _clear_records(self) -> None:
        self._register(RECORD + 8, 8, _CLEAR_RECORD)
        self._register(regs.FSTS, 4, 0xFF)

    def _records(self, replies: list[int], at: int) -> list[int]:
        return replies[at : at + 2] if replies[at + 1] >> 63 else []

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self._register(regs.IQT, 8, self._queue.tail)

    def invalidate_all(self) -> None:
        self.invalidate(_everything(self._queue.scalable))

    def _check_and_send(self) -> list[int]:
        replies = self.qemu.ask([*self._commands, f"readl {BASE + regs.FSTS:#x}", f"readq {BASE + regs.IQH:#x}"])
        _check_queue(replies[-2], replies[-1], self._queue.tail)
        return replies


class OurVtd(OurRig):
    """Our unit with the given capability registers."""

    def __init__(
        self,
        cap: int,
        ecap: int,
        bits: int = 48,
        scalable: bool = False,
        interrupts: bool = False,
        extended: bool = False,
    ) -> None:
        self.box = box = Machine("judged", PhysicalMemory(RAM))
        unit = VtdUnit(box.memory, cap, ecap, host_address_bits=bits, send_interrupt=box.root.interrupt, on_fault=None)
        box.mmio.add(BASE, unit)
        self.plug(unit, (*RIDS, *READERS))
        self._queue = Queue(scalable)
        for offset, width, value in _setup(scalable, interrupts, extended):
            box.mmio.write(BASE + offset, width, value)

    def _take_records(self) -> list[int]:
        mmio = self.box.mmio
        low, high = mmio.read(BASE + RECORD, 8), mmio.read(BASE + RECORD + 8, 8)
        mmio.write(BASE + RECORD + 8, 8, _CLEAR_RECORD)
        mmio.write(BASE + regs.FSTS, 4, 0xFF)
        return [low, high] if high >> 63 else []

    def invalidate(self, words: Iterable[int]) -> None:
        for pa, word in self._queue.put(words):
            self.word(pa, word)
        self.box.mmio.write(BASE + regs.IQT, 8, self._queue.tail)

    def invalidate_all(self) -> None:
        self.invalidate(_everything(self._queue.scalable))

    def _check(self) -> None:
        mmio = self.box.mmio
        _check_queue(mmio.read(BASE + regs.FSTS, 4), mmio.read(BASE + regs.IQH, 8), self._queue.tail)


def _check_queue(status: int, head: int, tail: int) -> None:
    if status & (regs.FSTS_IQE | regs.FSTS_ITE | regs.FSTS_ICE) or head != tail:
        raise AssertionError(f"the invalidation queue stopped: FSTS {status:#x}, head {head:#x}")
