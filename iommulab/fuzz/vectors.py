"""Programs with a real kernel's answers, in files: `--record` writes them, `--against recorded` reads them.

A file is gzipped JSON: the kernel's release, the seed, the machine where it is not the mock driver's alone, and the
programs with their answers. Of an answer it keeps the
results, the final state, and of the work region the bytes that the kernel changed.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iommulab.errors import UserError
from iommulab.files import write
from iommulab.fuzz.executor import Answer
from iommulab.fuzz.program import Program, compile_program

FORMAT = 1
#: Programs of one file in a directory of them.
PER_FILE = 50


@dataclass(slots=True)
class Vectors:
    """What a file holds: (number, program, answer) in order."""

    release: str
    seed: int
    items: list[tuple[int, Program, Answer]] = field(default_factory=list)
    machine: str = "mock"

    def save(self, path: Path) -> list[Path]:
        """Write the file, or into a directory files of `PER_FILE` programs; what was written.

        The same content gives the same bytes.
        """
        if path.is_dir():
            written = []
            for start in range(0, len(self.items), PER_FILE):
                machine = "" if self.machine == "mock" else f"-{self.machine}"
                name = f"{self.release.partition('-')[0]}{machine}-{start // PER_FILE:02}.json.gz"
                part = Vectors(self.release, self.seed, self.items[start : start + PER_FILE], self.machine)
                written += part.save(path / name)
            return written
        items = [[number, program.to_json(), *_pack(program, answer)] for number, program, answer in self.items]
        data: dict[str, Any] = {"format": FORMAT, "release": self.release, "seed": self.seed}
        if self.machine != "mock":
            data["machine"] = self.machine
        data["programs"] = items
        text = json.dumps(data, separators=(",", ":")).encode()
        write(path, gzip.compress(text, 9, mtime=0))
        return [path]


def load(path: Path) -> Vectors:
    """Read a file. UserError where it is none."""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        if data["format"] != FORMAT:
            raise UserError(f"{path} has format {data['format']}, not {FORMAT}: record it again")
        found = Vectors(data["release"], data["seed"], machine=data.get("machine", "mock"))
        for number, calls, *packed in data["programs"]:
            program = Program.from_json(calls)
            found.items.append((number, program, _unpack(program, packed)))
    except (ValueError, LookupError, TypeError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no file of recorded answers: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    return found


def _pack(program: Program, answer: Answer) -> list[Any]:
    results, work, final = answer
    image = compile_program(program).image
    padded = image + bytes(len(work) - len(image))
    delta = bytes(a ^ b for a, b in zip(work, padded, strict=True))
    return [results, base64.b64encode(zlib.compress(delta, 9)).decode(), final]


def _unpack(program: Program, packed: list[Any]) -> Answer:
    results, text, final = packed
    delta = zlib.decompress(base64.b64decode(text))
    image = compile_program(program).image
    padded = image + bytes(len(delta) - len(image))
    return results, bytes(a ^ b for a, b in zip(delta, padded, strict=True)), final


def chunks(directory: Path) -> Iterator[Path]:
    """The files of a directory, in order."""
    yield from sorted(directory.glob("*.json.gz"))
