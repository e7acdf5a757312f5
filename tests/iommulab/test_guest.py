"""What `--on vm` boots with: kernel images, roots and machines that fit each other, or one sentence why not."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from iommulab.cli import main
from iommulab.errors import UserError
from iommulab.guest import make_guest
from iommulab.guest.arm64 import ROOT, find_root
from iommulab.guest.initramfs import Archive, Entry, entries
from iommulab.guest.qemu import Qemu
from iommulab.kernel_images import Image, read_image


def arm64_image(release: str = "7.3.4-x") -> bytes:
    image = bytearray(0x1000)
    image[0x38:0x3C] = b"ARM\x64"
    text = f"Linux version {release} (somebody) #1".encode()
    image[0x800 : 0x800 + len(text)] = text
    return bytes(image)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "usr/bin/python3").write_text("#!/bin/sh\n")
    (folder / "usr/bin/python3").chmod(0o755)
    (folder / "bin").symlink_to("usr/bin")
    (folder / "usr/share/man").mkdir(parents=True)
    (folder / "usr/share/man/page").touch()
    return folder


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """An arm64 image, and a QEMU for it."""
    monkeypatch.delenv(ROOT, raising=False)
    monkeypatch.setattr("iommulab.guest.base.find_qemu", lambda architecture: Qemu(f"/qemu-{architecture}", "10"))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/Image.gz").write_bytes(gzip.compress(arm64_image()))
    return read_image(tmp_path / "kernels/Image.gz")


@pytest.mark.parametrize("packed", [False, True])
def test_an_arm64_image_names_its_release(tmp_path: Path, packed: bool) -> None:
    image = arm64_image()
    (tmp_path / "Image").write_bytes(gzip.compress(image) if packed else image)
    read = read_image(tmp_path / "Image")
    assert (read.release, read.architecture) == ("7.3.4-x", "arm64")


@pytest.mark.parametrize(
    "content", [b"", b"no kernel" * 100, gzip.compress(b"no kernel")], ids=["empty", "text", "packed"]
)
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="file is not a kernel image: neither a bzImage for x86 nor an Image"):
        read_image(tmp_path / "file")


def test_half_a_packed_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(arm64_image())[:-20])
    with pytest.raises(UserError, match="file is not a whole gzip file"):
        read_image(tmp_path / "file")


def test_a_directory_and_a_tar_file_of_it_give_the_same_root(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "root.tar.xz", "w:xz") as tar:
        tar.add(root, ".")
    found: dict[str, Entry] = {entry[0]: entry for entry in entries(root)}
    assert found == {entry[0]: entry for entry in entries(tmp_path / "root.tar.xz")}
    assert found["bin"] == ("bin", stat.S_IFLNK | 0o777, b"usr/bin")
    assert found["usr/bin/python3"] == ("usr/bin/python3", stat.S_IFREG | 0o755, b"#!/bin/sh\n")
    assert "usr/share/man/page" not in found  # nobody reads manuals in a guest


def test_a_hard_link_in_a_tar_file_has_its_content(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        first, second = tarfile.TarInfo("a"), tarfile.TarInfo("b")
        first.size, second.type, second.linkname = 4, tarfile.LNKTYPE, "a"
        tar.addfile(first, io.BytesIO(b"same"))
        tar.addfile(second)
    assert [(name, content) for name, _, content in entries(tmp_path / "root.tar")] == [("a", b"same"), ("b", b"same")]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    with (tmp_path / "archive").open("wb") as file:
        archive = Archive(file)
        archive.add("a/b/c", stat.S_IFREG | 0o644, b"odd")
        archive.add("link", stat.S_IFLNK | 0o777, b"a/b")
        archive.close()
    with (tmp_path / "archive").open("rb") as file:
        done = subprocess.run(["cpio", "-it", "--quiet"], stdin=file, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a", "a/b", "a/b/c", "link"]


def test_the_root_is_the_one_named_else_that_beside_the_image(
    image: Image, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="an arm64 guest needs a root file system with Python"):
        find_root(None, image)
    beside = image.path.with_name("root.tar.xz")
    beside.touch()
    assert find_root(None, image) == beside
    monkeypatch.setenv(ROOT, str(root))
    assert find_root(None, image) == root
    assert find_root(root.parent, image) == root.parent
    with pytest.raises(UserError, match="there is no root file system at nowhere"):
        find_root(Path("nowhere"), image)


def test_a_root_without_python_is_refused(image: Image, root: Path, tmp_path: Path) -> None:
    (root / "usr/bin/python3").unlink()
    with pytest.raises(UserError, match="has no usr/bin/python3"):
        make_guest(image, "virt-smmuv3", tmp_path, root)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk is neither a directory nor a tar file"):
        make_guest(image, "virt-smmuv3", tmp_path, tmp_path / "junk")


def test_an_arm64_guest_gets_the_suite_and_what_it_imports(image: Image, root: Path, tmp_path: Path) -> None:
    make_guest(image, "virt-smmuv3", tmp_path, root)
    archive = (tmp_path / "root.cpio").read_bytes()
    for name in (b"/conformance/conftest.py\0", b"/uapi/linux.py\0", b"site/pytest/__init__.py\0", b"iommulab/init\0"):
        assert name in archive
    assert b".pyc\0" not in archive


def test_machine_and_image_must_fit(image: Image, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"q35-vtd-legacy is a machine for x86_64; .*Image\.gz is for arm64"):
        make_guest(image, "q35-vtd-legacy", tmp_path)
    with pytest.raises(UserError, match="virt-smmuv3 is a machine for arm64; bzImage is for x86_64"):
        make_guest(Image(Path("bzImage"), "7.3"), "virt-smmuv3", tmp_path)
    with pytest.raises(UserError, match="--on vm knows no machine 'pdp11'; it knows: q35-vtd-legacy, "):
        make_guest(image, "pdp11", tmp_path)
    with pytest.raises(UserError, match="--root is for arm64 guests"):
        make_guest(Image(Path("bzImage"), "7.3"), "q35-vtd-legacy", tmp_path, tmp_path)


def test_without_qemu_for_arm64_one_sentence_says_what_to_install(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iommulab.guest.base.find_qemu", lambda architecture: None)
    with pytest.raises(UserError, match=r"qemu-system-aarch64 is not installed \(Debian: apt install qemu-system-arm"):
        make_guest(image, "virt-smmuv3", tmp_path)


def test_the_command_refuses_what_cannot_be_booted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--root", str(tmp_path)]) == 2
    assert "--root is what --on vm boots with" in capsys.readouterr().err
    assert main(["conformance", "--on", "vm", "--machine", "virt-smmuv3", "--report", str(tmp_path)]) == 2
    assert "no arm64 kernel image is known: pass --kernel-image PATH" in capsys.readouterr().err
