"""`--on vm`: the suite inside a guest, on a real kernel under QEMU. The guest itself is in `iommulab.guest`."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from iommulab.follow import tail
from iommulab.guest import make_guest
from iommulab.kernel_images import Image
from iommulab.progress import SuiteProgress
from iommulab.selection import LINUX, check_selection, pytest_command


class VmLaunch:
    """The test process in a guest that is booted for it."""

    def __init__(
        self,
        image: Image,
        machine: str,
        selection: list[str],
        directory: Path,
        progress: SuiteProgress,
        root: Path | None = None,
    ) -> None:
        self._guest = make_guest(image, machine, directory, root)
        self._directory = directory
        self._selection = selection
        check_selection(selection)
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

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        arguments = pytest_command([f"--backend={LINUX}", *self._selection], self._guest.python)
        arguments += [f"--only={only}"] if only is not None else []
        command = f'{shlex.join(arguments)} --events="$events"'
        files = (only,) if only is not None else ()
        return self._guest.start(command, events, self._log(attempt), self._console(attempt), files=files)

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
