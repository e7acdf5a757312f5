"""What changed in the ABI between two tables, and whether a program built against the old one still works.

The rules, in the order in which a reviewer would ask them:

* What is added harms nobody. What is removed, or has another number or value, breaks whoever names it.
* A struct whose first member is its size (`size` in iommufd, `argsz` in VFIO) may grow at its end: the kernel knows
  which length the caller means. So may a capability, which carries its version (`struct vfio_info_cap_header` first).
  Any other struct must keep its size.
* A member must stay where it is, as long as it is. Reserved bytes may be given names, padding may be declared, and a
  member may gain an alternative name for its bytes (become part of a union).
* A count of an enum's members (`..._NUM_IRQS`) grows with the enum; programs do not depend on its value.

Left out: what the bytes mean. A field whose meaning changed shows up in the conformance suite, not here.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uapi import history, registry
from uapi.headers import HeaderError, read_headers
from uapi.layout import Layout, Member
from uapi.table import ConstantFact, IoctlFact, StructFact, Table, table_at
from uapi.version import MAINLINE, parse

_RESERVED = re.compile(r"_*(reserved|resv|pad)\d*$")
_COUNT = re.compile(r"_(NUM(_\w+)?|NR|COUNT|MAX)$")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `kind` is header, ioctl, struct, field or constant; `action` added, removed, moved, resized,
    retyped, realigned, split (reserved bytes), renumbered or changed; `words` the sentence for people."""

    kind: str
    action: str
    name: str
    compatible: bool
    words: str
    old: Any = None
    new: Any = None


@dataclass(frozen=True, slots=True)
class Diff:
    """The changes from one table to another, in the order of the newer header."""

    old: Table
    new: Table
    changes: tuple[Change, ...]

    @property
    def compatible(self) -> bool:
        return all(change.compatible for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        sides = {
            side: {"release": table.release, "arch": table.arch, "source": table.source, "headers": list(table.headers)}
            for side, table in (("old", self.old), ("new", self.new))
        }
        return {**sides, "compatible": self.compatible, "changes": [asdict(change) for change in self.changes]}


class DiffError(Exception):
    """A side of the comparison cannot be had; the message is one sentence."""


def load(side: str, arch: str = "x86_64") -> Table:
    """The table that an argument means: a directory of headers, a sampled release, or any release between 6.1 and 7.3.

    A release that was not sampled is cut from the declarations. DiffError for anything else.
    """
    if "/" in side or Path(side).is_dir():
        try:
            return read_headers(side, arch)
        except HeaderError as error:
            raise DiffError(str(error)) from None
    try:
        release = parse(side)
        recorded = history.tables(arch).get(side)
    except ValueError as error:
        raise DiffError(f"{error}, or a directory of headers.") from None
    except LookupError as error:
        raise DiffError(f"{error}.") from None
    if recorded is not None:
        return recorded
    if f"{release.major}.{release.minor}" not in MAINLINE:
        raise DiffError(f"{side} is not of a known release; known are {MAINLINE[0]} to {MAINLINE[-1]}.")
    table = table_at(side, arch)
    table.source += "; this release was not sampled"
    return table


def compare(old: Table, new: Table) -> Diff:
    """Everything that changed from `old` to `new`. DiffError where they are of different architectures."""
    if old.arch != new.arch:
        raise DiffError(f"a table of {old.arch} cannot be compared with one of {new.arch}.")
    return Diff(old, new, tuple(_Comparison(old, new).run()))


class _Comparison:
    def __init__(self, old: Table, new: Table) -> None:
        self.old, self.new = old, new
        self.changes: list[Change] = []

    def run(self) -> list[Change]:
        self._headers()
        self._ioctls()
        self._structs()
        self._constants()
        return self.changes

    def _add(self, kind: str, action: str, name: str, compatible: bool, words: str, *sides: Any) -> None:
        self.changes.append(Change(kind, action, name, compatible, words, *sides))

    def _headers(self) -> None:
        """A header that only one side has is one change, not one for each thing in it."""
        for table, other, action in ((self.new, self.old, "added"), (self.old, self.new, "removed")):
            for header in table.headers:
                if header not in other.headers:
                    counts = {
                        part: sum(fact.header == header for fact in getattr(table, part).values())
                        for part in ("ioctls", "structs", "constants")
                    }
                    inside = ", ".join(f"{count} {part}" for part, count in counts.items())
                    self._add("header", action, header, action == "added", f"{header}: {action}, with {inside}", counts)

    def _both(self, fact: IoctlFact | StructFact | ConstantFact) -> bool:
        return fact.header in self.old.headers and fact.header in self.new.headers

    def _ioctls(self) -> None:
        old, new = self.old.ioctls, self.new.ioctls
        for name, fact in new.items():
            if name in old and old[name].number != fact.number:
                words = f"{name}: number {old[name].number:#x} -> {fact.number:#x}"
                self._add("ioctl", "renumbered", name, False, words, old[name].number, fact.number)
            elif name not in old and self._both(fact):
                words = f"{name}: new ioctl {fact.number:#x}{_evidence(name)}"
                self._add("ioctl", "added", name, True, words, None, fact.number)
        for name, fact in old.items():
            if name not in new and self._both(fact):
                words = f"{name}: ioctl {fact.number:#x} is gone{_evidence(name)}"
                self._add("ioctl", "removed", name, False, words, fact.number)

    def _structs(self) -> None:
        old, new = self.old.structs, self.new.structs
        for name, fact in new.items():
            if name in old:
                self._layout(name, old[name].layout, fact.layout)
            elif self._both(fact):
                words = f"struct {name}: new, {fact.layout.size} bytes{_evidence(name)}"
                self._add("struct", "added", name, True, words, None, fact.layout.size)
        for name, fact in old.items():
            if name not in new and self._both(fact):
                words = f"struct {name}: gone{_evidence(name)}"
                self._add("struct", "removed", name, False, words, fact.layout.size)

    def _layout(self, name: str, old: Layout, new: Layout) -> None:
        growable = _growable(new)
        if new.size != old.size:
            grew = new.size > old.size
            why = growable if grew and growable else _NOT_GROWABLE if grew else "it may not shrink"
            words = f"struct {name}: {old.size} -> {new.size} bytes; {why}"
            self._add("struct", "resized", name, bool(grew and growable), words, old.size, new.size)
        elif new.align != old.align:
            words = (
                f"struct {name}: alignment {old.align} -> {new.align}; the same {new.size} bytes for the kernel, but a "
                "program that has it inside a struct of its own may place it elsewhere"
            )
            self._add("struct", "realigned", name, True, words, old.align, new.align)
        before, after = _paths(old.members), _paths(new.members)
        for path, member in after.items():
            if path in before:
                self._field(f"{name}.{path}", before[path], member)
            else:
                self._new_field(name, path, member, old, before, after, growable)
        for path, member in before.items():
            if path not in after:
                self._old_field(f"{name}.{path}", member, new, after)

    def _old_field(self, name: str, member: Member, new: Layout, after: dict[str, Member]) -> None:
        heirs = [key for key, other in after.items() if _overlap(member, other)]
        reserved = _RESERVED.search(name) is not None and member.offset + member.size <= new.size
        how = "gone"
        if reserved:
            how = f"its reserved bytes are {', '.join(heirs)} now" if heirs else "its reserved bytes are padding again"
        elif heirs:
            how += f"; its bytes are {', '.join(heirs)} now"
        words = f"{name}: {how}{_evidence(name)}"
        self._add("field", "removed", name, reserved, words, _place(member))

    def _field(self, name: str, old: Member, new: Member) -> None:
        if (old.offset, old.size, old.text) == (new.offset, new.size, new.text):
            return
        sides = _place(old), _place(new)
        if _RESERVED.search(name) and _overlap(old, new) and (old.offset, old.size) != (new.offset, new.size):
            # What became of the bytes that it gave or took is told by the members that have or had them.
            words = f"{name}: {old.size} reserved bytes at {old.offset} -> {new.size} at {new.offset}"
            self._add("field", "split", name, True, words, *sides)
        elif old.offset != new.offset:
            self._add("field", "moved", name, False, f"{name}: moved from byte {old.offset} to {new.offset}", *sides)
        elif old.size != new.size:
            words = f"{name}: {old.size} -> {new.size} bytes ({old.text} -> {new.text})"
            self._add("field", "resized", name, False, words, *sides)
        else:
            words = f"{name}: {old.text} -> {new.text}, the same bytes"
            self._add("field", "retyped", name, False, words, *sides)

    def _new_field(
        self,
        struct: str,
        path: str,
        member: Member,
        old: Layout,
        before: dict[str, Member],
        after: dict[str, Member],
        growable: str,
    ) -> None:
        name = f"{struct}.{path}"
        words = f"{name}: new, {member.text} at byte {member.offset}"
        covered = [key for key, other in before.items() if _overlap(member, other)]
        kept = [key for key in covered if key in after and _place(after[key]) == _place(before[key])]
        compatible = True
        if member.offset >= old.size or (not covered and member.offset + member.size > old.size):
            compatible = bool(growable)
            words += ", at the end"
        elif not covered:
            words += ", where padding was"
        elif all(_RESERVED.search(key) for key in covered):
            words += f", out of {', '.join(covered)}"
        elif kept == covered:
            words += f", sharing its bytes with {', '.join(kept)}"
        else:
            compatible = False
            words += f", over the bytes of {', '.join(key for key in covered if key not in kept)}"
        words += _evidence(name)
        self._add("field", "added", name, compatible, words, None, _place(member))

    def _constants(self) -> None:
        old, new = self.old.constants, self.new.constants
        for name, fact in new.items():
            if name in old and old[name].value != fact.value:
                self._changed_constant(name, old[name], fact)
            elif name not in old and self._both(fact):
                words = f"{name}: new, {_number(fact.value)}{_evidence(name)}"
                self._add("constant", "added", name, True, words, None, fact.value)
        for name, fact in old.items():
            if name not in new and self._both(fact):
                words = f"{name}: gone (was {_number(fact.value)}){_evidence(name)}"
                heir = f"__{name.partition('_')[0]}_RESERVED_{name.partition('_')[2]}"
                if heir in new and new[heir].value == fact.value:
                    words += f"; its number is kept as {heir}"
                self._add("constant", "removed", name, False, words, fact.value)

    def _changed_constant(self, name: str, old: ConstantFact, new: ConstantFact) -> None:
        words = f"{name}: {_number(old.value)} -> {_number(new.value)}"
        compatible = False
        if _COUNT.search(name) and new.kind == "enum" and new.value > old.value:
            stem = _COUNT.sub("", name)
            joined = [
                other
                for other, fact in self.new.constants.items()
                if other not in self.old.constants
                and other.startswith(stem)
                and fact.enum == new.enum
                and old.value <= fact.value < new.value
            ]
            if joined:
                compatible = True
                words += f"; it counts the members of its enum, which gained {', '.join(joined)}"
        self._add("constant", "changed", name, compatible, words, old.value, new.value)


_NOT_GROWABLE = "its first member is not its size, so the kernel cannot tell the old length from the new"


def _growable(layout: Layout) -> str:
    """Why a struct may grow at its end; empty where it may not."""
    first = layout.members[0] if layout.members else None
    if first is None:
        return ""
    if first.name in ("size", "argsz") and first.text == "__u32":
        return f"its first member `{first.name}` tells the kernel which length the caller means"
    if first.text == "struct vfio_info_cap_header":
        return "a capability may grow at its end: it carries its version, and where the next one starts"
    return ""


def _paths(members: tuple[Member, ...], prefix: str = "") -> dict[str, Member]:
    """Members by the path that a program writes: through unnamed unions, and by dots into a member's unnamed type."""
    found: dict[str, Member] = {}
    for member in members:
        if member.name is None:
            found.update(_paths(member.members, prefix))
        else:
            found[prefix + member.name] = member
            found.update(_paths(member.members, f"{prefix}{member.name}."))
    return found


def _place(member: Member) -> dict[str, Any]:
    return {"offset": member.offset, "size": member.size, "type": member.text}


def _overlap(a: Member, b: Member) -> bool:
    return a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _number(value: int) -> str:
    return str(value) if -10 < value < 10 else f"{value:#x}"


def _evidence(name: str) -> str:
    """A remark on what stable trees took over from a later release, so that their numbers and mainline's disagree."""
    struct, _, member = name.partition(".")
    backports: tuple[str, ...] = ()
    since = None
    if member and struct in registry.structs():
        for field in registry.structs()[struct]._info_.fields:
            if field.name == member:
                since, backports = field.spec.since, field.spec.backports
    elif name in registry.constants():
        constant = registry.constants()[name]
        since, backports = constant.since, constant.backports
    if not backports:
        return ""
    return f" [mainline: since {since}; stable: {', '.join(backports)} took it over]"
