"""Read the ABI out of real headers: a tree of C headers in, the table of `uapi.table` out.

The compiler does the work. One run of the preprocessor lists the macros that each header defines; one compilation puts
their values, and the alignment of each struct, into an array; and its debug information (DWARF, read by pyelftools) has
every struct and enum with the place of each member. So what is reported is what a C program would see. Left out:
macros with arguments, macros that are no integer constant, and typedefs.

A tree may be a kernel source, an installed /usr/include, or any directory that has linux/vfio.h or linux/iommufd.h
below it in the usual places. Headers that a tree lacks (asm/, say, in an unbuilt source) come from the host.
"""

from __future__ import annotations

import os
import re
import shutil
import struct as binary
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uapi.layout import ARCHES, Layout, Member
from uapi.table import ConstantFact, IoctlFact, StructFact, Table

if TYPE_CHECKING:
    from elftools.dwarf.compileunit import CompileUnit
    from elftools.dwarf.die import DIE
    from elftools.elf.elffile import ELFFile

#: What is read, where the tree has it.
HEADERS = ("linux/iommufd.h", "linux/vfio.h", "linux/vfio_zdev.h", "linux/vfio_ccw.h")
_PLACES = ("include/uapi", "usr/include", "include", ".")
_FLAGS = (
    "-w",
    "-D__user=",  # marks pointers in headers that were not sanitised
    "-D__EXPORTED_HEADERS__",  # silences their warning
    "-D__packed=__attribute__((packed))",  # vfio_ccw.h uses it and leaves its definition to the program
    "-g",
    "-gdwarf-4",
    "-fno-eliminate-unused-debug-types",  # nothing here uses the types
)
_IOCTL = re.compile(r"\b_IO(?:R|W|WR)?\s*\(")
_DEFINE = re.compile(r"#define (\w+)(\(.*)?(?: (.*))?$")
_MARKER = re.compile(r'# \d+ "(.*)"')
_ERROR = re.compile(r"^macros:(\d+):", re.MULTILINE)


class HeaderError(Exception):
    """The headers could not be read; the message is one sentence that says why and what to do."""


def read_headers(tree: str | Path, arch: str = "x86_64") -> Table:
    """The ABI that the headers in `tree` declare.

    `arch` "x86_64" reads them as the host's 64-bit compiler does, "i386" with -m32. HeaderError where the tree has no
    such header, there is no compiler or pyelftools, or the headers do not compile.
    """
    if arch not in ARCHES:
        raise HeaderError(f"headers can be read for {' and '.join(ARCHES)}, not for {arch!r}.")
    root = include_root(tree)
    reader = _Reader(root, arch)
    table = Table(release_of(tree) or str(tree), arch, f"headers in {tree}", reader.headers)
    reader.fill(table)
    return table


def include_root(tree: str | Path) -> Path:
    """The directory below `tree` that has linux/iommufd.h or linux/vfio.h."""
    if not Path(tree).is_dir():
        raise HeaderError(f"{tree} is no directory of headers.")
    for place in _PLACES:
        root = Path(tree) / place
        if any((root / header).is_file() for header in HEADERS[:2]):
            return root.resolve()
    raise HeaderError(
        f"{tree} has neither linux/iommufd.h nor linux/vfio.h, nor include/uapi or usr/include with them."
    )


def release_of(tree: str | Path) -> str | None:
    """The kernel release that a tree says it is from: a source's Makefile, or linux/version.h beside the headers."""
    makefile = Path(tree) / "Makefile"
    if makefile.is_file():
        parts = dict(
            re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) =[ \t]*(\S*)", makefile.read_text(), re.M)
        )
        if parts.get("VERSION"):
            point = parts.get("SUBLEVEL", "0")
            candidate = re.match(r"-rc\d+", parts.get("EXTRAVERSION", ""))
            tail = candidate[0] if candidate else f".{point}" if point not in ("", "0") else ""
            return f"{parts['VERSION']}.{parts.get('PATCHLEVEL', '0')}{tail}"
    version = include_root(tree) / "linux" / "version.h"
    if version.is_file():
        numbers = dict(re.findall(r"LINUX_VERSION_(MAJOR|PATCHLEVEL|SUBLEVEL) (\d+)", version.read_text()))
        if len(numbers) == 3:
            return f"{numbers['MAJOR']}.{numbers['PATCHLEVEL']}.{numbers['SUBLEVEL']}"
    return None


def compiler() -> str:
    """The C compiler: $CC, else gcc, cc or clang. HeaderError where there is none."""
    for name in (os.environ.get("CC"), "gcc", "cc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise HeaderError("reading headers needs a C compiler: install gcc, or name one in $CC.")


def _elf(data: Any) -> ELFFile:
    if find_spec("elftools") is None:
        raise HeaderError("reading headers needs pyelftools: pip install 'iommulab[headers]'.")
    elf: ELFFile = import_module("elftools.elf.elffile").ELFFile(data)
    return elf


class _Reader:
    def __init__(self, root: Path, arch: str) -> None:
        self.root = root
        self.headers = tuple(header for header in HEADERS if (root / header).is_file())
        self._paths = {str((root / header).resolve()): header for header in self.headers}
        self._command = [compiler(), *_FLAGS, f"-I{root}"]
        if arch == "i386":
            # Debian keeps asm/ with the 64-bit headers, where -m32 does not look.
            self._command += [
                "-m32",
                *(f"-idirafter{path}" for path in sorted(Path("/usr/include").glob("*-linux-gnu"))),
            ]
        self._includes = "".join(f"#include <{header}>\n" for header in self.headers)

    def _run(self, *arguments: str, source: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *arguments], input=source, capture_output=True, text=True, check=False, timeout=60
        )

    def _compile(self, source: str) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            out = f"{directory}/out.o"
            result = self._run("-c", "-xc", "-", "-o", out, source=source)
            if result.returncode:
                raise _CompileError(result.stderr)
            return Path(out).read_bytes()

    def fill(self, table: Table) -> None:
        macros = list(self._macros())
        try:
            structs, enumerators = self._types()
            values, aligns = self._values([name for name, _, _ in macros], list(structs))
        except _CompileError as error:
            raise HeaderError(f"the headers do not compile ({_first_error(str(error))}).") from None
        for name, header, body in macros:
            if name in values and _IOCTL.search(body):
                table.ioctls[name] = IoctlFact(header, values[name] & 0xFFFFFFFF)
            elif name in values:
                table.constants[name] = ConstantFact(header, values[name], "define", None)
        table.constants.update(enumerators)
        for name, (header, size, members) in structs.items():
            table.structs[name] = StructFact(header, Layout(size, aligns[name], members))

    def _macros(self) -> Iterator[tuple[str, str, str]]:
        """(name, header, body) of each macro without arguments and with a body, in order of definition."""
        result = self._run("-E", "-dD", "-xc", "-", source=self._includes)
        if result.returncode:
            raise HeaderError(f"the headers do not preprocess ({_first_error(result.stderr)}).")
        header = None
        for line in result.stdout.splitlines():
            marker = _MARKER.match(line)
            if marker:
                header = self._paths.get(str(Path(marker[1]).resolve()))
            elif header and (define := _DEFINE.match(line)) and define[3] and not define[2]:
                yield define[1], header, define[3]

    def _values(self, macros: list[str], structs: list[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Values of the macros that are integer constants, and the alignment of each struct."""
        aligns = [f"_Alignof(struct {name})" for name in structs]
        while True:
            lines = [f"(long long)(({name}) * 1LL)," for name in macros] + [f"{expression}," for expression in aligns]
            source = f'{self._includes}const long long iommulab_values[] = {{\n#line 1 "macros"\n' + "\n".join(lines)
            try:
                data = self._compile(source + "\n};\n")
                break
            except _CompileError as error:
                bad = {int(number) - 1 for number in _ERROR.findall(str(error))}
                if not bad or max(bad) >= len(macros):
                    raise
                # Not integer constants: strings, and names of other things.
                macros = [name for number, name in enumerate(macros) if number not in bad]
        numbers = _array(data, "iommulab_values", len(macros) + len(structs))
        return dict(zip(macros, numbers, strict=False)), dict(zip(structs, numbers[len(macros) :], strict=True))

    def _types(self) -> tuple[dict[str, Any], dict[str, ConstantFact]]:
        """Structs as name -> (header, size, members), and enumerators, in order of declaration."""
        structs: dict[str, Any] = {}
        enumerators: dict[str, ConstantFact] = {}
        with tempfile.TemporaryFile() as stream:
            stream.write(self._compile(self._includes + "int iommulab_dummy;\n"))
            stream.seek(0)
            for unit in _elf(stream).get_dwarf_info().iter_CUs():
                files = _files(unit)
                top = [die for die in unit.get_top_DIE().iter_children() if _attribute(die, "DW_AT_decl_file")]
                for die in sorted(top, key=lambda die: int(_attribute(die, "DW_AT_decl_line") or 0)):
                    header = self._paths.get(files.get(_attribute(die, "DW_AT_decl_file"), ""))
                    if header is None:
                        continue
                    name = _name(die)
                    if die.tag in ("DW_TAG_structure_type", "DW_TAG_union_type") and name and die.has_children:
                        structs[name] = header, _attribute(die, "DW_AT_byte_size"), tuple(_members(die, 0))
                    elif die.tag == "DW_TAG_enumeration_type":
                        for item in die.iter_children():
                            value = int(_attribute(item, "DW_AT_const_value"))
                            enumerators[str(_name(item))] = ConstantFact(header, value, "enum", name)
        return structs, enumerators


class _CompileError(Exception):
    """What the compiler printed."""


def _first_error(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if "error:" in line), text.strip()[:200] or "no message")


def _array(data: bytes, name: str, count: int) -> list[int]:
    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.seek(0)
        elf = _elf(stream)
        table: Any = elf.get_section_by_name(".symtab")
        symbol = table.get_symbol_by_name(name)[0]
        section = elf.get_section(symbol["st_shndx"])
        order = "<" if elf.little_endian else ">"
        return list(binary.unpack_from(f"{order}{count}q", section.data(), symbol["st_value"]))


def _files(unit: CompileUnit) -> dict[int, str]:
    """DWARF's number of each source file, and its real path."""
    program: Any = unit.dwarfinfo.line_program_for_CU(unit)
    base = Path(os.fsdecode(_attribute(unit.get_top_DIE(), "DW_AT_comp_dir") or b"."))
    directories = [base, *(base / os.fsdecode(entry) for entry in program["include_directory"])]
    return {
        number: str((directories[entry.dir_index] / os.fsdecode(entry.name)).resolve())
        for number, entry in enumerate(program["file_entry"], 1)
    }


def _attribute(die: DIE, name: str) -> Any:
    attribute = die.attributes.get(name)
    return attribute.value if attribute is not None else None


def _name(die: DIE) -> str | None:
    name = _attribute(die, "DW_AT_name")
    return None if name is None else os.fsdecode(name)


def _members(die: DIE, base: int) -> Iterator[Member]:
    for child in die.iter_children():
        if child.tag != "DW_TAG_member":
            continue
        text, size, unnamed = _describe(child.get_DIE_from_attribute("DW_AT_type"))
        offset = base + int(_attribute(child, "DW_AT_data_member_location") or 0)
        align = _attribute(child, "DW_AT_alignment") if text.startswith("__") else None
        inner = tuple(_members(unnamed, offset)) if unnamed is not None else ()
        yield Member(_name(child), offset, size, text, align, inner)


def _describe(die: DIE) -> tuple[str, int, DIE | None]:
    """A type as (its name in C, its size in bytes, its DIE where it is a struct or union without a name)."""
    name, size = _name(die), int(_attribute(die, "DW_AT_byte_size") or 0)
    if die.tag == "DW_TAG_pointer_type":
        return f"{_describe(die.get_DIE_from_attribute('DW_AT_type'))[0]} *", size, None
    if die.tag == "DW_TAG_array_type":
        element, each, _ = _describe(die.get_DIE_from_attribute("DW_AT_type"))
        count = 1
        for dimension in die.iter_children():
            upper = _attribute(dimension, "DW_AT_upper_bound")
            number = _attribute(dimension, "DW_AT_count")
            length = number if number is not None else 0 if upper is None else upper + 1
            count *= length
            element += f"[{length or ''}]"
        return element, each * count, None
    if die.tag in ("DW_TAG_structure_type", "DW_TAG_union_type", "DW_TAG_enumeration_type"):
        kind = {"DW_TAG_structure_type": "struct", "DW_TAG_union_type": "union"}.get(die.tag, "enum")
        return f"{kind} {name or '<anonymous>'}", size, die if name is None and kind != "enum" else None
    if die.tag in ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type"):
        inner_text, inner_size, unnamed = _describe(die.get_DIE_from_attribute("DW_AT_type"))
        return name or inner_text, inner_size, unnamed
    return name or "?", size, None
