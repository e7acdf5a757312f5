"""`--on vm`: the suite inside a guest, on a real kernel under QEMU.

virtme-ng boots the image with this machine's root file system (read-only, writes go to memory) and the project's own
Python environment in it. The test process writes its events to a virtio port, which QEMU appends to a file here: every
line is out of the guest before the next step, so a panic loses nothing. The guest's console goes to a file of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iommulab.errors import UserError
from iommulab.follow import NOTHING, USAGE, kill, tail
from iommulab.kernel_images import Image
from iommulab.progress import SuiteProgress
from iommulab.results import SUITE

QEMU = "qemu-system-x86_64"
PORT = "iommulab.events"
MEMORY = "2G"
#: 80 huge pages for the tests that need them; the console tells warnings and IOMMU faults, not the whole boot.
KERNEL_ARGUMENTS = "hugepages=80 loglevel=6 panic=-1"
#: Seconds in which a kernel that really runs has printed its first lines.
PROBE_SECONDS = 10.0

#: A machine's devices as QEMU's options; {scalable} is the property's name, which QEMU 11.1 changed.
MACHINES = {
    "q35-vtd-legacy": (
        "-machine q35,kernel-irqchip=split "
        "-device intel-iommu,intremap=on,caching-mode=on,{scalable}=off,aw-bits=48 "
        "-device edu,addr=0x10,dma_mask=0xffffffffffffffff"
    ),
}


@dataclass(frozen=True, slots=True)
class Qemu:
    """QEMU as installed here."""

    path: str
    version: str


def find_qemu() -> Qemu | None:
    """QEMU for x86, or None."""
    path = shutil.which(QEMU)
    if path is None:
        return None
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"version (\S+)", told)
    return Qemu(path, found.group(1) if found else "unknown")


@functools.cache
def scalable_property(qemu: str) -> str:
    """The name of intel-iommu's scalable-mode property in this QEMU."""
    told = subprocess.run([qemu, "-device", "intel-iommu,help"], capture_output=True, text=True, timeout=20).stdout
    return "x-scalable-mode" if "x-scalable-mode" in told else "scalable-mode"


def kvm_problem(qemu: Qemu, image: Image | None) -> str | None:
    """None where KVM really runs this kernel, else in one clause why not. /dev/kvm alone says little."""
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not accessible to this user"
    if image is None:
        return "not probed: no kernel image to boot"
    with tempfile.TemporaryDirectory(prefix="iommulab-kvm-") as scratch:
        console = Path(scratch) / "console"
        command = [qemu.path, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-display", "none"]
        command += ["-nodefaults", "-no-reboot", "-serial", f"file:{console}", "-kernel", str(image.path)]
        command += ["-append", "console=ttyS0 earlyprintk=serial,ttyS0,115200 panic=-1"]
        with (Path(scratch) / "qemu").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            deadline = time.monotonic() + PROBE_SECONDS
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                # Without a root file system the kernel ends in a panic: it got that far on its own.
                if "Kernel panic" in tail(console, 400):
                    return None
                if ended:
                    said = tail(Path(scratch) / "qemu", 1)
                    return f"QEMU fails with it ({said})" if said else "QEMU fails with it"
                time.sleep(0.05)
        finally:
            kill(process)
    return f"it does not boot a kernel within {PROBE_SECONDS:.0f} s"


@contextlib.contextmanager
def collect(path: Path) -> Iterator[int]:
    """The writing end of a pipe whose data goes to a file, for as long as somebody holds that end."""
    reader, writer = os.pipe()
    try:
        with path.open("wb") as file:
            subprocess.Popen(["cat"], stdin=reader, stdout=file, stderr=subprocess.DEVNULL, start_new_session=True)
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


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
        if machine not in MACHINES:
            raise UserError(f"--on vm knows no machine {machine!r}; it knows: {', '.join(MACHINES)}")
        qemu = find_qemu()
        if qemu is None:
            raise UserError(f"{QEMU} is not installed (Debian: apt install qemu-system-x86)")
        if importlib.util.find_spec("virtme_ng") is None:
            raise UserError("virtme-ng is not installed here; install it with: pip install 'iommulab[vm]'")
        self._image = image
        self._directory = directory
        self._selection = selection
        self._pytest = pytest
        self._qemu = qemu
        self._options = MACHINES[machine].format(scalable=scalable_property(qemu.path))
        self._collect()
        progress.status("probing KVM")
        problem = kvm_problem(qemu, image)
        self._kvm = problem is None
        if problem is not None:
            progress.say(f"vm: KVM is not used: {problem}; emulating (TCG)")
        progress.status(f"booting {image.release or image.path.name}")
        self.environment: dict[str, Any] = {
            "image": image.path.name,
            "qemu": qemu.version,
            "accelerator": "kvm" if self._kvm else "tcg",
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
        script = self._directory / "guest.sh"
        script.write_text(self._script(only))
        options = (
            f"{self._options} -device virtio-serial-pci,id=iommulab "
            f"-chardev file,id=events,path={events},append=on "
            f"-device virtserialport,bus=iommulab.0,chardev=events,name={PORT}"
        )
        tools = str(Path(sys.executable).parent)
        vng = shutil.which("vng", path=os.pathsep.join([tools, os.environ.get("PATH", "")]))
        if vng is None:
            raise UserError("virtme-ng has no `vng` command here; install it with: pip install 'iommulab[vm]'")
        command = [vng, "--run", str(self._image.path), "--memory", MEMORY, "--cpus", "1", "--verbose"]
        command += [] if self._kvm else ["--disable-kvm"]
        command += ["--cwd", "/", "--qemu", self._qemu.path]
        command += ["--append", KERNEL_ARGUMENTS, f"--qemu-opts={options}", "--", f"sh {shlex.quote(str(script))}"]
        environment = os.environ | {"PATH": os.pathsep.join([tools, os.environ.get("PATH", os.defpath)])}
        # vng has QEMU open the guest's streams by name, each with an offset of its own, so they must be pipes. Its
        # --verbose sends the console to stderr.
        with collect(self._log(attempt)) as output, collect(self._console(attempt)) as console:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=console,
                start_new_session=True,
                env=environment,
                cwd=self._directory,
            )

    def _script(self, only: Path | None) -> str:
        arguments = [*self._pytest, "--backend", "uapi.linux:LinuxBackend", *self._selection]
        arguments += ["--only", str(only)] if only is not None else []
        return "\n".join(
            [
                "for port in /sys/class/virtio-ports/*; do",
                f'  [ "$(cat "$port/name")" = {PORT} ] && events=/dev/${{port##*/}}',
                "done",
                f"export PYTHONPATH={shlex.quote(str(SUITE.parent))}",
                "export PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HOME=/tmp",
                f'exec {shlex.join(arguments)} --events "$events"',
                "",
            ]
        )

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
