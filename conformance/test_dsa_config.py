"""The configuration space of a device with ATS, PRI and PASIDs as a client of vfio-pci sees it.

Mirrors pci_ext_cap_length and vfio_ecap_init() of drivers/vfio/pci/vfio_pci_config.c: ATS and PRI are there and cannot
be written, for whether they are on is the IOMMU driver's decision; PASID is taken out of the chain. What no known
capability owns passes through: a client that knows where the hidden one is reaches it.
"""

from __future__ import annotations

import errno

import pytest

from conformance.drivers.dsa import Dsa, DsaError
from conformance.steps import fails
from uapi.backend import Backend, File
from uapi.iommufd import IOMMU_GET_HW_INFO

pytestmark = [pytest.mark.since("7.3"), pytest.mark.needs("iommu", "root", "vfio_cdev", "dsa", "pasid", "ats")]

EXT_CAPS, ACS, ATS, PRI, PASID = 0x100, 0x0D, 0x0F, 0x13, 0x1B
#: Control registers in these capabilities, with their Enable bits.
CONTROL, ATS_ENABLE, PASID_ENABLE = 6, 0x8000, 1
PRI_CONTROL, PRI_ALLOCATION = 4, 12
#: Command error: a queue with a PASID on a device without.
ERR_WQ_PASID = 0x26


def chain(dsa: Dsa) -> dict[int, int]:
    """Where the extended capabilities are that the client sees, by id."""
    found, at = {}, EXT_CAPS
    while at:
        header = dsa.vfio.config_read(at, 4)
        found[header & 0xFFFF] = at
        at = header >> 20
    return found


def test_ats_and_pri_are_there_and_pasids_are_not(ats_dsa: Dsa) -> None:
    found = chain(ats_dsa)
    assert ATS in found
    assert PRI in found
    assert PASID not in found


def test_what_is_there_cannot_be_written(ats_dsa: Dsa) -> None:
    found = chain(ats_dsa)
    vfio = ats_dsa.vfio
    for at, width in (
        (found[ATS] + CONTROL, 2),
        (found[PRI] + PRI_CONTROL, 2),
        (found[PRI] + PRI_ALLOCATION, 4),
        (found[ATS], 4),
    ):
        before = vfio.config_read(at, width)
        vfio.config_write(at, width, before ^ (1 << 8 * width) - 1)
        assert vfio.config_read(at, width) == before


def test_ats_follows_the_attachment(iommu: File, ats_dsa: Dsa, ioas: int) -> None:
    """On an SMMUv3 it is on while the device is in a domain with a table; VT-d has it on from the start."""
    at = chain(ats_dsa)[ATS] + CONTROL
    before = ats_dsa.vfio.config_read(at, 2) & ATS_ENABLE
    ats_dsa.vfio.attach(ioas)
    assert ats_dsa.vfio.config_read(at, 2) & ATS_ENABLE
    ats_dsa.vfio.detach()
    assert ats_dsa.vfio.config_read(at, 2) & ATS_ENABLE == before


def hidden_pasid(dsa: Dsa) -> int:
    """Where the PASID capability is that the chain leaves out: it looks like one, in the gaps between the others."""
    found = chain(dsa)
    for at in range(EXT_CAPS, 0x200, 4):
        if at not in found.values() and dsa.vfio.config_read(at, 4) & 0xFFFFF == 1 << 16 | PASID:
            return at
    pytest.skip("the device has its PASID capability elsewhere")


def test_a_client_that_knows_where_reaches_the_hidden_capability(kernel: Backend, iommu: File, ats_dsa: Dsa) -> None:
    """Read and written as it is: it can take the device's PASIDs away, from itself alone."""
    at = hidden_pasid(ats_dsa) + CONTROL
    before = ats_dsa.vfio.config_read(at, 2)
    assert before & PASID_ENABLE
    ats_dsa.vfio.config_write(at, 2, 0)
    assert ats_dsa.vfio.config_read(at, 2) == 0
    with pytest.raises(DsaError) as refused:
        ats_dsa.queue(0, 5)
    assert refused.value.code == ERR_WQ_PASID
    info = IOMMU_GET_HW_INFO(iommu, dev_id=ats_dsa.vfio.devid)
    assert info.out_max_pasid_log2 > 0  # which the kernel counted at the probe
    ats_dsa.vfio.config_write(at, 2, before)
    ats_dsa.queue(0, 5)


def test_nothing_is_beyond_the_end(ats_dsa: Dsa) -> None:
    with fails(errno.EFAULT):
        ats_dsa.vfio.config_read(4096, 4)
    with fails(errno.EFAULT):
        ats_dsa.vfio.config_write(4094, 4, 0)
