"""iommulab/files.py: a file that a user asked for is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iommulab.errors import UserError
from iommulab.files import check_writable, write


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write(path, b"old")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run.json")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run.json").read_bytes() == b"new"


def test_a_device_is_written_to_and_stays_one() -> None:
    check_writable(Path(os.devnull))
    write(Path(os.devnull), b"new")
    assert Path(os.devnull).is_char_device()


def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot write /dev/full: no space left on device"):
        write(Path("/dev/full"), b"new")


@pytest.mark.parametrize("path", ["/proc/nowhere", "/not/there/run.json", "/", "/etc/passwd/run.json"])
def test_what_cannot_be_written_is_known_before(path: str) -> None:
    with pytest.raises(UserError, match=f"cannot write {path}: "):
        check_writable(Path(path))
