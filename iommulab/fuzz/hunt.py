"""One run of the fuzzer: programs of a seed on the model and on a target, and what differs."""

from __future__ import annotations

import argparse
import errno
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console

from iommulab.errors import UserError
from iommulab.fuzz.compare import Difference, differences
from iommulab.fuzz.executor import Answer, digest
from iommulab.fuzz.machines import generate
from iommulab.fuzz.model import Broken, ModelSide
from iommulab.fuzz.program import Call, Compiled, Program, compile_program
from iommulab.fuzz.target import Died, Frame, Target
from iommulab.progress import Meter


@dataclass(slots=True)
class Finding:
    """A program whose answers differ, or that broke the model or the kernel."""

    number: int
    program: Program
    differences: list[Difference]
    signature: str


@dataclass(slots=True)
class Run:
    """What a run found."""

    done: int = 0
    same: int = 0
    findings: list[Finding] = field(default_factory=list)
    #: Calls by name and whether the real kernel let them succeed; programs that were the same count.
    calls: Counter[tuple[str, bool]] = field(default_factory=Counter)


class HuntProgress(Meter):
    """How far a run of programs is."""

    def update(self, run: Run) -> None:
        different = f"{len(run.findings)} differ"
        self.reached(run.done, different if run.findings else "", different)


class Hunt:
    """Programs of one seed on the model and on a target."""

    def __init__(self, console: Console, args: argparse.Namespace, target: Target, model: ModelSide, seed: int) -> None:
        self.console = console
        self.target = target
        self.model = model
        self.seed = seed
        self.calls: int = args.calls
        self.dmabuf: bool = args.dmabuf
        self.limit = time.monotonic() + args.time
        self.recording = args.record is not None
        #: Programs that were not run, as a real kernel would warn of itself.
        self.excused = 0
        self.kept: list[tuple[int, Program, Answer]] = []
        self._pending: dict[int, tuple[Program, Compiled, Answer | Broken]] = {}

    def frames(self, numbers: Iterator[int]) -> Iterator[Frame]:
        """Generate, run on the model, compile for the target."""
        for number in numbers:
            if time.monotonic() > self.limit:
                return
            program = self.generate(number)
            frame = self.frame(number, program)
            ours = self._pending[number][2]
            if isinstance(ours, Broken) and ours.excused:
                del self._pending[number]
                self.excused += 1
            else:
                yield frame

    def generate(self, number: int) -> Program:
        """Program `number` of this run."""
        return generate(self.seed, number, self.calls, self.dmabuf, self.model.machine)

    def frame(self, number: int, program: Program) -> Frame:
        compiled = compile_program(program)
        answer = self.model.run(program, compiled)
        self._pending[number] = (program, compiled, answer)
        expected = b"" if isinstance(answer, Broken) or self.recording else digest(answer)
        return Frame(number, expected, compiled.image, compiled.steps, program.main_first)

    def run(self, numbers: range, meter: HuntProgress) -> Run:
        """All these programs."""
        found = Run()
        for frame, answer in self.target.ask(self.frames(iter(numbers))):
            program, compiled, ours = self._pending.pop(frame.number)
            found.done += 1
            told = self.judge(program, compiled, answer, ours)
            if told:
                found.findings.append(Finding(frame.number, program, told, signature(program, told)))
            else:
                found.same += 1
            if not isinstance(answer, bytes | Died) and self.recording:
                self.kept.append((frame.number, program, answer))
            theirs = ours if isinstance(answer, bytes) else answer
            if not isinstance(theirs, Died | Broken):
                found.calls.update(
                    (call.name, result >= 0) for call, result in zip(program.calls, theirs[0], strict=True)
                )
            meter.update(found)
        return found

    def judge(
        self, program: Program, compiled: Compiled, answer: Answer | bytes | Died, ours: Answer | Broken
    ) -> list[Difference]:
        """What differs; nothing where the digest came back."""
        if isinstance(answer, Died):
            said = ours.error if isinstance(ours, Broken) else "answers"
            return [Difference(-1, "the kernel", answer.why, said)]
        if isinstance(ours, Broken):
            return [] if ours.excused else [Difference(-1, "the model", "answers", ours.error)]
        if isinstance(answer, bytes):
            return []
        return differences(program, compiled, answer, ours)

    def need_mock_driver(self) -> None:
        """UserError where the kernel has none."""
        probe = compile_program(Program([Call("IOMMU_TEST_OP_MD_CHECK_REFS")]))
        for _, answer in self.target.ask(iter([Frame(0, b"", probe.image, probe.steps, False)])):
            if not isinstance(answer, Died) and answer[0] == [-errno.ENOTTY]:
                raise UserError(
                    f"the kernel {self.target.release} has no mock driver of iommufd; build it with "
                    "CONFIG_IOMMUFD_TEST=y"
                )

    def need_device(self) -> None:
        """UserError where the machine has no device that VFIO gives away."""
        probe = compile_program(Program([Call("open")]))
        for _, answer in self.target.ask(iter([Frame(0, b"", probe.image, probe.steps, False)])):
            if not isinstance(answer, Died) and answer[0] != [0]:
                why = errno.errorcode.get(-answer[0][0], str(answer[0][0]))
                raise UserError(f"no edu device (PCI 1234:11e8) that vfio-pci could have here: {why}")

    def ask(self, program: Program) -> list[Difference]:
        """One program, now."""
        for frame, answer in self.target.ask(iter([self.frame(0, program)])):
            kept, compiled, ours = self._pending.pop(frame.number)
            return self.judge(kept, compiled, answer, ours)
        raise AssertionError("the target answers every frame")


def signature(program: Program, found: list[Difference]) -> str:
    """What findings have in common that probably are one."""
    first = found[0]
    if first.call < 0:
        what = re.sub(r"\+0x[0-9a-f]+|id \d+", "", first.what)
        return f"{what}: {first.model}" if what == "the model" else f"{what}"
    values = f": {first.real} / {first.model}" if first.what == "result" else ""
    return f"{program.calls[first.call].name} {first.what}{values}"


def check(model: ModelSide, program: Program, answer: Answer) -> list[Difference]:
    """What the model answers otherwise than the recorded kernel."""
    compiled = compile_program(program)
    ours = model.run(program, compiled)
    if isinstance(ours, Broken):
        return [Difference(-1, "the model", "answers", ours.error)]
    return [] if digest(ours) == digest(answer) else differences(program, compiled, answer, ours)
