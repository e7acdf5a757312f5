"""The machines that have names.

`bare` is memory and nothing else; so is `mock`, the machine for the kernel's mock IOMMU driver, whose devices are made
by its clients. The others are in the files of this folder.
"""

from __future__ import annotations

from collections.abc import Callable

from fakedev.machine import Machine
from fakedev.machines.q35 import q35_noiommu, q35_vtd, q35_vtd_fs, q35_vtd_legacy, q35_vtd_max, q35_vtd_multifunction
from fakedev.machines.virt import virt_smmuv3, virt_smmuv3_max


def _bare() -> Machine:
    return Machine("bare")


def _mock() -> Machine:
    return Machine("mock")


#: Machines by name.
MACHINES: dict[str, Callable[[], Machine]] = {
    "bare": _bare,
    "mock": _mock,
    "q35-noiommu": q35_noiommu,
    "q35-vtd": q35_vtd,
    "q35-vtd-fs": q35_vtd_fs,
    "q35-vtd-legacy": q35_vtd_legacy,
    "q35-vtd-max": q35_vtd_max,
    "q35-vtd-multifunction": q35_vtd_multifunction,
    "virt-smmuv3": virt_smmuv3,
    "virt-smmuv3-max": virt_smmuv3_max,
}


def machine(name: str) -> Machine:
    """A new machine of that name. ValueError for a name that is not in MACHINES."""
    try:
        build = MACHINES[name]
    except KeyError:
        raise ValueError(f"no machine {name!r}; there are {', '.join(sorted(MACHINES))}") from None
    return build()
