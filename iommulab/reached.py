"""A pytest plugin (`-p iommulab.reached`) that notes which lines of the model a test process runs.

Each process, xdist's workers too, writes its own file into the folder that IOMMULAB_REACHED names. Loading the plugin
starts the measurement, so that nothing of the model is imported before.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import coverage

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


@atexit.register
def _save() -> None:
    _coverage.stop()
    _coverage.save()
