"""Kernel images for `--on vm`: where they are kept and which one is meant."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from iommulab.errors import UserError

#: What the boot protocol of x86 (Documentation/arch/x86/boot.rst) puts at 0x202 of an image.
_MAGIC = b"HdrS"
_RELEASE_POINTER = 0x20E
HOW_TO_GET_ONE = (
    "build one from any Linux tree with `iommulab kernel build SRC` (about 8 minutes on two cores), or pass "
    "--kernel-image PATH"
)


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable image and the release that its header names ("7.3.4-iommulab"; "" if it names none)."""

    path: Path
    release: str


def cache() -> Path:
    """The user's folder of built kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "iommulab" / "kernels"


def read_image(path: Path) -> Image:
    """Check that a file is an x86 kernel image and read its release. UserError otherwise."""
    try:
        with path.open("rb") as file:
            head = file.read(64 << 10)
    except OSError as error:
        raise UserError(f"cannot read the kernel image {path}: {(error.strerror or str(error)).lower()}") from error
    if head[0x202:0x206] != _MAGIC:
        raise UserError(f"{path} is not an x86 kernel image (a bzImage)")
    start = struct.unpack_from("<H", head, _RELEASE_POINTER)[0] + 0x200
    text = head[start : start + 256].split(b"\0")[0].decode("ascii", "replace") if start > 0x200 else ""
    return Image(path.resolve(), text.split(" ")[0])


def _order(image: Image) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", image.release)[:4])


def cached_images() -> list[Image]:
    """The images in the cache, newest release last."""
    images = []
    for path in sorted(cache().glob("*/bzImage")):
        try:
            images.append(read_image(path))
        except UserError:
            continue
    return sorted(images, key=_order)


def find_image(path: Path | None, version: str | None) -> Image:
    """The image at `path`, else the cached one of `version`, else the newest cached one. UserError if there is none."""
    if path is not None:
        return read_image(path)
    images = cached_images()
    if version is not None:
        found = [image for image in images if image.release == version or image.path.parent.name == version]
        found = found or [image for image in images if re.match(rf"{re.escape(version)}([.-]|$)", image.release)]
        if not found:
            have = ", ".join(image.release for image in images) or "none"
            raise UserError(f"no cached kernel image is {version} (cached: {have}): {HOW_TO_GET_ONE}")
        return found[-1]
    if not images:
        raise UserError(f"no kernel image is known: {HOW_TO_GET_ONE}")
    return images[-1]
