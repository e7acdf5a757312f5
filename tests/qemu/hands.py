"""What every QEMU rig and every rig of ours has in common: memory, devices that write, read and interrupt.

QEMU's commands are collected and sent when the answers are wanted. `iommu-testdev` writes PATTERN; `edu` reads into its
own buffer, which nobody sees, so it is then told to write that buffer out while the unit lets everything pass; its MSI
is whatever is put into its capability.
"""

from __future__ import annotations

from abc import abstractmethod

from fakedev.dma import DmaAbort, DmaPort
from fakedev.machine import Machine
from fakedev.pci import PciFunction
from tests.qemu.qtest import Qtest
from tests.qemu.rig import BLOCKED, ELSEWHERE, PATTERN, Rig

#: (offset, width, value) of a store to a register of the unit.
Stores = list[tuple[int, int, int]]
#: What iommu-testdev says when its write did not arrive.
_WRITE_BLOCKED = 0xDEAD_0002
_EDU_BUFFER, _EDU_STEP = 0x40000, 200_000_000
_MSI, _EDU_RAISE, _EDU_ACK = 0x40, 0x60, 0x64
_REMAPPED = "vtd_ir_remap_msi (addr "


def landed_answer(blocked: bool, landed: list[int], records: list[int]) -> list[int]:
    """The answer to a write: where it turned up, and the words of the records that it left."""
    return [*(landed or [BLOCKED if blocked else ELSEWHERE]), *records]


def name(rid: int) -> str:
    """A requester id as QEMU's `addr` has it."""
    return f"{rid >> 3:x}.{rid & 7:x}"


class QemuRig(Rig):
    """One QEMU with `writers` and `readers`: functions by requester id, with BARs of 1 MiB from `bars` up.

    `base` is where the unit's registers are, `scratch` RAM that no case uses.
    """

    def __init__(
        self, program: str, arguments: list[str], base: int, bars: int, scratch: int, writers: tuple, readers: tuple
    ) -> None:
        devices = [f"iommu-testdev,addr={name(rid)},multifunction=on" for rid in writers]
        devices += [f"edu,addr={name(rid)},multifunction=on,dma_mask=0xffffffffffffffff" for rid in readers]
        self.qemu = Qtest(program, [*arguments, *(word for device in devices for word in ("-device", device))])
        self._base, self._scratch = base, scratch
        self._commands: list[str] = []
        #: What each answer is made of: (kind, index of its first reply, where a write may turn up).
        self._wanted: list[tuple[str, int, tuple[int, ...]]] = []
        self._bars = {rid: bars + number * 0x10_0000 for number, rid in enumerate((*writers, *readers))}
        for rid, bar in self._bars.items():
            self._config(rid, 0x10, 4, bar)
            self._config(rid, 4, 2, 6)
            if rid in writers:
                for offset, value in ((0x1C, scratch), (0x20, 0), (0xC, 4), (0x18, 2)):
                    self._say(f"writel {bar + offset:#x} {value:#x}")

    # -- of each architecture ----------------------------------------------------------------------------------------

    @abstractmethod
    def _config(self, rid: int, offset: int, width: int, value: int) -> None:
        """A configuration store."""

    @abstractmethod
    def _bypass(self, on: bool) -> Stores:
        """What lets every request pass untranslated, or not any more."""

    @abstractmethod
    def _ask_for_records(self) -> None:
        """Queue the commands whose replies tell what records there are, after a request."""

    @abstractmethod
    def _clear_records(self) -> None:
        """Queue the commands after which no record is pending."""

    @abstractmethod
    def _check_and_send(self) -> list[int]:
        """Send the commands, see that the unit's queue has not stopped: the replies."""

    @abstractmethod
    def _records(self, replies: list[int], at: int) -> list[int]:
        """The words of the records of a request, whose replies begin at `at`."""

    # -- commands ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self.qemu.close()

    def _say(self, *commands: str) -> int:
        """Queue commands; the index of the first."""
        self._commands += commands
        return len(self._commands) - len(commands)

    def _register(self, offset: int, width: int, value: int) -> None:
        self._say(f"write{'l' if width == 4 else 'q'} {self._base + offset:#x} {value:#x}")

    def _registers(self, stores: Stores) -> None:
        for offset, width, value in stores:
            self._register(offset, width, value)

    # -- the rig -----------------------------------------------------------------------------------------------------

    def word(self, pa: int, value: int) -> None:
        self._say(f"writeq {pa:#x} {value:#x}")

    def look(self, pa: int) -> None:
        self._wanted.append(("l", self._say(f"readq {pa:#x}"), ()))

    def dma(self, rid: int, iova: int, where: list[int]) -> None:
        bar = self._bars[rid]
        self._say(f"writel {bar + 4:#x} {iova & 0xFFFF_FFFF:#x}", f"writel {bar + 8:#x} {iova >> 32:#x}")
        self._say(f"writel {bar + 0x14:#x} 1", f"readl {bar:#x}")
        first = self._say(f"readl {bar + 0x10:#x}", *(f"readl {pa:#x}" for pa in where))
        self._ask_for_records()
        self._wanted.append(("d", first, tuple(where)))
        self._say(*(f"writel {pa:#x} 0" for pa in where))
        self._clear_records()

    def read(self, rid: int, iova: int) -> None:
        self._edu(rid, iova, _EDU_BUFFER, 1)
        self._registers(self._bypass(True))
        self._edu(rid, _EDU_BUFFER, self._scratch, 3)
        self._registers(self._bypass(False))
        first = self._say(f"readl {self._scratch:#x}")
        self._ask_for_records()
        self._wanted.append(("r", first, ()))
        self._clear_records()

    def _edu(self, rid: int, source: int, destination: int, command: int) -> None:
        bar = self._bars[rid]
        for offset, value in ((0x80, source), (0x88, destination), (0x90, 4), (0x98, command)):
            self._say(f"writeq {bar + offset:#x} {value:#x}")
        self._say(f"clock_step {_EDU_STEP}")

    def message(self, rid: int, address: int, data: int) -> None:
        bar = self._bars[rid]
        for offset, width, value in ((4, 4, address & 0xFFFF_FFFF), (8, 4, address >> 32), (12, 2, data), (2, 2, 0x81)):
            self._config(rid, _MSI + offset, width, value)
        self._say(f"writel {bar + _EDU_RAISE:#x} 1", f"writel {bar + _EDU_ACK:#x} 1")
        first = len(self._commands)
        self._ask_for_records()
        self._wanted.append(("m", first, ()))
        self._clear_records()

    def settle(self) -> list:
        replies = self._check_and_send()
        messages = self._messages()
        answers: list = []
        for kind, first, where in self._wanted:
            if kind == "l":
                answers.append(replies[first])
            elif kind == "r":
                answers.append([replies[first] or BLOCKED, *self._records(replies, first + 1)])
            elif kind == "m":
                records = self._records(replies, first)
                answers.append([*next(messages), *records])
            else:
                landed = [pa for n, pa in enumerate(where, first + 1) if replies[n] == PATTERN]
                records = self._records(replies, first + 1 + len(where))
                answers.append(landed_answer(replies[first] == _WRITE_BLOCKED, landed, records))
        self._commands.clear()
        self._wanted.clear()
        return answers

    def _messages(self):
        """What each message became, from QEMU's traces: (address, data), or BLOCKED alone."""
        found: list[list[int]] = []
        for line in self.qemu.heard():
            if line.startswith("vtd_ir_remap_msi_req"):
                found.append([BLOCKED])
            elif line.startswith(_REMAPPED):
                address, data = line.partition("->")[2].strip(" ()").split(", ")
                found[-1] = [int(address.removeprefix("addr "), 16), int(data.removeprefix("data "), 16)]
        return iter(found)


class OurRig(Rig):
    """Our unit and its functions in a machine; the subclass makes `box`, then calls `plug`."""

    box: Machine

    def plug(self, unit, rids: tuple) -> None:
        """Put functions that do as they are told behind the unit."""
        self.memory = self.box.memory
        self.unit = unit
        self.ports: dict[int, DmaPort] = {}
        for rid in rids:
            function = PciFunction(f"0000:00:{rid >> 3:02x}.{rid & 7}", (1, 2), 0, command=4)
            self.ports[rid] = self.box.root.add(function, unit).dma
        self.box.interrupt_sink = lambda address, data: self._delivered.append([address, data])
        self._delivered: list[list[int]] = []
        self._answers: list = []

    @abstractmethod
    def _take_records(self) -> list[int]:
        """The words of the records that are pending, which they are not any more."""

    @abstractmethod
    def _check(self) -> None:
        """See that the unit's queue has not stopped."""

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
        self._answers.append(landed_answer(blocked, landed, self._take_records()))

    def read(self, rid: int, iova: int) -> None:
        try:
            value = int.from_bytes(self.ports[rid].read(iova, 4), "little")
        except DmaAbort:
            value = 0  # as in edu's buffer
        self._answers.append([value or BLOCKED, *self._take_records()])

    def message(self, rid: int, address: int, data: int) -> None:
        self._delivered.clear()
        try:
            self.ports[rid].write(address, data.to_bytes(4, "little"))
        except DmaAbort:
            self._delivered.append([BLOCKED])
        self._answers.append([*self._delivered[0], *self._take_records()])

    def settle(self) -> list:
        self._check()
        answers, self._answers = self._answers, []
        return answers
