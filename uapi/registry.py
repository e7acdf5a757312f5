"""All declarations of the ABI by name: which headers there are, and their ioctls, structs and constants."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from uapi import iommufd, iommufd_test, vfio, vfio_ccw, vfio_zdev
from uapi.constants import Constant
from uapi.cstruct import Struct, Union
from uapi.ioctl import Ioctl

#: The modules that mirror a uapi header, by its name.
HEADERS: dict[str, ModuleType] = {module.HEADER: module for module in (iommufd, vfio, vfio_zdev, vfio_ccw)}

#: The mock driver's header, which is no uapi and of which only 7.3 was sampled.
TEST_HEADER = iommufd_test.HEADER
_ALL = {**HEADERS, TEST_HEADER: iommufd_test}

AnyIoctl = Ioctl[Any]
AnyStruct = type[Struct] | type[Union]


def ioctls(*headers: str) -> dict[str, AnyIoctl]:
    """The ioctls of the given headers (all uapi headers if none is given), by name, in order of declaration."""
    return {
        name: value
        for header in headers or HEADERS
        for name, value in vars(_ALL[header]).items()
        if isinstance(value, Ioctl)
    }


def structs(*headers: str) -> dict[str, AnyStruct]:
    """The named structs of the given headers, by name, in order of declaration."""
    return {
        name: value
        for header in headers or HEADERS
        for name, value in vars(_ALL[header]).items()
        if isinstance(value, type)
        and issubclass(value, Struct | Union)
        and value.__module__ == _ALL[header].__name__
        and not name.startswith("_")
    }


def constants(*headers: str) -> dict[str, Constant]:
    """The enumerators and integer #defines of the given headers, by name, in order of declaration."""
    found: dict[str, Constant] = {}
    for header in headers or HEADERS:
        found.update(_ALL[header].CONSTANTS)
    return found


def header_of(thing: AnyIoctl | AnyStruct | Constant) -> str:
    """The header that a declaration is from."""
    for header, module in _ALL.items():
        if vars(module).get(thing.__name__ if isinstance(thing, type) else thing.name) is thing:
            return header
        if isinstance(thing, Constant) and module.CONSTANTS.get(thing.name) is thing:
            return header
    raise LookupError(f"{thing!r} is not declared in a header")
