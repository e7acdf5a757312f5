"""Nested HWPTs on PASIDs behind VT-d: each PASID has a guest's table of its own, on one parent.

Mirrors intel_nested_set_dev_pasid() of drivers/iommu/intel/nested.c and what it shares with the attachment of paging
domains in iommu.c; with page requests, prq.c. Such HWPTs of the device itself are in test_vtd_nested.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from conformance.drivers.dsa import FILL, SUCCESS, WQ_BLOCK, WQ_NO_ATS, Dsa, Queue
from conformance.dsa_offers import has_ats
from conformance.mock import answer_faults, fault_queue, read_faults
from conformance.mock_dirty import get_dirty, set_tracking
from conformance.spaces import is_shut_out
from conformance.steps import PAGE, U64_MAX, destroy, fails, hwpt_alloc, unmap
from conformance.vtd_guest import GPA, PAGES, RW, US, Guest, P, flush
from uapi.backend import Backend, File
from uapi.iommufd import (
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_PGFAULT_FLAGS_LAST_PAGE,
    IOMMU_PGFAULT_FLAGS_PASID_VALID,
    IOMMU_PGFAULT_PERM_WRITE,
)

pytestmark = [
    pytest.mark.since("7.3"),
    pytest.mark.needs("iommu", "root", "vfio_cdev", "vtd", "nesting", "dsa", "pasid"),
]

PASID, DIRTY, FAULT = IOMMU_HWPT_ALLOC_PASID, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_FAULT_ID_VALID
#: In each guest table: the page of the completion records, and the page that tells the tables apart.
RECORDS, VA = 0x10_0000, 0x4000_0000
#: The guest's pages for them: records, and what VA is in the tables "a", "b", "c".
RECORD_PAGE, LETTERS = -1, {"a": -2, "b": -3, "c": -4}
MARK = 0x1122334455667788


class PasidGuest(Guest):
    """A guest with a table a letter, and a nested HWPT on each."""

    def __init__(self, kernel: Backend, iommu: File, dsa: Dsa, ioas: int, flags: int = 0) -> None:
        super().__init__(kernel, iommu, dsa.vfio, ioas, flags | PASID)
        self.roots = {letter: self.new_table() for letter in LETTERS}
        self.hwpts = {}
        for letter in LETTERS:
            self.use(letter)
            self.map(RECORDS, self.page(RECORD_PAGE))
            self.map(VA, self.page(LETTERS[letter]))
            self.hwpts[letter] = self.nested(hwpt_flags=PASID)
        #: The page of the records, as a buffer of its own.
        self.records = _Page(self)

    def close(self) -> None:
        self.records.view.release()
        self.buffer.close()

    def use(self, letter: str) -> None:
        """Have `map` and its like work on the table of that letter."""
        self.root = self.roots[letter]

    def reached(self, queue: Queue, va: int = VA) -> str:
        """The letters whose pages a write to `va` changes, "-" for none."""
        for page in LETTERS.values():
            self.write(self.page(page), bytes(8))
        status = queue.fill(MARK, va, 8).status
        found = [letter for letter, page in LETTERS.items() if self.word(self.page(page)) == MARK]
        assert (status == SUCCESS) == bool(found)
        return "".join(found) or "-"


@pytest.fixture(params=[WQ_BLOCK, WQ_BLOCK | WQ_NO_ATS], ids=["ats", "no_ats"])
def mode(request: pytest.FixtureRequest, dsa: Dsa) -> int:
    """Flags of a queue: with the device TLB, if the device has one, and without."""
    if not request.param & WQ_NO_ATS and not has_ats(dsa.vfio):
        pytest.skip("the device has no ATS")
    return int(request.param)


@pytest.fixture
def guest(kernel: Backend, iommu: File, dsa: Dsa, ioas: int) -> Iterator[PasidGuest]:
    guest = PasidGuest(kernel, iommu, dsa, ioas, DIRTY)
    yield guest
    guest.close()


def queue_for(guest: PasidGuest, dsa: Dsa, pasid: int | None, mode: int, index: int = 0, gpa: bool = False) -> Queue:
    """A queue of a PASID, whose records are at RECORDS; `gpa`: at their guest-physical address."""
    queue = dsa.queue(index, pasid, mode)
    return queue.record_in(guest.records, guest.page(RECORD_PAGE) if gpa else RECORDS)  # type: ignore[arg-type]


class _Page:
    """The page of the records as a buffer of its own."""

    def __init__(self, guest: Guest) -> None:
        start = guest.page(RECORD_PAGE) - GPA
        self.view = guest.buffer.view[start : start + PAGE]
        self.length = PAGE


# -- which table -----------------------------------------------------------------------------------------------------


def test_each_pasid_goes_through_its_own_table(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    own = queue_for(guest, dsa, None, mode, 0, gpa=True)
    five, six = queue_for(guest, dsa, 5, mode, 1), queue_for(guest, dsa, 6, mode, 2)
    dsa.vfio.attach(guest.parent)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    dsa.vfio.attach_pasid(6, guest.hwpts["b"])
    assert [guest.reached(five), guest.reached(six)] == ["a", "b"]
    assert guest.reached(own, guest.page(LETTERS["c"])) == "c"
    assert [guest.reached(five), guest.reached(six)] == ["a", "b"]


def test_one_nested_hwpt_serves_the_device_and_its_pasids(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    own, five = queue_for(guest, dsa, None, mode), queue_for(guest, dsa, 5, mode, 1)
    dsa.vfio.attach(guest.hwpts["a"])
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    assert [guest.reached(own), guest.reached(five)] == ["a", "a"]
    dsa.vfio.attach(guest.hwpts["b"])
    assert [guest.reached(own), guest.reached(five)] == ["b", "a"]


def test_replaced_pasid_goes_through_the_new_table(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    five = queue_for(guest, dsa, 5, mode)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    assert guest.reached(five) == "a"
    dsa.vfio.attach_pasid(5, guest.hwpts["b"])
    assert guest.reached(five) == "b"
    destroy(guest.iommu, guest.hwpts["a"])
    dsa.vfio.attach_pasid(5, guest.parent)
    through = queue_for(guest, dsa, 5, mode, 1, gpa=True)
    assert guest.reached(through, guest.page(LETTERS["c"])) == "c"
    dsa.vfio.attach_pasid(5, guest.hwpts["c"])
    assert guest.reached(five) == "c"


def test_detached_pasid_reaches_nothing(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    five = queue_for(guest, dsa, 5, mode)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    assert guest.reached(five) == "a"
    with fails(errno.EBUSY):
        destroy(guest.iommu, guest.hwpts["a"])
    dsa.vfio.detach_pasid(5)
    assert is_shut_out(five, dsa)
    destroy(guest.iommu, guest.hwpts["a"])


def test_nested_hwpt_without_the_flag_takes_no_pasid(guest: PasidGuest, dsa: Dsa) -> None:
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, guest.nested())


@pytest.mark.parametrize("width", [0, 39, 64])
def test_failed_replace_shows_the_old_hwpt_and_translates_nothing(
    guest: PasidGuest, dsa: Dsa, mode: int, width: int
) -> None:
    """The old entry was torn down for the new one and is not put back; asking for the old HWPT again does nothing."""
    five = queue_for(guest, dsa, 5, mode)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    assert guest.reached(five) == "a"
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, guest.nested(hwpt_flags=PASID, addr_width=width))
    assert is_shut_out(five, dsa)
    with fails(errno.EBUSY):
        destroy(guest.iommu, guest.hwpts["a"])
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    assert is_shut_out(five, dsa)
    dsa.vfio.attach_pasid(5, guest.hwpts["b"])
    assert guest.reached(five) == "b"


def test_failed_replace_leaves_no_tracking_of_what_it_tore_down(guest: PasidGuest, dsa: Dsa) -> None:
    """The parent counts the PASID still, finds no second stage in its entry, and refuses."""
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, guest.nested(hwpt_flags=PASID, addr_width=1))
    with fails(errno.EOPNOTSUPP):
        set_tracking(guest.iommu, guest.parent)
    dsa.vfio.detach_pasid(5)
    set_tracking(guest.iommu, guest.parent)


def test_first_attach_that_fails_leaves_nothing(guest: PasidGuest, dsa: Dsa) -> None:
    bad = guest.nested(hwpt_flags=PASID, addr_width=39)
    with fails(errno.EINVAL):
        dsa.vfio.attach_pasid(5, bad)
    destroy(guest.iommu, bad)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])


# -- caches ----------------------------------------------------------------------------------------------------------


def test_invalidation_reaches_all_pasids_of_the_hwpt(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    five, six = queue_for(guest, dsa, 5, mode), queue_for(guest, dsa, 6, mode, 1)
    for pasid in (5, 6):
        dsa.vfio.attach_pasid(pasid, guest.hwpts["a"])
    assert [guest.reached(five), guest.reached(six)] == ["a", "a"]
    guest.use("a")
    guest.map(VA, guest.page(LETTERS["b"]))
    assert flush(guest.iommu, guest.hwpts["a"], (VA, 1)) == 1
    assert [guest.reached(five), guest.reached(six)] == ["b", "b"]
    guest.map(VA, guest.page(LETTERS["c"]))
    assert flush(guest.iommu, guest.hwpts["a"], (0, U64_MAX)) == 1
    assert [guest.reached(five), guest.reached(six)] == ["c", "c"]


def test_page_that_the_parent_loses_is_gone_for_every_pasid(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    """In device TLBs, too, where it was translated all the way."""
    five, six = queue_for(guest, dsa, 5, mode), queue_for(guest, dsa, 6, mode, 1)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    dsa.vfio.attach_pasid(6, guest.hwpts["b"])
    assert [guest.reached(five), guest.reached(six)] == ["a", "b"]
    unmap(guest.iommu, guest.ioas, GPA, PAGES * PAGE)
    assert is_shut_out(five, dsa)
    assert is_shut_out(six, dsa)


# -- dirty bits ------------------------------------------------------------------------------------------------------


@pytest.mark.needs("dirty")
def test_writes_of_every_pasid_are_in_the_parents_bitmap(guest: PasidGuest, dsa: Dsa, mode: int) -> None:
    five, six = queue_for(guest, dsa, 5, mode), queue_for(guest, dsa, 6, mode, 1)
    dsa.vfio.attach_pasid(5, guest.hwpts["a"])
    set_tracking(guest.iommu, guest.parent)
    dsa.vfio.attach_pasid(6, guest.hwpts["b"])
    first = PAGES + LETTERS["c"]

    def dirty() -> int:
        return get_dirty(guest.iommu, guest.parent, GPA + first * PAGE, 4 * PAGE)

    for queue, page in ((five, LETTERS["a"]), (six, LETTERS["b"]), (five, LETTERS["a"])):
        assert dirty() == 0
        assert queue.fill(MARK, VA, 8).status == SUCCESS
        assert dirty() == 1 << (PAGES + page - first) | 1 << (PAGES + RECORD_PAGE - first)


# -- page requests ---------------------------------------------------------------------------------------------------


@pytest.mark.needs("pri")
@pytest.mark.parametrize("pasid", [5, None])
def test_guest_serves_a_page_request(
    kernel: Backend, iommu: File, asking_dsa: Dsa, ioas: int, pasid: int | None
) -> None:
    """The VMM hands it to the guest, which maps the page and answers; the device goes on."""
    guest = PasidGuest(kernel, iommu, asking_dsa, ioas)
    fault_id, file = fault_queue(kernel, iommu)
    with file:
        guest.use("a")
        hwpt = guest.nested(hwpt_flags=PASID | FAULT, fault_id=fault_id)
        if pasid is None:
            asking_dsa.vfio.attach(hwpt)
        else:
            asking_dsa.vfio.attach_pasid(pasid, hwpt)
        queue = queue_for(guest, asking_dsa, pasid, WQ_BLOCK)
        job = queue.submit(FILL, MARK, VA + PAGE, 8)
        (fault,) = read_faults(file)
        assert (fault.dev_id, fault.pasid, fault.addr) == (1, pasid or 0, VA + PAGE)
        assert fault.perm & IOMMU_PGFAULT_PERM_WRITE
        # With a PASID the kernel lets a flag of its own through: the response is to carry it.
        flags = IOMMU_PGFAULT_FLAGS_LAST_PAGE | (0 if pasid is None else IOMMU_PGFAULT_FLAGS_PASID_VALID | 4)
        assert fault.flags == flags
        assert job.poll() is None
        guest.map(VA + PAGE, guest.page(LETTERS["c"]), P | RW | US)
        answer_faults(file, fault.cookie)
        assert job.wait().status == SUCCESS
        assert guest.word(guest.page(LETTERS["c"])) == MARK
        if pasid is None:
            asking_dsa.vfio.detach()
        else:
            asking_dsa.vfio.detach_pasid(pasid)
    guest.close()


def test_parent_for_pasids_is_none_without_nesting_flag(guest: PasidGuest, dsa: Dsa) -> None:
    plain = hwpt_alloc(guest.iommu, dsa.vfio.devid, guest.ioas, PASID)
    guest.parent = plain
    with fails(errno.EINVAL):
        guest.nested(hwpt_flags=PASID)
