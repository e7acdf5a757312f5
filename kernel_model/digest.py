"""What a kernel holds, as one value that can be compared: to find what a failed call has left behind.

`digest` walks from the kernel's roots over every object of the model and keeps its plain attributes: objects and their
users, areas, pins and charges, attachments, descriptors, the domains of groups. It knows no class but those below, so
that a new one is covered from its first day. Left out of it is what means nothing to a client and may differ after a
call that failed: free lists, caches, what a `Pages` keeps alive beyond its pins, and table pages, which stay with their
domain. `leftovers` says what is still there once everything is closed, those included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernel_model.fault_injection import FaultInjection
from kernel_model.file import SystemCall
from kernel_model.iommufd.pages import Pages

if TYPE_CHECKING:
    from kernel_model.kernel import Kernel

#: By class name: attributes that are not looked at.
_IGNORED = {
    "ObjectTable": {"_free", "_next"},
    "IoPagetable": {"_holes"},
    "Context": {"_entries", "_last", "kernel"},
    "Pages": {"_holds", "_pinned", "kernel"},
    "AccessFile": {"next_id"},
    "MockIommu": {"_free", "_next"},
    # Made at first use, and kept.
    "Group": {"blocking_domain"},
    # Where the window of doorbells is: noted before anything can fail, and not taken back.
    "IommufdGroup": {"sw_msi_start"},
    "VfioPciDevice": {"_saved", "reset_works"},
    "PublishedPages": {"_fd"},
    "Mm": {
        "alive",
        "places",
        "_new_place",
        "pins",
        "buffers",
        "_local",
        "_remote",
        "_local_address",
        "_remote_address",
        "_maps_fd",
        "_query_works",
    },
}
#: Classes that are named and not entered.
_OPAQUE = {
    "Kernel",
    "PageAllocator",
    "IntelUnit",
    "IntelIommu",
    "SmmuDevice",
    "ArmSmmuV3",
    "Master",
    "PageTable",
    "CacheTags",
    "Interrupts",
    "GicInterrupts",
    "FileSystem",
}
_PLAIN = (int, str, bytes, float, bool, type(None))

#: (object's number, its class, attribute, value)
Fact = tuple[int, str, str, object]


class _Walk:
    """One walk: objects are numbered as they are found."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._queue: deque[Any] = deque()
        self.facts: list[Fact] = []

    def value(self, found: Any) -> object:
        kind = type(found)
        if kind in _PLAIN:
            return found
        if isinstance(found, (list, tuple, deque)):
            return tuple(self.value(one) for one in found)
        if isinstance(found, dict):
            pairs = [(self.value(key), self.value(one)) for key, one in found.items()]
            return tuple(sorted(pairs, key=repr))
        if isinstance(found, (set, frozenset)):
            return tuple(sorted((self.value(one) for one in found), key=repr))
        if isinstance(found, int):
            return int(found)
        if not kind.__module__.startswith("kernel_model.") or isinstance(found, (SystemCall, FaultInjection)):
            return kind.__name__
        if kind.__name__ in _OPAQUE:
            return kind.__name__
        number = self._numbers.get(id(found))
        if number is None:
            number = self._numbers[id(found)] = len(self._numbers)
            self._queue.append(found)
        return (kind.__name__, number)

    def run(self) -> None:
        while self._queue:
            found = self._queue.popleft()
            number, name = self._numbers[id(found)], type(found).__name__
            for attribute, value in _attributes(found):
                self.facts.append((number, name, attribute, self.value(value)))


_slots: dict[type, tuple[tuple[str, ...], frozenset[str]]] = {}


def _attributes(found: Any) -> Iterator[tuple[str, Any]]:
    kind = type(found)
    if kind not in _slots:
        names = [name for base in kind.__mro__ for name in _names(base)]
        ignored = frozenset().union(*(_IGNORED.get(base.__name__, set()) for base in kind.__mro__))
        _slots[kind] = tuple(name for name in names if name not in ignored), ignored
    names_, ignored = _slots[kind]
    for name in names_:
        yield name, getattr(found, name, None)
    for name, value in getattr(found, "__dict__", {}).items():
        if name not in ignored:
            yield name, value
    if isinstance(found, Pages):
        yield "pinned", _pins(found)


def _names(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _pins(pages: Pages) -> list[tuple[int, int, int]]:
    """(first, last, count) of what is pinned, neighbours with one count together."""
    joined: list[tuple[int, int, int]] = []
    for first, last, count in pages.pins():
        if joined and joined[-1][1] + 1 == first and joined[-1][2] == count:
            joined[-1] = joined[-1][0], last, count
        else:
            joined.append((first, last, count))
    return joined


def digest(kernel: Kernel) -> list[Fact]:
    """All facts, in the order of the walk. Two of one kernel are equal if it holds the same."""
    walk = _Walk()
    walk.facts.append((-1, "Kernel", "descriptions", walk.value([one.description for one in kernel.descriptors()])))
    walk.facts.append((-1, "Kernel", "contexts", len(kernel.contexts)))
    walk.facts.append((-1, "Kernel", "devices", walk.value(kernel.devices)))
    walk.facts.append((-1, "Kernel", "mock", walk.value(kernel.mock_iommu)))
    walk.facts.append((-1, "Kernel", "mms", walk.value([process.mm for process in kernel.processes()])))
    walk.facts.append(
        (-1, "Kernel", "users", tuple(sorted((one.uid, one.locked_vm) for one in kernel.users() if one.locked_vm)))
    )
    walk.facts.append((-1, "Kernel", "work", len(kernel.queue)))
    walk.run()
    return walk.facts


def difference(before: list[Fact], after: list[Fact]) -> list[str]:
    """What is in one of them only, a line each."""
    old, new = {repr(fact) for fact in before}, {repr(fact) for fact in after}
    lines = [f"was {fact[1]}#{fact[0]}.{fact[2]} = {fact[3]!r}" for fact in before if repr(fact) not in new]
    return lines + [f"is {fact[1]}#{fact[0]}.{fact[2]} = {fact[3]!r}" for fact in after if repr(fact) not in old]


def leftovers(kernel: Kernel) -> list[str]:
    """What is held though no descriptor is open, a line each: leaks."""
    if kernel.descriptors():
        return []
    found = [f"{len(kernel.contexts)} contexts"] if kernel.contexts else []
    found += [f"{len(kernel.shared_files)} shared files"] if len(kernel.shared_files) else []
    mm = kernel.process.mm
    for name in ("pinned_vm", "locked_vm", "pins"):
        if getattr(mm, name):
            found.append(f"{name} {getattr(mm, name)}")
    found += [f"user {user.uid} pays for {user.locked_vm}" for user in kernel.users() if user.locked_vm]
    if kernel.pages.live != kernel.pages_at_boot:
        found.append(f"{kernel.pages.live - kernel.pages_at_boot} pages of tables")
    return found
