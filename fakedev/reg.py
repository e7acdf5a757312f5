"""A register file: named registers with reset values, write masks and actions.

A device declares its registers once (`Register`); the file then does what every device does: a load or store of 4 bytes
may hit half of an 8-byte register, read-only bits keep, write-one-to-clear bits clear, holes read as zero and swallow
stores. What a store *does* is the action, which runs after the value has changed and gets (old, written).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

Action: TypeAlias = Callable[[int, int], None]


class Register:
    """One register. `writable` bits take the written value, `clears` bits are cleared by a one; the rest is read-only.

    With `action`, the register's value is whatever the mask left; the action may change it.
    """

    __slots__ = ("action", "clears", "name", "offset", "reset", "value", "width", "writable")

    def __init__(
        self,
        name: str,
        offset: int,
        width: int = 4,
        *,
        reset: int = 0,
        writable: int = 0,
        clears: int = 0,
        action: Action | None = None,
    ) -> None:
        self.name = name
        self.offset = offset
        self.width = width
        self.reset = self.value = reset
        self.writable = writable
        self.clears = clears
        self.action = action

    def __repr__(self) -> str:
        return f"<{self.name} at {self.offset:#x} = {self.value:#x}>"


class RegisterFile:
    """The registers of one device, by offset. Accesses are of 4 or 8 bytes, naturally aligned; others are ignored."""

    def __init__(self, registers: Iterable[Register]) -> None:
        self.by_name = {register.name: register for register in registers}
        self._at: dict[int, Register] = {}
        for register in self.by_name.values():
            for offset in range(register.offset, register.offset + register.width, 4):
                if offset in self._at:
                    raise ValueError(f"{register.name} overlaps {self._at[offset].name}")
                self._at[offset] = register

    def read(self, offset: int, width: int) -> int:
        """A load; 0 where there is nothing."""
        register = self._at.get(offset)
        if register is None or width < 4 or offset % width:
            return 0
        if register.width == width:
            return register.value
        if width == 8:
            return register.value | self.read(offset + 4, 4) << 32
        return register.value >> 8 * (offset - register.offset) & 0xFFFF_FFFF

    def write(self, offset: int, width: int, value: int) -> None:
        """A store."""
        register = self._at.get(offset)
        if register is None or width < 4 or offset % width:
            return
        if width > register.width:
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
            return
        old = register.value
        shift = 8 * (offset - register.offset)
        covered = (1 << 8 * width) - 1 << shift
        written = value << shift & covered
        mask = register.writable & covered
        register.value = (old & ~mask | written & mask) & ~(written & register.clears)
        if register.action is not None:
            register.action(old, written)

    def reset(self) -> None:
        """Back to the reset values, without actions."""
        for register in self.by_name.values():
            register.value = register.reset
