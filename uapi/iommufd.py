"""The ABI of /dev/iommu: linux/iommufd.h at Linux 7.3, each thing once, in the header's order.

Mirrors include/uapi/linux/iommufd.h; what each field means in detail is in its kernel-doc. Left out: nothing.

`since` is the first of the sampled releases (`uapi/history`) whose header has the thing. 7.0 and 7.1 were not sampled:
"7.2" may be either.

A declaration file: it is as long as the header it mirrors.
"""

from ioctl_opt import IO

from uapi.constants import Constants, const
from uapi.cstruct import (
    Struct,
    Union,
    Was,
    aligned_le64,
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
    was,
)
from uapi.ioctl import Ioctl

HEADER = "linux/iommufd.h"
CONSTANTS = Constants(__name__)

with CONSTANTS.defines(since="6.2"):
    IOMMUFD_TYPE = ord(";")

with CONSTANTS.enum(since="6.2"):
    IOMMUFD_CMD_BASE = 0x80
    IOMMUFD_CMD_DESTROY = IOMMUFD_CMD_BASE
    IOMMUFD_CMD_IOAS_ALLOC = 0x81
    IOMMUFD_CMD_IOAS_ALLOW_IOVAS = 0x82
    IOMMUFD_CMD_IOAS_COPY = 0x83
    IOMMUFD_CMD_IOAS_IOVA_RANGES = 0x84
    IOMMUFD_CMD_IOAS_MAP = 0x85
    IOMMUFD_CMD_IOAS_UNMAP = 0x86
    IOMMUFD_CMD_OPTION = 0x87
    IOMMUFD_CMD_VFIO_IOAS = 0x88
    IOMMUFD_CMD_HWPT_ALLOC = const(0x89, since="6.6")
    IOMMUFD_CMD_GET_HW_INFO = const(0x8A, since="6.6")
    IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING = const(0x8B, since="6.7")
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP = const(0x8C, since="6.7")
    IOMMUFD_CMD_HWPT_INVALIDATE = const(0x8D, since="6.8")
    IOMMUFD_CMD_FAULT_QUEUE_ALLOC = const(0x8E, since="6.11")
    IOMMUFD_CMD_IOAS_MAP_FILE = const(0x8F, since="6.13")
    IOMMUFD_CMD_VIOMMU_ALLOC = const(0x90, since="6.13")
    IOMMUFD_CMD_VDEVICE_ALLOC = const(0x91, since="6.13")
    IOMMUFD_CMD_IOAS_CHANGE_PROCESS = const(0x92, since="6.13")
    IOMMUFD_CMD_VEVENTQ_ALLOC = const(0x93, since="6.15")
    IOMMUFD_CMD_HW_QUEUE_ALLOC = const(0x94, since="6.17")
    IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA = const(0x95, since="7.3")


@cstruct(since="6.2")
class iommu_destroy(Struct):
    """Destroy any object of this iommufd by its id."""

    size: u32
    id: u32


IOMMU_DESTROY = Ioctl(
    "IOMMU_DESTROY", IO(IOMMUFD_TYPE, IOMMUFD_CMD_DESTROY), iommu_destroy, last="id", since="6.2", area="object"
)


@cstruct(since="6.2")
class iommu_ioas_alloc(Struct):
    """Make an empty IO address space."""

    size: u32
    flags: u32
    out_ioas_id: u32


IOMMU_IOAS_ALLOC = Ioctl(
    "IOMMU_IOAS_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_ALLOC),
    iommu_ioas_alloc,
    last="out_ioas_id",
    since="6.2",
    area="ioas",
)


@cstruct(since="6.2")
class iommu_iova_range(Struct):
    """A range of IO virtual addresses; `last` is its last byte."""

    start: aligned_u64
    last: aligned_u64


@cstruct(since="6.2")
class iommu_ioas_iova_ranges(Struct):
    """Ask where an IOAS may be mapped. `num_iovas` is room on input and need on output."""

    size: u32
    ioas_id: u32
    num_iovas: u32
    __reserved: u32
    allowed_iovas: aligned_u64
    out_iova_alignment: aligned_u64


IOMMU_IOAS_IOVA_RANGES = Ioctl(
    "IOMMU_IOAS_IOVA_RANGES",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_IOVA_RANGES),
    iommu_ioas_iova_ranges,
    last="out_iova_alignment",
    since="6.2",
    area="ioas",
)


@cstruct(since="6.2")
class iommu_ioas_allow_iovas(Struct):
    """Promise ranges to an IOAS: automatic placement stays inside, no device may narrow them."""

    size: u32
    ioas_id: u32
    num_iovas: u32
    __reserved: u32
    allowed_iovas: aligned_u64


IOMMU_IOAS_ALLOW_IOVAS = Ioctl(
    "IOMMU_IOAS_ALLOW_IOVAS",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_ALLOW_IOVAS),
    iommu_ioas_allow_iovas,
    last="allowed_iovas",
    since="6.2",
    area="ioas",
)

with CONSTANTS.enum("iommufd_ioas_map_flags", since="6.2"):
    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
    IOMMU_IOAS_MAP_READABLE = 1 << 2


@cstruct(since="6.2")
class iommu_ioas_map(Struct):
    """Map memory of the calling process into an IOAS."""

    size: u32
    flags: u32
    ioas_id: u32
    __reserved: u32
    user_va: aligned_u64
    length: aligned_u64
    iova: aligned_u64


IOMMU_IOAS_MAP = Ioctl(
    "IOMMU_IOAS_MAP", IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_MAP), iommu_ioas_map, last="iova", since="6.2", area="ioas"
)


@cstruct(since="7.3")
class iommu_ioas_noiommu_get_pa(Struct):
    """Ask for the physical address behind an IOVA, for devices that do DMA without an IOMMU."""

    size: u32
    flags: u32
    ioas_id: u32
    __reserved: u32
    iova: aligned_u64
    length: aligned_u64
    out_phys: aligned_u64


IOMMU_IOAS_NOIOMMU_GET_PA = Ioctl(
    "IOMMU_IOAS_NOIOMMU_GET_PA",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA),
    iommu_ioas_noiommu_get_pa,
    last="out_phys",
    since="7.3",
    area="noiommu",
)


@cstruct(since="6.13")
class iommu_ioas_map_file(Struct):
    """Map a memfd, or a dma-buf that the kernel accepts, into an IOAS."""

    size: u32
    flags: u32
    ioas_id: u32
    fd: s32
    start: aligned_u64
    length: aligned_u64
    iova: aligned_u64


IOMMU_IOAS_MAP_FILE = Ioctl(
    "IOMMU_IOAS_MAP_FILE",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_MAP_FILE),
    iommu_ioas_map_file,
    last="iova",
    since="6.13",
    area="ioas",
)


@cstruct(since="6.2")
class iommu_ioas_copy(Struct):
    """Map what one IOAS has mapped into another (or the same) one, sharing the pinned pages."""

    size: u32
    flags: u32
    dst_ioas_id: u32
    src_ioas_id: u32
    length: aligned_u64
    dst_iova: aligned_u64
    src_iova: aligned_u64


IOMMU_IOAS_COPY = Ioctl(
    "IOMMU_IOAS_COPY",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_COPY),
    iommu_ioas_copy,
    last="src_iova",
    since="6.2",
    area="ioas",
)


@cstruct(since="6.2")
class iommu_ioas_unmap(Struct):
    """Unmap whole mappings; `length` says how many bytes went. 0 with U64_MAX means everything."""

    size: u32
    ioas_id: u32
    iova: aligned_u64
    length: aligned_u64


IOMMU_IOAS_UNMAP = Ioctl(
    "IOMMU_IOAS_UNMAP",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_UNMAP),
    iommu_ioas_unmap,
    last="length",
    since="6.2",
    area="ioas",
)

with CONSTANTS.enum("iommufd_option", since="6.2"):
    IOMMU_OPTION_RLIMIT_MODE = 0
    IOMMU_OPTION_HUGE_PAGES = 1

with CONSTANTS.enum("iommufd_option_ops", since="6.2"):
    IOMMU_OPTION_OP_SET = 0
    IOMMU_OPTION_OP_GET = 1


@cstruct(since="6.2")
class iommu_option(Struct):
    """Read or set an option of the context or of an object."""

    size: u32
    option_id: u32
    op: u16
    __reserved: u16
    object_id: u32
    val64: aligned_u64


IOMMU_OPTION = Ioctl(
    "IOMMU_OPTION", IO(IOMMUFD_TYPE, IOMMUFD_CMD_OPTION), iommu_option, last="val64", since="6.2", area="object"
)

with CONSTANTS.enum("iommufd_vfio_ioas_op", since="6.2"):
    IOMMU_VFIO_IOAS_GET = 0
    IOMMU_VFIO_IOAS_SET = 1
    IOMMU_VFIO_IOAS_CLEAR = 2


@cstruct(since="6.2")
class iommu_vfio_ioas(Struct):
    """Read, set or clear the IOAS that VFIO's container calls on this iommufd use."""

    size: u32
    ioas_id: u32
    op: u16
    __reserved: u16


IOMMU_VFIO_IOAS = Ioctl(
    "IOMMU_VFIO_IOAS",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_VFIO_IOAS),
    iommu_vfio_ioas,
    last="__reserved",
    since="6.2",
    area="vfio_compat",
)

with CONSTANTS.enum("iommufd_hwpt_alloc_flags", since="6.7"):
    IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
    IOMMU_HWPT_FAULT_ID_VALID = const(1 << 2, since="6.11")
    IOMMU_HWPT_ALLOC_PASID = const(1 << 3, since="6.13")

with CONSTANTS.enum("iommu_hwpt_vtd_s1_flags", since="6.7"):
    IOMMU_VTD_S1_SRE = 1 << 0
    IOMMU_VTD_S1_EAFE = 1 << 1
    IOMMU_VTD_S1_WPE = 1 << 2


@cstruct(since="6.7")
class iommu_hwpt_vtd_s1(Struct):
    """A guest's VT-d first-stage table, as data of IOMMU_HWPT_ALLOC. `addr_width` is in bits."""

    flags: aligned_u64
    pgtbl_addr: aligned_u64
    addr_width: u32
    __reserved: u32


@cstruct(since="6.13")
class iommu_hwpt_arm_smmuv3(Struct):
    """The first two words of a guest's SMMUv3 stream table entry, as data of IOMMU_HWPT_ALLOC."""

    ste: carray[aligned_le64] = length(2)


@cstruct(since="7.2")
class iommu_hwpt_amd_guest(Struct):
    """A guest's AMD device table entry, as data of IOMMU_HWPT_ALLOC."""

    dte: carray[aligned_u64] = length(4)


with CONSTANTS.enum("iommu_hwpt_data_type", since="6.7"):
    IOMMU_HWPT_DATA_NONE = 0
    IOMMU_HWPT_DATA_VTD_S1 = 1
    IOMMU_HWPT_DATA_ARM_SMMUV3 = const(2, since="6.13")
    IOMMU_HWPT_DATA_AMD_GUEST = const(3, since="7.2")


@cstruct(since="6.6")
class iommu_hwpt_alloc(Struct):
    """Make a hardware page table: `pt_id` is an IOAS (paging), or a HWPT or vIOMMU (nested)."""

    size: u32
    flags: u32
    dev_id: u32
    pt_id: u32
    out_hwpt_id: u32
    __reserved: u32
    data_type: u32 = since("6.7")
    data_len: u32 = since("6.7")
    data_uptr: aligned_u64 = since("6.7")
    fault_id: u32 = since("6.11")
    __reserved2: u32 = since("6.11")


IOMMU_HWPT_ALLOC = Ioctl(
    "IOMMU_HWPT_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_ALLOC),
    iommu_hwpt_alloc,
    last="__reserved",
    since="6.6",
    area="hwpt",
)

with CONSTANTS.enum("iommu_hw_info_vtd_flags", since="6.7"):
    IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0


@cstruct(since="6.6")
class iommu_hw_info_vtd(Struct):
    """The capability registers of a VT-d unit."""

    flags: u32
    __reserved: u32
    cap_reg: aligned_u64
    ecap_reg: aligned_u64


with CONSTANTS.enum("iommu_hw_info_arm_smmuv3_flags", since="7.3"):
    IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI = 1 << 0


@cstruct(since="6.13")
class iommu_hw_info_arm_smmuv3(Struct):
    """The identification registers of an SMMUv3."""

    flags: u32
    __reserved: u32
    idr: carray[u32] = length(6)
    iidr: u32
    aidr: u32


@cstruct(since="6.17")
class iommu_hw_info_tegra241_cmdqv(Struct):
    """Fields of the CMDQ-V PARAM register of a Tegra241."""

    flags: u32
    version: u8
    log2vcmdqs: u8
    log2vsids: u8
    __reserved: u8


@cstruct(since="7.2")
class iommu_hw_info_amd(Struct):
    """The two extended feature registers of an AMD IOMMU."""

    efr: aligned_u64
    efr2: aligned_u64


with CONSTANTS.enum("iommu_hw_info_type", since="6.6"):
    IOMMU_HW_INFO_TYPE_NONE = 0
    IOMMU_HW_INFO_TYPE_DEFAULT = const(0, since="6.17")
    IOMMU_HW_INFO_TYPE_INTEL_VTD = 1
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = const(2, since="6.13")
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = const(3, since="6.17")
    IOMMU_HW_INFO_TYPE_AMD = const(4, since="7.2")

with CONSTANTS.enum("iommufd_hw_capabilities", since="6.7"):
    IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
    IOMMU_HW_CAP_PCI_PASID_EXEC = const(1 << 1, since="6.15", backports=("6.12.95",))
    IOMMU_HW_CAP_PCI_PASID_PRIV = const(1 << 2, since="6.15", backports=("6.12.95",))
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = const(1 << 3, since="7.2")

with CONSTANTS.enum("iommufd_hw_info_flags", since="6.17"):
    IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0


@cstruct()
class _hw_info_type(Union):
    in_data_type: u32 = since("6.17")
    out_data_type: u32


@cstruct(since="6.6")
class iommu_hw_info(Struct):
    """Ask what IOMMU a bound device is behind. `data_len` is room on input, the kernel's length on output."""

    size: u32
    flags: u32
    dev_id: u32
    data_len: u32
    data_uptr: aligned_u64
    anon0: _hw_info_type = anonymous(since="6.17")
    out_max_pasid_log2: u8 = since("6.15", backports=("6.12.95",))
    __reserved: carray[u8] = length(3, was=Was(u32, until="6.15", backports=("6.12.95",)))
    out_capabilities: aligned_u64 = since("6.7")


IOMMU_GET_HW_INFO = Ioctl(
    "IOMMU_GET_HW_INFO",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_GET_HW_INFO),
    iommu_hw_info,
    last="__reserved",
    since="6.6",
    area="hw_info",
)

with CONSTANTS.enum("iommufd_hwpt_set_dirty_tracking_flags", since="6.7"):
    IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1


@cstruct(since="6.7")
class iommu_hwpt_set_dirty_tracking(Struct):
    """Turn dirty tracking of a HWPT on or off."""

    size: u32
    flags: u32
    hwpt_id: u32
    __reserved: u32


IOMMU_HWPT_SET_DIRTY_TRACKING = Ioctl(
    "IOMMU_HWPT_SET_DIRTY_TRACKING",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING),
    iommu_hwpt_set_dirty_tracking,
    last="__reserved",
    since="6.7",
    area="dirty",
)

with CONSTANTS.enum("iommufd_hwpt_get_dirty_bitmap_flags", since="6.7"):
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1


@cstruct(since="6.7")
class iommu_hwpt_get_dirty_bitmap(Struct):
    """Read, and by default clear, the dirty bits of an IOVA range; one bit a `page_size`."""

    size: u32
    hwpt_id: u32
    flags: u32
    __reserved: u32
    iova: aligned_u64
    length: aligned_u64
    page_size: aligned_u64
    data: aligned_u64


IOMMU_HWPT_GET_DIRTY_BITMAP = Ioctl(
    "IOMMU_HWPT_GET_DIRTY_BITMAP",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP),
    iommu_hwpt_get_dirty_bitmap,
    last="data",
    since="6.7",
    area="dirty",
)

with CONSTANTS.enum("iommu_hwpt_invalidate_data_type", since="6.8"):
    IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = const(1, since="6.13")

with CONSTANTS.enum("iommu_hwpt_vtd_s1_invalidate_flags", since="6.8"):
    IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0


@cstruct(since="6.8")
class iommu_hwpt_vtd_s1_invalidate(Struct):
    """An invalidation of a guest's VT-d table; address 0 with U64_MAX pages means all of it."""

    addr: aligned_u64
    npages: aligned_u64
    flags: u32
    __reserved: u32


@cstruct(since="6.13")
class iommu_viommu_arm_smmuv3_invalidate(Struct):
    """One invalidation command of the guest's SMMUv3 queue, little-endian."""

    cmd: carray[aligned_le64] = length(2)


@cstruct(since="6.8")
class iommu_hwpt_invalidate(Struct):
    """Hand an array of invalidations to a nested HWPT or vIOMMU; `entry_num` returns how many were done."""

    size: u32
    hwpt_id: u32
    data_uptr: aligned_u64
    data_type: u32
    entry_len: u32
    entry_num: u32
    __reserved: u32


IOMMU_HWPT_INVALIDATE = Ioctl(
    "IOMMU_HWPT_INVALIDATE",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_HWPT_INVALIDATE),
    iommu_hwpt_invalidate,
    last="__reserved",
    since="6.8",
    area="nesting",
)

with CONSTANTS.enum("iommu_hwpt_pgfault_flags", since="6.11"):
    IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0
    IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1

with CONSTANTS.enum("iommu_hwpt_pgfault_perm", since="6.11"):
    IOMMU_PGFAULT_PERM_READ = 1 << 0
    IOMMU_PGFAULT_PERM_WRITE = 1 << 1
    IOMMU_PGFAULT_PERM_EXEC = 1 << 2
    IOMMU_PGFAULT_PERM_PRIV = 1 << 3


@cstruct(since="6.11")
class iommu_hwpt_pgfault(Struct):
    """One page request, as read from a fault queue."""

    flags: u32
    dev_id: u32
    pasid: u32
    grpid: u32
    perm: u32
    __reserved: u32 = since("6.14", backports=("6.13.4", "6.12.95"))
    addr: aligned_u64 = was(u64, until="6.14", backports=("6.13.4", "6.12.95"))
    length: u32
    cookie: u32


with CONSTANTS.enum("iommufd_page_response_code", since="6.11"):
    IOMMUFD_PAGE_RESP_SUCCESS = 0
    IOMMUFD_PAGE_RESP_INVALID = 1


@cstruct(since="6.11")
class iommu_hwpt_page_response(Struct):
    """The answer to a page request group, as written to a fault queue."""

    cookie: u32
    code: u32


@cstruct(since="6.11")
class iommu_fault_alloc(Struct):
    """Make a fault queue and a descriptor to read and answer it."""

    size: u32
    flags: u32
    out_fault_id: u32
    out_fault_fd: u32


IOMMU_FAULT_QUEUE_ALLOC = Ioctl(
    "IOMMU_FAULT_QUEUE_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_FAULT_QUEUE_ALLOC),
    iommu_fault_alloc,
    last="out_fault_fd",
    since="6.11",
    area="fault",
)

with CONSTANTS.enum("iommu_viommu_type", since="6.13"):
    IOMMU_VIOMMU_TYPE_DEFAULT = 0
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = const(2, since="6.17")


@cstruct(since="6.17")
class iommu_viommu_tegra241_cmdqv(Struct):
    """Where to mmap the first page of a Tegra241 virtual interface; filled by IOMMU_VIOMMU_ALLOC."""

    out_vintf_mmap_offset: aligned_u64
    out_vintf_mmap_length: aligned_u64


@cstruct(since="6.13")
class iommu_viommu_alloc(Struct):
    """Make a virtual IOMMU: a slice of the IOMMU that `dev_id` is behind, on a nesting parent."""

    size: u32
    flags: u32
    type: u32
    dev_id: u32
    hwpt_id: u32
    out_viommu_id: u32
    data_len: u32 = since("6.17")
    __reserved: u32 = since("6.17")
    data_uptr: aligned_u64 = since("6.17")


IOMMU_VIOMMU_ALLOC = Ioctl(
    "IOMMU_VIOMMU_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_VIOMMU_ALLOC),
    iommu_viommu_alloc,
    last="out_viommu_id",
    since="6.13",
    area="viommu",
)


@cstruct(since="6.13")
class iommu_vdevice_alloc(Struct):
    """Give a device its id in the guest (`virt_id`: stream id, device id or requester id)."""

    size: u32
    viommu_id: u32
    dev_id: u32
    out_vdevice_id: u32
    virt_id: aligned_u64


IOMMU_VDEVICE_ALLOC = Ioctl(
    "IOMMU_VDEVICE_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_VDEVICE_ALLOC),
    iommu_vdevice_alloc,
    last="virt_id",
    since="6.13",
    area="viommu",
)


@cstruct(since="6.13")
class iommu_ioas_change_process(Struct):
    """Charge the pinned memory of every file mapping to the calling process."""

    size: u32
    __reserved: u32


IOMMU_IOAS_CHANGE_PROCESS = Ioctl(
    "IOMMU_IOAS_CHANGE_PROCESS",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_IOAS_CHANGE_PROCESS),
    iommu_ioas_change_process,
    last="__reserved",
    since="6.13",
    area="ioas",
)

with CONSTANTS.enum("iommu_veventq_flag", since="6.15"):
    IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0


@cstruct(since="6.15")
class iommufd_vevent_header(Struct):
    """Stands before each event in an event queue. A gap in `sequence` is a loss."""

    flags: u32
    sequence: u32


with CONSTANTS.enum("iommu_veventq_type", since="6.15"):
    IOMMU_VEVENTQ_TYPE_DEFAULT = 0
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = const(2, since="6.17")


@cstruct(since="6.15")
class iommu_vevent_arm_smmuv3(Struct):
    """An SMMUv3 event record for the guest, little-endian."""

    evt: carray[aligned_le64] = length(4)


@cstruct(since="6.17")
class iommu_vevent_tegra241_cmdqv(Struct):
    """The error map of a Tegra241 virtual interface."""

    lvcmdq_err_map: carray[aligned_le64] = length(2)


@cstruct(since="6.15")
class iommu_veventq_alloc(Struct):
    """Make an event queue of a vIOMMU, of at most `veventq_depth` events, and its descriptor."""

    size: u32
    flags: u32
    viommu_id: u32
    type: u32
    veventq_depth: u32
    out_veventq_id: u32
    out_veventq_fd: u32
    __reserved: u32


IOMMU_VEVENTQ_ALLOC = Ioctl(
    "IOMMU_VEVENTQ_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_VEVENTQ_ALLOC),
    iommu_veventq_alloc,
    last="out_veventq_fd",
    since="6.15",
    area="viommu",
)

with CONSTANTS.enum("iommu_hw_queue_type", since="6.17"):
    IOMMU_HW_QUEUE_TYPE_DEFAULT = 0
    IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1


@cstruct(since="6.17")
class iommu_hw_queue_alloc(Struct):
    """Let the hardware of a vIOMMU use a queue in guest memory."""

    size: u32
    flags: u32
    viommu_id: u32
    type: u32
    index: u32
    out_hw_queue_id: u32
    nesting_parent_iova: aligned_u64
    length: aligned_u64


IOMMU_HW_QUEUE_ALLOC = Ioctl(
    "IOMMU_HW_QUEUE_ALLOC",
    IO(IOMMUFD_TYPE, IOMMUFD_CMD_HW_QUEUE_ALLOC),
    iommu_hw_queue_alloc,
    last="length",
    since="6.17",
    area="viommu",
)
