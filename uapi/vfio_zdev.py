"""Device capabilities of s390 PCI functions: linux/vfio_zdev.h at Linux 7.3.

They follow `vfio_device_info` as a capability chain (VFIO_DEVICE_INFO_CAP_ZPCI_*). Left out: nothing.
"""

from uapi.constants import Constants
from uapi.cstruct import Struct, carray, cstruct, length, since, u8, u16, u32, u64
from uapi.vfio import vfio_info_cap_header

HEADER = "linux/vfio_zdev.h"
CONSTANTS = Constants(__name__)


@cstruct()
class vfio_device_info_cap_zpci_base(Struct):
    """Facts about a zPCI function. `header.version` says which of the later members are filled."""

    header: vfio_info_cap_header
    start_dma: u64
    end_dma: u64
    pchid: u16
    vfn: u16
    fmb_length: u16
    pft: u8
    gid: u8
    fh: u32
    ccdf_err_length: u32 = since("7.3")


with CONSTANTS.defines():
    VFIO_DEVICE_INFO_ZPCI_FLAG_REFRESH = 1


@cstruct()
class vfio_device_info_cap_zpci_group(Struct):
    """Facts about the group of a zPCI function."""

    header: vfio_info_cap_header
    dasm: u64
    msi_addr: u64
    flags: u64
    mui: u16
    noi: u16
    maxstbl: u16
    version: u8
    reserved: u8
    imaxstbl: u16


@cstruct()
class vfio_device_info_cap_zpci_util(Struct):
    """The utility string of a zPCI function, in EBCDIC."""

    header: vfio_info_cap_header
    size: u32
    util_str: carray[u8] = length(0)


@cstruct()
class vfio_device_info_cap_zpci_pfip(Struct):
    """The path of a zPCI function inside the machine."""

    header: vfio_info_cap_header
    size: u32
    pfip: carray[u8] = length(0)
