"""QEMU's q35: the virtual machines that the suite runs real x86 kernels in, as Linux sees them.

Functions are at the same addresses with the same ids and BARs as in `iommulab conformance --on vm`; only `edu` does
anything, the others are there so that IOMMU groups have the same numbers. `q35-vtd-legacy` is QEMU with
`intel-iommu,x-scalable-mode=off` and `edu`, `q35-vtd` the same with scalable mode (a second stage only), `q35-vtd-fs`
with `x-flts=on` besides (a first stage only); `q35-vtd-multifunction` is the first with two functions of `edu` in one
slot, which makes them one IOMMU group; `q35-noiommu` has no IOMMU. `q35-vtd-max` is like none of QEMU's: its unit has
everything that `fakedev/vtd` has, and there is a DMA engine with PASIDs, ATS and PRI.
"""

from __future__ import annotations

from collections.abc import Sequence

from fakedev.endpoints.dsa import Dsa
from fakedev.endpoints.edu import Edu
from fakedev.machine import (
    VTD_FIRST_STAGE_CAP,
    VTD_FIRST_STAGE_ECAP,
    VTD_LEGACY_CAP,
    VTD_LEGACY_ECAP,
    VTD_SCALABLE_CAP,
    VTD_SCALABLE_ECAP,
    Machine,
)
from fakedev.pci import IO, MEM32, MEM64, PCI_MULTIFUNCTION, Bar, PciFunction
from fakedev.vtd.features import SCALABLE


def _virtio(slot: int, device_id: int, class_code: int, line: int) -> PciFunction:
    """An inert virtio function as virtme-ng's guest has it."""
    position = 0 if slot == 1 else slot - 2
    memory_slot = 0 if slot == 1 else slot - 1
    return PciFunction(
        f"0000:00:{slot:02x}.0",
        (0x1AF4, device_id),
        class_code,
        subsystem=(0x1AF4, device_id - 0x1000),
        bars=[Bar(64, IO), Bar(0x1000, MEM32), None, None, Bar(0x4000, MEM64, prefetchable=True)],
        addresses=[0xC000 + 0x40 * position, 0xFEB0_0000 + 0x1000 * memory_slot, 0, 0, 0xFEBE_4000 + 0x4000 * position],
        interrupt_pin=1,
        interrupt_line=line,
        command=0x507,
    )


def _edu() -> Edu:
    return Edu("0000:00:10.0", bar_address=0xFEA0_0000, interrupt_line=10, command=0x103)


def q35_vtd_legacy() -> Machine:
    return _q35_vtd("q35-vtd-legacy", [_edu()])


def q35_vtd() -> Machine:
    return _q35_vtd("q35-vtd", [_edu()], VTD_SCALABLE_CAP, VTD_SCALABLE_ECAP)


def q35_vtd_fs() -> Machine:
    return _q35_vtd("q35-vtd-fs", [_edu()], VTD_FIRST_STAGE_CAP, VTD_FIRST_STAGE_ECAP)


def q35_vtd_max() -> Machine:
    dsa = Dsa("0000:00:11.0", 0xFE90_0000, 0xFE92_0000, command=0x103)
    return _q35_vtd("q35-vtd-max", [_edu(), dsa], SCALABLE.cap, SCALABLE.ecap)


def q35_vtd_multifunction() -> Machine:
    settings = {"interrupt_line": 10, "command": 0x103}
    first = Edu("0000:00:10.0", bar_address=0xFE90_0000, header_type=PCI_MULTIFUNCTION, **settings)
    return _q35_vtd("q35-vtd-multifunction", [first, Edu("0000:00:10.1", bar_address=0xFEA0_0000, **settings)])


def _q35_vtd(
    name: str, devices: Sequence[PciFunction], cap: int = VTD_LEGACY_CAP, ecap: int = VTD_LEGACY_ECAP
) -> Machine:
    box = Machine(name)
    unit = box.add_vtd(cap=cap, ecap=ecap)
    qemu = (0x1AF4, 0x1100)
    functions = [
        PciFunction("0000:00:00.0", (0x8086, 0x29C0), 0x060000, subsystem=qemu, command=0x103),
        _virtio(1, 0x1009, 0x000200, 10),
        PciFunction(
            "0000:00:02.0",
            (0x8086, 0x25AB),
            0x088000,
            subsystem=qemu,
            bars=[Bar(16)],
            addresses=[0xFEB0_1000],
            command=0x103,
        ),
        _virtio(3, 0x1003, 0x078000, 11),
        *(_virtio(slot, 0x1003, 0x078000, 11 if slot in (6, 7) else 10) for slot in range(4, 9)),
        *devices,
        PciFunction(
            "0000:00:1f.0",
            (0x8086, 0x2918),
            0x060100,
            revision=2,
            subsystem=qemu,
            header_type=PCI_MULTIFUNCTION,
            command=0x103,
        ),
        PciFunction(
            "0000:00:1f.2",
            (0x8086, 0x2922),
            0x010601,
            revision=2,
            subsystem=qemu,
            header_type=PCI_MULTIFUNCTION,
            bars=[None, None, None, None, Bar(32, IO), Bar(0x1000)],
            addresses=[0, 0, 0, 0, 0xC200, 0xFEB0_8000],
            interrupt_pin=1,
            interrupt_line=10,
            command=0x107,
        ),
        PciFunction(
            "0000:00:1f.3",
            (0x8086, 0x2930),
            0x0C0500,
            revision=2,
            subsystem=qemu,
            header_type=PCI_MULTIFUNCTION,
            bars=[None, None, None, None, Bar(64, IO)],
            addresses=[0, 0, 0, 0, 0x700],
            interrupt_pin=1,
            interrupt_line=10,
            command=0x103,
        ),
    ]
    for function in functions:
        box.add(function, unit)
    return box


def q35_noiommu() -> Machine:
    """No IOMMU, and VFIO gives its devices away nevertheless."""
    box = Machine("q35-noiommu", kernel_arguments="vfio.enable_unsafe_noiommu_mode=1")
    box.add(_edu())
    return box
