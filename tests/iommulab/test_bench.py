"""`iommulab bench`: what it prints and writes. No figure is tested for its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iommulab.bench import Row, _call_rows
from iommulab.cli import main
from iommulab.measure.units import SETTINGS


def test_a_ratio_over_its_budget_is_over() -> None:
    assert Row("x", 4.0, 1.0, 3.0).over
    assert not Row("x", 3.0, 1.0, 3.0).over


def test_without_a_peer_there_is_no_ratio() -> None:
    row = Row("x", 4.0, None, 3.0)
    assert row.ratio is None
    assert not row.over


def test_scaling_figures_stand_beside_those_of_a_thousand_areas() -> None:
    figures = {
        f"MAP 4 KiB among {count} areas": value for count, value in (("10", 1.0), ("1,000", 2.0), ("9,999", 5.0))
    }
    ratios = {row.name: row.ratio for row in _call_rows(figures, None) if row.peer is not None}
    assert ratios == {"MAP 4 KiB among 9,999 areas / 1,000 areas": 2.5}


def test_the_gibibyte_budget_is_for_mappings_that_reach_a_domain() -> None:
    figures = {"MAP + UNMAP 1 GiB, no domain": 1.0, "MAP + UNMAP 1 GiB, one domain": 1.0}
    assert [row.budget for row in _call_rows(figures, figures)] == [3.0, 1.0]


def test_bench_of_the_model_alone_has_calls_and_dma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    assert main(["bench", "--on", "model", "--seconds", "0.001", "--areas", "1000", "--json", str(target)]) == 0
    names = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert names["ioctl, cheap (OPTION get)"]["model"] > 0
    assert names["attach + detach"]["peer"] is None
    assert names["DMA read, direct memory, 4 KiB"]["ratio"] > 0
    for label in SETTINGS:
        assert names[f"{label}: DMA write 1 MiB"]["budget"] == 1.5
        for what in ("TLB hit", "TLB miss", "nothing cached", "miss and invalidation of a domain"):
            assert names[f"{label}: {what}"]["ratio"] > 0
    assert names["SMMUv3 nested: HWPT_INVALIDATE, each of 10,000 entries"]["model"] > 0
    assert "no real kernel beside it" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--areas", "1"], ["--json", "/"]])
def test_bad_arguments_of_bench_are_one_sentence_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["bench", "--on", "model", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
