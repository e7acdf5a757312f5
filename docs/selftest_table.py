"""docs/selftest.md: upstream's selftests on the model beside the real kernel, test by test.

    .venv/bin/iommulab selftest SRC
    .venv/bin/python docs/selftest_table.py report/selftest/model.json recorded:selftest-7.3.4-dmabuf

The second run may be any of a real kernel (`iommulab selftest SRC --on vm`).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from iommulab.results import Results, load

PAGE = Path(__file__).resolve().parent / "selftest.md"
HEAD = """\
# Upstream's selftests, test by test

The kernel's own `tools/testing/selftests/iommu/iommufd` and `iommufd_fail_nth`, built from Linux 7.3.4 and unmodified:
on the model under `iommulab run --machine mock`, and on the real 7.3.4 in a guest. Made by `docs/selftest_table.py`
from two runs of `iommulab selftest`; `.ci/run` runs the first again and fails if a test that the real kernel passes
does not.

The real kernel here is 7.3.4 with `iommufd_test_dmabuf_get()` returning the descriptor. As released it returns 0, and
the eight `dmabuf_*` tests fail there.
"""


def counts(run: Results, program: str) -> str:
    found = Counter(test.verdict for test in run.tests if test.id.startswith(f"{program}/"))
    return f"{found['passed']} / {found['failed']} / {found['skipped']}"


def main() -> None:
    model, real = (load(name) for name in sys.argv[1:3])
    programs = sorted({test.id.partition("/")[0] for test in real.tests})
    lines = [HEAD, "Passed / failed / skipped:", "", f"| program | model {model.release} | real {real.release} |"]
    lines += ["|---|---|---|"]
    lines += [f"| `{program}` | {counts(model, program)} | {counts(real, program)} |" for program in programs]
    ours = {test.id: test for test in model.tests}
    for program in programs:
        lines += ["", f"## {program}", "", "| test | model | real kernel |", "|---|---|---|"]
        for test in real.tests:
            if test.id.startswith(f"{program}/"):
                mine = ours.get(test.id)
                name = test.id.removeprefix(f"{program}/").replace("::", ".")
                reason = f" ({test.reason})" if test.verdict == "skipped" else ""
                lines.append(f"| {name} | {mine.verdict if mine else 'not run'} | {test.verdict}{reason} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
