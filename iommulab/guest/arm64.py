"""An arm64 guest: QEMU called as it is, with a root of its own as an initramfs.

virtme-ng shows a guest this machine's root file system, which is of no use where the guest has another architecture.
So the user gives a root (`--root`, IOMMULAB_ROOT, or a root.tar.xz beside the image) with a shell and Python; `uapi`
and the suite come from here, and so does what they import if the root lacks it: all of it pure Python.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

from iommulab.errors import UserError
from iommulab.guest.base import MEMORY, Guest, events_port, port
from iommulab.guest.initramfs import Archive, entries
from iommulab.guest.machines import GuestMachine
from iommulab.kernel_images import Image
from iommulab.results import SUITE
from iommulab.session import Session

ROOT = "IOMMULAB_ROOT"
#: Looked for beside the image where no root is named.
ROOT_NAME = "root.tar.xz"
OUTPUT = "iommulab.output"
#: What the suite imports besides the standard library; in the order in which they need each other.
_MODULES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "ioctl_opt")
_PYTHONS = ("usr/bin/python3", "usr/local/bin/python3", "bin/python3")
_SITE, _SCRIPT, _INIT_NAME = "iommulab/site", "iommulab/guest.sh", "iommulab/init"

_INIT = f"""#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /proc /sys /dev /tmp /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
for folder in /dev/shm /tmp /run; do mount -t tmpfs tmpfs $folder; done
mount -t debugfs debugfs /sys/kernel/debug
for port in /sys/class/virtio-ports/*; do
  [ "$(cat "$port/name")" = {OUTPUT} ] && output=/dev/${{port##*/}}
done
cd /
sh /{_SCRIPT} </dev/null >$output 2>&1
echo o >/proc/sysrq-trigger
sleep 60
"""


def find_root(root: Path | None, image: Image) -> Path:
    """The root that is meant. UserError if there is none."""
    if root is None and os.environ.get(ROOT):
        root = Path(os.environ[ROOT])
    if root is None:
        root = image.path.with_name(ROOT_NAME)
        if not root.exists():
            raise UserError(
                f"an {image.architecture} guest needs a root file system with Python (a directory or a tar file): "
                f"--root PATH, {ROOT}, or {ROOT_NAME} beside the image"
            )
    if not root.exists():
        raise UserError(f"there is no root file system at {root}")
    return root


class Arm64Guest(Guest):
    """An arm64 image with a root of its own."""

    def __init__(self, image: Image, machine: GuestMachine, directory: Path, root: Path | None = None) -> None:
        super().__init__(image, machine, directory)
        self._archive = directory / "root.cpio"
        self._write_archive(find_root(root, image))

    @property
    def python(self) -> str:
        return "python3"

    def start(
        self,
        command: str,
        events: Path,
        output: Path,
        console: Path,
        more_options: str = "",
        files: tuple[Path, ...] = (),
    ) -> subprocess.Popen[bytes]:
        initrd = self._directory / "initrd"
        shutil.copyfile(self._archive, initrd)
        with initrd.open("ab") as file:
            # A second archive after the first adds to it.
            archive = Archive(file)
            archive.add(_SCRIPT, stat.S_IFREG | 0o644, self._script(command, f"/{_SITE}").encode())
            for path in files:
                archive.add(str(path).lstrip("/"), stat.S_IFREG | 0o644, path.read_bytes())
            archive.close()
        # A -cpu of which the emulation is cheap: authenticated pointers cost a fifth of the time.
        run = [self.qemu.path, "-accel", self.accelerator, "-cpu", "host" if self._kvm else "max,pauth=off"]
        run += ["-m", MEMORY, "-smp", "1", "-display", "none", "-nodefaults", "-no-reboot"]
        run += ["-kernel", str(self.image.path), "-initrd", str(initrd)]
        # ramfs, because MAP_FILE takes any file of a tmpfs for memory, and tests know files that are none.
        run += [
            "-append",
            f"console=ttyAMA0 rdinit=/{_INIT_NAME} rootfstype=ramfs {self._arguments}",
            "-serial",
            f"file:{console}",
        ]
        run += shlex.split(f"{self._options} {events_port(events)} {port('output', output, OUTPUT)} {more_options}")
        with output.with_suffix(".qemu").open("wb") as log:
            return Session(run, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def _write_archive(self, root: Path) -> None:
        with self._archive.open("wb") as file:
            archive = Archive(file)
            archive.add_all(entries(root))
            if not any(path in archive.names for path in _PYTHONS):
                raise UserError(f"the root file system {root} has no {_PYTHONS[0]}")
            for module in _MODULES:
                if not any(name.endswith(f"-packages/{module}") for name in archive.names):
                    self._bring(archive, module)
            archive.add(_INIT_NAME, stat.S_IFREG | 0o755, _INIT.encode())
            for folder in (SUITE, SUITE.parent / "uapi"):
                archive.add_folder(folder, str(folder).lstrip("/"))
            archive.close()

    def _bring(self, archive: Archive, module: str) -> None:
        """A package of this machine's Python, to the guest's."""
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise UserError(f"neither this machine's Python nor the guest's root has the module {module}")
        archive.add_folder(Path(found.origin).parent, f"{_SITE}/{module}")
