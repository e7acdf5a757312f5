"""A guest behind an SMMUv3 with PASIDs, a device TLB and stalls of its own: its CD table, and what it is told of them.

Mirrors arm_smmu_make_nested_cd_table_ste(), arm_smmu_attach_dev_nested() with its ATS, the ATC_INV and SSID fields of
arm_vsmmu_validate_user_cmd(), and arm_smmu_handle_event() where a guest's stage stalls, of drivers/iommu/arm/
arm-smmu-v3. The host has no part in the guest's PASIDs: the kernel attaches the device alone.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, SUCCESS, WQ_BLOCK, WQ_NO_ATS, Dsa, Queue
from conformance.mock import answer_faults, fault_queue, read_faults
from conformance.spaces import is_shut_out
from conformance.steps import PAGE, answer, fails, hwpt_alloc, map_user, unmap
from conformance.vsmmu import (
    ATC_ALL,
    ATC_GLOBAL,
    ATC_INV,
    C_BAD_CD,
    C_BAD_SUBSTREAMID,
    CFGI_CD,
    EATS,
    EVENT_HEADER,
    EVENT_SIZE,
    F_STREAM_DISABLED,
    F_TRANSLATION,
    LEAF,
    NH_ASID,
    NH_VA,
    SSV,
    TTB_PAGE,
    Guest,
    V,
    asid,
    make_cd,
    sid,
    ssid,
)
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_INVALIDATE,
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
    IOMMU_PGFAULT_PERM_WRITE,
)

pytestmark = [
    pytest.mark.needs("iommu", "root", "vfio_cdev", "smmuv3", "nesting", "dsa", "pasid"),
    pytest.mark.since("7.3"),
]

VSID = 0x81
#: Completion records: the guest's address of their page, and the virtual one in each of its tables.
RECORDS_PAGE, RECORDS, IOVA, A, B = 0x9000_0000, 0x10_0000, 0x12_3456_7000, 16, 17
#: What a transaction without PASID meets, where there is a table of descriptors: nothing, no stage 1, the first one.
TERMINATE, BYPASS, SSID0 = 0, 1, 2
#: Eight descriptors.
CDMAX = 3 << 59
INPUT, READ = 2 << 40, 1 << 35
#: Of a CD: transactions stall.
CD_S = 1 << 44


class Setting:
    """A guest with a table for PASID 0 (of ASID 1) and one for PASID 5 (of ASID 5); the device attached to nothing."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, records: Buffer) -> None:
        self.dsa, self.records = dsa, records
        self.guest = Guest(kernel, iommu, dsa.vfio)
        map_user(iommu, self.guest.ioas, records.address, PAGE, iova=RECORDS_PAGE)
        self.five = self.guest.new_table()
        self.guest.set_cd(make_cd(self.guest.page(self.five), tag=5), 5)
        for root in (TTB_PAGE, self.five):
            self.guest.map(RECORDS, RECORDS_PAGE, root=root)
        self.guest.vdevice(VSID)

    def ste(self, s1dss: int = SSID0, eats: int = 0, more: int = 0) -> tuple[int, int]:
        low, high = self.guest.ste()
        return low | CDMAX, high | s1dss | EATS[eats] | more

    def enter(self, s1dss: int = SSID0, eats: int = 0) -> int:
        nested = self.guest.nested(self.ste(s1dss, eats))
        self.dsa.vfio.attach(nested)
        return nested

    def queue(self, index: int = 0, pasid: int | None = None, flags: int = WQ_BLOCK | WQ_NO_ATS) -> Queue:
        return self.dsa.queue(index, pasid, flags).record_in(self.records, RECORDS)

    def shut_out(self, pasid: int | None, index: int = 0) -> bool:
        queue = self.queue(index, pasid)
        found = is_shut_out(queue, self.dsa)
        self.dsa.disable(queue)
        return found


@pytest.fixture
def setting(kernel: Backend, iommu: File, dsa: Dsa, records: Buffer) -> Iterator[Setting]:
    made = Setting(kernel, iommu, dsa, records)
    yield made
    made.guest.close()


@pytest.fixture
def events(setting: Setting) -> File:
    return setting.guest.veventq()[1]


def taken(events: File) -> list[tuple[int, ...]]:
    """The records of all events that are there, without their headers."""
    data = events.read(64 * EVENT_SIZE)
    assert all(EVENT_HEADER.unpack_from(data, at)[0] == 0 for at in range(0, len(data), EVENT_SIZE))
    return [struct.unpack_from("<4Q", data, at + 8) for at in range(0, len(data), EVENT_SIZE)]


# -- the guest's table of descriptors --------------------------------------------------------------------------------


def test_each_pasid_has_the_table_that_the_guest_gave_it(setting: Setting) -> None:
    guest = setting.guest
    guest.map(IOVA, guest.page(A))
    guest.map(IOVA, guest.page(B), root=setting.five)
    setting.enter()
    own, five = setting.queue(0), setting.queue(1, 5)
    assert own.fill(0x1111111111111111, IOVA, 8).status == SUCCESS
    assert five.fill(0x2222222222222222, IOVA, 8).status == SUCCESS
    assert (guest.read(A, 8), guest.read(B, 8)) == (b"\x11" * 8, b"\x22" * 8)


def test_a_pasid_without_a_descriptor_is_told_with_its_number(setting: Setting, events: File) -> None:
    """SSV, and the SSID."""
    setting.enter()
    assert setting.shut_out(6)
    assert taken(events)[0] == (C_BAD_CD | SSV | ssid(6) | sid(VSID), 0, 0, 0)


def test_a_pasid_beyond_the_table_is_told(setting: Setting, events: File) -> None:
    """Without SSV: that kind of record always has the SSID."""
    setting.enter()
    assert setting.shut_out(8)
    assert taken(events)[0] == (C_BAD_SUBSTREAMID | ssid(8) | sid(VSID), 0, 0, 0)


def test_pasid_0_on_the_bus_meets_nothing_where_the_first_descriptor_is_for_requests_without(
    setting: Setting, events: File
) -> None:
    setting.enter(SSID0)
    assert setting.shut_out(0)
    assert taken(events)[0] == (F_STREAM_DISABLED | SSV | sid(VSID), 0, 0, 0)


def test_a_fault_of_a_pasid_names_it(setting: Setting, events: File) -> None:
    setting.enter()
    setting.queue(1, 5).fill(0, IOVA + 8, 8)
    setting.queue(0).fill(0, IOVA + 16, 8)
    assert taken(events) == [
        (F_TRANSLATION | SSV | ssid(5) | sid(VSID), INPUT, IOVA + 8, 0),
        (F_TRANSLATION | sid(VSID), INPUT, IOVA + 16, 0),
    ]


def test_requests_without_a_pasid_can_be_refused(setting: Setting, events: File) -> None:
    guest = setting.guest
    guest.map(IOVA, guest.page(B), root=setting.five)
    setting.enter(TERMINATE)
    assert setting.shut_out(None)
    assert taken(events)[0] == (F_STREAM_DISABLED | sid(VSID), 0, 0, 0)
    assert setting.queue(1, 5).fill(0x2222222222222222, IOVA, 8).status == SUCCESS


def test_requests_without_a_pasid_can_be_the_guest_s_addresses(setting: Setting, events: File) -> None:
    guest = setting.guest
    guest.map(IOVA, guest.page(B), root=setting.five)
    setting.enter(BYPASS)
    own = setting.dsa.queue(0, None, WQ_BLOCK | WQ_NO_ATS).record_in(setting.records, RECORDS_PAGE)
    assert own.fill(0x1111111111111111, guest.page(A), 8).status == SUCCESS
    assert setting.queue(1, 5).fill(0x2222222222222222, IOVA, 8).status == SUCCESS
    assert (guest.read(A, 8), guest.read(B, 8)) == (b"\x11" * 8, b"\x22" * 8)
    assert own.fill(0, IOVA, 8).status != SUCCESS
    assert taken(events) == []  # what stage 2 does not map is the host's


def test_a_descriptor_that_changed_is_read_after_the_command_for_its_pasid(setting: Setting) -> None:
    guest = setting.guest
    other = guest.new_table()
    for root, page in ((setting.five, A), (other, B)):
        guest.map(IOVA, guest.page(page), root=root)
    guest.map(RECORDS, RECORDS_PAGE, root=other)
    setting.enter()
    five = setting.queue(1, 5)
    assert five.fill(0x1111111111111111, IOVA, 8).status == SUCCESS
    guest.set_cd(make_cd(guest.page(other), tag=6), 5)
    guest.invalidate((CFGI_CD | sid(VSID) | ssid(5), LEAF))
    assert five.fill(0x2222222222222222, IOVA, 8).status == SUCCESS
    assert (guest.read(A, 8), guest.read(B, 8)) == (b"\x11" * 8, b"\x22" * 8)


def test_a_page_of_a_pasid_is_forgotten_by_its_asid(setting: Setting) -> None:
    guest = setting.guest
    guest.map(IOVA, guest.page(A), root=setting.five)
    setting.enter()
    five = setting.queue(1, 5)
    assert five.fill(0x1111111111111111, IOVA, 8).status == SUCCESS
    for command in ((NH_VA | asid(5), IOVA | LEAF), (NH_ASID | asid(5), 0)):
        guest.set_table(IOVA, 3, 0, root=setting.five)
        guest.invalidate(command)
        assert five.fill(0x2222222222222222, IOVA, 8).status != SUCCESS
        guest.map(IOVA, guest.page(A), root=setting.five)
    assert guest.read(A, 8) == b"\x11" * 8


def test_the_host_s_pasids_and_a_guest_s_do_not_meet(setting: Setting, iommu: File) -> None:
    """A PASID cannot be attached beside a nested HWPT, nor a nested HWPT beside a PASID."""
    dsa, guest = setting.dsa, setting.guest
    host = hwpt_alloc(iommu, dsa.vfio.devid, guest.ioas, IOMMU_HWPT_ALLOC_PASID)
    nested = setting.enter()
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, host)
    dsa.vfio.detach()
    dsa.vfio.attach_pasid(5, host)
    for target in (nested, guest.nested((V, 0)), guest.parent):
        with fails(errno.EINVAL):
            dsa.vfio.attach(target)
    dsa.vfio.detach_pasid(5)
    dsa.vfio.attach(nested)


# -- the device's own TLB --------------------------------------------------------------------------------------------


def ats_is_on(dsa: Dsa) -> bool:
    """The enable bit of the ATS capability, as VFIO shows it."""
    at = 0x100
    while dsa.vfio.config_read(at, 4) & 0xFFFF != 0x0F:
        at = dsa.vfio.config_read(at, 4) >> 20
    return bool(dsa.vfio.config_read(at + 6, 2) & 0x8000)


@pytest.fixture
def tlb(kernel: Backend, iommu: File, ats_dsa: Dsa, records: Buffer) -> Iterator[Setting]:
    """The same with a device that has ATS."""
    made = Setting(kernel, iommu, ats_dsa, records)
    yield made
    made.guest.close()


@pytest.mark.needs("ats")
def test_the_guest_s_vste_turns_ats_on_and_off(tlb: Setting) -> None:
    """Stage 1 has the guest's word; without it the host uses what there is."""
    guest, vfio = tlb.guest, tlb.dsa.vfio
    off, on = guest.nested(tlb.ste(eats=0)), guest.nested(tlb.ste(eats=1))
    bypass, abort = guest.nested((V | 4 << 1, 0)), guest.nested((V, 0))
    found = []
    for target in (off, on, bypass, off, abort, off, guest.parent, off, on, off):
        vfio.attach(target)
        found.append(ats_is_on(tlb.dsa))
    assert found == [False, True, True, False, True, False, True, False, True, False]
    vfio.detach()
    assert not ats_is_on(tlb.dsa)


@pytest.mark.needs("ats")
@pytest.mark.parametrize(
    ("pasid", "command"),
    [
        (None, (ATC_INV | sid(VSID), IOVA)),
        (None, (ATC_INV | sid(VSID), ATC_ALL)),
        (None, (ATC_INV | sid(VSID), (IOVA & -16 * PAGE) | 4)),
        (5, (ATC_INV | sid(VSID) | SSV | ssid(5), IOVA)),
        (5, (ATC_INV | sid(VSID) | SSV | ssid(5), ATC_ALL)),
        (5, (ATC_INV | sid(VSID) | SSV | ssid(1) | ATC_GLOBAL, IOVA)),
    ],
)
def test_the_guest_s_commands_reach_the_device_s_tlb(tlb: Setting, pasid: int | None, command: tuple[int, int]) -> None:
    guest, root = tlb.guest, TTB_PAGE if pasid is None else tlb.five
    guest.map(IOVA, guest.page(A), root=root)
    tlb.enter(eats=1)
    queue = tlb.queue(1, pasid, WQ_BLOCK)
    assert queue.fill(0x1111111111111111, IOVA, 8).status == SUCCESS
    guest.map(IOVA, guest.page(B), root=root)
    tag = 1 if pasid is None else 5
    assert guest.invalidate((NH_VA | asid(tag), IOVA | LEAF), command) == 2
    assert queue.fill(0x2222222222222222, IOVA, 8).status == SUCCESS
    assert (guest.read(A, 8), guest.read(B, 8)) == (b"\x11" * 8, b"\x22" * 8)


@pytest.mark.needs("ats")
@pytest.mark.parametrize(
    ("command", "number"),
    [
        ((ATC_INV | sid(VSID), ATC_ALL), 0),
        ((ATC_INV | sid(VSID), ATC_ALL + 1), errno.EIO),
        ((ATC_INV | sid(VSID), 63), errno.EIO),
        ((ATC_INV | sid(VSID) | ssid(5), 0), 0),
        ((ATC_INV | sid(VSID) | ATC_GLOBAL, 0), 0),
        ((ATC_INV | sid(VSID + 1), 0), errno.EIO),
        ((ATC_INV | sid(VSID) | 1 << 8, 0), errno.EIO),
        ((ATC_INV | sid(VSID) | 1 << 10, 0), errno.EIO),
        ((ATC_INV | sid(VSID), 1 << 6), errno.EIO),
        ((ATC_INV | sid(VSID), 1 << 11), errno.EIO),
    ],
)
def test_fields_of_the_command_for_device_tlbs(tlb: Setting, command: tuple[int, int], number: int) -> None:
    """A PASID without SSV is ignored."""
    tlb.enter(eats=1)
    arg = tlb.guest.invalidation(command)
    assert answer(IOMMU_HWPT_INVALIDATE.raw, tlb.guest.iommu, arg) == number
    assert arg.entry_num == (number == 0)


@pytest.mark.needs("ats")
def test_an_unmap_of_the_ioas_reaches_the_device_s_tlb(tlb: Setting, iommu: File) -> None:
    """For every PASID: the host does not know them."""
    guest, high = tlb.guest, 0x8000_0000
    map_user(iommu, guest.ioas, guest.ram.address + A * PAGE, PAGE, iova=high)
    for root in (TTB_PAGE, tlb.five):
        guest.map(IOVA, high, root=root)
    tlb.enter(eats=1)
    own, five = tlb.queue(0, None, WQ_BLOCK), tlb.queue(1, 5, WQ_BLOCK)
    for queue in (own, five):
        assert queue.fill(0x1111111111111111, IOVA, 8).status == SUCCESS
    unmap(iommu, guest.ioas, high, PAGE)
    for queue in (own, five):
        assert queue.fill(0x2222222222222222, IOVA, 8).status != SUCCESS
    assert guest.read(A, 8) == b"\x11" * 8


# -- stalls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stalling(kernel: Backend, iommu: File, stalling_dsa: Dsa, records: Buffer) -> Iterator[Setting]:
    """With a device that the unit lets wait, and descriptors that have it wait."""
    made = Setting(kernel, iommu, stalling_dsa, records)
    guest = made.guest
    guest.set_cd(make_cd(guest.page(TTB_PAGE), more=CD_S))
    guest.set_cd(make_cd(guest.page(made.five), tag=5, more=CD_S), 5)
    yield made
    guest.close()


@pytest.mark.needs("stall")
@pytest.mark.parametrize("pasid", [None, 5])
def test_a_stall_of_the_guest_s_stage_goes_to_the_fault_queue(
    stalling: Setting, kernel: Backend, iommu: File, pasid: int | None
) -> None:
    """Of any PASID to that of the nested HWPT; not to the event queue. The answer lets it go on."""
    guest = stalling.guest
    _, events = guest.veventq()
    fault, file = fault_queue(kernel, iommu)
    nested = guest.nested(stalling.ste(), flags=IOMMU_HWPT_FAULT_ID_VALID, fault_id=fault)
    stalling.dsa.vfio.attach(nested)
    queue = stalling.queue(1, pasid, WQ_BLOCK)
    job = queue.submit(FILL, 0x3333333333333333, IOVA + 8, 8)
    (found,) = read_faults(file)
    flags = IOMMU_PGFAULT_FLAGS_LAST_PAGE | (0 if pasid is None else IOMMU_PGFAULT_FLAGS_PASID_VALID)
    assert (found.addr, found.perm, found.flags, found.pasid) == (
        IOVA + 8,
        IOMMU_PGFAULT_PERM_WRITE,
        flags,
        pasid or 0,
    )
    assert job.poll() is None
    guest.map(IOVA, guest.page(A), root=TTB_PAGE if pasid is None else stalling.five)
    answer_faults(file, found.cookie)
    assert job.wait().status == SUCCESS
    assert guest.read(A, 8, 8) == b"\x33" * 8
    assert events.read(EVENT_SIZE) == b""
    stalling.dsa.vfio.detach()
    file.close()


@pytest.mark.needs("stall")
def test_a_stall_without_a_fault_queue_is_ended(stalling: Setting) -> None:
    """And told to nobody."""
    _, events = stalling.guest.veventq()
    stalling.dsa.vfio.attach(stalling.guest.nested(stalling.ste()))
    assert stalling.queue(1, 5).fill(0, IOVA, 8).status != SUCCESS
    assert events.read(EVENT_SIZE) == b""


@pytest.mark.needs("stall")
def test_a_guest_that_lets_nothing_stall_gets_events(stalling: Setting) -> None:
    """STE.S1STALLD, over descriptors that do not ask for it."""
    guest = stalling.guest
    _, events = guest.veventq()
    guest.set_cd(make_cd(guest.page(stalling.five), tag=5), 5)
    stalling.dsa.vfio.attach(guest.nested(stalling.ste(more=1 << 27)))
    stalling.queue(1, 5).fill(0, IOVA, 8)
    assert taken(events) == [(F_TRANSLATION | SSV | ssid(5) | sid(VSID), INPUT, IOVA, 0)]
