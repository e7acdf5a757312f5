"""A run of the suite as data: one form for the model, the running kernel and a guest.

`Results` grows from the event lines that `conformance/conftest.py` writes, and is kept as JSON (`.json`, or `.json.gz`
for the recorded runs that ship in `conformance/recorded/`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_origin, get_type_hints

import conformance
from iommulab.errors import UserError
from iommulab.files import write

FORMAT = "iommulab-run/1"
#: Where the suite lies, installed or in a checkout.
SUITE = Path(conformance.__file__).resolve().parent
RECORDED = SUITE / "recorded"
#: passed; failed; skipped; xfailed: failed as DIFFERENCES.md says it does on the model.
VERDICTS = ("passed", "failed", "skipped", "xfailed")


def area_of(test_id: str) -> str:
    """("test_ioas_map.py::test_x") -> "ioas_map"."""
    return test_id.partition("::")[0].rpartition("/")[2].removesuffix(".py").removeprefix("test_")


@dataclass(slots=True)
class Test:
    """One test's outcome."""

    __test__: ClassVar[bool] = False  # not for pytest to collect

    id: str
    verdict: str
    reason: str = ""
    duration: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    markers: dict[str, list[Any]] = field(default_factory=dict)
    text: str = ""
    sections: list[list[str]] = field(default_factory=list)

    @property
    def area(self) -> str:
        return area_of(self.id)

    def section(self, title: str) -> str:
        """The text that a failed test reported under `title`, "" if none."""
        return next((text for name, text in self.sections if name == title), "")


@dataclass(slots=True)
class Results:
    """One run. `on` is what the user asked for, `backend` and `release` what answered."""

    on: str
    backend: str = ""
    release: str = ""
    machine: str = ""
    python: str = ""
    started: str = ""
    duration: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    tests: list[Test] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[Test]:
        return [test for test in self.tests if test.verdict == "failed"]

    @property
    def ok(self) -> bool:
        return not self.failed and not self.broken

    @property
    def title(self) -> str:
        """("model 7.3, caching always", "vm 7.3.4-oracle")."""
        caching = self.environment.get("caching")
        return f"{self.on} {self.release}".strip() + (f", caching {caching}" if caching else "")

    def counts(self) -> Counter[str]:
        return Counter(test.verdict for test in self.tests)

    def areas(self) -> dict[str, list[Test]]:
        """The tests by area, areas in alphabetical order, tests in the order they ran."""
        found: dict[str, list[Test]] = {}
        for test in self.tests:
            found.setdefault(test.area, []).append(test)
        return dict(sorted(found.items()))

    def sort(self, order: Iterable[str]) -> None:
        """Put the tests in the suite's order, whatever order parallel workers ended in."""
        position = {test_id: index for index, test_id in enumerate(order)}
        self.tests.sort(key=lambda test: position.get(test.id, len(position)))

    def to_json(self) -> dict[str, Any]:
        tests = [{"id": test.id, "area": test.area, **_lean(asdict(test))} for test in self.tests]
        head = {key: getattr(self, key) for key in ("on", "backend", "release", "machine", "python", "started")}
        head |= {"duration": round(self.duration, 3), "environment": self.environment, "broken": self.broken}
        return {"format": FORMAT, **head, "summary": dict(self.counts()), "tests": tests}

    def save(self, path: Path) -> None:
        """Write the run as JSON, one test a line; gzip where the name ends in .gz."""
        data = self.to_json()
        tests = data.pop("tests")
        lines = ",\n".join(json.dumps(test, separators=(",", ":"), sort_keys=True) for test in tests)
        text = json.dumps(data, indent=1)[:-2] + ',\n "tests": [\n' + lines + "\n]\n}\n"
        write(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def _lean(test: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty: id and area stand already, and most tests have no failure text."""
    return {key: value for key, value in test.items() if key != "id" and (value or key in ("verdict", "calls"))}


def load(name: str) -> Results:
    """Read a run: a path to .json or .json.gz, or `recorded:NAME` for one that ships with the suite."""
    path = Path(name)
    if name.startswith("recorded:"):
        wanted = name.removeprefix("recorded:")
        known = {file.name.removesuffix(".json.gz"): file for file in sorted(RECORDED.glob("*.json.gz"))}
        if wanted not in known:
            have = ", ".join(known) or "none"
            raise UserError(f"there is no recorded run named {wanted!r}; there are: {have}")
        path = known[wanted]
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {(error.strerror or str(error)).lower()}") from error
    try:
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        return _from_json(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a run of the conformance suite ({error})") from error


def _from_json(data: Any) -> Results:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"no format {FORMAT!r}")
    fields = {key: data[key] for key in Results.__dataclass_fields__ if key in data and key != "tests"}
    tests = []
    for entry in data["tests"]:
        known = {key: value for key, value in entry.items() if key in Test.__dataclass_fields__}
        test = Test(**known)
        if test.verdict not in VERDICTS:
            raise ValueError(f"verdict {test.verdict!r} of {test.id}")
        tests.append(test)
    found = Results(**fields, tests=tests)
    _check(found, "the run")
    for test in tests:
        _check(test, str(test.id))
        if not all(map(_is_call, test.calls)):
            raise ValueError(f"a call of {test.id} is none")
    return found


def _is_call(call: Any) -> bool:
    kinds = {"call": str, "in": dict, "out": dict, "times": int}
    return (
        isinstance(call, dict)
        and "call" in call
        and all(isinstance(call.get(key, kind()), kind) for key, kind in kinds.items())
    )


def _check(entry: Results | Test, of: str) -> None:
    """ValueError where a field is not what it should be: a file from elsewhere, or written by hand."""
    for name, kind in get_type_hints(type(entry)).items():
        want = get_origin(kind) or kind
        if want is not ClassVar and not isinstance(getattr(entry, name), (int, float) if want is float else want):
            raise ValueError(f"{name} of {of} is no {want.__name__}")
