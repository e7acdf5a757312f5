"""Factories for `--backend`: how the suite gets the model."""

from __future__ import annotations

from kernel_model.kernel import Kernel


def model(machine: str = "q35-vtd-legacy", version: str = "7.3") -> Kernel:
    """A freshly booted model. ValueError for an unknown machine or release."""
    return Kernel(machine, version)
