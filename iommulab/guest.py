"""A guest booted for one shell script: the real kernel of `--on vm`, and of `iommulab bench`.

virtme-ng boots the image with this machine's root file system (read-only, writes go to memory) and the project's own
Python environment in it. What the script writes to "$events" goes through a virtio port, which QEMU appends to a file
here: every line is out of the guest before the next step, so a panic loses nothing. The guest's console goes to a
file of its own.
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
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iommulab.errors import UserError
from iommulab.follow import kill, tail
from iommulab.kernel_images import Image
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
    # Scalable mode, with a second stage; with a first stage instead of it.
    "q35-vtd": (
        "-machine q35,kernel-irqchip=split "
        "-device intel-iommu,intremap=on,caching-mode=on,{scalable}=on,aw-bits=48 "
        "-device edu,addr=0x10,dma_mask=0xffffffffffffffff"
    ),
    "q35-vtd-fs": (
        "-machine q35,kernel-irqchip=split "
        "-device intel-iommu,intremap=on,caching-mode=on,{scalable}=on,x-flts=on,aw-bits=48 "
        "-device edu,addr=0x10,dma_mask=0xffffffffffffffff"
    ),
    # Two functions that no access control keeps apart: one IOMMU group.
    "q35-vtd-multifunction": (
        "-machine q35,kernel-irqchip=split "
        "-device intel-iommu,intremap=on,caching-mode=on,{scalable}=off,aw-bits=48 "
        "-device edu,addr=0x10.0,multifunction=on,dma_mask=0xffffffffffffffff "
        "-device edu,addr=0x10.1,dma_mask=0xffffffffffffffff"
    ),
    # No IOMMU, and VFIO gives its devices away nevertheless.
    "q35-noiommu": "-machine q35 -device edu,addr=0x10,dma_mask=0xffffffffffffffff",
    # No IOMMU: before 6.17 the kernel's mock driver has no devices beside a real one.
    "mock": "-machine q35",
}
#: What a machine's kernel is told beside `KERNEL_ARGUMENTS`.
ARGUMENTS = {"q35-noiommu": "vfio.enable_unsafe_noiommu_mode=1"}


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
    path.write_bytes(b"")

    def copy() -> None:
        with path.open("ab", buffering=0) as file, open(reader, "rb", buffering=0) as pipe:
            while data := pipe.read(1 << 16):
                file.write(data)

    threading.Thread(target=copy, name=f"collect {path.name}", daemon=True).start()
    try:
        yield writer
    finally:
        os.close(writer)


class Guest:
    """An image and a machine, ready to boot. UserError where something to boot with is missing."""

    def __init__(self, image: Image, machine: str, directory: Path) -> None:
        if machine not in MACHINES:
            raise UserError(f"--on vm knows no machine {machine!r}; it knows: {', '.join(MACHINES)}")
        qemu = find_qemu()
        if qemu is None:
            raise UserError(f"{QEMU} is not installed (Debian: apt install qemu-system-x86)")
        if importlib.util.find_spec("virtme_ng") is None:
            raise UserError("virtme-ng is not installed here; install it with: pip install 'iommulab[vm]'")
        tools = str(Path(sys.executable).parent)
        vng = shutil.which("vng", path=os.pathsep.join([tools, os.environ.get("PATH", "")]))
        if vng is None:
            raise UserError("virtme-ng has no `vng` command here; install it with: pip install 'iommulab[vm]'")
        self.image = image
        self.qemu = qemu
        self._vng = vng
        self._tools = tools
        self._directory = directory
        self._arguments = f"{KERNEL_ARGUMENTS} {ARGUMENTS.get(machine, '')}".rstrip()
        self._options = MACHINES[machine].format(scalable=scalable_property(qemu.path))
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

    def start(
        self, command: str, events: Path, output: Path, console: Path, more_options: str = ""
    ) -> subprocess.Popen[bytes]:
        """Boot, run the shell command and power off. What it prints goes to `output`; QEMU gets `more_options`, too."""
        script = self._directory / "guest.sh"
        script.write_text(self._script(command))
        options = (
            f"{self._options} -device virtio-serial-pci,id=iommulab "
            f"-chardev file,id=events,path={events},append=on "
            f"-device virtserialport,bus=iommulab.0,chardev=events,name={PORT} {more_options}"
        ).rstrip()
        boot = [self._vng, "--run", str(self.image.path), "--memory", MEMORY, "--cpus", "1", "--verbose"]
        boot += [] if self._kvm else ["--disable-kvm"]
        boot += ["--cwd", "/", "--qemu", self.qemu.path]
        boot += ["--append", self._arguments, f"--qemu-opts={options}", "--", f"sh {shlex.quote(str(script))}"]
        environment = os.environ | {"PATH": os.pathsep.join([self._tools, os.environ.get("PATH", os.defpath)])}
        # vng has QEMU open the guest's streams by name, each with an offset of its own, so they must be pipes. Its
        # --verbose sends the console to stderr.
        with collect(output) as stdout, collect(console) as stderr:
            return subprocess.Popen(
                boot,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                env=environment,
                cwd=self._directory,
            )

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

    def _script(self, command: str) -> str:
        return "\n".join(
            [
                "for port in /sys/class/virtio-ports/*; do",
                f'  [ "$(cat "$port/name")" = {PORT} ] && events=/dev/${{port##*/}}',
                "done",
                f"export PYTHONPATH={shlex.quote(str(SUITE.parent))}",
                "export PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 HOME=/tmp",
                f"exec {command}",
                "",
            ]
        )
