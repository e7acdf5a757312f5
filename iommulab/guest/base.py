"""What every guest does, whatever boots it.

What the script writes to "$events" goes through a virtio port, which QEMU appends to a file here: every line is out of
the guest before the next step, so a panic loses nothing. The guest's console goes to a file of its own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from iommulab.errors import UserError
from iommulab.follow import tail
from iommulab.guest.machines import GuestMachine
from iommulab.guest.qemu import find_qemu, kvm_problem, missing, scalable_property
from iommulab.kernel_images import Image
from iommulab.results import SUITE
from iommulab.session import kill

EVENTS = "iommulab.events"
MEMORY = "2G"
#: 80 huge pages for the tests that need them; the console tells warnings and IOMMU faults, not the whole boot.
KERNEL_ARGUMENTS = "hugepages=80 loglevel=6 panic=-1"


def port(name: str, path: Path, told: str) -> str:
    """QEMU's options for a port that the guest finds as `told` and whose data is appended to a file."""
    return (
        f"-chardev file,id={name},path={path},append=on "
        f"-device virtserialport,bus=iommulab.0,chardev={name},name={told}"
    )


def events_port(path: Path) -> str:
    """QEMU's options for the ports' controller and the port of the events."""
    return f"-device virtio-serial-pci,id=iommulab {port('events', path, EVENTS)}"


class Guest(ABC):
    """An image and a machine, ready to boot. UserError where something to boot with is missing."""

    def __init__(self, image: Image, machine: GuestMachine, directory: Path) -> None:
        qemu = find_qemu(machine.architecture)
        if qemu is None:
            raise UserError(missing(machine.architecture))
        self.image = image
        self.qemu = qemu
        self._directory = directory
        self._arguments = f"{KERNEL_ARGUMENTS} {machine.arguments}".rstrip()
        self._options = machine.options
        if "{scalable}" in self._options:
            self._options = self._options.format(scalable=scalable_property(qemu.path))
        self._kvm = False

    def probe_kvm(self) -> str | None:
        """Decide on KVM; None where it is used, else why not."""
        problem = kvm_problem(self.qemu, self.image)
        self._kvm = problem is None
        return problem

    @property
    def accelerator(self) -> str:
        """ "kvm" or "tcg"."""
        return "kvm" if self._kvm else "tcg"

    @property
    @abstractmethod
    def python(self) -> str:
        """Python in the guest."""

    @abstractmethod
    def start(
        self,
        command: str,
        events: Path,
        output: Path,
        console: Path,
        more_options: str = "",
        files: tuple[Path, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """Boot, run the shell command and power off. What it prints goes to `output`; QEMU gets `more_options`, too.

        The command finds `files` at the paths that they have here.
        """

    def run(self, command: str, limit: float) -> str:
        """Boot for one command and wait at most `limit` seconds; what it wrote to "$events". UserError if it fails."""
        events, output = self._directory / "events", self._directory / "output.log"
        events.write_bytes(b"")
        process = self.start(command, events, output, self._directory / "console.log")
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"the guest did not finish within {limit:.0f} s: {tail(output, 3)}") from None
        finally:
            kill(process)
        if not events.stat().st_size:
            told = tail(output, 5) or tail(self._directory / "console.log", 5)
            raise UserError(f"the guest wrote nothing: {told}")
        return events.read_text(encoding="utf-8")

    def _script(self, command: str, *more_paths: str) -> str:
        paths = os.pathsep.join([str(SUITE.parent), *more_paths])
        return "\n".join(
            [
                "for port in /sys/class/virtio-ports/*; do",
                f'  [ "$(cat "$port/name")" = {EVENTS} ] && events=/dev/${{port##*/}}',
                "done",
                f"export PYTHONPATH={shlex.quote(paths)}",
                "export PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HOME=/tmp",
                f"exec {command}",
                "",
            ]
        )
