"""A pytest plugin for other projects: the fixture `kernel`, a freshly booted model for each test.

    def test_my_driver(kernel):
        with kernel.open("/dev/iommu") as iommu:
            ...

Loaded by pytest wherever iommulab is installed, so it does nothing until the fixture is asked for: a project's own
`kernel` fixture takes its place, and the model is imported at the first use.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from iommulab.connect import connect
from uapi.backend import Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("iommulab")
    group.addoption("--iommulab-machine", default="q35-vtd-legacy", metavar="NAME", help="the kernel fixture's machine")
    group.addoption("--iommulab-version", default="7.3", metavar="RELEASE", help="the kernel fixture's release")


@pytest.fixture
def kernel(pytestconfig: pytest.Config) -> Iterator[Backend]:
    """A model of the Linux kernel with an IOMMU and an `edu` device, closed after the test."""
    try:
        backend = connect(
            "model",
            machine=pytestconfig.getoption("--iommulab-machine"),
            version=pytestconfig.getoption("--iommulab-version"),
        )
    except ValueError as error:
        raise pytest.UsageError(f"iommulab: {error}") from error
    yield backend
    backend.close()
