"""A device that keeps no rule of the bus, for tests that an IOMMU keeps it from memory.

What a well-behaved function would not do, it does when told to by calls (it has no registers): it masters the bus while
it may not, sends requests in the name of others, with PASIDs that nobody enabled, translated ones to addresses that it
was never given or that were taken back, interrupts of its own making; it completes invalidations without forgetting, or
does not complete them; it asks for pages forever, and goes on after a detach. A name that is not its own gets it
somewhere only behind ports without source validation: in the root complex nobody believes it (VT-d specification
3.12.4).

A device TLB is the device's word: a function that software lets use translated requests reaches what the IOMMU does
not check again. That is why software turns ATS on for trusted functions only; with ATS off in the IOMMU's tables all of
this fails.

Left out: what the link below would do to malformed packets.
"""

from __future__ import annotations

from fakedev.ats import AtsPort
from fakedev.dma import DmaAbort, DmaPort
from fakedev.pci import PciFunction, RootComplex
from fakedev.pcie import PCI_EXP_TYPE_RC_END, AtsCapability, ExpressCapability, PasidCapability, PriCapability
from fakedev.tlp import NO_PASID, READ, WRITE, Invalidation, PageRequest, Translation


class _LyingPort(AtsPort):
    """Address translation services that forget only when told to be honest."""

    honest = False
    #: Whether invalidations are completed at all.
    completes = True

    def invalidate(self, request: Invalidation) -> bool:
        if self.honest:
            return super().invalidate(request)
        return self.completes


class Hostile(PciFunction):
    """The function. Each attack returns what it got, or None (False) where it was kept out."""

    def __init__(self, address: str, *, kind: int = PCI_EXP_TYPE_RC_END, command: int = 0) -> None:
        super().__init__(address, (0x1234, 0xBAD0), 0xFF0000, command=command, config_size=4096)
        ExpressCapability(self, 0x40, kind)
        self.port = _LyingPort(
            self, AtsCapability(self, 0x100), PasidCapability(self, 0x120, execute=True), PriCapability(self, 0x110)
        )
        #: What it has seen translated, however long ago.
        self.kept: dict[tuple[int, int], Translation] = {}
        self._always: DmaPort

    def attach(self, root: RootComplex, dma: DmaPort) -> None:
        super().attach(root, dma)
        self._always = root.port_below(self, self.rid)
        self._always.set_enabled(True)

    def _port(self, rid: int | None) -> DmaPort:
        """A way out that asks nobody whether it may: with the own requester id, or another's."""
        assert self.root is not None
        if rid is None:
            return self._always
        port = self.root.port_below(self, rid)
        port.set_enabled(True)
        return port

    # -- attacks -----------------------------------------------------------------------------------------------------

    def steal(self, address: int, length: int, *, rid: int | None = None, pasid: int = NO_PASID) -> bytes | None:
        """Read untranslated, whatever Bus Master Enable and the PASID capability say."""
        try:
            return self._port(rid).read(address, length, pasid, privileged=True, execute=pasid != NO_PASID)
        except DmaAbort:
            return None

    def smash(self, address: int, data: bytes, *, rid: int | None = None, pasid: int = NO_PASID) -> bool:
        """Write untranslated; True if the write was taken."""
        try:
            self._port(rid).write(address, data, pasid, privileged=True)
        except DmaAbort:
            return False
        return True

    def learn(self, address: int, pasid: int = NO_PASID, *, rid: int | None = None) -> Translation | None:
        """Ask for a translation and keep the answer for good."""
        try:
            found = self._port(rid).request_translation(address, READ | WRITE, pasid)
        except DmaAbort:
            return None
        if found.allowed:
            self.kept[pasid, found.start] = found
        return found

    def steal_translated(self, pa: int, length: int, *, rid: int | None = None) -> bytes | None:
        """Read with a translated request: at an address of its own choosing."""
        try:
            return self._port(rid).read_translated(pa, length)
        except DmaAbort:
            return None

    def smash_translated(self, pa: int, data: bytes, *, rid: int | None = None) -> bool:
        """Write with a translated request; True if it was taken."""
        try:
            self._port(rid).write_translated(pa, data)
        except DmaAbort:
            return False
        return True

    def use_kept(self, address: int, data: bytes, pasid: int = NO_PASID) -> bool:
        """Write by a translation that it once learned."""
        found = self.kept[pasid, address & -4096]
        return self.smash_translated(found.pa + address - found.start, data)

    def forge_interrupt(self, data: int, *, rid: int | None = None) -> bool:
        """Send a message signalled interrupt that nobody programmed; True if it was taken."""
        return self.smash(0xFEE0_0000, data.to_bytes(4, "little"), rid=rid)

    def flood(self, count: int, *, rid: int | None = None, pasid: int = NO_PASID) -> int:
        """Send page requests without end of group, credit or enabled interface; how many were taken."""
        taken = 0
        for number in range(count):
            request = PageRequest(self.rid if rid is None else rid, pasid, number << 12, READ | WRITE, 0, False)
            try:
                self._port(rid).send_page_request(request)
            except DmaAbort:
                continue
            taken += 1
        return taken
