"""`iommulab uapi list | show NAME | diff OLD NEW`: the mirrored ABI, readably, and what changed in it.

Exit status: 0; 1 where `diff` found an incompatible change; 2 with one sentence on bad input.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iommulab.errors import UserError
from uapi import registry
from uapi.cstruct import OLDEST, resolve
from uapi.diff import Diff, DiffError, compare, load
from uapi.layout import ARCHES, Layout, Member, exists, layout_at, sizes_at, value_at
from uapi.version import MAINLINE, NEWEST, parse

_ALL_HEADERS = (*registry.HEADERS, registry.TEST_HEADER)


def add_parser(subparsers: Any) -> None:
    """Add `uapi` and its three commands to the top parser's sub-commands."""
    top = subparsers.add_parser("uapi", help="the ABI of iommufd and VFIO: list it, show it, compare releases")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    lister = commands.add_parser("list", help="every ioctl (or struct, or constant)")
    lister.add_argument("what", nargs="?", choices=("ioctls", "structs", "constants"), default="ioctls")
    lister.add_argument(
        "--header", metavar="NAME", help="only one header: iommufd, vfio, vfio_zdev, vfio_ccw, iommufd_test"
    )
    lister.set_defaults(run=run, uapi=_list)

    shower = commands.add_parser("show", help="one ioctl, struct, enum or constant")
    shower.add_argument("name", metavar="NAME")
    shower.add_argument("--arch", choices=ARCHES, default="x86_64")
    shower.set_defaults(run=run, uapi=_show)

    differ = commands.add_parser(
        "diff",
        help="what changed between two releases or header trees; exit 1 on an incompatible change",
        description="OLD and NEW are releases (6.6, 6.13-rc7, 6.12.95) or directories of headers: a kernel source, "
        "or what `make headers_install` wrote.",
    )
    differ.add_argument("old", metavar="OLD")
    differ.add_argument("new", metavar="NEW")
    differ.add_argument("--arch", choices=ARCHES, default="x86_64")
    differ.set_defaults(run=run, uapi=_diff)

    for command in (lister, shower):
        command.add_argument("--release", default=NEWEST, metavar="R", help=f"as of a release (default {NEWEST})")
    for command in (lister, shower, differ):
        command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the chosen command. UserError for what cannot be done."""
    if hasattr(args, "release"):
        _check_release(args.release)
    status: int = args.uapi(args)
    return status


def _check_release(name: str) -> None:
    try:
        release = parse(name)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if f"{release.major}.{release.minor}" not in MAINLINE:
        raise UserError(f"{name} is not of a known release; known are {MAINLINE[0]} to {MAINLINE[-1]}.")


def _console() -> Console:
    # A pipe has no width: wide enough for the longest row, so that nothing is cut.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("value", "offset", "size", "at least")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


# --- list


def _list(args: argparse.Namespace) -> int:
    rows = list(_rows(args.what, _headers(args.header), args.release))
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = _grid(*(key.replace("_", " ") for key in (rows[0] if rows else {"nothing": ""})))
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row.values()))
    console = _console()
    console.print(table)
    console.print(f"{len(rows)} {args.what} at {args.release}")
    return 0


def _headers(wanted: str | None) -> tuple[str, ...]:
    if wanted is None:
        return tuple(registry.HEADERS)
    for header in _ALL_HEADERS:
        if wanted in (header, header.removeprefix("linux/"), header.removeprefix("linux/").removesuffix(".h")):
            return (header,)
    raise UserError(f"there is no header {wanted!r}; there are {', '.join(_ALL_HEADERS)}.")


def _rows(what: str, headers: tuple[str, ...], release: str) -> Iterator[dict[str, Any]]:
    if what == "ioctls":
        for name, ioctl in registry.ioctls(*headers).items():
            sizes = sizes_at(ioctl, release)
            if sizes is not None:
                argument = ioctl.struct.__name__ if ioctl.struct else f"({ioctl.argument})"
                yield {
                    "number": f"{ioctl.number:#x}",
                    "name": name,
                    "argument": argument,
                    "at_least": sizes[0] if ioctl.struct else None,
                    "size": sizes[1] if ioctl.struct else None,
                    "since": _since(ioctl.since),
                    "area": ioctl.area,
                }
    elif what == "structs":
        for name, struct in registry.structs(*headers).items():
            if exists(struct, release):
                size = layout_at(struct, release).size
                yield {"name": name, "size": size, "since": _since(struct._info_.since), "what": _doc(struct)}
    else:
        for name, constant in registry.constants(*headers).items():
            value = value_at(constant, release)
            if value is not None:
                yield {"name": name, "value": value, "since": _since(constant.since), "enum": constant.enum}


def _since(release: str) -> str:
    return f"≤{OLDEST}" if release == OLDEST else release


def _doc(struct: registry.AnyStruct) -> str:
    return (struct.__doc__ or "").strip()


# --- show


def _show(args: argparse.Namespace) -> int:
    facts = _facts(args.name, args.release, args.arch)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    console = _console()
    for fact in facts:
        _print_fact(console, fact)
    return 0


def _facts(name: str, release: str, arch: str) -> list[dict[str, Any]]:
    """What there is to say about a name: an ioctl and its struct, a struct, an enum, or a constant with its enum."""
    ioctls, structs = registry.ioctls(*_ALL_HEADERS), registry.structs(*_ALL_HEADERS)
    constants = registry.constants(*_ALL_HEADERS)
    enums = {constant.enum for constant in constants.values() if constant.enum}
    if name in ioctls:
        ioctl = ioctls[name]
        sizes = sizes_at(ioctl, release, arch)
        if sizes is None:
            raise UserError(f"{name} is not in {release}: it came in {ioctl.since}.")
        fact = {
            "ioctl": name,
            "header": registry.header_of(ioctl),
            "number": ioctl.number,
            "argument": ioctl.struct.__name__ if ioctl.struct else ioctl.argument,
            "min_size": sizes[0],
            "size": sizes[1],
            "last_required": ioctl.last,
            "since": _since(ioctl.since),
            "area": ioctl.area,
        }
        return [fact, *(_facts(ioctl.struct.__name__, release, arch) if ioctl.struct else [])]
    if name in structs:
        struct = structs[name]
        try:
            layout = layout_at(struct, release, arch)
        except LookupError as error:
            raise UserError(f"{error}.") from None
        return [
            {
                "struct": name,
                "header": registry.header_of(struct),
                "what": _doc(struct),
                "size": layout.size,
                "align": layout.align,
                "since": _since(struct._info_.since),
                "members": list(_member_rows(struct, layout)),
            }
        ]
    if name in enums or name in constants:
        enum = name if name in enums else constants[name].enum
        chosen = [c for c in constants.values() if (c.enum == enum if enum else c.name == name)]
        rows = [
            {
                "name": c.name,
                "value": value_at(c, release),
                "since": _since(c.since),
                "until": c.until,
                "note": _note(c),
            }
            for c in chosen
            if exists(c, release)
        ]
        if not rows:
            raise UserError(f"{name} is not in {release}: it came in {chosen[0].since}.")
        return [{"enum": enum, "header": registry.header_of(chosen[0]), "constants": rows}]
    near = difflib.get_close_matches(name.upper(), [*ioctls, *constants], 3) or difflib.get_close_matches(
        name, [*structs, *enums], 3
    )
    raise UserError(f"there is no {name!r} in the ABI{'; did you mean ' + ', '.join(near) if near else ''}.")


def _note(constant: Any) -> str:
    parts = []
    if constant.backports:
        parts.append(f"also in {', '.join(constant.backports)} and later of those trees")
    if constant.was:
        parts.append(f"{constant.was[0]} before {constant.was[1]}")
    return "; ".join(parts)


def _member_rows(struct: registry.AnyStruct, layout: Layout) -> Iterator[dict[str, Any]]:
    said: dict[str | None, tuple[str, str]] = {}

    def collect(of: registry.AnyStruct, since: str) -> None:
        for field in of._info_.fields:
            came = field.spec.since or since
            notes = [f"also in {', '.join(field.spec.backports)}"] if field.spec.backports else []
            if field.spec.was:
                text, align = resolve(field.spec.was.ctype)[1:3]
                before = text if text != field.text or field.spec.count is not None else f"{text}, unaligned"
                notes.append(f"{before} before {field.spec.was.until}" if not align else "")
            said[field.name] = came, "; ".join(notes)
            if field.spec.anonymous or field.text.endswith("<anonymous>"):
                # Before an unnamed union came, its older member stood alone.
                collect(field.ctype, since if field.spec.anonymous else came)

    collect(struct, struct._info_.since)

    def walk(members: tuple[Member, ...], depth: int) -> Iterator[dict[str, Any]]:
        for member in members:
            since, note = said.get(member.name, ("", ""))
            yield {
                "offset": member.offset,
                "size": member.size,
                "type": member.text,
                "name": member.name,
                "depth": depth,
                "since": _since(since),
                "note": note,
            }
            yield from walk(member.members, depth + 1)

    yield from walk(layout.members, 0)


def _print_fact(console: Console, fact: dict[str, Any]) -> None:
    if "ioctl" in fact:
        console.print(Text.assemble((fact["ioctl"], "bold"), f" = {fact['number']:#x}  ({fact['header']})"))
        console.print(f"  since {fact['since']}, area {fact['area']}, argument {fact['argument']}", markup=False)
        if fact["size"]:
            console.print(
                f"  {fact['size']} bytes; the kernel insists on {fact['min_size']}"
                + (f", up to `{fact['last_required']}`" if fact["last_required"] else "")
            )
        console.print()
    elif "struct" in fact:
        console.print(Text.assemble("struct ", (fact["struct"], "bold"), f"  ({fact['header']})"))
        console.print(f"  {fact['what']}", markup=False)
        console.print(f"  {fact['size']} bytes, aligned to {fact['align']}, since {fact['since']}\n")
        table = _grid("offset", "size", "type", "member", "since", "")
        for row in fact["members"]:
            name = "  " * row["depth"] + (row["name"] or "")
            since = row["since"] if row["since"] != fact["since"] else ""
            table.add_row(str(row["offset"]), str(row["size"]), Text(row["type"]), name, since, row["note"])
        console.print(table)
    else:
        kind = f"enum {fact['enum']}" if fact["enum"] else "constant"
        console.print(Text.assemble((kind, "bold"), f"  ({fact['header']})"))
        table = _grid("value", "name", "since", "")
        for row in fact["constants"]:
            until = f"gone in {row['until']}" if row["until"] else ""
            table.add_row(_hex(row["value"]), row["name"], row["since"], "; ".join(filter(None, (row["note"], until))))
        console.print(table)


def _hex(value: int) -> str:
    return str(value) if -10 < value < 10 else f"{value:#x}"


# --- diff


def _diff(args: argparse.Namespace) -> int:
    try:
        found = compare(load(args.old, args.arch), load(args.new, args.arch))
    except DiffError as error:
        raise UserError(str(error)) from None
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print_diff(_console(), found)
    return 0 if found.compatible else 1


def _print_diff(console: Console, found: Diff) -> None:
    for side, table in (("old", found.old), ("new", found.new)):
        console.print(
            f"{side}: {table.release} {table.arch}, {table.source}", style="dim", markup=False, soft_wrap=True
        )
    for change in found.changes:
        mark, style = (" ", "") if change.compatible else ("!", "red")
        console.print(Text(f"{mark} {change.words}", style=style), soft_wrap=True)
    broken = [change for change in found.changes if not change.compatible]
    if not found.changes:
        console.print("no change")
    elif broken:
        console.print(f"{len(found.changes)} changes, {len(broken)} of them incompatible (marked !)")
    else:
        console.print(f"{len(found.changes)} changes, all compatible")
