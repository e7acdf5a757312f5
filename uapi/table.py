"""The ABI at one release as plain facts: what `uapi diff` compares and `uapi/history` keeps.

A table comes from the declarations cut down to a release (`table_at`), from a recorded sample (`uapi.history`), or from
a header tree by the compiler (`uapi.headers`); the three are equal where the declarations are right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from uapi import registry
from uapi.layout import Layout, Member, exists, layout_at, value_at
from uapi.version import parse


@dataclass(frozen=True, slots=True)
class IoctlFact:
    """An ioctl's header and its full 32-bit number."""

    header: str
    number: int


@dataclass(frozen=True, slots=True)
class StructFact:
    """A struct's header and layout."""

    header: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class ConstantFact:
    """A constant's header, value, kind ("enum" or "define") and the name of its enum, if that has one."""

    header: str
    value: int
    kind: str
    enum: str | None


@dataclass(slots=True)
class Table:
    """The ABI of some headers at a release, on an architecture; `source` says in words where the facts are from."""

    release: str
    arch: str
    source: str
    headers: tuple[str, ...]
    ioctls: dict[str, IoctlFact] = field(default_factory=dict)
    structs: dict[str, StructFact] = field(default_factory=dict)
    constants: dict[str, ConstantFact] = field(default_factory=dict)


def table_at(release: str, arch: str = "x86_64") -> Table:
    """The declared ABI at a release, without the mock driver's. ValueError for what is no release name."""
    parse(release)
    table = Table(release, arch, "this project's declarations", ())
    for header in registry.HEADERS:
        for name, ioctl in registry.ioctls(header).items():
            if exists(ioctl, release):
                table.ioctls[name] = IoctlFact(header, ioctl.number)
        for name, struct in registry.structs(header).items():
            if exists(struct, release):
                table.structs[name] = StructFact(header, layout_at(struct, release, arch))
        for name, constant in registry.constants(header).items():
            value = value_at(constant, release)
            if value is not None:
                table.constants[name] = ConstantFact(header, value, constant.kind, constant.enum)
    facts: list[IoctlFact | StructFact | ConstantFact] = [
        *table.ioctls.values(),
        *table.structs.values(),
        *table.constants.values(),
    ]
    present = {fact.header for fact in facts}
    table.headers = tuple(header for header in registry.HEADERS if header in present)
    return table


def to_json(table: Table) -> dict[str, Any]:
    """The table as JSON values. Members become [name, offset, size, type, align, members]."""
    return {
        "release": table.release,
        "arch": table.arch,
        "source": table.source,
        "headers": list(table.headers),
        "ioctls": {name: [fact.header, fact.number] for name, fact in table.ioctls.items()},
        "structs": {
            name: [fact.header, fact.layout.size, fact.layout.align, _members_to_json(fact.layout.members)]
            for name, fact in table.structs.items()
        },
        "constants": {name: [fact.header, fact.value, fact.kind, fact.enum] for name, fact in table.constants.items()},
    }


def from_json(data: dict[str, Any]) -> Table:
    """The table that `to_json` wrote."""
    return Table(
        data["release"],
        data["arch"],
        data["source"],
        tuple(data["headers"]),
        {name: IoctlFact(*row) for name, row in data["ioctls"].items()},
        {
            name: StructFact(header, Layout(size, align, _members_from_json(members)))
            for name, (header, size, align, members) in data["structs"].items()
        },
        {name: ConstantFact(*row) for name, row in data["constants"].items()},
    )


def _members_to_json(members: tuple[Member, ...]) -> list[Any]:
    return [[m.name, m.offset, m.size, m.text, m.align, _members_to_json(m.members)] for m in members]


def _members_from_json(rows: list[Any]) -> tuple[Member, ...]:
    return tuple(
        Member(name, offset, size, text, align, _members_from_json(inner))
        for name, offset, size, text, align, inner in rows
    )
