"""An x86 guest: virtme-ng boots the image with this machine's root file system (read-only, writes go to memory) and the
project's own Python environment in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from iommulab.errors import UserError
from iommulab.guest.base import MEMORY, Guest, events_port
from iommulab.guest.machines import GuestMachine
from iommulab.kernel_images import Image
from iommulab.session import Session


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


class X86Guest(Guest):
    """An x86 image on this machine's root file system."""

    def __init__(self, image: Image, machine: GuestMachine, directory: Path) -> None:
        super().__init__(image, machine, directory)
        if importlib.util.find_spec("virtme_ng") is None:
            raise UserError("virtme-ng is not installed here; install it with: pip install 'iommulab[vm]'")
        self._tools = str(Path(sys.executable).parent)
        vng = shutil.which("vng", path=os.pathsep.join([self._tools, os.environ.get("PATH", "")]))
        if vng is None:
            raise UserError("virtme-ng has no `vng` command here; install it with: pip install 'iommulab[vm]'")
        self._vng = vng

    @property
    def python(self) -> str:
        return sys.executable

    def start(
        self,
        command: str,
        events: Path,
        output: Path,
        console: Path,
        more_options: str = "",
        files: tuple[Path, ...] = (),
    ) -> subprocess.Popen[bytes]:
        script = self._directory / "guest.sh"
        script.write_text(self._script(command))
        options = f"{self._options} {events_port(events)} {more_options}".rstrip()
        boot = [self._vng, "--run", str(self.image.path), "--memory", MEMORY, "--cpus", "1", "--verbose"]
        boot += [] if self._kvm else ["--disable-kvm"]
        boot += ["--cwd", "/", "--qemu", self.qemu.path]
        boot += ["--append", self._arguments, f"--qemu-opts={options}", "--", f"sh {shlex.quote(str(script))}"]
        environment = os.environ | {"PATH": os.pathsep.join([self._tools, os.environ.get("PATH", os.defpath)])}
        # vng has QEMU open the guest's streams by name, each with an offset of its own, so they must be pipes. Its
        # --verbose sends the console to stderr.
        with collect(output) as stdout, collect(console) as stderr:
            return Session(
                boot,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd=self._directory,
            )
