"""`conformance/DIFFERENCES.md`: where the model is known to differ from a real kernel, and why.

The file is Markdown for people with a fixed form for each entry::

    ## test_ioas_map.py::test_something
    - versions: 7.3, 6.12
    - model: what the model does
    - kernel: what the kernel does
    - why: why the model is not made to do the same

The heading is a test id; without its `[parameters]` it stands for all of them. `versions` are releases of the real
kernel: "7.3" holds for all of 7.3.y, "7.3.4" for that one, "all" for every one. A value may go on in indented lines.
Text before the first entry is free, and so are headings of level 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from iommulab.errors import UserError
from iommulab.results import SUITE

FILE = SUITE / "DIFFERENCES.md"
KEYS = ("versions", "model", "kernel", "why")
_VERSION = re.compile(r"all|\d+\.\d+(\.\d+)?")


@dataclass(slots=True)
class Difference:
    """One entry."""

    test: str
    line: int
    values: dict[str, str] = field(default_factory=dict)

    @property
    def versions(self) -> list[str]:
        return [version.strip() for version in self.values["versions"].split(",")]

    def is_about(self, test_id: str) -> bool:
        return test_id == self.test or test_id.partition("[")[0] == self.test

    def holds_for(self, release: str) -> bool:
        """Whether the entry speaks of a kernel of this release ("7.3.4-oracle")."""
        plain = re.match(r"[\d.]*", release)
        number = plain.group() if plain else ""
        return any(
            version == "all" or number == version or number.startswith(f"{version}.") for version in self.versions
        )


def parse(text: str, name: str = "DIFFERENCES.md") -> list[Difference]:
    """The entries of a file. UserError that names the line of the first malformed one."""
    entries: list[Difference] = []
    entry: Difference | None = None
    key = ""
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}, line {number}"
        if line.startswith("## "):
            test = line[3:].strip().strip("`")
            if not re.fullmatch(r"test_\w+\.py::\S.*", test):
                raise UserError(f"{where}: {test!r} is not a test id like test_ioas_map.py::test_name")
            if any(other.test == test for other in entries):
                raise UserError(f"{where}: {test} has an entry already")
            entry, key = Difference(test, number), ""
            entries.append(entry)
        elif line.startswith("# "):
            entry, key = None, ""
        elif entry is None or not line.strip():
            continue
        elif found := re.fullmatch(r"[-*] (\w+):\s*(.*)", line):
            key, value = found.groups()
            if key not in KEYS:
                raise UserError(f"{where}: unknown key {key!r}; an entry has {', '.join(KEYS)}")
            if key in entry.values:
                raise UserError(f"{where}: {key!r} is said twice")
            entry.values[key] = value.strip()
        elif key and line[0] in " \t":
            entry.values[key] = f"{entry.values[key]} {line.strip()}".strip()
        else:
            raise UserError(f"{where}: expected '- key: value' or an indented line that goes on, not {line.strip()!r}")
    for entry in entries:
        for key in KEYS:
            if not entry.values.get(key):
                raise UserError(f"{name}, line {entry.line}: the entry of {entry.test} has no {key!r}")
        for version in entry.versions:
            if not _VERSION.fullmatch(version):
                raise UserError(f"{name}, line {entry.line}: {version!r} is not a release like 7.3 or 7.3.4, nor 'all'")
    return entries


def load(path: Path = FILE) -> list[Difference]:
    """The entries of the file; none where there is no file."""
    try:
        return parse(path.read_text(), path.name)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def entry_for(entries: Iterable[Difference], test_id: str, release: str) -> Difference | None:
    """The entry that explains a test's difference on a kernel of this release."""
    for entry in entries:
        if entry.is_about(test_id) and entry.holds_for(release):
            return entry
    return None
