"""The ABI of one release, flattened for a kernel that boots as it: `profile("6.6")`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from uapi import registry
from uapi.ioctl import Ioctl
from uapi.layout import exists, sizes_at, value_at
from uapi.version import parse


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a release accepts as an ioctl's struct: at least `min_size` bytes, of which it knows `size`."""

    ioctl: Ioctl[Any]
    min_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What a release has: its ioctls by name with their sizes, its constants by name, and the names of its structs."""

    release: str
    ioctls: MappingProxyType[str, Sizes]
    constants: MappingProxyType[str, int]
    structs: frozenset[str]

    def mask(self, *flags: str) -> int:
        """The given flags, or-ed, as far as the release knows them."""
        known = 0
        for flag in flags:
            known |= self.constants.get(flag, 0)
        return known


@functools.cache
def profile(release: str) -> Profile:
    """The ABI at a release, the mock driver's included. ValueError for what is no release name."""
    parse(release)
    headers = (*registry.HEADERS, registry.TEST_HEADER)
    ioctls = {}
    for name, ioctl in registry.ioctls(*headers).items():
        sizes = sizes_at(ioctl, release)
        if sizes is not None:
            ioctls[name] = Sizes(ioctl, *sizes)
    values = {name: value_at(constant, release) for name, constant in registry.constants(*headers).items()}
    return Profile(
        release,
        MappingProxyType(ioctls),
        MappingProxyType({name: value for name, value in values.items() if value is not None}),
        frozenset(name for name, struct in registry.structs(*headers).items() if exists(struct, release)),
    )
