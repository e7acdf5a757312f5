"""dma-bufs (kernel_model/dma_buf.py, kernel_model/iommufd/pages_dmabuf.py): which domain holds what, and no leaks."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.mock import dmabuf_get, dmabuf_revoke, mock_domain
from conformance.steps import PAGE, answer, copy, destroy, ioas_alloc, map_file, unmap
from kernel_model.iommufd.hwpt import HwptPaging
from kernel_model.iommufd.ioas import Ioas
from kernel_model.kernel import Kernel

START = 1 << 24
BUFFERS = 2
SLOTS = 6

steps = st.one_of(
    st.tuples(st.just("map"), st.integers(0, BUFFERS - 1), st.integers(0, SLOTS - 1)),
    st.tuples(st.just("copy"), st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)),
    st.tuples(st.just("unmap"), st.integers(0, SLOTS - 1), st.just(0)),
    st.tuples(st.just("revoke"), st.integers(0, BUFFERS - 1), st.integers(0, 1)),
    st.tuples(st.just("attach"), st.just(0), st.just(0)),
    st.tuples(st.just("detach"), st.just(0), st.just(0)),
)


def iova(slot: int) -> int:
    return START + slot * PAGE


@settings(max_examples=60, deadline=None)
@given(program=st.lists(steps, max_size=25))
def test_domains_hold_what_is_mapped_and_not_revoked(program: list[tuple[str, int, int]]) -> None:
    with Kernel("mock") as kernel, kernel.open("/dev/iommu") as iommu:
        ioas = ioas_alloc(iommu)
        fds = [dmabuf_get(iommu, PAGE) for _ in range(BUFFERS)]
        revoked = [False] * BUFFERS
        #: Slot -> (buffer, whether it has been cut off): a cell that copies share.
        mapped: dict[int, tuple[int, list[bool]]] = {}
        devices: list[int] = []
        for what, one, two in program:
            if what == "map":
                done = answer(map_file, iommu, ioas, fds[one], 0, PAGE, iova(two)) == 0
                assert done == (two not in mapped and not revoked[one])
                if done:
                    mapped[two] = one, [False]
            elif what == "copy":
                if answer(copy, iommu, ioas, ioas, iova(one), PAGE, iova(two)) == 0:
                    mapped[two] = mapped[one]
            elif what == "unmap":
                assert (answer(unmap, iommu, ioas, iova(one), PAGE) == 0) == (one in mapped)
                mapped.pop(one, None)
            elif what == "revoke":
                dmabuf_revoke(iommu, fds[one], two)
                revoked[one] = bool(two)
                for buffer, cut in mapped.values():
                    cut[0] |= buffer == one
            elif what == "attach":
                devices.append(mock_domain(iommu, ioas).stdev)
            elif devices:
                destroy(iommu, devices.pop())
            (context,) = kernel.contexts
            assert context.objects.get(ioas, Ioas).iopt.areas.keys() == {iova(slot) for slot in mapped}
            for hwpt in context.objects.each(HwptPaging):
                assert hwpt.domain is not None
                for slot in range(SLOTS):
                    there = hwpt.domain.iova_to_phys(iova(slot)) is not None
                    assert there == (slot in mapped and not mapped[slot][1][0])
        for fd in fds:
            os.close(fd)
        while devices:
            destroy(iommu, devices.pop())
        for slot in mapped:
            unmap(iommu, ioas, iova(slot), PAGE)
        kernel.status("VmPin")  # any call: it notices the closed descriptors
        assert len(kernel.shared_files) == 0


def test_what_7_3_returns_on_request() -> None:
    with Kernel("mock", dmabuf_get="0") as kernel, kernel.open("/dev/iommu") as iommu:
        before = set(os.listdir("/proc/self/fd"))
        assert dmabuf_get(iommu, PAGE) == 0
        # The descriptor is there all the same, beside the model's end of it and the memory.
        assert len(set(os.listdir("/proc/self/fd")) - before) == 3
    with pytest.raises(ValueError, match="'fd' or '0'"):
        Kernel("mock", dmabuf_get="1")
