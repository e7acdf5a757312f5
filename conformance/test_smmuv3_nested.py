"""DMA through both stages of an SMMUv3: a guest's own tables over what the IOAS maps.

Mirrors arm_smmu_make_nested_domain_ste() and arm_smmu_attach_dev_nested() of drivers/iommu/arm/arm-smmu-v3/
arm-smmu-v3-iommufd.c, iommufd_sw_msi() of drivers/iommu/iommufd/driver.c, and the translation itself. The guest's CD
and tables are in its memory (conformance/vsmmu.py); what a change there does before it is invalidated is left open.
"""

from __future__ import annotations

import pytest

from conformance.drivers.edu import Edu, signals
from conformance.drivers.fixtures import idle_edu
from conformance.steps import PAGE, destroy, hwpt_alloc, map_user, unmap
from conformance.vsmmu import (
    ABORT,
    AF,
    BLOCK_RW,
    BYPASS,
    CFGI_CD,
    CFGI_CD_ALL,
    LEAF,
    NH_VA,
    NSNH_ALL,
    PAGE_RO,
    PAGE_RW,
    RAM,
    RAM_PAGES,
    S1,
    STE_1,
    SW_MSI,
    TTB_PAGE,
    Guest,
    V,
    asid,
    make_cd,
    sid,
    viommu_alloc,
)
from uapi.backend import File

pytestmark = [
    pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device", "smmuv3", "nesting"),
    pytest.mark.since("7.3"),
]

VSID = 0x81
#: A virtual address of the guest's, and the page that it is about.
IOVA, A, B, C = 0x12_3456_7000, 16, 17, 18
#: Bytes of a transfer: more than one register's width would be split by some units when it is refused.
SIZE = 4

edu = idle_edu


@pytest.fixture
def guest(smmu_guest: Guest) -> Guest:
    smmu_guest.write(A, b"aaaa")
    smmu_guest.write(B, b"bbbb")
    smmu_guest.write(C, b"cccc")
    return smmu_guest


def fetch(guest: Guest, edu: Edu, iova: int, page: int = C) -> bytes:
    """What the device reads at `iova`; it writes it to `page` through a way that is there for this alone."""
    edu.load(iova, SIZE)
    guest.map(OUT, guest.page(page))
    edu.store(OUT, SIZE)
    return guest.read(page, SIZE)


OUT = 0x7F_0000_0000


# -- two stages ------------------------------------------------------------------------------------------------------


def test_device_reads_and_writes_through_both_stages(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.map(IOVA + PAGE, guest.page(B))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    edu.store(IOVA + PAGE + 8, SIZE)
    assert guest.read(B, 12) == b"bbbb\0\0\0\0aaaa"


def test_pages_of_a_transfer_need_not_lie_together(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.map(IOVA + PAGE, guest.page(C))
    guest.map(OUT, guest.page(B))
    guest.write(A, b"end.", PAGE - 4)
    guest.enter(VSID)
    edu.load(IOVA + PAGE - 4, 8)
    edu.store(OUT, 8)
    assert guest.read(B, 8) == b"end.cccc"


def test_stage_1_refuses_what_the_guest_does_not_map(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    for address in (IOVA + PAGE, IOVA + (1 << 30), 0, guest.page(B), 1 << 39, 1 << 47):
        edu.store(address, SIZE)
    assert guest.read(B, SIZE) == b"bbbb"
    guest.map(OUT, guest.page(B))
    edu.store(OUT, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"


def test_stage_1_lets_a_read_only_page_be_read(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A), PAGE_RO)
    guest.enter(VSID)
    assert fetch(guest, edu, IOVA) == b"aaaa"
    guest.write(A, b"old.")
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"old."


def test_stage_1_refuses_a_page_without_the_access_flag(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A), PAGE_RW & ~AF)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"aaaa"


def test_stage_2_refuses_what_the_ioas_does_not_map(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, RAM + RAM_PAGES * PAGE)
    guest.map(IOVA + PAGE, guest.page(A))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    assert fetch(guest, edu, IOVA + PAGE) == b"aaaa"
    edu.load(IOVA, SIZE)  # a refused read leaves zeros
    edu.store(OUT, SIZE)
    assert guest.read(C, SIZE) == bytes(SIZE)


def test_stage_2_lets_a_read_only_mapping_be_read(guest: Guest, iommu: File, edu: Edu) -> None:
    """Whatever stage 1 says of it."""
    high = 0x8000_0000
    map_user(iommu, guest.ioas, guest.ram.address + A * PAGE, PAGE, iova=high, prot=4)
    guest.map(IOVA, high)
    guest.enter(VSID)
    assert fetch(guest, edu, IOVA) == b"aaaa"
    guest.write(A, b"old.")
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"old."


def test_stage_1_tables_lie_at_the_guest_s_addresses(guest: Guest, edu: Edu) -> None:
    """A CD whose tables the IOAS does not map leads nowhere."""
    guest.map(IOVA, guest.page(A))
    guest.set_cd(make_cd(0x1_0000_0000))
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"aaaa"
    guest.set_cd(make_cd(guest.page(TTB_PAGE)))
    guest.invalidate((CFGI_CD | sid(VSID), LEAF))
    assert fetch(guest, edu, IOVA) == b"aaaa"


def test_a_context_descriptor_that_the_ioas_does_not_map_leads_nowhere(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID, (V | S1 | 0x1_0000_0000, STE_1))
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"aaaa"
    guest.device.attach(guest.nested())
    assert fetch(guest, edu, IOVA) == b"aaaa"


def test_an_invalid_context_descriptor_leads_nowhere(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.set_cd([0] * 8)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"aaaa"
    guest.set_cd(make_cd(guest.page(TTB_PAGE)))
    guest.invalidate((CFGI_CD_ALL | sid(VSID), 0))
    assert fetch(guest, edu, IOVA) == b"aaaa"


def test_stage_1_blocks(guest: Guest, edu: Edu) -> None:
    """2 MiB of the guest's addresses in one entry of level 2; stage 2 has 4 KiB pages below it."""
    block = 2 << 20
    guest.map(IOVA & -block, RAM & -block, BLOCK_RW, level=2)
    guest.enter(VSID)
    assert fetch(guest, edu, (IOVA & -block) + A * PAGE) == b"aaaa"
    edu.store((IOVA & -block) + B * PAGE, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"


@pytest.mark.parametrize(("granule", "tg0"), [(14, 2), (16, 1)], ids=["16 KiB", "64 KiB"])
def test_a_guest_with_larger_pages(guest: Guest, edu: Edu, iommu: File, granule: int, tg0: int) -> None:
    """Two levels of tables; the first has 512 entries, the second a granule, of which the first 4 KiB are used: QEMU
    asks stage 2 only where a table begins, and takes the physical address of the first one to be aligned."""
    size, low, index_bits, first, second = 1 << granule, 0xC000_0000, granule - 3, 0x10, 0x123
    memory = guest.kernel.buffer(3 * size)
    map_user(iommu, guest.ioas, memory.address, 3 * size, iova=low)
    words = memory.view.cast("B").cast("Q")
    words[first] = low + size | 3
    words[size // 8 + second] = low + 2 * size | PAGE_RW
    words.release()
    memory.view[2 * size + 3 * PAGE : 2 * size + 3 * PAGE + SIZE] = b"far."
    cd = make_cd(low, tsz=64 - granule - index_bits - 9)
    cd[0] |= tg0 << 6
    guest.set_cd(cd)
    guest.enter(VSID)
    address = (first << index_bits | second) << granule
    edu.load(address + 3 * PAGE, SIZE)
    edu.store(address + PAGE - SIZE, SIZE)
    assert bytes(memory.view[2 * size + PAGE - SIZE : 2 * size + PAGE]) == b"far."
    guest.device.detach()
    unmap(iommu, guest.ioas, low, 3 * size)
    memory.close()


# -- one stage or none -----------------------------------------------------------------------------------------------


def test_a_bypass_vste_leaves_stage_2(guest: Guest, edu: Edu) -> None:
    """The device uses the guest's addresses; no vDEVICE is needed."""
    guest.map(IOVA, guest.page(A))
    guest.device.attach(guest.nested((V | BYPASS, 0)))
    edu.load(guest.page(A), SIZE)
    edu.store(guest.page(B), SIZE)
    edu.store(IOVA, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"


@pytest.mark.parametrize(
    "ste", [(V | ABORT, 0), (0, 0), (~1 & (1 << 64) - 1, 7)], ids=["abort", "invalid", "invalid 2"]
)
def test_an_abort_or_invalid_vste_refuses_everything(guest: Guest, edu: Edu, ste: tuple[int, int]) -> None:
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    guest.device.attach(guest.nested(ste))
    edu.store(guest.page(B), SIZE)
    edu.store(IOVA, SIZE)
    assert guest.read(B, SIZE) == b"bbbb"


def test_a_nested_hwpt_takes_over_from_its_parent_and_gives_back(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.device.attach(guest.parent)
    edu.load(guest.page(A), SIZE)
    guest.enter(VSID)
    edu.store(guest.page(B), SIZE)
    assert guest.read(B, SIZE) == b"bbbb"
    guest.map(OUT, guest.page(B))
    edu.store(OUT, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"
    guest.device.attach(guest.parent)
    edu.load(guest.page(C), SIZE)
    edu.store(OUT, SIZE)
    edu.store(guest.page(A), SIZE)
    assert (guest.read(A, SIZE), guest.read(B, SIZE)) == (b"cccc", b"aaaa")


def test_a_stage_1_hwpt_of_the_host_takes_over(guest: Guest, edu: Edu, iommu: File) -> None:
    """The unit's ASIDs and VMIDs do not meet."""
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    host = hwpt_alloc(iommu, guest.device.devid, guest.ioas)
    guest.device.attach(host)
    edu.store(guest.page(B), SIZE)
    edu.store(IOVA, SIZE)
    assert (guest.read(A, SIZE), guest.read(B, SIZE)) == (b"aaaa", b"aaaa")


def test_two_vstes_of_one_viommu(guest: Guest, edu: Edu) -> None:
    """A change of the vSTE is another HWPT. The context descriptors have ASIDs of their own."""
    guest.map(IOVA, guest.page(A))
    words = make_cd(guest.page(24), tag=2)
    guest.write(25, b"".join(word.to_bytes(8, "little") for word in words))
    # A second set of tables: the block of level 1 that covers the guest's memory.
    index = (IOVA >> 30 & 0x1FF) * 8
    guest.write(24, (RAM | BLOCK_RW).to_bytes(8, "little"), index)
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    guest.device.attach(guest.nested((V | S1 | guest.page(25), STE_1)))
    low = IOVA & -(1 << 30)
    edu.store(low + B * PAGE, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"
    edu.store(IOVA, SIZE)
    assert guest.read(A, SIZE) == b"aaaa"


def test_detached_device_reaches_nothing(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.map(IOVA + PAGE, guest.page(B))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    guest.device.detach()
    edu.store(IOVA + PAGE, SIZE)
    edu.store(guest.page(B), SIZE)
    assert guest.read(B, SIZE) == b"bbbb"


# -- changes below and above -----------------------------------------------------------------------------------------


def test_an_unmap_of_the_ioas_is_seen_at_once(guest: Guest, edu: Edu, iommu: File) -> None:
    """The kernel invalidates for stage 2, whatever the guest does."""
    high = 0x8000_0000
    map_user(iommu, guest.ioas, guest.ram.address + A * PAGE, 2 * PAGE, iova=high)
    guest.map(IOVA, high)
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    edu.store(IOVA + 16, SIZE)
    assert guest.read(A, SIZE, 16) == b"aaaa"
    unmap(iommu, guest.ioas, high, 2 * PAGE)
    edu.store(IOVA + 32, SIZE)
    assert guest.read(A, SIZE, 32) == bytes(4)
    map_user(iommu, guest.ioas, guest.ram.address + B * PAGE, PAGE, iova=high)
    edu.store(IOVA + 32, SIZE)
    assert (guest.read(A, SIZE, 32), guest.read(B, SIZE, 32)) == (bytes(4), b"aaaa")


def test_an_unmap_of_the_ioas_takes_the_guest_s_tables(guest: Guest, edu: Edu, iommu: File) -> None:
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    unmap(iommu, guest.ioas, RAM, RAM_PAGES * PAGE)
    edu.store(IOVA, SIZE)
    map_user(iommu, guest.ioas, guest.ram.address, RAM_PAGES * PAGE, iova=RAM)
    assert guest.read(A, SIZE) == b"aaaa"
    edu.load(IOVA, SIZE)
    guest.map(OUT, guest.page(B))
    edu.store(OUT, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"


def test_a_page_that_the_guest_moves_is_elsewhere_after_an_invalidation(guest: Guest, edu: Edu) -> None:
    guest.map(IOVA, guest.page(A))
    guest.map(OUT, guest.page(C))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    guest.map(IOVA, guest.page(B))
    guest.invalidate((NH_VA | asid(1), IOVA | LEAF))
    edu.load(IOVA, SIZE)
    edu.store(OUT, SIZE)
    assert guest.read(C, SIZE) == b"bbbb"


def test_another_guest_s_parent_is_another_world(guest: Guest, edu: Edu, iommu: File) -> None:
    """A second vIOMMU on a second parent: another VMID, though ASID and address are the same."""
    guest.map(IOVA, guest.page(A))
    vdevice = guest.vdevice(VSID)
    guest.device.attach(guest.nested())
    edu.load(IOVA, SIZE)
    guest.device.detach()
    destroy(iommu, vdevice)
    other = Guest(guest.kernel, iommu, guest.device)
    other.map(IOVA, other.page(B))
    other.map(OUT, other.page(C))
    other.write(B, b"BBBB")
    other.enter(VSID)
    edu.load(IOVA, SIZE)
    edu.store(OUT, SIZE)
    assert other.read(C, SIZE) == b"BBBB"
    assert guest.read(C, SIZE) == b"cccc"
    other.close()


def test_two_viommus_on_one_parent_share_the_guest_s_memory(guest: Guest, edu: Edu, iommu: File) -> None:
    """And, up to 7.3, the VMID: what is invalidated in one is invalidated in both."""
    guest.map(IOVA, guest.page(A))
    guest.map(OUT, guest.page(C))
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    guest.map(IOVA, guest.page(B))
    guest.invalidate((NSNH_ALL, 0), viommu=other)
    edu.load(IOVA, SIZE)
    edu.store(OUT, SIZE)
    assert guest.read(C, SIZE) == b"bbbb"


# -- interrupts ------------------------------------------------------------------------------------------------------


def test_interrupts_pass_where_the_guest_maps_the_doorbells_window(guest: Guest, edu: Edu) -> None:
    """The kernel gives the device an address of the window, and maps the doorbell there in the parent only."""
    guest.enter(VSID)
    eventfd = edu.enable_msi()
    edu.raise_irq(1)
    assert signals(eventfd, 0.3) == 0
    edu.acknowledge(1)
    guest.map(SW_MSI, SW_MSI, PAGE_RW)
    guest.invalidate((NSNH_ALL, 0))
    edu.raise_irq(2)
    assert signals(eventfd) == 1
    edu.acknowledge(2)


@pytest.mark.parametrize("before", [False, True])
def test_interrupts_pass_without_stage_1(guest: Guest, edu: Edu, before: bool) -> None:
    """Made before the attachment or behind it: the parent has the doorbell in either case."""
    if before:
        guest.device.attach(hwpt_alloc(guest.iommu, guest.device.devid, guest.ioas))
        eventfd = edu.enable_msi()
    guest.device.attach(guest.nested((V | BYPASS, 0)))
    if not before:
        eventfd = edu.enable_msi()
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)


def test_interrupts_that_were_there_pass_through_the_guest_s_table(guest: Guest, edu: Edu) -> None:
    guest.map(SW_MSI, SW_MSI, PAGE_RW)
    guest.device.attach(guest.parent)
    eventfd = edu.enable_msi()
    guest.enter(VSID)
    edu.raise_irq(1)
    assert signals(eventfd) == 1
    edu.acknowledge(1)
