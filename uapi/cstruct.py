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
    size: aligned_u64 = was(u64, until="6.7")          # the field had another C type
    devices: carray[vfio_pci_dependent_device] = length(0)     # an array; length 0 is a flexible one
    anon0: _Choice = anonymous()                      # an unnamed union or struct: its members are reached directly

`aligned_u64` is the headers' `__aligned_u64`: the same as `u64` on a 64-bit machine, and 8-byte aligned on i386 too. A
struct or union whose Python name begins with an underscore has no name in the header.

What a declaration also carries, `fields_of()` returns; `uapi.layout` cuts a struct down to an earlier release with it.
Only the standard library is used here, so that the ABI can be loaded inside any guest.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    u8 = int
    u16 = int
    u32 = int
    u64 = int
    s32 = int
    s64 = int
    aligned_u64 = int
    aligned_le64 = int
    u64_ptr = int

    _E = TypeVar("_E")

    class carray(Sequence[_E]):
        """A C array as the type checker sees it: what `ctypes.Array` offers, by the element's Python type."""

        def __setitem__(self, index: int | slice, value: Any) -> None: ...

else:
    u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
    s32, s64 = ctypes.c_int32, ctypes.c_int64

    class CType:
        """A C type that says more than its ctypes stand-in: how the header names it, and an alignment of its own."""

        def __init__(self, text, ctype, align=None, pointer=False):
            self.text, self.ctype, self.align, self.pointer = text, ctype, align, pointer

    aligned_u64 = CType("__u64", u64, align=8)
    aligned_le64 = CType("__le64", u64, align=8)
    u64_ptr = CType("__u64 *", ctypes.c_size_t, pointer=True)  # an address, kept as an int

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
    backports: tuple[str, ...] = ()


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


def was(ctype: Any, *, until: str, backports: tuple[str, ...] = ()) -> Any:
    """The field had another C type before release `until` (and before the stable releases in `backports`)."""
    return FieldSpec(was=Was(ctype, until, backports))


def length(count: int, *, since: str | None = None, backports: tuple[str, ...] = (), was: Was | None = None) -> Any:
    """The number of elements of a `carray` (0: a flexible array member)."""
    return FieldSpec(since=since, backports=backports, count=count, was=was)


def anonymous(*, since: str | None = None) -> Any:
    """The member is an unnamed union or struct of C11: its own members are reached through the outer struct."""
    return FieldSpec(since=since, anonymous=True)


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a struct as declared.

    `ctype` is the ctypes type of the element (or of the member itself where it is no array); `text` the header's name
    for it; `align` is 8 where the header asks for it on every architecture.
    """

    name: str
    ctype: Any
    spec: FieldSpec
    text: str = ""
    align: int | None = None
    pointer: bool = False


@dataclass(slots=True)
class StructInfo:
    """The declaration of a struct: when it came, its header, and its members in order."""

    name: str
    since: str
    backports: tuple[str, ...] = ()
    header: str = ""
    packed: bool = False
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


_TEXT = {u8: "__u8", u16: "__u16", u32: "__u32", u64: "__u64", s32: "__s32", s64: "__s64"}


def ctext(ctype: Any) -> str:
    """The header's name of a C type: `__u32`, `struct iommu_iova_range`, `union <anonymous>`."""
    if ctype in _TEXT:
        return _TEXT[ctype]
    kind = "union" if issubclass(ctype, ctypes.Union) else "struct"
    return f"{kind} {'<anonymous>' if ctype.__name__.startswith('_') else ctype.__name__}"


def resolve(annotation: Any) -> tuple[Any, str, int | None, bool]:
    """An annotation's ctypes type, its name in the header, its own alignment, and whether it is a pointer."""
    if hasattr(annotation, "text"):
        return annotation.ctype, annotation.text, annotation.align, annotation.pointer
    return annotation, ctext(annotation), None, False


def cstruct(*, since: str = OLDEST, backports: tuple[str, ...] = (), packed: bool = False) -> Callable[[S], S]:
    """Give the annotated class its C layout. `since` is the release whose header first has the struct.

    The header's name is taken from `HEADER` in the module that declares the struct.
    """

    def apply(cls: S) -> S:
        header = getattr(sys.modules[cls.__module__], "HEADER", "")
        info = StructInfo(cls.__name__, since, backports, header, packed)
        mangled = f"_{cls.__name__.lstrip('_')}__"
        layout: list[tuple[str, Any]] = []
        unnamed: list[str] = []
        for key, annotation in inspect.get_annotations(cls, eval_str=True).items():
            name = "__" + key[len(mangled) :] if key.startswith(mangled) else key
            spec = cls.__dict__.get(key, FieldSpec())
            is_array = isinstance(annotation, _ArrayOf)
            if is_array != (spec.count is not None):
                raise TypeError(f"{cls.__name__}.{name}: `carray[...]` and `= length(n)` go together")
            element, text, align, pointer = resolve(annotation.element if is_array else annotation)
            if key in cls.__dict__:
                delattr(cls, key)
            if spec.anonymous:
                unnamed.append(name)
            layout.append((name, element * spec.count if is_array else element))
            info.fields.append(Field(name, element, spec, text, align, pointer))
        if packed:
            cls._pack_ = 1
            cls._layout_ = "ms"  # type: ignore[union-attr]  # what `_pack_` implies; newer Pythons want it said
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
