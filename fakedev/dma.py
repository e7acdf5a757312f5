"""The device's side of a DMA: one `DmaPort` per function.

A request is five integers (rid, pasid, address, length, access) until it fails; then it becomes a `DmaRequest`, which
prints itself. What a device sees of a failure is `DmaAbort`, an aborted completion, with no reason in it: the reason is
in the IOMMU's fault record and, for people, in `Machine.last_faults`.

The port keeps the last translation it used in each direction. The IOMMU takes it away (`forget`) with every
invalidation that it executes, and then the port asks again: so the shortcut never outlives what the IOMMU has cached.

Left out: PASIDs (requests carry none yet), ATS, atomics, ordering, and the split into packets: a device that moves data
in pieces calls once a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from fakedev.memory import BusAbort, PhysicalMemory

#: Access bits of a request and of a translation.
READ, WRITE = 1, 2
#: The request carries no PASID.
NO_PASID = -1

#: Writes here are interrupts (Intel SDM 12.11); no IOMMU translates them.
MSI_START, MSI_END = 0xFEE0_0000, 0xFEF0_0000

#: A translated range: IOVAs [start, end), what to add for the physical address, and READ | WRITE as allowed.
Run: TypeAlias = tuple[int, int, int, int]
IDENTITY: Run = (0, 1 << 64, 0, READ | WRITE)


class TranslationFault(Exception):
    """The IOMMU refused a request. It stays inside the hardware; the fault record has been written already."""


class DmaAbort(Exception):
    """A request was aborted at `address`. What lies before it has been transferred."""

    def __init__(self, address: int) -> None:
        super().__init__(f"DMA aborted at {address:#x}")
        self.address = address


class DmaRequest:
    """A request that is worth talking about."""

    __slots__ = ("access", "address", "length", "pasid", "rid")

    def __init__(self, rid: int, pasid: int, address: int, length: int, access: int) -> None:
        self.rid = rid
        self.pasid = pasid
        self.address = address
        self.length = length
        self.access = access

    def __repr__(self) -> str:
        what = "read of" if self.access == READ else "write to"
        who = f"{self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7}"
        pasid = "" if self.pasid == NO_PASID else f" pasid {self.pasid}"
        return f"{who}{pasid}: {what} {self.length} bytes at iova {self.address:#x}"


class IommuHardware(Protocol):
    """What a port asks of the IOMMU that owns its function."""

    def translate(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The run that holds `address`, at most up to `address + length` looked up. Raises TranslationFault."""


class InterruptSink(Protocol):
    """Where a memory write to the MSI window goes."""

    def __call__(self, address: int, data: int, /) -> None: ...


class DmaPort:
    """The way from a function to memory.

    `enabled` follows the function's Bus Master Enable bit; set it with `set_enabled`. `iommu` is None for a function in
    front of no IOMMU.
    """

    __slots__ = (
        "_map",
        "_memory",
        "_ram_size",
        "_read_delta",
        "_read_end",
        "_read_in_ram",
        "_read_start",
        "_write_delta",
        "_write_end",
        "_write_in_ram",
        "_write_start",
        "enabled",
        "iommu",
        "on_abort",
        "on_interrupt",
        "rid",
    )

    def __init__(
        self, rid: int, memory: PhysicalMemory, iommu: IommuHardware | None, on_interrupt: InterruptSink
    ) -> None:
        self.rid = rid
        self.iommu = iommu
        self.on_interrupt = on_interrupt
        #: Told, in words, of requests that no memory answers. No IOMMU sees those.
        self.on_abort: Callable[[str], None] | None = None
        self.enabled = False
        self._memory = memory
        self._ram_size = memory.ram_size
        self._map = memory.mapped
        self._read_start = self._read_end = self._read_delta = 0
        self._write_start = self._write_end = self._write_delta = 0
        self._read_in_ram = self._write_in_ram = False

    def set_enabled(self, enabled: bool) -> None:
        """Bus Master Enable: while it is off every request is aborted before it leaves the function."""
        self.enabled = enabled
        self.forget()

    def forget(self) -> None:
        """Drop the shortcuts: the next request asks the IOMMU."""
        self._read_end = self._write_end = 0

    def last_runs(self) -> list[tuple[str, int, int, int]]:
        """The translations that the port holds: "read" or "write", IOVAs [start, end), and the physical start."""
        return [
            (what, start, end, start + delta)
            for what, start, end, delta in (
                ("read", self._read_start, self._read_end, self._read_delta),
                ("write", self._write_start, self._write_end, self._write_delta),
            )
            if end
        ]

    def read(self, address: int, length: int) -> bytes:
        """DMA read: `length` bytes from `address`, as the device addresses memory. DmaAbort."""
        if self._read_start <= address and address + length <= self._read_end:
            pa = address + self._read_delta
            if self._read_in_ram:
                return self._map[pa : pa + length]
            try:
                return self._memory.read(pa, length)
            except BusAbort as error:
                raise self._nobody(address, error) from None
        return self._read(address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """DMA write of `data` (bytes, or a byte view) at `address`. DmaAbort.

        A 4-byte write in the MSI window is an interrupt.
        """
        if self._write_start <= address and address + len(data) <= self._write_end:
            pa = address + self._write_delta
            if self._write_in_ram:
                self._map[pa : pa + len(data)] = data
                return
            try:
                self._memory.write(pa, data)
            except BusAbort as error:
                raise self._nobody(address, error) from None
            return
        self._write(address, data)

    def _read(self, address: int, length: int) -> bytes:
        parts = []
        end = address + length
        while address < end:
            start, stop, delta, _ = self._translate(address, end - address, READ)
            self._read_start, self._read_end, self._read_delta = start, stop, delta
            self._read_in_ram = start + delta >= 0 and stop + delta <= self._ram_size
            stop = min(stop, end)
            try:
                parts.append(self._memory.read(address + delta, stop - address))
            except BusAbort as error:
                raise self._nobody(address, error) from None
            address = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        if MSI_START <= address < MSI_END:
            self._interrupt(address, data)
            return
        view = memoryview(data)
        end = address + len(view)
        done = 0
        while address < end:
            start, stop, delta, _ = self._translate(address, end - address, WRITE)
            self._write_start, self._write_end, self._write_delta = start, stop, delta
            self._write_in_ram = start + delta >= 0 and stop + delta <= self._ram_size
            stop = min(stop, end)
            try:
                self._memory.write(address + delta, view[done : done + stop - address])
            except BusAbort as error:
                raise self._nobody(address, error) from None
            done += stop - address
            address = stop

    def _nobody(self, address: int, error: BusAbort) -> DmaAbort:
        """The abort of a request that was translated to where no memory answers."""
        if self.on_abort is not None:
            who = f"{self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7}"
            self.on_abort(f"{who}: iova {address:#x} is translated, but {error}")
        return DmaAbort(address)

    def _translate(self, address: int, length: int, access: int) -> Run:
        if not self.enabled or MSI_START <= address < MSI_END or address + length > 1 << 64:
            raise DmaAbort(address)
        if self.iommu is None:
            run = IDENTITY
        else:
            try:
                run = self.iommu.translate(self, NO_PASID, address, length, access)
            except TranslationFault:
                raise DmaAbort(address) from None
        # The MSI window is cut out of whatever is mapped around it.
        start, stop, delta, allowed = run
        if start < MSI_END and stop > MSI_START:
            run = (start, MSI_START, delta, allowed) if address < MSI_START else (MSI_END, stop, delta, allowed)
        return run

    def _interrupt(self, address: int, data: bytes | bytearray | memoryview) -> None:
        if not self.enabled or len(data) != 4 or address & 3:
            raise DmaAbort(address)
        self.on_interrupt(address, int.from_bytes(data, "little"))
