"""What one call of each ioctl of iommufd costs, as one client of any backend with the mock driver.

A call that makes something is timed alone, a batch at a time; what it made is destroyed between the batches. Figures
are in microseconds a call, the best of several rounds, as in `iommulab.measure`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from uapi import iommufd as api
from uapi import iommufd_test as mock
from uapi.backend import DEV_IOMMU, Backend, Buffer, File
from uapi.ioctl import Ioctl

_PAGE = 4096
_BATCH, _ROUNDS = 50, 5
_FIXED = api.IOMMU_IOAS_MAP_FIXED_IOVA | api.IOMMU_IOAS_MAP_READABLE | api.IOMMU_IOAS_MAP_WRITEABLE
_START = mock.MOCK_APERTURE_START

Undo = Callable[[Any], object]
Prepare = Callable[[int, Any], object]


class _World:
    """One context with an object of each kind on the mock driver."""

    def __init__(self, kernel: Backend, iommu: File, buffer: Buffer) -> None:
        self.kernel = kernel
        self.iommu = iommu
        self.buffer = buffer
        self.ioas = api.IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        self.other = api.IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        self.device = self.mock_device(self.ioas)
        self.scratch = kernel.buffer(_PAGE)

    def mock_device(self, pt_id: int) -> int:
        """The id of a new mock device that is attached there."""
        reply = mock.IOMMU_TEST_CMD.make(op=mock.IOMMU_TEST_OP_MOCK_DOMAIN, id=pt_id)
        mock.IOMMU_TEST_CMD.raw(self.iommu, reply)
        return int(reply.mock_domain.out_idev_id)

    # -- timing ------------------------------------------------------------------------------------------------------

    def cost(
        self,
        ioctl: Ioctl[Any],
        fields: dict[str, int] | None = None,
        *,
        prepare: Prepare | None = None,
        undo: Undo | None = None,
    ) -> float:
        """A batch of calls; `prepare` gets each one's number and argument before it, `undo` the argument after it."""
        number, call = ioctl.number, self.iommu.ioctl

        def batch() -> float:
            args = [ioctl.make(**(fields or {})) for _ in range(_BATCH)]
            if prepare is not None:
                for index, arg in enumerate(args):
                    prepare(index, arg)
            begin = time.perf_counter()
            for arg in args:
                call(number, arg)
            took = time.perf_counter() - begin
            if undo is not None:
                for arg in args:
                    undo(arg)
            return took

        return self._rounds(batch)

    def lone(self, ioctl: Ioctl[Any], fields: dict[str, int], *, undo: Undo) -> float:
        """As `cost`, for what can be there only once: each is undone before the next."""
        arg, number, call = ioctl.make(**fields), ioctl.number, self.iommu.ioctl

        def batch() -> float:
            took = 0.0
            for _ in range(_BATCH):
                begin = time.perf_counter()
                call(number, arg)
                took += time.perf_counter() - begin
                undo(arg)
            return took

        return self._rounds(batch)

    @staticmethod
    def _rounds(batch: Callable[[], float]) -> float:
        batch()
        gc.disable()
        try:
            return min(batch() for _ in range(_ROUNDS)) / _BATCH * 1e6
        finally:
            gc.enable()

    def destroys(self, member: str) -> Undo:
        """Destroy the object whose id is in `member` of the reply."""
        return lambda arg: self.destroy(getattr(arg, member))

    def destroy(self, number: int) -> None:
        api.IOMMU_DESTROY(self.iommu, id=number)

    def map(self, ioas: int, iova: int, length: int) -> None:
        api.IOMMU_IOAS_MAP(
            self.iommu, ioas_id=ioas, flags=_FIXED, user_va=self.buffer.address, length=length, iova=iova
        )

    def unmap(self, ioas: int, iova: int, length: int = _PAGE) -> None:
        api.IOMMU_IOAS_UNMAP(self.iommu, ioas_id=ioas, iova=iova, length=length)


def _ascending(member: str) -> Prepare:
    return lambda index, arg: setattr(arg, member, _START + index * _PAGE)


def _ioas(world: _World) -> Iterator[tuple[str, float]]:
    yield "IOAS_ALLOC", world.cost(api.IOMMU_IOAS_ALLOC, undo=world.destroys("out_ioas_id"))

    def alloc(index: int, arg: Any) -> None:
        arg.id = api.IOMMU_IOAS_ALLOC(world.iommu).out_ioas_id

    yield "DESTROY of an IOAS", world.cost(api.IOMMU_DESTROY, prepare=alloc)
    option = {"option_id": api.IOMMU_OPTION_HUGE_PAGES, "op": api.IOMMU_OPTION_OP_GET, "object_id": world.ioas}
    yield "OPTION, get", world.cost(api.IOMMU_OPTION, option)
    api.IOMMU_VFIO_IOAS(world.iommu, op=api.IOMMU_VFIO_IOAS_SET, ioas_id=world.other)
    yield "VFIO_IOAS, get", world.cost(api.IOMMU_VFIO_IOAS, {"op": api.IOMMU_VFIO_IOAS_GET})
    ranges = {"ioas_id": world.ioas, "allowed_iovas": world.scratch.address, "num_iovas": 8}
    yield "IOAS_IOVA_RANGES", world.cost(api.IOMMU_IOAS_IOVA_RANGES, ranges)
    yield "IOAS_ALLOW_IOVAS, none", world.cost(api.IOMMU_IOAS_ALLOW_IOVAS, {"ioas_id": world.other})
    yield "IOAS_CHANGE_PROCESS", world.cost(api.IOMMU_IOAS_CHANGE_PROCESS)


def _mappings(world: _World) -> Iterator[tuple[str, float]]:
    at_iova = _ascending("iova")
    page = {"flags": _FIXED, "length": _PAGE}
    for name, ioas in (("no domain", world.other), ("one domain", world.ioas)):
        map_ = {"ioas_id": ioas, "user_va": world.buffer.address, **page}
        cost = world.cost(
            api.IOMMU_IOAS_MAP, map_, prepare=at_iova, undo=lambda arg: world.unmap(arg.ioas_id, arg.iova)
        )
        yield f"IOAS_MAP 4 KiB, {name}", cost

        def map_it(index: int, arg: Any) -> None:
            at_iova(index, arg)
            world.map(arg.ioas_id, arg.iova, _PAGE)

        unmap = {"ioas_id": ioas, "length": _PAGE}
        yield f"IOAS_UNMAP 4 KiB, {name}", world.cost(api.IOMMU_IOAS_UNMAP, unmap, prepare=map_it)
    source = _START + (1 << 20)
    world.map(world.other, source, _PAGE)
    copy = {"dst_ioas_id": world.ioas, "src_ioas_id": world.other, "src_iova": source, **page}
    yield (
        "IOAS_COPY 4 KiB, one domain",
        world.cost(
            api.IOMMU_IOAS_COPY,
            copy,
            prepare=_ascending("dst_iova"),
            undo=lambda arg: world.unmap(world.ioas, arg.dst_iova),
        ),
    )
    world.unmap(world.other, source)
    fd = os.memfd_create("iommulab-measure")
    os.ftruncate(fd, _PAGE)
    file = {"ioas_id": world.ioas, "fd": fd, **page}
    file_undo: Undo = lambda arg: world.unmap(world.ioas, arg.iova)  # noqa: E731
    yield "IOAS_MAP_FILE 4 KiB, one domain", world.cost(api.IOMMU_IOAS_MAP_FILE, file, prepare=at_iova, undo=file_undo)
    os.close(fd)


def _hwpt(world: _World) -> Iterator[tuple[str, float]]:
    yield "GET_HW_INFO", world.cost(api.IOMMU_GET_HW_INFO, {"dev_id": world.device})
    paging = {"dev_id": world.device, "pt_id": world.other}
    yield "HWPT_ALLOC, paging", world.cost(api.IOMMU_HWPT_ALLOC, paging, undo=world.destroys("out_hwpt_id"))
    dirty = api.IOMMU_HWPT_ALLOC(world.iommu, flags=api.IOMMU_HWPT_ALLOC_DIRTY_TRACKING, **paging).out_hwpt_id
    enable = {"hwpt_id": dirty, "flags": api.IOMMU_HWPT_DIRTY_TRACKING_ENABLE}
    yield "HWPT_SET_DIRTY_TRACKING", world.cost(api.IOMMU_HWPT_SET_DIRTY_TRACKING, enable)
    length = 64 * _PAGE
    world.map(world.other, _START, length)
    get = {"hwpt_id": dirty, "iova": _START, "length": length, "page_size": _PAGE, "data": world.scratch.address}
    yield "HWPT_GET_DIRTY_BITMAP of 64 pages", world.cost(api.IOMMU_HWPT_GET_DIRTY_BITMAP, get)
    world.unmap(world.other, _START, length)
    world.destroy(dirty)


def _queues(world: _World) -> Iterator[tuple[str, float]]:
    def close(arg: Any) -> None:
        os.close(arg.out_fault_fd)
        world.destroy(arg.out_fault_id)

    yield "FAULT_QUEUE_ALLOC", world.cost(api.IOMMU_FAULT_QUEUE_ALLOC, undo=close)


def _nested(world: _World) -> Iterator[tuple[str, float]]:
    flags = api.IOMMU_HWPT_ALLOC_NEST_PARENT
    parent = api.IOMMU_HWPT_ALLOC(world.iommu, flags=flags, dev_id=world.device, pt_id=world.ioas).out_hwpt_id
    world.scratch.view[:64] = bytes(64)
    nested = {"dev_id": world.device, "pt_id": parent, "data_type": mock.IOMMU_HWPT_DATA_SELFTEST}
    nested |= {"data_uptr": world.scratch.address, "data_len": ctypes.sizeof(mock.iommu_hwpt_selftest)}
    yield "HWPT_ALLOC, nested", world.cost(api.IOMMU_HWPT_ALLOC, nested, undo=world.destroys("out_hwpt_id"))
    hwpt = api.IOMMU_HWPT_ALLOC(world.iommu, **nested).out_hwpt_id
    entry = {"hwpt_id": hwpt, "data_type": mock.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, "entry_num": 1}
    entry |= {
        "data_uptr": world.scratch.address,
        "entry_len": ctypes.sizeof(mock.iommu_hwpt_invalidate_selftest),
    }
    yield "HWPT_INVALIDATE of one entry", world.cost(api.IOMMU_HWPT_INVALIDATE, entry)
    world.destroy(hwpt)
    yield from _viommu(world, parent)


def _viommu(world: _World, parent: int) -> Iterator[tuple[str, float]]:
    device = world.mock_device(parent)
    viommu = {"dev_id": device, "hwpt_id": parent, "type": mock.IOMMU_VIOMMU_TYPE_SELFTEST}
    yield "VIOMMU_ALLOC", world.cost(api.IOMMU_VIOMMU_ALLOC, viommu, undo=world.destroys("out_viommu_id"))
    made = api.IOMMU_VIOMMU_ALLOC(world.iommu, **viommu).out_viommu_id
    vdevice = {"viommu_id": made, "dev_id": device, "virt_id": 0x99}
    yield "VDEVICE_ALLOC", world.lone(api.IOMMU_VDEVICE_ALLOC, vdevice, undo=world.destroys("out_vdevice_id"))

    def close(arg: Any) -> None:
        os.close(arg.out_veventq_fd)
        world.destroy(arg.out_veventq_id)

    queue = {"viommu_id": made, "type": mock.IOMMU_VEVENTQ_TYPE_SELFTEST, "veventq_depth": 2}
    yield "VEVENTQ_ALLOC", world.lone(api.IOMMU_VEVENTQ_ALLOC, queue, undo=close)
    world.map(world.ioas, _START, _PAGE)
    hw_queue = {"viommu_id": made, "type": mock.IOMMU_HW_QUEUE_TYPE_SELFTEST}
    hw_queue |= {"nesting_parent_iova": _START, "length": _PAGE}
    yield "HW_QUEUE_ALLOC", world.lone(api.IOMMU_HW_QUEUE_ALLOC, hw_queue, undo=world.destroys("out_hw_queue_id"))


def every_ioctl(kernel: Backend) -> Iterator[tuple[str, float]]:
    """(name, microseconds a call) for the ioctls of iommufd that the mock driver can serve.

    IOAS_NOIOMMU_GET_PA is not among them: it needs a device without an IOMMU.
    """
    with kernel.open(DEV_IOMMU) as iommu:
        buffer = kernel.buffer(64 * _PAGE)
        buffer.view[:] = bytes(64 * _PAGE)
        world = _World(kernel, iommu, buffer)
        for part in (_ioas, _mappings, _hwpt, _queues, _nested):
            yield from part(world)
        world.scratch.close()
    buffer.close()
