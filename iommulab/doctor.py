"""`iommulab doctor`: what this host offers."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from iommulab.errors import UserError
from iommulab.guest.arm64 import ROOT, ROOT_NAME
from iommulab.guest.qemu import find_qemu, kvm_problem, missing
from iommulab.kernel_images import HOW_TO_GET_ONE, Image, cached_images, find_image
from iommulab.terminal import console as make_console
from uapi.backend import DEV_IOMMU
from uapi.linux import LinuxBackend

#: A finding: whether it is there, and what is to be said of it.
Finding = tuple[bool, str]


def _python() -> Finding:
    return True, f"{platform.python_version()} ({platform.python_implementation()})"


def _kernel() -> Finding:
    release = platform.release()
    try:
        config = Path(f"/boot/config-{release}").read_text()
    except OSError:
        return True, release
    has = re.search(r"^CONFIG_IOMMUFD=[ym]$", config, re.MULTILINE) is not None
    return True, f"{release}, built {'with' if has else 'without'} CONFIG_IOMMUFD"


def _iommu() -> Finding:
    try:
        LinuxBackend().open(DEV_IOMMU).close()
    except OSError as error:
        known = {errno.ENOENT: "not there", errno.EACCES: "permission denied", errno.EPERM: "not permitted"}
        return False, known.get(error.errno or 0, error.strerror or str(error))
    return True, "opens: --on linux works"


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _vfio() -> Finding:
    devices = _names("/dev/vfio/devices")
    groups = [name for name in _names("/dev/vfio") if name.isdigit()]
    if devices or groups:
        return True, f"devices: {', '.join(devices) or 'none'}; groups: {', '.join(groups) or 'none'}"
    return False, "no device is bound to vfio-pci"


def _iommu_groups() -> Finding:
    units = _names("/sys/class/iommu")
    count = len(_names("/sys/kernel/iommu_groups"))
    return bool(units), f"{', '.join(units) or 'no IOMMU'}, {count} groups"


def _kvm(image: Image | None) -> Finding:
    qemu = find_qemu(image.architecture if image is not None else "x86_64")
    if qemu is None:
        return False, "cannot be probed without QEMU"
    problem = kvm_problem(qemu, image)
    if problem is None:
        return True, "boots a kernel"
    return False, f"{problem}; guests are emulated (TCG), which is slower but enough"


def _qemu(architecture: str) -> Finding:
    qemu = find_qemu(architecture)
    if qemu is None:
        return False, missing(architecture)
    return True, f"{qemu.version}, {qemu.path}"


def _arm64_root(image: Image | None) -> Finding:
    named = os.environ.get(ROOT)
    if named is None and image is not None and image.architecture == "arm64":
        named = str(image.path.with_name(ROOT_NAME))
    if named is None:
        return False, f"none: {ROOT} names none"
    return os.path.exists(named), named if os.path.exists(named) else f"there is none at {named}"


def _virtme() -> Finding:
    try:
        return True, importlib.metadata.version("virtme-ng")
    except importlib.metadata.PackageNotFoundError:
        return False, "not installed (pip install 'iommulab[vm]')"


def _images() -> Finding:
    images = cached_images()
    if not images:
        return False, f"none in the cache: {HOW_TO_GET_ONE}"
    return True, ", ".join(f"{image.release} ({image.path})" for image in images)


def _compiler() -> Finding:
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        path = shutil.which(name)
        if path is not None:
            try:
                told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
            except (OSError, subprocess.SubprocessError):
                continue
            return True, (told.splitlines() or [path])[0]
    return False, "none: `uapi diff` reads no header trees, and no kernel can be built"


def _memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    try:
        free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text().strip()
    except OSError:
        free = "0"
    return True, f"RLIMIT_MEMLOCK {limit}; {free} free huge pages of 2 MiB"


def findings(image: Image | None) -> dict[str, Callable[[], Finding]]:
    """What is looked at, in the order of the table."""
    return {
        "python": _python,
        "running kernel": _kernel,
        "/dev/iommu": _iommu,
        "IOMMU": _iommu_groups,
        "vfio devices": _vfio,
        "memory": _memory,
        "QEMU": lambda: _qemu("x86_64"),
        "QEMU for arm64": lambda: _qemu("arm64"),
        "arm64 root": lambda: _arm64_root(image),
        "KVM": lambda: _kvm(image),
        "virtme-ng": _virtme,
        "kernel images": _images,
        "compiler": _compiler,
    }


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("doctor", help="what this host offers", description=__doc__)
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the kernel that the KVM probe boots")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table. Nothing missing is an error: the model needs none of it."""
    console = make_console()
    try:
        image = find_image(args.kernel_image, None)
    except UserError:
        if args.kernel_image is not None:
            raise
        image = None
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, look in findings(image).items():
        there, text = look()
        table.add_row(name, "yes" if there else "no", Text(text), style=None if there else "yellow")
    console.print(table)
    return 0
