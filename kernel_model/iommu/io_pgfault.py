"""Page requests of devices, from the driver to whoever handles them, after drivers/iommu/io-pgfault.c at 7.3.

A device asks for pages in groups: requests with one group id, of which the last says so. The group goes to the handler
of the domain that the device, or its PASID, is attached to, who answers it once, as a whole.

Left out: the list of groups whose answer is outstanding (iommufd's handler takes each off it at once), and flushing (no
request is ever under way between a driver and a handler).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from kernel_model.errors import KernelBug, KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.iommu import core

#: Flags of a page request.
IOMMU_FAULT_PAGE_REQUEST_PASID_VALID, IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE = 1, 2

#: Answers.
IOMMU_PAGE_RESP_SUCCESS, IOMMU_PAGE_RESP_INVALID, IOMMU_PAGE_RESP_FAILURE = 0, 1, 0xF


class PageRequest(NamedTuple):
    """`struct iommu_fault_page_request`: the device wants the page of `addr`."""

    flags: int
    pasid: int
    grpid: int
    perm: int
    addr: int


class FaultParam:
    """`struct iommu_fault_param`: a device that may fault."""

    __slots__ = ("partial",)

    def __init__(self) -> None:
        #: Requests of groups whose last one has not come, oldest first.
        self.partial: list[PageRequest] = []


class IopfQueue:
    """`struct iopf_queue`: the devices whose requests come by one queue of the hardware."""

    __slots__ = ("devices",)

    def __init__(self) -> None:
        self.devices: list[core.Device] = []

    def discard_partial(self) -> None:
        """iopf_queue_discard_partial(): the hardware lost requests, perhaps the last ones of groups."""
        for device in self.devices:
            if device.fault_param is not None:
                device.fault_param.partial.clear()


class IopfGroup:
    """`struct iopf_group`: requests that are answered together, in the order in which they came."""

    __slots__ = ("cookie", "device", "faults", "handle")

    def __init__(self, device: core.Device, handle: core.AttachHandle, faults: list[PageRequest]) -> None:
        self.device = device
        #: What the device was attached to when it faulted.
        self.handle = handle
        self.faults = faults
        #: The handler's own name for it.
        self.cookie = 0


def iopf_queue_add_device(queue: IopfQueue, device: core.Device) -> None:
    """Requests of the device are taken from now on. ENOMEM."""
    if device.fault_param is not None:
        raise KernelBug(f"{device.name} is in the queue")
    if injecting:
        kmalloc("struct iommu_fault_param")
    device.fault_param = FaultParam()
    queue.devices.append(device)


def iopf_queue_remove_device(queue: IopfQueue, device: core.Device) -> None:
    """No more; what came of unfinished groups is forgotten."""
    if device.fault_param is None:
        raise KernelBug(f"{device.name} is not in the queue")
    device.fault_param = None
    queue.devices.remove(device)


def _find_fault_handler(device: core.Device, fault: PageRequest) -> core.AttachHandle | None:
    """What the request is for. A PASID that nobody attached is the guest's own, where the device's own domain is
    nested and the guest has the table of PASIDs."""
    if device.group is None or device.iommu is None:
        return None
    try:
        if not fault.flags & IOMMU_FAULT_PAGE_REQUEST_PASID_VALID:
            handle = core.attach_handle_get(device.group)
        elif fault.pasid in device.group.pasid_array or not device.iommu.user_pasid_table:
            handle = core.attach_handle_get(device.group, fault.pasid)
        else:
            handle = core.attach_handle_get(device.group, core.IOMMU_NO_PASID, core.IOMMU_DOMAIN_NESTED)
    except KernelError:
        return None
    return handle if handle.domain is not None and handle.domain.iopf_handler is not None else None


def report_device_fault(device: core.Device, fault: PageRequest) -> None:
    """iommu_report_device_fault(): a driver has a request of `device`.

    EINVAL: nobody handles it, and the device has its answer, INVALID. ENOMEM: it is not the last of its group, and is
    lost. A whole group for which there is no memory is answered FAILURE, without an error here.
    """
    handle = _find_fault_handler(device, fault)
    if handle is None:
        _page_response(device, fault, IOMMU_PAGE_RESP_INVALID)
        raise KernelError(errno.EINVAL, f"nobody handles page requests of {device.name}")
    param = device.fault_param
    if param is None or handle.domain is None or handle.domain.iopf_handler is None:
        raise KernelBug(f"{device.name} faults without being in the queue")
    if not fault.flags & IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE:
        if injecting:
            kmalloc("struct iopf_fault")
        param.partial.append(fault)
        return
    if injecting:
        try:
            kmalloc("struct iopf_group")
        except KernelError:
            param.partial = [other for other in param.partial if other.grpid != fault.grpid]
            _page_response(device, fault, IOMMU_PAGE_RESP_FAILURE)
            return
    faults = [other for other in param.partial if other.grpid == fault.grpid]
    param.partial = [other for other in param.partial if other.grpid != fault.grpid]
    handle.domain.iopf_handler(IopfGroup(device, handle, [*faults, fault]))


def iopf_group_response(group: IopfGroup, code: int) -> None:
    """Answer the group at its device: IOMMU_PAGE_RESP_*."""
    _page_response(group.device, group.faults[-1], code)


def _page_response(device: core.Device, fault: PageRequest, code: int) -> None:
    if device.iommu is not None:
        device.iommu.page_response(device, fault, code)
