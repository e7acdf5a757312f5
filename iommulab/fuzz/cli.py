"""`iommulab fuzz`: random programs on the model and on a real kernel, compared call by call. See docs/fuzz.md."""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iommulab.errors import UserError
from iommulab.fuzz.compare import Difference, differences, outcome
from iommulab.fuzz.executor import Answer, digest
from iommulab.fuzz.generator import generate
from iommulab.fuzz.model import Broken, ModelSide
from iommulab.fuzz.program import Compiled, Program, compile_program
from iommulab.fuzz.render import as_python
from iommulab.fuzz.shrink import shrink
from iommulab.fuzz.target import Died, Frame, Target
from iommulab.fuzz.vectors import Vectors, chunks, load
from iommulab.guest import Guest
from iommulab.kernel_images import find_image
from iommulab.results import SUITE
from iommulab.suite import need_linux
from iommulab.terminal import console as make_console
from uapi.version import NEWEST, parse

#: Answers of a real kernel that come with the project.
RECORDED = SUITE.parent / "tests" / "vectors"
#: Seconds between two plain lines where there is no terminal.
PLAIN_EVERY = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "fuzz", help="random programs on the model and on a real kernel, compared", description=__doc__
    )
    parser.add_argument(
        "--against",
        choices=("vm", "linux", "recorded"),
        required=True,
        help="a kernel in a guest, this machine's own, or recorded answers of one",
    )
    parser.add_argument("--programs", type=_count, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--calls", type=_count, default=30, metavar="N", help="calls of a program (default: 30)")
    parser.add_argument("--seed", type=_seed, metavar="N", help="where programs come from (default: a new one)")
    parser.add_argument("--program", type=_index, metavar="K", help="only this one of the seed, call by call")
    parser.add_argument("--time", type=float, default=float("inf"), metavar="SECONDS", help="start none after this")
    parser.add_argument("--show", type=_count, default=5, metavar="N", help="differences to shrink and print")
    parser.add_argument(
        "--dmabuf", action="store_true", help="with dma-bufs: for kernels whose DMABUF_GET returns the descriptor"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="keep programs and answers (.json.gz, or a directory)"
    )
    parser.add_argument("--kernel", metavar="VERSION", help="the cached image that --against vm boots")
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the image that --against vm boots")
    parser.add_argument("--model", metavar="VERSION", help="the model's release (default: the real kernel's)")
    parser.add_argument(
        "vectors", nargs="*", type=Path, metavar="FILE", help="recorded answers (default: the project's)"
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 10,000,000")
    return number


def _index(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("programs count from 0")
    return number


def _seed(text: str) -> int:
    number = int(text, 0)
    if not 0 <= number < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is no number of 64 bits")
    return number


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


class Meter:
    """How far a run is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, total: int, title: str) -> None:
        self._console = console
        self._total = total
        self._title = title
        self._began = self._said = time.monotonic()
        self._live = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[what]}"),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        self._task = self._live.add_task(title, total=total, what="starting") if self._live is not None else None

    def __enter__(self) -> Meter:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, run: Run) -> None:
        """Show where the run is."""
        different = len(run.findings)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=run.done, what=f"{different} differ" if different else "")
        elif time.monotonic() - self._said >= PLAIN_EVERY:
            self._said = time.monotonic()
            self._console.print(
                f"{self._title}: {run.done} of {self._total}, {different} differ, {self._said - self._began:.0f} s",
                markup=False,
                highlight=False,
            )


def run(args: argparse.Namespace) -> int:
    """0 where all answers are the same, 1 where some are not."""
    console = make_console()
    if args.vectors and args.against != "recorded":
        raise UserError("files are for --against recorded")
    if args.against != "vm" and (args.kernel or args.kernel_image):
        raise UserError("--kernel and --kernel-image say what --against vm boots")
    if args.against == "recorded":
        if args.record is not None:
            raise UserError("--record wants a real kernel: --against vm or linux")
        return _recorded(console, args)
    with tempfile.TemporaryDirectory(prefix="iommulab-") as scratch:
        directory = Path(scratch)
        guest = None
        if args.against == "vm":
            image = find_image(args.kernel_image, args.kernel)
            guest = Guest(image, "q35-vtd-legacy", directory)
            problem = guest.probe_kvm()
            if problem is not None:
                console.print(f"vm: KVM is not used: {problem}; emulating (TCG)", markup=False, highlight=False)
        else:
            need_linux()
        with Target(directory, guest) as target:
            target.start()
            return _live(console, args, target)


def model_release(release: str) -> str:
    """The model's name for a kernel's release ("7.3.4-oracle" is "7.3.4"). UserError for one that it does not know."""
    found = re.match(r"\d+\.\d+(\.\d+)?", release)
    text = found.group(0) if found else NEWEST
    # A kernel newer than the model is compared with the newest that there is.
    return text if parse(text).series <= parse(NEWEST).series else NEWEST


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
            program = generate(self.seed, number, self.calls, self.dmabuf)
            frame = self.frame(number, program)
            ours = self._pending[number][2]
            if isinstance(ours, Broken) and ours.excused:
                del self._pending[number]
                self.excused += 1
            else:
                yield frame

    def frame(self, number: int, program: Program) -> Frame:
        compiled = compile_program(program)
        answer = self.model.run(program, compiled)
        self._pending[number] = (program, compiled, answer)
        expected = b"" if isinstance(answer, Broken) or self.recording else digest(answer)
        return Frame(number, expected, compiled.image, compiled.steps, program.main_first)

    def run(self, numbers: range, meter: Meter) -> Run:
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


def _live(console: Console, args: argparse.Namespace, target: Target) -> int:
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    version = args.model or model_release(target.release)
    numbers = range(args.program, args.program + 1) if args.program is not None else range(args.programs)
    console.print(
        f"{target.release} against the model of {version}: seed {seed}, {len(numbers)} programs of {args.calls} calls",
        markup=False,
        highlight=False,
    )
    try:
        model = ModelSide(version)
    except ValueError as error:
        raise UserError(str(error)) from error
    began = time.monotonic()
    with model:
        hunt = Hunt(console, args, target, model, seed)
        with Meter(console, len(numbers), "fuzz") as meter:
            found = hunt.run(numbers, meter)
        if args.program is not None:
            _show_program(console, hunt, args.program)
        _report(console, hunt, found, args.show, args)
        if args.record is not None:
            written = Vectors(target.release, seed, hunt.kept).save(args.record)
            console.print("written: " + ", ".join(map(str, written)), markup=False, highlight=False)
    target.stop()
    if hunt.excused:
        console.print(
            f"{hunt.excused} programs were left out: a kernel warns of itself there (docs/fuzz.md)",
            markup=False,
            highlight=False,
        )
    for place, times in Counter(target.warned).most_common():
        console.print(f"the kernel warned of itself {times} times: {place}", markup=False, highlight=False)
    spent = time.monotonic() - began
    made = sum(found.calls.values())
    console.print(
        f"{found.done} programs, {made} calls ({sum(n for (_, good), n in found.calls.items() if good)} succeed), "
        f"{len(found.findings)} differ, {spent:.0f} s; seed {seed}",
        markup=False,
        highlight=False,
    )
    return 1 if found.findings else 0


def _show_program(console: Console, hunt: Hunt, number: int) -> None:
    program = generate(hunt.seed, number, hunt.calls, hunt.dmabuf)
    compiled = compile_program(program)
    ours = hunt.model.run(program, compiled)
    if isinstance(ours, Broken):
        console.print(ours.trace, markup=False, highlight=False)
        return
    for index, (call, why) in enumerate(zip(program.calls, hunt.model.reasons(program), strict=True)):
        said = why or outcome(ours[0][index])
        console.print(f"{index:3} {call.name} {call.fields} -> {said}", markup=False, highlight=False)


def _report(console: Console, hunt: Hunt, found: Run, most: int, args: argparse.Namespace) -> None:
    kinds: dict[str, list[Finding]] = {}
    for finding in found.findings:
        kinds.setdefault(finding.signature, []).append(finding)
    order = sorted(kinds.values(), key=len, reverse=True)
    for findings in order[:most]:
        finding = findings[0]
        small = shrink(finding.program, lambda program: bool(hunt.ask(program)))
        told = hunt.ask(small)
        console.rule(f"{len(findings)} programs: {finding.signature}")
        options = f"--against {args.against}" + (f" --kernel-image {args.kernel_image}" if args.kernel_image else "")
        calls = (f" --calls {hunt.calls}" if hunt.calls != 30 else "") + (" --dmabuf" if hunt.dmabuf else "")
        console.print(
            f"first: iommulab fuzz {options} --seed {hunt.seed} --program {finding.number}{calls}",
            markup=False,
            highlight=False,
        )
        if not told:
            console.print("it does not happen again with fewer calls", markup=False, highlight=False)
            small, told = finding.program, finding.differences
        for difference in told[:6]:
            where = f"call {difference.call} {small.calls[difference.call].name}" if difference.call >= 0 else "the end"
            console.print(
                f"  {where}, {difference.what}: real {difference.real}, model {difference.model}",
                markup=False,
                highlight=False,
            )
        console.print(as_python(small), markup=False, highlight=False)
    for findings in order[most:]:
        console.print(
            f"{len(findings)} programs: {findings[0].signature} (program {findings[0].number})",
            markup=False,
            highlight=False,
        )


def _recorded(console: Console, args: argparse.Namespace) -> int:
    paths = args.vectors or list(chunks(RECORDED))
    if not paths:
        raise UserError(f"no recorded answers in {RECORDED}")
    differ = done = 0
    began = time.monotonic()
    for path in paths:
        vectors = load(path)
        with ModelSide(args.model or model_release(vectors.release)) as model:
            for number, program, answer in vectors.items:
                done += 1
                told = check(model, program, answer)
                if told and differ < args.show:
                    console.rule(f"{os.path.basename(path)}, program {number}")
                    for difference in told[:6]:
                        console.print(f"  {difference}", markup=False, highlight=False)
                    console.print(as_python(program), markup=False, highlight=False)
                differ += bool(told)
    console.print(
        f"{done} recorded programs, {differ} differ, {time.monotonic() - began:.0f} s", markup=False, highlight=False
    )
    return 1 if differ else 0


def check(model: ModelSide, program: Program, answer: Answer) -> list[Difference]:
    """What the model answers otherwise than the recorded kernel."""
    compiled = compile_program(program)
    ours = model.run(program, compiled)
    if isinstance(ours, Broken):
        return [Difference(-1, "the model", "answers", ours.error)]
    return [] if digest(ours) == digest(answer) else differences(program, compiled, answer, ours)
