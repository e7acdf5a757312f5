"""Event records: numbers, the 32 bytes of each kind, and the record in words.

Mirrors Arm IHI 0070, 7.3. `Event` is what the unit knows of a refused request; `words` lays it out as the manual does
for its number. Left out: F_UUT, F_TLB_CONFLICT, F_CFG_CONFLICT, E_PAGE_REQUEST and F_VMS_FETCH (without MPAM nothing
fetches a VMS), which nothing here can cause; merging of records (permitted, never required).
"""

from __future__ import annotations

from fakedev.smmuv3.bits import Field, address_mask

F_UUT = 0x01
C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE, F_BAD_ATS_TREQ = 0x02, 0x03, 0x04, 0x05
F_STREAM_DISABLED, F_TRANSL_FORBIDDEN, C_BAD_SUBSTREAMID = 0x06, 0x07, 0x08
F_CD_FETCH, C_BAD_CD, F_WALK_EABT = 0x09, 0x0A, 0x0B
F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x10, 0x11, 0x12, 0x13
F_TLB_CONFLICT, F_CFG_CONFLICT, E_PAGE_REQUEST, F_VMS_FETCH = 0x20, 0x21, 0x24, 0x25

NAMES = {
    value: name
    for name, value in sorted(globals().items())
    if isinstance(value, int) and name.startswith(("C_", "E_", "F_"))
}

EVENT_BYTES = 32

EVT_0_ID, EVT_0_SSV = Field(7, 0), 1 << 11
EVT_0_SSID, EVT_0_SID = Field(31, 12), Field(63, 32)
EVT_1_STAG, EVT_1_STALL = Field(15, 0), 1 << 31
EVT_1_PNU, EVT_1_IND, EVT_1_RNW, EVT_1_S2 = 1 << 33, 1 << 34, 1 << 35, 1 << 39
EVT_1_CLASS, EVT_1_TTRNW = Field(41, 40), 1 << 44
#: F_BAD_ATS_TREQ: what was asked for.
EVT_1_TREQ_SPAN = Field(3, 0)
EVT_1_TREQ_P, EVT_1_TREQ_X, EVT_1_TREQ_W, EVT_1_TREQ_R = 1 << 28, 1 << 29, 1 << 30, 1 << 31
EVT_3_IPA_MASK, EVT_3_FETCH_ADDR_MASK = address_mask(51, 12), address_mask(51, 3)

CLASS_CD, CLASS_TT, CLASS_IN = 0, 1, 2
_CLASS_WORDS = ("fetching the CD", "walking stage 1", "for the request")

#: The four that may stall and that CD.R and STE.S2R silence (5.5).
TRANSLATION_RELATED = frozenset((F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION))
_WITH_ATTRIBUTES = TRANSLATION_RELATED | {F_WALK_EABT}
_WITH_FETCH_ADDRESS = frozenset((F_STE_FETCH, F_CD_FETCH, F_WALK_EABT, F_VMS_FETCH))


class Event:
    """One event, not yet laid out. `ssid` is None without a SubstreamID; the rest is as in the manual's record."""

    __slots__ = (
        "address",
        "fetch_address",
        "ind",
        "ipa",
        "klass",
        "number",
        "pnu",
        "rnw",
        "s2",
        "sid",
        "ssid",
        "stag",
        "ttrnw",
    )

    def __init__(
        self,
        number: int,
        sid: int,
        ssid: int | None = None,
        *,
        address: int = 0,
        rnw: bool = False,
        pnu: bool = False,
        ind: bool = False,
        s2: bool = False,
        klass: int = CLASS_IN,
        ipa: int = 0,
        fetch_address: int = 0,
        ttrnw: bool = True,
    ) -> None:
        self.number = number
        self.sid = sid
        self.ssid = ssid
        self.address = address
        self.rnw = rnw
        self.pnu = pnu
        self.ind = ind
        self.s2 = s2
        self.klass = klass
        self.ipa = ipa
        self.fetch_address = fetch_address
        self.ttrnw = ttrnw
        #: The token of a stalled transaction.
        self.stag: int | None = None

    def words(self) -> tuple[int, int, int, int]:
        """The record as four 64-bit words. Fields that its kind does not have are zero, and so is an unknown IPA."""
        number = self.number
        low = EVT_0_SID.put(self.sid) | number
        if number == C_BAD_SUBSTREAMID:  # its SubstreamID is always valid, and no bit says so
            low |= EVT_0_SSID.put(self.ssid or 0)
        elif self.ssid is not None:
            low |= EVT_0_SSID.put(self.ssid) | EVT_0_SSV
        second = address = last = 0
        if number in _WITH_ATTRIBUTES:
            second = EVT_1_RNW * self.rnw | EVT_1_PNU * self.pnu | EVT_1_IND * self.ind
            second |= EVT_1_S2 * self.s2 | EVT_1_CLASS.put(self.klass)
            address = self.address
            if number == F_PERMISSION and self.klass == CLASS_TT:
                second |= EVT_1_TTRNW * self.ttrnw
            if self.stag is not None:
                second |= EVT_1_STALL | EVT_1_STAG.put(self.stag)
        elif number == F_TRANSL_FORBIDDEN:
            second, address = EVT_1_RNW * self.rnw, self.address
        elif number == F_BAD_ATS_TREQ:
            asked = EVT_1_TREQ_R | EVT_1_TREQ_W * (not self.rnw) | EVT_1_TREQ_X * self.ind | EVT_1_TREQ_P * self.pnu
            second, address = asked | EVT_1_TREQ_SPAN.put(1), self.address & -4096
        if number in _WITH_FETCH_ADDRESS:
            last = self.fetch_address & EVT_3_FETCH_ADDR_MASK
        elif self.s2:
            last = self.ipa & EVT_3_IPA_MASK
        return low, second, address, last

    def __str__(self) -> str:
        parts = [NAMES.get(self.number, f"event {self.number:#x}")]
        if self.number in _WITH_ATTRIBUTES:
            parts.append(f"at stage {1 + self.s2} {_CLASS_WORDS[self.klass]}")
        if self.s2:
            parts.append(f"IPA {self.ipa:#x}")
        if self.number in _WITH_FETCH_ADDRESS:
            parts.append(f"nothing answers at {self.fetch_address:#x}")
        if self.stag is not None:
            parts.append(f"stalled, STAG {self.stag}")
        return ", ".join(parts)
