"""The console that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

#: Columns of a table where nobody's terminal says how wide it is: a log, a pipe.
LOG_WIDTH = 132


def console() -> Console:
    """Lines are not wrapped; tables are as wide as the terminal."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
