"""IOMMU_TEST_CMD, after the iommufd half of drivers/iommu/iommufd/selftest.c.

The mock driver itself is in `iommu.mock`. Importing this package puts the operations of its files on the table. The
kernel is one with CONFIG_IOMMUFD_TEST on every machine.
"""

from kernel_model.iommufd.selftest import accesses, checks, devices, dirty, dmabuf, faults, iotlb, pasid, viommu

__all__ = ["accesses", "checks", "devices", "dirty", "dmabuf", "faults", "iotlb", "pasid", "viommu"]
