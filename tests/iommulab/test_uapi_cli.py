"""`iommulab uapi`: what it prints, and its exit status."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from iommulab import uapi_cli
from iommulab.errors import UserError


def uapi(*words: str) -> int:
    parser = argparse.ArgumentParser()
    uapi_cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["uapi", *words])
    status: int = args.run(args)
    return status


def test_list_has_every_ioctl_and_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("list") == 0
    out = capsys.readouterr().out
    assert "56 ioctls at 7.3" in out
    assert "vfio_iommu_spapr_register_memory" in out
    assert "0x3b85" in out


def test_list_as_of_a_release_leaves_out_what_came_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("list", "--header", "iommufd", "--release", "6.2", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 9
    assert uapi("list", "constants", "--header", "vfio", "--release", "6.5", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["VFIO_AP_NUM_IRQS"]["value"] == 1
    assert uapi("list", "structs") == 0
    assert "98 structs at 7.3" in capsys.readouterr().out


def test_show_an_ioctl_prints_its_struct(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("show", "IOMMU_GET_HW_INFO") == 0
    out = capsys.readouterr().out
    assert "IOMMU_GET_HW_INFO = 0x3b8a  (linux/iommufd.h)" in out
    assert "40 bytes; the kernel insists on 32, up to `__reserved`" in out
    assert "out_max_pasid_log2  6.15   also in 6.12.95" in out
    assert "__u32 before 6.15" in out
    assert "union <anonymous>" in out


def test_show_follows_release_and_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("show", "iommu_hw_info", "--release", "6.6", "--json") == 0
    (fact,) = json.loads(capsys.readouterr().out)
    assert (fact["size"], [row["name"] for row in fact["members"]][-1]) == (32, "__reserved")
    assert uapi("show", "vfio_bitmap", "--arch", "i386", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["size"] == 20


def test_show_a_constant_prints_its_enum(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("show", "IOMMU_HWPT_ALLOC_PASID") == 0
    by_constant = capsys.readouterr().out
    assert uapi("show", "iommufd_hwpt_alloc_flags") == 0
    assert capsys.readouterr().out == by_constant
    assert "IOMMU_HWPT_FAULT_ID_VALID" in by_constant


def test_show_knows_the_mock_driver(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("show", "IOMMU_TEST_CMD") == 0
    assert "mock_domain_flags" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("show", "IOMMU_IOAS_MAPP"), "there is no 'IOMMU_IOAS_MAPP' in the ABI; did you mean IOMMU_IOAS_MAP"),
        (("show", "iommu_ioas_mapp"), "did you mean"),
        (("show", "IOMMU_HWPT_ALLOC", "--release", "6.2"), r"IOMMU_HWPT_ALLOC is not in 6\.2: it came in 6\.6\."),
        (("show", "iommu_hw_info", "--release", "6.5"), r"iommu_hw_info is not in 6\.5: it came in 6\.6\."),
        (("show", "IOMMU_HW_QUEUE_TYPE_DEFAULT", "--release", "6.5"), r"is not in 6\.5: it came in 6\.17\."),
        (("list", "--release", "4.19"), r"4\.19 is not of a known release; known are 6\.1 to 7\.3\."),
        (("list", "--release", "x"), "'x' is no kernel release"),
        (("list", "--header", "kvm"), "there is no header 'kvm'; there are linux/iommufd.h"),
        (("diff", "6.6", "nonsense"), "'nonsense' is no kernel release"),
        (("diff", "/nowhere/at/all", "6.6"), "/nowhere/at/all is no directory of headers."),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        uapi(*words)


def test_diff_exits_0_on_compatible_changes_and_1_on_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("diff", "6.16-rc3", "6.17-rc1") == 0
    assert "changes, all compatible" in capsys.readouterr().out
    assert uapi("diff", "6.12", "6.13-rc7") == 1
    out = capsys.readouterr().out
    assert "! VFIO_TYPE1_NESTING_IOMMU: gone" in out
    assert "1 of them incompatible (marked !)" in out
    assert uapi("diff", "6.9", "6.10") == 0
    assert "no change" in capsys.readouterr().out


def test_diff_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert uapi("diff", "6.12.107", "6.13-rc7", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["compatible"] is False
    assert {change["kind"] for change in data["changes"]} == {"ioctl", "struct", "field", "constant"}


def test_diff_of_a_header_tree_and_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/vfio.h").write_text("#define VFIO_TYPE (';')\n#define VFIO_BASE 101\n")
    assert uapi("diff", "7.3", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "! VFIO_BASE: 0x64 -> 0x65" in out
    assert "! linux/iommufd.h: removed" in out
    assert uapi("diff", str(tmp_path), str(tmp_path)) == 0
