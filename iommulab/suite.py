"""`iommulab conformance`: the suite on the model, on the running kernel or in a guest."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from iommulab.arguments import DEFAULT_CACHING, add_model_options, seconds, whole
from iommulab.errors import UserError
from iommulab.files import check_writable
from iommulab.follow import Follower, Launch, Limits, tail
from iommulab.guest.arm64 import ROOT_NAME
from iommulab.guest.machines import find_machine
from iommulab.kernel_images import find_image
from iommulab.progress import SuiteProgress
from iommulab.reports import write_all
from iommulab.results import SUITE, Results, Test
from iommulab.selection import LINUX, check_selection, pytest_command, pytest_environment, select_tests
from iommulab.session import Session
from iommulab.terminal import console as make_console
from iommulab.vm import VmLaunch
from uapi.backend import DEV_IOMMU
from uapi.linux import LinuxBackend

MODEL = "iommulab.backends:model"
DEFAULT_MACHINE, DEFAULT_VERSION = "q35-vtd-legacy", "7.3"
#: Failed tests that are printed in full.
SHOWN = 10


class HostLaunch:
    """pytest on this machine: the model, or the kernel that runs here."""

    def __init__(self, backend: str, options: dict[str, str], selection: list[str], workers: int, directory: Path):
        self._backend = backend
        self._options = options
        self._selection = selection
        self._workers = workers
        self._directory = directory

    def start(self, events: Path, only: Path | None, attempt: int) -> subprocess.Popen[bytes]:
        arguments = [f"--backend={self._backend}", f"--events={events}", *self._selection]
        for key, value in self._options.items():
            arguments += [f"--backend-option={key}={value}"]
        if only is not None:
            arguments += [f"--only={only}"]
        arguments += ["-p", "xdist", "-n", str(self._workers)] if self._workers > 1 else []
        with self._log(attempt).open("wb") as log:
            return Session(
                pytest_command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=pytest_environment(),
                cwd=SUITE.parent,
            )

    def _log(self, attempt: int) -> Path:
        return self._directory / f"pytest.{attempt}.log"

    def obituary(self, status: int | None, attempt: int) -> str:
        if status is None:
            return "the test process was stopped"
        if status < 0:
            return f"the test process died of {signal.Signals(-status).name}"
        return f"the test process ended with status {status}"

    def output(self, attempt: int) -> str:
        return tail(self._log(attempt), 40)


def workers_for(asked: int | None) -> int:
    if asked is not None:
        return asked
    return min(os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0)), 8)


def need_linux() -> None:
    """UserError in one sentence where the running kernel cannot be tested."""
    try:
        LinuxBackend().open(DEV_IOMMU).close()
    except OSError as error:
        why = {
            errno.ENOENT: "this kernel has none (CONFIG_IOMMUFD, which Debian's kernels leave out); use --on vm or "
            "--on model",
            errno.EACCES: "permission denied (run as root)",
            errno.EPERM: "not permitted (run as root)",
        }.get(error.errno or 0, (error.strerror or str(error)).lower())
        raise UserError(f"cannot open {DEV_IOMMU}: {why}") from error


def check_model(options: dict[str, str]) -> None:
    """UserError where the model knows no such machine or release. Only this needs the model in this process."""
    try:
        import_module(MODEL.partition(":")[0]).model(**options).close()
    except ValueError as error:
        raise UserError(str(error)) from error


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "conformance", help="run the suite on the model, on this kernel or in a guest", description=__doc__
    )
    parser.add_argument("tests", nargs="*", metavar="TESTID", help="areas, files or test ids (default: all)")
    parser.add_argument("--on", choices=("model", "linux", "vm"), default="model", help="what to test (default: model)")
    parser.add_argument(
        "--machine", default=DEFAULT_MACHINE, help=f"the machine, or a file .toml (default: {DEFAULT_MACHINE})"
    )
    parser.add_argument(
        "--kernel", metavar="VERSION", help=f"the model's release (default: {DEFAULT_VERSION}), or a cached image's"
    )
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the kernel that --on vm boots")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="PATH",
        help=f"an arm64 guest's root file system, a directory or a tar file (default: {ROOT_NAME} beside the image)",
    )
    add_model_options(parser)
    parser.add_argument("--report", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the run's JSON here too (.json or .json.gz)")
    parser.add_argument("-k", dest="expression", metavar="EXPR", help="tests whose names match, as in pytest")
    parser.add_argument("-n", dest="workers", type=whole(1, 256), metavar="N", help="parallel processes on the model")
    parser.add_argument(
        "--fail-nth",
        nargs="?",
        type=whole(0, 1_000_000),
        const=0,
        metavar="N",
        help="each ioctl of N tests (default: of all) first meets every failure that it can",
    )
    parser.add_argument("--test-time", type=seconds, default=120.0, metavar="SECONDS", help="limit of one test")
    parser.add_argument("--total-time", type=seconds, default=1500.0, metavar="SECONDS", help="limit of the run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suite, print the table, write the reports: 0, or 1 where a test failed."""
    console = make_console()
    if args.kernel_image is not None and args.on != "vm":
        raise UserError("--kernel-image is what --on vm boots; add --on vm")
    if args.root is not None and args.on != "vm":
        raise UserError("--root is what --on vm boots with; add --on vm")
    if args.workers not in (None, 1) and args.on != "model":
        raise UserError("-n is for --on model: one real kernel runs one test at a time")
    if args.caching != DEFAULT_CACHING and args.on != "model":
        raise UserError("--caching is for --on model: what real hardware keeps is its own affair")
    if args.dmabuf_get != "fd" and args.on != "model":
        raise UserError("--dmabuf-get is for --on model")
    if args.on == "linux" and (args.kernel is not None or args.machine != DEFAULT_MACHINE):
        raise UserError("--kernel and --machine are not for --on linux: it tests what runs here")
    selection = select_tests(args.tests)
    if args.expression:
        selection = ["-k", args.expression, *selection]
    selection = [f"--test-time={args.test_time:g}", *selection]
    if args.fail_nth is not None:
        selection = [f"--fail-nth={args.fail_nth}", *selection]
    results = Results(on=args.on, machine=args.machine if args.on != "linux" else "")
    try:
        args.report.mkdir(parents=True, exist_ok=True)
        check_writable(args.report / f"{args.on}.json")
    except OSError as error:
        raise UserError(f"cannot write to {args.report}: {(error.strerror or str(error)).lower()}") from error
    if args.record is not None:
        check_writable(args.record)
    # Deaths are noticed from outside, a little after the limit that the test process itself keeps.
    limits = Limits(test=args.test_time + 20, boot=300, total=args.total_time)
    with tempfile.TemporaryDirectory(prefix="iommulab-") as scratch, SuiteProgress(console, args.on) as progress:
        directory = Path(scratch)
        launch: Launch
        if args.on == "model":
            # pytest runs elsewhere, so the path of a machine file has to be whole.
            machine = os.path.abspath(args.machine) if args.machine.endswith(".toml") else args.machine
            options = {"machine": machine, "version": args.kernel or DEFAULT_VERSION}
            if args.dmabuf_get != "fd":
                options["dmabuf_get"] = args.dmabuf_get
            if args.caching != DEFAULT_CACHING:
                options["caching"] = args.caching
            check_model(options)
            results.environment = {"caching": args.caching}
            if args.expression:
                check_selection(selection)  # xdist's workers would only say that they died
            workers = 1 if args.tests and all("::" in name for name in args.tests) else workers_for(args.workers)
            launch = HostLaunch(MODEL, options, selection, workers, directory)
        elif args.on == "linux":
            need_linux()
            launch = HostLaunch(LINUX, {}, selection, 1, directory)
        else:
            image = find_image(args.kernel_image, args.kernel, find_machine(args.machine).architecture)
            vm = VmLaunch(image, args.machine, selection, directory, progress, args.root)
            results.environment = vm.environment
            launch = vm
        Follower(launch, results, limits, progress, directory).run()
        _keep_logs(directory, args.report, results)
    paths = write_all(results, args.report)
    if args.record is not None:
        results.save(args.record)
        paths.append(args.record)
    print_table(console, results)
    print_failures(console, results, rerun_options(args))
    console.print("written: " + ", ".join(str(path) for path in paths), markup=False, highlight=False)
    return 0 if results.ok else 1


def _keep_logs(scratch: Path, report: Path, results: Results) -> None:
    """What pytest and the guest's console said stays where something failed; what an older run left goes."""
    for name in ("console", "pytest"):
        for old in report.glob(f"{results.on}-{name}.*.log"):
            old.unlink()
        if not results.ok:
            for log in sorted(scratch.glob(f"{name}.*.log")):
                if log.stat().st_size:
                    shutil.copyfile(log, report / f"{results.on}-{log.name}")


def _skip_reasons(tests: list[Test]) -> str:
    reasons: dict[str, int] = {}
    for test in tests:
        if test.verdict in ("skipped", "xfailed"):
            reason = test.reason if test.verdict == "skipped" else f"known difference: {test.reason}"
            reasons[reason] = reasons.get(reason, 0) + 1
    return "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def print_table(console: Console, results: Results) -> None:
    """Areas down, verdicts across."""
    table = Table(box=None, pad_edge=False)
    table.add_column("area")
    for name in ("passed", "failed", "skipped"):
        table.add_column(name, justify="right")
    table.add_column("why skipped", overflow="fold", max_width=80)
    for area, tests in results.areas().items():
        passed, failed = (sum(test.verdict == verdict for test in tests) for verdict in ("passed", "failed"))
        skipped = len(tests) - passed - failed
        row = [area, *(str(number) if number else "." for number in (passed, failed, skipped)), _skip_reasons(tests)]
        table.add_row(*row, style="red" if failed else None)
    counts = results.counts()
    skipped = counts["skipped"] + counts["xfailed"]
    known = f"of these {counts['xfailed']} known differences" if counts["xfailed"] else ""
    table.add_section()
    table.add_row("all", str(counts["passed"]), str(counts["failed"]), str(skipped), known, style="bold")
    console.print()
    console.print(f"iommulab conformance on {results.title}", style="table.title", highlight=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"{len(results.tests)} tests in {results.duration:.1f} s", highlight=False)
    swept = [test.markers["fail_nth"] for test in results.tests if "fail_nth" in test.markers]
    if swept:
        calls, failures = (sum(int(pair[index]) for pair in swept) for index in (0, 1))
        console.print(f"{failures} failures injected into {calls} calls of {len(swept)} tests", highlight=False)


def rerun_options(args: argparse.Namespace) -> list[str]:
    """The options of this run that a rerun of one test needs."""
    options = []
    if args.on != "model":
        options += ["--on", args.on]
    if args.machine != DEFAULT_MACHINE:
        options += ["--machine", args.machine]
    if args.kernel:
        options += ["--kernel", args.kernel]
    if args.dmabuf_get != "fd":
        options += ["--dmabuf-get", args.dmabuf_get]
    if args.caching != DEFAULT_CACHING:
        options += ["--caching", args.caching]
    if args.fail_nth is not None:
        options += ["--fail-nth"]
    if args.kernel_image:
        options += ["--kernel-image", str(args.kernel_image)]
    if args.root:
        options += ["--root", str(args.root)]
    return options


def program() -> list[str]:
    """How this command was called, so that what is printed can be pasted."""
    called = Path(sys.argv[0])
    if called.name != "iommulab":
        return [os.path.relpath(sys.executable), "-m", "iommulab"]
    found = shutil.which("iommulab")
    same = found is not None and os.path.realpath(found) == os.path.realpath(called)
    return ["iommulab" if same else os.path.relpath(called)]


def print_failures(console: Console, results: Results, options: list[str]) -> None:
    """For each failed test: what was asserted, the calls that led to it, for a DMA the walk, and how to rerun it."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for broken in results.broken:
        say(f"\nBROKEN {broken['id']}\n{broken['text']}")
    for test in results.failed[:SHOWN]:
        say(f"\nFAILED {test.id}\n  {test.reason}")
        if test.text:
            say(_indent("\n".join(test.text.splitlines()[-25:])))
        for title in ("Recorded calls", "The model's view"):
            if test.section(title):
                say(f"  {title.lower()}:\n{_indent(test.section(title))}")
        say("  rerun: " + shlex.join([*program(), "conformance", *options, test.id]))
    if len(results.failed) > SHOWN:
        say(f"\n… and {len(results.failed) - SHOWN} more failed tests, in the reports")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
