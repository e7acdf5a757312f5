"""The memory of a fuzzed program: always at the same addresses, so that a program is the same bytes everywhere.

A program's pointers are numbers in it, automatic IOVAs follow from them, and nothing of an answer has to be made
comparable afterwards. What is where is in `REGIONS`; between and behind the regions nothing is mapped, so that a range
may run off an end. `WORK` holds the program's own blocks and outputs. Standard library only: this runs in bare guests.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Sequence

PAGE = 4096
#: High enough for nobody to be there (an executable, its heap), low enough for 39 bits of address.
BASE = 0x10_0000_0000

#: Name: address, pages.
REGIONS = {
    "buf": (BASE, 32),  # read and write
    "hole": (BASE + 32 * PAGE, 4),  # not mapped
    "tail": (BASE + 36 * PAGE, 8),  # read and write
    "ro": (BASE + 44 * PAGE, 8),  # written once, then read-only
    "none": (BASE + 52 * PAGE, 4),  # mapped without access
    "file": (BASE + 56 * PAGE, 16),  # a shared mapping of the memfd
    "gap": (BASE + 72 * PAGE, 56),  # not mapped
    "work": (BASE + 128 * PAGE, 16),  # blocks, inputs and outputs of the calls; nothing mapped behind
}
WORK = REGIONS["work"][0]
WORK_SIZE = 16 * PAGE
#: A page of the executor's own.
SYSTEM = BASE + 192 * PAGE
_END = BASE + 193 * PAGE

#: Descriptors that programs know by number. Files that calls open get numbers from FIRST_FD on, so that no id of an
#: object is the number of a file.
MEMFD, NULL_FD, FIRST_FD = 900, 901, 64

#: Regions whose contents and pins belong to a program's outcome.
WATCHED = ("buf", "tail", "ro", "file")

_PROT_NONE, _PROT_READ, _PROT_RW = 0, 1, 3
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NOREPLACE = 1, 2, 0x10, 0x20, 0x100000
_NOHUGEPAGE = 15
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mprotect = _libc.mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_memcmp = _libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def pattern(name: str) -> bytes:
    """What a region holds when a program starts: each 8 bytes tell their own place."""
    start, pages = REGIONS[name]
    return b"".join((start + offset | 1).to_bytes(8, "little") for offset in range(0, pages * PAGE, 8))


def _map(address: int, length: int, prot: int, flags: int, fd: int = -1) -> None:
    got = _mmap(address, length, prot, flags, fd, 0)
    if got == _FAILED or got is None:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mmap at {address:#x}")
    if got != address:
        raise OSError(0, f"mmap at {address:#x} went to {got:#x}")


class Memory:
    """The regions, mapped; one at a time in a process. OSError where the addresses are taken."""

    def __init__(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft <= NULL_FD:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
        self.patterns = {name: pattern(name) for name in WATCHED}
        _map(BASE, _END - BASE, _PROT_NONE, _PRIVATE | _ANONYMOUS | _NOREPLACE)
        self._file = -1
        self.build()
        self.work = memoryview((ctypes.c_char * WORK_SIZE).from_address(WORK)).cast("B")

    def build(self) -> None:
        """Map everything afresh: no page is what it was before."""
        _munmap(BASE, _END - BASE)
        if self._file >= 0:
            os.close(self._file)
        self._file = os.memfd_create("iommulab-fuzz")
        if self._file < MEMFD:
            os.dup2(self._file, MEMFD)
            os.close(self._file)
            self._file = MEMFD
        for name, (address, pages) in REGIONS.items():
            if name == "file":
                os.ftruncate(self._file, pages * PAGE)
                _map(address, pages * PAGE, _PROT_RW, _SHARED | _FIXED, self._file)
            elif name not in ("hole", "gap"):
                _map(address, pages * PAGE, _PROT_RW, _PRIVATE | _ANONYMOUS | _FIXED)
                _madvise(address, pages * PAGE, _NOHUGEPAGE)
        _map(SYSTEM, PAGE, _PROT_RW, _PRIVATE | _ANONYMOUS | _FIXED)
        ctypes.memset(WORK, 0, WORK_SIZE)
        ctypes.memset(SYSTEM, 0, PAGE)
        for name, content in self.patterns.items():
            ctypes.memmove(REGIONS[name][0], content, len(content))
        _mprotect(REGIONS["ro"][0], REGIONS["ro"][1] * PAGE, _PROT_READ)
        _mprotect(REGIONS["none"][0], REGIONS["none"][1] * PAGE, _PROT_NONE)

    def differing(self, names: Sequence[str]) -> list[str]:
        """Those of the regions (readable ones) that do not hold their pattern."""
        return [name for name in names if _memcmp(REGIONS[name][0], self.patterns[name], len(self.patterns[name])) != 0]

    @staticmethod
    def content(name: str) -> bytes:
        """A region's bytes; it must be readable."""
        address, pages = REGIONS[name]
        return ctypes.string_at(address, pages * PAGE)

    def restore(self, names: list[str]) -> None:
        """Write the pattern of these regions again."""
        for name in names:
            ctypes.memmove(REGIONS[name][0], self.patterns[name], len(self.patterns[name]))

    @staticmethod
    def poke(address: int, length: int, words: Sequence[tuple[int, int]]) -> int:
        """Zero so much memory but for these words of 8 bytes, each at its offset: 0."""
        ctypes.memset(address, 0, length)
        for offset, word in words:
            ctypes.c_uint64.from_address(address + offset).value = word
        return 0

    @staticmethod
    def unmap(address: int, length: int) -> int:
        """munmap(2): 0 or the errno, negative."""
        return -ctypes.get_errno() if _munmap(address, length) else 0

    @staticmethod
    def protect(address: int, length: int, prot: int) -> int:
        """mprotect(2): 0 or the errno, negative."""
        return -ctypes.get_errno() if _mprotect(address, length, prot) else 0

    def close(self) -> None:
        """Unmap everything."""
        self.work.release()
        _munmap(BASE, _END - BASE)
        os.close(self._file)
