"""What a person sees when a command cannot do what was asked."""

from __future__ import annotations


class UserError(Exception):
    """One clear sentence for the person at the terminal; the command ends with status 2."""
