"""Commands of an SMMUv3: opcodes, fields, and functions that make the two words of each.

Mirrors Arm IHI 0070 chapter 4. A driver calls the makers; the unit takes the words apart with the fields
(`fakedev/smmuv3/execute.py`). Left out: commands of the Secure and Realm queues, of EL2 and EL3, of MPAM and the DPT.
"""

from __future__ import annotations

from fakedev.smmuv3.bits import Field, address_mask

PREFETCH_CONFIG, PREFETCH_ADDR = 0x01, 0x02
CFGI_STE, CFGI_STE_RANGE, CFGI_CD, CFGI_CD_ALL = 0x03, 0x04, 0x05, 0x06
TLBI_NH_ALL, TLBI_NH_ASID, TLBI_NH_VA, TLBI_NH_VAA = 0x10, 0x11, 0x12, 0x13
TLBI_S12_VMALL, TLBI_S2_IPA, TLBI_NSNH_ALL = 0x28, 0x2A, 0x30
ATC_INV, PRI_RESP, RESUME, STALL_TERM, SYNC = 0x40, 0x41, 0x44, 0x45, 0x46

#: CFGI_STE_RANGE with this range is CFGI_ALL.
RANGE_ALL = 31

OPCODE = Field(7, 0)
SSEC, SSV = 1 << 10, 1 << 11
SSID, SID = Field(31, 12), Field(63, 32)

CFGI_LEAF = 1 << 0
CFGI_RANGE = Field(4, 0)

PREFETCH_SIZE, PREFETCH_STRIDE = Field(4, 0), Field(9, 5)

TLBI_NUM, TLBI_SCALE, TLBI_VMID, TLBI_ASID = Field(16, 12), Field(25, 20), Field(47, 32), Field(63, 48)
TLBI_LEAF, TLBI_TTL128 = 1 << 0, 1 << 7
TLBI_TTL, TLBI_TG = Field(9, 8), Field(11, 10)
TLBI_VA_MASK, TLBI_IPA_MASK = address_mask(63, 12), address_mask(51, 12)
#: Granules (log2 of bytes) by TG; with 0 the range fields say nothing.
TLBI_GRANULES = (0, 12, 14, 16)

ATC_GLOBAL = 1 << 9
ATC_SIZE = Field(5, 0)
#: The size that says "everything": 4096 << 52 bytes.
ATC_SIZE_ALL = 52

PRI_PRGINDEX, PRI_RESPONSE = Field(8, 0), Field(13, 12)
PRI_FAILURE, PRI_INVALID, PRI_SUCCESS = 0, 1, 2

RESUME_RETRY, RESUME_ABORT = 1 << 12, 1 << 13
RESUME_STAG = Field(15, 0)

SYNC_CS, SYNC_MSH, SYNC_MSIATTR, SYNC_MSIDATA = Field(13, 12), Field(23, 22), Field(27, 24), Field(63, 32)
SYNC_MSIADDR_MASK = address_mask(51, 2)
SIG_NONE, SIG_IRQ, SIG_SEV = 0, 1, 2


def _who(opcode: int, sid: int, ssid: int | None = None) -> int:
    return SID.put(sid) | opcode | (0 if ssid is None else SSID.put(ssid) | SSV)


def prefetch_config(sid: int, ssid: int | None = None) -> tuple[int, int]:
    """Fetch the entries that a stream needs ahead of its requests."""
    return _who(PREFETCH_CONFIG, sid, ssid), 0


def prefetch_addr(sid: int, address: int, size: int = 0, stride: int = 0, ssid: int | None = None) -> tuple[int, int]:
    """Fetch 1 << size translations from `address`, 4096 << stride bytes apart, ahead of requests."""
    where = address & TLBI_VA_MASK | PREFETCH_SIZE.put(size) | PREFETCH_STRIDE.put(stride)
    return _who(PREFETCH_ADDR, sid, ssid), where


def cfgi_ste(sid: int, leaf: bool = True) -> tuple[int, int]:
    """Forget a stream's STE and all CDs found through it; without `leaf` the level 1 descriptor, too."""
    return _who(CFGI_STE, sid), CFGI_LEAF * leaf


def cfgi_ste_range(sid: int, span: int) -> tuple[int, int]:
    """Forget the STEs (and what was found through them) of the 2 << span streams around `sid`."""
    return _who(CFGI_STE_RANGE, sid), CFGI_RANGE.put(span)


def cfgi_all() -> tuple[int, int]:
    """Forget all configuration."""
    return CFGI_STE_RANGE, RANGE_ALL


def cfgi_cd(sid: int, ssid: int, leaf: bool = True) -> tuple[int, int]:
    """Forget one CD of a stream; without `leaf` the level 1 descriptor, too."""
    return SID.put(sid) | SSID.put(ssid) | CFGI_CD, CFGI_LEAF * leaf


def cfgi_cd_all(sid: int) -> tuple[int, int]:
    """Forget all CDs of a stream, and their level 1 descriptors."""
    return _who(CFGI_CD_ALL, sid), 0


def tlbi_nh_all(vmid: int) -> tuple[int, int]:
    """Forget all stage 1 translations of a VMID, global ones included."""
    return TLBI_VMID.put(vmid) | TLBI_NH_ALL, 0


def tlbi_nh_asid(vmid: int, asid: int) -> tuple[int, int]:
    """Forget the translations of an ASID, but for global ones."""
    return TLBI_ASID.put(asid) | TLBI_VMID.put(vmid) | TLBI_NH_ASID, 0


def _tlbi(opcode: int, address: int, leaf: bool, tg: int, ttl: int, scale: int, num: int) -> tuple[int, int]:
    low = TLBI_SCALE.put(scale) | TLBI_NUM.put(num) | opcode
    return low, address | TLBI_TG.put(tg) | TLBI_TTL.put(ttl) | TLBI_LEAF * leaf


def tlbi_nh_va(
    vmid: int, asid: int, va: int, leaf: bool = False, *, tg: int = 0, ttl: int = 0, scale: int = 0, num: int = 0
) -> tuple[int, int]:
    """Forget the translation of one address; or, with `tg` (1 to 3 for 4, 16, 64 KiB), of (num + 1) << scale granules.

    `ttl` promises that the leaves are of that level (1 to 3).
    """
    low, high = _tlbi(TLBI_NH_VA, va & TLBI_VA_MASK, leaf, tg, ttl, scale, num)
    return low | TLBI_VMID.put(vmid) | TLBI_ASID.put(asid), high


def tlbi_nh_vaa(
    vmid: int, va: int, leaf: bool = False, *, tg: int = 0, ttl: int = 0, scale: int = 0, num: int = 0
) -> tuple[int, int]:
    """The same for all ASIDs of a VMID."""
    low, high = _tlbi(TLBI_NH_VAA, va & TLBI_VA_MASK, leaf, tg, ttl, scale, num)
    return low | TLBI_VMID.put(vmid), high


def tlbi_s2_ipa(
    vmid: int, ipa: int, leaf: bool = False, *, tg: int = 0, ttl: int = 0, scale: int = 0, num: int = 0
) -> tuple[int, int]:
    """Forget stage 2 translations by IPA; what stage 1 and 2 made together stays."""
    low, high = _tlbi(TLBI_S2_IPA, ipa & TLBI_IPA_MASK, leaf, tg, ttl, scale, num)
    return low | TLBI_VMID.put(vmid), high


def tlbi_s12_vmall(vmid: int) -> tuple[int, int]:
    """Forget all translations of a VMID, of both stages."""
    return TLBI_VMID.put(vmid) | TLBI_S12_VMALL, 0


def tlbi_nsnh_all() -> tuple[int, int]:
    """Forget all translations."""
    return TLBI_NSNH_ALL, 0


def atc_inv(sid: int, address: int, size: int, ssid: int | None = None, everywhere: bool = False) -> tuple[int, int]:
    """Tell an endpoint to forget 4096 << size bytes at `address` (of all PASIDs: `everywhere`, with an ssid)."""
    return _who(ATC_INV, sid, ssid) | ATC_GLOBAL * everywhere, address & TLBI_VA_MASK | ATC_SIZE.put(size)


def pri_resp(sid: int, group: int, response: int, ssid: int | None = None) -> tuple[int, int]:
    """Answer a page request group: PRI_FAILURE, PRI_INVALID, PRI_SUCCESS."""
    return _who(PRI_RESP, sid, ssid), PRI_RESPONSE.put(response) | PRI_PRGINDEX.put(group)


def resume(sid: int, stag: int, retry: bool, abort: bool = True) -> tuple[int, int]:
    """Let a stalled transaction try again, or end it."""
    return _who(RESUME, sid) | RESUME_RETRY * retry | RESUME_ABORT * (abort and not retry), RESUME_STAG.put(stag)


def stall_term(sid: int) -> tuple[int, int]:
    """End all stalled transactions of a stream."""
    return _who(STALL_TERM, sid), 0


def sync(signal: int = SIG_NONE, msi_address: int = 0, msi_data: int = 0) -> tuple[int, int]:
    """Wait for everything before; then signal. An MSI to address 0 is none."""
    return SYNC_MSIDATA.put(msi_data) | SYNC_CS.put(signal) | SYNC, msi_address & SYNC_MSIADDR_MASK
