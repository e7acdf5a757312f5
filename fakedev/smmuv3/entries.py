"""Stream table entries (STE), context descriptors (CD) and the first levels of their tables: bits and nothing else.

Mirrors Arm IHI 0070, 5.1 to 5.4. A name says the structure, the 64-bit word of it, and the manual's field:
`STE_0_CONFIG` is STE.Config in word 0. The driver writes words with these, the unit reads them
(`fakedev/smmuv3/config.py` judges them). Memory attributes (S1CIR, S1COR, S1CSH, IR0, MTCFG …) are declared for the
driver's sake; they change nothing here, where all memory is coherent. Left out: fields of the Secure and Realm states,
MPAM, permission indirection.
"""

from __future__ import annotations

from fakedev.smmuv3.bits import Field, address_mask

# -- level 1 stream table descriptor (5.1) ---------------------------------------------------------------------------

L1STD_SPAN = Field(4, 0)
L1STD_L2PTR_MASK = address_mask(51, 6)
#: The largest Span that is not reserved.
L1STD_MAX_SPAN = 11

# -- stream table entry (5.2) ----------------------------------------------------------------------------------------

STE_BYTES, STE_WORDS = 64, 8

STE_0_V = 1 << 0
STE_0_CONFIG, STE_0_S1FMT, STE_0_S1CDMAX = Field(3, 1), Field(5, 4), Field(63, 59)
STE_0_S1CONTEXTPTR_MASK = address_mask(51, 6)

CONFIG_ABORT, CONFIG_BYPASS, CONFIG_S1, CONFIG_S2, CONFIG_NESTED = 0, 4, 5, 6, 7
S1FMT_LINEAR, S1FMT_4K_L2, S1FMT_64K_L2 = 0, 1, 2

STE_1_S1DSS, STE_1_S1CIR, STE_1_S1COR, STE_1_S1CSH = Field(1, 0), Field(3, 2), Field(5, 4), Field(7, 6)
STE_1_DRE, STE_1_CONT, STE_1_DCP, STE_1_PPAR, STE_1_MEV = 1 << 12, Field(16, 13), 1 << 17, 1 << 18, 1 << 19
STE_1_S2FWB, STE_1_S1MPAM, STE_1_S1STALLD = 1 << 25, 1 << 26, 1 << 27
STE_1_EATS, STE_1_STRW = Field(29, 28), Field(31, 30)
STE_1_MEMATTR, STE_1_MTCFG, STE_1_ALLOCCFG = Field(35, 32), 1 << 36, Field(40, 37)
STE_1_SHCFG, STE_1_NSCFG, STE_1_PRIVCFG, STE_1_INSTCFG = Field(45, 44), Field(47, 46), Field(49, 48), Field(51, 50)

S1DSS_TERMINATE, S1DSS_BYPASS, S1DSS_SSID0 = 0, 1, 2
EATS_NONE, EATS_FULL, EATS_SPLIT = 0, 1, 2
STRW_NSEL1, STRW_EL2 = 0, 2
SHCFG_INCOMING = 1
#: PRIVCFG and INSTCFG: 2 says unprivileged and data, 3 says privileged and instruction, others keep what came in.
OVERRIDE_CLEAR, OVERRIDE_SET = 2, 3

STE_2_S2VMID = Field(15, 0)
STE_2_S2T0SZ, STE_2_S2SL0, STE_2_S2IR0, STE_2_S2OR0 = Field(37, 32), Field(39, 38), Field(41, 40), Field(43, 42)
STE_2_S2SH0, STE_2_S2TG, STE_2_S2PS = Field(45, 44), Field(47, 46), Field(50, 48)
STE_2_S2AA64, STE_2_S2ENDI, STE_2_S2AFFD, STE_2_S2PTW = 1 << 51, 1 << 52, 1 << 53, 1 << 54
STE_2_S2HD, STE_2_S2HA, STE_2_S2S, STE_2_S2R = 1 << 55, 1 << 56, 1 << 57, 1 << 58

STE_3_S2TTB_MASK = address_mask(51, 4)

#: Granules (log2 of bytes) by S2TG and CD.TG0, and by CD.TG1; None is reserved.
TG0_GRANULES: tuple[int | None, ...] = (12, 16, 14, None)
TG1_GRANULES: tuple[int | None, ...] = (None, 14, 12, 16)

# -- level 1 context descriptor (5.3) --------------------------------------------------------------------------------

L1CD_V = 1 << 0
L1CD_L2PTR_MASK = address_mask(51, 12)
#: CDs of a level 2 table, as log2, by S1Fmt.
L2_CD_LOG2 = {S1FMT_4K_L2: 6, S1FMT_64K_L2: 10}

# -- context descriptor (5.4) ----------------------------------------------------------------------------------------

CD_BYTES, CD_WORDS = 64, 8

CD_0_T0SZ, CD_0_TG0, CD_0_IR0, CD_0_OR0, CD_0_SH0 = Field(5, 0), Field(7, 6), Field(9, 8), Field(11, 10), Field(13, 12)
CD_0_EPD0, CD_0_ENDI = 1 << 14, 1 << 15
CD_0_T1SZ, CD_0_TG1, CD_0_IR1 = Field(21, 16), Field(23, 22), Field(25, 24)
CD_0_OR1, CD_0_SH1 = Field(27, 26), Field(29, 28)
CD_0_EPD1, CD_0_V = 1 << 30, 1 << 31
CD_0_IPS = Field(34, 32)
CD_0_AFFD, CD_0_WXN, CD_0_UWXN, CD_0_TBI0, CD_0_TBI1 = (1 << bit for bit in range(35, 40))
CD_0_PAN, CD_0_AA64, CD_0_HD, CD_0_HA = (1 << bit for bit in range(40, 44))
CD_0_S, CD_0_R, CD_0_A, CD_0_ASET = (1 << bit for bit in range(44, 48))
CD_0_ASID = Field(63, 48)

#: In words 1 and 2.
CD_TTB_MASK = address_mask(51, 4)
CD_HAD = 1 << 1
