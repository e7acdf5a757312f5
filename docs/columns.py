"""The README's table of both columns, from two runs:

    make conformance
    .venv/bin/python docs/columns.py report/model.json recorded:7.3.4

writes it between the two marks in README.md. The second run may be any run of a real kernel (`report/vm.json`).
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from iommulab import differences
from iommulab.compare import compare
from iommulab.results import Results, Test, area_of, load

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- columns: made by docs/columns.py -->", "<!-- end of columns -->"


def cell(tests: Sequence[Test]) -> str:
    counts = Counter(test.verdict for test in tests)
    if not tests:
        return "not run"
    return f"{counts['passed']} / {counts['failed']} / {counts['skipped'] + counts['xfailed']}"


def plain(run: Results) -> str:
    """ "7.3.4-oracle" -> "7.3.4": what follows is the builder's own."""
    return run.release.partition("-")[0]


def section(model: Results, real: Results) -> str:
    """The text between the marks."""
    found = compare(model, real, differences.load())
    guest = ""
    if real.environment:
        how = "with KVM" if real.environment["accelerator"] == "kvm" else "emulated (TCG)"
        guest = f" in a guest of QEMU {real.environment['qemu']}, {how}, with `intel-iommu` in legacy mode and `edu`"
    head = (
        f"Tests passed / failed / skipped, by area. Model: Linux {model.release}, on Python {model.python}, "
        f"{model.started[:10]}. Real kernel: Linux {plain(real)}{guest}, {real.started[:10]}."
    )
    areas = model.areas(), real.areas()
    rows = [f"| area | model {model.release} | real {plain(real)} | differ |", "|---|---|---|---|"]
    for area in sorted({*areas[0], *areas[1]}):
        differing = sum(area_of(one.test) == area for one in found.differing) or ""
        rows.append(f"| {area} | {cell(areas[0].get(area, []))} | {cell(areas[1].get(area, []))} | {differing} |")
    rows.append(f"| **all** | **{cell(model.tests)}** | **{cell(real.tests)}** | **{len(found.differing)}** |")
    known = len(found.differing) - len(found.unexplained)
    tail = (
        f"{found.same} tests do the same on both, call by call. {known} differ as "
        f"[DIFFERENCES.md](conformance/DIFFERENCES.md) says, {len(found.unexplained)} without an entry. What a test's "
        "own marker explains is no difference. The model skips:"
    )
    skips = Counter(test.reason.removeprefix("linux only: ") for test in model.tests if test.verdict == "skipped")
    lines = [f"* {count}: {reason}" for reason, count in skips.most_common()]
    return "\n".join([textwrap.fill(head, 118), "", *rows, "", textwrap.fill(tail, 118), "", *lines])


def main() -> None:
    model, real = (load(name) for name in sys.argv[1:3])
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{section(model, real)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
