"""DMA with PASIDs: each request goes through the HWPT that its PASID is attached to, and through no other.

Mirrors drivers/vfio/iommufd.c and the PASID half of drivers/iommu/iommu.c, and what the drivers of VT-d (pasid.c) and
SMMUv3 (the context descriptors) make of it. The rules among HWPTs are in test_vfio_pasid.py and test_mock_pasid.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, ON_WRITE, SUCCESS, WQ_BLOCK, WQ_NO_ATS, WQ_PRIVILEGED, Dsa, Queue
from conformance.dsa_offers import has_ats, max_pasids
from conformance.spaces import MORE, NAME, RECORDS, REFUSED, TARGET, Space, is_shut_out, reached
from conformance.steps import PAGE, READ, destroy, fails, hwpt_alloc, unmap
from uapi.backend import Backend, Buffer, File
from uapi.iommufd import (
    IOMMU_GET_HW_INFO,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
    IOMMU_HW_CAP_PCI_PASID_EXEC,
    IOMMU_HW_CAP_PCI_PASID_PRIV,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_PASID,
)

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid")]


@pytest.fixture
def spaces(kernel: Backend, iommu: File, dsa: Dsa, records: Buffer) -> Iterator[list[Space]]:
    """Three of them, attached to nothing."""
    made = [Space(kernel, iommu, dsa.vfio.devid, letter, records) for letter in (b"a", b"b", b"c")]
    yield made
    for space in made:
        space.pages.close()


@pytest.fixture(params=[WQ_BLOCK, WQ_BLOCK | WQ_NO_ATS], ids=["ats", "no_ats"])
def mode(request: pytest.FixtureRequest, dsa: Dsa) -> int:
    """Flags of a queue: with the device TLB, if the device has one, and without."""
    if not request.param & WQ_NO_ATS and not has_ats(dsa.vfio):
        pytest.skip("the device has no ATS")
    return int(request.param)


@pytest.fixture
def queues(dsa: Dsa, records: Buffer, mode: int) -> list[Queue]:
    """Of the device's own requests, of PASID 5 and of PASID 6."""
    return [dsa.queue(index, pasid, mode).record_in(records, RECORDS) for index, pasid in enumerate((None, 5, 6))]


def is_smmuv3(iommu: File, dsa: Dsa) -> bool:
    return IOMMU_GET_HW_INFO(iommu, dev_id=dsa.vfio.devid).out_data_type == IOMMU_HW_INFO_TYPE_ARM_SMMUV3


# -- which table -----------------------------------------------------------------------------------------------------


def test_each_request_goes_through_the_table_of_its_pasid(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    a, b, _ = spaces
    own, five, six = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    assert [reached(own, spaces), reached(five, spaces)] == ["a", "b"]
    assert is_shut_out(six, dsa)
    assert [reached(five, spaces), reached(own, spaces)] == ["b", "a"]


def test_a_replaced_pasid_goes_through_the_new_table_alone(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    a, b, c = spaces
    own, five, _ = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    assert reached(five, spaces) == "b"
    dsa.vfio.attach_pasid(5, c.hwpt)
    assert [reached(five, spaces), reached(own, spaces)] == ["c", "a"]
    dsa.vfio.attach_pasid(5, a.hwpt)
    assert [reached(five, spaces), reached(own, spaces)] == ["a", "a"]
    for space in (b, c):
        destroy(space.iommu, space.hwpt)


def test_a_detached_pasid_reaches_nothing_and_the_device_still_does(
    dsa: Dsa, spaces: list[Space], queues: list[Queue]
) -> None:
    a, b, _ = spaces
    own, five, _ = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    assert reached(five, spaces) == "b"
    dsa.vfio.detach_pasid(5)
    assert is_shut_out(five, dsa)
    assert reached(own, spaces) == "a"
    destroy(b.iommu, b.hwpt)
    dsa.vfio.attach_pasid(5, a.hwpt)
    assert reached(five, spaces) == "a"


def test_the_devices_own_attachment_changes_under_a_pasid(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    a, b, c = spaces
    own, five, _ = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    dsa.vfio.attach(c.hwpt)
    assert [reached(own, spaces), reached(five, spaces)] == ["c", "b"]
    dsa.vfio.detach()
    assert is_shut_out(own, dsa)
    assert reached(five, spaces) == "b"
    dsa.vfio.attach(a.hwpt)
    assert [reached(own, spaces), reached(five, spaces)] == ["a", "b"]


def test_a_pasid_needs_no_attachment_of_the_device(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    own, five, _ = queues
    dsa.vfio.attach_pasid(5, spaces[1].hwpt)
    assert reached(five, spaces) == "b"
    assert is_shut_out(own, dsa)
    dsa.vfio.detach_pasid(5)
    assert is_shut_out(five, dsa)
    assert is_shut_out(own, dsa)


def test_a_refused_replace_leaves_everything_as_it_was(
    iommu: File, dsa: Dsa, spaces: list[Space], queues: list[Queue]
) -> None:
    """A HWPT that is not for PASIDs, as the device's own or as a PASID's."""
    a, b, _ = spaces
    own, five, _ = queues
    plain = hwpt_alloc(iommu, dsa.vfio.devid, spaces[2].ioas)
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    with fails(errno.EINVAL):
        dsa.vfio.attach(plain)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, plain)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(6, spaces[2].ioas)
    assert [reached(own, spaces), reached(five, spaces)] == ["a", "b"]


# -- which pages -----------------------------------------------------------------------------------------------------


def test_an_unmapped_page_is_gone_for_every_pasid_of_the_table(
    dsa: Dsa, spaces: list[Space], queues: list[Queue]
) -> None:
    """That is, for two PASIDs of one HWPT, in whatever the device keeps, and for no other HWPT."""
    a, b, _ = spaces
    own, five, six = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    dsa.vfio.attach_pasid(6, b.hwpt)
    assert [reached(queue, spaces) for queue in queues] == ["a", "b", "b"]
    unmap(b.iommu, b.ioas, NAME, PAGE)
    assert [reached(queue, spaces) for queue in queues] == ["a", "-", "-"]
    unmap(a.iommu, a.ioas, TARGET, PAGE)
    assert reached(own, spaces) == "-"
    with fails(errno.EBUSY):
        destroy(b.iommu, b.hwpt)
    assert five.fill(0x6262, TARGET, 8).status == SUCCESS
    assert six.fill(0x6262, NAME, 8).status & ~ON_WRITE in REFUSED


def test_the_device_and_a_pasid_share_a_table(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    """The "system PASID" of a kernel driver: one map for both, and one unmap, whatever the device keeps."""
    a = spaces[0]
    own, five, _ = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, a.hwpt)
    a.map_more()
    assert own.fill(0x6F6F6F6F6F6F6F6F, MORE, 8).status == SUCCESS
    assert five.move(MORE, TARGET, 8).status == SUCCESS
    assert a.target == b"o" * 8
    a.unmap_more()
    for queue in (own, five):
        assert queue.fill(0, MORE, 8).status & ~ON_WRITE in REFUSED
    assert a.more() == b"o" * 8
    dsa.vfio.detach_pasid(5)
    assert reached(own, spaces) == "a"


def test_what_is_mapped_later_is_reached_at_once(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    a, b, _ = spaces
    own, five, _ = queues
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    for space, queue in ((b, five), (a, own)):
        assert queue.fill(0, MORE, 8).status & ~ON_WRITE in REFUSED
        space.map_more()
        assert queue.fill(0x1122334455667788, MORE, 8).status == SUCCESS
        assert space.more() == bytes.fromhex("8877665544332211")
    assert spaces[2].more() == bytes(8)


def test_a_page_that_may_only_be_read_is_not_written(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    _, b, _ = spaces
    five = queues[1]
    dsa.vfio.attach_pasid(5, b.hwpt)
    b.map_more(0, 1, READ)
    b.set_more(b"readable")
    assert five.move(MORE, TARGET, 8).status == SUCCESS
    assert b.target == b"readable"
    found = five.submit(FILL, 0, MORE, 8, 0).wait()
    assert (found.status & ON_WRITE, found.status & ~ON_WRITE in REFUSED) == (ON_WRITE, True)
    assert b.more() == b"readable"


def test_a_long_transfer_goes_on_to_the_page_that_is_missing(
    dsa: Dsa, spaces: list[Space], queues: list[Queue]
) -> None:
    _, b, _ = spaces
    dsa.vfio.attach_pasid(5, b.hwpt)
    b.map_more(0, 2)
    found = queues[1].fill(0x5A5A5A5A5A5A5A5A, MORE + 100, 2 * PAGE)
    assert (found.done, found.address) == (2 * PAGE - 100, MORE + 2 * PAGE)
    assert b.more(1, 8, PAGE - 8) == b"Z" * 8
    assert b.more(2) == bytes(8)


# -- which numbers ---------------------------------------------------------------------------------------------------


def test_the_last_pasid_works_and_the_next_is_einval(
    iommu: File, dsa: Dsa, spaces: list[Space], records: Buffer, mode: int
) -> None:
    count = max_pasids(dsa.vfio, iommu)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(count, spaces[0].hwpt)
    dsa.vfio.attach_pasid(count - 1, spaces[0].hwpt)
    queue = dsa.queue(0, count - 1, mode).record_in(records, RECORDS)
    assert reached(queue, spaces) == "a"
    other = dsa.queue(1, count >> 1, mode).record_in(records, RECORDS)
    assert is_shut_out(other, dsa)


def test_a_request_that_names_pasid_0_is_refused(dsa: Dsa, spaces: list[Space], records: Buffer, mode: int) -> None:
    """It is the number under which requests without one are translated, and stands on none (VT-d: SCT.9; SMMUv3:
    C_BAD_SUBSTREAMID)."""
    dsa.vfio.attach(spaces[0].hwpt)
    assert is_shut_out(dsa.queue(0, 0, mode).record_in(records, RECORDS), dsa)
    assert reached(dsa.queue(1, None, mode).record_in(records, RECORDS), spaces) == "a"


def test_privileged_requests(iommu: File, dsa: Dsa, spaces: list[Space], records: Buffer, mode: int) -> None:
    """VT-d's driver lets no PASID have any; an SMMUv3's tables give them what they give to all."""
    dsa.vfio.attach_pasid(5, spaces[0].hwpt)
    queue = dsa.queue(0, 5, mode | WQ_PRIVILEGED).record_in(records, RECORDS)
    assert reached(queue, spaces) == "a" if is_smmuv3(iommu, dsa) else is_shut_out(queue, dsa)


def test_hardware_information_tells_how_many_and_what_requests_may_ask_for(iommu: File, dsa: Dsa) -> None:
    info = IOMMU_GET_HW_INFO(iommu, dev_id=dsa.vfio.devid)
    assert 1 <= info.out_max_pasid_log2 <= 20
    asked = IOMMU_HW_CAP_PCI_PASID_EXEC | IOMMU_HW_CAP_PCI_PASID_PRIV
    assert info.out_capabilities & asked == IOMMU_HW_CAP_PCI_PASID_PRIV
    assert bool(info.out_capabilities & IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED) == (not has_ats(dsa.vfio))


def test_ten_pasids_have_ten_tables(kernel: Backend, iommu: File, dsa: Dsa, records: Buffer, mode: int) -> None:
    """One queue, which is configured anew for each."""
    made = [Space(kernel, iommu, dsa.vfio.devid, bytes([0x61 + n]), records) for n in range(10)]
    numbers = [1, 2, 3, 63, 64, 1000, 1023, 1024, 1025, 5000]
    for space, pasid in zip(made, numbers, strict=True):
        dsa.vfio.attach_pasid(pasid, space.hwpt)
    for n, pasid in enumerate(numbers):
        queue = dsa.queue(0, pasid, mode).record_in(records, RECORDS)
        assert reached(queue, made) == chr(0x61 + n)
        dsa.disable(queue)


# -- with stage 2, and over a reset ----------------------------------------------------------------------------------


def test_a_nesting_parent_of_an_smmuv3_is_not_for_pasids(iommu: File, dsa: Dsa, spaces: list[Space]) -> None:
    if not is_smmuv3(iommu, dsa):
        pytest.skip("no SMMUv3")
    with fails(errno.EOPNOTSUPP):
        Space(
            dsa.vfio.kernel,
            iommu,
            dsa.vfio.devid,
            b"p",
            spaces[0].pages,
            IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_PASID,
        )
    parent = hwpt_alloc(iommu, dsa.vfio.devid, spaces[0].ioas, IOMMU_HWPT_ALLOC_NEST_PARENT)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, parent)
    dsa.vfio.attach(parent)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, spaces[1].hwpt)
    dsa.vfio.detach()
    dsa.vfio.attach_pasid(5, spaces[1].hwpt)
    with fails(errno.EINVAL):
        dsa.vfio.attach(parent)


def test_pasids_stay_attached_over_a_reset(dsa: Dsa, spaces: list[Space], records: Buffer, mode: int) -> None:
    a, b, _ = spaces
    dsa.vfio.attach(a.hwpt)
    dsa.vfio.attach_pasid(5, b.hwpt)
    queue = dsa.queue(0, 5, mode).record_in(records, RECORDS)
    assert reached(queue, spaces) == "b"
    dsa.vfio.reset()
    dsa.restart()
    for pasid, letter in ((None, "a"), (5, "b")):
        queue = dsa.queue(0, pasid, mode).record_in(records, RECORDS)
        assert reached(queue, spaces) == letter
        dsa.disable(queue)
    unmap(b.iommu, b.ioas, NAME, PAGE)
    queue = dsa.queue(0, 5, mode).record_in(records, RECORDS)
    assert reached(queue, spaces) == "-"


def test_closing_the_device_detaches_what_is_attached(dsa: Dsa, spaces: list[Space], queues: list[Queue]) -> None:
    dsa.vfio.attach(spaces[0].hwpt)
    dsa.vfio.attach_pasid(5, spaces[1].hwpt)
    assert reached(queues[1], spaces) == "b"
    dsa.close()
    for space in spaces:
        destroy(space.iommu, space.hwpt)
        destroy(space.iommu, space.ioas)
