"""The history files: complete, deterministic, and honest about what was not sampled."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

import pytest

from uapi import history
from uapi.headers import HeaderError, read_headers, release_of
from uapi.history.__main__ import main
from uapi.table import from_json, table_at, to_json
from uapi.version import parse


@pytest.mark.parametrize("arch", ["x86_64", "i386"])
def test_repacking_gives_the_same_text(arch: str) -> None:
    shipped = (resources.files(history) / f"{arch}.json.gz").read_bytes()
    again = history.pack(list(history.unpack(shipped).values()))
    assert gzip.decompress(again) == gzip.decompress(shipped)
    assert again == history.pack(list(reversed(history.unpack(shipped).values())))


def test_a_table_survives_json() -> None:
    table = table_at("6.17", "i386")
    assert from_json(json.loads(json.dumps(to_json(table)))) == table


def test_tables_are_in_order_and_say_where_they_are_from() -> None:
    tables = history.tables()
    assert list(tables) == sorted(tables, key=parse)
    assert all(table.source for table in tables.values())


def test_an_unsampled_release_is_a_lookup_error_that_names_the_samples() -> None:
    with pytest.raises(LookupError, match=r"7\.0 was not sampled; the samples are 6\.1\.187, 6\.2"):
        history.table("7.0")
    with pytest.raises(LookupError, match="no history is kept for the architecture 'riscv'"):
        history.tables("riscv")


def test_a_sample_can_be_added_from_a_header_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/vfio.h").write_text("#define VFIO_TYPE (';')\n")
    status = main(["7.4", str(tmp_path), "a test", "--into", str(tmp_path)])
    error = capsys.readouterr().err
    if status == 2 and ("32" in error or "compiler" in error):
        pytest.skip(error)
    assert status == 0
    for arch in ("x86_64", "i386"):
        (table,) = history.unpack((tmp_path / f"{arch}.json.gz").read_bytes()).values()
        assert (table.release, table.arch, table.source, list(table.constants)) == (
            "7.4",
            arch,
            "a test",
            ["VFIO_TYPE"],
        )
    assert main(["7.4.x", str(tmp_path), "a test", "--into", str(tmp_path)]) == 2
    assert main(["7.5", str(tmp_path / "nowhere"), "a test", "--into", str(tmp_path)]) == 2


def test_rebuilding_a_sample_from_its_own_headers_changes_nothing(tmp_path: Path) -> None:
    """The history was written by another tool; this project's reader of headers gives the same facts."""
    root = Path("/usr/include")
    if not (root / "linux/vfio.h").is_file() or release_of(root) not in history.tables():
        pytest.skip("the headers of this host are of no sampled release")
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    try:
        read = read_headers(root)
    except HeaderError as error:
        pytest.skip(str(error))
    recorded = history.table(str(release_of(root)))
    if read.headers == recorded.headers:
        assert (read.ioctls, read.structs, read.constants) == (recorded.ioctls, recorded.structs, recorded.constants)
