"""What a generated program has made so far, as its generator believes.

The generator never runs anything: it takes it that a call it meant to succeed did, and refers to what came of it by the
call's number. Where it is wrong, calls fail on both sides alike, and the program is worth a little less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Area:
    """A mapping: where, how long, the memory behind it (an address, or "" where there is none to compare)."""

    iova: int | str
    length: int
    va: str
    write: bool


@dataclass(eq=False, slots=True)
class Ioas:
    """An IO address space; `aligned` says that HUGE_PAGES is off, so that all is in pages of 4 KiB."""

    ref: str
    aligned: bool
    areas: list[Area] = field(default_factory=list)
    domain: bool = False


@dataclass(eq=False, slots=True)
class Hwpt:
    """A hardware page table: paging (with its IOAS) or nested."""

    ref: str
    ioas: Ioas | None
    flags: int = 0
    nested: bool = False
    #: What a nested one's IOTLB words were at first; the vIOMMU it was made from; whether dirty tracking is on.
    word: int = 0
    viommu: Viommu | None = None
    tracked: bool = False


@dataclass(eq=False, slots=True)
class Device:
    """A mock device; `stdev` is the test's object, `idev` the device's own id. `pasids`: what was ever attached.

    `ready` for PASIDs, as its own page table is for devices with PASIDs; `guest` where that is a vIOMMU's.
    """

    stdev: str
    idev: str
    flags: int
    pasids: set[int] = field(default_factory=set)
    ready: bool = False
    guest: bool = False


@dataclass(eq=False, slots=True)
class DeviceFile:
    """An open VFIO character device: its descriptor, what it was bound as, what it is attached to."""

    fd: str
    device: Device | None = None
    ioas: Ioas | None = None


@dataclass(eq=False, slots=True)
class Viommu:
    ref: str
    parent: Hwpt
    queues: int = 0


@dataclass(eq=False, slots=True)
class Access:
    """An access's descriptor, whether it pins, and its pins."""

    fd: str
    ioas: Ioas
    pins: bool
    items: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Queue:
    """A fault queue or event queue: id and descriptor; the reads of it, for cookies."""

    ref: str
    fd: str
    reads: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class World:
    """Pools of objects, and which ids of theirs are good for a wrong guess."""

    rng: random.Random
    aligned: bool
    ioas: list[Ioas] = field(default_factory=list)
    hwpts: list[Hwpt] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    viommus: list[Viommu] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    faults: list[Queue] = field(default_factory=list)
    events: list[Queue] = field(default_factory=list)
    #: Ids of vDEVICEs and HW queues, and virtual ids in use.
    others: list[str] = field(default_factory=list)
    virtual: list[int] = field(default_factory=list)
    #: Descriptors of dma-bufs, with their length.
    dmabufs: list[tuple[str, int]] = field(default_factory=list)
    #: Where offsets of pages to be mapped are told.
    pages: list[str] = field(default_factory=list)
    compat: Ioas | None = None
    #: With hardware: open devices, and eventfds.
    files: list[DeviceFile] = field(default_factory=list)
    eventfds: list[str] = field(default_factory=list)

    def pick(self, pool: list[T]) -> T | None:
        """One of the pool, rather a young one."""
        if not pool:
            return None
        return pool[-1] if self.rng.random() < 0.4 else self.rng.choice(pool)

    def ids(self) -> list[str]:
        """All object ids but those of mock devices, whose death is a matter of its own."""
        found = [
            thing.ref for pool in (self.ioas, self.hwpts, self.viommus, self.faults, self.events) for thing in pool
        ]
        return found + self.others + [device.idev for device in self.devices]
