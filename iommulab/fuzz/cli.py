"""`iommulab fuzz`: random programs on the model and on a real kernel, compared call by call. See docs/fuzz.md."""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console

from iommulab.arguments import seconds, whole
from iommulab.errors import UserError
from iommulab.files import check_writable
from iommulab.fuzz.compare import outcome
from iommulab.fuzz.hunt import Finding, Hunt, HuntProgress, Run, check
from iommulab.fuzz.machines import GENERATORS
from iommulab.fuzz.model import Broken, ModelSide
from iommulab.fuzz.program import compile_program
from iommulab.fuzz.render import as_python
from iommulab.fuzz.shrink import shrink
from iommulab.fuzz.target import Target
from iommulab.fuzz.vectors import Vectors, chunks, load
from iommulab.guest import make_guest
from iommulab.kernel_images import find_image
from iommulab.results import SUITE
from iommulab.suite import need_linux
from iommulab.terminal import console as make_console
from uapi.version import NEWEST, parse

#: Answers of a real kernel that come with the project.
RECORDED = SUITE.parent / "tests" / "vectors"
#: What --against vm boots on for the mock machine. Mock drivers of older releases have no devices where the machine has
#: an IOMMU.
MOCK_GUEST = "q35-noiommu"


#: Runs for the shrinking of a program; of one that the kernel dies of, which is a boot each time.
BUDGET, DEADLY = 400, 12


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
    parser.add_argument(
        "--machine",
        choices=tuple(GENERATORS),
        default="mock",
        help="whose devices programs use: the mock driver's, or edu behind this machine's IOMMU (default: mock)",
    )
    parser.add_argument(
        "--programs", type=whole(1, 10_000_000), default=1000, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--calls", type=whole(1, 10_000_000), default=30, metavar="N", help="calls of a program (default: 30)"
    )
    parser.add_argument(
        "--seed", type=whole(0, (1 << 64) - 1), metavar="N", help="where programs come from (default: a new one)"
    )
    parser.add_argument(
        "--program", type=whole(0, (1 << 63) - 1), metavar="K", help="only this one of the seed, call by call"
    )
    parser.add_argument("--time", type=seconds, default=float("inf"), metavar="SECONDS", help="start none after this")
    parser.add_argument(
        "--show", type=whole(1, 10_000_000), default=5, metavar="N", help="differences to shrink and print (default: 5)"
    )
    parser.add_argument(
        "--dmabuf", action="store_true", help="with dma-bufs: for kernels whose DMABUF_GET returns the descriptor"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="keep programs and answers (.json.gz, or a directory)"
    )
    parser.add_argument("--kernel", metavar="VERSION", help="the cached image that --against vm boots")
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the image that --against vm boots")
    parser.add_argument("--root", type=Path, metavar="PATH", help="an arm64 guest's root file system")
    parser.add_argument("--model", metavar="VERSION", help="the model's release (default: the real kernel's)")
    parser.add_argument(
        "vectors", nargs="*", type=Path, metavar="FILE", help="recorded answers (default: the project's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 where all answers are the same, 1 where some are not."""
    console = make_console()
    if args.vectors and args.against != "recorded":
        raise UserError("files are for --against recorded")
    if args.against != "vm" and (args.kernel or args.kernel_image):
        raise UserError("--kernel and --kernel-image say what --against vm boots")
    if args.record is not None:
        check_writable(args.record / "part" if args.record.is_dir() else args.record)
    if args.against == "recorded":
        if args.record is not None:
            raise UserError("--record wants a real kernel: --against vm or linux")
        return _recorded(console, args)
    with tempfile.TemporaryDirectory(prefix="iommulab-") as scratch:
        directory = Path(scratch)
        guest = None
        if args.against == "vm":
            image = find_image(args.kernel_image, args.kernel)
            guest = make_guest(image, MOCK_GUEST if args.machine == "mock" else args.machine, directory, args.root)
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


def _model(version: str, machine: str) -> ModelSide:
    try:
        return ModelSide(version, machine)
    except ValueError as error:
        raise UserError(str(error)) from error


def _live(console: Console, args: argparse.Namespace, target: Target) -> int:
    on = "" if args.machine == "mock" else f", {args.machine}"
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    version = args.model or model_release(target.release)
    numbers = range(args.program, args.program + 1) if args.program is not None else range(args.programs)
    console.print(
        f"{target.release} against the model of {version}{on}: "
        f"seed {seed}, {len(numbers)} programs of {args.calls} calls",
        markup=False,
        highlight=False,
    )
    began = time.monotonic()
    with _model(version, args.machine) as model:
        hunt = Hunt(console, args, target, model, seed)
        hunt.need_mock_driver()
        if args.machine != "mock":
            hunt.need_device()
        with HuntProgress(console, "fuzz", len(numbers)) as meter:
            found = hunt.run(numbers, meter)
        if args.program is not None:
            _show_program(console, hunt, args.program)
        _report(console, hunt, found, args.show, args)
        if args.record is not None:
            written = Vectors(target.release, seed, hunt.kept, args.machine).save(args.record)
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
    program = hunt.generate(number)
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
        console.print(f"shrinking program {finding.number}", markup=False, highlight=False)
        budget = DEADLY if finding.differences[0].what == "the kernel" else BUDGET
        small = shrink(finding.program, lambda program: bool(hunt.ask(program)), budget)
        told = hunt.ask(small)
        console.rule(f"{len(findings)} programs: {finding.signature}")
        options = f"--against {args.against}" + (f" --kernel-image {args.kernel_image}" if args.kernel_image else "")
        options += f" --machine {args.machine}" if args.machine != "mock" else ""
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
        console.print(as_python(small, args.machine), markup=False, highlight=False)
    for findings in order[most:]:
        console.print(
            f"{len(findings)} programs: {findings[0].signature} (program {findings[0].number})",
            markup=False,
            highlight=False,
        )


def _recorded(console: Console, args: argparse.Namespace) -> int:
    paths = args.vectors or list(chunks(RECORDED))
    if not paths:
        raise UserError(f"no recorded answers in {RECORDED}: they come with a checkout; or name a FILE")
    differ = done = 0
    began = time.monotonic()
    for path in paths:
        vectors = load(path)
        with _model(args.model or model_release(vectors.release), vectors.machine) as model:
            for number, program, answer in vectors.items:
                done += 1
                told = check(model, program, answer)
                if told and differ < args.show:
                    console.rule(f"{os.path.basename(path)}, program {number}")
                    for difference in told[:6]:
                        console.print(f"  {difference}", markup=False, highlight=False)
                    console.print(as_python(program, vectors.machine), markup=False, highlight=False)
                differ += bool(told)
    console.print(
        f"{done} recorded programs, {differ} differ, {time.monotonic() - began:.0f} s", markup=False, highlight=False
    )
    return 1 if differ else 0
