"""QEMU's Arm board `virt` with `iommu=smmuv3`, as Linux sees it: an SMMUv3, and a GIC whose translation service (ITS)
takes MSIs.

Functions of `virt-smmuv3` are at the same addresses with the same ids and BARs as in `iommulab conformance --on vm`,
and the registers of its SMMU say what QEMU 10.0.2's say; only `edu` does anything. `virt-smmuv3-max` is the same board
with an SMMU that has everything that `fakedev/smmuv3` has, and with two DMA engines that have PASIDs: one also ATS and
PRI; of the other, in the manner of KunPeng 920's, the firmware says that its requests may stall. No QEMU is like it.
RAM starts at 1 GiB; below it are registers, and from 512 GiB on BARs of 64 bits.
"""

from __future__ import annotations

from fakedev.endpoints.dsa import MMIO_SIZE, Dsa
from fakedev.endpoints.edu import Edu
from fakedev.machine import SMMU_BASE, Machine
from fakedev.memory import PhysicalMemory
from fakedev.pci import IO, MEM32, MEM64, Bar, PciFunction
from fakedev.smmuv3.regs import QEMU_VIRT, Features

#: Where the board has its RAM, and its interrupt translation service.
RAM_START, RAM_SIZE = 0x4000_0000, 0x4000_0000
ITS_BASE, ITS_SIZE = 0x0808_0000, 0x2_0000
#: Where it has BARs, and what its device tree calls the host bridge that leads there.
BARS, BARS_END, _BARS_64 = 0x1000_0000, 0x3EFF_0000, 0x80_0000_0000
HOST_BRIDGE = "4010000000.pcie"
#: An SMMU with everything.
EVERYTHING = Features(sev=True, small_tables=True)
#: The firmware says that no device bypasses the caches, without which Linux gives out no vIOMMUs. QEMU's says nothing:
#: the kernel of a guest that is to be compared has to be built to believe it.
CANWBS = "canwbs"


def _virtio_serial() -> PciFunction:
    """The inert virtio function that the guest talks by, as its driver has left it."""
    return PciFunction(
        "0000:00:01.0",
        (0x1AF4, 0x1003),
        0x078000,
        subsystem=(0x1AF4, 0x0003),
        bars=[Bar(64, IO), Bar(0x1000, MEM32), None, None, Bar(0x4000, MEM64, prefetchable=True)],
        addresses=[0x1000, BARS + 0x10_0000, 0, 0, _BARS_64],
        interrupt_pin=1,
        interrupt_line=18,
        command=0x407,
    )


def virt_smmuv3() -> Machine:
    return _board("virt-smmuv3", QEMU_VIRT)


def virt_smmuv3_max() -> Machine:
    first, second = (_BARS_64 + n * 0x10_0000 for n in (1, 2))
    asking = Dsa("0000:00:11.0", first - MMIO_SIZE, first)
    return _board("virt-smmuv3-max", EVERYTHING, asking, Dsa("0000:00:12.0", second - MMIO_SIZE, second, ats=False))


def _board(name: str, features: Features, *more: PciFunction) -> Machine:
    memory = PhysicalMemory(RAM_SIZE, RAM_START, address_bits=features.oas)
    box = Machine(name, memory, its=ITS_BASE, host_bridge=HOST_BRIDGE)
    unit = box.add_smmu(SMMU_BASE, features)
    functions = [
        PciFunction("0000:00:00.0", (0x1B36, 0x0008), 0x060000, subsystem=(0x1AF4, 0x1100)),
        _virtio_serial(),
        Edu("0000:00:10.0", bar_address=BARS),
        *more,
    ]
    for function in functions:
        stalls = isinstance(function, Dsa) and function.port.ats is None
        box.add(function, unit, [CANWBS, "dma-can-stall"] if stalls else [CANWBS])
    return box
