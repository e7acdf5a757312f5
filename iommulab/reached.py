"""A pytest plugin (`-p iommulab.reached`) that notes which lines of the model a test process runs.

Each process, xdist's workers too, writes its own file into the folder that IOMMULAB_REACHED names. Loading the plugin
starts the measurement, so that nothing of the model is imported before.
"""

from __future__ import annotations

import os
from pathlib import Path

import coverage
import pytest

_FOLDER = Path(os.environ["IOMMULAB_REACHED"])
_MODEL = Path(__file__).resolve().parent.parent / "kernel_model"

_coverage = coverage.Coverage(
    data_file=str(_FOLDER / "lines"),
    data_suffix=True,
    include=[f"{_MODEL}/*"],
    config_file=False,
    messages=False,
)
_coverage.start()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """A worker that has told its end is killed soon after: what it ran is saved before."""
    _coverage.stop()
    _coverage.save()
