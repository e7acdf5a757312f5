"""QEMU's answers as files: tests/vectors/qemu/UNIT-NN.json.gz.

A file has the unit's name, the parameters that ours is built with, and [case, answers] pairs. They are recorded with
`python -m tests.qemu.judged UNIT CASES [FIRST]`, which needs QEMU (tests/qemu/qtest.py says how it is found).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "vectors" / "qemu"
PER_FILE = 1000


def names(unit: str) -> list[Path]:
    """The files of a unit."""
    return sorted(DIRECTORY.glob(f"{unit}-[0-9][0-9].json.gz"))


def load(path: Path) -> dict:
    with gzip.open(path, "rt") as stream:
        return json.load(stream)


def save(unit: str, number: int, content: dict) -> Path:
    """Write a file; the same content gives the same bytes."""
    path = DIRECTORY / f"{unit}-{number:02}.json.gz"
    data = json.dumps(content, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    return path
