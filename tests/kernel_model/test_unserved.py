"""Every declared ioctl is served by the model, or is listed with the reason why not."""

from __future__ import annotations

import ast
import errno
from pathlib import Path

import pytest

import kernel_model
from conformance.drivers.vfio import VfioDevice
from kernel_model.kernel import Kernel
from kernel_model.unserved import UNSERVED
from uapi import registry
from uapi.backend import DEV_IOMMU

DECLARED = registry.ioctls(*registry.HEADERS, registry.TEST_HEADER)


def used_by_the_model() -> set[str]:
    """Names that the model's modules import from the declarations."""
    names: set[str] = set()
    for path in Path(kernel_model.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uapi."):
                names |= {alias.name for alias in node.names}
    return names & set(DECLARED)


def test_a_declared_ioctl_is_served_or_has_a_reason() -> None:
    assert set(DECLARED) - used_by_the_model() == set(UNSERVED)


def test_every_reason_says_something() -> None:
    assert all(len(reason.split()) >= 3 for reason in UNSERVED.values())


@pytest.mark.parametrize("name", [name for name in UNSERVED if name.startswith("VFIO_DEVICE") or "TEST" in name])
def test_an_unserved_ioctl_is_enotty_on_its_own_file(name: str) -> None:
    with Kernel() as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, "0000:00:10.0") as device:
        device.bind(iommu)
        file = iommu if name.startswith("IOMMU") else device.file
        with pytest.raises(OSError) as failed:  # noqa: PT011 - the errno follows
            file.ioctl(DECLARED[name].number, 0)
        assert failed.value.errno == errno.ENOTTY
