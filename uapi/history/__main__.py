"""Add a release to the history files: `python -m uapi.history RELEASE TREE WORDS`.

TREE has the release's headers (see `uapi.headers`), WORDS say where they are from, for the record. Both architectures
are read, so the compiler must build 32-bit code too. What is there under the same name is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from uapi import history
from uapi.headers import HeaderError, read_headers
from uapi.layout import ARCHES
from uapi.version import parse


def main(arguments: list[str] | None = None) -> int:
    """Read the tree and rewrite the files: 0, or 2 with one sentence where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m uapi.history", description="Add a release to the history files.")
    parser.add_argument("release", metavar="RELEASE")
    parser.add_argument("tree", metavar="TREE", type=Path)
    parser.add_argument("words", metavar="WORDS")
    parser.add_argument("--into", metavar="DIRECTORY", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    try:
        parse(args.release)
        read = {arch: read_headers(args.tree, arch) for arch in ARCHES}
    except (ValueError, HeaderError) as error:
        print(f"uapi.history: {error}", file=sys.stderr)
        return 2
    for arch, table in read.items():
        path = args.into / f"{arch}.json.gz"
        tables = history.unpack(path.read_bytes()) if path.is_file() else {}
        tables[args.release] = dataclasses.replace(table, release=args.release, source=args.words)
        path.write_bytes(history.pack(list(tables.values())))
        print(f"{path}: {len(tables)} releases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
