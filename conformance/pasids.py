"""Steps on the PASIDs of mock devices: the four operations of IOMMU_TEST_CMD, and HWPTs that suit them.

As in `conformance.mock` nothing is checked here: an errno reaches the test as OSError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from conformance.mock import mock_domain_flags, mock_replace, run
from conformance.steps import hwpt_alloc, ioas_alloc, place
from uapi import iommufd_test as abi
from uapi.backend import File
from uapi.iommufd import IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID

PASIDS = 1 << abi.MOCK_PASID_WIDTH
#: The PASID that fails on purpose.
FAILING = abi.IOMMU_TEST_PASID_RESERVED


class PasidDevice(NamedTuple):
    """Ids of a mock device with PASIDs; its own requests go to the automatic HWPT `auto`, which is not for PASIDs."""

    ioas: int
    stdev: int
    idev: int
    auto: int


def pasid_device(iommu: File, ioas: int = 0, flags: int = abi.MOCK_FLAGS_DEVICE_PASID) -> PasidDevice:
    """A device on `ioas`, or on a fresh one."""
    ioas = ioas or ioas_alloc(iommu)
    mock = mock_domain_flags(iommu, ioas, flags)
    return PasidDevice(ioas, mock.stdev, mock.idev, mock.hwpt)


def ready(iommu: File, count: int = 1) -> tuple[PasidDevice, list[int]]:
    """A device whose own requests are on a HWPT for PASIDs already, and `count` such HWPTs, that one the first."""
    dev = pasid_device(iommu)
    hwpts = [pasid_hwpt(iommu, dev) for _ in range(count)]
    mock_replace(iommu, dev.stdev, hwpts[0])
    return dev, hwpts


def pasid_hwpt(iommu: File, dev: PasidDevice, ioas: int = 0, flags: int = 0) -> int:
    """A paging HWPT for PASIDs; the id."""
    return hwpt_alloc(iommu, dev.idev, ioas or dev.ioas, IOMMU_HWPT_ALLOC_PASID | flags)


def nest_parent(iommu: File, dev: PasidDevice, flags: int = 0) -> int:
    """A paging HWPT for nesting; the id."""
    return hwpt_alloc(iommu, dev.idev, dev.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT | flags)


def nested(iommu: File, idev: int, parent: int, flags: int = IOMMU_HWPT_ALLOC_PASID, fault_id: int = 0) -> int:
    """A nested HWPT on a parent or in a vIOMMU, for PASIDs unless `flags` say otherwise; the id."""
    data = place(bytes(abi.iommu_hwpt_selftest(iotlb=abi.IOMMU_TEST_IOTLB_DEFAULT))[:4])
    more = {"fault_id": fault_id} if fault_id else {}
    kind = abi.IOMMU_HWPT_DATA_SELFTEST
    return hwpt_alloc(iommu, idev, parent, flags, data_type=kind, data_len=4, data_uptr=data, **more)


def pasid_attach(iommu: File, stdev: int, pasid: int, pt_id: int) -> int:
    """PASID_ATTACH; the id of the HWPT."""
    op = abi.IOMMU_TEST_OP_PASID_ATTACH
    return int(run(iommu, op, stdev, "pasid_attach", pasid=pasid, pt_id=pt_id).pasid_attach.pt_id)


def pasid_replace(iommu: File, stdev: int, pasid: int, pt_id: int) -> int:
    """PASID_REPLACE; the id of the HWPT."""
    op = abi.IOMMU_TEST_OP_PASID_REPLACE
    return int(run(iommu, op, stdev, "pasid_replace", pasid=pasid, pt_id=pt_id).pasid_replace.pt_id)


def pasid_detach(iommu: File, stdev: int, *pasids: int) -> None:
    """PASID_DETACH, each. A device must not go while one of its PASIDs is attached: the kernel loses it."""
    for pasid in pasids:
        run(iommu, abi.IOMMU_TEST_OP_PASID_DETACH, stdev, "pasid_detach", pasid=pasid)


def pasid_check(iommu: File, stdev: int, pasid: int, hwpt: int = 0) -> None:
    """PASID_CHECK_HWPT: the PASID is attached to `hwpt`; 0: to nothing."""
    run(iommu, abi.IOMMU_TEST_OP_PASID_CHECK_HWPT, stdev, "pasid_check", pasid=pasid, hwpt_id=hwpt)


@contextmanager
def attached(iommu: File, stdev: int, pasids: Iterable[int], pt_id: int) -> Iterator[None]:
    """These PASIDs are attached to `pt_id`, and detached at the end whatever happens."""
    pasids = list(pasids)
    try:
        for pasid in pasids:
            pasid_attach(iommu, stdev, pasid, pt_id)
        yield
    finally:
        pasid_detach(iommu, stdev, *pasids)
