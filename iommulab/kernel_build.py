"""`iommulab kernel`: build an image for `--on vm` from any Linux tree, and list what there is.

The configuration is `make allnoconfig` with the options of `data/kernel.config`. The tree itself is not written to: the
build lies in the user's cache and is kept, so that the next build of the same tree is short.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from iommulab.errors import UserError
from iommulab.kernel_images import HOW_TO_GET_ONE, cache, cached_images, read_image
from iommulab.make import run_make
from iommulab.terminal import console as make_console

FRAGMENT = Path(__file__).resolve().parent / "data" / "kernel.config"
#: Programs that a kernel build calls, and the Debian packages that have them.
TOOLS = {"make": "make", "gcc": "gcc", "ld": "binutils", "flex": "flex", "bison": "bison", "bc": "bc"}
#: Without these the suite cannot run in the guest.
NEEDED = (
    "IOMMUFD",
    "IOMMUFD_TEST",
    "INTEL_IOMMU",
    "VFIO",
    "VFIO_PCI",
    "VFIO_DEVICE_CDEV",
    "BLOCK",
    "VIRTIO_PCI",
    "VIRTIO_CONSOLE",
    "9P_FS",
    "NET_9P_VIRTIO",
    "OVERLAY_FS",
    "TMPFS",
    "DEVTMPFS",
    "SERIAL_8250_CONSOLE",
    "BINFMT_ELF",
    "BINFMT_SCRIPT",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    top = subparsers.add_parser("kernel", help="kernels for --on vm: build one, list them", description=__doc__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    builder = commands.add_parser("build", help="build an image from a Linux tree and keep it in the cache")
    builder.add_argument("tree", type=Path, metavar="SRC", help="a Linux source tree")
    builder.add_argument("-j", dest="jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="parallel jobs")
    builder.set_defaults(run=run_build)
    lister = commands.add_parser("list", help="the images in the cache")
    lister.set_defaults(run=run_list)


def run_list(_args: argparse.Namespace) -> int:
    """Print the cached images."""
    console = make_console()
    images = cached_images()
    if not images:
        console.print(f"no kernel image in {cache()}: {HOW_TO_GET_ONE}", markup=False, highlight=False)
        return 0
    table = Table(box=None, pad_edge=False)
    for title in ("release", "built", "size", "image"):
        table.add_column(title)
    for image in images:
        status = image.path.stat()
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
        table.add_row(image.release, built, f"{status.st_size / 1e6:.1f} MB", str(image.path))
    console.print(table)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Build and keep an image."""
    if not 1 <= args.jobs <= 1024:
        raise UserError(f"-j {args.jobs} is not a number of jobs")
    console = make_console()
    path = build(args.tree, args.jobs, console)
    console.print(f"built {path}", markup=False, highlight=False)
    console.print("run the suite on it: iommulab conformance --on vm", markup=False, highlight=False)
    return 0


def check_tree(tree: Path) -> Path:
    """The tree's absolute path. UserError where it is no Linux source."""
    if (
        not (tree / "Kconfig").is_file()
        or not (tree / "Makefile").is_file()
        or not (tree / "init" / "main.c").is_file()
    ):
        raise UserError(f"{tree} is not a Linux source tree")
    if not (tree / "drivers" / "iommu" / "iommufd").is_dir():
        raise UserError(f"{tree} has no drivers/iommu/iommufd: iommufd came with Linux 6.2")
    return tree.resolve()


def check_tools() -> None:
    """UserError that names what a build lacks on this machine."""
    if platform.machine() != "x86_64":
        raise UserError(f"kernels are built for x86_64 only, and this machine is {platform.machine()}")
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        raise UserError(f"a kernel build needs more tools (Debian: apt install {' '.join(missing)} libelf-dev)")


def build(tree: Path, jobs: int, console: Console) -> Path:
    """Configure and build `tree`, and put the image into the cache. UserError where a step fails."""
    tree = check_tree(tree)
    check_tools()
    objects = cache().parent / "build" / hashlib.sha256(str(tree).encode()).hexdigest()[:12]
    log = objects / "iommulab.log"
    try:
        objects.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write to {objects}: {(error.strerror or str(error)).lower()}") from error
    make = ["make", "-C", str(tree), f"O={objects}", "ARCH=x86_64"]
    console.print(f"building {tree} in {objects}", markup=False, highlight=False)
    run_make([*make, f"KCONFIG_ALLCONFIG={FRAGMENT}", "allnoconfig"], log, console, "configuring")
    check_config((objects / ".config").read_text())
    run_make([*make, f"-j{jobs}", "bzImage"], log, console, "building")
    image = objects / "arch" / "x86" / "boot" / "bzImage"
    release = read_image(image).release or (objects / "include" / "config" / "kernel.release").read_text().strip()
    kept = cache() / release
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, kept / "bzImage.new")
    (kept / "bzImage.new").replace(kept / "bzImage")
    shutil.copyfile(objects / ".config", kept / "config")
    return kept / "bzImage"


def check_config(text: str) -> None:
    """UserError where the configuration lacks what the suite needs."""
    chosen = set(re.findall(r"^CONFIG_(\w+)=y$", text, re.MULTILINE))
    missing = [option for option in NEEDED if option not in chosen]
    if missing:
        raise UserError(f"this tree cannot be configured for the suite: it leaves out {', '.join(missing)}")
