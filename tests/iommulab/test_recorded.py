"""The models of other releases and machines than the usual one, held to the recorded runs of their real kernels.

`make conformance` and `iommulab compare` do this for the newest release behind VT-d in legacy mode, whole. Here it is
a slice: for each recorded run of an older release the areas whose tests know of releases; for the newest on arm64 those
in which SMMUv3 shows, behind VT-d in scalable mode those that speak of the unit. `-m soak` runs the suite whole.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance.offers import number
from iommulab.compare import NOT_RUN, compare
from iommulab.results import RECORDED, load
from uapi.version import NEWEST, parse

RUNS = sorted(path.name.removesuffix(".json.gz") for path in RECORDED.glob("[0-9]*.json.gz"))
OLDER = [name for name in RUNS if parse(name.partition("-")[0]).series != parse(NEWEST).series]
ARM64 = "7.3.4-arm64"
#: Areas that are quick and have tests of both sides of rows of uapi/behaviours.py.
SLICE = ("versions", "mock_domain", "mock_map", "viommu_errors", "hwpt_alloc", "vfio_compat")
#: Areas in which an arm64 kernel behind SMMUv3 does not do what an x86 one does behind VT-d.
ARM64_SLICE = (
    *("smmuv3_hw_info", "smmuv3_nested", "smmuv3_viommu", "smmuv3_veventq", "smmu_faults", "ioas_reserved"),
    *("hwpt_alloc", "vfio_msi", "vfio_compat_device", "vfio_walks"),
)
#: Runs of the newest release on VT-d units in scalable mode, and areas that are quick and speak of the unit.
SCALABLE = [name for name in RUNS if "-q35-vtd" in name]
UNIT_SLICE = ("vtd_stages", "ioas_reserved", "vfio_iommufd", "vfio_pasid", "vfio_hwpt", "vfio_walks")


def differing(name: str, directory: Path, areas: tuple[str, ...]) -> list[str]:
    """The tests in both runs that are not the same, as the command would print them."""
    real = load(f"recorded:{name}")
    options = ["--kernel", number(real.release), "--machine", real.machine, "--report", str(directory)]
    command = [sys.executable, "-m", "iommulab", "conformance", *options, *areas]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = compare(load(str(directory / "model.json")), real, [])
    both = [one for one in found.differing if NOT_RUN not in (one.left, one.right)]
    assert found.same > 100
    return [f"{one.test}\n  {one.left}\n  {one.right}" for one in both]


def test_an_older_release_is_recorded_with_and_without_an_iommu() -> None:
    assert {load(f"recorded:{name}").machine for name in OLDER} == {"q35-vtd-legacy", "mock"}


@pytest.mark.parametrize("name", [*OLDER, ARM64, *SCALABLE])
def test_recorded_kernel_passes_every_test_that_it_runs(name: str) -> None:
    assert not load(f"recorded:{name}").failed


@pytest.mark.parametrize("name", OLDER)
def test_model_of_an_older_release_does_what_the_recorded_kernel_did(name: str, tmp_path: Path) -> None:
    assert not differing(name, tmp_path, SLICE)


def test_model_behind_smmuv3_does_what_the_recorded_arm64_kernel_did(tmp_path: Path) -> None:
    assert load(f"recorded:{ARM64}").machine == "virt-smmuv3"
    assert not differing(ARM64, tmp_path, ARM64_SLICE)


@pytest.mark.parametrize("name", SCALABLE)
def test_model_with_a_unit_in_scalable_mode_does_what_the_recorded_kernel_did(name: str, tmp_path: Path) -> None:
    assert not differing(name, tmp_path, UNIT_SLICE)


def test_both_stages_of_vtd_are_recorded() -> None:
    assert {load(f"recorded:{name}").machine for name in SCALABLE} == {"q35-vtd", "q35-vtd-fs"}


@pytest.mark.soak
@pytest.mark.parametrize("name", [*OLDER, ARM64])
def test_model_does_all_that_the_recorded_kernel_did(name: str, tmp_path: Path) -> None:
    assert not differing(name, tmp_path, ())
