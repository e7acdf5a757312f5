"""What drivers call to use a function's ATS, PRI and PASID capabilities, through its configuration space.

Mirrors drivers/pci/ats.c (names without `pci_`). Whether a service is on is asked of its control register. Left out:
virtual functions, quirks (`pasid_no_tlp`), untrusted functions.
"""

from __future__ import annotations

import errno

from fakedev.pci import PCI_EXT_CAP_START, PciFunction, RootComplex
from fakedev.pcie import (
    PCI_ACS_RR,
    PCI_ACS_UF,
    PCI_ATS_CAP,
    PCI_ATS_CAP_PAGE_ALIGNED,
    PCI_ATS_CTRL,
    PCI_ATS_CTRL_ENABLE,
    PCI_ATS_MIN_STU,
    PCI_EXT_CAP_ID_ATS,
    PCI_EXT_CAP_ID_PASID,
    PCI_EXT_CAP_ID_PRI,
    PCI_PASID_CAP,
    PCI_PASID_CTRL,
    PCI_PASID_CTRL_ENABLE,
    PCI_PASID_EXEC,
    PCI_PASID_PRIV,
    PCI_PRI_ALLOC_REQ,
    PCI_PRI_CTRL,
    PCI_PRI_CTRL_ENABLE,
    PCI_PRI_CTRL_RESET,
    PCI_PRI_MAX_REQ,
    PCI_PRI_STATUS,
    PCI_PRI_STATUS_PASID,
    PCI_PRI_STATUS_STOPPED,
)
from kernel_model.errors import KernelBug, KernelError
from kernel_model.iommu.pci_group import acs_path_enabled

#: What a reset loses and the kernel puts back, in this order: (capability, register, width).
_STATE = (
    (PCI_EXT_CAP_ID_PASID, PCI_PASID_CTRL, 2),
    (PCI_EXT_CAP_ID_PRI, PCI_PRI_ALLOC_REQ, 4),
    (PCI_EXT_CAP_ID_PRI, PCI_PRI_CTRL, 2),
    (PCI_EXT_CAP_ID_ATS, PCI_ATS_CTRL, 2),
)


def find_ext_capability(function: PciFunction, cap: int) -> int:
    """Where an extended capability is; 0 if the function does not have it."""
    at = PCI_EXT_CAP_START if function.config_size > PCI_EXT_CAP_START else 0
    while at:
        header = function.config_read(at, 4)
        if header & 0xFFFF == cap and header:
            return at
        at = header >> 20
    return 0


def _control(function: PciFunction, cap: int, register: int) -> int:
    at = find_ext_capability(function, cap)
    return function.config_read(at + register, 2) if at else 0


def _need(function: PciFunction, cap: int, what: str) -> int:
    at = find_ext_capability(function, cap)
    if not at:
        raise KernelError(errno.EINVAL, f"{function.address} has no {what}")
    return at


# -- address translation services ------------------------------------------------------------------------------------


def ats_supported(function: PciFunction) -> bool:
    """Whether the function has a device TLB."""
    return bool(find_ext_capability(function, PCI_EXT_CAP_ID_ATS))


def ats_queue_depth(function: PciFunction) -> int:
    """How many invalidations the function takes at once, 1 to 32. EINVAL: it has no ATS."""
    at = _need(function, PCI_EXT_CAP_ID_ATS, "ATS")
    return function.config_read(at + PCI_ATS_CAP, 2) & 0x1F or 32


def ats_page_aligned(function: PciFunction) -> bool:
    """Whether the function asks for translations of page-aligned addresses only."""
    return bool(_control(function, PCI_EXT_CAP_ID_ATS, PCI_ATS_CAP) & PCI_ATS_CAP_PAGE_ALIGNED)


def ats_enabled(function: PciFunction) -> bool:
    return bool(_control(function, PCI_EXT_CAP_ID_ATS, PCI_ATS_CTRL) & PCI_ATS_CTRL_ENABLE)


def enable_ats(function: PciFunction, page_shift: int) -> None:
    """Let the function ask for translations of units of 1 << page_shift bytes. EINVAL: it cannot; below 4 KiB."""
    at = _need(function, PCI_EXT_CAP_ID_ATS, "ATS")
    if ats_enabled(function):
        raise KernelBug(f"ATS of {function.address} is on already")
    if page_shift < PCI_ATS_MIN_STU:
        raise KernelError(errno.EINVAL, f"a smallest translation unit of {1 << page_shift} bytes")
    function.config_write(at + PCI_ATS_CTRL, 2, PCI_ATS_CTRL_ENABLE | page_shift - PCI_ATS_MIN_STU)


def disable_ats(function: PciFunction) -> None:
    at = find_ext_capability(function, PCI_EXT_CAP_ID_ATS)
    if not ats_enabled(function):
        raise KernelBug(f"ATS of {function.address} is off already")
    function.config_write(at + PCI_ATS_CTRL, 2, function.config_read(at + PCI_ATS_CTRL, 2) & ~PCI_ATS_CTRL_ENABLE)


# -- page requests ---------------------------------------------------------------------------------------------------


def pri_supported(function: PciFunction) -> bool:
    """Whether the function has a page request interface."""
    return bool(find_ext_capability(function, PCI_EXT_CAP_ID_PRI))


def pri_enabled(function: PciFunction) -> bool:
    return bool(_control(function, PCI_EXT_CAP_ID_PRI, PCI_PRI_CTRL) & PCI_PRI_CTRL_ENABLE)


def enable_pri(function: PciFunction, requests: int) -> None:
    """Let the function have up to `requests` page requests outstanding.

    EINVAL: it has no interface. EBUSY: requests from before it was disabled are not answered yet.
    """
    at = _need(function, PCI_EXT_CAP_ID_PRI, "page request interface")
    if pri_enabled(function):
        raise KernelBug(f"PRI of {function.address} is on already")
    if not function.config_read(at + PCI_PRI_STATUS, 2) & PCI_PRI_STATUS_STOPPED:
        raise KernelError(errno.EBUSY, "page requests are outstanding")
    allocated = min(requests, function.config_read(at + PCI_PRI_MAX_REQ, 4))
    function.config_write(at + PCI_PRI_ALLOC_REQ, 4, allocated)
    function.config_write(at + PCI_PRI_CTRL, 2, PCI_PRI_CTRL_ENABLE)


def disable_pri(function: PciFunction) -> None:
    at = find_ext_capability(function, PCI_EXT_CAP_ID_PRI)
    if not pri_enabled(function):
        raise KernelBug(f"PRI of {function.address} is off already")
    function.config_write(at + PCI_PRI_CTRL, 2, 0)


def reset_pri(function: PciFunction) -> None:
    """Drop what the interface, which is off, has outstanding. EINVAL: there is none."""
    at = _need(function, PCI_EXT_CAP_ID_PRI, "page request interface")
    if pri_enabled(function):
        raise KernelBug(f"PRI of {function.address} is on")
    function.config_write(at + PCI_PRI_CTRL, 2, PCI_PRI_CTRL_RESET)


def prg_resp_pasid_required(function: PciFunction) -> bool:
    """Whether responses to page requests have to carry the PASID."""
    return bool(_control(function, PCI_EXT_CAP_ID_PRI, PCI_PRI_STATUS) & PCI_PRI_STATUS_PASID)


# -- PASIDs ----------------------------------------------------------------------------------------------------------


def max_pasids(function: PciFunction) -> int:
    """How many PASIDs the function has. EINVAL: none."""
    at = _need(function, PCI_EXT_CAP_ID_PASID, "PASIDs")
    return 1 << (function.config_read(at + PCI_PASID_CAP, 2) >> 8 & 0x1F)


def pasid_features(function: PciFunction) -> int:
    """PCI_PASID_EXEC and PCI_PASID_PRIV, as the function can. EINVAL: it has no PASIDs."""
    at = _need(function, PCI_EXT_CAP_ID_PASID, "PASIDs")
    return function.config_read(at + PCI_PASID_CAP, 2) & (PCI_PASID_EXEC | PCI_PASID_PRIV)


def pasid_status(function: PciFunction) -> int:
    """What is on: PCI_PASID_CTRL_ENABLE, PCI_PASID_EXEC, PCI_PASID_PRIV. EINVAL: it has no PASIDs."""
    at = _need(function, PCI_EXT_CAP_ID_PASID, "PASIDs")
    return function.config_read(at + PCI_PASID_CTRL, 2) & (PCI_PASID_CTRL_ENABLE | PCI_PASID_EXEC | PCI_PASID_PRIV)


def pasid_enabled(function: PciFunction) -> bool:
    return bool(_control(function, PCI_EXT_CAP_ID_PASID, PCI_PASID_CTRL) & PCI_PASID_CTRL_ENABLE)


def enable_pasid(root: RootComplex, function: PciFunction, features: int) -> None:
    """Let the function send PASIDs, with `features` of `pasid_features`.

    EINVAL: it has none, or not those; the way to the root may turn requests around, as addresses with a PASID mean
    nothing to a peer.
    """
    if pasid_enabled(function):
        raise KernelBug(f"PASIDs of {function.address} are on already")
    at = _need(function, PCI_EXT_CAP_ID_PASID, "PASIDs")
    if not acs_path_enabled(root, function, PCI_ACS_RR | PCI_ACS_UF):
        raise KernelError(errno.EINVAL, "requests may be routed to peers")
    if features & ~pasid_features(function):
        raise KernelError(errno.EINVAL, f"no PASID features {features:#x}")
    function.config_write(at + PCI_PASID_CTRL, 2, PCI_PASID_CTRL_ENABLE | features)


def disable_pasid(function: PciFunction) -> None:
    at = find_ext_capability(function, PCI_EXT_CAP_ID_PASID)
    if not pasid_enabled(function):
        raise KernelBug(f"PASIDs of {function.address} are off already")
    function.config_write(at + PCI_PASID_CTRL, 2, 0)


# -- over a reset ----------------------------------------------------------------------------------------------------


def save_state(function: PciFunction) -> list[tuple[int, int, int]]:
    """What `restore_state` puts back: (offset, width, value) of the services' controls."""
    found = []
    for cap, register, width in _STATE:
        at = find_ext_capability(function, cap)
        if at:
            found.append((at + register, width, function.config_read(at + register, width)))
    return found


def restore_state(function: PciFunction, saved: list[tuple[int, int, int]]) -> None:
    """pci_restore_pasid_state(), pci_restore_pri_state(), pci_restore_ats_state()."""
    for offset, width, value in saved:
        function.config_write(offset, width, value)
