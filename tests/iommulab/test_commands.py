"""The commands as a person calls them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

import iommulab
from iommulab import kernel_build, kernel_images
from iommulab.cli import main
from iommulab.coverage import find_sites, read_reasons
from iommulab.errors import UserError
from iommulab.reports import junit, ktap
from iommulab.results import Results, Test, area_of, load
from iommulab.suite import print_failures
from uapi.backend import DEV_IOMMU

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "iommulab", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment, check=False)


def test_the_heading_says_what_the_hardware_keeps(tmp_path: Path) -> None:
    done = run("conformance", "--caching", "random:7", "--report", str(tmp_path), "-n", "1", "ioas_alloc")
    assert "iommulab conformance on model 7.3, caching random:7" in done.stdout
    assert load(str(tmp_path / "model.json")).environment == {"caching": "random:7"}


@pytest.mark.parametrize("command", [["conformance", "--report", "REPORT"], ["run", "--", "true"]])
def test_hardware_that_keeps_what_there_is_no_word_for_is_an_error(tmp_path: Path, command: list[str]) -> None:
    words = [str(tmp_path) if word == "REPORT" else word for word in command]
    done = run(words[0], "--caching", "often", *words[1:])
    assert done.returncode == 2
    assert "caching is always, never, random or random:SEED, not 'often'" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_area_on_the_model_prints_a_table_and_writes_reports(tmp_path: Path) -> None:
    done = run("conformance", "--report", str(tmp_path), "-n", "1", "ioas_alloc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ioas_alloc" in done.stdout
    results = load(str(tmp_path / "model.json"))
    assert results.tests
    assert {test.verdict for test in results.tests} == {"passed"}
    assert results.tests[0].calls
    text = (tmp_path / "model.ktap").read_text()
    assert text.startswith("KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: ioas_alloc\n")
    suite = ElementTree.parse(tmp_path / "model.xml").getroot().find("testsuite")
    assert suite is not None
    assert int(suite.get("tests", "0")) == len(results.tests)


def test_on_a_machine_without_an_iommu_what_needs_one_is_skipped(tmp_path: Path) -> None:
    areas = ("vfio_group", "vfio_info", "vfio_msi", "noiommu_get_pa", "ioas_alloc")
    done = run("conformance", "--report", str(tmp_path), "-n", "1", "--machine", "q35-noiommu", *areas)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the edu device is behind no IOMMU" in done.stdout


def test_one_test_by_id_and_a_record(tmp_path: Path) -> None:
    listed = run("conformance", "--report", str(tmp_path), "-n", "1", "ioas_alloc")
    assert listed.returncode == 0
    test_id = load(str(tmp_path / "model.json")).tests[0].id
    kept = tmp_path / "kept.json.gz"
    done = run("conformance", "--report", str(tmp_path), "--record", str(kept), f"conformance/{test_id}")
    assert done.returncode == 0
    assert [test.id for test in load(str(kept)).tests] == [test_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conformance", "nothing"], "there is no test 'nothing'"),
        (["conformance", "-k", "no_such_name_anywhere", "ioas_alloc"], "no test matches"),
        (["conformance", "-k", "((", "ioas_alloc"], "-k"),
        (["conformance", "ioas_alloc::test_not_there"], "not found"),
        (["conformance", "--machine", "toaster", "ioas_alloc"], "toaster"),
        (["conformance", "--machine", "no/such.toml", "ioas_alloc"], "no/such.toml: cannot be read"),
        (["conformance", "--kernel", "0.99", "ioas_alloc"], "0.99"),
        (["conformance", "--kernel-image", "/x"], "add --on vm"),
        (["conformance", "--on", "vm", "-n", "2"], "one real kernel runs one test at a time"),
        (["conformance", "--on", "vm", "--kernel-image", "/not/there"], "cannot read the kernel image"),
        (["conformance", "--on", "vm", "--kernel-image", "/etc/passwd"], "is not a kernel image"),
        (["conformance", "--report", "/proc/nowhere", "ioas_alloc"], "cannot write to"),
        (["conformance", "--record", "/proc/nowhere", "ioas_alloc"], "cannot write /proc/nowhere"),
        (["conformance", "--record", "/not/there/run.json", "ioas_alloc"], "cannot write /not/there/run.json"),
        (["conformance", "--record", "/", "ioas_alloc"], "cannot write /: is a directory"),
        (["conformance", "-n", "many"], "many is no whole number from 1 to 256"),
        (["conformance", "--fail-nth", "-3"], "-3 is no whole number"),
        (["conformance", "--test-time", "soon"], "soon is no time in seconds"),
        (["conformance", "--on", "linux", "--machine", "mock"], "it tests what runs here"),
        (["conformance", "--on", "vm", "--dmabuf-get", "0"], "--dmabuf-get is for --on model"),
        (["kernel", "build", "/"], "is not a Linux source tree"),
        (["fuzz", "--against", "recorded", "--model", "9.9"], "9.9 is no release that the model knows"),
        (["fuzz", "--against", "recorded", "--seed", "x"], "x is no whole number from 0"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["compare", "a", "b"], "cannot read a"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "--report" not in arguments and arguments[0] == "conformance":
        arguments = [*arguments, "--report", str(tmp_path)]
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 1 + done.stderr.startswith("vm:"), done.stderr


@pytest.mark.skipif(os.path.exists(DEV_IOMMU), reason="/dev/iommu is here")
def test_on_linux_without_iommufd_says_what_is_missing(tmp_path: Path) -> None:
    done = run("conformance", "--on", "linux", "--report", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot open /dev/iommu" in done.stderr


def test_vm_without_an_image_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["conformance", "--on", "vm", "--report", str(tmp_path)]) == 2
    assert "iommulab kernel build SRC" in capsys.readouterr().err


def test_failure_prints_calls_walk_and_rerun(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [["Recorded calls", "   1  open(path=/dev/iommu) = 0"], ["The model's view", "level 2 is empty"]]
    test = Test("test_a.py::test_b[c d]", "failed", "no", text="assert 0", sections=sections)
    print_failures(Console(soft_wrap=True), Results("vm", tests=[test]), ["--on", "vm"])
    told = capsys.readouterr().out
    assert "1  open(path=/dev/iommu) = 0" in told
    assert "level 2 is empty" in told
    assert "conformance --on vm 'test_a.py::test_b[c d]'" in told


def test_ktap_and_junit_of_every_verdict() -> None:
    tests = [
        Test("test_a.py::test_1", "passed"),
        Test("test_a.py::test_2", "failed", "bad # thing\0"),
        Test("test_a.py::test_3", "skipped", "no device"),
        Test("test_b.py::test_4", "xfailed", "known"),
    ]
    results = Results("model", tests=tests)
    lines = ktap(results).splitlines()
    assert "  ok 1 test_1" in lines
    assert "  not ok 2 test_2" in lines
    assert "  ok 3 test_3 # SKIP no device" in lines
    assert "  not ok 1 test_4 # TODO known" in lines
    assert lines[-1] == "ok 2 b"
    assert lines[1] == "1..2"
    assert "not ok 1 a" in lines
    root = ElementTree.fromstring(junit(results))
    assert [suite.get("failures") for suite in root] == ["1", "0"]


def test_area_is_the_file_name() -> None:
    assert area_of("test_ioas_map.py::test_x[1]") == "ioas_map"


def test_results_survive_json_and_gzip(tmp_path: Path) -> None:
    tests = [Test("test_a.py::test_1", "skipped", "why", 0.25, notes={"n": 1}, markers={"since": ["6.13"]})]
    results = Results("model", "model", "7.3", "m", tests=tests)
    for name in ("a.json", "a.json.gz"):
        results.save(tmp_path / name)
        assert load(str(tmp_path / name)).tests == tests
    assert json.loads((tmp_path / "a.json").read_text())["summary"] == {"skipped": 1}


def image_bytes(release: str) -> bytes:
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x400)
    text = f"{release} (somebody) #1".encode()
    head[0x600 : 0x600 + len(text)] = text
    return bytes(head)


def test_cached_images_are_found_by_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for release in ("6.9.1-x", "6.12.4-x", "7.3.4-x"):
        folder = kernel_images.cache() / release
        folder.mkdir(parents=True)
        (folder / "bzImage").write_bytes(image_bytes(release))
    assert [image.release for image in kernel_images.cached_images()] == ["6.9.1-x", "6.12.4-x", "7.3.4-x"]
    assert kernel_images.find_image(None, None).release == "7.3.4-x"
    assert kernel_images.find_image(None, "6.12").release == "6.12.4-x"
    with pytest.raises(UserError, match=r"no cached kernel image is 6\.1 "):
        kernel_images.find_image(None, "6.1")
    assert main(["kernel", "list"]) == 0


def test_a_configuration_without_the_needed_options_is_refused() -> None:
    fragment = kernel_build.FRAGMENT.read_text()
    kernel_build.check_config(fragment)
    with pytest.raises(UserError, match=r"it leaves out IOMMUFD$"):
        kernel_build.check_config(fragment.replace("CONFIG_IOMMUFD=y", "# CONFIG_IOMMUFD is not set"))


def test_a_tree_before_iommufd_is_refused(tmp_path: Path) -> None:
    for name in ("Kconfig", "Makefile", "init/main.c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"iommufd came with Linux 6\.2"):
        kernel_build.check_tree(tmp_path)


def test_doctor_tells_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for word in ("/dev/iommu", "vfio devices", "KVM", "QEMU", "kernel images", "compiler"):
        assert word in told


def test_connect_gives_the_model_where_there_is_no_iommufd() -> None:
    backend = iommulab.connect("model")
    with backend.open(DEV_IOMMU):
        assert backend.name == "model"
    backend.close()
    if not os.path.exists(DEV_IOMMU):
        with iommulab.connect() as auto:  # type: ignore[attr-defined]  # the model is a context manager
            assert auto.name == "model"
        with pytest.raises(FileNotFoundError):
            iommulab.connect("linux")
    with pytest.raises(ValueError, match="expected 'auto', 'linux' or 'model'"):
        iommulab.connect("windows")


def test_plugin_gives_other_projects_a_fresh_kernel(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "def test_a(kernel):\n    kernel.open('/dev/iommu')\n    assert kernel.release == '6.6'\n"
        "def test_b(kernel):\n    assert kernel.name == 'model'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "iommulab.pytest_plugin"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--iommulab-version", "6.6", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_errno_sites_are_found_with_their_function(tmp_path: Path) -> None:
    package = tmp_path / "model"
    package.mkdir()
    (package / "a.py").write_text(
        "class C:\n    def f(self):\n        raise KernelError(errno.EINVAL, 'no')\n"
        "def g(number):\n    raise KernelError(number)\n    raise ValueError\n"
    )
    found = [(site.path, site.line, site.function, site.errno) for site in find_sites(package)]
    assert found == [("model/a.py", 3, "C.f", "EINVAL"), ("model/a.py", 5, "g", "?")]


def test_reasons_are_read_and_a_malformed_one_is_told() -> None:
    text = "# Title\n\n- `model/a.py C.f EINVAL`: because\n  of this\n"
    assert read_reasons(text) == {("model/a.py", "C.f", "EINVAL"): "because of this"}
    with pytest.raises(UserError, match="line 1: expected"):
        read_reasons("- model/a.py: no\n")
    with pytest.raises(UserError, match="has no reason"):
        read_reasons("- `model/a.py C.f EINVAL`:\n")
