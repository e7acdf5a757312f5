"""Which tests of the suite are meant, and how pytest is called for them."""

from __future__ import annotations

import os
import subprocess
import sys

from iommulab.errors import UserError
from iommulab.results import SUITE

#: pytest's exit statuses: wrong usage, nothing collected.
USAGE, NOTHING = 4, 5
LINUX = "uapi.linux:LinuxBackend"


def pytest_command(arguments: list[str], python: str = sys.executable) -> list[str]:
    """How pytest is run on the suite, wherever it runs. Without a cache: the suite's folder may be read-only.

    The suite's own options must be whole words (--backend=NAME): before it has read conftest.py, pytest 8 takes a value
    that stands alone for a test, and then no other for one.
    """
    return [python, "-m", "pytest", "-c", str(SUITE / "pytest.ini"), "-p", "no:cacheprovider", *arguments]


def pytest_environment() -> dict[str, str]:
    """pytest's own plugins only: what else is installed here, or set in this shell, is no part of the suite."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUITE.parent), environment.get("PYTHONPATH")]))
    return environment


def select_tests(wanted: list[str]) -> list[str]:
    """pytest's arguments for test ids, files or areas ("ioas_map"); the whole suite for none."""
    chosen = []
    for name in wanted:
        path, separator, rest = name.removeprefix("conformance/").partition("::")
        for candidate in (path, f"test_{path}.py", f"{path}.py"):
            if path and (SUITE / candidate).is_file():
                chosen.append(f"{SUITE / candidate}{separator}{rest}")
                break
        else:
            raise UserError(f"there is no test {name!r}: an area (ioas_map), a file (test_ioas_map.py) or a test id")
    return chosen or [str(SUITE)]


def check_selection(selection: list[str]) -> None:
    """Collect once without running anything. UserError where pytest has something to say against it.

    It also leaves every module compiled, for a guest where Python is slow.
    """
    command = pytest_command(["--collect-only", "-q", f"--backend={LINUX}", *selection])
    done = subprocess.run(
        command, capture_output=True, text=True, env=pytest_environment(), cwd=SUITE.parent, check=False
    )
    if done.returncode == NOTHING:
        raise UserError("no test matches")
    if done.returncode == USAGE:
        raise UserError(complaint(done.stdout + done.stderr) or "pytest refused its arguments")


def complaint(output: str) -> str:
    """pytest's own error lines, each once."""
    told = [line.partition("ERROR: ")[2].strip() for line in output.splitlines() if "ERROR: " in line]
    return "; ".join(dict.fromkeys(filter(None, told)))
