"""Fixtures of the model's own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel_model.kernel import Kernel


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel on a machine without devices."""
    with Kernel("bare") as kernel:
        yield kernel
