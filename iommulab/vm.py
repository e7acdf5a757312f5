"""`--on vm`: the suite inside a guest, on a real kernel under QEMU. The guest itself is in `iommulab.guest`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from iommulab.errors import UserError
from iommulab.follow import NOTHING, USAGE, tail
from iommulab.guest import Guest
from iommulab.kernel_images import Image
from iommulab.progress import SuiteProgress
from iommulab.results import SUITE


class VmLaunch:
    """The test process in a guest that is booted for it."""

    def __init__(
        self,
        image: Image,
        machine: str,
        selection: list[str],
        directory: Path,
        pytest: list[str],
        progress: SuiteProgress,
    ) -> None:
        self._guest = Guest(image, machine, directory)
        self._directory = directory
        self._selection = selection
        self._pytest = pytest
        self._collect()
        progress.status("probing KVM")
        problem = self._guest.probe_kvm()
        if problem is not None:
            progress.say(f"vm: KVM is not used: {problem}; emulating (TCG)")
        progress.status(f"booting {image.release or image.path.name}")
        self.environment: dict[str, Any] = {
            "image": image.path.name,
            "qemu": self._guest.qemu.version,
            "accelerator": self._guest.accelerator,
        }

    def _collect(self) -> None:
        """Let the host collect once: wrong arguments show before a boot, and the guest, where Python is slow, finds
        every module compiled."""
        command = [*self._pytest, "--collect-only", "-q", "--backend", "uapi.linux:LinuxBackend", *self._selection]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(SUITE.parent)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SUITE.parent)
        if done.returncode == NOTHING:
            raise UserError("no test matches")
        if done.returncode == USAGE:
            lines = (done.stdout + done.stderr).splitlines()
            told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            raise UserError("; ".join(told) or "pytest refused its arguments")

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        arguments = [*self._pytest, "--backend", "uapi.linux:LinuxBackend", *self._selection]
        arguments += ["--only", str(only)] if only is not None else []
        command = f'{shlex.join(arguments)} --events "$events"'
        return self._guest.start(command, events, self._log(attempt), self._console(attempt))

    def _console(self, attempt: int) -> Path:
        return self._directory / f"console.{attempt}.log"

    def _log(self, attempt: int) -> Path:
        return self._directory / f"pytest.{attempt}.log"

    def obituary(self, status: int | None, attempt: int) -> str:
        told = tail(self._console(attempt), 2000)
        panic = re.search(r"Kernel panic - not syncing: (.*)", told)
        if panic:
            return f"the guest's kernel panicked: {panic.group(1).strip()}"
        oops = re.search(r"(BUG: .*|Oops: .*|general protection fault.*)", told)
        suffix = f"; its console says: {oops.group(1).strip()}" if oops else ""
        if status is None:
            return f"the guest was stopped{suffix}"
        return f"the guest ended with the test (status {status}){suffix}"

    def output(self, attempt: int) -> str:
        return f"{tail(self._log(attempt), 30)}\n{tail(self._console(attempt), 15)}".strip()
