"""The suite's frame (conformance/conftest.py), on a tiny suite and a fake kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SUITE = """
import os, time, pytest

def test_passes(iommu):
    iommu.ioctl(1)

def test_fails(kernel):
    with kernel.open("/dev/iommu") as file:
        file.ioctl(2)

@pytest.mark.since("6.13")
def test_new(kernel): ...

@pytest.mark.since("6.6")
def test_old_enough(kernel): ...

@pytest.mark.needs("dma_device")
def test_device(kernel): ...

@pytest.mark.model_only("a reason")
def test_of_the_model(kernel): ...

@pytest.mark.linux_only("another")
def test_of_linux(kernel): ...

@pytest.mark.differs("known")
def test_known(kernel):
    assert kernel.name == "linux"

@pytest.mark.differs("known no more")
def test_mended(kernel): ...

def test_notes(kernel):
    kernel.note("seen", [1, 2])

def test_leaves_a_file_open(kernel):
    kernel.open("/dev/iommu")

def test_slow(kernel):
    if kernel.release == "6.7":
        time.sleep(60)
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "pytest.ini").write_text((ROOT / "conformance" / "pytest.ini").read_text())
    (folder / "test_tiny.py").write_text(SUITE)
    return folder


def run(suite: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]], list[Any]]:
    events = suite / "events"
    command = [sys.executable, "-m", "pytest", "-c", str(suite / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    command += ["-p", "conformance.conftest", "--backend", "fake_backend:Backend", "--events", str(events)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, *arguments, str(suite)], capture_output=True, text=True, env=environment, cwd=suite, check=False
    )
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return done, {line["id"].partition("::")[2]: line for line in lines if line["event"] == "result"}, lines


def test_verdicts_and_reasons(suite: Path) -> None:
    done, tests, lines = run(suite)
    assert done.returncode == 1
    found = {name: (test["verdict"], test["reason"]) for name, test in tests.items()}
    assert found == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", "OSError: [Errno 25] Inappropriate ioctl for device"),
        "test_new": ("skipped", "needs Linux 6.13"),
        "test_old_enough": ("passed", ""),
        "test_device": ("skipped", "no edu device (PCI 1234:11e8)"),
        "test_of_the_model": ("passed", ""),
        "test_of_linux": ("skipped", "linux only: another"),
        "test_known": ("xfailed", "known"),
        "test_mended": ("failed", "[XPASS(strict)] known no more"),
        "test_notes": ("passed", ""),
        "test_leaves_a_file_open": ("passed", ""),
        "test_slow": ("passed", ""),
    }
    begin, end = lines[0], lines[-1]
    assert (begin["event"], begin["backend"], begin["release"], len(begin["ids"])) == ("begin", "model", "6.6", 12)
    assert (end["event"], end["status"]) == ("end", 1)


def test_calls_notes_and_markers_are_reported(suite: Path) -> None:
    _, tests, _ = run(suite)
    assert [call["call"] for call in tests["test_fails"]["calls"]] == ["open", "ioctl 0x2", "close"]
    assert tests["test_fails"]["calls"][1]["errno"] == "ENOTTY"
    assert tests["test_notes"]["notes"] == {"seen": [1, 2]}
    assert tests["test_new"]["markers"] == {"since": ["6.13"]}
    assert tests["test_leaves_a_file_open"]["calls"][-1]["call"] == "close"


def test_failure_shows_the_calls_and_the_models_view(suite: Path) -> None:
    done, tests, _ = run(suite)
    sections = dict(tests["test_fails"]["sections"])
    assert "ioctl 0x2(fd1) = -ENOTTY" in sections["Recorded calls"]
    assert sections["The model's view"] == "the walk ended at level 2"
    assert "ioctl 0x2(fd1) = -ENOTTY" in done.stdout


def test_on_a_real_kernel_the_known_differences_must_pass(suite: Path) -> None:
    _, tests, _ = run(suite, "--backend-option", "name=linux", "--backend-option", "release=7.3.4-test")
    assert tests["test_known"]["verdict"] == "passed"
    assert tests["test_new"]["verdict"] == "passed"
    assert tests["test_of_the_model"]["reason"] == "model only: a reason"


def test_only_the_listed_tests_run_in_the_listed_order(suite: Path) -> None:
    (suite / "only").write_text("test_tiny.py::test_notes\ntest_tiny.py::test_passes\n")
    _, _, lines = run(suite, "--only", str(suite / "only"))
    started = [line["id"].partition("::")[2] for line in lines if line["event"] == "start"]
    assert started == ["test_notes", "test_passes"]


def test_begin_knows_what_was_deselected(suite: Path) -> None:
    _, _, lines = run(suite, "-k", "notes")
    assert lines[0]["ids"] == ["test_tiny.py::test_notes"]


def test_a_test_that_does_not_end_fails(suite: Path) -> None:
    _, tests, _ = run(suite, "--backend-option", "release=6.7", "--test-time", "0.5", "-k", "slow")
    assert tests["test_slow"]["verdict"] == "failed"
    assert "no end after 0.5 s" in tests["test_slow"]["reason"]


def test_workers_report_through_one_stream(suite: Path) -> None:
    _, tests, lines = run(suite, "-p", "xdist", "-n", "2")
    assert len(tests) == 12
    assert [line["event"] for line in lines].count("begin") == 1
    assert tests["test_fails"]["calls"][1]["errno"] == "ENOTTY"


def test_unknown_backend_is_one_sentence(suite: Path) -> None:
    done, _, _ = run(suite, "--backend", "nowhere:Nothing")
    assert done.returncode == 4
    assert "No module named 'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_need_is_an_error(suite: Path) -> None:
    (suite / "test_wrong.py").write_text("import pytest\n@pytest.mark.needs('moon')\ndef test_x(kernel): ...\n")
    done, _, _ = run(suite)
    assert done.returncode == 4
    assert "needs('moon') is unknown" in done.stdout + done.stderr
