"""QEMU 11's `iommu-testdev` (1b36:0005): a device that writes a pattern by DMA and says where it landed.

Mirrors hw/misc/iommu-testdev.c and docs/specs/iommu-testdev.rst of QEMU: registers, results, arming, that only 4-byte
accesses do anything. A store arms it, a load of the first register lets it write its pattern to the IOVA; it then
looks, not through the IOMMU, whether the pattern is at the physical address that it was told, and keeps the result.

Differences, on purpose: QEMU's device masters the bus whether or not it may, this one only with Bus Master Enable;
while a write waits in the IOMMU (QEMU's never does) the result stays BUSY. The Secure address space of Arm is not
there: writes to it fail.
"""

from __future__ import annotations

from functools import partial

from fakedev.dma import DmaAbort, Outcome, Parked
from fakedev.memory import BusAbort
from fakedev.pci import Bar, PciFunction

BAR_SIZE = 0x1000
REG_TRIGGERING, REG_GVA_LO, REG_GVA_HI, REG_LEN, REG_RESULT = 0x00, 0x04, 0x08, 0x0C, 0x10
REG_DBELL, REG_ATTRS, REG_GPA_LO, REG_GPA_HI = 0x14, 0x18, 0x1C, 0x20
RESULT_OK, RESULT_IDLE, RESULT_BUSY = 0, 0xFFFF_FFFF, 0xFFFF_FFFE
ERR_BAD_LEN, ERR_TX_FAIL, ERR_RD_FAIL = 0xDEAD_0001, 0xDEAD_0002, 0xDEAD_0003
ERR_MISMATCH, ERR_NOT_ARMED, ERR_BAD_ATTRS = 0xDEAD_0004, 0xDEAD_0005, 0xDEAD_0006
DBELL_ARM = 1
ATTRS_SECURE, ATTRS_SPACE_SHIFT, ATTRS_SPACE_VALID = 1, 1, 8
_SPACE_SECURE, _SPACE_NONSECURE = 0, 1
#: What it writes, in little-endian order, over and over.
PATTERN = 0x1234_5678

_PLAIN = (REG_GVA_LO, REG_GVA_HI, REG_LEN, REG_RESULT, REG_ATTRS, REG_GPA_LO, REG_GPA_HI)


class TestdevBar(Bar):
    """The registers. An access of 8 bytes is two of 4, a smaller one is none."""

    def __init__(self, device: IommuTestdev) -> None:
        super().__init__(BAR_SIZE)
        self._device = device

    def read(self, offset: int, width: int) -> int:
        if width < 4 or offset % 4:
            return 0
        value = 0
        for at in range(0, width, 4):
            value |= self._device.load(offset + at) << 8 * at
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        if width >= 4 and offset % 4 == 0:
            for at in range(0, width, 4):
                self._device.store(offset + at, value >> 8 * at & 0xFFFF_FFFF)


class IommuTestdev(PciFunction):
    """The function."""

    def __init__(self, address: str, bar_address: int = 0, command: int = 0, header_type: int = 0) -> None:
        super().__init__(
            address,
            (0x1B36, 0x0005),
            0x00FF00,
            subsystem=(0x1AF4, 0x1100),
            header_type=header_type,
            bars=[TestdevBar(self)],
            addresses=[bar_address],
            command=command,
        )
        self.armed = False
        self.registers: dict[int, int] = {}
        self._waiting: Parked | None = None
        self.reset_device()

    def reset_device(self) -> None:
        self.armed = False
        self._waiting = None
        self.registers = dict.fromkeys(_PLAIN, 0)
        self.registers[REG_RESULT] = RESULT_IDLE
        self.registers[REG_ATTRS] = _SPACE_NONSECURE << ATTRS_SPACE_SHIFT

    def load(self, offset: int) -> int:
        """A load of 4 bytes. Of the first register: go."""
        if offset == REG_TRIGGERING:
            if self._waiting is None:
                self._run()
            return 0
        return self.registers.get(offset, 0)

    def store(self, offset: int, value: int) -> None:
        """A store of 4 bytes."""
        if offset == REG_DBELL:
            self.armed = bool(value & DBELL_ARM)
            self._waiting = None
            self.registers[REG_RESULT] = RESULT_BUSY if self.armed else RESULT_IDLE
        elif offset in self.registers:
            self.registers[offset] = value

    def _run(self) -> None:
        if not self.armed:
            self.registers[REG_RESULT] = ERR_NOT_ARMED
            return
        result = self._transfer()
        if result is not None:
            self.registers[REG_RESULT] = result
            self.armed = False

    def _transfer(self, dropped: bool = False) -> int | None:
        """Write, and look; None while the write waits. `dropped`: the IOMMU ended it as if it had happened."""
        registers = self.registers
        length, attrs = registers[REG_LEN], registers[REG_ATTRS]
        if not length:
            return ERR_BAD_LEN
        secure = bool(attrs & ATTRS_SECURE)
        if attrs & ATTRS_SPACE_VALID:
            space = attrs >> ATTRS_SPACE_SHIFT & 3
            if space <= _SPACE_NONSECURE and secure != (space == _SPACE_SECURE):
                return ERR_BAD_ATTRS
            secure = space != _SPACE_NONSECURE
        if secure:
            return ERR_TX_FAIL
        pattern = (PATTERN.to_bytes(4, "little") * (length // 4 + 1))[:length]
        if not dropped:
            try:
                if not self._send(registers[REG_GVA_HI] << 32 | registers[REG_GVA_LO], pattern):
                    return ERR_TX_FAIL
            except Parked as parked:
                self._waiting = parked
                parked.then(partial(self._resume, parked))
                return None
        assert self.root is not None
        try:
            found = self.root.memory.read(registers[REG_GPA_HI] << 32 | registers[REG_GPA_LO], length)
        except BusAbort:
            return ERR_RD_FAIL
        return RESULT_OK if found == pattern else ERR_MISMATCH

    def _send(self, address: int, data: bytes) -> bool:
        """Write page by page; a refused piece does not keep the others from being written."""
        done, good = 0, True
        while done < len(data):
            at = address + done & (1 << 64) - 1
            size = min(len(data) - done, 4096 - (at & 4095))
            try:
                self.dma.write(at, data[done : done + size])
            except DmaAbort:
                good = False
            done += size
        return good

    def _resume(self, parked: Parked, outcome: Outcome) -> None:
        if self._waiting is not parked:
            return  # disarmed meanwhile
        self._waiting = None
        if outcome == Outcome.ABORT:
            result: int | None = ERR_TX_FAIL
        else:
            result = self._transfer(dropped=outcome == Outcome.RAZ_WI)
        if result is not None:
            self.registers[REG_RESULT] = result
            self.armed = False
