"""What the manuals have, as lists: for tests that hold the emulation and docs/hardware.md to them.

The VT-d specification, revision 5.10: 6.5.2 (descriptors), 7.1.3 table 30 and 5.1.4.1 table 15 (fault reasons), 11.4
(registers), 11.4.2 and 11.4.3 (capabilities). Arm IHI 0070 G.b: 4.1.1 (commands), 6.2.1 and 6.2.2 (registers of the
Non-secure programming interface), 6.3.1 to 6.3.6 (identification), 7.3 (events). What a manual calls reserved,
deprecated or IMPLEMENTATION DEFINED is not here.
"""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """The hexadecimal numbers and ranges of a text: "1-E 30"."""
    found: list[int] = []
    for word in text.split():
        first, _, last = word.partition("-")
        found += range(int(first, 16), int(last or first, 16) + 1)
    return found


# ---------------------------------------------------------------------------------------------------------------- VT-d

#: Field of CAP_REG or ECAP_REG: (highest bit, lowest bit).
VTD_CAP = {
    "esrtps": (63, 63), "esirtps": (62, 62), "ecmds": (61, 61), "fs5lp": (60, 60), "pi": (59, 59), "fs1gp": (56, 56),
    "drd": (55, 55), "dwd": (54, 54), "mamv": (53, 48), "nfr": (47, 40), "psi": (39, 39), "sslps": (37, 34),
    "fro": (33, 24), "zlr": (22, 22), "mgaw": (21, 16), "sagaw": (12, 8), "cm": (7, 7), "phmr": (6, 6), "plmr": (5, 5),
    "rwbf": (4, 4), "nd": (2, 0),
}  # fmt: skip
VTD_ECAP = {
    "irreq": (62, 62), "eimer": (61, 61), "rdts": (60, 60), "hpt1gps": (59, 59), "sms": (58, 58), "ssirws": (57, 57),
    "ptrs": (56, 56), "hpts": (55, 55), "rprivs": (53, 53), "adms": (52, 52), "pms": (51, 51), "tdxcs": (50, 50),
    "rps": (49, 49), "smpwcs": (48, 48), "fsts": (47, 47), "ssts": (46, 46), "ssads": (45, 45), "vcs": (44, 44),
    "smts": (43, 43), "pds": (42, 42), "dit": (41, 41), "pasid": (40, 40), "pss": (39, 35), "eafs": (34, 34),
    "nwfs": (33, 33), "srs": (31, 31), "ers": (30, 30), "prs": (29, 29), "nest": (26, 26), "mts": (25, 25),
    "mhmv": (23, 20), "iro": (17, 8), "sc": (7, 7), "pt": (6, 6), "eim": (4, 4), "ir": (3, 3), "dt": (2, 2),
    "qi": (1, 1), "c": (0, 0),
}  # fmt: skip
#: Offsets; the IOTLB and fault recording registers are where the capabilities say.
VTD_REGISTERS = {
    *numbers("0 8 10 18 1C 20 28 34 38 3C 40 44 64 68 6C 70 78 80 88 90 9C A0 A4 A8 AC B0 B8"),
    *numbers("C0 C8 D0 DC E0 E4 E8 EC"),
    *numbers("100 108 120 128 130 138 140 148 150 158 160 168"),
    *range(0x180, 0x220, 8),
    *numbers("300 310 314 318 31C 324 328 32C 330 334 380"),
    *numbers("400 408 410 420 428 430 438 440 448"),
    *numbers("DC0 E00 E08 E10 E30"),
}
VTD_DESCRIPTORS = set(numbers("1-A"))
VTD_REASONS = set(numbers("1-E 20-2B 30-34 38-3A 40-49 50-52 58-5D 60 70-77 90-91 78-7D 80 81 83-87 89 A0-A5"))

# -------------------------------------------------------------------------------------------------------------- SMMUv3

SMMU_COMMANDS = {
    0x01: "PREFETCH_CONFIG", 0x02: "PREFETCH_ADDR", 0x03: "CFGI_STE", 0x04: "CFGI_STE_RANGE", 0x05: "CFGI_CD",
    0x06: "CFGI_CD_ALL", 0x07: "CFGI_VMS_PIDM", 0x10: "TLBI_NH_ALL", 0x11: "TLBI_NH_ASID", 0x12: "TLBI_NH_VA",
    0x13: "TLBI_NH_VAA", 0x18: "TLBI_EL3_ALL", 0x1A: "TLBI_EL3_VA", 0x20: "TLBI_EL2_ALL", 0x21: "TLBI_EL2_ASID",
    0x22: "TLBI_EL2_VA", 0x23: "TLBI_EL2_VAA", 0x28: "TLBI_S12_VMALL", 0x2A: "TLBI_S2_IPA", 0x30: "TLBI_NSNH_ALL",
    0x40: "ATC_INV", 0x41: "PRI_RESP", 0x44: "RESUME", 0x45: "STALL_TERM", 0x46: "SYNC", 0x50: "TLBI_S_EL2_ALL",
    0x51: "TLBI_S_EL2_ASID", 0x52: "TLBI_S_EL2_VA", 0x53: "TLBI_S_EL2_VAA", 0x58: "TLBI_S_S12_VMALL",
    0x5A: "TLBI_S_S2_IPA", 0x60: "TLBI_SNH_ALL", 0x70: "DPTI_ALL", 0x73: "DPTI_PA",
}  # fmt: skip
SMMU_EVENTS = {
    0x01: "F_UUT", 0x02: "C_BAD_STREAMID", 0x03: "F_STE_FETCH", 0x04: "C_BAD_STE", 0x05: "F_BAD_ATS_TREQ",
    0x06: "F_STREAM_DISABLED", 0x07: "F_TRANSL_FORBIDDEN", 0x08: "C_BAD_SUBSTREAMID", 0x09: "F_CD_FETCH",
    0x0A: "C_BAD_CD", 0x0B: "F_WALK_EABT", 0x10: "F_TRANSLATION", 0x11: "F_ADDR_SIZE", 0x12: "F_ACCESS",
    0x13: "F_PERMISSION", 0x20: "F_TLB_CONFLICT", 0x21: "F_CFG_CONFLICT", 0x24: "E_PAGE_REQUEST",
    0x25: "F_VMS_FETCH",
}  # fmt: skip
#: By register: field: (highest bit, lowest bit).
SMMU_IDENTIFICATION = {
    "IDR0": {
        "RME_IMPL": (30, 30), "ST_LEVEL": (28, 27), "TERM_MODEL": (26, 26), "STALL_MODEL": (25, 24),
        "ATSRECERR": (23, 23), "TTENDIAN": (22, 21), "VATOS": (20, 20), "CD2L": (19, 19), "VMID16": (18, 18),
        "VMW": (17, 17), "PRI": (16, 16), "ATOS": (15, 15), "SEV": (14, 14), "MSI": (13, 13), "ASID16": (12, 12),
        "NS1ATS": (11, 11), "ATS": (10, 10), "HYP": (9, 9), "DORMHINT": (8, 8), "HTTU": (7, 6), "BTM": (5, 5),
        "COHACC": (4, 4), "TTF": (3, 2), "S1P": (1, 1), "S2P": (0, 0),
    },
    "IDR1": {
        "ECMDQ": (31, 31), "TABLES_PRESET": (30, 30), "QUEUES_PRESET": (29, 29), "REL": (28, 28),
        "ATTR_TYPES_OVR": (27, 27), "ATTR_PERMS_OVR": (26, 26), "CMDQS": (25, 21), "EVENTQS": (20, 16),
        "PRIQS": (15, 11), "SSIDSIZE": (10, 6), "SIDSIZE": (5, 0),
    },
    "IDR2": {"BA_VATOS": (9, 0)},
    "IDR3": {
        "AIE": (23, 23), "MTEPERM": (22, 22), "THE": (21, 21), "S2PO": (20, 20), "S2PI": (19, 19), "S1PI": (18, 18),
        "EPAN": (17, 17), "PASIDTT": (16, 16), "DPT": (15, 15), "PTWNNC": (14, 14), "E0PD": (13, 13), "BBML": (12, 11),
        "RIL": (10, 10), "STT": (9, 9), "FWB": (8, 8), "MPAM": (7, 7), "PPS": (5, 5), "XNX": (4, 4), "PBHA": (3, 3),
        "HAD": (2, 2),
    },
    "IDR5": {
        "STALL_MAX": (31, 16), "VAX": (11, 10), "D128": (8, 8), "DS": (7, 7), "GRAN64K": (6, 6), "GRAN16K": (5, 5),
        "GRAN4K": (4, 4), "OAS": (2, 0),
    },
}  # fmt: skip
#: Of pages 0 and 1.
SMMU_REGISTERS = {
    0x00: "IDR0", 0x04: "IDR1", 0x08: "IDR2", 0x0C: "IDR3", 0x10: "IDR4", 0x14: "IDR5", 0x18: "IIDR", 0x1C: "AIDR",
    0x20: "CR0", 0x24: "CR0ACK", 0x28: "CR1", 0x2C: "CR2", 0x30: "S2PII", 0x40: "STATUSR", 0x44: "GBPA", 0x48: "AGBPA",
    0x50: "IRQ_CTRL", 0x54: "IRQ_CTRLACK", 0x60: "GERROR", 0x64: "GERRORN", 0x68: "GERROR_IRQ_CFG0",
    0x70: "GERROR_IRQ_CFG1", 0x74: "GERROR_IRQ_CFG2", 0x80: "STRTAB_BASE", 0x88: "STRTAB_BASE_CFG", 0x90: "CMDQ_BASE",
    0x98: "CMDQ_PROD", 0x9C: "CMDQ_CONS", 0xA0: "EVENTQ_BASE", 0xB0: "EVENTQ_IRQ_CFG0", 0xB8: "EVENTQ_IRQ_CFG1",
    0xBC: "EVENTQ_IRQ_CFG2", 0xC0: "PRIQ_BASE", 0xD0: "PRIQ_IRQ_CFG0", 0xD8: "PRIQ_IRQ_CFG1", 0xDC: "PRIQ_IRQ_CFG2",
    0x100: "GATOS_CTRL", 0x108: "GATOS_SID", 0x110: "GATOS_ADDR", 0x118: "GATOS_PAR", 0x130: "MPAMIDR", 0x138: "GMPAM",
    0x13C: "GBPMPAM", 0x180: "VATOS_SEL", 0x190: "IDR6", 0x200: "DPT_BASE", 0x208: "DPT_BASE_CFG",
    0x210: "DPT_CFG_FAR", 0x4000: "CMDQ_CONTROL_PAGE_BASE", 0x4008: "CMDQ_CONTROL_PAGE_CFG",
    0x400C: "CMDQ_CONTROL_PAGE_STATUS", 0x100A8: "EVENTQ_PROD", 0x100AC: "EVENTQ_CONS", 0x100C8: "PRIQ_PROD",
    0x100CC: "PRIQ_CONS",
}  # fmt: skip
