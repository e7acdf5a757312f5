"""C structs as annotated classes.

A struct of a uapi header is written as the header writes it, one field a line, and becomes a `ctypes.Structure` with
the compiler's own layout::

    @cstruct(since="6.2")
    class iommu_ioas_alloc(Struct):
        size: u32
        flags: u32
        out_ioas_id: u32

To mypy a `u32` is an `int`; at run time it is `ctypes.c_uint32`. A name with two leading underscores keeps them
(`cmd.__reserved`), as in the header. What a class body cannot say by its annotation alone is said by its value:

    fault_id: u32 = since("6.11")                     # the field came later than the struct
    devices: carray[vfio_pci_dependent_device] = length(0)     # an array; length 0 is a flexible one
    anon0: _Choice = anonymous()                      # an unnamed union or struct: its members are reached directly

What a declaration also carries, `fields_of()` returns. Only the standard library is used here, so that the ABI can be
loaded inside any guest.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    u8 = u16 = u32 = u64 = s32 = s64 = int
    carray = ctypes.Array
else:
    u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
    s32, s64 = ctypes.c_int32, ctypes.c_int64

    class carray:
        """`carray[u64] = length(n)`: a C array of n elements."""

        def __class_getitem__(cls, element):
            return _ArrayOf(element)


#: The oldest release of which this project has the headers. `since=OLDEST` reads "6.1 or earlier".
OLDEST = "6.1"


class _ArrayOf:
    def __init__(self, element: Any) -> None:
        self.element = element


@dataclass(frozen=True, slots=True)
class Was:
    """An earlier shape of a field: its C type then, and the release that changed it."""

    ctype: Any
    until: str


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """What a field's declaration says beside its type."""

    since: str | None = None
    backports: tuple[str, ...] = ()
    count: int | None = None
    anonymous: bool = False
    was: Was | None = None


def since(release: str, *, backports: tuple[str, ...] = (), was: Was | None = None) -> Any:
    """The field exists from `release` on, and in the stable releases named in `backports`."""
    return FieldSpec(since=release, backports=backports, was=was)


def length(count: int, *, since: str | None = None, backports: tuple[str, ...] = (), was: Was | None = None) -> Any:
    """The number of elements of a `carray` (0: a flexible array member)."""
    return FieldSpec(since=since, backports=backports, count=count, was=was)


def anonymous(*, since: str | None = None) -> Any:
    """The member is an unnamed union or struct of C11: its own members are reached through the outer struct."""
    return FieldSpec(since=since, anonymous=True)


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a struct as declared."""

    name: str
    ctype: Any
    spec: FieldSpec


@dataclass(slots=True)
class StructInfo:
    """The declaration of a struct: when it came, its header, and its members in order."""

    name: str
    since: str
    backports: tuple[str, ...] = ()
    header: str = ""
    fields: list[Field] = field(default_factory=list)


def _describe(value: Any) -> str:
    inner = ", ".join(f"{name}={_show(getattr(value, name))}" for name in plain_fields(type(value)))
    return f"{type(value).__name__}({inner})"


class Struct(ctypes.Structure):
    """Base of every mirrored struct."""

    _info_: ClassVar[StructInfo]
    __repr__ = _describe


class Union(ctypes.Union):
    """Base of every mirrored union."""

    _info_: ClassVar[StructInfo]
    __repr__ = _describe


S = TypeVar("S", bound="type[Struct] | type[Union]")


def cstruct(*, since: str = OLDEST, backports: tuple[str, ...] = (), header: str = "") -> Callable[[S], S]:
    """Give the annotated class its C layout. `since` is the release whose header first has the struct."""

    def apply(cls: S) -> S:
        info = StructInfo(cls.__name__, since, backports, header)
        mangled = f"_{cls.__name__.lstrip('_')}__"
        layout: list[tuple[str, Any]] = []
        unnamed: list[str] = []
        for key, annotation in inspect.get_annotations(cls).items():
            name = "__" + key[len(mangled) :] if key.startswith(mangled) else key
            spec = cls.__dict__.get(key, FieldSpec())
            if isinstance(annotation, _ArrayOf):
                if spec.count is None:
                    raise TypeError(f"{cls.__name__}.{name}: an array needs `= length(n)`")
                annotation = annotation.element * spec.count
            if key in cls.__dict__:
                delattr(cls, key)
            if spec.anonymous:
                unnamed.append(name)
            layout.append((name, annotation))
            info.fields.append(Field(name, annotation, spec))
        if unnamed:
            cls._anonymous_ = unnamed
        cls._fields_ = layout
        cls._info_ = info
        return cls

    return apply


def fields_of(struct: type[Struct] | type[Union]) -> list[Field]:
    """The members of a struct in order, unnamed unions unopened."""
    return struct._info_.fields


def plain_fields(struct: type[Struct] | type[Union]) -> list[str]:
    """Names of all members, those of unnamed unions and structs in their place."""
    names: list[str] = []
    for member in struct._info_.fields:
        if member.spec.anonymous:
            names += plain_fields(member.ctype)
        else:
            names.append(member.name)
    return names


def offsetofend(struct: type[ctypes.Structure], name: str) -> int:
    """The kernel's `offsetofend()`: bytes from the start of the struct to the end of the member."""
    descriptor = getattr(struct, name)
    return int(descriptor.offset) + int(descriptor.size)


def _show(value: Any) -> str:
    if isinstance(value, int):
        return str(value) if -10 < value < 10 else hex(value)
    if isinstance(value, ctypes.Array):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return repr(value)
