"""Files that a user asked for: whole or not at all, and refused before a long run where they cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from iommulab.errors import UserError


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")


def _is_special(path: Path) -> bool:
    """A device, a pipe: written to, never replaced."""
    return path.exists() and not path.is_file()


def check_writable(path: Path) -> None:
    """UserError in one sentence where `write` would fail; nothing is left behind."""
    path = Path(os.path.realpath(path))
    try:
        if _is_special(path):
            path.open("ab").close()
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise _refused(path, error) from error


def write(path: Path, data: bytes) -> None:
    """The file is the old one until the new one is whole. UserError where it cannot be written."""
    path = Path(os.path.realpath(path))  # of a link, what it leads to is replaced
    try:
        if _is_special(path):
            path.write_bytes(data)
            return
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_bytes(data)
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise _refused(path, error) from error
