"""The fuzzer: programs, their compiled form, both sides, shrinking, and the recorded answers of the real kernel."""

from __future__ import annotations

import argparse
import ast
import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from iommulab.cli import main
from iommulab.errors import UserError
from iommulab.fuzz.cli import RECORDED, model_release
from iommulab.fuzz.compare import Difference, differences
from iommulab.fuzz.executor import Answer, digest
from iommulab.fuzz.generator import ACTIONS
from iommulab.fuzz.hunt import Hunt, HuntProgress, check, signature
from iommulab.fuzz.machines import GENERATORS, generate
from iommulab.fuzz.memory import MEMFD, NULL_FD
from iommulab.fuzz.model import Broken, ModelSide
from iommulab.fuzz.program import LAYOUTS, Call, Program, compile_program, without
from iommulab.fuzz.render import as_python
from iommulab.fuzz.shrink import shrink
from iommulab.fuzz.target import Died, Frame, Target
from iommulab.fuzz.vectors import PER_FILE, Vectors, chunks, load
from iommulab.kernel_images import find_image

ROOT = Path(__file__).resolve().parent.parent.parent
HARDWARE = [name for name in GENERATORS if name != "mock"]
#: An executor as on a real kernel, but on the model; a program without calls kills it, one of size 0 hangs.
EXECUTOR = """
import os, sys, time
from iommulab.fuzz.executor import Executor, serve
from iommulab.fuzz.hunt import Hunt, HuntProgress, check, signature
from iommulab.fuzz.model import ModelDoor
from kernel_model.kernel import Kernel
run = Executor.run
def deadly(self, image, steps, main_first=False):
    if not steps:
        os._exit(3)
    if not image[0]:
        time.sleep(60)
    return run(self, image, steps, main_first)
Executor.run = deadly
serve(0, 1, ModelDoor(Kernel("mock", "7.3.4")))
"""


@pytest.fixture
def model() -> Iterator[ModelSide]:
    with ModelSide("7.3.4") as side:
        yield side


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Target(tmp_path, command=[sys.executable, "-c", EXECUTOR]) as found:
        yield found


def answer(side: ModelSide, program: Program) -> Answer:
    found = side.run(program, compile_program(program))
    assert not isinstance(found, Broken), found.trace
    return found


def frame(number: int, program: Program, expected: bytes = b"") -> Frame:
    compiled = compile_program(program)
    return Frame(number, expected, compiled.image, compiled.steps, program.main_first)


# -- programs ------------------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 100_000))
@settings(max_examples=40, deadline=None)
def test_a_seed_is_a_program(seed: int, number: int) -> None:
    program = generate(seed, number)
    assert program == generate(seed, number)
    assert len(program.calls) >= 30
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_other_numbers_and_seeds_are_other_programs() -> None:
    texts = {repr(generate(seed, number)) for seed in range(3) for number in range(20)}
    assert len(texts) == 60


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_is_left_of_a_program_still_compiles(number: int, rng: object) -> None:
    program = generate(7, number)
    dropped = {index for index in range(len(program.calls)) if rng.random() < 0.5}  # type: ignore[attr-defined]
    rest = without(program, dropped)
    assert len(rest.calls) == len(program.calls) - len(dropped)
    assert [call.name for call in rest.calls] == [
        call.name for index, call in enumerate(program.calls) if index not in dropped
    ]
    compile_program(rest)


def test_no_program_names_a_descriptor_that_differs_between_processes() -> None:
    known = {MEMFD, NULL_FD, 950, (1 << 31) - 1, (1 << 32) - 1}
    programs = [generate(8, number, dmabuf=True) for number in range(400)]
    programs += [program for path in chunks(RECORDED) for _, program, _ in load(path).items]
    for program in programs:
        for call in program.calls:
            for name in ("fd", "dmabuf_fd"):
                value = call.fields.get(name)
                assert not isinstance(value, int) or value in known or call.name in ("read", "write", "close"), call


def test_references_follow_their_calls_and_to_a_dropped_one_are_zero() -> None:
    calls = [
        Call("IOMMU_IOAS_ALLOC"),
        Call("IOMMU_IOAS_ALLOC"),
        Call("IOMMU_DESTROY", {"id": "@1.out_ioas_id"}),
        Call("IOMMU_DESTROY", {"id": "@0.out_ioas_id"}),
    ]
    rest = without(Program(calls), {0})
    assert [call.fields for call in rest.calls] == [{}, {"id": "@0.out_ioas_id"}, {"id": 0}]


def test_a_program_too_long_for_its_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        compile_program(Program([Call("IOMMU_IOAS_MAP")] * 2000))


@pytest.mark.parametrize("number", range(8))
def test_a_program_renders_as_python_that_parses(number: int) -> None:
    program = generate(11, number)
    text = as_python(program)
    ast.parse(text)
    assert text.count("call(") >= sum(call.is_ioctl for call in program.calls)


def test_rendered_python_does_on_the_model_what_the_program_does(capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(
        [
            Call("IOMMU_IOAS_ALLOC"),
            Call("IOMMU_TEST_OP_MOCK_DOMAIN", {"id": "@0.out_ioas_id"}),
            Call("IOMMU_IOAS_MAP", {"flags": 6, "ioas_id": "@0.out_ioas_id", "user_va": "&buf+0x1000", "length": 4096}),
            Call("IOMMU_DESTROY", {"id": "@1.out_hwpt_id"}),
            Call("IOMMU_DESTROY", {"id": "@1.out_stdev_id"}),
            Call("IOMMU_TEST_OP_DMABUF_GET", {"length": 4096, "open_flags": 0x80002}),
            Call("IOMMU_TEST_OP_DMABUF_REVOKE", {"dmabuf_fd": "@5.result_fd", "revoked": 1}),
            Call("close", {"fd": "@5.result_fd"}),
            Call("VFIO_GET_API_VERSION"),
        ]
    )
    text = as_python(program).replace('LinuxBackend()  # or Kernel("mock")', 'Kernel("mock")')
    names: dict[str, Any] = {}
    exec(compile(text, "rendered", "exec"), names)
    names["iommu"].close()
    names["kernel"].close()
    said = capsys.readouterr().out.split("\n")
    assert said[5].startswith("IOMMU_TEST_CMD = ")
    assert said[6:8] == ["IOMMU_TEST_CMD = 0", "VFIO_GET_API_VERSION = 0"]
    assert said[:5] == [
        "IOMMU_IOAS_ALLOC = 0",
        "IOMMU_TEST_CMD = 0",
        "IOMMU_IOAS_MAP = 0",
        "IOMMU_DESTROY EBUSY",
        "IOMMU_DESTROY = 0",
    ]


def test_every_ioctl_and_test_operation_comes_up() -> None:
    names = {call.name for number in range(600) for call in generate(5, number).calls}
    mine = {name for name in LAYOUTS if name.startswith("IOMMU_")}
    assert mine - names == {"IOMMU_TEST_OP_DMABUF_GET", "IOMMU_TEST_OP_DMABUF_REVOKE"}
    with_dmabuf = {call.name for number in range(60) for call in generate(5, number, dmabuf=True).calls}
    assert {"IOMMU_TEST_OP_DMABUF_GET", "IOMMU_TEST_OP_DMABUF_REVOKE"} <= with_dmabuf
    assert len(ACTIONS) > 40


# -- running -------------------------------------------------------------------------------------------------------


def test_the_same_program_gives_the_same_answer(model: ModelSide) -> None:
    for number in range(10):
        program = generate(1, number)
        first = answer(model, program)
        assert digest(answer(model, program)) == digest(first)


def test_programs_do_not_depend_on_those_before_them(model: ModelSide) -> None:
    programs = [generate(2, number) for number in range(12)]
    forth = [digest(answer(model, program)) for program in programs]
    back = [digest(answer(model, program)) for program in reversed(programs)]
    assert forth == back[::-1]


def test_final_state_tells_pins_destroyed_ids_and_contents(model: ModelSide) -> None:
    program = Program(
        [
            Call("IOMMU_IOAS_ALLOC"),
            Call("IOMMU_TEST_OP_MOCK_DOMAIN", {"id": "@0.out_ioas_id"}),
            Call("IOMMU_IOAS_MAP", {"flags": 6, "ioas_id": "@0.out_ioas_id", "user_va": "&buf+0x1000", "length": 8192}),
            Call("IOMMU_TEST_OP_CREATE_ACCESS", {"id": "@0.out_ioas_id"}),
            Call(
                "IOMMU_TEST_OP_ACCESS_RW",
                {"id": "@3.out_access_fd", "flags": 1, "iova": "@2.iova", "length": 4, "uptr": "*01020304"},
            ),
        ]
    )
    results, _, final = answer(model, program)
    assert results == [0] * 5
    assert final["pins"][:4] == [0, 1, 1, 0]
    assert final["VmPin"] == [8]
    assert final["contents"][0] == 0x10_0000_1000
    assert final["left"] == []
    assert 0 in final["destroy"]


def test_a_difference_names_call_field_and_values(model: ModelSide) -> None:
    program = Program([Call("IOMMU_IOAS_ALLOC"), Call("IOMMU_DESTROY", {"id": "@0.out_ioas_id"})])
    compiled = compile_program(program)
    results, work, final = answer(model, program)
    other = bytearray(work)
    other[8] = 77
    changed: Answer = ([0, -16], bytes(other), final | {"VmPin": [4]})
    found = differences(program, compiled, changed, (results, work, final))
    assert found[0] == Difference(0, "out_ioas_id", "0x4d", "0x1")
    assert Difference(1, "result", "EBUSY", "0") in found
    assert found[-1].what == "VmPin at the end"
    assert signature(program, found) == "IOMMU_IOAS_ALLOC out_ioas_id"


def test_a_target_answers_with_the_digest_that_was_expected(model: ModelSide, target: Target) -> None:
    programs = [generate(3, number) for number in range(70)]
    wanted = [digest(answer(model, program)) for program in programs]
    frames = (frame(number, program, wanted[number]) for number, program in enumerate(programs))
    assert [found for _, found in target.ask(frames)] == wanted


def test_a_target_tells_the_whole_answer_where_another_was_expected(model: ModelSide, target: Target) -> None:
    program = generate(3, 1)
    (_, found), *rest = target.ask(iter([frame(0, program, b"otherwis")]))
    assert not rest
    assert tuple(found) == answer(model, program)


def test_a_death_costs_one_program(model: ModelSide, target: Target) -> None:
    programs = [Program([Call("IOMMU_IOAS_ALLOC")]), Program([]), *[generate(4, number) for number in range(60)]]
    found = list(target.ask(frame(number, program) for number, program in enumerate(programs)))
    assert [number for number, (_, told) in enumerate(found) if isinstance(told, Died)] == [1]
    assert [sent.number for sent, _ in found] == list(range(62))
    assert tuple(found[-1][1]) == answer(model, programs[-1])


def test_silence_costs_one_program(model: ModelSide, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iommulab.fuzz.target.SILENCE", 5.0)
    silent = Program([Call("IOMMU_IOAS_ALLOC", {"size": 0})])
    programs = [generate(4, 1), silent, *[generate(4, number) for number in range(20)]]
    found = list(target.ask(frame(number, program) for number, program in enumerate(programs)))
    assert [told.why for _, told in found if isinstance(told, Died)] == ["no answer within 5 s"]
    assert tuple(found[-1][1]) == answer(model, programs[-1])


def test_a_broken_model_is_booted_again(model: ModelSide, monkeypatch: pytest.MonkeyPatch) -> None:
    program = generate(1, 1)
    before = digest(answer(model, program))
    with monkeypatch.context() as patch:  # every call of the model fails as no call may
        patch.setattr("kernel_model.door.ModelFile.ioctl", lambda *_: 1 // 0)
        found = model.run(program, compile_program(program))
    assert isinstance(found, Broken)
    assert found.error.startswith("ZeroDivisionError")
    assert digest(answer(model, program)) == before


def hold(side: ModelSide, seed: int, numbers: range) -> None:
    """No program of these breaks the model."""
    for number in numbers:
        program = generate(seed, number, machine=side.machine)
        found = side.run(program, compile_program(program))
        if isinstance(found, Broken):
            assert found.excused, f"program {number} of seed {seed}:\n{as_python(program)}\n{found.trace}"


@pytest.mark.parametrize("seed", range(2))
def test_no_program_breaks_the_model(model: ModelSide, seed: int) -> None:
    hold(model, seed, range(50))


@pytest.mark.parametrize("machine", HARDWARE)
def test_no_program_breaks_the_model_of_a_machine(machine: str) -> None:
    with ModelSide("7.3.4", machine) as side:
        hold(side, 5, range(25))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_no_program_of_thousands_breaks_the_model(model: ModelSide, seed: int) -> None:
    hold(model, 1000 + seed, range(2000))


@pytest.mark.soak
@pytest.mark.parametrize(("machine", "programs"), [("mock", 10_000), *((name, 1000) for name in HARDWARE)])
def test_thousands_of_programs_on_a_real_kernel(
    machine: str, programs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the newest image of `iommulab kernel list`, in a guest; for Arm on the one that IOMMULAB_ARM64_IMAGE names."""
    arguments = ["fuzz", "--against", "vm", "--machine", machine, "--programs", str(programs)]
    if machine.startswith("virt-"):
        if "IOMMULAB_ARM64_IMAGE" not in os.environ:
            pytest.skip("IOMMULAB_ARM64_IMAGE names no kernel image for arm64")
        arguments += ["--kernel-image", os.environ["IOMMULAB_ARM64_IMAGE"]]
    else:
        try:
            find_image(None, None)
        except UserError as error:
            pytest.skip(str(error))
    status = main(arguments)
    assert status == 0, capsys.readouterr().out


def hunt(target: Target, model: ModelSide, seed: int = 3) -> Hunt:
    arguments = argparse.Namespace(calls=30, dmabuf=False, time=1e6, record=None)
    return Hunt(Console(), arguments, target, model, seed)


def test_a_run_of_two_equal_kernels_finds_nothing(model: ModelSide, target: Target) -> None:
    with HuntProgress(Console(), "fuzz", 25) as meter:
        found = hunt(target, model).run(range(25), meter)
    assert (found.done, found.same, found.findings) == (25, 25, [])
    assert sum(found.calls.values()) > 25 * 30


def test_a_run_of_two_kernels_finds_what_differs_and_shrinks_it(
    model: ModelSide, target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kernel_model.iommufd.main.IOMMU_OPTION_RLIMIT_MODE", 77)
    mine = hunt(target, model)
    with HuntProgress(Console(), "fuzz", 40) as meter:
        found = mine.run(range(40), meter)
    assert found.findings
    small = shrink(found.findings[0].program, lambda program: bool(mine.ask(program)))
    assert [call.name for call in small.calls] == ["IOMMU_OPTION"]


def test_a_kernel_without_the_mock_driver_is_named(
    model: ModelSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    blind = EXECUTOR.replace("serve(0", "ModelDoor.ioctl = lambda *_: -25  # ENOTTY\nserve(0")
    with Target(tmp_path, command=[sys.executable, "-c", blind]) as bare:
        bare.start()
        with pytest.raises(UserError, match="has no mock driver"):
            hunt(bare, model).need_mock_driver()


# -- shrinking -----------------------------------------------------------------------------------------------------


def test_shrinking_keeps_the_calls_that_matter() -> None:
    program = generate(9, 3)
    places = [index for index, call in enumerate(program.calls) if call.name == "IOMMU_IOAS_MAP"]
    assert places

    def differs(candidate: Program) -> bool:
        return any(call.name == "IOMMU_IOAS_MAP" for call in candidate.calls)

    small = shrink(program, differs)
    assert [call.name for call in small.calls] == ["IOMMU_IOAS_MAP"]
    assert small.calls[0].fields == {}


def test_shrinking_stops_at_its_budget() -> None:
    runs = itertools.count()

    def differs(_: Program) -> bool:
        return next(runs) < 0

    shrink(generate(9, 4), differs, budget=10)
    assert next(runs) == 10


# -- recorded answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.name for path in chunks(RECORDED)])
def test_the_model_answers_as_the_recorded_kernel(name: str) -> None:
    vectors = load(RECORDED / name)
    with ModelSide(model_release(vectors.release), vectors.machine) as side:
        for number, program, recorded in vectors.items:
            told = check(side, program, recorded)
            assert not told, f"program {number} of seed {vectors.seed}: {told[0]}\n{as_python(program)}"


def test_a_thousand_programs_are_recorded() -> None:
    assert sum(len(load(path).items) for path in chunks(RECORDED)) >= 1000


def test_a_directory_gets_files_of_fifty(model: ModelSide, tmp_path: Path) -> None:
    program = Program([Call("IOMMU_IOAS_ALLOC")])
    items = [(number, program, answer(model, program)) for number in range(PER_FILE + 1)]
    written = Vectors("7.3.4-test", 6, items).save(tmp_path)
    assert [path.name for path in written] == ["7.3.4-00.json.gz", "7.3.4-01.json.gz"]
    assert [item for path in chunks(tmp_path) for item in load(path).items] == items


def test_vectors_come_back_as_they_were(model: ModelSide, tmp_path: Path) -> None:
    items = [(number, program := generate(6, number), answer(model, program)) for number in range(3)]
    path = tmp_path / "some.json.gz"
    Vectors("7.3.4-test", 6, items).save(path)
    once = path.read_bytes()
    back = load(path)
    assert back == Vectors("7.3.4-test", 6, items)
    back.save(path)
    assert path.read_bytes() == once


# -- the command ---------------------------------------------------------------------------------------------------


def _record(path: Path, model: ModelSide, *, wrong: bool = False) -> None:
    program = Program([Call("IOMMU_IOAS_ALLOC")])
    results, work, final = answer(model, program)
    Vectors("7.3.4-test", 0, [(0, program, ([-12] if wrong else results, work, final))]).save(path)
    model.close()


def test_recorded_answers_that_are_the_models_are_status_0(
    model: ModelSide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "good.json.gz", model)
    model._boot()
    model.close()
    assert main(["fuzz", "--against", "recorded", str(tmp_path / "good.json.gz")]) == 0
    assert "1 recorded programs, 0 differ" in capsys.readouterr().out
    model._boot()


def test_a_difference_is_status_1_and_a_program_to_paste(
    model: ModelSide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "bad.json.gz", model, wrong=True)
    assert main(["fuzz", "--against", "recorded", str(tmp_path / "bad.json.gz")]) == 1
    said = capsys.readouterr().out
    assert "ENOMEM" in said
    assert "call(IOMMU_IOAS_ALLOC)" in said
    model._boot()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--against", "recorded", "nowhere.json.gz"], "cannot read nowhere.json.gz: no such file or directory"),
        (["--against", "recorded", "--record", "x"], "--record wants a real kernel"),
        (["--against", "linux", "x.json.gz"], "files are for --against recorded"),
        (["--against", "linux", "--kernel-image", "x"], "say what --against vm boots"),
        (["--against", "vm", "--kernel-image", "nowhere"], "cannot read the kernel image nowhere"),
    ],
)
def test_a_bad_request_is_one_sentence_and_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuzz", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said


def test_a_file_that_holds_no_answers_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"no gzip", gzip.compress(b"no json"), gzip.compress(b'{"format": 1}'), gzip.compress(b"[]")):
        path = tmp_path / "wrong.json.gz"
        path.write_bytes(content)
        assert main(["fuzz", "--against", "recorded", str(path)]) == 2
        assert "is no file of recorded answers" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--programs=0", "--calls=-1", "--seed=-1", "--program=-2", "--programs=x"])
def test_a_bad_number_is_a_usage_error(argument: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(["fuzz", "--against", "linux", argument])
    assert error.value.code == 2


def test_a_release_is_the_models_name_for_it() -> None:
    assert model_release("7.3.4-oracle") == "7.3.4"
    assert model_release("6.12.74+deb13-amd64") == "6.12.74"
    assert model_release("99.1.2") == "7.3"
