"""The two ways a call can end badly.

`KernelError` is what a client sees: an `OSError` with the kernel's errno and, for the reader of a trace, the reason.
`KernelBug` is the model having broken an invariant of its own: it is never caught and always fails a test.
"""

from __future__ import annotations

import os
from errno import errorcode


class KernelError(OSError):
    """An errno for the client. `why` is one clause for people; the kernel itself says nothing.

    Like an OSError of the real kernel it is also what Python calls its errno: a FileNotFoundError, a PermissionError.
    """

    why: str

    def __new__(cls, errno: int, why: str = "") -> KernelError:
        kind, text = _KINDS.get(errno) or (KernelError, os.strerror(errno))
        error = super().__new__(kind, errno, text)
        error.why = why
        return error

    def __init__(self, errno: int, why: str = "") -> None:
        """All is done: an OSError takes its arguments in __new__ where that is overridden."""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.why}" if self.why else super().__str__()


def _kinds() -> dict[int, tuple[type[KernelError], str]]:
    """errno -> the class, which is also Python's own subclass of OSError where it has one, and the message."""
    found: dict[int, tuple[type[KernelError], str]] = {}
    made: dict[type[OSError], type[KernelError]] = {OSError: KernelError}
    for number in errorcode:
        base = type(OSError(number, ""))
        if base not in made:
            made[base] = type("KernelError", (KernelError, base), {})
        found[number] = made[base], os.strerror(number)
    return found


_KINDS = _kinds()


class KernelBug(Exception):
    """The model contradicts itself."""
