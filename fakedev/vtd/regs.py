"""Registers of a VT-d unit: offsets and fields.

Mirrors the VT-d specification 11.4, names after drivers/iommu/intel/iommu.h. What the two capability registers say is
in `fakedev.vtd.features`. Left out: the registers of performance monitoring, memory types, virtual and enhanced
commands, which no capability offers.
"""

from __future__ import annotations

from fakedev.vtd.features import Capabilities as Capabilities  # the registers' contents, for whoever reads them

VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR = 0x34, 0x38, 0x3C, 0x40, 0x44
PMEN, PLMBASE, PLMLIMIT, PHMBASE, PHMLIMIT = 0x64, 0x68, 0x6C, 0x70, 0x78
IQH, IQT, IQA, ICS = 0x80, 0x88, 0x90, 0x9C
IECTL, IEDATA, IEADDR, IEUADDR, IQERCD, IRTA = 0xA0, 0xA4, 0xA8, 0xAC, 0xB0, 0xB8
PQH, PQT, PQA, PRS = 0xC0, 0xC8, 0xD0, 0xDC
PECTL, PEDATA, PEADDR, PEUADDR = 0xE0, 0xE4, 0xE8, 0xEC

# GCMD and GSTS share their bits.
TE, SRTP, SFL, EAFL, WBF, QIE, IRE, SIRTP, CFI = (1 << bit for bit in (31, 30, 29, 28, 27, 26, 25, 24, 23))

FSTS_PFO, FSTS_PPF, FSTS_IQE, FSTS_ICE, FSTS_ITE = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 6
FSTS_FRI_SHIFT = 8
EVENT_IM, EVENT_IP = 1 << 31, 1 << 30
ICS_IWC = 1 << 0
PRS_PPR, PRS_PRO = 1 << 0, 1 << 1
PMEN_EPM, PMEN_PRS = 1 << 31, 1 << 0

#: A fault record: 128 bits; in its upper word. T1 and T2 are the type: write 00, page request 01, read 10, atomic 11.
FRCD_F, FRCD_READ, FRCD_REASON_SHIFT = 1 << 63, 1 << 62, 32
FRCD_T1, FRCD_T2 = FRCD_READ, 1 << 28
FRCD_AT_SHIFT, FRCD_PASID_SHIFT = 60, 40
FRCD_PP, FRCD_EXE, FRCD_PRIV = 1 << 31, 1 << 30, 1 << 29

RTADDR_TTM_SHIFT = 10
#: Translation table modes.
TTM_LEGACY, TTM_SCALABLE, TTM_RESERVED, TTM_ABORT = range(4)
IQA_DW, IQA_QS_MASK = 1 << 11, 7
#: Why the invalidation queue stopped (IQERCD.IQEI).
IQEI_NONE, IQEI_TAIL, IQEI_FETCH, IQEI_TYPE, IQEI_RESERVED, IQEI_WIDTH, IQEI_ALIGNMENT, IQEI_MODE = range(8)
IQERCD_ITESID_SHIFT, IQERCD_ICESID_SHIFT = 32, 48
PQA_QS_MASK = 7
IRTA_EIME, IRTA_SIZE_MASK = 1 << 11, 0xF
CCMD_ICC = 1 << 63
IOTLB_IVT = 1 << 63

ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
WINDOW_SIZE = 0x1000
