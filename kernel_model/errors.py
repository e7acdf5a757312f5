"""The two ways a call can end badly.

`KernelError` is what a client sees: an `OSError` with the kernel's errno and, for the reader of a trace, the reason.
`KernelBug` is the model having broken an invariant of its own: it is never caught and always fails a test.
"""

from __future__ import annotations

import os


class KernelError(OSError):
    """An errno for the client. `why` is one clause for people; the kernel itself says nothing."""

    def __init__(self, errno: int, why: str = "") -> None:
        super().__init__(errno, os.strerror(errno))
        self.why = why

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.why}" if self.why else super().__str__()


class KernelBug(Exception):
    """The model contradicts itself."""
