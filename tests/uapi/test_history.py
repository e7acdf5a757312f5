"""The history files: complete, deterministic, and honest about what was not sampled."""

from __future__ import annotations

import gzip
import json
from importlib import resources

import pytest

from uapi import history
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
