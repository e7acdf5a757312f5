"""Pages whose writes the hardware keeps: a HWPT with dirty tracking, edu on it, and what a bitmap of them says.

Fixtures for tests of a unit's own dirty bits. A set of dirty pages is a Python int, bit 0 for the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.drivers.edu import Edu
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.steps import PAGE, hwpt_alloc, map_user
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_DIRTY_TRACKING

IOVA, COUNT = 0x10_0000, 64


@pytest.fixture
def memory(kernel: Backend) -> Iterator[Buffer]:
    """COUNT pages of the client."""
    buffer = kernel.buffer(COUNT * PAGE)
    yield buffer
    buffer.close()


@pytest.fixture
def tracked(iommu: File, edu: Edu, ioas: int, memory: Buffer) -> int:
    """A HWPT with dirty tracking, switched on, COUNT pages mapped at IOVA, and the device attached to it."""
    map_user(iommu, ioas, memory.address, COUNT * PAGE, IOVA)
    hwpt = hwpt_alloc(iommu, edu.vfio.devid, ioas, IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    edu.vfio.attach(hwpt)
    set_tracking(iommu, hwpt)
    return hwpt


def bits(*pages: int) -> int:
    return sum(1 << page for page in pages)


def dirty(iommu: File, hwpt: int, clear: bool = True) -> int:
    """The dirty pages of [IOVA, IOVA + COUNT pages)."""
    return get_dirty(iommu, hwpt, IOVA, COUNT * PAGE, clear=clear)
