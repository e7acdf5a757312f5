"""IOMMU_IOAS_NOIOMMU_GET_PA where no device is without an IOMMU: its checks, in order.

Mirrors iommufd_ioas_noiommu_get_pa() and the head of iopt_get_phys(). A kernel without CONFIG_IOMMUFD_NOIOMMU answers
EOPNOTSUPP to everything: such tests skip there.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.vfio import VfioDevice
from conformance.steps import NOWHERE, PAGE, U64_MAX, answer, fails, ioas_alloc, map_user
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_IOAS_NOIOMMU_GET_PA

pytestmark = pytest.mark.since("7.3")

CAP_SYS_RAWIO = 17


@pytest.fixture
def mapped(iommu: File) -> int:
    """An IOAS with one lazy page at 0x10000."""
    if answer(IOMMU_IOAS_NOIOMMU_GET_PA, iommu) == errno.EOPNOTSUPP:
        pytest.skip("no CONFIG_IOMMUFD_NOIOMMU")
    ioas = ioas_alloc(iommu)
    map_user(iommu, ioas, NOWHERE, PAGE, iova=0x10000)
    return ioas


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 1, "length": 0}, errno.EOPNOTSUPP),
        ({"__reserved": 1, "length": 0}, errno.EOPNOTSUPP),
        ({"length": 0, "iova": U64_MAX}, errno.EINVAL),
        ({"iova": U64_MAX, "ioas_id": 99}, errno.EOVERFLOW),
        ({"ioas_id": 0}, errno.ENOENT),
        ({"ioas_id": 99, "iova": 0}, errno.ENOENT),
        ({"iova": 0xFFFF}, errno.ENOENT),
        ({"iova": 0x11000}, errno.ENOENT),
        ({"iova": U64_MAX - 1}, errno.ENOENT),
        ({}, errno.EOPNOTSUPP),
        ({"iova": 0x10FFF, "length": U64_MAX}, errno.EOPNOTSUPP),
    ],
)
def test_check(iommu: File, mapped: int, fields: dict[str, int], number: int) -> None:
    with fails(number):
        IOMMU_IOAS_NOIOMMU_GET_PA(iommu, **{"ioas_id": mapped, "iova": 0x10000, "length": PAGE, **fields})


@pytest.mark.parametrize(
    "fields", [{}, {"flags": 1}, {"length": 0}, {"ioas_id": 99}], ids=["good", "flags", "length", "ioas"]
)
def test_without_cap_sys_rawio_is_eperm_before_anything(
    kernel: Backend, iommu: File, mapped: int, fields: dict[str, int]
) -> None:
    with kernel.spawn() as client:
        client.drop_capabilities(CAP_SYS_RAWIO)
        remote = client.receive(iommu)
        with fails(errno.EPERM):
            IOMMU_IOAS_NOIOMMU_GET_PA(remote, **{"ioas_id": mapped, "iova": 0x10000, "length": PAGE, **fields})


@pytest.mark.needs("iommu", "root", "vfio_cdev")
def test_area_in_the_domain_of_an_iommu_is_eopnotsupp(
    kernel: Backend, device: VfioDevice, iommu: File, ioas: int
) -> None:
    buffer = kernel.buffer(PAGE)
    device.attach(ioas)
    map_user(iommu, ioas, buffer.address, PAGE, iova=0)
    with fails(errno.EOPNOTSUPP):
        IOMMU_IOAS_NOIOMMU_GET_PA(iommu, ioas_id=ioas, iova=0, length=PAGE)
