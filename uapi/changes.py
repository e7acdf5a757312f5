"""What each release added to the ABI, out of the declarations: the header's half of the table of releases.

`abi_changes()` gives the same rows as `uapi.behaviours` has by hand: new ioctls, ioctls whose struct grew, new
constants, release by release. Evidence is `header` where the release, or one that has everything of it, was
sampled (`uapi/history`; the mock driver's header was read at 6.12, 7.2 and 7.3), else UNVERIFIED.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from uapi import history, registry
from uapi.behaviours import HEADER, UNVERIFIED, Behaviour
from uapi.layout import exists, sizes_at
from uapi.profile import profile
from uapi.version import MAINLINE, parse

#: Releases whose mock driver's header was compared with the declarations.
TEST_HEADER_SAMPLES = ("6.12", "7.2", "7.3")
#: Constants of more than this many names are counted, not listed.
_LISTED = 4


def abi_changes() -> Iterator[Behaviour]:
    """A row for each mainline release and header that added something, in order."""
    sampled = {parse(name).series for name in history.tables()}
    for older, release in itertools.pairwise(MAINLINE):
        for header in ("linux/iommufd.h", "linux/vfio.h", registry.TEST_HEADER):
            text = "; ".join(_added(header, older, release))
            if not text:
                continue
            known = release in TEST_HEADER_SAMPLES if header == registry.TEST_HEADER else _seen(release, sampled)
            name = header.removeprefix("linux/")
            yield Behaviour(
                f"abi-{release}-{name.removesuffix('.h').replace('_', '-')}",
                "abi",
                release,
                f"{name}: {text}",
                "ENOTTY, EOPNOTSUPP or E2BIG, by the size rules",
                HEADER if known else UNVERIFIED,
                test="tests/uapi/test_history.py" if known else "",
            )


def _seen(release: str, sampled: set[tuple[int, int]]) -> bool:
    return parse(release).series in sampled


def _added(header: str, older: str, release: str) -> Iterator[str]:
    before, after = profile(older), profile(release)
    ioctls = registry.ioctls(header)
    new = [name for name in ioctls if name in after.ioctls and name not in before.ioctls]
    if new:
        yield "new " + ", ".join(new)
    for name, ioctl in ioctls.items():
        sizes = sizes_at(ioctl, older), sizes_at(ioctl, release)
        if sizes[0] is not None and sizes[1] is not None and sizes[0] != sizes[1]:
            yield f"{name} {sizes[0][1]} -> {sizes[1][1]} bytes"
    constants = registry.constants(header)
    new = [name for name, one in constants.items() if exists(one, release) and not exists(one, older)]
    if len(new) > _LISTED:
        yield f"{len(new)} constants, among them {', '.join(new[:_LISTED])}"
    elif new:
        yield "constants " + ", ".join(new)
    gone = [name for name, one in constants.items() if exists(one, older) and not exists(one, release)]
    if gone:
        yield "gone: " + ", ".join(gone)
