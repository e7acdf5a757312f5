"""The smallest kernel that the suite's frame can run on: one node, one ioctl (number 1 answers, others ENOTTY)."""

from __future__ import annotations

import errno
import os
from typing import Any

from uapi.buffers import AnonymousBuffer


class File:
    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(os.devnull, os.O_RDWR)

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, arg: Any = 0) -> int:
        if request != 1:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Backend:
    def __init__(self, name: str = "model", release: str = "6.6") -> None:
        self.name, self.release = name, release

    def open(self, path: str, flags: int = 0) -> File:
        if path != "/dev/iommu":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return File(path)

    def listdir(self, path: str) -> list[str]:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def buffer(self, length: int, *, huge: bool = False) -> AnonymousBuffer:
        return AnonymousBuffer(length)

    def failure_notes(self) -> list[str]:
        return ["the walk ended at level 2"]

    def close(self) -> None: ...
