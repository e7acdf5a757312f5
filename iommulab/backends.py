"""Factories for `--backend`: how the suite gets the model."""

from __future__ import annotations

from kernel_model.kernel import Kernel


def model(
    machine: str = "q35-vtd-legacy", version: str = "7.3", dmabuf_get: str = "fd", caching: str = "always"
) -> Kernel:
    """A freshly booted model. ValueError for an unknown machine, release or choice."""
    return Kernel(machine, version, dmabuf_get=dmabuf_get, caching=caching)
