"""Fuzzed programs with a device behind an IOMMU: what they do on the model, and what they never do."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from conformance.drivers.vfio import CONFIG_REGION, REGION_SHIFT
from iommulab.cli import main
from iommulab.errors import UserError
from iommulab.fuzz import edu_steps
from iommulab.fuzz.executor import Answer, digest
from iommulab.fuzz.hunt import Hunt
from iommulab.fuzz.machines import GENERATORS, generate
from iommulab.fuzz.memory import MEMFD, NULL_FD, PAGE, REGIONS
from iommulab.fuzz.model import Broken, ModelSide
from iommulab.fuzz.program import MAIN_FD, Call, Program, compile_program, without
from iommulab.fuzz.render import as_python
from iommulab.fuzz.target import Target
from iommulab.fuzz.vectors import Vectors, chunks, load
from uapi.vfio import VFIO_DEVICE_FEATURE_DMA_BUF

ROOT = Path(__file__).resolve().parent.parent.parent
HARDWARE = [name for name in GENERATORS if name != "mock"]
#: An executor as on a real kernel without devices.
BARE = """
from iommulab.fuzz.executor import serve
from iommulab.fuzz.model import ModelDoor
from kernel_model.kernel import Kernel
serve(0, 1, ModelDoor(Kernel("mock", "7.3.4")))
"""
IOVA = 0x100_0000


@pytest.fixture
def model() -> Iterator[ModelSide]:
    with ModelSide("7.3.4", "q35-vtd") as side:
        yield side


def answer(side: ModelSide, program: Program) -> Answer:
    found = side.run(program, compile_program(program))
    assert not isinstance(found, Broken), found.trace
    return found


def attached(*calls: Call) -> Program:
    """A device attached to an IOAS with two pages of `buf` mapped, its memory and bus master on; then these calls."""
    mapped = {"flags": 7, "ioas_id": "@0.out_ioas_id", "user_va": "&buf+0x0", "length": 2 * PAGE, "iova": IOVA}
    return Program(
        [
            Call("IOMMU_IOAS_ALLOC"),
            Call("open"),
            Call("VFIO_DEVICE_BIND_IOMMUFD", {"iommufd": MAIN_FD}, file="@1.fd"),
            Call("VFIO_DEVICE_ATTACH_IOMMUFD_PT", {"pt_id": "@0.out_ioas_id"}, file="@1.fd"),
            Call("IOMMU_IOAS_MAP", mapped),
            Call("pwrite", {"fd": "@1.fd", "data": "*0600", "offset": CONFIG_REGION << REGION_SHIFT | 4}),
            *calls,
        ]
    )


@pytest.mark.parametrize("machine", [name for name in HARDWARE if name.startswith("q35-")])
def test_programs_do_not_depend_on_those_before_them(machine: str) -> None:
    """On the Arm machine an MSI that could not be set up outlives its program (docs/fuzz.md)."""
    programs = [generate(2, number, machine=machine) for number in range(12)]
    with ModelSide("7.3.4", machine) as side:
        forth = [digest(answer(side, program)) for program in programs]
        back = [digest(answer(side, program)) for program in reversed(programs)]
    assert forth == back[::-1]


@pytest.mark.parametrize("machine", HARDWARE)
def test_a_program_survives_json_cuts_and_rendering(machine: str) -> None:
    for number in range(10):
        program = generate(3, number, machine=machine)
        assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
        ast.parse(as_python(program, machine))
        rest = without(program, set(range(0, len(program.calls), 3)))
        compile_program(rest)
        ast.parse(as_python(rest, machine))


@pytest.mark.parametrize("machine", HARDWARE)
def test_programs_ask_for_nothing_that_is_chance(machine: str) -> None:
    known = {MEMFD, NULL_FD, 950, (1 << 31) - 1, (1 << 32) - 1}
    for number in range(150):
        for call in generate(4, number, machine=machine).calls:
            fields = call.fields
            if call.name in ("pread", "pwrite") and fields["offset"] >> REGION_SHIFT == CONFIG_REGION:
                count = fields["count"] if call.name == "pread" else len(fields["data"]) // 2
                place = fields["offset"] & 0xFFFF
                if call.name == "pread":
                    assert not any(place <= byte < place + count for byte in (*range(0x10, 0x14), 0x3C)), call
            if call.name == "VFIO_DEVICE_FEATURE":
                assert fields.get("flags", 0) & 0xFFFF != VFIO_DEVICE_FEATURE_DMA_BUF, call
            if isinstance(fields.get("iommufd"), int):
                assert fields["iommufd"] in known, call
            assert not call.name.startswith("IOMMU_TEST_OP_MOCK_DOMAIN"), call


def test_a_copy_moves_memory(model: ModelSide) -> None:
    copy = Call("edu_copy", {"fd": "@1.fd", "source": IOVA, "target": IOVA + PAGE, "count": PAGE})
    results, _, final = answer(model, attached(copy))
    assert results[6] == 0
    assert final["contents"][0] == REGIONS["buf"][0] + PAGE
    assert len(final["contents"]) == 2


def test_a_copy_from_nowhere_leaves_zeros_and_one_to_nowhere_nothing(model: ModelSide) -> None:
    there = Call("edu_copy", {"fd": "@1.fd", "source": IOVA, "target": IOVA + 4 * PAGE, "count": 64})
    results, _, final = answer(model, attached(there))
    assert (results[6], final["contents"]) == (0, [])
    back = Call("edu_copy", {"fd": "@1.fd", "source": IOVA + 4 * PAGE, "target": IOVA, "count": PAGE})
    results, _, final = answer(model, attached(back))
    assert (results[6], final["contents"][0]) == (0, REGIONS["buf"][0])


@pytest.mark.parametrize("place", [0xFEE0_0000, 0xFEDF_FFFF, 0xFEEF_FFF0])
def test_a_copy_that_would_be_an_interrupt_is_not_made(model: ModelSide, place: int) -> None:
    copy = Call("edu_copy", {"fd": "@1.fd", "source": IOVA, "target": place, "count": 8})
    assert answer(model, attached(copy))[0][6] == -errno.EPERM


def test_a_write_that_would_outlive_its_program_is_not_made(model: ModelSide) -> None:
    dma = Call("pwrite", {"fd": "@1.fd", "data": "*ffffffff", "offset": 0x80})
    past = Call("pwrite", {"fd": "@1.fd", "data": "*ffffffff", "offset": CONFIG_REGION << REGION_SHIFT | 0x4C})
    assert answer(model, attached(dma, past))[0][6:] == [-errno.EPERM] * 2
    assert not edu_steps.forbidden(CONFIG_REGION << REGION_SHIFT | 0x4A, 4)


def test_an_interrupt_signals_its_eventfd_and_is_acknowledged(model: ModelSide) -> None:
    on = {"argsz": 24, "flags": 0x24, "index": 1, "count": 1, "data0": "@6.fd"}
    irq, read = Call("edu_irq", {"fd": "@1.fd", "bits": 2}), Call("read", {"fd": "@6.fd", "count": 8})
    program = attached(Call("eventfd"), Call("VFIO_DEVICE_SET_IRQS", on, file="@1.fd"), irq, read, irq, read, read)
    assert answer(model, program)[0][6:] == [0, 0, 2, 8, 2, 8, -errno.EAGAIN]


def test_a_signal_that_vfio_waits_for_is_gone_before_the_next_step(model: ModelSide) -> None:
    store = {"argsz": 32, "flags": 4, "data": 1, "offset": 4, "fd": "@6.fd"}
    signal, read = Call("write", {"fd": "@6.fd", "words": [1, 0]}), Call("read", {"fd": "@6.fd", "count": 8})
    program = attached(Call("eventfd"), Call("VFIO_DEVICE_IOEVENTFD", store, file="@1.fd"), signal, read)
    assert answer(model, program)[0][6:] == [0, 0, 8, -errno.EAGAIN]


def test_no_descriptors_number_is_in_an_answer(model: ModelSide) -> None:
    program = attached(Call("eventfd"))
    compiled = compile_program(program)
    found = model.run(program, compiled)
    assert not isinstance(found, Broken)
    field = next(start for start, _, index, name in compiled.places if index == 2 and not name)
    assert found[1][field + 8 : field + 12] == b"\1\0\0\0"


def test_calls_on_a_file_that_is_not_open_are_ebadf(model: ModelSide) -> None:
    program = attached(Call("close", {"fd": "@1.fd"}), Call("VFIO_DEVICE_GET_INFO", file="@1.fd"))
    program.calls.append(Call("pread", {"fd": "@1.fd", "count": 4, "offset": 0}))
    program.calls.append(Call("edu_liveness", {"fd": "@1.fd", "value": 1}))
    assert answer(model, program)[0][6:] == [0, *[-errno.EBADF] * 3]


def test_files_of_a_machine_say_so(model: ModelSide, tmp_path: Path) -> None:
    program = attached()
    kept = Vectors("7.3.4-test", 6, [(0, program, answer(model, program))], "q35-vtd")
    written = kept.save(tmp_path)
    assert [path.name for path in written] == ["7.3.4-q35-vtd-00.json.gz"]
    assert [load(path) for path in chunks(tmp_path)] == [kept]


@pytest.mark.parametrize("machine", HARDWARE)
def test_answers_of_the_real_kernel_are_recorded(machine: str) -> None:
    """`test_fuzz.py` holds the model against them."""
    paths = sorted((ROOT / "tests" / "vectors").glob(f"7.3.4-{machine}-[0-9][0-9].json.gz"))
    assert sum(len(load(path).items) for path in paths) >= 40
    assert {load(path).machine for path in paths} == {machine}


def test_a_kernel_without_the_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = argparse.Namespace(calls=30, dmabuf=False, time=1e6, record=None)
    bare, refused = (
        Target(tmp_path, command=[sys.executable, "-c", BARE]),
        pytest.raises(UserError, match="no edu device"),
    )
    with bare, ModelSide("7.3.4", "q35-vtd") as side, refused:
        Hunt(Console(), arguments, bare, side, 1).need_device()


def test_an_unknown_machine_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as error:
        main(["fuzz", "--against", "linux", "--machine", "nowhere"])
    assert error.value.code == 2
