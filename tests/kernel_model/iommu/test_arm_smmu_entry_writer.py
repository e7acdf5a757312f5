"""The entries that the SMMUv3 driver makes, and how it changes one under the hardware's eyes.

In the idea of the kernel's own arm-smmu-v3-test.c, but every store is looked at, not only every sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fakedev.smmuv3 import entries as e
from kernel_model.errors import KernelBug
from kernel_model.iommu.arm_smmu_v3.entries import (
    WORDS,
    StreamOptions,
    make_abort_ste,
    make_bypass_ste,
    make_cdtable_ste,
    make_nested_ste,
    make_s1_cd,
    make_s2_domain_ste,
)
from kernel_model.iommu.arm_smmu_v3.entry_writer import CD, STE, EntryKind, write_entry
from kernel_model.iommu.io_pgtable_arm import stage1_format, stage2_format

_SIZES = 1 << 12 | 1 << 21 | 1 << 30
_S1 = stage1_format(_SIZES, 48, 44)
_S2 = stage2_format(_SIZES, 44, 44)
_OVERRIDING = StreamOptions(attr_types_ovr=True, stalls=True)
_STALLING = StreamOptions(attr_types_ovr=True, stalls=True, stall_enabled=True)
_CDTAB = 0xF0F0_F0F0_F000
_HARMLESS = e.STE_1_EATS.mask | e.STE_1_MEV


def s1_ste(s1dss: int = e.S1DSS_SSID0, ats: bool = False, options: StreamOptions = _OVERRIDING) -> list[int]:
    return make_cdtable_ste(options, e.S1FMT_64K_L2, _CDTAB, 20, ats, s1dss)


def s2_ste(ats: bool = False, options: StreamOptions = _OVERRIDING, vmid: int = 9) -> list[int]:
    return make_s2_domain_ste(options, _S2, 0x1234_5000, vmid, ats)


def nested_ste(guest: Sequence[int] | None = None) -> list[int]:
    return make_nested_ste(_OVERRIDING, guest or s1_ste()[:2], _S2, 0x1234_5000, 9, False)


class Watched(list[int]):
    """An entry that keeps what it was after each store."""

    def __init__(self, words: Sequence[int]) -> None:
        super().__init__(words)
        self.states = [list(words)]

    def __setitem__(self, index, value) -> None:  # type: ignore[no-untyped-def]
        super().__setitem__(index, value)
        self.states.append(list(self))


def change(kind: EntryKind, old: Sequence[int], new: Sequence[int]) -> tuple[bool, int]:
    """Write `new` over `old`; whether no moment was invalid, and the syncs."""
    entry = Watched(old)
    syncs: list[list[int]] = []
    write_entry(kind, entry, new, lambda: syncs.append(list(entry)))
    assert list(entry) == list(new)
    assert syncs[-1:] in ([], [list(new)]), "the last store was not synced"
    valid = e.STE_0_V if kind is STE else e.CD_0_V
    hitless = True
    for state in entry.states:
        if not state[0] & valid:
            hitless = False
            continue
        seen = [word & used for word, used in zip(state, kind.used(state), strict=True)]
        ends = [[word & used for word, used in zip(end, kind.used(state), strict=True)] for end in (old, new)]
        if kind is STE:
            for words in (seen, *ends):
                words[1] &= ~_HARMLESS
        assert seen in ends, f"neither the old nor the new entry: {[hex(word) for word in state]}"
    return hitless, len(syncs)


ABORT, BYPASS = make_abort_ste(), make_bypass_ste(_OVERRIDING)


@pytest.mark.parametrize(
    ("old", "new", "syncs"),
    [
        (BYPASS, ABORT, 2),
        (ABORT, BYPASS, 2),
        (s1_ste(), ABORT, 2),
        (ABORT, s1_ste(), 2),
        (s1_ste(), BYPASS, 3),
        (BYPASS, s1_ste(), 3),
        (s1_ste(), s1_ste(e.S1DSS_BYPASS), 1),
        (s1_ste(e.S1DSS_BYPASS), s1_ste(), 1),
        (s1_ste(e.S1DSS_BYPASS), BYPASS, 2),
        (BYPASS, s1_ste(e.S1DSS_BYPASS), 2),
        (s2_ste(), ABORT, 2),
        (ABORT, s2_ste(), 2),
        (s2_ste(), BYPASS, 2),
        (BYPASS, s2_ste(), 2),
        (s1_ste(), s2_ste(vmid=0), 3),
        (s2_ste(vmid=0), s1_ste(), 3),
        (s1_ste(options=_STALLING), s2_ste(options=_STALLING, vmid=0), 3),
        (s2_ste(options=_STALLING, vmid=0), s1_ste(options=_STALLING), 3),
        (s1_ste(), s1_ste(ats=True), 1),
        (s1_ste(ats=True), s1_ste(e.S1DSS_BYPASS), 1),
        (s2_ste(), s2_ste(vmid=10), 1),
        (s1_ste(), s1_ste(), 0),
    ],
    ids=lambda value: f"{e.STE_0_CONFIG.get(value[0])}" if isinstance(value, list) else str(value),
)
def test_a_change_without_a_moment_of_abort(old: list[int], new: list[int], syncs: int) -> None:
    assert change(STE, old, new) == (True, syncs)


def test_between_the_stages_the_vmid_makes_an_abort_unavoidable() -> None:
    """Stage 1 is under VMID 0, which the hardware reads, and no domain of stage 2 has it."""
    assert change(STE, s1_ste(), s2_ste()) == (False, 3)
    assert change(STE, s2_ste(), s1_ste()) == (False, 3)


@pytest.mark.parametrize("moved", [0x1_0000, 0x4000_0000])
def test_two_words_in_use_cannot_change_without_an_abort_between(moved: int) -> None:
    other = make_cdtable_ste(_OVERRIDING, e.S1FMT_LINEAR, _CDTAB ^ moved, 3, False, e.S1DSS_TERMINATE)
    assert change(STE, s1_ste(), other) == (False, 3)


def test_every_pair_of_entries_passes_through_nothing_else() -> None:
    every = [ABORT, BYPASS, [0] * WORDS, nested_ste(), nested_ste(make_bypass_ste(_OVERRIDING)[:2])]
    for options in (StreamOptions(), _OVERRIDING, _STALLING, StreamOptions(e2h=True)):
        for ats in (False, True):
            every += [s1_ste(s1dss, ats, options) for s1dss in range(3)]
            every.append(s2_ste(ats, options))
    for old in every:
        for new in every:
            change(STE, old, new)


def test_eats_waits_its_turn_where_stage_2_stalls() -> None:
    old, new = s2_ste(ats=True), s2_ste(options=_STALLING)
    assert change(STE, old, new) == (False, 3)


def test_mev_and_eats_may_change_together_with_one_other_word() -> None:
    old = s2_ste()
    new = s2_ste(ats=True, vmid=10)
    new[1] |= e.STE_1_MEV
    assert change(STE, old, new) == (True, 2)


def test_clearing_a_cd_and_setting_it_again() -> None:
    cd = make_s1_cd(_OVERRIDING, _S1, 0x1234_5000, 778)
    assert change(CD, [0] * WORDS, cd) == (False, 2)
    assert change(CD, cd, [0] * WORDS) == (False, 2)


def test_another_asid_is_one_store() -> None:
    cds = [make_s1_cd(_OVERRIDING, _S1, 0x1234_5000, asid) for asid in (778, 1023)]
    assert change(CD, cds[0], cds[1]) == (True, 1)


def test_another_table_under_another_asid_breaks_the_cd() -> None:
    cds = [make_s1_cd(_OVERRIDING, _S1, root, asid) for root, asid in ((0x1000, 1), (0x2000, 2))]
    assert change(CD, cds[0], cds[1]) == (False, 3)


def test_switching_a_cds_table_off_is_hitless() -> None:
    cd = make_s1_cd(_OVERRIDING, _S1, 0x1234_5000, 5)
    released = [cd[0] & e.CD_0_ASID.mask | e.CD_0_V | e.CD_0_AA64 | e.CD_0_R | e.CD_0_A | e.CD_0_ASET, 0, 0, cd[3]]
    released[0] |= e.CD_0_EPD0 | e.CD_0_EPD1 | e.CD_0_IPS.mask & cd[0]
    released += [0] * 4
    assert change(CD, cd, released) == (True, 2)
    assert change(CD, released, cd) == (True, 2)


def test_a_bit_that_nothing_reads_is_a_bug() -> None:
    target = list(ABORT)
    target[5] = 1
    with pytest.raises(KernelBug):
        write_entry(STE, list(BYPASS), target, lambda: None)


# -- the entries -----------------------------------------------------------------------------------------------------


def test_abort_and_bypass() -> None:
    assert ABORT == [1, 0, 0, 0, 0, 0, 0, 0]
    assert make_bypass_ste(StreamOptions()) == [0b1001, 0, 0, 0, 0, 0, 0, 0]
    assert BYPASS[1] == 1 << 44


def test_a_cd_table_ste() -> None:
    ste = make_cdtable_ste(StreamOptions(), e.S1FMT_LINEAR, _CDTAB, 4, True, e.S1DSS_SSID0)
    assert ste[0] == 4 << 59 | _CDTAB | 0b1011
    assert ste[1] == 1 << 28 | 3 << 6 | 1 << 4 | 1 << 2 | 2
    assert ste[2:] == [0] * 6


def test_only_a_device_that_may_stall_is_let() -> None:
    assert s1_ste(options=_OVERRIDING)[1] & e.STE_1_S1STALLD
    assert not s1_ste(options=_STALLING)[1] & e.STE_1_S1STALLD
    assert not s1_ste(options=StreamOptions())[1] & e.STE_1_S1STALLD
    assert s2_ste(options=_STALLING)[2] & e.STE_2_S2S
    assert make_s1_cd(_STALLING, _S1, 0, 1)[0] & e.CD_0_S


@pytest.mark.parametrize(("oas", "t0sz", "sl0", "ps"), [(32, 32, 1, 0), (40, 24, 1, 2), (44, 20, 2, 4), (48, 16, 2, 5)])
def test_a_stage_2_ste_tells_the_tables_geometry(oas: int, t0sz: int, sl0: int, ps: int) -> None:
    ste = make_s2_domain_ste(StreamOptions(), stage2_format(_SIZES, oas, oas), 0x8000, 7, False)
    assert ste[0] == 0b1101
    word = ste[2]
    assert (e.STE_2_S2T0SZ.get(word), e.STE_2_S2SL0.get(word), e.STE_2_S2PS.get(word)) == (t0sz, sl0, ps)
    assert e.STE_2_S2VMID.get(word) == 7
    needed = e.STE_2_S2AA64 | e.STE_2_S2R | e.STE_2_S2PTW
    assert word & needed == needed
    assert ste[3] == 0x8000


def test_a_cd_tells_the_tables_geometry() -> None:
    cd = make_s1_cd(StreamOptions(), stage1_format(1 << 16 | 1 << 29, 48, 44), 0x1_0000, 0xABCD)
    word = cd[0]
    assert (e.CD_0_T0SZ.get(word), e.CD_0_TG0.get(word), e.CD_0_IPS.get(word)) == (16, 1, 4)
    assert word >> 48 == 0xABCD
    assert word & (e.CD_0_EPD1 | e.CD_0_AA64 | e.CD_0_HA) == e.CD_0_EPD1 | e.CD_0_AA64
    assert cd[1:4] == [0x1_0000, 0, 0xF404_FF44]


def test_a_cd_for_dirty_tracking_lets_the_hardware_write_both_flags() -> None:
    both = e.CD_0_HA | e.CD_0_HD
    assert make_s1_cd(StreamOptions(), _S1, 0x1000, 1, dirty_tracking=True)[0] & both == both


def test_fwb_is_told_to_the_hardware() -> None:
    assert make_s2_domain_ste(StreamOptions(), _S2, 0, 1, False, fwb=True)[1] == e.STE_1_S2FWB


@pytest.mark.parametrize(
    "build", [lambda: [0, 0], lambda: make_abort_ste()[:2], lambda: [e.STE_0_V | e.STE_0_CONFIG.put(e.CONFIG_S2), 0]]
)
def test_a_guests_invalid_or_aborting_ste_is_abort(build: Callable[[], list[int]]) -> None:
    assert nested_ste(build()) == ABORT


def test_a_guests_bypass_is_stage_2_alone() -> None:
    assert nested_ste(make_bypass_ste(StreamOptions())[:2]) == s2_ste()


def test_a_guests_stage_1_is_over_stage_2() -> None:
    guest = s1_ste()[:2]
    ste = nested_ste(guest)
    assert e.STE_0_CONFIG.get(ste[0]) == e.CONFIG_NESTED
    assert ste[0] & ~e.STE_0_CONFIG.mask == guest[0] & ~e.STE_0_CONFIG.mask
    assert ste[1] == s2_ste()[1] | guest[1] | e.STE_1_MEV
    assert ste[2:] == s2_ste()[2:]
