"""QEMU as installed here: which one there is for an architecture, and whether KVM really runs a kernel."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from iommulab.follow import tail
from iommulab.kernel_images import Image
from iommulab.session import Session, kill

#: Seconds in which a kernel that really runs has printed its first lines.
PROBE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture's names: QEMU's program, Debian's package with it, platform.machine(), how KVM is tried."""

    program: str
    package: str
    host: str
    kvm_machine: str
    console: str


ARCHITECTURES = {
    "x86_64": Architecture(
        "qemu-system-x86_64", "qemu-system-x86", "x86_64", "q35", "console=ttyS0 earlyprintk=serial,ttyS0,115200"
    ),
    "arm64": Architecture(
        "qemu-system-aarch64", "qemu-system-arm", "aarch64", "virt,gic-version=host", "console=ttyAMA0 earlycon"
    ),
}


@dataclass(frozen=True, slots=True)
class Qemu:
    """QEMU as installed here."""

    path: str
    version: str


def missing(architecture: str) -> str:
    """What to say where `find_qemu` finds none."""
    names = ARCHITECTURES[architecture]
    return f"{names.program} is not installed (Debian: apt install {names.package})"


def find_qemu(architecture: str = "x86_64") -> Qemu | None:
    """QEMU for an architecture, or None."""
    path = shutil.which(ARCHITECTURES[architecture].program)
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
    if image is not None and platform.machine() != ARCHITECTURES[image.architecture].host:
        return f"this machine is not {image.architecture}"
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not accessible to this user"
    if image is None:
        return "not probed: no kernel image to boot"
    names = ARCHITECTURES[image.architecture]
    with tempfile.TemporaryDirectory(prefix="iommulab-kvm-") as scratch:
        console = Path(scratch) / "console"
        command = [qemu.path, "-machine", names.kvm_machine, "-accel", "kvm", "-cpu", "host", "-m", "256"]
        command += ["-display", "none", "-nodefaults", "-no-reboot", "-serial", f"file:{console}"]
        command += ["-kernel", str(image.path), "-append", f"{names.console} panic=-1"]
        with (Path(scratch) / "qemu").open("wb") as log:
            process = Session(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
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
