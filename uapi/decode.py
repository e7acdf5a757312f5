"""What a recorded log says: calls decoded by the declarations of `uapi`, and made the same in every run.

The log (`uapi.trace`) is replayed from its start, so that a descriptor or an address gets its token by the moment it
was used. Object ids, IOVAs and errnos stay as they are: the kernel chooses them by rule.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from uapi import registry
from uapi.constants import Constant
from uapi.cstruct import Struct, Union, fields_of
from uapi.ioctl import Ioctl
from uapi.iommufd_test import IOMMU_TEST_OP_DMABUF_GET, TEST_OP_MEMBERS, iommu_test_cmd

#: One decoded call, ready for JSON. Keys: call, file, in, and either ret with out, or errno; and where they apply
#: client, why (the model's reason), times (identical calls in a row), volatile (outputs that differ from run to run).
Call: TypeAlias = "dict[str, Any]"

#: One raw entry of a log: its kind, then what `uapi.trace` put there.
Event: TypeAlias = "tuple[Any, ...]"

_PAGE = 4096


def _declared() -> dict[int, list[Ioctl[Any]]]:
    """Every declared ioctl by its number. A few VFIO numbers have two meanings, told apart by struct or file."""
    table: dict[int, list[Ioctl[Any]]] = {}
    for ioctl in [*registry.ioctls().values(), *registry.ioctls(registry.TEST_HEADER).values()]:
        table.setdefault(ioctl.number, []).append(ioctl)
    return table


IOCTLS = _declared()
_BY_NAME = {ioctl.name: ioctl for ioctls in IOCTLS.values() for ioctl in ioctls}


class _Names:
    """Tokens for what differs from run to run, as the log goes by."""

    def __init__(self) -> None:
        self.files: dict[int, str] = {}
        self.fds: dict[tuple[int, int], str] = {}
        self.paths: dict[int, tuple[int, int]] = {}
        self.areas: dict[int, tuple[int, str, int, int]] = {}
        self.counts: dict[str, int] = {}

    def new(self, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind}{self.counts[kind]}"

    def file(self, client: int, serial: int, fd: int) -> None:
        token = self.fds.get((client, fd)) or self.new("fd")
        self.files[serial] = self.fds[client, fd] = token
        self.paths[serial] = (client, fd)

    def closed(self, serial: int) -> None:
        self.fds.pop(self.paths.get(serial, (0, -1)), None)

    def fd(self, client: int, value: int, out: bool) -> int | str:
        if value < 0:
            return value
        known = self.fds.get((client, value))
        if known is None and out:
            known = self.fds[client, value] = self.new("fd")
        return known or ("fd?" if value < 1024 else value)

    def pointer(self, client: int, value: int) -> int | str:
        """An address as buffer + offset; other user addresses of a 64-bit process become `ptr`."""
        if value < 1 << 16:
            return value
        end = None
        for owner, token, start, length in self.areas.values():
            if owner == client and start <= value < start + length:
                return f"{token}+{value - start:#x}"
            if owner == client and value == start + length:
                end = f"{token}+{length:#x}"
        if end is None and 1 << 32 <= value < 1 << 47:
            return f"ptr+{value % _PAGE:#x}"
        return end or value


_POINTER_NAMES = frozenset({"user_va", "allowed_iovas", "data_uptr", "vaddr", "uptr", "addr", "address", "data"})
_RETURNS_FD = frozenset({"VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_GET_GFX_DMABUF"})


def find_ioctl(request: int, argument: type | None = None, path: str = "") -> Ioctl[Any] | None:
    """The declaration of an ioctl number; the argument's struct, then the file it is called on, decide ties."""
    candidates = IOCTLS.get(request & 0xFFFFFFFF, [])
    for candidate in candidates:
        if candidate.struct is not None and candidate.struct is argument:
            return candidate
    if len(candidates) > 1 and path.startswith("/dev/vfio/"):
        container = path == "/dev/vfio/vfio"
        for candidate in candidates:
            if candidate.name.startswith("VFIO_IOMMU") == container:
                return candidate
    return candidates[0] if candidates else None


def errno_name(number: int) -> str:
    """The kernel's name of an errno. Python's table knows 95 as ENOTSUP, its name in another standard."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


def _words(raw: bytes) -> list[int]:
    padded = raw + bytes(-len(raw) % 8)
    words = list(memoryview(padded).cast("Q"))
    while words and words[-1] == 0:
        words.pop()
    return words


def _test_member(raw: bytes, union: Any) -> type[Struct] | None:
    """The member of the mock driver's union that the command in `raw` uses; None outside the union, or unknown."""
    if not issubclass(union, ctypes.Union):
        return None
    name = TEST_OP_MEMBERS.get(int.from_bytes(raw[4:8], "little"))
    return next((member.ctype for member in fields_of(union) if member.name == name), None)


def _values(struct: type[Struct] | type[Union], raw: bytes, base: int = 0) -> Iterator[tuple[str, Any, Any, bytes]]:
    """(name, ctype, value, bytes) of each member; a union is given as its 64-bit words under `union`, or as the member
    that counts where that is known."""
    for member in fields_of(struct):
        descriptor = getattr(struct, member.name)
        start = base + descriptor.offset
        part = raw[start : start + ctypes.sizeof(member.ctype)]
        if member.spec.anonymous and issubclass(member.ctype, Struct):
            yield from _values(member.ctype, raw, start)
        elif struct is iommu_test_cmd and (chosen := _test_member(raw, member.ctype)) is not None:
            yield from _values(chosen, raw, start)
        elif issubclass(member.ctype, ctypes.Union):
            yield ("union" if member.spec.anonymous else member.name), member.ctype, _words(part), part
        elif issubclass(member.ctype, Struct):
            inner = {name: value for name, _, value, _ in _values(member.ctype, raw, start) if value}
            yield member.name, member.ctype, inner, part
        elif issubclass(member.ctype, ctypes.Array):
            text = member.ctype._type_ is ctypes.c_char
            yield member.name, member.ctype, part.rstrip(b"\0").decode("latin-1") if text else _words(part), part
        else:
            size = ctypes.sizeof(member.ctype)
            signed = member.ctype(-1).value < 0
            yield member.name, member.ctype, int.from_bytes(part[:size], "little", signed=signed), part


def _canonical(names: _Names, client: int, name: str, value: Any, out: bool) -> Any:
    if isinstance(value, list):
        return [names.pointer(client, item) if isinstance(item, int) else item for item in value]
    if not isinstance(value, int):
        return value
    if name.endswith("fd"):
        signed = value - (1 << 32) if value >= 1 << 31 else value
        return names.fd(client, signed, out)
    if name == "out_phys":  # where memory is, is chance; where in its page, is not
        return f"pa+{value & 0xFFF:#x}"
    pointer = names.pointer(client, value)
    if isinstance(pointer, str) and pointer.startswith("ptr") and name not in _POINTER_NAMES:
        return value
    return pointer


def _decode_ioctl(names: _Names, event: Event) -> Call:
    _, client, serial, path, request, kind, before, after, number, result, why = event
    known = find_ioctl(request, kind, path)
    name = known.name if known else f"ioctl {request:#x}"
    struct = known.struct if known else None
    if struct is None and isinstance(kind, type) and issubclass(kind, Struct):
        struct = kind
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    if isinstance(before, int):
        if before or struct is not None:
            inputs["arg"] = names.pointer(client, before)
    else:
        covered = 0
        if struct is not None:
            covered = ctypes.sizeof(struct)
            olds = list(_values(struct, before.ljust(covered, b"\0")))
            news = list(_values(struct, after.ljust(covered, b"\0")))
            size_field = known.size_field if known else None
            for (field, _, old, old_raw), (_, _, new, new_raw) in zip(olds, news, strict=True):
                if old and not (field == size_field and old == covered):
                    inputs[field] = _canonical(names, client, field, old, False)
                if old_raw != new_raw:
                    outputs[field] = _canonical(names, client, field, new, True)
            if len(before) < covered:
                inputs["bytes"] = len(before)
        if len(before) > covered:
            if any(before[covered:]):
                inputs["tail"] = before[covered:].rstrip(b"\0").hex()
            if before[covered:] != after[covered:]:
                outputs["tail"] = after[covered:].rstrip(b"\0").hex()
    call: Call = {"call": name, "file": names.files.get(serial, "fd?"), "in": inputs}
    if number:
        call["errno"] = errno_name(number)
        if why:
            call["why"] = why
        if outputs:
            call["out"] = outputs
    else:
        returns_fd = name in _RETURNS_FD or (result > 0 and inputs.get("op") == IOMMU_TEST_OP_DMABUF_GET)
        call["ret"] = names.fd(client, result, True) if returns_fd else result
        call["out"] = outputs
    if client:
        call["client"] = client
    return call


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _decode_event(names: _Names, event: Event) -> Call | None:
    kind = event[0]
    if kind == "ioctl":
        return _decode_ioctl(names, event)
    if kind == "file":
        names.file(event[1], event[2], event[3])
    elif kind == "memory":
        _, client, serial, token, start, length = event
        names.areas[serial] = (client, names.new(token), start, length)
    elif kind == "forget":
        names.areas.pop(event[2], None)
    elif kind == "close":
        names.closed(event[2])
        return {"call": "close", "file": names.files.get(event[2], "fd?"), "in": {}, "ret": 0}
    elif kind == "open":
        _, client, path, number, why = event
        call: Call = {"call": "open", "in": {"path": path}}
        call |= {"errno": errno_name(number)} if number else {"ret": 0}
        return call | ({"why": why} if why else {}) | ({"client": client} if client else {})
    elif kind == "mmio":
        _, access, serial, offset, width, value = event
        inputs = {"offset": offset, "width": width} | ({"value": value} if access == "store" else {})
        call = {"call": access, "file": names.files.get(serial, "fd?"), "in": inputs, "volatile": True}
        return call | ({"ret": value} if access == "load" else {"ret": 0})
    elif kind == "call":
        _, name, serial, inputs, number, result, why = event
        call = {"call": name, "file": names.files.get(serial, "fd?")}
        call["in"] = {key: _plain(value) for key, value in inputs.items()}
        if number:
            call["errno"] = errno_name(number)
        else:
            call["ret"] = _plain(result)
        return call | ({"why": why} if why else {})
    return None


def decode(events: Sequence[Event]) -> Iterator[Call]:
    """The calls of a raw log in order; identical ones in a row are one, with `times`."""
    names = _Names()
    last: Call | None = None
    for event in events:
        call = _decode_event(names, event)
        if call is None:
            continue
        if last is not None and {key: value for key, value in last.items() if key != "times"} == call:
            last["times"] = last.get("times", 1) + 1
            continue
        if last is not None:
            yield last
        last = call
    if last is not None:
        yield last


def _by_enum() -> dict[str, list[Constant]]:
    found: dict[str, list[Constant]] = {}
    for constant in [*registry.constants().values(), *registry.constants(registry.TEST_HEADER).values()]:
        found.setdefault(constant.enum or "", []).append(constant)
    return found


_ENUMS = _by_enum()
#: Members that hold one value of an enum. Flags are found by the headers' naming rules.
_VALUES = {
    ("IOMMU_OPTION", "option_id"): "iommufd_option",
    ("IOMMU_OPTION", "op"): "iommufd_option_ops",
    ("IOMMU_VFIO_IOAS", "op"): "iommufd_vfio_ioas_op",
    ("IOMMU_HWPT_ALLOC", "data_type"): "iommu_hwpt_data_type",
    ("IOMMU_GET_HW_INFO", "data_type"): "iommu_hw_info_type",
    ("IOMMU_GET_HW_INFO", "out_data_type"): "iommu_hw_info_type",
    ("IOMMU_TEST_CMD", "op"): "",
}


@functools.cache
def _names_of(call: str, field: str) -> tuple[bool, tuple[tuple[str, int], ...]]:
    """(are they flags, (name, value) of each) for a member of a call's struct; nothing where none is known."""
    known = _BY_NAME.get(call)
    if known is None or known.struct is None:
        return False, ()
    if (call, field) in _VALUES:
        enum = _VALUES[call, field]
        chosen = _ENUMS.get(enum, []) if enum else [c for e in _ENUMS.values() for c in e if "_TEST_OP_" in c.name]
        return False, tuple((constant.name, constant.value) for constant in chosen)
    if field != "flags":
        return False, ()
    struct = known.struct.__name__
    enum = f"{struct.replace('iommu_', 'iommufd_', 1)}_flags"
    chosen = _ENUMS.get(enum) or _ENUMS.get(f"{struct}_flags") or []
    if not chosen:
        stem = struct.upper().removesuffix("_INFO")
        prefixes = (f"{struct.upper()}_", f"{stem}_FLAGS_", f"{stem}_FLAG_")
        chosen = [c for c in _ENUMS.get("", []) if c.name.startswith(prefixes) and c.value.bit_count() == 1]
    return True, tuple((constant.name, constant.value) for constant in chosen)


def _show_named(call: str, field: str, value: int) -> str:
    flags, names = _names_of(call, field)
    if not flags:
        return next((name for name, known in names if known == value), _show(value))
    parts, left = [], value
    for name, bit in names:
        if bit and left & bit == bit:
            parts.append(name)
            left &= ~bit
    return "|".join(parts + ([_show(left)] if left or not parts else []))


def _show(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | list | dict):
        return str(value)
    if isinstance(value, int):
        return str(value) if -10 < value < 10 else hex(value)
    if isinstance(value, list):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return "{" + ", ".join(f"{key}={_show(item)}" for key, item in value.items()) + "}"


def render(call: Call) -> str:
    """One call on one line, for people."""
    parts = [call["file"]] if "file" in call else []
    for name, value in call.get("in", {}).items():
        shown = _show_named(call["call"], name, value) if isinstance(value, int) else _show(value)
        parts.append(f"{name}={shown}")
    text = f"{call['call']}({', '.join(parts)})"
    if "client" in call:
        text = f"client{call['client']}: {text}"
    if "errno" in call:
        text += f" = -{call['errno']}" + (f" ({call['why']})" if call.get("why") else "")
    else:
        text += f" = {_show(call.get('ret', 0))}"
    if call.get("out"):
        text += " -> " + ", ".join(f"{name}={_show(value)}" for name, value in call["out"].items())
    return text + (f"   [{call['times']} times]" if "times" in call else "")


def render_all(calls: Sequence[Call], last: int = 60) -> list[str]:
    """The last calls, numbered from 1 at the first call of the log."""
    lines = [f"{number:4d}  {render(call)}" for number, call in enumerate(calls, 1)]
    if len(lines) > last:
        lines = [f"      … {len(lines) - last} earlier calls", *lines[-last:]]
    return lines
