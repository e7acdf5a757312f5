"""Which PCI functions share an IOMMU group: those that the hardware cannot keep apart.

Mirrors `pci_device_group()` and its helpers in drivers/iommu/iommu.c, `pci_for_each_dma_alias()` of
drivers/pci/search.c, `pci_acs_enabled()` and `pci_acs_path_enabled()` of drivers/pci/pci.c, over the functions of a
root complex. As there, the ports of one switch are apart even where none of them redirects requests between them.

Left out: quirks (devices that are known to alias others, or to be isolated without saying so), virtual functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fakedev.pci import PCI_HEADER_TYPE, PCI_MULTIFUNCTION, PciFunction, RootComplex
from fakedev.pcie import (
    PCI_ACS_CR,
    PCI_ACS_EC,
    PCI_ACS_RR,
    PCI_ACS_SV,
    PCI_ACS_UF,
    PCI_EXP_TYPE_DOWNSTREAM,
    PCI_EXP_TYPE_PCI_BRIDGE,
    PCI_EXP_TYPE_ROOT_PORT,
)

T = TypeVar("T")
#: What keeps a function's requests from its neighbours.
REQ_ACS_FLAGS = PCI_ACS_SV | PCI_ACS_RR | PCI_ACS_CR | PCI_ACS_UF
_EXP_TYPE_PCIE_BRIDGE, _EXP_TYPE_RC_EC = 8, 10


def is_multifunction(function: PciFunction) -> bool:
    """`pdev->multifunction`: the header says so, or it is not the first of its slot."""
    return bool(function.config[PCI_HEADER_TYPE] & PCI_MULTIFUNCTION or function.rid & 7)


def acs_enabled(function: PciFunction, flags: int) -> bool:
    """pci_acs_enabled(): whether a function's requests go where `flags` want them to go."""
    kind = function.express_type
    if kind in (None, PCI_EXP_TYPE_PCI_BRIDGE, _EXP_TYPE_PCIE_BRIDGE, _EXP_TYPE_RC_EC):
        return False
    if kind not in (PCI_EXP_TYPE_DOWNSTREAM, PCI_EXP_TYPE_ROOT_PORT) and not is_multifunction(function):
        return True
    acs = function.acs
    if acs is None:
        return False
    # What is not even offered is taken for hard-wired.
    flags &= acs.supported | PCI_ACS_EC
    return acs.control & flags == flags


def acs_path_enabled(root: RootComplex, start: PciFunction, flags: int) -> bool:
    """pci_acs_path_enabled(): the same of `start` and every bridge above it."""
    return all(acs_enabled(function, flags) for function in (start, *root.upstream(start)))


def dma_aliases(root: RootComplex, function: PciFunction) -> list[tuple[PciFunction, int]]:
    """pci_for_each_dma_alias(): who takes the function's requests over, and the requester ids that they then have."""
    found = [(function, function.rid)]
    for bridge in root.upstream(function):
        if bridge.express_type == PCI_EXP_TYPE_PCI_BRIDGE:
            found.append((bridge, bridge.secondary << 8))
        elif bridge.express_type in (None, _EXP_TYPE_PCIE_BRIDGE):
            found.append((bridge, bridge.rid))
    return found


def pci_device_group(root: RootComplex, function: PciFunction, group_of: Callable[[PciFunction], T | None]) -> T | None:
    """The group that `function` has to join, by the groups that functions have already; None: one of its own."""
    for alias, _ in dma_aliases(root, function):
        function = alias
        group = group_of(alias)
        if group is not None:
            return group
    # Up to where access control keeps requests from turning around.
    for bridge in root.upstream(function):
        if acs_path_enabled(root, bridge, REQ_ACS_FLAGS):
            break
        function = bridge
        group = group_of(bridge)
        if group is not None:
            return group
    return _function_alias_group(root, function, group_of)


def _function_alias_group(
    root: RootComplex, function: PciFunction, group_of: Callable[[PciFunction], T | None]
) -> T | None:
    """get_pci_function_alias_group(): of another function of the slot from which nothing isolates this one."""
    if not is_multifunction(function) or acs_enabled(function, REQ_ACS_FLAGS):
        return None
    for rid, other in sorted(root.functions.items()):
        if rid >> 3 == function.rid >> 3 and other is not function and not acs_enabled(other, REQ_ACS_FLAGS):
            group = group_of(other)
            if group is not None:
                return group
    return None
