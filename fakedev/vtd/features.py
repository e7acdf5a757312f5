"""What a VT-d unit can do: the two capability registers as a dataclass, and back.

Mirrors the VT-d specification 11.4.2 (CAP_REG) and 11.4.3 (ECAP_REG), revision 5.10; `Features` has one field for each
of theirs, under the manual's name in lower case (`sllps` and its kin are second stage, `fs…` first stage).
`Capabilities` is what the unit and the driver ask, with the names that say what for.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Field: (register 0 CAP or 1 ECAP, lowest bit, bits).
_LAYOUT = {
    "nd": (0, 0, 3),
    "rwbf": (0, 4, 1),
    "plmr": (0, 5, 1),
    "phmr": (0, 6, 1),
    "cm": (0, 7, 1),
    "sagaw": (0, 8, 5),
    "mgaw": (0, 16, 6),
    "zlr": (0, 22, 1),
    "fro": (0, 24, 10),
    "sslps": (0, 34, 4),
    "psi": (0, 39, 1),
    "nfr": (0, 40, 8),
    "mamv": (0, 48, 6),
    "dwd": (0, 54, 1),
    "drd": (0, 55, 1),
    "fs1gp": (0, 56, 1),
    "pi": (0, 59, 1),
    "fs5lp": (0, 60, 1),
    "ecmds": (0, 61, 1),
    "esirtps": (0, 62, 1),
    "esrtps": (0, 63, 1),
    "c": (1, 0, 1),
    "qi": (1, 1, 1),
    "dt": (1, 2, 1),
    "ir": (1, 3, 1),
    "eim": (1, 4, 1),
    "pt": (1, 6, 1),
    "sc": (1, 7, 1),
    "iro": (1, 8, 10),
    "mhmv": (1, 20, 4),
    "mts": (1, 25, 1),
    "nest": (1, 26, 1),
    "prs": (1, 29, 1),
    "ers": (1, 30, 1),
    "srs": (1, 31, 1),
    "nwfs": (1, 33, 1),
    "eafs": (1, 34, 1),
    "pss": (1, 35, 5),
    "pasid": (1, 40, 1),
    "dit": (1, 41, 1),
    "pds": (1, 42, 1),
    "smts": (1, 43, 1),
    "vcs": (1, 44, 1),
    "ssads": (1, 45, 1),
    "ssts": (1, 46, 1),
    "fsts": (1, 47, 1),
    "smpwcs": (1, 48, 1),
    "rps": (1, 49, 1),
    "tdxcs": (1, 50, 1),
    "pms": (1, 51, 1),
    "adms": (1, 52, 1),
    "rprivs": (1, 53, 1),
    "hpts": (1, 55, 1),
    "ptrs": (1, 56, 1),
    "ssirws": (1, 57, 1),
    "sms": (1, 58, 1),
    "hpt1gps": (1, 59, 1),
    "rdts": (1, 60, 1),
    "eimer": (1, 61, 1),
    "irreq": (1, 62, 1),
}

#: "Implementations reporting <value> as clear also report <key> as clear" (11.4.2, 11.4.3).
NEEDS = {
    "fs5lp": ("fsts",),
    "fs1gp": ("fsts",),
    "pi": ("ir",),
    "dt": ("qi",),
    "ir": ("qi",),
    "eim": ("ir",),
    "mts": ("smts",),
    "nest": ("smts", "fsts", "ssts"),
    "prs": ("dt", "smts"),
    "srs": ("smts",),
    "nwfs": ("dt",),
    "eafs": ("fsts", "smpwcs"),
    "pss": ("smts",),
    "pasid": ("smts",),
    "dit": ("dt",),
    "pds": ("dt",),
    "smts": ("qi",),
    "ssads": ("smpwcs",),
    "fsts": ("smts",),
    "smpwcs": ("smts",),
    "rps": ("smts",),
    "rprivs": ("srs",),
    "ptrs": ("dt", "pasid"),
    "sms": ("prs",),
    "ssirws": ("ssts",),
    "eimer": ("eim",),
    "irreq": ("ir",),
}

#: What this emulation does not do, so that no unit may offer it.
ABSENT = ("rwbf", "pi", "ecmds", "mts", "vcs", "tdxcs", "pms", "hpts", "ssirws", "hpt1gps", "rdts")


@dataclass(frozen=True)
class Features:
    """The fields of CAP and ECAP. The defaults are a small unit in legacy mode with a queue.

    Values are the registers': `mgaw` and `nfr` are one less than the number, `fro` and `iro` count 16 bytes, `nd` is
    the code (6: 16-bit domain ids), `pss` one less than the bits of a PASID. ValueError where the registers' rules
    (NEEDS) or the width of a field are broken, or the emulation lacks it.
    """

    nd: int = 6
    rwbf: int = 0
    plmr: int = 0
    phmr: int = 0
    cm: int = 0
    sagaw: int = 0b0110
    mgaw: int = 47
    zlr: int = 1
    fro: int = 0x22
    sslps: int = 3
    psi: int = 1
    nfr: int = 0
    mamv: int = 18
    dwd: int = 1
    drd: int = 1
    fs1gp: int = 0
    pi: int = 0
    fs5lp: int = 0
    ecmds: int = 0
    esirtps: int = 0
    esrtps: int = 0
    c: int = 1
    qi: int = 1
    dt: int = 0
    ir: int = 0
    eim: int = 0
    pt: int = 1
    sc: int = 1
    iro: int = 0xF
    mhmv: int = 0
    mts: int = 0
    nest: int = 0
    prs: int = 0
    ers: int = 0
    srs: int = 0
    nwfs: int = 0
    eafs: int = 0
    pss: int = 0
    pasid: int = 0
    dit: int = 0
    pds: int = 0
    smts: int = 0
    vcs: int = 0
    ssads: int = 0
    ssts: int = 0
    fsts: int = 0
    smpwcs: int = 0
    rps: int = 0
    tdxcs: int = 0
    pms: int = 0
    adms: int = 0
    rprivs: int = 0
    hpts: int = 0
    ptrs: int = 0
    ssirws: int = 0
    sms: int = 0
    hpt1gps: int = 0
    rdts: int = 0
    eimer: int = 0
    irreq: int = 0

    def __post_init__(self) -> None:
        for name, (_, _, bits) in _LAYOUT.items():
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} = {value:#x} does not fit in {bits} bits")
            for other in NEEDS.get(name, ()):
                if value and not getattr(self, other):
                    raise ValueError(f"{name} needs {other}")
        for name in ABSENT:
            if getattr(self, name):
                raise ValueError(f"{name} is not emulated")
        if self.sslps not in (0, 1, 3):
            raise ValueError(f"sslps = {self.sslps:#b}: a large page needs the smaller ones")

    @classmethod
    def of(cls, cap: int, ecap: int) -> Features:
        """The fields of two register values. Bits that are none of them are ignored."""
        return cls(**{n: (cap, ecap)[reg] >> low & (1 << bits) - 1 for n, (reg, low, bits) in _LAYOUT.items()})

    @property
    def cap(self) -> int:
        """CAP_REG."""
        return self._register(0)

    @property
    def ecap(self) -> int:
        """ECAP_REG."""
        return self._register(1)

    def _register(self, which: int) -> int:
        return sum(getattr(self, name) << low for name, (register, low, _) in _LAYOUT.items() if register == which)


#: A unit that can do everything that the emulation does.
SCALABLE = Features(
    sagaw=0b1110,
    mgaw=56,
    nfr=7,
    fs1gp=1,
    fs5lp=1,
    esirtps=1,
    esrtps=1,
    dt=1,
    ir=1,
    eim=1,
    nest=1,
    prs=1,
    srs=1,
    nwfs=1,
    eafs=1,
    pss=19,
    pasid=1,
    pds=1,
    smts=1,
    ssads=1,
    ssts=1,
    fsts=1,
    smpwcs=1,
    rps=1,
    adms=1,
    rprivs=1,
    ptrs=1,
    sms=1,
    iro=0x50,
    fro=0x60,
    mhmv=15,
)


class Capabilities:
    """CAP_REG and ECAP_REG, taken apart."""

    __slots__ = (
        "abort_mode",
        "am_max",
        "caching_mode",
        "cap",
        "device_tlb",
        "device_tlb_throttle",
        "ecap",
        "enhanced_interrupt_pointer",
        "enhanced_root_pointer",
        "execute",
        "extended_accessed",
        "extended_interrupts",
        "extended_interrupts_required",
        "fault_offset",
        "fault_records",
        "first_stage",
        "first_stage_5_levels",
        "first_stage_gigabytes",
        "handle_mask_max",
        "interrupt_remapping",
        "interrupts_required",
        "iotlb_offset",
        "mgaw",
        "ndoms",
        "nested",
        "no_write_flag",
        "page_request",
        "page_request_drain",
        "page_selective",
        "pasid",
        "pasid_bits",
        "pass_through",
        "protected_high",
        "protected_low",
        "queued_invalidation",
        "rid_pasid",
        "rid_priv",
        "sagaw",
        "scalable",
        "second_stage",
        "second_stage_dirty",
        "sllps",
        "snoop_control",
        "stop_marker",
        "supervisor",
        "translated_pasid",
        "walk_coherency",
        "write_buffer_flush",
        "zero_length_read",
    )

    def __init__(self, cap: int, ecap: int) -> None:
        self.cap = cap
        self.ecap = ecap
        self.ndoms = 1 << 4 + 2 * (cap & 7)
        self.write_buffer_flush = bool(cap >> 4 & 1)
        self.protected_low = bool(cap >> 5 & 1)
        self.protected_high = bool(cap >> 6 & 1)
        self.caching_mode = bool(cap >> 7 & 1)
        #: Bit n: tables of n + 2 levels.
        self.sagaw = cap >> 8 & 0x1F
        self.mgaw = (cap >> 16 & 0x3F) + 1
        self.fault_offset = (cap >> 24 & 0x3FF) * 16
        self.sllps = cap >> 34 & 0xF
        self.page_selective = bool(cap >> 39 & 1)
        self.fault_records = (cap >> 40 & 0xFF) + 1
        self.am_max = cap >> 48 & 0x3F
        self.first_stage_gigabytes = bool(cap >> 56 & 1)
        self.first_stage_5_levels = bool(cap >> 60 & 1)
        self.enhanced_interrupt_pointer = bool(cap >> 62 & 1)
        self.enhanced_root_pointer = bool(cap >> 63 & 1)
        self.zero_length_read = bool(cap >> 22 & 1)
        self.queued_invalidation = bool(ecap >> 1 & 1)
        self.device_tlb = bool(ecap >> 2 & 1)
        self.interrupt_remapping = bool(ecap >> 3 & 1)
        self.extended_interrupts = bool(ecap >> 4 & 1)
        self.pass_through = bool(ecap >> 6 & 1)
        self.snoop_control = bool(ecap >> 7 & 1)
        self.iotlb_offset = (ecap >> 8 & 0x3FF) * 16
        self.handle_mask_max = ecap >> 20 & 0xF
        self.nested = bool(ecap >> 26 & 1)
        self.page_request = bool(ecap >> 29 & 1)
        self.execute = bool(ecap >> 30 & 1)
        self.supervisor = bool(ecap >> 31 & 1)
        self.no_write_flag = bool(ecap >> 33 & 1)
        self.extended_accessed = bool(ecap >> 34 & 1)
        self.pasid_bits = (ecap >> 35 & 0x1F) + 1
        self.pasid = bool(ecap >> 40 & 1)
        self.device_tlb_throttle = bool(ecap >> 41 & 1)
        self.page_request_drain = bool(ecap >> 42 & 1)
        self.scalable = bool(ecap >> 43 & 1)
        self.second_stage_dirty = bool(ecap >> 45 & 1)
        self.second_stage = bool(ecap >> 46 & 1)
        self.first_stage = bool(ecap >> 47 & 1)
        self.walk_coherency = bool(ecap >> 48 & 1)
        self.rid_pasid = bool(ecap >> 49 & 1)
        self.abort_mode = bool(ecap >> 52 & 1)
        self.rid_priv = bool(ecap >> 53 & 1)
        self.translated_pasid = bool(ecap >> 56 & 1)
        self.stop_marker = bool(ecap >> 58 & 1)
        self.extended_interrupts_required = bool(ecap >> 61 & 1)
        self.interrupts_required = bool(ecap >> 62 & 1)

    @property
    def widest_table(self) -> int:
        """Bits of an address that the largest tables translate: the largest AGAW, or without one the first stage's."""
        agaws = self.sagaw & 0b1110
        return 21 + 9 * agaws.bit_length() if agaws else 57 if self.first_stage_5_levels else 48

    @property
    def features(self) -> Features:
        """Field by field. ValueError where the registers break their own rules."""
        return Features.of(self.cap, self.ecap)
