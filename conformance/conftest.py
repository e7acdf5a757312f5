"""The suite's frame: the kernel under test, what each test needs, and what is reported of it.

The backend comes from outside: `--backend MODULE:FACTORY`, a callable that returns a `uapi.backend.Backend`, called
with the `--backend-option KEY=VALUE` pairs as keyword arguments. Every test gets a backend of its own, so on the model
a fresh kernel. `--events FILE` appends one JSON object a line as the run goes on; `iommulab conformance` reads them.

Only the standard library, pytest, ioctl_opt and `uapi` are imported here, so that it runs in a bare guest.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from conformance.fail_nth import FailNth
from conformance.layout import LAYOUT, find_layout
from conformance.offers import PROBES, number, older
from conformance.steps import ioas_alloc
from uapi.backend import DEV_IOMMU, Backend
from uapi.behaviours import BY_ID
from uapi.decode import render_all
from uapi.trace import RecordedFile, Recorder

pytest_plugins = ["conformance.drivers.fixtures", "conformance.tracked"]

#: For the test that runs now; the report hook empties it.
_RECORDER = pytest.StashKey[Recorder]()
_FACTORY = pytest.StashKey[Callable[[], Backend]]()
_OFFERS = pytest.StashKey[dict[str, "str | None"]]()
_EVENTS = pytest.StashKey["Events"]()

MARKERS = (
    'since(release): the behaviour came with this release ("6.13"); skipped on an older kernel',
    "has(behaviour): the new side of a row of uapi/behaviours.py; skipped on a kernel that is older",
    "lacks(behaviour): the old side of one; skipped on a kernel that is newer",
    "needs(*things): skipped where the kernel or its host lacks one of " + ", ".join(PROBES),
    "model_only(reason): says something that only the model can show",
    "linux_only(reason): says something that only a real kernel can show",
    "differs(why): the model is known to differ; has an entry in DIFFERENCES.md and must fail on the model",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("iommulab conformance")
    group.addoption("--backend", default="iommulab.backends:model", help="MODULE:FACTORY of the kernel under test")
    group.addoption("--backend-option", action="append", default=[], metavar="KEY=VALUE", help="given to the factory")
    group.addoption("--fail-nth", type=int, metavar="N", help="sweep failures (fail_nth.py) in N tests (0: in all)")
    group.addoption("--events", help="append one JSON object a line to this file as the run goes on")
    group.addoption("--only", metavar="FILE", help="run just the test ids listed in this file, one a line")
    group.addoption("--test-time", type=float, default=120.0, help="seconds that one test may take (0: no limit)")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[_FACTORY] = _factory(config)
    config.stash[_OFFERS] = {}
    if config.getoption("events") and not hasattr(config, "workerinput"):
        config.stash[_EVENTS] = Events(config.getoption("events"), config.stash[_FACTORY])


def _factory(config: pytest.Config) -> Callable[[], Backend]:
    name = config.getoption("backend")
    module, _, attribute = name.partition(":")
    options = dict(option.partition("=")[::2] for option in config.getoption("backend_option"))
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--backend {name}: {error}") from error

    def factory() -> Backend:
        backend: Backend = make(**options)
        return backend

    return factory


# ---------------------------------------------------------------------------------------------- what a test is run with


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """The kernel under test. What the test leaves open is closed after it."""
    backend = request.config.stash[_FACTORY]()
    recorder = Recorder(backend if request.config.getoption("fail_nth") is None else FailNth(backend))
    request.node.stash[_RECORDER] = recorder
    yield recorder
    recorder.close()


@pytest.fixture
def iommu(kernel: Recorder) -> Iterator[RecordedFile]:
    """/dev/iommu, open."""
    with kernel.open(DEV_IOMMU) as file:
        yield file


@pytest.fixture
def ioas(iommu: RecordedFile) -> int:
    """The id of a fresh IOAS."""
    return ioas_alloc(iommu)


# ----------------------------------------------------------------------------------------------- which tests are run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("only"):
        wanted = Path(config.getoption("only")).read_text().split("\n")
        order = {name: position for position, name in enumerate(wanted) if name}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])
    count = config.getoption("fail_nth")
    if count and not config.getoption("only"):
        chosen = {items[index * len(items) // count] for index in range(min(count, len(items)))}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    backend = config.stash[_FACTORY]()
    try:
        if any("layout" in getattr(item, "fixturenames", ()) for item in items):
            config.stash[LAYOUT] = find_layout(backend)
        for item in items:
            reason = _unfit(config, item, backend)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
            for marker in item.iter_markers("differs"):
                if backend.name == "model":
                    item.add_marker(pytest.mark.xfail(strict=True, reason=str(marker.args[0])))
    finally:
        backend.close()
    if _EVENTS in config.stash:
        config.stash[_EVENTS].begin([item.nodeid for item in items])


def _unfit(config: pytest.Config, item: pytest.Item, backend: Backend) -> str | None:
    """Why the test cannot run on this kernel, or None."""
    for kind, other in (("model_only", "linux"), ("linux_only", "model")):
        marker = item.get_closest_marker(kind)
        if marker is not None and backend.name == other:
            return f"{kind.replace('_', ' ')}: {marker.args[0]}"
    for marker in item.iter_markers("since"):
        if older(backend.release, marker.args[0]):
            return f"needs Linux {marker.args[0]}"
    for wanted in ("has", "lacks"):
        for marker in item.iter_markers(wanted):
            row = BY_ID[marker.args[0]]
            if row.holds(number(backend.release)) != (wanted == "has"):
                return f"{'needs' if wanted == 'has' else 'older than'} Linux {row.since}"
    offers = config.stash[_OFFERS]
    things = [thing for marker in item.iter_markers("needs") for thing in marker.args]
    if "fail_nth" in things and config.getoption("fail_nth") is not None:
        return "it makes failures of its own"
    # A test that asks for the fixture of /dev/iommu need not say that it needs one.
    things += ["iommu"] if "iommu" in getattr(item, "fixturenames", ()) else []
    for thing in things:
        if thing not in PROBES:
            raise pytest.UsageError(f"{item.nodeid}: needs({thing!r}) is unknown; known: {', '.join(PROBES)}")
        if thing not in offers:
            offers[thing] = PROBES[thing](backend)
        missing = offers[thing]
        if missing is not None:
            return missing
    return None


# ------------------------------------------------------------------------------------------------ how long it may take


class TestTimeout(Exception):
    """The test did not end in its time."""

    __test__ = False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, None, None]:
    limit = item.config.getoption("test_time")

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TestTimeout(f"no end after {limit:g} s")

    if limit:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
    yield
    if limit:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------- what is told of it


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    recorder = item.stash.get(_RECORDER, None)
    if report.failed and recorder is not None:
        report.sections.append(("Recorded calls", "\n".join(render_all(recorder.calls())) or "none"))
        notes = getattr(recorder.inner, "failure_notes", None)
        lines = notes() if notes is not None else []
        if lines:
            report.sections.append(("The model's view", "\n".join(lines)))
    if call.when == "teardown" and item.config.getoption("events"):
        # A plain attribute travels from an xdist worker with the report.
        report.iommulab = {
            "calls": recorder.calls() if recorder is not None else [],
            "dropped": recorder.dropped if recorder is not None else 0,
            "notes": recorder.notes if recorder is not None else {},
            "markers": markers_of(item) | swept(recorder),
        }


def pytest_runtest_logstart(nodeid: str) -> None:
    if _current is not None:
        _current.put({"event": "start", "id": nodeid})


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _current is not None:
        _current.report(report)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Under xdist the workers collect."""
    if _current is not None:
        _current.begin(ids)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _EVENTS in session.config.stash:
        session.config.stash[_EVENTS].finish(int(exitstatus))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and _current is not None:
        _current.put({"event": "broken", "id": report.nodeid, "text": str(report.longrepr)})


#: The session's event stream; report hooks get no config.
_current: Events | None = None


class Events:
    """The run as JSON lines: `begin`, per test `start` and `result`, `broken` for a file that does not load, `end`."""

    def __init__(self, path: str, factory: Callable[[], Backend]) -> None:
        global _current
        self._factory = factory
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open: dict[str, dict[str, Any]] = {}
        self._begun = False
        _current = self

    def put(self, event: dict[str, Any]) -> None:
        data = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data) :]

    def begin(self, ids: Sequence[str]) -> None:
        if self._begun:
            return
        self._begun = True
        backend = self._factory()
        self.put(
            {
                "event": "begin",
                "backend": backend.name,
                "release": backend.release,
                "python": sys.version.split()[0],
                "ids": list(ids),
                "time": time.time(),
            }
        )
        backend.close()

    def report(self, report: pytest.TestReport) -> None:
        test = self._open.setdefault(
            report.nodeid, {"event": "result", "id": report.nodeid, "verdict": "passed", "reason": "", "duration": 0.0}
        )
        test["duration"] += report.duration
        if report.skipped:
            known = hasattr(report, "wasxfail")
            test["verdict"] = "xfailed" if known else "skipped"
            test["reason"] = str(getattr(report, "wasxfail", "")) if known else _skip_reason(report)
        elif report.failed and test["verdict"] != "failed":
            test["verdict"] = "failed"
            test["reason"] = _last_line(report)
            test["text"] = report.longreprtext
            test["sections"] = [list(section) for section in report.sections]
        if report.when == "teardown":
            test |= getattr(report, "iommulab", {"calls": [], "dropped": 0, "notes": {}, "markers": {}})
            test["duration"] = round(test["duration"], 6)
            self.put(self._open.pop(report.nodeid))
        elif report.when not in ("setup", "call"):
            # A crashed xdist worker is one report of its own kind.
            self.put(self._open.pop(report.nodeid) | {"calls": [], "dropped": 0, "notes": {}, "markers": {}})

    def finish(self, status: int) -> None:
        self.put({"event": "end", "status": status})


def markers_of(item: pytest.Item) -> dict[str, list[Any]]:
    """The suite's own markers of a test, with their arguments."""
    names = [marker.partition("(")[0] for marker in MARKERS]
    found: dict[str, list[Any]] = {}
    for marker in item.iter_markers():
        if marker.name in names:
            found.setdefault(marker.name, []).extend(marker.args)
    return found


def swept(recorder: Recorder | None) -> dict[str, list[Any]]:
    """How many calls of the test met failures, and how many of these."""
    backend = recorder.inner if recorder is not None else None
    return {"fail_nth": [backend.calls, backend.injected.total()]} if isinstance(backend, FailNth) else {}


def _skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[0].removeprefix("Failed: ") if lines else "failed"
