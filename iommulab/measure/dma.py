"""DMA on the model, through a device's port and the machine's IOMMU: part of what `iommulab bench` measures.

Direct memory is a `Kernel.buffer()`, which the model keeps alive; checked memory is any other memory of the process,
which goes through the host's kernel. Every transfer translates through the VT-d unit with the translation cached.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from functools import partial

from conformance.drivers.vfio import VfioDevice, functions
from fakedev.dma import DmaPort
from iommulab.measure import EDU, KIB, MIB, best
from kernel_model.kernel import Kernel
from uapi.backend import DEV_IOMMU, File
from uapi.iommufd import (
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
)

SIZES = ((8, "8 B"), (4 * KIB, "4 KiB"), (MIB, "1 MiB"))
_DIRECT, _CHECKED = 1 << 30, 2 << 30


def _map(iommu: File, ioas_id: int, address: int, iova: int) -> None:
    flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE
    IOMMU_IOAS_MAP(iommu, ioas_id=ioas_id, flags=flags, user_va=address, length=MIB, iova=iova)


def _figures(port: DmaPort, iova: int, label: str, seconds: float) -> Iterator[tuple[str, float]]:
    for length, size in SIZES:
        data = bytes(length)
        yield f"DMA write, {label}, {size}", best(partial(port.write, iova, data), seconds=seconds)
        yield f"DMA read, {label}, {size}", best(partial(port.read, iova, length), seconds=seconds)


def dma_figures(seconds: float) -> Iterator[tuple[str, float]]:
    """Microseconds of a DMA of each size, both ways, to direct and to checked memory."""
    with Kernel("q35-vtd-legacy") as kernel, kernel.open(DEV_IOMMU) as iommu:
        address = functions(kernel, *EDU)[0]
        with VfioDevice(kernel, address) as device:
            device.bind(iommu)
            device.enable()
            ioas_id = IOMMU_IOAS_ALLOC(iommu).out_ioas_id
            buffer = kernel.buffer(MIB)
            other = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _map(iommu, ioas_id, buffer.address, _DIRECT)
            _map(iommu, ioas_id, ctypes.addressof(ctypes.c_char.from_buffer(other)), _CHECKED)
            device.attach(ioas_id)
            port = kernel.machine.function(address).dma
            yield from _figures(port, _DIRECT, "direct memory", seconds)
            yield from _figures(port, _CHECKED, "checked memory", seconds)


def memmove_figures(seconds: float) -> Iterator[tuple[str, float]]:
    """ctypes.memmove of the DMA sizes, the physical limit for a copy from Python."""
    source, target = ctypes.create_string_buffer(MIB), ctypes.create_string_buffer(MIB)
    here, there = ctypes.addressof(source), ctypes.addressof(target)
    for length, name in ((8, "8 B"), (4 * KIB, "4 KiB"), (MIB, "1 MiB")):
        yield f"memmove {name}", best(partial(ctypes.memmove, there, here, length), seconds=seconds)
