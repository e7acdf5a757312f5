"""Rules of vIOMMUs and of their queues that hold for any sequence of calls, held against simpler ways to say them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.mock import APERTURE, mock_domain, mock_replace
from conformance.mock_guest import (
    EVENT,
    HEADER,
    PUBLISHED,
    guest,
    hw_queue_alloc,
    nested_hwpt,
    publish,
    trigger_vevent,
    vdevice_alloc,
    veventq_alloc,
    viommu_alloc,
)
from conformance.steps import answer, destroy, ioas_alloc, map_user, unmap
from kernel_model.kernel import Kernel
from uapi.iommufd import IOMMU_VEVENTQ_FLAG_LOST_EVENTS

PAGE = 4096


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with Kernel("mock") as kernel:
        yield kernel


class Expected:
    """A queue as a list: each event is (sequence, whether it stands for lost ones)."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.entries: list[tuple[int, bool]] = []
        self.sequence = 0

    def report(self) -> None:
        if self.entries and self.entries[-1][1]:
            self.entries.pop()
        full = len(self.entries) == self.depth
        self.entries.append((self.sequence, full))
        self.sequence += 1

    def read(self, count: int) -> bytes | int:
        if count < HEADER.size:
            return errno.EINVAL
        data = b""
        while self.entries:
            sequence, lost = self.entries[0]
            one = HEADER.pack(IOMMU_VEVENTQ_FLAG_LOST_EVENTS, sequence) if lost else EVENT.pack(0, sequence, 0x99)
            if len(data) + len(one) > count:
                return data or errno.EINVAL
            data += one
            self.entries.pop(0)
        return data


@settings(max_examples=150, deadline=None)
@given(depth=st.integers(1, 5), steps=st.lists(st.one_of(st.just(-1), st.integers(0, 90)), max_size=40))
def test_queue_is_a_list_with_room_for_so_many(kernel: Kernel, depth: int, steps: list[int]) -> None:
    """-1 reports an event, another number reads so many bytes."""
    with kernel.open("/dev/iommu") as iommu:
        ids = guest(iommu)
        nested = nested_hwpt(iommu, ids.idev, ids.viommu)
        vdevice_alloc(iommu, ids.viommu, ids.idev, 0x99)
        mock_replace(iommu, ids.stdev, nested)
        _, file = veventq_alloc(kernel, iommu, ids.viommu, depth)
        expected = Expected(depth)
        for step in steps:
            if step < 0:
                trigger_vevent(iommu, ids.idev)
                expected.report()
                continue
            found: bytes | int
            try:
                found = file.read(step)
            except OSError as error:
                found = error.errno or 0
            assert found == expected.read(step)
            assert bool(file.poll(1)) == bool(expected.entries)
        file.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=25))
def test_ranges_lie_lowest_first_and_never_on_each_other(kernel: Kernel, steps: list[int | None]) -> None:
    """None publishes, a number takes the range of that rank away."""
    with kernel.open("/dev/iommu") as iommu:
        ids = guest(iommu)
        live: dict[int, int] = {}
        for step in steps:
            if step is None:
                number, offset = publish(iommu, ids)
                assert offset == next(at for at in range(PAGE, 1 << 20, PUBLISHED) if at not in live)
                live[offset] = number
            elif live:
                destroy(iommu, live.pop(sorted(live)[step % len(live)]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["device", "go", "vdevice", "destroy"]), max_size=30), st.randoms(use_true_random=False)
)
def test_tombstones_are_the_ids_of_vdevices_whose_device_went(kernel: Kernel, steps: list[str], random: Random) -> None:
    with kernel.open("/dev/iommu") as iommu:
        ids = guest(iommu)
        devices = {ids.stdev: ids.idev}
        vdevices: dict[int, int] = {}
        dead: set[int] = set()
        for step in steps:
            if step == "device":
                made = mock_domain(iommu, ids.parent)
                devices[made.stdev] = made.idev
            elif not devices:
                continue
            stdev = random.choice(sorted(devices))
            if step == "go":
                destroy(iommu, stdev)
                del devices[stdev]
                if stdev in vdevices:
                    dead.add(vdevices.pop(stdev))
            elif step == "vdevice":
                if stdev in vdevices:
                    assert answer(vdevice_alloc, iommu, ids.viommu, devices[stdev], 99) == errno.EEXIST
                else:
                    vdevices[stdev] = vdevice_alloc(iommu, ids.viommu, devices[stdev], stdev)
            elif step == "destroy" and stdev in vdevices:
                destroy(iommu, vdevices.pop(stdev))
        for number in dead:
            assert answer(destroy, iommu, number) == errno.ENOENT
        new = {ioas_alloc(iommu) for _ in range(20)}
        assert not new & dead
    with kernel.open("/dev/iommu") as again:
        assert ioas_alloc(again) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("queue"), st.integers(0, 7 * PAGE), st.integers(1, 3 * PAGE)),
            st.tuples(st.just("unmap"), st.integers(0, 7), st.integers(1, 8)),
            st.tuples(st.just("destroy"), st.integers(0, 9), st.just(0)),
        ),
        max_size=20,
    )
)
def test_unmap_stops_at_the_first_page_of_a_queue(kernel: Kernel, steps: list[tuple[str, int, int]]) -> None:
    """Eight pages, each a mapping of its own; every queue has a vIOMMU of its own."""
    start = APERTURE[0]
    with kernel.open("/dev/iommu") as iommu, kernel.buffer(8 * PAGE) as memory:
        ids = guest(iommu)
        for page in range(8):
            map_user(iommu, ids.ioas, memory.address + page * PAGE, PAGE, start + page * PAGE)
        mapped = set(range(8))
        queues: list[tuple[int, set[int]]] = []
        for step, first, count in steps:
            if step == "queue":
                pages = set(range(first // PAGE, (first + count - 1) // PAGE + 1))
                viommu = viommu_alloc(iommu, ids.idev, ids.parent)
                if pages <= mapped:
                    queues.append((hw_queue_alloc(iommu, viommu, 0, start + first, count), pages))
                else:
                    assert answer(hw_queue_alloc, iommu, viommu, 0, start + first, count) == errno.ENOENT
                    destroy(iommu, viommu)
            elif step == "destroy" and queues:
                destroy(iommu, queues.pop(first % len(queues))[0])
            elif step == "unmap":
                there = sorted(page for page in mapped if first <= page < first + count)
                locked = set().union(*(pages for _, pages in queues))
                stop = next((page for page in there if page in locked), None)
                expected = errno.EBUSY if stop is not None else 0 if there else errno.ENOENT
                assert answer(unmap, iommu, ids.ioas, start + first * PAGE, count * PAGE) == expected
                mapped -= {page for page in there if stop is None or page < stop}


def test_mapping_that_outlives_the_kernel_can_be_closed() -> None:
    with Kernel("mock") as short:
        iommu = short.open("/dev/iommu")
        _, offset = publish(iommu, guest(iommu))
        mapping = iommu.mmap(PUBLISHED, offset)
    assert mapping.read(0, 4) == 0xBEEF
    mapping.close()
    iommu.close()


def test_without_dev_shm_the_pages_lie_in_a_memfd(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_model.iommufd.published._SHM", "/nowhere")
    with kernel.open("/dev/iommu") as iommu:
        _, offset = publish(iommu, guest(iommu))
        with iommu.mmap(PUBLISHED, offset) as one, iommu.mmap(PUBLISHED, offset) as two:
            one.write(4, 4, 9)
            assert (two.read(0, 4), two.read(4, 4)) == (0xBEEF, 9)


def test_no_memory_for_the_pages_is_enomem_and_leaves_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel.open("/dev/iommu") as iommu:
        ids = guest(iommu)

        def full(fd: int, data: bytes, offset: int) -> int:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", full)
            assert answer(publish, iommu, ids) == errno.ENOMEM
        assert publish(iommu, ids) == (ids.viommu + 1, PAGE)
