"""The machines that `--on vm` boots: what QEMU is told, and whose kernel it takes."""

from __future__ import annotations

from dataclasses import dataclass

from iommulab.errors import UserError

#: The suite's DMA engine. Its own mask would be 28 bits.
EDU = "-device edu,addr=0x10,dma_mask=0xffffffffffffffff"
#: A machine adds {scalable}, the name of a property that QEMU 11.1 changed.
VTD = "-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on,aw-bits=48"


@dataclass(frozen=True, slots=True)
class GuestMachine:
    """QEMU's options of a machine's devices, and what its kernel is told beside the arguments of every guest."""

    options: str
    arguments: str = ""
    architecture: str = "x86_64"


MACHINES = {
    "q35-vtd-legacy": GuestMachine(f"{VTD},{{scalable}}=off {EDU}"),
    # Scalable mode, with a second stage; with a first stage instead of it.
    "q35-vtd": GuestMachine(f"{VTD},{{scalable}}=on {EDU}"),
    "q35-vtd-fs": GuestMachine(f"{VTD},{{scalable}}=on,x-flts=on {EDU}"),
    # Two functions that no access control keeps apart: one IOMMU group.
    "q35-vtd-multifunction": GuestMachine(
        f"{VTD},{{scalable}}=off -device edu,addr=0x10.0,multifunction=on,dma_mask=0xffffffffffffffff "
        "-device edu,addr=0x10.1,dma_mask=0xffffffffffffffff"
    ),
    # No IOMMU, and VFIO gives its devices away nevertheless.
    "q35-noiommu": GuestMachine(f"-machine q35 {EDU}", "vfio.enable_unsafe_noiommu_mode=1"),
    # No IOMMU: before 6.17 the kernel's mock driver has no devices beside a real one.
    "mock": GuestMachine("-machine q35"),
    # Both stages of translation, which is what QEMU's SMMU has by default from 9.1 on.
    "virt-smmuv3": GuestMachine(f"-machine virt,gic-version=3,its=on,iommu=smmuv3 {EDU}", architecture="arm64"),
}


def find_machine(name: str) -> GuestMachine:
    """The machine of that name. UserError for one that QEMU is not known to have."""
    if name not in MACHINES:
        raise UserError(f"--on vm knows no machine {name!r}; it knows: {', '.join(MACHINES)}")
    return MACHINES[name]
