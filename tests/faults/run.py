"""`python -m tests.faults.run [NAME…]`: put each fault into a copy of the model, and run the suite on it.

The copy has links to all that is as it was, so that it costs next to nothing. A fault is caught where the test that
names it fails there: by an assertion or an error of the model, not because nothing could be run. First of all those
tests pass on the model as it is. `--every N --of K` takes every Nth fault, from the Kth on; `--doc` writes
docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.faults.faults import FAULTS
from tests.faults.table import IOMMUFD, SMMUV3, VTD, Fault, changed

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("uapi", "fakedev", "kernel_model", "shim", "iommulab")
CACHING = "always"


def copy_with(fault: Fault | None, where: Path) -> None:
    """A tree of links, with the fault's file as it becomes. The suite itself is copied: it looks for its own place."""
    shutil.copytree(ROOT / "conformance", where / "conformance", ignore=shutil.ignore_patterns("__pycache__", "*.gz"))
    for package in PACKAGES:
        (where / package).symlink_to(ROOT / package)
    if fault is None:
        return
    here = where
    parts = Path(fault.file).parts
    for n, part in enumerate(parts[:-1]):
        here = here / part
        here.unlink()
        here.mkdir()
        for other in ROOT.joinpath(*parts[: n + 1]).iterdir():
            if other.name != "__pycache__":
                (here / other.name).symlink_to(other)
    target = here / parts[-1]
    target.unlink()
    target.write_text(changed(fault, (ROOT / fault.file).read_text()))


def suite(where: Path, machine: str, tests: Iterable[str]) -> dict[str, str]:
    """Verdicts of tests of the suite in a copy by id, with and without parameters: "failed" if any did."""
    command = [sys.executable, "-m", "iommulab", "conformance", "--machine", machine, "--caching", CACHING]
    command += ["-n", "1", "--report", str(where / "report"), *tests]
    environment = os.environ | {"PYTHONPATH": str(where)}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    report = where / "report" / "model.json"
    if not report.exists():
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    run = json.loads(report.read_text())
    if run["broken"]:
        raise RuntimeError(f"{run['broken'][0]}")
    verdicts: dict[str, str] = {}
    for test in sorted(run["tests"], key=lambda test: ["skipped", "passed", "failed"].index(test["verdict"])):
        verdicts[test["id"]] = verdicts[test["id"].partition("[")[0]] = test["verdict"]
    return verdicts


def healthy(faults: Iterable[Fault]) -> list[str]:
    """What is wrong with the tests on the model as it is: they all have to pass."""
    by_machine: dict[str, set[str]] = {}
    for fault in faults:
        by_machine.setdefault(fault.machine, set()).add(fault.test)
    wrong = []
    for machine, tests in by_machine.items():
        with tempfile.TemporaryDirectory(prefix="iommulab-fault-") as scratch:
            copy_with(None, Path(scratch))
            verdicts = suite(Path(scratch), machine, sorted(tests))
        for name in sorted(tests):
            verdict = verdicts.get(name, "not there")
            if verdict != "passed":
                wrong.append(f"{name} is {verdict} on {machine}")
    return wrong


def caught(fault: Fault) -> bool:
    """Whether the fault's test fails with it."""
    with tempfile.TemporaryDirectory(prefix="iommulab-fault-") as scratch:
        copy_with(fault, Path(scratch))
        return "failed" in suite(Path(scratch), fault.machine, [fault.test]).values()


def document() -> str:
    """docs/faults.md."""
    rows = []
    for kind in (VTD, SMMUV3, IOMMUFD):
        chosen = [fault for fault in FAULTS if fault.kind == kind]
        rows += [
            "",
            f"## {kind}: {len(chosen)}",
            "",
            "| fault | what is wrong | where | caught by, on |",
            "|---|---|---|---|",
        ]
        for fault in chosen:
            test = fault.test.partition("[")[0].replace("test_", "", 1).replace(".py::", ": ")
            rows.append(f"| {fault.name} | {fault.what} | `{fault.file}` | {test}, {fault.machine} |")
    return HEAD + "\n".join(rows) + "\n"


HEAD = """# Faults that the suite catches

Each of these is one line of the model, changed: what a programmer may get wrong in a driver, in iommufd or in VFIO.
With it in place, the test of the conformance suite that stands beside it fails, on hardware that keeps what it may
(`--caching always`). The lines themselves are in `tests/faults`; this page is made from them:

```
.venv/bin/python -m tests.faults.run                  # all of them
.venv/bin/python -m tests.faults.run forgotten-unpin  # one
.venv/bin/python -m tests.faults.run --doc            # this page
```

`make test` looks that each line is still there, CI tries some of them, `make soak` all.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--of", type=int, default=0, metavar="K")
    parser.add_argument("--doc", action="store_true")
    args = parser.parse_args()
    if args.doc:
        (ROOT / "docs" / "faults.md").write_text(document())
        return 0
    known = {fault.name: fault for fault in FAULTS}
    for name in args.names:
        if name not in known:
            parser.error(f"no fault {name!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in args.names] or FAULTS[args.of % args.every :: args.every]
    wrong = healthy(chosen)
    for line in wrong:
        print(f"without any fault: {line}", flush=True)
    missed = 0
    for fault in chosen:
        begin = time.monotonic()
        found = caught(fault)
        missed += not found
        took = time.monotonic() - begin
        print(
            f"{'caught' if found else 'MISSED'}  {fault.name} by {fault.test} on {fault.machine} ({took:.1f} s)",
            flush=True,
        )
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
