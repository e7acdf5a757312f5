"""A run written for machines: KTAP (the kernel's test format, Documentation/dev-tools/ktap.rst) and JUnit XML."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from iommulab.files import write
from iommulab.results import Results, Test


def write_all(results: Results, directory: Path) -> list[Path]:
    """JSON, KTAP and JUnit in `directory`, named after what the suite ran on."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{results.on}.{ending}" for ending in ("json", "ktap", "xml")]
    results.save(paths[0])
    write(paths[1], ktap(results).encode())
    write(paths[2], junit(results))
    return paths


def _line(text: str) -> str:
    """One line of KTAP: '#' would start a directive."""
    return " ".join(text.split()).replace("#", "")


def _ktap_test(number: int, test: Test) -> list[str]:
    name = _line(test.id.partition("::")[2] or test.id)
    state = "not ok" if test.verdict == "failed" else "ok"
    line = f"{state} {number} {name}"
    if test.verdict == "skipped":
        line += f" # SKIP {_line(test.reason)}"
    elif test.verdict == "xfailed":
        line = f"not ok {number} {name} # TODO {_line(test.reason)}"
    elif test.verdict == "failed":
        return [f"# {_line(test.reason)}", line]
    return [line]


def ktap(results: Results) -> str:
    """The run as KTAP version 1, one subtest an area."""
    areas = results.areas()
    lines = ["KTAP version 1", f"1..{len(areas)}"]
    for number, (area, tests) in enumerate(areas.items(), 1):
        lines += ["  KTAP version 1", f"  # Subtest: {area}", f"  1..{len(tests)}"]
        for index, test in enumerate(tests, 1):
            lines += [f"  {line}" for line in _ktap_test(index, test)]
        verdicts = {test.verdict for test in tests}
        state = "not ok" if "failed" in verdicts else "ok"
        lines.append(f"{state} {number} {area}" + (" # SKIP" if verdicts == {"skipped"} else ""))
    return "\n".join(lines) + "\n"


def _clean(text: str) -> str:
    """Characters that XML 1.0 cannot hold become '?'."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def junit(results: Results) -> bytes:
    """The run as JUnit XML, one testsuite an area."""
    root = ElementTree.Element("testsuites", name=f"iommulab conformance on {results.title}")
    for area, tests in results.areas().items():
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=area,
            tests=str(len(tests)),
            failures=str(sum(test.verdict == "failed" for test in tests)),
            skipped=str(sum(test.verdict in ("skipped", "xfailed") for test in tests)),
            errors="0",
            time=f"{sum(test.duration for test in tests):.3f}",
        )
        for test in tests:
            name = _clean(test.id.partition("::")[2] or test.id)
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"conformance.{area}", name=name, time=f"{test.duration:.6f}"
            )
            if test.verdict == "failed":
                failure = ElementTree.SubElement(case, "failure", message=_clean(test.reason))
                failure.text = _clean("\n\n".join([test.text, *(f"{name}\n{text}" for name, text in test.sections)]))
            elif test.verdict in ("skipped", "xfailed"):
                ElementTree.SubElement(case, "skipped", message=_clean(test.reason))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"
