"""A root file system as an initramfs: what boots a guest of another architecture than this machine's.

The format is Documentation/driver-api/early-userspace/buffer-format.rst of the kernel, its "newc" variant. The archive
is made straight from a directory or a tar file: nothing is unpacked here, so no rights are needed, and the guest's
writes stay in its own memory. What nobody runs in a guest (manuals, translations) is left out.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from iommulab.errors import UserError

#: Folders of a root that a guest for tests has no use for; /dev comes from devtmpfs.
_LEFT_OUT = ("dev/", "usr/include/", "usr/share/doc/", "usr/share/info/", "usr/share/locale/", "usr/share/man/", "var/")
_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
}
#: An entry: its path without a leading slash, its mode, its content (a link's target).
Entry = tuple[str, int, bytes]


class Archive:
    """An initramfs being written. Everything in it belongs to root."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._count = 0
        self.names: set[str] = set()

    def add(self, path: str, mode: int, content: bytes = b"") -> None:
        """One entry; folders above it that are missing come first."""
        parent = os.path.dirname(path)
        if parent and parent not in self.names:
            self.add(parent, stat.S_IFDIR | 0o755)
        self.names.add(path)
        self._entry(path, mode, content)

    def add_all(self, entries: Iterator[Entry]) -> None:
        for entry in entries:
            self.add(*entry)

    def add_folder(self, folder: Path, path: str) -> None:
        """The files of a folder here, at a path there; nothing compiled."""
        for file in sorted(folder.rglob("*")):
            if "__pycache__" not in file.parts and file.is_file():
                self.add(f"{path}/{file.relative_to(folder)}", stat.S_IFREG | 0o644, file.read_bytes())

    def close(self) -> None:
        self._entry("TRAILER!!!", 0, b"")

    def _entry(self, path: str, mode: int, content: bytes) -> None:
        self._count += 1
        name = os.fsencode(path) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # The inode's number, mode, owner, group, links, time, size, two devices, the name's size, no checksum.
        fields = (self._count, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        for part in (head, content):
            self._file.write(part + b"\0" * (-len(part) % 4))


def entries(root: Path) -> Iterator[Entry]:
    """What is in a root: a directory, or a tar file however compressed. UserError where it cannot be read."""
    try:
        yield from _directory(root) if root.is_dir() else _tar(root)
    except tarfile.TarError as error:
        raise UserError(f"{root} is neither a directory nor a tar file") from error
    except OSError as error:
        raise UserError(f"cannot read the root {root}: {(error.strerror or str(error)).lower()}") from error


def _directory(root: Path) -> Iterator[Entry]:
    for folder, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            inside = os.path.relpath(path, root)
            mode = os.lstat(path).st_mode
            if inside.startswith(_LEFT_OUT):
                continue
            if stat.S_ISLNK(mode):
                yield inside, mode, os.fsencode(os.readlink(path))
            elif stat.S_ISDIR(mode):
                yield inside, mode, b""
            elif stat.S_ISREG(mode):
                yield inside, mode, Path(path).read_bytes()


def _tar(root: Path) -> Iterator[Entry]:
    with tarfile.open(root) as tar:
        for member in tar:
            inside = member.name.removeprefix("./").strip("/")
            if member.type not in _KINDS or inside in ("", ".") or inside.startswith(_LEFT_OUT):
                continue
            content = b""
            if member.issym():
                content = os.fsencode(member.linkname)
            elif not member.isdir():
                file = tar.extractfile(member)  # of a hard link: what it links to
                content = file.read() if file is not None else b""
            yield inside, _KINDS[member.type] | member.mode, content
