"""Address spaces for a device with PASIDs: an IOAS, a HWPT on it and a few pages, at the same IOVAs in each.

RECORDS is one page of the client's for completion records, mapped in all of them; NAME tells whose a space is; what a
device writes goes to TARGET; MORE, four pages, is mapped in none until a test maps it.
"""

from __future__ import annotations

from conformance.drivers.dsa import HARDWARE, MOVE, ON_WRITE, PAGE_FAULT, SUCCESS, TRANSLATION, WQ_BLOCK, Dsa, Queue
from conformance.mock import fault_queue
from conformance.steps import PAGE, RW, hwpt_alloc, ioas_alloc, map_user, unmap
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_FAULT_ID_VALID

RECORDS, TARGET, NAME, MORE = 0x10_0000, 0x10_1000, 0x10_2000, 0x20_0000
#: What a device says of a request that was refused: without ATS; with ATS, no such page; and no translations at all.
REFUSED = (HARDWARE, PAGE_FAULT, TRANSLATION)


class Space:
    """One of them, on the HWPT of these flags; attached to nothing."""

    def __init__(
        self,
        kernel: Backend,
        iommu: File,
        dev_id: int,
        name: bytes,
        records: Buffer,
        flags: int = IOMMU_HWPT_ALLOC_PASID,
        **fields: int,
    ) -> None:
        self.iommu, self.name = iommu, name
        #: TARGET, NAME, and the four of MORE.
        self.pages: Buffer = kernel.buffer(6 * PAGE)
        self.pages.view[PAGE : PAGE + 8] = name * 8
        self.ioas = ioas_alloc(iommu)
        map_user(iommu, self.ioas, records.address, PAGE, RECORDS)
        map_user(iommu, self.ioas, self.pages.address, PAGE, TARGET)
        map_user(iommu, self.ioas, self.pages.address + PAGE, PAGE, NAME)
        self.hwpt = hwpt_alloc(iommu, dev_id, self.ioas, flags, **fields)

    @property
    def target(self) -> bytes:
        """The first 8 bytes of TARGET."""
        return bytes(self.pages.view[:8])

    def map_more(self, index: int = 0, count: int = 1, prot: int = RW) -> int:
        """Map pages of MORE; the IOVA of the first."""
        iova = MORE + index * PAGE
        map_user(self.iommu, self.ioas, self.pages.address + (2 + index) * PAGE, count * PAGE, iova, prot)
        return iova

    def unmap_more(self, index: int = 0, count: int = 1) -> None:
        unmap(self.iommu, self.ioas, MORE + index * PAGE, count * PAGE)

    def more(self, index: int = 0, count: int = 8, offset: int = 0) -> bytes:
        """Bytes of a page of MORE."""
        start = (2 + index) * PAGE + offset
        return bytes(self.pages.view[start : start + count])

    def set_more(self, data: bytes, index: int = 0, offset: int = 0) -> None:
        start = (2 + index) * PAGE + offset
        self.pages.view[start : start + len(data)] = data


class PasidFaults:
    """A fault queue and a space that reports to it, on PASID 5; the device itself is attached to nothing."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, records: Buffer, flags: int = 0) -> None:
        self.kernel, self.iommu, self.dsa, self.records = kernel, iommu, dsa, records
        self.fault, self.file = fault_queue(kernel, iommu)
        flags |= IOMMU_HWPT_FAULT_ID_VALID | IOMMU_HWPT_ALLOC_PASID
        self.space = Space(kernel, iommu, dsa.vfio.devid, b"s", records, flags, fault_id=self.fault)
        dsa.vfio.attach_pasid(5, self.space.hwpt)

    def queue(self, index: int = 0, pasid: int | None = 5, flags: int = WQ_BLOCK) -> Queue:
        return self.dsa.queue(index, pasid, flags).record_in(self.records, RECORDS)


def reached(queue: Queue, spaces: list[Space]) -> str:
    """The letters of the spaces whose NAME a copy through `queue` brings to their TARGET; "-" where it is refused."""
    for space in spaces:
        space.pages.view[:8] = bytes(8)
    status = queue.move(NAME, TARGET, 8).status
    changed = [space for space in spaces if space.target != bytes(8)]
    assert all(space.target == space.name * 8 for space in changed)
    assert (status == SUCCESS) == bool(changed), f"status {status:#x}"
    assert changed or status & ~ON_WRITE in REFUSED
    return "".join(space.name.decode() for space in changed) or "-"


def is_shut_out(queue: Queue, dsa: Dsa) -> bool:
    """Whether not even the completion record of a copy gets through."""
    job = queue.submit(MOVE, NAME, TARGET, 8, 0)
    error = dsa.error()
    return job.poll() is None and error is not None and error[1] == RECORDS + 32 * job.slot
