"""The device's side of a DMA: one `DmaPort` per function.

A request is five integers (rid, pasid, address, length, access) until it fails; then it becomes a `DmaRequest`, which
prints itself. What a device sees of a failure is `DmaAbort`, an aborted completion, with no reason in it: the reason is
in the IOMMU's fault record and, for people, in `Machine.last_faults`.

The port keeps the last translation it used in each direction, if its `caching` has shortcuts. The IOMMU takes it away
(`forget`) with every invalidation that it executes, and then the port asks again: so the shortcut never outlives what
the IOMMU has cached.

Requests are untranslated; with a PASID they carry its prefix. `read_translated` and `write_translated` send translated
requests (AT=10b), `request_translation` asks for a translation (AT=01b), `send_page_request` asks for a page; the
device TLB that uses them is in fakedev/ats.py. An IOMMU that answers them is a `TranslationAgent`.

A request that the IOMMU neither carries out nor refuses raises `Parked`: the device's engine keeps what it was doing
and is called when the request may be sent again.

Left out: atomics, ordering, and the split into packets: a device that moves data in pieces calls once a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import NoReturn, Protocol, TypeAlias, runtime_checkable

from fakedev.caching import LEAVES, Caching
from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.tlp import EXECUTE, NO_PASID, PRIVILEGED, READ, WRITE, PageRequest, Translation

__all__ = [
    "EXECUTE",
    "IDENTITY",
    "MSI_END",
    "MSI_START",
    "NO_PASID",
    "PRIVILEGED",
    "READ",
    "WRITE",
    "DmaAbort",
    "DmaPort",
    "DmaRequest",
    "InterruptRemapper",
    "InterruptSink",
    "IommuHardware",
    "Outcome",
    "Parked",
    "Run",
    "TranslationAgent",
    "TranslationFault",
]

#: Writes here are interrupts (Intel SDM 12.11); no IOMMU translates them.
MSI_START, MSI_END = 0xFEE0_0000, 0xFEF0_0000

#: A translated range: IOVAs [start, end), what to add for the physical address, and READ | WRITE (| EXECUTE) as allowed
#: to requests of the same privilege.
Run: TypeAlias = tuple[int, int, int, int]
IDENTITY: Run = (0, 1 << 64, 0, READ | WRITE | EXECUTE)


class TranslationFault(Exception):
    """The IOMMU refused a request. It stays inside the hardware; the fault record has been written already."""


class DmaAbort(Exception):
    """A request was aborted at `address`. What lies before it has been transferred."""

    def __init__(self, address: int) -> None:
        super().__init__(f"DMA aborted at {address:#x}")
        self.address = address


class Outcome(IntEnum):
    """How a parked request ends (SMMUv3: CMD_RESUME's Action and Abort, CMD_STALL_TERM)."""

    #: The request is translated anew.
    RETRY = 0
    #: It fails, with an abort that the device sees.
    ABORT = 1
    #: It ends without having happened: reads give zeros, writes are ignored.
    RAZ_WI = 2


class Parked(Exception):
    """A request waits: it stalls in the IOMMU, or the device has asked for its page.

    Whoever parks it keeps the object and calls `resolve` once; the engine that caught it leaves a callback with `then`.
    The callback runs inside `resolve` and may send requests, so an IOMMU resolves when it is done with the command that
    said so. What lies before the address that waits may have been transferred; a retry starts the request over.
    """

    def __init__(self, request: DmaRequest) -> None:
        super().__init__(f"{request!r} waits")
        self.request = request
        self.outcome: Outcome | None = None
        self._callback: Callable[[Outcome], None] | None = None

    def then(self, callback: Callable[[Outcome], None]) -> None:
        """Let `callback` know the outcome: now, if there is one."""
        if self.outcome is None:
            self._callback = callback
        else:
            callback(self.outcome)

    def resolve(self, outcome: Outcome) -> None:
        """End the wait. A second call changes nothing."""
        if self.outcome is None:
            self.outcome = outcome
            callback, self._callback = self._callback, None
            if callback is not None:
                callback(outcome)


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
        what = "write to" if self.access & WRITE else "fetch of" if self.access & EXECUTE else "read of"
        if self.access & PRIVILEGED:
            what = f"privileged {what}"
        who = f"{self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7}"
        pasid = "" if self.pasid == NO_PASID else f" pasid {self.pasid}"
        return f"{who}{pasid}: {what} {self.length} bytes at iova {self.address:#x}"


class IommuHardware(Protocol):
    """What a port asks of the IOMMU that owns its function."""

    def translate(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """The run that holds `address`, at most up to `address + length` looked up. Raises TranslationFault, Parked.

        `access` is READ, READ | EXECUTE or WRITE; with a PASID also PRIVILEGED.
        """


@runtime_checkable
class TranslationAgent(IommuHardware, Protocol):
    """An IOMMU that serves functions with ATS and PRI."""

    def translated(self, port: DmaPort, pasid: int, address: int, length: int, access: int) -> Run:
        """Check a translated request: the run that holds `address`, as for `translate`. Raises TranslationFault.

        The run is the identity unless what the function was given was not a physical address (SMMUv3's split-stage
        ATS).
        """

    def request_translation(self, port: DmaPort, pasid: int, address: int, access: int) -> Translation:
        """Answer a translation request; `access` without WRITE is its No Write flag.

        Raises TranslationFault where the completion is Unsupported Request or Completer Abort.
        """

    def page_request(self, port: DmaPort, request: PageRequest) -> None:
        """Take a page request message. The answer comes by `Downstream.respond`, possibly before this returns."""


@runtime_checkable
class InterruptRemapper(IommuHardware, Protocol):
    """An IOMMU that messages of its functions pass through."""

    def interrupt(self, port: DmaPort, address: int, data: int) -> tuple[int, int]:
        """The (address, data) that a message becomes. Raises TranslationFault."""

    def illegal_interrupt(self, port: DmaPort, address: int, length: int, access: int) -> NoReturn:
        """Note a request to the MSI window that is no message: always raises TranslationFault."""


class InterruptSink(Protocol):
    """Where a memory write to the MSI window goes."""

    def __call__(self, address: int, data: int, /) -> None: ...


class DmaPort:
    """The way from a function to memory.

    `enabled` follows the function's Bus Master Enable bit; set it with `set_enabled`. `iommu` is None for a function in
    front of no IOMMU. `msi_window` is the range of untranslated addresses whose writes are interrupts: a PC's, or an
    empty one where interrupts are writes to memory as any others. Those end at `doorbell`, a physical address where no
    memory is; `on_doorbell` gets the request id and what was written.
    """

    __slots__ = (
        "_map",
        "_memory",
        "_ram_end",
        "_ram_start",
        "_read_delta",
        "_read_end",
        "_read_in_ram",
        "_read_start",
        "_runs",
        "_write_delta",
        "_write_end",
        "_write_in_ram",
        "_write_start",
        "caching",
        "doorbell",
        "enabled",
        "iommu",
        "msi_window",
        "on_abort",
        "on_doorbell",
        "on_interrupt",
        "peers",
        "rid",
        "translation_blocked",
    )

    def __init__(
        self,
        rid: int,
        memory: PhysicalMemory,
        iommu: IommuHardware | None,
        on_interrupt: InterruptSink,
        msi_window: tuple[int, int] = (MSI_START, MSI_END),
        doorbell: int = -1,
        on_doorbell: InterruptSink | None = None,
    ) -> None:
        self.rid = rid
        self.doorbell = doorbell
        self.on_doorbell = on_doorbell
        self.iommu = iommu
        self.msi_window = msi_window
        self.on_interrupt = on_interrupt
        #: Told, in words, of requests that no memory answers. No IOMMU sees those.
        self.on_abort: Callable[[str], None] | None = None
        #: Behind a bridge: BARs, (start, end), that a switch reaches without the root complex, so without the IOMMU;
        #: and whether a port on the way lets no request pass that is translated or asks for a translation.
        self.peers: Callable[[], list[tuple[int, int]]] | None = None
        self.translation_blocked: Callable[[], bool] | None = None
        self.enabled = False
        self.caching: Caching = LEAVES
        self._memory = memory
        self._ram_start, self._ram_end = memory.ram_start, memory.ram_end
        self._map = memory.mapped
        self._read_start = self._read_end = self._read_delta = 0
        self._write_start = self._write_end = self._write_delta = 0
        self._read_in_ram = self._write_in_ram = False
        #: The last run of each PASID and kind of access, by `pasid << 4 | access`.
        self._runs: dict[int, Run] = {}

    def set_enabled(self, enabled: bool) -> None:
        """Bus Master Enable: while it is off every request is aborted before it leaves the function."""
        self.enabled = enabled
        self.forget()

    def forget(self) -> None:
        """Drop the shortcuts: the next request asks the IOMMU."""
        self._read_end = self._write_end = 0
        self._runs.clear()

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

    def read(
        self, address: int, length: int, pasid: int = NO_PASID, privileged: bool = False, execute: bool = False
    ) -> bytes:
        """DMA read: `length` bytes from `address`, as the device addresses memory. DmaAbort, Parked.

        `privileged` and `execute` (an instruction fetch) mean something with a PASID only.
        """
        if pasid >= 0:
            access = READ | (EXECUTE if execute else 0) | (PRIVILEGED if privileged else 0)
            return self._read_pasid(address, length, pasid, access)
        if self._read_start <= address and address + length <= self._read_end:
            pa = address + self._read_delta
            if self._read_in_ram:
                return self._map[pa : pa + length]
            try:
                return self._memory.read(pa, length)
            except BusAbort as error:
                raise self._nobody(address, error) from None
        return self._read(address, length)

    def write(
        self, address: int, data: bytes | bytearray | memoryview, pasid: int = NO_PASID, privileged: bool = False
    ) -> None:
        """DMA write of `data` (bytes, or a byte view) at `address`. DmaAbort, Parked.

        A 4-byte write in the MSI window is an interrupt. `privileged` means something with a PASID only.
        """
        if pasid >= 0:
            self._write_pasid(address, data, pasid, WRITE | (PRIVILEGED if privileged else 0))
            return
        if self._write_start <= address and address + len(data) <= self._write_end:
            pa = address + self._write_delta
            if self._write_in_ram:
                self._map[pa : pa + len(data)] = data
                return
            try:
                self._memory.write(pa, data)
            except BusAbort as error:
                self._unanswered_write(address, pa, data, error)
            return
        self._write(address, data)

    def _read(self, address: int, length: int) -> bytes:
        parts = []
        end = address + length
        while address < end:
            start, stop, delta, _ = self._translate(address, end - address, READ)
            if self.caching.shortcuts:
                self._read_start, self._read_end, self._read_delta = start, stop, delta
                self._read_in_ram = start + delta >= self._ram_start and stop + delta <= self._ram_end
            stop = min(stop, end)
            try:
                parts.append(self._memory.read(address + delta, stop - address))
            except BusAbort as error:
                raise self._nobody(address, error) from None
            address = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        first, beyond = self.msi_window
        if first <= address < beyond:
            self._interrupt(address, data)
            return
        view = memoryview(data)
        end = address + len(view)
        done = 0
        while address < end:
            start, stop, delta, _ = self._translate(address, end - address, WRITE)
            if self.caching.shortcuts:
                self._write_start, self._write_end, self._write_delta = start, stop, delta
                self._write_in_ram = start + delta >= self._ram_start and stop + delta <= self._ram_end
            stop = min(stop, end)
            piece = view[done : done + stop - address]
            try:
                self._memory.write(address + delta, piece)
            except BusAbort as error:
                self._unanswered_write(address, address + delta, piece, error)
            done += stop - address
            address = stop

    def _nobody(self, address: int, error: BusAbort) -> DmaAbort:
        """The abort of a request that was translated to where no memory answers."""
        if self.on_abort is not None:
            who = f"{self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7}"
            self.on_abort(f"{who}: iova {address:#x} is translated, but {error}")
        return DmaAbort(address)

    def _unanswered_write(self, address: int, pa: int, data: bytes | bytearray | memoryview, error: BusAbort) -> None:
        """A write that no memory took: the interrupt controller does, or nobody."""
        if pa != self.doorbell or len(data) != 4 or self.on_doorbell is None:
            raise self._nobody(address, error) from None
        self.on_doorbell(self.rid, int.from_bytes(data, "little"))

    def _translate(self, address: int, length: int, access: int, pasid: int = NO_PASID) -> Run:
        # A request with a PASID is never an interrupt (VT-d specification 3.15; PCIe 6.20).
        first, beyond = self.msi_window if pasid == NO_PASID else (0, 0)
        if not self.enabled or address + length > 1 << 64:
            raise DmaAbort(address)
        if first <= address < beyond:
            self._no_interrupt(address, length, access)
        peers = [] if self.peers is None else self.peers()
        for base, beyond_bar in peers:
            if base <= address < beyond_bar:
                return base, beyond_bar, 0, READ | WRITE
        if self.iommu is None:
            if pasid != NO_PASID:
                raise DmaAbort(address)  # nobody there understands the prefix
            run = IDENTITY
        else:
            if not self.caching.shortcuts:
                self.caching.before_request()
            try:
                run = self.iommu.translate(self, pasid, address, length, access)
            except TranslationFault:
                raise DmaAbort(address) from None
        # The MSI window and what peers answer are cut out of whatever is mapped around them.
        for low, high in ((first, beyond), *peers):
            start, stop, delta, allowed = run
            if start < high and stop > low:
                run = (start, low, delta, allowed) if address < low else (high, stop, delta, allowed)
        return run

    # -- requests with a PASID ---------------------------------------------------------------------------------------

    def _pasid_run(self, address: int, length: int, pasid: int, access: int) -> Run:
        key = pasid << 4 | access
        run = self._runs.get(key)
        if run is None or not run[0] <= address < run[1]:
            run = self._translate(address, length, access, pasid)
            if self.caching.shortcuts:
                self._runs[key] = run
        return run

    def _read_pasid(self, address: int, length: int, pasid: int, access: int) -> bytes:
        parts = []
        end = address + length
        while address < end:
            _, stop, delta, _ = self._pasid_run(address, end - address, pasid, access)
            stop = min(stop, end)
            parts.append(self._load(address, address + delta, stop - address))
            address = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write_pasid(self, address: int, data: bytes | bytearray | memoryview, pasid: int, access: int) -> None:
        view = memoryview(data)
        end = address + len(view)
        done = 0
        while address < end:
            _, stop, delta, _ = self._pasid_run(address, end - address, pasid, access)
            stop = min(stop, end)
            self._store(address, address + delta, view[done : done + stop - address])
            done += stop - address
            address = stop

    def _load(self, address: int, pa: int, length: int) -> bytes:
        try:
            return self._memory.read(pa, length)
        except BusAbort as error:
            raise self._nobody(address, error) from None

    def _store(self, address: int, pa: int, data: bytes | memoryview) -> None:
        try:
            self._memory.write(pa, data)
        except BusAbort as error:
            self._unanswered_write(address, pa, data, error)

    # -- address translation services --------------------------------------------------------------------------------

    def _agent(self, address: int) -> TranslationAgent:
        if not self.enabled or not isinstance(self.iommu, TranslationAgent):
            raise DmaAbort(address)
        return self.iommu

    def _unblocked_agent(self, address: int) -> TranslationAgent:
        """Who takes a request with an address type. DmaAbort."""
        if self.translation_blocked is not None and self.translation_blocked():
            raise DmaAbort(address)
        return self._agent(address)

    def read_translated(self, address: int, length: int, pasid: int = NO_PASID, access: int = READ) -> bytes:
        """A translated read request (AT=10b). DmaAbort: the IOMMU does not take it, or nobody answers there."""
        parts = []
        end = address + length
        while address < end:
            stop, delta = self._translated(address, end - address, pasid, access)
            parts.append(self._load(address, address + delta, stop - address))
            address = stop
        return b"".join(parts)

    def write_translated(
        self, address: int, data: bytes | bytearray | memoryview, pasid: int = NO_PASID, access: int = WRITE
    ) -> None:
        """A translated write request (AT=10b). DmaAbort, as for reads."""
        view = memoryview(data)
        end = address + len(view)
        done = 0
        while address < end:
            stop, delta = self._translated(address, end - address, pasid, access)
            self._store(address, address + delta, view[done : done + stop - address])
            done += stop - address
            address = stop

    def _translated(self, address: int, length: int, pasid: int, access: int) -> tuple[int, int]:
        try:
            _, stop, delta, _ = self._unblocked_agent(address).translated(self, pasid, address, length, access)
        except TranslationFault:
            raise DmaAbort(address) from None
        return min(stop, address + length), delta

    def request_translation(self, address: int, access: int, pasid: int = NO_PASID) -> Translation:
        """A translation request (AT=01b) for the page that holds `address`.

        DmaAbort: the completion is Unsupported Request or Completer Abort, and no translation should be asked for
        again before software has done something about it.
        """
        try:
            return self._unblocked_agent(address).request_translation(self, pasid, address, access)
        except TranslationFault:
            raise DmaAbort(address) from None

    def send_page_request(self, request: PageRequest) -> None:
        """A page request message, whose requester is this port. DmaAbort: no translation agent is above."""
        self._agent(request.address).page_request(self, request._replace(rid=self.rid))

    # -- interrupts --------------------------------------------------------------------------------------------------

    def _interrupt(self, address: int, data: bytes | bytearray | memoryview) -> None:
        if not self.enabled:
            raise DmaAbort(address)
        if len(data) != 4 or address & 3:
            self._no_interrupt(address, len(data), WRITE)
        message = int.from_bytes(data, "little")
        if isinstance(self.iommu, InterruptRemapper):
            try:
                address, message = self.iommu.interrupt(self, address, message)
            except TranslationFault:
                raise DmaAbort(address) from None
        self.on_interrupt(address, message)

    def _no_interrupt(self, address: int, length: int, access: int) -> NoReturn:
        """Refuse a request to the MSI window that is no message."""
        if isinstance(self.iommu, InterruptRemapper):
            with suppress(TranslationFault):
                self.iommu.illegal_interrupt(self, address, length, access)
        raise DmaAbort(address)
