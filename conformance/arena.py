"""Client memory for the tests of bad pointers: pages that the test protects or unmaps one by one.

This is ordinary memory of the process, made with libc's own mmap and mprotect, and the kernel under test gets bare
addresses of it: the real kernel and the model both have to find out by themselves what may be read or written.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from uapi.backend import MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE

PAGE = 4096
_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`pages` zeroed pages in a row; `address` is that of the first."""

    def __init__(self, pages: int) -> None:
        address = _libc.mmap(None, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.address: int = address
        self._mapped = set(range(pages))

    def page(self, index: int) -> int:
        """Address of a page's first byte."""
        return self.address + index * PAGE

    def protect(self, index: int, prot: int) -> None:
        """mprotect one page."""
        if _libc.mprotect(self.page(index), PAGE, prot) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def read_only(self, index: int) -> None:
        self.protect(index, PROT_READ)

    def no_access(self, index: int) -> None:
        self.protect(index, PROT_NONE)

    def unmap(self, index: int) -> None:
        """Leave a hole where the page was."""
        self._mapped.remove(index)
        _libc.munmap(self.page(index), PAGE)

    def renew(self, index: int) -> None:
        """Put a fresh page in its place."""
        prot, flags = PROT_READ | PROT_WRITE, MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED
        if _libc.mmap(self.page(index), PAGE, prot, flags, -1, 0) != self.page(index):
            raise OSError(ctypes.get_errno(), "mmap")

    @staticmethod
    def write(address: int, data: bytes | ctypes.Structure) -> None:
        """Put bytes, or those of a struct, anywhere in the arena's writable pages."""
        data = bytes(data)
        ctypes.memmove(address, data, len(data))

    @staticmethod
    def read(address: int, length: int) -> bytes:
        return ctypes.string_at(address, length)

    def close(self) -> None:
        for index in self._mapped:
            _libc.munmap(self.page(index), PAGE)
        self._mapped.clear()


@contextlib.contextmanager
def arena(pages: int) -> Iterator[Arena]:
    """An `Arena` for the length of a block."""
    memory = Arena(pages)
    try:
        yield memory
    finally:
        memory.close()
