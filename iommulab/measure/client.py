"""The figures of one client of any backend: calls on /dev/iommu, mappings with and without a device, many areas."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from conformance.drivers.vfio import VfioDevice, functions
from iommulab.measure import EDU, GIB, KIB, MIB, best
from iommulab.measure.dirty import dirty_figures
from iommulab.measure.invalidate import invalidate_figures
from iommulab.measure.ioctls import every_ioctl
from iommulab.measure.vevents import vevent_figures
from uapi.backend import DEV_IOMMU, Backend, File
from uapi.iommufd import (
    IOMMU_DESTROY,
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
    IOMMU_IOAS_UNMAP,
    IOMMU_OPTION,
    IOMMU_OPTION_OP_GET,
    IOMMU_OPTION_RLIMIT_MODE,
)
from uapi.vfio import VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT

_FLAGS = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE
#: How many areas are added for one figure.
_ADDED = 200


def ioctl_figures(kernel: Backend, seconds: float) -> Iterator[tuple[str, float]]:
    """Calls on /dev/iommu alone."""
    with kernel.open(DEV_IOMMU) as iommu:
        cheap = IOMMU_OPTION.make(option_id=IOMMU_OPTION_RLIMIT_MODE, op=IOMMU_OPTION_OP_GET)
        yield "ioctl, cheap (OPTION get)", best(lambda: iommu.ioctl(IOMMU_OPTION.number, cheap), seconds=seconds)

        absent = IOMMU_DESTROY.make(id=0)

        def fail() -> None:
            try:
                iommu.ioctl(IOMMU_DESTROY.number, absent)
            except OSError:
                return
            raise RuntimeError("id 0 was destroyed")

        yield "ioctl, failing (DESTROY 0)", best(fail, seconds=seconds)

        ioas, destroy = IOMMU_IOAS_ALLOC.make(), IOMMU_DESTROY.make()

        def alloc_destroy() -> None:
            iommu.ioctl(IOMMU_IOAS_ALLOC.number, ioas)
            destroy.id = ioas.out_ioas_id
            iommu.ioctl(IOMMU_DESTROY.number, destroy)

        yield "IOAS_ALLOC + DESTROY", best(alloc_destroy, seconds=seconds)


def map_unmap(iommu: File, ioas_id: int, address: int, length: int) -> Callable[[], None]:
    """One MAP and one UNMAP of the range at a fixed IOVA."""
    iova = 1 * GIB
    map_ = IOMMU_IOAS_MAP.make(ioas_id=ioas_id, flags=_FLAGS, user_va=address, length=length, iova=iova)
    unmap = IOMMU_IOAS_UNMAP.make(ioas_id=ioas_id, iova=iova, length=length)

    def call() -> None:
        iommu.ioctl(IOMMU_IOAS_MAP.number, map_)
        unmap.length = length
        iommu.ioctl(IOMMU_IOAS_UNMAP.number, unmap)

    return call


@contextmanager
def buffer_of(kernel: Backend, length: int) -> Iterator[int]:
    """Touched client memory; its address. MemoryError where the machine has not enough."""
    try:
        buffer = kernel.buffer(length)
    except OSError as error:
        raise MemoryError(str(error)) from error
    view = buffer.view
    for offset in range(0, length, 4096):
        view[offset] = 1
    try:
        yield buffer.address
    finally:
        buffer.close()


def map_figures(kernel: Backend, seconds: float, label: str, iommu: File, ioas_id: int) -> Iterator[tuple[str, float]]:
    """MAP + UNMAP of 4 KiB, 2 MiB and 1 GiB."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    for length, name in ((4 * KIB, "4 KiB"), (2 * MIB, "2 MiB"), (GIB, "1 GiB")):
        if length * 5 // 4 > available:
            continue
        with buffer_of(kernel, length) as address:
            yield f"MAP + UNMAP {name}, {label}", best(map_unmap(iommu, ioas_id, address, length), seconds=seconds)


def area_figures(kernel: Backend, counts: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """MAP of one more 4 KiB page where so many areas are there already, every second page of the space."""
    with kernel.open(DEV_IOMMU) as iommu, buffer_of(kernel, 4096) as address:
        ioas_id = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        arg = IOMMU_IOAS_MAP.make(ioas_id=ioas_id, flags=_FLAGS, user_va=address, length=4096)
        number, base, have = IOMMU_IOAS_MAP.number, 1 * GIB, 0

        def add(count: int) -> float:
            nonlocal have
            begin = time.perf_counter()
            for index in range(have, have + count):
                arg.iova = base + index * 8192
                iommu.ioctl(number, arg)
            have += count
            return (time.perf_counter() - begin) / count * 1e6

        for count in counts:
            if count > have:
                add(count - have)
            gc.disable()
            yield f"MAP 4 KiB among {count:,} areas", min(add(_ADDED) for _ in range(5))
            gc.enable()


def device_figures(kernel: Backend, seconds: float) -> Iterator[tuple[str, float]]:
    """What needs a device: attach + detach, and mappings that reach a domain."""
    addresses = functions(kernel, *EDU)
    if not addresses:
        return
    with kernel.open(DEV_IOMMU) as iommu, VfioDevice(kernel, addresses[0]) as device:
        device.bind(iommu)
        ioas_id = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        attach = VFIO_DEVICE_ATTACH_IOMMUFD_PT.make()
        detach = VFIO_DEVICE_DETACH_IOMMUFD_PT.make()

        def attach_detach() -> None:
            attach.pt_id = ioas_id
            device.file.ioctl(VFIO_DEVICE_ATTACH_IOMMUFD_PT.number, attach)
            device.file.ioctl(VFIO_DEVICE_DETACH_IOMMUFD_PT.number, detach)

        yield "attach + detach", best(attach_detach, seconds=seconds)
        device.attach(ioas_id)
        yield from map_figures(kernel, seconds, "one domain", iommu, ioas_id)


def client_figures(kernel: Backend, seconds: float, counts: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """All figures of one backend, as they are measured."""
    yield from ioctl_figures(kernel, seconds)
    yield from every_ioctl(kernel)
    with kernel.open(DEV_IOMMU) as iommu:
        ioas_id = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
        yield from map_figures(kernel, seconds, "no domain", iommu, ioas_id)
    yield from device_figures(kernel, seconds)
    yield from dirty_figures(kernel, partial(best, seconds=seconds))
    yield from invalidate_figures(kernel, partial(best, seconds=seconds))
    yield from vevent_figures(kernel)
    yield from area_figures(kernel, counts)
