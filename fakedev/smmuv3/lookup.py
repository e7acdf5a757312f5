"""From a StreamID and a SubstreamID to a configuration: the stream table, the CD tables, and the cache of both.

Mirrors Arm IHI 0070, 3.3.1, 3.3.2, 5.1 to 5.4 and 4.3. Everything that was fetched is kept, illegal entries and invalid
level 1 descriptors included, until a CFGI command names it; only a fetch that failed leaves nothing. So an entry that
was changed without the command goes on as it was. CONT is ignored, as it may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from fakedev.memory import BusAbort
from fakedev.smmuv3 import entries as e
from fakedev.smmuv3 import events, regs
from fakedev.smmuv3.config import Cd, Ste, decode_cd, decode_ste
from fakedev.smmuv3.regs import Features
from fakedev.smmuv3.translate import Refused, Stream, Translator

#: Where an address of a stream's CD table lies. Raises Refused.
Locate: TypeAlias = Callable[[Ste, int], int]


class ConfigurationError(Refused):
    """No configuration: a refusal that is known before any address is looked at.

    `ssid` is the SubstreamID to record where it is not the request's.
    """

    def __init__(self, number: int, *, fetch_address: int = 0, ssid: int | None = None) -> None:
        super().__init__(number, fetch_address=fetch_address)
        self.ssid = ssid


class StreamAborts(Exception):
    """The STE says abort: no event."""


class Configuration:
    """The stream table and what is cached of it. `base` and `base_cfg` read the two registers."""

    def __init__(
        self,
        features: Features,
        translator: Translator,
        base: Callable[[], int],
        base_cfg: Callable[[], int],
        keep: Callable[[], bool],
    ) -> None:
        self.features = features
        self._translator = translator
        self._base = base
        self._base_cfg = base_cfg
        self._keep = keep
        #: Level 1 descriptors of the stream table by index, STEs by StreamID.
        self.l1stds: dict[int, int] = {}
        self.stes: dict[int, Ste] = {}
        #: By StreamID: level 1 descriptors of its CD table by index, CDs by index.
        self.l1cds: dict[int, dict[int, int]] = {}
        self.cds: dict[int, dict[int, Cd]] = {}
        #: What a request uses, by StreamID and then SubstreamID (-1: none); made of the above.
        self.streams: dict[int, dict[int, Stream]] = {}

    # -- lookup ------------------------------------------------------------------------------------------------------

    def stream(self, sid: int, pasid: int) -> Stream:
        """The configuration of a request; `pasid` is -1 without one. Raises Refused, StreamAborts."""
        ste = self.ste(sid)
        if ste.aborts:
            raise StreamAborts
        ssid = None if pasid < 0 else pasid
        try:
            index = self.cd_index(ste, ssid)
            cd = None if index is None else self._cd(sid, ste, index)
            if cd is not None and cd.illegal:
                raise ConfigurationError(events.C_BAD_CD)
        except Refused as refused:
            refused.ste = ste
            raise
        stream = Stream(sid, ssid, ste, cd)
        if self._keep():
            self.streams.setdefault(sid, {})[pasid] = stream
        return stream

    def ste(self, sid: int) -> Ste:
        """A valid STE. Raises ConfigurationError."""
        ste = self.stes.get(sid)
        if ste is None:
            ste = self.read_ste(sid, self.l1stds)
            if self._keep():
                self.stes[sid] = ste
        if ste.illegal:
            raise ConfigurationError(events.C_BAD_STE)
        return ste

    def read_ste(self, sid: int, l1stds: dict[int, int]) -> Ste:
        """The STE in memory; level 1 descriptors come from, and go to, `l1stds`. Raises ConfigurationError."""
        config, base = self._base_cfg(), self._base() & regs.STRTAB_BASE_ADDR_MASK
        log2 = regs.STRTAB_LOG2SIZE.get(config)  # beyond SIDSIZE the table is aligned to it, and unreachable
        if sid >> min(log2, self.features.sid_bits):
            raise ConfigurationError(events.C_BAD_STREAMID)
        two_level = self.features.two_level_stream_table
        if two_level and regs.STRTAB_FMT.get(config) == regs.STRTAB_FMT_2LVL:
            split = regs.STRTAB_SPLIT.get(config)
            if split not in (6, 8, 10):
                split = 6  # reserved values behave as 0b00110
            base &= -(8 << max(log2 - split, 3))
            number = sid >> split
            descriptor = l1stds.get(number)
            if descriptor is None:
                descriptor = self._fetch(base + 8 * number)
                if self._keep():
                    l1stds[number] = descriptor
            span = e.L1STD_SPAN.get(descriptor)
            rest = sid & (1 << split) - 1
            if not 0 < span <= min(e.L1STD_MAX_SPAN, split + 1) or rest >> span - 1:
                raise ConfigurationError(events.C_BAD_STREAMID)
            where = (descriptor & e.L1STD_L2PTR_MASK & -(e.STE_BYTES << span - 1)) + e.STE_BYTES * rest
        else:
            where = (base & -(e.STE_BYTES << log2)) + e.STE_BYTES * sid
        return decode_ste(self.features, [self._fetch(where + 8 * word) for word in range(e.STE_WORDS)])

    def _fetch(self, pa: int) -> int:
        try:
            return self._translator.load(pa)
        except BusAbort:
            raise ConfigurationError(events.F_STE_FETCH, fetch_address=pa) from None

    def cd_index(self, ste: Ste, ssid: int | None) -> int | None:
        """Which CD a request uses; None if it bypasses stage 1. Raises ConfigurationError."""
        if ssid is not None:
            if not ste.s1 or ssid >> ste.s1cdmax or not ste.s1cdmax:
                raise ConfigurationError(events.C_BAD_SUBSTREAMID)
            if ste.s1dss == e.S1DSS_SSID0 and ssid == 0:
                raise ConfigurationError(events.F_STREAM_DISABLED)
            return ssid
        if not ste.s1:
            return None
        if not ste.s1cdmax or ste.s1dss == e.S1DSS_SSID0:
            return 0
        if ste.s1dss == e.S1DSS_BYPASS:
            return None
        raise ConfigurationError(events.F_STREAM_DISABLED)

    def _cd(self, sid: int, ste: Ste, index: int) -> Cd:
        cds = self.cds.get(sid)
        cd = None if cds is None else cds.get(index)
        if cd is None:
            l1cds = self.l1cds.setdefault(sid, {})
            cd = self.read_cd(ste, index, l1cds)
            if self._keep():
                self.cds.setdefault(sid, {})[index] = cd
            else:
                self.l1cds.pop(sid)
        return cd

    def read_cd(self, ste: Ste, index: int, l1cds: dict[int, int], locate: Locate | None = None) -> Cd:
        """The CD in memory; level 1 descriptors come from, and go to, `l1cds`. Raises Refused.

        `locate` says where an address of the CD table lies, if not the way that a request goes, through TLB and tables.
        """
        where_is = locate or self._translator.cd_pa
        pointer = ste.s1contextptr
        if ste.s1fmt == e.S1FMT_LINEAR:
            where = (pointer & -(e.CD_BYTES << ste.s1cdmax)) + e.CD_BYTES * index
        else:
            low_bits = e.L2_CD_LOG2[ste.s1fmt]
            number = index >> low_bits
            descriptor = l1cds.get(number)
            if descriptor is None:
                pointer &= -(8 << max(ste.s1cdmax - low_bits, 3))
                descriptor = l1cds[number] = self._fetch_cd(where_is(ste, pointer + 8 * number))
            table = descriptor & e.L1CD_L2PTR_MASK & -(e.CD_BYTES << low_bits)
            if not descriptor & e.L1CD_V or table >> self.features.oas:
                raise ConfigurationError(events.C_BAD_SUBSTREAMID, ssid=index)
            where = table + e.CD_BYTES * (index & (1 << low_bits) - 1)
        pa = where_is(ste, where)  # a CD does not cross a page
        return decode_cd(self.features, ste, [self._fetch_cd(pa + 8 * word) for word in range(e.CD_WORDS)])

    def _fetch_cd(self, pa: int) -> int:
        try:
            return self._translator.load(pa)
        except BusAbort:
            raise ConfigurationError(events.F_CD_FETCH, fetch_address=pa) from None

    # -- invalidation ------------------------------------------------------------------------------------------------

    def forget_ste(self, sid: int, leaf: bool) -> None:
        """CFGI_STE: the STE and what was found through it; its level 1 descriptor, too, without `leaf`."""
        self.stes.pop(sid, None)
        self.forget_cds(sid)
        if not leaf:
            self.l1stds.pop(sid >> self._split(), None)

    def forget_range(self, sid: int, span: int) -> None:
        """CFGI_STE_RANGE: 2 << span streams, and their level 1 descriptors."""
        if span == 31:
            self.clear()
            return
        first = sid & -(2 << span)
        last = first + (2 << span) - 1
        caches = self.stes.keys() | self.cds.keys() | self.l1cds.keys() | self.streams.keys()
        for known in [known for known in caches if first <= known <= last]:
            self.forget_ste(known, leaf=True)
        split = self._split()
        for number in [number for number in self.l1stds if first >> split <= number <= last >> split]:
            del self.l1stds[number]

    def _split(self) -> int:
        split = regs.STRTAB_SPLIT.get(self._base_cfg())
        return split if split in (6, 8, 10) else 6

    def forget_cd(self, sid: int, index: int, leaf: bool) -> None:
        """CFGI_CD: one CD; its level 1 descriptor, too, without `leaf`."""
        self.cds.get(sid, {}).pop(index, None)
        streams = self.streams.get(sid, {})
        streams.pop(index, None)
        if index == 0:
            streams.pop(-1, None)
        ste = self.stes.get(sid)
        if not leaf and ste is None:
            self.l1cds.pop(sid, None)  # which of them, only the STE could tell
        elif not leaf and ste is not None and ste.s1fmt:
            self.l1cds.get(sid, {}).pop(index >> e.L2_CD_LOG2[ste.s1fmt], None)

    def forget_cds(self, sid: int) -> None:
        """CFGI_CD_ALL: all CDs of a stream, and their level 1 descriptors."""
        self.cds.pop(sid, None)
        self.l1cds.pop(sid, None)
        self.streams.pop(sid, None)

    def set_keep(self, keep: Callable[[], bool]) -> None:
        """From now on, keep what `keep` allows."""
        self.clear()
        self._keep = keep

    def droppers(self) -> list[Callable[[], None]]:
        """The caches, to be emptied at any time."""
        return [self.l1stds.clear, self.stes.clear, self.l1cds.clear, self.cds.clear, self.streams.clear]

    def clear(self) -> None:
        """CFGI_ALL."""
        self.l1stds.clear()
        self.stes.clear()
        self.l1cds.clear()
        self.cds.clear()
        self.streams.clear()
