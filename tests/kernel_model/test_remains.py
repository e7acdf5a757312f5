"""What is kept of a process that goes (kernel_model/process.py, kernel_model/client_memory.py)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakedev.memory import BusAbort
from kernel_model.errors import KernelError
from kernel_model.kernel import Kernel

PAGE = 4096
PAGES = 12
#: More than is read at once.
LARGE = (1 << 20) + 3 * PAGE

ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4)).map(lambda r: (r[0], min(r[1], PAGES - r[0])))


def content(first: int, count: int) -> bytes:
    return b"".join(bytes([page + 1]) * PAGE for page in range(first, first + count))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pinned=st.lists(ranges, max_size=5), dropped=st.integers(0, 5), asked=st.lists(ranges, min_size=3, max_size=6))
def test_exactly_the_pinned_pages_are_kept(
    pinned: list[tuple[int, int]], dropped: int, asked: list[tuple[int, int]]
) -> None:
    with Kernel("bare") as kernel:
        client = kernel.spawn()
        base = client.allocate(PAGES * PAGE)
        client.poke(base, content(0, PAGES))
        mm = client._process.mm
        release = [mm.pin(base + first * PAGE, count * PAGE) for first, count in pinned]
        for unpin in release[:dropped]:
            unpin()
        kept = {page for first, count in pinned[dropped:] for page in range(first, first + count)}
        client.exit()
        for first, count in asked:
            at = mm.physical(base + first * PAGE)
            if kept.issuperset(range(first, first + count)):
                assert kernel.memory.read(at, count * PAGE) == content(first, count)
                kernel.memory.write(at + 1, content(first, count)[1:])
                assert kernel.memory.read(at + count * PAGE - 1, 1) == bytes([first + count])
            else:
                with pytest.raises(BusAbort):
                    kernel.memory.read(at, count * PAGE)
        for unpin in release[dropped:]:
            unpin()
        assert mm.remains == []


def test_large_ranges_and_holes_in_them() -> None:
    with Kernel("bare") as kernel:
        client = kernel.spawn()
        base = client.allocate(2 * LARGE)
        client.poke(base + LARGE - 2, b"across")
        mm = client._process.mm
        mm.pin(base, 2 * LARGE)
        client.free(base + 5 * PAGE, PAGE)
        client.exit()
        assert kernel.memory.read(mm.physical(base + LARGE - 2), 6) == b"across"
        assert kernel.memory.read(mm.physical(base + 6 * PAGE), 2 * LARGE - 6 * PAGE).strip(b"\0") == b"across"
        for address in (base + 5 * PAGE, base + 5 * PAGE - 1):
            with pytest.raises(BusAbort):
                kernel.memory.read(mm.physical(address), 2)


def test_window_is_given_away_when_nothing_is_pinned_in_it() -> None:
    with Kernel("bare") as kernel:
        held = []
        for _ in range(10):
            client = kernel.spawn()
            held.append(client._process.mm.pin(client.allocate(PAGE), PAGE))
            client.exit()
        for _ in range(20):  # more than there are windows
            kernel.spawn().exit()
        for unpin in held:
            unpin()
        clients = [kernel.spawn() for _ in range(14)]
        with pytest.raises(OSError, match="15 client processes"):
            kernel.spawn()
        for client in clients:
            client.exit()


def test_memory_of_the_dead_is_no_callers_memory() -> None:
    with Kernel("bare") as kernel:
        client = kernel.spawn()
        address = client.allocate(PAGE)
        mm = client._process.mm
        mm.pin(address, PAGE)
        client.exit()
        with pytest.raises(KernelError):
            mm.read(address, 1)
        assert mm.vmas(address, address + PAGE) == []
