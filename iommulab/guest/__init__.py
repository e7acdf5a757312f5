"""A guest booted for one shell script: the real kernel of `--on vm`, and of `iommulab bench`.

| file | what it is |
|---|---|
| machines.py | the machines, as QEMU's options |
| qemu.py | QEMU and KVM as found here |
| base.py | what every guest does: events through a port, a script, a time limit |
| x86.py | an x86 kernel on this machine's root file system, through virtme-ng |
| arm64.py, initramfs.py | an arm64 kernel with a root of its own |
"""

from __future__ import annotations

from pathlib import Path

from iommulab.errors import UserError
from iommulab.guest.arm64 import Arm64Guest
from iommulab.guest.base import Guest
from iommulab.guest.machines import find_machine
from iommulab.guest.x86 import X86Guest
from iommulab.kernel_images import Image

__all__ = ["Guest", "make_guest"]


def make_guest(image: Image, name: str, directory: Path, root: Path | None = None) -> Guest:
    """An image and a machine, ready to boot. UserError where they do not fit or something to boot with is missing.

    `root` is an arm64 guest's root file system; an x86 guest has this machine's.
    """
    found = find_machine(name)
    if image.architecture != found.architecture:
        raise UserError(f"{name} is a machine for {found.architecture}; {image.path} is for {image.architecture}")
    if found.architecture == "arm64":
        return Arm64Guest(image, found, directory, root)
    if root is not None:
        raise UserError(f"--root is for arm64 guests; {name} runs on this machine's root file system")
    return X86Guest(image, found, directory)
