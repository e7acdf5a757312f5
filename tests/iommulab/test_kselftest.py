"""`iommulab selftest`: building the programs, reading their TAP, comparing with a recorded run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from iommulab.cli import main
from iommulab.errors import UserError
from iommulab.kselftest import tests_of as results_in
from iommulab.results import RECORDED, load

TAP = """\
TAP version 13
1..4
# Starting 4 tests from 2 test cases.
#  RUN           first.good ...
#            OK  first.good
ok 1 first.good
#  RUN           first.small.bad ...
# bad.c:7:bad:Expected 0 (0) == -1 (-1)
# bad: Test terminated by assertion
#          FAIL  first.small.bad
not ok 2 first.small.bad
#      SKIP      no luck
ok 3 first.small.skipped # SKIP no luck
not ok 4 second.huge.page
"""


def told(text: str, huge: bool = True) -> list[tuple[str, str]]:
    return [(test.id, test.verdict) for test in results_in("prog", iter(text.splitlines(keepends=True)), huge=huge)]


def test_each_line_of_the_plan_is_a_test_with_its_verdict() -> None:
    assert told(TAP) == [
        ("prog/first::good", "passed"),
        ("prog/first.small::bad", "failed"),
        ("prog/first.small::skipped", "skipped"),
        ("prog/second.huge::page", "failed"),
    ]


def test_what_fails_for_want_of_huge_pages_counts_as_not_run() -> None:
    assert told(TAP, huge=False)[3] == ("prog/second.huge::page", "skipped")
    assert told(TAP, huge=False)[1][1] == "failed"


def test_a_program_that_dies_fails_what_it_still_planned() -> None:
    cut = TAP[: TAP.index("#      SKIP")]
    assert [verdict for _, verdict in told(cut)] == ["passed", "failed", "failed", "failed"]


def test_a_program_without_a_plan_is_one_sentence() -> None:
    with pytest.raises(UserError, match="printed no plan: cannot open"):
        told("cannot open /dev/iommu\n")


def test_the_recorded_run_of_the_real_kernel_is_whole() -> None:
    verdicts = [test.verdict for test in load("recorded:selftest-7.3.4-dmabuf").tests]
    assert (RECORDED / "selftest-7.3.4-dmabuf.json.gz").is_file()
    assert [verdicts.count(kind) for kind in ("passed", "failed", "skipped")] == [249, 0, 5]


PROGRAM = r"""
#include <stdio.h>
#include <fcntl.h>
int main(void)
{
	int fd = open("/dev/iommu", O_RDWR);

	printf("TAP version 13\n1..2\n%s 1 open.works\nok 2 open.rest # SKIP nothing\n", fd >= 0 ? "ok" : "not ok");
	return fd < 0;
}
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux tree as small as can be: one program, headers that are nothing."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("no gcc or make to build a program with")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "linux"
    programs = root / "tools" / "testing" / "selftests" / "iommu"
    for directory in (programs, root / "init", root / "drivers" / "iommu" / "iommufd"):
        directory.mkdir(parents=True)
    (root / "Kconfig").touch()
    (root / "init" / "main.c").touch()
    (root / "Makefile").write_text("headers:\n\t@true\n")
    (programs / "iommufd.c").write_text(PROGRAM)
    (programs / "Makefile").write_text("all:\n\t@$(CC) -o $(OUTPUT)/iommufd iommufd.c\n")
    return root


def test_a_program_is_built_and_run_on_the_model(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report"
    assert main(["selftest", str(tree), "--program", "iommufd", "--report", str(report)]) == 0
    assert "iommufd: 1 pass, 0 fail, 1 skip of 2" in capfd.readouterr().out
    run = json.loads((report / "model.json").read_text())
    assert [(test["id"], test["verdict"]) for test in run["tests"]] == [
        ("iommufd/open::works", "passed"),
        ("iommufd/open::rest", "skipped"),
    ]
    assert not (tree / "tools" / "testing" / "selftests" / "iommu" / "iommufd").exists()


def test_a_drop_against_the_expected_run_fails(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report"
    common = ["selftest", str(tree), "--program", "iommufd"]
    assert main([*common, "--report", str(report)]) == 0
    source = tree / "tools" / "testing" / "selftests" / "iommu" / "iommufd.c"
    source.write_text(PROGRAM.replace("open.works", "open.other"))
    expect = ["--expect", str(report / "model.json"), "--report", str(tmp_path / "second")]
    assert main([*common, *expect]) == 1
    assert "worse than recorded: iommufd/open::works" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/not/there"], "/not/there is not a Linux source tree"),
        (["{tree}", "--program", "iommufd_fail_nth"], "has no iommufd_fail_nth.c"),
        (["{tree}", "--expect", "recorded:0.1"], "no recorded run named '0.1'"),
        (
            ["{tree}", "--program", "iommufd", "--on", "vm", "--kernel-image", "/not/there"],
            "cannot read the kernel image",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(tree=tree) for argument in arguments]
    assert main(["selftest", *given, "--report", str(tmp_path / "report")]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count(os.linesep) == 1
