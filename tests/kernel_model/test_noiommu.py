"""Devices without an IOMMU: the domain that only remembers, and NOIOMMU_GET_PA against the pages one by one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.drivers.edu import Edu, edu_functions
from conformance.drivers.vfio import VfioDevice, take
from conformance.steps import PAGE, ioas_alloc, map_file, map_user, memfd
from kernel_model.door import ModelFile
from kernel_model.errors import KernelError
from kernel_model.iommu.noiommu import NOIOMMU, NoiommuDomain
from kernel_model.iommufd.ioas import Ioas
from kernel_model.kernel import Kernel
from uapi.iommufd import IOMMU_IOAS_NOIOMMU_GET_PA, IOMMU_VFIO_IOAS, IOMMU_VFIO_IOAS_SET
from uapi.vfio import VFIO_IOMMU_MAP_DMA

IOVA = 0x10_0000


def refused(number: int) -> Any:
    return pytest.raises(KernelError, match=rf"\[Errno {number}\]")


@contextmanager
def attached() -> Iterator[tuple[Kernel, ModelFile, VfioDevice, int]]:
    """A kernel, its /dev/iommu, the device that has no IOMMU, and the IOAS that it is attached to."""
    with Kernel("q35-noiommu") as kernel, kernel.open("/dev/iommu") as iommu:
        (address,) = edu_functions(kernel)
        with VfioDevice(kernel, address) as device:
            device.bind(iommu)
            ioas = ioas_alloc(iommu)
            device.attach(ioas)
            yield kernel, iommu, device, ioas


def test_mapping_without_permissions_is_einval() -> None:
    domain = NoiommuDomain(NOIOMMU)
    with refused(errno.EINVAL):
        domain.map(0, 0, PAGE, 0)
    with refused(errno.ENXIO):
        domain.map(0, 1, PAGE, 1)
    domain.map(0, PAGE, PAGE, 1)
    with refused(errno.EADDRINUSE):
        domain.map(0, PAGE, PAGE, 1)
    assert domain.unmap(0, PAGE) == PAGE
    domain.free()


def test_container_call_reaches_it() -> None:
    with attached() as (kernel, iommu, _, ioas):
        IOMMU_VFIO_IOAS(iommu, op=IOMMU_VFIO_IOAS_SET, ioas_id=ioas)
        buffer = kernel.buffer(PAGE)
        with refused(errno.EINVAL):
            VFIO_IOMMU_MAP_DMA(iommu, flags=0, vaddr=buffer.address, iova=0, size=PAGE)
        VFIO_IOMMU_MAP_DMA(iommu, flags=3, vaddr=buffer.address, iova=0, size=PAGE)


@pytest.mark.parametrize(("machine", "version"), [("q35-noiommu", "7.2"), ("mock", "7.3")])
def test_without_the_mode_or_before_7_3_vfio_refuses_it(machine: str, version: str) -> None:
    with Kernel(machine, version) as kernel:
        for address in edu_functions(kernel):
            with refused(errno.EINVAL):
                take(kernel, address)


def test_the_device_does_dma_at_the_address_that_was_told() -> None:
    with attached() as (kernel, iommu, device, ioas), memfd(2 * PAGE) as fd:
        buffer = kernel.buffer(PAGE)
        buffer.view[:5] = b"hello"
        map_user(iommu, ioas, buffer.address, PAGE, iova=IOVA)
        map_file(iommu, ioas, fd, 0, PAGE, iova=2 * IOVA)
        source, destination = (
            IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=iova, length=1).out_phys for iova in (IOVA, 2 * IOVA)
        )
        edu = Edu(device)
        edu.memcpy(destination, source, 5)
        edu.remove()
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            assert file.read(5) == b"hello"


#: Which of four pages stand at a mapping's pages: contiguous or not.
layouts = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(layout=layouts, first=st.integers(0, 6 * PAGE - 1), asked=st.integers(1, 8 * PAGE))
def test_length_is_that_of_the_contiguous_pages_of_the_mapping(layout: list[int], first: int, asked: int) -> None:
    """Against a byte-by-byte look at one mapping: the pages of a memfd make runs where their numbers follow."""
    with attached() as (kernel, iommu, _, ioas):
        buffer = kernel.buffer(6 * PAGE)
        map_user(iommu, ioas, buffer.address, len(layout) * PAGE, iova=IOVA)
        # The pages as the layout wants them, in place of those that the map has put there.
        (context,) = kernel.contexts
        domain = context.objects.get(ioas, Ioas).iopt.domains[0]
        domain.unmap(IOVA, len(layout) * PAGE)
        for index, page in enumerate(layout):
            domain.map(IOVA + index * PAGE, (1 + page) * PAGE, PAGE, 3)
        first %= len(layout) * PAGE
        expected = PAGE - first % PAGE
        for index in range(first // PAGE, len(layout) - 1):
            if layout[index + 1] != layout[index] + 1:
                break
            expected += PAGE
        reply = IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=IOVA + first, length=asked)
        assert reply.out_phys == (1 + layout[first // PAGE]) * PAGE + first % PAGE
        assert reply.length == min(expected, asked)
        domain.unmap(IOVA, len(layout) * PAGE)
        domain.map(IOVA, PAGE, len(layout) * PAGE, 3)
