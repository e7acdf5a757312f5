"""Regions of s390 subchannel devices: linux/vfio_ccw.h at Linux 7.3. Left out: nothing."""

from uapi.constants import Constants
from uapi.cstruct import Struct, carray, cstruct, length, u8, u32

HEADER = "linux/vfio_ccw.h"
CONSTANTS = Constants(__name__)

with CONSTANTS.defines():
    ORB_AREA_SIZE = 12
    SCSW_AREA_SIZE = 12
    IRB_AREA_SIZE = 96


@cstruct(packed=True)
class ccw_io_region(Struct):
    """Region that starts I/O on a subchannel."""

    orb_area: carray[u8] = length(ORB_AREA_SIZE)
    scsw_area: carray[u8] = length(SCSW_AREA_SIZE)
    irb_area: carray[u8] = length(IRB_AREA_SIZE)
    ret_code: u32


with CONSTANTS.defines():
    VFIO_CCW_ASYNC_CMD_HSCH = 1 << 0
    VFIO_CCW_ASYNC_CMD_CSCH = 1 << 1


@cstruct(packed=True)
class ccw_cmd_region(Struct):
    """Region that issues an asynchronous command."""

    command: u32
    ret_code: u32


with CONSTANTS.defines():
    SCHIB_AREA_SIZE = 52


@cstruct(packed=True)
class ccw_schib_region(Struct):
    """Region that reads the subchannel-information block."""

    schib_area: carray[u8] = length(SCHIB_AREA_SIZE)


@cstruct(packed=True)
class ccw_crw_region(Struct):
    """Region that returns a channel report word."""

    crw: u32
    pad: u32
