"""A struct as an earlier release, or another architecture, lays it out.

The declarations say when each member came and what it was before; ctypes lays out the newest shape only. This module
applies C's rules to the members that a release has: each at the next multiple of its alignment, the whole rounded up to
the largest. Architectures: x86_64, and i386 with its 4-byte aligned 64-bit integers and 4-byte pointers. Left out: bit
fields, which no mirrored struct has.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from uapi.constants import Constant
from uapi.cstruct import Field, resolve
from uapi.ioctl import Ioctl
from uapi.registry import AnyStruct
from uapi.version import NEWEST, includes

ARCHES = ("x86_64", "i386")


@dataclass(frozen=True, slots=True)
class Member:
    """One member at its place: `offset` in bytes from the start of the outermost struct.

    `text` is the header's type ("__u32", "__u8[]", "struct vfio_bitmap", "union <anonymous>"); `align` the alignment
    that the header asks for beyond the type's own; `members` those of a struct or union without a name of its own. An
    unnamed member's `name` is None.
    """

    name: str | None
    offset: int
    size: int
    text: str
    align: int | None
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A struct's size and alignment in bytes, and its members in order."""

    size: int
    align: int
    members: tuple[Member, ...]

    def flat(self) -> dict[str, Member]:
        """The members that C reaches by one name, those of unnamed unions and structs included."""
        found: dict[str, Member] = {}

        def collect(members: tuple[Member, ...]) -> None:
            for member in members:
                if member.name is None:
                    collect(member.members)
                else:
                    found[member.name] = member

        collect(self.members)
        return found


def exists(thing: Ioctl[Any] | AnyStruct | Constant | Field, release: str) -> bool:
    """Whether the release has an ioctl, struct, constant or member (asked of a struct that it has)."""
    if isinstance(thing, Field):
        since = thing.spec.since
        return since is None or includes(release, since, thing.spec.backports)
    if isinstance(thing, Constant) and thing.until is not None and includes(release, thing.until):
        return False
    info = thing._info_ if isinstance(thing, type) else thing
    return includes(release, info.since, info.backports)


def value_at(constant: Constant, release: str) -> int | None:
    """A constant's value at a release, None where the release has no such name."""
    if not exists(constant, release):
        return None
    if constant.was is not None and not includes(release, constant.was[1]):
        return constant.was[0]
    return constant.value


def layout_at(struct: AnyStruct, release: str = NEWEST, arch: str = "x86_64") -> Layout:
    """The layout of a struct at a release. LookupError where the release has no such struct."""
    if arch not in ARCHES:
        raise ValueError(f"layout is known for {' and '.join(ARCHES)}, not for {arch!r}")
    if not exists(struct, release):
        raise LookupError(f"{struct.__name__} is not in {release}: it came in {struct._info_.since}")
    return _layout(struct, release, arch, 0)


def sizes_at(ioctl: Ioctl[Any], release: str, arch: str = "x86_64") -> tuple[int, int] | None:
    """(smallest accepted size, full size) in bytes of an ioctl's struct at a release; None where it has no such ioctl.

    (0, 0) for an ioctl without a struct.
    """
    if not exists(ioctl, release):
        return None
    if ioctl.struct is None:
        return 0, 0
    layout = layout_at(ioctl.struct, release, arch)
    if ioctl.last is None:
        return layout.size, layout.size
    last = layout.flat()[ioctl.last]
    return last.offset + last.size, layout.size


def _layout(struct: AnyStruct, release: str, arch: str, base: int) -> Layout:
    is_union = issubclass(struct, ctypes.Union)
    packed = struct._info_.packed
    offset = end = 0
    align = 1
    members: list[Member] = []
    for field in _fields(struct, release):
        member, own = _place(field, release, arch, base, 0 if is_union else offset, packed)
        members.append(member)
        align = max(align, own)
        offset = member.offset - base + member.size
        end = max(end, offset)
    return Layout(-(-end // align) * align, align, tuple(members))


def _fields(struct: AnyStruct, release: str) -> list[Field]:
    """The members that a release has. Until an unnamed union came, its older member stood alone in its place."""
    present: list[Field] = []
    for field in struct._info_.fields:
        if exists(field, release):
            present.append(field)
        elif field.spec.anonymous:
            present += _fields(field.ctype, release)
    return present


def _place(field: Field, release: str, arch: str, base: int, offset: int, packed: bool) -> tuple[Member, int]:
    ctype, text, align, pointer, count = field.ctype, field.text, field.align, field.pointer, field.spec.count
    was = field.spec.was
    if was is not None and not includes(release, was.until, was.backports):
        ctype, text, align, pointer = resolve(was.ctype)
        count = None
    members: tuple[Member, ...] = ()
    if pointer:
        size = own = 4 if arch == "i386" else 8
    elif issubclass(ctype, ctypes.Structure | ctypes.Union):
        inner = _layout(ctype, release, arch, 0)
        size, own = inner.size, inner.align
    else:
        size = ctypes.sizeof(ctype)
        own = min(size, 4) if arch == "i386" else size
    own = 1 if packed else max(own, align or 1)
    offset = -(-offset // own) * own
    if text.endswith("<anonymous>"):
        members = _layout(ctype, release, arch, base + offset).members
    if count is not None:
        size *= count
        text += f"[{count or ''}]"
    name = None if field.spec.anonymous else field.name
    return Member(name, base + offset, size, text, align, members), own
