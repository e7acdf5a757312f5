"""IOMMU_IOAS_CHANGE_PROCESS: the caller takes over the pages of file mappings, and what they cost.

Mirrors iommufd_ioas_change_process(), charge_current() and change_mm() of drivers/iommu/iommufd/ioas.c.
"""

from __future__ import annotations

import errno
import resource
from types import SimpleNamespace
from typing import Any

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import (
    NOWHERE,
    PAGE,
    answer,
    fails,
    ioas_alloc,
    map_file,
    map_user,
    memfd,
    option_set,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Client, File, RemoteFile
from uapi.iommufd import IOMMU_IOAS_CHANGE_PROCESS, IOMMU_OPTION_RLIMIT_MODE

pytestmark = pytest.mark.since("6.13")

CAP_IPC_LOCK = 14


def needs_device(test: Any) -> Any:
    """Pins need a domain; both modes that charge."""
    return pytest.mark.needs("iommu", "root", "vfio_cdev")(pytest.mark.parametrize("mode", ["user", "mm"])(test))


def change_process(iommu: File | RemoteFile) -> None:
    IOMMU_IOAS_CHANGE_PROCESS(iommu)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 0x8000_0000])
def test_reserved_field_is_eopnotsupp(iommu: File, value: int) -> None:
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_CHANGE_PROCESS(iommu, __reserved=value)


def test_nothing_to_change_is_fine(iommu: File) -> None:
    change_process(iommu)
    ioas_alloc(iommu)
    change_process(iommu)


def test_user_mapping_in_any_ioas_is_einval(iommu: File) -> None:
    first, second = ioas_alloc(iommu), ioas_alloc(iommu)
    with memfd(PAGE) as fd:
        map_file(iommu, first, fd, 0, PAGE, iova=0)
    map_user(iommu, second, NOWHERE, PAGE, iova=PAGE)
    with fails(errno.EINVAL):
        change_process(iommu)
    unmap(iommu, second, PAGE, PAGE)
    change_process(iommu)


def test_reserved_field_comes_before_the_mappings(iommu: File) -> None:
    map_user(iommu, ioas_alloc(iommu), NOWHERE, PAGE, iova=PAGE)
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_CHANGE_PROCESS(iommu, __reserved=1)


def test_caller_needs_no_right(kernel: Backend, iommu: File) -> None:
    with memfd(PAGE) as fd, kernel.spawn() as client:
        map_file(iommu, ioas_alloc(iommu), fd, 0, PAGE, iova=0)
        client.setuid(65534)
        change_process(client.receive(iommu))


def charged(client: Client) -> tuple[int, int]:
    """Pages in VmPin and VmLck."""
    return client.status("VmPin") // 4, client.status("VmLck") // 4


def map_memfd(client: Client, iommu: RemoteFile, ioas: int, pages: int) -> None:
    """Have the client map a memfd that it is given for this."""
    with memfd(pages * PAGE) as fd:
        passed = client.receive(SimpleNamespace(fileno=lambda: fd, path="memfd"))  # type: ignore[arg-type]
        map_file(iommu, ioas, passed.fileno(), 0, pages * PAGE, iova=0)


def weak(kernel: Backend, iommu: File, client: Client) -> RemoteFile:
    """The context in a client that pays for its pins."""
    client.drop_capabilities(CAP_IPC_LOCK)
    return client.receive(iommu)


@pytest.fixture
def pinned(cdev: VfioDevice, iommu: File, mode: str) -> int:
    """An IOAS with the device attached, in a context of that mode."""
    option_set(iommu, IOMMU_OPTION_RLIMIT_MODE, int(mode == "mm"))
    cdev.bind(iommu)
    ioas = ioas_alloc(iommu)
    cdev.attach(ioas)
    return ioas


@needs_device
def test_charges_move_to_the_caller(kernel: Backend, iommu: File, pinned: int, mode: str) -> None:
    full = (8, 8 if mode == "mm" else 0)
    with kernel.spawn() as first, kernel.spawn() as second:
        ours, theirs = weak(kernel, iommu, first), weak(kernel, iommu, second)
        map_memfd(first, ours, pinned, 8)
        seen = [(charged(first), charged(second))]
        for _ in range(2):
            change_process(theirs)
            seen.append((charged(first), charged(second)))
        unmap_all(iommu, pinned)
        seen.append((charged(first), charged(second)))
    assert seen == [(full, (0, 0)), ((0, 0), full), ((0, 0), full), ((0, 0), (0, 0))]


@needs_device
def test_caller_that_cannot_pay_is_enomem_and_nothing_moves(
    kernel: Backend, iommu: File, pinned: int, mode: str
) -> None:
    full = (8, 8 if mode == "mm" else 0)
    with kernel.spawn() as first, kernel.spawn() as second:
        ours, theirs = weak(kernel, iommu, first), weak(kernel, iommu, second)
        map_memfd(first, ours, pinned, 8)
        second.setrlimit(resource.RLIMIT_MEMLOCK, 7 * PAGE, 7 * PAGE)
        assert answer(change_process, theirs) == errno.ENOMEM
        assert (charged(first), charged(second)) == (full, (0, 0))
        unmap_all(iommu, pinned)
        assert (charged(first), charged(second)) == ((0, 0), (0, 0))


@needs_device
def test_charge_outlives_the_first_process(kernel: Backend, iommu: File, pinned: int, mode: str) -> None:
    with kernel.spawn() as second:
        with kernel.spawn() as first:
            map_memfd(first, weak(kernel, iommu, first), pinned, 8)
            change_process(weak(kernel, iommu, second))
        assert charged(second) == (8, 8 if mode == "mm" else 0)
        unmap_all(iommu, pinned)
        assert charged(second) == (0, 0)
