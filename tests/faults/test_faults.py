"""The faults' lines are there, their page is made from them, and (in a soak) each is caught."""

import ast

import pytest

from tests.faults.faults import FAULTS
from tests.faults.run import ROOT, caught, document, healthy
from tests.faults.table import IOMMUFD, SMMUV3, VTD, Fault, changed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_line_is_there_once_and_its_change_is_python(fault):
    text = (ROOT / fault.file).read_text()
    faulty = changed(fault, text)
    ast.parse(faulty)
    assert sum(a != b for a, b in zip(text.split("\n"), faulty.split("\n"), strict=True)) == 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_test_that_catches_it_is_in_the_suite(fault):
    path, _, name = fault.test.partition("[")[0].partition("::")
    assert f"def {name}(" in (ROOT / "conformance" / path).read_text()


def test_there_are_thirty_and_ten_of_each_kind_with_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    for kind in (VTD, SMMUV3, IOMMUFD):
        assert sum(fault.kind == kind for fault in FAULTS) >= 10


def test_the_page_of_the_faults_is_the_one_that_they_make():
    assert (ROOT / "docs" / "faults.md").read_text() == document(), "python -m tests.faults.run --doc"


def test_a_line_that_is_there_twice_needs_one_above_it():
    twice = "def f():\n    return 1\ndef g():\n    return 1\n"
    fault = Fault("x", VTD, "", "x.py", "return 1", "return 2", "", "")
    with pytest.raises(LookupError, match="2 lines"):
        changed(fault, twice)
    assert changed(fault._replace(below="def g():"), twice) == "def f():\n    return 1\ndef g():\n    return 2\n"
    with pytest.raises(LookupError, match="0 lines"):
        changed(fault._replace(below="def h():"), twice)


@pytest.mark.soak
def test_the_tests_that_catch_faults_pass_without_them():
    assert healthy(FAULTS) == []


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_is_caught(fault):
    assert caught(fault)
