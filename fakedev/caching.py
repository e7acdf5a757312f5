"""How much the caches of a machine keep: everything, nothing, or what chance says.

The manuals let hardware keep what it read until an invalidation names it, and let it forget anything at any time
(VT-d 6.2, Arm IHI 0070 3.21). Software is right only if it is right on all of these machines: `always` finds what it
forgets to invalidate, `never` what it counts on being kept, `random` what needs both. The caches meant are those of
contexts, PASIDs, STEs and CDs, of translations and of the tables above them, of device TLBs, and with VT-d's caching
mode of what is not there. LEAVES is what a unit does by itself, and QEMU's emulations do: all but the tables.

Left out: prefetching of what no request asked for, and limits of size.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

CHOICES = "always, never, random or random:SEED"


class Caching:
    """One machine's way. `keep()` is asked before each insertion, `tables` says whether walks are kept, too.

    `shortcuts`: ports may go on with a translation without asking their IOMMU, which they lose with every invalidation.
    """

    __slots__ = ("_droppers", "_random", "keep", "name", "shortcuts", "tables")

    def __init__(self, name: str, *, tables: bool, keeps: bool = True, random: Random | None = None) -> None:
        self.name = name
        self.tables = tables
        self.shortcuts = keeps and random is None
        self._random = random
        self._droppers: list[Callable[[], None]] = []
        self.keep: Callable[[], bool] = (lambda: keeps) if random is None else (lambda: random.random() < 0.6)

    def droppable(self, *droppers: Callable[[], None]) -> None:
        """Caches that may be emptied at any time, each by a call."""
        self._droppers += droppers

    def before_request(self) -> None:
        """With chance: one request in three finds one of the caches empty."""
        if self._random is not None and self._droppers and self._random.random() < 1 / 3:
            self._random.choice(self._droppers)()


#: Translations and configurations are kept, tables are walked anew.
LEAVES = Caching("leaves", tables=False)


def caching(text: str) -> Caching:
    """The way that `text` names. ValueError."""
    name, separator, seed = text.partition(":")
    if text == "always":
        return Caching(text, tables=True)
    if text == "never":
        return Caching(text, tables=False, keeps=False)
    if name == "random" and (not separator or seed.isdecimal()):
        return Caching(f"random:{int(seed or 0)}", tables=True, random=Random(int(seed or 0)))
    raise ValueError(f"caching is {CHOICES}, not {text!r}")
