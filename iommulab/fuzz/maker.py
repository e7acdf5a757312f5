"""How a generator makes calls: what its actions share."""

from __future__ import annotations

import random

from iommulab.fuzz.program import Call, Value
from iommulab.fuzz.spoil import spoil, within_a_page
from iommulab.fuzz.world import World

#: The part of all calls in which something is made wrong.
SPOILED = 0.14


class Maker:
    """Adds calls to a program and keeps its world."""

    def __init__(self, rng: random.Random, dmabuf: bool = False) -> None:
        #: Whether the kernel's DMABUF_GET returns what it made.
        self.dmabuf = dmabuf
        self.rng = rng
        self.calls: list[Call] = []
        self.spoiled = SPOILED
        self.world = World(rng, aligned=rng.random() < 0.35)

    def add(self, name: str, **fields: Value) -> str | None:
        """Add a call, perhaps spoiled; "@N." to refer to it, or None where it was spoiled."""
        call = self.sure(name, **fields)
        spoiled = self.coin(self.spoiled) and spoil(self.calls[-1], self.world)
        return None if spoiled else call

    def sure(self, name: str, **fields: Value) -> str:
        """Add a call as it is."""
        self.calls.append(Call(name, {key: value for key, value in fields.items() if value != 0}))
        if name == "IOMMU_HW_QUEUE_ALLOC":
            within_a_page(self.calls[-1])
        return f"@{len(self.calls) - 1}."

    def coin(self, chance: float) -> bool:
        return self.rng.random() < chance

    def virtual(self, known: bool = False) -> int:
        """A virtual device id."""
        if self.world.virtual and self.coin(0.8 if known else 0.15):
            return self.rng.choice(self.world.virtual)
        return self.rng.choice((0, 1, 2, 3, 0x99, 0xFFFFFFFF))
