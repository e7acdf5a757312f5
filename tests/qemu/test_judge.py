"""QEMU's emulated IOMMUs as judges of ours: recorded everywhere, live for `make soak`."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from tests.qemu import vectors
from tests.qemu.departures import DEPARTURES, markdown
from tests.qemu.judged import UNITS, Judged, asked, differences
from tests.qemu.qtest import Qtest, QtestError, find_qemu
from tests.qemu.rig import count

#: The first seed of a live run: not one of those that were recorded.
FIRST = 1_000_000
FILES = [path for name in UNITS for path in vectors.names(name)]


def qemu(unit: Judged) -> str:
    program, missing = find_qemu(unit.architecture)
    if missing:
        pytest.skip(missing)
    return program


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_ours_does_what_qemu_was_recorded_to_do(path):
    content = vectors.load(path)
    found = differences(UNITS[content["unit"]], content["parameters"], content["cases"])
    assert not found, f"{len(found)} of {len(content['cases'])} cases differ:\n" + "\n".join(found[:3])


@pytest.mark.parametrize("name", UNITS)
def test_cases_are_the_same_for_the_same_seed_and_have_answers(name):
    case = UNITS[name].case
    assert [case(seed) for seed in range(50)] == [case(seed) for seed in range(50)]
    assert all(count(case(seed)) for seed in range(50))


def test_departures_name_the_manuals_section():
    assert all(departure.section and departure.manual and departure.qemu for departure in DEPARTURES)


def test_the_page_has_the_table_of_departures():
    page = Path(__file__).parents[2] / "docs" / "qemu.md"
    assert markdown() in page.read_text(), "print it anew: python -m tests.qemu.departures"


def test_a_program_that_says_nothing_is_given_up(tmp_path):
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with Qtest(str(program), [], timeout=0.2) as silent, pytest.raises(QtestError, match="no reply in"):
        silent.ask(["readl 0x0"])


def test_a_program_that_ends_is_an_error_with_its_last_words(tmp_path):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho no such machine >&2\nexit 1\n")
    program.chmod(0o755)
    with Qtest(str(program), []) as broken, pytest.raises(QtestError, match="no such machine"):
        broken.ask(["readl 0x0"])


def test_an_old_qemu_is_refused_with_its_version(tmp_path, monkeypatch):
    program = tmp_path / "old"
    program.write_text("#!/bin/sh\necho QEMU emulator version 10.0.13\n")
    program.chmod(0o755)
    monkeypatch.setenv("IOMMULAB_QEMU_X86_64", str(program))
    assert find_qemu("x86_64") == (
        "",
        f"qemu-system-x86_64 11 or newer is needed (IOMMULAB_QEMU_X86_64 may name it); {program} is version 10.0",
    )


@pytest.mark.soak
@pytest.mark.parametrize("name", UNITS)
def test_ours_does_what_a_live_qemu_does(name):
    unit = UNITS[name]
    live = unit.live // 100 if os.environ.get("IOMMULAB_SOAK_QUICK") else unit.live
    answers = asked(unit, qemu(unit), range(FIRST, FIRST + live))
    while piece := list(islice(answers, 2000)):
        found = differences(unit, piece[0][0], [(case, answer) for _, case, answer in piece])
        assert not found, f"{len(found)} cases differ:\n" + "\n".join(found[:3])
