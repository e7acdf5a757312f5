"""`iommulab versions`: what it prints, and its exit status."""

from __future__ import annotations

import json

import pytest

from iommulab import versions
from iommulab.cli import main
from iommulab.results import Results, Test
from uapi.behaviours import BY_ID, TABLE
from uapi.iommufd_test import IOMMU_TEST_OP_DIRTY, IOMMU_TEST_OP_MOCK_DOMAIN


def test_every_row_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions"]) == 0
    out = capsys.readouterr().out
    assert f"{len(versions.everything())} differences between 6.2 and 7.3" in out
    assert "a page that is mapped writable only refuses reads" in " ".join(out.split())


def test_json_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() > {row.id for row in TABLE}
    row = rows["fault-read-too-small"]
    assert (row["since"], row["backports"], row["evidence"]) == ("7.2", ["6.12.117"], "source")


def test_a_release_lists_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "6.12.117", "--json"]) == 0
    lacks = {row["id"] for row in json.loads(capsys.readouterr().out)}
    assert {"mock-generic-pt", "vtd-write-only", "abi-6.13-iommufd"} <= lacks
    assert not {"fault-read-too-small", "vfio-cdev", "abi-6.11-iommufd"} & lacks
    assert main(["versions", "7.3"]) == 0
    assert "0 differences that 7.3 does not have" in capsys.readouterr().out


def test_evidence_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--evidence", "run", "--json"]) == 0
    assert {row["evidence"] for row in json.loads(capsys.readouterr().out)} == {"run"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x"], "'x' is no kernel release"),
        (["6.1"], "6.1 is not known here: 6.2 to 7.3 are."),
        (["7.4"], "7.4 is not known here"),
        (["--coverage", "6.6"], "--coverage is of all releases"),
        (["--coverage", "--evidence", "run"], "--coverage is of all releases"),
        (["--markdown", "6.6"], "--markdown is the whole table."),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def one(test_id: str, *names: str, op: int = 0, **markers: list[str]) -> Test:
    calls = [{"call": name, "in": {"op": op} if op else {}} for name in names]
    return Test(test_id, "passed", calls=calls, markers=markers)


def test_coverage_counts_the_tests_that_a_release_runs() -> None:
    run = Results("vm", "linux", "7.3.4-oracle")
    run.tests = [
        one("a", "IOMMU_IOAS_MAP"),
        one("b", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP", since=["6.13"]),
        one("c", "IOMMU_IOAS_MAP", linux_only=["why"]),
        one("d", "IOMMU_IOAS_MAP", has=["fault-read-too-small"]),
        Test("e", "failed", calls=[{"call": "IOMMU_IOAS_MAP"}]),
        one("f", "IOMMU_TEST_CMD", op=IOMMU_TEST_OP_MOCK_DOMAIN),
    ]
    older = Results("vm", "linux", "6.12.117-oracle")
    older.tests = [one("a", "IOMMU_IOAS_MAP"), one("g", "IOMMU_IOAS_MAP", lacks=["mmap-of-iommufd"])]
    found = versions.Coverage([older, run])
    counts = [found.on_model("IOMMU_IOAS_MAP", release) for release in ("6.2", "6.12.117", "6.13", "7.3")]
    assert counts == [2, 3, 3, 3]
    assert [found.on_real("IOMMU_IOAS_MAP", release) for release in found.releases] == [2, 4]
    assert found.on_model("IOMMU_TEST_OP_MOCK_DOMAIN", "6.2") == 1
    assert found.on_real("IOMMU_TEST_OP_MOCK_DOMAIN", "6.12.117") == 0


def test_coverage_has_a_row_for_every_ioctl_and_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--coverage", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sum(not name.startswith("IOMMU_TEST_OP_") for name in rows) == 22
    assert len(rows) == 22 + 23
    assert rows["IOMMU_IOAS_NOIOMMU_GET_PA"]["model"]["7.2"] is None
    assert not [name for name, row in rows.items() if any(count is False for count in row["model"].values())]


def test_coverage_is_printed_with_a_column_a_release(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--coverage"]) == 0
    out = capsys.readouterr().out
    assert out.split("\n")[0].split()[3:6] == ["6.2", "6.3", "6.4"]
    assert "real 7.3.4" in out
    assert "HWPT_INVALIDATE" in out


def test_unknown_operation_is_not_handled() -> None:
    assert versions.handled("IOMMU_TEST_OP_DIRTY", "6.6") is None
    assert versions.handled("IOMMU_TEST_OP_DIRTY", "6.7") is True
    assert IOMMU_TEST_OP_DIRTY == 13


def test_fits_follows_both_sides_of_a_row() -> None:
    row = BY_ID["mmap-of-iommufd"]
    assert versions.fits(one("x", has=[row.id]), "6.17")
    assert not versions.fits(one("x", has=[row.id]), "6.16")
    assert versions.fits(one("x", lacks=[row.id]), "6.16")
    assert not versions.fits(one("x", lacks=[row.id]), "6.17")
