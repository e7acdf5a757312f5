"""VFIO_DEVICE_FEATURE: the part that is the same for all devices.

Mirrors `vfio_ioctl_device_feature()` in drivers/vfio/vfio_main.c and `vfio_check_feature()` in include/linux/vfio.h.

Left out: migration and DMA logging. No driver of the model has them, so they are ENOTTY as for plain vfio-pci.
"""

from __future__ import annotations

import errno

from kernel_model.errors import KernelError
from kernel_model.file import SystemCall
from kernel_model.vfio.device import VfioDevice
from uapi.behaviours import has
from uapi.vfio import (
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_MASK,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIGRATION,
    VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET,
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
)

_MINIMUM = 8
_KNOWN = VFIO_DEVICE_FEATURE_MASK | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PROBE
_MIGRATION = (
    VFIO_DEVICE_FEATURE_MIGRATION,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
)


def device_feature(device: VfioDevice, call: SystemCall, arg: int) -> int:
    """EFAULT, EINVAL: the header and its flags. ENOTTY: the device has no such feature. Then the feature's own."""
    header = call.copy_from_user(arg, _MINIMUM)
    argsz = int.from_bytes(header[:4], "little")
    flags = int.from_bytes(header[4:8], "little")
    if argsz < _MINIMUM:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {_MINIMUM}")
    if flags & ~_KNOWN:
        raise KernelError(errno.EINVAL, f"flags {flags:#x}")
    both = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET
    if not flags & VFIO_DEVICE_FEATURE_PROBE and flags & both == both:
        raise KernelError(errno.EINVAL, "GET and SET together are for PROBE")
    feature = flags & VFIO_DEVICE_FEATURE_MASK
    if feature in _MIGRATION:
        raise KernelError(errno.ENOTTY, "the driver cannot migrate the device")
    # Asked of the migration flags, not of the operations: so a device that cannot migrate has it and refuses it.
    if feature == VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 and has(device.kernel.release, "precopy-info-v2"):
        raise KernelError(errno.EINVAL, "the driver has no PRE_COPY")
    return device.device_feature(call, flags, arg + _MINIMUM, argsz - _MINIMUM)


def check_feature(flags: int, argsz: int, supported: int, minimum: int) -> bool:
    """vfio_check_feature(): whether to go on; False ends the call in success, as PROBE does.

    EINVAL: an operation that is not in `supported`, none at all, or data shorter than `minimum` bytes.
    """
    wanted = flags & (VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET)
    if wanted & ~supported:
        raise KernelError(errno.EINVAL, "the feature has no such operation")
    if flags & VFIO_DEVICE_FEATURE_PROBE:
        return False
    if not wanted:
        raise KernelError(errno.EINVAL, "neither GET nor SET")
    if argsz < minimum:
        raise KernelError(errno.EINVAL, f"{argsz} bytes of data, {minimum} are needed")
    return True
