"""Bridges: root ports, switch ports, and bridges to conventional PCI.

Mirrors the type-1 header (PCI-to-PCI Bridge 1.2, chapter 3) as far as topology needs it, and ACS (PCI Express 6.12) on
the ports. Bus numbers are those that the firmware gave; software may read them.

Left out: memory and I/O windows (what is behind a bridge answers where its BARs are), hot plug, changes of bus numbers.
"""

from __future__ import annotations

from fakedev.pci import PciFunction
from fakedev.pcie import (
    PCI_ACS_CR,
    PCI_ACS_DT,
    PCI_ACS_EC,
    PCI_ACS_RR,
    PCI_ACS_SV,
    PCI_ACS_TB,
    PCI_ACS_UF,
    PCI_EXP_TYPE_DOWNSTREAM,
    PCI_EXP_TYPE_PCI_BRIDGE,
    PCI_EXP_TYPE_ROOT_PORT,
    PCI_EXP_TYPE_UPSTREAM,
    AcsCapability,
    ExpressCapability,
)

PCI_PRIMARY_BUS, PCI_SECONDARY_BUS, PCI_SUBORDINATE_BUS, PCI_BRIDGE_CONTROL = 0x18, 0x19, 0x1A, 0x3E
PCI_HEADER_TYPE_BRIDGE = 1
#: What a port with ACS has (Direct Translated only where ATS is meant to go to peers), and what Linux turns on.
ACS_ALL = PCI_ACS_SV | PCI_ACS_TB | PCI_ACS_RR | PCI_ACS_CR | PCI_ACS_UF | PCI_ACS_DT
ACS_LINUX = PCI_ACS_SV | PCI_ACS_RR | PCI_ACS_CR | PCI_ACS_UF
KINDS = {
    "root-port": PCI_EXP_TYPE_ROOT_PORT,
    "upstream-port": PCI_EXP_TYPE_UPSTREAM,
    "downstream-port": PCI_EXP_TYPE_DOWNSTREAM,
    "pcie-to-pci": PCI_EXP_TYPE_PCI_BRIDGE,
    "pci": None,
}


class PciBridge(PciFunction):
    """A bridge to bus `secondary`, with buses up to `subordinate` behind it.

    `kind` is a name of KINDS; "pci" is a bridge of conventional PCI. `acs` are the services that the port has, 0 for no
    such capability; those of ACS_LINUX are on from the start, as the firmware of a machine for virtualisation leaves
    them.
    """

    def __init__(
        self,
        address: str,
        secondary: int,
        subordinate: int | None = None,
        *,
        kind: str = "root-port",
        acs: int = ACS_ALL,
        ids: tuple[int, int] = (0x1B36, 0x000C),
    ) -> None:
        super().__init__(
            address,
            ids,
            0x060400,
            header_type=PCI_HEADER_TYPE_BRIDGE,
            config_size=256 if kind == "pci" else 4096,
            command=0x7,
        )
        last = secondary if subordinate is None else subordinate
        if not self.rid >> 8 < secondary <= last <= 255:
            raise ValueError(f"{address}: a bridge from bus {self.rid >> 8:02x} to {secondary:02x}-{last:02x}")
        if kind not in KINDS:
            raise ValueError(f"{address}: {kind!r} is no kind of bridge: {', '.join(KINDS)}")
        self.secondary, self.subordinate = secondary, last
        self.config[PCI_PRIMARY_BUS : PCI_SUBORDINATE_BUS + 1] = bytes([self.rid >> 8, secondary, last])
        self.config[PCI_BRIDGE_CONTROL] = 0
        self._reset_state = bytes(self.config)
        express = KINDS[kind]
        if express is not None:
            ExpressCapability(self, 0x40, express, flr=False)
        if acs and express in (PCI_EXP_TYPE_ROOT_PORT, PCI_EXP_TYPE_DOWNSTREAM):
            AcsCapability(self, 0x100, acs & ~PCI_ACS_EC, ACS_LINUX)
