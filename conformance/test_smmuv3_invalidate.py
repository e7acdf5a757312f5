"""IOMMU_HWPT_INVALIDATE of an SMMUv3's vIOMMU: which commands a guest may send, and that they reach the hardware.

Mirrors arm_vsmmu_cache_invalidate(), arm_vsmmu_validate_user_cmd() and arm_vsmmu_convert_user_cmd() of
drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c. What the unit has decides over some fields; ranges and 16-bit ASIDs
are taken for granted.
"""

from __future__ import annotations

import errno
import struct

import pytest

from conformance.arena import arena
from conformance.drivers.edu import Edu
from conformance.drivers.fixtures import idle_edu
from conformance.steps import NOWHERE, PAGE, U32_MAX, answer, destroy, fails, place
from conformance.vsmmu import (
    ATC_INV,
    CFGI_ALL,
    CFGI_CD,
    CFGI_CD_ALL,
    CFGI_STE,
    LEAF,
    NH_ALL,
    NH_ASID,
    NH_VA,
    NH_VAA,
    NSNH_ALL,
    SYNC,
    TTB_PAGE,
    Guest,
    asid,
    make_cd,
    sid,
    unit,
    viommu_alloc,
    vmid,
)
from uapi.backend import File
from uapi.iommufd import IOMMU_HWPT_INVALIDATE

pytestmark = [
    pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device", "smmuv3", "nesting"),
    pytest.mark.since("7.3"),
]

VSID = 0x81
IOVA, OUT, A, B, C = 0x12_3456_7000, 0x7F_0000_0000, 16, 17, 18
SIZE = 4
OK = (NSNH_ALL, 0)
BAD = (SYNC, 0)

edu = idle_edu


@pytest.fixture
def guest(smmu_guest: Guest) -> Guest:
    smmu_guest.write(A, b"aaaa")
    smmu_guest.write(B, b"bbbb")
    smmu_guest.map(IOVA, smmu_guest.page(A))
    smmu_guest.map(OUT, smmu_guest.page(C))
    return smmu_guest


def done(guest: Guest, *commands: tuple[int, int], viommu: int = 0, **fields: int) -> tuple[int, int]:
    """The errno of a call, 0 for success, and entry_num after it."""
    arg = guest.invalidation(*commands, viommu=viommu, **fields)
    return answer(IOMMU_HWPT_INVALIDATE.raw, guest.iommu, arg), int(arg.entry_num)


def seen(guest: Guest, edu: Edu) -> bytes:
    """What the device reads at IOVA."""
    edu.load(IOVA, SIZE)
    edu.store(OUT, SIZE)
    return guest.read(C, SIZE)


# -- the array -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "answered"),
    [
        ({"__reserved": 1, "hwpt_id": 99}, (errno.EOPNOTSUPP, 0)),
        ({"entry_len": 0, "hwpt_id": 99}, (errno.EINVAL, 0)),
        ({"entry_len": PAGE + 1, "hwpt_id": 99}, (errno.EINVAL, 0)),
        ({"entry_num": (1 << 19) + 1, "hwpt_id": 99}, (errno.EINVAL, 0)),
        ({"hwpt_id": 99}, (errno.ENOENT, 0)),
        ({"hwpt_id": 1}, (errno.EINVAL, 0)),
        ({"hwpt_id": 3}, (errno.EINVAL, 0)),
        ({"hwpt_id": 5}, (errno.EINVAL, 0)),
        ({"hwpt_id": 6}, (errno.EOPNOTSUPP, 0)),
        ({"data_type": 0}, (errno.EINVAL, 0)),
        ({"data_type": 2, "data_uptr": NOWHERE}, (errno.EINVAL, 0)),
        ({"data_type": U32_MAX}, (errno.EINVAL, 0)),
        ({"entry_num": 0}, (errno.EINVAL, 0)),
        ({"entry_num": 0, "data_type": 2}, (errno.EINVAL, 0)),
        ({"entry_num": 0, "data_uptr": 0, "entry_len": 0}, (errno.EINVAL, 0)),
        ({"data_uptr": NOWHERE}, (errno.EFAULT, 0)),
        ({"data_uptr": NOWHERE, "entry_len": 8}, (errno.EFAULT, 0)),
        ({"data_uptr": NOWHERE, "entry_num": (1 << 18) + 1}, (errno.ENOMEM, (1 << 18) + 1)),
        ({"data_type": 2, "entry_num": 1 << 19}, (errno.ENOMEM, 1 << 19)),
        ({"data_uptr": NOWHERE, "entry_num": 1 << 18}, (errno.EFAULT, 0)),
        ({}, (0, 1)),
    ],
)
def test_order_of_the_checks(guest: Guest, change: dict[str, int], answered: tuple[int, int]) -> None:
    """5 is a vDEVICE, 6 a nested HWPT, whose caches its vIOMMU has. More entries than 4 MiB is no memory."""
    guest.vdevice(VSID)
    guest.nested()
    assert done(guest, OK, **change) == answered


@pytest.mark.parametrize("length", [1, 7, 8, 15])
def test_a_short_entry_ends_in_zeros(guest: Guest, length: int) -> None:
    assert done(guest, OK, entry_len=length) == (0, 1)


@pytest.mark.parametrize("length", [17, 24, 32, PAGE])
def test_a_long_entry_has_to_end_in_zeros(guest: Guest, length: int) -> None:
    with arena(3) as memory:
        memory.write(memory.address, struct.pack("<QQ", *OK))
        memory.write(memory.address + length, struct.pack("<QQ", *OK))
        fields = {"data_uptr": memory.address, "entry_len": length}
        assert done(guest, OK, OK, **fields) == (0, 2)
        memory.write(memory.address + 2 * length - 1, b"\1")
        assert done(guest, OK, OK, **fields) == (errno.E2BIG, 0)


def test_all_entries_are_read_before_the_first_is_judged(guest: Guest) -> None:
    with arena(2) as memory:
        memory.unmap(1)
        memory.write(memory.page(1) - 16, struct.pack("<QQ", *BAD))
        assert done(guest, BAD, OK, data_uptr=memory.page(1) - 16) == (errno.EFAULT, 0)
        assert done(guest, BAD, data_uptr=memory.page(1) - 16) == (errno.EIO, 0)


@pytest.mark.parametrize("number", [1, 62, 63, 64, 65, 126, 127, 128, 200])
def test_count_of_the_entries_that_were_done(guest: Guest, number: int) -> None:
    assert done(guest, *[OK] * number) == (0, number)
    assert done(guest, *[OK] * number, BAD, OK) == (errno.EIO, number)
    assert done(guest, BAD, *[OK] * number) == (errno.EIO, 0)


# -- commands --------------------------------------------------------------------------------------------------------


def test_opcodes(guest: Guest) -> None:
    """ATC_INV only of units with ATS."""
    guest.vdevice(VSID)
    allowed = {CFGI_CD, CFGI_CD_ALL, NH_ALL, NH_ASID, NH_VA, NH_VAA, NSNH_ALL}
    allowed |= {ATC_INV} if unit(guest.iommu, guest.device.devid).ats else set()
    stream = {CFGI_STE, CFGI_ALL, CFGI_CD, CFGI_CD_ALL, ATC_INV}
    taken = {code for code in range(256) if done(guest, (code | sid(VSID) * (code in stream), 0)) == (0, 1)}
    assert taken == allowed


def bits(first: int, last: int) -> int:
    return (1 << last + 1) - (1 << first)


_NO_RANGE = bits(12, 63) | LEAF
#: A good command, and which bits of its two words, opcode aside, may be the other way.
FIELDS: dict[str, tuple[tuple[int, int], int, int]] = {
    "NSNH_ALL": ((NSNH_ALL, 0), 0, 0),
    "NH_ALL": ((NH_ALL, 0), bits(32, 47), 0),
    "NH_ASID": ((NH_ASID, 0), bits(32, 63), 0),
    "NH_VA": ((NH_VA, 0), bits(32, 63), _NO_RANGE),
    "NH_VAA": ((NH_VAA, 0), bits(32, 47), _NO_RANGE),
    # TG 1, TTL 1: TG may become 3, TTL 3.
    "NH_VA of a range": (
        (NH_VA, 1 << 10 | 1 << 8),
        bits(12, 16) | bits(20, 24) | bits(32, 63),
        _NO_RANGE | 1 << 11 | 1 << 9,
    ),
    # TG 1, NUM 1: TTL may become anything, NUM not 0.
    "NH_VAA of a range": (
        (NH_VAA | 1 << 12, 1 << 10),
        bits(13, 16) | bits(20, 24) | bits(32, 47),
        _NO_RANGE | 1 << 11 | 3 << 8,
    ),
    "CFGI_CD": ((CFGI_CD | sid(VSID), 0), 0, LEAF),
    "CFGI_CD_ALL": ((CFGI_CD_ALL | sid(VSID), 0), 0, 0),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(guest: Guest, name: str) -> None:
    """Each bit the other way: taken or refused. CFGI_CD has a PASID where the unit has PASIDs."""
    guest.vdevice(VSID)
    (low, high), good_low, good_high = FIELDS[name]
    if name == "CFGI_CD" and unit(guest.iommu, guest.device.devid).ssids:
        good_low |= bits(12, 31)
    assert done(guest, (low, high)) == (0, 1)
    for bit in range(8, 64):
        assert done(guest, (low ^ 1 << bit, high)) == ((0, 1) if good_low >> bit & 1 else (errno.EIO, 0)), bit
    for bit in range(64):
        assert done(guest, (low, high ^ 1 << bit)) == ((0, 1) if good_high >> bit & 1 else (errno.EIO, 0)), bit


@pytest.mark.parametrize("code", [NH_VA, NH_VAA])
def test_ranges(guest: Guest, code: int) -> None:
    """Every granule, level, NUM and SCALE: reserved are a range or a level without granule, a granule without both, and
    level 1 of 16 KiB."""
    for tg in range(4):
        for ttl in range(4):
            for num, scale in ((0, 0), (1, 0), (31, 31), (0, 1), (0, 31), (0, 32)):
                good = bool(num or scale or ttl) if tg else not (num or scale or ttl)
                good = good and (tg, ttl) != (2, 1) and scale < 32
                command = (code | num << 12 | scale << 20, tg << 10 | ttl << 8)
                assert done(guest, command) == ((0, 1) if good else (errno.EIO, 0)), (tg, ttl, num, scale)


@pytest.mark.parametrize("code", [CFGI_CD, CFGI_CD_ALL])
def test_streams_are_the_viommu_s_vdevices(guest: Guest, iommu: File, code: int) -> None:
    """Attached or not. A command has 32 bits for one, a vDEVICE's id may have more."""
    other = viommu_alloc(iommu, guest.device.devid, guest.parent)
    for vsid in (0, VSID, U32_MAX):
        assert done(guest, (code | sid(vsid), 0)) == (errno.EIO, 0)
        vdevice = guest.vdevice(vsid)
        assert done(guest, (code | sid(vsid), 0)) == (0, 1)
        assert done(guest, (code | sid(vsid ^ 1), 0)) == (errno.EIO, 0)
        assert done(guest, (code | sid(vsid), 0), viommu=other) == (errno.EIO, 0)
        destroy(iommu, vdevice)
        assert done(guest, (code | sid(vsid), 0)) == (errno.EIO, 0)
    guest.vdevice(1 << 32 | VSID)
    assert done(guest, (code | sid(VSID), 0)) == (errno.EIO, 0)


def test_bits_are_judged_before_the_stream(guest: Guest) -> None:
    """Both are EIO, and both leave the ones before as done."""
    assert done(guest, OK, (CFGI_CD | sid(9), 0), OK) == (errno.EIO, 1)
    assert done(guest, OK, OK, (CFGI_CD | sid(9), 2)) == (errno.EIO, 2)


# -- what they do ----------------------------------------------------------------------------------------------------


#: Each takes the page at IOVA, under ASID 1, out of what the hardware remembers. The guest's VMID is of no account.
EFFECTIVE: dict[str, tuple[int, int]] = {
    "NSNH_ALL": (NSNH_ALL, 0),
    "NH_ALL": (NH_ALL, 0),
    "NH_ALL of another VMID": (NH_ALL | vmid(0xFFFF), 0),
    "NH_ASID": (NH_ASID | asid(1), 0),
    "NH_ASID of another VMID": (NH_ASID | asid(1) | vmid(0x1234), 0),
    "NH_VA": (NH_VA | asid(1), IOVA),
    "NH_VA, leaf": (NH_VA | asid(1), IOVA | LEAF),
    "NH_VA of another VMID": (NH_VA | asid(1) | vmid(1), IOVA | LEAF),
    "NH_VA of a level": (NH_VA | asid(1), IOVA | LEAF | 1 << 10 | 3 << 8),
    "NH_VA of a range": (NH_VA | asid(1) | 31 << 12, (IOVA & -32 * PAGE) | LEAF | 1 << 10 | 3 << 8),
    "NH_VA of a scaled range": (NH_VA | asid(1) | 1 << 12 | 9 << 20, (IOVA & -512 * PAGE) | 1 << 10),
    "NH_VAA": (NH_VAA, IOVA | LEAF),
    "NH_VAA of a range": (NH_VAA | 7 << 12, (IOVA & -8 * PAGE) | LEAF | 1 << 10),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_page_is_forgotten(guest: Guest, edu: Edu, name: str) -> None:
    guest.enter(VSID)
    assert seen(guest, edu) == b"aaaa"
    guest.map(IOVA, guest.page(B))
    assert done(guest, EFFECTIVE[name]) == (0, 1)
    assert seen(guest, edu) == b"bbbb"


@pytest.mark.parametrize("position", [0, 62, 63, 64, 126, 199])
def test_page_is_forgotten_wherever_the_command_stands(guest: Guest, edu: Edu, position: int) -> None:
    """Commands go to the hardware 63 at a time."""
    guest.enter(VSID)
    assert seen(guest, edu) == b"aaaa"
    guest.map(IOVA, guest.page(B))
    commands = [(NH_ASID | asid(77), 0)] * 200
    commands[position] = (NH_VA | asid(1), IOVA | LEAF)
    assert done(guest, *commands) == (0, 200)
    assert seen(guest, edu) == b"bbbb"


def test_first_63_commands_are_carried_out_whatever_follows(guest: Guest, edu: Edu) -> None:
    """What comes behind them, up to the bad one, is counted as done, but is not."""
    guest.enter(VSID)
    assert seen(guest, edu) == b"aaaa"
    guest.map(IOVA, guest.page(B))
    assert done(guest, *[(NH_VA | asid(1), IOVA | LEAF)] * 65, BAD) == (errno.EIO, 65)
    assert seen(guest, edu) == b"bbbb"


@pytest.mark.parametrize("code", [CFGI_CD | sid(VSID), CFGI_CD_ALL | sid(VSID)])
def test_context_descriptor_is_forgotten(guest: Guest, edu: Edu, code: int) -> None:
    guest.enter(VSID)
    assert seen(guest, edu) == b"aaaa"
    # Another table, under another ASID: the block of level 1 that covers the guest's memory, and OUT's way as before.
    for at, entry in (((IOVA >> 30 & 0x1FF) * 8, 0x4000_0000 | 0x741), (8 * (OUT >> 30 & 0x1FF), None)):
        value = guest.read(TTB_PAGE, 8, at) if entry is None else entry.to_bytes(8, "little")
        guest.write(24, value, at)
    guest.set_cd(make_cd(guest.page(24), tag=2))
    assert done(guest, (code, 0)) == (0, 1)
    edu.load((IOVA & -(1 << 30)) + B * PAGE, SIZE)
    edu.store(OUT, SIZE)
    assert guest.read(C, SIZE) == b"bbbb"


def test_a_table_of_the_guest_s_is_forgotten_without_the_leaf_bit(guest: Guest, edu: Edu) -> None:
    guest.enter(VSID)
    assert seen(guest, edu) == b"aaaa"
    table = guest.descriptor(IOVA) * 8 & -PAGE
    guest.write(24, (guest.page(B) | 0xF43).to_bytes(8, "little"), (IOVA >> 12 & 0x1FF) * 8)
    guest.set_table(IOVA, 2, guest.page(24) | 3)
    assert table != 24 * PAGE
    assert done(guest, (NH_VA | asid(1), IOVA)) == (0, 1)
    assert seen(guest, edu) == b"bbbb"


def test_the_parent_itself_has_no_invalidation(guest: Guest, iommu: File) -> None:
    nested = guest.nested()
    for kind in (0, 1):
        arg = IOMMU_HWPT_INVALIDATE.make(
            hwpt_id=nested, data_type=kind, entry_len=16, entry_num=1, data_uptr=place(struct.pack("<QQ", *OK))
        )
        with fails(errno.EOPNOTSUPP):
            IOMMU_HWPT_INVALIDATE.raw(iommu, arg)
