"""Kernel images for `--on vm`: where they are kept and which one is meant."""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from iommulab.errors import UserError

#: What the boot protocol of x86 (Documentation/arch/x86/boot.rst) puts at 0x202 of an image.
_MAGIC = b"HdrS"
_RELEASE_POINTER = 0x20E
#: What that of arm64 (Documentation/arch/arm64/booting.rst) puts at 0x38. Its header names no release; the text does.
_ARM64_MAGIC = b"ARM\x64"
_GZIP = b"\x1f\x8b"
HOW_TO_GET_ONE = (
    "build one from any Linux tree with `iommulab kernel build SRC` (about 8 minutes on two cores), or pass "
    "--kernel-image PATH"
)


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable image and the release that it names ("7.3.4-iommulab"; "" if it names none)."""

    path: Path
    release: str
    architecture: str = "x86_64"


def cache() -> Path:
    """The user's folder of built kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "iommulab" / "kernels"


def read_image(path: Path) -> Image:
    """Check that a file is a kernel image, for x86 or arm64, and read its release. UserError otherwise."""
    try:
        with path.open("rb") as file:
            head = file.read(64 << 10)
        if head[0x202:0x206] == _MAGIC:
            return Image(path.resolve(), _x86_release(head))
        whole = gzip.decompress(path.read_bytes()) if head.startswith(_GZIP) else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file") from error
    except OSError as error:
        raise UserError(f"cannot read the kernel image {path}: {(error.strerror or str(error)).lower()}") from error
    if whole[0x38:0x3C] != _ARM64_MAGIC:
        raise UserError(f"{path} is not a kernel image: neither a bzImage for x86 nor an Image or Image.gz for arm64")
    found = re.search(rb"Linux version (\d[^ ]*) ", whole)
    return Image(path.resolve(), found[1].decode("ascii", "replace") if found else "", "arm64")


def _x86_release(head: bytes) -> str:
    start = struct.unpack_from("<H", head, _RELEASE_POINTER)[0] + 0x200
    text = head[start : start + 256].split(b"\0")[0].decode("ascii", "replace") if start > 0x200 else ""
    return text.split(" ")[0]


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


def find_image(path: Path | None, version: str | None, architecture: str = "x86_64") -> Image:
    """The image at `path`, else the cached one of `version`, else the newest cached one. UserError if there is none."""
    if path is not None:
        return read_image(path)
    if architecture != "x86_64":
        raise UserError(f"no {architecture} kernel image is known: pass --kernel-image PATH (an Image or Image.gz)")
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
