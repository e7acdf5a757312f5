"""Constants of a header, declared as plain module ints and still known by the release that brought them.

A header's module opens a table and declares each enum, or each run of #defines, in a `with` block::

    CONSTANTS = Constants(__name__)

    with CONSTANTS.enum("iommufd_hwpt_alloc_flags", since="6.7"):
        IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
        IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
        IOMMU_HWPT_FAULT_ID_VALID = const(1 << 2, since="6.11")

To mypy, and on hot paths, each name is an ordinary int of the module. The block notes every name that it sees defined,
so the table `CONSTANTS` (name -> `Constant`) is derived from the same lines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uapi.cstruct import OLDEST


@dataclass(frozen=True, slots=True)
class Constant:
    """One constant. `until` is the release that removed it; `was` an earlier value and the release that changed it."""

    name: str
    value: int
    kind: str
    enum: str | None
    since: str
    backports: tuple[str, ...] = ()
    until: str | None = None
    was: tuple[int, str] | None = None


class _Said(int):
    """An int with what `const` said of it, until the end of its block."""

    said: dict[str, Any]


def const(
    value: int,
    *,
    since: str | None = None,
    backports: tuple[str, ...] = (),
    until: str | None = None,
    was: tuple[int, str] | None = None,
) -> int:
    """A constant that came later than its block (`since`, and the stable releases in `backports`), went (`until`), or
    had another value before a release (`was=(value, release)`)."""
    noted = _Said(value)
    noted.said = {"since": since, "backports": backports, "until": until, "was": was}
    return noted


class Constants(dict[str, Constant]):
    """The constants of one module, by name, in the order of their declaration."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self._module = vars(sys.modules[module])

    @contextmanager
    def _block(self, kind: str, enum: str | None, since: str) -> Iterator[None]:
        before = set(self._module)
        yield
        for name in [name for name in self._module if name not in before]:
            value = self._module[name]
            said = {key: item for key, item in getattr(value, "said", {}).items() if item is not None}
            self[name] = Constant(name, int(value), kind, enum, **{"since": since, **said})
            self._module[name] = int(value)

    def enum(self, name: str | None = None, *, since: str = OLDEST) -> Any:
        """The enumerators of one enum; `name` None for an unnamed one."""
        return self._block("enum", name, since)

    def defines(self, *, since: str = OLDEST) -> Any:
        """A run of integer #defines."""
        return self._block("define", None, since)
