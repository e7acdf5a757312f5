"""`iommulab.connect()`: the real kernel where it can be had, else the model."""

from __future__ import annotations

from uapi.backend import DEV_IOMMU, Backend
from uapi.linux import LinuxBackend


def connect(on: str = "auto", *, machine: str = "q35-vtd-legacy", version: str = "7.3") -> Backend:
    """A kernel to talk to: "linux", "model", or "auto", which is the real one where /dev/iommu opens.

    `machine` and `version` are the model's. Raises OSError (ENOENT, EACCES, EPERM) for "linux" where /dev/iommu does
    not open, and ValueError for another `on`, or a machine or release that the model does not know.
    """
    if on not in ("auto", "linux", "model"):
        raise ValueError(f"on={on!r}: expected 'auto', 'linux' or 'model'")
    if on != "model":
        linux = LinuxBackend()
        try:
            linux.open(DEV_IOMMU).close()
            return linux
        except OSError:
            if on == "linux":
                raise
    # The model is loaded only where it is used: a guest has no need of it.
    from kernel_model.kernel import Kernel

    return Kernel(machine, version)
