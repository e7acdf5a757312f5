"""QEMU's Arm board `virt` with `iommu=smmuv3`, as Linux sees it: an SMMUv3, a GIC with a translation service for MSIs.

The registers of the SMMU say what QEMU 10.0.2's say. RAM starts at 1 GiB; below it are registers. Functions are at the
same addresses with the same ids and BARs as in `iommulab conformance --on vm`; only `edu` does anything.
"""

from __future__ import annotations

from fakedev.endpoints.edu import Edu
from fakedev.machine import SMMU_BASE, Machine
from fakedev.memory import PhysicalMemory
from fakedev.pci import PciFunction
from fakedev.smmuv3.regs import QEMU_VIRT, Features

#: Where the board has its RAM, and its interrupt translation service.
RAM_START, RAM_SIZE = 0x4000_0000, 0x4000_0000
ITS_BASE = 0x0808_0000


def _board(name: str, features: Features) -> Machine:
    memory = PhysicalMemory(RAM_SIZE, RAM_START, address_bits=features.oas)
    return Machine(name, memory, its=ITS_BASE)


def virt_smmuv3() -> Machine:
    box = _board("virt-smmuv3", QEMU_VIRT)
    unit = box.add_smmu(SMMU_BASE, QEMU_VIRT)
    functions = [
        PciFunction("0000:00:00.0", (0x1B36, 0x0008), 0x060000, subsystem=(0x1AF4, 0x1100)),
        Edu("0000:00:10.0", bar_address=0x1010_0000),
    ]
    for function in functions:
        box.add(function, unit)
    return box
