"""Declared ioctls that the model has no handler for, and why: each is answered ENOTTY, as by a kernel without them.

`tests/kernel_model/test_unserved.py` holds that every declared ioctl is served or stands here.
"""

from __future__ import annotations

_GROUPS = "VFIO's groups and containers are to come; an iommufd and the character device stand in"
_POWER = "of IBM POWER; the model is a PC"
_GRAPHICS = "of mediated graphics devices; vfio-pci has none either"

UNSERVED = {
    "VFIO_GROUP_GET_STATUS": _GROUPS,
    "VFIO_GROUP_SET_CONTAINER": _GROUPS,
    "VFIO_GROUP_UNSET_CONTAINER": _GROUPS,
    "VFIO_GROUP_GET_DEVICE_FD": _GROUPS,
    "VFIO_IOMMU_DIRTY_PAGES": "of a VFIO container; an iommufd refuses it, too",
    "VFIO_MIG_GET_PRECOPY_INFO": "of a migration file, which needs a device that can migrate; vfio-pci's cannot",
    "VFIO_DEVICE_QUERY_GFX_PLANE": _GRAPHICS,
    "VFIO_DEVICE_GET_GFX_DMABUF": _GRAPHICS,
    "VFIO_EEH_PE_OP": _POWER,
    "VFIO_IOMMU_ENABLE": _POWER,
    "VFIO_IOMMU_DISABLE": _POWER,
    "VFIO_IOMMU_SPAPR_REGISTER_MEMORY": _POWER,
    "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY": _POWER,
    "VFIO_IOMMU_SPAPR_TCE_CREATE": _POWER,
    "VFIO_IOMMU_SPAPR_TCE_GET_INFO": _POWER,
    "VFIO_IOMMU_SPAPR_TCE_REMOVE": _POWER,
}
