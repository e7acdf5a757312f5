"""What a guest's own mistakes come to: bits of its STE, context descriptor and tables, one at a time, and the records.

Arm IHI 0070 says which are mistakes (5.2.2, 5.4.2) and which number a record gets (7.3); the driver hands records of
the guest's stage on. Left out is where QEMU does not do as the manual says: tables beyond the address size, AP[1] and
APTable[0], S1CDMax without substreams, CD.IPS of reserved values.
"""

from __future__ import annotations

import select
import struct

import pytest

from conformance.drivers.edu import Edu
from conformance.drivers.fixtures import idle_edu
from conformance.vsmmu import (
    C_BAD_CD,
    C_BAD_STE,
    EVENT_SIZE,
    F_PERMISSION,
    F_TRANSLATION,
    PAGE_RO,
    PAGE_RW,
    S1STALLD,
    TABLE,
    TTB_PAGE,
    Guest,
    make_cd,
    sid,
    unit,
)
from uapi.backend import File

pytestmark = [
    pytest.mark.needs("iommu", "root", "vfio_cdev", "dma_device", "smmuv3", "nesting"),
    pytest.mark.since("7.3"),
]

VSID, IOVA, A, SIZE = 0x81, 0x12_3456_7000, 16, 4
INPUT = 2 << 40
#: What edu's own buffer does not have, whatever earlier tests left there.
BEFORE = b"\xa5\x5a\xc3\x3c"
CONFIGURATION = (C_BAD_STE, C_BAD_CD)

edu = idle_edu


@pytest.fixture
def guest(smmu_guest: Guest) -> Guest:
    smmu_guest.write(A, BEFORE)
    smmu_guest.map(IOVA, smmu_guest.page(A))
    return smmu_guest


@pytest.fixture
def queue(guest: Guest) -> File:
    return guest.veventq()[1]


def outcome(guest: Guest, edu: Edu, queue: File) -> int:
    """What becomes of a write to IOVA: the number of its event, which is right in all its words; 0: it is done."""
    edu.store(IOVA, SIZE)
    done = guest.read(A, SIZE) != BEFORE
    if not select.select([queue.fileno()], [], [], 0.1 if done else 2.0)[0]:
        assert done, "refused without an event"
        return 0
    data = queue.read(EVENT_SIZE)
    assert not done
    low, second, address, last = struct.unpack_from("<4Q", data, 8)
    number: int = low & 0xFF
    assert low == number | sid(VSID)
    assert (second, address, last) == ((0, 0, 0) if number in CONFIGURATION else (INPUT, IOVA, 0))
    return number


#: Changed bits of the two words, and what it comes to.
STES = {
    "S1Fmt without a table of descriptors": (1 << 4, 0, 0),
    "S1Fmt, reserved value": (3 << 4, 0, 0),
    "S1DSS without a table of descriptors": (0, 1, 0),
    "S1DSS, reserved value": (0, 3, 0),
    "cacheability": (0, 0xFC, 0),
}


@pytest.mark.parametrize("name", STES)
def test_vste(guest: Guest, edu: Edu, queue: File, name: str) -> None:
    low, high = guest.ste()
    first, second, number = STES[name]
    guest.enter(VSID, (low | first, high | second))
    assert outcome(guest, edu, queue) == number


def test_a_vste_that_disables_stalls_is_bad_where_there_are_none(guest: Guest, edu: Edu, queue: File) -> None:
    """The driver takes it; the unit does not, and the guest is told so."""
    low, high = guest.ste()
    guest.enter(VSID, (low, high | S1STALLD))
    stalls = unit(guest.iommu, guest.device.devid).stalls
    assert outcome(guest, edu, queue) == (0 if stalls else C_BAD_STE)


#: Changed bits of the first word.
CDS = {
    "V": (1 << 31, C_BAD_CD),
    "AA64": (1 << 41, C_BAD_CD),
    "ENDI": (1 << 15, C_BAD_CD),
    "TG0, reserved value": (3 << 6, C_BAD_CD),
    "T0SZ 12": (25 ^ 12, C_BAD_CD),
    "T0SZ 15": (25 ^ 15, C_BAD_CD),
    "T0SZ 16": (25 ^ 16, F_TRANSLATION),
    "T0SZ 39": (25 ^ 39, F_TRANSLATION),
    "T0SZ 50": (25 ^ 50, C_BAD_CD),
    "EPD0": (1 << 14, F_TRANSLATION),
    "TTB1 with its T1SZ 0": (1 << 30, C_BAD_CD),
    "IPS 4": ((2 ^ 4) << 32, 0),
    "IPS 5": ((2 ^ 5) << 32, 0),
    "AFFD": (1 << 35, 0),
    "WXN": (1 << 36, 0),
    "TBI0": (1 << 38, 0),
    "ASET": (1 << 47, 0),
}


@pytest.mark.parametrize("name", CDS)
def test_context_descriptor(guest: Guest, edu: Edu, queue: File, name: str) -> None:
    bits, number = CDS[name]
    guest.set_cd(make_cd(guest.page(TTB_PAGE), more=bits))
    guest.enter(VSID)
    assert outcome(guest, edu, queue) == number


@pytest.mark.parametrize("bits", [1 << 42, 1 << 43, 3 << 42], ids=["HD", "HA", "HA and HD"])
def test_a_context_descriptor_for_hardware_s_flags_is_bad_where_it_keeps_none(
    guest: Guest, edu: Edu, queue: File, bits: int
) -> None:
    guest.set_cd(make_cd(guest.page(TTB_PAGE), more=bits))
    guest.enter(VSID)
    keeps = unit(guest.iommu, guest.device.devid).flags
    number = outcome(guest, edu, queue)
    assert number == (0 if keeps else C_BAD_CD)


@pytest.mark.parametrize("bits", [1 << 44, 3 << 44], ids=["S", "S without R"])
def test_a_context_descriptor_that_stalls_is_bad_where_nothing_does(
    guest: Guest, edu: Edu, queue: File, bits: int
) -> None:
    guest.set_cd(make_cd(guest.page(TTB_PAGE), more=bits))
    guest.enter(VSID)
    stalls = unit(guest.iommu, guest.device.devid).stalls
    assert outcome(guest, edu, queue) == (0 if stalls else C_BAD_CD)


#: The page's descriptor.
PAGES = {
    "XN": (PAGE_RW | 1 << 54, 0),
    "PXN": (PAGE_RW | 1 << 53, 0),
    "contiguous": (PAGE_RW | 1 << 52, 0),
    "DBM": (PAGE_RW | 1 << 51, 0),
    "DBM of a read-only page": (PAGE_RO | 1 << 51, F_PERMISSION),
    "NS": (PAGE_RW | 1 << 5, 0),
    "not shareable": (PAGE_RW & ~(3 << 8), 0),
    "another attribute": (PAGE_RW | 7 << 2, 0),
    "reserved kind": (PAGE_RW & ~TABLE, F_TRANSLATION),
}


@pytest.mark.parametrize("name", PAGES)
def test_page(guest: Guest, edu: Edu, queue: File, name: str) -> None:
    bits, number = PAGES[name]
    guest.map(IOVA, guest.page(A), bits)
    guest.enter(VSID)
    assert outcome(guest, edu, queue) == number


#: Bits of a table's descriptor.
TABLES = {
    "PXNTable and XNTable": (3 << 59, 0),
    "APTable, read-only": (2 << 61, F_PERMISSION),
    "NSTable": (1 << 63, 0),
    "ignored bits": (0x7F << 52 | 0x3FF << 2, 0),
}


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_table(guest: Guest, edu: Edu, queue: File, name: str, level: int) -> None:
    bits, number = TABLES[name]
    guest.change(IOVA, level, bits)
    guest.enter(VSID)
    assert outcome(guest, edu, queue) == number
