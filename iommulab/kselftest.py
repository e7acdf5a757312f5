"""`iommulab selftest`: upstream's own iommufd selftests, unmodified, on the model or a real kernel.

The programs are built from a Linux tree (tools/testing/selftests/iommu) and run under `iommulab run`, on the running
kernel or in a guest. Their TAP becomes a run like one of the suite, so that `iommulab compare` sets two side by side.
Tests that need huge pages count as skipped, "not run", where the host has none free and none can be set.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.table import Table

from iommulab.errors import UserError
from iommulab.files import check_writable
from iommulab.guest import make_guest
from iommulab.kernel_build import check_tree
from iommulab.kernel_images import cache, find_image
from iommulab.make import run_make
from iommulab.progress import SuiteProgress
from iommulab.reports import write_all
from iommulab.results import Results, Test, load
from iommulab.session import Session, kill
from iommulab.suite import need_linux
from iommulab.terminal import console
from uapi.version import NEWEST

PROGRAMS = ("iommufd", "iommufd_fail_nth")
#: Free huge pages of 2 MiB that the programs want.
HUGE_PAGES = 64
_HUGE_PAGES_FREE = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
_HUGE_PAGES_SET = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
#: `# RUN name ...`, `ok 3 name`, `not ok 4 name`, `ok 5 name # SKIP why`; the harness may put its words behind.
_LINE = re.compile(r"(ok|not ok) \d+ (\S+)(?: # SKIP *(.*))?")
_COUNT = re.compile(r"1\.\.(\d+)")
#: Seconds for one program.
_LIMIT = 900.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "selftest", help="upstream's own iommufd selftests, unmodified", description=__doc__.splitlines()[0]
    )
    parser.add_argument("tree", type=Path, metavar="SRC", help="a Linux source tree")
    parser.add_argument("--on", choices=("model", "linux", "vm"), default="model", help="what to test (default: model)")
    parser.add_argument("--kernel", metavar="VERSION", help=f"the model's release (default: {NEWEST}), or an image's")
    parser.add_argument("--kernel-image", type=Path, metavar="PATH", help="the kernel that --on vm boots")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="only this one; may be repeated")
    parser.add_argument("--expect", metavar="RUN", help="fail only where this run (or recorded:NAME) is better")
    parser.add_argument(
        "--report", type=Path, default=Path("report/selftest"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the run's JSON here too (.json or .json.gz)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; 1 where a test failed, or with --expect, where one is worse than there."""
    if args.on == "linux":
        need_linux()
    if args.record is not None:
        check_writable(args.record)
    expected = load(args.expect) if args.expect else None
    programs = build(args.tree, args.program or PROGRAMS)
    results = Results(on=args.on, machine="mock", python=sys.version.split()[0])
    results.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    started = time.monotonic()
    with SuiteProgress(console(), "selftest") as progress, _HugePages() as huge:
        runner = {"model": _on_model, "linux": _on_linux, "vm": _on_vm}[args.on]
        for program, lines in runner(args, programs, results, progress):
            before = time.monotonic()
            for test in tests_of(program, lines, huge=huge.enough or args.on == "vm"):
                now = time.monotonic()
                test.duration, before = now - before, now
                results.tests.append(test)
                progress.finished(test)
    results.duration = time.monotonic() - started
    write_all(results, args.report)
    if args.record:
        results.save(args.record)
    _print(results)
    worse = results.failed if expected is None else _worse(results, expected)
    for test in worse:
        print(f"{'failed' if expected is None else 'worse than recorded'}: {test.id}")
    return 1 if worse else 0


# -- the programs ------------------------------------------------------------------------------------------------------


def build(tree: Path, programs: Iterable[str]) -> list[Path]:
    """The built programs. They and the tree's uAPI headers go to the user's cache; the tree is not written to."""
    tree = check_tree(tree)
    source = tree / "tools" / "testing" / "selftests" / "iommu"
    missing = [name for name in programs if not (source / f"{name}.c").is_file()]
    if missing:
        raise UserError(f"{source} has no {missing[0]}.c")
    tools = [tool for tool in ("make", "gcc") if shutil.which(tool) is None]
    if tools:
        raise UserError(f"the selftests are built with {' and '.join(tools)}, which is missing here")
    objects = cache().parent / "selftest" / hashlib.sha256(str(tree).encode()).hexdigest()[:12]
    try:
        (objects / "iommu").mkdir(parents=True, exist_ok=True)
        (objects / "log").write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write to {objects}: {(error.strerror or str(error)).lower()}") from error
    log, out = objects / "log", console()
    run_make(["make", "-C", str(tree), f"O={objects}", "headers"], log, out, "installing the tree's headers")
    flags = [f"OUTPUT={objects / 'iommu'}", f"KHDR_INCLUDES=-isystem {objects / 'usr' / 'include'}"]
    run_make(["make", "-C", str(source), *flags], log, out, "building the selftests (they need libcap-dev)")
    return [objects / "iommu" / name for name in programs]


class _HugePages:
    """At least HUGE_PAGES free ones while it is entered, where this user may set them."""

    def __init__(self) -> None:
        self.enough = False
        self._before: int | None = None

    def __enter__(self) -> _HugePages:
        try:
            free = int(Path(_HUGE_PAGES_FREE).read_text())
            if free < HUGE_PAGES:
                total = int(Path(_HUGE_PAGES_SET).read_text())
                Path(_HUGE_PAGES_SET).write_text(str(total + HUGE_PAGES - free))
                self._before = total
                free = int(Path(_HUGE_PAGES_FREE).read_text())
            self.enough = free >= HUGE_PAGES
        except (OSError, ValueError):
            self.enough = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            Path(_HUGE_PAGES_SET).write_text(str(self._before))


# -- where they run ----------------------------------------------------------------------------------------------------

Runs = Iterator[tuple[str, Iterator[str]]]


def _on_model(args: argparse.Namespace, programs: list[Path], results: Results, progress: SuiteProgress) -> Runs:
    version = args.kernel or NEWEST
    results.backend, results.release = "model", version
    launch = [sys.executable, "-m", "iommulab", "run", "--machine", "mock", "--version", version, "--"]
    yield from _here(launch, programs, progress)


def _on_linux(args: argparse.Namespace, programs: list[Path], results: Results, progress: SuiteProgress) -> Runs:
    results.backend, results.release = "linux", os.uname().release
    yield from _here([], programs, progress)


def _here(launch: list[str], programs: list[Path], progress: SuiteProgress) -> Runs:
    for path in programs:
        progress.status(path.name)
        with Session(
            [*launch, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                yield path.name, iter(process.stdout)
            finally:
                kill(process)


def _on_vm(args: argparse.Namespace, programs: list[Path], results: Results, progress: SuiteProgress) -> Runs:
    image = find_image(args.kernel_image, args.kernel)
    results.backend, results.release = "linux", image.release
    with tempfile.TemporaryDirectory(prefix="iommulab-selftest-") as directory:
        # Without an IOMMU: beside a real one the mock driver of releases before 6.17 has no devices.
        guest = make_guest(image, "mock", Path(directory))
        problem = guest.probe_kvm()
        if problem is not None:
            progress.say(f"vm: KVM is not used: {problem}; emulating (TCG)")
        results.environment = {
            "image": image.path.name,
            "qemu": guest.qemu.version,
            "accelerator": guest.accelerator,
        }
        for path in programs:
            progress.status(f"{path.name} in {image.release}")
            # The harness's processes die with the port's descriptor closed: let a shell copy the lines.
            text = guest.run(f'sh -c \'{shlex.quote(str(path))} 2>&1 | cat >"$0"\' "$events"', limit=_LIMIT)
            yield path.name, iter(text.splitlines(keepends=True))


# -- what they say -----------------------------------------------------------------------------------------------------


def tests_of(program: str, lines: Iterator[str], *, huge: bool) -> Iterator[Test]:
    """The results in a program's TAP, one by one. What the plan counts and nobody told is failed: it died."""
    planned, told, text = 0, 0, []
    for line in lines:
        line = line.rstrip("\n")
        if count := _COUNT.fullmatch(line):
            planned = int(count[1])
        found = _LINE.match(line)
        if found is None:
            text.append(line)
            continue
        told += 1
        state, name, why = found[1], found[2], found[3]
        fixture, _, case = name.rpartition(".")
        test = Test(f"{program}/{fixture}::{case}", "passed")
        if why is not None:
            test.verdict, test.reason = "skipped", why or "the program skips it"
        elif state == "not ok" and not huge and "huge" in name:
            test.verdict, test.reason = "skipped", f"not run: no {HUGE_PAGES} free huge pages of 2 MiB"
        elif state == "not ok":
            said = [one for one in text if one.startswith("#") and " RUN " not in one and "FAIL" not in one]
            test.verdict, test.text = "failed", "\n".join(text[-30:])
            test.reason = said[-1].lstrip("# ") if said else "not ok"
        text.clear()
        yield test
    if not planned:
        raise UserError(f"{program} printed no plan: {text[-1] if text else 'nothing at all'}")
    for number in range(told, planned):
        yield Test(f"{program}/lost::test {number + 1}", "failed", reason="the program ended before it")


def _worse(results: Results, expected: Results) -> list[Test]:
    """What passed in the expected run and does not now, except what could not run here."""
    passed = {test.id for test in expected.tests if test.verdict == "passed"}
    now = {test.id: test for test in results.tests}
    programs = {name.partition("/")[0] for name in now}
    worse = [test for test in results.tests if test.verdict == "failed" and test.id in passed]
    lost = [name for name in passed if name not in now and name.partition("/")[0] in programs]
    return worse + [Test(name, "failed", reason="no result") for name in sorted(lost)]


def _print(results: Results) -> None:
    table = Table(title=f"upstream's iommufd selftests on {results.title}", title_justify="left")
    table.add_column("fixture")
    for title in ("pass", "fail", "skip"):
        table.add_column(title, justify="right")
    for area, tests in results.areas().items():
        verdicts = [test.verdict for test in tests]
        table.add_row(area, *(str(verdicts.count(kind) or ".") for kind in ("passed", "failed", "skipped")))
    console().print(table)
    for program in sorted({test.id.partition("/")[0] for test in results.tests}):
        mine = [test.verdict for test in results.tests if test.id.startswith(program + "/")]
        counts = ", ".join(
            f"{mine.count(kind)} {word}" for kind, word in (("passed", "pass"), ("failed", "fail"), ("skipped", "skip"))
        )
        print(f"{program}: {counts} of {len(mine)}")
    print(f"{len(results.tests)} tests in {results.duration:.1f} s")
