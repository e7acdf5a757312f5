"""Addresses of Python's own mappings, and libc's mmap and munmap for holes in them."""

from __future__ import annotations

import ctypes
import mmap

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def address_in(memory: mmap.mmap) -> int:
    """Where a mapping of Python's is."""
    view = _Buffer()  # of a read-only mapping too, which ctypes' own from_buffer refuses
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(memory), ctypes.byref(view), 0)
    address = int(view.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address


class _Buffer(ctypes.Structure):
    """Py_buffer, as far as its address; the rest is room."""

    _fields_ = [("buf", ctypes.c_void_p), ("rest", ctypes.c_uint64 * 16)]
