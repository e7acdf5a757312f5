"""Page requests of devices behind a VT-d unit: the queue that the unit fills, what is refused at once, and the answers.

Mirrors drivers/iommu/intel/prq.c at 7.3. A request that the driver does not like is answered INVALID if it is the last
of its group; the others go to whoever handles the device's page faults (io_pgfault). Addresses must be canonical for a
processor of 48 bits, whatever the unit's first stage has. Left out: giving the queue back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fakedev.machine import Machine
from fakedev.vtd import descriptors as qi
from fakedev.vtd import regs
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.core import IOMMU_NO_PASID, Device
from kernel_model.iommu.intel.dmar import FLPT_DEFAULT_DID, IntelUnit
from kernel_model.iommu.io_pgfault import (
    IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE,
    IOMMU_FAULT_PAGE_REQUEST_PASID_VALID,
    PageRequest,
    report_device_fault,
)
from kernel_model.irq import MSI_ADDRESS, Interrupts
from kernel_model.page_alloc import PageAllocator

if TYPE_CHECKING:
    from kernel_model.iommu.intel.device import DeviceInfo
    from kernel_model.iommu.intel.dmar import IntelUnit

#: The queue has 4096 << _ORDER bytes.
_ORDER = 4
_SIZE = 4096 << _ORDER
_RING_MASK = _SIZE - qi.PRQ_BYTES
#: Set with a PASID, and clients of a fault queue see it (IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID).
_NEEDS_PASID = 1 << 2
_PERM_READ, _PERM_WRITE, _PERM_EXEC, _PERM_PRIV = 1, 2, 4, 8
_VIRTUAL_BITS = 48
_QI_DONE = 2
#: In a flush: everything.
_ALL_PAGES = 52


class PageRequests:
    """The queue of one unit (`iommu->prq`) and its thread. `devices` are those with ATS, by request id."""

    def __init__(self, machine: Machine, pages: PageAllocator, unit: IntelUnit) -> None:
        self._unit = unit
        self._mmio = machine.mmio
        self._words = machine.memory.words
        self._queue = pages.alloc(_SIZE)
        #: `device_rbtree`.
        self.devices: dict[int, Device] = {}
        self._running = self._again = False

    def start(self, interrupts: Interrupts, vector: int) -> None:
        """intel_iommu_enable_prq()."""
        base = self._unit.base
        interrupts.request_irq(vector, self._interrupt)
        self._mmio.write(base + regs.PEDATA, 4, vector)
        self._mmio.write(base + regs.PEADDR, 4, MSI_ADDRESS)
        self._mmio.write(base + regs.PEUADDR, 4, 0)
        self._mmio.write(base + regs.PECTL, 4, 0)
        self._mmio.write(base + regs.PQH, 8, 0)
        self._mmio.write(base + regs.PQT, 8, 0)
        self._mmio.write(base + regs.PQA, 8, self._queue | _ORDER)

    # -- what comes --------------------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        """The thread runs once at a time; an interrupt meanwhile has it run again."""
        self._again = True
        if self._running:
            return
        self._running = True
        try:
            while self._again:
                self._again = False
                self._thread()
        finally:
            self._running = False

    def _thread(self) -> None:
        """prq_event_thread()."""
        base = self._unit.base
        self._mmio.write(base + regs.PRS, 4, regs.PRS_PPR)
        tail = self._mmio.read(base + regs.PQT, 8) & _RING_MASK
        head = self._mmio.read(base + regs.PQH, 8) & _RING_MASK
        while head != tail:
            index = self._queue + head >> 3
            self._handle(self._words[index], self._words[index + 1])
            head = (head + qi.PRQ_BYTES) & _RING_MASK
        self._mmio.write(base + regs.PQH, 8, tail)
        if self._overflowed():
            head = self._mmio.read(base + regs.PQH, 8) & _RING_MASK
            tail = self._mmio.read(base + regs.PQT, 8) & _RING_MASK
            if head == tail:
                self._unit.iopf_queue.discard_partial()
                self._mmio.write(base + regs.PRS, 4, regs.PRS_PRO)

    def _overflowed(self) -> bool:
        return bool(self._mmio.read(self._unit.base + regs.PRS, 4) & regs.PRS_PRO)

    def _handle(self, low: int, high: int) -> None:
        reads, writes = high & qi.PRQ_READ, high & qi.PRQ_WRITE
        address = high & -4096 & (1 << 64) - 1
        sign = address >> _VIRTUAL_BITS - 1
        canonical = sign in (0, (1 << 65 - _VIRTUAL_BITS) - 1)
        privileged = low & qi.PRQ_PRIVILEGED and (reads or writes)
        if not canonical or privileged or (low & qi.PRQ_EXECUTE and reads):
            self._refuse(low, high)
        elif high & qi.PRQ_LAST and not reads and not writes:
            return  # a stop marker, which nobody waits for
        else:
            device = self.devices.get(low >> qi.PRQ_RID_SHIFT & 0xFFFF)
            if device is None:
                self._refuse(low, high)
                return
            try:
                report_device_fault(device, _fault(low, high, address))
            except KernelError:
                return  # it has its answer, or is not the last of its group

    def _refuse(self, low: int, high: int) -> None:
        """handle_bad_prq_event()."""
        if high & qi.PRQ_LAST:
            rid, group = low >> qi.PRQ_RID_SHIFT & 0xFFFF, high >> qi.PRQ_GROUP_SHIFT & qi.PRQ_GROUP_MASK
            self._unit.submit([qi.page_group_response(rid, _pasid(low), group, qi.PGRP_INVALID)])

    # -- what goes ---------------------------------------------------------------------------------------------------

    def respond(self, info: DeviceInfo, fault: PageRequest, code: int) -> None:
        """intel_iommu_page_response(): IOMMU_PAGE_RESP_*, whose numbers are the hardware's."""
        pasid = fault.pasid if fault.flags & IOMMU_FAULT_PAGE_REQUEST_PASID_VALID else None
        self._unit.submit([qi.page_group_response(info.rid, pasid, fault.grpid, code)])

    def drain(self, info: DeviceInfo, pasid: int) -> None:
        """intel_iommu_drain_pasid_prq(): nothing of the device's PASID is on the way any more, either way.

        Its entry is not present and the caches have forgotten it. What is in the queue was handled when it came.
        """
        if not info.iopf_refcount:
            return
        base, unit = self._unit.base, self._unit
        if self._mmio.read(base + regs.PQH, 8) != self._mmio.read(base + regs.PQT, 8):
            raise KernelBug("page requests in the queue that no interrupt told of")
        did = FLPT_DEFAULT_DID if info.domain is None else info.domain.domain_id(unit)
        fence = _QI_DONE << qi.WAIT_DATA_SHIFT | qi.WAIT_FN | qi.WAIT_TYPE, 0
        if pasid == IOMMU_NO_PASID:
            iotlb = qi.iotlb(did, 0, 0, qi.DOMAIN)
            device_tlb = qi.device_tlb(info.rid, info.pfsid, 0, _ALL_PAGES, info.ats_qdep)
        else:
            iotlb = qi.pasid_iotlb(did, pasid, 0, 0, qi.PIOTLB_PASID)
            device_tlb = qi.pasid_device_tlb(info.rid, info.pfsid, pasid, 0, _ALL_PAGES, info.ats_qdep)
        while True:
            unit.submit([fence, iotlb, device_tlb], drain=True)
            if not self._overflowed():
                break
            self._interrupt()


def _pasid(low: int) -> int | None:
    return low >> qi.PRQ_PASID_SHIFT & 0xF_FFFF if low & qi.PRQ_PP else None


def _fault(low: int, high: int, address: int) -> PageRequest:
    """intel_prq_report()."""
    pasid = _pasid(low)
    flags = IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE if high & qi.PRQ_LAST else 0
    if pasid is not None:
        flags |= IOMMU_FAULT_PAGE_REQUEST_PASID_VALID | _NEEDS_PASID
    perm = (_PERM_READ if high & qi.PRQ_READ else 0) | (_PERM_WRITE if high & qi.PRQ_WRITE else 0)
    perm |= (_PERM_EXEC if low & qi.PRQ_EXECUTE else 0) | (_PERM_PRIV if low & qi.PRQ_PRIVILEGED else 0)
    group = high >> qi.PRQ_GROUP_SHIFT & qi.PRQ_GROUP_MASK
    return PageRequest(flags, pasid or 0, group, perm, address)
