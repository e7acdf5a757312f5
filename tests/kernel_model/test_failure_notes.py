"""What `Kernel.failure_notes()` tells of DMA that went through: how it was translated, and what the tables say now."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.vfio import VfioDevice
from conformance.steps import map_file, map_user, memfd, unmap
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU
from uapi.iommufd import IOMMU_IOAS_ALLOC

PAGE, IOVA = 4096, 0x10_0000


@pytest.fixture
def notes() -> Iterator[tuple[Kernel, Edu, list[str]]]:
    """A kernel whose edu has read a mapped page, and what it tells then."""
    with Kernel() as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, "0000:00:10.0") as device:
        device.bind(iommu)
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        device.attach(ioas)
        memory = kernel.buffer(PAGE)
        map_user(iommu, ioas, memory.address, PAGE, IOVA)
        edu = Edu(device)
        edu.store(IOVA, 8)
        told = kernel.failure_notes()
        yield kernel, edu, told
        unmap(iommu, ioas, IOVA, PAGE)
        edu.remove()


def test_a_transfer_that_went_through_is_told_with_its_walk(notes: tuple[Kernel, Edu, list[str]]) -> None:
    _, _, told = notes
    assert len(told) == 1
    first, *walk = told[0].splitlines()
    assert first.startswith(f"0000:00:10.0: last write in iova {IOVA:#x}-{IOVA + PAGE - 1:#x} went to ")
    assert any("context entry" in line for line in walk)
    assert any(line.strip().startswith("level 0 table") for line in walk)


def test_a_stale_hit_shows_as_a_cached_page_that_the_tables_do_not_have(notes: tuple[Kernel, Edu, list[str]]) -> None:
    kernel, edu, told = notes
    entry = next(line for line in told[0].splitlines() if "level 0 table" in line)
    table = int(entry.split("table ")[1].split("[")[0], 16)
    index = int(entry.split("[")[1].split("]")[0])
    word = kernel.memory.words[(table >> 3) + index]
    kernel.memory.words[(table >> 3) + index] = 0  # a driver that forgets to invalidate
    edu.store(IOVA, 8)
    lines = kernel.failure_notes()[-1].splitlines()
    assert any(line.strip().startswith("IOTLB:") and line.endswith("RW") for line in lines)
    assert "not present" in lines[-1]
    kernel.memory.words[(table >> 3) + index] = word


def test_memory_that_has_gone_is_told() -> None:
    with Kernel() as kernel, kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, "0000:00:10.0") as device:
        device.bind(iommu)
        ioas = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        device.attach(ioas)
        edu = Edu(device)
        with memfd(PAGE) as fd:
            map_file(iommu, ioas, fd, 0, PAGE, IOVA)
            os.ftruncate(fd, 0)
            edu.store(IOVA, 8)
        edu.remove()
        assert kernel.failure_notes()[0].startswith(f"00:10.0: iova {IOVA:#x} is translated, but nothing answers at ")
