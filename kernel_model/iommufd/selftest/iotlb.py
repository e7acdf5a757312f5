"""MD_CHECK_IOTLB, after drivers/iommu/iommufd/selftest.c: what a nested mock domain still caches."""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.iommu.mock.nested import MockNestedDomain
from kernel_model.iommufd.hwpt import HwptNested
from kernel_model.iommufd.selftest.operations import TestCommand, operation


@operation("IOMMU_TEST_OP_MD_CHECK_IOTLB")
def _md_check_iotlb(ucmd: TestCommand) -> None:
    """ENOENT: no such nested HWPT. EINVAL: not a mock domain; no such word, or it holds something else."""
    domain = ucmd.ctx.objects.get(ucmd.cmd.id, HwptNested).domain
    check = ucmd.cmd.check_iotlb
    if not isinstance(domain, MockNestedDomain):
        raise KernelError(errno.EINVAL, f"HWPT {ucmd.cmd.id} is no mock domain")
    if check.id >= len(domain.iotlb) or domain.iotlb[check.id] != check.iotlb:
        raise KernelError(errno.EINVAL, f"word {check.id} is not {check.iotlb:#x}")
