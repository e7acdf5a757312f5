"""Names of kernel releases, and what they include.

A release is a name: "6.13-rc7", "6.13", "6.12.95", "7.3". A declaration says `since="6.13"`, the mainline release whose
merge window brought the thing (so every -rc of it has it), or names a point release, `since="6.13.4"`. Version numbers
are no total order: 6.12.95 has things that 6.13 lacks, because a stable tree took them from 6.15. Such things name the
stable releases too: `backports=("6.12.95",)` reads "in 6.12.y from 6.12.95 on".
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from uapi.cstruct import OLDEST

#: The release that this project's declarations mirror whole.
NEWEST = "7.3"

#: Mainline releases between OLDEST and NEWEST. Of 7.0 and 7.1 no header was sampled (see uapi/history).
MAINLINE = (*(f"6.{minor}" for minor in range(1, 20)), "7.0", "7.1", "7.2", "7.3")

_NAME = re.compile(r"(\d+)\.(\d+)(?:\.(\d+)|-rc(\d+))?")
_FINAL = 1 << 30


class Release(NamedTuple):
    """A release name taken apart. Compares as in one line of development: an -rc, then the release, then its points."""

    major: int
    minor: int
    rc: int
    point: int

    @property
    def series(self) -> tuple[int, int]:
        return self.major, self.minor


@functools.cache
def parse(name: str) -> Release:
    """The parts of a release name. ValueError, with a sentence, for what is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no kernel release: expected a name like 6.13, 6.13-rc7 or 6.12.95")
    major, minor, point, rc = match.groups()
    return Release(int(major), int(minor), int(rc) if rc else _FINAL, int(point or 0))


def _has(release: Release, since: Release, *, stable: bool) -> bool:
    if release.series != since.series:
        return release.series > since.series and not stable
    if since.point or stable:
        return release.rc == _FINAL and release.point >= since.point
    return release.rc >= since.rc if since.rc != _FINAL else True


@functools.cache
def includes(release: str, since: str, backports: tuple[str, ...] = ()) -> bool:
    """Whether `release` has what came in `since` and was taken into the stable releases `backports`.

    `since` OLDEST means "6.1 or earlier": every release has it, older ones as far as is known. A `since` with a point
    means from that point release on, and every later series. A `backports` entry holds only within its own series.
    """
    parsed = parse(release)
    if since == OLDEST:
        return True
    return _has(parsed, parse(since), stable=False) or any(
        _has(parsed, parse(backport), stable=True) for backport in backports
    )
