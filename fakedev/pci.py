"""PCI: the root complex, and functions with a configuration space that behaves as hardware does.

Mirrors the PCI Local Bus specification 3.0, chapter 6 (type-0 headers, BAR sizing, MSI in 6.8) as QEMU's `hw/pci/pci.c`
implements it: which bits of the command register can be set, that bytes behind the header which no capability claims
are plain storage, that an access beyond the end reads as ones.

A function with 4096 bytes of configuration space has extended capabilities too (PCI Express 7.6); which there are is in
fakedev/pcie.py.

Left out: MSI-X, power management, expansion ROMs, changes of bus numbers and of bridges' windows. A function without a
reset of its own has an empty `reset_methods`, as QEMU's `edu` has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn, Protocol

from fakedev.dma import (
    MSI_END,
    MSI_START,
    DmaAbort,
    DmaPort,
    IommuHardware,
    Outcome,
    Parked,
    Run,
    TranslationFault,
)
from fakedev.memory import BusAbort, PhysicalMemory
from fakedev.tlp import AtsEndpoint, Invalidation, PageResponse

# Offsets and bits of the header (uapi/linux/pci_regs.h).
PCI_VENDOR_ID, PCI_DEVICE_ID, PCI_COMMAND, PCI_STATUS = 0x00, 0x02, 0x04, 0x06
PCI_REVISION_ID, PCI_CACHE_LINE_SIZE, PCI_HEADER_TYPE = 0x08, 0x0C, 0x0E
PCI_BASE_ADDRESS_0, PCI_SUBSYSTEM_VENDOR_ID, PCI_CAPABILITY_LIST = 0x10, 0x2C, 0x34
PCI_INTERRUPT_LINE, PCI_INTERRUPT_PIN = 0x3C, 0x3D
PCI_COMMAND_IO, PCI_COMMAND_MEMORY, PCI_COMMAND_MASTER = 0x1, 0x2, 0x4
PCI_COMMAND_SERR, PCI_COMMAND_INTX_DISABLE = 0x100, 0x400
PCI_STATUS_INTERRUPT, PCI_STATUS_CAP_LIST = 0x08, 0x10
PCI_CAP_ID_MSI = 0x05
PCI_MSI_FLAGS, PCI_MSI_ADDRESS_LO, PCI_MSI_ADDRESS_HI = 0x02, 0x04, 0x08
PCI_MSI_FLAGS_ENABLE, PCI_MSI_FLAGS_QSIZE, PCI_MSI_FLAGS_64BIT = 0x0001, 0x0070, 0x0080
PCI_MULTIFUNCTION = 0x80

_COMMAND_WRITABLE = (
    PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE
)
_STATUS_CLEARED_BY_ONES = 0xF900
_HEADER_SIZE = 0x40
#: Where extended capabilities begin, and the size of a space that has them.
PCI_EXT_CAP_START, PCI_EXT_CONFIG_SIZE = 0x100, 0x1000
_ADDRESS = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")

# Of PCI Express and of access control services, by fakedev/pcie.py: what routing asks for.
_TYPE_UPSTREAM, _TYPE_PCI_BRIDGE = 5, 7
_ACS_SOURCE_VALIDATION, _ACS_TRANSLATION_BLOCKING, _ACS_REQUEST_REDIRECT = 1, 2, 4

MEM32, MEM64, IO = "mem32", "mem64", "io"


def rid_of(address: str) -> int:
    """The requester id of "0000:00:10.0": bus, device, function. ValueError for anything else, and for segments."""
    match = _ADDRESS.fullmatch(address)
    if match is None or match[1] != "0000" or int(match[3], 16) > 31:
        raise ValueError(f"no PCI address: {address!r}")
    return int(match[2], 16) << 8 | int(match[3], 16) << 3 | int(match[4])


class Bar:
    """A base address register and the registers or memory behind it. This one is inert: reads 0, drops writes."""

    def __init__(self, size: int, kind: str = MEM32, prefetchable: bool = False) -> None:
        if size & (size - 1) or size < (4 if kind == IO else 16):
            raise ValueError(f"a BAR of {size} bytes")
        self.size = size
        self.kind = kind
        self.prefetchable = prefetchable

    @property
    def is_memory(self) -> bool:
        return self.kind != IO

    @property
    def type_bits(self) -> int:
        """The read-only low bits of the register."""
        if self.kind == IO:
            return 1
        return (4 if self.kind == MEM64 else 0) | (8 if self.prefetchable else 0)

    def read(self, offset: int, width: int) -> int:
        """One load of 1, 2, 4 or 8 bytes at `offset`."""
        return 0

    def write(self, offset: int, width: int, value: int) -> None:
        """One store of 1, 2, 4 or 8 bytes at `offset`."""


class RegisterWindow:
    """A BAR as other bus masters see it: a DMA to it becomes naturally aligned accesses of up to 8 bytes."""

    def __init__(self, function: PciFunction, bar: Bar) -> None:
        self._function = function
        self._bar = bar

    def view(self, _offset: int, _length: int) -> memoryview | None:
        return None

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset)
        return b"".join(self._bar.read(at, width).to_bytes(width, "little") for at, width in _accesses(offset, length))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._check(offset)
        for at, width in _accesses(offset, len(data)):
            start = at - offset
            self._bar.write(at, width, int.from_bytes(data[start : start + width], "little"))

    def _check(self, offset: int) -> None:
        if not self._function.memory_enabled:
            raise BusAbort(offset)


def _accesses(offset: int, length: int) -> Iterable[tuple[int, int]]:
    end = offset + length
    while offset < end:
        width = 8
        while offset % width or offset + width > end:
            width //= 2
        yield offset, width
        offset += width


class MsiCapability:
    """The MSI capability of a function: where its interrupts go. It reads the configuration space each time."""

    def __init__(self, function: PciFunction, offset: int, vectors_lg2: int) -> None:
        self._function = function
        self.offset = offset
        self.vectors = 1 << vectors_lg2
        flags = PCI_MSI_FLAGS_64BIT | vectors_lg2 << 1
        writable = PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE
        function.add_capability(
            PCI_CAP_ID_MSI,
            offset,
            flags.to_bytes(2, "little") + bytes(10),
            writable.to_bytes(2, "little") + b"\xfc\xff\xff\xff" + b"\xff\xff\xff\xff" + b"\xff\xff",
        )

    @property
    def enabled(self) -> bool:
        return bool(self._function.config[self.offset + PCI_MSI_FLAGS] & PCI_MSI_FLAGS_ENABLE)

    @property
    def enabled_vectors(self) -> int:
        return 1 << (self._function.config[self.offset + PCI_MSI_FLAGS] >> 4 & 7)

    @property
    def address(self) -> int:
        return int.from_bytes(self._function.config[self.offset + 4 : self.offset + 12], "little")

    @property
    def data(self) -> int:
        return int.from_bytes(self._function.config[self.offset + 12 : self.offset + 14], "little")

    def notify(self, vector: int = 0) -> None:
        """Send the interrupt, if MSI is on and the function may master the bus."""
        if self.enabled:
            data = self.data & ~(self.enabled_vectors - 1) | vector
            self._send(self.address, data.to_bytes(4, "little"))

    def _send(self, address: int, data: bytes, outcome: Outcome = Outcome.RETRY) -> None:
        """A posted write: the function never hears what becomes of it. Where the IOMMU stalls it, it goes later."""
        if outcome != Outcome.RETRY:
            return
        try:
            self._function.dma.write(address, data)
        except DmaAbort:
            pass
        except Parked as parked:
            parked.then(partial(self._send, address, data))


class AcsRegisters(Protocol):
    """PCI_ACS_* bits: what a function can, and what is on."""

    @property
    def supported(self) -> int: ...
    @property
    def control(self) -> int: ...


class PciFunction:
    """A type-0 function (type 1: fakedev/bridge.py).

    `bars` lists up to six entries (None where there is no BAR; the slot after a MEM64 stays None). `addresses` are what
    the firmware assigned. `config` is the space itself: read it freely, change it through `config_write`.
    """

    #: Of a bridge: the buses behind it. 0: the function is no bridge.
    secondary = subordinate = 0
    #: What PCI Express calls it (PCI_EXP_TYPE_*); None for a function of conventional PCI.
    express_type: int | None = None
    #: Its access control services, if it has any.
    acs: AcsRegisters | None = None
    #: Names of the resets that the function has ("flr", "af_flr", "pm"); sysfs' `reset_method`.
    reset_methods: tuple[str, ...] = ()

    def __init__(
        self,
        address: str,
        ids: tuple[int, int],
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        bars: Iterable[Bar | None] = (),
        addresses: Iterable[int] = (),
        header_type: int = 0,
        interrupt_pin: int = 0,
        interrupt_line: int = 0,
        command: int = 0,
        config_size: int = 256,
    ) -> None:
        self.address = address
        self.rid = rid_of(address)
        self.bars = [*bars]
        self.bars += [None] * (6 - len(self.bars))
        self.config_size = config_size
        self.config = bytearray(config_size)
        self.msi: MsiCapability | None = None
        self.dma: DmaPort
        #: Who takes invalidations and page responses, if the function has address translation services.
        self.ats: AtsEndpoint | None = None
        self.root: RootComplex | None = None
        #: What the function asserts, and what leaves it (INTx Disable stands between).
        self.intx_level = False
        self.memory_enabled = False
        self._writable = bytearray(_HEADER_SIZE) + b"\xff" * (min(config_size, PCI_EXT_CAP_START) - _HEADER_SIZE)
        self._writable += bytes(config_size - len(self._writable))
        self._cleared = bytearray(config_size)
        self._last_capability = PCI_CAPABILITY_LIST
        self._last_extended = 0
        self._watches: list[tuple[int, int, Callable[[], None]]] = []
        self._at_reset: list[Callable[[], None]] = []
        self._windows: dict[int, int] = {}

        def put(offset: int, width: int, value: int, writable: int = 0, cleared: int = 0) -> None:
            self.config[offset : offset + width] = value.to_bytes(width, "little")
            self._writable[offset : offset + width] = writable.to_bytes(width, "little")
            self._cleared[offset : offset + width] = cleared.to_bytes(width, "little")

        put(PCI_VENDOR_ID, 2, ids[0])
        put(PCI_DEVICE_ID, 2, ids[1])
        put(PCI_COMMAND, 2, command, _COMMAND_WRITABLE)
        put(PCI_STATUS, 2, 0, 0, _STATUS_CLEARED_BY_ONES)
        put(PCI_REVISION_ID, 4, class_code << 8 | revision)
        put(PCI_CACHE_LINE_SIZE, 1, 0, 0xFF)
        put(PCI_HEADER_TYPE, 1, header_type)
        put(PCI_SUBSYSTEM_VENDOR_ID, 4, subsystem[1] << 16 | subsystem[0])
        put(PCI_INTERRUPT_LINE, 1, interrupt_line, 0xFF)
        put(PCI_INTERRUPT_PIN, 1, interrupt_pin)
        assigned = [*addresses, 0, 0, 0, 0, 0, 0]
        for index, bar in enumerate(self.bars):
            if bar is not None:
                width = 8 if bar.kind == MEM64 else 4
                writable = -bar.size & (1 << 8 * width) - 1
                put(PCI_BASE_ADDRESS_0 + 4 * index, width, assigned[index] | bar.type_bits, writable)
        self._reset_state = bytes(self.config)

    def set_multifunction(self) -> None:
        """Say in the header that the slot has more functions."""
        self.config[PCI_HEADER_TYPE] |= PCI_MULTIFUNCTION
        self._reset_state = bytes(self.config)

    # -- capabilities ------------------------------------------------------------------------------------------------

    def add_capability(self, cap_id: int, offset: int, body: bytes, writable: bytes) -> None:
        """Put a capability at `offset`: `body` follows its two-byte header, `writable` masks the bytes of `body`."""
        if len(body) != len(writable):
            raise ValueError("a capability's mask has another length than its body")
        end = offset + 2 + len(body)
        self.config[offset:end] = bytes([cap_id, 0]) + body
        self._writable[offset:end] = b"\0\0" + writable
        link = self._last_capability if self._last_capability == PCI_CAPABILITY_LIST else self._last_capability + 1
        self.config[link] = offset
        self._last_capability = offset
        self.config[PCI_STATUS] |= PCI_STATUS_CAP_LIST
        self._reset_state = bytes(self.config)

    def add_extended_capability(
        self, cap_id: int, version: int, offset: int, body: bytes, writable: bytes, cleared: bytes = b""
    ) -> None:
        """Put an extended capability at `offset`: `body` follows its four-byte header.

        `writable` and `cleared` (by writing ones) mask the bytes of `body`. The first one is at 0x100. ValueError.
        """
        end = offset + 4 + len(body)
        if len(body) != len(writable) or offset % 4 or end > self.config_size:
            raise ValueError(f"{self.address}: no extended capability of {len(body) + 4} bytes fits at {offset:#x}")
        if (offset == PCI_EXT_CAP_START) == bool(self._last_extended):
            raise ValueError(f"{self.address}: the first extended capability is at 0x100, and only that")
        self.config[offset:end] = (version << 16 | cap_id).to_bytes(4, "little") + body
        self._writable[offset:end] = bytes(4) + writable
        self._cleared[offset:end] = bytes(4) + cleared.ljust(len(body), b"\0")
        if self._last_extended:
            link = self._last_extended + 2
            self.config[link : link + 2] = (self.config[link] & 15 | offset << 4).to_bytes(2, "little")
        self._last_extended = offset
        self._reset_state = bytes(self.config)

    def watch_config(self, offset: int, length: int, changed: Callable[[], None]) -> None:
        """Call `changed` after every configuration store that touches [offset, offset + length)."""
        self._watches.append((offset, offset + length, changed))

    def at_reset(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever the function has been reset."""
        self._at_reset.append(callback)

    def add_msi(self, offset: int, vectors_lg2: int = 0) -> None:
        """Give the function the MSI capability with 1 << vectors_lg2 vectors, 64-bit, without masking."""
        self.msi = MsiCapability(self, offset, vectors_lg2)

    # -- configuration accesses --------------------------------------------------------------------------------------

    def config_read(self, offset: int, width: int) -> int:
        """A configuration load of 1, 2 or 4 bytes; all ones beyond the end of the space."""
        if offset + width > self.config_size:
            return (1 << 8 * width) - 1
        return int.from_bytes(self.config[offset : offset + width], "little")

    def config_write(self, offset: int, width: int, value: int) -> None:
        """A configuration store of 1, 2 or 4 bytes: read-only bits keep, status bits clear by ones."""
        if offset + width > self.config_size:
            return
        end = offset + width
        config = self.config
        for at in range(offset, end):
            byte = value & 0xFF
            value >>= 8
            writable = self._writable[at]
            config[at] = (config[at] & ~writable | byte & writable) & ~(byte & self._cleared[at])
        if offset < PCI_COMMAND + 2 and end > PCI_COMMAND:
            self._command_changed()
        if offset < PCI_BASE_ADDRESS_0 + 24 and end > PCI_BASE_ADDRESS_0:
            self._place_bars()
        for start, stop, changed in self._watches:
            if offset < stop and end > start:
                changed()

    def _command_changed(self) -> None:
        command = self.config_read(PCI_COMMAND, 2)
        self.memory_enabled = bool(command & PCI_COMMAND_MEMORY)
        self.dma.set_enabled(bool(command & PCI_COMMAND_MASTER))
        self._place_bars()
        if self.root is not None:
            self.root.intx(self)

    @property
    def intx_asserted(self) -> bool:
        """What the interrupt controller sees."""
        return self.intx_level and not self.config_read(PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE

    def set_intx(self, level: bool) -> None:
        """Drive the function's interrupt pin."""
        self.intx_level = level
        status = self.config[PCI_STATUS] & ~PCI_STATUS_INTERRUPT
        self.config[PCI_STATUS] = status | (PCI_STATUS_INTERRUPT if level else 0)
        if self.root is not None:
            self.root.intx(self)

    # -- BARs --------------------------------------------------------------------------------------------------------

    def bar_address(self, index: int) -> int:
        """The bus address in BAR `index`."""
        bar = self.bars[index]
        if bar is None:
            return 0
        width = 8 if bar.kind == MEM64 else 4
        value = int.from_bytes(self.config[PCI_BASE_ADDRESS_0 + 4 * index :][:width], "little")
        return value & -bar.size

    def decoded(self) -> list[tuple[int, int]]:
        """(address, size) of the memory BARs that answer now."""
        return [(base, bar.size) for index, base in self._windows.items() if (bar := self.bars[index]) is not None]

    def _place_bars(self) -> None:
        if self.root is None:
            return
        for index, bar in enumerate(self.bars):
            if bar is None or not bar.is_memory:
                continue
            wanted = self.bar_address(index) if self.memory_enabled else 0
            now = self._windows.get(index, 0)
            if wanted != now:
                if now:
                    self.root.unmap(now)
                    del self._windows[index]
                if wanted and self.root.map(wanted, bar.size, RegisterWindow(self, bar)):
                    self._windows[index] = wanted

    # -- reset -------------------------------------------------------------------------------------------------------

    def attach(self, root: RootComplex, dma: DmaPort) -> None:
        """Plug the function into a root complex."""
        self.root = root
        self.dma = dma
        self._command_changed()

    def reset(self) -> None:
        """Back to power-on: configuration (the firmware's BAR addresses stay), interrupts, the device itself.

        What the hardware can do when told to; whether software has a way to tell it is `reset_methods`.
        """
        line = self.config[PCI_INTERRUPT_LINE]
        self.config[:] = self._reset_state
        self.config[PCI_INTERRUPT_LINE] = line
        self.config[PCI_COMMAND : PCI_COMMAND + 2] = b"\0\0"
        self.set_intx(False)
        self.reset_device()
        self._command_changed()
        for callback in self._at_reset:
            callback()

    def reset_device(self) -> None:
        """Reset what lies behind the BARs. For subclasses."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"


class _Refusal:
    """Where requests end that a bridge does not let through."""

    def translate(self, _port: DmaPort, _pasid: int, _address: int, _length: int, _access: int) -> Run:
        raise TranslationFault

    def interrupt(self, _port: DmaPort, _address: int, _data: int) -> tuple[int, int]:
        raise TranslationFault

    def illegal_interrupt(self, _port: DmaPort, _address: int, _length: int, _access: int) -> NoReturn:
        raise TranslationFault


class RootComplex:
    """Where functions meet memory, their IOMMU and the interrupt controller."""

    def __init__(
        self, memory: PhysicalMemory, msi_window: tuple[int, int] = (MSI_START, MSI_END), doorbell: int = -1
    ) -> None:
        self.memory = memory
        #: Untranslated writes here are interrupts. (0, 0) where interrupts are writes to memory as any others.
        self.msi_window = msi_window
        #: The physical address of the register that takes those, no memory's (GITS_TRANSLATER); -1 without.
        self.doorbell = doorbell
        self.functions: dict[int, PciFunction] = {}
        self._behind_bridges: list[DmaPort] = []
        #: Given by the kernel: gets (address, data) of every MSI.
        self.interrupt_sink: Callable[[int, int], None] | None = None
        #: Given by the kernel: gets (request id, data) of every write to the doorbell.
        self.doorbell_sink: Callable[[int, int], None] | None = None
        #: Given by the kernel: gets a function whose `intx_asserted` may have changed.
        self.intx_sink: Callable[[PciFunction], None] | None = None

    def add(self, function: PciFunction, iommu: IommuHardware | None) -> PciFunction:
        """Plug `function` in, behind `iommu` or behind none. ValueError if its slot is taken."""
        if function.rid in self.functions:
            raise ValueError(f"two functions at {function.address}")
        self.functions[function.rid] = function
        port = self._port(self.requester_id(function), iommu)
        self._connect(function, port)
        function.attach(self, port)
        return function

    # -- the tree ----------------------------------------------------------------------------------------------------

    def upstream(self, function: PciFunction) -> list[PciFunction]:
        """The bridges between a function and the root, nearest first; none for a function on bus 0."""
        found: list[PciFunction] = []
        bus = function.rid >> 8
        while bus:
            above = next((bridge for bridge in self.functions.values() if bridge.secondary == bus), None)
            if above is None or above in found:
                return []
            found.append(above)
            bus = above.rid >> 8
        return found

    def requester_id(self, function: PciFunction) -> int:
        """What the IOMMU sees: the function's own id, or that of the bridge that takes its requests over."""
        rid = function.rid
        for bridge in self.upstream(function):
            if bridge.express_type == _TYPE_PCI_BRIDGE:
                rid = bridge.secondary << 8
        return rid

    def port_below(self, function: PciFunction, rid: int) -> DmaPort:
        """A second port where `function` is plugged in, for requests that say they are of `rid`.

        Nobody believes them behind a port with ACS Source Validation on, nor of a function in the root complex, which
        knows its own (VT-d specification 3.12.4): every request is refused.
        """
        iommu = function.dma.iommu
        bridges = self.upstream(function)
        if not bridges and rid != function.rid:
            iommu = _Refusal()
        for bridge in bridges:
            inside = bridge.secondary <= rid >> 8 <= bridge.subordinate
            if bridge.acs is not None and bridge.acs.control & _ACS_SOURCE_VALIDATION and not inside:
                iommu = _Refusal()
            if bridge.express_type == _TYPE_PCI_BRIDGE:
                rid = bridge.secondary << 8
        port = self._port(rid, iommu)
        self._connect(function, port)
        return port

    def _port(self, rid: int, iommu: IommuHardware | None) -> DmaPort:
        return DmaPort(rid, self.memory, iommu, self.interrupt, self.msi_window, self.doorbell, self._ring)

    def _connect(self, function: PciFunction, port: DmaPort) -> None:
        if self.upstream(function):
            port.peers = lambda: self._peers(function)
            port.translation_blocked = lambda: self._translation_blocked(function)
            self._behind_bridges.append(port)

    def _peers(self, function: PciFunction) -> list[tuple[int, int]]:
        """The BARs, (start, end), that a switch or a conventional bus leads to without asking the root complex."""
        found = []
        below = function
        for bridge in self.upstream(function):
            conventional = bridge.express_type in (None, _TYPE_PCI_BRIDGE)
            redirected = below.acs is not None and below.acs.control & _ACS_REQUEST_REDIRECT
            if conventional or (bridge.express_type == _TYPE_UPSTREAM and not redirected):
                for peer in self.functions.values():
                    if bridge.secondary <= peer.rid >> 8 <= bridge.subordinate and peer is not function:
                        found += [(base, base + size) for base, size in peer.decoded()]
            below = bridge
        return found

    def _translation_blocked(self, function: PciFunction) -> bool:
        """A port on the way up has ACS Translation Blocking on: requests with an address type end there."""
        acs = [bridge.acs for bridge in self.upstream(function)]
        return any(each is not None and each.control & _ACS_TRANSLATION_BLOCKING for each in acs)

    def forget_routes(self) -> None:
        """What leads where has changed: ports behind bridges look again."""
        for port in self._behind_bridges:
            port.forget()

    def interrupt(self, address: int, data: int) -> None:
        """A message signalled interrupt arrived."""
        if self.interrupt_sink is not None:
            self.interrupt_sink(address, data)

    def _ring(self, rid: int, data: int) -> None:
        if self.doorbell_sink is not None:
            self.doorbell_sink(rid, data)

    def intx(self, function: PciFunction) -> None:
        if self.intx_sink is not None:
            self.intx_sink(function)

    def invalidate(self, rid: int, request: Invalidation) -> bool:
        """Carry an invalidation request to a function's device TLB; False if it is not completed."""
        function = self.functions.get(rid)
        return function is not None and function.ats is not None and function.ats.invalidate(request)

    def respond(self, rid: int, response: PageResponse) -> bool:
        """Carry a page request group response to a function; False if nobody takes it."""
        function = self.functions.get(rid)
        return function is not None and function.ats is not None and function.ats.respond(response)

    def map(self, base: int, size: int, window: RegisterWindow) -> bool:
        """Route [base, base + size) to a BAR; False where something else answers already, as on a real bus."""
        try:
            self.memory.add_window(base, size, window)
        except ValueError:
            return False
        self.forget_routes()
        return True

    def unmap(self, base: int) -> None:
        self.memory.remove_window(base)
        self.forget_routes()
