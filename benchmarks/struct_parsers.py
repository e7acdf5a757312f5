"""What Python packages for C structs make of the real linux/iommufd.h and linux/vfio.h: the figures of docs/structs.md.

    python benchmarks/struct_parsers.py DIRECTORY_OF_HEADERS

DIRECTORY has linux/iommufd.h, for instance the usr/include of Debian's linux-libc-dev 7.3.4. Each package that is
installed gets three tries: the headers as they lie there; what `gcc -E` makes of them; and, one struct at a time so
that a failure costs only that struct, its preprocessed text without attributes. A struct counts as exact if its size,
and the offset and size of each member that C reaches by name, are those of the machine-made table in uapi/history
(x86_64). cstruct2 reads no C: it gets the mirrored declarations, transcribed to its classes.

    pip install cstruct2 cstruct dissect.cstruct cffi ctypesgen

Needs gcc, and the project itself installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uapi import history, registry
from uapi.cstruct import Struct, fields_of

HEADERS = ("linux/iommufd.h", "linux/vfio.h")
RELEASE = "7.3.4"
#: A struct as somebody lays it out: its size, and for each member (offset, size), None where it cannot say.
Facts = tuple[int | None, dict[str, tuple[int | None, int | None]]]

TYPES = """
typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef unsigned long long __u64;
typedef int __s32; typedef long long __s64; typedef unsigned long long __le64;
"""


class Package(ABC):
    """One package under test."""

    name = ""
    #: What to load before structs that stand alone.
    prelude = TYPES
    #: Where the headers lie.
    tree = Path()

    @abstractmethod
    def load(self, text: str) -> None:
        """Read declarations. The package's own errors."""

    @abstractmethod
    def facts(self, struct: str) -> Facts:
        """LookupError where the struct is not known."""


class Cffi(Package):
    """cffi: pycparser reads the text, and cffi lays it out."""

    name = "cffi"

    def __init__(self) -> None:
        self.ffi = importlib.import_module("cffi").FFI()

    def load(self, text: str) -> None:
        self.ffi.cdef(text)

    def facts(self, struct: str) -> Facts:
        try:
            kind = self.ffi.typeof(f"struct {struct}")
        except Exception as error:
            raise LookupError(struct) from error
        members: dict[str, tuple[int | None, int | None]] = {}

        def collect(of: Any, base: int) -> None:
            for name, field in of.fields:
                if not name:
                    collect(field.type, base + field.offset)
                else:
                    flexible = field.type.kind == "array" and field.type.length is None
                    members[name] = base + field.offset, 0 if flexible else self.ffi.sizeof(field.type)

        collect(kind, 0)
        return self.ffi.sizeof(kind), members


class DissectCstruct(Package):
    """dissect.cstruct, with `align=True`."""

    name = "dissect.cstruct"
    #: It knows the kernel's plain types.
    prelude = "typedef uint64_t __aligned_u64; typedef uint64_t __aligned_le64; typedef uint64_t __le64;"
    prelude += "typedef int32_t __s32; typedef int64_t __s64;"

    def __init__(self) -> None:
        self.cs = importlib.import_module("dissect.cstruct").cstruct()

    def load(self, text: str) -> None:
        self.cs.load(text, align=True)

    def facts(self, struct: str) -> Facts:
        try:
            kind = self.cs.resolve(struct)
        except Exception as error:
            raise LookupError(struct) from error
        members: dict[str, tuple[int | None, int | None]] = {}

        def collect(of: Any, base: int) -> None:
            for field in of.__fields__:
                # The members of a union have no offset of their own.
                offset = base + field.offset if field.offset is not None else base if of is not kind else None
                if not field._name or field._name.startswith("__anonymous"):
                    collect(field.type, base + (field.offset or 0))
                else:
                    members[field._name] = offset, field.type.size

        collect(kind, 0)
        return kind.size, members


class PythonCstruct(Package):
    """cstruct (python-cstruct), native byte order, which means C's alignment."""

    name = "cstruct"

    def __init__(self) -> None:
        self.module = importlib.import_module("cstruct")

    def load(self, text: str) -> None:
        self.module.parse(text, __cls__=self.module.MemCStruct)

    def facts(self, struct: str) -> Facts:
        types = importlib.import_module("cstruct.base").STRUCTS
        kind = types.get(struct) or types.get(f"struct {struct}")
        if kind is None:
            raise LookupError(struct)
        members: dict[str, tuple[int | None, int | None]] = {}

        def collect(of: Any, base: int) -> None:
            for name, field in of.__fields_types__.items():
                if name.startswith("__anonymous"):
                    collect(field.ref, base + field.offset)
                else:
                    members[name] = base + field.offset, 0 if field.flexible_array else field.vsize

        collect(kind, 0)
        return kind.sizeof(), members


class Ctypesgen(Package):
    """ctypesgen: writes a module of ctypes classes, by way of gcc's preprocessor."""

    name = "ctypesgen"

    def __init__(self) -> None:
        self.text = ""
        self.module: Any = None

    def load(self, text: str) -> None:
        text = self.text + text
        with tempfile.TemporaryDirectory() as scratch:
            header, out = Path(scratch) / "header.h", Path(scratch) / "out.py"
            header.write_text(text)
            command = [str(Path(sys.executable).parent / "ctypesgen"), "-o", str(out), f"-I{self.tree}", str(header)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not out.exists():
                raise ValueError((done.stderr.strip().splitlines() or ["failed"])[-1])
            spec = importlib.util.spec_from_file_location("generated", out)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        self.module, self.text = module, text

    def facts(self, struct: str) -> Facts:
        kind = getattr(self.module, f"struct_{struct}", None)
        if kind is None or not hasattr(kind, "_fields_"):
            raise LookupError(struct)
        return _ctypes_facts(kind)


class Ours(Package):
    """The classes of this project."""

    name = "@cstruct of iommulab"

    def load(self, text: str) -> None:
        """Nothing to read: the classes are there."""

    def facts(self, struct: str) -> Facts:
        return _ctypes_facts(registry.structs()[struct])


class Cstruct2(Package):
    """cstruct2: a class for each struct, transcribed from our declarations."""

    name = "cstruct2"
    renamed = False
    _PLAIN = {"__u8": 1, "__u16": 2, "__u32": 4, "__s32": 4, "__u64": 8, "__s64": 8, "__le64": 8}

    def __init__(self) -> None:
        self.make = importlib.import_module("cstruct2.cstruct2").cstruct2
        self.made: dict[str, Any] = {}

    def load(self, text: str) -> None:
        """ValueError: it reads no C; `transcribe` writes a struct out in its own notation."""
        raise ValueError("it reads no C declarations")

    def transcribe(self, struct: type[Struct]) -> None:
        annotations: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for field in fields_of(struct):
            name, width = field.name, self._PLAIN.get(field.text)
            if self.renamed and name.startswith("_"):
                name = f"U{name}"
            if field.spec.anonymous or field.text.startswith("union"):
                raise ValueError("no unions")
            if field.spec.count == 0:
                raise ValueError("no arrays of unknown length")
            if width is None and field.ctype.__name__ not in self.made:
                raise ValueError(f"no {field.text}")
            value: Any = ("host", width) if width else self.made[field.ctype.__name__]
            annotations[name] = int if width else self.make
            values[name] = value if field.spec.count is None else [field.spec.count, *value]
        made = self.make(type(struct.__name__, (), {"__annotations__": annotations, **values}))
        self.made[struct.__name__] = made

    def facts(self, struct: str) -> Facts:
        made = self.made.get(struct)
        if made is None:
            raise LookupError(struct)
        members: dict[str, tuple[int | None, int | None]] = {}
        position = 0
        for field in made.fields:
            if isinstance(field, list):
                size = field[1] * field[2].width
                members[field[0].removeprefix("U")] = position, size
            else:
                # Its own len() raises TypeError.
                size = self.facts(_name_of(self.made, field.another))[0] if hasattr(field, "another") else field.width
                members[field.name.removeprefix("U")] = position, size
            position += size
        return position, members


class RenamedCstruct2(Cstruct2):
    """cstruct2 with other names for members that begin with an underscore, which it leaves out without a word."""

    renamed = True


def _name_of(made: dict[str, Any], wanted: Any) -> str:
    return next(name for name, value in made.items() if value is wanted)


def _ctypes_facts(kind: Any) -> Facts:
    members: dict[str, tuple[int | None, int | None]] = {}

    def collect(of: Any, base: int) -> None:
        hidden = getattr(of, "_anonymous_", ())
        for name, inner, *_ in of._fields_:
            place = getattr(of, name)
            if name in hidden:
                collect(inner, base + place.offset)
            else:
                members[name] = base + place.offset, place.size

    collect(kind, 0)
    return ctypes.sizeof(kind), members


def expected(struct: str) -> Facts:
    """What the compiler made of it."""
    layout = history.table(RELEASE).structs[struct].layout
    return layout.size, {name: (member.offset, member.size) for name, member in layout.flat().items()}


def preprocess(tree: Path, header: str) -> str:
    """The header's own part of what the preprocessor writes."""
    source = f"#define __counted_by(member)\n#include <{header}>\n"
    command = ["gcc", "-E", "-xc", "-", f"-I{tree}"]
    lines = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout.splitlines()
    kept, inside = [], False
    for line in lines:
        if line.startswith("# "):
            inside = line.split('"')[1].endswith(header)
        elif inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def plain(text: str) -> str:
    """Without attributes and GNU words."""
    text = re.sub(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)", "", text)
    return text.replace("__signed__", "signed").replace("__extension__", "")


def structs_in(text: str) -> list[tuple[str, str]]:
    """(name, text) of each named struct, in order."""
    found = []
    for match in re.finditer(r"^struct (\w+) \{", text, re.M):
        depth, end = 0, match.end() - 1
        while True:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
            if not depth:
                break
        found.append((match[1], text[match.start() : text.index(";", end) + 1] + "\n"))
    return found


def verdict(package: Package, struct: str) -> str:
    """ "exact", "absent", or what is wrong."""
    try:
        size, members = package.facts(struct)
    except LookupError:
        return "absent"
    right_size, right = expected(struct)
    if size != right_size:
        return f"size {size}, not {right_size}"
    for name, place in right.items():
        if members.get(name) != place:
            return f"{name} at {members.get(name, 'nowhere')}, not {place}"
    return "exact"


def whole(make: Callable[[], Package], text: str) -> str:
    """How a package takes a whole header: what it loaded, or what it says."""
    package = make()
    try:
        package.load(text)
    except Exception as error:
        said = " ".join((str(error).splitlines() or [""])[0].split())
        return f"fails: {type(error).__name__}: {said[:90]}"
    verdicts = [verdict(package, name) for name in NAMES]
    return f"{sum(v != 'absent' for v in verdicts)} loaded, {verdicts.count('exact')} exact"


def measure(make: Callable[[], Package], pieces: list[tuple[str, str]]) -> None:
    """One struct at a time."""
    package = make()
    refused: dict[str, str] = {}
    if isinstance(package, Cstruct2):
        for name in NAMES:
            try:
                package.transcribe(registry.structs()[name])  # type: ignore[arg-type]
            except Exception as error:
                refused[name] = " ".join(str(error).split())[:70]
    elif not isinstance(package, Ours):
        package.load(package.prelude)
        for name, text in pieces:
            try:
                package.load(text)
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
    verdicts = {name: verdict(package, name) for name in NAMES}
    loaded = sum(v != "absent" for v in verdicts.values())
    print(f"  one by one: {loaded} of {len(NAMES)} loaded, {list(verdicts.values()).count('exact')} exact")
    for name, said in verdicts.items():
        if said != "exact":
            print(f"    {name}: {refused.get(name, said)}")


NAMES = [name for name, fact in history.table(RELEASE).structs.items() if fact.header in HEADERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("tree", type=Path)
    tree = Package.tree = parser.parse_args().tree.resolve()
    as_it_is = "\n".join((tree / header).read_text() for header in HEADERS)
    after = "".join(preprocess(tree, header) for header in HEADERS)
    pieces = structs_in(plain(after))
    assert {name for name, _ in pieces} == set(NAMES), "the headers are not those of the table"
    print(f"Python {sys.version.split()[0]}, {len(NAMES)} structs of {' and '.join(HEADERS)} of {RELEASE}")
    for make in (Cstruct2, RenamedCstruct2, PythonCstruct, DissectCstruct, Cffi, Ctypesgen, Ours):
        try:
            version = importlib.metadata.version(make.name) if make is not Ours else "this tree"
        except importlib.metadata.PackageNotFoundError:
            print(f"\n{make.name}: not installed")
            continue
        renamed = ", members that begin with _ renamed" if make is RenamedCstruct2 else ""
        print(f"\n{make.name} {version}{renamed}")
        # Some packages print as they parse, and warn.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not issubclass(make, Cstruct2 | Ours):
                print(f"  as it is: {whole(make, as_it_is)}")
                print(f"  after gcc -E: {whole(make, make.prelude + after)}")
            measure(make, pieces)


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C")
    main()
