"""PCI Express capabilities as registers: Express itself, ATS, PRI, PASID and access control services.

Mirrors PCI Express Base 6.0: 7.5.3 (Express capability), 7.8.8 (PASID), 7.7.11 (ACS), 10.5.1 (ATS), 10.5.2 (page
request). Offsets and bits have the names of uapi/linux/pci_regs.h. A class here is a function's registers with the
semantics that hardware gives them; what a device does with them is in fakedev/ats.py.

Left out: link and slot registers (they read zero), the egress control vector of ACS, process address spaces beyond 20
bits.
"""

from __future__ import annotations

from fakedev.pci import PCI_EXT_CONFIG_SIZE, PciFunction

PCI_CAP_ID_EXP = 0x10
PCI_EXT_CAP_ID_ACS, PCI_EXT_CAP_ID_ATS, PCI_EXT_CAP_ID_PRI, PCI_EXT_CAP_ID_PASID = 0x0D, 0x0F, 0x13, 0x1B

PCI_EXP_FLAGS, PCI_EXP_DEVCAP, PCI_EXP_DEVCTL, PCI_EXP_DEVCAP2 = 0x02, 0x04, 0x08, 0x24
PCI_EXP_TYPE_ENDPOINT, PCI_EXP_TYPE_ROOT_PORT, PCI_EXP_TYPE_UPSTREAM, PCI_EXP_TYPE_DOWNSTREAM = 0, 4, 5, 6
PCI_EXP_TYPE_PCI_BRIDGE, PCI_EXP_TYPE_RC_END = 7, 9
PCI_EXP_DEVCAP_RBER, PCI_EXP_DEVCAP_FLR = 0x8000, 1 << 28
PCI_EXP_DEVCTL_BCR_FLR = 0x8000
PCI_EXP_DEVCAP2_EE_PREFIX = 1 << 21
_EXPRESS_SIZE = 0x3C

PCI_ATS_CAP, PCI_ATS_CTRL = 0x04, 0x06
PCI_ATS_CAP_PAGE_ALIGNED, PCI_ATS_CAP_GLOBAL_INVALIDATE = 0x20, 0x40
PCI_ATS_CTRL_ENABLE, PCI_ATS_CTRL_STU_MASK, PCI_ATS_MIN_STU = 0x8000, 0x1F, 12

PCI_PRI_CTRL, PCI_PRI_STATUS, PCI_PRI_MAX_REQ, PCI_PRI_ALLOC_REQ = 0x04, 0x06, 0x08, 0x0C
PCI_PRI_CTRL_ENABLE, PCI_PRI_CTRL_RESET = 1, 2
PCI_PRI_STATUS_RF, PCI_PRI_STATUS_UPRGI, PCI_PRI_STATUS_STOPPED, PCI_PRI_STATUS_PASID = 1, 2, 0x100, 0x8000

PCI_PASID_CAP, PCI_PASID_CTRL = 0x04, 0x06
PCI_PASID_EXEC, PCI_PASID_PRIV, PCI_PASID_CTRL_ENABLE = 2, 4, 1

PCI_ACS_CAP, PCI_ACS_CTRL = 0x04, 0x06
PCI_ACS_SV, PCI_ACS_TB, PCI_ACS_RR, PCI_ACS_CR, PCI_ACS_UF, PCI_ACS_EC, PCI_ACS_DT = 1, 2, 4, 8, 0x10, 0x20, 0x40


class ExpressCapability:
    """What makes a function a PCI Express one, of `kind` PCI_EXP_TYPE_*. With `flr` it has function level reset."""

    def __init__(self, function: PciFunction, offset: int, kind: int, flr: bool = True, prefixes: bool = True) -> None:
        self._function = function
        self.offset = offset
        function.express_type = kind
        body = bytearray(_EXPRESS_SIZE - 2)
        writable = bytearray(_EXPRESS_SIZE - 2)

        def put(register: int, width: int, value: int, mask: int = 0) -> None:
            body[register - 2 : register - 2 + width] = value.to_bytes(width, "little")
            writable[register - 2 : register - 2 + width] = mask.to_bytes(width, "little")

        put(PCI_EXP_FLAGS, 2, kind << 4 | 2)
        put(PCI_EXP_DEVCAP, 4, PCI_EXP_DEVCAP_RBER | (PCI_EXP_DEVCAP_FLR if flr else 0))
        put(PCI_EXP_DEVCTL, 2, 0, 0x7FFF | (PCI_EXP_DEVCTL_BCR_FLR if flr else 0))
        put(PCI_EXP_DEVCAP2, 4, PCI_EXP_DEVCAP2_EE_PREFIX if prefixes else 0)
        function.add_capability(PCI_CAP_ID_EXP, offset, bytes(body), bytes(writable))
        if flr:
            function.reset_methods = (*function.reset_methods, "flr")
            function.watch_config(offset + PCI_EXP_DEVCTL, 2, self._control_changed)

    def _control_changed(self) -> None:
        if self._function.config[self.offset + PCI_EXP_DEVCTL + 1] & PCI_EXP_DEVCTL_BCR_FLR >> 8:
            self._function.reset()  # the bit reads zero afterwards


class _Extended:
    """Where an extended capability is, and its 16-bit registers."""

    def __init__(self, function: PciFunction, offset: int) -> None:
        if function.config_size != PCI_EXT_CONFIG_SIZE:
            raise ValueError(f"{function.address} has no extended configuration space")
        self.function = function
        self.offset = offset

    def _get(self, register: int, width: int = 2) -> int:
        at = self.offset + register
        return int.from_bytes(self.function.config[at : at + width], "little")

    def _put(self, register: int, value: int) -> None:
        at = self.offset + register
        self.function.config[at : at + 2] = value.to_bytes(2, "little")


class AtsCapability(_Extended):
    """ATS: `queue_depth` is the number of invalidations that the function takes at once, 32 for 0."""

    def __init__(
        self, function: PciFunction, offset: int, queue_depth: int = 0, global_invalidate: bool = True
    ) -> None:
        super().__init__(function, offset)
        flags = queue_depth | PCI_ATS_CAP_PAGE_ALIGNED | (PCI_ATS_CAP_GLOBAL_INVALIDATE if global_invalidate else 0)
        writable = PCI_ATS_CTRL_ENABLE | PCI_ATS_CTRL_STU_MASK
        function.add_extended_capability(
            PCI_EXT_CAP_ID_ATS,
            1,
            offset,
            flags.to_bytes(2, "little") + bytes(2),
            bytes(2) + writable.to_bytes(2, "little"),
        )

    @property
    def enabled(self) -> bool:
        return bool(self._get(PCI_ATS_CTRL) & PCI_ATS_CTRL_ENABLE)

    @property
    def stu_lg2(self) -> int:
        """log2 of the smallest translation unit, in bytes."""
        return PCI_ATS_MIN_STU + (self._get(PCI_ATS_CTRL) & PCI_ATS_CTRL_STU_MASK)


class PriCapability(_Extended):
    """The page request interface: at most `capacity` requests outstanding.

    `response_pasid`: responses carry the PASID of their request.
    """

    def __init__(self, function: PciFunction, offset: int, capacity: int = 32, response_pasid: bool = True) -> None:
        super().__init__(function, offset)
        self.response_pasid = response_pasid
        status = PCI_PRI_STATUS_STOPPED | (PCI_PRI_STATUS_PASID if response_pasid else 0)
        body = bytes(2) + status.to_bytes(2, "little") + capacity.to_bytes(4, "little") + bytes(4)
        writable = (PCI_PRI_CTRL_ENABLE | PCI_PRI_CTRL_RESET).to_bytes(2, "little") + bytes(6) + b"\xff" * 4
        cleared = bytes(2) + (PCI_PRI_STATUS_RF | PCI_PRI_STATUS_UPRGI).to_bytes(2, "little")
        function.add_extended_capability(PCI_EXT_CAP_ID_PRI, 1, offset, body, writable, cleared)

    @property
    def enabled(self) -> bool:
        return bool(self._get(PCI_PRI_CTRL) & PCI_PRI_CTRL_ENABLE)

    def take_reset(self) -> bool:
        """Whether software asked for a reset, which counts while the interface is off; the bit reads zero always."""
        control = self._get(PCI_PRI_CTRL)
        self._put(PCI_PRI_CTRL, control & ~PCI_PRI_CTRL_RESET)
        return control & (PCI_PRI_CTRL_RESET | PCI_PRI_CTRL_ENABLE) == PCI_PRI_CTRL_RESET

    @property
    def allocation(self) -> int:
        """How many requests software lets the function have outstanding, and it has room for."""
        return min(self._get(PCI_PRI_ALLOC_REQ, 4), self._get(PCI_PRI_MAX_REQ, 4))

    @property
    def status(self) -> int:
        return self._get(PCI_PRI_STATUS)

    def set_status(self, bits: int) -> None:
        """Set RF or UPRGI."""
        self._put(PCI_PRI_STATUS, self.status | bits)

    def set_stopped(self, stopped: bool) -> None:
        status = self.status & ~PCI_PRI_STATUS_STOPPED
        self._put(PCI_PRI_STATUS, status | (PCI_PRI_STATUS_STOPPED if stopped else 0))


class PasidCapability(_Extended):
    """PASIDs of `bits` bits, with execute and privileged requests if the function sends such."""

    def __init__(
        self, function: PciFunction, offset: int, bits: int = 20, execute: bool = False, privileged: bool = True
    ) -> None:
        super().__init__(function, offset)
        if not 1 <= bits <= 20:
            raise ValueError(f"PASIDs of {bits} bits: 1 to 20")
        self.bits = bits
        permissions = (PCI_PASID_EXEC if execute else 0) | (PCI_PASID_PRIV if privileged else 0)
        function.add_extended_capability(
            PCI_EXT_CAP_ID_PASID,
            1,
            offset,
            (bits << 8 | permissions).to_bytes(2, "little") + bytes(2),
            bytes(2) + (PCI_PASID_CTRL_ENABLE | permissions).to_bytes(2, "little"),
        )

    @property
    def enabled(self) -> bool:
        return bool(self._get(PCI_PASID_CTRL) & PCI_PASID_CTRL_ENABLE)

    @property
    def execute(self) -> bool:
        """Whether requests may ask for execution."""
        return bool(self._get(PCI_PASID_CTRL) & PCI_PASID_EXEC)

    @property
    def privileged(self) -> bool:
        """Whether requests may be privileged."""
        return bool(self._get(PCI_PASID_CTRL) & PCI_PASID_PRIV)


class AcsCapability(_Extended):
    """Access control services; `supported` are PCI_ACS_* bits, `enabled` those that are on from the start."""

    def __init__(self, function: PciFunction, offset: int, supported: int, enabled: int = 0) -> None:
        super().__init__(function, offset)
        function.acs = self
        function.watch_config(offset + PCI_ACS_CTRL, 2, self._control_changed)
        function.add_extended_capability(
            PCI_EXT_CAP_ID_ACS,
            1,
            offset,
            supported.to_bytes(2, "little") + (enabled & supported).to_bytes(2, "little"),
            bytes(2) + supported.to_bytes(2, "little"),
        )

    @property
    def supported(self) -> int:
        return self._get(PCI_ACS_CAP)

    @property
    def control(self) -> int:
        """The services that are on."""
        return self._get(PCI_ACS_CTRL)

    def _control_changed(self) -> None:
        if self.function.root is not None:
            self.function.root.forget_routes()
