"""One context in two processes, and two contexts in two.

A context belongs to whoever holds a descriptor of it (drivers/iommu/iommufd/main.c). The memory, the descriptors and
the rights of a call are those of the process that makes it. What pins are charged to whom is in
test_pin_accounting.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.steps import (
    NOWHERE,
    PAGE,
    answer,
    destroy,
    fails,
    ioas_alloc,
    map_user,
    unmap,
    unmap_all,
)
from uapi.backend import Backend, Client, File
from uapi.iommufd import IOMMU_IOAS_ALLOC


@pytest.fixture
def client(kernel: Backend) -> Iterator[Client]:
    with kernel.spawn() as client:
        yield client


def test_context_that_was_passed_over_is_shared(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    assert ioas_alloc(iommu) == 1
    assert ioas_alloc(remote) == 2
    assert ioas_alloc(iommu) == 3


def test_either_side_may_destroy_the_others_objects(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    ours, theirs = ioas_alloc(iommu), ioas_alloc(remote)
    destroy(iommu, theirs)
    destroy(remote, ours)
    with fails(errno.ENOENT):
        destroy(iommu, ours)


def test_maps_of_both_sides_lie_in_one_space(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    ioas = ioas_alloc(iommu)
    map_user(remote, ioas, client.allocate(PAGE), PAGE, iova=PAGE)
    with fails(errno.EEXIST):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=PAGE)
    assert unmap(iommu, ioas, PAGE, PAGE) == PAGE


def test_client_opens_a_context_of_its_own(iommu: File, client: Client) -> None:
    remote = client.open("/dev/iommu")
    assert ioas_alloc(iommu) == 1
    assert ioas_alloc(remote) == 1
    destroy(remote, 1)
    destroy(iommu, 1)


def test_two_clients_share_what_both_were_given(kernel: Backend, iommu: File, client: Client) -> None:
    with kernel.spawn() as other:
        first, second = client.receive(iommu), other.receive(iommu)
        assert [ioas_alloc(first), ioas_alloc(second), ioas_alloc(first)] == [1, 2, 3]


@pytest.mark.needs("iommu")
def test_context_outlives_the_process_that_opened_it(kernel: Backend, client: Client) -> None:
    iommu = kernel.open("/dev/iommu")
    ioas = ioas_alloc(iommu)
    remote = client.receive(iommu)
    iommu.close()
    assert ioas_alloc(remote) == ioas + 1
    destroy(remote, ioas)


def test_context_outlives_a_client_that_exits(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    ioas = ioas_alloc(remote)
    client.exit()
    assert ioas_alloc(iommu) == ioas + 1
    destroy(iommu, ioas)


def test_lazy_map_outlives_the_process_that_made_it(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    ioas = ioas_alloc(iommu)
    map_user(remote, ioas, client.allocate(4 * PAGE), 4 * PAGE, iova=PAGE)
    client.exit()
    with fails(errno.EEXIST):
        map_user(iommu, ioas, NOWHERE, PAGE, iova=2 * PAGE)
    assert unmap_all(iommu, ioas) == 4 * PAGE


def test_descriptor_that_the_client_closed_is_gone_for_it_alone(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    remote.close()
    assert answer(remote.ioctl, IOMMU_IOAS_ALLOC.number, IOMMU_IOAS_ALLOC.make()) == errno.EBADF
    assert ioas_alloc(iommu) == 1


def test_argument_address_is_one_of_the_caller(iommu: File, client: Client) -> None:
    """The same number is a block in the client and nothing here."""
    remote = client.receive(iommu)
    address = client.allocate(PAGE)
    client.poke(address, bytes(IOMMU_IOAS_ALLOC.make()))
    remote.ioctl(IOMMU_IOAS_ALLOC.number, address)
    assert IOMMU_IOAS_ALLOC.struct.from_buffer_copy(client.peek(address, 12)).out_ioas_id == 1
    client.free(address, PAGE)
    with fails(errno.EFAULT):
        remote.ioctl(IOMMU_IOAS_ALLOC.number, address)


def test_unprivileged_client_may_use_a_context_that_it_is_given(iommu: File, client: Client) -> None:
    remote = client.receive(iommu)
    client.setuid(65534)
    ioas = ioas_alloc(remote)
    assert map_user(remote, ioas, client.allocate(PAGE), PAGE) == PAGE
    assert unmap_all(remote, ioas) == PAGE
