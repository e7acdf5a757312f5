"""The operation that plays a device which writes, after drivers/iommu/iommufd/selftest.c."""

from __future__ import annotations

import errno

from kernel_model.bitmask import ones
from kernel_model.errors import KernelError
from kernel_model.fault_injection import injecting, kmalloc
from kernel_model.interval import U64_MAX
from kernel_model.iommu.mock.domain import MockPagingDomain
from kernel_model.iommufd.hwpt import HwptPaging
from kernel_model.iommufd.selftest.operations import TestCommand, operation
from uapi.behaviours import has
from uapi.iommufd_test import MOCK_PAGE_SIZE

_MOST_BITS = 16 << 20 << 3


def _mapped(domain: MockPagingDomain, iova: int, bits: int) -> int:
    """Those of `bits`, one for each 2 KiB from `iova` on, that have a page."""
    found = bytearray(bits.bit_length() // 8 + 1)
    for byte, value in enumerate(bits.to_bytes(len(found), "little")):
        for bit in range(8 if value else 0):
            address = iova + (8 * byte + bit) * MOCK_PAGE_SIZE
            if value >> bit & 1 and domain.iova_to_phys(address) is not None:
                found[byte] |= 1 << bit
    return int.from_bytes(found, "little")


@operation("IOMMU_TEST_OP_DIRTY")
def _dirty(ucmd: TestCommand) -> None:
    """Make the leaf at iova + i * page_size dirty for each set bit i, and count the bits, also those over holes.

    EINVAL: a page size, length or address of 0, or IOVA and length off the page size. EOVERFLOW: more than 2^27 bits.
    ENOENT: no such paging HWPT. EINVAL: not a mock domain; tracking is off. EFAULT: the bits; the reply, with all done.
    """
    dirty = ucmd.cmd.dirty
    iova, length, page_size, address = dirty.iova, dirty.length, dirty.page_size, dirty.uptr
    if not page_size or not length or iova % page_size or length % page_size or not address:
        raise KernelError(errno.EINVAL, f"{iova:#x} and {length:#x} in pages of {page_size:#x}, or no bitmap")
    count = length // page_size
    if count > _MOST_BITS and has(ucmd.ctx.kernel.release, "mock-dirty-cap"):
        raise KernelError(errno.EOVERFLOW, f"{count} bits")
    domain = ucmd.ctx.objects.get(ucmd.cmd.id, HwptPaging).domain
    if not isinstance(domain, MockPagingDomain):
        raise KernelError(errno.EINVAL, f"HWPT {ucmd.cmd.id} is no mock domain")
    if not domain.tracks_dirty:
        raise KernelError(errno.EINVAL, "dirty tracking is off")
    if injecting:
        kmalloc("a copy of the bitmap")
    bits = int.from_bytes(ucmd.call.copy_from_user(address, (count + 7) // 8), "little") & ones(count)
    if not has(ucmd.ctx.kernel.release, "mock-generic-pt"):
        # The array of 2 KiB pages was indexed in the caller's page size, and a bit over a hole counted for nothing.
        iova, page_size = iova // page_size * MOCK_PAGE_SIZE, MOCK_PAGE_SIZE
        bits &= _mapped(domain, iova, bits)
    below = -(-(U64_MAX + 1 - iova) // page_size)  # the kernel's addresses wrap
    domain.table.set_dirty(iova, page_size, bits & ones(min(below, count)))
    if below < count:
        domain.table.set_dirty((iova + below * page_size) & U64_MAX, page_size, bits >> below)
    dirty.out_nr_dirty = bits.bit_count()
    ucmd.respond()
