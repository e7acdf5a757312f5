"""A function's side of address translation services: the device TLB, and the page request interface.

Mirrors PCI Express Base 6.0, chapter 10. An `AtsPort` stands before a function's `DmaPort` and has the same `read` and
`write`. While ATS is off it passes requests on; while it is on it asks for translations, keeps them until an
invalidation request names them, and sends translated requests, which carry no PASID (10.2.3 lets them only where a
control bit allows it, which these functions do not have). So what software forgets to invalidate is used on.

A page that the translation agent says is not accessible is a page fault of the device: with the page request
interface on and `block` asked for, the request is `Parked` until the response; else it is a `PageFault`, which a device
reports as it likes. The interface keeps to its allocation (further requests wait for credit), goes off after a response
failure, and says in its status what it got that it did not expect.

Left out: translation requests ahead of use, several pages in one translation request, relaxed ordering, ITags.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fakedev.dma import DmaAbort, DmaRequest, Outcome, Parked
from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_ATS_CTRL,
    PCI_PASID_CTRL,
    PCI_PRI_CTRL,
    PCI_PRI_STATUS_RF,
    PCI_PRI_STATUS_UPRGI,
    AtsCapability,
    PasidCapability,
    PriCapability,
)
from fakedev.tlp import (
    EXECUTE,
    NO_PASID,
    PRG_INDEX_MASK,
    PRG_INVALID,
    PRG_SUCCESS,
    PRIVILEGED,
    READ,
    WRITE,
    Invalidation,
    PageRequest,
    PageResponse,
    Translation,
)


class PageFault(DmaAbort):
    """The translation agent answered: nobody may `access` the page of `address`."""

    def __init__(self, address: int, access: int) -> None:
        super().__init__(address)
        self.access = access


class DeviceTlb:
    """Translations that the function holds, by PASID (and privilege) and page size. Full, it empties itself."""

    def __init__(self, capacity: int = 1 << 12) -> None:
        self.capacity = capacity
        #: (PASID, privileged) -> length -> start -> what was answered.
        self._tags: dict[tuple[int, int], dict[int, dict[int, Translation]]] = {}

    def __len__(self) -> int:
        return sum(len(pages) for sizes in self._tags.values() for pages in sizes.values())

    def lookup(self, pasid: int, privileged: int, address: int) -> Translation | None:
        """The translation that holds `address`."""
        for length, pages in self._tags.get((pasid, privileged), {}).items():
            found = pages.get(address & -length)
            if found is not None:
                return found
        return None

    def insert(self, pasid: int, privileged: int, found: Translation) -> None:
        """Keep an answer, instead of what was kept for the same page."""
        if len(self) >= self.capacity:
            self.clear()
        self._tags.setdefault((pasid, privileged), {}).setdefault(found.length, {})[found.start] = found

    def invalidate(self, request: Invalidation) -> None:
        """Forget every translation that reaches into the range.

        Without a PASID in the request those of all PASIDs go, too, as Linux's SMMUv3 driver counts on.
        """
        end = request.start + request.length
        everyone = request.every_pasid or request.pasid == NO_PASID
        for (pasid, _), sizes in self._tags.items():
            if everyone or pasid == request.pasid:
                for length, pages in sizes.items():
                    for start in [start for start in pages if start < end and start + length > request.start]:
                        del pages[start]

    def clear(self) -> None:
        self._tags.clear()


class PageRequests:
    """The page request interface of one function."""

    def __init__(self, function: PciFunction, capability: PriCapability) -> None:
        self._function = function
        self.capability = capability
        #: Groups that were sent and not answered: index -> (PASID, requests in it, who waits).
        self._outstanding: dict[int, tuple[int, int, Parked]] = {}
        #: Groups that wait for credit.
        self._waiting: deque[tuple[int, Sequence[tuple[int, int]], Parked]] = deque()
        self._failed = False
        self._was_enabled = False
        function.watch_config(capability.offset + PCI_PRI_CTRL, 2, self._control_changed)
        function.at_reset(self._drop)

    @property
    def enabled(self) -> bool:
        """Whether requests may be sent: software enabled the interface, and no response failure turned it off."""
        return self.capability.enabled and not self._failed

    @property
    def outstanding(self) -> int:
        """Requests that were sent and not answered."""
        return sum(count for _, count, _ in self._outstanding.values())

    def ask(self, pasid: int, pages: Sequence[tuple[int, int]]) -> Parked:
        """Send one group of requests, each (address, access); what is returned resolves with the response.

        RETRY after success, ABORT after any other answer. DmaAbort: the interface is off, or the group is larger than
        the allocation.
        """
        address, access = pages[0]
        if not self.enabled or len(pages) > self.capability.allocation:
            raise DmaAbort(address)
        parked = Parked(DmaRequest(self._function.rid, pasid, address, 4096, access))
        self._waiting.append((pasid, pages, parked))
        self._send()
        return parked

    def stop(self, pasid: int) -> None:
        """Send the stop marker: no request of `pasid` follows. DmaAbort where no translation agent is above."""
        self._function.dma.send_page_request(PageRequest(self._function.rid, pasid, 0, 0, 0, True))

    def respond(self, response: PageResponse) -> None:
        """Take a response. One that nothing waits for sets UPRGI; after a failure all are ignored."""
        if self._failed:
            return
        group = self._outstanding.get(response.group & PRG_INDEX_MASK)
        expected = NO_PASID if group is None or not self.capability.response_pasid else group[0]
        if group is None or response.pasid != expected:
            self.capability.set_status(PCI_PRI_STATUS_UPRGI)
            return
        del self._outstanding[response.group & PRG_INDEX_MASK]
        if response.code in (PRG_SUCCESS, PRG_INVALID):
            self._settle()
            group[2].resolve(Outcome.RETRY if response.code == PRG_SUCCESS else Outcome.ABORT)
            self._send()
        else:
            self._failed = True
            self.capability.set_status(PCI_PRI_STATUS_RF)
            self._drop_groups(group[2])

    def _send(self) -> None:
        """Send waiting groups as far as there is credit."""
        while self._waiting and self.enabled:
            pasid, pages, parked = self._waiting[0]
            if self.outstanding + len(pages) > self.capability.allocation or len(self._outstanding) > PRG_INDEX_MASK:
                return
            self._waiting.popleft()
            index = next(n for n in range(PRG_INDEX_MASK + 1) if n not in self._outstanding)
            self._outstanding[index] = (pasid, len(pages), parked)
            rid = self._function.rid
            for number, (address, access) in enumerate(pages):
                last = number == len(pages) - 1
                message = PageRequest(rid, pasid, address & -4096, access, index, last)
                try:
                    self._function.dma.send_page_request(message)
                except DmaAbort:
                    del self._outstanding[index]
                    parked.resolve(Outcome.ABORT)
                    break

    def _control_changed(self) -> None:
        if self.capability.take_reset():
            self._drop_groups()
        enabled = self.capability.enabled
        if enabled and not self._was_enabled:
            self._failed = False
        if not enabled:
            # Groups that wait for credit are never sent.
            waiting, self._waiting = self._waiting, deque()
            for _, _, parked in waiting:
                parked.resolve(Outcome.ABORT)
        self._was_enabled = enabled
        self._settle()
        self._send()

    def _settle(self) -> None:
        self.capability.set_stopped(not self.capability.enabled and not self._outstanding)

    def _drop_groups(self, *more: Parked) -> None:
        """Forget what is outstanding: nobody will answer it."""
        lost = [*more, *(parked for _, _, parked in self._outstanding.values()), *(p for _, _, p in self._waiting)]
        self._outstanding.clear()
        self._waiting.clear()
        self._settle()
        for parked in lost:
            parked.resolve(Outcome.ABORT)

    def _drop(self) -> None:
        self._failed = self._was_enabled = False
        self._drop_groups()


class AtsPort:
    """A function's way to memory with address translation services.

    Capabilities that the function does not have are None. Requests go out with the PASID, privilege and
    execute bits that software has enabled.
    """

    def __init__(
        self,
        function: PciFunction,
        ats: AtsCapability | None = None,
        pasid: PasidCapability | None = None,
        pri: PriCapability | None = None,
    ) -> None:
        self._function = function
        self.ats = ats
        self.pasid = pasid
        self.tlb = DeviceTlb()
        self.page_requests = None if pri is None else PageRequests(function, pri)
        self._was_enabled = False
        function.ats = self
        if ats is not None:
            function.watch_config(ats.offset + PCI_ATS_CTRL, 2, self._control_changed)
        if pasid is not None:
            function.watch_config(pasid.offset + PCI_PASID_CTRL, 2, self.tlb.clear)
        function.at_reset(self._control_changed)

    @property
    def enabled(self) -> bool:
        """Whether requests are translated before they are sent."""
        return self.ats is not None and self.ats.enabled

    def read(
        self,
        address: int,
        length: int,
        pasid: int = NO_PASID,
        privileged: bool = False,
        execute: bool = False,
        block: bool = True,
        direct: bool = False,
    ) -> bytes:
        """As DmaPort.read; `block` says whether to wait for a page that is not there, `direct` to do without ATS.

        DmaAbort, PageFault, Parked.
        """
        access = READ | self._prefix(address, pasid, privileged, execute)
        if direct or not self.enabled:
            return self._function.dma.read(address, length, pasid, access & PRIVILEGED != 0, access & EXECUTE != 0)
        parts = []
        end = address + length
        while address < end:
            found = self._find(address, pasid, access, block)
            size = min(end, found.start + found.length) - address
            if found.untranslated:
                dma = self._function.dma
                parts.append(dma.read(address, size, pasid, access & PRIVILEGED != 0, access & EXECUTE != 0))
            else:
                pa = found.pa + address - found.start
                parts.append(self._function.dma.read_translated(pa, size))
            address += size
        return b"".join(parts)

    def write(
        self,
        address: int,
        data: bytes | bytearray | memoryview,
        pasid: int = NO_PASID,
        privileged: bool = False,
        block: bool = True,
        direct: bool = False,
    ) -> None:
        """As DmaPort.write; interrupts stay untranslated. `block` and `direct` as for reads.

        DmaAbort, PageFault, Parked.
        """
        access = WRITE | self._prefix(address, pasid, privileged, False)
        dma = self._function.dma
        first, beyond = dma.msi_window
        if direct or not self.enabled or first <= address < beyond:
            dma.write(address, data, pasid, access & PRIVILEGED != 0)
            return
        view = memoryview(data)
        end = address + len(view)
        done = 0
        while address < end:
            found = self._find(address, pasid, access, block)
            size = min(end, found.start + found.length) - address
            piece = view[done : done + size]
            if found.untranslated:
                dma.write(address, piece, pasid, access & PRIVILEGED != 0)
            else:
                dma.write_translated(found.pa + address - found.start, piece)
            done += size
            address += size

    def invalidate(self, request: Invalidation) -> bool:
        """An invalidation request from the translation agent. A function whose ATS is off does not take it."""
        if not self.enabled:
            return False
        self.tlb.invalidate(request)
        return True

    def respond(self, response: PageResponse) -> bool:
        """A page request group response from the translation agent."""
        if self.page_requests is None:
            return False
        self.page_requests.respond(response)
        return True

    def _prefix(self, address: int, pasid: int, privileged: bool, execute: bool) -> int:
        """The bits that the PASID prefix carries, as far as software allows. DmaAbort: no such prefix may be sent."""
        if pasid == NO_PASID:
            return 0
        capability = self.pasid
        if capability is None or not capability.enabled or pasid >> capability.bits:
            raise DmaAbort(address)
        return (PRIVILEGED if privileged and capability.privileged else 0) | (
            EXECUTE if execute and capability.execute else 0
        )

    def _find(self, address: int, pasid: int, access: int, block: bool) -> Translation:
        """A translation that allows `access`: from the TLB, else asked for. DmaAbort, PageFault, Parked."""
        privileged = access & PRIVILEGED
        wanted = access & ~PRIVILEGED
        found = self.tlb.lookup(pasid, privileged, address)
        if found is None or wanted & ~found.allowed:
            found = self._function.dma.request_translation(address, access, pasid)
            if found.allowed and self._function.dma.caching.keep():
                self.tlb.insert(pasid, privileged, found)
            if wanted & ~found.allowed:
                if block and self.page_requests is not None and self.page_requests.enabled:
                    raise self.page_requests.ask(pasid, [(address, access)])
                raise PageFault(address, access)
        return found

    def _control_changed(self) -> None:
        # Translations do not outlive ATS (10.5.1.3): each time it is enabled the cache is empty.
        enabled = self.enabled
        if enabled != self._was_enabled:
            self._was_enabled = enabled
            self.tlb.clear()
