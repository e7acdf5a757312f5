"""Events of an SMMUv3 that reach a guest: which, with what in their 32 bytes, and where they go.

Mirrors arm_smmu_handle_event(), arm_vmaster_report_event(), arm_smmu_attach_prepare_vmaster() and its commit of
drivers/iommu/arm/arm-smmu-v3, and the queue of drivers/iommu/iommufd/eventq.c with events that hardware makes. Events
come by an interrupt a moment after the transfer: tests wait for them.
"""

from __future__ import annotations

import errno
import select
import struct

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.fixtures import idle_edu, smmu_guest
from conformance.steps import PAGE, U32_MAX, answer, destroy, fails, hwpt_alloc, map_user
from conformance.vsmmu import (
    ABORT,
    AF,
    BYPASS,
    C_BAD_CD,
    CFGI_CD,
    EVENT_HEADER,
    EVENT_SIZE,
    F_ACCESS,
    F_ADDR_SIZE,
    F_PERMISSION,
    F_TRANSLATION,
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
    make_cd,
    sid,
    veventq_alloc,
    viommu_alloc,
)
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_FAULT_QUEUE_ALLOC,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_VEVENTQ_ALLOC,
    IOMMU_VEVENTQ_FLAG_LOST_EVENTS,
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
)

pytestmark = [
    pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device", "smmuv3", "nesting"),
    pytest.mark.since("7.3"),
]

LOST = IOMMU_VEVENTQ_FLAG_LOST_EVENTS
VSID = 0x81
IOVA, A, B = 0x12_3456_7000, 16, 17
SIZE = 4
#: Of the second word: the read bit, and the class "the request's own address".
READ, INPUT, TABLE_WALK = 1 << 35, 2 << 40, 1 << 40

guest, edu = smmu_guest, idle_edu


@pytest.fixture
def queue(guest: Guest) -> File:
    """A queue for 16 events in the guest's vIOMMU."""
    return guest.veventq()[1]


def waits(queue: File, timeout: float = 2.0) -> bool:
    """Whether there is something to read, or will be in time."""
    return bool(select.select([queue.fileno()], [], [], timeout)[0])


def event(queue: File) -> tuple[int, ...]:
    """The next event: flags, sequence and the record's four words; all zero where none comes."""
    if not waits(queue):
        return (0,) * 6
    data = queue.read(EVENT_SIZE)
    return EVENT_HEADER.unpack_from(data) + (struct.unpack_from("<4Q", data, 8) if len(data) > 8 else ())


def nothing(queue: File) -> bool:
    """Nothing is there and nothing comes soon."""
    return not waits(queue, 0.2) and queue.read(EVENT_SIZE) == b""


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_write_that_stage_1_does_not_map(guest: Guest, edu: Edu, queue: File) -> None:
    guest.enter(VSID)
    edu.store(IOVA + 0x128, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, IOVA + 0x128, 0)
    assert queue.read(EVENT_SIZE) == b""


def test_a_read_that_stage_1_does_not_map(guest: Guest, edu: Edu, queue: File) -> None:
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT | READ, IOVA, 0)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_level_that_ends_the_walk_is_not_told(guest: Guest, edu: Edu, queue: File, level: int) -> None:
    guest.map(IOVA, guest.page(A))
    guest.set_table(IOVA, level, 0)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, IOVA, 0)


@pytest.mark.parametrize("address", [1 << 39, (1 << 48) - PAGE, 1 << 60])
def test_an_address_outside_the_guest_s_table(guest: Guest, edu: Edu, queue: File, address: int) -> None:
    guest.enter(VSID)
    edu.store(address, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, address, 0)


def test_a_write_to_a_read_only_page(guest: Guest, edu: Edu, queue: File) -> None:
    guest.map(IOVA, guest.page(A), PAGE_RO)
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    edu.store(IOVA + 8, SIZE)
    assert event(queue) == (0, 0, F_PERMISSION | sid(VSID), INPUT, IOVA + 8, 0)
    assert nothing(queue)


def test_a_page_without_the_access_flag(guest: Guest, edu: Edu, queue: File) -> None:
    guest.map(IOVA, guest.page(A), PAGE_RW & ~AF)
    guest.enter(VSID)
    edu.load(IOVA, SIZE)
    assert event(queue) == (0, 0, F_ACCESS | sid(VSID), INPUT | READ, IOVA, 0)


def test_a_page_beyond_the_guest_s_address_size(guest: Guest, edu: Edu, queue: File) -> None:
    """CD.IPS says 40 bits."""
    guest.map(IOVA, 1 << 40)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert event(queue) == (0, 0, F_ADDR_SIZE | sid(VSID), INPUT, IOVA, 0)


def test_a_first_table_beyond_the_guest_s_address_size(guest: Guest, edu: Edu, queue: File) -> None:
    """It makes the context descriptor a bad one."""
    guest.set_cd(make_cd(1 << 40))
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    kernel_note = event(queue)
    assert kernel_note[:2] == (0, 0)
    assert kernel_note[2] & 0xFF in {C_BAD_CD, F_ADDR_SIZE}
    guest.kernel.note("event", [f"{word:#x}" for word in kernel_note])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "cd",
    [[0] * 8, make_cd(RAM, more=1 << 41), make_cd(RAM, tsz=3), make_cd(RAM, more=1 << 46)],
    ids=["invalid", "AArch32", "T0SZ", "A"],
)
def test_a_bad_context_descriptor(guest: Guest, edu: Edu, queue: File, cd: list[int]) -> None:
    guest.set_cd(cd)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert event(queue) == (0, 0, C_BAD_CD | sid(VSID), 0, 0, 0)


def test_faults_that_the_guest_does_not_want_recorded(guest: Guest, edu: Edu, queue: File) -> None:
    """CD.R is zero: refused, and nobody told, but of what is wrong with the descriptor itself."""
    guest.set_cd(make_cd(guest.page(TTB_PAGE), more=1 << 45))
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert nothing(queue)
    guest.set_cd([0] * 8)
    guest.invalidate((CFGI_CD | sid(VSID), 1))
    edu.store(IOVA, SIZE)
    assert event(queue)[:3] == (0, 0, C_BAD_CD | sid(VSID))


@pytest.mark.parametrize("vsid", [0, 1, 0x80, 0xFFFF, U32_MAX, 1 << 32, 5 << 32 | 0x1234])
def test_the_stream_is_the_guest_s(guest: Guest, edu: Edu, queue: File, vsid: int) -> None:
    """The lower 32 bits of the vDEVICE's id."""
    guest.enter(vsid)
    edu.store(IOVA, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(vsid), INPUT, IOVA, 0)


def test_an_interrupt_that_the_guest_does_not_map(guest: Guest, edu: Edu, queue: File) -> None:
    """The doorbell's address in the window that the kernel chose; a message is a write."""
    guest.enter(VSID)
    edu.enable_msi()
    edu.raise_irq(1)
    flags, sequence, low, second, address, ipa = event(queue)
    assert (flags, sequence, low, second, ipa) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, 0)
    assert address & -PAGE == SW_MSI
    guest.kernel.note("doorbell", address)  # type: ignore[attr-defined]
    edu.acknowledge(1)


# -- what is not told ------------------------------------------------------------------------------------------------


def test_faults_of_stage_2_are_the_host_s(guest: Guest, edu: Edu, queue: File, iommu: File) -> None:
    """The sequence does not count them."""
    map_user(iommu, guest.ioas, guest.ram.address, PAGE, iova=0x8000_0000, prot=4)
    guest.map(IOVA, RAM + RAM_PAGES * PAGE)
    guest.map(IOVA + PAGE, 0x8000_0000)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    edu.store(IOVA + PAGE, SIZE)
    assert nothing(queue)
    edu.store(IOVA + 2 * PAGE, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, IOVA + 2 * PAGE, 0)


def test_a_context_descriptor_outside_the_guest_s_memory_is_the_host_s(guest: Guest, edu: Edu, queue: File) -> None:
    guest.enter(VSID, (V | S1 | 0x1_0000_0000, STE_1))
    edu.store(IOVA, SIZE)
    assert nothing(queue)


@pytest.mark.parametrize("ste", [(V | BYPASS, 0), (V | ABORT, 0), (0, 0)], ids=["bypass", "abort", "invalid"])
def test_without_stage_1_nothing_is_told(guest: Guest, edu: Edu, queue: File, ste: tuple[int, int]) -> None:
    """With a vDEVICE or without. An invalid vSTE is refused as abort is: the guest gets no C_BAD_STE."""
    nested = guest.nested(ste)
    guest.device.attach(nested)
    edu.store(IOVA, SIZE)
    guest.device.detach()
    guest.enter(VSID, ste)
    edu.store(IOVA, SIZE)
    assert nothing(queue)


def test_a_device_that_left_is_told_of_no_more(guest: Guest, edu: Edu, queue: File, iommu: File) -> None:
    host = hwpt_alloc(iommu, guest.device.devid, guest.ioas)
    nested = guest.enter(VSID)
    for leave in (guest.device.detach, lambda: guest.device.attach(guest.parent), lambda: guest.device.attach(host)):
        guest.device.attach(nested)
        leave()
        edu.store(IOVA, SIZE)
        assert nothing(queue)
    guest.device.attach(nested)
    edu.store(IOVA, SIZE)
    assert event(queue)[1:3] == (0, F_TRANSLATION | sid(VSID))


def test_events_go_to_the_host_s_log_where_there_is_no_queue(guest: Guest, edu: Edu) -> None:
    """A queue that is made later starts at 0."""
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    _, queue = guest.veventq()
    assert nothing(queue)
    edu.store(IOVA + 4, SIZE)
    assert event(queue) == (0, 0, F_TRANSLATION | sid(VSID), INPUT, IOVA + 4, 0)


def test_a_queue_of_another_type_gets_nothing(guest: Guest, edu: Edu, kernel: Backend, iommu: File) -> None:
    kind = IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV
    reply = IOMMU_VEVENTQ_ALLOC(iommu, viommu_id=guest.viommu, type=kind, veventq_depth=4)
    other = kernel.adopt(reply.out_veventq_fd)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    assert nothing(other)


# -- whose they are --------------------------------------------------------------------------------------------------


def test_a_vdevice_that_went_keeps_its_name_until_the_next_attachment(
    guest: Guest, edu: Edu, queue: File, iommu: File
) -> None:
    vdevice = guest.vdevice(VSID)
    nested, other = guest.nested(), guest.nested()
    guest.device.attach(nested)
    destroy(iommu, vdevice)
    edu.store(IOVA, SIZE)
    assert event(queue)[2] == F_TRANSLATION | sid(VSID)
    guest.vdevice(0x55)
    edu.store(IOVA, SIZE)
    assert event(queue)[2] == F_TRANSLATION | sid(VSID)
    guest.device.attach(other)
    edu.store(IOVA, SIZE)
    assert event(queue)[1:3] == (2, F_TRANSLATION | sid(0x55))


def test_a_refused_attachment_leaves_events_as_they_were(guest: Guest, edu: Edu, queue: File, iommu: File) -> None:
    vdevice = guest.vdevice(VSID)
    guest.device.attach(guest.nested())
    destroy(iommu, vdevice)
    with fails(errno.ENOENT):
        guest.device.attach(guest.nested())
    edu.store(IOVA, SIZE)
    assert event(queue)[2] == F_TRANSLATION | sid(VSID)


def test_events_go_to_the_viommu_that_the_device_is_in(guest: Guest, edu: Edu, queue: File, iommu: File) -> None:
    vdevice = guest.vdevice(VSID)
    nested = guest.nested()
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    _, second = veventq_alloc(guest.kernel, iommu, other, 4)
    guest.device.attach(nested)
    edu.store(IOVA, SIZE)
    assert event(queue)[1:3] == (0, F_TRANSLATION | sid(VSID))
    destroy(iommu, vdevice)
    guest.vdevice(0x99, other)
    guest.device.attach(guest.nested(viommu=other))
    edu.store(IOVA, SIZE)
    assert event(second)[1:3] == (0, F_TRANSLATION | sid(0x99))
    assert nothing(queue)


def test_events_do_not_go_to_the_fault_queue(guest: Guest, edu: Edu, queue: File, iommu: File) -> None:
    """What does not stall is no fault to answer."""
    fault = IOMMU_FAULT_QUEUE_ALLOC(iommu)
    faults = guest.kernel.adopt(fault.out_fault_fd)
    guest.vdevice(VSID)
    guest.device.attach(guest.nested(flags=IOMMU_HWPT_FAULT_ID_VALID, fault_id=fault.out_fault_id))
    edu.store(IOVA, SIZE)
    assert event(queue)[1:3] == (0, F_TRANSLATION | sid(VSID))
    assert faults.read(400) == b""
    guest.device.detach()


# -- the queue -------------------------------------------------------------------------------------------------------


def test_order_of_the_checks(guest: Guest, iommu: File) -> None:
    good = {"type": IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, "veventq_depth": 1, "viommu_id": guest.viommu}
    for change, number in (
        ({"flags": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"__reserved": 1, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"type": 0, "veventq_depth": 0}, errno.EOPNOTSUPP),
        ({"veventq_depth": 0, "viommu_id": 99}, errno.EINVAL),
        ({"veventq_depth": (1 << 19) + 1, "viommu_id": 99}, errno.EINVAL),
        ({"viommu_id": 99}, errno.ENOENT),
        ({"viommu_id": guest.parent}, errno.ENOENT),
    ):
        assert answer(IOMMU_VEVENTQ_ALLOC, iommu, **(good | change)) == number, change


def test_a_queue_holds_the_viommu(guest: Guest, iommu: File) -> None:
    number, file = guest.veventq()
    with fails(errno.EEXIST):
        guest.veventq()
    with fails(errno.EBUSY):
        destroy(iommu, guest.viommu)
    with fails(errno.EBUSY):
        destroy(iommu, number)
    file.close()
    destroy(iommu, number)
    destroy(iommu, guest.viommu)


def test_events_in_a_row(guest: Guest, edu: Edu, queue: File) -> None:
    """Read at once, in the order in which they came; one at a time otherwise."""
    guest.enter(VSID)
    for number in range(3):
        edu.store(IOVA + number * 4, SIZE)
        assert waits(queue)
    for count in (EVENT_SIZE - 1, 8):
        with fails(errno.EINVAL):
            queue.read(count)
    data = queue.read(3 * EVENT_SIZE - 1)
    assert len(data) == 2 * EVENT_SIZE
    assert [EVENT_HEADER.unpack_from(data, at) for at in (0, EVENT_SIZE)] == [(0, 0), (0, 1)]
    assert event(queue) == (0, 2, F_TRANSLATION | sid(VSID), INPUT, IOVA + 8, 0)


def test_events_that_do_not_fit_are_lost(guest: Guest, edu: Edu) -> None:
    """A header behind the rest says so, with the number of the last one; room makes it go."""
    _, queue = guest.veventq(2)
    guest.enter(VSID)
    for number in range(4):
        edu.store(IOVA + number * 4, SIZE)
    assert waits(queue)
    edu.vfio.kernel.note("settled", settle(queue))  # type: ignore[attr-defined]
    data = queue.read(PAGE)
    assert len(data) == 2 * EVENT_SIZE + 8
    assert [EVENT_HEADER.unpack_from(data, at * EVENT_SIZE) for at in range(3)] == [(0, 0), (0, 1), (LOST, 3)]
    edu.store(IOVA, SIZE)
    assert event(queue)[:2] == (0, 4)


def settle(queue: File) -> bool:
    """Give the last interrupt its time."""
    select.select([], [], [], 0.2)
    return waits(queue)


def test_a_later_event_takes_the_place_of_the_lost_one_s_header(guest: Guest, edu: Edu) -> None:
    _, queue = guest.veventq(1)
    guest.enter(VSID)
    edu.store(IOVA, SIZE)
    edu.store(IOVA + 4, SIZE)
    settle(queue)
    assert event(queue)[:2] == (0, 0)
    edu.store(IOVA + 8, SIZE)
    settle(queue)
    data = queue.read(PAGE)
    assert (len(data), EVENT_HEADER.unpack_from(data)) == (EVENT_SIZE, (0, 2))


def test_a_closed_descriptor_keeps_the_queue_counting(guest: Guest, edu: Edu, iommu: File) -> None:
    """There is no way to open it again; a new queue starts at 0."""
    number, queue = guest.veventq()
    guest.enter(VSID)
    queue.close()
    edu.store(IOVA, SIZE)
    with fails(errno.EEXIST):
        guest.veventq()
    destroy(iommu, number)
    _, queue = guest.veventq()
    edu.store(IOVA, SIZE)
    assert event(queue)[:2] == (0, 0)


def test_events_stop_when_the_guest_mends_its_table(guest: Guest, edu: Edu, queue: File) -> None:
    guest.map(IOVA, guest.page(A))
    guest.enter(VSID)
    guest.write(A, b"aaaa")
    edu.load(IOVA, SIZE)
    edu.store(IOVA + PAGE, SIZE)
    assert event(queue)[:2] == (0, 0)
    guest.map(IOVA + PAGE, guest.page(B))
    edu.store(IOVA + PAGE, SIZE)
    assert guest.read(B, SIZE) == b"aaaa"
    guest.set_table(IOVA + PAGE, 3, 0)
    guest.invalidate((NSNH_ALL, 0))
    edu.store(IOVA + PAGE, SIZE)
    assert event(queue)[:3] == (0, 1, F_TRANSLATION | sid(VSID))
