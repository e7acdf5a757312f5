"""What the hardware in front of the suite's device leaves to a client: the end of the aperture, the window of
interrupts, and what HWPTs can be.

A kernel is asked which IOMMU it has, and what its registers say; what follows from that is here as the drivers' source
has it (compute_vasz_lg2_fs() and -_ss() of drivers/iommu/intel/iommu.c, arm_smmu_domain_finalise()). A test that takes
the fixture `layout` holds on any of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from conformance.offers import bound
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
)

#: Set while tests are collected.
LAYOUT = pytest.StashKey["Layout | None"]()


@dataclass(frozen=True)
class Layout:
    """[0, last] is the aperture; [msi_start, msi_last] a device may not be given, as interrupts go there.

    `write_only`: a mapping can be written to without being readable. `dirty`: what is written to can be tracked.
    `snoop_control`: devices' no-snoop requests can be made to snoop.
    """

    last: int
    msi_start: int
    msi_last: int
    write_only: bool
    dirty: bool
    snoop_control: bool

    @property
    def aperture(self) -> list[tuple[int, int]]:
        """The ranges of an IOAS with a domain for the device, but without the device."""
        return [(0, self.last)]

    @property
    def attached(self) -> list[tuple[int, int]]:
        """The ranges of an IOAS that the device is attached to."""
        return [(0, self.msi_start - 1), (self.msi_last + 1, self.last)]


def vtd_first_stage(ecap: int) -> bool:
    """Whether ordinary domains are of the first stage: the unit has one, in scalable mode."""
    return bool(ecap >> 43 & 1 and ecap >> 47 & 1)


def vtd_last(cap: int, ecap: int) -> int:
    """The end of the aperture of an ordinary domain behind a VT-d unit with these registers."""
    mgaw, sagaw = (cap >> 16 & 0x3F) + 1, cap >> 8 & 0x1F
    if vtd_first_stage(ecap):  # canonical addresses, the lower half of them
        widest = 57 if mgaw > 48 and cap >> 60 & 1 else 48
        return (1 << min(widest, mgaw) - 1) - 1
    for width, smaller, levels in ((57, 48, 3), (48, 39, 2), (39, 30, 1)):
        if mgaw > smaller and sagaw >> levels:
            return (1 << min(width, mgaw)) - 1
    raise AssertionError(f"no address width in cap {cap:#x}")


def find_layout(backend: Backend) -> Layout | None:
    """What the device in front of the suite leaves; None without one, or behind an IOMMU that is none of these."""
    found: list[Layout] = []

    def ask(iommu: File, dev_id: int) -> None:
        buffer = backend.buffer(4096)
        reply = IOMMU_GET_HW_INFO(iommu, dev_id=dev_id, data_len=64, data_uptr=buffer.address)
        if reply.out_data_type == IOMMU_HW_INFO_TYPE_INTEL_VTD:
            cap, ecap = struct.unpack_from("<QQ", buffer.view, 8)
            found.append(
                Layout(
                    vtd_last(cap, ecap),
                    0xFEE0_0000,
                    0xFEEF_FFFF,
                    write_only=not vtd_first_stage(ecap),
                    dirty=bool(ecap >> 43 & ecap >> 45 & ecap >> 48 & 1),
                    snoop_control=bool(ecap >> 7 & 1),
                )
            )
        elif reply.out_data_type == IOMMU_HW_INFO_TYPE_ARM_SMMUV3:
            dirty = bool(reply.out_capabilities & IOMMU_HW_CAP_DIRTY_TRACKING)
            found.append(
                Layout((1 << 48) - 1, 0x800_0000, 0x80F_FFFF, write_only=False, dirty=dirty, snoop_control=False)
            )
        buffer.close()

    bound(backend, ask)
    return found[0] if found else None
