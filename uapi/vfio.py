"""The ABI of VFIO: linux/vfio.h at Linux 7.3, each thing once, in the header's order.

Mirrors include/uapi/linux/vfio.h; what each field means in detail is in its kernel-doc. Constants stand before the
struct whose field they are for. Left out: the macros VFIO_DEVICE_STATE_VALID, _IS_ERROR and
_SET_ERROR of the withdrawn first migration protocol. The structs of s390 are in uapi/vfio_zdev.py and uapi/vfio_ccw.py.

`since` is the first of the sampled releases (`uapi/history`) whose header has the thing. The oldest sample is 6.1: what
says no `since` is 6.1 or older. 7.0 and 7.1 were not sampled: "7.2" may be either.

`last` is the member up to which the kernel insists on `argsz` (its `minsz`). Up to three ioctls share a number: which
one it means depends on the file it is issued on.

A declaration file: it is as long as the header it mirrors.
"""

from ioctl_opt import IO

from uapi.constants import Constants, const
from uapi.cstruct import (
    Struct,
    Union,
    aligned_u64,
    anonymous,
    carray,
    cstruct,
    length,
    s32,
    since,
    u8,
    u16,
    u32,
    u64,
    u64_ptr,
    was,
)
from uapi.ioctl import Ioctl

HEADER = "linux/vfio.h"
CONSTANTS = Constants(__name__)

with CONSTANTS.defines():
    VFIO_API_VERSION = 0
    VFIO_TYPE1_IOMMU = 1
    VFIO_SPAPR_TCE_IOMMU = 2
    VFIO_TYPE1v2_IOMMU = 3
    VFIO_DMA_CC_IOMMU = 4
    VFIO_EEH = 5
    VFIO_TYPE1_NESTING_IOMMU = const(6, until="6.13")
    __VFIO_RESERVED_TYPE1_NESTING_IOMMU = const(6, since="6.13")
    VFIO_SPAPR_TCE_v2_IOMMU = 7
    VFIO_NOIOMMU_IOMMU = 8
    VFIO_UNMAP_ALL = 9
    VFIO_UPDATE_VADDR = 10
    VFIO_TYPE = ord(";")
    VFIO_BASE = 100


@cstruct()
class vfio_info_cap_header(Struct):
    """Stands before each capability of an INFO answer; `next` counts from the answer's start, 0 ends."""

    id: u16
    version: u16
    next: u32


VFIO_GET_API_VERSION: Ioctl[Struct] = Ioctl("VFIO_GET_API_VERSION", IO(VFIO_TYPE, VFIO_BASE + 0), area="container")

VFIO_CHECK_EXTENSION: Ioctl[Struct] = Ioctl(
    "VFIO_CHECK_EXTENSION", IO(VFIO_TYPE, VFIO_BASE + 1), argument="value", area="container"
)

VFIO_SET_IOMMU: Ioctl[Struct] = Ioctl(
    "VFIO_SET_IOMMU", IO(VFIO_TYPE, VFIO_BASE + 2), argument="value", area="container"
)

with CONSTANTS.defines():
    VFIO_GROUP_FLAGS_VIABLE = 1 << 0
    VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1


@cstruct()
class vfio_group_status(Struct):
    """The state of a group."""

    argsz: u32
    flags: u32


VFIO_GROUP_GET_STATUS = Ioctl(
    "VFIO_GROUP_GET_STATUS", IO(VFIO_TYPE, VFIO_BASE + 3), vfio_group_status, last="flags", area="group"
)

VFIO_GROUP_SET_CONTAINER: Ioctl[Struct] = Ioctl(
    "VFIO_GROUP_SET_CONTAINER", IO(VFIO_TYPE, VFIO_BASE + 4), argument="pointer", area="group"
)

VFIO_GROUP_UNSET_CONTAINER: Ioctl[Struct] = Ioctl(
    "VFIO_GROUP_UNSET_CONTAINER", IO(VFIO_TYPE, VFIO_BASE + 5), area="group"
)

VFIO_GROUP_GET_DEVICE_FD: Ioctl[Struct] = Ioctl(
    "VFIO_GROUP_GET_DEVICE_FD", IO(VFIO_TYPE, VFIO_BASE + 6), argument="string", area="group"
)

with CONSTANTS.defines():
    VFIO_DEVICE_FLAGS_RESET = 1 << 0
    VFIO_DEVICE_FLAGS_PCI = 1 << 1
    VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2
    VFIO_DEVICE_FLAGS_AMBA = 1 << 3
    VFIO_DEVICE_FLAGS_CCW = 1 << 4
    VFIO_DEVICE_FLAGS_AP = 1 << 5
    VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6
    VFIO_DEVICE_FLAGS_CAPS = 1 << 7
    VFIO_DEVICE_FLAGS_CDX = const(1 << 8, since="6.5")


@cstruct()
class vfio_device_info(Struct):
    """What a device is, and how many regions and interrupt indexes it has."""

    argsz: u32
    flags: u32
    num_regions: u32
    num_irqs: u32
    cap_offset: u32
    pad: u32 = since("6.6")


VFIO_DEVICE_GET_INFO = Ioctl(
    "VFIO_DEVICE_GET_INFO", IO(VFIO_TYPE, VFIO_BASE + 7), vfio_device_info, last="num_irqs", area="device"
)

# The kinds of mediated device, as their `device_api` attribute in sysfs says.
VFIO_DEVICE_API_PCI_STRING = "vfio-pci"
VFIO_DEVICE_API_PLATFORM_STRING = "vfio-platform"
VFIO_DEVICE_API_AMBA_STRING = "vfio-amba"
VFIO_DEVICE_API_CCW_STRING = "vfio-ccw"
VFIO_DEVICE_API_AP_STRING = "vfio-ap"

with CONSTANTS.defines():
    VFIO_DEVICE_INFO_CAP_ZPCI_BASE = 1
    VFIO_DEVICE_INFO_CAP_ZPCI_GROUP = 2
    VFIO_DEVICE_INFO_CAP_ZPCI_UTIL = 3
    VFIO_DEVICE_INFO_CAP_ZPCI_PFIP = 4
    VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = const(5, since="6.5")
    VFIO_PCI_ATOMIC_COMP32 = const(1 << 0, since="6.5")
    VFIO_PCI_ATOMIC_COMP64 = const(1 << 1, since="6.5")
    VFIO_PCI_ATOMIC_COMP128 = const(1 << 2, since="6.5")


@cstruct(since="6.5")
class vfio_device_info_cap_pci_atomic_comp(Struct):
    """Which widths of PCIe AtomicOps the path to the root completes."""

    header: vfio_info_cap_header
    flags: u32
    reserved: u32


with CONSTANTS.defines():
    VFIO_REGION_INFO_FLAG_READ = 1 << 0
    VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
    VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
    VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


@cstruct()
class vfio_region_info(Struct):
    """Size, place in the device file and access of one region."""

    argsz: u32
    flags: u32
    index: u32
    cap_offset: u32
    size: aligned_u64 = was(u64, until="6.7")
    offset: aligned_u64 = was(u64, until="6.7")


VFIO_DEVICE_GET_REGION_INFO = Ioctl(
    "VFIO_DEVICE_GET_REGION_INFO", IO(VFIO_TYPE, VFIO_BASE + 8), vfio_region_info, last="offset", area="device"
)

with CONSTANTS.defines():
    VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1


@cstruct()
class vfio_region_sparse_mmap_area(Struct):
    """A part of a region that can be mapped."""

    offset: aligned_u64 = was(u64, until="6.7")
    size: aligned_u64 = was(u64, until="6.7")


@cstruct()
class vfio_region_info_cap_sparse_mmap(Struct):
    """Only these areas of the region can be mapped."""

    header: vfio_info_cap_header
    nr_areas: u32
    reserved: u32
    areas: carray[vfio_region_sparse_mmap_area] = length(0)


with CONSTANTS.defines():
    VFIO_REGION_INFO_CAP_TYPE = 2


@cstruct()
class vfio_region_info_cap_type(Struct):
    """Says what a device-specific region is."""

    header: vfio_info_cap_header
    type: u32
    subtype: u32


with CONSTANTS.defines():
    VFIO_REGION_TYPE_PCI_VENDOR_TYPE = -(1 << 31)  # a C int; in a u32 field it reads 0x80000000
    VFIO_REGION_TYPE_PCI_VENDOR_MASK = 0xFFFF
    VFIO_REGION_TYPE_GFX = 1
    VFIO_REGION_TYPE_CCW = 2
    VFIO_REGION_TYPE_MIGRATION_DEPRECATED = 3
    VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION = 1
    VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG = 2
    VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG = 3
    VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM = 1
    VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD = 1
    VFIO_REGION_SUBTYPE_GFX_EDID = 1
    VFIO_DEVICE_GFX_LINK_STATE_UP = 1
    VFIO_DEVICE_GFX_LINK_STATE_DOWN = 2


@cstruct()
class vfio_region_gfx_edid(Struct):
    """Layout of the EDID region of a virtual GPU."""

    edid_offset: u32
    edid_max_size: u32
    edid_size: u32
    max_xres: u32
    max_yres: u32
    link_state: u32


with CONSTANTS.defines():
    VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD = 1
    VFIO_REGION_SUBTYPE_CCW_SCHIB = 2
    VFIO_REGION_SUBTYPE_CCW_CRW = 3
    VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED = 1
    VFIO_DEVICE_STATE_V1_STOP = 0
    VFIO_DEVICE_STATE_V1_RUNNING = 1 << 0
    VFIO_DEVICE_STATE_V1_SAVING = 1 << 1
    VFIO_DEVICE_STATE_V1_RESUMING = 1 << 2
    VFIO_DEVICE_STATE_MASK = VFIO_DEVICE_STATE_V1_RUNNING | VFIO_DEVICE_STATE_V1_SAVING | VFIO_DEVICE_STATE_V1_RESUMING


@cstruct()
class vfio_device_migration_info(Struct):
    """Layout of the first (withdrawn) migration region."""

    device_state: u32
    reserved: u32
    pending_bytes: aligned_u64 = was(u64, until="6.7")
    data_offset: aligned_u64 = was(u64, until="6.7")
    data_size: aligned_u64 = was(u64, until="6.7")


with CONSTANTS.defines():
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3
    VFIO_REGION_INFO_CAP_NVLINK2_SSATGT = 4


@cstruct()
class vfio_region_info_cap_nvlink2_ssatgt(Struct):
    """The TGT of an NVLink2 region (no longer provided)."""

    header: vfio_info_cap_header
    tgt: aligned_u64 = was(u64, until="6.7")


with CONSTANTS.defines():
    VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD = 5


@cstruct()
class vfio_region_info_cap_nvlink2_lnkspd(Struct):
    """The link speed of an NVLink2 region (no longer provided)."""

    header: vfio_info_cap_header
    link_speed: u32
    __pad: u32


with CONSTANTS.defines():
    VFIO_IRQ_INFO_EVENTFD = 1 << 0
    VFIO_IRQ_INFO_MASKABLE = 1 << 1
    VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
    VFIO_IRQ_INFO_NORESIZE = 1 << 3


@cstruct()
class vfio_irq_info(Struct):
    """What one interrupt index can do, and how many vectors it has."""

    argsz: u32
    flags: u32
    index: u32
    count: u32


VFIO_DEVICE_GET_IRQ_INFO = Ioctl(
    "VFIO_DEVICE_GET_IRQ_INFO", IO(VFIO_TYPE, VFIO_BASE + 9), vfio_irq_info, last="count", area="device"
)

with CONSTANTS.defines():
    VFIO_IRQ_SET_DATA_NONE = 1 << 0
    VFIO_IRQ_SET_DATA_BOOL = 1 << 1
    VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
    VFIO_IRQ_SET_ACTION_MASK = 1 << 3
    VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
    VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


@cstruct()
class vfio_irq_set(Struct):
    """Mask, unmask, trigger or wire up `count` vectors from `start`; `data` by the data flag."""

    argsz: u32
    flags: u32
    index: u32
    start: u32
    count: u32
    data: carray[u8] = length(0)


VFIO_DEVICE_SET_IRQS = Ioctl(
    "VFIO_DEVICE_SET_IRQS", IO(VFIO_TYPE, VFIO_BASE + 10), vfio_irq_set, last="count", area="device"
)

with CONSTANTS.defines():
    VFIO_IRQ_SET_DATA_TYPE_MASK = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD
    VFIO_IRQ_SET_ACTION_TYPE_MASK = VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER

VFIO_DEVICE_RESET: Ioctl[Struct] = Ioctl("VFIO_DEVICE_RESET", IO(VFIO_TYPE, VFIO_BASE + 11), area="device")

with CONSTANTS.enum():
    VFIO_PCI_BAR0_REGION_INDEX = 0
    VFIO_PCI_BAR1_REGION_INDEX = 1
    VFIO_PCI_BAR2_REGION_INDEX = 2
    VFIO_PCI_BAR3_REGION_INDEX = 3
    VFIO_PCI_BAR4_REGION_INDEX = 4
    VFIO_PCI_BAR5_REGION_INDEX = 5
    VFIO_PCI_ROM_REGION_INDEX = 6
    VFIO_PCI_CONFIG_REGION_INDEX = 7
    VFIO_PCI_VGA_REGION_INDEX = 8
    VFIO_PCI_NUM_REGIONS = 9

with CONSTANTS.enum():
    VFIO_PCI_INTX_IRQ_INDEX = 0
    VFIO_PCI_MSI_IRQ_INDEX = 1
    VFIO_PCI_MSIX_IRQ_INDEX = 2
    VFIO_PCI_ERR_IRQ_INDEX = 3
    VFIO_PCI_REQ_IRQ_INDEX = 4
    VFIO_PCI_NUM_IRQS = 5

with CONSTANTS.enum():
    VFIO_CCW_CONFIG_REGION_INDEX = 0
    VFIO_CCW_NUM_REGIONS = 1

with CONSTANTS.enum():
    VFIO_CCW_IO_IRQ_INDEX = 0
    VFIO_CCW_CRW_IRQ_INDEX = 1
    VFIO_CCW_REQ_IRQ_INDEX = 2
    VFIO_CCW_NUM_IRQS = 3

with CONSTANTS.enum(since="6.5"):
    VFIO_AP_REQ_IRQ_INDEX = 0
    VFIO_AP_CFG_CHG_IRQ_INDEX = const(1, since="6.15")
    VFIO_AP_NUM_IRQS = const(2, was=(1, "6.15"))

with CONSTANTS.defines(since="6.6"):
    VFIO_PCI_DEVID_OWNED = 0
    VFIO_PCI_DEVID_NOT_OWNED = -1


@cstruct()
class _dependent_device_id(Union):
    group_id: u32
    devid: u32 = since("6.6")


@cstruct()
class vfio_pci_dependent_device(Struct):
    """A device that a hot reset would also reset."""

    anon0: _dependent_device_id = anonymous(since="6.6")
    segment: u16
    bus: u8
    devfn: u8


with CONSTANTS.defines(since="6.6"):
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1


@cstruct()
class vfio_pci_hot_reset_info(Struct):
    """Every device that a hot reset of this one would reset. `count` returns how many."""

    argsz: u32
    flags: u32
    count: u32
    devices: carray[vfio_pci_dependent_device] = length(0)


VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = Ioctl(
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
    IO(VFIO_TYPE, VFIO_BASE + 12),
    vfio_pci_hot_reset_info,
    last="count",
    area="hot_reset",
)


@cstruct()
class vfio_pci_hot_reset(Struct):
    """Reset the bus or slot, proving ownership by group (or, for a cdev, by nothing: count 0)."""

    argsz: u32
    flags: u32
    count: u32
    group_fds: carray[s32] = length(0)


VFIO_DEVICE_PCI_HOT_RESET = Ioctl(
    "VFIO_DEVICE_PCI_HOT_RESET", IO(VFIO_TYPE, VFIO_BASE + 13), vfio_pci_hot_reset, last="count", area="hot_reset"
)

with CONSTANTS.defines():
    VFIO_GFX_PLANE_TYPE_PROBE = 1 << 0
    VFIO_GFX_PLANE_TYPE_DMABUF = 1 << 1
    VFIO_GFX_PLANE_TYPE_REGION = 1 << 2


@cstruct()
class _gfx_plane_source(Union):
    region_index: u32
    dmabuf_id: u32


@cstruct()
class vfio_device_gfx_plane_info(Struct):
    """One plane of a virtual GPU's display."""

    argsz: u32
    flags: u32
    drm_plane_type: u32
    drm_format: u32
    drm_format_mod: aligned_u64 = was(u64, until="6.7")
    width: u32
    height: u32
    stride: u32
    size: u32
    x_pos: u32
    y_pos: u32
    x_hot: u32
    y_hot: u32
    anon0: _gfx_plane_source = anonymous()
    reserved: u32 = since("6.7")


VFIO_DEVICE_QUERY_GFX_PLANE = Ioctl(
    "VFIO_DEVICE_QUERY_GFX_PLANE", IO(VFIO_TYPE, VFIO_BASE + 14), vfio_device_gfx_plane_info, area="gfx"
)

VFIO_DEVICE_GET_GFX_DMABUF: Ioctl[Struct] = Ioctl(
    "VFIO_DEVICE_GET_GFX_DMABUF", IO(VFIO_TYPE, VFIO_BASE + 15), argument="pointer", area="gfx"
)

with CONSTANTS.defines():
    VFIO_DEVICE_IOEVENTFD_8 = 1 << 0
    VFIO_DEVICE_IOEVENTFD_16 = 1 << 1
    VFIO_DEVICE_IOEVENTFD_32 = 1 << 2
    VFIO_DEVICE_IOEVENTFD_64 = 1 << 3
    VFIO_DEVICE_IOEVENTFD_SIZE_MASK = 0xF


@cstruct()
class vfio_device_ioeventfd(Struct):
    """Write `data` at `offset` of the device file each time the eventfd fires; fd -1 takes it back."""

    argsz: u32
    flags: u32
    offset: aligned_u64 = was(u64, until="6.7")
    data: aligned_u64 = was(u64, until="6.7")
    fd: s32
    reserved: u32 = since("6.7")


VFIO_DEVICE_IOEVENTFD = Ioctl(
    "VFIO_DEVICE_IOEVENTFD", IO(VFIO_TYPE, VFIO_BASE + 16), vfio_device_ioeventfd, last="fd", area="device"
)

with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_MASK = 0xFFFF
    VFIO_DEVICE_FEATURE_GET = 1 << 16
    VFIO_DEVICE_FEATURE_SET = 1 << 17
    VFIO_DEVICE_FEATURE_PROBE = 1 << 18


@cstruct()
class vfio_device_feature(Struct):
    """Read, set or probe one feature; its data follows."""

    argsz: u32
    flags: u32
    data: carray[u8] = length(0)


VFIO_DEVICE_FEATURE = Ioctl(
    "VFIO_DEVICE_FEATURE", IO(VFIO_TYPE, VFIO_BASE + 17), vfio_device_feature, last="flags", area="feature"
)

with CONSTANTS.defines(since="6.17"):
    VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0


@cstruct(since="6.6")
class vfio_device_bind_iommufd(Struct):
    """Bind the device of a cdev file to an iommufd; `out_devid` is its id there."""

    argsz: u32
    flags: u32
    iommufd: s32
    out_devid: u32
    token_uuid_ptr: aligned_u64 = since("6.17")


VFIO_DEVICE_BIND_IOMMUFD = Ioctl(
    "VFIO_DEVICE_BIND_IOMMUFD",
    IO(VFIO_TYPE, VFIO_BASE + 18),
    vfio_device_bind_iommufd,
    last="out_devid",
    since="6.6",
    area="cdev",
)

with CONSTANTS.defines(since="6.15"):
    VFIO_DEVICE_ATTACH_PASID = 1 << 0


@cstruct(since="6.6")
class vfio_device_attach_iommufd_pt(Struct):
    """Attach the bound device, or one PASID of it, to an IOAS or HWPT; `pt_id` returns the HWPT."""

    argsz: u32
    flags: u32
    pt_id: u32
    pasid: u32 = since("6.15")


VFIO_DEVICE_ATTACH_IOMMUFD_PT = Ioctl(
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
    IO(VFIO_TYPE, VFIO_BASE + 19),
    vfio_device_attach_iommufd_pt,
    last="pt_id",
    since="6.6",
    area="cdev",
)

with CONSTANTS.defines(since="6.15"):
    VFIO_DEVICE_DETACH_PASID = 1 << 0


@cstruct(since="6.6")
class vfio_device_detach_iommufd_pt(Struct):
    """Detach the bound device, or one PASID of it."""

    argsz: u32
    flags: u32
    pasid: u32 = since("6.15")


VFIO_DEVICE_DETACH_IOMMUFD_PT = Ioctl(
    "VFIO_DEVICE_DETACH_IOMMUFD_PT",
    IO(VFIO_TYPE, VFIO_BASE + 20),
    vfio_device_detach_iommufd_pt,
    last="flags",
    since="6.6",
    area="cdev",
)

with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0
    VFIO_MIGRATION_STOP_COPY = 1 << 0
    VFIO_MIGRATION_P2P = 1 << 1
    VFIO_MIGRATION_PRE_COPY = const(1 << 2, since="6.2")


@cstruct()
class vfio_device_feature_migration(Struct):
    """Which migration states the device has."""

    flags: aligned_u64


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_MIGRATION = 1


@cstruct()
class vfio_device_feature_mig_state(Struct):
    """The migration state of the device, and the stream's descriptor."""

    device_state: u32
    data_fd: s32


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2

with CONSTANTS.enum("vfio_device_mig_state"):
    VFIO_DEVICE_STATE_ERROR = 0
    VFIO_DEVICE_STATE_STOP = 1
    VFIO_DEVICE_STATE_RUNNING = 2
    VFIO_DEVICE_STATE_STOP_COPY = 3
    VFIO_DEVICE_STATE_RESUMING = 4
    VFIO_DEVICE_STATE_RUNNING_P2P = 5
    VFIO_DEVICE_STATE_PRE_COPY = const(6, since="6.2")
    VFIO_DEVICE_STATE_PRE_COPY_P2P = const(7, since="6.2")
    VFIO_DEVICE_STATE_NR = const(8, since="6.8")

with CONSTANTS.defines(since="7.2"):
    VFIO_PRECOPY_INFO_REINIT = 1 << 0


@cstruct(since="6.2")
class vfio_precopy_info(Struct):
    """Asked on a migration stream: how much is left to pre-copy."""

    argsz: u32
    flags: u32
    initial_bytes: aligned_u64
    dirty_bytes: aligned_u64


VFIO_MIG_GET_PRECOPY_INFO = Ioctl(
    "VFIO_MIG_GET_PRECOPY_INFO",
    IO(VFIO_TYPE, VFIO_BASE + 21),
    vfio_precopy_info,
    last="dirty_bytes",
    since="6.2",
    area="migration",
)

with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3


@cstruct()
class vfio_device_low_power_entry_with_wakeup(Struct):
    """Enter low power; the eventfd fires when the device wakes."""

    wakeup_eventfd: s32
    reserved: u32


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5


@cstruct()
class vfio_device_feature_dma_logging_control(Struct):
    """Start logging the device's DMA writes in an array of ranges."""

    page_size: aligned_u64
    num_ranges: u32
    __reserved: u32
    ranges: aligned_u64


@cstruct()
class vfio_device_feature_dma_logging_range(Struct):
    """One range to be logged."""

    iova: aligned_u64
    length: aligned_u64


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7


@cstruct()
class vfio_device_feature_dma_logging_report(Struct):
    """Read and clear the log of a range; one bit a `page_size`."""

    iova: aligned_u64
    length: aligned_u64
    page_size: aligned_u64
    bitmap: aligned_u64


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8


@cstruct(since="6.2")
class vfio_device_feature_mig_data_size(Struct):
    """An estimate of the bytes that a stop-copy would transfer."""

    stop_copy_length: aligned_u64


with CONSTANTS.defines(since="6.2"):
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
    VFIO_DEVICE_FEATURE_CLEAR_MASTER = const(0, since="6.7")
    VFIO_DEVICE_FEATURE_SET_MASTER = const(1, since="6.7")


@cstruct(since="6.7")
class vfio_device_feature_bus_master(Struct):
    """Set or clear bus mastering."""

    op: u32


with CONSTANTS.defines(since="6.7"):
    VFIO_DEVICE_FEATURE_BUS_MASTER = 10
    VFIO_DEVICE_FEATURE_DMA_BUF = const(11, since="6.19")


@cstruct(since="6.19")
class vfio_region_dma_range(Struct):
    """A part of a region to be exported."""

    offset: u64
    length: u64


@cstruct(since="6.19")
class vfio_device_feature_dma_buf(Struct):
    """Export parts of a BAR as a dma-buf; the call returns the descriptor."""

    region_index: u32
    open_flags: u32
    flags: u32
    nr_ranges: u32
    dma_ranges: carray[vfio_region_dma_range] = length(0)


with CONSTANTS.defines(since="7.2"):
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12


@cstruct(since="7.3")
class vfio_device_feature_zpci_err(Struct):
    """Where to put the error description of an s390 PCI function."""

    data: aligned_u64


with CONSTANTS.defines():
    VFIO_DEVICE_FEATURE_ZPCI_ERROR = const(13, since="7.3")
    VFIO_IOMMU_INFO_PGSIZES = 1 << 0
    VFIO_IOMMU_INFO_CAPS = 1 << 1


@cstruct()
class vfio_iommu_type1_info(Struct):
    """What a type1 container's IOMMU can do."""

    argsz: u32
    flags: u32
    iova_pgsizes: aligned_u64 = was(u64, until="6.7")
    cap_offset: u32
    pad: u32 = since("6.6")


with CONSTANTS.defines():
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1


@cstruct()
class vfio_iova_range(Struct):
    """A usable IOVA range; `end` is its last byte."""

    start: u64
    end: u64


@cstruct()
class vfio_iommu_type1_info_cap_iova_range(Struct):
    """The IOVA ranges that the container may map."""

    header: vfio_info_cap_header
    nr_iovas: u32
    reserved: u32
    iova_ranges: carray[vfio_iova_range] = length(0)


with CONSTANTS.defines():
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2


@cstruct()
class vfio_iommu_type1_info_cap_migration(Struct):
    """Page sizes and the largest bitmap of the container's dirty log."""

    header: vfio_info_cap_header
    flags: u32
    pgsize_bitmap: u64
    max_dirty_bitmap_size: u64


with CONSTANTS.defines():
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3


@cstruct()
class vfio_iommu_type1_info_dma_avail(Struct):
    """How many more mappings the container may hold."""

    header: vfio_info_cap_header
    avail: u32


VFIO_IOMMU_GET_INFO = Ioctl(
    "VFIO_IOMMU_GET_INFO", IO(VFIO_TYPE, VFIO_BASE + 12), vfio_iommu_type1_info, last="iova_pgsizes", area="type1"
)

with CONSTANTS.defines():
    VFIO_DMA_MAP_FLAG_READ = 1 << 0
    VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
    VFIO_DMA_MAP_FLAG_VADDR = 1 << 2


@cstruct()
class vfio_iommu_type1_dma_map(Struct):
    """Map memory of the calling process into a container."""

    argsz: u32
    flags: u32
    vaddr: u64
    iova: u64
    size: u64


VFIO_IOMMU_MAP_DMA = Ioctl(
    "VFIO_IOMMU_MAP_DMA", IO(VFIO_TYPE, VFIO_BASE + 13), vfio_iommu_type1_dma_map, last="size", area="type1"
)


@cstruct()
class vfio_bitmap(Struct):
    """A dirty bitmap in client memory: one bit a `pgsize`, `size` bytes."""

    pgsize: u64
    size: u64
    data: u64_ptr


with CONSTANTS.defines():
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
    VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
    VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2


@cstruct()
class vfio_iommu_type1_dma_unmap(Struct):
    """Unmap a range of a container; a `vfio_bitmap` may follow."""

    argsz: u32
    flags: u32
    iova: u64
    size: u64
    data: carray[u8] = length(0)


VFIO_IOMMU_UNMAP_DMA = Ioctl(
    "VFIO_IOMMU_UNMAP_DMA", IO(VFIO_TYPE, VFIO_BASE + 14), vfio_iommu_type1_dma_unmap, last="size", area="type1"
)

VFIO_IOMMU_ENABLE: Ioctl[Struct] = Ioctl("VFIO_IOMMU_ENABLE", IO(VFIO_TYPE, VFIO_BASE + 15), area="spapr")

VFIO_IOMMU_DISABLE: Ioctl[Struct] = Ioctl("VFIO_IOMMU_DISABLE", IO(VFIO_TYPE, VFIO_BASE + 16), area="spapr")

with CONSTANTS.defines():
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


@cstruct()
class vfio_iommu_type1_dirty_bitmap(Struct):
    """Start, stop or read the container's dirty log; to read, a range follows."""

    argsz: u32
    flags: u32
    data: carray[u8] = length(0)


@cstruct()
class vfio_iommu_type1_dirty_bitmap_get(Struct):
    """The range of the container's dirty log to be read."""

    iova: u64
    size: u64
    bitmap: vfio_bitmap


VFIO_IOMMU_DIRTY_PAGES = Ioctl(
    "VFIO_IOMMU_DIRTY_PAGES", IO(VFIO_TYPE, VFIO_BASE + 17), vfio_iommu_type1_dirty_bitmap, last="flags", area="type1"
)


@cstruct()
class vfio_iommu_spapr_tce_ddw_info(Struct):
    """Dynamic DMA windows of a POWER server."""

    pgsizes: u64
    max_dynamic_windows_supported: u32
    levels: u32


with CONSTANTS.defines():
    VFIO_IOMMU_SPAPR_INFO_DDW = 1 << 0


@cstruct()
class vfio_iommu_spapr_tce_info(Struct):
    """The 32-bit DMA window of a POWER server."""

    argsz: u32
    flags: u32
    dma32_window_start: u32
    dma32_window_size: u32
    ddw: vfio_iommu_spapr_tce_ddw_info


VFIO_IOMMU_SPAPR_TCE_GET_INFO = Ioctl(
    "VFIO_IOMMU_SPAPR_TCE_GET_INFO",
    IO(VFIO_TYPE, VFIO_BASE + 12),
    vfio_iommu_spapr_tce_info,
    last="dma32_window_size",
    area="spapr",
)


@cstruct()
class vfio_eeh_pe_err(Struct):
    """A PCI error to be injected."""

    type: u32
    func: u32
    addr: u64
    mask: u64


@cstruct()
class _eeh_pe_data(Union):
    err: vfio_eeh_pe_err


@cstruct()
class vfio_eeh_pe_op(Struct):
    """An operation on a POWER partitionable endpoint."""

    argsz: u32
    flags: u32
    op: u32
    anon0: _eeh_pe_data = anonymous()


with CONSTANTS.defines():
    VFIO_EEH_PE_DISABLE = 0
    VFIO_EEH_PE_ENABLE = 1
    VFIO_EEH_PE_UNFREEZE_IO = 2
    VFIO_EEH_PE_UNFREEZE_DMA = 3
    VFIO_EEH_PE_GET_STATE = 4
    VFIO_EEH_PE_STATE_NORMAL = 0
    VFIO_EEH_PE_STATE_RESET = 1
    VFIO_EEH_PE_STATE_STOPPED = 2
    VFIO_EEH_PE_STATE_STOPPED_DMA = 4
    VFIO_EEH_PE_STATE_UNAVAIL = 5
    VFIO_EEH_PE_RESET_DEACTIVATE = 5
    VFIO_EEH_PE_RESET_HOT = 6
    VFIO_EEH_PE_RESET_FUNDAMENTAL = 7
    VFIO_EEH_PE_CONFIGURE = 8
    VFIO_EEH_PE_INJECT_ERR = 9

VFIO_EEH_PE_OP = Ioctl("VFIO_EEH_PE_OP", IO(VFIO_TYPE, VFIO_BASE + 21), vfio_eeh_pe_op, last="op", area="spapr")


@cstruct()
class vfio_iommu_spapr_register_memory(Struct):
    """Pin memory in advance, or let it go."""

    argsz: u32
    flags: u32
    vaddr: u64
    size: u64


VFIO_IOMMU_SPAPR_REGISTER_MEMORY = Ioctl(
    "VFIO_IOMMU_SPAPR_REGISTER_MEMORY",
    IO(VFIO_TYPE, VFIO_BASE + 17),
    vfio_iommu_spapr_register_memory,
    last="size",
    area="spapr",
)

VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY = Ioctl(
    "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY",
    IO(VFIO_TYPE, VFIO_BASE + 18),
    vfio_iommu_spapr_register_memory,
    last="size",
    area="spapr",
)


@cstruct()
class vfio_iommu_spapr_tce_create(Struct):
    """Make a DMA window; `start_addr` returns where it lies."""

    argsz: u32
    flags: u32
    page_shift: u32
    __resv1: u32
    window_size: u64
    levels: u32
    __resv2: u32
    start_addr: u64


VFIO_IOMMU_SPAPR_TCE_CREATE = Ioctl(
    "VFIO_IOMMU_SPAPR_TCE_CREATE",
    IO(VFIO_TYPE, VFIO_BASE + 19),
    vfio_iommu_spapr_tce_create,
    last="start_addr",
    area="spapr",
)


@cstruct()
class vfio_iommu_spapr_tce_remove(Struct):
    """Remove a DMA window."""

    argsz: u32
    flags: u32
    start_addr: u64


VFIO_IOMMU_SPAPR_TCE_REMOVE = Ioctl(
    "VFIO_IOMMU_SPAPR_TCE_REMOVE",
    IO(VFIO_TYPE, VFIO_BASE + 20),
    vfio_iommu_spapr_tce_remove,
    last="start_addr",
    area="spapr",
)
