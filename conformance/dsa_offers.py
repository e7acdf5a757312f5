"""What a kernel's DSA-like devices offer to a test: probes behind `@pytest.mark.needs(...)`, and the choice of one.

A machine may have several of them: with ATS and page requests, or without both, for an IOMMU that lets requests wait.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from conformance.drivers.dsa import dsa_functions
from conformance.drivers.vfio import VfioDevice
from conformance.steps import answer, hwpt_alloc, ioas_alloc, place
from uapi.backend import DEV_IOMMU, Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_GET_HW_INFO,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HWPT_FAULT_ID_VALID,
    iommu_hw_info_arm_smmuv3,
)

_EXT_CAPS, _ATS = 0x100, 0x0F
_IDR0_STALL_MODEL_SHIFT, _NEVER = 24, 1
#: Asks a bound device: None, or what is missing.
Ask = Callable[[VfioDevice, File], "str | None"]


def has_ats(device: VfioDevice) -> bool:
    """Whether the configuration space that VFIO shows has the ATS capability."""
    at = _EXT_CAPS
    while at:
        header = device.config_read(at, 4)
        if header & 0xFFFF == _ATS:
            return True
        at = header >> 20
    return False


def max_pasids(device: VfioDevice, iommu: File) -> int:
    """How many PASIDs the device has behind its IOMMU; 0 for none."""
    log2 = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_max_pasid_log2
    return 1 << log2 if log2 else 0


def lacks_stalls(device: VfioDevice, iommu: File) -> str | None:
    """Why an SMMUv3 lets no request of the device wait. That the firmware lets this device is taken for granted."""
    where = place(bytes(40))
    if IOMMU_GET_HW_INFO(iommu, dev_id=device.devid, data_len=40, data_uptr=where).out_data_type != (
        IOMMU_HW_INFO_TYPE_ARM_SMMUV3
    ):
        return "no SMMUv3"
    if iommu_hw_info_arm_smmuv3.from_address(where).idr[0] >> _IDR0_STALL_MODEL_SHIFT & 3 == _NEVER:
        return "the SMMU does not stall"
    return "a device with ATS is not to stall" if has_ats(device) else None


def lacks_page_requests(device: VfioDevice, iommu: File) -> str | None:
    """Why no page request of the device reaches a client."""
    kind = IOMMU_GET_HW_INFO(iommu, dev_id=device.devid).out_data_type
    if kind == IOMMU_HW_INFO_TYPE_ARM_SMMUV3:
        return "the SMMUv3 driver takes no page requests"
    if not has_ats(device):
        return "the device has no ATS"
    reply = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    with device.kernel.adopt(reply.out_fault_fd):
        ioas = ioas_alloc(iommu)
        hwpt = hwpt_alloc(iommu, device.devid, ioas, IOMMU_HWPT_FAULT_ID_VALID, fault_id=reply.out_fault_id)
        refused = answer(device.attach, hwpt)
        return f"page requests are not enabled ({errno.errorcode[refused]})" if refused else None


def lacks_waiting(device: VfioDevice, iommu: File) -> str | None:
    """Why no request of the device ever waits for its client."""
    stalls = lacks_stalls(device, iommu)
    return None if stalls is None else lacks_page_requests(device, iommu)


def find_dsa(backend: Backend, ask: Ask | None = None) -> tuple[str | None, str]:
    """The address of the first DSA that lacks nothing, None if there is none; and what the last one lacks."""
    missing = "no DSA-like device (PCI 8086:0b25)"
    for address in dsa_functions(backend):
        try:
            with VfioDevice(backend, address) as device, backend.open(DEV_IOMMU) as iommu:
                device.bind(iommu)
                found = ask(device, iommu) if ask is not None else None
        except OSError as error:
            found = f"the device cannot be asked ({errno.errorcode.get(error.errno or 0, error.errno)})"
        if found is None:
            return address, ""
        missing = found
    return None, missing


def _probe(ask: Ask | None) -> Callable[[Backend], str | None]:
    def probe(backend: Backend) -> str | None:
        address, missing = find_dsa(backend, ask)
        return missing if address is None else None

    return probe


def lacks_pasids(device: VfioDevice, iommu: File) -> str | None:
    return None if max_pasids(device, iommu) else "no PASIDs"


def lacks_ats(device: VfioDevice, iommu: File) -> str | None:
    return None if has_ats(device) else "the device has no ATS"


DSA_PROBES = {
    "dsa": _probe(None),
    "pasid": _probe(lacks_pasids),
    "ats": _probe(lacks_ats),
    "stall": _probe(lacks_stalls),
    "pri": _probe(lacks_page_requests),
    "waiting_dma": _probe(lacks_waiting),
}
