"""Registers of an SMMUv3: offsets, fields, and the features that the identification registers tell of.

Mirrors Arm IHI 0070 chapter 6 ("Memory map and registers"); names follow the manual, shortened as in
drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.h. The event and PRI queues' indexes are in page 1, at 0x10000.
Left out: the Secure, Realm and Root programming interfaces, ATOS and VATOS, ECMDQ, MPAM, DPT, RAS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fakedev.smmuv3.bits import Field, address_mask

PAGE_1 = 0x10000
#: Two pages of 64 KiB.
WINDOW_SIZE = 0x20000

IDR0, IDR1, IDR2, IDR3, IDR4, IDR5, IIDR, AIDR = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C
CR0, CR0ACK, CR1, CR2, STATUSR, GBPA, AGBPA = 0x20, 0x24, 0x28, 0x2C, 0x40, 0x44, 0x48
IRQ_CTRL, IRQ_CTRLACK, GERROR, GERRORN = 0x50, 0x54, 0x60, 0x64
GERROR_IRQ_CFG0, GERROR_IRQ_CFG1, GERROR_IRQ_CFG2 = 0x68, 0x70, 0x74
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, PAGE_1 + 0xA8, PAGE_1 + 0xAC
EVENTQ_IRQ_CFG0, EVENTQ_IRQ_CFG1, EVENTQ_IRQ_CFG2 = 0xB0, 0xB8, 0xBC
PRIQ_BASE, PRIQ_PROD, PRIQ_CONS = 0xC0, PAGE_1 + 0xC8, PAGE_1 + 0xCC
PRIQ_IRQ_CFG0, PRIQ_IRQ_CFG1, PRIQ_IRQ_CFG2 = 0xD0, 0xD8, 0xDC

IDR0_S2P, IDR0_S1P, IDR0_COHACC, IDR0_HYP = 1 << 0, 1 << 1, 1 << 4, 1 << 9
IDR0_ATS, IDR0_ASID16, IDR0_MSI, IDR0_SEV, IDR0_PRI = 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 16
IDR0_VMID16, IDR0_CD2L, IDR0_ATSRECERR, IDR0_TERM_MODEL = 1 << 18, 1 << 19, 1 << 23, 1 << 26
IDR0_TTF, IDR0_HTTU, IDR0_TTENDIAN = Field(3, 2), Field(7, 6), Field(22, 21)
IDR0_STALL_MODEL, IDR0_ST_LEVEL = Field(25, 24), Field(28, 27)

IDR1_SIDSIZE, IDR1_SSIDSIZE = Field(5, 0), Field(10, 6)
IDR1_PRIQS, IDR1_EVENTQS, IDR1_CMDQS = Field(15, 11), Field(20, 16), Field(25, 21)
IDR1_ATTR_PERMS_OVR, IDR1_ATTR_TYPES_OVR = 1 << 26, 1 << 27

IDR3_HAD, IDR3_XNX, IDR3_PPS, IDR3_FWB, IDR3_STT, IDR3_RIL = 1 << 2, 1 << 4, 1 << 5, 1 << 8, 1 << 9, 1 << 10
IDR3_BBM = Field(12, 11)

IDR5_OAS, IDR5_VAX, IDR5_STALL_MAX = Field(2, 0), Field(11, 10), Field(31, 16)
IDR5_GRAN4K, IDR5_GRAN16K, IDR5_GRAN64K, IDR5_DS = 1 << 4, 1 << 5, 1 << 6, 1 << 7

CR0_SMMUEN, CR0_PRIQEN, CR0_EVENTQEN, CR0_CMDQEN, CR0_ATSCHK = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
CR2_E2H, CR2_RECINVSID, CR2_PTM, CR2_REC_CFG_ATS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
#: CR1: attributes of accesses to tables, and to queues.
CR1_TABLE_MASK, CR1_QUEUE_MASK = 0xFC0, 0x03F
GBPA_ABORT, GBPA_UPDATE = 1 << 20, 1 << 31
#: ABORT, INSTCFG, PRIVCFG, SHCFG, ALLOCCFG, MTCFG, MemAttr.
GBPA_MASK = 0x001F_3F1F
IRQ_GERROR, IRQ_PRIQ, IRQ_EVENTQ = 1 << 0, 1 << 1, 1 << 2

GERROR_CMDQ_ERR, GERROR_EVENTQ_ABT_ERR, GERROR_PRIQ_ABT_ERR = 1 << 0, 1 << 2, 1 << 3
GERROR_MSI_CMDQ_ABT_ERR, GERROR_MSI_EVENTQ_ABT_ERR = 1 << 4, 1 << 5
GERROR_MSI_PRIQ_ABT_ERR, GERROR_MSI_GERROR_ABT_ERR, GERROR_SFM_ERR = 1 << 6, 1 << 7, 1 << 8
GERROR_MASK = 0x1FD

IRQ_CFG0_ADDR_MASK = address_mask(51, 2)
#: IRQ_CFG2: attributes of messages.
IRQ_CFG2_MASK = 0x3F
#: PRIQ_IRQ_CFG2: interrupt on the last request of a group rather than on a queue that fills.
PRIQ_IRQ_CFG2_LO = 1 << 31

STRTAB_BASE_RA = 1 << 62
STRTAB_BASE_ADDR_MASK = address_mask(51, 6)
STRTAB_LOG2SIZE, STRTAB_SPLIT, STRTAB_FMT = Field(5, 0), Field(10, 6), Field(17, 16)
STRTAB_FMT_LINEAR, STRTAB_FMT_2LVL = 0, 1

Q_BASE_RWA = 1 << 62
Q_BASE_ADDR_MASK = address_mask(51, 5)
Q_BASE_LOG2SIZE = Field(4, 0)
#: In PROD of an output queue OVFLG, in its CONS OVACKFLG.
Q_OVERFLOW_FLAG = 1 << 31
CMDQ_CONS_ERR = Field(30, 24)
CERROR_NONE, CERROR_ILL, CERROR_ABT, CERROR_ATC_INV_SYNC = range(4)

#: Output address sizes by IDR5.OAS, CD.IPS and STE.S2PS.
ADDRESS_SIZES = (32, 36, 40, 42, 44, 48, 52)
STALL_BOTH, STALL_NEVER, STALL_FORCED = range(3)
HTTU_NONE, HTTU_ACCESS, HTTU_ACCESS_DIRTY = range(3)


@dataclass(frozen=True)
class Features:
    """What one SMMU can do; the identification registers are made from it.

    `oas` is in bits, as in ADDRESS_SIZES; `granules` are log2 of bytes; queue sizes are log2 of entries. The default
    has everything that this emulation has. ValueError for what no SMMU can be, or what is not emulated.
    """

    stage1: bool = True
    stage2: bool = True
    oas: int = 48
    sid_bits: int = 16
    ssid_bits: int = 20
    granules: tuple[int, ...] = (12, 14, 16)
    asid16: bool = True
    vmid16: bool = True
    two_level_stream_table: bool = True
    two_level_cd_table: bool = True
    ats: bool = True
    pri: bool = True
    msi: bool = True
    sev: bool = False
    coherent: bool = True
    stall_model: int = STALL_BOTH
    httu: int = HTTU_ACCESS_DIRTY
    range_invalidation: bool = True
    s2fwb: bool = True
    hierarchical_attribute_disable: bool = True
    #: XN[1:0] of stage 2 tells privileged from unprivileged execution.
    xnx: bool = True
    small_tables: bool = False
    #: 52-bit virtual addresses with the 64 KiB granule.
    vax52: bool = False
    bbm: int = 2
    #: PASIDs on automatic responses to page requests.
    pps: bool = True
    #: CR2.REC_CFG_ATS is there: errors of the configuration that endpoints with ATS and PRI meet can be recorded.
    ats_record_errors: bool = True
    #: PRIVCFG and INSTCFG of an STE are obeyed.
    attr_perms_override: bool = True
    cmdq_log2: int = 19
    eventq_log2: int = 19
    priq_log2: int = 19
    #: 0 to 4 for SMMUv3.0 to SMMUv3.4.
    arch_minor: int = 2
    iidr: int = 0

    def __post_init__(self) -> None:
        if not (self.stage1 or self.stage2):
            raise ValueError("an SMMU has stage 1, stage 2 or both")
        if self.oas not in ADDRESS_SIZES:
            raise ValueError(f"output addresses of {self.oas} bits: not one of {ADDRESS_SIZES}")
        if not self.granules or not set(self.granules) <= {12, 14, 16}:
            raise ValueError(f"granules {self.granules}: some of 12, 14, 16 (log2 of bytes)")
        if not 0 <= self.sid_bits <= 32 or not 0 <= self.ssid_bits <= 20:
            raise ValueError("stream ids have up to 32 bits, substream ids up to 20")
        if self.pri and not self.ats:
            raise ValueError("page requests need ATS")
        if not 0 <= self.stall_model <= 2 or not 0 <= self.httu <= 2:
            raise ValueError("the stall model is 0, 1 or 2; so is HTTU")
        if self.arch_minor == 0:
            raise ValueError("SMMUv3.0 leaves too much unpredictable; 3.1 to 3.4 are emulated")
        for name in ("cmdq_log2", "eventq_log2", "priq_log2"):
            if not 0 <= getattr(self, name) <= 19:
                raise ValueError(f"{name}: a queue has up to 2**19 entries")

    def but(self, **changes: Any) -> Features:
        """The same with some features changed."""
        return replace(self, **changes)

    @property
    def idr0(self) -> int:
        """SMMU_IDR0: stages, models, optional commands. Terminated transactions are always aborted (TERM_MODEL)."""
        return (
            IDR0_S2P * self.stage2
            | IDR0_S1P * self.stage1
            | IDR0_TTF.put(2)
            | IDR0_COHACC * self.coherent
            | IDR0_HTTU.put(self.httu)
            | IDR0_ATS * self.ats
            | IDR0_ASID16 * self.asid16
            | IDR0_MSI * self.msi
            | IDR0_SEV * self.sev
            | IDR0_PRI * self.pri
            | IDR0_VMID16 * self.vmid16
            | IDR0_CD2L * self.two_level_cd_table
            | IDR0_TTENDIAN.put(2)
            | IDR0_ATSRECERR * (self.ats and self.ats_record_errors)
            | IDR0_STALL_MODEL.put(self.stall_model)
            | IDR0_TERM_MODEL
            | IDR0_ST_LEVEL.put(int(self.two_level_stream_table))
        )

    @property
    def idr1(self) -> int:
        """SMMU_IDR1: sizes of ids and queues."""
        return (
            IDR1_SIDSIZE.put(self.sid_bits)
            | IDR1_SSIDSIZE.put(self.ssid_bits)
            | IDR1_PRIQS.put(self.priq_log2 if self.pri else 0)
            | IDR1_EVENTQS.put(self.eventq_log2)
            | IDR1_CMDQS.put(self.cmdq_log2)
            | IDR1_ATTR_PERMS_OVR * self.attr_perms_override
        )

    @property
    def idr3(self) -> int:
        """SMMU_IDR3: later additions."""
        return (
            IDR3_HAD * (self.hierarchical_attribute_disable and self.stage1)
            | IDR3_XNX * self.xnx
            | IDR3_PPS * (self.pps and self.pri and self.ssid_bits > 0)
            | IDR3_FWB * self.s2fwb
            | IDR3_STT * self.small_tables
            | IDR3_RIL * self.range_invalidation
            | IDR3_BBM.put(self.bbm)
        )

    @property
    def idr5(self) -> int:
        """SMMU_IDR5: address sizes, granules, how many transactions can be stalled."""
        return (
            IDR5_OAS.put(ADDRESS_SIZES.index(self.oas))
            | IDR5_GRAN4K * (12 in self.granules)
            | IDR5_GRAN16K * (14 in self.granules)
            | IDR5_GRAN64K * (16 in self.granules)
            | IDR5_VAX.put(int(self.vax52))
            | IDR5_STALL_MAX.put(0 if self.stall_model == STALL_NEVER else STALL_MAX)
        )

    @property
    def aidr(self) -> int:
        """SMMU_AIDR: the revision of the architecture."""
        return self.arch_minor


#: Transactions that can be stalled at once: the number of different STAGs.
STALL_MAX = 256

#: As QEMU's `-machine virt,iommu=smmuv3` (11.1) tells of itself: both stages, no substreams, ATS, PRI, stalls or MSIs.
QEMU_VIRT = Features(
    oas=44,
    ssid_bits=0,
    two_level_cd_table=False,
    ats=False,
    pri=False,
    msi=False,
    stall_model=STALL_NEVER,
    httu=HTTU_NONE,
    s2fwb=False,
    pps=False,
    ats_record_errors=False,
    attr_perms_override=False,
    arch_minor=1,
)
