"""Recorded ABI tables of sampled releases, machine-made from the headers of each.

One file an architecture, `x86_64.json.gz` and `i386.json.gz`: the rows that all its releases have among them, each
once, and for each release the numbers of its own rows. The text inside depends on the tables alone.

Releases named -rcN are samples taken after that merge window closed. 6.1 was sampled from a stable release, and
without iommufd.h, which came in 6.2. Not sampled: 7.0, 7.1, and the first release of 6.13 to 6.18.

`python -m uapi.history RELEASE TREE WORDS` adds a sample.
"""

from __future__ import annotations

import functools
import gzip
import json
from importlib import resources
from typing import Any

from uapi.table import Table, from_json, to_json
from uapi.version import parse

_PARTS = ("ioctls", "structs", "constants")


def pack(tables: list[Table]) -> bytes:
    """The tables of one architecture as the bytes of a history file."""
    pool: dict[str, int] = {}
    releases = []
    for table in sorted(tables, key=lambda table: parse(table.release)):
        data = to_json(table)
        for part in _PARTS:
            rows = (json.dumps([name, row], separators=(",", ":")) for name, row in data[part].items())
            data[part] = [pool.setdefault(row, len(pool)) for row in rows]
        releases.append(data)
    text = json.dumps({"rows": [json.loads(row) for row in pool], "releases": releases}, separators=(",", ":"))
    return gzip.compress(text.encode(), 9, mtime=0)


def unpack(data: bytes) -> dict[str, Table]:
    """The tables in a history file, by release, in the order of `Release`."""
    content = json.loads(gzip.decompress(data))
    tables = {}
    for release in content["releases"]:
        whole: dict[str, Any] = dict(release)
        for part in _PARTS:
            whole[part] = dict(content["rows"][number] for number in release[part])
        tables[release["release"]] = from_json(whole)
    return tables


@functools.cache
def tables(arch: str = "x86_64") -> dict[str, Table]:
    """All sampled releases of an architecture ("x86_64" or "i386"), by name, oldest first. LookupError for others."""
    path = resources.files(__name__) / f"{arch}.json.gz"
    if not path.is_file():
        raise LookupError(f"no history is kept for the architecture {arch!r}")
    return unpack(path.read_bytes())


def table(release: str, arch: str = "x86_64") -> Table:
    """The recorded table of a release. LookupError where it was not sampled."""
    found = tables(arch).get(release)
    if found is None:
        raise LookupError(f"{release} was not sampled; the samples are {', '.join(tables(arch))}")
    return found
