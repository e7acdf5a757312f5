"""Registers of a VT-d unit: offsets, fields, and what the capability registers say.

Mirrors the VT-d specification 11.4, names after drivers/iommu/intel/iommu.h. `Capabilities` reads the two capability
registers as the manual does; the unit and the driver both ask it.
"""

from __future__ import annotations

VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR = 0x34, 0x38, 0x3C, 0x40, 0x44
IQH, IQT, IQA, ICS = 0x80, 0x88, 0x90, 0x9C
IECTL, IEDATA, IEADDR, IEUADDR, IQERCD, IRTA = 0xA0, 0xA4, 0xA8, 0xAC, 0xB0, 0xB8

# GCMD and GSTS share their bits.
TE, SRTP, SFL, EAFL, WBF, QIE, IRE, SIRTP, CFI = (1 << bit for bit in (31, 30, 29, 28, 27, 26, 25, 24, 23))

FSTS_PFO, FSTS_PPF, FSTS_IQE, FSTS_ICE, FSTS_ITE = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 6
FSTS_FRI_SHIFT = 8
EVENT_IM, EVENT_IP = 1 << 31, 1 << 30
ICS_IWC = 1 << 0

#: A fault record: 128 bits; in its upper word
FRCD_F, FRCD_READ, FRCD_REASON_SHIFT = 1 << 63, 1 << 62, 32

RTADDR_TTM_SHIFT = 10
IQA_DW, IQA_QS_MASK = 1 << 11, 7
CCMD_ICC = 1 << 63
IOTLB_IVT = 1 << 63

ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
WINDOW_SIZE = 0x1000


class Capabilities:
    """CAP_REG and ECAP_REG, taken apart."""

    __slots__ = (
        "am_max",
        "caching_mode",
        "cap",
        "device_tlb",
        "ecap",
        "fault_offset",
        "fault_records",
        "interrupt_remapping",
        "iotlb_offset",
        "mgaw",
        "ndoms",
        "page_selective",
        "pass_through",
        "queued_invalidation",
        "sagaw",
        "scalable",
        "sllps",
        "snoop_control",
        "write_buffer_flush",
    )

    def __init__(self, cap: int, ecap: int) -> None:
        self.cap = cap
        self.ecap = ecap
        self.ndoms = 1 << 4 + 2 * (cap & 7)
        self.write_buffer_flush = bool(cap >> 4 & 1)
        self.caching_mode = bool(cap >> 7 & 1)
        #: Bit n: tables of n + 2 levels.
        self.sagaw = cap >> 8 & 0x1F
        self.mgaw = (cap >> 16 & 0x3F) + 1
        self.fault_offset = (cap >> 24 & 0x3FF) * 16
        self.sllps = cap >> 34 & 0xF
        self.page_selective = bool(cap >> 39 & 1)
        self.fault_records = (cap >> 40 & 0xFF) + 1
        self.am_max = cap >> 48 & 0x3F
        self.queued_invalidation = bool(ecap >> 1 & 1)
        self.device_tlb = bool(ecap >> 2 & 1)
        self.interrupt_remapping = bool(ecap >> 3 & 1)
        self.pass_through = bool(ecap >> 6 & 1)
        self.snoop_control = bool(ecap >> 7 & 1)
        self.iotlb_offset = (ecap >> 8 & 0x3FF) * 16
        self.scalable = bool(ecap >> 43 & 1)
